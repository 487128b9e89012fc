"""The loss as an object with fixed options."""

from __future__ import annotations

import threading
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._arguments import Arguments
from fastce._array import bounds_view
from fastce._curvature import cross_entropy_grad_hess, cross_entropy_hvp
from fastce._dispatch import with_plain_options
from fastce._loss import Loss, cross_entropy, cross_entropy_with_grad
from fastce._options import OPTIONS
from fastce._stats import CrossEntropyStats

_DEFAULTS = {name: option.default for name, option in OPTIONS.items()} | {"reuse_grad": False}


class CrossEntropyLoss:
    """Softmax cross-entropy with fixed options.

    Parameters
    ----------
    axis, weight, sample_weight, ignore_index, label_smoothing, reduction, on_empty
        As for `cross_entropy`, with the same defaults. All options are keyword-only, and attributes of the object.
        Numbers and names are checked here, arrays when it is called.
    logit_scale, softcap, z_loss, n_threads
        As for `cross_entropy`.
    reuse_grad : bool, default False
        Whether `with_grad` overwrites the gradient that it returned last, instead of making a new array.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`, for options that are unknown or out of range.

    Notes
    -----
    ``CrossEntropyLoss(**options)(logits, target)`` is ``cross_entropy(logits, target, **options)``, which documents the
    formula. A `sample_weight` passed to a call replaces that of the object.

    Objects are equal if their options are equal, arrays element by element. Options can be changed later, so objects
    are not hashable. Arrays are not copied.

    With ``reuse_grad=True`` a gradient is valid until the next call of `with_grad` in the same thread: that returns the
    same array with other numbers, so that a training loop touches no new memory. A new array is made for logits of
    another shape, dtype or memory layout than those of the last call, for logits that are no array, if an argument
    lies in the memory of the last gradient, and if that is read-only. A call that raises leaves the last gradient as
    `out` would be left, and calls with `out` have nothing to do with it. Each thread has an array of its own, and so
    has each copy of the object. They are freed when the object is, or when `reuse_grad` is set to False.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> loss = fastce.CrossEntropyLoss(label_smoothing=0.1)
    >>> loss
    CrossEntropyLoss(label_smoothing=0.1)
    >>> print(f"{loss(np.zeros((4, 10)), np.arange(4)):.4f}")
    2.3026
    >>> loss == fastce.CrossEntropyLoss(label_smoothing=0.1)
    True
    """

    _last_grad: _LastGrad | None = None

    def __init__(
        self,
        *,
        axis: int | None = None,
        weight: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        on_empty: str = "nan",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        n_threads: int | None = None,
        reuse_grad: bool = False,
    ) -> None:
        options = (ignore_index, label_smoothing, reduction, on_empty, logit_scale, softcap, z_loss)
        with_plain_options(Arguments(None, None, axis, None, None, options, n_threads))
        self.axis = axis
        self.weight = weight
        self.sample_weight = sample_weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.on_empty = on_empty
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.z_loss = z_loss
        self.n_threads = n_threads
        self.reuse_grad = reuse_grad

    @property
    def reuse_grad(self) -> bool:
        """Whether `with_grad` overwrites the gradient that it returned last."""
        return self._last_grad is not None

    @reuse_grad.setter
    def reuse_grad(self, value: bool) -> None:
        vars(self).pop("_last_grad", None)
        if value:
            self._last_grad = _LastGrad()

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes, for copies and pickles, which have no gradients yet."""
        return vars(self) | ({"_last_grad": _LastGrad()} if self.reuse_grad else {})

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        values = ((name, getattr(self, name), default) for name, default in _DEFAULTS.items())
        changed = (f"{name}={value!r}" for name, value, default in values if not _is_same(value, default))
        return f"{type(self).__name__}({', '.join(changed)})"

    def __eq__(self, other: object) -> bool:
        """Return True if all options are the same."""
        if not isinstance(other, CrossEntropyLoss) or type(self) is not type(other):
            return NotImplemented
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in _DEFAULTS)

    __hash__ = None  # type: ignore[assignment]

    def _options(self, sample_weight: ArrayLike | None) -> dict[str, Any]:
        """Return the options of a call; other attributes are none."""
        own = vars(self)
        options = own if len(own) == len(OPTIONS) else {name: own[name] for name in OPTIONS}
        return options if sample_weight is None else {**options, "sample_weight": sample_weight}

    def __call__(self, logits: ArrayLike, target: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Loss:
        """Return the loss, as `cross_entropy` does."""
        return cross_entropy(logits, target, **self._options(sample_weight))

    @overload
    def with_grad(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        return_stats: Literal[False] = False,
    ) -> tuple[Loss, NDArray[Any]]: ...
    @overload
    def with_grad(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        return_stats: Literal[True],
    ) -> tuple[Loss, NDArray[Any], CrossEntropyStats]: ...
    @overload
    def with_grad(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        return_stats: bool,
    ) -> tuple[Loss, NDArray[Any]] | tuple[Loss, NDArray[Any], CrossEntropyStats]: ...
    def with_grad(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        return_stats: bool = False,
    ) -> tuple[Loss, NDArray[Any]] | tuple[Loss, NDArray[Any], CrossEntropyStats]:
        """Return the loss, its gradient and, on request, statistics, as `cross_entropy_with_grad` does.

        With `reuse_grad` the next call in the same thread overwrites the gradient.
        """
        options = self._options(sample_weight)
        last = self._last_grad if out is None else None
        if last is not None:
            out = last.array_for(logits, target, grad_output, options["weight"], options["sample_weight"])
        results = cross_entropy_with_grad(
            logits, target, grad_output=grad_output, out=out, return_stats=return_stats, **options
        )
        if last is not None:
            last.keep(logits, results[1])
        return results

    def hvp(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        v: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Return the product of the Hessian of the loss and a vector, as `cross_entropy_hvp` does."""
        return cross_entropy_hvp(logits, target, v, grad_output=grad_output, out=out, **self._options(sample_weight))

    def grad_hess(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        curvature: str = "exact",
        sample_weight: ArrayLike | None = None,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        hess_out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the gradient and a diagonal second derivative, as `cross_entropy_grad_hess` does."""
        return cross_entropy_grad_hess(
            logits,
            target,
            curvature=curvature,
            grad_output=grad_output,
            out=out,
            hess_out=hess_out,
            **self._options(sample_weight),
        )


class _LastGrad(threading.local):
    """The gradient that a call returned last; each thread has another."""

    _grad: Any = None
    _layouts: tuple[Any, ...] = ()  # of the logits, and of the gradient as it was made

    def __reduce__(self) -> tuple[type[_LastGrad], tuple[()]]:
        return _LastGrad, ()

    def keep(self, logits: Any, grad: Any) -> None:
        """Remember the gradient of these logits, if they are an array of the same kind."""
        if isinstance(logits, type(grad)):
            self._grad, self._layouts = grad, (_layout(logits), _layout(grad))

    def array_for(self, logits: Any, *others: Any) -> Any:
        """Return the last gradient if that of these logits would be like it, and no argument is in its memory."""
        grad = self._grad
        if grad is None or not isinstance(logits, type(grad)) or self._layouts != (_layout(logits), _layout(grad)):
            return None
        arrays = [array for array in (logits, *others) if isinstance(array, type(grad))]
        is_used = any(np.may_share_memory(bounds_view(array), bounds_view(grad)) for array in arrays)
        is_writeable = getattr(grad.flags, "writeable", True)  # on a GPU all are
        return grad if is_writeable and not is_used else None


def _layout(array: Any) -> tuple[Any, ...]:
    return array.shape, array.strides, array.dtype, array.device


def _is_same(a: object, b: object) -> bool:
    """Return True if two values of an option are the same."""
    if a is b:
        return True
    if a is None or b is None:
        return False
    try:
        return bool(np.array_equal(a, b))  # type: ignore[arg-type]
    except (TypeError, RuntimeError):  # one is on a GPU, the other is not
        return False
