"""What the user passes, checked before anything is computed; errors name the argument, what was expected, what came.

Only shapes, dtypes, devices and Python numbers are looked at, so nothing waits for a GPU, and all of it works while
tracing. The exceptions are the range of class indices, and λ, that lie on a CPU.
"""

import sys
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.masked import MaskedTensor
from torch.nn.parameter import UninitializedTensorMixin

from .internals import is_watched
from .messages import of_shape, warn_user, wrong
from .primitives import value_on_cpu
from .sharding.shard import VocabShard

GAPS = (UninitializedTensorMixin, MaskedTensor)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REALS = (*FLOATS, *INDICES, torch.uint16, torch.uint32, torch.uint64)
REDUCTIONS = ("none", "mean", "sum")
BACKENDS = (None, "triton", "compile", "eager")

CLASSES_ARE_DIMENSION_1 = "dimension 1 of the logits is the classes: pass input.movedim(-1, 1)"
AS_TENSOR = "torch.as_tensor makes one of a list, an array or a number"

# From this many classes on, the plain sum S outweighs the cross entropy: measured on Gaussian clusters, accuracy fell
# from 1.00 to 0.32 at K = 1000 and to 0.00 at K = 10000, where the class mean kept 1.00 and 0.97.
MANY_CLASSES = 256


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


def _check_number(argument: str, value: object, low: float, high: float, expected: str, mend: str = "") -> None:
    """The number is in its range; ``mend`` says what to do instead of 0."""
    if not _is_number(value):
        mend = f"{argument}.item() makes a number of it" if isinstance(value, Tensor) else ""
        raise wrong(TypeError, argument, expected, value, mend)
    # A comparison of NumPy's scalars with these bounds may overflow. Converting others would lose their symbols.
    number = value if isinstance(value, (int, float)) else float(value)
    if not (may_hold(number >= low) and may_hold(number <= high)):
        raise wrong(ValueError, argument, expected, value, mend if value == 0 else "")


def _check_scalar_tensor(argument: str, value: Tensor) -> None:
    _check_dense(argument, value)
    if is_dtensor(value):
        raise TypeError(f"{argument}: expected a plain tensor, got a DTensor; {argument}.full_tensor() is one")
    if value.dim() != 0 or value.dtype not in REALS:
        mend = f"{argument}.squeeze() has none" if value.dtype in REALS and value.numel() == 1 else ""
        raise wrong(ValueError, argument, "a number or a real tensor of 0 dimensions", value, mend)
    if value.requires_grad and torch.is_grad_enabled():
        warn_once(f"a gradient of {argument}")


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
    _check_number("c", c, 1e-30, 1.0, "a number from 1e-30 to 1", "for plain cross entropy pass reg_weight=0")
    check_reg_weight(reg_weight)
    if not isinstance(ignore_index, (int, Integral)) or isinstance(ignore_index, bool):
        raise wrong(TypeError, "ignore_index", "an int", ignore_index)
    if not (may_hold(ignore_index >= -(2**63)) and may_hold(ignore_index < 2**63)):
        raise wrong(ValueError, "ignore_index", "an int of 64 bits", ignore_index)
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise wrong(ValueError, "reduction", "'none', 'mean' or 'sum'", reduction)
    if denominator is not None:
        if reduction != "mean":
            raise wrong(ValueError, "denominator", f"None with reduction={reduction!r}", denominator)
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
            raise wrong(TypeError, argument, "True, False or None", value)
    for argument, value in (("inplace", inplace), ("return_parts", return_parts)):
        if not isinstance(value, bool):
            raise wrong(TypeError, argument, "True or False", value)
    if not (backend is None or isinstance(backend, str)) or backend not in BACKENDS:
        raise wrong(ValueError, "backend", "None, 'triton', 'compile' or 'eager'", backend)
    if shard is not None and not isinstance(shard, VocabShard):
        raise wrong(TypeError, "shard", "a VocabShard or None", shard)


