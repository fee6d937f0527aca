"""The mathematics of one class, as the fallback computes it: the coin whose odds are p : c.

From d = z - m (m the row's maximum) and off = log exp_sum + log c:

    t = d - off        = log(p / c)
    x = exp(d) / exp(off)  = p / c, from the same exponential as p
    μ = min(x, 1) / (1 + x)    the smaller of the coin's two probabilities
    h = |t| μ - log1p(-μ)      its entropy
    u = t μ (1 - μ)            = -dh/dt
"""

import math

import torch
from torch import Tensor

# Of many logits, uncompiled, exp is a power of 2: torch.exp, which is MKL's, takes four times as long on an AMD EPYC,
# measured. The product loses |d| 2^-24 of e. S sees it where p is near c: too much of it where c is less than this.
LOG2_E, LEAST_C = math.log2(math.e), 1e-8


def exp_in(scratch: Tensor | None, d: Tensor, power_of_2: bool) -> Tensor:
    """exp d; the scratch is written over."""
    return d.exp() if scratch is None or not power_of_2 else torch.mul(d, LOG2_E, out=scratch).exp2()


def offset_of(exp_sum: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """off, what its rounding lost, and exp(-off).

    In float32 off is rounded by up to 1e-6. That would move every t of the row by as much, the same way, and where the
    u of many classes cancel in their sum it is this common error that does not.
    """
    off = exp_sum.log() + c.log()
    scaled = exp_sum * c
    return off, scaled * (-off).exp() - 1, 1 / scaled


def coin(d: Tensor, e: Tensor, off: Tensor, lost: Tensor, e_off: Tensor) -> tuple[Tensor, Tensor]:
    """t and μ, from d, e = exp(d) and the three of `offset_of`."""
    x = e * e_off
    # At -inf logits t stays finite, so that nothing multiplies 0 by infinity; exp(-1e4) is 0 in every dtype. (Here
    # torch.where is clamp, NaN included, in fewer instructions. A named constant would become an input of the graph.)
    t = torch.where(d < -1e4, -1e4, d) - off - lost
    return t, torch.where(x > 1, 1, x) / (1 + x)


def minus_log1p_over(mu: Tensor) -> Tensor:
    """-log(1 - μ) / μ for μ from 0 to 1/2.

    In float32 a polynomial of degree 9, off by 6e-9 at most (mpmath.chebyfit): a third of the instructions of a
    logarithm, and no digit is lost at small μ.
    """
    if mu.dtype == torch.float64:
        return torch.where(mu == 0, 1, -torch.log1p(-mu) / mu)
    p = 1.733611947 * mu - 2.458961878
    p = p * mu + 1.959870572
    p = p * mu - 0.5900887025
    p = p * mu + 0.3407464713
    p = p * mu + 0.1754407727
    p = p * mu + 0.2519567943
    p = p * mu + 0.333255162
    p = p * mu + 0.5000011986
    return p * mu + 0.999999997


def h_of(t: Tensor, mu: Tensor) -> Tensor:
    """The coin's entropy."""
    return mu * (t.abs() + minus_log1p_over(mu))


def u_of(t: Tensor, mu: Tensor) -> Tensor:
    """-dh/dt."""
    return t * mu * (1 - mu)
