"""The mathematics of one tile, (ROWS, BLOCK_K) classes in registers: each formula once, for all kernels.

Logarithms have the base 2, as the hardware's have: what passes.py calls d, t, h and u is divided by log 2 here.

    d = (z - m) log2 e          m the row's maximum
    e = 2^d                     p = e / s, s the sum of e over the row
    t = d - log2(s c)           = log2(p / c)
    x = e / (s c)               = p / c, from the same exponential as p
    μ = min(x, 1) / (1 + x)     the smaller of the coin's two probabilities
    h = |t| μ - log2(1 - μ)     the coin's entropy, in bits
    u = t μ (1 - μ)

A number per row is a vector, (ROWS,); numbers that meet a tile are columns, (ROWS, 1).
"""

import triton
import triton.language as tl

# A constexpr stands on the right: on the left of a tensor, the interpreter would make a constexpr of the result.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# 2^FLOOR is 0. It stands in for -inf, so that t is finite where it is multiplied by 0.
FLOOR = tl.constexpr(-1e4)

# Four classes share one logarithm. With eight, where all μ are 1/2, the 1 in 1 - Π(1 - μ) costs eight bits, 1.5e-6 of
# S; with four, 1e-7.
LOG2_GROUP = tl.constexpr(2)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of a number. PTX says whether NVIDIA's instructions are there; the interpreter and AMD take Triton's own.


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _log2(x, PTX: tl.constexpr):
    """To 2^-22 absolutely, for x from 1/16 to 1."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _minus_log2_1m(M, PTX: tl.constexpr):
    """-log2(1 - M); where 1 - M would lose digits of M, by the first five terms of its series."""
    series = M * (1.0 + M * (1 / 2 + M * (1 / 3 + M * (1 / 4 + M * (1 / 5)))))
    return tl.where(M < 0.05, series * LOG2_E, -_log2(1.0 - M, PTX))


@triton.jit
def _tanh(v):
    """To 2e-7 of itself. Near 0 it is v + v³ q(v²), q fitted to (tanh(v)/v - 1)/v² at Chebyshev nodes in v²."""
    w = v * v
    near = v + v * w * (-0.333333116 + w * (0.133305137 + w * (-0.0533910541 + w * 0.0179992182)))
    e = tl.exp2(tl.abs(v) * (-2 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.5, near, tl.where(v < 0, -far, far))


@triton.jit
def log2_parts(x):
    """(whole, rest) with log2 x = whole + rest and 0 <= rest < 1, for x >= 1e-37 or NaN.

    One rounded number would move the t of all classes of a row the same way, by up to 1e-6, and where the u of many
    classes cancel in their sum that is what does not.
    """
    bits = x.to(tl.int32, bitcast=True)
    whole = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return whole, tl.where(x == x, tl.log2(mantissa), x)


# ---------------------------------------------------------------------------------------------------------------------
# Functions of a tile, or of the rows' targets. A row's `numbers` are m, log2(s c) as whole + rest, and 1 / (s c).


@triton.jit
def load_logits(pointers, mask, softcap):
    """z in float32, -inf outside the mask."""
    z = tl.load(pointers, mask=mask, other=-INF).to(tl.float32)
    if softcap is not None:
        z = tl.where(mask, softcap * _tanh(z * (1.0 / softcap)), -INF)
    return z


@triton.jit
def finite_maximum(m):
    """What to subtract from logits whose maximum is m, which may be -inf."""
    return tl.where(m == -INF, 0.0, m)


@triton.jit
def columns(numbers):
    """A row's numbers, to meet a tile."""
    m, whole, rest, e_scale = numbers
    return m[:, None], whole[:, None], rest[:, None], e_scale[:, None]


@triton.jit
def _exp(z, m):
    """d and e, d finite also where z is -inf; NaN stays NaN."""
    d = tl.maximum((z - m) * LOG2_E, FLOOR, propagate_nan=tl.PropagateNan.ALL)
    return d, tl.exp2(d)


@triton.jit
def _coin(z, numbers, PTX: tl.constexpr):
    """e, t and μ."""
    m, whole, rest, e_scale = numbers
    d, e = _exp(z, m)
    x = e * e_scale
    return e, d - whole - rest, tl.minimum(x, 1.0) * _reciprocal(1.0 + x, PTX)


@triton.jit
def _u(t, mu):
    return t * (mu - mu * mu)


@triton.jit
def coin_h_and_u(z, numbers, PTX: tl.constexpr):
    """h and u, with a logarithm for every class."""
    _, t, mu = _coin(z, numbers, PTX)
    return tl.abs(t) * mu + _minus_log2_1m(mu, PTX), _u(t, mu)


@triton.jit
def sums_of_h_and_u(z, numbers, ADJACENT: tl.constexpr, PTX: tl.constexpr):
    """Over a tile's classes, with one logarithm for four of them, the Π(1 - μ) of a group kept as 1 - M.

    The classes of a group are ADJACENT where a thread holds adjacent classes, else spread evenly over the tile.
    """
    _, t, mu = _coin(z, numbers, PTX)
    M = mu
    for _ in tl.static_range(LOG2_GROUP):
        if ADJACENT:
            pairs = tl.reshape(M, (M.shape[0], M.shape[1] // 2, 2))
        else:
            pairs = tl.permute(tl.reshape(M, (M.shape[0], 2, M.shape[1] // 2)), (0, 2, 1))
        a, b = tl.split(pairs)
        M = a + (b - a * b)
    return tl.sum(tl.abs(t) * mu, 1) + tl.sum(_minus_log2_1m(M, PTX), 1), tl.sum(_u(t, mu), 1)


@triton.jit
def add_to_lse(lse, z, wy, given, HAS_Y: tl.constexpr, WEIGHTED: tl.constexpr):
    """m, s, Σ w y, Σ w y (z - m), and Σ w y before smoothing, with one more tile."""
    m_old, exp_sum, y_sum, yz_sum, omega = lse
    m = tl.maximum(m_old, tl.max(z, 1))
    exp_sum *= tl.where(m_old == m, 1.0, tl.exp2((m_old - m) * LOG2_E))
    reference = finite_maximum(m)[:, None]
    _, e = _exp(z, reference)
    exp_sum += tl.sum(e, 1)
    if HAS_Y:
        yz_sum += tl.where((m_old == m) | (y_sum == 0), 0.0, y_sum * (m_old - m))
        yz_sum += tl.sum(tl.where(wy == 0, 0.0, wy * (z - reference)), 1)
        y_sum += tl.sum(wy, 1)
        if WEIGHTED:
            omega += tl.sum(given, 1)
    return m, exp_sum, y_sum, yz_sum, omega


@triton.jit
def gradient_of(z, wy, numbers, coef_e, coef_u, scale, softcap, HAS_Y: tl.constexpr, PTX: tl.constexpr):
    """coef_e e + coef_u u - scale w y."""
    e, t, mu = _coin(z, numbers, PTX)
    gradient = coef_e * e + coef_u * _u(t, mu)
    if HAS_Y:
        gradient -= scale * wy
    if softcap is not None:
        ratio = z * (1.0 / softcap)
        gradient *= tl.where(z == -INF, 0.0, 1.0 - ratio * ratio)  # -inf only where nothing is read
    return gradient
