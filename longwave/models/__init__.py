"""Backbones, the heads over them, generation and storage."""

from longwave.models.autoencoder import Autoencoder
from longwave.models.backbone import Backbone, BackboneState, Block, ParallelBlock
from longwave.models.classifier import Classifier, PairClassifier
from longwave.models.distill import Distilled, distill
from longwave.models.embedding import TypedEmbedding
from longwave.models.generate import Sampling, Stream, generate, stream
from longwave.models.lm import LM
from longwave.models.masked_lm import MaskedLM, MaskedLMHead
from longwave.models.regressor import Forecaster, Regressor
from longwave.models.sashimi import Level, Sashimi, SashimiState
from longwave.models.spec import (
    MODEL_SPEC,
    AutoencoderSpec,
    ClassifierSpec,
    ForecasterSpec,
    LMSpec,
    MaskedLMSpec,
    ModelSpec,
    PairClassifierSpec,
    RegressorSpec,
    SashimiSpec,
)
from longwave.models.states import Held, load_state, save_state
from longwave.models.storage import load, save, tokenizer, weights

__all__ = [
    "LM",
    "MODEL_SPEC",
    "Autoencoder",
    "AutoencoderSpec",
    "Backbone",
    "BackboneState",
    "Block",
    "Classifier",
    "ClassifierSpec",
    "Distilled",
    "Forecaster",
    "ForecasterSpec",
    "Held",
    "LMSpec",
    "Level",
    "MaskedLM",
    "MaskedLMHead",
    "MaskedLMSpec",
    "ModelSpec",
    "PairClassifier",
    "PairClassifierSpec",
    "ParallelBlock",
    "Regressor",
    "RegressorSpec",
    "Sampling",
    "Sashimi",
    "SashimiSpec",
    "SashimiState",
    "Stream",
    "TypedEmbedding",
    "distill",
    "generate",
    "load",
    "load_state",
    "save",
    "save_state",
    "stream",
    "tokenizer",
    "weights",
]
