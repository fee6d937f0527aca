"""The primitives on a GPU, each the launch of a kernel, and the small kernels of a step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..primitives import NUM_LOSSES, NUM_LSE, NUM_STATS, NUM_SUMS, RowOptions, new_gradient, new_per_row, primitive
from .kernels import row_gradient_kernel, row_loss_kernel, row_lse_kernel, row_sums_kernel
from .launch import Prepared, active_clusters, compile_kernel, device_of, launch, launch_small, on_device
from .plan import power_of_2
from .small import inverse_count_kernel, scale_gradient_kernel, scaled_sum_kernel

# The most rows that one program counts, and sums the losses of: one step of a cluster of SMALL_CLUSTER thread blocks,
# sixteen rows for each thread. Where there are no clusters, a step of the largest block is half of its registers.
FEW_ROWS = 65536
SMALL_CLUSTER, SMALL_WARPS = 8, 16
LARGEST_BLOCK, STEP_BYTES = 1024, 2**17
# Programs that multiply a stored gradient: enough for the bandwidth of a GPU, and few to start and end if there is
# nothing to do. No GPU has timed this.
SCALING_PROGRAMS = 1024
# Elements of their tiles: 16 for each thread of four warps.
SCALING_TILE = 2048


@primitive("triton")
def row_lse(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> Tensor:
    """m, exp_sum, y_sum, yz_sum, omega of each row: (5, N)."""
    stats = new_per_row(logits, NUM_LSE)
    launch(row_lse_kernel, logits, target, weight, options, stats_ptr=stats)
    return stats


@primitive("triton")
def row_sums(logits: Tensor, target: Tensor, stats: Tensor, options: RowOptions) -> Tensor:
    """h_sum and u_sum of each row, (2, N), from the (5, N) of row_lse."""
    sums = new_per_row(logits, NUM_SUMS)
    launch(row_sums_kernel, logits, target, None, options, stats_ptr=stats.contiguous(), sums_ptr=sums)
    return sums


def _stride(factor: Tensor | None) -> int:
    """From a row's factor to the next row's; 0 where all rows have one, ()."""
    return 0 if factor is None or factor.dim() == 0 else factor.stride(0)


def _launch_row_loss(logits, target, weight, options, *, scale=None, stats=None, gradient=None) -> Tensor:
    """The losses of each row, (4, N), from one launch; it fills the statistics and the gradient that are given."""
    losses = new_per_row(logits, NUM_LOSSES)
    launch(
        row_loss_kernel,
        logits,
        target,
        weight,
        options,
        scale_ptr=scale,
        scale_stride=_stride(scale),
        losses_ptr=losses,
        stats_ptr=stats,
        gradient_ptr=gradient,
    )
    return losses


@primitive("triton")
def row_loss(logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and its statistics, (7, N), from which row_gradient goes on."""
    stats = new_per_row(logits, NUM_STATS)
    return _launch_row_loss(logits, target, weight, options, stats=stats), stats


@primitive("triton")
def row_loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """The losses of each row, (4, N), and the gradient of scale * loss, (N, K), from one read of the logits."""
    gradient = new_gradient(logits)
    return _launch_row_loss(logits, target, weight, options, scale=scale, gradient=gradient), gradient


