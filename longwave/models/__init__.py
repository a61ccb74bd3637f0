"""Backbones, the heads over them, generation and storage."""

from longwave.models.backbone import Backbone, BackboneState, Block
from longwave.models.classifier import Classifier
from longwave.models.distill import Distilled, distill
from longwave.models.generate import Sampling, Stream, generate, stream
from longwave.models.lm import LM
from longwave.models.masked_lm import MaskedLM, MaskedLMHead
from longwave.models.sashimi import Level, Sashimi, SashimiState
from longwave.models.score import Score
from longwave.models.spec import MODEL_SPEC, ClassifierSpec, LMSpec, MaskedLMSpec, ModelSpec, SashimiSpec
from longwave.models.states import Held, load_state, save_state
from longwave.models.storage import load, save, weights

__all__ = [
    "LM",
    "MODEL_SPEC",
    "Backbone",
    "BackboneState",
    "Block",
    "Classifier",
    "ClassifierSpec",
    "Distilled",
    "Held",
    "LMSpec",
    "Level",
    "MaskedLM",
    "MaskedLMHead",
    "MaskedLMSpec",
    "ModelSpec",
    "Sampling",
    "Sashimi",
    "SashimiSpec",
    "SashimiState",
    "Score",
    "Stream",
    "distill",
    "generate",
    "load",
    "load_state",
    "save",
    "save_state",
    "stream",
    "weights",
]
