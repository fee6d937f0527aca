"""What the user passes, checked before anything is computed; errors name the argument, what was expected, what came.

Only shapes, dtypes, devices and Python numbers are looked at, so nothing waits for a GPU, and all of it works while
tracing. The exception is the range of class indices that lie on a CPU.
"""

import sys
import warnings
from numbers import Integral, Real

import torch
from torch import Tensor

from .ops import is_watched
from .shard import VocabShard

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
BACKENDS = (None, "triton", "compile", "eager")

# From this many classes on, the plain sum S outweighs the cross entropy: measured on Gaussian clusters, accuracy fell
# from 1.00 to 0.32 at K = 1000 and to 0.00 at K = 10000, where the class mean kept 1.00 and 0.97.
MANY_CLASSES = 256


def _got(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return repr(value)


def _wrong(error: type[Exception], argument: str, expected: str, value: object) -> Exception:
    return error(f"{argument}: expected {expected}, got {_got(value)}")


def _is_number(value: object) -> bool:
    # (int, float) comes first for torch.compile, which sees symbolic numbers as these.
    # Of the other real numbers only NumPy's can be multiplied by a tensor.
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, Real) and type(value).__module__ == "numpy"


def may_hold(condition: bool) -> bool:
    """Whether it holds, or is of a number that a graph computes (``x.item()``), which while tracing nobody knows."""
    if torch.compiler.is_compiling():
        return torch.fx.experimental.symbolic_shapes.guard_or_true(condition)
    return condition


def _check_number(argument: str, value: object, low: float, high: float, expected: str) -> None:
    if not _is_number(value):
        raise _wrong(TypeError, argument, expected, value)
    # A comparison of NumPy's scalars with these bounds may overflow. Converting others would lose their symbols.
    number = value if isinstance(value, (int, float)) else float(value)
    if not (may_hold(number >= low) and may_hold(number <= high)):
        raise _wrong(ValueError, argument, expected, value)


def _check_scalar_tensor(argument: str, value: Tensor) -> None:
    if value.dim() != 0 or value.is_complex() or value.dtype == torch.bool:
        raise _wrong(ValueError, argument, "a number or a real tensor of 0 dimensions", value)


def check_reg_weight(value: object, largest: float = sys.float_info.max) -> None:
    """λ, alone."""
    if isinstance(value, Tensor):
        _check_scalar_tensor("reg_weight", value)
    else:
        _check_number("reg_weight", value, -largest, largest, "a finite number or a tensor of 0 dimensions")


def check_options(
    *,
    c,
    reg_weight,
    class_mean,
    ignore_index,
    reduction,
    denominator,
    label_smoothing,
    z_loss,
    softcap,
    return_parts,
    shard,
    backend,
    inplace=False,
    recompute=None,
) -> None:
    """The arguments that can be judged alone."""
    largest = sys.float_info.max
    # For smaller c, a probability divided by c leaves the range of float32.
    _check_number("c", c, 1e-30, 1.0, "a number from 1e-30 to 1")
    check_reg_weight(reg_weight)
    if not isinstance(ignore_index, (int, Integral)) or isinstance(ignore_index, bool):
        raise _wrong(TypeError, "ignore_index", "an int", ignore_index)
    if not (may_hold(ignore_index >= -(2**63)) and may_hold(ignore_index < 2**63)):
        raise _wrong(ValueError, "ignore_index", "an int of 64 bits", ignore_index)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise _wrong(ValueError, "reduction", "'none', 'mean' or 'sum'", reduction)
    if denominator is not None:
        if reduction != "mean":
            raise _wrong(ValueError, "denominator", f"None with reduction={reduction!r}", denominator)
        if isinstance(denominator, Tensor):
            _check_scalar_tensor("denominator", denominator)
        else:
            expected = "a number of at least 1e-30 or a tensor of 0 dimensions"
            _check_number("denominator", denominator, 1e-30, largest, expected)
    _check_number("label_smoothing", label_smoothing, 0.0, 1.0, "a number from 0 to 1")
    _check_number("z_loss", z_loss, 0.0, largest, "a finite number of at least 0")
    if softcap is not None:
        _check_number("softcap", softcap, 1e-30, 1e30, "None or a number from 1e-30 to 1e30")
    for argument, value in (("class_mean", class_mean), ("recompute", recompute)):
        if value is not None and not isinstance(value, bool):
            raise _wrong(TypeError, argument, "True, False or None", value)
    for argument, value in (("inplace", inplace), ("return_parts", return_parts)):
        if not isinstance(value, bool):
            raise _wrong(TypeError, argument, "True or False", value)
    if backend not in BACKENDS:
        raise _wrong(ValueError, "backend", "None, 'triton', 'compile' or 'eager'", backend)
    if shard is not None and not isinstance(shard, VocabShard):
        raise _wrong(TypeError, "shard", "a VocabShard or None", shard)


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor, which it can be only where somebody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _check_are_tensors(needed: dict[str, object], optional: dict[str, object]) -> None:
    for argument, value in (needed | optional).items():
        if not isinstance(value, Tensor) and not (value is None and argument in optional):
            raise _wrong(TypeError, argument, "a tensor" if argument in needed else "a tensor or None", value)
        if is_dtensor(value):
            raise TypeError(f"{argument}: expected a plain tensor, as input is one, got a DTensor")


