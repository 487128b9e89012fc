"""The CUDA kernels compile for every architecture, and need no more of it than their launches count on.

NVRTC does that without a GPU; see `nvrtc`. A *slot* is an architecture and a geometry that dispatch can choose on it; a
*variant* is what a kernel computes there. All variants in all slots are tens of thousands of kernels, which
``FASTCE_CUDA_MATRIX=full`` compiles in hours. Otherwise these few hundred are, the same ones each time:

1. Every slot is compiled. Of the many that differ only in how many classes a thread holds (COLUMN), an architecture
   takes those with the largest number for each size of logits, and takes turns with the others for the rest.
2. Every variant is compiled in one slot at least of every family. float16 and bfloat16, which become the same
   arithmetic, take turns in that, and so do the types of probabilities. A softcap, whose tanh is long and appears once
   for every number that a thread holds, is left out where that takes seconds to compile.
3. The kernels that need most registers are compiled for every architecture: those with probabilities, gradient
   and statistics, for the largest geometry of each family, and for all of BLOCK, whose threads may have fewest. The
   sizes of logits take turns.

Several kernels make one program, each in a namespace and with macros of its own.
"""

import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

import nvrtc
from fastce._cuda._geometry import Geometry, Limits, choose_geometry, total_geometry
from fastce._cuda._program import DIRECTORY, Variant, source_of

if nvrtc.find() is None:
    pytest.skip("needs the packages nvidia-cuda-nvrtc and nvidia-cuda-runtime", allow_module_level=True)

DTYPES = ("float32", "float64", "float16", "bfloat16")
IS_FULL = os.environ.get("FASTCE_CUDA_MATRIX") == "full"
# Bytes of shared memory: the most that a block may ask for, and what a multiprocessor has; 1024 of each block are not
# for it. From the table of technical specifications in NVIDIA's programming guide.
LIMITS = {
    75: Limits(65536, 65536, has_clusters=False),
    80: Limits(166912, 167936, has_clusters=False),
    86: Limits(101376, 102400, has_clusters=False),
    89: Limits(101376, 102400, has_clusters=False),
    90: Limits(232448, 233472, has_clusters=True),
    100: Limits(232448, 233472, has_clusters=True),
    120: Limits(101376, 102400, has_clusters=True),
}
ARCHITECTURES = [arch for arch in LIMITS if arch in nvrtc.architectures()]
REGISTERS = 65536  # of a multiprocessor
REGISTER_UNIT = 8  # a thread's are rounded up to
RESERVED = 1024
ITEMSIZES = {2: ("float16", "bfloat16"), 4: ("float32",), 8: ("float64",)}
KERNELS = (DIRECTORY / "kernels.cu").read_text()
BATCH = 4  # kernels of a program
MOST_CAPPED = 16  # numbers that a thread holds (rule 2)


class Kernel(NamedTuple):
    variant: Variant
    geometry: Geometry

    def macros(self, name):
        """Return the lines in front of the source, with a name that no other kernel of a program has."""
        lines = source_of(self.variant, self.geometry).removesuffix(KERNELS).splitlines()
        macros = dict(line.split()[1:] for line in lines if line.startswith("#define"))
        return {**macros, "FC_NAME": name}


def geometries_of(arch):
    """Return what dispatch can choose, and the sizes of logits that it chooses it for.

    Without the grid, which is no part of a kernel, and with the most shared memory that a launch can ask for.
    """
    n_classes = [*range(1, 301), *(int(301 * 1.01**i) for i in range(890)), 2**21]
    layouts = [(True, True), (True, False), (False, False)]
    sizes, shared = {}, Counter()
    for itemsize, n, (row_major, dense), aligned in itertools.product(ITEMSIZES, n_classes, layouts, [True, False]):
        if n == 1 and not row_major:
            continue  # a single class always lies side by side
        geometry = choose_geometry(
            1, n, itemsize, LIMITS[arch], is_row_major=row_major, is_dense=dense, is_aligned=aligned
        )
        kind = geometry._replace(grid=0, shared_bytes=0)
        sizes.setdefault(kind, set()).add(itemsize)
        shared[kind] = max(shared[kind], geometry.shared_bytes)
    total = total_geometry(10**6)._replace(grid=0)
    return {kind._replace(shared_bytes=shared[kind]): found for kind, found in sizes.items()} | {total: set(ITEMSIZES)}


