"""A language model: the likelihood of a text that it was not trained with, against λ, c and the mean over classes.

The small transformer of examples/lm.py, on the King James Bible in GPT-2's vocabulary of 50257, where a sum over the
wrong classes weighs fifty thousand times a mean. Neither attack nor search: a grid, at equal steps.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from losses import OURS, Setting
from torch import nn
from training import Run

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import lm

DATA = "bible"
SIZE = lm.SIZES["cpu"]
TEST_TOKENS = 20 * SIZE.batch * SIZE.context
SETTINGS = [
    Setting("cross entropy", math.nan, math.nan, False, False, lm.WEIGHT_DECAY),
    *(Setting(OURS, lam, c, True, False, lm.WEIGHT_DECAY) for lam in (0.1, 1.0, 10.0) for c in (1e-7, 1e-5, 1e-3)),
    *(Setting(OURS, lam, 1e-7, False, False, lm.WEIGHT_DECAY) for lam in (1e-6, 1e-5, 1e-4)),
]


def run_of(setting: Setting, seed: int) -> Run:
    """A run of the transformer; its examples are windows of the text."""
    windows, rate = SIZE.steps * SIZE.batch, SIZE.learning_rate
    return Run(DATA, "transformer", "standard", 0.0, *setting, seed, windows, 1, SIZE.batch, rate, math.nan)


def train(run: Run) -> tuple[nn.Module, float]:
    """A trained model, and H on windows of the last twentieth of the text."""
    args = argparse.Namespace(seed=run.seed, device=torch.device("cpu"), bf16=False)
    train_tokens, test_tokens = lm.load_split()
    options = {"reg_weight": 0.0}
    if run.loss == OURS:
        options = {"reg_weight": run.strength, "c": run.c, "class_mean": run.class_mean}
    model, _ = lm.train(run.loss, SIZE, args, train_tokens, show=False, **options)
    args.seed = 0  # the same windows for all
    cross_entropy, _ = lm.evaluate(model, SIZE, args, test_tokens)
    return model, cross_entropy
