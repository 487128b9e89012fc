"""What is timed: shapes and numbers."""

import functools

import numpy as np

# (rows, classes), each for its reason.
SHAPES = [
    (65536, 1000),  # image classes, far out of cache
    (4096, 32000),  # a vocabulary
    (1024, 128256),  # a large vocabulary: a row is half a megabyte
    (65536, 100),  # short rows, near the size of a cache
    (1000000, 10),  # few classes: every per-row cost shows
    (256, 1000),  # in cache
    (32, 10),  # the cost of a call
]
DTYPES = ["float32", "float64"]
THREADS = [1, 2]

# NumPy needs several matrices of the logits' size; its benchmark stops at these many logits.
NUMPY_SIZE_LIMIT = 10_000_000

# Repeated to fill the logits: drawing them all would take longer than timing. Prime, so that no two rows are alike.
N_RANDOM = 1_000_003


@functools.cache
def random_numbers(dtype):
    """Return normal numbers of standard deviation 3, as the logits of a half-trained model."""
    return (3 * np.random.default_rng(0).standard_normal(N_RANDOM)).astype(dtype)


def make_logits(shape, dtype):
    """Return new logits."""
    return np.resize(random_numbers(dtype), shape)


def make_target(shape):
    """Return class indices."""
    n_rows, n_classes = shape
    return np.random.default_rng(1).integers(n_classes, size=n_rows)