def is_dtensor(value: object) -> bool:
    """Whether it is a DTensor, which it can be only where somebody has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _check_dense(argument: str, value: Tensor) -> None:
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
            _check_dense(argument, value)
        elif value is not None or argument in needed:
            expected = "a tensor" if argument in needed else "a tensor or None"
            raise wrong(TypeError, argument, expected, value, "" if value is None else AS_TENSOR)


def _way_to_floats(argument: str, value: Tensor) -> str:
    """What mends a dtype that is none of ``FLOATS``."""
    if value.is_complex():
        return f"{argument}.real and {argument}.abs() are real"
    return f"{argument}.{'dequantize' if value.is_quantized else 'float'}() converts it"


def _check_beside(argument: str, value: Tensor, input: Tensor) -> None:
    if is_dtensor(value):
        raise TypeError(f"{argument}: expected a plain tensor, as input is one, got a DTensor")
    if value.device != input.device:
        raise ValueError(f"{argument}: expected a tensor on {input.device}, as input, got one on {value.device}")


def under_autocast(device: torch.device) -> bool:
    """Whether autocast chooses dtypes on the device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_indices(target: Tensor, logits_shape: torch.Size, dim: int) -> None:
    """Dtype and shape of class indices; dimension ``dim`` of the logits is the classes."""
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
    chunk_rows: int | None,
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
    check_chunk_rows(chunk_rows)


def check_size(argument: str, value: object, expected: str = "an int") -> None:
    """A number of features, classes or rows."""
    if not isinstance(value, (int, Integral)) or isinstance(value, bool):
        raise wrong(TypeError, argument, expected, value)
    if value < 1:
        raise wrong(ValueError, argument, f"{expected} of at least 1", value)
    if value >= 2**63:
        raise wrong(ValueError, argument, f"{expected} of 64 bits", value)


def check_chunk_rows(chunk_rows: int | None) -> None:
    """A number of rows, or None."""
    if chunk_rows is not None:
        check_size("chunk_rows", chunk_rows, "None or an int")


def check_class_weights(weight: object, sizes: tuple[int, ...] = ()) -> None:
    """Class weights before there are logits: of one of these sizes, where they are known."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        expected = "a tensor of class weights or None"
        raise wrong(TypeError, "weight", expected, weight, f"{AS_TENSOR}; other options are keywords, such as c=1e-7")
    _check_dense("weight", weight)
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


# What is said once a process, where somebody would wonder about it.
ONCE = {
    "many classes": (
        f"The regularizer S sums over the classes, and from K = {MANY_CLASSES} on it outweighs the cross entropy: "
        "networks then learn little or nothing. Pass class_mean=True to divide it by K - 1, or class_mean=False to "
        "keep the sum and silence this."
    ),
    "plain autograd": (
        "target or weight requires a gradient, which only plain autograd gives: on a CPU it takes 10 to 30 times as "
        "long. If that gradient is not wanted, as of a teacher's probabilities, pass target.detach() (or "
        "weight.detach()); if it is, backend='eager' silences this."
    ),
    "all logits": (
        "linear: expected a plain nn.Linear without hooks; this one is called, as it may do more than multiply by its "
        "weight. So all logits, N x K, and their gradient are in memory, and not a chunk of them. To go without them, "
        "merge the adapter, remove the hooks, or use torch.nn.utils.parametrizations."
    ),
    **{
        f"a gradient of {argument}": (
            f"{argument} requires a gradient and gets none: no gradient flows through it. Pass {argument}.detach() to "
            "silence this."
        )
        for argument in ("reg_weight", "denominator")
    },
}
_warned: set[str] = set()  # of ONCE


def warn_once(what: str) -> None:
    """Warn with a text of ``ONCE``, once a process, at the user's line."""
    if what in _warned:
        return
    _warned.add(what)
    warn_user(ONCE[what])


# While compiling it runs once, as the graph is traced. (torch.compiler.assume_constant_result sets no more than this
# attribute, but importing it loads Dynamo.)
warn_once._dynamo_marked_constant = True


def check_many_classes(num_classes: int, reg_weight: float | Tensor) -> None:
    """Warn, once a process, where the plain sum over many classes drowns the cross entropy: unless λ is known as 0."""
    if num_classes < MANY_CLASSES:
        return
    if not torch.compiler.is_compiling():  # which would compile the number in
        reg_weight = value_on_cpu(reg_weight)
        if not isinstance(reg_weight, Tensor) and reg_weight == 0:
            return
    warn_once("many classes")
