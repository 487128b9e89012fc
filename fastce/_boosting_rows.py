"""What XGBoost and LightGBM call an objective or a metric with: rows of margins, labels and weights.

Design
------
1. Soft labels are a table of what labels mean, not an array that runs parallel to a data set. Both libraries call a
   metric with one data set after another, take rows out for cross-validation, and, LightGBM, copy parameters: labels
   follow their rows through all that, whereas guesses by identity or number of rows go wrong.
2. One margin m per row is the difference of two classes' logits: the loss is that of the logits (0, m), the gradient by
   m is that of the second logit, and the second derivative by m the second entry of the Hessian's diagonal. The
   libraries multiply p (1 - p) for logits that move together, by 2 and C / (C - 1); one margin moves alone, so there
   the factor is 1, as in their own objectives for two classes. Two margins move apart as far as one moves.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastce._labels import as_index

Array = NDArray[Any]

_ONE_MARGIN = ", one margin, which is that of two classes"
_MAX_LABELS = 2**24  # both libraries keep labels in float32, where 2**24 + 1 is 2**24


class Rows(NamedTuple):
    """The rows of a call: predictions as passed, the logits that they mean, target and weights."""

    margins: Array
    logits: Array
    target: Array
    sample_weight: Any

    @property
    def has_one_margin(self) -> bool:
        """Return True if the logits are those of two classes with one margin."""
        return self.logits is not self.margins

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Explain, in the message about an invalid class, that there are two classes."""
        try:
            yield
        except IndexError as error:
            if not self.has_one_margin:
                raise
            raise IndexError(f"{error}{_ONE_MARGIN}: for more, set the library's num_class") from None


def read_rows(preds: Any, data: Any, sample_weight: Any, *, num_class: int | None, soft_labels: Array | None) -> Rows:
    """Return the rows of a call in either interface, for so many classes if that is known."""
    if hasattr(data, "get_label"):
        labels, sample_weight = data.get_label(), data.get_weight()
    else:
        labels, preds = preds, data
    margins = np.asarray(preds)
    logits = _as_logits(margins)
    if num_class not in (None, logits.shape[1]):
        raise ValueError(
            f"predictions must be of num_class={num_class} classes, got shape {margins.shape}"
            f"{_ONE_MARGIN if logits is not margins else ''}"
        )
    if labels is None or (np.size(labels) == 0 and len(logits)):
        raise ValueError("data must have labels, got none: set its label")  # None in LightGBM, else empty
    if sample_weight is not None and np.size(sample_weight) == 0:
        sample_weight = None  # so XGBoost says that there are none
    return Rows(margins, logits, _as_target(np.asarray(labels), soft_labels), sample_weight)


def _as_logits(margins: Array) -> Array:
    """Return the logits: the margins themselves, or for one margin those of two classes, (0, margin)."""
    if margins.ndim not in (1, 2):
        raise ValueError(
            f"predictions must have shape (n, n_classes), or (n,) or (n, 1) for two classes, got {margins.shape}"
        )
    if margins.ndim == 2 and margins.shape[1] != 1:
        return margins
    logits: Array = np.zeros((2, len(margins)), margins.dtype).T  # a class after the other: results are dense
    logits[:, 1] = margins.reshape(-1)
    return logits


def _as_target(labels: Array, table: Array | None) -> Array:
    """Return class indices or probabilities, as a table of soft labels has them."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        if table is not None:
            raise ValueError(
                f"labels must be one number per row where soft_labels say what they mean, got shape {labels.shape}"
            )
        return labels
    index = as_index(labels, "labels", ": distributions are rows of soft_labels, and a label is a row's number")
    if table is None:
        return index
    if index.size and not (index.min() >= 0 and index.max() < len(table)):
        bad = int(((index < 0) | (index >= len(table))).argmax())
        raise IndexError(f"label[{bad}] is {index[bad]}, but soft_labels has {len(table)} rows")
    target: Array = table[index]
    return target


def check_soft_labels(soft_labels: ArrayLike) -> Array:
    """Return the table; that the options go with it is checked later."""
    table = np.asarray(soft_labels)
    if table.ndim != 2:
        raise ValueError(f"soft_labels must have shape (n_labels, n_classes), got {table.shape}")
    if table.dtype.kind != "f":
        raise TypeError(f"soft_labels must be floats, got {table.dtype.name}")
    if len(table) > _MAX_LABELS:
        raise ValueError(
            f"soft_labels must have at most {_MAX_LABELS} rows, as labels are float32 numbers, got {len(table)}"
        )
    if table.size and not (table.min() >= 0 and table.max() < np.inf):
        bad = table[~((table >= 0) & (table < np.inf))][0]
        raise ValueError(f"soft_labels must be finite and not negative, got {bad}")
    return table
