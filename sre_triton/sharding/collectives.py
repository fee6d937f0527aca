"""Classes sharded over the ranks of a process group: a row's statistics from those of its shards.

Each rank has the logits of its classes, all rows, and all targets. A step is

    row_lse         of the shard's classes
    all-gather      of the five; m = max m_r, exp_sum = Σ exp_sum_r exp(m_r - m), the sums with y likewise
    row_sums        with the row's m and exp_sum
    all-reduce      h_sum and u_sum
    row_gradient    now, or in the backward, without a collective

So this is where ranks agree on a row's maximum: :func:`_combine`. Beyond GATHER_RANKS ranks, whose statistics together
outgrow a shard's logits, two all-reduces, of the maxima and of the sums, take the place of the gathering.

There is no other communication. What ranks must agree on, such as K and the options, travels in front of the five
statistics (:func:`_header`). Where they do not agree, a CPU raises; a GPU, which is not waited for, makes NaN of all
rows.
"""

import functools
import hashlib
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import primitives
from ..compiled.passes import Row, local_class, losses_of
from ..compiled.primitives import scalars_of
from ..internals import hidden_from_modes, is_exporting
from ..messages import DIFFERENT_CALLS, NOT_EVERY_CLASS_ONCE
from ..primitives import (
    NUM_LOSSES,
    NUM_LSE,
    NUM_STATS,
    NUM_SUMS,
    OPTIONS,
    RowOptions,
    as_tensors,
    batching_rule,
    needs_dispatch,
    new_per_row,
    register_formula,
    without_forward_ad,
)
from ..reference import compute_dtype
from .shard import group_of

# A gathering moves 16 bytes a row for each rank, four statistics (a fifth where there are class weights). At 64 ranks
# and K = 128256, that is a quarter of a shard's bfloat16 logits.
GATHER_RANKS = 64

# Devices whose memory a program can look at without waiting.
READABLE = ("cpu",)


# ---------------------------------------------------------------------------------------------------------------------
# What travels in front of the statistics


AGREED = ("c", "reg_weight", "label_smoothing", "z_loss", "softcap")  # options, beside the factor of the losses
NUM_DIGEST, NUM_VALUES, NUM_SUMMED = 3, 1 + len(AGREED), 2
NUM_SAME = NUM_DIGEST + NUM_VALUES


def _digest(text: str, count: int, bits: int) -> list[int]:
    """A digest of the text: ``count`` whole numbers of ``bits`` bits, which floats hold exactly, as their sums do."""
    digest = hashlib.blake2b(text.encode(), digest_size=2 * count).digest()
    return [int.from_bytes(digest[i : i + 2], "big") >> (16 - bits) for i in range(0, 2 * count, 2)]