def _check_device(argument: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ValueError(f"{argument}: expected a tensor on {input.device}, as input, got one on {value.device}")


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses dtypes on the device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _check_target(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    *,
    input: Tensor,
    logits_shape: torch.Size,
    dim: int,  # of the classes
) -> None:
    _check_device("target", target, input)
    if target.shape == logits_shape:
        if target.dtype not in FLOATS:
            raise _wrong(TypeError, "target", "floating-point probabilities, since its shape is the logits'", target)
        if not may_hold(ignore_index < 0):
            raise _wrong(ValueError, "ignore_index", "a negative number with target probabilities", ignore_index)
    else:
        if target.dtype not in (torch.int64, torch.uint8):
            expected = "int64 or uint8 class indices, or probabilities shaped as the logits"
            raise _wrong(TypeError, "target", expected, target)
        shape = logits_shape[:dim] + logits_shape[dim + 1 :]
        if target.shape != shape and not (len(logits_shape) == 1 and target.shape == (1,)):
            expected = f"class indices of shape {tuple(shape)} or probabilities of shape {tuple(logits_shape)}"
            raise _wrong(ValueError, "target", expected, target)
    if weight is None:
        return
    if weight.shape != (logits_shape[dim],):
        raise _wrong(ValueError, "weight", f"a tensor of shape ({logits_shape[dim]},)", weight)
    _check_device("weight", weight, input)
    if weight.dtype not in FLOATS:
        raise _wrong(TypeError, "weight", "a floating-point tensor", weight)
    if target.shape != logits_shape:
        if weight.dtype != input.dtype and not under_autocast(input.device):
            raise _wrong(TypeError, "weight", f"the input's dtype, {input.dtype}, with class indices", weight)
        if weight.requires_grad:
            raise ValueError("weight: expected one that requires no gradient with class indices; detach it")


def of_shard(shard: VocabShard | None, target: Tensor, weight: Tensor | None, dim: int) -> tuple[Tensor, Tensor | None]:
    """Target probabilities and class weights of the shard alone, where they are of all classes."""
    if shard is None:
        return target, weight
    num_here = shard.stop - shard.start
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim() > dim:
        if target.shape[dim] not in (num_here, shard.num_classes):
            expected = f"probabilities of {num_here} or {shard.num_classes} classes in dimension {dim}"
            raise _wrong(ValueError, "target", expected, target)
        if target.shape[dim] != num_here:
            target = target.narrow(dim, shard.start, num_here)
    if isinstance(weight, Tensor):
        if weight.shape not in ((num_here,), (shard.num_classes,)):
            expected = f"a tensor of shape ({num_here},) or ({shard.num_classes},)"
            raise _wrong(ValueError, "weight", expected, weight)
        if weight.shape[0] != num_here:
            weight = weight[shard.start : shard.stop]
    return target, weight


def check_backend_of_shard(backend: str) -> None:
    """Plain autograd knows nothing of other ranks."""
    if backend == "eager":
        raise ValueError(
            "backend: expected 'triton' or 'compile' for classes that are sharded, without torch.func transforms "
            "inside torch.compile, and a target and weight that require no gradient, got 'eager'"
        )


def check_tensors(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, shard: VocabShard | None
) -> None:
    """Shapes, dtypes and devices: what ``F.cross_entropy`` takes."""
    _check_are_tensors({"input": input, "target": target}, {"weight": weight})
    if input.dtype not in FLOATS:
        raise _wrong(TypeError, "input", "float16, bfloat16, float32 or float64 logits", input)
    if input.dim() == 0:
        raise _wrong(ValueError, "input", "logits of shape (K,), (N, K) or (N, K, d1, ...)", input)
    dim = min(1, input.dim() - 1)
    if shard is not None and input.shape[dim] != shard.stop - shard.start:
        expected = f"logits of the shard's {shard.stop - shard.start} classes in dimension {dim}"
        raise _wrong(ValueError, "input", expected, input)
    if shard is None and input.shape[dim] == 0:
        raise _wrong(ValueError, "input", "at least one class", input)
    _check_target(target, weight, ignore_index, input=input, logits_shape=input.shape, dim=dim)


def check_linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    chunk_rows: int | None,
    shard: VocabShard | None,
) -> None:
    """The same for a linear layer and its loss."""
    needed = {"input": input, "linear_weight": linear_weight, "target": target}
    _check_are_tensors(needed, {"linear_bias": linear_bias, "weight": weight})
    if input.dtype not in FLOATS:
        raise _wrong(TypeError, "input", "float16, bfloat16, float32 or float64 features", input)
    if input.dim() == 0:
        raise _wrong(ValueError, "input", "features of shape (..., D)", input)
    if (
        linear_weight.dim() != 2
        or linear_weight.shape[1] != input.shape[-1]
        or (linear_weight.shape[0] == 0 if shard is None else linear_weight.shape[0] != shard.stop - shard.start)
    ):
        classes = "(K, {}), K at least 1," if shard is None else f"({shard.stop - shard.start}, {{}}), of this shard,"
        shape = classes.format(input.shape[-1])
        expected = f"a tensor of shape {shape} for input of shape {tuple(input.shape)}"
        raise _wrong(ValueError, "linear_weight", expected, linear_weight)
    num_classes = linear_weight.shape[0]
    if linear_bias is not None and linear_bias.shape != (num_classes,):
        raise _wrong(ValueError, "linear_bias", f"a tensor of shape ({num_classes},)", linear_bias)
    for argument, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is None:
            continue
        _check_device(argument, value, input)
        # Autocast brings all dtypes but float64 to one.
        brought = under_autocast(input.device) and torch.float64 not in (value.dtype, input.dtype)
        if value.dtype not in FLOATS or (value.dtype != input.dtype and not brought):
            raise _wrong(TypeError, argument, f"the input's dtype, {input.dtype}", value)
    shape = input.shape[:-1] + linear_weight.shape[:1]
    _check_target(target, weight, ignore_index, input=input, logits_shape=shape, dim=input.dim() - 1)
    check_chunk_rows(chunk_rows)


