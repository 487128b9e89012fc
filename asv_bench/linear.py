"""Print what the loss of a linear layer costs besides its products: python asv_bench/linear.py.

Chunk size by chunk size: the call, and NumPy's products of the same chunks into arrays that are there, lower quartiles
of interleaved rounds; and the peak of the process's memory besides the gradients (Linux only). With --wrt one product
or two are left out, as for a layer that is frozen. Needs a quiet machine and 2 GiB.
"""

import argparse
from pathlib import Path

import numpy as np

import fastce
from fastce._benchmarks.machine import read_bytes
from fastce._benchmarks.timing import run_calls
from fastce._linear_chunks import LOGITS_BYTES

MIB = 2**20
CHUNKS = (16, 32, 48, 64, 96)  # MiB of logits
LEAVES = ("features", "linear_weight", "linear_bias")


def make_layer(n_rows, n_features, n_classes):
    """Return features, weight and target of a layer that has learnt nothing yet."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((n_rows, n_features), np.float32)
    weight = rng.standard_normal((n_classes, n_features), np.float32) / np.float32(n_features**0.5)
    return features, weight, rng.integers(0, n_classes, n_rows)


def make_products(features, weight, chunk_rows, wrt=LEAVES):
    """Return a function of no arguments that does nothing but the products."""
    buffer = np.zeros((chunk_rows, len(weight)), np.float32)
    grad_features, grad_weight = np.zeros_like(features), np.zeros_like(weight)

    def run():
        for start in range(0, len(features), chunk_rows):
            x = features[start : start + chunk_rows]
            logits = np.matmul(x, weight.T, out=buffer[: len(x)])
            if "features" in wrt:
                np.matmul(logits, weight, out=grad_features[start : start + chunk_rows])
            if "linear_weight" in wrt:
                np.matmul(logits.T, x, out=grad_weight)

    return run


def peak_bytes(call):
    """Return by how much the process grew at most, less the arrays that are returned; None where that is not known."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = read_bytes("self/status", "VmRSS")
    result = call()
    return read_bytes("self/status", "VmHWM") - before - sum(array.nbytes for array in result[1:] if array is not None)


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", nargs=3, type=int, default=(8192, 512, 32000), metavar=("N", "d", "C"))
    parser.add_argument("--mib", nargs="+", type=int, default=CHUNKS, help="MiB of logits of a chunk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--wrt", nargs="*", choices=LEAVES, default=LEAVES, help="the gradients that are wanted")
    options = parser.parse_args(arguments)
    features, weight, target = make_layer(*options.shape)
    bias = np.zeros(len(weight), np.float32) if options.bias else None
    calls = {}
    for mib in options.mib:
        most = min(len(features), max(1, mib * MIB // (4 * len(weight))))
        chunk_rows = -(-len(features) // -(-len(features) // most))  # as even as the library makes them
        calls[mib, "call"] = lambda chunk_rows=chunk_rows: fastce.linear_cross_entropy_with_grad(
            features, weight, target, linear_bias=bias, chunk_rows=chunk_rows, wrt=options.wrt
        )
        calls[mib, "products"] = make_products(features, weight, chunk_rows, options.wrt)
    seconds = run_calls(calls, options.rounds)
    wanted = "" if options.wrt == LEAVES else f", gradients of {' and '.join(options.wrt) or 'nothing'}"
    print("{} x {} x {}, {} rounds".format(*options.shape, options.rounds) + ", with bias" * options.bias + wanted)
    for mib in options.mib:
        whole, products = seconds[mib, "call"], seconds[mib, "products"]
        peak = peak_bytes(calls[mib, "call"])
        memory = "" if peak is None else f", peak {peak / MIB:.0f} MiB"
        default = " (default)" if mib * MIB == LOGITS_BYTES else ""
        print(f"  {mib} MiB: {whole:.3f} s, products {products:.3f} s, ratio {whole / products:.3f}{memory}{default}")


if __name__ == "__main__":
    main()
