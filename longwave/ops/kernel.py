"""A backend with a gradient of its own: what its module leaves out, so that autograd, compile and export see it."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from longwave.ops.declaration import Declaration

_SCHEMA = {bool: "bool", int: "SymInt", float: "float", float | None: "float?"}


def transformed() -> bool:
    """Whether torch.func or forward mode differentiates what is called now, which only plain torch code allows."""
    functorch = torch._C._functorch
    kinds = {level.key() for level in functorch.get_interpreter_stack() or ()}
    return forward_ad._current_level >= 0 or bool(kinds & {functorch.TransformType.Grad, functorch.TransformType.Jvp})


def _batched() -> bool:
    """Whether torch.func.vmap hides which tensors want a gradient."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _import(name: str) -> Any:
    return importlib.import_module(name)


for _function in (transformed, _batched, _import):
    vars(_function)["_dynamo_marked_constant"] = True  # called while a graph is made; torch's decorator imports dynamo


def watched() -> bool:
    """Whether somebody looks on who must see the op itself: a mode, a transform, a tracer, forward mode."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_plain(x: Any) -> bool:
    """Whether x is a number or a tensor that is nothing but numbers in memory, or nothing."""
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter:
        return not (x.is_conj() or x.is_neg())
    return x is None or kind in (bool, int, float)


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

    None of them is called by autograd or on anything but plain tensors, except ``saved`` and ``why_not``.
    """

    def __init__(self, declaration: Declaration, signature: inspect.Signature, name: str, module: str):
        self.declaration, self._module = declaration, module
        self._arguments = list(signature.parameters)
        self._options = [argument for argument in self._arguments if argument not in declaration.arguments]
        package = importlib.import_module(module.rpartition(".")[0])
        self._refuse: Callable[..., str | None] | None = getattr(package, "why_not", None)
        types = {argument: _schema(parameter) for argument, parameter in signature.parameters.items()}
        options = "".join(f", {types[option]}" for option in self._options)
        results = "Tensor, " * len(declaration.returns)
        forward = torch.library.custom_op(
            f"longwave::{declaration.op}_{name}",
            self._forward,
            mutates_args=(),
            schema=f"({', '.join(types.values())}, bool keep) -> ({results}Tensor)",
        )
        backward = torch.library.custom_op(
            f"longwave::{declaration.op}_{name}_backward",
            self._backward,
            mutates_args=(),
            schema="(Tensor?[] grads, Tensor?[] tensors, Tensor?[] results, Tensor saved, bool[] needed"
            f"{options}) -> Tensor[]",
        )
        forward.register_fake(self._forward_fake)
        forward.register_autograd(self._differentiate, setup_context=self._setup)
        backward.register_fake(self._backward_fake)
        self.op, self.backward_op = forward._opoverload, backward._opoverload

    @property
    def module(self) -> Any:
        """Imported."""
        return _import(self._module)

    def why_not(self, *inputs: Any) -> str | None:
        """The reason why it cannot run these inputs, or None."""
        if transformed():
            return "torch.func or forward mode differentiates it, which only the reference allows"
        reason = self._refuse and self._refuse(*(x for x in inputs if isinstance(x, Tensor)))
        return reason or (self.module.why_not(*inputs) if hasattr(self.module, "why_not") else None)

    def direct(self, *inputs: Any) -> Any:
        """The results, for plain tensors of which no gradient is wanted: none of torch's machinery in between."""
        module = self.module
        return module.forward(*inputs, False)[0] if hasattr(module, "saved") else module.forward(*inputs)

    def recorded(self, *inputs: Any) -> Any:
        """The results, for plain tensors of which gradients are wanted: no dispatcher in between."""
        *results, _ = _Recorded.apply(*inputs, self)
        return tuple(results) if len(results) > 1 else results[0]

    def __call__(self, *inputs: Any) -> Any:
        """The results, through torch's dispatcher, for whoever looks on there: a compiler, an exporter, a mode."""
        wanted = _batched() or any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        keep = wanted and torch.is_grad_enabled()
        *results, _ = self.op(*inputs, keep)
        return tuple(results) if len(results) > 1 else results[0]

    def _forward(self, *values: Any) -> tuple[Tensor, ...]:
        *inputs, keep = values
        if hasattr(self.module, "saved"):
            results, saved = self.module.forward(*inputs, keep)
        else:
            results, saved = self.module.forward(*inputs), None
        results = results if isinstance(results, tuple) else (results,)
        return *results, saved if keep and saved is not None else results[0].new_empty(0)

    def _forward_fake(self, *values: Any) -> tuple[Tensor, ...]:
        *inputs, keep = values
        results = self.declaration.results(dict(zip(self._arguments, inputs)))
        keeps = keep and hasattr(self.module, "saved")
        return *results, self.module.saved(*inputs) if keeps else results[0].new_empty(0)

    def _setup(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *values, keep = inputs
        assert keep or not hasattr(self.module, "saved"), "the forward pass was told that no gradient is wanted"
        given = dict(zip(self._arguments, values))
        results = dict(zip([*self.declaration.returns, "saved"], output))
        wanted = self._wanted
        tensors = [given[name] for name in self.declaration.arguments]
        ctx.save_for_backward(
            *(given[name] if name in wanted else None for name in self.declaration.arguments),
            *(tensor if name in wanted or name == "saved" else None for name, tensor in results.items()),
        )
        ctx.like = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors]
        ctx.options = [given[option] for option in self._options]
        ctx.set_materialize_grads(False)

    @functools.cached_property
    def _wanted(self) -> list[str]:
        """What the backward pass asks for."""
        return list(inspect.signature(self.module.backward).parameters)

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (len(self._arguments) + 1)
        count = len(self.declaration.arguments)
        tensors, (*results, saved) = list(ctx.saved_tensors[:count]), ctx.saved_tensors[count:]
        needed = dict(zip(self._arguments, ctx.needs_input_grad))
        wanted = [needed[name] for name in self.declaration.arguments]
        for i, like in enumerate(ctx.like):
            if wanted[i] and tensors[i] is None:  # its shape and dtype are all that the gradient needs
                shape, dtype, device = like
                tensors[i] = torch.empty((), dtype=dtype, device=device).expand(shape)
        seen = torch.compiler.is_compiling() or watched() or any(not is_plain(grad) for grad in grads)
        run = self.backward_op if seen else self._backward
        found = iter(run(list(grads[:-1]), tensors, results, saved, wanted, *ctx.options))
        return *(next(found) if needed[argument] else None for argument in self._arguments), None

    def _backward(
        self,
        grads: Sequence[Tensor | None],
        tensors: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
        saved: Tensor,
        needed: Sequence[bool],
        *options: Any,
    ) -> list[Tensor]:
        given = dict(zip(self.declaration.arguments, tensors))
        names = {name for name, need in zip(given, needed) if need}
        known = {
            **{f"d{name}": grad for name, grad in zip(self.declaration.returns, grads)},
            **dict(zip(self.declaration.returns, results)),
            **given,
            **dict(zip(self._options, options)),
            "saved": saved,
            "needed": names,
        }
        with without_autocast(saved.device):
            found = self.module.backward(**{name: known[name] for name in self._wanted})
        return [_like(found[name], x) for name, x in given.items() if x is not None and name in names]

    def _backward_fake(self, grads, tensors, results, saved, needed, *options) -> list[Tensor]:
        wanted = (x for x, need in zip(tensors, needed) if need)
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in wanted]


class _Recorded(torch.autograd.Function):
    """A kernel's two passes on autograd's tape, without what torch.library puts around them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *values, kernel = inputs
        results = kernel._forward(*values, True)
        kernel._setup(ctx, inputs, results)
        ctx.kernel = kernel
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.kernel._differentiate(ctx, *grads)


def _schema(parameter: inspect.Parameter) -> str:
    kind = _SCHEMA.get(parameter.annotation, "Tensor" if parameter.default is inspect.Parameter.empty else "Tensor?")
    return f"{kind} {parameter.name}"


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient as that of x must be: real where x is, contiguous."""
    return (grad.real if grad.is_complex() and not x.is_complex() else grad).to(x.dtype).contiguous()
