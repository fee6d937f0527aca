"""Passes over rows of logits, as the fallback compiles them: a row's losses and statistics, and its gradient.

formulas.py gives t and μ of each class. Sums of them over the classes are values of the row, and the gradient of every
class but the target's is made of these:

    gradient = coef_e exp(z - m) + coef_u u - coef_1

A pass takes whole tensors, (N, K) and (N,), and is compiled to one loop over the rows. For each row the loop goes over
the classes up to four times, while they lie in the nearest cache: for the maximum, for the sum of exponentials, for the
sums of h and u, for the gradient. columns.py says how a pass must be written to become one loop.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import compute_dtype
from .columns import largest_of_classes, pack, sum_of_classes, unpack, wide
from .formulas import coin, h_of, offset_of, u_of


class Scalars(NamedTuple):
    """The scalar options as 0-dim tensors, so that another value is not another compilation; None where not in use."""

    c: Tensor
    reg_weight: Tensor
    ignore_index: Tensor
    label_smoothing: Tensor | None
    z_loss: Tensor | None
    softcap: Tensor | None
    first_class: Tensor | None = None  # the logits' classes are a shard's: the first of them,
    all_classes: Tensor | None = None  # and K


class Row(NamedTuple):
    """The statistics of a row, as primitives.py names them, each (n, WIDTH)."""

    m: Tensor
    exp_sum: Tensor
    y_sum: Tensor
    yz_sum: Tensor
    omega: Tensor
    h_sum: Tensor | None = None
    u_sum: Tensor | None = None


def row_of(stats: tuple[Tensor, ...]) -> Row:
    """The statistics as columns, from one (n,) for each of them."""
    return Row(*(wide(value.unsqueeze(1)) for value in stats))


def _capped(logits: Tensor, scalars: Scalars) -> Tensor:
    """z: the logits in the dtype of the arithmetic, after the softcap."""
    z = logits.to(compute_dtype(logits.dtype))
    return z if scalars.softcap is None else scalars.softcap * torch.tanh(z / scalars.softcap)


def shares(scalars: Scalars, num_classes: int) -> tuple[Tensor | float, Tensor | float]:
    """What label smoothing gives to every class, ε/K, and what it leaves to the target, 1 - ε."""
    if scalars.label_smoothing is None:
        return 0.0, 1.0
    if scalars.all_classes is not None:
        num_classes = scalars.all_classes
    return scalars.label_smoothing / num_classes, 1 - scalars.label_smoothing


def _smoothed(target: Tensor, z: Tensor, scalars: Scalars) -> Tensor:
    """Target probabilities, y."""
    share, kept = shares(scalars, z.shape[1])
    return kept * target.to(z.dtype) + share


def local_class(target: Tensor, num_classes: int, first_class: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where among the logits' classes the target is (0 if nowhere), and whether it is one of them."""
    if first_class is not None:
        target = target - first_class
    here = (target >= 0) & (target < num_classes)
    return torch.where(here, target, 0), here


