"""The losses as ``nn.Module``."""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import (
    check_are_tensors,
    check_class_weights,
    check_features,
    check_layer,
    is_dtensor,
)
from .functional import linear_self_regularized_entropy, self_regularized_entropy
from .layer import features_of
from .messages import warn_once, wrong
from .options import Options, check_options, check_reg_weight
from .reference import Parts
from .sharding.shard import VocabShard

LARGEST = torch.finfo(torch.float32).max
# Of these a whole number is kept as a float: torch.compile makes a graph for every int that a module has.
FLOATS = ("c", "denominator", "label_smoothing", "z_loss", "softcap")


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

    if TYPE_CHECKING:  # a buffer, which may be set to a number

        @property
        def reg_weight(self) -> Tensor:
            """λ."""

        @reg_weight.setter
        def reg_weight(self, value: float | Tensor) -> None: ...

    def _check(self, weight: object, **options: object) -> None:
        """Class weights and options, before they are kept."""
        check_options(Options(**options))
        shard, num_classes = options["shard"], self._num_classes
        if shard is not None and num_classes not in (None, shard.num_classes):
            raise wrong(ValueError, "shard", f"one of {num_classes} classes, as num_classes", shard)
        sizes = () if num_classes is None else (num_classes,)
        check_class_weights(weight, sizes if shard is None else (shard.stop - shard.start, shard.num_classes))

    def _keep(self, arguments: dict[str, object], device: torch.device | str | None = None) -> None:
        """Check the constructor's arguments and make attributes of them: λ and the class weights are buffers."""
        options = {name: arguments[name] for name in self._DEFAULTS}
        self._num_classes = arguments.get("num_classes")
        self._check(arguments["weight"], **options)
        reg_weight = options.pop("reg_weight")
        check_reg_weight(reg_weight, LARGEST)
        self.register_buffer("weight", arguments["weight"])
        for name, value in options.items():
            setattr(self, name, value)
        if isinstance(reg_weight, Tensor):
            self._last_value = math.nan
            reg_weight = reg_weight.detach().float()
        else:
            self._last_value = float(reg_weight)
            device = torch.get_default_device() if device is None else torch.device(device)
            # A module on "meta" gets its parameters from a checkpoint, which does not have this.
            device = "cpu" if device.type == "meta" else device
            reg_weight = torch.tensor(self._last_value, dtype=torch.float32, device=device)
        self.register_buffer("reg_weight", reg_weight, persistent=False)

    def __setattr__(self, name: str, value: object) -> None:
        """Check what is set after the constructor; λ is written into the buffer that is there."""
        kept = "reg_weight" in self.__dict__.get("_buffers", {})  # and what is set now comes after the constructor
        if kept and name == "reg_weight":
            self._set_reg_weight(value)
            return
        if kept and name == "weight":
            self._check(value, **self._options())
        elif kept and name in self._DEFAULTS:
            self._check(self.weight, **self._options() | {name: value})  # with the others, as some exclude each other
        super().__setattr__(name, float(value) if name in FLOATS and type(value) is int else value)

    def _set_reg_weight(self, value: object) -> None:
        """Write λ into its buffer, which compiled and captured graphs read."""
        check_reg_weight(value, LARGEST)
        if isinstance(value, Tensor):
            self._local_reg_weight().copy_(value.detach())
            if self.reg_weight.is_meta and not value.is_meta:
                self._last_value = value.item()  # once, as no memory keeps it
            return
        self._local_reg_weight().fill_(value)
        self._last_value = float(value)  # which "meta" does not keep

    def _local_reg_weight(self) -> Tensor:
        """It is a DTensor, the same on all ranks, where distribute_module made it one."""
        return self.reg_weight.to_local() if is_dtensor(self.reg_weight) else self.reg_weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Loss":
        """``to``, ``half``, ``cuda`` and the like: λ moves to the device, but stays float32."""
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
        """The keywords of the function."""
        return {name: getattr(self, name) for name in self._DEFAULTS} | {"reg_weight": self._local_reg_weight()}

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
            and each may be changed between steps: it is checked when it is set, with the others as they then are.
        reg_weight: a buffer as well, of 0 dimensions, float32 and not in the ``state_dict``: after loading, set it
            again. To set it, as a schedule does at each step (:func:`sre_triton.ramp`), writes into it, which compiles
            nothing again. Set it on this module, which DDP and other wrappers hold, not on the wrapper. A float32
            tensor that is given here is the buffer, until the module moves; another is copied. On a GPU, move the
            module to it as well: a CUDA graph sees λ change only there.

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
        """The arguments are the class's."""
        super().__init__()
        self._keep(locals())

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of logits (K,), (N, K) or (N, K, d1, ...) and class indices or probabilities."""
        return self_regularized_entropy(input, target, self.weight, **self._options())


class LinearSelfRegularizedEntropyLoss(_Loss):
    """A classifier's linear layer and its loss: :func:`sre_triton.linear_self_regularized_entropy` as a module.

    It takes features and never makes all logits. ``module.linear(features)`` makes them, to predict with.

    That is so while ``linear`` is a plain ``nn.Linear``, ``torch.nn.utils.parametrizations`` of its weight included.
    Where it may be more (an adapter such as LoRA, a subclass with a forward of its own, hooks, a quantized weight,
    FSDP2 around ``linear`` alone), the forward calls it once, and takes the loss of what it returns. Logits and their
    gradient are then in memory, ``chunk_rows`` means nothing, NaN features of ignored rows reach the gradients as they
    do through any layer, and a warning says so once.

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
        """The arguments are the class's."""
        super().__init__()
        check_layer(in_features, num_classes, dtype)
        self._keep(locals(), device)
        num_here = num_classes if shard is None else shard.stop - shard.start
        self.linear: torch.nn.Linear = torch.nn.Linear(in_features, num_here, bias=bias, device=device, dtype=dtype)

    @torch.jit.unused
    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of features (..., D) and class indices (...) or probabilities (..., K)."""
        linear = self.linear
        check_are_tensors({"input": input, "target": target}, {})
        features = features_of(linear, input)
        if features is None:
            return self._of_logits(linear(input), target)
        linear_weight = linear.weight  # once, as a parametrization computes it
        check_features(features, linear_weight)
        return linear_self_regularized_entropy(
            features, linear_weight, target, linear_bias=linear.bias, weight=self.weight, **self._options()
        )

    def _of_logits(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The same of logits (..., K)."""
        warn_once("all logits")
        options = self._options()
        del options["chunk_rows"]
        linear_weight = getattr(self.linear, "weight", None)
        if is_dtensor(linear_weight) and not is_dtensor(logits) and logits.shape[-1] != linear_weight.shape[0]:
            options["shard"] = VocabShard.from_dtensor(linear_weight)
        if logits.dim() > 2:
            target = target.movedim(-1, 1) if target.dim() == logits.dim() else target
            logits = logits.movedim(-1, 1)
        return self_regularized_entropy(logits, target, self.weight, **options)
