"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each primitive is a plain function on a block of rows, compiled once for every set of options and dtypes and then
called block after block. A block is small enough to stay in the processor's cache, so the matrix itself crosses
the memory bus once in and once out, however often the compiled loops walk over a block. Without a C++ compiler the
same blocks run uncompiled.
"""

import functools
import itertools
import types
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .ops import new_gradient, primitive
from .passes import Flags, Numbers, gradient_pass, lse_pass, sums_pass
from .reference import compute_dtype

# Bytes of logits, in the dtype of the arithmetic, in one block of rows. 4 MiB was best or within 5 % of the best of
# 1, 2, 4 and 8 at K = 1000, 32768 and 262144 (fp32, 2 cores).
BLOCK_BYTES = 4 * 2**20

NO_COMPILER = (
    "sre_triton found no usable C++ compiler ({}), so the loss runs uncompiled, several times slower. "
    "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install; "
    "Windows: the Visual Studio build tools), or set CXX to a compiler."
)
NO_TRITON = "sre_triton runs uncompiled, several times slower, as torch.compile cannot serve this GPU: {}"


@functools.cache
def _compiled(function: Callable, flags: Flags, *key) -> Callable:
    """The compiled function, one for each key.

    ``torch.compile`` keeps what it compiled, and counts it against its limit of recompilations, by code object. Each
    key gets a code object of its own, so that no set of options pushes another one out.
    """

    def body(*args):
        return function(*args, flags)

    code = body.__code__.replace(co_name=function.__name__)
    return torch.compile(types.FunctionType(code, globals(), closure=body.__closure__), dynamic=True, fullgraph=True)


_has_compiler = True


def _call(function: Callable, flags: Flags, logits: Tensor, *args):
    """One pass over one block of rows, compiled where there is a compiler."""
    global _has_compiler
    if _has_compiler and logits.numel():
        num_rows, num_classes = logits.shape
        device = logits.device.type
        key = (
            *(arg if arg is None else (arg.dtype, arg.dim()) for arg in (logits, *args[:-1])),
            # What torch.compile compiles again for as well: shapes and modes.
            (num_rows == 1, num_classes == 1, num_classes < 12),
            (torch.is_inference_mode_enabled(), logits.is_inference()),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.are_deterministic_algorithms_enabled(),
        )
        try:
            return _compiled(function, flags, device, *key)(logits, *args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            missing = (torch._inductor.exc.InvalidCxxCompiler, torch._inductor.exc.CppCompileError)
            if not isinstance(error.inner_exception, missing):
                raise
            _has_compiler = False
            warnings.warn(NO_COMPILER.format(type(error.inner_exception).__name__), RuntimeWarning, stacklevel=2)
        except torch._dynamo.exc.ShortenTraceback as error:
            # What Inductor needs on a GPU, and is not there or does not serve this one.
            if type(error).__name__ not in ("TritonMissing", "GPUTooOldForTriton"):
                raise
            _has_compiler = False
            warnings.warn(NO_TRITON.format(error), RuntimeWarning, stacklevel=2)
    return function(logits, *args, flags)


def _by_blocks(logits: Tensor, compute: Callable, *, scratch: bool) -> list[Tensor]:
    """``compute(rows, z, e)`` for each block of rows, z its logits, e scratch; puts together what it returns."""
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    # At least two rows a block: a dimension of one is a compilation of its own.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    logits = logits.detach()
    e = logits.new_empty(-(-num_rows // num_blocks), num_classes, dtype=dtype) if scratch else None
    with torch.no_grad():
        parts = [
            compute(slice(start, stop), logits[start:stop].contiguous(), e[: stop - start] if scratch else None)
            for start, stop in itertools.pairwise(bounds)
        ]
        return list(parts[0]) if num_blocks == 1 else [torch.cat(numbers, -1) for numbers in zip(*parts, strict=True)]


def _gradient(logits, gradient, rows, z, target, weight, stats, scale, e, numbers: Numbers, flags: Flags) -> None:
    """One block of the gradient, which may be the logits."""
    inplace = gradient is logits
    out = None if inplace else gradient[rows]
    at_target = _call(gradient_pass, flags, z, target, weight, stats, scale, e, out, numbers)
    out = z if inplace else out
    if at_target is not None:
        index = torch.where((target >= 0) & (target < out.shape[1]), target, 0)
        out.scatter_(1, index.unsqueeze(1), at_target.unsqueeze(1).to(out.dtype))
    if inplace and not logits.is_contiguous():
        logits[rows].copy_(z)


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, ops.OPTIONS.


def _prepared(logits, target, weight, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap):
    """Target and weight in the dtypes of the arithmetic, and the options as the passes take them."""
    dtype = compute_dtype(logits.dtype)
    numbers = Numbers(
        c.to(dtype),
        c.double().log().to(dtype),
        reg_weight.to(dtype),
        torch.tensor(ignore_index, device="cpu"),
        torch.tensor(label_smoothing, dtype=dtype, device="cpu"),
        torch.tensor(z_loss, dtype=dtype, device="cpu"),
        torch.tensor(softcap, dtype=dtype, device="cpu"),
    )
    flags = Flags(smoothing=label_smoothing > 0, softcap=softcap > 0)
    target = target.contiguous() if target.dim() == 2 else target.long()
    return target, None if weight is None else weight.to(dtype), numbers, flags


def _fill_gradient(gradient, logits, target, weight, stats, scale, *options) -> None:
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)
    scale = scale.contiguous()

    def compute(rows, z, e):
        block_stats = stats[:, rows].contiguous()
        _gradient(logits, gradient, rows, z, target[rows], weight, block_stats, scale[rows], None, numbers, flags)
        return ()

    _by_blocks(logits, compute, scratch=False)


def _losses_and_fill_gradient(gradient, logits, target, weight, scale, *options) -> Tensor:
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)
    scale = scale.contiguous()

    def compute(rows, z, e):
        lse = _call(lse_pass, flags, z, target[rows], weight, e, numbers)
        sums, losses = _call(sums_pass, flags, z, target[rows], lse, e, numbers)
        stats = torch.cat([lse, sums])
        _gradient(logits, gradient, rows, z, target[rows], weight, stats, scale[rows], e, numbers, flags)
        return (losses,)

    return _by_blocks(logits, compute, scratch=True)[0]


@primitive("compile")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)

    def compute(rows, z, e):
        return (_call(lse_pass, flags, z, target[rows], weight, e, numbers),)

    return _by_blocks(logits, compute, scratch=True)[0]


@primitive("compile")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, *options) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    target, _, numbers, flags = _prepared(logits, target, None, *options)

    def compute(rows, z, e):
        return _call(sums_pass, flags, z, target[rows], stats[:, rows].contiguous(), None, numbers)[:1]

    return _by_blocks(logits, compute, scratch=False)[0]


@primitive("compile")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)

    def compute(rows, z, e):
        lse = _call(lse_pass, flags, z, target[rows], weight, e, numbers)
        sums, losses = _call(sums_pass, flags, z, target[rows], lse, e, numbers)
        return losses, torch.cat([lse, sums])

    losses, stats = _by_blocks(logits, compute, scratch=True)
    return losses, stats


@primitive("compile")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, *options
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    gradient = new_gradient(logits)
    _fill_gradient(gradient, logits, target, weight, stats, scale, *options)
    return gradient


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    gradient = new_gradient(logits)
    return _losses_and_fill_gradient(gradient, logits, target, weight, scale, *options), gradient


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    _fill_gradient(logits, logits, target, weight, stats, scale, *options)
    return logits.detach()


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    losses = _losses_and_fill_gradient(logits, logits, target, weight, scale, *options)
    return losses, logits.detach()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
