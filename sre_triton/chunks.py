"""A linear layer and the loss of its logits, a chunk of rows at a time, so that N x K logits never exist.

For each chunk of rows x, and the classifier's W and b:

    z  = x W' + b                            into memory that all chunks share
    g  = d loss / d z                        over z, in one pass with the losses: row_loss_and_gradient_
    dx = g W,   dW += g' x,   db += Σ g      sums over the chunks in float32 or wider

The products are PyTorch's. Each reads W once a chunk, and dW is read and written, which costs little beside a product
of many rows and much beside one of few: that decides how many rows make a chunk.

Where the classes are sharded, W and b are those of this rank's classes, row_lse, row_sums and row_gradient_ take the
place of the one pass (sharding/collectives.py), and dx is a sum over the ranks, on its way while the next chunk is
computed.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .backend import primitives
from .internals import hidden_from_modes
from .primitives import NUM_LOSSES, RowOptions
from .reference import compute_dtype
from .sharding.collectives import row_stats, sum_of_weights
from .sharding.shard import group_of

# Logits of a chunk, and the rows it has at least.
# On a GPU 512 MiB in bfloat16. While an H100 moves a byte it does 330 operations of a product in bfloat16, and of dW it
# moves 8 bytes for 2 operations a row: from 1300 rows on it can do both at a time. No GPU has timed this.
GPU_LOGITS, GPU_ROWS = 2**28, 1024
# On a CPU 64 MiB in float32. Measured at K = 50257 and 128256, D = 256 (2 cores, AVX-512): chunks of 512 and 1024 rows
# were the fastest; those of 256 took 1.04 times as long in float32, 1.2 times in bfloat16.
CPU_LOGITS, CPU_ROWS = 2**24, 512
MULTIPLE = 64  # of rows, as products are computed in tiles
LINE = 128  # bytes: where rows begin on a GPU. Products that read them at any other place, as for odd K, are slow.


class How(NamedTuple):
    """What is to be computed, apart from the tensors."""

    backend: str
    chunk_rows: int  # 0: rows_of_chunk
    dtype: torch.dtype  # of the logits
    wanted: tuple[bool, bool, bool]  # which gradients: of input, linear_weight, linear_bias
    early: bool  # the gradients have the losses' factor in them
    group: str  # the name of the process group that shards the classes; "" where none does
    divide: bool  # the factor, by the sum of the targets' class weights, which are on all its ranks


def rows_of_chunk(num_rows: int, num_classes: int, device: torch.device) -> int:
    """How many rows make a chunk when the user does not say; the last has fewer."""
    logits, rows = (CPU_LOGITS, CPU_ROWS) if device.type == "cpu" else (GPU_LOGITS, GPU_ROWS)
    num_chunks = max(1, -(-num_rows // max(rows, logits // num_classes)))
    return -(-num_rows // (num_chunks * MULTIPLE)) * MULTIPLE


def gradient_dtype(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Of a parameter's gradient before the upstream one is known: a sum over rows may be too large for float16."""
    return torch.float32 if dtype == torch.float16 else parameter.dtype


def _chunks(num_rows: int, size: int, kept: Tensor | None) -> list[slice] | list[Tensor]:
    """The rows of each chunk."""
    if kept is not None:
        return list(kept.split(size)) if kept.shape[0] else []
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(1, size))]


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a b``, in the dtype of ``total``; the first time ``total = a b``."""
    how = {"out": total}
    if total.dtype != a.dtype:
        if total.is_cuda:
            how["out_dtype"] = total.dtype
        elif a.dtype == torch.bfloat16:
            # A CPU that multiplies bfloat16 has it as the result, too: rounded once a chunk, after sums in float32.
            # Measured (2 cores, AVX-512): products in float32 made a step 1.6 times as long.
            total.copy_(a @ b) if first else total.add_(a @ b)
            return
        else:
            a, b = a.to(total.dtype), b.to(total.dtype)
    if first:
        torch.mm(a, b, **how)
    else:
        torch.addmm(total, a, b, **how)


def _rows_that_count(target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """Of class indices (N,): which rows are ignored, (N,), on a GPU, and which are kept, (any,), on a CPU.

    Nothing of an ignored row is to reach a gradient, not even a NaN among its features. On a CPU such rows are left
    out; on a GPU, where to count them would be to wait for them, their features are set to 0. None where there is
    nothing to do.
    """
    if target.dim() == 2:
        return None, None
    ignored = target == ignore_index
    if ignored.device.type != "cpu":
        return ignored, None
    return None, (~ignored).nonzero().squeeze(1) if ignored.any() else None  # on a CPU


def _of_chunk(scale: Tensor, rows: slice | Tensor) -> Tensor:
    """The factors of a chunk's rows, (n,), or the one of all rows, ()."""
    return scale if scale.dim() == 0 else scale[rows]


