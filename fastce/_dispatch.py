"""From a public function to the backend of its arrays, and from a rule that is broken to what follows.

Design
------
1. A call goes to the compiled `call` as it is: that is all for NumPy arrays and plain numbers.
2. If it breaks a rule, everything is taken in first: numbers, names and arrays of others become Python's own and
   NumPy's (or CuPy's). That runs their code, which may change any other argument, so all are views that nobody else
   has; then `call` looks again. What it still cannot read is converted, and whatever else it says is an error
   (`_messages`).
3. Arrays on a GPU go the second way. `call` checks views of their bounds, and the GPU's backend computes (`_gpu`).
"""

from typing import Any

import numpy as np

from fastce import _cpu, _gpu
from fastce._arguments import ARRAYS, DIAGONAL, NLL, NORMALIZER, PRODUCT, Arguments
from fastce._array import RESULTS, array_module, take_in
from fastce._cpu._rules import RuleError
from fastce._far_weights import scale_weights
from fastce._logits import arithmetic
from fastce._messages import Broken, exception_for
from fastce._options import OPTIONS


def call(*arguments: Any) -> Any:
    """Compute the first argument, of the others: those of the compiled `call`."""
    try:
        return _cpu.kernels.call(*arguments)
    except RuleError:
        pass
    what, *others = arguments
    return _call_again(what, Arguments(*others))


def _call_again(what: int, given: Arguments) -> Any:
    """Compute what was given with something that breaks a rule, or raise its exception."""
    plain = with_plain_options(given)
    xp = np if what in (PRODUCT, DIAGONAL) else array_module(given.logits)  # those two for NumPy arrays only
    like = "log_probs" if what == NLL else "logits"  # what the caller calls them
    names = [name for name in ARRAYS if name != "v" or what == PRODUCT]
    taken: dict[str, Any] = take_in(xp, [(like if name == "logits" else name, getattr(given, name)) for name in names])
    taken["logits"] = taken.pop(like)
    arguments = plain._replace(**taken)
    if xp is np:
        results, arguments = settle(what, arguments, like)
    else:
        _, arguments = settle(NORMALIZER, arguments, like)
        results = _gpu.launch(what, arguments)
    # The very objects that were given, not views of them.
    own = {id(getattr(arguments, name)): getattr(given, name) for name in RESULTS if getattr(given, name) is not None}
    if type(results) is tuple:
        return tuple(own.get(id(result), result) for result in results)
    return own.get(id(results), results)


def with_plain_options(arguments: Arguments) -> Arguments:
    """Return options as numbers and strings of Python's own types, after all checks that need no arrays."""
    plain = arguments
    while True:
        try:
            _cpu.kernels.check_options(plain.options, plain.n_threads, plain.axis)
        except RuleError as error:
            broken = Broken(*error.args)
        else:
            return plain
        given = arguments.by_name()
        convert = OPTIONS[broken.name].convert
        if broken.rule != "kind" or convert is None:
            raise exception_for(broken, given)
        plain = plain.with_named(**{broken.name: convert(given[broken.name], broken.name)})


def settle(what: int, arguments: Arguments, like: str = "logits") -> tuple[Any, Arguments]:
    """Compute something of arguments that were taken in; return it, and the arguments that it was computed of.

    For arrays on a GPU nothing is computed: they are checked only. `like` is what messages call the logits.
    """
    arguments = arguments._replace(is_taken_in=True)
    on_gpu = not isinstance(arguments.logits, np.ndarray)
    while True:
        try:
            if on_gpu:
                _gpu.check(what, arguments)
                return None, arguments
            return _cpu.kernels.call(what, *arguments), arguments
        except RuleError as error:
            broken = Broken(*error.args)
        if broken.rule == "conversion":
            arguments = _convert(arguments, broken.name)
        elif broken.rule == "far":
            arguments = scale_weights(arguments, int(broken.value))
        else:
            raise exception_for(broken, arguments.by_name(), like=like)


def _convert(arguments: Arguments, name: str) -> Arguments:
    """Convert an array to a type that the kernels read."""
    dtype = arithmetic(arguments.logits.dtype) if name in ("target", "v") else np.dtype(np.float64)
    with np.errstate(over="ignore", under="ignore"):  # infinities are results like others, or refused later
        converted = getattr(arguments, name).astype(dtype)
    return arguments._replace(**{name: converted})
