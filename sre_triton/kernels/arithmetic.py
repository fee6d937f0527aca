"""Functions of one number, of which all formulas are made, and the value of an option.

PTX says whether NVIDIA's instructions are there; the interpreter and AMD take Triton's own. Every function takes and
returns a block of any shape: one result for each element.
"""

import triton
import triton.language as tl

from .groups import INTERPRETED

# In a product with a tensor a constexpr stands on the right. With the constexpr on the left, the interpreter would make
# a constexpr of the result.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def fma(x, y, z):
    """x * y + z, of the shape of x, rounded once. The interpreter has no such instruction: float64 takes its place."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def less_product(x, y, z):
    """x - y z, of the shape of x, rounded once on a GPU.

    All formulas subtract products with this function, because the LLVM of Triton 3.8 cannot compile `x - y * z` for
    every Blackwell kernel. Blackwell has instructions for pairs of numbers. Where LLVM sees only after a shuffle of
    pairs that a product is subtracted, it makes a negation of a pair, and ends the process.
    """
    if INTERPRETED:
        return x - y * z
    else:
        return tl.fma(y * -1.0, z, x)  # not -y: Triton 3.6 and 3.7 make 0 - y of it, an instruction


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """1 / x, of the shape of x, right to 2^-23 of itself."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def exp2(x):
    """2^x, of the shape of x, right to 2^-22 of itself. Tests put an inexact function in its place."""
    return tl.exp2(x)


@triton.jit
def log2(x, PTX: tl.constexpr):
    """log2 x, of the shape of x, right to 2^-22: of itself, or absolutely where log2 x is near 0."""
    if PTX:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def minus_log2(P, M, PTX: tl.constexpr):
    """-log2 P, of the shape of P, where P = 1 - M and M is the more exact of the two.

    The entropy h needs it with M = μ, or with the M of several classes. For M = 1e-9, P is 1 in float32, and log2 P
    would be 0 instead of -1.44e-9. So a polynomial M q(M) takes over below M = 0.05. q is fitted to -log2(1 - M) / M at
    Chebyshev nodes, and M q(M) is right to 1.4e-8 of itself.
    """
    near = M * (1.44269502 + M * (0.721357346 + M * (0.479925036 + M * 0.391268671)))
    return tl.where(M < 0.05, near, -log2(P, PTX))


@triton.jit
def product_of_two(M_a, P_a, M_b, P_b):
    """(M, P) of the product of two factors P, where P = 1 - M and M is kept beside it: see `minus_log2`."""
    return M_a + less_product(M_b, M_a, M_b), P_a * P_b


@triton.jit
def tanh(v):
    """tanh v, of the shape of v, right to 2e-7 of itself. The softcap needs it.

    Far from 0 an exponential gives it. Near 0 the exponential would lose digits, so a polynomial takes over below |v| =
    0.5: v + v³ q(v²). q is fitted to (tanh(v)/v - 1)/v² at Chebyshev nodes in v².
    """
    w = v * v
    near = v + v * w * (-0.333333116 + w * (0.133305137 + w * (-0.0533910541 + w * 0.0179992182)))
    e = tl.exp2(tl.abs(v) * (-2 * LOG2_E))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.5, near, tl.where(v < 0, -far, far))


@triton.jit
def exp2_near_0(x):
    """2^x, of the shape of x, right to the last digit near x = 0.

    A correction of s by 2^lost needs it, where `lost` is most often tiny: the instruction is right to 2^-22 only.
    """
    y = x * LN_2
    return tl.where(tl.abs(x) < 0.001, 1.0 + (y + 0.5 * y * y), exp2(x))


@triton.jit
def log2_parts(x, PTX: tl.constexpr):
    """(whole, rest), of the shape of x: log2 x = whole + rest with 0 <= rest < 1, for x >= 1e-37 or NaN.

    The sum of the two would lose digits: log2 50257 = 15 + 0.617, and 15 takes four bits from the fraction. The
    exponent of the float is `whole`; `rest` is the logarithm of its mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    whole = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    return whole, log2(mantissa, PTX) + x * 0.0  # NaN stays NaN


@triton.jit
def value_of(option):
    """The value, (), of a scalar option that is in use: the number itself, or the one at the pointer.

    A pointer to the GPU's memory lets the host go on without a wait for the value.
    """
    if isinstance(option, float):  # in the interpreter
        return option
    elif option.dtype.is_ptr():
        return tl.load(option).to(tl.float32)
    else:
        return option