def check_chunk_rows(chunk_rows: int | None) -> None:
    """A number of rows, or None."""
    if chunk_rows is None:
        return
    if not isinstance(chunk_rows, (int, Integral)) or isinstance(chunk_rows, bool):
        raise _wrong(TypeError, "chunk_rows", "None or an int", chunk_rows)
    if chunk_rows < 1:
        raise _wrong(ValueError, "chunk_rows", "None or an int of at least 1", chunk_rows)


def check_range(target: Tensor, num_classes: int, ignore_index: int) -> bool:
    """Class indices on a CPU; on a GPU looking would stall it, and while tracing there is nothing to look at.

    Returns:
        True where it has seen that no row is ignored.
    """
    if target.device.type != "cpu" or is_watched() or target.numel() == 0:
        return False
    low, high = torch.aminmax(target)
    if low.item() >= 0 and high.item() < num_classes:  # on a CPU
        return not 0 <= ignore_index < num_classes
    outside = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if outside.any():
        first = target[outside][0].item()  # on a CPU, for the error's text
        raise IndexError(
            f"target: expected class indices from 0 to {num_classes - 1} or ignore_index={ignore_index}, got {first}"
        )
    return False


def check_inplace(input: Tensor) -> None:
    """Whether ``inplace=True`` may take the logits' storage: not a parameter's, not under a transform."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError("inplace: expected False under torch.func transforms, got True")
    for tensor in (input, input._base):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                "inplace: expected False for logits that are a leaf requiring a gradient (or a view of one), got True; "
                "their values would be overwritten"
            )


_warned_of_many_classes = False


def _warn_of_many_classes() -> None:
    global _warned_of_many_classes
    if not _warned_of_many_classes:
        _warned_of_many_classes = True
        warnings.warn(
            f"The regularizer S sums over the classes, and from K = {MANY_CLASSES} on it outweighs the cross entropy: "
            "networks then learn little or nothing. Pass class_mean=True to divide it by K - 1, or class_mean=False to "
            "keep the sum and silence this.",
            UserWarning,
            stacklevel=4,
        )


# While compiling it runs once, as the graph is traced. (torch.compiler.assume_constant_result sets no more than this
# attribute, but importing it loads Dynamo.)
_warn_of_many_classes._dynamo_marked_constant = True


def check_many_classes(num_classes: int, reg_weight: float | Tensor) -> None:
    """Warn, once a process, where the plain sum over many classes drowns the cross entropy."""
    if num_classes >= MANY_CLASSES and not isinstance(reg_weight, Tensor) and not may_hold(reg_weight != 1):
        _warn_of_many_classes()
