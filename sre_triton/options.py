"""The options of the loss: their names and order, the check of each, and what rows take of them.

How an option goes, λ for example, and where to add another one:

    functional.py, modules.py    a keyword, in the docstring too; in `FLOATS` of modules.py if it is a float
    here                         `Options`, `Keywords`; its check in `_check_values`; `Options.of_rows` and `_of_rows`
                                 make λ' of it
    primitives.py                `RowOptions`, the last argument of all primitives, and `OPTIONS`, the same for ops
    kernels/                     launch.py `_scalars` -> rows.py `Scalars` -> rows.py, formulas.py: the mathematics;
                                 memory.py, and `plain` in launch.py, if a class then has more than its logit
    compiled/                    primitives.py `_made` -> passes.py `Scalars` -> passes.py, formulas.py; uncompiled.py,
                                 and `single_pass` in primitives.py, which knows what `ordinary` can do
    reference.py, eager.py       the same mathematics, for plain autograd
    sharding/collectives.py      `AGREED`: ranks must pass the same value
    tests/helpers.py, tests/variants.py, tests/ptx/check.py: what is tried with every kernel

Only Python numbers and scalar tensors are looked at, so nothing waits for a GPU, and all of it works while tracing. The
exception is a λ that lies on a CPU.
"""

import functools
import sys
from numbers import Real
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from .checks import REALS, check_dense, check_size, is_dtensor
from .internals import may_hold
from .messages import MANY_CLASSES, check_int, warn_once, wrong
from .primitives import RowOptions, value_on_cpu
from .reference import compute_dtype
from .sharding.shard import VocabShard

REDUCTIONS = ("none", "mean", "sum")
BACKENDS = (None, "triton", "compile", "eager")
SIMPLE = {bool, float, int, str, type(None)}  # types whose equal values are alike


class Keywords(TypedDict, total=False):
    """The types of the keywords that both functions have, beside ``return_parts``, which decides what is returned."""

    c: float
    reg_weight: float | Tensor
    class_mean: bool | None
    ignore_index: int
    reduction: str
    denominator: float | Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    shard: VocabShard | None
    backend: str | None


class KeywordsOfLogits(Keywords, total=False):
    """With those of :func:`sre_triton.self_regularized_entropy` alone."""

    inplace: bool
    recompute: bool | None


class KeywordsOfLinear(Keywords, total=False):
    """With those of :func:`sre_triton.linear_self_regularized_entropy` alone."""

    chunk_rows: int | None


class Options(NamedTuple):
    """The keywords of a call, in the order of the public signatures; those that one of the two lacks come last."""

    c: float
    reg_weight: float | Tensor
    class_mean: bool | None
    ignore_index: int
    reduction: str
    denominator: float | Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    return_parts: bool
    shard: VocabShard | None
    backend: str | None
    inplace: bool = False
    recompute: bool | None = None
    chunk_rows: int | None = None

    def per_class(self, num_classes: int) -> float:
        """What the mean over the wrong classes multiplies S by."""
        if not self.class_mean:
            return 1.0
        return 1 / (num_classes - 1) if num_classes > 1 else 0.0

    def of_rows(self, num_classes: int, backend: str, rows: Tensor) -> RowOptions:
        """What the primitives take, for rows of ``num_classes``: λ' is λ times what the mean over the classes makes.

        An option that is not in use is None, so that a kernel has no instruction for it. While compiling numbers become
        tensors, as the graph would hold for one value otherwise; one that may be 0 or not is in use.
        """
        of_classes = (0, None) if self.shard is None else (self.shard.start, self.shard.num_classes)
        # Who compiles a model waits anyway.
        now = self.backend == "compile" or (backend == "compile" and torch.compiler.is_compiling())
        reg_weight = value_on_cpu(self.reg_weight)
        may_be_none = self.label_smoothing, self.z_loss, self.softcap
        number, device = float, "cpu"
        if torch.compiler.is_compiling():
            # A tensor times a number is traced without compiling the number in. In a graph for a GPU, nothing may lie
            # on the CPU if it is to become a CUDA graph.
            device = rows.device if backend == "triton" else "cpu"
            number = torch.ones((), dtype=torch.float64, device=device).mul
        elif not isinstance(reg_weight, Tensor):
            per_class = self.per_class(num_classes)
            return _of_rows(self.c, reg_weight, per_class, self.ignore_index, may_be_none, of_classes, now)
        if isinstance(reg_weight, Tensor):
            device = device if reg_weight.device.type == "cpu" else rows.device
            reg_weight = reg_weight.detach().to(device, compute_dtype(rows.dtype))
        else:
            reg_weight = number(reg_weight)
        c, reg_weight = number(self.c), reg_weight * self.per_class(num_classes)
        others = [None if x is None or not may_hold(x != 0) else number(x) for x in may_be_none]
        return RowOptions(c, reg_weight, int(self.ignore_index), *others, *of_classes, now)


