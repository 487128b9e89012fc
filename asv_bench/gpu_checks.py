"""Is it right on this GPU? Random problems against the definition in float64, with poison in and around the outputs."""

import ml_dtypes
import numpy as np

import fastce
import fastce.cuda
from fastce import _cuda, _reference
from fastce._cuda._geometry import choose_geometry
from gpu_measure import reason_of
from gpu_peers import as_torch, bits_of, import_torch

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Sums of float32, and of float64, beyond the rounding of the result itself.
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}

OPTIONS = ("smoothing", "weights", "none", "probabilities")

# "margins": rows that are part of longer ones, so that they begin anywhere; "F": Fortran order.
SWEEP = [
    ((1, 1), "C"),
    ((3, 2), "C"),
    ((70_001, 3), "C"),
    ((1000, 10), "C"),
    ((1000, 10), "margins"),
    ((1000, 10), "F"),
    ((513, 17), "C"),
    ((300, 32), "C"),
    ((129, 33), "margins"),
    ((65, 100), "C"),
    ((33, 255), "margins"),
    ((77, 1000), "C"),
    ((50, 1023), "C"),
    ((9, 4097), "margins"),
    ((7, 32_000), "C"),
    ((3, 50_257), "C"),
    ((5, 128_256), "margins"),
    ((3, 256_000), "C"),
    ((2, 1_000_003), "C"),
    ((2, 21, 16, 17), "C"),
    ((2, 150, 8, 9), "C"),
    ((3, 40, 50), "F"),
]


def limits():
    """Return the limits of the present device, as the choice of a kernel wants them."""
    import cupy

    return _cuda._limits_of(cupy.cuda.Device())


def geometry_of(logits):
    """Return the geometry for loss and gradient in place."""
    import cupy

    rows = cupy.moveaxis(logits, 1, -1)
    n_classes = rows.shape[-1]
    return choose_geometry(
        rows.size // n_classes, n_classes, rows.itemsize, limits(), **_cuda._geometry_inputs(rows, rows)
    )


def place(x, layout="C"):
    """Return a copy on the GPU and the integers of the memory that it is part of, elsewhere -1, which is NaN."""
    import cupy

    before, after = (1, 2) if layout == "margins" else (0, 0)
    shape = *x.shape[:-1], before + x.shape[-1] + after
    whole = cupy.empty(shape, f"i{x.itemsize}", order="F" if layout == "F" else "C")
    whole.fill(-1)
    part = whole[..., before : before + x.shape[-1]]
    part[...] = cupy.asarray(np.ascontiguousarray(x).view(part.dtype))
    return part.view(x.dtype), whole


def poison(like, layout):
    """Return NaN everywhere."""
    return place(np.full(like.shape, -1, f"i{like.itemsize}").view(like.dtype), layout)


def move(value):
    """Return an array, or what else an option is, for the device."""
    return place(value)[0] if isinstance(value, np.ndarray) else value


def options_of(name, rng, shape, dtype):
    """Return keyword arguments."""
    if name == "smoothing":
        return {"label_smoothing": 0.1, "z_loss": 1e-4}
    if name == "weights":
        weight = (0.5 + rng.random(shape[1])).astype(np.float32)
        return {"weight": weight, "sample_weight": 0.5 + rng.random((shape[0], *shape[2:]))}
    if name == "none":
        return {"reduction": "none", "softcap": 30.0, "logit_scale": 0.5}
    if name == "probabilities":
        prob = rng.random(shape)
        return {"target": (prob / prob.sum(axis=1, keepdims=True)).astype(dtype)}
    return {}


