"""What the build says where it cannot work. That it does work, everything else shows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parent.parent / "setup.py"

if not SETUP.exists():
    pytest.skip("an installed package has no setup.py", allow_module_level=True)
pytest.importorskip("Cython")
pytest.importorskip("setuptools")


def build(folder, compiler):
    """Try to build into a folder; return what was said, last line last."""
    command = [sys.executable, SETUP, "-q", "build_ext", "--build-temp", folder / "temp", "--build-lib", folder / "lib"]
    done = subprocess.run(
        command, cwd=SETUP.parent, env={**os.environ, "CC": compiler}, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert not list(folder.rglob("*.c"))
    return done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="setuptools looks for that compiler, and explains")
@pytest.mark.parametrize(
    ("compiler", "text"),
    [
        ("no-such-compiler", "there is no C compiler: no program is called 'no-such-compiler'"),
        ("false", "the C compiler does not work"),
    ],
)
def test_a_compiler_that_is_not_there_is_asked_for(tmp_path, compiler, text):
    said = build(tmp_path, compiler)
    assert "Traceback" not in said
    assert said.startswith("error: fastce is compiled while it is installed") and text in said
    assert "apt install gcc python3-dev" in said
