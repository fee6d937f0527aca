"""One training: what it is given, and the network that comes out."""

import hashlib
from typing import NamedTuple

import attacks
import torch
from data import Data, with_wrong_labels
from losses import Setting, loss_of
from models import MODELS
from torch import nn


class Run(NamedTuple):
    """Everything that a training depends on. Two runs with the same seed have the same first weights and batches."""

    data: str
    model: str
    training: str  # "standard" or "pgd": with images that an attack made from those of the batch
    wrong_labels: float  # share of the training labels
    loss: str
    strength: float
    c: float
    class_mean: bool
    ramp: bool
    weight_decay: float
    seed: int
    examples: int  # images, or windows of a text
    epochs: int
    batch: int
    learning_rate: float
    train_epsilon: float  # of the attack in the training

    @property
    def setting(self) -> Setting:
        """The loss and the weight decay."""
        return Setting(*(getattr(self, name) for name in Setting._fields))


ATTACK_STEPS = 7  # of projected gradient descent, in adversarial training: "Madry et al.", arXiv:1706.06083
WARM_UP = 0.2  # of the steps, in which the learning rate grows


def train(run: Run, data: Data) -> nn.Module:
    """A network in evaluation mode."""
    data = data.first(run.examples)
    labels = with_wrong_labels(data.labels, run.wrong_labels, run.seed) if run.wrong_labels else data.labels
    torch.manual_seed(run.seed)  # the first weights, the order of the images, and where attacks start
    model = MODELS[run.model]()
    optimizer = torch.optim.AdamW(model.parameters(), run.learning_rate, weight_decay=run.weight_decay)
    batches = len(labels) // run.batch
    steps = run.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.learning_rate, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    for epoch in range(run.epochs):
        order = torch.randperm(len(labels))[: batches * run.batch].split(run.batch)
        for number, rows in enumerate(order):
            images = data.images[rows]
            if run.training == "pgd":
                images = attacks.pgd(model.eval(), Data(images, labels[rows]), run.train_epsilon, ATTACK_STEPS)
                model.train()
            loss = loss_of(run.setting, (epoch * batches + number) / steps)(model(images), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def checksum(model: nn.Module) -> str:
    """Eight digits that tell one set of weights from another."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:8]