def _at_target(z: Tensor, target: Tensor, scalars: Scalars) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Of each row: whether it is counted, its `local_class`, the logit there, and whether it is in another shard."""
    target = wide(target.unsqueeze(1))
    counted = target != scalars.ignore_index
    index, here = local_class(target, z.shape[1], scalars.first_class)
    elsewhere = None
    if scalars.all_classes is not None:
        elsewhere = (target >= 0) & (target < scalars.all_classes) & ~here
    return counted, index, here, z.gather(1, index), elsewhere


def _unless(elsewhere: Tensor | None, x: Tensor | float) -> Tensor | float:
    """x, and 0 for rows whose target is in another shard."""
    return x if elsewhere is None else torch.where(elsewhere, 0, x)


def _lse(z: Tensor, target: Tensor, weight: Tensor | None, scalars: Scalars) -> tuple[Tensor, Tensor, Row]:
    """d = z - m and exp(d), (n, K), and the first five statistics of the rows."""
    num_classes = z.shape[1]
    share, kept = shares(scalars, num_classes)
    top = m = largest_of_classes(z)
    if scalars.all_classes is not None:
        top = torch.where(m == -torch.inf, 0, m)  # this shard's classes may all be masked where another's are not
    d = z - top
    e = d.exp()
    top, m, exp_sum = wide(top), wide(m), sum_of_classes(e)
    if target.dim() == 2:
        y = _smoothed(target, z, scalars)
        y = y if weight is None else y * weight
        omega = torch.ones_like(m) if weight is None else sum_of_classes(target.to(z.dtype) * weight)
        return d, e, Row(m, exp_sum, sum_of_classes(y), sum_of_classes(torch.where(y == 0, 0, y * d)), omega)
    _, index, here, z_g, elsewhere = _at_target(z, target, scalars)
    omega = torch.ones_like(z_g) if weight is None else weight[index]
    omega = _unless(elsewhere, torch.where(here, omega, float("nan")))
    y_sum = kept * omega
    yz_sum = y_sum * _unless(elsewhere, z_g - top)
    if scalars.label_smoothing is not None:
        y_sum = y_sum + share * (num_classes if weight is None else sum_of_classes(weight.unsqueeze(0)))
        yz_sum = yz_sum + share * sum_of_classes(d if weight is None else torch.where(weight == 0, 0, d * weight))
    return d, e, Row(m, exp_sum, y_sum, yz_sum, omega)


def _sums(
    z: Tensor, h: Tensor, u: Tensor, row: Row, target: Tensor, offset: tuple[Tensor, ...], scalars: Scalars
) -> tuple[Tensor, Tensor]:
    """Σ (1 - y) h and Σ (1 - y) u."""
    if target.dim() == 2:
        wrong = 1 - _smoothed(target, z, scalars)
        return sum_of_classes(wrong * h), sum_of_classes(wrong * u)
    share, kept = shares(scalars, z.shape[1])
    _, _, _, z_g, elsewhere = _at_target(z, target, scalars)
    kept = _unless(elsewhere, kept)
    t_g, mu_g = coin(z_g - row.m, (z_g - row.m).exp(), *offset)
    return (1 - share) * sum_of_classes(h) - kept * h_of(t_g, mu_g), (1 - share) * sum_of_classes(u) - kept * u_of(
        t_g, mu_g
    )


def _walked(z: Tensor, target: Tensor, weight: Tensor | None, scalars: Scalars) -> tuple:
    """All that comes before the losses and the gradient: (first, offset, exp(d), u, row).

    `first` is the offset of `offset_of`, packed: the pass returns it, so that it is stored and not computed again for
    every vector of classes. `row` has all seven statistics.
    """
    d, e, row = _lse(z, target, weight, scalars)
    first = pack(*offset_of(row.exp_sum, scalars.c))
    offset = unpack(first, 0, 3)
    t, mu = coin(d, e, *offset)
    h, u = h_of(t, mu), u_of(t, mu)
    return first, offset, e, u, Row(*row[:5], *_sums(z, h, u, row, target, offset, scalars))


def losses_of(row: Row, target: Tensor, scalars: Scalars) -> tuple[Tensor, ...]:
    """Loss, H, S, α lse²."""
    log_sum = row.exp_sum.log()
    cross_entropy = row.y_sum * log_sum - row.yz_sum
    regularizer = row.omega * row.h_sum
    loss = cross_entropy - scalars.reg_weight * regularizer
    z_penalty = torch.zeros_like(loss)
    if scalars.z_loss is not None:
        z_penalty = scalars.z_loss * row.omega * (row.m + log_sum).square()
    losses = loss + z_penalty, cross_entropy, regularizer, z_penalty
    if target.dim() == 2:
        return losses
    counted = target.unsqueeze(1) != scalars.ignore_index
    return tuple(torch.where(counted, loss, 0) for loss in losses)


def gradient_of(z: Tensor, e: Tensor, u: Tensor, coefs: tuple[Tensor | float, ...], scalars: Scalars) -> Tensor:
    """coef_e e + coef_u u - coef_1, through the softcap, (n, K) or (n, WIDTH)."""
    coef_e, coef_u, coef_1 = coefs
    gradient = coef_e * e + coef_u * u - coef_1
    return gradient if scalars.softcap is None else gradient * (1 - (z / scalars.softcap).square())


def coefficients_of(
    z: Tensor,
    row: Row,
    target: Tensor,
    weight: Tensor | None,
    offset: tuple[Tensor, ...],
    scale: Tensor,
    scalars: Scalars,
) -> tuple[Tensor, ...]:
    """The gradient at the target, then coef_e, coef_u and scale for the other classes, and whether a row counts."""
    share, kept = shares(scalars, z.shape[1])
    if scale.dim() == 1:  # else one for all rows
        scale = wide(scale.unsqueeze(1))
    of_lse = -scalars.reg_weight * row.u_sum
    if scalars.z_loss is not None:
        of_lse = of_lse + 2 * scalars.z_loss * (row.m + row.exp_sum.log())
    coef_e = scale * (row.y_sum + row.omega * of_lse) / row.exp_sum
    coef_u = scale * row.omega * scalars.reg_weight
    if target.dim() == 2:
        return torch.zeros_like(coef_e), coef_e, coef_u, scale.expand_as(coef_e), torch.ones_like(coef_e)
    counted, index, _, z_g, elsewhere = _at_target(z, target, scalars)
    kept = _unless(elsewhere, kept)
    d_g = z_g - row.m
    wy_g = kept * row.omega + (share if weight is None else share * weight[index])
    coefs = coef_e, coef_u * (1 - share - kept), scale * wy_g
    e_g = d_g.exp()
    at_target = gradient_of(z_g, e_g, u_of(*coin(d_g, e_g, *offset)), coefs, scalars)
    return torch.where(counted, at_target, 0), coef_e, coef_u, scale.expand_as(coef_e), counted.to(z.dtype)


def _gradient(z, e, u, target, weight, coefs, scalars: Scalars) -> Tensor:
    """Of all classes, (n, K); what it says of the target class is to be written over."""
    coef_e, coef_u, scale, counted = coefs
    share, _ = shares(scalars, z.shape[1])
    if target.dim() == 2:
        y = _smoothed(target, z, scalars)
        wy = y if weight is None else y * weight
        return gradient_of(z, e, u, (coef_e, coef_u * (1 - y), scale * wy), scalars)
    coef_1 = 0.0
    if scalars.label_smoothing is not None:
        coef_u = coef_u * (1 - share)
        coef_1 = scale * share if weight is None else scale * share * weight
    return torch.where(counted != 0, gradient_of(z, e, u, (coef_e, coef_u, coef_1), scalars), 0)


# ---------------------------------------------------------------------------------------------------------------------
# The passes, all with the same arguments. Each returns a packed tensor first (columns.py), with what its docstring says
# in its columns, from the first on. With `out`, the gradient is written there, except at the targets: the caller writes
# those, from the packed column after the losses. Without `out`, the gradient is the second tensor, complete. Tensors
# after these are returned only so that Inductor stores them.
#
# `out` may be the logits themselves. The gradient of a row is made from what is packed, so Inductor writes it after
# everything that reads the row.


def _with_gradient(
    gradient: Tensor,
    dtype: torch.dtype,
    target: Tensor,
    out: Tensor | None,
    packed: Tensor,
    last: int,
    scalars: Scalars,
) -> tuple[Tensor] | tuple[Tensor, Tensor]:
    """(packed,), and the gradient written into `out`; without `out` (packed, gradient), complete.

    Column `last` of what is packed has the gradient at the target.
    """
    if out is not None:
        out.copy_(gradient)
        return (packed,)
    gradient = gradient.to(dtype)
    if target.dim() == 1:
        index, _ = local_class(target, gradient.shape[1], scalars.first_class)
        gradient = gradient.scatter(1, index.unsqueeze(1), packed[:, last : last + 1].to(dtype))
    return packed, gradient


def lse_pass(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: None, scale: None, out: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed: the first five statistics."""
    _, _, row = _lse(_capped(logits, scalars), target, weight, scalars)
    return (pack(*row[:5]),)


