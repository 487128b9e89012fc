"""Softmax cross-entropy of PyTorch tensors, a replacement for that of `torch.nn`: a script changes one import.

Needs PyTorch, which nothing else in this package imports.

Design
------
1. On the CPU the forward pass of a reduced loss also computes the gradient, and saves it instead of the logits. The
   upstream gradient of a training step is 1, and then backward has nothing left to do.
2. In other cases backward computes the gradient, with the upstream gradient folded in:

   - float16, where losses are scaled up to keep small gradients from underflow: scaling a stored 0 would be too late;
   - ``reduction="none"``, with arbitrary upstream gradients: multiplying by them later takes another sweep, and turns
     the zeros of skipped rows into NaN where they are infinite;
   - on a GPU, where asking whether a number is 1 means waiting for all work before it.

3. A saved gradient is multiplied in place, unless the graph is retained: an earlier caller may still hold it.
4. Transforms, forward mode, compilers and everything else that intercepts operators get operators: see
   `_torch_operators`.
"""

import inspect
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
from fastce import _torch_arrays, _torch_graph, _torch_memory, _torch_operators
from fastce._torch_arrays import check_tensors
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
        The logits, on the CPU or on a CUDA device, of any strides.
    target : Tensor
        Class indices of any integer dtype, shaped like `input` without the class axis; or class probabilities of any
        floating dtype, shaped like `input`.
    weight : Tensor, shape (C,), optional
        One factor per class, finite, of any sign.
    size_average, reduce : bool, optional
        Old names of `reduction`. Deprecated in PyTorch, which warns.
    ignore_index : int, default -100
        Rows with this class index are skipped. With class probabilities it must be negative, and has no effect.
    reduction : {"mean", "sum", "none"}, default "mean"
        How the losses of the rows are combined.
    label_smoothing : float in [0, 1], default 0
        Share of the uniform distribution in the target.
    sample_weight : Tensor, shaped like an index target, optional
        One factor per row, finite, of any sign. Rows of weight 0 are skipped.
    logit_scale, softcap, z_loss, on_empty, n_threads
        As for `fastce.cross_entropy`.

    Returns
    -------
    loss : Tensor, without dimensions, or shaped like an index target if ``reduction="none"``
        Has the dtype of `input`; under autocast float32 for half-precision logits. Both are as in PyTorch.

    Raises
    ------
    TypeError
        If an argument is not a tensor, is sparse, quantized, nested or masked, is on another device than `input`, or
        has the wrong dtype; if `input` is neither on the CPU nor on a CUDA device.
    IndexError, ValueError
        As `fastce.cross_entropy`.
    NotImplementedError
        If anything but `input` requires a gradient or has a tangent; if the gradient is differentiated again, in either
        mode; if it is compiled as a whole within a transform of ``torch.func``.
    ImportError
        If a tensor is bfloat16 and ml_dtypes is missing, or if it is on a GPU and CuPy is missing.

    See Also
    --------
    fastce.cross_entropy : The formula, and what the options mean.
    CrossEntropyLoss : The same as a module.

    Notes
    -----
    The gradient has the dtype and the memory format of `input`. For a reduced loss on the CPU the forward pass computes
    it, and it is saved instead of the logits; backward multiplies it by the upstream gradient unless that is 1. In
    float16, with ``reduction="none"`` and on a GPU, backward computes it with the upstream gradient folded in. It is
    rounded once, so scaled losses keep small gradients. Then `input` is saved, and must not be overwritten before
    backward.

    The transforms of ``torch.func`` work, gradients per sample by ``vmap(grad(...))`` in one call for all samples, and
    so do forward mode, ``torch.compile``, ``torch.export``, ``torch.jit.trace`` and fake tensors. They see an operator,
    ``torch.ops.fastce.cross_entropy``, whose backward computes the gradient. Class weights that differ from sample to
    sample need one call each.

    On a GPU work goes to PyTorch's current stream, and a class out of range is reported late: see `fastce.cuda`.

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
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "z_loss": z_loss,
        "on_empty": on_empty,
        "n_threads": n_threads,
    }
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
            **options,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    check_tensors(input, target=target, weight=weight, sample_weight=sample_weight)
    if target.is_floating_point() and ignore_index < 0:
        ignore_index = _DEFAULT_IGNORE_INDEX  # PyTorch refuses only those that could be classes
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing, **options}
    _torch_graph.check_constants(options, ("input",), target=target, weight=weight, sample_weight=sample_weight)
    dtype = _torch_arrays.loss_dtype(input)
    if not _torch_graph.is_ordinary(*tensors):
        return _torch_operators.differentiable_loss(tensors, dtype, options)
    if torch.is_grad_enabled() and input.requires_grad:
        return _CrossEntropy.apply(dtype, options, *tensors)
    return _torch_arrays.loss_of(tensors, dtype, options)


# The options, which a module keeps, and their defaults.
_PARAMETERS = inspect.signature(cross_entropy).parameters.values()
_DEFAULTS = {x.name: x.default for x in _PARAMETERS if x.name in _torch_operators.Options._fields}


def empty_cache() -> None:
    """Free the memory that is kept for the next large gradient on the CPU.

    See Also
    --------
    torch.cuda.empty_cache : The same for GPUs, whose memory PyTorch caches itself.

    Notes
    -----
    The memory of one gradient is kept: the last one that nothing refers to any more.

    Examples
    --------
    >>> from fastce.torch import empty_cache
    >>> empty_cache()
    """
    _torch_memory.kept.clear()


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):  # type: ignore[misc]
    """Softmax cross-entropy as a module, a subclass of and replacement for ``torch.nn.CrossEntropyLoss``.

    Parameters
    ----------
    weight : Tensor, shape (C,), optional
        One factor per class. It is a buffer: it moves with the module and is part of its state.
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
    Sample weights differ from batch to batch, so they are passed to the call: ``loss(input, target,
    sample_weight=...)``.

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
        return {name: getattr(self, name) for name in _DEFAULTS}

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
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items() if value != _DEFAULTS[name])


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The loss as a node of PyTorch's graph."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, options: dict[str, Any], *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.dtype, ctx.options = dtype, options
        ctx.has_grad = _torch_graph.is_gradient_made_forward(tensors, options)
        if not ctx.has_grad:
            ctx.save_for_backward(*tensors)
            return _torch_arrays.loss_of(tensors, dtype, options)
        loss, grad = _torch_arrays.loss_and_grad(tensors, dtype, options)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @_torch_graph.untraced_if_compiling
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not once_differentiable's business: it looks at grad_output only, which is a constant as a rule, and would
            # hand out a gradient that silently counts as a constant too.
            raise NotImplementedError(_torch_operators.ONCE)
        # The arguments, or the gradient alone. Asked for once: a checkpoint gives them out no second time.
        saved = ctx.saved_tensors
        if ctx.has_grad:
            grad = _torch_graph.scale(saved[0], grad_output)
        elif _torch_graph.is_ordinary(grad_output):
            _, grad = _torch_arrays.loss_and_grad(saved, ctx.dtype, ctx.options, grad_output)
        else:
            grad = _torch_operators.gradient(grad_output, saved, ctx.options)
        return None, None, grad, None, None, None
