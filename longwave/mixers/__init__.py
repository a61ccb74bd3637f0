"""Every mixer, one file each. This list is the table of contents: add your line here."""

from longwave.mixers.aft import AFTConv, AFTFull, AFTLocal, AFTSimple
from longwave.mixers.attention import Attention
from longwave.mixers.base import MIXERS, AnyMixer, Mixer, MixerSpec, State, mixer, state_bytes
from longwave.mixers.bidirectional import Bidirectional
from longwave.mixers.bigs import BiGS
from longwave.mixers.butterfly_conv import ButterflyConv
from longwave.mixers.ckconv import CKConv
from longwave.mixers.conv import Conv
from longwave.mixers.dss import DSS, DSSSoftmax
from longwave.mixers.gated_deltanet import GatedDeltaNet
from longwave.mixers.gla import GLA
from longwave.mixers.gss import GSS
from longwave.mixers.h3 import H3
from longwave.mixers.hyena import Hyena, HyenaTwoSided, LaughingHyena
from longwave.mixers.lfm2_conv import LFM2Conv
from longwave.mixers.liquid_s4 import LiquidS4
from longwave.mixers.long_conv import LongConvMixer
from longwave.mixers.lstm import LSTM
from longwave.mixers.mamba import Mamba
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.mega import Mega, MegaTwoSided
from longwave.mixers.mlstm import MLSTM
from longwave.mixers.monarch_mixer import MonarchMixer
from longwave.mixers.positions import LearnedPositions, SinusoidalPositions
from longwave.mixers.retnet import RetNet
from longwave.mixers.rg_lru import RGLRU
from longwave.mixers.rwkv4 import RWKV4, RWKV4Channel
from longwave.mixers.s4 import S4
from longwave.mixers.s4d import S4D
from longwave.mixers.s4nd import S4NDMixer
from longwave.mixers.s5 import S5, S5TwoSided
from longwave.mixers.states import Growing, join, select
from longwave.mixers.two_sided import TwoSided

__all__ = [
    "DSS",
    "GLA",
    "GSS",
    "H3",
    "LSTM",
    "MIXERS",
    "MLSTM",
    "RGLRU",
    "RWKV4",
    "S4",
    "S4D",
    "S5",
    "AFTConv",
    "AFTFull",
    "AFTLocal",
    "AFTSimple",
    "AnyMixer",
    "Attention",
    "BiGS",
    "Bidirectional",
    "ButterflyConv",
    "CKConv",
    "Conv",
    "DSSSoftmax",
    "GatedDeltaNet",
    "Growing",
    "Hyena",
    "HyenaTwoSided",
    "LFM2Conv",
    "LaughingHyena",
    "LearnedPositions",
    "LiquidS4",
    "LongConvMixer",
    "Mamba",
    "Mamba2",
    "Mega",
    "MegaTwoSided",
    "Mixer",
    "MixerSpec",
    "MonarchMixer",
    "RWKV4Channel",
    "RetNet",
    "S4NDMixer",
    "S5TwoSided",
    "SinusoidalPositions",
    "State",
    "TwoSided",
    "join",
    "mixer",
    "select",
    "state_bytes",
]
