"""The passes of passes.py uncompiled: the same values of rows and the same gradient, in few operations of PyTorch.

Small problems are computed so until it pays to compile (inductor.py), and all of them where nothing can be compiled. A
step is some sixty operations, each of a microsecond or two for few logits. For many, the time goes to the twenty that
go over a matrix, of which the exponential and the logarithm take half; so these are in place:

    d       z - m, then t, then |t| μ
    e       exp(d), then the gradient
    x       p / c, then h
    odds    of the coin's rarer side, then its probability μ
    u       1 + these odds, then u

A value of a row is a column, (n, 1). A number that meets one is a tensor, as PyTorch takes 2 us to make one of it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..primitives import new_gradient
from ..reference import compute_dtype
from .formulas import LEAST_C, exp_in
from .passes import Row, Scalars, shares

# Logits in a block of rows. Measured for K = 1000 on 2 cores: blocks of 2**16 took 1.3 times as long.
BLOCK = 2**18
# Logits for which each operation takes a microsecond or two, however fast it would be on a matrix.
FEW = 2**15


class Numbers(NamedTuple):
    """Numbers as tensors, (), of the dtype of the arithmetic."""

    c: Tensor
    log_c: Tensor
    reg_weight: Tensor
    inverse_c: Tensor
    zero: Tensor
    one: Tensor
    nan: Tensor
    power_of_2: bool  # whether exp may be one


def numbers_of(scalars: Scalars, dtype: torch.dtype) -> Numbers:
    """The scalar options that every row needs, and constants."""
    c = scalars.c
    numbers = c, c.log(), scalars.reg_weight, 1 / c, *torch.tensor([0.0, 1.0, torch.nan], device=c.device)
    power_of_2 = c.device.type == "cpu" and c.item() >= LEAST_C  # on a CPU nobody waits
    return Numbers(*(number.to(dtype) for number in numbers), power_of_2)


def _scratch(z: Tensor) -> Sequence[Tensor | None]:
    """Five matrices like z, for all but e. Few logits do without, None: an operation makes its own as fast.

    They are one piece of memory, which malloc keeps for the next step. It gives back several pieces that together are
    more than twice the largest, and to touch new pages takes as long as the arithmetic.
    """
    return (None,) * 5 if z.numel() < FEW else z.new_empty(5, *z.shape).unbind()


def _coin(
    t: Tensor, x: Tensor, scratch: Sequence[Tensor | None], wants_h: bool, numbers: Numbers
) -> tuple[Tensor, Tensor | None]:
    """u and h, from t = log x and x = p / c, both of which are written over."""
    odds, u, lost = scratch
    odds = torch.reciprocal(x, out=odds)
    torch.minimum(odds, x, out=odds)
    u = torch.add(odds, numbers.one, out=u)
    if wants_h:
        # log(1 + odds), without what the rounding of the sum has added. Measured: torch.log1p takes as long as the
        # logarithm, or 10 times as long, depending on what the CPU did before.
        lost = torch.sub(u, numbers.one, out=lost).sub_(odds)
        torch.log(u, out=x).sub_(lost)
    t_mu = t.mul_(odds.div_(u))
    torch.div(t_mu, u, out=u)
    return u, x.add_(t_mu.abs_()) if wants_h else None


class _Block:
    """Some rows, what is known of them, and the matrices."""

    def __init__(self, z: Tensor, target: Tensor, weight: Tensor | None, scalars: Scalars, numbers: Numbers) -> None:
        """``z`` (n, K) in the dtype of the arithmetic, and ``weight`` too; the rest as the passes get it."""
        num_classes = z.shape[1]
        self.slope: Tensor | None = None
        if scalars.softcap is not None:
            tanh = torch.tanh(z / scalars.softcap)
            z, self.slope = tanh * scalars.softcap, 1 - tanh.square_()
        self.z: Tensor = z
        self.weight: Tensor | None = weight
        self.scalars: Scalars = scalars
        self.numbers: Numbers = numbers
        self.y: Tensor | None = None
        self.ignored: Tensor | None = None
        self.elsewhere: Tensor | None = None
        self.share: Tensor | float
        self.share, self.kept = shares(scalars, num_classes)
        self.smoothed: bool = scalars.label_smoothing is not None
        if target.dim() == 2:
            self.target = target
            self.y = target * self.kept + self.share if self.smoothed else target
            return
        target = target.unsqueeze(1)
        ignored = target == scalars.ignore_index
        if ignored.device.type != "cpu" or ignored.any():  # on a GPU nobody waits to know
            self.ignored = ignored
        local = target if scalars.first_class is None else target - scalars.first_class
        # Where the target is none of the classes, the row is spoilt; where it is another shard's, any will do.
        self.index: Tensor = local.clamp(0, num_classes - 1)
        self.here: Tensor = self.index == local
        if scalars.all_classes is not None:
            self.elsewhere = (target >= 0) & (target < scalars.all_classes) & ~self.here
            self.kept = torch.where(self.elsewhere, 0, numbers.one * self.kept)

    def weighted(self, y: Tensor | float) -> Tensor | float:
        """y_j w_j, or y_j."""
        return y if self.weight is None else y * self.weight

    def exponentials(self, m: Tensor) -> None:
        """d and e."""
        self.x: Tensor | None
        self.scratch: list[Tensor | None]
        d, self.x, *self.scratch = _scratch(self.z)
        self.d: Tensor = torch.sub(self.z, m, out=d)
        self.e: Tensor = exp_in(self.x, self.d, self.numbers.power_of_2)

    def lse(self) -> Row:
        """The first five statistics."""
        numbers, weight = self.numbers, self.weight
        m = top = self.z.amax(1, keepdim=True)
        if self.scalars.all_classes is not None:
            top = torch.where(m == -torch.inf, 0, m)  # all of this shard's classes may be masked
        self.exponentials(top)
        d, exp_sum = self.d, self.e.sum(1, keepdim=True)
        if self.y is not None:
            y = self.weighted(self.y)
            omega = torch.ones_like(m) if weight is None else (self.target * weight).sum(1, keepdim=True)
            yz_sum = torch.where(y == 0, 0, y * d).sum(1, keepdim=True)
            return Row(m, exp_sum, y.sum(1, keepdim=True), yz_sum, omega)
        d_g = d.gather(1, self.index)
        omega = torch.where(self.here, numbers.one if weight is None else weight[self.index], numbers.nan)
        if self.elsewhere is not None:
            omega, d_g = torch.where(self.elsewhere, 0, omega), torch.where(self.elsewhere, 0, d_g)
        y_sum = omega * self.kept
        yz_sum = y_sum * d_g
        if self.smoothed:
            y_sum = y_sum + self.share * (d.shape[1] if weight is None else weight.sum())
            every = d if weight is None else torch.where(weight == 0, 0, d * weight)
            yz_sum = yz_sum + self.share * every.sum(1, keepdim=True)
        return Row(m, exp_sum, y_sum, yz_sum, omega)

    def coin(self, exp_sum: Tensor, wants_h: bool) -> None:
        """u, h and log Σ exp d."""
        numbers = self.numbers
        self.log_sum: Tensor = exp_sum.log()
        off, scaled = self.log_sum + numbers.log_c, exp_sum * numbers.c
        lost = off.neg().exp_().mul_(scaled).sub_(numbers.one)  # by the rounding of off, see formulas.offset_of
        # At -inf logits t stays finite, so that nothing multiplies 0 by infinity. NaN comes back with off.
        t = F.threshold_(self.d, -1e4, -1e4).sub_(off).sub_(lost)
        x = torch.mul(self.e, scaled.reciprocal_(), out=self.x)
        self.u: Tensor
        self.h: Tensor | None
        self.u, self.h = _coin(t, x, self.scratch, wants_h, numbers)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Σ (1 - y) h and Σ (1 - y) u."""
        return self._of_wrong(self.h), self._of_wrong(self.u)

    def _of_wrong(self, x: Tensor) -> Tensor:
        """Σ (1 - y) x."""
        if self.y is not None:
            return ((1 - self.y) * x).sum(1, keepdim=True)
        return (1 - self.share) * x.sum(1, keepdim=True) - self.kept * x.gather(1, self.index)

    def losses(self, row: Row) -> list[Tensor]:
        """Loss, H, S, α lse²."""
        H = row.y_sum * self.log_sum - row.yz_sum
        S = row.omega * row.h_sum
        loss = torch.addcmul(H, S, self.numbers.reg_weight, value=-1)
        if self.scalars.z_loss is None:
            z_penalty = torch.zeros_like(H)
        else:
            z_penalty = self.scalars.z_loss * row.omega * (row.m + self.log_sum).square()
            loss = loss + z_penalty
        losses = [loss, H, S, z_penalty]
        if self.ignored is not None:
            losses = [values.masked_fill(self.ignored, 0) for values in losses]
        return losses

    def gradient(self, row: Row, scale: Tensor) -> Tensor:
        """scale times the gradient of each row's loss, over e."""
        numbers, scalars, e, u = self.numbers, self.scalars, self.e, self.u
        if scale.dim() == 1:
            scale = scale.unsqueeze(1)
        coef_e = torch.addcmul(row.y_sum, row.omega * row.u_sum, numbers.reg_weight, value=-1)
        if scalars.z_loss is not None:
            coef_e = coef_e + 2 * scalars.z_loss * row.omega * (row.m + self.log_sum)
        coef_e = coef_e.mul_(scale).div_(row.exp_sum)
        of_target = row.omega * scale
        coef_u = of_target * numbers.reg_weight
        if self.y is not None:
            e.mul_(coef_e).addcmul_(u.mul_(1 - self.y), coef_u).sub_(scale * self.weighted(self.y))
        else:
            share = self.share if self.weight is None else self.share * self.weight[self.index]
            at_target = coef_e * e.gather(1, self.index)
            at_target = at_target + coef_u * (1 - self.share - self.kept) * u.gather(1, self.index)
            at_target = at_target - (self.kept * of_target + scale * share)
            e.mul_(coef_e).addcmul_(u, coef_u * (1 - self.share))
            if self.smoothed:
                e.sub_(scale * self.weighted(self.share))
            e.scatter_(1, self.index, at_target)
        if self.slope is not None:
            e.mul_(self.slope)
        if self.ignored is not None:
            e.masked_fill_(self.ignored, 0)
        return e


