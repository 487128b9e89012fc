"""Print forward and backward of a training step with PyTorch's losses and with ours: python asv_bench/training.py.

Of logits that are a leaf, and of a linear layer, on the CPU in float32, and by how much the gradients differ. Lower
quartiles of interleaved rounds. Needs PyTorch, a quiet machine and 8 GiB.
"""

import argparse
from functools import partial

import numpy as np
import torch
from torch.nn import functional

import fastce
import fastce.torch
from fastce._benchmarks.timing import run_rounds, sample
from linear import make_layer


def step_of(loss, leaves):
    """Return a function that makes the gradients of leaves, from nothing."""

    def step():
        for leaf in leaves:
            leaf.grad = None
        loss().backward()
        return [leaf.grad for leaf in leaves]

    return step


def logits_steps(n_rows, n_classes):
    """Return the steps of logits alone."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n_rows, n_classes, generator=generator).requires_grad_()
    target = torch.randint(n_classes, (n_rows,), generator=generator)
    return {
        "fastce.torch": step_of(lambda: fastce.torch.cross_entropy(logits, target), [logits]),
        "torch": step_of(lambda: functional.cross_entropy(logits, target), [logits]),
    }


def linear_steps(n_rows, n_features, n_classes):
    """Return the steps of a linear layer: ours, and PyTorch's with and without chunks, where it has them."""
    arrays = make_layer(n_rows, n_features, n_classes)
    features, weight, target = (torch.from_numpy(array) for array in arrays)
    leaves = [features.requires_grad_(), weight.requires_grad_()]

    def ours():
        _, *grads, _ = fastce.linear_cross_entropy_with_grad(*arrays)
        return [torch.from_numpy(grad) for grad in grads]

    steps = {"fastce": ours}
    if hasattr(functional, "linear_cross_entropy"):
        options = {"torch": None, "torch in chunks": torch.nn.LinearCrossEntropyOptions()}
        for name, value in options.items():
            loss = lambda value=value: functional.linear_cross_entropy(features, weight, target, options=value)  # noqa: E731
            steps[name] = step_of(loss, leaves)
    else:
        steps["torch"] = step_of(lambda: functional.cross_entropy(functional.linear(features, weight), target), leaves)
    return steps


def measure(title, steps, rounds):
    """Time the steps in turn and print them against the first."""
    expected = [grad.clone() for grad in next(iter(steps.values()))()]
    difference = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(step(), expected, strict=True))
        for name, step in steps.items()
    }
    # Each after one that is not timed: what another step has freed still keeps the system busy.
    seconds = run_rounds({name: [partial(sample, step, before=step)] for name, step in steps.items()}, rounds)
    print(title)
    for name, value in seconds.items():
        ratio = value / next(iter(seconds.values()))
        print(f"  {name}: {1e3 * value:.1f} ms, ratio {ratio:.2f}, largest difference {difference[name]:.1e}")


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--logits", nargs=2, type=int, default=(4096, 32000), metavar=("N", "C"))
    parser.add_argument("--linear", nargs=3, type=int, default=(8192, 512, 32000), metavar=("N", "d", "C"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, NumPy {np.__version__}")
    measure("logits {} x {}".format(*options.logits), logits_steps(*options.logits), options.rounds)
    measure("linear {} x {} x {}".format(*options.linear), linear_steps(*options.linear), options.rounds)


if __name__ == "__main__":
    main()
