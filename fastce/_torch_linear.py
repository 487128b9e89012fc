"""The loss of a linear layer on tensors, without holding all logits: a function and a node of PyTorch's graph.

Design
------
1. The products and their chunks are those of the function for arrays. Gradients are computed for tensors that require
   one.
2. They are computed when those of logits are, for the same reasons, see `fastce.torch`: in the forward pass for reduced
   losses, where the gradients are saved and input and weight may change afterwards; in backward for float16 and
   ``reduction="none"``.
3. Gradients are copied once, into memory that PyTorch has allocated, in the layout of their tensors.
4. Transforms, forward mode, compilers and tracers are refused. All that they could get is the loss of existing logits,
   which a caller can write down.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch.overrides import handle_torch_function, has_torch_function

import fastce
from fastce import _torch_graph
from fastce._torch_arrays import Tensors, as_array, as_tensor, call, check_tensors, loss_dtype

_LEAVES = ("input", "linear_weight", "linear_bias")
# The tensors of the loss, leaves first, as the functions for arrays call them.
_ARRAYS = ("features", "linear_weight", "linear_bias", "target", "weight", "sample_weight")

_ONLY_ORDINARY = (
    "fastce.torch.linear_cross_entropy works neither under torch.func, forward mode and batched gradients, nor where "
    "operators are traced or compiled, for it never has all logits: use fastce.torch.cross_entropy of "
    "torch.nn.functional.linear there"
)
_ONCE = (
    "the gradient of fastce.torch.linear_cross_entropy cannot be differentiated again: call backward or "
    "torch.autograd.grad without create_graph=True, or use torch.nn.functional.linear_cross_entropy"
)


def linear_cross_entropy(
    input: torch.Tensor,  # noqa: A002 - PyTorch's name
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    sample_weight: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    on_empty: str = "nan",
    chunk_rows: int | None = None,
    n_threads: int | None = None,
) -> torch.Tensor:
    """Return what ``torch.nn.functional.linear_cross_entropy`` does, without ever holding all logits.

    Parameters
    ----------
    input : Tensor, shape (..., d), float32, float64, float16 or bfloat16
        The layer's input on the CPU: (N, d), (B, T, d), or (d,) for a single row.
    linear_weight : Tensor, shape (C, d) or (C, d1, ..., dK, d), dtype of `input`
        The layer's weight.
    target : Tensor
        Class indices of any integer dtype, of shape (...) or (..., d1, ..., dK); or class probabilities of any floating
        dtype, of shape (..., C) or (..., C, d1, ..., dK).
    linear_bias : Tensor, shape (C,) or (C, d1, ..., dK), dtype of `input`, optional
        The layer's bias.
    weight : Tensor, shape (C,), optional
        One factor per class, finite.
    reduction, label_smoothing
        As for `fastce.torch.cross_entropy`.
    ignore_index : int, optional
        Rows with this class index are skipped. ``None`` means -100. Must not be given with class probabilities.
    options : torch.nn.LinearCrossEntropyOptions, optional
        Only `batch_chunk_size` has an effect, that of `chunk_rows`. Whatever the others are, half precision is summed
        in float32, and the graph may be retained.
    sample_weight : Tensor, shaped like an index target, optional
        One factor per row, finite. Rows of weight 0 are skipped.
    logit_scale, softcap, z_loss, on_empty, n_threads
        As for `fastce.cross_entropy`.
    chunk_rows : int, optional
        Number of rows of `input` per chunk. ``None`` means as many as make 64 MiB of logits.

    Returns
    -------
    loss : Tensor, without dimensions, or shaped like an index target if ``reduction="none"``
        Has the dtype of `input`; under autocast float32 for half precision.

    Raises
    ------
    TypeError
        If an argument is not a tensor, is not on the CPU, or has the wrong dtype; if dtypes differ outside of autocast.
    IndexError, ValueError
        As `fastce.linear_cross_entropy`.
    NotImplementedError
        If anything but `input`, `linear_weight` and `linear_bias` requires a gradient; under ``torch.func``, in forward
        mode, compiled or traced; from ``backward``, if it is called with ``create_graph=True``.
    ImportError
        If a tensor is bfloat16 and ml_dtypes is missing.

    See Also
    --------
    fastce.linear_cross_entropy_with_grad : The formulas, and the memory that a call takes.

    Notes
    -----
    For a reduced loss the forward pass computes the gradients of the tensors that require one, and they are saved
    instead of input and weight; frozen tensors cost nothing. In float16 and with ``reduction="none"`` backward computes
    them with the upstream gradient folded in, and multiplies for the logits once more.

    Under autocast the arguments may differ in dtype, and are multiplied in the widest. A float32 layer is not rounded
    to half precision, because the products are computed in float32 in any case.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import linear_cross_entropy
    >>> layer = torch.nn.Linear(2, 3)
    >>> _ = layer.weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]])), layer.bias.data.zero_()
    >>> features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> loss = linear_cross_entropy(features, layer.weight, torch.tensor([0, 2]), linear_bias=layer.bias)
    >>> print(f"{loss.item():.6f}")
    1.667234
    >>> loss.backward()
    >>> print(layer.bias.grad.numpy().round(4))
    [-0.0839  0.508  -0.4241]
    """
    tensors = (input, linear_weight, target, linear_bias, weight, sample_weight)
    chosen: dict[str, Any] = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "on_empty": on_empty,
        "n_threads": n_threads,
    }
    if has_torch_function(tensors):
        return handle_torch_function(
            linear_cross_entropy,
            tensors,
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            ignore_index=ignore_index,
            options=options,
            sample_weight=sample_weight,
            chunk_rows=chunk_rows,
            **chosen,
        )
    if not _torch_graph.is_ordinary(*tensors):
        raise NotImplementedError(_ONLY_ORDINARY)
    constants = {"target": target, "weight": weight, "sample_weight": sample_weight}
    check_tensors(input, linear_weight=linear_weight, linear_bias=linear_bias, **constants)
    if input.device.type != "cpu":
        raise TypeError(
            f"input must be on the CPU, got a tensor on {input.device}: use fastce.torch.cross_entropy of "
            f"torch.nn.functional.linear"
        )
    chosen["ignore_index"] = -100 if ignore_index is None else ignore_index
    chosen["chunk_rows"] = _chunk_rows(options, chunk_rows)
    _torch_graph.check_constants(chosen, _LEAVES, **constants)
    dtype = loss_dtype(input)
    leaves: tuple[Any, ...] = (input, linear_weight, linear_bias)
    if torch.is_autocast_enabled("cpu"):
        leaves = _to_widest(*leaves)
    tensors = (*leaves, *constants.values())
    if torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves):
        return _LinearCrossEntropy.apply(dtype, chosen, *tensors)
    return _loss(tensors, dtype, chosen)


def _chunk_rows(options: Any, chunk_rows: int | None) -> int | None:
    """Return the rows of a chunk, which may be said in PyTorch's way and in ours."""
    if options is None:
        return chunk_rows
    kind = getattr(torch.nn, "LinearCrossEntropyOptions", ())
    if not isinstance(options, kind):
        raise TypeError(f"options must be a torch.nn.LinearCrossEntropyOptions, got {type(options).__name__}")
    said: int | None = options.batch_chunk_size
    if said is not None and chunk_rows is not None and said != chunk_rows:
        raise ValueError(f"chunk_rows must be left alone with options.batch_chunk_size={said}, got {chunk_rows}")
    return said if chunk_rows is None else chunk_rows