def solve_repeatedly(x, layout, arguments):
    """Solve into poisoned memory, again, and in place; return loss and gradient, and whether all had the same bits."""
    on_gpu = {name: move(value) for name, value in arguments.items()}
    given, _ = place(x, layout)
    runs = []
    for in_place in (False, False, True):
        logits, whole = place(x, layout) if in_place else poison(x, layout)
        loss, grad = fastce.cross_entropy_with_grad(logits if in_place else given, out=logits, **on_gpu)
        runs.append((bits_of(loss).get(), bits_of(grad).get(), whole.get()))
    fastce.cuda.check_errors()
    loss, grad, whole = runs[0]
    margins = whole[..., :1], whole[..., 1 + x.shape[-1] :]
    is_clean = whole.shape == x.shape or all((margin == -1).all() for margin in margins)
    is_same = all(np.array_equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    return loss.view(np.float64 if loss.itemsize == 8 else np.float32), grad.view(x.dtype), is_same and is_clean


def check(rng, shape, dtype, layout="C", option="plain"):
    """Return the errors of loss and gradient, in units of 1 + loss and of 1 / n, and what is wrong, in words."""
    x = (3 * rng.standard_normal(shape)).astype(dtype)
    target = rng.integers(shape[1], size=(shape[0], *shape[2:]))
    target[rng.random(target.shape) < 0.1] = -100
    target.flat[0] = shape[1] - 1
    arguments = {"target": target, **options_of(option, rng, shape, dtype)}
    loss, grad, is_same = solve_repeatedly(x, layout, arguments)
    expected = _reference.cross_entropy(x, **arguments)
    scale = target.size if arguments.get("reduction", "mean") == "mean" else 1
    kind = ml_dtypes.finfo(dtype)
    rounding = np.abs(expected.grad) * float(kind.eps) / 2 + float(kind.smallest_subnormal)
    tolerance = TOLERANCES["float64" if dtype == "float64" else "float32"]
    loss_error = float((np.abs(loss - expected.loss) / (1 + np.abs(expected.loss))).max())
    grad_error = float((np.abs(grad.astype(np.float64) - expected.grad) - rounding).max(initial=0)) * scale
    is_right = {  # which NaN never is
        "OTHER BITS, or written beside": is_same,
        "LOSS WRONG": loss_error <= tolerance,
        "GRADIENT WRONG": grad_error <= tolerance,
    }
    return {"loss": loss_error, "grad": grad_error, "wrong": [words for words, right in is_right.items() if not right]}


def checked(say, name, *arguments):
    """Check, and return the figures; say at once what is wrong."""
    try:
        figures = check(*arguments)
    except Exception as error:  # say it, and go on
        figures = {"wrong": [reason_of(error)]}
    if figures["wrong"]:
        say(f"  {name}: {', '.join(figures['wrong'])} {figures}")
    return figures


def check_clusters(say, rng, n_rows):
    """Check rows that need clusters of each size; `n_rows` should be more than run at once."""
    figures = {}
    if not limits().has_clusters:
        say("  this device has no clusters")
        return figures
    for cluster in (2, 4, 8):
        for dtype in ("float32", "bfloat16"):
            n_classes = fewest_classes(n_rows, np.dtype(dtype).itemsize, cluster)
            name = f"cluster of {cluster}, {n_rows} x {n_classes} {dtype}"
            if n_classes:
                figures[name] = found = checked(say, name, rng, (n_rows, n_classes), dtype)
                say(f"  {name}: loss {found.get('loss', np.nan):.1e}, gradient {found.get('grad', np.nan):.1e}")
            else:
                say(f"  cluster of {cluster}, {dtype}: no number of classes asks for it")
    return figures


def fewest_classes(n_rows, itemsize, cluster):
    """Return an odd number of classes that is done by clusters of so many blocks, or 0."""
    layout = {"is_row_major": True, "is_dense": True, "is_aligned": False}
    for n_classes in range(10_007, 400_000, 5_000):
        if choose_geometry(n_rows, n_classes, itemsize, limits(), **layout).cluster == cluster:
            return n_classes
    return 0


def check_sweep(say, rng, dtypes):
    """Check every shape and type, plain and with one set of options in turn; say the larger error of the gradient."""
    figures = {}
    for i, (shape, layout) in enumerate(SWEEP):
        title, worst = f"{' x '.join(map(str, shape))} {layout}", []
        for j, dtype in enumerate(dtypes):
            for option in ("plain", OPTIONS[(i + j) % len(OPTIONS)]):
                name = f"{title} {dtype} {option}"
                figures[name] = checked(say, name, rng, shape, dtype, layout, option)
            worst.append(f"{dtype} {max(figures[name].get('grad', np.nan) for name in list(figures)[-2:]):.0e}")
        say(f"  {title}: {', '.join(worst)}")
    return figures


def check_bad_target(say):
    """Check what becomes of a class that does not exist."""
    x, y, bad = np.ones((40, 100), np.float32), np.arange(40), 7
    y[bad] = 100
    wrong = []
    loss, grad = fastce.cross_entropy_with_grad(move(x), move(y), reduction="none")
    loss, grad = loss.get(), grad.get()
    if np.flatnonzero(np.isnan(loss)).tolist() != [bad] or np.flatnonzero(~grad.any(axis=1)).tolist() != [bad]:
        wrong.append("LOSS OR GRADIENT WRONG")
    logits = move(x)
    for when, call in {
        "late": fastce.cuda.check_errors,
        "at once": lambda: fastce.cross_entropy_with_grad(logits, move(y), out=logits),
    }.items():
        try:
            with fastce.cuda.synchronous_checks():
                call()
            wrong.append(f"NOT TOLD {when}")
        except IndexError as error:
            if f"[{bad}]" not in str(error):
                wrong.append(f"told {when} as {error}")
    if not (logits.get() == x).all():
        wrong.append("WRITTEN in spite of the error")
    say(f"  a class that does not exist: {', '.join(wrong) or 'told, late and at once'}")
    return wrong


def check_torch(say, rng):
    """Check that tensors give the bits of arrays."""
    x = (3 * rng.standard_normal((64, 1000))).astype("bfloat16")
    y = rng.integers(1000, size=64)
    try:
        import_torch()
        tensor, target = as_torch(place(x)[0]), as_torch(move(y))
        loss, grad = fastce.cross_entropy_with_grad(tensor, target, out=tensor)
        own_loss, own_grad = fastce.cross_entropy_with_grad(move(x), move(y))
        is_same = (bits_of(grad) == bits_of(own_grad)).all() and loss == own_loss
        message = f"{'the same bits' if is_same else 'OTHER BITS'}, returned as {type(grad).__module__}'s"
    except Exception as error:
        message = reason_of(error)
    say(f"  tensors of PyTorch, bfloat16, in place: {message}")
    return message
