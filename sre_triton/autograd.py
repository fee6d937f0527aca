"""The autograd Functions over the row primitives: two ways to the gradient.

*Single pass*: the forward computes the gradient together with the loss, already multiplied by the factor of the mean.
The backward hands it over, multiplied by the upstream gradient where this is not 1. *Recompute*: the forward keeps the
seven statistics of each row, and the backward reads the logits again.

Where classes are sharded, sharding/collectives.py computes the losses and statistics before; a Function gets them as
arguments, and computes the gradient alone.
"""

import functools
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import eager
from .arguments import Arguments, recomputes
from .backend import primitives
from .internals import is_batched, is_transformed, is_watched
from .messages import DOUBLE_BACKWARD, FORWARD_AD, SECOND_BACKWARD
from .primitives import RowOptions, kept_options, options_again
from .results import Call, reduced
from .sharding.collectives import sharded_row_loss


def is_functional(grad_loss: Tensor) -> bool:
    """Whether the backward must not write in place: it is watched, batched, or recorded itself."""
    return is_watched() or is_batched(grad_loss) or torch.is_grad_enabled()


# A Function with `setup_context` has a `forward` without ctx. torch.compile tells the two kinds apart by the number of
# forward's parameters, so each is written out here, where *args would be shorter.


class SinglePass(torch.autograd.Function):
    """Loss and gradient from one read of the logits.

    The stored gradient is an output, so that whoever differentiates through it comes to this node's backward, which
    says no. (While compiling it is marked as non-differentiable instead, and PyTorch says no.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        target: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        losses: Tensor | None,
        stats: Tensor | None,
        backend: str,
        reduction: str,
        inplace: bool,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss, (4, N) losses of the rows, the gradient). Of sharded classes losses and stats are given."""
        row_primitives = primitives(backend)
        if stats is None:
            compute = row_primitives.row_loss_and_gradient_ if inplace else row_primitives.row_loss_and_gradient
            losses, gradient = compute(rows, target, weight, factor, options)
        else:
            compute = row_primitives.row_gradient_ if inplace else row_primitives.row_gradient
            gradient = compute(rows, target, weight, stats, factor, options)
            losses = losses.clone()  # not what came in
        return reduced(losses[0], factor, reduction, backend), losses, gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the gradient."""
        _, losses, gradient = output
        ctx.num_inputs = len(inputs)
        ctx.backend = inputs[6]
        ctx.handed_over = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((losses, gradient) if torch.compiler.is_compiling() else (losses,)))
        ctx.save_for_backward(gradient)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None, grad_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient that is there, times the upstream one: in place, so only once."""
        no_more = (None,) * (ctx.num_inputs - 1)
        if torch.compiler.is_compiling():
            (gradient,) = ctx.saved_tensors
            return (gradient * grad_loss.unsqueeze(-1)).to(gradient.dtype), *no_more
        return _hand_over(ctx, grad_loss, grad_gradient), *no_more


def _hand_over(ctx: Any, grad_loss: Tensor | None, grad_gradient: Tensor | None) -> Tensor | None:
    """The gradient that a single pass has stored, times the upstream one."""
    if grad_gradient is not None:
        raise RuntimeError(DOUBLE_BACKWARD)
    if ctx.handed_over:
        raise RuntimeError(SECOND_BACKWARD)
    if grad_loss is None:
        return None
    (gradient,) = ctx.saved_tensors
    if is_functional(grad_loss):
        return (gradient * grad_loss.unsqueeze(-1)).to(gradient.dtype)
    ctx.handed_over = True
    return primitives(ctx.backend).scale_gradient_(gradient.detach(), grad_loss)


class Recompute(torch.autograd.Function):
    """Loss from one read of the logits; the gradient from another, in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        target: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        losses: Tensor | None,
        stats: Tensor | None,
        backend: str,
        reduction: str,
        inplace: bool,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss, (4, N) losses of the rows, (7, N) statistics), which are returned as they are if they came in."""
        if stats is None:
            losses, stats = primitives(backend).row_loss(rows, target, weight, options)
        else:
            losses, stats = losses.clone(), stats.clone()  # not what came in
        return reduced(losses[0], factor, reduction, backend), losses, stats

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep the arguments and the statistics."""
        rows, target, weight, factor, _, _, ctx.backend, _, ctx.inplace, options = inputs
        _, losses, stats = output
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, stats)
        ctx.save_for_backward(rows, target, weight, factor, stats, *kept_options(ctx, options))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient, from the logits and the statistics."""
        no_more = (None,) * (ctx.num_inputs - 1)
        if grad_loss is None:
            return None, *no_more
        rows, target, weight, factor, stats, *saved = ctx.saved_tensors
        arguments = (target, weight, stats, factor * grad_loss, options_again(ctx, saved))
        if torch.compiler.is_compiling():
            return primitives(ctx.backend).row_gradient(rows, *arguments), *no_more
        if ctx.inplace and not is_functional(grad_loss):
            return primitives(ctx.backend).row_gradient_(rows, *arguments), *no_more
        watched = is_watched() or is_batched(grad_loss)
        return apply(_RowGradient, watched, rows, ctx.backend, *arguments), *no_more


