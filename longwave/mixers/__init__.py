"""Every mixer, one file each. This list is the table of contents: add your line here."""

from longwave.mixers.attention import Attention
from longwave.mixers.base import MIXERS, Mixer, MixerSpec, State, mixer, nearest, options_of, state_bytes
from longwave.mixers.bidirectional import Bidirectional
from longwave.mixers.h3 import H3
from longwave.mixers.hyena import Hyena
from longwave.mixers.long_conv import LongConvMixer
from longwave.mixers.lstm import LSTM
from longwave.mixers.mamba import Mamba
from longwave.mixers.s4d import S4D
from longwave.mixers.two_sided import TwoSided

__all__ = [
    "H3",
    "LSTM",
    "MIXERS",
    "S4D",
    "Attention",
    "Bidirectional",
    "Hyena",
    "LongConvMixer",
    "Mamba",
    "Mixer",
    "MixerSpec",
    "State",
    "TwoSided",
    "mixer",
    "nearest",
    "options_of",
    "state_bytes",
]
