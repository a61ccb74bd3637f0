"""A backend with a gradient of its own: what its module leaves out, so that autograd, compile and export see it."""

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from longwave.ops.declaration import Declaration

SCHEMA = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", float | None: "float?"}  # others: "Tensor?"


def transform() -> str | None:
    """What torch.func or forward mode does with what is called now: "derivative", "vmap" alone, or None."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if forward_ad._current_level >= 0 or any(level.key().name != "Vmap" for level in levels):
        return "derivative"
    return "vmap" if levels else None


def _import(name: str) -> None:
    if name not in sys.modules:
        with _disable_current_modes():  # or its tensors would be fake where a graph is the first to need it
            importlib.import_module(name)


for _function in (transform, _import):
    vars(_function)["_dynamo_marked_constant"] = True  # called while a graph is made; torch's decorator imports dynamo


def watched() -> bool:
    """Whether somebody looks on who must see the op itself: a mode, a transform, a tracer, forward mode."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def key(values: Sequence[Any], free: Sequence[int | None] | None = None) -> tuple | None:
    """All that checks and choice may depend on; None if a tensor is more than numbers in memory, or one is watched.

    Args:
        values: the inputs.
        free: of each an axis whose size does not matter, but that there is something, or None; None for none of all.
    """
    if torch.compiler.is_compiling() or watched():
        return None
    found: list[Any] = []
    for place, x in enumerate(values):
        kind = type(x)
        if (kind is Tensor or kind is torch.nn.Parameter) and not (x.is_conj() or x.is_neg()):
            found += x.shape, x.dtype, x.device, x.requires_grad
            if free is not None and (axis := free[place]) is not None and x.shape[axis]:
                found[-4] = (*x.shape[:axis], *x.shape[axis + 1 :])
        elif x is None or kind in (bool, int, float):
            found.append(x)
        else:
            return None
    return tuple(found)


def without_autocast(device: torch.device | None) -> contextlib.AbstractContextManager:
    """Within it autocast changes no dtype on the device: powers, filters and scans in bfloat16 would be noise."""
    if device is None or device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


