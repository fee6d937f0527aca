"""A linear layer and the loss together, without the logits in between: the public function and its autograd Functions.

The two ways to the gradient are those of the loss itself. For ``"mean"`` and ``"sum"`` the gradients are computed
together with the loss, and the backward hands them over, each when it is asked for. For ``"none"``, whose upstream
gradient is a vector, the backward computes what it is asked for again.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager
from .autograd import apply, is_functional, reduced
from .backend import primitives
from .checks import (
    check_are_tensors,
    check_linear,
    check_many_classes,
    check_options,
    check_range,
    is_dtensor,
    of_shard,
    under_autocast,
)
from .chunks import How, linear_losses_and_gradients
from .internals import hidden_from_modes, is_exporting, is_watched
from .loss import backend_of, factor_of, is_transformed, options_of, per_class_of, result_of, returned, share_of
from .primitives import DOUBLE_BACKWARD, kept_options, options_again
from .reference import Parts
from .sharding.shard import VocabShard

SECOND_BACKWARD = (
    "linear_self_regularized_entropy: the gradients were computed together with the loss and handed over by the first "
    "backward; pass reduction='none', which computes them in every backward, to run it through the same graph again"
)
NO_GRADIENTS = (False, False, False)


def _is_asked_for(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward that runs goes on to a node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf whose gradient autograd.grad is to return, or in no backward at all
        return True


def _asked_for(ctx, wanted: tuple[bool, bool, bool]) -> tuple[bool, ...]:
    """Which of the gradients the backward that runs is for: pipelines run one for the input's, another for the rest."""
    if is_watched():
        return wanted
    edges = ctx.next_functions
    return tuple(want and _is_asked_for(edges[i][0]) for i, want in enumerate(wanted))


class LinearSinglePass(torch.autograd.Function):
    """Loss and gradients, which are outputs for the sake of those who differentiate through them, to be told no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, factor, reduction, how,
        c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes,
    ):  # fmt: skip
        options = (c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes)
        # With 1/N in them, gradients in float16 would vanish before the loss scaler reaches them.
        how = how._replace(early=how.dtype != torch.float16)
        tensors = input, linear_weight, linear_bias, target, weight, factor
        losses, *gradients, factor = linear_losses_and_gradients(*tensors, None, how, *options)
        return reduced(losses[0], factor, reduction, how.backend), losses, factor, *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, losses, factor, *gradients = output
        ctx.num_inputs, ctx.how = len(inputs), inputs[7]
        ctx.handed_over = NO_GRADIENTS
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, factor, *(gradients if torch.compiler.is_compiling() else ()))
        ctx.save_for_backward(factor, *gradients)

    @staticmethod
    def backward(ctx, grad_loss, _, __, *grad_gradients):
        compiling = torch.compiler.is_compiling()
        if not compiling and any(gradient is not None for gradient in grad_gradients):
            raise RuntimeError(DOUBLE_BACKWARD)
        asked = _asked_for(ctx, ctx.how.wanted)
        if not compiling and any(map(operator.and_, asked, ctx.handed_over)):
            raise RuntimeError(SECOND_BACKWARD)
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
        input, linear_weight, linear_bias, target, weight, factor, reduction, how,
        c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes,
    ):  # fmt: skip
        options = (c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes)
        tensors = input, linear_weight, linear_bias, target, weight, factor
        how = how._replace(wanted=NO_GRADIENTS)
        losses, *_, factor = linear_losses_and_gradients(*tensors, None, how, *options)
        return reduced(losses[0], factor, reduction, how.backend), losses, factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.how = inputs[:8]
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *kept_options(ctx, inputs[8:]))

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * ctx.num_inputs
        input, linear_weight, linear_bias, target, weight, factor, *saved = ctx.saved_tensors
        tensors = input, linear_weight, linear_bias, target, weight, factor
        asked = _asked_for(ctx, ctx.how.wanted)
        arguments = *tensors, grad_loss, ctx.how._replace(wanted=asked), *options_again(ctx, saved)
        if torch.compiler.is_compiling():
            _, *gradients, _ = linear_losses_and_gradients(*arguments)
        else:
            _, *gradients, _ = apply(_LinearGradients, *arguments, count=3)
        gradients = (g if ask else None for g, ask in zip(gradients, asked, strict=True))
        return *gradients, *(None,) * (ctx.num_inputs - 3)


class _LinearGradients(torch.autograd.Function):
    """The gradients, as a node whose own backward says no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, linear_weight, linear_bias, target, weight, factor, upstream, how,
        c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes,
    ):  # fmt: skip
        options = (c, reg_weight, ignore, smoothing, z_loss, cap, first_class, all_classes)
        tensors = input, linear_weight, linear_bias, target, weight, factor, upstream
        return linear_losses_and_gradients(*tensors, how, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DOUBLE_BACKWARD)


