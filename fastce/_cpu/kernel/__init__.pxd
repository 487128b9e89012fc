"""The kernels: a file for each, and what they share."""
