"""What the schedule must know of a kernel: each kernel's file ends with a function that plans a task for it.

A kernel is a C function of its own, called through a pointer. Copies of inlined code may be contracted to FMA
differently, and a result would depend on which of them computed it.
"""
from fastce._cpu.prefetch cimport CACHE_LINE
from fastce._cpu.task cimport Task

# Does the rows start .. stop - 1, in a workspace of its own.
ctypedef void (*process_t)(const Task*, Py_ssize_t, Py_ssize_t, char*) noexcept nogil

cdef enum:
    # A chunk, the unit that threads take, has about so many numbers, a tenth of a millisecond's work.
    CHUNK_NUMBERS = 262144


cdef struct KernelSpec:
    process_t process
    Py_ssize_t group          # rows that the kernel does together
    Py_ssize_t share          # of how many rows a thread's share should be a multiple
    Py_ssize_t part_rows      # rows over which it sums the losses
    Py_ssize_t chunk_numbers
    Py_ssize_t workspace      # bytes that one thread needs


cdef inline Py_ssize_t align(Py_ssize_t n_bytes) noexcept nogil:
    """Return n_bytes, or an address, up to whole cache lines, so that threads do not share one."""
    return (n_bytes + CACHE_LINE - 1) // CACHE_LINE * CACHE_LINE


cdef inline KernelSpec make_spec(
    process_t process, Py_ssize_t group, Py_ssize_t part_rows, Py_ssize_t workspace
) noexcept nogil:
    cdef KernelSpec spec
    spec.process = process
    spec.group = spec.share = group
    spec.part_rows = part_rows
    spec.chunk_numbers = CHUNK_NUMBERS
    spec.workspace = workspace
    return spec
