"""What the user passes, checked before anything is computed; errors name the argument, what was expected, what came.

Only shapes, dtypes, devices and Python numbers are looked at, so nothing waits for a GPU, and all of it works while
tracing. The exception is the range of class indices that lie on a CPU.
"""

import sys

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.parameter import UninitializedTensorMixin

from .internals import is_watched, may_hold, under_functorch
from .messages import check_int, of_shape, wrong
from .sharding.shard import VocabShard

GAPS: tuple[type[object], ...] = (UninitializedTensorMixin, MaskedTensor)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REALS = (*FLOATS, *INDICES, torch.uint16, torch.uint32, torch.uint64)
CLASSES_ARE_DIMENSION_1 = "dimension 1 of the logits is the classes: pass input.movedim(-1, 1)"
AS_TENSOR = "torch.as_tensor makes one of a list, an array or a number"


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor, which it can be only where somebody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_dense(argument: str, value: Tensor) -> None:
    """The tensor has a number at each place of its shape, and memory that is laid out by strides."""
    if value.layout is torch.strided and not value.is_nested and (type(value) is Tensor or not isinstance(value, GAPS)):
        return
    if isinstance(value, UninitializedTensorMixin):
        mend = "the first forward of its module makes it one"
    elif value.is_nested:
        mend = f"torch.nested.to_padded_tensor({argument}, ...) is one"
    elif isinstance(value, MaskedTensor):
        mend = f"{argument}.to_tensor(...) is one"
    else:
        mend = f"{argument}.to_dense() is one"
    raise wrong(TypeError, argument, "a dense tensor", value, mend)


def check_are_tensors(needed: dict[str, object], optional: dict[str, object]) -> None:
    """Tensors, and such as can be computed with; what is ``optional`` may be None."""
    for argument, value in (needed | optional).items():
        if isinstance(value, torch.fx.Proxy):
            raise TypeError(
                f"{argument}: expected a tensor, got a torch.fx.Proxy; symbolic tracing cannot look into the loss, "
                "whatever its backend: keep it whole, by torch.fx.wrap of the function's name or a Tracer whose "
                "is_leaf_module is true of the module, or use torch.export.export"
            )
        if isinstance(value, Tensor):
            check_dense(argument, value)
        elif value is not None or argument in needed:
            expected = "a tensor" if argument in needed else "a tensor or None"
            raise wrong(TypeError, argument, expected, value, "" if value is None else AS_TENSOR)


def _way_to_floats(argument: str, value: Tensor) -> str:
    """What mends a dtype that is none of ``FLOATS``."""
    if value.is_complex():
        return f"{argument}.real and {argument}.abs() are real"
    return f"{argument}.{'dequantize' if value.is_quantized else 'float'}() converts it"


def _check_beside(argument: str, value: Tensor, input: Tensor) -> None:
    """The tensor is a plain one, on the device of the input."""
    if is_dtensor(value):
        raise TypeError(f"{argument}: expected a plain tensor, as input is one, got a DTensor")
    if value.device != input.device:
        raise ValueError(f"{argument}: expected a tensor on {input.device}, as input, got one on {value.device}")


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses dtypes on the device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_indices(target: Tensor, logits_shape: torch.Size, dim: int) -> None:
    """Class indices have a dtype and a shape that fit the logits, whose dimension ``dim`` is the classes.

    For logits (K,) they are () or, as for ``F.cross_entropy``, (1,).
    """
    shape = logits_shape[:dim] + logits_shape[dim + 1 :]
    fits = target.shape == shape or (len(logits_shape) == 1 and target.shape == (1,))
    if fits and target.dtype in INDICES:
        return
    classes_are_last = not fits and dim < len(logits_shape) - 1 and target.shape == logits_shape[:-1]
    if target.dtype not in INDICES:
        expected = "int64, int32, int16, int8 or uint8 class indices, or probabilities shaped as the logits"
        are_indices = (fits or classes_are_last) and not target.is_quantized
        mend = "target.long() makes class indices of it" if are_indices else ""
        raise wrong(TypeError, "target", expected, target, mend)
    of_indices, of_logits = of_shape(shape), of_shape(logits_shape)
    expected = f"class indices of shape {of_indices} or probabilities of shape {of_logits}"
    raise wrong(ValueError, "target", expected, target, CLASSES_ARE_DIMENSION_1 if classes_are_last else "")


