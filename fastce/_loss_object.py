"""The loss as an object that keeps its options."""

from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._curvature import cross_entropy_grad_hess, cross_entropy_hvp
from fastce._loss import Loss, cross_entropy, cross_entropy_with_grad
from fastce._options import LossOptions, check_options

_DEFAULTS: dict[str, Any] = cross_entropy.__kwdefaults__ or {}


class CrossEntropyLoss:
    """Softmax cross-entropy with its options fixed.

    Parameters
    ----------
    **options
        The options of `cross_entropy`, all keyword-only, with its defaults; checked here as far as they can be without
        logits. Also attributes of the object.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy`, for options that are unknown or out of range.

    Notes
    -----
    ``CrossEntropyLoss(**options)(logits, target)`` is ``cross_entropy(logits, target, **options)``, where the formula
    stands.

    Examples
    --------
    >>> import numpy as np
    >>> import fastce
    >>> loss = fastce.CrossEntropyLoss(label_smoothing=0.1)
    >>> loss
    CrossEntropyLoss(label_smoothing=0.1)
    >>> print(f"{loss(np.zeros((4, 10)), np.arange(4)):.4f}")
    2.3026
    """

    def __init__(self, **options: Unpack[LossOptions]) -> None:
        given: dict[str, Any] = dict(options)
        unknown = given.keys() - _DEFAULTS.keys()
        if unknown:
            raise TypeError(f"options must be those of cross_entropy, got {', '.join(sorted(unknown))}")
        check_options(**{name: given[name] for name in given.keys() - {"axis", "weight", "sample_weight"}})
        self.__dict__.update(_DEFAULTS)
        self.__dict__.update(given)

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        changed = (
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not (value is _DEFAULTS[name] or np.array_equal(value, _DEFAULTS[name]))
        )
        return f"CrossEntropyLoss({', '.join(changed)})"

    def __call__(self, logits: ArrayLike, target: ArrayLike) -> Loss:
        """Return the loss, as `cross_entropy` does."""
        return cross_entropy(logits, target, **vars(self))

    def with_grad(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> tuple[Loss, NDArray[Any]]:
        """Return the loss and its gradient, as `cross_entropy_with_grad` does."""
        return cross_entropy_with_grad(logits, target, grad_output=grad_output, out=out, **vars(self))

    def hvp(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        v: ArrayLike,
        *,
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Return the product of the loss's Hessian and a vector, as `cross_entropy_hvp` does."""
        return cross_entropy_hvp(logits, target, v, grad_output=grad_output, out=out, **vars(self))

    def grad_hess(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        *,
        curvature: str = "exact",
        grad_output: ArrayLike | None = None,
        out: NDArray[Any] | None = None,
        hess_out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the gradient and a diagonal of curvature, as `cross_entropy_grad_hess` does."""
        return cross_entropy_grad_hess(
            logits, target, curvature=curvature, grad_output=grad_output, out=out, hess_out=hess_out, **vars(self)
        )
