"""Softmax cross-entropy on PyTorch's tensors, for scripts that take it from `torch.nn` today: change the import.

Needs PyTorch, which nothing else in this package imports.

Design
------
1. Tensors are looked at where they are, never copied: on the host as NumPy arrays, on a GPU as CuPy's. NumPy has no
   bfloat16, so it travels as integers of 16 bits and is then called by the name that ml_dtypes gives it.
2. On the host a reduced loss makes its gradient in the forward sweep; only that is saved, not the logits. The upstream
   gradient of a training step is 1, and then backward has nothing left to do.
3. Elsewhere the sweep that makes the gradient is backward's, with the upstream gradient folded into it:

   - float16, whose losses are scaled up lest small gradients become 0: scaling what has become 0 comes too late;
   - ``reduction="none"``, whose upstream gradients are anything: multiplying by them later is a sweep as well, and
     makes NaN of the zeros of skipped rows where they are infinite;
   - on a GPU, where to ask whether a number is 1 is to wait for all work before it.

4. A saved gradient is multiplied where it is, unless the graph is retained: whoever got it before may hold it still.
5. Large gradients on the host are in NumPy's memory, for which it asks Linux for large pages, and the memory of the
   last one that nobody holds any more is kept for the next step. To touch new memory for the first time takes longer
   than all else: forward and backward of 4096 x 32000 logits of float32 take 36 ms instead of 103, and 475 in PyTorch
   (asv_bench/training.py, two cores of a Zen 4).
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import _reduction  # the names of old keywords: nothing public knows them

import fastce

__all__ = ["CrossEntropyLoss", "cross_entropy", "empty_cache"]

_DEFAULT_IGNORE_INDEX = -100

_LARGE = 4 * 2**20  # bytes from which NumPy asks for large pages

# Memory of a large gradient that nobody holds any more: one buffer of bytes, or none.
_kept: list[NDArray[np.uint8]] = []

# Whether backward runs with retain_graph=True. Nothing public tells; where this is missing, assume so: it costs a copy.
_is_graph_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


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
        The logits, on the host or on a CUDA device, of any strides. Messages of errors call them logits.
    target : Tensor
        Class indices of any integer dtype, shaped like `input` without the class axis; or class probabilities of any
        floating dtype, shaped like `input`.
    weight : Tensor, shape (C,), optional
        One factor per class, finite and not negative.
    size_average, reduce : bool, optional
        What `reduction` was formerly called. Deprecated in PyTorch, which warns.
    ignore_index : int, default -100
        Rows with this class index are skipped. With class probabilities it must be negative, and means nothing.
    reduction : {"mean", "sum", "none"}, default "mean"
        What to do with the losses of the rows.
    label_smoothing : float in [0, 1], default 0
        How much of the target is replaced by the uniform distribution.
    sample_weight : Tensor, shaped like an index target, optional
        One factor per row. Rows of weight 0 are skipped.
    logit_scale, softcap, z_loss, on_empty, n_threads
        As for `fastce.cross_entropy`.

    Returns
    -------
    loss : Tensor, without dimensions, or shaped like an index target if ``reduction="none"``
        Of the dtype of `input`, as in PyTorch; under autocast float32 for logits of 16 bits, as there.

    Raises
    ------
    TypeError
        If an argument is no tensor, is on another device than `input`, or of a wrong kind; if `input` is neither on the
        host nor on a CUDA device.
    IndexError, ValueError
        As `fastce.cross_entropy`.
    NotImplementedError
        If anything but `input` requires a gradient; from ``backward``, if it is called with ``create_graph=True``.
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
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    _check_tensors(input, target=target, weight=weight, sample_weight=sample_weight)
    if torch.is_grad_enabled():
        constants = {
            "target": target,
            "weight": weight,
            "sample_weight": sample_weight,
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "z_loss": z_loss,
        }
        for name, value in constants.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise NotImplementedError(
                    f"{name} must not require a gradient, which is made for input alone (pass {name}.detach(), or use "
                    f"torch.nn.functional.cross_entropy), got a tensor that does"
                )
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
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            options[name] = value.detach()  # a number as well, but PyTorch warns where it could have a gradient
    if torch.is_grad_enabled() and input.requires_grad:
        return _CrossEntropy.apply(input, target, weight, sample_weight, options)
    return _loss(input, target, weight, sample_weight, options)


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
    _kept.clear()


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
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.options = options
        ctx.has_grad = (
            input.device.type == "cpu" and input.dtype != torch.float16 and options["reduction"] in ("mean", "sum")
        )
        if not ctx.has_grad:
            ctx.save_for_backward(input, target, weight, sample_weight)
            return _loss(input, target, weight, sample_weight, options)
        loss, grad = _loss_and_grad(input, target, weight, sample_weight, options)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not once_differentiable's business: it looks at grad_output only, which is a constant as a rule, and would
            # hand out a gradient that silently counts as a constant too.
            raise NotImplementedError(
                "the gradient of fastce.torch.cross_entropy cannot be differentiated again: call backward or "
                "torch.autograd.grad without create_graph=True, or use torch.nn.functional.cross_entropy"
            )
        if ctx.has_grad:
            (grad,) = ctx.saved_tensors
            grad = _scale(grad, float(grad_output))
        else:
            input, target, weight, sample_weight = ctx.saved_tensors  # noqa: A001
            _, grad = _loss_and_grad(input, target, weight, sample_weight, ctx.options, grad_output)
        return grad, None, None, None, None


def _scale(grad: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply a gradient, where it is if nobody will ask for it again."""
    if _is_graph_retained():
        return grad * factor
    return grad if factor == 1 else grad.mul_(factor)


