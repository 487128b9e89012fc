"""The demo trains on real images, compares three losses and ends cleanly when interrupted."""

import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("sklearn")
COMMAND = [sys.executable, "-m", "fastce", "demo"]


def test_the_demo_trains_and_all_losses_agree():
    done = subprocess.run([*COMMAND, "--epochs", "2"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    epochs = [line for line in lines if line.startswith("epoch")]
    assert len(epochs) == 2
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in epochs]
    assert losses[1] < losses[0] < 2.3  # less than the log of ten classes
    assert float(epochs[1].split("accuracy ")[1].rstrip("%")) > 85
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *losses, fit_head, _, fastce_fit, sklearn_fit = rows
    assert (head[-1], fit_head[-1]) == ("agrees", "held-out accuracy")
    assert [(row[0], row[-1]) for row in losses] == [(name, "yes") for name in ("fastce", "NumPy", "scikit-learn")]
    assert "all agree" in done.stdout
    for name, fit in {"fastce": fastce_fit, "scikit-learn": sklearn_fit}.items():
        assert fit[0] == name and float(fit[-1].rstrip("%")) > 90


def test_the_demo_needs_sensible_arguments():
    done = subprocess.run([*COMMAND, "--epochs", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "at least 1, got '0'" in done.stderr


# Whoever runs the tests in the background has the signal ignored, and children inherit that.
INTERRUPTIBLE = """
import signal, sys
from fastce.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as on Unix")
def test_an_interrupt_ends_the_demo_without_a_traceback():
    command = [sys.executable, "-c", INTERRUPTIBLE, "demo", "--epochs", "1000000"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch"):  # it is under way
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
