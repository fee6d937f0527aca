"""From the losses of rows to the result of a call: what they are multiplied by, their reduction, the parts."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Arguments
from .backend import backend_of, primitives
from .primitives import NUM_LOSSES, RowOptions, needs_dispatch
from .reference import Parts, compute_dtype, sample_weights


class Call(NamedTuple):
    """What is decided before anything is computed."""

    backend: str
    reduction: str
    factor: Tensor  # (): what the sum of the rows' losses is multiplied by
    divide: bool  # the factor, by the weights of all ranks' targets, once they are known
    options: RowOptions


def reduced(losses: Tensor, factor: Tensor, reduction: str, backend: str) -> Tensor:
    """(N,), or such a column, -> () or itself: a tensor of its own, so that the user may change it in place."""
    if reduction == "none":
        return losses.flatten().clone()
    if few_launches(losses, backend):
        return primitives(backend).scaled_sum(losses, factor)
    return losses.sum() * factor


def few_launches(rows: Tensor, backend: str) -> bool:
    """Whether kernels/small.py does in one launch what takes PyTorch several, for values of rows in eager code."""
    if backend != "triton" or not 0 < rows.shape[0] <= primitives(backend).FEW_ROWS:
        return False
    return not needs_dispatch(rows, (rows,))


def _factor_of(arguments: Arguments, reduction: str, divide: bool, backend: str) -> Tensor:
    """What the sum of the rows' losses is multiplied by, ()."""
    rows, target, weight, options = arguments.rows, arguments.target, arguments.weight, arguments.options
    dtype, denominator = compute_dtype(rows.dtype), options.denominator
    if reduction != "mean" or divide:
        denominator = 1.0
    elif denominator is None:
        if target.dim() == 2 or (arguments.none_ignored and weight is None):
            denominator = rows.shape[0]
        elif few_launches(rows, backend):
            return primitives(backend).inverse_count(target, weight, arguments.num_classes, options.ignore_index)
        else:
            denominator = sample_weights(target, weight, options.ignore_index).sum()
    if isinstance(denominator, Tensor):
        return denominator.detach().to(rows.device, dtype).reciprocal()
    if torch.compiler.is_compiling():  # which would compile the number in
        return torch.ones((), dtype=dtype, device=rows.device) / denominator
    if arguments.is_single_pass and rows.is_cpu:
        return _kept_inverse(denominator, dtype)
    return _inverse(denominator, dtype, rows.device)


def _inverse(denominator: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 / denominator as a tensor, ()."""
    return torch.full((), 1 / denominator if denominator else math.inf, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _kept_inverse(denominator: float, dtype: torch.dtype) -> Tensor:
    """The same on the CPU: for calls that neither save nor return it, as who has it may write over it."""
    with torch.inference_mode(False):
        return _inverse(denominator, dtype, torch.device("cpu"))


def _share_of(arguments: Arguments) -> tuple[str, float]:
    """How this rank reduces its rows, and which share the mean of them has in the mean of all (sharding/dtensor.py)."""
    options, layout = arguments.options, arguments.layout
    if layout is None or options.reduction != "mean" or options.denominator is not None:
        return options.reduction, 1.0
    return ("mean", layout.share) if layout.share else ("sum", 1.0)  # there is no mean of no rows


def _parts_of(losses: Tensor, call: Call, per_class: float, shape: torch.Size) -> Parts:
    """The parts, from the losses of the rows (4, N)."""
    losses = losses.detach()
    if call.reduction == "none":
        parts = losses.reshape(NUM_LOSSES, *shape)[1:].contiguous()
    else:
        parts = losses[1:].sum(1) * call.factor
    cross_entropy, regularizer, z_penalty = parts.unbind()
    return Parts(cross_entropy, regularizer * per_class, z_penalty)


def _call_of(arguments: Arguments) -> Call:
    """What is to be computed for any arguments."""
    options = arguments.options
    backend = backend_of(options.backend, arguments.rows, arguments.target, arguments.weight, options.shard)
    reduction, share = _share_of(arguments)
    divide = reduction == "mean" and arguments.weights_are_shared_out
    factor = _factor_of(arguments, reduction, divide, backend)
    if share != 1:
        factor = factor * share
    return Call(backend, reduction, factor, divide, options.of_rows(arguments.num_classes, backend, arguments.rows))


def result_of(
    arguments: Arguments, compute: Callable[[Arguments, Call], tuple[Tensor, Tensor, Tensor]]
) -> Tensor | tuple[Tensor, Parts]:
    """What the user gets.

    Args:
        arguments: of the call.
        compute: returns the reduced loss, the losses of the rows (4, N), and the factor, if it was divided since.
    """
    options, layout, plan = arguments.options, arguments.layout, arguments.plan
    if plan is None:
        call = _call_of(arguments)
    else:
        factor = _factor_of(arguments, options.reduction, False, plan.backend)
        call = Call(plan.backend, options.reduction, factor, False, plan.options)
    reduction = call.reduction
    loss, losses, factor = compute(arguments, call)
    if reduction == "none" and loss.shape != arguments.shape:  # FSDP2 warns of views
        loss = loss.reshape(arguments.shape)
    parts = None
    if options.return_parts:
        per_class = options.per_class(arguments.num_classes)
        parts = _parts_of(losses, call._replace(factor=factor), per_class, arguments.shape)
    if layout is not None:
        loss = layout.result(loss, reduction)
        parts = parts and Parts(*(layout.result(part, reduction) for part in parts))
    return (loss, parts) if options.return_parts else loss
