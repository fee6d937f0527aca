"""What is measured of a trained network, in groups; a group is a list of measures and is appended as one.

A measure is a number at two coordinates: ``epsilon`` of the attack, and ``level``, which is the bin, the quantile or
the number of steps; nan where a measure has no such coordinate.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import attacks
import data
import numpy as np
import torch
import torch.nn.functional as F
from data import CORRUPTIONS, Data, Split
from losses import USUAL
from models import logits_of
from scipy import optimize
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error
from training import Run, train

EPSILONS = {"fashion-mnist": (0.02, 0.05), "mnist": (0.1, 0.2)}
OTHER = {"fashion-mnist": "mnist", "mnist": "fashion-mnist"}  # out of distribution
PGD_STEPS, PGD_RESTARTS = 40, 2  # restarts for each of two objectives
STEP_COUNTS = (1, 2, 5, 10, 20, 50, 100)
LARGE_EPSILON = 0.5  # half of black to white: every image can become grey, so no network can know it
FEW = 200  # images, for what compares attacks with each other
BINS = 15
QUANTILES = tuple(q / 10 for q in range(11))
TRANSFER_SEED = 1000  # of the network whose adversarial images are tried on all others


class Measure(NamedTuple):
    """A number, its coordinates, how many images it was taken from, and, for some, which of them count."""

    measure: str
    value: float
    count: int
    epsilon: float = math.nan
    level: float = math.nan
    kept: str = ""  # hexadecimal, a bit for each image: whether it counts


def bits(flags: Tensor) -> str:
    """Flags (N,) as hexadecimal digits, the first image first."""
    return np.packbits(flags.numpy()).tobytes().hex()


def share(
    measure: str, flags: Tensor, epsilon: float = math.nan, level: float = math.nan, keep: bool = False
) -> Measure:
    """The share of flags (N,) that are true, and, if they are to be kept, the flags."""
    return Measure(measure, flags.double().mean().item(), len(flags), epsilon, level, bits(flags) if keep else "")


def temperature_of(logits: Tensor, labels: Tensor) -> float:
    """What logits (N, K) have to be divided by for the least cross entropy. arXiv:1706.04599."""
    result = optimize.minimize_scalar(
        lambda log_t: F.cross_entropy(logits / math.exp(log_t), labels).item(), bounds=(-4, 4), method="bounded"
    )
    return math.exp(result.x)


def calibration(logits: Tensor, labels: Tensor, temperature: float, suffix: str) -> Iterator[Measure]:
    """Cross entropy and expected calibration error of logits (N, K) that are divided by a temperature."""
    p, count = (logits / temperature).softmax(1), len(labels)
    error = multiclass_calibration_error(p, labels, p.shape[1], n_bins=BINS, norm="l1")
    yield Measure(f"nll{suffix}", F.cross_entropy(logits / temperature, labels).item(), count)
    yield Measure(f"ece{suffix}", error.item(), count)


def reliability(logits: Tensor, labels: Tensor) -> Iterator[Measure]:
    """Accuracy against confidence in equal bins, whose middle is the level."""
    confidence, predicted = logits.softmax(1).max(1)
    bins = (confidence * BINS).long().clamp_max(BINS - 1)
    for number in range(BINS):
        if (inside := bins == number).any():
            level = (number + 0.5) / BINS
            yield share("reliability", (predicted == labels)[inside], level=level)
            yield Measure("confidence", confidence[inside].mean().item(), int(inside.sum()), level=level)


def wrong_probabilities(logits: Tensor, labels: Tensor) -> Iterator[Measure]:
    """Quantiles of log10 p_j over the wrong classes of all images."""
    wrong = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    values = (logits.double().log_softmax(1) / math.log(10))[wrong]
    for quantile in QUANTILES:
        yield Measure("wrong_log10_p", values.quantile(quantile).item(), len(labels), level=quantile)


def out_of_distribution(inside: Tensor, outside: Tensor) -> Iterator[Measure]:
    """How well known and unknown images are told apart by their logits (N, K): area under the ROC curve."""
    for name, score in (
        ("auroc_probability", lambda logits: logits.softmax(1).amax(1)),
        ("auroc_entropy", lambda logits: (logits.softmax(1) * logits.log_softmax(1)).sum(1)),
    ):
        known = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
        value = roc_auc_score(known.numpy(), torch.cat([score(inside.double()), score(outside.double())]).numpy())
        yield Measure(name, float(value), len(known))


@functools.lru_cache(maxsize=4)
def transferred(run: Run, folder: Path | None, count: int) -> dict[float, Data]:
    """Adversarial images for an independently trained network, by epsilon."""
    split = data.load(run.data, folder)
    model, test = train(run, split.train), split.test.first(count)
    generator = torch.Generator().manual_seed(attacks.SEED)
    return {
        epsilon: test._replace(images=attacks.pgd(model, test, epsilon, PGD_STEPS, generator=generator))
        for epsilon in EPSILONS[run.data]
    }


class Divided(nn.Module):
    """A network whose logits are divided by a number."""

    def __init__(self, model: nn.Module, divisor: float) -> None:
        super().__init__()
        self.model, self.divisor = model, divisor

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, K)."""
        return self.model(images) / self.divisor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit over the largest other one, (N,)."""
    label = labels[:, None]
    return (logits.gather(1, label) - logits.scatter(1, label, -math.inf).amax(1, keepdim=True)).squeeze(1)


def masking(model: nn.Module, test: Data, validation_logits: Tensor, run: Run) -> Iterator[Measure]:
    """Signs of gradients that mislead an attack rather than of a network that withstands it. arXiv:1802.00420."""
    few = test.first(FEW)
    gradient = attacks.input_gradient(model, few).flatten(1).abs().sum(1)
    yield Measure("gradient_norm", gradient.median().item(), len(gradient))
    yield share("gradient_zero", gradient == 0)
    yield share("pgd_large_epsilon", attacks.withstands_pgd(model, few, LARGE_EPSILON, 100), LARGE_EPSILON)
    scale = (validation_logits - validation_logits.mean(1, keepdim=True)).std().item()
    yield Measure("scale", scale, len(validation_logits))
    for epsilon in EPSILONS[run.data]:
        for steps in STEP_COUNTS:
            yield share("pgd_steps", attacks.withstands_pgd(model, few, epsilon, steps), epsilon, steps)
        for _, right in attacks.autoattack(model, few, epsilon, ["square"]):
            yield share("square_alone", right, epsilon)
        # Logits of the size 1: a loss that makes them ten times as large would saturate the attack's cross entropy.
        for _, right in attacks.autoattack(Divided(model, scale), test, epsilon, ["apgd-ce"]):
            yield share("apgd-ce_divided", right, epsilon, keep=True)


class Trained(NamedTuple):
    """A network, its run, and what it is measured with."""

    model: nn.Module
    run: Run
    split: Split
    folder: Path | None
    attacked: int  # images of the test set that are attacked
    validated: int  # of the validation set


def validation(trained: Trained) -> Iterator[Measure]:
    """What a setting is chosen by."""
    model, run, split = trained[:3]
    yield share("clean", attacks.is_right(model, split.validation))
    few = split.validation.first(trained.validated)
    for epsilon in EPSILONS[run.data]:
        yield share("pgd", attacks.withstands_pgd(model, few, epsilon, 20), epsilon)


def clean(trained: Trained) -> Iterator[Measure]:
    """Accuracy on the test set."""
    yield share("clean", attacks.is_right(trained.model, trained.split.test))


def test(trained: Trained) -> Iterator[Measure]:
    """Everything about the test set but AutoAttack."""
    model, run, split, folder, attacked, _ = trained
    logits, labels = logits_of(model, split.test.images), split.test.labels
    validation_logits = logits_of(model, split.validation.images)
    temperature = temperature_of(validation_logits, split.validation.labels)
    yield share("clean", logits.argmax(1) == labels, keep=True)
    yield Measure("temperature", temperature, len(validation_logits))
    yield Measure("margin", margins(logits, labels).mean().item(), len(labels))
    yield from calibration(logits, labels, 1, "")
    yield from calibration(logits, labels, temperature, "_scaled")
    yield from reliability(logits, labels)
    yield from wrong_probabilities(logits, labels)
    for name, corrupt in CORRUPTIONS.items():
        yield share(f"corrupted_{name}", logits_of(model, corrupt(split.test.images)).argmax(1) == labels)
    if run.data != "mnist" or data.find_fashion(folder):
        yield from out_of_distribution(logits, logits_of(model, data.load(OTHER[run.data], folder).test.images))

    few = split.test.first(attacked)
    source = run._replace(
        training="standard", wrong_labels=0.0, train_epsilon=math.nan, seed=TRANSFER_SEED, **USUAL[0]._asdict()
    )
    for epsilon, images in transferred(source, folder, attacked).items():
        yield share("fgsm", attacks.is_right(model, few._replace(images=attacks.fgsm(model, few, epsilon))), epsilon)
        right = attacks.withstands_pgd(model, few, epsilon, PGD_STEPS, PGD_RESTARTS)
        yield share("pgd", right, epsilon, keep=True)
        yield share("transfer", attacks.is_right(model, images), epsilon, keep=True)
    yield from masking(model, few, validation_logits, run)


def autoattack(trained: Trained) -> Iterator[Measure]:
    """AutoAttack in full: the share that is left after each of its four attacks; "after_square" is the verdict."""
    few = trained.split.test.first(trained.attacked)
    for epsilon in EPSILONS[trained.run.data]:
        for name, right in attacks.autoattack(trained.model, few, epsilon):
            yield share(f"after_{name}", right, epsilon, keep=name == attacks.ATTACKS[-1])


GROUPS = {group.__name__: group for group in (validation, clean, test, autoattack)}
