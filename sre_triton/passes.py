"""The mathematics of one block of rows, in three passes that the fallback compiles.

Per class, from d = z - m (m the row's maximum) and off = log exp_sum + log c:

    t = d - off        = log(p / c)
    x = exp(d) / exp(off)  = p / c, from the same exponential as p
    μ = min(x, 1) / (1 + x)    the smaller of the coin's two probabilities
    h = |t| μ - log1p(-μ)      the coin's entropy
    u = t μ (1 - μ)            = -dh/dt

and the gradient is  coef_p p + coef_u u - coef_1  with the target's own value written over it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import compute_dtype


class Numbers(NamedTuple):
    """The scalar options as 0-dim tensors, so that another value is not another compilation."""

    c: Tensor
    log_c: Tensor
    reg_weight: Tensor
    ignore_index: Tensor
    label_smoothing: Tensor
    z_loss: Tensor
    softcap: Tensor


class Flags(NamedTuple):
    """The options that change the code."""

    smoothing: bool
    softcap: bool


# A number per row is a column, (n, 1).


def _stack(*columns: Tensor) -> Tensor:
    return torch.stack([column.squeeze(1) for column in columns])


def _columns(stats: Tensor) -> tuple[Tensor, ...]:
    return stats.unsqueeze(2).unbind(0)


def _loaded(*columns: Tensor) -> tuple[Tensor, ...]:
    """The same columns as parts of one written tensor, so that the loops over the classes load their numbers.

    Otherwise Inductor derives them again for every vector of classes.
    """
    return _columns(_stack(*columns))


def _capped(logits: Tensor, numbers: Numbers, flags: Flags) -> Tensor:
    z = logits.to(compute_dtype(logits.dtype))
    return numbers.softcap * torch.tanh(z / numbers.softcap) if flags.softcap else z


def _smoothed(y: Tensor, numbers: Numbers, num_classes: int) -> Tensor:
    return (1 - numbers.label_smoothing) * y + numbers.label_smoothing / num_classes


def _at_target(z: Tensor, target: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: whether it is counted, its target class (0 if that is out of range), and the logit there."""
    target = target[:, None]
    counted = target != numbers.ignore_index
    index = torch.where((target >= 0) & (target < z.shape[1]), target, 0)
    return counted, index, z.gather(1, index)


