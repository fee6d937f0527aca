"""The primitives through ``torch.compile``: for machines without Triton, and for float64.

Each primitive is a plain function on a block of rows, compiled once for every set of options and dtypes and then
called block after block. A block is small enough to stay in the processor's cache, so the matrix itself crosses
the memory bus once in and once out, however often the compiled loops walk over a block. Without a C++ compiler the
same blocks run uncompiled.

Per class, from d = z - m (m the row's maximum) and off = log_sum + log c:

    t = d - off        = log(p / c)
    x = exp(d) / exp(off)  = p / c, from the same exponential as p
    μ = min(x, 1) / (1 + x)    the smaller of the coin's two probabilities
    h = |t| μ - log1p(-μ)      the coin's entropy
    u = t μ (1 - μ)            = -dh/dt

and the gradient is  coef_p p + coef_u u - coef_1  with the target's own value written over it.
"""

import functools
import types
import warnings
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .ops import primitive
from .reference import compute_dtype

# Bytes of logits, in the dtype of the arithmetic, in one block of rows. 4 MiB was best or within 5 % of the best of
# 1, 2, 4 and 8 at K = 1000, 32768 and 262144 (fp32, 2 cores with 1 MiB of L2 each).
BLOCK_BYTES = 4 * 2**20

# exp(-FAR) is 0 in every dtype: where -inf logits are put, so that nothing multiplies 0 by infinity.
FAR = 1e4


class Numbers(NamedTuple):
    """The scalar options as 0-dim tensors, so that another value is not another compilation."""

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


