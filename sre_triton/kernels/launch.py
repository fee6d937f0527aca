"""How a kernel is launched on a GPU: its inputs, its options, its variant."""

import contextlib
import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..primitives import RowOptions
from .kernels import row_loss_kernel
from .plan import Device, Plan, plan
from .rows import Inputs, Scalars, Variant

INTERPRETED = triton.knobs.runtime.interpret
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Hopper, Blackwell, Blackwell Ultra; the consumers' cards are newer, but have smaller clusters.
CLUSTERS_OF_16 = (90, 100, 103)


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


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _in_rows(matrix: Tensor) -> Tensor:
    """The matrix, as a copy where its rows do not lie one element after another."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _number_or_pointer(value: float | Tensor | None) -> float | Tensor | None:
    """The value of a tensor on the CPU; one on a GPU stays a tensor, as looking at it would wait for the GPU."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _scalars(options: RowOptions) -> Scalars:
    """The options as a kernel takes them."""
    c = _number_or_pointer(options.c)
    whole = rest = None
    if isinstance(c, float):
        log2_c = math.log2(c)
        whole, rest = float(round(log2_c)), log2_c - round(log2_c)
    return Scalars(
        c=c,
        log2_c_whole=whole,
        log2_c_rest=rest,
        reg_weight=_number_or_pointer(options.reg_weight),
        ignore_index=options.ignore_index,
        label_smoothing=_number_or_pointer(options.label_smoothing),
        z_loss=_number_or_pointer(options.z_loss),
        softcap=_number_or_pointer(options.softcap),
    )


def _full(how: Plan, shortest: int) -> int:
    """How many tiles have a class at every place in every row, where rows have so many classes at least."""
    whole = how.block_k // how.groups
    ends = [whole * (i + 1) for i in range(how.tiles)]
    ends += [whole * how.tiles + (how.tail >> bit << bit) for bit in (3, 2, 1, 0) if how.tail >> bit & 1]
    return sum(how.groups * end <= shortest for end in ends)


def _variant(
    how: Plan,
    gpu: GPUTarget,
    align: int,
    vector: int,
    window: bool,
    shortest: int,
    probabilities: bool,
    has_y: bool,
    smoothed: bool,
) -> Variant:
    """What is compiled in; rows have at least ``shortest`` classes besides the edges of a window."""
    return Variant(
        PROBABILITIES=probabilities,
        HAS_Y=has_y,
        SMOOTHED=smoothed and not has_y,
        RESIDENT=how.path != "loop",
        STAGES=how.stages,
        ROWS=how.rows,
        BLOCK_K=how.block_k,
        GROUPS=how.groups,
        TILES=how.tiles,
        TAIL=how.tail,
        FULL=0 if how.path == "loop" else _full(how, shortest),
        ALIGN=align,
        VECTOR=vector,
        ADJACENT=(vector if window else align).bit_length() - 1,
        WINDOW=window,
        CTAS=how.num_ctas,
        PTX=gpu.backend == "cuda",
    )


def launch(
    kernel: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions, **arguments: Any
) -> None:
    """Launch a kernel over the rows of the logits, with the Inputs, Scalars and Variant for them."""
    num_rows, num_classes = logits.shape
    if num_rows == 0 or num_classes == 0:
        return
    scalars, all_classes = _scalars(options), options.all_classes
    probabilities = target.dim() == 2
    logits, target = _in_rows(logits), _in_rows(target) if probabilities else target.contiguous()
    gradient = arguments.get("gradient_ptr")
    strides = [matrix.stride(0) for matrix in (logits, gradient, target) if matrix is not None and matrix.dim() == 2]
    # Divides K and the distance of rows, so that as many classes at a time are read and written: at most 16 bytes.
    vector = 16 // logits.element_size()
    align = math.gcd(vector, num_classes, *strides)
    if "gradient_ptr" in arguments:
        arguments["gradient_stride"] = 0 if gradient is None else gradient.stride(0) // align

    window = align < vector and (gradient is None or gradient.stride(0) == logits.stride(0))
    smoothed = scalars.label_smoothing is not None
    has_y = probabilities or (smoothed and weight is not None)
    holds_rows = kernel is row_loss_kernel
    with on_device(logits.device):
        gpu = _gpu(logits.device.index)
        how = plan(
            num_rows,
            num_classes,
            logits.element_size(),
            holds_rows=holds_rows,
            aligned=align == vector,
            plain=not has_y and scalars.softcap is None,
            device=_device(logits.device.index),
            window=vector if window else 0,
        )
        window = window and how.rows == 1
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
                first_class=None if all_classes is None else options.first_class,
                all_classes=all_classes,
            ),
            scalars=scalars,
            VARIANT=_variant(how, gpu, align, vector, window, shortest, probabilities, has_y, smoothed),
            num_warps=how.num_warps,
            num_ctas=how.num_ctas,
            enable_fp_fusion=True,
            **arguments,
        )