def _room_for_logits(W: Tensor, num_rows: int, backend: str) -> Tensor:
    """Memory for the logits of a chunk, (num_rows, K), which all chunks share."""
    num_classes = pitch = W.shape[0]
    if backend == "triton":
        pitch = -(-num_classes * W.dtype.itemsize // LINE) * LINE // W.dtype.itemsize
    logits = W.new_empty(num_rows, pitch)
    # On a CPU with AMX, products in bfloat16 read on to the next multiple of 32 classes, and 0 times NaN is NaN.
    logits[:, num_classes:].zero_()
    return logits[:, :num_classes]


class _Gradients:
    """The gradients of input, W and b that are wanted, to which each chunk adds; those that are not have no elements.

    Sums over the chunks are float32 or wider. The input's gradient of a chunk is, where classes are sharded, a sum over
    the ranks, which is on its way while the next chunk is computed.
    """

    def __init__(
        self, input: Tensor, W: Tensor, wanted: tuple[bool, bool, bool], sums_dtype: torch.dtype, group: object
    ) -> None:
        """``sums_dtype`` is that of the sum over the chunks for W; ``group`` shards the classes, or is None."""
        of_input, of_weight, of_bias = wanted
        self.wanted, self.group, self.W = wanted, group, W
        self.exact = compute_dtype(W.dtype)
        self.input = input.new_zeros(input.shape if of_input else 0)
        self.weight = W.new_empty(W.shape if of_weight else 0, dtype=sums_dtype)
        self.bias = W.new_zeros(W.shape[0] if of_bias else 0, dtype=self.exact)
        self.first = True
        self.on_its_way = None

    def add(self, rows: slice | Tensor, x: Tensor, g: Tensor) -> None:
        """Add what follows from a chunk's features x (n, D) and gradient of logits g (n, K)."""
        of_input, of_weight, of_bias = self.wanted
        if of_input and self.group is None:
            self.input[rows] = torch.mm(g, self.W).to(self.input.dtype)
        elif of_input:
            total = self.W.new_empty(x.shape, dtype=self.exact)
            _add_product(total, g, self.W, first=True)
            self.arrive()
            self.on_its_way = rows, total, dist.all_reduce(total, group=self.group, async_op=True)
        if of_weight:
            _add_product(self.weight, g.t(), x, self.first)
        if of_bias:
            self.bias += g.sum(0, dtype=self.exact)
        self.first = False

    def arrive(self) -> None:
        """Store the chunk of the input's gradient whose sum over the ranks is on its way."""
        if self.on_its_way is not None:
            rows, total, work = self.on_its_way
            work.wait()
            self.input[rows] = total.to(self.input.dtype)

    def finish(self, linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """All three, those of parameters in their :func:`gradient_dtype`."""
        self.arrive()
        if self.first:  # there were no rows
            self.weight.zero_()
        dtype, bias = self.W.dtype, linear_weight if linear_bias is None else linear_bias
        return (
            self.input,
            self.weight.to(gradient_dtype(linear_weight, dtype)),
            self.bias.to(gradient_dtype(bias, dtype)),
        )


@hidden_from_modes
def losses_and_gradients(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (K, D)
    linear_bias: Tensor | None,  # (K,)
    target: Tensor,  # (N,) or (N, K)
    weight: Tensor | None,  # (K,)
    factor: Tensor,  # ()
    upstream: Tensor | None,  # () or (N,)
    how: How,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses of each row, (4, N), the gradients of input, W and b, and the factor.

    The gradients are those of Σ factor * upstream * loss, those of parameters in their :func:`gradient_dtype`. One that
    is not wanted has no elements.
    """
    row_primitives = primitives(how.backend)
    input, dtype = input.detach(), how.dtype
    W = linear_weight.detach().to(dtype)
    b = None if linear_bias is None else linear_bias.detach().to(dtype)
    num_rows, num_classes = input.shape[0], W.shape[0]
    group = group_of(how.group) if how.group else None

    ignored, kept = _rows_that_count(target, options.ignore_index)
    num_kept = num_rows if kept is None else kept.shape[0]
    # The same on all ranks.
    classes_of_rank = num_classes if group is None else -(-options.all_classes // group.size())
    size = min(how.chunk_rows or rows_of_chunk(num_kept, classes_of_rank, input.device), num_kept)
    chunks = _chunks(num_rows, size, kept)

    one_sum = len(chunks) == 1 and gradient_dtype(linear_weight, dtype) == dtype
    gradients = _Gradients(input, W, how.wanted, dtype if one_sum else compute_dtype(dtype), group)
    losses = input.new_zeros(NUM_LOSSES, num_rows, dtype=compute_dtype(dtype))
    logits = _room_for_logits(W, size, how.backend)
    scale = factor if how.early else torch.ones_like(factor)
    scale = scale if upstream is None else scale * upstream
    divisor = sum_of_weights(target, weight, options) if how.divide else factor.new_empty(0)
    for rows in chunks:
        x = input[rows].to(dtype)
        if ignored is not None:
            x = x.masked_fill(ignored[rows].unsqueeze(1), 0)
        z = logits[: x.shape[0]]
        if b is None:
            torch.mm(x, W.t(), out=z)
        else:
            torch.addmm(b, x, W.t(), out=z)
        of_rows = z, target[rows], weight
        if group is None and not any(how.wanted):
            losses[:, rows] = row_primitives.row_loss(*of_rows, options)[0]
            continue
        if group is None:
            losses[:, rows], g = row_primitives.row_loss_and_gradient_(*of_rows, _of_chunk(scale, rows), options)
        else:
            first = rows is chunks[0]
            call, rest = ("linear", how.wanted[0], size), divisor if first else divisor[:0]
            losses[:, rows], stats, rest = row_stats(row_primitives, *of_rows, options, group, 1.0, call, rest)
            if first and how.divide:
                divisor = rest
                scale = scale / divisor.squeeze(0) if how.early else scale
            if not any(how.wanted):
                continue
            g = row_primitives.row_gradient_(*of_rows, stats, _of_chunk(scale, rows), options)
        gradients.add(rows, x, g)
    factor = factor / divisor.squeeze(0) if how.divide else factor.clone()  # not what came in
    return losses, *gradients.finish(linear_weight, linear_bias), factor
