"""How losses take part in PyTorch's graph: what intercepts them, when a gradient is made, and what has none.

The ordinary way reads the tensors' numbers at once. Transforms, forward mode, tracers, compilers and modes need
operators instead, or are refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastce._torch_arrays import Tensors

# Whether backward runs with retain_graph=True. Nothing public tells; where this is missing, assume so: it costs a copy.
_is_graph_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# What nothing public tells either. Where one of these is missing, so is what it tells of.
_are_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_count_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
# Upstream gradients for a batch, as `torch.autograd.functional.jacobian` has them with ``vectorize=True``.
is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
# Keeps compilers out of a function. Public, but for what is imported at once.
untraced = getattr(torch, "_disable_dynamo", lambda function: function)


def untraced_if_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep compilers out of a function that asks what they cannot follow.

    PyTorch's own means to do so imports the compiler when it is first called, for which training should not wait.
    """
    never_traced = untraced(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        return (never_traced if torch.compiler.is_dynamo_compiling() else function)(*arguments)

    return call


def is_ordinary(*tensors: torch.Tensor | None) -> bool:
    """Return True if the tensors' numbers may be read now, and nothing intercepts or records operators."""
    return not (
        torch.compiler.is_compiling()
        or is_transformed()
        or _count_modes() > 0
        or torch.jit.is_tracing()
        or any(
            type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or is_batched(tensor)
            for tensor in tensors
            if tensor is not None
        )
    )


def is_transformed() -> bool:
    """Return True if a transform of `torch.func` or forward mode is active."""
    return bool(_are_transforms_active()) or forward_ad._current_level >= 0


def check_constants(options: dict[str, Any], leaves: tuple[str, ...], **tensors: torch.Tensor | None) -> None:
    """Refuse gradients of anything but the leaves; turn options that are tensors into numbers."""
    for name, value in {**tensors, **options}.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(no_gradient(name, leaves))
        if name in options:
            if not is_ordinary(value):
                raise TypeError(
                    f"{name} must be a number where torch.func, forward mode, a tracer or a compiler is at work, got a "
                    f"tensor: pass float({name}), taken outside"
                )
            options[name] = value.detach()  # a number as well, but PyTorch warns where it could have a gradient


def no_gradient(name: str, leaves: tuple[str, ...] = ("input",)) -> str:
    """Return the message for a derivative that nobody makes."""
    function = "cross_entropy" if len(leaves) == 1 else "linear_cross_entropy"
    return (
        f"{name} must not require a gradient, which is made for {', '.join(leaves)} alone (pass {name}.detach(), or "
        f"use torch.nn.functional.{function}), got a tensor that does"
    )


def is_gradient_made_forward(tensors: Tensors, options: dict[str, Any]) -> bool:
    """Return True if the forward pass makes the gradient: see the design of `fastce.torch`."""
    input = tensors[0]  # noqa: A001
    return input.device.type == "cpu" and input.dtype != torch.float16 and options["reduction"] in ("mean", "sum")


def scale(grad: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    """Multiply a gradient, where it is if nobody will ask for it again."""
    if not is_ordinary(grad_output):
        return grad * grad_output
    factor = float(grad_output)
    if _is_graph_retained():
        return grad * factor
    return grad if factor == 1 else grad.mul_(factor)