def _check_tensors(input: torch.Tensor, **others: torch.Tensor | None) -> None:  # noqa: A002
    """Refuse what is no tensor, or not where the logits are."""
    for name, value in {"input": input, **others}.items():
        if value is None and name != "target":
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.device != input.device:
            raise TypeError(f"{name} must be on the device of input, {input.device}, got {value.device}")
    if input.device.type not in ("cpu", "cuda"):
        raise TypeError(f"input must be on the CPU or a CUDA device, got a tensor on {input.device}")


def _loss(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor,
    weight: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return the loss."""
    with _stream_of(input):
        loss = fastce.cross_entropy(
            _as_array(input),
            _as_array(target),
            weight=_as_array(weight),
            sample_weight=_as_array(sample_weight),
            **options,
        )
        return _as_tensor(loss, _loss_dtype(input))


def _loss_and_grad(
    input: torch.Tensor,  # noqa: A002
    target: torch.Tensor,
    weight: torch.Tensor | None,
    sample_weight: torch.Tensor | None,
    options: dict[str, Any],
    grad_output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the gradient in a new tensor."""
    grad = _empty_like(input)
    with _stream_of(input):
        loss, _ = fastce.cross_entropy_with_grad(
            _as_array(input),
            _as_array(target),
            weight=_as_array(weight),
            sample_weight=_as_array(sample_weight),
            grad_output=_as_array(grad_output),
            out=_as_array(grad),
            **options,
        )
        return _as_tensor(loss, _loss_dtype(input)), grad


def _empty_like(input: torch.Tensor) -> torch.Tensor:  # noqa: A002
    """Return what `torch.empty_like` returns, strides included, in memory that is sooner there."""
    if input.device.type != "cpu" or input.nbytes < _LARGE:
        return torch.empty_like(input)
    like = torch.empty_like(input, device="meta")
    storage = torch.from_numpy(_lend(like.nbytes)).untyped_storage()
    return torch.empty(0, dtype=input.dtype).set_(storage, 0, like.shape, like.stride())


def _lend(n_bytes: int) -> NDArray[np.uint8]:
    """Return memory that comes back to `_kept` when nothing refers to it any more."""
    try:
        memory = _kept.pop()
    except IndexError:
        memory = np.empty(n_bytes, np.uint8)
    if not n_bytes <= memory.nbytes <= 2 * n_bytes:  # too small, or too much to hold for so little
        memory = np.empty(n_bytes, np.uint8)
    loan = memory[:n_bytes]
    weakref.finalize(loan, _take_back, memory).atexit = False
    return loan


def _take_back(memory: NDArray[np.uint8]) -> None:
    """Keep this memory, and no other."""
    _kept[:] = [memory]


def _loss_dtype(input: torch.Tensor) -> torch.dtype:  # noqa: A002
    """Return PyTorch's dtype of the loss."""
    is_half = input.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if is_half and torch.is_autocast_enabled(input.device.type) else input.dtype


def _as_array(tensor: torch.Tensor | None) -> Any:
    """Return an array of NumPy or CuPy in the memory of a tensor."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    dtype = None
    if tensor.dtype == torch.bfloat16:
        dtype = _bfloat16()
        tensor = tensor.view(torch.int16)
    if tensor.device.type == "cpu":
        array = tensor.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(tensor)
    return array if dtype is None else array.view(dtype)


def _as_tensor(loss: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a loss as a tensor where it is."""
    is_on_host = isinstance(loss, np.ndarray | np.generic)
    tensor = torch.from_numpy(np.asarray(loss)) if is_on_host else torch.from_dlpack(loss)
    return tensor.to(dtype)


def _bfloat16() -> Any:
    """Return NumPy's dtype of this name."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 tensors need the package ml_dtypes: pip install ml-dtypes") from error
    return ml_dtypes.bfloat16


class _ForeignStream:
    """A stream as CuPy takes it in; PyTorch's own say this of themselves in recent versions only."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def _stream_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CuPy works where PyTorch does, so that each finds what the other has done."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else _current_stream(tensor.device)


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[None]:
    import cupy

    with torch.cuda.device(device):  # which CuPy takes for the stream's
        stream = _ForeignStream(torch.cuda.current_stream(device))
        with cupy.cuda.Stream.from_external(stream):
            yield
