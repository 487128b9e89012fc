"""Mean cross-entropy of class indices and its gradient, by this library and by its peers.

Design
------
1. Packages are imported where they are used: all but NumPy are optional, and starting one may take seconds.
2. `prepare` does what a user does once: it converts types, wraps the memory of the logits, compiles. The call that it
   returns reads the logits as they are then, and may overwrite them; it does what a user does in every step. JAX, which
   takes no foreign memory that changes, works on a copy.
3. All get the same number of threads, but for those that cannot be told: NumPy and SciPy have one, JAX chooses.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import fastce
from fastce import _reference

Array = npt.NDArray[Any]
Call = Callable[[], tuple[Any, Any]]

# How far two of them may differ: all round in float32, which leaves some units of 1.2e-7, or round results to 16 bits,
# and some the loss as well.
TOLERANCE = 1e-5
_TOLERANCES_16_BIT = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


class Peer(NamedTuple):
    """What it takes to compute a loss and a gradient."""

    prepare: Callable[[Array, Array, int | None], Call]  # from logits, target, n_threads
    packages: tuple[str, ...] = ()  # to import, beyond this library and NumPy
    n_matrices: int = 0  # so many arrays of the logits' size exist at the peak, beyond the logits


def disagreement(one: tuple[Any, Any], other: tuple[Any, Any], n_rows: int) -> tuple[float, float]:
    """Return how far two losses differ, relative to 1 + loss, and two gradients, to 1 / n_rows; NaN if one has NaN."""
    loss, other_loss = float(one[0]), float(other[0])
    difference = one[1] - other[1]
    grad_error = float(np.abs(difference, out=difference).max(initial=0)) * n_rows
    return abs(loss - other_loss) / (1 + abs(other_loss)), grad_error


def tolerance(dtype: str) -> float:
    """Return how far results from logits of this type may differ."""
    return _TOLERANCES_16_BIT.get(dtype, TOLERANCE)


def refuse_more_than_a_matrix(logits: Array) -> None:
    """Raise an error for logits that would have to be transposed and copied first."""
    if logits.ndim != 2:
        raise ValueError(f"takes matrices only, got {logits.ndim} dimensions")


def prepare_fastce(logits: Array, target: Array, n_threads: int | None, *, new: bool = False) -> Call:
    """Write the gradient over the logits, or into a new array."""
    out = None if new else logits
    return lambda: fastce.cross_entropy_with_grad(logits, target, out=out, n_threads=n_threads)


def prepare_numpy(logits: Array, target: Array, _n_threads: int | None) -> Call:
    """Use the obvious expression."""
    refuse_more_than_a_matrix(logits)
    return lambda: _reference.numpy_loss_and_grad(logits, target)


def prepare_scipy(logits: Array, target: Array, _n_threads: int | None) -> Call:
    """Derive everything from `scipy.special.log_softmax`."""
    from scipy.special import log_softmax

    index = np.expand_dims(target, 1)

    def loss_and_grad() -> tuple[Any, Array]:
        log_p = log_softmax(logits, axis=1)
        loss = -np.take_along_axis(log_p, index, axis=1).mean()
        grad = np.exp(log_p, out=log_p)
        np.put_along_axis(grad, index, np.take_along_axis(grad, index, axis=1) - 1, axis=1)
        grad /= target.size
        return loss, grad

    return loss_and_grad


def prepare_sklearn(logits: Array, target: Array, n_threads: int | None) -> Call:
    """Use the loss under scikit-learn's own models; its default is one thread."""
    from sklearn._loss.loss import HalfMultinomialLoss

    refuse_more_than_a_matrix(logits)
    half_multinomial = HalfMultinomialLoss(n_classes=logits.shape[1])
    y = target.astype(logits.dtype)

    def loss_and_grad() -> tuple[Any, Array]:
        # One loss and gradient per row; the mean is left to the caller, as in those models.
        loss, grad = half_multinomial.loss_gradient(y, logits, gradient_out=logits, n_threads=n_threads or 1)
        grad /= len(target)
        return loss.mean(), grad

    return loss_and_grad


