"""The stubs of the compiled modules say what is in them."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastce import _cpu

pytest.importorskip("mypy")


# Only what runs here: loading the module of another instruction set may end the process.
@pytest.mark.slow
@pytest.mark.parametrize("isa", _cpu.supported_isas)
def test_stubs_match_the_compiled_modules(isa, tmp_path):
    name = f"_kernels_{isa}"
    assert (Path(_cpu.__file__).parent / f"{name}.pyi").exists()
    command = [sys.executable, "-m", "mypy.stubtest", f"fastce._cpu.{name}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