def single_pass(dtype: torch.dtype, device: torch.device, num_classes: int, options: RowOptions) -> Callable:
    """:func:`row_loss_and_gradient` for ordinary calls (arguments.Plan): of rows, class indices and one factor."""

    def compute(
        rows: Tensor, target: Tensor, factor: Tensor, all_count: bool, return_parts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each row, (N,), its losses, (4, N), and the gradient."""
        losses, gradient = row_loss_and_gradient.function(rows, target, None, factor, options)
        return losses[0], losses, gradient

    return compute


def _launch_row_gradient(gradient, logits, target, weight, stats, scale, options) -> None:
    """Fill the gradient, (N, K), from the statistics, (7, N), by one launch."""
    launch(
        row_gradient_kernel,
        logits,
        target,
        weight,
        options,
        stats_ptr=stats.contiguous(),
        scale_ptr=scale,
        scale_stride=_stride(scale),
        gradient_ptr=gradient,
    )


@primitive("triton")
def row_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, options: RowOptions
) -> Tensor:
    """The gradient of scale * loss, (N, K) in the dtype of the logits."""
    gradient = new_gradient(logits)
    _launch_row_gradient(gradient, logits, target, weight, stats, scale, options)
    return gradient


# For eager code only. Autograd does not see what a kernel writes, so its version counter is moved by hand.


def row_loss_and_gradient_(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, options: RowOptions
) -> tuple[Tensor, Tensor]:
    """:func:`row_loss_and_gradient` with the gradient written over the logits."""
    losses = _launch_row_loss(logits, target, weight, options, scale=scale, gradient=logits)
    torch.autograd.graph.increment_version(logits)
    return losses, logits.detach()


def row_gradient_(
    logits: Tensor, target: Tensor, weight: Tensor | None, stats: Tensor, scale: Tensor, options: RowOptions
) -> Tensor:
    """:func:`row_gradient` written over the logits."""
    _launch_row_gradient(logits, logits, target, weight, stats, scale, options)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _prepare_one_program(kernel: Any, arguments: dict[str, Any]) -> Prepared:
    """A kernel whose single program has the GPU to itself."""
    per_row = next(iter(arguments.values()))
    device = device_of(per_row.device.index)
    if device.largest_cluster >= SMALL_CLUSTER:
        arguments["BLOCK"] = FEW_ROWS
        compiled = compile_kernel(kernel, arguments, num_warps=SMALL_WARPS, num_ctas=SMALL_CLUSTER)
        if active_clusters(compiled, SMALL_CLUSTER, 1, device):
            return Prepared(compiled, {"BLOCK": FEW_ROWS})
    arguments["BLOCK"] = block = STEP_BYTES // per_row.element_size()
    compiled = compile_kernel(kernel, arguments, num_warps=LARGEST_BLOCK // device.warp_size)
    return Prepared(compiled, {"BLOCK": block})


def scale_gradient_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply the stored gradient (N, K) by the upstream one, () or (N,), in place, and return it.

    The kernel sees on the GPU whether a factor is 1, and has nothing to do then.
    """
    num_rows, num_classes = gradient.shape
    if num_rows == 0 or gradient.is_meta:
        return gradient
    align = math.gcd(16 // gradient.element_size(), num_classes, gradient.stride(0))
    block_k = min(SCALING_TILE, max(16, power_of_2(num_classes)))
    tile_rows = SCALING_TILE // block_k
    num_programs = min(-(-num_rows // tile_rows), SCALING_PROGRAMS)
    arguments = {
        "gradient_ptr": gradient,
        "gradient_stride": gradient.stride(0) // align,
        "factor_ptr": factor,
        "factor_stride": _stride(factor),
        "num_rows": num_rows,
        "num_classes": num_classes // align,
        "num_programs": num_programs,
        "ROWS": tile_rows,
        "BLOCK_K": block_k,
        "ALIGN": align,
    }
    with on_device(gradient.device):
        launch_small(
            scale_gradient_kernel,
            num_programs,
            arguments,
            lambda *given: Prepared(compile_kernel(*given, num_warps=4), {}),
        )
    torch.autograd.graph.increment_version(gradient)
    return gradient


def inverse_count(target: Tensor, weight: Tensor | None, num_classes: int, ignore_index: int) -> Tensor:
    """The factor, (), that makes a mean of the summed loss of class indices, in one launch; for up to FEW_ROWS."""
    factor = target.new_empty((), dtype=torch.float32)
    arguments = {
        "target_ptr": target.contiguous(),
        "weight_ptr": None if weight is None else weight.contiguous(),
        "factor_ptr": factor,
        "num_rows": target.shape[0],
        "num_classes": num_classes,
        "ignore_index": ignore_index,
        "BLOCK": None,
    }
    with on_device(target.device):
        launch_small(inverse_count_kernel, 1, arguments, _prepare_one_program)
    return factor


def scaled_sum(losses: Tensor, factor: Tensor) -> Tensor:
    """``losses.sum() * factor``, (), in one launch; for up to FEW_ROWS."""
    total = torch.empty_like(factor)
    arguments = {
        "losses_ptr": losses,
        "factor_ptr": factor,
        "sum_ptr": total,
        "num_rows": losses.shape[0],
        "BLOCK": None,
    }
    with on_device(losses.device):
        launch_small(scaled_sum_kernel, 1, arguments, _prepare_one_program)
    return total