def _coin(d: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """t and μ."""
    d = d.clamp_min(-FAR)
    x = d.exp() * (-off).exp()
    return d - off, x.clamp_max(1) / (1 + x)


def _h(t: Tensor, mu: Tensor) -> Tensor:
    return t.abs() * mu - torch.log1p(-mu)


def _u(t: Tensor, mu: Tensor) -> Tensor:
    return t * mu * (1 - mu)


def _row_lse(z: Tensor, target: Tensor, weight: Tensor | None, numbers: Numbers, flags: Flags) -> tuple[Tensor, ...]:
    """m, log_sum, y_sum, yz_sum, omega."""
    num_classes = z.shape[1]
    m = z.amax(1, keepdim=True)
    d = z - m
    log_sum = d.clamp_min(-FAR).exp().sum(1, keepdim=True).log()
    if target.dim() == 2:
        y = target.to(z.dtype)
        omega = (y if weight is None else y * weight).sum(1, keepdim=True)
        y = _smoothed(y, numbers, num_classes)
        y = y if weight is None else y * weight
        return m, log_sum, y.sum(1, keepdim=True), torch.where(y == 0, 0, y * d).sum(1, keepdim=True), omega

    _, index, z_g = _at_target(z, target, numbers)
    omega = torch.ones_like(z_g) if weight is None else weight[index]
    omega = torch.where(index == target[:, None], omega, torch.nan)
    y_g = (1 - numbers.label_smoothing) * omega
    y_sum, yz_sum = y_g, y_g * (z_g - m)
    if flags.smoothing:
        share = numbers.label_smoothing / num_classes
        y_sum = y_sum + share * (num_classes if weight is None else weight.sum())
        yz_sum = yz_sum + share * (d if weight is None else torch.where(weight == 0, 0, d * weight)).sum(1, keepdim=True)
    return m, log_sum, y_sum, yz_sum, omega


def _row_sums(z: Tensor, target: Tensor, stats: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
    """s_sum, u_sum."""
    m, log_sum = stats[:2]
    off = log_sum + numbers.log_c
    t, mu = _coin(z - m, off)
    h, u = _h(t, mu), _u(t, mu)
    if target.dim() == 2:
        wrong = 1 - _smoothed(target.to(z.dtype), numbers, z.shape[1])
        return (wrong * h).sum(1, keepdim=True), (wrong * u).sum(1, keepdim=True)

    _, _, z_g = _at_target(z, target, numbers)
    t_g, mu_g = _coin(z_g - m, off)
    all_classes = 1 - numbers.label_smoothing / z.shape[1]
    at_target = 1 - numbers.label_smoothing
    s_sum = all_classes * h.sum(1, keepdim=True) - at_target * _h(t_g, mu_g)
    u_sum = all_classes * u.sum(1, keepdim=True) - at_target * _u(t_g, mu_g)
    return s_sum, u_sum


def _losses(target: Tensor, stats: tuple[Tensor, ...], numbers: Numbers) -> tuple[Tensor, ...]:
    """loss, H, S, α lse²."""
    m, log_sum, y_sum, yz_sum, omega, s_sum, _ = stats
    cross_entropy = y_sum * log_sum - yz_sum
    regularizer = omega * s_sum
    z_penalty = numbers.z_loss * omega * (m + log_sum).square()
    losses = (cross_entropy - numbers.reg_weight * regularizer + z_penalty, cross_entropy, regularizer, z_penalty)
    if target.dim() == 2:
        return losses
    counted = target[:, None] != numbers.ignore_index
    return tuple(torch.where(counted, number, 0) for number in losses)


def _row_gradient(
    z: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: tuple[Tensor, ...],
    scale: Tensor,
    numbers: Numbers,
    flags: Flags,
) -> tuple[Tensor, Tensor | None]:
    """The gradient, and for class indices its value at the target, (1, n), to be written over it."""
    m, log_sum, y_sum, _, omega, _, u_sum = stats
    num_classes = z.shape[1]
    off = log_sum + numbers.log_c
    share = numbers.label_smoothing / num_classes
    coef_p = scale * (y_sum + omega * (2 * numbers.z_loss * (m + log_sum) - numbers.reg_weight * u_sum))
    coef_u = scale * omega * numbers.reg_weight

    def elementwise(z, coef_u, w_y):
        d = z - m
        p = d.clamp_min(-FAR).exp() * (-log_sum).exp()
        gradient = coef_p * p + coef_u * _u(*_coin(d, off)) - w_y
        return gradient * (1 - (z / numbers.softcap).square()) if flags.softcap else gradient

    if target.dim() == 2:
        y = _smoothed(target.to(z.dtype), numbers, num_classes)
        return elementwise(z, coef_u * (1 - y), scale * (y if weight is None else y * weight)), None

    counted, index, z_g = _at_target(z, target, numbers)
    w_y = scale * (share if weight is None else share * weight) if flags.smoothing else 0.0
    w_y_g = scale * share * (1.0 if weight is None else weight[index]) if flags.smoothing else 0.0
    coef_u_all, y_g = coef_u * (1 - share), 1 - numbers.label_smoothing
    gradient = elementwise(z, coef_u_all, w_y)
    at_target = elementwise(z_g, coef_u_all - y_g * coef_u, w_y_g + scale * y_g * omega)
    return torch.where(counted, gradient, 0), torch.where(counted, at_target, 0).t()


# ---------------------------------------------------------------------------------------------------------------------
# What is compiled: one block of rows. It returns numbers per row and writes the gradient into `out`, or over the
# logits.


def _stack(columns: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([column.squeeze(1) for column in columns])


def _columns(stats: Tensor) -> tuple[Tensor, ...]:
    return stats.unsqueeze(2).unbind(0)


def _lse_block(logits, target, weight, stats, scale, out, numbers, flags):
    return (_stack(_row_lse(_capped(logits, numbers, flags), target, weight, numbers, flags)),)


def _sums_block(logits, target, weight, stats, scale, out, numbers, flags):
    return (_stack(_row_sums(_capped(logits, numbers, flags), target, _columns(stats), numbers)),)


def _loss_block(logits, target, weight, stats, scale, out, numbers, flags):
    z = _capped(logits, numbers, flags)
    lse = _row_lse(z, target, weight, numbers, flags)
    stats = lse + _row_sums(z, target, lse, numbers)
    return _stack(_losses(target, stats, numbers)), _stack(stats)


def _gradient_block(logits, target, weight, stats, scale, out, numbers, flags):
    z = _capped(logits, numbers, flags)
    gradient, at_target = _row_gradient(z, target, weight, _columns(stats), scale.unsqueeze(1), numbers, flags)
    (logits if out is None else out).copy_(gradient)
    return (at_target,)


def _loss_and_gradient_block(logits, target, weight, stats, scale, out, numbers, flags):
    z = _capped(logits, numbers, flags)
    lse = _row_lse(z, target, weight, numbers, flags)
    stats = lse + _row_sums(z, target, lse, numbers)
    gradient, at_target = _row_gradient(z, target, weight, stats, scale.unsqueeze(1), numbers, flags)
    (logits if out is None else out).copy_(gradient)
    return _stack(_losses(target, stats, numbers)), at_target


@functools.cache
def _compiled(block: Callable, flags: Flags, *key) -> Callable:
    """The compiled block, one for each key.

    ``torch.compile`` keeps what it compiled, and counts it against its limit of recompilations, by code object. Each
    key gets a code object of its own, so that no set of options pushes another one out.
    """

    def body(*args):
        return block(*args, flags)

    body = types.FunctionType(body.__code__.replace(co_name=block.__name__), globals(), None, None, body.__closure__)
    return torch.compile(body, dynamic=True, fullgraph=True)


_has_compiler = True


def _call(block: Callable, logits, target, weight, stats, scale, out, numbers, flags: Flags):
    """One block of rows, compiled where there is a compiler."""
    global _has_compiler
    args = (logits, target, weight, stats, scale, out, numbers)
    if _has_compiler and logits.numel():
        key = (logits.dtype, logits.device.type, target.dtype, target.dim(), weight is None, out is None)
        try:
            return _compiled(block, flags, *key)(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            missing = (torch._inductor.exc.InvalidCxxCompiler, torch._inductor.exc.CppCompileError)
            if not isinstance(error.inner_exception, missing):
                raise
            _has_compiler = False
            warnings.warn(NO_COMPILER.format(type(error.inner_exception).__name__), RuntimeWarning, stacklevel=2)
    return block(*args, flags)


def _run(block: Callable, logits, target, weight, stats, scale, gradient, numbers: Numbers, flags: Flags):
    """``block`` on blocks of rows: returns its numbers, put together, and fills ``gradient`` (it may be ``logits``)."""
    num_rows, num_classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    indices = target.dim() == 1
    target = target.long() if indices else target
    weight = None if weight is None else weight.to(dtype)
    inplace = gradient is logits

    def part(rows):
        z = logits[rows].contiguous()
        returned = _call(
            block,
            z,
            target[rows].contiguous(),
            weight,
            None if stats is None else stats[:, rows].contiguous(),
            None if scale is None else scale[rows].contiguous(),
            None if gradient is None or inplace else gradient[rows],
            numbers,
            flags,
        )
        if inplace and not logits.is_contiguous():
            logits[rows].copy_(z)
        return returned

    # At least two rows a block: a dimension of one is a compilation of its own.
    num_blocks = max(1, min(num_rows * num_classes * dtype.itemsize // BLOCK_BYTES, num_rows // 2))
    bounds = [num_rows * i // num_blocks for i in range(num_blocks + 1)]
    with torch.no_grad():
        parts = [part(slice(*ends)) for ends in zip(bounds, bounds[1:], strict=False)]
        returned = parts[0] if num_blocks == 1 else [torch.cat(numbers, 1) for numbers in zip(*parts, strict=True)]
        if gradient is not None and indices:
            index = torch.where((target >= 0) & (target < num_classes), target, 0)
            gradient.scatter_(1, index.unsqueeze(1), returned[-1].t().to(gradient.dtype))
    return returned


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options: log c, λ', ignore_index, ε, α, and the softcap or 0.


def _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap) -> tuple[Numbers, Flags]:
    dtype = compute_dtype(logits.dtype)
    numbers = Numbers(
        log_c.to(dtype),
        reg_weight.to(dtype),
        torch.tensor(ignore_index),
        torch.tensor(label_smoothing, dtype=dtype),
        torch.tensor(z_loss, dtype=dtype),
        torch.tensor(softcap, dtype=dtype),
    )
    return numbers, Flags(smoothing=label_smoothing > 0, softcap=softcap > 0)


@primitive("compile")
def row_lse(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) class indices or (N, K) probabilities
    weight: Optional[Tensor],  # (K,)
    log_c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (5, N)
    options = _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    return _run(_lse_block, logits, target, weight, None, None, None, *options)[0]


@primitive("compile")
def row_sums(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    stats: Tensor,  # (5, N), from row_lse
    log_c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (2, N)
    options = _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    return _run(_sums_block, logits, target, None, stats, None, None, *options)[0]


@primitive("compile")
def row_loss(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    log_c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # losses (4, N), stats (7, N)
    options = _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    losses, stats = _run(_loss_block, logits, target, weight, None, None, None, *options)
    return losses, stats


@primitive("compile")
def row_gradient(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    stats: Tensor,  # (7, N), from row_lse and row_sums
    scale: Tensor,  # (N,), what the gradient is multiplied by before it is rounded
    log_c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Tensor:  # (N, K), the dtype of logits
    gradient = logits.new_empty(logits.shape)
    options = _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    _run(_gradient_block, logits, target, weight, stats, scale, gradient, *options)
    return gradient


@primitive("compile")
def row_loss_and_gradient(
    logits: Tensor,  # (N, K)
    target: Tensor,  # (N,) or (N, K)
    weight: Optional[Tensor],  # (K,)
    scale: Tensor,  # (N,)
    log_c: Tensor,  # ()
    reg_weight: Tensor,  # ()
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # losses (4, N), gradient (N, K)
    gradient = logits.new_empty(logits.shape)
    options = _options(logits, log_c, reg_weight, ignore_index, label_smoothing, z_loss, softcap)
    losses = _run(_loss_and_gradient_block, logits, target, weight, None, scale, gradient, *options)[0]
    return losses, gradient


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits, in eager code only."""
    _run(_gradient_block, logits, target, weight, stats, scale, logits, *_options(logits, *options))
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits, in eager code only."""
    losses = _run(_loss_and_gradient_block, logits, target, weight, None, scale, logits, *_options(logits, *options))[0]
    torch.autograd.graph.increment_version(logits)
    return losses, logits.detach()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place; by 1 costs nothing on a CPU."""
    if factor.dim() == 0 and factor.device.type == "cpu" and factor == 1:
        return gradient
    return gradient.mul_(factor.unsqueeze(-1))
