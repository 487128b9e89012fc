"""Softmax cross-entropy on PyTorch's tensors, for scripts that take it from `torch.nn` today: change the import.

Needs PyTorch, which nothing else in this package imports.

Design
------
1. On the host a reduced loss makes its gradient in the forward sweep; only that is saved, not the logits. The upstream
   gradient of a training step is 1, and then backward has nothing left to do.
2. Elsewhere the sweep that makes the gradient is backward's, with the upstream gradient folded into it:

   - float16, whose losses are scaled up lest small gradients become 0: scaling what has become 0 comes too late;
   - ``reduction="none"``, whose upstream gradients are anything: multiplying by them later is a sweep as well, and
     makes NaN of the zeros of skipped rows where they are infinite;
   - on a GPU, where to ask whether a number is 1 is to wait for all work before it.

3. A saved gradient is multiplied where it is, unless the graph is retained: whoever got it before may hold it still.
4. Transforms, forward mode, compilers and whatever else intercepts operators get operators: see `_torch_operators`.
"""

from typing import Any

try:
    import torch
    from torch.nn import _reduction  # the names of old keywords: nothing public knows them
    from torch.overrides import handle_torch_function, has_torch_function
except ImportError as error:
    raise type(error)(
        f"fastce.torch needs PyTorch 2.4 or later, got: {error}. Install it with pip install 'fastce[torch]'",
        name=error.name,
        path=error.path,
    ) from error

import fastce
from fastce import _torch_arrays, _torch_operators
from fastce._torch_arrays import HALVES, check_tensors
from fastce._torch_linear import linear_cross_entropy

__all__ = ["CrossEntropyLoss", "cross_entropy", "empty_cache", "linear_cross_entropy"]

_DEFAULT_IGNORE_INDEX = -100


def cross_entropy(
    input: torch.Tensor,  # noqa: A002 - PyTorch's name
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = _DEFAULT_IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    sample_weight: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    on_empty: str = "nan",
    n_threads: int | None = None,
) -> torch.Tensor:
    """Return the softmax cross-entropy between logits and targets, as ``torch.nn.functional.cross_entropy`` does.

    Parameters
    ----------
    input : Tensor, shape (N, C), (N, C, d1, ...) or (C,), float32, float64, float16 or bfloat16
        The logits, on the host or on a CUDA device, of any strides.
    target : Tensor
        Class indices of any integer dtype, shaped like `input` without the class axis; or class probabilities of any
        floating dtype, shaped like `input`.
    weight : Tensor, shape (C,), optional
        One factor per class, finite, of any sign.
    size_average, reduce : bool, optional
        What `reduction` was formerly called. Deprecated in PyTorch, which warns.
    ignore_index : int, default -100
        Rows with this class index are skipped. With class probabilities it must be negative, and means nothing.
    reduction : {"mean", "sum", "none"}, default "mean"
        What to do with the losses of the rows.
    label_smoothing : float in [0, 1], default 0
        How much of the target is replaced by the uniform distribution.
    sample_weight : Tensor, shaped like an index target, optional
        One factor per row, finite, of any sign. Rows of weight 0 are skipped.
    logit_scale, softcap, z_loss, on_empty, n_threads
        As for `fastce.cross_entropy`.

    Returns
    -------
    loss : Tensor, without dimensions, or shaped like an index target if ``reduction="none"``
        Of the dtype of `input`, as in PyTorch; under autocast float32 for logits of 16 bits, as there.

    Raises
    ------
    TypeError
        If an argument is no tensor, is sparse, quantized, nested or masked, is on another device than `input`, or of a
        wrong kind; if `input` is neither on the host nor on a CUDA device.
    IndexError, ValueError
        As `fastce.cross_entropy`.
    NotImplementedError
        If anything but `input` requires a gradient or has a tangent; if the gradient is differentiated again, in either
        mode; if it is compiled whole within a transform of ``torch.func``.
    ImportError
        If a tensor is bfloat16 and ml_dtypes is missing, or on a GPU and CuPy is.

    See Also
    --------
    fastce.cross_entropy : The formula, and what the options mean.
    CrossEntropyLoss : The same as a module.

    Notes
    -----
    The gradient has the dtype and the memory format of `input`. For a reduced loss on the host the forward sweep makes
    it, and it is kept instead of the logits; backward multiplies it by the upstream gradient unless that is 1. In
    float16, with ``reduction="none"`` and on a GPU, backward makes it with the upstream gradient folded in: one
    rounding, so that scaled losses keep small gradients. Then `input` is saved, and must not be overwritten before.

    The transforms of ``torch.func`` work, gradients per sample by ``vmap(grad(...))`` in one call for all samples, and
    so do forward mode, ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and fake tensors. They get an operator,
    ``torch.ops.fastce.cross_entropy``, and backward makes the gradient there. Class weights that differ from sample to
    sample take one call each.

    On a GPU work is put on PyTorch's current stream, and a class that does not exist is told late: see `fastce.cuda`.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import cross_entropy
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], requires_grad=True)
    >>> loss = cross_entropy(logits, torch.tensor([0, 2]))
    >>> print(f"{loss.item():.6f}")
    1.667234
    >>> loss.backward()
    >>> print(logits.grad.numpy().round(4))
    [[-0.1065  0.0533  0.0533]
     [ 0.0226  0.4547 -0.4774]]
    """
    tensors = (input, target, weight, sample_weight)
    if has_torch_function(tensors):
        return handle_torch_function(
            cross_entropy,
            tensors,
            input,
            target,
            weight,
            size_average,
            ignore_index,
            reduce,
            reduction,
            label_smoothing,
            sample_weight=sample_weight,
            logit_scale=logit_scale,
            softcap=softcap,
            z_loss=z_loss,
            on_empty=on_empty,
            n_threads=n_threads,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_tensors(input, target=target, weight=weight, sample_weight=sample_weight)
    if target.is_floating_point() and ignore_index < 0:
        ignore_index = _DEFAULT_IGNORE_INDEX  # PyTorch refuses only those that could be classes
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "on_empty": on_empty,
        "n_threads": n_threads,
    }
    _torch_operators.check_constants(options, ("input",), target=target, weight=weight, sample_weight=sample_weight)
    dtype = _loss_dtype(input)
    if not _torch_operators.is_ordinary(*tensors):
        return _torch_operators.differentiable_loss(*tensors, dtype, options)
    if torch.is_grad_enabled() and input.requires_grad:
        return _CrossEntropy.apply(*tensors, dtype, options)
    return _torch_arrays.loss_of(*tensors, dtype, options)


