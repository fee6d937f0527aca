"""The arguments of a call, checked and as rows: of both public functions the same from here on."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import choose, primitives
from .checks import (
    FLOATS,
    check_are_tensors,
    check_inplace,
    check_linear,
    check_range,
    check_tensors,
    is_dtensor,
    of_shard,
)
from .internals import in_forward_mode, is_exporting, is_jit_tracing, is_seen_by_modes, is_watched
from .options import SIMPLE, Options, check_many_classes, check_options
from .primitives import RowOptions


class Arguments(NamedTuple):
    """What of a call is on this rank."""

    inputs: tuple[Tensor | None, ...]  # what may get a gradient: logits (N, K), or features (N, D), W (K, D), b (K,)
    target: Tensor  # (N,) or (N, K)
    weight: Tensor | None  # (K,)
    options: Options
    num_classes: int  # K, with the classes of all shards
    shape: torch.Size  # of the loss without reduction
    none_ignored: bool  # no class index is ignored, and all were seen to be in range
    wanted: tuple[bool, ...]  # which of the inputs gets a gradient
    layout: object  # of DTensors (sharding/dtensor.py), or None
    plan: "Plan | None" = None  # of an ordinary call
    is_single_pass: bool = False  # an ordinary call that wants its gradient at once, in memory of its own

    @property
    def rows(self) -> Tensor:
        """What a row of the loss belongs to: logits or features."""
        return self.inputs[0]

    @property
    def weights_are_shared_out(self) -> bool:
        """Whether the mean divides by weights of targets that are in other shards.

        Their sum then comes with the numbers of the rows, and the losses are divided by it later.
        """
        options = self.options
        if options.shard is None or self.weight is None or self.target.dim() != 1:
            return False
        return options.reduction == "mean" and options.denominator is None


class Plan(NamedTuple):
    """What follows from options, dtype, device and K, of an ordinary call."""

    backend: str
    options: RowOptions
    single_pass: Callable | None  # of the backend, with all this in it; not of "eager"


@functools.lru_cache(maxsize=64, typed=True)
def _plan(dtype: torch.dtype, device: torch.device, num_classes: int, *values: float | str | None) -> Plan:
    """Of the values of Options; made again only for values, or types of them, that have not passed."""
    options = Options(*values)
    check_options(options)
    rows = torch.empty(0, num_classes, dtype=dtype, device=device)
    backend = choose(options.backend, rows, differentiable_arguments=False)
    row_options = options.of_rows(num_classes, backend, rows)
    if backend == "eager":
        return Plan(backend, row_options, None)
    return Plan(backend, row_options, primitives(backend).single_pass(dtype, device, num_classes, row_options))


def recomputes(options: Options, dtype: torch.dtype) -> bool:
    """Whether the gradient of logits is computed in the backward."""
    if options.recompute is None:
        return dtype == torch.float16 or options.reduction == "none"
    return options.recompute


def _with_number(options: Options) -> Options:
    """The options with λ as a number, where it is a tensor on the CPU that nobody would complain of, as a module's."""
    reg_weight = options.reg_weight
    plain = reg_weight.is_cpu and reg_weight.layout is torch.strided and not reg_weight.is_nested
    if plain and reg_weight.dtype is torch.float32 and reg_weight.dim() == 0:
        value = reg_weight.item()  # on a CPU
        if math.isfinite(value) and not reg_weight.requires_grad:
            return Options(options.c, value, *options[2:])  # _replace takes 2 us
    return options


def of_ordinary_logits(input: Tensor, target: Tensor, options: Options) -> Arguments | None:
    """The arguments of a call in plain eager code: logits (N, K), class indices (N,), options that are numbers.

    Most calls are so, and what Python does for them takes half the time. None of others.
    """
    if not (
        not is_seen_by_modes()
        and (type(input) is Tensor or type(input) is torch.nn.Parameter)
        and type(target) is Tensor
        and input.dim() == 2
        and input.dtype in FLOATS
        and target.dtype is torch.int64
        and input.layout is target.layout is torch.strided
        and not input.is_meta
        and not (is_watched() or in_forward_mode() or is_jit_tracing() or input.is_nested or target.is_nested)
    ):
        return None
    if type(options.reg_weight) is Tensor:
        options = _with_number(options)
    if not SIMPLE.issuperset(map(type, options)):
        return None
    num_rows, num_classes = input.shape
    if num_classes == 0 or target.shape != (num_rows,) or target.device != input.device:
        return None
    try:
        plan = _plan(input.dtype, input.device, num_classes, *options)
    except (TypeError, ValueError, RuntimeError):  # which is raised in its turn, where any call is looked at
        return None
    none_ignored = check_range(target, num_classes, options.ignore_index, watched=False)
    wanted = torch.is_grad_enabled() and input.requires_grad
    if options.inplace and wanted:
        check_inplace(input)
    check_many_classes(options, num_classes)
    return Arguments(
        inputs=(input,),
        target=target,
        weight=None,
        options=options,
        num_classes=num_classes,
        shape=target.shape,
        none_ignored=none_ignored,
        wanted=(wanted,),
        layout=None,
        plan=plan,
        is_single_pass=wanted and not options.inplace and not recomputes(options, input.dtype),
    )


