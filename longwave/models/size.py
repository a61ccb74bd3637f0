"""How much memory a model takes, known before it takes any."""

import torch
from torch import nn

from longwave.machine import require_memory
from longwave.models.spec import ModelSpec

KEPT = {1: "its weights", 4: "its weights, gradients and two moments each"}


def on_meta(spec: ModelSpec, copies: int | None = None) -> nn.Module:
    """The model on the meta device, where it takes no memory.

    Args:
        spec: which model.
        copies: of each weight, that will be kept on this machine: 1 to run it, 4 to train it; None asks nothing.
    Raises:
        ValueError: where the machine has not as much memory, or the model has a tensor that none could hold.
    """
    try:
        with torch.device("meta"):
            model = spec.build()
    except (RuntimeError, OverflowError) as error:  # of torch, which cannot count so many bytes
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"the model is too large for any machine ({reason}); make its sizes smaller") from error
    if copies is not None:
        require_memory(
            copies * sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
            f"a model of d_model = {spec.d_model:,} and layers = {spec.layers:,}, {KEPT[copies]},",
            "make its sizes smaller",
        )
    return model
