"""The options are defined once: signatures, the typed dict and docstrings agree with the definition."""

import inspect
import re
import typing

import pytest

import fastce
from fastce._options import NAMES, NUMBERS_AND_NAMES, OPTIONS, LossOptions

FUNCTIONS = [
    fastce.cross_entropy,
    fastce.cross_entropy_grad_hess,
    fastce.cross_entropy_hvp,
    fastce.cross_entropy_stats,
    fastce.cross_entropy_with_grad,
    fastce.linear_cross_entropy,
    fastce.linear_cross_entropy_with_grad,
    fastce.nll_loss,
    fastce.CrossEntropyLoss.__init__,
]


def parameters_of(function):
    """Return the documented parameters: names that share an entry have the same one."""
    text = inspect.getdoc(function).split("Parameters\n----------\n")[1].split("\n\n")[0]
    entries = re.findall(r"^(\S.*?)(?: : (.*))?$", text, re.MULTILINE)
    return {name: documented for names, documented in entries for name in names.split(", ")}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_signatures_have_the_options_as_they_are_defined(function):
    parameters = inspect.signature(function, eval_str=True).parameters
    found = [name for name in parameters if name in OPTIONS]
    if function is not fastce.nll_loss:
        assert found == list(OPTIONS)
    for name in found:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == OPTIONS[name].default
        assert type(parameters[name].default) is type(OPTIONS[name].default)
        assert parameters[name].annotation == OPTIONS[name].annotation


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_docstrings_have_the_options_as_they_are_defined(function):
    owner = fastce.CrossEntropyLoss if function is fastce.CrossEntropyLoss.__init__ else function
    documented = parameters_of(owner)
    for name in inspect.signature(function).parameters:
        if name in OPTIONS:
            assert documented[name] in ("", OPTIONS[name].documented)  # "" where another page is named
    if function is fastce.cross_entropy:
        assert all(documented[name] for name in OPTIONS)


def test_the_typed_dict_has_the_options_as_they_are_defined():
    hints = typing.get_type_hints(LossOptions)
    assert hints == {name: option.annotation for name, option in OPTIONS.items()}
    assert not LossOptions.__required_keys__


def test_the_order_of_the_compiled_call():
    assert [name for name in OPTIONS if name in NUMBERS_AND_NAMES] == list(NUMBERS_AND_NAMES)
    assert all(OPTIONS[name].default in names for name, names in NAMES.items())
