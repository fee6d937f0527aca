"""The definition of the loss, in plain PyTorch: any floating dtype, every option, differentiable twice.

    H = -sum_j y_j log p_j                        cross entropy
    R(p) = a log a + b log b,  a = c/(c+p), b = p/(c+p)
    S = -sum_j (1 - y_j) R(p_j)                   self-regularized entropy
    loss = H + w α lse² - w λ' S                  w the sample's weight, λ' = λ or λ/(K-1)

Nothing here is clever. It is what all backends are measured against.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .internals import register_namedtuple


class Parts(NamedTuple):
    """The parts of the loss, detached and reduced as the loss is.

    ``loss = cross_entropy - reg_weight * regularizer + z_loss``

    Attributes:
        cross_entropy: H.
        regularizer: S, after ``class_mean`` and before ``reg_weight``.
        z_loss: α lse².
    """

    cross_entropy: Tensor
    regularizer: Tensor
    z_loss: Tensor


# Programs that return it can be saved (torch.export.save).
register_namedtuple(Parts, "sre_triton.Parts")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: float64 for float64 logits, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def coin_entropy(t: Tensor) -> Tensor:
    """h = -R(p), the entropy of a coin with odds p : c, from t = log(p / c).

    Each half of the line has its own form, in which nothing overflows or cancels; at t = -inf it is 0.
    """
    empty = t == -torch.inf
    t = torch.where(empty, 0, t)
    rising = F.softplus(t) - t * torch.sigmoid(t)
    falling = F.softplus(-t) + t * torch.sigmoid(-t)
    return torch.where(empty, 0, torch.where(t > 0, falling, rising))


def target_distribution(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """y with the shape of ``input``: one-hot rows for class indices (0 where ignored, NaN where out of range)."""
    dtype = compute_dtype(input.dtype)
    if target.shape == input.shape:
        return target.to(dtype)
    dim = min(1, input.dim() - 1)
    num_classes = input.shape[dim]
    index = target.reshape(input.shape[:dim] + input.shape[dim + 1 :]).unsqueeze(dim).long()
    classes = torch.arange(num_classes, device=input.device).reshape([-1] + [1] * (input.dim() - dim - 1))
    one_hot = (index == classes).to(dtype)
    inside = (index >= 0) & (index < num_classes)
    return torch.where(index == ignore_index, 0, torch.where(inside, one_hot, torch.nan))


def sample_weights(
    target: Tensor,  # class indices, any shape
    weight: Tensor | None,  # (K,)
    ignore_index: int,
) -> Tensor:
    """What the mean over class indices divides by, row by row: 1 or w[target], 0 where ignored."""
    counted = target != ignore_index
    if weight is None:
        return counted
    counted = counted & (target >= 0) & (target < weight.shape[0])
    weight = weight.detach().to(compute_dtype(weight.dtype))
    return torch.where(counted, weight[torch.where(counted, target, 0).long()], 0)


def self_regularized_entropy(
    input: Tensor,  # (K,), (N, K) or (N, K, d1, ...)
    target: Tensor,  # class indices (), (N,) or (N, d1, ...), or probabilities shaped as input
    weight: Tensor | None = None,  # (K,)
    *,
    c: float = 1e-7,
    reg_weight: float | Tensor = 1.0,
    class_mean: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Parts]:
    """The loss and its parts, with the arguments of :func:`sre_triton.self_regularized_entropy`, unchecked."""
    dtype = compute_dtype(input.dtype)
    dim = min(1, input.dim() - 1)
    num_classes = input.shape[dim]

    indices = target.shape != input.shape
    shape = input.shape[:dim] + input.shape[dim + 1 :]
    ignored = (target == ignore_index).reshape(shape) if indices else torch.zeros(shape, device=input.device).bool()
    z = torch.where(ignored.unsqueeze(dim), 0, input.to(dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    # Not torch.log_softmax: over many classes its sum of exponentials is off by 5e-6 in float32.
    m = z.detach().amax(dim, keepdim=True)
    d = z - m
    log_sum = d.exp().sum(dim, keepdim=True).log()
    log_p = d - log_sum
    # Not log_p - log c: backward would sum the -1 of H and the far smaller gradients of S in one float32 sum.
    t = d - log_sum - math.log(c)
    lse = (m + log_sum).squeeze(dim)

    y = target_distribution(input, target, ignore_index)
    w = torch.ones(num_classes, dtype=dtype, device=input.device) if weight is None else weight.to(dtype)
    w = w.reshape([-1] + [1] * (input.dim() - dim - 1))
    omega = torch.ones(shape, dtype=dtype, device=input.device)
    if weight is not None or indices:
        omega = (w * y).sum(dim)
    y = (1 - label_smoothing) * y + label_smoothing / num_classes

    log_p_masked = torch.where((w * y == 0) & (log_p == -torch.inf), 0, log_p)  # 0 log 0 = 0
    cross_entropy = -(w * y * log_p_masked).sum(dim)
    regularizer = omega * ((1 - y) * coin_entropy(t)).sum(dim)
    if class_mean:
        regularizer = regularizer / (num_classes - 1) if num_classes > 1 else torch.zeros_like(regularizer)
    z_penalty = z_loss * omega * lse.square() if z_loss else torch.zeros_like(lse)

    rows = torch.where(ignored, 0, torch.stack([cross_entropy, regularizer, z_penalty]))
    if reduction != "none":
        rows = torch.stack([part.sum() for part in rows])
    if reduction == "mean":
        if denominator is None:
            denominator = sample_weights(target, weight, ignore_index).sum() if indices else ignored.numel()
        if isinstance(denominator, Tensor):
            denominator = denominator.detach().to(input.device, dtype)
        rows = rows / denominator

    if isinstance(reg_weight, Tensor):
        reg_weight = reg_weight.detach().to(input.device, dtype)
    cross_entropy, regularizer, z_penalty = rows
    loss = cross_entropy - reg_weight * regularizer + z_penalty
    return loss, Parts(*rows.detach())


def source_formula(input: Tensor, target: Tensor, c: float = 1e-7) -> Tensor:
    """The source's formula word for word: mean over rows of H - S, in probabilities, for logits (N, K).

    It loses every digit where p is far below c, and its gradient is NaN at p = 0: for tests and timings only.
    """
    p = torch.softmax(input, 1)
    a, b = c / (c + p), p / (c + p)
    R = a * torch.log(a) + b * torch.log(b)
    H = -torch.log(p.gather(1, target[:, None])).squeeze(1)
    wrong = torch.arange(input.shape[1], device=input.device) != target[:, None]
    S = -(R * wrong).sum(1)
    return (H - S).mean()
