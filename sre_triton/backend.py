"""The only place that chooses who computes the loss."""

from types import ModuleType

import torch
from torch import Tensor


def choose(backend: str | None, logits: Tensor, differentiable_arguments: bool) -> str:
    """The backend that serves ``logits``.

    Args:
        backend: what the user asked for.
        logits: the logits.
        differentiable_arguments: whether a gradient for more than the logits (target probabilities, their class
            weights) is wanted, which only plain autograd gives.
    """
    if backend is None:
        # Inside torch.compile, torch.func transforms see through plain operations only.
        transformed = torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return "eager" if differentiable_arguments or transformed else "compile"
    if backend == "triton":
        if logits.dtype == torch.float64:
            raise ValueError("backend: expected 'compile' or 'eager' for float64 logits, got 'triton'")
    if backend == "compile" and differentiable_arguments:
        raise ValueError(
            "backend: expected 'eager' or None where target or weight require a gradient, got 'compile'; detach them "
            "if you do not want one"
        )
    return backend


def primitives(name: str) -> ModuleType:
    """The module that holds the backend's primitives."""
    if name == "triton":
        from . import launch

        return launch
    from . import fallback

    return fallback
