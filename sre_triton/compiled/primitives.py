"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each is a pass over the rows, compiled to one loop (columns.py says how). A row comes from memory once, lies in the
cache whenever it is walked over again, and its gradient goes to memory once. Where it does not pay to compile, or
nothing can be compiled (inductor.py says where), uncompiled.py does the same.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..primitives import NUM_LOSSES, NUM_LSE, NUM_STATS, NUM_SUMS, RowOptions, new_gradient, primitive
from ..reference import compute_dtype
from . import uncompiled
from .columns import SHORT
from .inductor import FEWEST, compiled_pass, key_of, kind_of, stays_uncompiled, version_of
from .passes import Scalars, gradient_pass, local_class, loss_and_gradient_pass, loss_pass, lse_pass, sums_pass

# Bytes in one block of rows, in the dtype of the arithmetic, where there are blocks.
# Measured for K from 1000 to 262144 (bf16, 2 cores, AVX-512): steps on blocks of 2 MiB took 1.05 times as long, on
# blocks of 1 MiB 1.2 times.
BLOCK_BYTES = 4 * 2**20


@functools.lru_cache(maxsize=64)
def _tensor_of(value: float, dtype: torch.dtype) -> Tensor:
    """The number as a tensor, (), on the CPU; the same tensor for the same number."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")


def _as_tensor(value: float | Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A scalar option as a tensor, (), of the dtype; one on a GPU as it is, since a conversion would be a launch."""
    if isinstance(value, Tensor):
        return value if value.dtype == dtype or value.device.type != "cpu" else value.to(dtype)
    return None if value is None else _tensor_of(value, dtype)


def _made(dtype: torch.dtype, options: RowOptions) -> Scalars:
    """The options as tensors: c and λ' in float64, the indices in int64, the others in ``dtype``."""
    first = _as_tensor(options.c, torch.float64), _as_tensor(options.reg_weight, torch.float64)
    others = (_as_tensor(option, dtype) for option in (options.label_smoothing, options.z_loss, options.softcap))
    made = *first, _tensor_of(options.ignore_index, torch.int64), *others
    if options.all_classes is None:
        return Scalars(*made)
    return Scalars(*made, _tensor_of(options.first_class, torch.int64), _tensor_of(options.all_classes, torch.int64))


class Known(NamedTuple):
    """The options as the passes take them, and what is known of them before there are rows."""

    scalars: Scalars
    kind: tuple[bool, ...]
    numbers: uncompiled.Numbers | None  # made where they are needed, of options that are tensors


@functools.lru_cache(maxsize=64)
def _known_of_numbers(dtype: torch.dtype, options: RowOptions) -> Known:
    """Kept for options that are numbers."""
    with torch.inference_mode(False):
        scalars = _made(dtype, options)
        return Known(scalars, kind_of(scalars), uncompiled.numbers_of(scalars, dtype))


def known_of(dtype: torch.dtype, options: RowOptions) -> Known:
    """Of any options."""
    if isinstance(options.c, Tensor) or isinstance(options.reg_weight, Tensor):
        scalars = _made(dtype, options)
        return Known(scalars, kind_of(scalars), None)
    return _known_of_numbers(dtype, options)  # then the others are none either


def scalars_of(dtype: torch.dtype, options: RowOptions) -> Scalars:
    """The options as the passes take them."""
    return known_of(dtype, options).scalars


class Pass(NamedTuple):
    """A pass, compiled and uncompiled, and how many values it has of each row."""

    compiled: Callable
    uncompiled: uncompiled.Pass
    count: int


LSE = Pass(lse_pass, uncompiled.lse, NUM_LSE)
SUMS = Pass(sums_pass, uncompiled.sums, NUM_SUMS)
LOSS = Pass(loss_pass, uncompiled.loss, NUM_LOSSES + NUM_STATS)
GRADIENT = Pass(gradient_pass, uncompiled.gradient, 0)
LOSS_AND_GRADIENT = Pass(loss_and_gradient_pass, uncompiled.loss_and_gradient, NUM_LOSSES)


