"""Functions of which a compiler or an exporter sees one node: those with loops that depend on a length."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longwave.ops.kernel import without_autocast

OPAQUE: dict[str, Callable[..., Any]] = {}  # every one by name


def opaque(like: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A differentiable function of torch operations that is one node in a graph, of any sizes.

        @opaque(like=lambda x, length: x.new_empty(x.shape[0], length))
        def doubled(x: Tensor, length: int) -> Tensor: ...

    Unrolled, its loops would fix the lengths for which a graph is made, and take long to compile. Called without a
    graph being made it is nothing but the function. In a graph its gradient runs the function once more. Autocast
    does not reach into it.

    Args:
        like: (the function's arguments) -> a tensor like the one that it returns. The arguments are tensors (or None
            where annotated so), then integers, and annotated.
    """

    def wrap(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = f"longwave::{function.__name__.lstrip('_')}"
        kinds = [p.annotation for p in inspect.signature(function).parameters.values()]
        count = sum(kind is not int for kind in kinds)

        @functools.wraps(function)
        def exact(*args: Any) -> Tensor:
            with without_autocast(args[0].device):
                return function(*args)

        def run(*args: Any) -> Tensor:
            return exact(*args).contiguous()

        def backward(
            grad: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[int], needed: Sequence[int]
        ) -> list[Tensor]:
            def of_needed(*wanted: Tensor) -> Tensor:
                args = list(tensors)
                for i, tensor in zip(needed, wanted):
                    args[i] = tensor
                return exact(*args, *numbers)

            pull = torch.func.vjp(of_needed, *(tensors[i] for i in needed))[1]
            return [found.contiguous() for found in pull(grad)]

        op = torch.library.custom_op(
            name, run, mutates_args=(), schema=torch.library.infer_schema(function, mutates_args=())
        )
        back = torch.library.custom_op(
            f"{name}_backward",
            backward,
            mutates_args=(),
            schema="(Tensor grad, Tensor?[] tensors, SymInt[] numbers, int[] needed) -> Tensor[]",
        )
        op.register_fake(like)
        back.register_fake(lambda grad, tensors, numbers, needed: [torch.empty_like(tensors[i]) for i in needed])

        def setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
            ctx.save_for_backward(*inputs[:count])
            ctx.numbers = inputs[count:]

        def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            needed = [i for i in range(count) if ctx.needs_input_grad[i]]
            found = dict(zip(needed, back(grad, ctx.saved_tensors, ctx.numbers, needed)))
            return tuple(found.get(i) for i in range(len(kinds)))

        op.register_autograd(differentiate, setup_context=setup)

        @functools.wraps(function)
        def call(*args: Any) -> Tensor:
            return op(*args) if torch.compiler.is_compiling() else exact(*args)

        OPAQUE[name] = call
        return call

    return wrap
