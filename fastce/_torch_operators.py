"""The loss as PyTorch's transforms, modes and compilers need it: an operator, and derivatives that they can build on.

Design
------
1. Two operators, the loss and its gradient, are registered with PyTorch. So whatever intercepts operators finds them:
   `torch.compile`, `torch.export`, `torch.jit.trace` and `make_fx`, fake tensors, dispatch modes. To read the numbers
   there, as the ordinary way does, would fail, or write them into the trace as constants.
2. `torch.func` and forward mode get two functions of autograd over these, for an operator has no rule for tangents. The
   gradient is a function of its own because it is what must not be differentiated again: there, in backward and in
   forward mode, whoever tries is told. To hand out a constant would be wrong silently.
3. Under `vmap` all samples go through one call, with the batch as one more axis of rows. A mean or a sum has rows of
   its own for each sample, so the call is one of ``reduction="none"``; the sums are made here, and the factor that a
   mean is divided by is part of the rows' upstream gradients. Only class weights that differ from sample to sample
   are unknown to a call, and take one each.
4. What a mean divides by is found in float64. Where it is 0 the rows get the sample weight 0: skipped rows have a loss
   and a gradient of 0, whatever they hold.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from fastce import CrossEntropyLoss
from fastce._torch_arrays import HALVES, Tensors, loss_and_grad, loss_of
from fastce._torch_graph import is_batched, is_transformed, no_gradient, untraced

_VALUE_OF_NOTHING = {"nan": float("nan"), "zero": 0.0}

_TENSORS = ("input", "target", "weight", "sample_weight")
_OPTIONS = (
    "int axis, str reduction, int ignore_index, float label_smoothing, float logit_scale, float? softcap, "
    "float z_loss, str on_empty, int? n_threads"
)
_ARGUMENTS = f"Tensor input, Tensor target, Tensor? weight, Tensor? sample_weight, {_OPTIONS}"

ONCE = (
    "the gradient of fastce.torch.cross_entropy cannot be differentiated again: call backward or torch.autograd.grad "
    "without create_graph=True and torch.func.grad or jvp once, or use torch.nn.functional.cross_entropy"
)


class Options(NamedTuple):
    """The options of the operators, in the order of their schemas."""

    axis: int
    reduction: str
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    softcap: float | None
    z_loss: float
    on_empty: str
    n_threads: int | None

    def row_shape(self, input: torch.Tensor) -> tuple[int, ...]:  # noqa: A002
        """Return the shape of an index target."""
        return (*input.shape[: self.axis], *input.shape[self.axis + 1 :])

    def loss_shape(self, input: torch.Tensor) -> tuple[int, ...]:  # noqa: A002
        """Return the shape of the loss."""
        return self.row_shape(input) if self.reduction == "none" else ()


def _split(inputs: tuple[Any, ...]) -> tuple[Tensors, Options]:
    """Return an operator's tensors, and its options."""
    n_tensors = len(inputs) - len(Options._fields)
    return inputs[:n_tensors], Options(*inputs[n_tensors:])


def differentiable_loss(tensors: Tensors, dtype: torch.dtype, options: dict[str, Any]) -> torch.Tensor:
    """Return the loss, in the way that is not the ordinary one."""
    if torch.compiler.is_dynamo_compiling():
        if is_transformed():
            raise NotImplementedError(
                "fastce.torch.cross_entropy cannot be compiled within a transform of torch.func or in forward mode: "
                "call torch.compile without fullgraph=True, or on what is outside of the transform, or use "
                "torch.nn.functional.cross_entropy"
            )
    else:
        CrossEntropyLoss(**options)  # which checks them; while compiling, the operator's fake kernel does so
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            if torch.masked.is_masked_tensor(tensor):
                raise TypeError(
                    f"{name} must not be a masked tensor: fill it with {name}.to_tensor(0), and skip rows by "
                    f"ignore_index or a sample_weight of 0"
                )
    call = _apply_loss if is_transformed() else _loss_operator
    return call(*tensors, *_numbers(tensors[0], options)).to(dtype)


def gradient(grad_output: torch.Tensor, tensors: Tensors, options: dict[str, Any]) -> torch.Tensor:
    """Return the gradient, in the way that is not the ordinary one."""
    input, numbers = tensors[0], _numbers(tensors[0], options)  # noqa: A001
    if is_batched(grad_output):  # its numbers cannot be read
        factor = grad_output.unsqueeze(numbers.axis) if numbers.reduction == "none" else grad_output
        return _multiply_gradient(_gradient_operator, tensors, numbers, factor).to(input.dtype)
    return _apply_gradient(grad_output, *tensors, *numbers)


