"""The public function: arguments, shapes and reduction around the autograd Functions."""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import eager
from .autograd import Recompute, SinglePass, apply, few_launches, reduced
from .backend import choose, primitives
from .checks import (
    check_are_tensors,
    check_backend_of_shard,
    check_inplace,
    check_many_classes,
    check_options,
    check_range,
    check_tensors,
    is_dtensor,
    may_hold,
    of_shard,
    warn_once,
)
from .internals import hidden_from_modes, is_exporting, is_watched
from .primitives import NUM_LOSSES, value_on_cpu
from .reference import Parts, compute_dtype, sample_weights
from .sharding.collectives import row_loss
from .sharding.shard import VocabShard


def _as_rows(tensor: Tensor) -> Tensor:
    """(K,), (N, K) or (N, K, d1, ...) -> (rows, K); the same tensor where it has that shape."""
    if tensor.dim() == 2:
        return tensor
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.movedim(1, -1).flatten(0, -2)


def factor_of(reduction, denominator, rows, num_classes, target, weight, ignore_index, none_ignored, backend) -> Tensor:
    """What the sum of the rows' losses is multiplied by, (), given the weights of all ``num_classes``."""
    dtype = compute_dtype(rows.dtype)
    if reduction != "mean":
        denominator = 1.0
    elif denominator is None:
        if target.dim() == 2 or (none_ignored and weight is None):
            denominator = rows.shape[0]
        elif few_launches(rows, backend):
            return primitives(backend).inverse_count(target, weight, num_classes, ignore_index)
        else:
            denominator = sample_weights(target, weight, ignore_index).sum()
    if isinstance(denominator, Tensor):
        return denominator.detach().to(rows.device, dtype).reciprocal()
    if torch.compiler.is_compiling():  # which would compile the number in
        return torch.ones((), dtype=dtype, device=rows.device) / denominator
    return torch.full((), 1 / denominator if denominator else math.inf, dtype=dtype, device=rows.device)


def per_class_of(class_mean: bool | None, num_classes: int) -> float:
    """What the mean over the wrong classes multiplies S by."""
    if not class_mean:
        return 1.0
    return 1 / (num_classes - 1) if num_classes > 1 else 0.0


def options_of(
    c, reg_weight, ignore_index, label_smoothing, z_loss, softcap, per_class: float, backend: str, rows: Tensor, shard
) -> tuple:
    """The last arguments of the primitives (OPTIONS): λ' is λ times what the mean over the classes makes of it."""
    number, device = float, "cpu"
    if torch.compiler.is_compiling():
        # A tensor times a number is traced without compiling the number in. In a graph for a GPU, nothing may lie on
        # the CPU if it is to become a CUDA graph.
        device = rows.device if backend == "triton" else "cpu"
        number = torch.ones((), dtype=torch.float64, device=device).mul
    reg_weight = value_on_cpu(reg_weight)
    if isinstance(reg_weight, Tensor):
        device = device if reg_weight.device.type == "cpu" else rows.device
        reg_weight = reg_weight.detach().to(device, compute_dtype(rows.dtype))
    else:
        reg_weight = number(reg_weight)
    others = [None if x is None or not may_hold(x != 0) else number(x) for x in (label_smoothing, z_loss, softcap)]
    of_classes = (0, None) if shard is None else (shard.start, shard.num_classes)
    return number(c), reg_weight * per_class, int(ignore_index), *others, *of_classes


