"""Every compiled rule has a message, and every message a rule."""

import inspect
import re
from pathlib import Path

import pytest

import fastce
from fastce import _messages

SOURCES = [Path(fastce.__file__).parent / "_cpu" / name for name in ("call.pxd", "_kernels.pyx")]
# What Python answers by a conversion.
CONVERTED = {"array", "kind", "conversion", "far"}


def test_rules_and_messages_belong_together():
    if not SOURCES[0].exists():
        pytest.skip("an installed package has no sources")
    text = "".join(path.read_text() for path in SOURCES)
    calls = re.findall(r"\bfail\(\s*&?c(?:all)?,(.*?),\s*(?:name|\"\w+\"),", text)
    rules = {rule for call in calls for rule in re.findall(r'"([^"]+)"', call)}
    messages = re.findall(r'^ +case "([^"]+)"', inspect.getsource(_messages.exception_for), re.MULTILINE)
    assert rules == {*messages, *CONVERTED}
