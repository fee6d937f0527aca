"""How a kernel is launched on a GPU: its inputs, its options, its variant.

A training calls the same kernels with other numbers at every step. What does not change from step to step is found out
at the first one and kept: the plan, the variant, the compiled kernel (`_prepared`). A later step looks it up, and hands
its tensors to the compiled kernel. So Triton's own launcher, which looks at each argument of each call, only compiles.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..primitives import RowOptions
from .groups import num_full
from .kernels import row_loss_kernel
from .plan import LARGEST_CLUSTER, MULTIPROCESSOR_REGISTERS, Device, Plan, plan
from .rows import Inputs, Scalars, Variant

INTERPRETED = triton.knobs.runtime.interpret
TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Hopper, Blackwell, Blackwell Ultra; the consumers' cards are newer, but have smaller clusters.
CLUSTERS_OF_16 = (90, 100, 103)
NUMBERS = {float, int, bool, type(None)}
# Parameters of small kernels in which Triton specialises nothing but whether they have 32 bits.
NOT_COMPILED_IN = {"num_rows", "num_programs"}
# Kernels that are kept. A training has a few; a program in which K or strides change at every step has many.
MOST_PREPARED = 1024


@functools.cache
def _gpu(index: int | None) -> GPUTarget:
    """What Triton compiles for; the interpreter counts as a GPU of 32 lanes without instructions of its own."""
    return GPUTarget("interpreter", 90, 32) if INTERPRETED else triton.runtime.driver.active.get_current_target()


@functools.cache
def device_of(index: int | None) -> Device:
    """What of it decides how a kernel is launched. The interpreter takes all ways of a new GPU, if a very small one."""
    gpu = _gpu(index)
    nvidia = gpu.backend in ("cuda", "interpreter")
    if INTERPRETED:
        properties = {"multiprocessor_count": 2, "max_shared_mem": 227 << 10}
    else:
        driver = triton.runtime.driver.active
        properties = driver.utils.get_device_properties(driver.get_current_device())
    clusters = nvidia and gpu.arch in CLUSTERS_OF_16 and TRITON_VERSION >= (3, 8)
    return Device(
        warp_size=gpu.warp_size,
        multiprocessors=properties["multiprocessor_count"],
        largest_cluster=LARGEST_CLUSTER if clusters else 1,
        shared_bytes=properties["max_shared_mem"] if nvidia and gpu.arch >= 80 else 0,
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels that are compiled


class Prepared(NamedTuple):
    """A compiled kernel, and what of its launches is the same at every step."""

    kernel: Any  # Triton's CompiledKernel; in the interpreter the function
    constants: dict[str, Any]  # arguments that are compiled in
    rows: int = 1  # of a program at a time
    programs: int = 0  # at most; 0 if there are as many as there are rows


_prepared: dict[tuple[Any, ...], Prepared] = {}


def keep(key: tuple[Any, ...], made: Prepared) -> Prepared:
    """For the next launch with the same key."""
    if len(_prepared) >= MOST_PREPARED:
        _prepared.clear()
    _prepared[key] = made
    return made


def kinds(values: Iterable[Any]) -> tuple[Any, ...]:
    """What Triton compiles in of arguments: of a tensor its dtype and whether it begins at a multiple of 16 bytes.

    For AMD it is also whether the storage has less than 2 GiB: then offsets are cut to 32 bits. Of a number it is
    whether it is 1 or a multiple of 16: the key of `_prepared` simply has the number.
    """
    numbers = NUMBERS
    if _gpu(None).backend == "cuda":
        return tuple([x if type(x) in numbers else (x.dtype, not x.data_ptr() & 15) for x in values])
    return tuple([x if type(x) in numbers else (x.dtype, not x.data_ptr() & 15, _is_large(x)) for x in values])


def _is_large(tensor: Tensor) -> bool:
    """Whether its storage has 2 GiB or more."""
    return tensor.untyped_storage().nbytes() >= 2**31


def compile_kernel(kernel: Any, arguments: dict[str, Any], **options: Any) -> Any:
    """Triton's CompiledKernel for such arguments, in the order of its parameters; in the interpreter the function."""
    if INTERPRETED:
        return kernel
    return kernel.warmup(*arguments.values(), grid=(1,), enable_fp_fusion=True, **options)


