"""Random calls in processes of their own, by the fuzzer of fuzz.py; and whether that sees what it should."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuzz
from fuzz_problems import Dice, Memory
from guard import PAGE, Pool, before_a_guard, behind_a_guard

FUZZER = Path(fuzz.__file__)


def run_python(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=FUZZER.parent)


def fuzz_calls(calls, seed=0):
    result = run_python(FUZZER, "--calls", calls, "--seed", seed)
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout)


def test_random_calls_match_the_definition():
    fuzz_calls(1000)


@pytest.mark.slow
def test_many_random_calls_match_the_definition(pytestconfig):
    fuzz_calls(*(pytestconfig.getoption(f"--fuzz-{name}") for name in ("calls", "seed")))


@pytest.mark.parametrize("attack", ["inputs", "threads"])
def test_threads_that_disturb_each_other_do_no_harm(attack):
    result = run_python("-X", "faulthandler", FUZZER.with_name("attack.py"), attack, "--seconds", 2)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_case_is_a_function_of_seed_and_number():
    """Whatever was drawn before, and wherever it lies in memory."""

    def describe(number, pool):
        memory = Memory(Dice(7, number), pool)
        return memory.operand((3, 4), np.float32).array.strides, memory.place(), memory.dice.numbers.random()

    pool = Pool()
    first = [describe(number, pool) for number in range(50)]
    assert first == [describe(number, Pool()) for number in range(50)]
    assert len(set(first)) == 50


@pytest.mark.skipif(sys.platform == "win32", reason="no pages can be protected")
@pytest.mark.parametrize("place", ["behind_a_guard", "before_a_guard"])
@pytest.mark.parametrize("write", [False, True])
def test_a_byte_beyond_a_guard_ends_the_process(place, write):
    off = -1 if place == "behind_a_guard" else 40
    program = f"""
import ctypes, guard, numpy
array = guard.{place}(numpy.arange(5.0))
byte = ctypes.c_char.from_address(array.ctypes.data + {off})
{"byte.value = b'a'" if write else "byte.value"}
"""
    assert run_python("-c", program.replace(str(off), "0")).returncode == 0
    assert run_python("-c", program).returncode < 0


def test_guarded_copies_are_at_the_ends_of_pages():
    array = np.arange(5.0)
    for copy in (behind_a_guard(array), before_a_guard(array)):
        np.testing.assert_array_equal(copy, array)
    assert behind_a_guard(array).ctypes.data % PAGE == 0
    assert (before_a_guard(array).ctypes.data + array.nbytes) % PAGE == 0


@pytest.mark.parametrize("place", ["start", "end", "heap"])
def test_bytes_around_an_operand_are_looked_at(monkeypatch, place):
    memory = Memory(Dice(0, 0), Pool())
    monkeypatch.setattr(memory, "place", lambda: (place, 0))
    operand = memory.operand((3, 2), np.float32, strides=(16, 4))
    operand.array[...] = 1
    result, is_clean = operand.take_result()
    assert is_clean and result.tolist() == [[1, 1]] * 3
    operand.array[...] = 1
    between = np.lib.stride_tricks.as_strided(operand.array.view(np.uint8)[:, :1], (9,), (1,))
    between[8] = 3
    assert not operand.take_result()[1]


def test_faults_are_told_with_the_command_that_repeats_them(monkeypatch, capsys):
    def broken(calls):
        calls.make(max, 1, calls.dice.integer(2, 3))
        raise AssertionError("a fault")

    monkeypatch.setattr(fuzz, "ALL_FAMILIES", (broken,))
    assert fuzz.work(5, range(100), 1000) == (0, fuzz.MOST_FAULTS)
    told = capsys.readouterr().out
    assert "FAULT python tests/fuzz.py --seed 5 --case 0\n  AssertionError: a fault" in told
    assert "max(1, " in told


def test_a_crash_is_told_with_the_command_that_repeats_it_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    program = tmp_path / "crash.py"
    program.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(FUZZER.parent)!r})
import fuzz
def crash(calls):
    calls.n_made += 1
    if calls.dice.often(0.1):
        os.kill(os.getpid(), signal.SIGSEGV)
fuzz.ALL_FAMILIES = (crash,)
fuzz.main()
"""
    )
    monkeypatch.setattr(fuzz, "PROGRAM", program)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--calls", "40", "--seed", "2", "--jobs", "2"])
    assert fuzz.main() == 1
    told = capsys.readouterr().out
    assert told.count("the process ended with status -11") >= 2
    assert "FAULT python tests/fuzz.py --seed 2 --case " in told
    assert "seed 2: " in told
