"""Attacks on a network, in the maximum norm: images at most epsilon away from the given ones, in every pixel.

AutoAttack is the judge: a loss that only flattens gradients looks good under the others. Its four attacks are those of
pyautoattack, with their standard numbers. Projected gradient descent is written here, because adversarial training
needs it at every step; torchattacks has it too, but pins an old version of each of its requirements.
"""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from data import Data
from models import logits_of
from pyautoattack import AutoAttack
from torch import Tensor, nn

SEED = 0
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of AutoAttack, in its own order


def is_right(model: nn.Module, data: Data) -> Tensor:
    """Whether each image gets its label, (N,)."""
    return logits_of(model, data.images).argmax(1) == data.labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of all rows."""
    return F.cross_entropy(logits, labels, reduction="sum")


def lost_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest wrong logit less the label's, of all rows: never flat, whatever the scale. arXiv:1608.04644."""
    label = labels[:, None]
    return (logits.scatter(1, label, -torch.inf).amax(1) - logits.gather(1, label).squeeze(1)).sum()


Objective = Callable[[Tensor, Tensor], Tensor]
OBJECTIVES = (cross_entropy, lost_margin)


def input_gradient(model: nn.Module, data: Data, objective: Objective = cross_entropy) -> Tensor:
    """The gradient of what an attack raises in the images, as large as they are."""
    images = data.images.clone().requires_grad_()
    return torch.autograd.grad(objective(model(images), data.labels), images)[0]


def fgsm(model: nn.Module, data: Data, epsilon: float) -> Tensor:
    """One step, as far as allowed. "Explaining and Harnessing Adversarial Examples", arXiv:1412.6572."""
    return (data.images + epsilon * input_gradient(model, data).sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    data: Data,
    epsilon: float,
    steps: int,
    objective: Objective = cross_entropy,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Steps of 2.5 epsilon / steps along the sign of the gradient, from a random start. arXiv:1706.06083."""
    low, high = (data.images - epsilon).clamp_min(0), (data.images + epsilon).clamp_max(1)
    images = low + (high - low) * torch.rand(low.shape, generator=generator)
    for _ in range(steps):
        gradient = input_gradient(model, Data(images, data.labels), objective)
        images = (images + 2.5 * epsilon / steps * gradient.sign()).clamp(low, high)
    return images


def withstands_pgd(model: nn.Module, data: Data, epsilon: float, steps: int, restarts: int = 1) -> Tensor:
    """Whether each image (N,) keeps its label, for both objectives under every restart, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    right = is_right(model, data)
    for objective in OBJECTIVES * restarts:
        rows = right.nonzero().squeeze(1)
        attacked = Data(data.images[rows], data.labels[rows])
        images = pgd(model, attacked, epsilon, steps, objective, generator)
        right[rows] = is_right(model, attacked._replace(images=images))
    return right


def autoattack(
    model: nn.Module, data: Data, epsilon: float, names: Sequence[str] = ATTACKS
) -> Iterator[tuple[str, Tensor]]:
    """Name of an attack, and whether each image (N,) has kept its label under it and all before it.

    "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
    arXiv:2003.01690.
    """
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attack = AutoAttack(model, eps=epsilon, seed=SEED, version="standard")
    attack.verbose = False
    right = is_right(model, data)
    for name in names:
        rows = right.nonzero().squeeze(1)
        if len(rows):
            attack.attacks_to_run = [name]
            attacked = Data(data.images[rows], data.labels[rows])
            images, _ = attack.run_standard_evaluation(*attacked, batch_size=len(rows))
            right[rows] = is_right(model, attacked._replace(images=images))
        yield name, right.clone()
