"""The map: axes through one base case, 65536 x 1000 float32 in C order, plain, loss and gradient in place, two threads.

The cross product of all axes would take days and make tables that nobody reads.
"""

import contextlib
from dataclasses import replace

from fastce import _cpu
from fastce._bench import PAUSE as STEP_PAUSE
from fastce._contenders import CONTENDERS
from fastce._steps import STEPS, make_step, run_in_turn

from .accuracy import worst_ulp
from .measure import gigabytes_per_second, make_call, ratio_to_floor, wake_threads
from .problems import CALLS, DTYPES, IMAGES, ISAS, LAYOUTS, OPTIONS, SHAPES, THREADS, Case, make_logits

STEP_ROUNDS = 7
STEP_TURN = 0.2  # s: what each has in a round


def round_for_table(number):
    """Return no more digits than mean something; asv prints all that there are."""
    return float(f"{number:.3g}")


class _Axis:
    """What is measured at each point of an axis: `param_names` holds the field of `Case` that varies."""

    # A call in place spoils its input and needs a setup of its own. Of short calls, as many as fit in a second.
    number = 1
    repeat = (5, 200, 1.0)

    def make_case(self, value):
        return Case(**{self.param_names[0]: value})

    def setup(self, value):
        self.stack = contextlib.ExitStack()
        self.case = self.make_case(value)
        if not self.case.is_supported():
            raise NotImplementedError
        self.logits = make_logits(*self.case.logits_key)
        self.call = make_call(self.case, self.logits)
        self.stack.enter_context(_cpu.use_isa(self.case.isa))
        wake_threads(self.case.n_threads)

    def teardown(self, value):
        self.stack.close()

    def time_call(self, value):
        self.call()

    def peakmem_call(self, value):
        self.call()

    def track_ratio_to_floor(self, value):
        return round_for_table(ratio_to_floor(self.case))

    def track_gigabytes_per_second(self, value):
        return round_for_table(gigabytes_per_second(self.case))

    def track_worst_ulp(self, value):
        return round_for_table(worst_ulp(self.case))

    track_ratio_to_floor.unit = "floors"
    track_gigabytes_per_second.unit = "GB/s"
    track_worst_ulp.unit = "ulp"


class Shape(_Axis):
    """Rows and classes; here also the loss alone, whose sweep differs."""

    params = SHAPES
    param_names = ("shape",)

    def setup(self, value):
        super().setup(value)
        self.loss = make_call(replace(self.case, call="loss"), self.logits)

    def time_loss(self, value):
        self.loss()


class Dtype(_Axis):
    """Types of the logits."""

    params = DTYPES
    param_names = ("dtype",)


class Layout(_Axis):
    """Orders in memory, among them images, whose classes lie far apart and whose shape is another than the base's."""

    params = LAYOUTS + IMAGES
    param_names = ("layout",)

    def make_case(self, value):
        return Case(shape=value) if value in IMAGES else Case(layout=value)


class Option(_Axis):
    """Options, and class probabilities for a target."""

    params = tuple(OPTIONS)
    param_names = ("option",)


class InstructionSet(_Axis):
    """Those that this machine does not have are n/a."""

    params = ISAS
    param_names = ("isa",)


class Threads(_Axis):
    """At most so many threads."""

    params = THREADS
    param_names = ("n_threads",)


class Step:
    """Training steps: a product, loss and gradient, two products; times in turn, see `fastce._steps`."""

    params = tuple(step.name for step in STEPS)
    param_names = ("step",)
    case = Case()

    def setup(self, value):
        step = next(step for step in STEPS if step.name == value)
        losses = {"fastce": ("fastce", None), "one thread": ("fastce", 1), "NumPy": ("NumPy", None)}
        self.runs = {
            title: make_step(step, CONTENDERS[name].prepare, n_threads) for title, (name, n_threads) in losses.items()
        }

    def teardown(self, value):
        pass

    def time_fastce(self, value):
        self.runs["fastce"]()

    def time_numpy(self, value):
        self.runs["NumPy"]()

    def track_ratio_to_the_better_of_numpy_and_one_thread(self, value):
        seconds = run_in_turn(self.runs, STEP_ROUNDS, STEP_TURN, STEP_PAUSE)
        return round_for_table(seconds["fastce"] / min(seconds["one thread"], seconds["NumPy"]))

    track_ratio_to_the_better_of_numpy_and_one_thread.unit = "times"


class Call(_Axis):
    """Loss alone, gradient in place or not, what the library replaces, and the floor: how far its ratio is from 1."""

    params = CALLS
    param_names = ("call",)

    track_worst_ulp = None  # of the library alone, and the same for its calls
