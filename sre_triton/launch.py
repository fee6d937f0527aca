"""The primitives on a GPU: which variant of a kernel is launched, and how."""

import contextlib
import functools
import math

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from .kernels import row_gradient_kernel, row_loss_kernel, row_lse_kernel, row_sums_kernel
from .ops import NUM_LOSSES, NUM_LSE, NUM_STATS, NUM_SUMS, new_gradient, new_numbers, primitive
from .plan import Device, plan
from .rows import Inputs, Options, Variant
from .scalars import inverse_count_kernel, scale_gradient_kernel, scaled_sum_kernel

INTERPRETED = triton.knobs.runtime.interpret
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Hopper, Blackwell, Blackwell Ultra; the consumers' cards are newer, but have smaller clusters.
CLUSTERS_OF_16 = (90, 100, 103)
# One program reads the numbers of so many rows in a few microseconds; PyTorch's two launches take as long.
FEW_ROWS = 65536
# Programs that multiply a stored gradient: enough for the bandwidth of a GPU, and few to start and end if there is
# nothing to do.
SCALING_PROGRAMS = 1024
SCALING_TILE = 2048


@functools.cache
def _gpu(index: int | None) -> GPUTarget:
    """What Triton compiles for; the interpreter counts as a GPU of 32 lanes without instructions of its own."""
    return GPUTarget("interpreter", 90, 32) if INTERPRETED else triton.runtime.driver.active.get_current_target()


@functools.cache
def _device(index: int | None) -> Device:
    """What of it decides how a kernel is launched. The interpreter takes all ways of a new GPU, if a very small one."""
    gpu = _gpu(index)
    nvidia = gpu.backend in ("cuda", "interpreter")
    if INTERPRETED:
        properties = {"multiprocessor_count": 2, "max_shared_mem": 227 << 10}
    else:
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
    return Device(
        warp_size=gpu.warp_size,
        multiprocessors=properties["multiprocessor_count"],
        clusters=nvidia and gpu.arch in CLUSTERS_OF_16 and TRITON_VERSION >= (3, 8),
        shared_bytes=properties["max_shared_mem"] if nvidia and gpu.arch >= 80 else 0,
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _in_rows(matrix: Tensor) -> Tensor:
    """The matrix, as a copy where its rows do not lie one element after another."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _scalar(value: float | Tensor | None) -> float | Tensor | None:
    """The value of a tensor on the CPU; one on a GPU stays a tensor, as looking at it would wait for the GPU."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _options(c, reg_weight, ignore_index, label_smoothing, z_loss, softcap) -> Options:
    c = _scalar(c)
    whole = rest = None
    if isinstance(c, float):
        log2_c = math.log2(c)
        whole, rest = float(round(log2_c)), log2_c - round(log2_c)
    return Options(
        c=c,
        log2_c_whole=whole,
        log2_c_rest=rest,
        reg_weight=_scalar(reg_weight),
        ignore_index=ignore_index,
        label_smoothing=_scalar(label_smoothing),
        z_loss=_scalar(z_loss),
        softcap=_scalar(softcap),
    )


def _launch(kernel, logits: Tensor, target: Tensor, weight: Tensor | None, options: tuple, **arguments) -> None:
    """Launch a kernel over the rows of the logits, with the Inputs, Options and Variant for them."""
    num_rows, num_classes = logits.shape
    if num_rows == 0 or num_classes == 0:
        return
    opts, (first_class, all_classes) = _options(*options[:6]), options[6:] or (None, None)
    probabilities = target.dim() == 2
    logits, target = _in_rows(logits), _in_rows(target) if probabilities else target.contiguous()
    gradient = arguments.get("gradient_ptr")
    strides = [matrix.stride(0) for matrix in (logits, gradient, target) if matrix is not None and matrix.dim() == 2]
    # Divides K and the distance of rows, so that as many classes at a time are read and written: at most 16 bytes.
    vector = 16 // logits.element_size()
    align = math.gcd(vector, num_classes, *strides)
    if "gradient_ptr" in arguments:
        arguments["gradient_stride"] = 0 if gradient is None else gradient.stride(0) // align

    smoothed = opts.label_smoothing is not None
    has_y = probabilities or (smoothed and weight is not None)
    holds_rows = kernel is row_loss_kernel
    with _on(logits.device):
        gpu = _gpu(logits.device.index)
        how = plan(
            num_rows,
            num_classes,
            logits.element_size(),
            holds_rows=holds_rows,
            aligned=align == vector,
            plain=not has_y and opts.softcap is None,
            device=_device(logits.device.index),
        )
        window = align < vector and how.rows == 1 and (gradient is None or gradient.stride(0) == logits.stride(0))
        shortest = num_classes - 2 * (vector - 1) if window else num_classes
        if holds_rows:
            arguments["num_programs"] = how.programs
        if gpu.backend == "cuda":
            # Left to itself, ptxas spills to stay below 64 where 128 are free.
            arguments["maxnreg"] = how.registers
        kernel[(how.programs,)](
            inputs=Inputs(
                logits_ptr=logits,
                logits_stride=logits.stride(0) // align,
                target_ptr=target,
                target_stride=target.stride(0) // align if probabilities else 0,
                weight_ptr=None if weight is None else weight.contiguous(),
                num_rows=num_rows,
                num_classes=num_classes // align,
                first_class=None if all_classes is None else first_class,
                all_classes=all_classes,
            ),
            opts=opts,
            V=Variant(
                PROBABILITIES=probabilities,
                HAS_Y=has_y,
                SMOOTHED=smoothed and not has_y,
                RESIDENT=how.path != "loop",
                STAGES=how.stages,
                ROWS=how.rows,
                BLOCK_K=how.block_k,
                TILES=how.tiles,
                FULL=0 if how.path == "loop" else shortest // how.block_k,
                ALIGN=align,
                VECTOR=vector,
                ADJACENT=(vector if window else align).bit_length() - 1,
                WINDOW=window,
                CTAS=how.num_ctas,
                PTX=gpu.backend == "cuda",
            ),
            num_warps=how.num_warps,
            num_ctas=how.num_ctas,
            enable_fp_fusion=True,
            **arguments,
        )


# ---------------------------------------------------------------------------------------------------------------------
# The primitives. Their arguments end with the same options, ops.OPTIONS.


@primitive("triton")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    stats = new_numbers(logits, NUM_LSE)
    _launch(row_lse_kernel, logits, target, weight, options, stats_ptr=stats)
    return stats


@primitive("triton")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, *options) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    sums = new_numbers(logits, NUM_SUMS)
    _launch(row_sums_kernel, logits, target, None, options, stats_ptr=stats.contiguous(), sums_ptr=sums)
    return sums


