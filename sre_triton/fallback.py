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

import functools
import inspect
import itertools
import logging
import operator
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

STAND_IN_ROWS = 96  # of the shape that is compiled for; not a number of classes there

logger = logging.getLogger("sre_triton")

_lock = threading.Lock()
_compiled: dict[tuple, Callable] = {}
_uncompiled: set[str] = set()  # types of devices that nothing can be compiled for


INDUCTOR = {
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
        return Numbers(*items) if name == "numbers" else tuple(items)
    if arg is None:
        return None
    return arg.new_zeros((num_classes,) if name == "weight" else (STAND_IN_ROWS, num_classes)[: arg.dim()])


def _flat(args: tuple) -> list:
    """The arguments of a pass, tuples taken apart, and the numbers of rows and classes."""
    flat = []
    for arg in args:
        if isinstance(arg, tuple):
            flat.extend(arg)
        else:
            flat.append(arg)
    flat.extend(args[0].shape)
    return flat


def _compile(function: Callable, args: tuple) -> Callable | None:
    """What Inductor makes of the function, to be called with `_flat` arguments; None where that cannot be.

    torch.compile is asked once. At each call after that it would take 35 us to check what the key says and to arrange
    the arguments, a third of what 256 rows of 1000 classes take on two cores; so Inductor's own result is called, with
    the arguments in the order in which it was seen to get them.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    logits = args[0]
    what = f"{function.__name__} for {str(logits.dtype).removeprefix('torch.')} logits on {logits.device}"
    num_classes = SHORT // 2 if logits.shape[1] <= SHORT else 2 * SHORT
    names = inspect.signature(function).parameters
    stand_ins = tuple(_stand_in(name, arg, num_classes) for name, arg in zip(names, args, strict=True))
    flat = _flat(stand_ins)
    compiled, order = None, []
    started = None

    def compile_inner(*args, **kwargs):
        nonlocal compiled
        compiled = compile_fx_inner(*args, **kwargs)
        return compiled

    def backend(graph, inputs):
        nonlocal started
        if started is None:  # Dynamo starts again where numbers turn out to be constant
            started = time.perf_counter()
            logger.warning("compiling %s, once for each set of options: 2 to 15 seconds, unless Inductor has it cached", what)
        # The cache of AOTAutograd would return all it makes around Inductor's result; Inductor has its own.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            whole = compile_fx(graph, inputs, compile_inner, dict(INDUCTOR))
        logger.info("compiled %s in %.1f s", what, time.perf_counter() - started)

        def note_order(*inputs):
            for given in inputs:
                same = (x == given if isinstance(given, int) and isinstance(x, int) else x is given for x in flat)
                order.append(list(same).index(True))
            return whole(*inputs)

        return note_order

    # Dynamo keeps what it compiled by code object: each key has its own.
    code = function.__code__.replace(co_name=f"{function.__name__}_{len(_compiled)}")
    try:
        clone = types.FunctionType(code, function.__globals__)
        torch.compile(clone, backend=backend, dynamic=True, fullgraph=True)(*stand_ins)
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
        if compiled is None:  # torch.compile is switched off
            return None
        pick = operator.itemgetter(*order)
        return lambda flat: compiled(list(pick(flat)))
    _uncompiled.add(logits.device.type)
    warnings.warn(warning, RuntimeWarning, stacklevel=2)
    return None


def _compiles(logits: Tensor) -> bool:
    """One row and fewer than eight classes are shapes that would each be compiled anew."""
    return logits.shape[0] > 1 and logits.shape[1] >= 8 and logits.device.type not in _uncompiled


def _call(function: Callable, *args):
    """One pass over some rows, compiled where it can be."""
    logits = args[0]
    if not _compiles(logits):
        return function(*args)
    flat = _flat(args)
    where = logits.device, args[-1].reg_weight.is_cpu
    dtypes = (arg if arg is None else arg.dtype for arg in flat[:-2])
    key = function, logits.shape[1] > SHORT, *where, *dtypes
    compiled = _compiled.get(key)
    if compiled is None:
        with _lock:
            compiled = _compiled.get(key) or _compile(function, args)
            if compiled is None:
                return function(*args)
            _compiled[key] = compiled
    return compiled(flat)


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, ops.OPTIONS.


@functools.lru_cache(maxsize=64)
def _number(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


@functools.lru_cache(maxsize=64)
def _numbers(dtype, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap) -> Numbers:
    """The options as the passes take them."""
    others = (_number(value, dtype) if value > 0 else None for value in (label_smoothing, z_loss, softcap))
    first = _number(c, torch.float64), _number(reg_weight, torch.float64), _number(ignore_index, torch.int64)
    return Numbers(*first, *others)


def _numbers_and_tensors(dtype, c: float | Tensor, reg_weight: float | Tensor, *others) -> Numbers:
    """The same where c and λ' may be tensors."""
    if not isinstance(reg_weight, Tensor):
        return _numbers(dtype, c, reg_weight, *others)
    c = c if isinstance(c, Tensor) else _number(c, torch.float64)
    reg_weight = reg_weight.double() if reg_weight.device.type == "cpu" else reg_weight
    return _numbers(dtype, 1.0, 1.0, *others)._replace(c=c, reg_weight=reg_weight)


def _run(
    function: Callable, logits: Tensor, target, weight, stats, scale, options, count: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A pass over all rows: the first ``count`` numbers of each, (count, N), and the gradient, in ``out`` if given."""
    logits = logits.detach()
    dtype = compute_dtype(logits.dtype)
    if target.dim() == 2:
        target = target.to(dtype)
    target = target.contiguous()
    weight = None if weight is None else weight.to(dtype).contiguous()
    stats = None if stats is None else stats.contiguous()
    scale = None if scale is None else scale.contiguous()
    numbers = _numbers_and_tensors(dtype, *options)
    if logits.dtype == dtype and logits.is_contiguous() and _compiles(logits) and numbers.softcap is None:
        stats = None if stats is None else stats.unbind()
        outputs = _call(function, logits, target, weight, stats, scale, out, numbers)
        packed, gradient = outputs[-1], outputs[-2] if out is None and scale is not None else out
    else:
        if scale is not None and out is None:
            out = new_gradient(logits)
        packed, gradient = _blocks(function, logits, target, weight, stats, scale, out, numbers), out
    if out is not None and target.dim() == 1 and out.numel() > 0:
        # Where the target is none of the classes, the row is NaN or 0 anyway.
        index = torch.arange(out.shape[0], device=out.device), target.clamp(0, out.shape[1] - 1)
        out.index_put_(index, packed[:, count].to(out.dtype))
    if out is not None:  # compiled code writes behind autograd's back
        torch.autograd.graph.increment_version(out)
    return packed.t()[:count], gradient


def _blocks(
    function: Callable,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    numbers: Numbers,
) -> Tensor:
    """The same, a block of rows at a time, with the numbers of a row as the pass returns them.

    Half precision and rows that do not lie one after another are copied into z, and so is everything that leaves
    matrices as large as the logits in between, which so stay in the cache: softcap, and what is not compiled. The
    gradient may be written over z: each element of it is the last that is computed from its logit.
    """
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    # At least two rows a block: one row is not compiled.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    scratch = logits.new_empty(-(-num_rows // num_blocks), num_classes, dtype=dtype)
    packed = []
    for start, stop in itertools.pairwise(bounds):
        rows, z = slice(start, stop), scratch[: stop - start]
        z.copy_(logits[rows])
        into = z if out is None or not out.is_contiguous() else out[rows]
        of_rows = None if stats is None else stats[:, rows].unbind(), None if scale is None else scale[rows]
        packed.append(_call(function, z, target[rows], weight, *of_rows, into, numbers)[-1])
        if out is not None and into is z:
            out[rows] = z
    return torch.cat(packed)


@primitive("compile")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    return _run(lse_pass, logits, target, weight, None, None, options, NUM_LSE)[0]


@primitive("compile")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, *options) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    return _run(sums_pass, logits, target, None, stats, None, options, NUM_SUMS)[0]


@primitive("compile")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    numbers, _ = _run(loss_pass, logits, target, weight, None, None, options, NUM_LOSSES + NUM_STATS)
    return numbers[:NUM_LOSSES], numbers[NUM_LOSSES:].clone()


@primitive("compile")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, *options
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    return _run(gradient_pass, logits, target, weight, stats, scale, options, 0)[1]


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    return _run(loss_and_gradient_pass, logits, target, weight, None, scale, options, NUM_LOSSES)


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(gradient_pass, logits, target, weight, stats, scale, options, 0, logits)[1]


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(loss_and_gradient_pass, logits, target, weight, None, scale, options, NUM_LOSSES, logits)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