def _run(
    which: Pass, logits: Tensor, target, weight, stats, scale, options: RowOptions, out: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """A pass over all rows: the values of each, (count, N), and the gradient, in ``out`` if given."""
    if torch.is_grad_enabled():
        logits = logits.detach()
    dtype = compute_dtype(logits.dtype)
    if logits.shape[1] == 0:  # a shard without classes
        return logits.new_zeros(which.count, logits.shape[0], dtype=dtype), new_gradient(logits)
    if target.dim() == 2:
        target = target.to(dtype)
    target = target.contiguous()
    weight = None if weight is None else weight.to(dtype).contiguous()
    stats = None if stats is None else stats.contiguous()
    scale = None if scale is None else scale.contiguous()
    scalars, kind, numbers = known_of(dtype, options)
    how = kind, logits.numel(), options.compile_now
    packed, complete = None, ()
    if logits.is_contiguous() and scalars.softcap is None:
        args = logits, target, weight, None if stats is None else stats.unbind(), scale, out, scalars
        compiled = compiled_pass(which.compiled, args, *how)
        if compiled is not None:
            packed, *complete = compiled(args)
    else:
        if scale is not None and out is None:
            out = new_gradient(logits)
        packed = _blocks(which.compiled, how, logits, target, weight, stats, scale, out, scalars)
    if packed is None:
        numbers = numbers or uncompiled.numbers_of(scalars, dtype)
        return uncompiled.run(which.uncompiled, logits, target, weight, stats, scale, out, scalars, numbers)
    found = packed.t()[: which.count]
    if out is None:
        return found, None if scale is None else complete[0]
    if target.dim() == 1 and out.numel() > 0:
        # Where the target is none of the classes, the row is NaN or 0 anyway; where it is another shard's, what is
        # written is the gradient of class 0.
        index = target.clamp(0, out.shape[1] - 1)
        if scalars.all_classes is not None:
            index, _ = local_class(target, out.shape[1], scalars.first_class)
        at_target = packed[:, which.count].to(out.dtype)
        out.index_put_((torch.arange(out.shape[0], device=out.device), index), at_target)
    torch.autograd.graph.increment_version(out)  # compiled code writes behind autograd's back
    return found, out


def _blocks(
    function: Callable,
    how: tuple,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    scalars: Scalars,
) -> Tensor | None:
    """The same, compiled, a block of rows at a time: the values of all rows, packed as the pass returns them.

    Rows that do not lie one after another are copied into z, and so are those with a softcap, which leaves matrices as
    large as the logits in between, that so stay in the cache. The gradient may be written over z: each element of it is
    the last that is computed from its logit. None where nothing is compiled.
    """
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    # At least two rows a block: one row is not compiled.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    scratch = logits.new_empty(-(-num_rows // num_blocks), num_classes, dtype=dtype)
    packed, compiled = [], None
    for start, stop in itertools.pairwise(bounds):
        rows, z = slice(start, stop), scratch[: stop - start]
        into = z if out is None or not out.is_contiguous() else out[rows]
        of_rows = (
            None if stats is None else stats[:, rows].unbind(),
            scale if scale is None or scale.dim() == 0 else scale[rows],
        )
        args = z, target[rows], weight, *of_rows, into, scalars
        compiled = compiled or compiled_pass(function, args, *how)
        if compiled is None:
            return None
        z.copy_(logits[rows])
        packed.append(compiled(args)[0])
        if out is not None and into is z:
            out[rows] = z
    return torch.cat(packed)


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, primitives.OPTIONS.


@primitive("compile")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    return _run(LSE, logits, target, weight, None, None, options)[0]


@primitive("compile")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, options: RowOptions) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    return _run(SUMS, logits, target, None, stats, None, options)[0]


@primitive("compile")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    found, _ = _run(LOSS, logits, target, weight, None, None, options)
    return found[:NUM_LOSSES], found[NUM_LOSSES:].clone()


@primitive("compile")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, options: RowOptions
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    return _run(GRADIENT, logits, target, weight, stats, scale, options)[1]


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    return _run(LOSS_AND_GRADIENT, logits, target, weight, None, scale, options)


def single_pass(dtype: torch.dtype, device: torch.device, num_classes: int, options: RowOptions) -> Callable:
    """:func:`row_loss_and_gradient` for ordinary calls (arguments.Plan): of rows, class indices and one factor.

    What is known before the tensors are is done before.
    """
    scalars, kind, numbers = known_of(compute_dtype(dtype), options)
    key = key_of(loss_and_gradient_pass, num_classes, kind, dtype, device, 1, True, 0, None)
    is_compiled = scalars.softcap is None and num_classes >= FEWEST
    extras = scalars.label_smoothing, scalars.z_loss, scalars.softcap
    is_simple, exact = 1 < num_classes <= SHORT and extras == (None,) * 3, compute_dtype(dtype)
    device_type, now, largest = device.type, options.compile_now, uncompiled.BLOCK // num_classes

    def compute(
        rows: Tensor, target: Tensor, factor: Tensor, all_count: bool, return_parts: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The loss of each row, (N,) or (N, 1), its losses, (4, N), if the parts are wanted, and the gradient.

        ``all_count`` says that all targets were seen to be classes, and none to be ignored.
        """
        num_rows = rows.shape[0]
        may_be_compiled = is_compiled and num_rows > 1
        is_whole = rows.is_contiguous()  # others have another version
        if may_be_compiled and is_whole:
            compiled = version_of(key)
            if compiled is not None:
                packed, gradient, *_ = compiled((rows, target.contiguous(), None, None, factor, None, scalars))
                return packed.select(1, 0), packed.t()[:NUM_LOSSES] if return_parts else None, gradient
        fits = is_simple and all_count and 0 < num_rows <= largest and is_whole
        if fits and (not may_be_compiled or stays_uncompiled(key, device_type, num_rows * num_classes, now)):
            if dtype == exact:  # else two calls that do nothing
                return uncompiled.ordinary(rows, target, factor, return_parts, numbers)
            loss, losses, gradient = uncompiled.ordinary(rows.to(exact), target, factor, return_parts, numbers)
            return loss, losses, gradient.to(dtype)
        losses, gradient = row_loss_and_gradient.function(rows, target, None, factor, options)
        return losses[0], losses, gradient

    return compute


def row_gradient_(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, options: RowOptions
) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(GRADIENT, logits, target, weight, stats, scale, options, logits)[1]


def row_loss_and_gradient_(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(LOSS_AND_GRADIENT, logits, target, weight, None, scale, options, logits)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.is_cpu and factor.item() == 1:  # on a CPU
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
