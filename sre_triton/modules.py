"""The losses as ``nn.Module``."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_chunk_rows, check_options
from .linear import linear_self_regularized_entropy
from .loss import self_regularized_entropy
from .reference import Parts
from .shard import VocabShard


def _defaults(function: Callable, *but: str) -> dict[str, object]:
    """The keywords of a function that are attributes of its module."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in but}


class _Loss(torch.nn.Module):
    """Keeps the class weights as a buffer and the keywords of a function as attributes."""

    _DEFAULTS: dict[str, object]

    def _keep(self, arguments: dict[str, object]) -> None:
        self.register_buffer("weight", arguments["weight"])
        for name in self._DEFAULTS:
            setattr(self, name, arguments[name])

    def _options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._DEFAULTS}

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        changed = (
            item
            for item in self._options().items()
            if isinstance(item[1], Tensor) or item[1] != self._DEFAULTS[item[0]]
        )
        return ", ".join(f"{name}={value!r}" for name, value in changed)


class SelfRegularizedEntropyLoss(_Loss):
    """:func:`sre_triton.self_regularized_entropy` as a module: the same keywords, ``forward(input, target)``.

    Args:
        weight: class weights (K,), kept as a buffer; the other arguments are kept as attributes of the same names,
            and each may be changed between steps.

    Example:
        >>> criterion = SelfRegularizedEntropyLoss(class_mean=True)
        >>> logits = torch.randn(8, 1000, requires_grad=True)
        >>> criterion(logits, torch.randint(1000, (8,))).backward()
    """

    _DEFAULTS = _defaults(self_regularized_entropy)

    def __init__(
        self,
        weight: Tensor | None = None,
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
    ) -> None:
        super().__init__()
        self._keep(locals())
        check_options(**self._options())

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of logits (K,), (N, K) or (N, K, d1, ...) and class indices or probabilities."""
        return self_regularized_entropy(input, target, self.weight, **self._options())


class LinearSelfRegularizedEntropyLoss(_Loss):
    """A classifier's linear layer and its loss: :func:`sre_triton.linear_self_regularized_entropy` as a module.

    It takes features and never makes all logits. ``module.linear(features)`` makes them, to predict with. (To shard it,
    FSDP2 is to wrap this module or one around it, as its forward does not call that of ``linear``.)

    Args:
        in_features: D.
        num_classes: K.
        bias, device, dtype: of ``linear``, an ``nn.Linear(in_features, num_classes)``. To tie its weight to an
            embedding's, set ``module.linear.weight = embedding.weight``. With ``shard``, num_classes is K and
            ``linear`` has this rank's classes; or shard it with ``parallelize_module`` and ``ColwiseParallel``.
        weight: class weights (K,), kept as a buffer; the other arguments are kept as attributes of the same names,
            and each may be changed between steps.

    Example:
        >>> head = LinearSelfRegularizedEntropyLoss(64, 1000, class_mean=True)
        >>> features = torch.randn(2, 16, 64, requires_grad=True)
        >>> head(features, torch.randint(1000, (2, 16))).backward()
    """

    _DEFAULTS = _defaults(linear_self_regularized_entropy, "linear_bias", "weight")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
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
    ) -> None:
        super().__init__()
        self._keep(locals())
        options = self._options()
        check_chunk_rows(options.pop("chunk_rows"))
        check_options(**options)
        if shard is not None and shard.num_classes != num_classes:
            raise ValueError(f"shard: expected one of {num_classes} classes, as num_classes, got {shard}")
        num_here = num_classes if shard is None else shard.stop - shard.start
        self.linear = torch.nn.Linear(in_features, num_here, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of features (..., D) and class indices (...) or probabilities (..., K)."""
        linear = self.linear
        return linear_self_regularized_entropy(
            input, linear.weight, target, linear_bias=linear.bias, weight=self.weight, **self._options()
        )