# ---------------------------------------------------------------------------------------------------------------------
# The passes. Each takes a block, the statistics as far as they are known, and the factor of the gradient, and returns
# columns and the gradient, which are what the pass of the same name in passes.py returns.

Pass = Callable[[_Block, Row | None, Tensor | None], tuple[list[Tensor], Tensor | None]]


def lse(block: _Block, row: None, scale: None) -> tuple[list[Tensor], None]:
    """The first five statistics."""
    return list(block.lse()[:5]), None


def sums(block: _Block, row: Row, scale: None) -> tuple[list[Tensor], None]:
    """The other two, from the first five."""
    block.exponentials(row.m)
    block.coin(row.exp_sum, wants_h=True)
    return list(block.sums()), None


def _all_statistics(block: _Block) -> Row:
    """All seven."""
    row = block.lse()
    block.coin(row.exp_sum, wants_h=True)
    return Row(*row[:5], *block.sums())


def loss(block: _Block, row: None, scale: None) -> tuple[list[Tensor], None]:
    """The four losses, the seven statistics."""
    row = _all_statistics(block)
    return [*block.losses(row), *row], None


def gradient(block: _Block, row: Row, scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """The gradient, from the seven statistics."""
    block.exponentials(row.m)
    block.coin(row.exp_sum, wants_h=False)
    return [], block.gradient(row, scale)


def loss_and_gradient(block: _Block, row: None, scale: Tensor) -> tuple[list[Tensor], Tensor]:
    """The four losses. And the gradient."""
    row = _all_statistics(block)
    return block.losses(row), block.gradient(row, scale)


def ordinary(
    z: Tensor, target: Tensor, scale: Tensor, return_parts: bool, numbers: Numbers
) -> tuple[Tensor, Tensor | None, Tensor]:
    """:func:`loss_and_gradient` of one block in half the operations.

    For rows of up to SHORT classes, class indices that are all in range and counted, one factor, and no option but c
    and λ.

    Returns:
        The loss of each row, (n, 1); all of its losses, (4, n), if the parts are wanted; the gradient, (n, K).
    """
    index = target.unsqueeze(1)
    d, x, *scratch = _scratch(z)
    if z.numel() < FEW:
        d, exp_sum = torch.log_softmax(z, 1), None
        e, H, off, over_c = d.exp(), d.gather(1, index).neg_(), numbers.log_c, numbers.inverse_c
    else:
        d = torch.sub(z, z.amax(1, keepdim=True), out=d)
        e = exp_in(x, d, numbers.power_of_2)
        exp_sum = e.sum(1, keepdim=True)
        log_sum = exp_sum.log()
        H, off, over_c = log_sum - d.gather(1, index), log_sum + numbers.log_c, numbers.inverse_c / exp_sum
    t = F.threshold_(d, -1e4, -1e4).sub_(off)
    u, h = _coin(t, torch.mul(e, over_c, out=x), scratch, True, numbers)
    S = h.scatter_(1, index, 0).sum(1, keepdim=True)
    u_sum = u.scatter_(1, index, 0).sum(1, keepdim=True)
    loss, losses = torch.addcmul(H, S, numbers.reg_weight, value=-1), None
    if return_parts:
        losses = torch.cat((loss, H, S, numbers.zero.expand_as(H))).view(4, -1)
    coef_e = torch.addcmul(numbers.one, u_sum, numbers.reg_weight, value=-1).mul_(scale)
    if exp_sum is not None:
        coef_e.div_(exp_sum)
    gradient = e.mul_(coef_e).addcmul_(u, scale * numbers.reg_weight)
    return loss, losses, gradient.scatter_(1, index, gradient.gather(1, index).sub_(scale))


def run(
    function: Pass, logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor | None, scale: Tensor | None,
    out: Tensor | None, scalars: Scalars, numbers: Numbers,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """A pass over all rows, a block at a time: the columns of each, (how many, N), and the gradient, in ``out``.

    ``out`` may be the logits: each block of the gradient is written when nothing reads its logits any more.
    """
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    num_blocks = max(1, min(num_rows * num_classes // BLOCK, num_rows))
    if num_blocks == 1:
        row = None if stats is None else Row(*(value.unsqueeze(1) for value in stats))
        columns, gradient = function(_Block(logits.to(dtype), target, weight, scalars, numbers), row, scale)
        if gradient is not None:
            out = gradient.to(logits.dtype) if out is None else out.copy_(gradient)
        return torch.cat(columns).view(len(columns), -1) if columns else None, out
    if out is None and scale is not None:
        out = new_gradient(logits)
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    values = []
    for start, stop in itertools.pairwise(bounds):
        rows = slice(start, stop)
        given = stats if stats is None else stats[:, rows], scale if scale is None or scale.dim() == 0 else scale[rows]
        into = None if out is None else out[rows]
        values.append(run(function, logits[rows], target[rows], weight, *given, into, scalars, numbers)[0])
    return (torch.cat(values, 1) if values[0] is not None else None), out
