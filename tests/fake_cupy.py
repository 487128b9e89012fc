"""A stand-in for CuPy on NumPy: as much of it as fastce needs, so that machines without a GPU test the device path.

Arrays are as strict as CuPy's: nothing turns them into NumPy arrays unasked, or mixes them with such. Kernels are
compiled by g++ and run by cuda_host/host.hpp. `install` makes it the module that `import cupy` gives.
"""

import atexit
import ctypes
import functools
import hashlib
import itertools
import math
import mmap
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

import ml_dtypes
import numpy as np

__version__ = "14.0.0"

HOST = Path(__file__).parent / "cuda_host"
KINDS = "?bhilqBHILQefdFD"
LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # elsewhere no kernel runs
if LIBC:
    LIBC.posix_memalign.argtypes = ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t
    LIBC.free.argtypes = (ctypes.c_void_p,)
    LIBC.free.restype = None
    LIBC.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long
    LIBC.mmap.restype = ctypes.c_void_p
    LIBC.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    LIBC.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
PATTERN = 0xA5  # around guarded memory

# What the device says of itself, for tests to change.
settings = types.SimpleNamespace(
    compute_capability="90",
    attributes={
        "MaxSharedMemoryPerBlockOptin": 232448,
        "MultiProcessorCount": 4,
        "MaxSharedMemoryPerMultiprocessor": 233472,
    },
    device_count=1,
    guard=None,  # "before" or "behind": that end of every new array lies at a page that nobody may touch
)
damages = []  # what was found where guarded arrays do not reach to
compiler_flags = []  # in addition, say -fsanitize=address
launches = []  # a dict of each launch: name, grid, block, cluster, shared_mem, code

dtype = np.dtype
bool_ = np.bool_
int8, int16, int32, int64 = np.int8, np.int16, np.int32, np.int64
uint8, uint16, uint32, uint64 = np.uint8, np.uint16, np.uint32, np.uint64
float16, float32, float64 = np.float16, np.float32, np.float64


def _allocate_guarded(nbytes, side):
    """Return the address of memory between two pages that nobody may touch, and what checks and frees it.

    One end lies at such a page. What remains of the other end's page holds a pattern, which is looked at in the end.
    """
    page = mmap.PAGESIZE
    room = -(-max(nbytes, 1) // page) * page
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = LIBC.mmap(None, room + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0)
    if base in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"no {nbytes} bytes")
    for outside in (base, base + page + room):
        if LIBC.mprotect(outside, page, 0):
            raise MemoryError("pages cannot be protected")
    first = base + page
    ctypes.memset(first, PATTERN, room)
    start = 0 if side == "before" else room - nbytes
    expected, copy, munmap = bytes([PATTERN]) * (room - nbytes), ctypes.string_at, LIBC.munmap

    def free(address):
        found = copy(first, start) + copy(address + nbytes, room - nbytes - start)
        munmap(base, room + 2 * page)
        if found != expected:
            damages.append(f"{nbytes} bytes, the {side} end at a page: written outside")

    return first + start, free


class _Memory:
    """Device memory: exactly as long as asked for, aligned as CuPy's unless guarded, and full of NaN."""

    def __init__(self, nbytes):
        if settings.guard is None:
            address = ctypes.c_void_p()
            if LIBC.posix_memalign(ctypes.byref(address), 512, max(nbytes, 1)):
                raise MemoryError(f"no {nbytes} bytes")
            self._free = LIBC.free  # modules may be gone before the last array
            self._address = address.value
        else:
            self._address, self._free = _allocate_guarded(nbytes, settings.guard)
        ctypes.memset(self._address, 0xFF, nbytes)
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (self._address, False)}

    def __del__(self):
        if hasattr(self, "_address"):
            self._free(self._address)


