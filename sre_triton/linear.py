"""A linear layer and the loss together, without the logits in between: the autograd Functions.

The two ways to the gradient are those of the loss itself. For ``"mean"`` and ``"sum"`` the gradients are computed
together with the loss, and the backward hands them over, each when it is asked for. For ``"none"``, whose upstream
gradient is a vector, the backward computes what it is asked for again.
"""

import operator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .arguments import Arguments
from .autograd import apply, is_functional
from .backend import primitives
from .checks import under_autocast
from .chunks import How
from .internals import is_batched, is_transformed, is_watched, will_execute
from .linear_primitive import linear_losses_and_gradients
from .messages import DOUBLE_BACKWARD, SECOND_BACKWARD_OF_LINEAR
from .primitives import RowOptions, kept_options, options_again
from .results import Call, reduced

NO_GRADIENTS = (False, False, False)


def _asked_for(ctx: Any, wanted: tuple[bool, bool, bool]) -> tuple[bool, ...]:
    """Which of the gradients the backward that runs is for: pipelines run one for the input's, another for the rest."""
    if is_watched():
        return wanted
    edges = ctx.next_functions
    return tuple(want and will_execute(edges[i][0]) for i, want in enumerate(wanted))


class LinearSinglePass(torch.autograd.Function):
    """Loss and gradients, which are outputs for the sake of those who differentiate through them, to be told no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        reduction: str,
        how: How,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(the loss, (4, N) losses of the rows, the factor, the three gradients)."""
        # With 1/N in them, gradients in float16 would vanish before the loss scaler reaches them.
        how = how._replace(early=how.dtype != torch.float16)
        tensors = input, linear_weight, linear_bias, target, weight, factor
        losses, *gradients, factor = linear_losses_and_gradients(*tensors, None, how, options)
        return reduced(losses[0], factor, reduction, how.backend), losses, factor, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients, and the factor for float16."""
        _, losses, factor, *gradients = output
        ctx.num_inputs, ctx.how = len(inputs), inputs[7]
        ctx.handed_over = NO_GRADIENTS
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, factor, *(gradients if torch.compiler.is_compiling() else ()))
        ctx.save_for_backward(factor, *gradients)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, _: Tensor | None, __: Tensor | None, *grad_gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Those gradients that are asked for, times the upstream one: each in place, so only once."""
        compiling = torch.compiler.is_compiling()
        if not compiling and any(gradient is not None for gradient in grad_gradients):
            raise RuntimeError(DOUBLE_BACKWARD)
        asked = _asked_for(ctx, ctx.how.wanted)
        if not compiling and any(map(operator.and_, asked, ctx.handed_over)):
            raise RuntimeError(SECOND_BACKWARD_OF_LINEAR)
        if grad_loss is None:
            return (None,) * ctx.num_inputs
        factor, *gradients = ctx.saved_tensors
        if ctx.how.dtype == torch.float16:
            # Infinite where no row is counted, and all gradients are 0.
            grad_loss = grad_loss * torch.where(factor.isinf(), 0, factor)
        functional = compiling or is_functional(grad_loss)
        handed_over = tuple(map(operator.or_, asked, ctx.handed_over))
        # Autograd would not give the others any more if one of what it has saved had changed.
        in_place = not functional and handed_over == ctx.how.wanted
        scaled = []
        for gradient, ask in zip(gradients, asked, strict=True):
            if not ask:
                scaled.append(None)
            elif not in_place:
                # In float32: what has no dimensions would be brought to half precision first.
                scaled.append((gradient * grad_loss.unsqueeze(-1)).to(gradient.dtype))
            else:
                rows = gradient.detach() if gradient.dim() == 2 else gradient.detach().unsqueeze(0)
                scaled.append(primitives(ctx.how.backend).scale_gradient_(rows, grad_loss).view_as(gradient))
        if not functional:
            ctx.handed_over = handed_over
        return *scaled, *(None,) * (ctx.num_inputs - 3)


class LinearRecompute(torch.autograd.Function):
    """The loss alone; the backward computes logits and gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        reduction: str,
        how: How,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the loss, (4, N) losses of the rows, the factor)."""
        tensors = input, linear_weight, linear_bias, target, weight, factor
        how = how._replace(wanted=NO_GRADIENTS)
        losses, *_, factor = linear_losses_and_gradients(*tensors, None, how, options)
        return reduced(losses[0], factor, reduction, how.backend), losses, factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the arguments."""
        *tensors, _, ctx.how, options = inputs
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *kept_options(ctx, options))

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Those gradients that are asked for, computed now."""
        if grad_loss is None:
            return (None,) * ctx.num_inputs
        input, linear_weight, linear_bias, target, weight, factor, *saved = ctx.saved_tensors
        tensors = input, linear_weight, linear_bias, target, weight, factor
        asked = _asked_for(ctx, ctx.how.wanted)
        arguments = *tensors, grad_loss, ctx.how._replace(wanted=asked), options_again(ctx, saved)
        if torch.compiler.is_compiling():
            _, *gradients, _ = linear_losses_and_gradients(*arguments)
        else:
            watched = is_watched() or is_batched(grad_loss)
            _, *gradients, _ = apply(_LinearGradients, watched, *arguments, count=3)
        gradients = (g if ask else None for g, ask in zip(gradients, asked, strict=True))
        return *gradients, *(None,) * (ctx.num_inputs - 3)


class _LinearGradients(torch.autograd.Function):
    """The gradients, as a node whose own backward says no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        factor: Tensor,
        upstream: Tensor | None,
        how: How,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(the losses again, the three gradients, the factor)."""
        tensors = input, linear_weight, linear_bias, target, weight, factor, upstream
        return linear_losses_and_gradients(*tensors, how, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        """There is no second derivative."""
        raise RuntimeError(DOUBLE_BACKWARD)


def loss_of_linear(arguments: Arguments, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, () or (N,), the losses of the rows, (4, N), and the factor."""
    rows, linear_weight, linear_bias = tensors = arguments.inputs
    target, weight, wanted, shard = arguments.target, arguments.weight, arguments.wanted, arguments.options.shard
    backend, reduction, factor, divide, options = call
    if backend == "eager":
        if target.dim() == 1 and not arguments.none_ignored:
            rows = torch.where((target == options.ignore_index).unsqueeze(1), 0, rows)
        logits = F.linear(rows, linear_weight, linear_bias)
        loss, losses = eager.losses_of_rows(logits, target, weight, arguments.none_ignored, options)
        return reduced(loss, factor, reduction, backend), losses, factor
    dtype = rows.dtype
    if dtype != torch.float64 and under_autocast(rows.device):
        dtype = torch.get_autocast_dtype(rows.device.type)
    how = How(
        backend=backend,
        chunk_rows=int(arguments.options.chunk_rows or 0),
        dtype=dtype,
        wanted=wanted,
        early=True,
        group="" if shard is None else shard.name,
        divide=divide,
    )
    if any(wanted) or is_transformed():
        function = LinearSinglePass if any(wanted) and reduction != "none" else LinearRecompute
        given = *tensors, target, weight, factor, reduction, how, options
        loss, losses, factor, *_ = apply(function, is_watched(), *given, count=3)
        return loss, losses, factor
    losses, *_, factor = linear_losses_and_gradients(*tensors, target, weight, factor, None, how, options)
    return reduced(losses[0], factor, reduction, backend), losses, factor