def sums_pass(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: tuple[Tensor, ...], scale: None, out: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed: the other two statistics, from the first five."""
    z = _capped(logits, scalars)
    row = row_of(stats)
    first = pack(*offset_of(row.exp_sum, scalars.c), row.m)
    *offset, m = unpack(first, 0, 4)
    d = z - m
    t, mu = coin(d, d.exp(), *offset)
    h, u = h_of(t, mu), u_of(t, mu)
    return pack(*_sums(z, h, u, row, target, offset, scalars)), first


def loss_pass(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: None, scale: None, out: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed: the four losses, the seven statistics."""
    first, *_, row = _walked(_capped(logits, scalars), target, weight, scalars)
    return pack(*losses_of(row, target, scalars), *row), first


def gradient_pass(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: tuple[Tensor, ...], scale: Tensor, out: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed: the gradient at the target. And the gradient, from the seven statistics."""
    z = _capped(logits, scalars)
    row = row_of(stats)
    offset = offset_of(row.exp_sum, scalars.c)
    coefs = coefficients_of(z, row, target, weight, offset, scale, scalars)
    packed = pack(*coefs, *offset, row.m)
    *coefs, off, lost, e_off, m = unpack(packed, 1, 8)
    d = z - m
    e = d.exp()
    u = u_of(*coin(d, e, off, lost, e_off))
    gradient = _gradient(z, e, u, target, weight, coefs, scalars)
    return _with_gradient(gradient, logits.dtype, target, out, packed, 0, scalars)


def loss_and_gradient_pass(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: None, scale: Tensor, out: Tensor | None,
    scalars: Scalars,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed: the four losses, the gradient at the target. And the gradient."""
    z = _capped(logits, scalars)
    first, offset, e, u, row = _walked(z, target, weight, scalars)
    coefs = coefficients_of(z, row, target, weight, offset, scale, scalars)
    packed = pack(*losses_of(row, target, scalars), *coefs)
    gradient = _gradient(z, e, u, target, weight, unpack(packed, 5, 4), scalars)
    return *_with_gradient(gradient, logits.dtype, target, out, packed, 4, scalars), first
