"""What a layer does when it is called: nothing but a product with its weight, which then need not be asked of it?

Adapters, hooks, subclasses and quantized weights do something else, and reparametrisations by hooks make the weight.
Hooks of two kinds do nothing to the logits: those of PyTorch's trackers (of FLOPs, of communication), which watch all
modules, and those of ColwiseParallel, which say where features and logits lie.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import is_dtensor
from .internals import global_hooks, without_torch_function

LINEAR = torch.nn.Linear
FORWARD = LINEAR.forward  # what others put in its place does more, perhaps


def _only_watched() -> bool:
    """Whether the hooks of all modules are those of PyTorch's trackers."""
    hooks = global_hooks()
    return hooks is not None and all((getattr(hook, "__module__", None) or "").startswith("torch.") for hook in hooks)


def _is_multiplied(parameter: Tensor | None) -> bool:
    """Whether a product with it is one with its numbers: not if it wraps other tensors, as quantized weights do."""
    kind = type(parameter)
    if parameter is None or kind in (Tensor, torch.nn.Parameter) or is_dtensor(parameter):
        return True
    return without_torch_function(kind) and not hasattr(kind, "__tensor_flatten__")


def _closure(hook: Callable) -> dict[str, object]:
    """What a hook of ``distribute_module`` keeps; nothing of another hook."""
    if getattr(hook, "__module__", None) != "torch.distributed.tensor._api":
        return {}
    return {name: cell.cell_contents for name, cell in zip(hook.__code__.co_freevars, hook.__closure__, strict=True)}


def _placed(layer: torch.nn.Module, input: Tensor) -> Tensor | None:
    """The input as ColwiseParallel lays it out, if the hooks are that style's and no others."""
    style = sys.modules.get("torch.distributed.tensor.parallel.style")
    hooks = *layer._forward_pre_hooks.values(), *layer._forward_hooks.values()
    if style is None or len(hooks) != 2 or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    before, after = map(_closure, hooks)
    place, give = before.get("input_fn"), after.get("output_fn")
    if not (isinstance(place, functools.partial) and isinstance(give, functools.partial)):
        return None
    colwise = style.ColwiseParallel
    if place.func is not colwise._prepare_input_fn or give.func is not colwise._prepare_output_fn:
        return None
    return place(layer, (input,), before["device_mesh"])


def features_of(layer: torch.nn.Module, input: Tensor) -> Tensor | None:
    """The input as it meets the layer's weight and bias, (..., D), or None where the layer must be called."""
    kind = type(layer)
    if (
        kind.forward is not FORWARD  # a parametrized layer has this one
        or kind.__call__ is not LINEAR.__call__  # which tracers replace
        or "forward" in layer.__dict__
        or layer._compiled_call_impl is not None
        or not _only_watched()
    ):
        return None
    for parameter in layer._parameters.values():
        if not _is_multiplied(parameter):
            return None
    if not (layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks):
        return input
    return _placed(layer, input)