def _multiply_gradient(
    call: Callable[..., torch.Tensor], tensors: Tensors, options: Options, factor: torch.Tensor
) -> torch.Tensor:
    """Return the gradient times a factor, in the arithmetic's dtype: with 16 bits it would be rounded before that."""
    input, *others = tensors  # noqa: A001
    ones = torch.ones(options.loss_shape(input), dtype=_arithmetic(input), device=input.device)
    grad = call(ones, input.to(ones.dtype), *others, *options)
    # Where the gradient is 0, because a row is skipped or a logit -inf, what the factor is does not matter.
    return torch.where(grad == 0, 0, grad * factor)


def _numbers(input: torch.Tensor, options: dict[str, Any]) -> Options:  # noqa: A002
    """Return options as the operators' schemas want them."""
    kinds = {"ignore_index": int, "n_threads": int}
    numbers: dict[str, Any] = {
        name: x if x is None or isinstance(x, str) else kinds.get(name, float)(x) for name, x in options.items()
    }
    return Options(axis=max(0, min(input.ndim - 1, 1)), **numbers)


# The operators, which see numbers, or fake tensors that have a shape only.


@torch.library.custom_op("fastce::cross_entropy", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")  # type: ignore[untyped-decorator]
def _loss_operator(*inputs: Any) -> torch.Tensor:
    tensors, options = _split(inputs)
    return loss_of(tensors, _arithmetic(tensors[0]), options._asdict())


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "fastce::cross_entropy_grad", mutates_args=(), schema=f"(Tensor grad_output, {_ARGUMENTS}) -> Tensor"
)
def _gradient_operator(grad_output: torch.Tensor, *inputs: Any) -> torch.Tensor:
    tensors, options = _split(inputs)
    _, grad = loss_and_grad(tensors, _arithmetic(tensors[0]), options._asdict(), grad_output)
    return grad


@_loss_operator.register_fake  # type: ignore[untyped-decorator]
def _fake_loss(*inputs: Any) -> torch.Tensor:
    (input, *_), options = _split(inputs)  # noqa: A001
    CrossEntropyLoss(**options._asdict())  # which checks them while there is still a line of the caller's to blame
    return input.new_empty(options.loss_shape(input), dtype=_arithmetic(input))