@hidden_from_modes
def linear_self_regularized_entropy(
    input: Tensor,  # (..., D)
    linear_weight: Tensor,  # (K, D)
    target: Tensor,  # class indices (...), or probabilities (..., K)
    *,
    linear_bias: Tensor | None = None,  # (K,)
    weight: Tensor | None = None,  # (K,)
    chunk_rows: int | None = None,
    c: float = 1e-7,
    reg_weight: float | Tensor = 1.0,
    class_mean: bool | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_parts: bool = False,
    shard: VocabShard | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Parts]:
    r"""A linear layer and the self-regularized entropy of its logits, which never exist all at a time.

    For features x (one row of ``input``), W (``linear_weight``) and b (``linear_bias``)::

        z = W x + b
        loss = H(z) - reg_weight * S(z)

    the values and gradients of ``self_regularized_entropy(F.linear(input, W, b), target)`` with the classes in the last
    dimension, in the memory of a chunk of rows: the product, the loss with the gradient written over the logits, and
    the products that make the gradients of input, W and b of it, one chunk after another. The gradients are there when
    the forward ends. With ``reduction="none"``, and in a program of ``torch.export``, the backward computes logits and
    gradients anew.

    Args:
        input: features (..., D), in float16, bfloat16, float32 or float64; under autocast the logits have its dtype.
        linear_weight: W (K, D), of the input's dtype, or of any but float64 under autocast. A layer that does more than
            multiply by its weight (an adapter, hooks) is for :class:`LinearSelfRegularizedEntropyLoss`, which calls it.
        target: class indices (int64, int32, int16, int8 or uint8) of shape (...), or probabilities (..., K) in any
            floating dtype. For a language model shift the labels, ``labels.roll(-1, 1)`` with the last column set to
            ``ignore_index``: logits and features that are sliced must be copied.
        linear_bias: b (K,), or None.
        weight: class weights (K,).
        chunk_rows: how many rows make a chunk; the result depends on it by roundings alone. None is chosen so that a
            chunk has at most 2^24 logits but 512 rows or more on a CPU (64 MiB in float32), 2^28 but 1024 rows or more
            elsewhere (512 MiB in bfloat16), and chunks are about equal.
        c: the probability to which wrong classes are pushed, from 1e-30 to 1.
        reg_weight: λ, finite; a number or a 0-dim tensor, through which no gradient flows.
        class_mean: divide S by K - 1; None is the plain sum and warns where :func:`self_regularized_entropy` does.
        ignore_index: rows with this class index have loss 0, and nothing of them reaches any gradient, not even NaN;
            a CPU spends no time on them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``F.cross_entropy``. With "none", features or weights that
            are changed before the backward through NumPy, which PyTorch does not see, silently change the gradients.
        denominator: with ``"mean"``, divide by this number or 0-dim tensor instead, through which no gradient
            flows. Pass a count that is a tensor as it is: ``count.item()`` waits for a GPU, and ends a graph of
            ``torch.compile`` (with ``fullgraph=True`` an error) unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set.
        label_smoothing: ε; y becomes (1 - ε) y + ε / K.
        z_loss: α >= 0; adds α lse².
        softcap: s > 0; the logits become s tanh(z / s) first.
        return_parts: also return :class:`Parts`.
        shard: which classes the rows of linear_weight are of, where each rank of a process group has some
            (:class:`VocabShard`): three collectives a chunk, of which the last sums the input's gradient over the
            ranks; with ``reduction="none"`` the backward repeats them. ``target`` are the class indices among all
            classes; ``weight`` and target probabilities are of the shard's classes or of all, as their shapes say.
            DTensors need none.
        backend: who computes the loss of a chunk, ``"triton"``, ``"compile"`` or None, which chooses as
            :func:`self_regularized_entropy` does; ``"eager"`` is a plain linear layer and plain autograd.

    Returns:
        As :func:`self_regularized_entropy`: the loss, float32 (float64 for float64), a scalar or with
        ``reduction="none"`` of shape (...); with ``return_parts`` a pair of it and :class:`Parts`. The gradients of
        linear_weight and linear_bias are summed over the chunks in float32, and are rounded to their dtype once.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        IndexError: a class index on a CPU is out of range. On a GPU or inside ``torch.compile`` its row is NaN, and so
            are all gradients of parameters.
        RuntimeError: in the backward, when a gradient is asked for a second time (not with ``reduction="none"``) or is
            differentiated itself (see ``backend``).

    Example:
        >>> features = torch.randn(2, 16, 64, requires_grad=True)
        >>> head = torch.nn.Linear(64, 1000, bias=False)
        >>> labels = torch.randint(1000, (2, 16))
        >>> loss = linear_self_regularized_entropy(features, head.weight, labels, class_mean=True)
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([1000, 64])

    Source: the loss as :func:`self_regularized_entropy`.
    """
    check_options(
        c=c,
        reg_weight=reg_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        denominator=denominator,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        class_mean=class_mean,
        return_parts=return_parts,
        shard=shard,
        backend=backend,
    )
    needed = {"input": input, "linear_weight": linear_weight, "target": target}
    check_are_tensors(needed, {"linear_bias": linear_bias, "weight": weight})
    layout = None
    if is_dtensor(input) or is_dtensor(linear_weight):
        from .sharding.dtensor import of_linear

        input, linear_weight, linear_bias, target, weight, shard, layout = of_linear(
            input, linear_weight, linear_bias, target, weight, shard
        )
    if shard is not None and input.dim() > 0:
        target, weight = of_shard(shard, target, weight, input.dim(), dim=input.dim() - 1)
    check_linear(input, linear_weight, linear_bias, target, weight, ignore_index, chunk_rows, shard)
    num_here, num_features = linear_weight.shape
    num_classes = num_here if shard is None else shard.num_classes
    shape = input.shape[:-1]
    indices = target.shape != (*shape, num_here)
    if indices:
        target = target.long()  # before anything is compared with it: in uint8, 300 is 44
    none_ignored = indices and check_range(target, num_classes, ignore_index)
    if class_mean is None:
        check_many_classes(num_classes, reg_weight)

    rows = input.reshape(-1, num_features)
    target = target.reshape(-1) if indices else target.reshape(rows.shape[0], num_here)
    per_class = per_class_of(class_mean, num_classes)
    name = backend_of(backend, input, target, weight, shard)
    reduction, share = share_of(layout, reduction, denominator)

    # Where the weights of some targets are in other shards, the sum of all comes with the numbers of the rows.
    divide = shard is not None and weight is not None and indices and reduction == "mean" and denominator is None
    count = 1.0 if divide else denominator
    factor = factor_of(reduction, count, rows, num_classes, target, weight, ignore_index, none_ignored, name)
    if share != 1:
        factor = factor * share
    dtype = input.dtype
    if dtype != torch.float64 and under_autocast(input.device):
        dtype = torch.get_autocast_dtype(input.device.type)
    tensors = rows, linear_weight, linear_bias
    # A program that is exported has the op's formula, whatever is wanted now.
    wants_gradient = torch.is_grad_enabled() and not is_exporting()
    wanted = tuple(wants_gradient and tensor is not None and tensor.requires_grad for tensor in tensors)
    how = How(
        backend=name,
        chunk_rows=int(chunk_rows or 0),
        dtype=dtype,
        wanted=wanted,
        early=True,
        group="" if shard is None else shard.name,
        divide=divide,
    )
    options = options_of(c, reg_weight, ignore_index, label_smoothing, z_loss, softcap, per_class, name, rows, shard)

    if name == "eager":
        if indices and not none_ignored:
            rows = torch.where((target == ignore_index).unsqueeze(1), 0, rows)
        logits = F.linear(rows, linear_weight, linear_bias)
        loss, losses = eager.row_loss(logits, target, weight, none_ignored, *options[:-2])  # without those of a shard
        loss = reduced(loss, factor, reduction, name)
    elif any(wanted) or is_transformed():
        function = LinearSinglePass if any(wanted) and reduction != "none" else LinearRecompute
        loss, losses, factor, *_ = apply(function, *tensors, target, weight, factor, reduction, how, *options, count=3)
    else:
        losses, *_, factor = linear_losses_and_gradients(*tensors, target, weight, factor, None, how, *options)
        loss = reduced(losses[0], factor, reduction, name)
    loss, parts = result_of(loss, losses, factor, per_class, reduction=reduction, shape=shape, with_parts=return_parts)
    return returned(loss, parts, layout, reduction, return_parts)