GEOMETRIES = {arch: geometries_of(arch) for arch in ARCHITECTURES}
FAMILIES = sorted({geometry.family for found in GEOMETRIES.values() for geometry in found} - {"TOTAL"})


def variants(dtypes, prob_dtypes):
    """Yield what the public functions ask for; alternatives that take turns are tuples, which `settle` chooses from."""
    for dtype in dtypes:
        for prob, out, cap, stats in itertools.product([None, *prob_dtypes], [None, "grad"], [0, 1], [0, 1]):
            for smoothed in [0, 1] if prob is None else [0]:  # probabilities are the same kernel with smoothing
                yield Variant(dtype, prob, bool(smoothed), out, bool(cap), bool(stats))
        yield Variant(dtype, out="softmax")
        yield Variant(dtype, out="log_softmax")
        for prob in [None, *prob_dtypes]:
            yield Variant(dtype, prob, is_normalized=True)


def settle(variant, turn):
    """Return a variant with one of each tuple's alternatives; all pairs of these have their turn."""
    dtype, prob = variant.dtype, variant.prob_dtype
    if isinstance(dtype, tuple):
        turn, own = divmod(turn, len(dtype)) if isinstance(prob, tuple) else (0, turn % len(dtype))
        dtype = dtype[own]
    if isinstance(prob, tuple):
        prob = prob[turn % len(prob)]
    return variant._replace(dtype=dtype, prob_dtype=prob)


def itemsize_of(variant):
    return next(size for size, dtypes in ITEMSIZES.items() if variant.dtype in (*dtypes, dtypes))


def full_matrix():
    """Return all kernels of each architecture."""
    return {
        arch: [
            Kernel(variant, geometry)
            for geometry, sizes in found.items()
            for variant in (variants(DTYPES, DTYPES) if geometry.family != "TOTAL" else map(Variant, DTYPES))
            if itemsize_of(variant) in sizes
        ]
        for arch, found in GEOMETRIES.items()
    }


def has_turn(arch, geometry):
    """Return True if an architecture compiles a geometry in the small matrix (rule 1)."""
    found = GEOMETRIES[arch].items()
    largest = {max(g.classes for g, sizes in found if size in sizes) for size in ITEMSIZES}
    return geometry.classes in {0, *largest} or geometry.classes % len(ARCHITECTURES) == ARCHITECTURES.index(arch)


def hungriest(arch):
    """Yield the kernels that need most registers (rule 3)."""
    for family in FAMILIES:
        own = [g for g in GEOMETRIES[arch] if g.family == family]
        if family != "BLOCK":
            own = [max(own, key=lambda g: (g.classes, g.granules * g.lanes, g.threads))]
        for turn, geometry in enumerate(own, ARCHITECTURES.index(arch)):
            sizes = sorted(GEOMETRIES[arch][geometry])
            dtype = ITEMSIZES[sizes[turn % len(sizes)]][0]
            yield Kernel(Variant(dtype, "float32", out="grad", has_stats=True), geometry)