def _check_target(
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    *,
    input: Tensor,
    logits_shape: torch.Size,
    dim: int,  # of the classes
) -> None:
    """Target and class weights, once the logits have passed."""
    _check_beside("target", target, input)
    if target.shape == logits_shape:
        if target.dtype not in FLOATS:
            expected = "floating-point probabilities, since its shape is the logits'"
            raise wrong(TypeError, "target", expected, target, _way_to_floats("target", target))
        if not may_hold(ignore_index < 0):
            raise wrong(ValueError, "ignore_index", "a negative number with target probabilities", ignore_index)
    else:
        check_indices(target, logits_shape, dim)
    if weight is None:
        return
    _check_beside("weight", weight, input)
    if weight.shape != (logits_shape[dim],):
        raise wrong(ValueError, "weight", f"a tensor of shape ({logits_shape[dim]},)", weight)
    if weight.dtype not in FLOATS:
        raise wrong(TypeError, "weight", "a floating-point tensor", weight, _way_to_floats("weight", weight))
    if target.shape != logits_shape:
        if weight.dtype != input.dtype and not under_autocast(input.device):
            raise wrong(TypeError, "weight", f"the input's dtype, {input.dtype}, with class indices", weight)
        if weight.requires_grad:
            raise ValueError("weight: expected one that requires no gradient with class indices; detach it")


def of_shard(
    shard: VocabShard, target: Tensor, weight: Tensor | None, num_dims: int, dim: int
) -> tuple[Tensor, Tensor | None]:
    """Target probabilities and class weights of the shard alone, where they are of all classes.

    ``num_dims`` has the tensor with the classes in ``dim``. One-hot integers pass as probabilities do, until their
    dtype is looked at.
    """
    num_here = shard.stop - shard.start
    sizes = num_here, shard.num_classes
    floats = target.is_floating_point()
    if target.dim() == num_dims and (floats or (num_dims > 1 and target.shape[dim] in sizes)):
        if target.shape[dim] not in sizes:
            expected = f"probabilities of {num_here} or {shard.num_classes} classes in dimension {dim}"
            raise wrong(ValueError, "target", expected, target)
        if target.shape[dim] != num_here:
            target = target.narrow(dim, shard.start, num_here)
    if weight is not None:
        if weight.shape not in ((num_here,), (shard.num_classes,)):
            expected = f"a tensor of shape ({num_here},) or ({shard.num_classes},)"
            raise wrong(ValueError, "weight", expected, weight)
        if weight.shape[0] != num_here:
            weight = weight[shard.start : shard.stop]
    return target, weight


def check_tensors(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, shard: VocabShard | None
) -> None:
    """Shapes, dtypes and devices: what ``F.cross_entropy`` takes."""
    if input.dtype not in FLOATS:
        expected = "float16, bfloat16, float32 or float64 logits"
        raise wrong(TypeError, "input", expected, input, _way_to_floats("input", input))
    if input.dim() == 0:
        raise wrong(ValueError, "input", "logits of shape (K,), (N, K) or (N, K, d1, ...)", input)
    dim = min(1, input.dim() - 1)
    if shard is not None and input.shape[dim] != shard.stop - shard.start:
        expected = f"logits of the shard's {shard.stop - shard.start} classes in dimension {dim}"
        last = dim < input.dim() - 1 and input.shape[-1] == shard.stop - shard.start
        raise wrong(ValueError, "input", expected, input, CLASSES_ARE_DIMENSION_1 if last else "")
    if shard is None and input.shape[dim] == 0:
        raise wrong(ValueError, "input", "at least one class", input)
    _check_target(target, weight, ignore_index, input=input, logits_shape=input.shape, dim=dim)