class _Foreign:
    """Device memory of somebody else, who is kept alive."""

    def __init__(self, owner):
        interface = owner.__cuda_array_interface__
        self._owner = owner
        self.__array_interface__ = {k: interface.get(k) for k in ("shape", "typestr", "data", "strides")}
        self.__array_interface__["version"] = 3


def _allocate(shape, dtype, order="C"):
    dtype = _check_dtype(dtype)
    shape = (operator.index(shape),) if hasattr(shape, "__index__") else tuple(map(operator.index, shape))
    memory = np.asarray(_Memory(math.prod(shape) * dtype.itemsize))
    return np.ndarray(shape, dtype, memory, order=order)


def _check_dtype(dtype):
    dtype = np.dtype(dtype)
    if dtype.char not in KINDS and dtype != ml_dtypes.bfloat16:
        raise ValueError(f"Unsupported dtype {dtype}")
    return dtype


def _like(array, order="K"):
    """Return device memory for a NumPy array's elements; "K" keeps the order of its axes, "A" what is in Fortran's."""
    if order == "A":
        order = "F" if array.flags.fnc else "C"
    if order != "K":
        return _allocate(array.shape, array.dtype, order)
    axes = sorted(range(array.ndim), key=lambda i: -abs(array.strides[i]))
    return _allocate([array.shape[i] for i in axes], array.dtype).transpose(np.argsort(axes))


def _own(array, order="K"):
    """Copy a NumPy array to device memory."""
    result = _like(array, order)
    result[...] = array
    return result


def _wrap(result):
    """Make device arrays of the arrays and scalars that NumPy returned; views stay views."""
    if isinstance(result, tuple | list):
        return type(result)(map(_wrap, result))
    if not isinstance(result, np.ndarray | np.generic):
        return result
    base = result = np.asarray(result)
    while isinstance(base, np.ndarray):
        base = base.base
    self = object.__new__(ndarray)
    self._array = result if isinstance(base, _Memory | _Foreign) else _own(result)
    return self


def _unwrap(value):
    """Make NumPy arrays of the device arrays in an argument."""
    if isinstance(value, ndarray):
        return value._array
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(map(_unwrap, value))
    return value


class _Flags:
    """CuPy's flags, which know no `writeable`."""

    def __init__(self, flags):
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous
        self.forc, self.fnc, self.owndata = flags.forc, flags.fnc, flags.owndata

    def __getitem__(self, name):
        return getattr(self, name.lower())


