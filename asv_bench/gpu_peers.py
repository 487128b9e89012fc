"""Loss and gradient on a GPU by this library and by those it is compared with, on the same logits, and their times.

Design
------
1. CuPy owns the arrays that all work on; PyTorch sees the same memory. Whoever can writes the gradient over the logits.
2. A peer is prepared once, with what a user does once; its call takes the number of a set of logits and does what
   a user does in every step. Packages are imported where they are used: all but CuPy are optional.
3. Numbers of 16 bits are copied, compared and handed over as integers, so that no library has to know their type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastce
from fastce import _reference
from fastce._benchmarks.cases import random_numbers
from fastce._benchmarks.peers import refuse_more_than_a_matrix

N_SETS = 2  # of logits, in turn


class Problem:
    """Targets, and sets of logits of the same shape, classes second, with what they are restored from."""

    def __init__(self, shape, dtype, ignored=0.0):
        import cupy

        rng = np.random.default_rng(1)
        self.row_shape = shape[0], *shape[2:]
        self.host_target = rng.integers(shape[1], size=self.row_shape)
        self.host_target[rng.random(self.row_shape) < ignored] = -100
        self.target = cupy.asarray(self.host_target)
        self.n_rows, self.n_kept = self.target.size, int((self.host_target >= 0).sum())
        numbers = random_numbers(dtype)
        self.sources = [fill(np.roll(numbers, 1000 * k), shape) for k in range(N_SETS)]
        self.logits = [cupy.empty_like(source) for source in self.sources]

    @property
    def n_bytes(self):
        """What has to move: kept rows in, all rows out, a class index in and a loss out for each."""
        n_classes, itemsize = self.logits[0].shape[1], self.logits[0].itemsize
        return (self.n_kept + self.n_rows) * n_classes * itemsize + 12 * self.n_rows

    def restore(self, k):
        """Copy fresh logits into set k."""
        copy(self.sources[k], self.logits[k])

    def grad_error(self, grad, is_sum=False):
        """Return by how much a gradient of set 0 misses float64's in three rows, times what the mean divides by."""
        rows = [0, self.n_rows // 2, self.n_rows - 1]
        x, g = (rows_of(array, rows, self.sources[0].dtype) for array in (self.sources[0], grad))
        expected = _reference.cross_entropy(x, self.host_target.reshape(-1)[rows], reduction="sum").grad
        return float(np.abs(g.astype(np.float64) * (1 if is_sum else self.n_kept) - expected).max())


def copy(source, target):
    """Copy memory to memory of the device."""
    target.data.copy_from_device_async(source.data, source.nbytes)


def fill(numbers, shape):
    """Return these numbers on the GPU over and over."""
    import cupy

    bits = cupy.asarray(numbers.view(f"i{numbers.itemsize}"))
    flat = cupy.empty(math.prod(shape), bits.dtype)
    for start in range(0, flat.size, bits.size):
        part = flat[start : start + bits.size]
        part[...] = bits[: part.size]
    return flat.reshape(shape).view(numbers.dtype)


def bits_of(x):
    """Return the integers in the memory of a CuPy array or of a tensor."""
    import cupy

    if not isinstance(x, cupy.ndarray):
        import torch

        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = cupy.from_dlpack(x.detach().view(integers[x.element_size()]))
    return x.view(f"i{x.itemsize}")


def rows_of(x, rows, dtype):
    """Return some rows as a NumPy array."""
    import cupy

    matrix = cupy.moveaxis(bits_of(x), 1, -1).reshape(-1, x.shape[1])
    return np.stack([matrix[row].get() for row in rows]).view(dtype)


def as_torch(x):
    """Return a tensor in the memory of a CuPy array; bfloat16 travels as integers, which all versions know."""
    import torch

    if x.dtype.name == "bfloat16":
        return torch.from_dlpack(x.view("i2")).view(torch.bfloat16)
    return torch.from_dlpack(x)


def import_torch():
    """Return PyTorch if it works on the GPU, on the stream of CuPy: by default both use the device's own."""
    import cupy
    import torch

    if not torch.cuda.is_available():
        raise ImportError(f"PyTorch {torch.__version__} finds no GPU")
    if torch.cuda.current_stream().cuda_stream != cupy.cuda.get_current_stream().ptr:
        raise RuntimeError("PyTorch and CuPy have different streams, and would not wait for each other")
    return torch


class Peer(NamedTuple):
    """What it takes to compute a loss and a gradient."""

    prepare: Callable[[Problem], Callable[[int], tuple[Any, Any]]]
    is_sum: bool = False  # the gradient is that of the sum, which nobody has divided by the number of rows


def prepare_fastce(problem):
    """Write the gradient over the logits."""
    return lambda k: fastce.cross_entropy_with_grad(problem.logits[k], problem.target, out=problem.logits[k])


def prepare_fastce_loss(problem):
    """Make no gradient."""
    return lambda k: (fastce.cross_entropy(problem.logits[k], problem.target), None)


def prepare_fastce_tensors(problem):
    """Take PyTorch's tensors, which are taken in anew in every call."""
    import_torch()
    x, y = [as_torch(x) for x in problem.logits], as_torch(problem.target)
    return lambda k: fastce.cross_entropy_with_grad(x[k], y, out=x[k])


def prepare_cupy(problem):
    """Use the obvious expression, in float32 for logits of 16 bits."""
    import cupy

    grid = cupy.meshgrid(*map(cupy.arange, problem.row_shape), indexing="ij", sparse=True)
    at_target = grid[0], problem.target, *grid[1:]

    def loss_and_grad(k):
        logits = problem.logits[k]
        x = logits.astype("float32", copy=False)
        shifted = x - x.max(axis=1, keepdims=True)
        p = cupy.exp(shifted)
        s = p.sum(axis=1, keepdims=True)
        loss = (cupy.log(s[:, 0]) - shifted[at_target]).mean()
        p /= s
        p[at_target] -= 1
        p /= problem.n_rows
        return loss, p.astype(logits.dtype, copy=False)

    return loss_and_grad


def with_autograd(problem, loss_of):
    """Return a call that differentiates a function of tensors."""
    torch = import_torch()
    x, y = [as_torch(x).requires_grad_() for x in problem.logits], as_torch(problem.target)

    def loss_and_grad(k):
        loss = loss_of(x[k], y)
        (grad,) = torch.autograd.grad(loss, x[k])
        return loss.detach(), grad

    return loss_and_grad


def prepare_torch(problem, compiled=False):
    """Use PyTorch's own loss."""
    torch = import_torch()
    cross_entropy = torch.nn.functional.cross_entropy
    if compiled:
        torch.compiler.reset()  # earlier shapes count against a limit, beyond which it runs eagerly
        cross_entropy = torch.compile(cross_entropy, dynamic=False)
    return with_autograd(problem, cross_entropy)


def prepare_liger(problem):
    """Use Liger's function, whose forward pass writes the gradient over the logits."""
    refuse_more_than_a_matrix(problem.logits[0])
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return with_autograd(problem, lambda x, y: LigerCrossEntropyFunction.apply(x, y, None)[0])


def prepare_quack(problem):
    """Use quack's mean loss, whose backward pass writes the gradient over the logits."""
    refuse_more_than_a_matrix(problem.logits[0])
    from quack.cross_entropy import cross_entropy

    return with_autograd(problem, lambda x, y: cross_entropy(x, y, reduction="mean", inplace_backward=True))


def prepare_quack_at_once(problem):
    """Let quack's forward kernel write the gradient over the logits, which it can for the sum alone."""
    refuse_more_than_a_matrix(problem.logits[0])
    import_torch()
    from quack.cross_entropy import cross_entropy_fwd

    x, y = [as_torch(x) for x in problem.logits], as_torch(problem.target)

    def loss_and_grad(k):
        loss, *_, grad = cross_entropy_fwd(x[k], y, return_dx=True, inplace_backward=True)
        return loss.mean(), grad

    return loss_and_grad


PEERS = {
    "fastce": Peer(prepare_fastce),
    "CuPy": Peer(prepare_cupy),
    "PyTorch": Peer(prepare_torch),
    "torch.compile": Peer(functools.partial(prepare_torch, compiled=True)),
    "Liger": Peer(prepare_liger),
    "quack": Peer(prepare_quack),
    "quack, sum": Peer(prepare_quack_at_once, is_sum=True),
}