def empty_cache() -> None:
    """Give back to the system the memory that is kept for the next large gradient on the CPU.

    See Also
    --------
    torch.cuda.empty_cache : The same for GPUs, whose memory PyTorch keeps itself.

    Notes
    -----
    At most one is kept: the last that nothing refers to any more.

    Examples
    --------
    >>> from fastce.torch import empty_cache
    >>> empty_cache()
    """
    _torch_arrays.kept.clear()


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):  # type: ignore[misc]
    """Softmax cross-entropy as a module, in the place of ``torch.nn.CrossEntropyLoss``, which it is a kind of.

    Parameters
    ----------
    weight : Tensor, shape (C,), optional
        One factor per class. A buffer: it moves with the module and is part of its state.
    size_average, ignore_index, reduce, reduction, label_smoothing
        As for `cross_entropy`. Also attributes.
    logit_scale, softcap, z_loss, on_empty, n_threads
        As for `cross_entropy`. Also attributes.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`, for options out of range.

    Notes
    -----
    Sample weights differ from batch to batch: they are given to the call, ``loss(input, target, sample_weight=...)``.

    Examples
    --------
    >>> import torch
    >>> from fastce.torch import CrossEntropyLoss
    >>> loss = CrossEntropyLoss(label_smoothing=0.1, softcap=30.0)
    >>> loss
    CrossEntropyLoss(label_smoothing=0.1, softcap=30.0)
    >>> print(f"{loss(torch.zeros(4, 10), torch.arange(4)).item():.4f}")
    2.3026
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = _DEFAULT_IGNORE_INDEX,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        on_empty: str = "nan",
        n_threads: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.on_empty = on_empty
        self.n_threads = n_threads
        fastce.CrossEntropyLoss(**self._options())  # which checks them

    def _options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "z_loss": self.z_loss,
            "on_empty": self.on_empty,
            "n_threads": self.n_threads,
        }

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002 - PyTorch's name
        target: torch.Tensor,
        *,
        sample_weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, as `cross_entropy` does.

        Parameters
        ----------
        input, target, sample_weight
            As for `cross_entropy`.

        Returns
        -------
        loss : Tensor
            As from `cross_entropy`.
        """
        return cross_entropy(input, target, self.weight, sample_weight=sample_weight, **self._options())

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults, for the module's line in a model's listing."""
        defaults = {"ignore_index": _DEFAULT_IGNORE_INDEX, **(cross_entropy.__kwdefaults__ or {})}
        defaults |= {"reduction": "mean", "label_smoothing": 0.0}
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items() if value != defaults[name])


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The loss as a node of PyTorch's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,  # noqa: A002
        target: torch.Tensor,
        weight: torch.Tensor | None,
        sample_weight: torch.Tensor | None,
        dtype: torch.dtype,
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.dtype, ctx.options = dtype, options
        ctx.has_grad = (
            input.device.type == "cpu" and input.dtype != torch.float16 and options["reduction"] in ("mean", "sum")
        )
        if not ctx.has_grad:
            ctx.save_for_backward(input, target, weight, sample_weight)
            return _torch_arrays.loss_of(input, target, weight, sample_weight, dtype, options)
        loss, grad = _torch_arrays.loss_and_grad(input, target, weight, sample_weight, dtype, options)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not once_differentiable's business: it looks at grad_output only, which is a constant as a rule, and would
            # hand out a gradient that silently counts as a constant too.
            raise NotImplementedError(_torch_operators.ONCE)
        saved: tuple[Any, Any, Any, Any] = ctx.saved_tensors
        if ctx.has_grad:
            (grad,) = ctx.saved_tensors
            grad = _torch_operators.scale(grad, grad_output)
        elif _torch_operators.is_batched(grad_output):
            grad = _torch_operators.batched_gradient(grad_output, *saved, ctx.options)
        elif _torch_operators.is_ordinary(grad_output):
            _, grad = _torch_arrays.loss_and_grad(*saved, ctx.dtype, ctx.options, grad_output)
        else:
            grad = _torch_operators.gradient(grad_output, *saved, ctx.options)
        return grad, None, None, None, None, None


def _loss_dtype(input: torch.Tensor) -> torch.dtype:  # noqa: A002
    """Return PyTorch's dtype of the loss."""
    return torch.float32 if input.dtype in HALVES and torch.is_autocast_enabled(input.device.type) else input.dtype