class ndarray:  # noqa: N801
    """An array in device memory."""

    __array_priority__ = 100

    def __init__(self, shape, dtype=float, order="C"):
        self._array = _allocate(shape, dtype, order)

    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    strides = property(lambda self: self._array.strides)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)
    flags = property(lambda self: _Flags(self._array.flags))
    data = property(lambda self: types.SimpleNamespace(ptr=self._array.__array_interface__["data"][0]))
    device = property(lambda self: Device(0))
    T = property(lambda self: self.transpose())

    def astype(self, dtype, order="K", copy=True):
        dtype = _check_dtype(dtype)
        if not copy and dtype == self.dtype:
            return self
        return _wrap(_own(self._array.astype(dtype), order))

    def copy(self, order="C"):
        return _wrap(_own(self._array, order))

    def reshape(self, *shape, order="C"):
        return _wrap(self._array.reshape(*shape, order=order))

    def ravel(self, order="C"):
        return _wrap(self._array.ravel(order))

    def transpose(self, *axes):
        return _wrap(self._array.transpose(*axes))

    def swapaxes(self, a, b):
        return _wrap(self._array.swapaxes(a, b))

    def view(self, dtype=None):
        return _wrap(self._array.view() if dtype is None else self._array.view(_check_dtype(dtype)))

    def fill(self, value):
        self._array.fill(_unwrap(value))

    def get(self, stream=None, order="C", out=None):
        if out is None:
            return np.array(self._array, order=order)
        out[...] = self._array
        return out

    def set(self, array, stream=None):
        if not isinstance(array, np.ndarray):
            raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
        if array.dtype != self.dtype or array.shape != self.shape:
            raise ValueError("dtype or shape mismatch")
        self._array[...] = array

    def item(self, *args):
        return self._array.item(*args)

    def tolist(self):
        return self._array.tolist()

    def any(self, axis=None, **options):
        return _wrap(self._array.any(axis, **options))

    def all(self, axis=None, **options):
        return _wrap(self._array.all(axis, **options))

    def max(self, axis=None, **options):
        return _wrap(self._array.max(axis, **options))

    def min(self, axis=None, **options):
        return _wrap(self._array.min(axis, **options))

    def sum(self, axis=None, **options):
        return _wrap(self._array.sum(axis, **options))

    def argmax(self, axis=None, **options):
        return _wrap(self._array.argmax(axis, **options))

    def __getitem__(self, key):
        key = _unwrap(key if isinstance(key, tuple) else (key,))
        if not any(k is Ellipsis for k in key):
            key += (Ellipsis,)  # a view of no dimensions, where NumPy would make a scalar
        return _wrap(self._array[key])

    def __setitem__(self, key, value):
        if isinstance(value, np.ndarray) and (key is Ellipsis or (isinstance(key, slice) and key == slice(None))):
            self.set(value)
        else:
            self._array[_unwrap(key)] = _unwrap(value)

    def __len__(self):
        return len(self._array)

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self._array)

    def __int__(self):
        return int(self._array.item())

    def __float__(self):
        return float(self._array.item())

    def __index__(self):
        return operator.index(self._array)

    def __repr__(self):
        return repr(self._array)

    def __format__(self, spec):
        return format(self._array.item() if self.ndim == 0 else self._array, spec)

    __hash__ = None

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array "
            "explicitly."
        )

    def __array_function__(self, function, types, args, kwargs):
        kwargs = {name: _unwrap(value) for name, value in kwargs.items()}
        return _wrap(function(*_unwrap(args), **kwargs))

    def __array_ufunc__(self, ufunc, method, *args, out=None, **kwargs):
        if method != "__call__":
            return NotImplemented
        kwargs = {name: _unwrap(value) for name, value in kwargs.items()}
        if out is None:
            return _wrap(ufunc(*_unwrap(args), **kwargs))
        ufunc(*_unwrap(args), out=_unwrap(out), **kwargs)
        return out[0] if len(out) == 1 else out

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "descr": self.dtype.descr,
            "data": (self.data.ptr, False),
            "strides": None if self._array.flags.c_contiguous else self.strides,
            "stream": 1,
            "version": 3,
        }

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, **options):
        raise BufferError("NumPy's capsules cannot hold device memory")


ndarray.__module__ = "cupy"


def _add_operators():
    """Give the class Python's operators, which NumPy carries out."""

    def forward(name):
        def method(self, *others):
            others = _unwrap(others)
            result = getattr(self._array, name)(*others)
            return self if result is self._array else _wrap(result)

        method.__name__ = name
        setattr(ndarray, name, method)

    arithmetic = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"
    for name, prefix in itertools.product(arithmetic, ("", "r", "i")):
        forward(f"__{prefix}{name}__")
    for name in "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert":
        forward(f"__{name}__")


_add_operators()


def array(obj, dtype=None, copy=True, order="K"):
    """Copy into device memory what is anywhere."""
    if isinstance(obj, ndarray):
        return obj.astype(obj.dtype if dtype is None else dtype, order, copy)
    if hasattr(obj, "__cuda_array_interface__"):
        return array(_from_interface(obj), dtype, copy, order)
    if isinstance(obj, tuple | list) and any(isinstance(part, ndarray) for part in obj):
        obj = [part._array if isinstance(part, ndarray) else part for part in obj]
    result = np.asarray(obj, dtype)
    _check_dtype(result.dtype)
    return _wrap(_own(result, order))


