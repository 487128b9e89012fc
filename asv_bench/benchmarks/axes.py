"""The map: axes through one base case, 65536 x 1000 float32 in C order, plain, loss and gradient in place, two threads.

The cross product of all axes would take days and make tables that nobody reads.
"""

import contextlib
from dataclasses import replace

from fastce import _cpu
from fastce._benchmarks.cases import (
    CALLS,
    DTYPES,
    IMAGES,
    LAYOUTS,
    OPTIONS,
    SHAPES,
    Case,
    make_logits,
    name_shape,
    parse_shape,
)
from fastce._benchmarks.measure import make_call, make_operands, measure, wake_threads
from fastce._benchmarks.peers import PEERS
from fastce._benchmarks.steps import STEPS, make_step, run_steps

from .accuracy import worst_ulp

BASE = Case((65536, 1000), n_threads=2)
STEP_ROUNDS = 7


def round_for_table(number):
    """Return no more digits than mean something; asv prints all that there are."""
    return float(f"{number:.3g}")


class _Axis:
    """What is measured at each point of an axis: `param_names` holds the field of `Case` that varies."""

    # A call in place spoils its input and needs a setup of its own. Of short calls, as many as fit in a second.
    number = 1
    repeat = (5, 200, 1.0)

    def make_case(self, value):
        return replace(BASE, **{self.param_names[0]: value})

    def setup(self, value):
        self.stack = contextlib.ExitStack()
        self.case = self.make_case(value)
        if not self.case.is_supported():
            raise NotImplementedError
        self.logits = make_logits(self.case)
        self.call = make_call(self.case, self.logits, make_operands(self.case, self.logits))
        self.stack.enter_context(_cpu.use_isa(self.case.isa or _cpu.isa))
        wake_threads(self.case.n_threads)

    def teardown(self, value):
        self.stack.close()

    def time_call(self, value):
        self.call()

    def peakmem_call(self, value):
        self.call()

    def track_ratio_to_floor(self, value):
        return round_for_table(measure([self.case])[self.case].multiple)

    def track_gigabytes_per_second(self, value):
        n_bytes = CALLS[self.case.call].n_passes * self.case.n_bytes
        return round_for_table(1e-9 * n_bytes / measure([self.case])[self.case].seconds)

    def track_worst_ulp(self, value):
        return round_for_table(worst_ulp(self.case))

    track_ratio_to_floor.unit = "floors"
    track_gigabytes_per_second.unit = "GB/s"
    track_worst_ulp.unit = "ulp"


class _Shapes(_Axis):
    """Shapes by name, since asv would take tuples apart."""

    def make_case(self, value):
        return replace(BASE, shape=parse_shape(value))


class Shape(_Shapes):
    """Rows and classes; here also the loss alone, whose sweep differs, and the NumPy expression that is replaced."""

    params = tuple(map(name_shape, SHAPES))
    param_names = ("shape",)

    def setup(self, value):
        super().setup(value)
        loss = replace(self.case, call="loss")
        operands = make_operands(loss, self.logits)
        self.loss = make_call(loss, self.logits, operands)

        self.numpy = PEERS["NumPy"].prepare(self.logits, operands["target"], None)

    def time_loss(self, value):
        self.loss()

    def time_numpy(self, value):
        self.numpy()


class Image(_Shapes):
    """Images, whose classes lie far apart."""

    params = tuple(map(name_shape, IMAGES))
    param_names = ("shape",)


class Dtype(_Axis):
    """Types of the logits."""

    params = DTYPES
    param_names = ("dtype",)


class Layout(_Axis):
    """Orders in memory."""

    params = LAYOUTS
    param_names = ("layout",)


class Option(_Axis):
    """Options, and class probabilities for a target."""

    params = tuple(OPTIONS)
    param_names = ("option",)


class InstructionSet(_Axis):
    """Those that this machine does not have are n/a."""

    params = _cpu._ISAS
    param_names = ("isa",)


class Threads(_Axis):
    """At most so many threads."""

    params = (1, 2)
    param_names = ("n_threads",)


class Call(_Axis):
    """Loss alone, gradient in place or not, and second derivatives."""

    params = tuple(CALLS)
    param_names = ("call",)

    track_worst_ulp = None  # of the library alone, and the same for its calls


class Step:
    """Training steps: a product, loss and gradient, two products; times in turn."""

    params = tuple(step.name for step in STEPS)
    param_names = ("step",)
    case = BASE

    def setup(self, value):
        step = next(step for step in STEPS if step.name == value)
        losses = {"fastce": ("fastce", None), "one thread": ("fastce", 1), "NumPy": ("NumPy", None)}
        self.steps = {title: make_step(step, *loss) for title, loss in losses.items()}

    def teardown(self, value):
        pass

    def time_fastce(self, value):
        self.steps["fastce"]()

    def time_numpy(self, value):
        self.steps["NumPy"]()

    def track_ratio_to_the_better_of_numpy_and_one_thread(self, value):
        seconds = run_steps(self.steps, STEP_ROUNDS)
        return round_for_table(seconds["fastce"] / min(seconds["one thread"], seconds["NumPy"]))

    track_ratio_to_the_better_of_numpy_and_one_thread.unit = "times"
