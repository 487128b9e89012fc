"""Loss, and loss with gradient, over shapes, data types and threads."""

import numpy as np

import fastce
from fastce._reference import numpy_loss_and_grad

from .problems import DTYPES, NUMPY_SIZE_LIMIT, SHAPES, THREADS, make_logits, make_target

# Names in asv's tables; a list of tuples would be taken apart.
PROBLEMS = {f"{n_rows}x{n_classes}": (n_rows, n_classes) for n_rows, n_classes in SHAPES}


class Loss:
    """The loss alone: reads the logits."""

    params = (list(PROBLEMS), DTYPES, THREADS)
    param_names = ("problem", "dtype", "n_threads")

    def setup(self, problem, dtype, n_threads):
        self.logits = make_logits(PROBLEMS[problem], dtype)
        self.target = make_target(PROBLEMS[problem])

    def time_cross_entropy(self, problem, dtype, n_threads):
        fastce.cross_entropy(self.logits, self.target, n_threads=n_threads)


class GradInPlace:
    """Loss and gradient over the logits. Each call spoils its input and needs a setup of its own: `number` is 1."""

    params = (list(PROBLEMS), DTYPES, THREADS)
    param_names = ("problem", "dtype", "n_threads")
    number = 1

    def setup(self, problem, dtype, n_threads):
        self.logits = make_logits(PROBLEMS[problem], dtype)
        self.target = make_target(PROBLEMS[problem])
        # Filling the logits took long enough for the threads to fall asleep; a real training loop finds them awake.
        fastce.cross_entropy_with_grad(self.logits[:1], self.target[:1], n_threads=n_threads)

    def time_cross_entropy_with_grad(self, problem, dtype, n_threads):
        fastce.cross_entropy_with_grad(self.logits, self.target, out=self.logits, n_threads=n_threads)


class GradNew:
    """Loss and gradient in a new array: the price of fresh pages included."""

    params = (list(PROBLEMS), DTYPES, THREADS)
    param_names = ("problem", "dtype", "n_threads")

    def setup(self, problem, dtype, n_threads):
        self.logits = make_logits(PROBLEMS[problem], dtype)
        self.target = make_target(PROBLEMS[problem])

    def time_cross_entropy_with_grad(self, problem, dtype, n_threads):
        fastce.cross_entropy_with_grad(self.logits, self.target, n_threads=n_threads)


class Floor:
    """One read and one write of the logits: no gradient in place can take less. One thread."""

    params = (list(PROBLEMS), DTYPES)
    param_names = ("problem", "dtype")

    def setup(self, problem, dtype):
        self.logits = make_logits(PROBLEMS[problem], dtype)

    def time_multiply_by_one(self, problem, dtype):
        np.multiply(self.logits, 1, out=self.logits)


class NumPy:
    """What the library replaces: the obvious expression, which the tests check too."""

    params = (list(PROBLEMS), DTYPES)
    param_names = ("problem", "dtype")

    def setup(self, problem, dtype):
        n_rows, n_classes = PROBLEMS[problem]
        if n_rows * n_classes > NUMPY_SIZE_LIMIT:
            raise NotImplementedError
        self.logits = make_logits(PROBLEMS[problem], dtype)
        self.target = make_target(PROBLEMS[problem])

    def time_numpy_loss_and_grad(self, problem, dtype):
        numpy_loss_and_grad(self.logits, self.target)