def _row_loss(logits, target, weight, options, *, scale=None, stats=None, gradient=None) -> Tensor:
    losses = new_numbers(logits, NUM_LOSSES)
    _launch(
        row_loss_kernel,
        logits,
        target,
        weight,
        options,
        scale_ptr=scale,
        scale_stride=0 if scale is None else scale.stride(0),
        losses_ptr=losses,
        stats_ptr=stats,
        gradient_ptr=gradient,
    )
    return losses


@primitive("triton")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, *options) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    stats = new_numbers(logits, NUM_STATS)
    return _row_loss(logits, target, weight, options, stats=stats), stats


@primitive("triton")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, *options
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    gradient = new_gradient(logits)
    return _row_loss(logits, target, weight, options, scale=scale, gradient=gradient), gradient


def _fill_gradient(gradient, logits, target, weight, stats, scale, options) -> None:
    _launch(
        row_gradient_kernel,
        logits,
        target,
        weight,
        options,
        stats_ptr=stats.contiguous(),
        scale_ptr=scale,
        scale_stride=scale.stride(0),
        gradient_ptr=gradient,
    )


@primitive("triton")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, *options
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    gradient = new_gradient(logits)
    _fill_gradient(gradient, logits, target, weight, stats, scale, options)
    return gradient


# Eager code only. Kernels write behind autograd's back, so its version counter is moved by hand.


def row_loss_and_gradient_(logits, target, weight, scale, *options) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits."""
    losses = _row_loss(logits, target, weight, options, scale=scale, gradient=logits)
    torch.autograd.graph.increment_version(logits)
    return losses, logits.detach()


def row_gradient_(logits, target, weight, stats, scale, *options) -> Tensor:
    """:func:`row_gradient` written over the logits."""
    _fill_gradient(logits, logits, target, weight, stats, scale, options)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,); a factor of 1 is seen on the GPU."""
    num_rows, num_classes = gradient.shape
    if num_rows == 0 or gradient.is_meta:
        return gradient
    align = math.gcd(16 // gradient.element_size(), num_classes, gradient.stride(0))
    block_k = min(SCALING_TILE, max(16, triton.next_power_of_2(num_classes)))
    tile_rows = SCALING_TILE // block_k
    num_programs = min(triton.cdiv(num_rows, tile_rows), SCALING_PROGRAMS)
    with _on(gradient.device):
        scale_gradient_kernel[(num_programs,)](
            gradient_ptr=gradient,
            gradient_stride=gradient.stride(0) // align,
            factor_ptr=factor,
            factor_stride=factor.stride(0) if factor.dim() else 0,
            num_rows=num_rows,
            num_classes=num_classes // align,
            num_programs=num_programs,
            ROWS=tile_rows,
            BLOCK_K=block_k,
            ALIGN=align,
            num_warps=4,
            enable_fp_fusion=True,
        )
    torch.autograd.graph.increment_version(gradient)
    return gradient


def inverse_count(target: Tensor, weight: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    """What the loss of class indices is multiplied by for its mean, (), in one launch; for up to FEW_ROWS."""
    factor = target.new_empty((), dtype=torch.float32)
    with _on(target.device):
        inverse_count_kernel[(1,)](
            target_ptr=target.contiguous(),
            weight_ptr=None if weight is None else weight.contiguous(),
            factor_ptr=factor,
            num_rows=target.shape[0],
            num_classes=num_classes,
            ignore_index=ignore_index,
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return factor


def scaled_sum(numbers: Tensor, factor: Tensor) -> Tensor:
    """``numbers.sum() * factor``, (), in one launch; for up to FEW_ROWS."""
    total = torch.empty_like(factor)
    with _on(numbers.device):
        scaled_sum_kernel[(1,)](
            numbers_ptr=numbers,
            factor_ptr=factor,
            sum_ptr=total,
            num_rows=numbers.shape[0],
            BLOCK=1024,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return total
