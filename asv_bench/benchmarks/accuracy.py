"""The worst error of a case, on fewer rows than are timed."""

from dataclasses import replace

import numpy as np

import fastce
from fastce import _cpu, _reference
from fastce._benchmarks.cases import make_arguments, make_logits

SIZE_LIMIT = 1 << 18  # logits: the truth takes twenty float64 arrays of that size


def shrink(shape):
    """Return a shape of the same classes and no more than `SIZE_LIMIT` logits, or a single row."""
    shape = np.array(shape)
    rows = np.arange(shape.size) != 1
    while shape.prod() > SIZE_LIMIT and (shape[rows] > 1).any():
        longest = np.where(rows, shape, 0).argmax()
        shape[longest] = (shape[longest] + 1) // 2
    return tuple(shape.tolist())


def plain_truth(logits, target):
    """Return each row's loss and gradient in long double, of a matrix of finite logits and class indices."""
    rows = np.arange(len(logits))
    terms = np.exp(logits.astype(np.longdouble) - logits[rows, target].astype(np.longdouble)[:, None])
    terms[rows, target] = 0
    others = terms.sum(axis=1)
    grad = terms / (1 + others)[:, None]
    grad[rows, target] = -others / (1 + others)
    return np.log1p(others), grad


def worst_ulp(case):
    """Return the largest error of a row's loss or gradient, in ulp; NaN where there is no truth to compare with.

    An ulp is the spacing of the type's numbers at the right loss, or at the row's largest gradient: where two terms
    of a gradient nearly cancel, a unit of the tiny rest says nothing. Few classes have targets that lead by far, and
    each unit of the lead may cost one ulp: compare commits, not shapes.
    """
    case = replace(case, shape=shrink(case.shape))
    logits, arguments = make_logits(case), make_arguments(case)
    stats = arguments.pop("return_stats", False)
    arguments["reduction"] = "none"
    if case.dtype != "float64":
        right_loss, right_grad, _ = _reference.cross_entropy(logits, **arguments)
    elif case.option == "plain" and logits.ndim == 2 and np.finfo(np.longdouble).eps < np.finfo(np.float64).eps:
        right_loss, right_grad = plain_truth(logits, arguments["target"])
    else:
        return float("nan")
    arguments |= {"return_stats": stats, "n_threads": case.n_threads}
    with _cpu.use_isa(case.isa or _cpu.isa):
        loss, grad, *_ = fastce.cross_entropy_with_grad(logits, out=logits, **arguments)
    loss_ulp = np.spacing(abs(right_loss).astype(loss.dtype))
    grad_ulp = np.spacing(abs(right_grad).max(axis=1, keepdims=True).astype(grad.dtype))
    loss_error = abs(loss - right_loss) / loss_ulp
    # Not in 16 bits: NumPy would not promote bfloat16 and float64 to float64 in all versions.
    grad_error = abs(grad.astype(right_grad.dtype) - right_grad) / grad_ulp.astype(right_grad.dtype)
    return float(max(loss_error.max(), grad_error.max()))