@functools.lru_cache(maxsize=64)
def _of_rows(c, reg_weight, per_class, ignore_index, may_be_none, of_classes, now) -> RowOptions:
    """:meth:`Options.of_rows` of numbers in eager code: the same object for the same numbers."""
    others = [None if x is None or x == 0 else float(x) for x in may_be_none]
    return RowOptions(float(c), float(reg_weight) * per_class, int(ignore_index), *others, *of_classes, now)


def _is_number(value: object) -> bool:
    """Whether it is a real number of Python or NumPy, and no bool."""
    # (int, float) comes first for torch.compile, which sees symbolic numbers as these.
    # Of the other real numbers only NumPy's can be multiplied by a tensor.
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, Real) and type(value).__module__ == "numpy"


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
    """A plain real tensor of 0 dimensions. Warns where it requires a gradient, which it does not get."""
    check_dense(argument, value)
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


def check_options(options: Options) -> None:
    """What can be judged alone. Numbers, strings and flags that have passed before pass at once."""
    if isinstance(options.reg_weight, Tensor):
        check_reg_weight(options.reg_weight)
        options = options._replace(reg_weight=0.0)
    if torch.compiler.is_compiling() or not SIMPLE.issuperset(map(type, options)):
        _check_values(options)
    else:
        _check_once(*options)


@functools.lru_cache(maxsize=256, typed=True)
def _check_once(*values: float | str | None) -> None:
    """:func:`_check_values`, again only for values or types that have not passed."""
    _check_values(Options(*values))


def _check_values(options: Options) -> None:
    """All options, one by one."""
    largest = sys.float_info.max
    # For a smaller c, a probability divided by c leaves the range of float32.
    _check_number("c", options.c, 1e-30, 1.0, "a number from 1e-30 to 1", "for plain cross entropy pass reg_weight=0")
    check_reg_weight(options.reg_weight)
    check_int("ignore_index", options.ignore_index)
    if not (may_hold(options.ignore_index >= -(2**63)) and may_hold(options.ignore_index < 2**63)):
        raise wrong(ValueError, "ignore_index", "an int of 64 bits", options.ignore_index)
    if not isinstance(options.reduction, str) or options.reduction not in REDUCTIONS:
        raise wrong(ValueError, "reduction", "'none', 'mean' or 'sum'", options.reduction)
    if options.denominator is not None:
        if options.reduction != "mean":
            raise wrong(ValueError, "denominator", f"None with reduction={options.reduction!r}", options.denominator)
        if isinstance(options.denominator, Tensor):
            _check_scalar_tensor("denominator", options.denominator)
        else:
            expected = "a number of at least 1e-30 or a tensor of 0 dimensions"
            _check_number("denominator", options.denominator, 1e-30, largest, expected)
    _check_number("label_smoothing", options.label_smoothing, 0.0, 1.0, "a number from 0 to 1")
    _check_number("z_loss", options.z_loss, 0.0, largest, "a finite number of at least 0")
    if options.softcap is not None:
        _check_number("softcap", options.softcap, 1e-30, 1e30, "None or a number from 1e-30 to 1e30")
    for argument, value in (("class_mean", options.class_mean), ("recompute", options.recompute)):
        if value is not None and not isinstance(value, bool):
            raise wrong(TypeError, argument, "True, False or None", value)
    for argument, value in (("inplace", options.inplace), ("return_parts", options.return_parts)):
        if not isinstance(value, bool):
            raise wrong(TypeError, argument, "True or False", value)
    if not (options.backend is None or isinstance(options.backend, str)) or options.backend not in BACKENDS:
        raise wrong(ValueError, "backend", "None, 'triton', 'compile' or 'eager'", options.backend)
    if options.shard is not None and not isinstance(options.shard, VocabShard):
        raise wrong(TypeError, "shard", "a VocabShard or None", options.shard)
    if options.chunk_rows is not None:
        check_size("chunk_rows", options.chunk_rows, "None or an int")


def check_many_classes(options: Options, num_classes: int) -> None:
    """Warn, once a process, where the plain sum over many classes drowns the cross entropy: unless λ is known as 0."""
    if options.class_mean is not None or num_classes < MANY_CLASSES:
        return
    if not torch.compiler.is_compiling():  # which would compile the number in
        reg_weight = value_on_cpu(options.reg_weight)
        if not isinstance(reg_weight, Tensor) and reg_weight == 0:
            return
    warn_once("many classes")
