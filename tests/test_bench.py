"""The benchmark, on small cases: who takes part, that all agree, and what is written."""

import json
import sys

import numpy as np
import pytest

from fastce.__main__ import main
from fastce._benchmarks import bench, floor, steps, timing
from fastce._benchmarks.peers import PEERS, Peer

# Other packages may warn as they like.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(bench, "SAMPLE", 0)
    monkeypatch.setattr(steps, "TURN", 0)


def compare_with(monkeypatch, **peers):
    """Have no other peers."""
    monkeypatch.setattr(bench, "PEERS", {"fastce": PEERS["fastce"], **peers})


def test_all_installed_peers_agree(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["bench", "--quick", "--rounds", "1", "--json", str(path)]) == 0
    output = capsys.readouterr()
    report = json.loads(path.read_text())
    assert {"date", "machine", "versions", "fastce", "n_threads", "rounds", "cases", "steps"} == set(report)
    assert report["fastce"]["versions"]["numpy"] == np.__version__
    assert [*report["cases"], *report["steps"]] == [case.name for case in bench.QUICK]
    left_out = {line.partition(":")[0] for line in output.err.splitlines() if "left out" in line}
    assert not left_out & {"fastce", "fastce, new", "NumPy"}
    taking_part = set(PEERS) - left_out - {"torch.compile"}
    for name, case in report["cases"].items():
        cannot = set()
        if len(case["shape"]) > 2:
            cannot = {"NumPy", "scikit-learn", "Numba"}
        elif case["dtype"] in ("float16", "bfloat16"):
            cannot = {"scikit-learn", "Numba"}
        if case["dtype"] == "bfloat16":
            cannot |= {"NumPy", "SciPy"}  # round differences of logits to 8 bits, and are 2 % off
        assert set(case["dropped"]) == cannot & taking_part, name
        assert set(case["seconds"]) == {"floor", *taking_part} - set(case["dropped"])
        assert all(seconds > 0 for seconds in case["seconds"].values())
        assert f"| {name} " in output.out
    for name, seconds in report["steps"].items():
        assert {"fastce", "fastce, one thread", "NumPy"} <= set(seconds) and min(seconds.values()) > 0
        assert f"| {name} " in output.out


@pytest.mark.parametrize("layout", ["C", "F", "strided"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 1000])
def test_every_way_to_the_floor_moves_all_numbers_once(layout, dtype, n_threads):
    original = np.arange(7 * 10).reshape(7, 10).astype(dtype)
    numbers = {"C": original.copy(), "F": original.copy(order="F"), "strided": np.repeat(original, 2, axis=1)[:, ::2]}
    logits = numbers[layout]
    n_ways = 1 if n_threads == 1 else 2
    for kind in (floor.READ, floor.IN_PLACE):
        ways = floor.make_floors(kind, logits, n_threads)
        assert len(ways) == n_ways
        for way in ways:
            way()
            assert np.array_equal(logits, original)
    for number in range(2 * n_ways):  # two functions copy
        out = np.full_like(logits, -1)
        ways = floor.make_floors(floor.COPY, logits, n_threads, out)
        assert len(ways) == 2 * n_ways
        ways[number]()
        assert np.array_equal(out, original)


def test_steps_are_chosen_by_name(capsys):
    assert main(["bench", "--cases", "step-512x64x100", "--rounds", "1"]) == 0
    _, head, _, row = capsys.readouterr().out.splitlines()
    assert head.startswith("| step, ms ") and row.startswith("| step-512x64x100 ")


def test_a_peer_that_fails_is_dropped_with_the_reason(monkeypatch, tmp_path, capsys):
    def prepare_wrong(logits, target, n_threads):
        call = PEERS["fastce"].prepare(logits, target, n_threads)
        return lambda: (call()[0], logits + np.float32(1e-3))

    def prepare_nan(logits, target, n_threads):
        return lambda: (np.nan, np.full_like(logits, np.nan))

    def prepare_broken(logits, target, n_threads):
        raise RuntimeError("no compiler\nand many more lines")

    compare_with(
        monkeypatch,
        wrong=Peer(prepare_wrong),
        nan=Peer(prepare_nan),
        broken=Peer(prepare_broken),
        absent=Peer(prepare_broken, ("no_such_package",)),
        huge=Peer(PEERS["NumPy"].prepare, n_matrices=10**12),
    )
    path = tmp_path / "report.json"
    assert main(["bench", "--cases", "300x10", "--rounds", "1", "--json", str(path)]) == 0
    case = json.loads(path.read_text())["cases"]["300x10"]
    output = capsys.readouterr()
    assert "absent: left out: No module named 'no_such_package'" in output.err
    assert case["dropped"]["broken"] == "RuntimeError: no compiler"
    for name in ("wrong", "nan"):
        assert case["dropped"][name].startswith("ArithmeticError: differs by")
    if sys.platform == "linux":  # elsewhere nobody knows how much memory is left
        assert case["dropped"].pop("huge").startswith("MemoryError: needs")
        assert list(case["seconds"]) == ["floor", "fastce"]
    for name, reason in case["dropped"].items():
        assert f"300x10: {name} dropped: {reason}" in output.err


def test_a_case_that_does_not_fit_into_memory_is_skipped(monkeypatch, capsys):
    compare_with(monkeypatch)
    monkeypatch.setattr(bench, "available_memory", lambda: 2**20)
    assert main(["bench", "--cases", "65536x1000"]) == 0
    assert "65536x1000: skipped, for it needs 0.7 GiB, of which 0.0 are available" in capsys.readouterr().err


def test_an_interrupt_ends_it(monkeypatch, capsys):
    def prepare_interrupted(logits, target, n_threads):
        raise KeyboardInterrupt

    compare_with(monkeypatch, other=Peer(prepare_interrupted))
    assert main(["bench", "--quick"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_figure(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    compare_with(monkeypatch, NumPy=PEERS["NumPy"])
    path = tmp_path / "figure.png"
    assert main(["bench", "--quick", "--rounds", "1", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_figure(monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(sys.modules, "fastce._benchmarks.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--quick", "--plot", str(tmp_path / "figure.png")]) == 1
    assert "--plot needs matplotlib (pip install 'fastce[bench]')" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "3x3"], "must be one of 65536x1000, "),
        (["--rounds", "0"], "must be a whole number of at least 1, got '0'"),
        (["--rounds", "1.5"], "must be a whole number of at least 1, got '1.5'"),
        (["--json", "no/such/folder/x"], "must be a file in a folder that exists, got 'no/such/folder/x'"),
        (["--quick", "--cases", "32x10"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err
