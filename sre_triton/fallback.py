"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each primitive is a plain function on a block of rows, compiled once for every set of options and dtypes and then
called block after block. A block is small enough to stay in the processor's cache, so the matrix itself crosses
the memory bus once in and once out, however often the compiled loops walk over a block. Without a C++ compiler the
same blocks run uncompiled.

Per class, from d = z - m (m the row's maximum) and off = log exp_sum + log c:

    t = d - off        = log(p / c)
    x = exp(d) / exp(off)  = p / c, from the same exponential as p
    μ = min(x, 1) / (1 + x)    the smaller of the coin's two probabilities
    h = |t| μ - log1p(-μ)      the coin's entropy
    u = t μ (1 - μ)            = -dh/dt

and the gradient is  coef_p p + coef_u u - coef_1  with the target's own value written over it.
"""

import functools
import itertools
import types
import warnings
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .ops import primitive
from .reference import compute_dtype

# Bytes of logits, in the dtype of the arithmetic, in one block of rows. 4 MiB was best or within 5 % of the best of
# 1, 2, 4 and 8 at K = 1000, 32768 and 262144 (fp32, 2 cores).
BLOCK_BYTES = 4 * 2**20


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


NO_COMPILER = (
    "sre_triton found no usable C++ compiler ({}), so the loss runs uncompiled, several times slower. "
    "Install g++ and Python's headers (Debian, Ubuntu: apt install g++ python3-dev; macOS: xcode-select --install; "
    "Windows: the Visual Studio build tools), or set CXX to a compiler."
)


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics of one block of rows. A number per row is a column, (n, 1).


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


def _minus_log1p(mu: Tensor) -> Tensor:
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
    return t.abs() * mu + _minus_log1p(mu), _u(t, mu)


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
    h = h + _minus_log1p(M)
    rest = slice(4 * quarter, None)
    h_rest, u_rest = _h_and_u(d[:, rest], e[:, rest], *offset)
    return (
        h.sum(1, keepdim=True) + h_rest.sum(1, keepdim=True),
        u.sum(1, keepdim=True) + u_rest.sum(1, keepdim=True),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled: three passes over a block of rows, that leave exp(d) to each other in `e`. Row numbers come and go
# as (count, n).


def _lse_pass(logits, target, weight, e, numbers: Numbers, flags: Flags) -> Tensor:
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


def _sums_pass(logits, target, lse, e, numbers: Numbers, flags: Flags) -> tuple[Tensor, Tensor]:
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


def _gradient_pass(logits, target, weight, stats, scale, e, out, numbers: Numbers, flags: Flags) -> Tensor | None:
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


@functools.cache
def _compiled(function: Callable, flags: Flags, *key) -> Callable:
    """The compiled function, one for each key.

    ``torch.compile`` keeps what it compiled, and counts it against its limit of recompilations, by code object. Each
    key gets a code object of its own, so that no set of options pushes another one out.
    """

    def body(*args):
        return function(*args, flags)

    code = body.__code__.replace(co_name=function.__name__)
    return torch.compile(types.FunctionType(code, globals(), closure=body.__closure__), dynamic=True, fullgraph=True)


_has_compiler = True


def _call(function: Callable, flags: Flags, logits: Tensor, *args):
    """One pass over one block of rows, compiled where there is a compiler."""
    global _has_compiler
    if _has_compiler and logits.numel():
        num_rows, num_classes = logits.shape
        device = logits.device.type
        key = (
            *(arg if arg is None else (arg.dtype, arg.dim()) for arg in (logits, *args[:-1])),
            # What torch.compile compiles again for as well: shapes and modes.
            (num_rows == 1, num_classes == 1, num_classes < 12),
            (torch.is_inference_mode_enabled(), logits.is_inference()),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            torch.are_deterministic_algorithms_enabled(),
        )
        try:
            return _compiled(function, flags, device, *key)(logits, *args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            missing = (torch._inductor.exc.InvalidCxxCompiler, torch._inductor.exc.CppCompileError)
            if not isinstance(error.inner_exception, missing):
                raise
            _has_compiler = False
            warnings.warn(NO_COMPILER.format(type(error.inner_exception).__name__), RuntimeWarning, stacklevel=2)
    return function(logits, *args, flags)


def _by_blocks(logits: Tensor, compute: Callable, *, scratch: bool) -> list[Tensor]:
    """``compute(rows, z, e)`` for each block of rows, z its logits, e scratch; puts together what it returns."""
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    # At least two rows a block: a dimension of one is a compilation of its own.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    logits = logits.detach()
    e = logits.new_empty(-(-num_rows // num_blocks), num_classes, dtype=dtype) if scratch else None
    with torch.no_grad():
        parts = [
            compute(slice(start, stop), logits[start:stop].contiguous(), e[: stop - start] if scratch else None)
            for start, stop in itertools.pairwise(bounds)
        ]
        return list(parts[0]) if num_blocks == 1 else [torch.cat(numbers, -1) for numbers in zip(*parts, strict=True)]


def _gradient(logits, gradient, rows, z, target, weight, stats, scale, e, numbers: Numbers, flags: Flags) -> None:
    """One block of the gradient, which may be the logits."""
    inplace = gradient is logits
    out = None if inplace else gradient[rows]
    at_target = _call(_gradient_pass, flags, z, target, weight, stats, scale, e, out, numbers)
    out = z if inplace else out
    if at_target is not None:
        index = torch.where((target >= 0) & (target < out.shape[1]), target, 0)
        out.scatter_(1, index.unsqueeze(1), at_target.unsqueeze(1).to(out.dtype))
    if inplace and not logits.is_contiguous():
        logits[rows].copy_(z)


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options: c, λ', ignore_index, ε, α, and the softcap or 0.


def _prepared(logits, target, weight, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap):
    """Target and weight in the dtypes of the arithmetic, and the options as the passes take them."""
    dtype = compute_dtype(logits.dtype)
    numbers = Numbers(
        c.to(dtype),
        c.double().log().to(dtype),
        reg_weight.to(dtype),
        torch.tensor(ignore_index, device="cpu"),
        torch.tensor(label_smoothing, dtype=dtype, device="cpu"),
        torch.tensor(z_loss, dtype=dtype, device="cpu"),
        torch.tensor(softcap, dtype=dtype, device="cpu"),
    )
    flags = Flags(smoothing=label_smoothing > 0, softcap=softcap > 0)
    target = target.contiguous() if target.dim() == 2 else target.long()
    return target, None if weight is None else weight.to(dtype), numbers, flags


def _fill_gradient(gradient, logits, target, weight, stats, scale, *options) -> None:
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)
    scale = scale.contiguous()

    def compute(rows, z, e):
        block_stats = stats[:, rows].contiguous()
        _gradient(logits, gradient, rows, z, target[rows], weight, block_stats, scale[rows], None, numbers, flags)
        return ()

    _by_blocks(logits, compute, scratch=False)


def _losses_and_fill_gradient(gradient, logits, target, weight, scale, *options) -> Tensor:
    target, weight, numbers, flags = _prepared(logits, target, weight, *options)
    scale = scale.contiguous()

    def compute(rows, z, e):
        lse = _call(_lse_pass, flags, z, target[rows], weight, e, numbers)
        sums, losses = _call(_sums_pass, flags, z, target[rows], lse, e, numbers)
        stats = torch.cat([lse, sums])
        _gradient(logits, gradient, rows, z, target[rows], weight, stats, scale[rows], e, numbers, flags)
        return (losses,)

    return _by_blocks(logits, compute, scratch=True)[0]


@primitive("compile")
def row_lse(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) class indices or (N, K) probabilities
    weight: Optional[Tensor],  # (K,)
    c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (5, N)
    """m, exp_sum, y_sum, yz_sum, omega of each row."""
    target, weight, numbers, flags = _prepared(
        logits, target, weight, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap
    )

    def compute(rows, z, e):
        return (_call(_lse_pass, flags, z, target[rows], weight, e, numbers),)

    return _by_blocks(logits, compute, scratch=True)[0]


@primitive("compile")
def row_sums(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    stats: Tensor,  # (5, N), from row_lse
    c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (2, N)
    """h_sum and u_sum of each row."""
    target, _, numbers, flags = _prepared(
        logits, target, None, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap
    )

    def compute(rows, z, e):
        return _call(_sums_pass, flags, z, target[rows], stats[:, rows].contiguous(), None, numbers)[:1]

    return _by_blocks(logits, compute, scratch=False)[0]


@primitive("compile")
def row_loss(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # losses (4, N), stats (7, N)
    """The losses of each row, and the statistics from which row_gradient goes on."""
    target, weight, numbers, flags = _prepared(
        logits, target, weight, c, reg_weight, ignore_index, label_smoothing, z_loss, softcap
    )

    def compute(rows, z, e):
        lse = _call(_lse_pass, flags, z, target[rows], weight, e, numbers)
        sums, losses = _call(_sums_pass, flags, z, target[rows], lse, e, numbers)
        return losses, torch.cat([lse, sums])

    losses, stats = _by_blocks(logits, compute, scratch=True)
    return losses, stats


@primitive("compile")
def row_gradient(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    stats: Tensor,  # (7, N), from row_lse and row_sums
    scale: Tensor,  # (N,), what the gradient is multiplied by before it is rounded
    c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (N, K), the dtype of logits
    """The gradient of scale * loss."""
    options = (c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    gradient = logits.new_empty(logits.shape)
    _fill_gradient(gradient, logits, target, weight, stats, scale, *options)
    return gradient


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    scale: Tensor,  # (N,)
    c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # losses (4, N), gradient (N, K)
    """The losses of each row and the gradient of scale * loss, from one read of the logits."""
    options = (c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    gradient = logits.new_empty(logits.shape)
    return _losses_and_fill_gradient(gradient, logits, target, weight, scale, *options), gradient


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    _fill_gradient(logits, logits, target, weight, stats, scale, *options)
    return logits.detach()


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    losses = _losses_and_fill_gradient(logits, logits, target, weight, scale, *options)
    return losses, logits.detach()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
