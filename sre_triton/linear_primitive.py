"""The linear layer and its loss as PyTorch sees them: one registered op, its fake, batching rule, formula and cost.

The computation is that of chunks.py. It is an op for the reasons that the primitives are (primitives.py).
"""

import torch
from torch import Tensor

from .chunks import How, gradient_dtype, losses_and_gradients
from .flops import count_flops
from .messages import DOUBLE_BACKWARD, OTHER_GRADIENTS
from .primitives import (
    NUM_LOSSES,
    NUM_OPTIONS,
    OPTIONS,
    RowOptions,
    as_tensors,
    kept_options,
    needs_dispatch,
    options_again,
    without_forward_ad,
)
from .reference import compute_dtype

NUM_TENSORS = 7  # the first arguments of the op


def _fake(
    input, linear_weight, linear_bias, target, weight, factor, upstream, backend, chunk_rows, dtype, wanted, *_
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns, not yet written."""
    of_input, of_weight, of_bias = wanted
    bias = linear_weight if linear_bias is None else linear_bias
    return (
        input.new_empty(NUM_LOSSES, input.shape[0], dtype=compute_dtype(dtype)),
        input.new_empty(input.shape if of_input else 0),
        linear_weight.new_empty(linear_weight.shape if of_weight else 0, dtype=gradient_dtype(linear_weight, dtype)),
        linear_weight.new_empty(linear_weight.shape[0] if of_bias else 0, dtype=gradient_dtype(bias, dtype)),
        factor.new_empty(()),
    )


def _one_by_one(info, in_dims, *args):
    """The batching rule. More rows in one call would not do, as gradients of parameters are sums over rows."""

    def of_call(arg, dim, i):
        """The argument of call i."""
        return arg.select(dim, i) if isinstance(dim, int) else arg

    calls = (map(of_call, args, in_dims, [i] * len(args)) for i in range(info.batch_size))
    outputs = [_op(*call) for call in calls]
    return tuple(torch.stack(output) for output in zip(*outputs, strict=True)), (0,) * len(outputs[0])


def _flops(
    input,
    linear_weight,
    linear_bias,
    target,
    weight,
    factor,
    upstream,
    backend,
    chunk_rows,
    dtype,
    wanted,
    *_,
    out_shape,
) -> int:
    """2 N D K for each product, that of the logits and those of gradients. K are the classes of this rank."""
    of_input, of_weight, _ = wanted
    (num_rows, num_features), (num_classes, _) = input, linear_weight
    return 2 * num_rows * num_features * num_classes * (1 + of_input + of_weight)


def _of_op(*args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`losses_and_gradients`, whose last two arguments an op takes one by one."""
    end = NUM_TENSORS + len(How._fields)  # PyTorch may leave out options after it that have their defaults
    return losses_and_gradients(*args[:NUM_TENSORS], How(*args[NUM_TENSORS:end]), RowOptions(*args[end:]))


def _setup_context(ctx, inputs, output):
    """Keep the arguments: the formula computes everything again."""
    if any(ctx.needs_input_grad[3:5]):
        raise ValueError(OTHER_GRADIENTS)
    ctx.how = How(*inputs[NUM_TENSORS:-NUM_OPTIONS])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(*inputs[:5], *kept_options(ctx, RowOptions(*inputs[-NUM_OPTIONS:])))


def _backward(ctx, grad_losses, *grad_gradients):
    """Logits and gradients are computed anew: what the losses are multiplied by later is known now alone."""
    if any(gradient is not None for gradient in grad_gradients):
        raise RuntimeError(DOUBLE_BACKWARD)
    input, linear_weight, linear_bias, target, weight, *saved = ctx.saved_tensors
    tensors = input, linear_weight, linear_bias, target, weight
    upstream = grad_losses[0]  # The other losses are the parts, through which no gradient flows.
    wanted = list(ctx.needs_input_grad[:3])
    one = torch.ones_like(upstream[:1]).squeeze(0)
    how = ctx.how._replace(wanted=wanted, early=True, divide=False)
    _, *gradients, _ = _op(*tensors, one, upstream, *how, *options_again(ctx, saved))
    gradients = (gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True))
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - 3)


_op = torch.library.custom_op(
    "sre_triton::linear_losses_and_gradients",
    without_forward_ad(_of_op),
    mutates_args=(),
    schema="(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight, Tensor factor, "
    "Tensor? upstream, str backend, int chunk_rows, ScalarType dtype, bool[] wanted, bool early, str group, "
    f"bool divide, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_vmap(_one_by_one)
_op.register_autograd(_backward, setup_context=_setup_context)
count_flops(torch.ops.sre_triton.linear_losses_and_gradients, _flops)


def linear_losses_and_gradients(
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
    """:func:`losses_and_gradients`, called as it is in ordinary eager code, else as the registered op."""
    tensors = input, linear_weight, linear_bias, target, weight, factor, upstream
    if any(tensor is not None and needs_dispatch(tensor, (tensor,)) for tensor in tensors):
        return _op(*tensors, *how._replace(wanted=list(how.wanted)), *as_tensors(options))
    return losses_and_gradients(*tensors, how, options)
