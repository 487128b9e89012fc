"""The layers of the package: every module imports from the layers below it, and nothing else."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastce

PACKAGE = Path(fastce.__file__).parent

# module: what of this package it may import. The standard library and NumPy are open to all.
LAYERS = {
    "__init__": {
        "_config",
        "_curvature",
        "_linear",
        "_logsumexp",
        "_loss",
        "_loss_object",
        "_nll_loss",
        "_softmax",
        "_stats",
    },  # the public API
    "_loss_object": {"_arguments", "_array", "_curvature", "_dispatch", "_loss", "_options", "_stats"},  # functions
    "_loss": {"_arguments", "_dispatch", "_options", "_stats"},
    "_stats": {"_arguments", "_array", "_dispatch"},
    "_curvature": {"_arguments", "_dispatch", "_options"},
    "_nll_loss": {"_arguments", "_dispatch", "_options"},
    "_linear": {"_arguments", "_linear_chunks", "_linear_grads", "_linear_layer", "_loss", "_options", "_stats"},
    "_linear_chunks": {
        "_arguments",
        "_array",
        "_axes",
        "_cpu",
        "_dispatch",
        "_linear_grads",
        "_linear_layer",
        "_logits",
        "_loss",
        "_stats",
    },
    "_linear_grads": {"_array", "_linear_layer"},
    "_linear_layer": {"_arguments", "_array", "_checks", "_dispatch", "_logits", "_options"},
    "_softmax": {"_array", "_axes", "_checks", "_cpu", "_logits"},
    "_logsumexp": {"_array", "_axes", "_checks", "_logits", "_weighted_sums", "_wording"},
    "_weighted_sums": {"_array", "_logits"},
    "_config": {"_cpu"},
    "_axes": {"_array", "_checks", "_cpu", "_cuda", "_logits", "_options", "_wording"},  # dispatch, and what it needs
    "_dispatch": {"_arguments", "_array", "_cpu", "_far_weights", "_gpu", "_logits", "_messages", "_options"},
    "_gpu": {"_arguments", "_array", "_cpu", "_cuda", "_logits", "_messages"},
    "_far_weights": {"_arguments", "_array"},
    "_checks": {"_array", "_cpu", "_messages", "_options"},
    "_arguments": {"_cpu", "_logits", "_options"},
    "_messages": {"_advice", "_array", "_logits", "_options", "_wording"},
    "_advice": {"_array", "_wording"},
    "_options": {"_cpu", "_wording"},
    "_logits": {"_array"},
    "_array": {"_wording"},
    "_wording": set(),
    "cuda": {"_array", "_cuda"},  # what a GPU alone needs
    "_reference": set(),  # the definition, which imports nothing of this
}
# Imported within functions: nothing of it before there is an array on a GPU.
LAZY = {"cupy"}
# Programs and integrations stand on the public functions, and on each other. They may bring their own packages.
PROGRAMS = {
    "__main__": {"_benchmarks"},
    "boosting": {"_boosting_objects"},
    "_boosting_objects": {"_boosting_rows"},
    "_boosting_rows": {"_labels"},
    "torch": {"_torch_arrays", "_torch_graph", "_torch_linear", "_torch_memory", "_torch_operators"},
    "_torch_linear": {"_torch_arrays", "_torch_graph"},
    "_torch_operators": {"_torch_arrays", "_torch_graph"},
    "_torch_graph": {"_torch_arrays"},
    "_torch_arrays": {"_torch_memory"},
    "_torch_memory": set(),
    "sklearn": {"_sklearn_loss", "_sklearn_objective", "_sklearn_solvers"},
    "_sklearn_loss": {"_labels"},
    "_labels": set(),
    "_sklearn_solvers": {"_sklearn_objective"},
    "_sklearn_objective": {"_sklearn_blas"},
    "_sklearn_blas": set(),
}


def imports(path):
    """Return the modules of this package that a file imports (its public names count as `fastce`), and the others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [node.module]
            if node.module == "fastce":
                names = [f"fastce.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "fastce":
                others.add(top)
            else:
                own.add(rest.partition(".")[0] if re.match("_[^_]", rest) else "fastce")
    return own, others


def modules():
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_a_layer():
    """A new one must be given its place here."""
    assert modules() == sorted(LAYERS | PROGRAMS)


@pytest.mark.parametrize("module", LAYERS)
def test_modules_import_from_the_layers_below(module):
    own, others = imports(PACKAGE / f"{module}.py")
    assert own <= LAYERS[module]
    assert others <= {*sys.stdlib_module_names, "numpy", *LAZY}


@pytest.mark.parametrize("module", PROGRAMS)
def test_programs_stand_on_the_public_functions(module):
    own, _ = imports(PACKAGE / f"{module}.py")
    assert own <= {"fastce", *PROGRAMS[module]}


def test_the_benchmarks_stand_on_the_public_functions():
    """And on instruction sets, and on the reference's NumPy expression, which is a peer."""
    for path in sorted((PACKAGE / "_benchmarks").glob("*.py")):
        own, _ = imports(path)
        assert own <= {"fastce", "_benchmarks", "_cpu", "_reference"}, path.name


@pytest.mark.parametrize("backend", ["_cpu", "_cuda"])
def test_a_backend_imports_nothing_from_above_or_beside(backend):
    for path in sorted((PACKAGE / backend).glob("*.py")):
        own, others = imports(path)
        assert own <= {backend}, path.name
        assert others <= {*sys.stdlib_module_names, "numpy", *LAZY}, path.name


def test_the_kernels_know_only_each_other():
    sources = sorted(path for path in (PACKAGE / "_cpu").rglob("*") if path.suffix in (".pyx", ".pxd"))
    if not sources:
        pytest.skip("an installed package has no sources")
    for path in sources:
        for module in re.findall(r"^\s*(?:from|cimport|import)\s+([\w.]+)", path.read_text(), re.MULTILINE):
            top = module.split(".")[0]
            assert top in ("cpython", "cython", "libc", "numpy", "openmp") or module.startswith("fastce._cpu"), (
                f"{path.name} imports {module}"
            )


def test_the_kernels_sources_form_no_circle():
    """Neither by cimports nor by headers, so that each layer can be read without those above it."""
    folder = PACKAGE / "_cpu"
    below = {}
    for path in folder.rglob("*"):
        if path.suffix in (".pyx", ".pxd"):
            modules = re.findall(r"^from fastce\._cpu\.([\w.]+) cimport", path.read_text(), re.MULTILINE)
            headers = re.findall(r'^cdef extern from "([\w/]+\.h)"', path.read_text(), re.MULTILINE)
            name = path.relative_to(folder).with_suffix("").as_posix().replace("/", ".")
            below[name] = {*modules, *(header for header in headers if (folder / header).exists())}
        elif path.suffix == ".h":
            name = path.relative_to(folder).as_posix()
            included = re.findall(r'^#include "([\w/]+\.h)"', path.read_text(), re.MULTILINE)
            # A header with a text for each type includes itself.
            below[name] = {header for header in included if (folder / header).exists()} - {name}
    if "_kernels" not in below:
        pytest.skip("an installed package has no sources")
    order = list(graphlib.TopologicalSorter(below).static_order())
    assert order[-1] == "_kernels"


def test_importing_the_package_imports_no_other_package():
    """Above all not CuPy, whose import starts CUDA, and none of the peers."""
    code = "import sys, numpy; before = set(sys.modules); import fastce; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    new = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fastce" in new
    assert not new & {"cupy", "scipy", "sklearn", "torch", "pandas"}
    assert new - {"fastce"} <= {*sys.stdlib_module_names, "numpy", "cython_runtime"} | {
        name for name in new if name.startswith("_cython_")
    }