def prepare_torch(logits: Array, target: Array, n_threads: int | None, *, compiled: bool = False) -> Call:
    """Let autograd differentiate PyTorch's loss."""
    import torch

    if n_threads is not None:
        torch.set_num_threads(n_threads)
    cross_entropy = torch.nn.functional.cross_entropy
    if compiled:
        torch.compiler.reset()  # earlier shapes count against a limit, beyond which it runs eagerly
        cross_entropy = torch.compile(cross_entropy, dynamic=False)
    is_bfloat16 = logits.dtype.name == "bfloat16"  # which PyTorch takes from NumPy as other 16 bits only
    x = torch.from_numpy(logits.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(logits)
    x, y = x.requires_grad_(), torch.from_numpy(target)

    def loss_and_grad() -> tuple[Any, Any]:
        loss = cross_entropy(x, y)
        (grad,) = torch.autograd.grad(loss, x)
        if is_bfloat16:
            return loss.item(), grad.view(torch.int16).numpy().view(logits.dtype)
        return loss.detach(), grad

    return loss_and_grad


def prepare_jax(logits: Array, target: Array, _n_threads: int | None) -> Call:
    """Let JAX differentiate and compile optax's loss, for the CPU."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)  # or float64 would become float32
    cpu = jax.devices("cpu")[0]
    x, y = jax.device_put(logits.copy(), cpu), jax.device_put(target.astype(np.int32), cpu)

    def loss(x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(x, y, axis=1).mean()

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(value_and_grad(x, y))


@functools.cache
def compile_numba_loop() -> Any:
    """Return a loop over the rows that turns logits into the gradient and returns the loss."""
    import numba
    from numba import prange

    def loop(logits: Array, target: Array) -> Any:
        n_rows, n_classes = logits.shape
        loss = 0.0
        for i in prange(n_rows):
            top = logits[i, 0]
            for k in range(1, n_classes):
                top = max(top, logits[i, k])
            y = target[i]
            shifted = logits[i, y] - top
            total = logits.dtype.type(0)
            for k in range(n_classes):
                e = np.exp(logits[i, k] - top)
                logits[i, k] = e
                total += e
            loss += np.log(total) - shifted
            factor = logits.dtype.type(1 / (n_rows * total))
            for k in range(n_classes):
                logits[i, k] *= factor
            logits[i, y] -= 1 / n_rows
        return loss / n_rows

    # All of fast math but what would make NaN and infinity undefined.
    return numba.njit(parallel=True, fastmath={"reassoc", "contract", "arcp", "nsz"})(loop)


def prepare_numba(logits: Array, target: Array, n_threads: int | None) -> Call:
    """Compile the loop that one writes for Numba."""
    import numba

    refuse_more_than_a_matrix(logits)
    if n_threads is not None:
        numba.set_num_threads(n_threads)
    loop = compile_numba_loop()
    return lambda: (loop(logits, target), logits)


PEERS = {
    "fastce": Peer(prepare_fastce),
    "fastce, new": Peer(functools.partial(prepare_fastce, new=True), n_matrices=1),
    "NumPy": Peer(prepare_numpy, n_matrices=2),
    "SciPy": Peer(prepare_scipy, ("scipy",), n_matrices=3),
    "scikit-learn": Peer(prepare_sklearn, ("sklearn",)),
    "PyTorch": Peer(prepare_torch, ("torch",), n_matrices=3),
    "torch.compile": Peer(functools.partial(prepare_torch, compiled=True), ("torch",), n_matrices=3),
    "JAX + optax": Peer(prepare_jax, ("jax", "optax"), n_matrices=4),
    "Numba": Peer(prepare_numba, ("numba",)),
}
