"""Tensors as arrays and back: what is taken and what refused, results in PyTorch's memory, and calls of the loss.

Design
------
1. Tensors are looked at where they are, never copied: on the host as NumPy arrays, on a GPU as CuPy's. NumPy has no
   bfloat16, so it travels as integers of 16 bits and is then called by the name that ml_dtypes gives it. Only what is
   stored with its sign reversed, as the imaginary part of a conjugate is, has to be copied.
2. The storage of tensors stays as it was, and that of results is like any other: it can be resized. So results are in
   memory that PyTorch has allocated, and `Tensor.numpy` is not used, after which PyTorch resizes no more.
3. Rules and messages are those of the arrays' functions. They are told in PyTorch's words, and what NumPy could not
   even look at is refused before.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import fastce
from fastce._torch_memory import empty_like

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = tuple(getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
_READABLE = frozenset((*DTYPES, *_INTEGERS, torch.bool))

# NumPy's names of these types.
_TYPES = {
    dtype: np.dtype("int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")).str
    for dtype in _READABLE
}

_NEEDED = ("input", "target", "linear_weight")  # arguments that cannot be None

# The tensors of a loss, None where there is none, and what the functions for arrays call them.
Tensors = tuple[Any, ...]
_ARRAYS = ("logits", "target", "weight", "sample_weight")

# How the messages of NumPy's functions are said here.
_WORDS = tuple(
    (re.compile(pattern), word)
    for pattern, word in (
        (r"\.astype\(np\.int64\)", ".long()"),
        (r"\.astype\(np\.(\w+)\)", r".to(torch.\1)"),
        (r"\.astype\((\w+)\.dtype\)", r".to(\1.dtype)"),
        (r"\bnp\.", "torch."),
        (r"\baxis=", "dim="),
        (r": remove its last axis$", ": remove its last dimension with target.squeeze(-1)"),
        (r"\b(logits|features)'", "input's"),
        (r"\b(logits|features)\b", "input"),
    )
)


def check_tensors(input: torch.Tensor, **others: torch.Tensor | None) -> None:  # noqa: A002 - PyTorch's name
    """Refuse what is no tensor, or not where the input is, or not stored as an array."""
    for name, value in {"input": input, **others}.items():
        if value is not None or name in _NEEDED:
            _check_tensor(name, value, input)
    if input.dtype not in DTYPES:
        hint = ": convert it with input.float()" if input.dtype in _INTEGERS else ""
        if hint and others["target"].is_floating_point():  # type: ignore[union-attr]
            hint = ", while target is floating: they seem to be swapped"
        raise TypeError(f"input must be float32, float64, float16 or bfloat16, got {input.dtype}{hint}")
    if input.device.type not in ("cpu", "cuda"):
        raise TypeError(f"input must be on the CPU or a CUDA device, got a tensor on {input.device}")


def _check_tensor(name: str, value: Any, input: torch.Tensor) -> None:  # noqa: A002
    """Refuse what is not an array of numbers on the input's device."""
    if not isinstance(value, torch.Tensor):
        hint = ""
        if isinstance(value, np.ndarray | np.generic | list | tuple | int | float):
            hint = f": convert it with torch.as_tensor({name})"
        elif name == "weight":
            hint = ": give one factor for each class, as in torch.tensor([1.0, 2.0])"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{hint}")
    if value.is_nested:
        raise TypeError(
            f"{name} must be one dense tensor, got a nested one: pad it with torch.nested.to_padded_tensor, and give "
            f"what was added the class ignore_index"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}: convert it with {name}.to_dense()")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantized, got {value.dtype}: convert it with {name}.dequantize()")
    if value.device != input.device:
        raise TypeError(f"{name} must be on the device of input, {input.device}, got {value.device}")
    if value.dtype not in _READABLE:
        kinds = f"{'' if name == 'input' else 'of an integer dtype, '}float32, float64, float16 or bfloat16"
        hint = f": convert it with {name}.float()" if value.is_floating_point() else ""
        raise TypeError(f"{name} must be {kinds}, got {value.dtype}{hint}")


def call(function: Callable[..., Any], names: tuple[str, ...], tensors: Tensors, options: dict[str, Any]) -> Any:
    """Call one of the functions for arrays, which has its names; its messages are told in PyTorch's words."""
    arrays = dict(zip(names, map(as_array, tensors), strict=True))
    try:
        return function(**arrays, **options)
    except (TypeError, ValueError, IndexError) as error:
        message = str(error)
        for pattern, word in _WORDS:
            message = pattern.sub(word, message)
        if type(error) not in (TypeError, ValueError, IndexError) or message == str(error):
            raise
        raise type(error)(message) from None


def loss_of(tensors: Tensors, dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    """Return the loss of input, target, weight and sample_weight."""
    with stream_of(tensors[0]):
        return as_tensor(call(fastce.cross_entropy, _ARRAYS, tensors, options), dtype)


def loss_and_grad(
    tensors: Tensors, dtype: torch.dtype, options: dict[str, Any], grad_output: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss, and the gradient in a new tensor."""
    grad = empty_like(tensors[0])
    with stream_of(grad):
        names = (*_ARRAYS, "grad_output", "out")
        loss, _ = call(fastce.cross_entropy_with_grad, names, (*tensors, grad_output, grad), options)
        return as_tensor(loss, dtype), grad


class _Memory:
    """The memory of a tensor, as NumPy takes it in."""

    __slots__ = ("__array_interface__", "tensor")
    __array_interface__: dict[str, Any]
    tensor: torch.Tensor


def as_array(tensor: torch.Tensor | None) -> Any:
    """Return an array of NumPy or CuPy in the memory of a tensor."""
    if tensor is None:
        return None
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.device.type == "cpu":
        size = tensor.itemsize
        memory = _Memory()
        memory.tensor = tensor  # which must live as long as the array
        memory.__array_interface__ = {
            "version": 3,
            "shape": tensor.shape,
            "strides": tuple([stride * size for stride in tensor.stride()]),
            "typestr": _TYPES[tensor.dtype],
            "data": (tensor.data_ptr(), False),
        }
        array = np.asarray(memory)
        return array if tensor.dtype != torch.bfloat16 else array.view(_bfloat16())
    import cupy

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return cupy.from_dlpack(tensor.view(torch.int16)).view(_bfloat16())
    return cupy.from_dlpack(tensor)


def loss_dtype(input: torch.Tensor) -> torch.dtype:  # noqa: A002
    """Return PyTorch's dtype of the loss."""
    return torch.float32 if input.dtype in HALVES and torch.is_autocast_enabled(input.device.type) else input.dtype


def as_tensor(array: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return an array as a tensor where it is; on the host a copy, whose memory is PyTorch's."""
    if isinstance(array, np.ndarray | np.generic):
        return torch.tensor(array, dtype=dtype, device="cpu")
    return torch.from_dlpack(array).to(dtype)


def _bfloat16() -> Any:
    """Return NumPy's dtype of this name."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 tensors need the package ml_dtypes: pip install ml-dtypes") from error
    return ml_dtypes.bfloat16


class _ForeignStream:
    """A stream as CuPy takes it in; PyTorch's own say this of themselves in recent versions only."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def stream_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CuPy works where PyTorch does, so that each finds what the other has done."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else _current_stream(tensor.device)


@contextlib.contextmanager
def _current_stream(device: torch.device) -> Iterator[None]:
    import cupy

    with torch.cuda.device(device):  # which CuPy takes for the stream's
        stream = _ForeignStream(torch.cuda.current_stream(device))
        with cupy.cuda.Stream.from_external(stream):
            yield
