"""Build the compiled kernels; everything declarative is in pyproject.toml.

Design
------
1. One Cython source becomes one extension module per instruction set, each with its own compiler flags. Rejected: one
   module with functions marked for several instruction sets. The marks differ between compilers, the loader of musl
   cannot choose among them, and no test can force one.
2. Cython runs inside build_ext, into the temporary build folder: the extensions keep their .pyx as source, so the sdist
   carries it, and no generated C lands in the source tree. It runs as a program for each module, at the same time as
   the others: calls of one Cython exclude each other, and took a quarter of the build.
3. What the compiler can do is asked of the compiler, by compiling a few lines, never guessed from the platform's name.
4. Every build is a whole build (`force`): the result depends on the environment (CC, CFLAGS, FASTCE_OPENMP), of which
   time stamps know nothing.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

SOURCE = Path("fastce/_cpu/_kernels.pyx")
SHARED = Path("fastce/_shared")
BASELINE = "baseline"
NEON = "neon"

# Here and not in the sources, because a .pyx does not pass its directives on to the .pxd files from which it inlines.
DIRECTIVES = {
    "language_level": 3,
    "cdivision": True,  # no test for division by zero, which would put jumps into vector code
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "freethreading_compatible": True,
    "autotestdict": False,
}

# What each instruction set adds for GCC and Clang. GCC prefers 256-bit vectors on many CPUs that have 512-bit ones.
ISA_FLAGS = {
    BASELINE: [],
    NEON: [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
        "-mprefer-vector-width=512",
    ],
}
# What the compiler defines where it can build for them. The baseline is what the architecture has: on 64-bit Arm, NEON.
ISA_ARCHITECTURES = {NEON: "__aarch64__", "avx2": "__x86_64__", "avx512": "__x86_64__"}

# The -fno flags allow vector code and change only what nobody looks at: errno, floating-point traps, the sign of zero.
# -g0: Python's own flags ask for debug information, which makes a module seven times as large.
UNIX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]
# The compiler chooses what of Cython's functions it inlines; only short ones in C are inlined always, see
# compiler.h. To force all took twice as long to compile.
UNIX_FLAGS += ["-DCYTHON_INLINE=inline __attribute__((unused))"]
# GCC turns selects into jumps, after which it leaves the loop scalar: six times slower with the same results. And it
# would unroll loops over 16 lanes before it vectorises, which then fails: up to three times slower. And it makes `rep
# stos` of loops that fill a few lanes, which takes longer to start than they take: a twentieth of rows of 1000.
GCC_FLAGS = [
    "-fno-thread-jumps", "--param=max-completely-peel-times=15", "-fno-tree-loop-distribute-patterns",
]  # fmt: skip
MSVC_FLAGS = ["/O2", "/std:c11"]

# Each breaks a promise of the library. Reordering sums removes the rounding steps on which exp and log1p rest, assuming
# finite numbers removes the NaN tests, and linking with one of the collective names sets flush-to-zero in every process
# that loads the module.
FORBIDDEN_FLAGS = {
    "-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-fassociative-math", "-ffinite-math-only",
    "-freciprocal-math", "-fno-honor-nans", "-fno-honor-infinities", "-mdaz-ftz", "-ffp-model=fast",
    "-ffp-model=aggressive", "/fp:fast",
}  # fmt: skip

# (compile, link) flags; the first pair that builds the probe wins.
OPENMP_FLAGS = [
    (["-fopenmp"], ["-fopenmp"]),  # GCC, and Clang where it brings libomp
    (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),  # Apple's Clang with a libomp installed beside it
]

ANY_PROGRAM = "int probe(void) { return 0; }\n"
PYTHON_PROGRAM = "#include <Python.h>\n" + ANY_PROGRAM
ARCHITECTURE_PROGRAM = "#ifndef %s\n#error another architecture\n#endif\n" + ANY_PROGRAM
OPENMP_PROGRAM = "#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n"


class BuildKernels(build_ext):
    """Make C from Cython and choose the flags, which depend on a compiler known only here."""

    def finalize_options(self):
        """Build everything, and the modules side by side."""
        super().finalize_options()
        self.force = True
        if self.parallel is None:
            self.parallel = len(ISA_FLAGS)  # also by fewer cores, which would else wait for the last; 0.4 GB each

    def build_extensions(self):
        """Build one module for each instruction set that the compiler builds for."""
        self.refuse_unsafe_flags()
        is_msvc = self.compiler.compiler_type == "msvc"
        if not is_msvc:  # whose absence setuptools explains
            self.require_compiler()
        openmp_compile, openmp_link = self.choose_openmp(is_msvc)
        common = MSVC_FLAGS if is_msvc else [*UNIX_FLAGS, *(flag for flag in GCC_FLAGS if self.accepts([flag]))]
        isas = [BASELINE] if is_msvc else self.choose_isas()
        built = []
        for extension in self.extensions:
            isa = extension.name.rpartition("_")[2]
            if isa not in isas:
                self.announce(f"fastce: not built for {isa}", level=logging.INFO)
                continue
            extension.extra_compile_args = [*common, *ISA_FLAGS[isa], *openmp_compile]
            extension.extra_link_args = [*openmp_link]
            built.append(extension)
        self.extensions = built
        super().build_extensions()

    def build_extension(self, ext):
        """Build one module."""
        ext.sources = [self.make_c(ext)]
        super().build_extension(ext)

    def choose_isas(self):
        """Return the instruction sets that GCC or Clang builds for, the architecture's own among them."""
        isas = [
            isa
            for isa, macro in ISA_ARCHITECTURES.items()
            if self.accepts(ISA_FLAGS[isa], ARCHITECTURE_PROGRAM % macro)
        ]
        return isas if NEON in isas else [BASELINE, *isas]

    def make_c(self, extension):
        """Return the C source for one module. Cython builds the module's name into it, so each module has its own."""
        source = Path(self.build_temp, extension.name.rpartition(".")[2], SOURCE.name).with_suffix(".c")
        source.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "cython", "--module-name", extension.name, "--output-file", str(source)]
        for directive, value in DIRECTIVES.items():
            command += ["--directive", f"{directive}={value}"]
        if subprocess.run([*command, str(SOURCE)], check=False).returncode:
            raise CompileError("Cython found errors in the kernels' source, see above")
        return str(source)

    def require_compiler(self):
        """Raise if there is no working C compiler, or if it does not find Python's headers."""
        advice = "install one, on Debian and Ubuntu with: apt install gcc python3-dev"
        command = " ".join(self.compiler.compiler_so)
        if shutil.which(self.compiler.compiler_so[0]) is None:
            raise CompileError(
                f"fastce is compiled while it is installed, for which there is no C compiler: no program "
                f"is called {self.compiler.compiler_so[0]!r}, as CC or Python's own build has it; {advice}"
            )
        for program, missing in (
            (ANY_PROGRAM, "the C compiler does not work"),
            (PYTHON_PROGRAM, "there is no Python.h"),
        ):
            status, messages = self.try_flags([f"-I{folder}" for folder in self.compiler.include_dirs], program, ())
            if status:
                raise CompileError(
                    f"fastce is compiled while it is installed, but {missing}; {advice}. "
                    f"The command was {command}, and its messages:\n{messages.decode(errors='replace')}"
                )

    def refuse_unsafe_flags(self):
        """Raise if the environment brings floating-point flags under which the kernels are wrong."""
        commands = (getattr(self.compiler, name, None) for name in ("compiler_so", "linker_so"))
        given = {word for command in commands for word in command or ()}
        given.update(os.environ.get("CL", "").split())  # how MSVC is given flags
        if unsafe := sorted(given & FORBIDDEN_FLAGS):
            raise CompileError(
                f"CFLAGS, LDFLAGS or CC contain {', '.join(unsafe)}: fastce would compute wrong numbers; remove it"
            )

    def choose_openmp(self, is_msvc):
        """Return compile and link flags for OpenMP, empty for a serial build."""
        wish = os.environ.get("FASTCE_OPENMP", "auto")
        if wish not in ("0", "1", "auto"):
            raise CompileError(f"FASTCE_OPENMP must be 0, 1 or auto, got {wish!r}")
        if wish == "0":
            return [], []
        if is_msvc:
            return ["/openmp"], []
        for compile_flags, link_flags in OPENMP_FLAGS:
            if self.accepts(compile_flags, OPENMP_PROGRAM, link_flags):
                return compile_flags, link_flags
        if wish == "1":
            raise CompileError("FASTCE_OPENMP=1, but the compiler cannot build a program with OpenMP")
        self.warn("the compiler has no OpenMP: fastce will run on one thread")
        return [], []

    def accepts(self, flags, program=ANY_PROGRAM, link_flags=()):
        """Tell whether GCC or Clang takes the flags and says no more about them than about none."""
        # Not -Werror: Python's own flags may already be more than Clang likes, and then every answer would be no.
        return self.try_flags(flags, program, link_flags) == self.try_flags((), ANY_PROGRAM, ())

    def try_flags(self, compile_flags, program, link_flags):
        """Make a shared object of the program; return the compiler's exit status and messages."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "probe.c").write_text(program)
            for command in (
                [*self.compiler.compiler_so, *compile_flags, "-c", "probe.c", "-o", "probe.o"],
                [*self.compiler.linker_so, "probe.o", *link_flags, "-o", "probe.so"],
            ):
                result = subprocess.run(command, cwd=folder, capture_output=True, check=False)
                if result.returncode or result.stderr:
                    break
            return result.returncode, result.stderr


class SourceDistribution(sdist):
    """Carry the documentation, and the tests whole; setuptools on its own takes only those named test*.py."""

    def make_distribution(self):
        """Add what setuptools leaves out, then pack."""
        patterns = ("tests/**/*.py", "tests/**/*.hpp", "docs/*")
        files = {str(path) for pattern in patterns for path in Path().glob(pattern)}
        self.filelist.extend(sorted(files.difference(self.filelist.files)))
        super().make_distribution()


def readme_with_absolute_links():
    """Return README.md for package indexes, which resolve no relative links."""
    url = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]

    def make_absolute(match):
        bang, text, path = match.groups()
        return f"{bang}[{text}]({url}/{'raw' if bang else 'blob'}/main/{path})"

    # [text](path) and ![text](path), neither with a scheme nor within the page
    return re.sub(
        r"(!?)\[([^\]]*)\]\((?!#|\w+:)([^)]*)\)", make_absolute, Path("README.md").read_text(encoding="utf-8")
    )


extensions = [
    Extension(
        f"fastce._cpu._kernels_{isa}",
        [str(SOURCE)],
        depends=[
            str(path)
            for folder, kinds in ((SOURCE.parent, ("*.pxd", "*.h")), (SHARED, ("*.h",)))
            for kind in kinds
            for path in sorted(folder.rglob(kind))
        ],
        include_dirs=[str(SOURCE.parent), str(SHARED), numpy.get_include()],
        define_macros=[
            ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
            ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
        ],
    )
    for isa in ISA_FLAGS
]
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels, "sdist": SourceDistribution},
    long_description=readme_with_absolute_links(),
    long_description_content_type="text/markdown",
)
