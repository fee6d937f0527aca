"""Plain autograd: a row's losses in few operations, of which PyTorch takes any number of derivatives.

With d = z - m, m the row's maximum, and t = log(p / c) = d - log sum exp d - log c, the coin's entropy is

    h = softplus(n) - n sigmoid(n),   n = -|t|

in which nothing cancels. A pass over N x K costs as much as any other, so what can be is one number a row: class
indices pick their logit and their h, and no one-hot distribution is written.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives import RowOptions
from .reference import compute_dtype


def coin_entropy(t: Tensor) -> Tensor:
    """h = -R(p) from t = log(p / c), finite."""
    # Of -abs(t) autograd says that it does not change at t = 0, and the second derivative of h would be 0 there.
    n = torch.sub(t, t.relu(), alpha=2)
    return F.softplus(n) - F.silu(n)


def cross_entropy(log_p: Tensor, y: Tensor) -> Tensor:
    """-sum_j y_j log p_j, where 0 log 0 = 0."""
    return -(y * torch.where((y == 0) & (log_p == -torch.inf), 0, log_p)).sum(1)


def losses_of_rows(
    logits: Tensor,  # (N, K)
    target: Tensor,  # class indices (N,) or probabilities (N, K)
    weight: Tensor | None,  # (K,)
    none_ignored: bool,  # no class index is ignored, and all were seen to be in range
    options: RowOptions,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, (N,), and, detached, its losses as in primitives.py, (4, N)."""
    num_classes, c, softcap = logits.shape[1], options.c, options.softcap
    indices = target.dim() == 1
    look = indices and not none_ignored
    z = logits.to(compute_dtype(logits.dtype))
    if look:
        ignored = target == options.ignore_index
        z = torch.where(ignored.unsqueeze(1), 0, z)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    m = z.detach().amax(1, keepdim=True)
    if look:
        wanted = torch.where(ignored, 0, target)
        target = wanted.clamp(0, num_classes - 1)
        m = torch.where((target == wanted).unsqueeze(1), m, torch.nan)  # so is the row of an index that is no class
    d = z - m
    # Not torch.log_softmax: over many classes its sum of exponentials is off by 5e-6 in float32.
    log_sum = d.exp().sum(1, keepdim=True).log()
    # At -inf logits t stays finite, so that no derivative multiplies 0 by infinity; exp(-1e4) is 0 in every dtype. Not
    # from log p: the backward would sum the y of H and the far smaller gradients of S in one float32 sum.
    t = F.threshold(d, -1e4, -1e4) - log_sum - (c.log() if isinstance(c, Tensor) else math.log(c))
    h = coin_entropy(t)

    w = None if weight is None else weight.to(z.dtype)
    smoothed = options.label_smoothing is not None
    label_smoothing = options.label_smoothing if smoothed else 0.0
    even = label_smoothing / num_classes
    if indices:
        omega = 1 if w is None else w[target]
        column = target.unsqueeze(1)
        h_target = h.gather(1, column).squeeze(1)
        H = (1 - label_smoothing) * omega * (log_sum - d.gather(1, column)).squeeze(1)
        if smoothed:
            H = H + even * cross_entropy(d - log_sum, z.new_ones(num_classes) if w is None else w)
    else:
        y = target.to(z.dtype)
        omega = 1 if w is None else (w * y).sum(1)
        h_target = (y * h).sum(1)
        y = (1 - label_smoothing) * y + even if smoothed else y
        H = cross_entropy(d - log_sum, y if w is None else w * y)
    S = omega * ((1 - even) * h.sum(1) - (1 - label_smoothing) * h_target)
    lse = (m + log_sum).squeeze(1)
    z_penalty = torch.zeros_like(lse) if options.z_loss is None else options.z_loss * omega * lse.square()
    loss = H - options.reg_weight * S + z_penalty
    losses = torch.stack([loss, H, S, z_penalty]).detach()
    return (torch.where(ignored, 0, loss), torch.where(ignored, 0, losses)) if look else (loss, losses)
