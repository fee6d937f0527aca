"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each is a pass over the rows, compiled to one loop (columns.py says how). A row comes from memory once, lies in the
cache whenever it is walked over again, and its gradient goes to memory once. Where nothing can be compiled (inductor.py
says where) the same functions run as they are, on blocks of rows.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from ..primitives import NUM_LOSSES, NUM_LSE, NUM_STATS, NUM_SUMS, RowOptions, new_gradient, primitive
from ..reference import compute_dtype
from .inductor import compiled_pass
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


_made_of_numbers = functools.lru_cache(maxsize=64)(_made)


def scalars_of(dtype: torch.dtype, options: RowOptions) -> Scalars:
    """The options as the passes take them."""
    if isinstance(options.c, Tensor) or isinstance(options.reg_weight, Tensor):
        return _made(dtype, options)
    return _made_of_numbers(dtype, options)  # then the others are none either


def _run(
    function: Callable, logits: Tensor, target, weight, stats, scale, options, count: int, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A pass over all rows: the first ``count`` values of each, (count, N), and the gradient, in ``out`` if given."""
    logits = logits.detach()
    dtype = compute_dtype(logits.dtype)
    if logits.shape[1] == 0:  # a shard without classes
        return logits.new_zeros(count, logits.shape[0], dtype=dtype), new_gradient(logits)
    if target.dim() == 2:
        target = target.to(dtype)
    target = target.contiguous()
    weight = None if weight is None else weight.to(dtype).contiguous()
    stats = None if stats is None else stats.contiguous()
    scale = None if scale is None else scale.contiguous()
    scalars = scalars_of(dtype, options)
    compiled = None
    if logits.is_contiguous() and scalars.softcap is None:
        args = logits, target, weight, None if stats is None else stats.unbind(), scale, out, scalars
        compiled = compiled_pass(function, args)
    if compiled is not None:
        packed, *others = compiled(args)
        gradient = others[0] if out is None and scale is not None else out
    else:
        if scale is not None and out is None:
            out = new_gradient(logits)
        packed, gradient = _blocks(function, logits, target, weight, stats, scale, out, scalars), out
    if out is not None and target.dim() == 1 and out.numel() > 0:
        # Where the target is none of the classes, the row is NaN or 0 anyway; where it is another shard's, what is
        # written is the gradient of class 0.
        index = target.clamp(0, out.shape[1] - 1)
        if scalars.all_classes is not None:
            index, _ = local_class(target, out.shape[1], scalars.first_class)
        out.index_put_((torch.arange(out.shape[0], device=out.device), index), packed[:, count].to(out.dtype))
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
    scalars: Scalars,
) -> Tensor:
    """The same, a block of rows at a time: the values of all rows, packed as the pass returns them (columns.py).

    Rows that do not lie one after another are copied into z, and so is everything that leaves matrices as large as the
    logits in between, which so stay in the cache: softcap, and what is not compiled. The gradient may be written over
    z: each element of it is the last that is computed from its logit.
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
        of_rows = (
            None if stats is None else stats[:, rows].unbind(),
            scale if scale is None or scale.dim() == 0 else scale[rows],
        )
        args = z, target[rows], weight, *of_rows, into, scalars
        compiled = compiled_pass(function, args)
        packed.append((function(*args) if compiled is None else compiled(args))[0])
        if out is not None and into is z:
            out[rows] = z
    return torch.cat(packed)


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, primitives.OPTIONS.


@primitive("compile")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    return _run(lse_pass, logits, target, weight, None, None, options, NUM_LSE)[0]


@primitive("compile")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, options: RowOptions) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    return _run(sums_pass, logits, target, None, stats, None, options, NUM_SUMS)[0]


@primitive("compile")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    found, _ = _run(loss_pass, logits, target, weight, None, None, options, NUM_LOSSES + NUM_STATS)
    return found[:NUM_LOSSES], found[NUM_LOSSES:].clone()


@primitive("compile")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, options: RowOptions
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    return _run(gradient_pass, logits, target, weight, stats, scale, options, 0)[1]


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    return _run(loss_and_gradient_pass, logits, target, weight, None, scale, options, NUM_LOSSES)


def row_gradient_(logits, target, weight, stats, scale, options: RowOptions) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(gradient_pass, logits, target, weight, stats, scale, options, 0, logits)[1]


def row_loss_and_gradient_(logits, target, weight, scale, options: RowOptions) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    logits = logits.detach()
    return _run(loss_and_gradient_pass, logits, target, weight, None, scale, options, NUM_LOSSES, logits)


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor.item() == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