@functools.lru_cache(maxsize=256)
def _constants(text: str, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A header with zeros where `_header` will write the values of the options: this part is the same at every step."""
    ends = zip(_digest(str(stop), NUM_SUMMED, 12), _digest(str(start), NUM_SUMMED, 12), strict=True)
    with torch.inference_mode(False):
        header = [*_digest(text, NUM_DIGEST, 16), *[0] * NUM_VALUES, *(stop - start for stop, start in ends)]
        return torch.tensor(header, dtype=dtype, device=device)


def _header(text: str, values: tuple[float | Tensor | None, ...], start: int, stop: int, like: Tensor) -> Tensor:
    """What a rank sends in front of its statistics, (NUM_SAME + NUM_SUMMED,), so that all see whether they agree.

    The first NUM_SAME must be the same on all ranks: a digest of the text, which says what is called, and the values of
    the options, with 0 for None. The last NUM_SUMMED are digest(stop) - digest(start), and the ranks add them up. If
    the shards hold every class once, each stop but the last is another shard's start, and the two cancel: the sum is
    digest(K) - digest(0), however the classes are shared out. Example: the shards 0 to 6 and 6 to 10 give digest(6) -
    digest(0) + digest(10) - digest(6).
    """
    header, largest = _constants(text, start, stop, like.dtype, like.device).clone(), torch.finfo(like.dtype).max
    for i, value in enumerate(values, NUM_DIGEST):
        if isinstance(value, Tensor):
            header[i].copy_(value)
        elif value is not None:
            header[i].fill_(max(-largest, min(value, largest)))
    return header


def _expected_sum(num_classes: int, like: Tensor) -> Tensor:
    """What the last NUM_SUMMED of all headers add up to, if the shards hold every class once."""
    return _constants("", 0, num_classes, like.dtype, like.device)[NUM_SAME:]


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where a and b are equal, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def _checked(stats: Tensor, same: Tensor, complete: Tensor, num_classes: int) -> Tensor:
    """The statistics, if the ranks (``same``, one each, or one for all) made the same call on complete shards."""
    if stats.device.type not in READABLE:
        return torch.where(same.all() & complete, stats, torch.nan)
    if not same.all():
        others = (~same).nonzero().squeeze(-1).tolist() if same.dim() else ()
        rank = f" between this rank and rank {others[0]} of the group" if others else ""
        raise RuntimeError(DIFFERENT_CALLS.format(rank))
    if not complete:
        raise RuntimeError(NOT_EVERY_CLASS_ONCE.format(num_classes))
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# The collectives


# The older name warns since torch 2.14; the newer is not there before.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def _relative(stats: Tensor, m: Tensor) -> Tensor:
    """What of row_lse's statistics (..., count, N) adds up over the shards, relative to the largest m of all, (N,)."""
    m_r, exp_sum, y_sum, yz_sum, *omega = stats.unbind(-2)
    shift = torch.where(m_r == -torch.inf, 0, m_r - m)  # there is nothing to shift where all classes are masked
    return torch.stack([exp_sum * shift.exp(), y_sum, yz_sum + y_sum * shift, *omega], -2)


def _combine(
    stats: Tensor, header: Tensor, rest: Tensor, group: "dist.ProcessGroup", num_classes: int
) -> tuple[Tensor, Tensor]:
    """Statistics of whole rows, (count, N), from row_lse's of this shard, and the sum of ``rest`` over the ranks."""
    num_ranks, (count, num_rows) = dist.get_world_size(group), stats.shape
    same, summed = header[:NUM_SAME], torch.cat([header[NUM_SAME:], rest])
    expected = _expected_sum(num_classes, header)
    if num_ranks <= GATHER_RANKS:
        sent = torch.cat([same, summed, stats.flatten()])
        gathered = sent.new_empty(num_ranks * sent.numel())
        _all_gather(gathered, sent, group=group)
        first, second, stats = gathered.view(num_ranks, -1).split(
            [same.numel(), summed.numel(), count * num_rows], dim=1
        )
        stats = stats.unflatten(1, (count, num_rows))
        agreed = _same(first, same).all(1)
        m = stats[:, 0].amax(0)
        sums, summed = _relative(stats, m).sum(0), second.sum(0)
    else:
        largest = torch.cat([same, -same, stats[0]])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        agreed = (_same(largest[:NUM_SAME], same) & _same(largest[NUM_SAME : 2 * NUM_SAME], -same)).all()
        m = largest[2 * NUM_SAME :]
        sums = torch.cat([summed, _relative(stats, m).flatten()])
        dist.all_reduce(sums, group=group)
        summed, sums = sums.split([summed.numel(), (count - 1) * num_rows])
        sums = sums.unflatten(0, (count - 1, num_rows))
    complete = (summed[:NUM_SUMMED] == expected).all()
    stats = _checked(torch.cat([m.unsqueeze(0), sums]), agreed, complete, num_classes)
    return stats, summed[NUM_SUMMED:]


def sum_of_weights(target: Tensor, weight: Tensor, options: RowOptions) -> Tensor:
    """Of those targets of class indices that are in this shard, (1,)."""
    weight = weight.detach().to(compute_dtype(weight.dtype))
    if weight.numel() == 0:
        return weight.new_zeros(1)
    index, here = local_class(target, weight.shape[0], options.first_class)
    return torch.where(here & (target != options.ignore_index), weight[index], 0).sum(0, keepdim=True)


def row_stats(
    row_primitives: ModuleType,
    logits: Tensor,  # (N, classes of the shard)
    target: Tensor,  # (N,), or (N, classes of the shard)
    weight: Tensor | None,  # (classes of the shard,)
    options: RowOptions,
    group: "dist.ProcessGroup",
    factor: float | Tensor,
    call: tuple[object, ...] = (),
    rest: Tensor | None = None,  # (any,)
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses (4, N) and statistics (7, N) of whole rows, and the sum of ``rest`` over the ranks: two collectives.

    The ``factor`` with which the losses will be multiplied must be the same on all ranks, and so must ``call``.
    """
    num_classes = options.all_classes
    num_rows, num_here = logits.shape
    indices = target.dim() == 1

    stats = new_per_row(logits, NUM_LSE)
    if num_here:
        stats = row_primitives.row_lse(logits, target, weight, options)
    else:
        stats.zero_()[0] = -torch.inf
    call = repr((*call, num_rows, num_classes, logits.dtype, indices, weight is None, options.ignore_index))
    values = factor, *(getattr(options, name) for name in AGREED)
    header = _header(call, values, options.first_class, options.first_class + num_here, stats)
    # Without class weights, ω is 1.
    sent = stats if weight is not None else stats[: NUM_LSE - 1]
    stats, rest = _combine(sent, header, stats.new_empty(0) if rest is None else rest, group, num_classes)
    if weight is None:
        omega = torch.ones_like(stats[:1])
        if indices:
            # So is then Σ y, unless a target is no class, or the ranks do not have the same targets.
            omega = torch.where((stats[2:3] - 1).abs() < 1e-3, omega, torch.nan)
            stats = torch.cat([stats[:2], omega, stats[3:]])
        stats = torch.cat([stats, omega])

    sums = stats.new_zeros(NUM_SUMS, num_rows)
    if num_here:
        sums = row_primitives.row_sums(logits, target, stats, options).contiguous()
    dist.all_reduce(sums, group=group)
    stats = torch.cat([stats, sums])
    losses = losses_of(Row(*stats.unsqueeze(2)), target, scalars_of(stats.dtype, options))
    return torch.cat(losses, 1).t().contiguous(), stats, rest


@hidden_from_modes
def _compute(logits, target, weight, factor, backend, group, options: RowOptions) -> tuple[Tensor, Tensor]:
    """Losses (4, N) and statistics (7, N), given the backend and the group by name."""
    return row_stats(primitives(backend), logits, target, weight, options, group_of(group), factor)[:2]


def _of_op(*args) -> tuple[Tensor, Tensor]:
    """:func:`_compute`, whose last argument an op takes one by one."""
    return _compute(*args[:6], RowOptions(*args[6:]))


_SCHEMA = (
    f"(Tensor logits, Tensor target, Tensor? weight, Tensor factor, str backend, str group, {OPTIONS}) "
    "-> (Tensor, Tensor)"
)
_op = torch.library.custom_op(
    "sre_triton::sharded_row_loss",
    without_forward_ad(_of_op),
    mutates_args=(),
    schema=_SCHEMA,
)
_op.register_fake(lambda logits, *_: (new_per_row(logits, NUM_LOSSES), new_per_row(logits, NUM_STATS)))
_op.register_vmap(batching_rule(_op, _SCHEMA, (1, 1)))
register_formula(_op, lambda inputs: inputs[4], with_stats=True)


def sharded_row_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    factor: Tensor,
    backend: str,
    group: str,
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """:func:`row_stats` as the primitive row_loss: losses (4, N), statistics (7, N)."""
    if not is_exporting():
        logits = logits.detach()
    if not needs_dispatch(logits, (target, weight, factor)):
        return _compute(logits, target, weight, factor, backend, group, options)
    return _op(logits, target, weight, factor, backend, group, *as_tensors(options))