def asarray(a, dtype=None, order="K"):
    """Return a device array as it is, and a view of other device memory."""
    return array(a, dtype, False, order)


def ascontiguousarray(a, dtype=None):
    result = asarray(a, dtype)
    return result if result.flags.c_contiguous else result.copy()


def _from_interface(owner):
    result = np.asarray(_Foreign(owner))
    if result.dtype.kind == "V":  # what NumPy has no name for
        if "bfloat16" not in str(owner.dtype):
            raise ValueError(f"Unsupported dtype {owner.dtype}")
        result = result.view(ml_dtypes.bfloat16)
    return _wrap(result)


def from_dlpack(owner):
    """Return a view; the data is found by the other protocol, which NumPy can read."""
    if owner.__dlpack_device__()[0] != 2:
        raise ValueError("no CUDA device")
    return owner[...] if isinstance(owner, ndarray) else _from_interface(owner)


def empty(shape, dtype=float, order="C"):
    return ndarray(shape, dtype, order)


def full(shape, fill_value, dtype=None, order="C"):
    result = ndarray(shape, np.asarray(_unwrap(fill_value)).dtype if dtype is None else dtype, order)
    result.fill(fill_value)
    return result


def zeros(shape, dtype=float, order="C"):
    return full(shape, 0, dtype, order)


def ones(shape, dtype=float, order="C"):
    return full(shape, 1, dtype, order)


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    if subok is not None:
        raise TypeError("subok is not supported yet")
    return _wrap(_like(np.empty_like(prototype._array, dtype, order, shape=shape)))


def zeros_like(prototype, dtype=None, order="K", subok=None, shape=None):
    result = empty_like(prototype, dtype, order, subok, shape)
    result.fill(0)
    return result


def moveaxis(a, source, destination):
    return _wrap(np.moveaxis(a._array, source, destination))


def isfinite(a):
    return _wrap(np.isfinite(a._array))


def shares_memory(a, b):
    return np.shares_memory(_unwrap(a), _unwrap(b))


def may_share_memory(a, b):
    return np.may_share_memory(_unwrap(a), _unwrap(b))


class RawModule:
    """Kernels given as text. It may hold one, which FC_NAME names."""

    def __init__(self, *, code, options=(), **others):
        self.code, self.options = code, tuple(options)

    def compile(self):
        return _load(self.code, self.options)

    def get_function(self, name):
        library = self.compile()
        if not hasattr(library, name):
            raise RuntimeError(f"CUDA_ERROR_NOT_FOUND: named symbol not found: {name}")
        return RawKernel(name, self.code, library)


class RawKernel:
    """A kernel, which runs to its end when it is launched. All of one name and text are one function of the device."""

    _shared_maxima = {}  # noqa: RUF012

    def __init__(self, name, code, library):
        cluster = re.search(r"^\s*#\s*define\s+FC_CLUSTER\s+(\d+)", code, re.MULTILINE)
        self.name = name
        self._code, self._library, self._cluster = code, library, int(cluster[1]) if cluster else 1

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._shared_maxima.get((self.name, self._code), 49152)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, n_bytes):
        self._shared_maxima[self.name, self._code] = n_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        (task,) = args
        task, expected = task.tobytes(), ctypes.c_size_t.in_dll(self._library, "fc_host_task_bytes").value
        if len(task) != expected:
            raise RuntimeError(f"{self.name}: the task has {len(task)} bytes, the kernel's has {expected}")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory, not opted in")
        grid, block = ((*size, 1, 1)[:3] for size in (grid, block))
        if grid[1:] != (1, 1) or block[1:] != (1, 1):
            raise RuntimeError(f"{self.name}: only grids and blocks of one dimension, got {grid} and {block}")
        launches.append(
            {
                "name": self.name,
                "grid": grid,
                "block": block,
                "cluster": self._cluster,
                "shared_mem": shared_mem,
                "code": self._code,
            }
        )
        message = ctypes.create_string_buffer(512)
        sizes = (ctypes.c_uint(int(n)) for n in (grid[0], block[0], self._cluster))
        run = self._library.fc_host_run
        if run(task, *sizes, ctypes.c_size_t(shared_mem), message, ctypes.c_size_t(len(message))):
            raise RuntimeError(f"{self.name}: {message.value.decode()}")


