"""Every compiled rule has a message, and every message a rule."""

import inspect
import re
from pathlib import Path

import pytest

import fastce
from fastce import _messages

SOURCES = sorted((Path(fastce.__file__).parent / "_cpu").glob("*.p[xy][xd]"))
# What Python answers by a conversion.
CONVERTED = {"array", "kind", "conversion", "far"}


def test_rules_and_messages_belong_together():
    if not SOURCES:
        pytest.skip("an installed package has no sources")
    text = "".join(path.read_text() for path in SOURCES)
    first_arguments = re.findall(r"\bfail\((.*?), (?:name|\"\w+\")", text)
    rules = {rule for argument in first_arguments for rule in re.findall(r'"([^"]+)"', argument)}
    messages = re.findall(r'^ +case "([^"]+)"', inspect.getsource(_messages.exception_for), re.MULTILINE)
    assert rules == {*messages, *CONVERTED}
