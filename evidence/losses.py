"""The losses that are compared: formulas, and the strengths that a search draws from.

All but cross entropy have one strength; this loss has c, a mean over classes and a ramp beside it. All are means over
the rows of logits (N, K), with labels (N,), p = softmax(z), g the label and q_j = p_j / (1 - p_g) for a wrong class j.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sre_triton import self_regularized_entropy

OURS = "self-regularized entropy"
Loss = Callable[[Tensor, Tensor], Tensor]


class Setting(NamedTuple):
    """A loss with its numbers, and the weight decay of the optimizer; nan where a loss has no such number."""

    loss: str
    strength: float
    c: float
    class_mean: bool  # the regularizer is a mean over the wrong classes
    ramp: bool  # the strength grows from 0 in the first half of the training
    weight_decay: float


class Space(NamedTuple):
    """What a search draws the strength from, between two limits, uniformly in its logarithm."""

    symbol: str
    low: float
    high: float


WEIGHT_DECAY = (1e-3, 4.0)
C = (1e-7, 1e-1)


def wrong_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of the wrong classes among themselves, -Σ q_j log q_j, (N,)."""
    wrong = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    log_q = logits[wrong].view(len(logits), -1).log_softmax(1)
    return -(log_q.exp() * log_q).sum(1)


def focal(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """-(1 - p_g)^γ log p_g. "Focal Loss for Dense Object Detection", arXiv:1708.02002, equation 4, over a softmax."""
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    return -((-torch.expm1(log_p)).clamp_min(1e-12) ** strength * log_p).mean()  # 0^γ has no gradient for γ < 1


def confidence_penalty(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """H - β entropy(p). "Regularizing Neural Networks by Penalizing Confident Outputs", arXiv:1701.06548."""
    log_p = logits.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return F.nll_loss(log_p, labels) - strength * entropy.mean()


def complement(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """H + γ / (K - 1) Σ q_j log q_j.

    The complement cross entropy of arXiv:2009.01189, which takes in one step what "Complement Objective Training",
    arXiv:1903.01182, takes in two. The sign is that of the latter: the wrong classes are evened out.
    """
    scale = strength / (logits.shape[1] - 1)
    return F.cross_entropy(logits, labels) - scale * wrong_entropy(logits, labels).mean()


def guided_complement(logits: Tensor, labels: Tensor, strength: float) -> Tensor:
    """p_g^α Σ q_j log q_j / log(K - 1), alone. "Guided Complement Entropy", arXiv:1903.09799."""
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    guide = (strength * log_p).exp()  # p_g^α, whose gradient is finite at p_g = 0
    return -(guide * wrong_entropy(logits, labels)).mean() / math.log(logits.shape[1] - 1)


SPACES = {
    "cross entropy": Space("", math.nan, math.nan),
    "label smoothing": Space("ε", 0.01, 0.9),
    "focal loss": Space("γ", 0.1, 10),
    "confidence penalty": Space("β", 0.03, 3),
    "complement cross entropy": Space("γ", 0.1, 30),
    "guided complement entropy": Space("α", 0.03, 1),
    OURS: Space("λ", 0.03, 10),
}
RIVALS = {
    "cross entropy": lambda logits, labels, _: F.cross_entropy(logits, labels),
    "label smoothing": lambda logits, labels, strength: F.cross_entropy(logits, labels, label_smoothing=strength),
    "focal loss": focal,
    "confidence penalty": confidence_penalty,
    "complement cross entropy": complement,
    "guided complement entropy": guided_complement,
}


def loss_of(setting: Setting, progress: float) -> Loss:
    """The loss at this share of the training, which a ramp depends on."""
    strength = setting.strength * (min(1, 2 * progress) if setting.ramp else 1)
    if setting.loss == OURS:  # uncompiled: so small a batch never pays back a compilation
        options = {"reg_weight": strength, "c": setting.c, "class_mean": setting.class_mean, "backend": "eager"}
        return lambda logits, labels: self_regularized_entropy(logits, labels, **options)
    return lambda logits, labels: RIVALS[setting.loss](logits, labels, strength)


def name_of(setting: Setting) -> str:
    """A setting as a reader wants it: its symbols, then the weight decay."""
    symbol = SPACES[setting.loss].symbol
    parts = [f"{symbol} = {setting.strength:g}"] if symbol else []
    parts += [f"c = {setting.c:g}"] if not math.isnan(setting.c) else []
    return ", ".join(
        [*parts, *["class mean"] * setting.class_mean, *["ramp"] * setting.ramp, f"decay {setting.weight_decay:g}"]
    )


class Box(NamedTuple):
    """The limits between which a search draws, uniformly in the logarithm."""

    strength: tuple[float, float]
    c: tuple[float, float]
    weight_decay: tuple[float, float]


def whole_box(loss: str) -> Box:
    """All of a loss's space; nan for what it has not."""
    return Box(SPACES[loss][1:], C if loss == OURS else (math.nan, math.nan), WEIGHT_DECAY)


def draw(loss: str, count: int, box: Box, seed: int) -> list[Setting]:
    """Settings of a loss, spread evenly by a scrambled Sobol sequence over the logarithms of their numbers."""

    def between(low: float, high: float, u: float) -> float:
        return math.nan if math.isnan(low) else float(f"{low * (high / low) ** u:.3g}")

    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(count).tolist()
    return [
        Setting(
            loss,
            between(*box.strength, u),
            between(*box.c, v),
            False,
            loss == OURS and w >= 0.5,
            between(*box.weight_decay, x),
        )
        for x, u, v, w in points
    ]


def narrowed(loss: str, settings: list[Setting]) -> Box:
    """The part of the space that these settings lie in, and half as far again on either side, in the logarithm."""
    limits = []
    for name, (low, high) in whole_box(loss)._asdict().items():
        values = [getattr(setting, name) for setting in settings]
        margin = max((max(values) / min(values)) ** 0.5, 2.0)
        limits.append((max(low, min(values) / margin), min(high, max(values) * margin)))
    return Box(*limits)


# What people take without a search. AdamW's own weight decay is 0.01.
USUAL = (
    Setting("cross entropy", math.nan, math.nan, False, False, 0.01),
    Setting("label smoothing", 0.1, math.nan, False, False, 0.01),
    Setting(OURS, 1.0, 1e-7, False, False, 0.01),
)
