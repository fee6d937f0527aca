"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each primitive is a plain function of rows of logits, compiled once for every set of options and dtypes, into one loop
over the rows (passes.py says how): a row comes from memory once, is found in the cache whenever it is walked over
again, and its gradient goes to memory once. What is compiled holds for any number of rows and classes; only to rows of
more than 1024 classes belongs another version, whose sums are in float64. Without a C++ compiler the same functions run
uncompiled, on blocks of rows.

The first call of each version compiles it, for some seconds, and the logger "sre_triton" says so. Inductor keeps what
it compiled where it always does, in TORCHINDUCTOR_CACHE_DIR.

A GPU without Triton runs the blocks uncompiled; on Apple's MPS and Intel's XPU ``torch.compile`` is asked as on a CPU.
None of these three has been run: there was no such machine.
"""

import inspect
import itertools
import logging
import threading
import time
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .ops import NUM_LOSSES, NUM_LSE, NUM_STATS, NUM_SUMS, new_gradient, primitive
from .passes import SHORT, Numbers, gradient_pass, loss_and_gradient_pass, loss_pass, lse_pass, sums_pass
from .reference import compute_dtype

# Bytes in one block of rows, in the dtype of the arithmetic, where there are blocks: half precision is copied into one.
# Steps on blocks of 2 MiB took 1.05 times as long, of 1 MiB 1.2 times (bf16, K from 1000 to 262144, 2 cores).
BLOCK_BYTES = 4 * 2**20

NO_COMPILER = (
    "sre_triton found no usable C++ compiler ({}), so the loss runs uncompiled, several times slower. "
    "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install; "
    "Windows: the Visual Studio build tools), or set CXX to a compiler."
)
NO_TRITON = "sre_triton runs uncompiled, several times slower, as torch.compile cannot serve this GPU: {}"

logger = logging.getLogger("sre_triton")

_lock = threading.Lock()
_compiled: dict[tuple, Callable] = {}
_uncompiled: set[str] = set()  # types of devices that nothing can be compiled for


def _of_shapes(guards: list) -> list[bool]:
    """Which of its guards Dynamo is to check at each call.

    Dtypes and devices are in the key of what is compiled, strides are checked by the compiled code, and none of the
    modes that Dynamo would compile again for (number of threads, autocast, determinism, inference) changes this code.
    """
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


INDUCTOR = {
    "guard_filter_fn": _of_shapes,
    # Fused multiplication and addition.
    "cpp.enable_floating_point_contract_flag": "fast",
    # What several loops use is stored if it is made of more than five tensors: u, but not the gradient.
    "realize_reads_threshold": 5,
    # As many threads as there are at each call, not as there were, nor as the first call's size was worth.
    "cpp.dynamic_threads": True,
}


def _stand_in(name: str, arg, num_classes: int):
    """Zeros of the dtype and number of dimensions of an argument: what is compiled depends on no shape that came."""
    if isinstance(arg, tuple):
        items = [_stand_in(name, item, num_classes) for item in arg]
        return type(arg)(*items) if hasattr(arg, "_fields") else tuple(items)
    if arg is None:
        return None
    return arg.new_zeros((num_classes,) if name == "weight" else (96, num_classes)[: arg.dim()])


def _compile(function: Callable, args: tuple) -> Callable:
    """The function compiled, or where that cannot be, the function."""
    logits = args[0]
    what = f"{function.__name__} for {str(logits.dtype).removeprefix('torch.')} logits on {logits.device}"
    logger.warning("compiling %s, once for each set of options: 2 to 15 seconds, unless Inductor has it cached", what)
    # torch.compile keeps what it compiled, and counts it against its limit, by code object: each key has its own. (It
    # takes entries out of the options.)
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    clone = types.FunctionType(code, function.__globals__)
    compiled = torch.compile(clone, dynamic=True, fullgraph=True, options=dict(INDUCTOR))
    names = inspect.signature(function).parameters
    start = time.perf_counter()
    try:
        num_classes = SHORT // 2 if logits.shape[1] <= SHORT else 2 * SHORT
        compiled(*(_stand_in(name, arg, num_classes) for name, arg in zip(names, args, strict=True)))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        missing = (torch._inductor.exc.InvalidCxxCompiler, torch._inductor.exc.CppCompileError)
        if not isinstance(error.inner_exception, missing):
            raise
        warning = NO_COMPILER.format(type(error.inner_exception).__name__)
    except torch._dynamo.exc.ShortenTraceback as error:
        # What Inductor needs on a GPU, and is not there or does not serve this one.
        if type(error).__name__ not in ("TritonMissing", "GPUTooOldForTriton"):
            raise
        warning = NO_TRITON.format(error)
    else:
        logger.info("compiled %s in %.1f s", what, time.perf_counter() - start)
        return compiled
    _uncompiled.add(logits.device.type)
    warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return function


def _key(arg) -> object:
    if isinstance(arg, tuple):
        return tuple(map(_key, arg))
    return arg if arg is None else (arg.dtype, arg.dim(), arg.device)


def _compiles(logits: Tensor) -> bool:
    """One row and fewer than eight classes are shapes that would each be compiled anew."""
    return logits.shape[0] > 1 and logits.shape[1] >= 8 and logits.device.type not in _uncompiled


def _call(function: Callable, logits: Tensor, *args):
    """One pass over some rows, compiled where it can be."""
    if not _compiles(logits):
        return function(logits, *args)
    key = (function.__name__, logits.shape[1] > SHORT, _key(logits), *map(_key, args))
    compiled = _compiled.get(key)
    if compiled is None:
        with _lock:
            compiled = _compiled.get(key)
            if compiled is None:
                compiled = _compiled[key] = _compile(function, (logits, *args))
    return compiled(logits, *args)


@torch.no_grad()
def _rows(logits: Tensor, gradient: Tensor | None, numbers: Numbers, count: int, compute: Callable) -> Tensor:
    """The first ``count`` numbers of each row, (count, N), from ``compute(rows, z, out)``.

    Half precision and rows that do not lie one after another are copied into z, block by block, and so is everything
    that leaves matrices as large as the logits in between, which so stay in the cache: softcap, and what is not
    compiled. The gradient may be written over z: each element of it is the last that is computed from its logit.
    """
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    if logits.dtype == dtype and logits.is_contiguous() and _compiles(logits) and numbers.softcap is None:
        rows = slice(0, num_rows)
        return compute(rows, logits, gradient)[:, :count].t().contiguous()
    # At least two rows a block: one row is not compiled.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    scratch = logits.new_empty(-(-num_rows // num_blocks), num_classes, dtype=dtype)
    results = logits.new_empty(count, num_rows, dtype=dtype)
    for start, stop in itertools.pairwise(bounds):
        rows, z = slice(start, stop), scratch[: stop - start]
        z.copy_(logits[rows])
        out = z if gradient is None or not gradient.is_contiguous() else gradient[rows]
        results[:, rows] = compute(rows, z, out)[:, :count].t()
        if gradient is not None and out is z:
            gradient[rows] = z
    return results


def _fill(gradient: Tensor, logits: Tensor, target: Tensor, numbers: Numbers, count: int, compute: Callable) -> Tensor:
    """The same with a gradient: of each row, ``count`` numbers are returned, and the next is that of the target."""
    gradient = gradient.detach()
    results = _rows(logits.detach(), gradient, numbers, count + 1, compute)
    num_rows, num_classes = gradient.shape
    if target.dim() == 1 and num_classes > 0:
        # Where the target is none of the classes, the row is NaN or 0 anyway.
        index = torch.arange(num_rows, device=target.device), target.clamp(0, num_classes - 1)
        gradient.index_put_(index, results[count].to(gradient.dtype))
    return results[:count]


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, ops.OPTIONS.


def _prepared(logits, target, weight, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap):
    """Target and weight in the dtypes of the arithmetic, and the options as the passes take them."""
    dtype = compute_dtype(logits.dtype)

    def number(value):
        return torch.tensor(value, dtype=dtype, device="cpu") if value > 0 else None

    numbers = Numbers(
        c,
        reg_weight.double() if reg_weight.device.type == "cpu" else reg_weight,
        torch.tensor(ignore_index, device="cpu"),
        number(label_smoothing),
        number(z_loss),
        number(softcap),
    )
    target = target.to(dtype if target.dim() == 2 else torch.int64).contiguous()
    return target, None if weight is None else weight.to(dtype).contiguous(), numbers


@primitive("compile")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    target, weight, numbers = _prepared(logits, target, weight, *options)
    return _rows(logits, None, numbers, NUM_LSE, lambda rows, z, _: _call(lse_pass, z, target[rows], weight, numbers))


@primitive("compile")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, *options) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    target, _, numbers = _prepared(logits, target, None, *options)
    stats = stats.contiguous()

    def compute(rows, z, _):
        return _call(sums_pass, z, target[rows], stats[:, rows].unbind(), numbers)[1]

    return _rows(logits, None, numbers, NUM_SUMS, compute)


@primitive("compile")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    target, weight, numbers = _prepared(logits, target, weight, *options)

    def compute(rows, z, _):
        return _call(loss_pass, z, target[rows], weight, numbers)[1]

    losses = _rows(logits, None, numbers, NUM_LOSSES + NUM_STATS, compute)
    return losses[:NUM_LOSSES], losses[NUM_LOSSES:].clone()


def _row_gradient(gradient, logits, target, weight, stats, scale, *options) -> None:
    target, weight, numbers = _prepared(logits, target, weight, *options)
    stats, scale = stats.contiguous(), scale.contiguous()

    def compute(rows, z, out):
        return _call(gradient_pass, z, target[rows], weight, stats[:, rows].unbind(), scale[rows], out, numbers)

    _fill(gradient, logits, target, numbers, 0, compute)


def _row_loss_and_gradient(gradient, logits, target, weight, scale, *options) -> Tensor:
    target, weight, numbers = _prepared(logits, target, weight, *options)
    scale = scale.contiguous()

    def compute(rows, z, out):
        return _call(loss_and_gradient_pass, z, target[rows], weight, scale[rows], out, numbers)[1]

    return _fill(gradient, logits, target, numbers, NUM_LOSSES, compute)


@primitive("compile")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, *options
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    gradient = new_gradient(logits)
    _row_gradient(gradient, logits, target, weight, stats, scale, *options)
    return gradient


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    gradient = new_gradient(logits)
    return _row_loss_and_gradient(gradient, logits, target, weight, scale, *options), gradient


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    _row_gradient(logits, logits, target, weight, stats, scale, *options)
    return logits.detach()


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    losses = _row_loss_and_gradient(logits, logits, target, weight, scale, *options)
    return losses, logits.detach()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