class _RowGradient(torch.autograd.Function):
    """The gradient, as a node whose own backward says no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor,
        backend: str,
        target: Tensor,
        weight: Tensor | None,
        stats: Tensor,
        scale: Tensor,
        options: RowOptions,
    ) -> Tensor:
        """The gradient, (N, K)."""
        return primitives(backend).row_gradient(rows, target, weight, stats, scale, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        """There is no second derivative."""
        raise RuntimeError(DOUBLE_BACKWARD)


def _no_forward_ad(ctx: Any, *tangents: Tensor | None) -> NoReturn:
    """The ``jvp`` of all Functions: there is none."""
    raise NotImplementedError(FORWARD_AD)


class _OrdinarySinglePass(torch.autograd.Function):
    """SinglePass for an ordinary call (arguments.Plan), with as few objects and calls as there can be."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arguments: Arguments, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        """(the loss, (4, N) losses of the rows if the parts are wanted, the gradient)."""
        backend, reduction, factor, *_ = call
        return_parts = arguments.options.return_parts
        loss, losses, gradient = arguments.plan.single_pass(
            rows, arguments.target, factor, arguments.none_ignored, return_parts
        )
        ctx.backend, ctx.handed_over = backend, False
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        loss = reduced(loss, factor, reduction, backend)
        if not return_parts:
            return loss, None, gradient
        ctx.mark_non_differentiable(losses)
        return loss, losses, gradient

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None, grad_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        """As of SinglePass."""
        return _hand_over(ctx, grad_loss, grad_gradient), None, None

    jvp = staticmethod(_no_forward_ad)


@functools.cache
def _watched(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same for transforms, of which those in forward mode are told no; torch.compile takes no jvp."""
    return type(function.__name__, (function,), {"jvp": staticmethod(_no_forward_ad)})


@functools.cache
def _plain(function: type[torch.autograd.Function], count: int) -> type[torch.autograd.Function]:
    """The same for plain eager code.

    Where there is a setup_context, PyTorch binds the arguments anew at every call: a hundred microseconds, a quarter of
    a step's time in Python. And each argument costs, so that all but those with a gradient come as one.
    """

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...] | Tensor:
            """As ``function.forward`` and ``setup_context``."""
            args = *args[:count], *args[count]
            outputs = function.forward(*args)
            function.setup_context(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            """As ``function.backward``, for the arguments that are left."""
            return *function.backward(ctx, *grads)[:count], None

        jvp = staticmethod(_no_forward_ad)

    Plain.__name__ = Plain.__qualname__ = function.__name__
    return Plain


def apply(
    function: type[torch.autograd.Function], watched: bool, *arguments: Any, count: int = 1
) -> tuple[Tensor, ...] | Tensor:
    """Apply a Function, in plain eager code or ``watched``; its first ``count`` arguments may get a gradient."""
    if watched:
        return (function if torch.compiler.is_compiling() else _watched(function)).apply(*arguments)
    return _plain(function, count).apply(*arguments[:count], arguments[count:])


def _own_rows(rows: Tensor) -> bool:
    """Whether rows lie in memory, one after another, so that a gradient can be written over them."""
    return rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and not rows.is_meta


def loss_of_logits(arguments: Arguments, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, () or (N,), the losses of the rows, (4, N), and the factor."""
    (rows,), target, weight, factor = arguments.inputs, arguments.target, arguments.weight, call.factor
    backend, reduction, options, shard = call.backend, call.reduction, call.options, arguments.options.shard
    if backend == "eager":
        loss, losses = eager.losses_of_rows(rows, target, weight, arguments.none_ignored, options)
        return reduced(loss, factor, reduction, backend), losses, factor
    if arguments.is_single_pass:
        loss, losses, _ = _OrdinarySinglePass.apply(rows, arguments, call)
        return loss, losses, factor
    known = None, None
    if shard is not None:
        losses, stats = known = sharded_row_loss(rows, target, weight, factor, backend, shard.name, options)
        if call.divide:
            counted = (target != options.ignore_index) & (target >= 0) & (target < arguments.num_classes)
            factor = factor / torch.where(counted, stats[4], 0).sum()
    (wants_gradient,) = arguments.wanted
    if wants_gradient or is_transformed():
        watched = is_watched()
        inplace = arguments.options.inplace and wants_gradient and not watched and _own_rows(rows)
        recompute = not wants_gradient or recomputes(arguments.options, rows.dtype)
        function = Recompute if recompute else SinglePass
        given = rows, target, weight, factor, *known, backend, reduction, inplace, options
        loss, losses, _ = apply(function, watched, *given)
        return loss, losses, factor
    if shard is None:
        losses, _ = primitives(backend).row_loss(rows, target, weight, options)
    return reduced(losses[0], factor, reduction, backend), losses, factor