def _as_rows(tensor: Tensor) -> Tensor:
    """(K,), (N, K) or (N, K, d1, ...) -> (rows, K); the same tensor where it has that shape."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.movedim(1, -1).flatten(0, -2)


def _wanted(inputs: tuple[Tensor | None, ...]) -> tuple[bool, ...]:
    """Which of the inputs gets a gradient. A program that is exported has the op's formula, whatever is wanted now."""
    if not torch.is_grad_enabled() or is_exporting():
        return (False,) * len(inputs)
    return tuple([tensor is not None and tensor.requires_grad for tensor in inputs])


def of_logits(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Arguments:
    """The arguments of the loss of logits."""
    check_options(options)
    check_are_tensors({"input": input, "target": target}, {"weight": weight})
    layout, shard = None, options.shard
    if is_dtensor(input):
        from .sharding import dtensor

        input, target, weight, shard, layout = dtensor.of_logits(input, target, weight, shard)
    dim = min(1, input.dim() - 1)
    if shard is not None and input.dim() > 0:
        target, weight = of_shard(shard, target, weight, input.dim(), dim)
    check_tensors(input, target, weight, options.ignore_index, shard)
    num_classes = input.shape[dim] if shard is None else shard.num_classes
    indices = target.shape != input.shape
    if indices:
        target = target.long()  # before anything is compared with it: in uint8, 300 is 44
    none_ignored = indices and check_range(target, num_classes, options.ignore_index)
    wanted = _wanted((input,))
    if options.inplace and any(wanted) and not torch.compiler.is_compiling():
        check_inplace(input)
    check_many_classes(options, num_classes)
    return Arguments(
        inputs=(_as_rows(input),),
        target=target.flatten() if indices else _as_rows(target),
        weight=weight,
        options=options if shard is options.shard else options._replace(shard=shard),  # which takes 2 us
        num_classes=num_classes,
        shape=input.shape[:dim] + input.shape[dim + 1 :],
        none_ignored=none_ignored,
        wanted=wanted,
        layout=layout,
    )


def of_linear(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> Arguments:
    """The arguments of a linear layer and its loss."""
    check_options(options)
    needed = {"input": input, "linear_weight": linear_weight, "target": target}
    check_are_tensors(needed, {"linear_bias": linear_bias, "weight": weight})
    layout, shard = None, options.shard
    if is_dtensor(input) or is_dtensor(linear_weight):
        from .sharding import dtensor

        input, linear_weight, linear_bias, target, weight, shard, layout = dtensor.of_linear(
            input, linear_weight, linear_bias, target, weight, shard
        )
    if shard is not None and input.dim() > 0:
        target, weight = of_shard(shard, target, weight, input.dim(), dim=input.dim() - 1)
    check_linear(input, linear_weight, linear_bias, target, weight, options.ignore_index, shard)
    num_here, num_features = linear_weight.shape
    num_classes = num_here if shard is None else shard.num_classes
    shape = input.shape[:-1]
    indices = target.shape != (*shape, num_here)
    if indices:
        target = target.long()  # before anything is compared with it: in uint8, 300 is 44
    none_ignored = indices and check_range(target, num_classes, options.ignore_index)
    check_many_classes(options, num_classes)
    rows = input.reshape(-1, num_features)
    inputs = rows, linear_weight, linear_bias
    return Arguments(
        inputs=inputs,
        target=target.reshape(-1) if indices else target.reshape(rows.shape[0], num_here),
        weight=weight,
        options=options if shard is options.shard else options._replace(shard=shard),  # which takes 2 us
        num_classes=num_classes,
        shape=shape,
        none_ignored=none_ignored,
        wanted=_wanted(inputs),
        layout=layout,
    )
