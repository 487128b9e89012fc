"""Benchmarks of fastce: run ``asv run`` in the folder asv_bench, or ``asv check -E existing`` for a quick look.

Absolute times say little, since memory sets the pace: the ratio to the floor, which reads and writes the logits once,
tells how much there is to gain.
"""
