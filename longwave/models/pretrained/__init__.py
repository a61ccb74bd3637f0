"""Official weights in longwave's modules: one file a source, one line of the table a source."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from longwave.mixers import nearest
from longwave.models.pretrained import mamba, s4, safari
from longwave.models.pretrained.system import Choice, Options, System

SYSTEMS: dict[str, System] = {**s4.SYSTEMS, **safari.SYSTEMS, **mamba.SYSTEMS}

__all__ = ["SYSTEMS", "Choice", "Options", "System", "from_official"]


def from_official(system: str, config: Mapping[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """A module that computes what the official one does, from the official one's weights.

    Args:
        system: which official module: h3, hyena, hyenastandalone, longconv, blockfft (HazyResearch/safari), s4d,
            s4dmin (state-spaces/s4), mamba_hf (Hugging Face transformers), selective_scan (state-spaces/mamba).
        config: the official constructor's arguments by name, defaults left out or not; arguments of the run
            (L, rate, batch, ...) may be among them.
        state: the official ``state_dict()``.
    Returns:
        A module that takes the official inputs by name and returns the output, or a dict of them where there are
        several. It is in the weights' dtype. The mixer or model inside, with its own state, is ``.model`` where
        there is one.
    Raises:
        ValueError: for an unknown system, an option that is unknown or not carried over, a key that is missing or
            unexpected, or a wrong shape; it names the thing.
    """
    if system not in SYSTEMS:
        known = ", ".join(SYSTEMS)
        raise ValueError(f"no official system is called {system!r}; there are {known}{nearest(system, SYSTEMS)}")
    try:
        return SYSTEMS[system].load(config, state)
    except ValueError as error:
        raise ValueError(f"{system}: {error}") from error