def small_matrix():
    """Return the kernels of each architecture that the module's rules choose."""
    chosen = {arch: [] for arch in ARCHITECTURES}
    every = list(variants([alike if len(alike) > 1 else alike[0] for alike in ITEMSIZES.values()], [DTYPES]))
    for i, family in enumerate(FAMILIES):
        slots = [
            (arch, geometry)
            for arch, found in GEOMETRIES.items()
            for geometry in found
            if geometry.family == family and has_turn(arch, geometry)
        ]
        seen, filled = Counter(), Counter()

        def fits(variant, slot):
            size, geometry = itemsize_of(variant), slot[1]
            held = max(geometry.granules * 16 // size, geometry.classes)
            return size in GEOMETRIES[slot[0]][geometry] and not (variant.has_softcap and held > MOST_CAPPED)

        def fill(variant, slot, i=i, seen=seen, filled=filled):
            chosen[slot[0]].append(Kernel(settle(variant, i + seen.total()), slot[1]))
            seen[variant] += 1
            filled[slot] += 1

        for slot in slots:
            fill(min((v for v in every if fits(v, slot)), key=seen.__getitem__), slot)
        for variant in every:
            if not seen[variant]:
                fill(variant, min((s for s in slots if fits(variant, s)), key=filled.__getitem__))
    for arch, found in GEOMETRIES.items():
        chosen[arch] += hungriest(arch)
        chosen[arch] += [Kernel(Variant(dtype), g) for g in found if g.family == "TOTAL" for dtype in DTYPES]
    return {arch: list(dict.fromkeys(kernels)) for arch, kernels in chosen.items()}


def program_of(kernels):
    """Return one source with all of the kernels, named k0, k1, ..."""
    lines = ['#include "device.cuh"']
    for i, kernel in enumerate(kernels):
        macros = kernel.macros(f"k{i}")
        lines += [f"#define {name} {value}" for name, value in macros.items()]
        lines += [f"namespace v{i} {{", '#include "kernels.cu"', "}"]
        lines += [f"#undef {name}" for name in macros]
    return "\n".join(lines)


def compile_all(kernels, arch):
    """Return what each of the kernels takes, compiling two programs at a time."""

    def one(batch):
        try:
            _, log = nvrtc.compile(program_of(batch), arch, [DIRECTORY])
        except RuntimeError as error:
            names = "\n".join(f"v{i}: {kernel}" for i, kernel in enumerate(batch))
            raise AssertionError(f"sm_{arch}: these do not compile:\n{names}\n{error}") from error
        usage = nvrtc.usage_of(log)
        return [usage[f"k{i}"] for i in range(len(batch))]

    # The slowest first, so that the threads end together.
    order = sorted(kernels, key=lambda k: -(k.geometry.granules + k.geometry.classes) * (1 + k.variant.has_softcap))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(one, [order[i : i + BATCH] for i in range(0, len(order), BATCH)])
        return dict(zip(order, itertools.chain.from_iterable(found), strict=True))


def faults_of(kernel, usage):
    """Return in words what a kernel must not do."""
    macros = kernel.macros("")
    threads, per_sm = int(macros["FC_THREADS"]), int(macros["FC_PER_SM"])
    granted = -(-usage.registers // REGISTER_UNIT) * REGISTER_UNIT
    if usage.spill_stores or usage.spill_loads:
        yield f"spills: {usage}"
    elif usage.stack:
        yield f"keeps an array in local memory: {usage}"
    if granted * threads * per_sm > REGISTERS:
        yield f"has {usage.registers} registers, too many for {per_sm} blocks of {threads} threads"
    if usage.shared:
        yield f"has {usage.shared} bytes of static shared memory"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_keep_to_registers(arch):
    kernels = (full_matrix() if IS_FULL else small_matrix())[arch]
    found = compile_all(kernels, arch)
    faults = [f"{kernel} {fault}" for kernel, usage in found.items() for fault in faults_of(kernel, usage)]
    assert not faults, "\n".join([f"{len(faults)} of {len(found)} kernels for sm_{arch}:", *faults])


def test_the_small_matrix_keeps_its_rules():
    small = small_matrix()
    every = {family: set() for family in FAMILIES}
    for arch, kernels in small.items():
        there = {kernel.geometry for kernel in kernels}
        assert {g for g in GEOMETRIES[arch] if not g.classes} <= there
        for kernel in kernels:
            assert itemsize_of(kernel.variant) in GEOMETRIES[arch][kernel.geometry]
            every.setdefault(kernel.geometry.family, set()).add(kernel.variant)
    assert {g for kernels in small.values() for _, g in kernels if g.family == "COLUMN"} == {
        g for found in GEOMETRIES.values() for g in found if g.family == "COLUMN"
    }
    alike = {dtype: dtypes for dtypes in ITEMSIZES.values() for dtype in dtypes}
    wanted = {v._replace(dtype=alike[v.dtype], prob_dtype=v.prob_dtype and "any") for v in variants(DTYPES, DTYPES)}
    for family in FAMILIES:
        seen = {v._replace(dtype=alike[v.dtype], prob_dtype=v.prob_dtype and "any") for v in every[family]}
        assert seen == wanted, family
    pairs = {(v.dtype, v.prob_dtype) for seen in every.values() for v in seen}
    assert pairs == set(itertools.product(DTYPES, [None, *DTYPES]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shared_memory_fits(arch):
    limits = LIMITS[arch]
    for geometry in GEOMETRIES[arch]:
        assert geometry.shared_bytes <= limits.shared_per_block, geometry
        if geometry.family == "BLOCK":  # whose rule for per_sm is the shared memory
            assert geometry.per_sm * (geometry.shared_bytes + RESERVED) <= limits.shared_per_sm, geometry
        assert geometry.cluster == 1 or limits.has_clusters


BLOCK = Geometry("BLOCK", 0, threads=256, per_sm=3)
GRADIENT = Variant("float32", out="grad")


def source_with(kernel, **macros):
    """Return a kernel's source with other macros than dispatch would give it."""
    macros = {**kernel.macros("k0"), **macros}
    return "\n".join([*(f"#define {name} {value}" for name, value in macros.items()), KERNELS])


def test_the_source_of_one_kernel_compiles():
    _, log = nvrtc.compile(source_of(GRADIENT, BLOCK), ARCHITECTURES[0], [DIRECTORY])
    assert list(nvrtc.usage_of(log)) == ["fastce"]


@pytest.mark.slow
def test_another_layout_of_the_task_does_not_compile():
    kernel = Kernel(GRADIENT, BLOCK)
    size = int(kernel.macros("")["FC_TASK_BYTES"])
    nvrtc.compile(source_with(kernel), 80, [DIRECTORY])
    with pytest.raises(RuntimeError, match="another struct"):
        nvrtc.compile(source_with(kernel, FC_TASK_BYTES=size + 8), 80, [DIRECTORY])


@pytest.mark.slow
def test_spills_are_seen():
    # 32 registers for each of 2048 threads: not enough for this.
    kernel = Kernel(Variant("float64", "float64", out="grad", has_stats=True), BLOCK)
    _, log = nvrtc.compile(source_with(kernel, FC_THREADS=512, FC_PER_SM=4), 80, [DIRECTORY])
    usage = nvrtc.usage_of(log)["k0"]
    assert usage.spill_stores > 0 and usage.spill_loads > 0
    assert any("spills" in fault for fault in faults_of(kernel, usage))


def test_too_many_registers_are_seen():
    kernel = Kernel(GRADIENT, BLOCK)
    fits = nvrtc.Usage(registers=80, shared=0, stack=0, spill_stores=0, spill_loads=0)
    assert not list(faults_of(kernel, fits))
    assert any("registers" in fault for fault in faults_of(kernel, fits._replace(registers=81)))
    assert any("static" in fault for fault in faults_of(kernel, fits._replace(shared=16)))
    assert any("local" in fault for fault in faults_of(kernel, fits._replace(stack=16)))


@pytest.mark.slow
@pytest.mark.skipif(90 not in ARCHITECTURES, reason="this NVRTC does not know sm_90")
@pytest.mark.parametrize("cluster", [1, 2])
def test_rows_move_in_granules(cluster):
    ptx = nvrtc.compile_to_ptx(source_of(GRADIENT, BLOCK._replace(cluster=cluster)), 90, [DIRECTORY])
    copies = [line.split() for line in ptx.splitlines() if "cp.async.cg.shared.global" in line]
    assert copies and all(words[-1] == "16;" for words in copies)
    assert "st.global.v4" in ptx
    assert ".local" not in ptx
    for exchange in ("mapa.shared::cluster", "st.shared::cluster", "barrier.cluster.arrive", "barrier.cluster.wait"):
        assert (exchange in ptx) == (cluster > 1), exchange
