"""The only place that chooses who computes the loss."""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from .internals import constant_while_compiling, is_jit_tracing, under_functorch
from .messages import warn_once

GPUS = ("cuda", "xpu")  # AMD's are "cuda" too


_modules: dict[str, ModuleType] = {}


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton computes nothing on the device; None where it compiles for it, or interprets on a CPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from .kernels.launch import INTERPRETED

        return None if INTERPRETED else "Triton needs a GPU (or TRITON_INTERPRET=1)"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (7, 0) else f"Triton needs compute capability 7.0, and it has {capability}"
    return None if device.type in (*GPUS, "meta") else f"Triton knows no device {device.type!r}"


@constant_while_compiling
def has_triton(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for the device, or interprets on a CPU."""
    return why_not_triton(device) is None


def choose(backend: str | None, logits: Tensor, differentiable_arguments: bool) -> str:
    """The backend that serves ``logits``.

    Args:
        backend: what the user asked for.
        logits: the logits.
        differentiable_arguments: whether a gradient for more than the logits (target probabilities, their class
            weights) is wanted, which only plain autograd gives.
    """
    if backend != "eager" and is_jit_tracing():
        raise RuntimeError(
            "sre_triton: torch.jit.trace sees only what PyTorch's own operations compute; pass backend='eager', which "
            "is made of them but knows no sharded classes, or use torch.export.export"
        )
    if backend is None:
        # Inside torch.compile, torch.func transforms see through plain operations only.
        transformed = torch.compiler.is_compiling() and under_functorch()
        if differentiable_arguments or transformed:
            return "eager"
        on_gpu = logits.device.type in GPUS and logits.dtype != torch.float64
        return "triton" if on_gpu and has_triton(logits.device) else "compile"
    if backend == "triton" and logits.dtype == torch.float64:
        raise ValueError("backend: expected 'compile' or 'eager' for float64 logits, got 'triton'")
    if backend == "triton" and not has_triton(logits.device):
        raise ValueError(
            f"backend: expected None, 'compile' or 'eager' for logits on {logits.device}, got 'triton', which needs "
            "Triton and a GPU, or Triton's interpreter (TRITON_INTERPRET=1, set before the first import)"
        )
    if backend != "eager" and differentiable_arguments:
        raise ValueError(
            f"backend: expected 'eager' or None where target or weight require a gradient, got {backend!r}; detach "
            "them if you do not want one"
        )
    return backend


def backend_of(backend: str | None, rows: Tensor, target: Tensor, weight: Tensor | None, shard: object | None) -> str:
    """Who computes. The user hears of it where a gradient that nobody may want makes it slow."""
    differentiable = target.requires_grad or (weight is not None and weight.requires_grad)
    differentiable = differentiable and torch.is_grad_enabled()
    name = choose(backend, rows, differentiable)
    if shard is not None and name == "eager":  # plain autograd knows nothing of other ranks
        raise ValueError(
            "backend: expected 'triton' or 'compile' for classes that are sharded, without torch.func transforms "
            "inside torch.compile, and a target and weight that require no gradient, got 'eager'"
        )
    if differentiable and backend is None:
        warn_once("plain autograd")
    return name


def primitives(name: str) -> ModuleType:
    """The module that holds the backend's primitives."""
    tracing = torch.compiler.is_compiling()  # whose graph would depend on what is loaded
    if not tracing and name in _modules:
        return _modules[name]
    if name == "triton":
        from .kernels import primitives as of_backend
    else:
        from .compiled import primitives as of_backend
    if not tracing:
        _modules[name] = of_backend
    return of_backend
