"""The public functions: their signatures, and where each goes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .arguments import Arguments, of_linear, of_logits, of_ordinary_logits
from .autograd import loss_of_logits
from .internals import hidden_from_modes
from .linear import loss_of_linear
from .options import KeywordsOfLinear, KeywordsOfLogits, Options
from .reference import Parts
from .results import result_of
from .sharding.shard import VocabShard

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def self_regularized_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_parts: Literal[False] = False,
    **options: "Unpack[KeywordsOfLogits]",
) -> Tensor: ...
@overload
def self_regularized_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_parts: Literal[True],
    **options: "Unpack[KeywordsOfLogits]",
) -> tuple[Tensor, Parts]: ...
@overload
def self_regularized_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    return_parts: bool,
    **options: "Unpack[KeywordsOfLogits]",
) -> Tensor | tuple[Tensor, Parts]: ...
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
            collectives in the forward (three beyond 64 ranks), none in the backward. ``target`` are the class indices
            among all classes. ``weight`` and target probabilities are of the shard's classes or of all, as their
            shapes say. A DTensor needs none.
        backend: ``"triton"`` (kernels for a GPU; on a CPU only in Triton's interpreter; not float64), ``"compile"``
            (``torch.compile``: one loop over the rows), ``"eager"`` (plain autograd, differentiable twice) or None,
            which chooses: ``"eager"``, slow, where ``target`` or ``weight`` require a gradient (detach what needs none)
            and for ``torch.func`` transforms inside ``torch.compile``, else ``"triton"`` on a GPU that has it, else
            ``"compile"``, but few logits run uncompiled until it pays to compile (README, "The first call"). A
            ``TorchFunctionMode`` sees nothing of the loss unless "eager" is asked for.

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
    options = Options(
        c, reg_weight, class_mean, ignore_index, reduction, denominator, label_smoothing, z_loss, softcap,
        return_parts, shard, backend, inplace, recompute,
    )  # fmt: skip
    if weight is None:
        ordinary = of_ordinary_logits(input, target, options)
        if ordinary is not None:
            return result_of(ordinary, loss_of_logits)
    return _loss(of_logits, loss_of_logits, options, input, target, weight)


@overload
def linear_self_regularized_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_parts: Literal[False] = False,
    **options: "Unpack[KeywordsOfLinear]",
) -> Tensor: ...
@overload
def linear_self_regularized_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_parts: Literal[True],
    **options: "Unpack[KeywordsOfLinear]",
) -> tuple[Tensor, Parts]: ...
@overload
def linear_self_regularized_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    return_parts: bool,
    **options: "Unpack[KeywordsOfLinear]",
) -> Tensor | tuple[Tensor, Parts]: ...
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
    options = Options(
        c, reg_weight, class_mean, ignore_index, reduction, denominator, label_smoothing, z_loss, softcap,
        return_parts, shard, backend, chunk_rows=chunk_rows,
    )  # fmt: skip
    return _loss(of_linear, loss_of_linear, options, input, linear_weight, linear_bias, target, weight)


def _loss(
    of_tensors: Callable[..., Arguments], compute: Callable, options: Options, *tensors: Tensor | None
) -> Tensor | tuple[Tensor, Parts]:
    """What any call returns."""
    is_eager = isinstance(options.backend, str) and options.backend == "eager"
    return (_seen if is_eager else _hidden)(of_tensors, compute, options, *tensors)


def _seen(of_tensors, compute, options, *tensors) -> Tensor | tuple[Tensor, Parts]:
    """The same, which modes see."""
    return result_of(of_tensors(*tensors, options), compute)


_hidden = hidden_from_modes(_seen)
