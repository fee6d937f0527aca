"""The loss as an ``nn.Module``."""

import inspect

import torch
from torch import Tensor

from .checks import check_options
from .loss import self_regularized_entropy
from .reference import Parts

# The keywords of the function, which are the module's attributes.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(self_regularized_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
}


class SelfRegularizedEntropyLoss(torch.nn.Module):
    """:func:`sre_triton.self_regularized_entropy` as a module: the same keywords, ``forward(input, target)``.

    Args:
        weight: class weights (K,), kept as a buffer; the other arguments are kept as attributes of the same names,
            and each may be changed between steps.

    Example:
        >>> criterion = SelfRegularizedEntropyLoss(class_mean=True)
        >>> logits = torch.randn(8, 1000, requires_grad=True)
        >>> criterion(logits, torch.randint(1000, (8,))).backward()
    """

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
        shard: None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        options = locals()
        for name in _DEFAULTS:
            setattr(self, name, options[name])
        check_options(**self._options())

    def _options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in _DEFAULTS}

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, Parts]:
        """The loss of logits (K,), (N, K) or (N, K, d1, ...) and class indices or probabilities."""
        return self_regularized_entropy(input, target, self.weight, **self._options())

    def extra_repr(self) -> str:
        """The options that are not the defaults."""
        changed = (
            item for item in self._options().items() if isinstance(item[1], Tensor) or item[1] != _DEFAULTS[item[0]]
        )
        return ", ".join(f"{name}={value!r}" for name, value in changed)