def enqueue(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    """Launch what `compile_kernel` has returned. All launches pass here: who has no GPU puts another in its place."""
    kernel[(programs, 1, 1)](*arguments.values())


def active_clusters(kernel: Any, num_ctas: int, per_multiprocessor: int, device: Device) -> int:
    """How many clusters of a compiled kernel the GPU has room for at a time, by its driver; 0 if for none.

    Triton asks for blocks of 128 threads, with any number of them on a multiprocessor. So it is told that they need
    as much shared memory as leaves room for as many as their registers do.
    """
    if INTERPRETED:
        return max(1, device.multiprocessors * per_multiprocessor // num_ctas)
    utils = triton.runtime.driver.active.utils
    _ = kernel.run  # loads it
    shared = max(kernel.metadata.shared, device.shared_bytes // per_multiprocessor - 2048)
    return utils.cuOccupancyMaxActiveClusters(kernel.function, shared, num_ctas)


def launch_small(kernel: Any, num_programs: int, arguments: dict[str, Any], prepare: Callable) -> None:
    """Launch a small kernel, on the current device."""
    key = (
        kernel.fn,
        arguments["num_rows"] >> 31,
        *kinds([value for name, value in arguments.items() if name not in NOT_COMPILED_IN]),
    )
    device = next(iter(arguments.values())).device
    ready = _prepared.get((device, key)) or keep((device, key), prepare(kernel, arguments))
    arguments.update(ready.constants)
    enqueue(ready.kernel, num_programs, arguments)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels of rows


def _in_rows(matrix: Tensor) -> Tensor:
    """The matrix, as a copy where its rows do not lie one element after another."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _number_or_pointer(value: float | Tensor | None) -> float | Tensor | None:
    """The value of a tensor on the CPU; one on a GPU stays a tensor, as looking at it would wait for the GPU."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def _scalars(options: RowOptions) -> tuple[Scalars, tuple[Any, ...]]:
    """The options as a kernel takes them, and what of them is compiled in."""
    c = _number_or_pointer(options.c)
    whole = rest = None
    if isinstance(c, float):
        log2_c = math.log2(c)
        whole, rest = float(round(log2_c)), log2_c - round(log2_c)
    scalars = Scalars(
        c=c,
        log2_c_whole=whole,
        log2_c_rest=rest,
        reg_weight=_number_or_pointer(options.reg_weight),
        ignore_index=options.ignore_index,
        label_smoothing=_number_or_pointer(options.label_smoothing),
        z_loss=_number_or_pointer(options.z_loss),
        softcap=_number_or_pointer(options.softcap),
    )
    # Nothing of a float is compiled in.
    return scalars, tuple("float" if type(x) is float else kinds((x,)) for x in scalars)


_scalars_of_numbers = functools.lru_cache(MOST_PREPARED)(_scalars)


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
    resident = how.path != "loop"
    return Variant(
        PROBABILITIES=probabilities,
        HAS_Y=has_y,
        SMOOTHED=smoothed and not has_y,
        RESIDENT=resident,
        STAGES=how.stages,
        ROWS=how.rows,
        BLOCK_K=how.block_k,
        GROUPS=how.groups,
        TILES=how.tiles,
        TAIL=how.tail,
        FULL=num_full(how.block_k, how.groups, how.tiles, how.tail, shortest) if resident else 0,
        ALIGN=align,
        VECTOR=vector,
        ADJACENT=(vector if window else align).bit_length() - 1,
        WINDOW=window,
        CTAS=how.num_ctas,
        PTX=gpu.backend == "cuda",
    )


def _prepare(
    kernel: Any, arguments: dict[str, Any], num_classes: int, align: int, vector: int, window: bool
) -> Prepared:
    """A kernel of rows for such arguments; where its clusters do not fit the GPU, one of smaller ones, or the loop."""
    inputs, scalars = arguments["inputs"], arguments["scalars"]
    logits, target = inputs.logits_ptr, inputs.target_ptr
    probabilities, smoothed = target.dim() == 2, scalars.label_smoothing is not None
    has_y = probabilities or (smoothed and inputs.weight_ptr is not None)
    gpu, device = _gpu(logits.device.index), device_of(logits.device.index)
    while True:
        how = plan(
            num_classes,
            logits.element_size(),
            holds_rows=kernel is row_loss_kernel,
            at_once=align,
            plain=not has_y and scalars.softcap is None,
            device=device,
            window=vector if window else 0,
        )
        window_too = window and how.rows == 1
        shortest = num_classes - 2 * (vector - 1) if window_too else num_classes
        variant = _variant(how, gpu, align, vector, window_too, shortest, probabilities, has_y, smoothed)
        arguments["VARIANT"] = variant
        # Left to itself, ptxas spills to stay below 64 where 128 are free.
        registers = {"maxnreg": how.registers} if gpu.backend == "cuda" else {}
        compiled = compile_kernel(kernel, arguments, num_warps=how.num_warps, num_ctas=how.num_ctas, **registers)
        if how.num_ctas == 1:
            return Prepared(compiled, {"VARIANT": variant}, how.rows, how.programs)
        per_multiprocessor = MULTIPROCESSOR_REGISTERS // (how.num_warps * device.warp_size * how.registers)
        if active := active_clusters(compiled, how.num_ctas, per_multiprocessor, device):
            return Prepared(compiled, {"VARIANT": variant}, how.rows, min(how.programs, active))
        device = device._replace(largest_cluster=how.num_ctas // 2)


def launch(
    kernel: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: RowOptions, **arguments: Any
) -> None:
    """Launch a kernel over the rows of the logits, with the Inputs, Scalars and Variant for them.

    ``arguments`` are those between them, in their order; their gradient_stride and num_programs are filled in here.
    """
    num_rows, num_classes = logits.shape
    if num_rows == 0 or num_classes == 0:
        return
    probabilities = target.dim() == 2
    logits, target = _in_rows(logits), _in_rows(target) if probabilities else target.contiguous()
    weight = None if weight is None else weight.contiguous()
    gradient = arguments.get("gradient_ptr")
    scalars, compiled_in = (_scalars_of_numbers if NUMBERS.issuperset(map(type, options)) else _scalars)(options)
    stride = logits.stride(0)
    target_stride = target.stride(0) if probabilities else None
    gradient_stride = stride if gradient is None else gradient.stride(0)
    # Divides K and the distance of rows, so that as many classes at a time are read and written: at most 16 bytes.
    vector = 16 // logits.element_size()
    align = math.gcd(vector, num_classes, stride, gradient_stride, target_stride or 0)
    if "gradient_ptr" in arguments:
        arguments["gradient_stride"] = 0 if gradient is None else gradient_stride // align
    if kernel is row_loss_kernel:
        arguments["num_programs"] = 1
    inputs = Inputs(
        logits_ptr=logits,
        logits_stride=stride // align,
        target_ptr=target,
        target_stride=(target_stride or 0) // align,
        weight_ptr=weight,
        odd=2 * num_rows + 1,
        num_classes=num_classes // align,
        first_class=None if options.all_classes is None else options.first_class,
        all_classes=options.all_classes,
    )
    everything = {"inputs": inputs, "scalars": scalars, **arguments, "VARIANT": None}
    strides = stride, target_stride, gradient_stride, align
    key = (
        kernel.fn, logits.device, num_classes, strides, options.first_class, options.all_classes, num_rows >> 30,
        compiled_in, kinds((logits, target, weight, *arguments.values())),
    )  # fmt: skip
    with on_device(logits.device):
        ready = _prepared.get(key)
        if ready is None:
            window = align < vector and gradient_stride == stride
            ready = keep(key, _prepare(kernel, everything, num_classes, align, vector, window))
        num_programs = -(-num_rows // ready.rows)
        if ready.programs:
            num_programs = min(num_programs, ready.programs)
        if kernel is row_loss_kernel:
            everything["num_programs"] = num_programs
        everything.update(ready.constants)
        enqueue(ready.kernel, num_programs, everything)