class Kernel:
    """A backend that is a module of ``forward`` and ``backward``, imported when it is first needed.

    The module has, with the op's arguments as ``inputs``, none left out:

    - ``forward(*inputs)``: what the op returns, contiguous and in memory of its own.
    - ``backward(needed, ...)``: a dict of the gradients of those tensor arguments whose names are in the set
      ``needed``; more do no harm. Its other parameters are what it wants to see, by name: arguments, results, ``dy``
      for the gradient of the result ``y``, None where nothing depends on it. Nothing else is kept for it.
    - where forward has more to tell backward: ``saved(*inputs)``, a tensor like the one that backward gets as
      ``saved``. Then forward has one more argument, ``keep``, and returns (results, saved); without ``keep`` nobody
      looks at the latter.
    - where it cannot do all that its folder can: ``why_not(*inputs)``, the reason or None, a function of shapes,
      dtypes, devices and options alone.
    """

    def __init__(self, declaration: Declaration, signature: inspect.Signature, name: str, module: str):
        self.declaration, self._module = declaration, module
        self._arguments = list(signature.parameters)
        self._options = [argument for argument in self._arguments if argument not in declaration.arguments]
        self._folder = importlib.import_module(module.rpartition(".")[0])
        types = {name: SCHEMA.get(p.annotation, "Tensor?") + f" {name}" for name, p in signature.parameters.items()}
        tensors, options = ", ".join(types.values()), "".join(f", {types[option]}" for option in self._options)
        forward = torch.library.custom_op(
            f"longwave::{declaration.op}_{name}",
            self._forward,
            mutates_args=(),
            schema=f"({tensors}, bool keep) -> ({'Tensor, ' * len(declaration.returns)}Tensor)",
        )
        lists = "Tensor?[] grads, Tensor?[] tensors, Tensor?[] results, Tensor saved, bool[] needed"
        backward = torch.library.custom_op(
            f"longwave::{declaration.op}_{name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"({lists}{options}) -> Tensor[]",
        )
        forward.register_fake(self._forward_fake)
        forward.register_autograd(self._differentiate, setup_context=self._setup)
        backward.register_fake(self._backward_fake)
        self.op, self.backward_op = forward._opoverload, backward._opoverload

    @property
    def module(self) -> Any:
        """Imported."""
        _import(self._module)
        return getattr(self._folder, self._module.rpartition(".")[2])  # from where a graph may have it, too

    def why_not(self, *inputs: Any) -> str | None:
        """The reason why it cannot run these inputs, or None."""
        if transform() == "derivative":
            return "torch.func or forward mode differentiates it, which only the reference allows"
        kinds = {name: kind for name, (_, kind) in self.declaration.arguments.items()}
        tensors = [x for name, x in zip(self._arguments, inputs) if isinstance(x, Tensor) and kinds[name] != "wide"]
        if hasattr(self._folder, "why_not") and (reason := self._folder.why_not(*tensors)):
            return reason
        return self.module.why_not(*inputs) if hasattr(self.module, "why_not") else None

    @functools.cached_property
    def direct(self) -> Callable[..., Any]:
        """Inputs -> results, for plain tensors of which no gradient is wanted: nothing of torch in between."""
        forward = self.module.forward
        return (lambda *inputs: forward(*inputs, False)[0]) if hasattr(self.module, "saved") else forward

    def recorded(self, *inputs: Any) -> Any:
        """The results, for plain tensors of which gradients are wanted: only autograd in between."""
        *results, _ = _Recorded.apply(*inputs, self)
        return tuple(results) if len(results) > 1 else results[0]

    def __call__(self, *inputs: Any) -> Any:
        """The results, through torch's dispatcher, for all who look on there: compilers, exporters, modes."""
        wanted = transform() == "vmap" or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        *results, _ = self.op(*inputs, wanted and torch.is_grad_enabled())
        return tuple(results) if len(results) > 1 else results[0]

    def _forward(self, *values: Any) -> tuple[Tensor, ...]:
        *inputs, keep = values
        saves = hasattr(self.module, "saved")
        results, saved = self.module.forward(*values) if saves else (self.module.forward(*inputs), None)
        results = results if isinstance(results, tuple) else (results,)
        return *results, saved if saves and keep else results[0].new_empty(0)

    def _forward_fake(self, *values: Any) -> tuple[Tensor, ...]:
        *inputs, keep = values
        results = self.declaration.results(dict(zip(self._arguments, inputs)))
        saves = keep and hasattr(self.module, "saved")
        return *results, self.module.saved(*inputs) if saves else results[0].new_empty(0)

    def _setup(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        assert inputs[-1] or not hasattr(self.module, "saved"), "forward was told that no gradient is wanted"
        given, results = dict(zip(self._arguments, inputs)), zip([*self.declaration.returns, "saved"], output)
        tensors = {name: given[name] for name in self.declaration.arguments}
        kept = [x if name in self._wanted else None for name, x in [*tensors.items(), *results]]
        ctx.save_for_backward(*kept[:-1], output[-1])
        ctx.like = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors.values()]
        ctx.options = [given[option] for option in self._options]
        ctx.set_materialize_grads(False)

    @functools.cached_property
    def _wanted(self) -> list[str]:
        """What the backward pass asks for."""
        return list(inspect.signature(self.module.backward).parameters)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = dict(zip(self._arguments, ctx.needs_input_grad))
        if all(grad is None for grad in grads):
            return (None,) * (len(needed) + 1)
        count, wanted = len(ctx.like), [needed[name] for name in self.declaration.arguments]
        tensors, (*results, saved) = list(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        for i, like in enumerate(ctx.like):
            if wanted[i] and tensors[i] is None:  # shape and dtype are all that its gradient needs
                tensors[i] = torch.empty((), dtype=like[1], device=like[2]).expand(like[0])
        run = self.backward_op if key(grads) is None else self._backward
        found = iter(run(list(grads[:-1]), tensors, results, saved, wanted, *ctx.options))
        return *(next(found) if need else None for need in needed.values()), None

    def _backward(
        self, grads: Sequence, tensors: Sequence, results: Sequence, saved: Tensor, needed: Sequence, *options: Any
    ) -> list[Tensor]:
        given, returns = dict(zip(self.declaration.arguments, tensors)), self.declaration.returns
        names = {name for name, need in zip(given, needed) if need}
        known = {**given, **dict(zip(returns, results)), **{f"d{name}": grad for name, grad in zip(returns, grads)}}
        known |= dict(zip(self._options, options)) | {"saved": saved, "needed": names}
        with without_autocast(saved.device):
            found = self.module.backward(**{name: known[name] for name in self._wanted})
        return [_like(found[name], x) for name, x in given.items() if name in names]

    def _backward_fake(
        self, grads: Sequence, tensors: Sequence, results: Sequence, saved: Tensor, needed: Sequence, *options: Any
    ) -> list[Tensor]:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x, need in zip(tensors, needed) if need]


class _Recorded(torch.autograd.Function):
    """Both passes of a kernel on autograd's tape, without what torch.library puts around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *values, ctx.kernel = inputs
        results = ctx.kernel._forward(*values, True)
        ctx.kernel._setup(ctx, inputs, results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.kernel._differentiate(ctx, *grads)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient as that of x must be: real where x is, contiguous."""
    return (grad.real if grad.is_complex() and not x.is_complex() else grad).to(x.dtype).contiguous()