def _offset(exp_sum: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """off, what its rounding lost, and exp(-off).

    In float32 off is rounded by up to 1e-6. That would move every t of the row by as much, the same way, and where the
    u of many classes cancel in their sum it is this common error that does not.
    """
    off = exp_sum.log() + numbers.log_c
    scaled = exp_sum * numbers.c
    return off, scaled * (-off).exp() - 1, 1 / scaled


def _coin(d: Tensor, e: Tensor, off: Tensor, lost: Tensor, e_off: Tensor) -> tuple[Tensor, Tensor]:
    """t and μ, from d, e = exp(d) and the columns of `_offset`."""
    x = e * e_off
    # At -inf logits t stays finite, so that nothing multiplies 0 by infinity; exp(-1e4) is 0 in every dtype. (Here
    # torch.where is clamp, NaN included, in fewer instructions. A named constant would become an input of the graph.)
    t = torch.where(d < -1e4, -1e4, d) - off - lost
    return t, torch.where(x > 1, 1, x) / (1 + x)


def minus_log1p(mu: Tensor) -> Tensor:
    """-log(1 - μ), from a logarithm and the rounding error of its argument.

    Not log1p: Sleef's, for AVX-512, loads a constant under an empty mask, and where that page of the library was
    never touched each such load is a fault that the processor suppresses, at 20 times the cost of the logarithm.
    """
    r = 1 - mu
    return (r - 1 + mu) - r.log()


def _u(t: Tensor, mu: Tensor) -> Tensor:
    return t * mu * (1 - mu)


def _h_and_u(d: Tensor, e: Tensor, *offset: Tensor) -> tuple[Tensor, Tensor]:
    t, mu = _coin(d, e, *offset)
    return t.abs() * mu + minus_log1p(mu), _u(t, mu)


def _sums_of_h_and_u(d: Tensor, e: Tensor, *offset: Tensor) -> tuple[Tensor, Tensor]:
    """Over all classes, with one logarithm for four classes: Π (1 - μ) is kept as 1 - M, so that no digit is lost.

    The four lie a quarter of the row apart, so that each quarter is read as it lies in memory; what does not divide by
    four comes after them (four to seven classes, as a slice of none or one would be a compilation of its own).
    """
    num_classes = d.shape[1]
    if num_classes < 12:
        h, u = _h_and_u(d, e, *offset)
        return h.sum(1, keepdim=True), u.sum(1, keepdim=True)
    quarter = num_classes // 4 - 1
    h = u = M = 0.0
    for i in range(4):
        part = slice(i * quarter, (i + 1) * quarter)
        t, mu = _coin(d[:, part], e[:, part], *offset)
        h, u, M = h + t.abs() * mu, u + _u(t, mu), M + mu * (1 - M)
    h = h + minus_log1p(M)
    rest = slice(4 * quarter, None)
    h_rest, u_rest = _h_and_u(d[:, rest], e[:, rest], *offset)
    return (
        h.sum(1, keepdim=True) + h_rest.sum(1, keepdim=True),
        u.sum(1, keepdim=True) + u_rest.sum(1, keepdim=True),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The passes, that leave exp(d) to each other in `e`. Row numbers come and go
# as (count, n).


def lse_pass(logits, target, weight, e, numbers: Numbers, flags: Flags) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega; fills ``e``."""
    z = _capped(logits, numbers, flags)
    num_classes = z.shape[1]
    m = z.amax(1, keepdim=True)
    d = z - m
    exp_d = d.exp()
    e.copy_(exp_d)
    # In float32 the small exponentials would be lost beside the large ones: 5e-6 of the sum at K = 131072.
    wide = z.dtype if z.device.type == "mps" else torch.float64
    exp_sum = exp_d.sum(1, keepdim=True, dtype=wide).to(z.dtype)
    if target.dim() == 2:
        y = target.to(z.dtype)
        omega = torch.ones_like(m) if weight is None else (y * weight).sum(1, keepdim=True)
        y = _smoothed(y, numbers, num_classes)
        y = y if weight is None else y * weight
        y_sum, yz_sum = y.sum(1, keepdim=True), torch.where(y == 0, 0, y * d).sum(1, keepdim=True)
    else:
        _, index, z_g = _at_target(z, target, numbers)
        omega = torch.ones_like(z_g) if weight is None else weight[index]
        omega = torch.where(index == target[:, None], omega, torch.nan)
        y_g = (1 - numbers.label_smoothing) * omega
        y_sum, yz_sum = y_g, y_g * (z_g - m)
        if flags.smoothing:
            share = numbers.label_smoothing / num_classes
            y_sum = y_sum + share * (num_classes if weight is None else weight.sum())
            wz = d if weight is None else torch.where(weight == 0, 0, d * weight)
            yz_sum = yz_sum + share * wz.sum(1, keepdim=True)
    return _stack(m, exp_sum, y_sum, yz_sum, omega)


def sums_pass(logits, target, lse, e, numbers: Numbers, flags: Flags) -> tuple[Tensor, Tensor]:
    """h_sum, u_sum; loss, H, S, α lse²."""
    z = _capped(logits, numbers, flags)
    m, exp_sum, y_sum, yz_sum, omega = _columns(lse)
    e = (z - m).exp() if e is None else e
    offset = _loaded(*_offset(exp_sum, numbers))
    if target.dim() == 2:
        h, u = _h_and_u(z - m, e, *offset)
        wrong = 1 - _smoothed(target.to(z.dtype), numbers, z.shape[1])
        h_sum, u_sum = (wrong * h).sum(1, keepdim=True), (wrong * u).sum(1, keepdim=True)
    else:
        counted, _, z_g = _at_target(z, target, numbers)
        h, u = _sums_of_h_and_u(z - m, e, *offset)
        h_g, u_g = _h_and_u(z_g - m, (z_g - m).exp(), *offset)
        all_classes, at_target = 1 - numbers.label_smoothing / z.shape[1], 1 - numbers.label_smoothing
        h_sum, u_sum = all_classes * h - at_target * h_g, all_classes * u - at_target * u_g

    log_sum = exp_sum.log()
    cross_entropy = y_sum * log_sum - yz_sum
    regularizer = omega * h_sum
    z_penalty = numbers.z_loss * omega * (m + log_sum).square()
    losses = _stack(cross_entropy - numbers.reg_weight * regularizer + z_penalty, cross_entropy, regularizer, z_penalty)
    return _stack(h_sum, u_sum), losses if target.dim() == 2 else torch.where(counted.t(), losses, 0)


def gradient_pass(logits, target, weight, stats, scale, e, out, numbers: Numbers, flags: Flags) -> Tensor | None:
    """Fills ``out``, or where that is None the logits, with the gradient.

    For class indices it returns the gradient at the targets, (n,), which is to be written over what stands there.
    """
    z = _capped(logits, numbers, flags)
    num_classes = z.shape[1]
    m, exp_sum, y_sum, _, omega, _, u_sum = _columns(stats)
    scale = scale.unsqueeze(1)
    share = numbers.label_smoothing / num_classes
    coef_p = scale * (y_sum + omega * (2 * numbers.z_loss * (m + exp_sum.log()) - numbers.reg_weight * u_sum))
    coef_u = scale * omega * numbers.reg_weight

    def gradient_at(z, e, m, off, lost, e_off, coef_e, coef_u, coef_1):
        gradient = coef_e * e + coef_u * _u(*_coin(z - m, e, off, lost, e_off)) - coef_1
        return gradient * (1 - (z / numbers.softcap).square()) if flags.softcap else gradient

    e = (z - m).exp() if e is None else e
    rows = (m, *_offset(exp_sum, numbers), coef_p / exp_sum)
    if target.dim() == 2:
        y = _smoothed(target.to(z.dtype), numbers, num_classes)
        *rows, coef_u, scale = _loaded(*rows, coef_u, scale)
        gradient = gradient_at(z, e, *rows, coef_u * (1 - y), scale * (y if weight is None else y * weight))
        at_target = None
    else:
        counted, index, z_g = _at_target(z, target, numbers)
        y_g = 1 - numbers.label_smoothing
        wy_g = y_g * omega + (share if weight is None else share * weight[index])
        at_target = gradient_at(z_g, (z_g - m).exp(), *rows, coef_u * (1 - share - y_g), scale * wy_g)
        at_target = torch.where(counted, at_target, 0).squeeze(1)
        *rows, coef_1, counted = _loaded(*rows, coef_u * (1 - share), scale * share, counted.to(z.dtype))
        if not flags.smoothing:
            coef_1 = 0.0
        elif weight is not None:
            coef_1 = coef_1 * weight
        gradient = torch.where(counted != 0, gradient_at(z, e, *rows, coef_1), 0)
    (logits if out is None else out).copy_(gradient)
    return at_target