def check_linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    shard: VocabShard | None,
) -> None:
    """The same for a linear layer and its loss."""
    if input.dtype not in FLOATS:
        expected = "float16, bfloat16, float32 or float64 features"
        raise wrong(TypeError, "input", expected, input, _way_to_floats("input", input))
    if input.dim() == 0:
        raise wrong(ValueError, "input", "features of shape (..., D)", input)
    if (
        linear_weight.dim() != 2
        or linear_weight.shape[1] != input.shape[-1]
        or (linear_weight.shape[0] == 0 if shard is None else linear_weight.shape[0] != shard.stop - shard.start)
    ):
        classes = "(K, {}), K at least 1," if shard is None else f"({shard.stop - shard.start}, {{}}), of this shard,"
        shape = classes.format(input.shape[-1])
        expected = f"a tensor of shape {shape} for input of shape {of_shape(input.shape)}"
        raise wrong(ValueError, "linear_weight", expected, linear_weight)
    num_classes = linear_weight.shape[0]
    if linear_bias is not None and linear_bias.shape != (num_classes,):
        raise wrong(ValueError, "linear_bias", f"a tensor of shape ({num_classes},)", linear_bias)
    for argument, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is None:
            continue
        _check_beside(argument, value, input)
        # Autocast brings all dtypes but float64 to one.
        brought = under_autocast(input.device) and torch.float64 not in (value.dtype, input.dtype)
        if value.dtype not in FLOATS or (value.dtype != input.dtype and not brought):
            mend = "" if value.dtype in FLOATS else _way_to_floats(argument, value)
            raise wrong(TypeError, argument, f"the input's dtype, {input.dtype}", value, mend)
    shape = input.shape[:-1] + linear_weight.shape[:1]
    _check_target(target, weight, ignore_index, input=input, logits_shape=shape, dim=input.dim() - 1)


def check_size(argument: str, value: object, expected: str = "an int") -> None:
    """A number of features, classes or rows."""
    check_int(argument, value, expected)
    if value < 1:
        raise wrong(ValueError, argument, f"{expected} of at least 1", value)
    if value >= 2**63:
        raise wrong(ValueError, argument, f"{expected} of 64 bits", value)


def check_class_weights(weight: object, sizes: tuple[int, ...] = ()) -> None:
    """Class weights before there are logits: of one of these sizes, where they are known."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        expected = "a tensor of class weights or None"
        raise wrong(TypeError, "weight", expected, weight, f"{AS_TENSOR}; other options are keywords, such as c=1e-7")
    check_dense("weight", weight)
    if weight.dtype not in FLOATS:
        raise wrong(TypeError, "weight", "a floating-point tensor", weight, _way_to_floats("weight", weight))
    if weight.dim() != 1 or (sizes and weight.shape[0] not in sizes):
        shapes = " or ".join(f"({size},)" for size in dict.fromkeys(sizes or ("K",)))
        raise wrong(ValueError, "weight", f"a tensor of shape {shapes}", weight)


def check_layer(in_features: object, num_classes: object, dtype: object) -> None:
    """What a linear layer is made of."""
    check_size("in_features", in_features)
    check_size("num_classes", num_classes)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise wrong(TypeError, "dtype", "None, torch.float16, torch.bfloat16, torch.float32 or torch.float64", dtype)


def check_features(input: object, linear_weight: Tensor) -> None:
    """Features for a layer that is there, so that the wrong ones of the two are the features."""
    check_are_tensors({"input": input, "linear_weight": linear_weight}, {})
    if input.dim() > 0 and linear_weight.dim() == 2 and input.shape[-1] != linear_weight.shape[1]:
        expected = f"features of shape (..., {linear_weight.shape[1]}), as the layer takes"
        raise wrong(ValueError, "input", expected, input)


def check_range(target: Tensor, num_classes: int, ignore_index: int, watched: bool | None = None) -> bool:
    """Class indices on a CPU; on a GPU looking would stall it, and while tracing there is nothing to look at.

    Returns:
        True where it has seen that no row is ignored.
    """
    if not target.is_cpu or (is_watched() if watched is None else watched) or target.numel() == 0:
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
    if under_functorch():
        raise ValueError("inplace: expected False under torch.func transforms, got True")
    for tensor in (input, input._base):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                "inplace: expected False for logits that are a leaf requiring a gradient (or a view of one), got True; "
                "their values would be overwritten"
            )
