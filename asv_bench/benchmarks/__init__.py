"""Benchmarks of fastce: run ``asv run`` in the folder asv_bench, or ``asv check -E existing`` for a quick look.

Absolute times say little, since memory sets the pace: the ratio to the memory floor tells how much there is to gain.

The harness is this checkout's, whichever fastce is installed: asv runs the same benchmarks on all versions.
"""

import importlib.util
import sys
from pathlib import Path

import fastce

_HARNESS = Path(__file__).parents[2] / "fastce" / "_benchmarks"
if _HARNESS.is_dir() and not _HARNESS.parent.samefile(Path(fastce.__file__).parent):
    _spec = importlib.util.spec_from_file_location("fastce._benchmarks", _HARNESS / "__init__.py")
    fastce._benchmarks = sys.modules["fastce._benchmarks"] = importlib.util.module_from_spec(_spec)