def _to_widest(*leaves: Any) -> tuple[torch.Tensor | None, ...]:
    """Convert tensors to one dtype that holds the numbers of all; gradients are converted back."""
    dtype = functools.reduce(torch.promote_types, [leaf.dtype for leaf in leaves if leaf is not None])
    return tuple(None if leaf is None else leaf.to(dtype) for leaf in leaves)


class _LinearCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The loss as a node of PyTorch's graph."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, options: dict[str, Any], *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.dtype, ctx.options = dtype, options
        ctx.has_grads = _torch_graph.is_gradient_made_forward(tensors, options)
        if not ctx.has_grads:
            ctx.save_for_backward(*tensors)
            return _loss(tensors, dtype, options)
        loss, grads = _loss_and_grads(tensors, dtype, options, ctx.needs_input_grad[2:])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @_torch_graph.untraced_if_compiling
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(_ONCE)
        if ctx.has_grads:
            grads = [None if x is None else _torch_graph.scale(x, grad_output) for x in ctx.saved_tensors]
        elif _torch_graph.is_ordinary(grad_output):
            wanted = ctx.needs_input_grad[2:]
            _, grads = _loss_and_grads(ctx.saved_tensors, ctx.dtype, ctx.options, wanted, grad_output)
        else:
            raise NotImplementedError(_ONLY_ORDINARY)
        return (None, None, *grads, None, None, None)


def _loss(tensors: Tensors, dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    return as_tensor(call(fastce.linear_cross_entropy, _ARRAYS, tensors, options), dtype)


def _loss_and_grads(
    tensors: Tensors,
    dtype: torch.dtype,
    options: dict[str, Any],
    wanted: tuple[bool, ...],
    grad_output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return the loss and the gradients that are wanted."""
    names = (*_ARRAYS, "grad_output")
    wrt = [name for name, is_wanted in zip(_ARRAYS, wanted, strict=True) if is_wanted]
    function = fastce.linear_cross_entropy_with_grad
    loss, *arrays = call(function, names, (*tensors, grad_output), {"wrt": wrt, **options})
    grads: list[torch.Tensor | None] = []
    for leaf in tensors[: len(_LEAVES)]:
        array = arrays.pop(0)  # so that no two copies of a gradient are held longer than need be
        grads.append(None if array is None else torch.empty_like(leaf))
        if array is not None:
            np.copyto(as_array(grads[-1]), array)
    return as_tensor(loss, dtype), grads
