"""The public function: shapes, reduction, and the autograd Functions over the row primitives.

Two ways to the gradient. In a *single pass* it is computed together with the loss, already divided by the mean's
denominator, and the backward hands it over, multiplied by the upstream gradient where that is not 1. With
*recompute* the forward keeps seven numbers a row and the backward reads the logits again.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .backend import choose, primitives
from .checks import (
    check_inplace,
    check_many_classes,
    check_options,
    check_range,
    check_tensors,
)
from .ops import is_batched, is_watched
from .reference import Parts, compute_dtype, sample_weights

SECOND_BACKWARD = (
    "self_regularized_entropy: the gradient was computed together with the loss and handed over by the first backward; "
    "pass recompute=True to run backward through the same graph again"
)
DOUBLE_BACKWARD = (
    "self_regularized_entropy: the gradient cannot be differentiated again; pass backend='eager', which can"
)


def _reduced(losses: Tensor, factor: Tensor, reduction: str) -> Tensor:
    """(4, N) -> () or (N,): a tensor of its own, so that the user may change it in place."""
    return losses[0].clone() if reduction == "none" else losses[0].sum() * factor


def _functional(grad_loss: Tensor) -> bool:
    """Whether the backward must not write in place: it is watched, batched, or recorded itself."""
    return is_watched() or is_batched(grad_loss) or torch.is_grad_enabled()


# No *args in a forward beside setup_context: torch.compile counts its parameters to see whether it takes a ctx.


class _SinglePass(torch.autograd.Function):
    """Loss and gradient from one read of the logits.

    The stored gradient is an output, so that whoever differentiates through it comes to this node's backward, which
    says no. (While compiling it is marked as non-differentiable instead, and PyTorch says no.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows, target, weight, factor, backend, reduction, inplace, c, reg_weight, ignore, smoothing, z_loss, cap
    ):
        options = (c, reg_weight, ignore, smoothing, z_loss, cap)
        row_primitives = primitives(backend)
        compute = row_primitives.row_loss_and_gradient_ if inplace else row_primitives.row_loss_and_gradient
        losses, gradient = compute(rows, target, weight, factor.expand(rows.shape[0]), *options)
        return _reduced(losses, factor, reduction), losses, gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, losses, gradient = output
        ctx.num_inputs = len(inputs)
        ctx.backend = inputs[4]
        ctx.handed_over = False
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*((losses, gradient) if torch.compiler.is_compiling() else (losses,)))
        ctx.save_for_backward(gradient)

    @staticmethod
    def backward(ctx, grad_loss, _, grad_gradient):
        no_more = (None,) * (ctx.num_inputs - 1)
        if torch.compiler.is_compiling():
            (gradient,) = ctx.saved_tensors
            return (gradient * grad_loss.unsqueeze(-1)).to(gradient.dtype), *no_more
        if grad_gradient is not None:
            raise RuntimeError(DOUBLE_BACKWARD)
        if ctx.handed_over:
            raise RuntimeError(SECOND_BACKWARD)
        if grad_loss is None:
            return None, *no_more
        (gradient,) = ctx.saved_tensors
        if _functional(grad_loss):
            return (gradient * grad_loss.unsqueeze(-1)).to(gradient.dtype), *no_more
        ctx.handed_over = True
        return primitives(ctx.backend).scale_gradient_(gradient.detach(), grad_loss), *no_more


