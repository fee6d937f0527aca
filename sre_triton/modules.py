"""The losses as ``nn.Module``."""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import (
    MANY_CLASSES,
    check_chunk_rows,
    check_many_classes,
    check_options,
    check_reg_weight,
    is_dtensor,
)
from .linear import linear_self_regularized_entropy
from .loss import self_regularized_entropy
from .reference import Parts
from .shard import VocabShard

LARGEST = torch.finfo(torch.float32).max


def _defaults(function: Callable, *but: str) -> dict[str, object]:
    """The keywords of a function that are attributes of its module."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in but}


class _Loss(torch.nn.Module):
    """Keeps class weights and λ as buffers and the other keywords of a function as attributes.

    A model with it can be scripted (torch.jit.script), as long as what is scripted does not come to call it.

    λ is in memory of its own that moves with the module alone, so that whoever has this memory, a compiled graph or on
    a GPU a captured one, sees it change; in float32, whatever becomes of the module; and not in the state, so that
    checkpoints of a model with another loss load.
    """

    _DEFAULTS: dict[str, object]
    weight: Tensor | None
    reg_weight: Tensor

    def _keep(self, arguments: dict[str, object], device: torch.device | str | None = None) -> None:
        options = {name: arguments[name] for name in self._DEFAULTS}
        check_options(**{name: options[name] for name in options if name != "chunk_rows"})
        reg_weight = options.pop("reg_weight")
        check_reg_weight(reg_weight, LARGEST)
        self.register_buffer("weight", arguments["weight"])
        for name, value in options.items():
            setattr(self, name, value)
        if isinstance(reg_weight, Tensor):
            self._was_1, self._last_value = False, math.nan
            reg_weight = reg_weight.detach().float()
        else:
            self._was_1, self._last_value = reg_weight == 1, float(reg_weight)
            device = torch.get_default_device() if device is None else torch.device(device)
            # A module on "meta" gets its parameters from a checkpoint, which does not have this.
            device = "cpu" if device.type == "meta" else device
            reg_weight = torch.tensor(self._last_value, dtype=torch.float32, device=device)
        self.register_buffer("reg_weight", reg_weight, persistent=False)

    def __setattr__(self, name: str, value: object) -> None:
        if name != "reg_weight" or name not in self.__dict__.get("_buffers", {}):
            super().__setattr__(name, value)
            return
        check_reg_weight(value, LARGEST)
        if isinstance(value, Tensor):
            self._local_reg_weight().copy_(value.detach())
            return
        self._local_reg_weight().fill_(value)
        self._was_1 |= value == 1
        self._last_value = float(value)  # which "meta" does not keep

    def _local_reg_weight(self) -> Tensor:
        """It is a DTensor, the same on all ranks, where distribute_module made it one."""
        return self.reg_weight.to_local() if is_dtensor(self.reg_weight) else self.reg_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Loss":
        reg_weight = self.reg_weight
        super()._apply(fn, recurse)
        moved = self._buffers["reg_weight"]
        if moved.is_meta and not reg_weight.is_meta:
            self._last_value = reg_weight.item()  # once, as the module gives up its memory
        if reg_weight.is_meta and not moved.is_meta:
            moved = torch.full_like(moved, self._last_value, dtype=torch.float32)
        else:
            moved = reg_weight.to(moved.device)
        self._buffers["reg_weight"] = moved
        return self

    def _options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._DEFAULTS} | {"reg_weight": self._local_reg_weight()}

    def _check_many_classes(self, num_classes: int) -> None:
        if self.class_mean is None:
            num_classes = num_classes if self.shard is None else self.shard.num_classes
            # In this order, so that nothing is compiled again when λ comes to 1 where it does not matter.
            if num_classes >= MANY_CLASSES and self._was_1:
                check_many_classes(num_classes, 1)

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        options = self._options()
        value = self._last_value if self.reg_weight.is_meta else options["reg_weight"].item()  # is to be read by people
        options["reg_weight"] = float(f"{value:.7g}")  # the digits of float32
        changed = (
            item for item in options.items() if isinstance(item[1], Tensor) or item[1] != self._DEFAULTS[item[0]]
        )
        return ", ".join(f"{name}={value!r}" for name, value in changed)


class SelfRegularizedEntropyLoss(_Loss):
    """:func:`sre_triton.self_regularized_entropy` as a module: the same keywords, ``forward(input, target)``.

    Args:
        weight: class weights (K,), kept as a buffer; the other arguments are kept as attributes of the same names,
            and each may be changed between steps.
        reg_weight: a buffer as well, of 0 dimensions, float32 and not in the ``state_dict``. To set it, as a schedule
            does at each step (:func:`sre_triton.ramp`), writes into it, which compiles nothing again. A float32 tensor
            that is given here is the buffer, until the module moves; another is copied. On a GPU, move the module to
            it as well: a CUDA graph sees λ change only there.

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

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of logits (K,), (N, K) or (N, K, d1, ...) and class indices or probabilities."""
        result = self_regularized_entropy(input, target, self.weight, **self._options())
        self._check_many_classes(input.shape[min(1, input.dim() - 1)])
        return result


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
        weight, reg_weight: buffers, as those of :class:`SelfRegularizedEntropyLoss`; the other arguments are kept as
            attributes of the same names, and each may be changed between steps.

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
        check_chunk_rows(chunk_rows)
        self._keep(locals(), device)
        if shard is not None and shard.num_classes != num_classes:
            raise ValueError(f"shard: expected one of {num_classes} classes, as num_classes, got {shard}")
        num_here = num_classes if shard is None else shard.stop - shard.start
        self.linear = torch.nn.Linear(in_features, num_here, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of features (..., D) and class indices (...) or probabilities (..., K)."""
        linear = self.linear
        result = linear_self_regularized_entropy(
            input, linear.weight, target, linear_bias=linear.bias, weight=self.weight, **self._options()
        )
        self._check_many_classes(linear.weight.shape[0])
        return result