@_gradient_operator.register_fake  # type: ignore[untyped-decorator]
def _fake_gradient(grad_output: torch.Tensor, input: torch.Tensor, *_: Any) -> torch.Tensor:  # noqa: A002
    return torch.empty_like(input)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save what the gradient is made of."""
    _check_leaves(ctx.needs_input_grad)
    tensors, ctx.options = _split(inputs)
    ctx.save_for_backward(*tensors)


def _check_leaves(have_derivatives: Iterable[bool]) -> None:
    """Refuse derivatives by anything but the input."""
    for name, has_derivative in zip(_TENSORS, have_derivatives, strict=False):
        if has_derivative and name != "input":
            raise NotImplementedError(no_gradient(name))


def _refuse(*_: Any) -> None:
    raise NotImplementedError(ONCE)


def _backward(call: Callable[..., torch.Tensor], ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
    grad = call(grad_output, *ctx.saved_tensors, *ctx.options)
    return (grad, *(None,) * (len(_TENSORS) - 1 + len(ctx.options)))


_loss_operator.register_autograd(functools.partial(_backward, _gradient_operator), setup_context=_keep_inputs)
_gradient_operator.register_autograd(_refuse)


# Their rules under `vmap`. `call` is what the rule is for, by which other transforms still see what it does.


def _map_loss(call: Callable[..., torch.Tensor], options: Options, tensors: Tensors) -> torch.Tensor:
    rows, tensors, total = _as_one_call(options, tensors)
    losses = call(*tensors, *rows)
    if options.reduction == "none":
        return losses
    loss = _sum_rows(losses.double())
    if total is not None:
        loss = torch.where(total == 0, _VALUE_OF_NOTHING[options.on_empty], loss / torch.where(total == 0, 1, total))
    return loss.to(losses.dtype)


def _map_gradient(call: Callable[..., torch.Tensor], options: Options, tensors: Tensors) -> torch.Tensor:
    grad_output = tensors[0]
    rows, others, total = _as_one_call(options, tensors[1:])
    if options.reduction != "none":
        grad_output = grad_output.double()
        if total is not None:
            grad_output = grad_output / torch.where(total == 0, 1, total)
        grad_output = _as_rows(grad_output, rows.row_shape(others[0]))
    return call(grad_output, *others, *rows)


def _map(rule: Callable[..., Any], call: Any, info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
    """Follow a rule where every tensor but the class weights has a first axis for the batch.

    If class weights have one too, call once for each sample.
    """
    tensors, options = _split(inputs)
    place = len(tensors) - len(_TENSORS) + _TENSORS.index("weight")
    if in_dims[place] is not None:
        results = [
            call(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return torch.stack(results), 0
    batched = [
        x if x is None or i == place else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for i, (x, dim) in enumerate(zip(tensors, in_dims, strict=False))
    ]
    return rule(call, options, tuple(batched)), 0


def _as_one_call(options: Options, tensors: Tensors) -> tuple[Options, Tensors, torch.Tensor | None]:
    """Return the options and tensors of one call for all samples; for a mean also what each divides by."""
    rows = options._replace(axis=options.axis + 1, reduction="none")
    if options.reduction != "mean":
        return rows, tensors, None
    total, sample_weight = _find_normalizer(tensors, rows)
    return rows, (*tensors[:-1], sample_weight), total


def _as_rows(values: torch.Tensor, row_shape: tuple[int, ...]) -> torch.Tensor:
    """Give every row the value of its sample."""
    return values.reshape(-1, *(1,) * (len(row_shape) - 1)).expand(row_shape)


def _sum_rows(values: torch.Tensor) -> torch.Tensor:
    """Add up what belongs to each sample."""
    return values.sum(tuple(range(1, values.ndim))) if values.ndim > 1 else values


def _find_normalizer(tensors: Tensors, options: Options) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what the mean of each sample divides by, and the sample weights, 0 where that is 0."""
    input, target, weight, sample_weight = tensors  # noqa: A001
    row_shape = options.row_shape(input)
    if sample_weight is None:
        factor = torch.ones((), dtype=torch.float64, device=input.device).expand(row_shape)
    elif sample_weight.shape == row_shape:
        factor = sample_weight.double()
    else:
        return torch.ones(input.shape[0]), sample_weight  # to be refused by the call, like all that does not fit
    weights = factor
    if not target.is_floating_point() and target.shape == row_shape:
        index = target.long()
        is_kept = index != options.ignore_index
        if weight is not None and weight.shape == input.shape[options.axis : options.axis + 1] and len(weight):
            weights = weights * weight.double()[torch.where(is_kept, index, 0).clamp(0, len(weight) - 1)]
        weights = weights * is_kept
    total = _sum_rows(weights)
    return total, torch.where(_as_rows(total, row_shape) == 0, 0, factor)


_loss_operator.register_vmap(functools.partial(_map, _map_loss, _loss_operator))
_gradient_operator.register_vmap(functools.partial(_map, _map_gradient, _gradient_operator))


# Their derivatives.


class _Loss(torch.autograd.Function):  # type: ignore[misc]
    """The loss, which can be differentiated once, in either mode."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _loss_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _keep_inputs(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # or every weight has a tangent of zeros
        ctx.save_for_forward(*inputs[: len(_TENSORS)])

    @staticmethod
    @untraced  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Any, ...]:
        return _backward(_Gradient.apply, ctx, grad_output)  # which is never None: there is one output

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> torch.Tensor:
        _check_leaves(tangent is not None for tangent in tangents)
        # The first is never None: no other may have one.
        product = _multiply_gradient(_Gradient.apply, ctx.saved_tensors, ctx.options, tangents[0])
        return product.sum(ctx.options.axis) if ctx.options.reduction == "none" else product.sum()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        return _map(_map_loss, _Loss.apply, info, in_dims, *inputs)


class _Gradient(torch.autograd.Function):  # type: ignore[misc]
    """The gradient, which cannot be differentiated again."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _gradient_operator(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    backward = jvp = staticmethod(_refuse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        return _map(_map_gradient, _Gradient.apply, info, in_dims, *inputs)


# Nothing of these functions is for `torch.compile`, which meets them where it has given up on the caller.
_apply_loss = untraced(lambda *inputs: _Loss.apply(*inputs))
_apply_gradient = untraced(lambda *inputs: _Gradient.apply(*inputs))


def _arithmetic(input: torch.Tensor) -> torch.dtype:  # noqa: A002
    """Return the dtype of losses before they are rounded to the input's."""
    return torch.float32 if input.dtype in HALVES else input.dtype
