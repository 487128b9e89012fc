"""Check and measure fastce on a GPU, beside its peers: python asv_bench/gpu.py.

Needs CuPy and a built fastce; PyTorch, Liger-Kernel and quack-kernels take part where they are installed. Everything is
printed as soon as it is known, the most telling problems first, in about six minutes.
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fastce
import gpu_checks
from fastce import _cuda
from fastce._benchmarks.cases import parse_shape
from gpu_measure import bandwidth, first_calls, free_memory, host_microseconds, measure, peak_bytes, reason_of
from gpu_peers import PEERS, Peer, Problem, prepare_fastce_loss, prepare_fastce_tensors

PACKAGES = ("numpy", "ml_dtypes", "torch", "triton", "liger-kernel", "quack-kernels", "nvidia-cutlass-dsl")
SMI_FIELDS = "driver_version,power.limit,clocks.max.sm,clocks.max.memory,clocks.sm,temperature.gpu"


class Row(NamedTuple):
    """A problem, and how many percent of the rate of a copy it ought to reach."""

    shape: str
    dtype: str
    bar: int | None = None
    ignored: float = 0.0

    def __str__(self):
        """Name it."""
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"{self.shape.replace('x', ' x ')} {self.dtype}{ignored}"


ROWS = [
    Row("8192x128256", "bfloat16", 90),
    Row("8192x256000", "bfloat16", 90),
    Row("4096x32000", "float32", 90),
    Row("8192x128256", "float32", 90),
    Row("65536x1000", "float32", 80),
    Row("65536x1000", "bfloat16"),
    Row("1048576x10", "float32", 60),
    Row("16x21x512x512", "float32"),
    Row("8192x128256", "bfloat16", ignored=0.1),
]


def say(line):
    """Print at once: whoever ends the run shall have what there is."""
    print(line, flush=True)


class Run:
    """What the steps share: the command's options, and all figures so far."""

    def __init__(self, options):
        self.options = options
        self.start = time.perf_counter()
        self.figures = {}
        names = [name for name in PEERS if name.partition(",")[0] not in options.without]
        self.peers = {name: PEERS[name] for name in names}

    @property
    def seconds(self):
        """How long it has taken so far."""
        return time.perf_counter() - self.start

    def shape(self, row):
        """Return a problem's shape, or a smaller one."""
        n, *others = parse_shape(row.shape)
        return (max(n // 64, 1) if self.options.quick else n, *others)

    def measure(self, row, peers):
        """Return a problem's figures, the GB that it has to move, and those of its logits."""
        free_memory()
        try:
            problem = Problem(self.shape(row), row.dtype, row.ignored)
            nbytes = problem.logits[0].nbytes
            repetitions = 20 if nbytes > 3e9 else 50  # which take long, and vary little
            return measure(problem, peers, repetitions), problem.n_bytes / 1e9, nbytes / 1e9
        except Exception as error:  # the next one may be smaller
            return {name: {"failed": reason_of(error)} for name in peers}, 0.0, 0.0

    def rate(self, name):
        """Return a rate of the memory in GB/s, measured if it has not been yet."""
        if name not in self.figures.get("ceilings", {}):
            self.figures["ceilings"] = ceilings(self)
        return self.figures["ceilings"][name]


def describe(_run):
    """Say what takes part."""
    import cupy

    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime
    figures = {
        "device": runtime.getDeviceProperties(device.id)["name"].decode(),
        "compute capability": device.compute_capability,
        "memory": f"{device.mem_info[0] / 2**30:.1f} GiB free of {device.mem_info[1] / 2**30:.1f}",
        "CUDA": f"{runtime.driverGetVersion()} of the driver, {runtime.runtimeGetVersion()} of the runtime",
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "Python": platform.python_version(),
        "CuPy": cupy.__version__,
        "fastce": fastce.__version__,
    }
    for name in PACKAGES:
        try:
            figures[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            figures[name] = "not installed"
    try:
        command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        figures[SMI_FIELDS] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError as error:
        figures[SMI_FIELDS] = reason_of(error)
    for name, value in figures.items():
        say(f"  {name}: {value}")
    return figures


def ceilings(run):
    """Measure how fast memory is read and written on this device, now."""
    free_memory()
    figures = bandwidth(2**26 if run.options.quick else 2**32)
    say("  " + ", ".join(f"{name} {figure:.0f} GB/s" for name, figure in figures.items()))
    return figures


def clusters(run):
    """Check clusters; say which kernel each problem gets."""
    import cupy

    figures = gpu_checks.check_clusters(say, np.random.default_rng(run.options.seed), 9 if run.options.quick else 150)
    for row in ROWS:
        free_memory()
        logits = cupy.empty(parse_shape(row.shape), f"i{np.dtype(row.dtype).itemsize}")
        figures[str(row)] = geometry = gpu_checks.geometry_of(logits)._asdict()
        say(f"  {row}: " + ", ".join(f"{name} {value}" for name, value in geometry.items()))
    return figures


def correctness(run):
    """Check results."""
    dtypes = ("float32", "bfloat16") if run.options.quick else gpu_checks.DTYPES
    rng = np.random.default_rng(run.options.seed)
    figures = gpu_checks.check_sweep(say, rng, dtypes)
    say(f"  {len(figures)} problems, wrong: {sum(bool(found['wrong']) for found in figures.values())}")
    figures["bad target"] = gpu_checks.check_bad_target(say)
    figures["torch"] = gpu_checks.check_torch(say, rng)
    return figures


def timings(run):
    """Measure loss and gradient in place, and the loss alone."""
    peers = {"fastce": PEERS["fastce"], "loss": Peer(prepare_fastce_loss)}
    figures = {}
    for row in ROWS:
        found, gigabytes, written = run.measure(row, peers)
        figures[str(row)], both, loss = found, found["fastce"], found["loss"]
        if "failed" in both or "failed" in loss:
            say(f"  {row}: FAILED, {both} {loss}")
            continue
        both["gb_s"], loss["gb_s"] = 1e3 * gigabytes / both["ms"], 1e3 * (gigabytes - written) / loss["ms"]
        both["percent"], loss["percent"] = 100 * both["gb_s"] / run.rate("copy"), 100 * loss["gb_s"] / run.rate("read")
        line = f"{time_of(both)}, {both['percent']:.1f}% of a copy"
        if row.bar is not None:
            both["held"] = both["percent"] >= row.bar
            line += f" (bar {row.bar}: {'held' if both['held'] else 'NOT'})"
        line += f", gradient off by {both['grad_error']:.0e}"
        say(f"  {row}: {line}; loss alone {time_of(loss)}, {loss['percent']:.1f}% of a read")
    return figures


def time_of(found):
    """Return median, quantiles and rate in words."""
    return f"{found['ms']:.4f} ms ({found['p20']:.4f}, {found['p80']:.4f}), {found['gb_s']:.0f} GB/s"


def peers(run):
    """Measure all in the same loop."""
    figures = {}
    for row in [row for row in ROWS if not row.ignored]:
        if run.seconds > run.options.budget:
            say(f"  {row}: left out, {run.seconds:.0f} s have passed")
            continue
        found, gigabytes, _ = run.measure(row, run.peers)
        figures[str(row)] = found
        say(f"  {row}, after {run.seconds:.0f} s")
        own, others = found["fastce"], {}
        for name, one in found.items():
            if "failed" in one:
                say(f"    {name:14s} {one['failed']}")
                continue
            one["gb_s"] = 1e3 * gigabytes / one["ms"]
            # With room for losses of rows that were rounded to 16 bits, and gradients that were so twice.
            one["right"] = one["grad_error"] <= 0.02 and abs(one["loss"] / own.get("loss", np.nan) - 1) <= 0.02
            wrong = "" if one["right"] else f", WRONG: gradient off by {one['grad_error']:.0e}, loss {one['loss']}"
            say(f"    {name:14s} {time_of(one)}, first call {one['first_s']:.1f} s{wrong}")
            if name != "fastce" and one["right"]:
                others[name] = one["ms"]
        if others and "ms" in own:
            fastest = min(others, key=others.get)
            own["speedup"] = others[fastest] / own["ms"]
            say(f"    the fastest other, {fastest}, takes {own['speedup']:.2f} times as long as fastce")
    return figures


def latency(run):
    """Measure first calls, and what calls of a tiny problem cost."""
    figures = {"first calls": first_calls(say)}
    problem = Problem((32, 10), "float32")
    problem.restore(0)
    peers = {"fastce, tensors": Peer(prepare_fastce_tensors), **run.peers}
    say("  32 x 10, microseconds until a call returns; with its work on the device; and alone, with a wait for it")
    for name, peer in peers.items():
        try:
            figures[name] = found = host_microseconds(peer.prepare(problem), 100 if run.options.quick else 1000)
            say(f"    {name:16s}" + ", ".join(f"{microseconds:8.1f}" for microseconds in found.values()))
        except Exception as error:  # other people's code
            say(f"    {name:16s}{reason_of(error)}")
    return figures


def memory(run):
    """Measure what a call needs beside logits and targets."""
    problem = Problem(run.shape(ROWS[0]), ROWS[0].dtype)
    figures = {"logits": problem.logits[0].nbytes}
    say(f"  {ROWS[0]}: logits {figures['logits'] / 2**20:.1f} MiB")
    for name, peer in run.peers.items():
        free_memory()
        try:
            call = peer.prepare(problem)
            problem.restore(0)
            call(0)
            _cuda._workspaces.clear()  # of which the first call on a stream makes one
            figures[name] = peak_bytes(call)
            say(f"    {name:14s} {figures[name] / 2**20:.3f} MiB, {figures[name] / problem.n_rows:.1f} bytes a row")
        except Exception as error:  # other people's code
            say(f"    {name:14s} {reason_of(error)}")
    return figures


STEPS = {
    "device": describe,
    "ceilings": ceilings,
    "clusters": clusters,
    "correctness": correctness,
    "timings": timings,
    "latency": latency,
    "memory": memory,
    "peers": peers,
}


def several_of(allowed):
    """Return a type for argparse: names with commas between."""

    def split(text):
        names = text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
        return names

    return split


def main(arguments=None):
    """Do the steps."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="STEP,...", type=several_of(STEPS), default=[*STEPS], help=", ".join(STEPS))
    peers = [name for name in PEERS if name != "fastce" and "," not in name]
    parser.add_argument("--without", metavar="PEER,...", type=several_of(peers), default=[], help=", ".join(peers))
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures, after every step")
    parser.add_argument("--quick", action="store_true", help="fewer rows: does everything run?")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the checks; another each time")
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no more peers are begun")
    run = Run(parser.parse_args(arguments))
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # no CuPy, no driver, no device: each has an error of its own
        parser.exit(1, f"needs CuPy and a GPU: {reason_of(error)}\n")
    for name in run.options.only:
        say(f"{name}, after {run.seconds:.0f} s" + (f", seed {run.options.seed}" if STEPS[name] is correctness else ""))
        try:
            run.figures[name] = STEPS[name](run)
        except Exception as error:  # the other steps may tell why
            traceback.print_exc(file=sys.stdout)
            run.figures[name] = {"failed": reason_of(error)}
        if run.options.json:
            run.options.json.write_text(json.dumps(run.figures, indent=1))
    say(f"done, after {run.seconds:.0f} s")


if __name__ == "__main__":
    main()
