"""The benchmarks' harness: `python -m fastce bench`, the demo and the scripts of asv_bench stand on it.

`cases` says what is measured, and makes the data; `measure` times this library's calls, in multiples of the memory
`floor`; `peers` are the packages that it is compared with; `steps` puts losses between matrix products; `timing` is how
all of them are timed, and `report` how the figures are shown.

asv takes every function for a benchmark that its benchmarks import under a name like time_*, mem_*, peakmem_* or
track_*. So nothing here has such a name.
"""