_libraries = {}
_lock = threading.Lock()


def _load(code, options=()):
    """Compile a kernel for the host, once in this process, and load it."""
    kept, words = [], iter(options)
    for word in words:
        if word in ("-I", "-D"):
            kept.append(word + next(words))
        elif word.startswith(("-I", "-D")):
            kept.append(word)
    key = code, tuple(kept), tuple(compiler_flags)
    with _lock:
        if key not in _libraries:
            stem = _folder() / hashlib.sha256(repr(key).encode()).hexdigest()[:16]
            compile_host(f"{code}\nFC_HOST_ENTRY(FC_NAME)\n", stem, [*kept, *compiler_flags])
            _libraries[key] = ctypes.CDLL(str(stem.with_suffix(".so")))
        return _libraries[key]


def compiler():
    """Return the command of the C++ compiler, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def compile_host(text, stem, flags, suffix=".so"):
    """Compile the text of a kernel to a shared library, or to a program if the suffix is empty."""
    source, target = stem.with_suffix(".cpp"), stem.with_suffix(suffix)
    source.write_text(text, encoding="utf-8")
    command = [
        *compiler(),
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-DFC_HOST",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        *flags,
    ]
    if suffix:
        _run([*command, f"-I{_precompile(command)}", f"-I{HOST}", "-shared", "-o", str(target), str(source)])
    else:
        _run([*command, f"-I{HOST}", "-pthread", "-o", str(target), str(source)])
    return target


@functools.cache
def _folder():
    """Make the folder of this process's libraries."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def _precompile(command):
    """Return a folder with what this command makes of the header alone: that is half of a kernel's time."""
    folder = _folder() / hashlib.sha256(repr(command).encode()).hexdigest()[:16]
    if not folder.exists():
        folder.mkdir()
        _run([*command, "-x", "c++-header", str(HOST / "host.hpp"), "-o", str(folder / "host.hpp.gch")])
    return folder


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")


class Device:
    """The one device."""

    def __init__(self, device=0):
        self.id = int(device)

    compute_capability = property(lambda self: settings.compute_capability)
    attributes = property(lambda self: settings.attributes)

    def __int__(self):
        return self.id

    def __eq__(self, other):
        return isinstance(other, Device) and other.id == self.id

    def __hash__(self):
        return hash(self.id)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def use(self):
        pass

    def synchronize(self):
        pass


class Stream:
    """The default stream."""

    ptr = 0

    def synchronize(self):
        pass


def _alloc_pinned_memory(nbytes):
    """Return memory of the host, for the buffer protocol, that the device reaches at `ptr`."""
    members = {"ptr": property(ctypes.addressof)}
    memory = type("PinnedMemoryPointer", (ctypes.c_char * nbytes,), members)()
    ctypes.memset(memory, 0xFF, nbytes)
    return memory


runtime = types.ModuleType("cupy.cuda.runtime")
runtime.getDeviceCount = lambda: settings.device_count
runtime.getDevice = lambda: 0
runtime.deviceSynchronize = lambda: None

cuda = types.ModuleType("cupy.cuda")
cuda.Device = Device
cuda.Stream = Stream
cuda.get_current_stream = Stream
cuda.alloc_pinned_memory = _alloc_pinned_memory
cuda.is_available = lambda: settings.device_count > 0
cuda.runtime = runtime


def install(monkeypatch):
    """Make this the module that `import cupy` gives."""
    monkeypatch.setitem(sys.modules, "cupy", sys.modules[__name__])
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cupy.cuda.runtime", runtime)