class _Recompute(torch.autograd.Function):
    """Loss from one read of the logits; the gradient from another, in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows, target, weight, factor, backend, reduction, inplace, c, reg_weight, ignore, smoothing, z_loss, cap
    ):
        options = (c, reg_weight, ignore, smoothing, z_loss, cap)
        losses, stats = primitives(backend).row_loss(rows, target, weight, *options)
        return _reduced(losses, factor, reduction), losses, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, target, weight, factor, backend, _, inplace, c, reg_weight, *options = inputs
        _, losses, stats = output
        ctx.backend, ctx.inplace, ctx.options = backend, inplace, tuple(options)
        ctx.num_inputs = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses, stats)
        ctx.save_for_backward(rows, target, weight, factor, c, reg_weight, stats)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        no_more = (None,) * (ctx.num_inputs - 1)
        if grad_loss is None:
            return None, *no_more
        rows, target, weight, factor, c, reg_weight, stats = ctx.saved_tensors
        scale = (factor * grad_loss).expand(rows.shape[0])
        arguments = (target, weight, stats, scale, c, reg_weight, *ctx.options)
        if torch.compiler.is_compiling():
            return primitives(ctx.backend).row_gradient(rows, *arguments), *no_more
        if ctx.inplace and not _functional(grad_loss):
            return primitives(ctx.backend).row_gradient_(rows, *arguments), *no_more
        return _RowGradient.apply(rows, ctx.backend, *arguments), *no_more


class _RowGradient(torch.autograd.Function):
    """The gradient, as a node whose own backward says no."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows, backend, target, weight, stats, scale, c, reg_weight, ignore, smoothing, z_loss, cap):
        options = (c, reg_weight, ignore, smoothing, z_loss, cap)
        return primitives(backend).row_gradient(rows, target, weight, stats, scale, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(DOUBLE_BACKWARD)


def _as_rows(tensor: Tensor) -> Tensor:
    """(K,), (N, K) or (N, K, d1, ...) -> (rows, K); the same tensor where it has that shape."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.movedim(1, -1).flatten(0, -2)


def _own_rows(rows: Tensor) -> bool:
    """Whether rows lie in memory, one after another, so that a gradient can be written over them."""
    return rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and not rows.is_meta


def self_regularized_entropy(
    input: Tensor,  # (K,), (N, K) or (N, K, d1, ...)
    target: Tensor,  # class indices (), (N,) or (N, d1, ...), or probabilities shaped as input
    weight: Tensor | None = None,  # (K,)
    *,
    c: float = 1e-7,
    reg_weight: float | Tensor = 1.0,
    class_mean: bool | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace: bool = False,
    recompute: bool | None = None,
    return_parts: bool = False,
    shard: None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Parts]:
    r"""Cross entropy minus the entropy of a coin with odds p_j : c for every wrong class.

    For one row of logits z with target class g and p = softmax(z)::

        H = -log p_g
        R(p) = a log a + b log b,   a = c / (c + p),   b = p / (c + p)
        S = -sum_{j != g} R(p_j)
        loss = H - reg_weight * S

    -R(p) is largest, log 2, at p = c, so every wrong class is pushed to the probability c. With target probabilities
    y, H is -sum_j y_j log p_j and S is -sum_j (1 - y_j) R(p_j). With ``reg_weight=0`` this is ``F.cross_entropy``,
    argument for argument, except that the loss of half-precision logits is float32, that an ignored row has gradient
    0 even where it holds NaN, and that 0 log 0 = 0 where a probability of 0 meets a logit of -inf.

    Args:
        input: logits, (K,), (N, K) or (N, K, d1, ..., dk), in float16, bfloat16, float32 or float64. The arithmetic
            is float32 (float64 for float64). A logit of -inf masks its class. NaN and +inf spoil their own row only
            (a ``softcap`` makes infinities finite).
        target: class indices (int64 or uint8) of the input's shape without the class dimension, or probabilities of
            the input's shape and any floating dtype, whose rows need not sum to 1 (only H is scaled by that sum).
        weight: class weights (K,). H is weighted as in ``F.cross_entropy``; S and the z-loss of a row are multiplied
            by the weight of its target, sum_j w_j y_j for probabilities.
        c: the probability to which wrong classes are pushed, from 1e-30 to 1.
        reg_weight: λ, finite; a number or a 0-dim tensor, through which no gradient flows.
        class_mean: divide S by K - 1 (0 when K = 1). None is the plain sum, and warns once where it is likely to
            drown the cross entropy: K >= 256 and ``reg_weight=1``.
        ignore_index: rows with this class index have loss 0 and gradient 0, whatever they hold.
        reduction: ``"mean"`` (over the weights of the rows that are not ignored), ``"sum"`` or ``"none"``.
        denominator: with ``"mean"``, divide by this number or 0-dim tensor instead.
        label_smoothing: ε; y becomes (1 - ε) y + ε / K.
        z_loss: α >= 0; adds α lse², lse the logsumexp of the row.
        softcap: s > 0; the logits become s tanh(z / s) first.
        inplace: let the gradient take the storage of the logits, whose values are gone afterwards: after the forward,
            or with ``recompute`` after the backward; compute other losses and metrics from them first. It is used where
            rows lie one after another in memory, outside ``torch.compile``, not by "eager", and when a gradient is
            wanted at all.
        recompute: False computes the gradient together with the loss (one read and one write of N x K for the whole
            step; a second backward through the graph raises). True keeps seven numbers a row and reads the logits
            again in the backward. None is True for float16, whose small gradients vanish before a loss scaler reaches
            them, and for ``reduction="none"``; else False. "eager" keeps what autograd keeps.
        return_parts: also return :class:`Parts`.
        shard: not available in this version; None.
        backend: ``"triton"`` (kernels for a GPU; on a CPU only in Triton's interpreter; not float64), ``"compile"``
            (``torch.compile`` over blocks of rows), ``"eager"`` (plain autograd, differentiable twice) or None, which
            chooses: ``"eager"`` where ``target`` or ``weight`` require a gradient and for ``torch.func`` transforms
            inside ``torch.compile``, else ``"triton"`` on a GPU that has it, else ``"compile"``.

    Returns:
        The loss, float32 (float64 for float64 logits), a scalar or with ``reduction="none"`` one number a row; with
        ``return_parts`` a pair of it and ``Parts(cross_entropy, regularizer, z_loss)``, detached and reduced like it:
        loss = cross_entropy - reg_weight * regularizer + z_loss.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, dtype, shape, device or range.
        IndexError: a class index on a CPU is out of range. On a GPU or inside ``torch.compile`` its row is NaN.
        RuntimeError: in the backward, when it comes a second time (see ``recompute``) or is differentiated itself
            (see ``backend``).

    Example:
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> target = torch.randint(10, (8,))
        >>> loss, parts = self_regularized_entropy(logits, target, return_parts=True)
        >>> loss.backward()
        >>> torch.allclose(loss.detach(), parts.cross_entropy - parts.regularizer)
        True

    Source: "Self-Regularized-Entropy: Robust Image Classification via Class-wise Softmax Suppression", project page,
    January 2021.
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
        recompute=recompute,
        inplace=inplace,
        return_parts=return_parts,
        shard=shard,
        backend=backend,
    )
    check_tensors(input, target, weight, ignore_index)
    dim = min(1, input.dim() - 1)
    num_classes = input.shape[dim]
    indices = target.shape != input.shape
    if indices:
        target = target.long()  # before anything is compared with it: in uint8, 300 is 44
        check_range(target, num_classes, ignore_index)
    wants_gradient = torch.is_grad_enabled() and input.requires_grad
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if inplace and wants_gradient and not torch.compiler.is_compiling():
        check_inplace(input)
    if class_mean is None:
        check_many_classes(num_classes, reg_weight)

    others = (tensor for tensor in (target, weight) if tensor is not None)
    name = choose(backend, input, torch.is_grad_enabled() and any(tensor.requires_grad for tensor in others))
    if name == "eager":
        loss, parts = reference.self_regularized_entropy(
            input,
            target,
            weight,
            c=c,
            reg_weight=reg_weight,
            class_mean=bool(class_mean),
            ignore_index=ignore_index,
            reduction=reduction,
            denominator=denominator,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
        return (loss, parts) if return_parts else loss

    dtype = compute_dtype(input.dtype)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    rows = _as_rows(input)
    target = target.flatten() if indices else _as_rows(target)
    # λ' and the mean over the classes are one number.
    per_class = (1 / (num_classes - 1) if num_classes > 1 else 0.0) if class_mean else 1.0
    # A number times a tensor, which torch.compile traces without compiling the number in. In eager code it is a number
    # again when a kernel is launched; in a graph for a GPU, nothing may lie on the CPU if it is to become a CUDA graph.
    graph_on_gpu = name == "triton" and torch.compiler.is_compiling()
    one = torch.ones((), dtype=torch.float64, device=input.device if graph_on_gpu else "cpu")
    if isinstance(reg_weight, Tensor):
        reg_weight = reg_weight.detach().to(one.device if reg_weight.device.type == "cpu" else input.device, dtype)
    else:
        reg_weight = one * reg_weight
    reg_weight = reg_weight * per_class
    if reduction != "mean":
        factor = torch.ones((), dtype=dtype, device=input.device)
    else:
        if denominator is None:
            denominator = sample_weights(target, weight, ignore_index).sum() if indices else rows.shape[0]
        if isinstance(denominator, Tensor):
            factor = denominator.detach().to(input.device, dtype).reciprocal()
        else:
            factor = torch.ones((), dtype=dtype, device=input.device) / denominator
    options = (
        one * c,
        reg_weight,
        int(ignore_index),
        float(label_smoothing),
        float(z_loss),
        float(softcap or 0.0),
    )

    if wants_gradient or transformed:
        inplace = inplace and wants_gradient and not is_watched() and _own_rows(rows)
        if not wants_gradient:
            recompute = True
        elif recompute is None:
            recompute = input.dtype == torch.float16 or reduction == "none"
        function = _Recompute if recompute else _SinglePass
        loss, losses, _ = function.apply(rows, target, weight, factor, name, reduction, inplace, *options)
    else:
        losses, _ = primitives(name).row_loss(rows, target, weight, *options)
        loss = _reduced(losses, factor, reduction)
    if reduction == "none":
        loss = loss.reshape(shape)
    if not return_parts:
        return loss
    parts = losses[1:].reshape(3, *shape) if reduction == "none" else losses[1:].sum(1) * factor
    cross_entropy, regularizer, z_penalty = parts.unbind()
    return loss, Parts(cross_entropy, regularizer * per_class, z_penalty)