def is_transformed() -> bool:
    """Whether somebody differentiates or batches whose tensors need not say that they require a gradient."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def result_of(
    loss: Tensor,
    losses: Tensor,  # (4, rows)
    factor: Tensor,
    per_class: float,
    *,
    reduction: str,
    shape: torch.Size,
    with_parts: bool,
) -> tuple[Tensor, Parts | None]:
    """The loss, without reduction in ``shape``, and its parts, if they are wanted."""
    if reduction == "none":
        loss = loss if loss.shape == shape else loss.reshape(shape)  # FSDP2 warns of views
        losses = losses.reshape(NUM_LOSSES, *shape)
    if not with_parts:
        return loss, None
    losses = losses.detach()
    parts = losses[1:].contiguous() if reduction == "none" else losses[1:].sum(1) * factor
    cross_entropy, regularizer, z_penalty = parts.unbind()
    return loss, Parts(cross_entropy, regularizer * per_class, z_penalty)


def backend_of(
    backend: str | None, input: Tensor, target: Tensor, weight: Tensor | None, shard: VocabShard | None
) -> str:
    """Who computes. The user hears of it where a gradient that nobody may want makes it slow."""
    others = (tensor for tensor in (target, weight) if tensor is not None)
    differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in others)
    name = choose(backend, input, differentiable)
    if shard is not None:
        check_backend_of_shard(name)
    if differentiable and backend is None:
        warn_once("plain autograd")
    return name


def share_of(layout, reduction: str, denominator) -> tuple[str, float]:
    """How this rank reduces its rows, and which share the mean of them has in the mean of all (sharding/dtensor.py)."""
    if layout is None or reduction != "mean" or denominator is not None:
        return reduction, 1.0
    return ("mean", layout.share) if layout.share else ("sum", 1.0)  # there is no mean of no rows


def returned(
    loss: Tensor, parts: Parts | None, layout, reduction: str, return_parts: bool
) -> Tensor | tuple[Tensor, Parts]:
    """What the user gets."""
    if layout is not None:
        loss = layout.result(loss, reduction)
        parts = parts and Parts(*(layout.result(part, reduction) for part in parts))
    return (loss, parts) if return_parts else loss


def _own_rows(rows: Tensor) -> bool:
    """Whether rows lie in memory, one after another, so that a gradient can be written over them."""
    return rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and not rows.is_meta


@hidden_from_modes
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
    shard: VocabShard | None = None,
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
        target: class indices (int64, int32, int16, int8 or uint8) of the input's shape without the class dimension, or
            probabilities of the input's shape and any floating dtype, whose rows need not sum to 1 (only H is scaled
            by that sum).
        weight: class weights (K,). H is weighted as in ``F.cross_entropy``; S and the z-loss of a row are multiplied
            by the weight of its target, sum_j w_j y_j for probabilities.
        c: the probability to which wrong classes are pushed, from 1e-30 to 1.
        reg_weight: λ, finite; a number or a 0-dim tensor, through which no gradient flows.
        class_mean: divide S by K - 1 (0 when K = 1). None is the plain sum, and warns once where it is likely to
            drown the cross entropy: K >= 256, unless λ is 0. (One on a GPU or in a compiled graph is never read, and
            counts as not 0.)
        ignore_index: rows with this class index have loss 0 and gradient 0, whatever they hold.
        reduction: ``"mean"`` (over the weights of the rows that are not ignored), ``"sum"`` or ``"none"``.
        denominator: with ``"mean"``, divide by this number or 0-dim tensor instead, through which no gradient flows.
            Pass a count that is a tensor as it is: ``count.item()`` waits for a GPU, and ends a graph of
            ``torch.compile`` (with ``fullgraph=True`` an error) unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set.
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
            them, and for ``reduction="none"``; else False. A program of ``torch.export`` does what True does. "eager"
            keeps what autograd keeps.
            Logits that are changed in between through NumPy, which PyTorch does not see, silently change a gradient
            that is still to be computed.
        return_parts: also return :class:`Parts`.
        shard: which classes the logits are of, where each rank of a process group has some (:class:`VocabShard`): two
            collectives in the forward, none in the backward. ``target`` are the class indices among all classes.
            ``weight`` and target probabilities are of the shard's classes or of all, as their shapes say. A DTensor
            needs none.
        backend: ``"triton"`` (kernels for a GPU; on a CPU only in Triton's interpreter; not float64), ``"compile"``
            (``torch.compile``: one loop over the rows), ``"eager"`` (plain autograd, differentiable twice) or None,
            which chooses: ``"eager"``, slow, where ``target`` or ``weight`` require a gradient (detach what needs none)
            and for ``torch.func`` transforms inside ``torch.compile``, else ``"triton"`` on a GPU that has it, else
            ``"compile"``. A ``TorchFunctionMode`` sees nothing of the loss unless "eager" is asked for.

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
    check_are_tensors({"input": input, "target": target}, {"weight": weight})
    layout = None
    if is_dtensor(input):
        from .sharding.dtensor import of_logits

        input, target, weight, shard, layout = of_logits(input, target, weight, shard)
    if shard is not None and input.dim() > 0:
        target, weight = of_shard(shard, target, weight, input.dim(), dim=min(1, input.dim() - 1))
    check_tensors(input, target, weight, ignore_index, shard)
    dim = min(1, input.dim() - 1)
    num_classes = input.shape[dim] if shard is None else shard.num_classes
    indices = target.shape != input.shape
    if indices:
        target = target.long()  # before anything is compared with it: in uint8, 300 is 44
    none_ignored = indices and check_range(target, num_classes, ignore_index)
    # A program that is exported has the op's formula, whatever is wanted now.
    wants_gradient = torch.is_grad_enabled() and input.requires_grad and not is_exporting()
    if inplace and wants_gradient and not torch.compiler.is_compiling():
        check_inplace(input)
    if class_mean is None:
        check_many_classes(num_classes, reg_weight)

    name = backend_of(backend, input, target, weight, shard)
    reduction, share = share_of(layout, reduction, denominator)

    rows = _as_rows(input)
    target = target.flatten() if indices else _as_rows(target)
    # λ' and the mean over the classes are one number.
    per_class = per_class_of(class_mean, num_classes)
    # Where the weights of some targets are in other shards, their sum comes with the numbers of the rows.
    sum_later = shard is not None and weight is not None and indices and reduction == "mean" and denominator is None
    count = 1.0 if sum_later else denominator
    factor = factor_of(reduction, count, rows, num_classes, target, weight, ignore_index, none_ignored, name)
    if share != 1:
        factor = factor * share
    options = options_of(c, reg_weight, ignore_index, label_smoothing, z_loss, softcap, per_class, name, rows, shard)
    known = None, None
    if shard is not None:
        losses, stats = known = row_loss(rows, target, weight, factor, name, shard.name, *options)
        if sum_later:
            counted = (target != ignore_index) & (target >= 0) & (target < num_classes)
            factor = factor / torch.where(counted, stats[4], 0).sum()

    if name == "eager":
        loss, losses = eager.row_loss(rows, target, weight, none_ignored, *options[:-2])  # without those of a shard
        loss = reduced(loss, factor, reduction, name)
    elif wants_gradient or is_transformed():
        inplace = inplace and wants_gradient and not is_watched() and _own_rows(rows)
        if not wants_gradient:
            recompute = True
        elif recompute is None:
            recompute = input.dtype == torch.float16 or reduction == "none"
        function = Recompute if recompute else SinglePass
        loss, losses, _ = apply(function, rows, target, weight, factor, *known, name, reduction, inplace, *options)
    else:
        if shard is None:
            losses, _ = primitives(name).row_loss(rows, target, weight, *options)
        loss = reduced(losses[0], factor, reduction, name)
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    loss, parts = result_of(loss, losses, factor, per_class, reduction=reduction, shape=shape, with_parts=return_parts)
    return returned(loss, parts, layout, reduction, return_parts)
