"""Which runs there are: a search on the validation set, then, with what it chose, everything else."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import language
import pandas as pd
import results
from losses import OURS, SPACES, USUAL, Setting, draw
from measures import EPSILONS, OTHER
from training import ATTACK_STEPS, Run

# How much clean accuracy, on the validation set, a setting may have less than the best of cross entropy.
GIVEN_UP = (0.005, 0.015, 0.03)
MIDDLE = 1  # where only one of them is tried
SEARCH_SEED = 0
WRONG_LABELS = (0.2, 0.4)
ADVERSARIAL_LOSSES = ("cross entropy", "label smoothing", OURS)

# Microseconds of one core that an image takes, in training and under attack: AMD EPYC with AVX-512, torch 2.14.1.
TRAINING_US = {"small": 75, "residual": 340}
ATTACK_US = {"small": 85, "residual": 230}
LANGUAGE_SECONDS = 240.0


class Size(NamedTuple):
    """How much of everything."""

    recipes: dict[str, tuple[int, int]]  # examples and epochs, by data
    losses: tuple[str, ...]
    trials: int  # for each loss
    seeds: tuple[int, ...]
    given_up: tuple[float, ...]
    attacked: int  # images of the test set
    validated: int  # images of the validation set that are attacked


FULL = Size({"fashion-mnist": (50000, 8), "mnist": (3000, 40)}, tuple(SPACES), 24, (1, 2, 3, 4, 5), GIVEN_UP, 500, 2000)
QUICK = Size(
    {"fashion-mnist": (10000, 3), "mnist": (3000, 10)}, ADVERSARIAL_LOSSES, 4, (1, 2), (GIVEN_UP[MIDDLE],), 40, 500
)
BATCH, LEARNING_RATE = 128, 2e-3


class SearchMissingError(Exception):
    """What a stage tries is chosen by a search that has not been done."""


class Task(NamedTuple):
    """A run, the groups of measures to take, and the file they go to."""

    run: Run
    groups: tuple[str, ...]
    stage: str


def run_of(size: Size, data: str, setting: Setting, seed: int, **changes: object) -> Run:
    """A run of the small network with standard training, but for the changes."""
    examples, epochs = size.recipes[data]
    run = Run(data, "small", "standard", 0.0, *setting, seed, examples, epochs, BATCH, LEARNING_RATE, math.nan)
    return run._replace(**changes)


def trials(folder: Path, data: str) -> pd.DataFrame:
    """What the search found: a line for each setting, its clean accuracy, and its mean under attack."""
    table = results.read(folder, "search")
    table = table[table.data == data]
    setting = list(Setting._fields)
    means = table.groupby([*setting, "measure"], dropna=False, sort=False).value.mean().unstack("measure")
    return means.reset_index().reindex(columns=[*setting, "clean", "pgd"])


def chosen(folder: Path, size: Size, data: str) -> dict[tuple[str, float], Setting]:
    """By loss and accuracy given up: the most robust setting that still has that accuracy, on the validation set.

    Robust is the mean accuracy under PGD of 20 steps at the two epsilons. A loss that reaches the accuracy with none of
    its settings is represented by the most accurate one.
    """
    table = trials(folder, data)
    if table.groupby("loss").size().reindex(size.losses).fillna(0).min() < size.trials:
        raise SearchMissingError(f"python evidence/run.py --stages search --sets {data}: comes first")
    best = table[table.loss == "cross entropy"].clean.max()
    choice = {}
    for loss in size.losses:
        of_loss = table[table.loss == loss]
        for given_up in size.given_up:
            allowed = of_loss[of_loss.clean >= best - given_up]
            row = allowed.loc[allowed.pgd.idxmax()] if len(allowed) else of_loss.loc[of_loss.clean.idxmax()]
            setting = Setting(*row[list(Setting._fields)])
            choice[loss, given_up] = setting._replace(class_mean=bool(row.class_mean), ramp=bool(row.ramp))
    return choice


def search(size: Size, data: str) -> Iterator[Task]:
    """Every trial once."""
    for settings in zip(*(draw(loss, size.trials) for loss in size.losses), strict=True):
        for setting in settings:
            yield Task(run_of(size, data, setting, SEARCH_SEED), ("validation",), "search")


def fronts(size: Size, data: str, choice: dict[tuple[str, float], Setting]) -> Iterator[Task]:
    """What was chosen, and what is usual, with everything measured."""
    for seed in size.seeds:
        for setting in (*choice.values(), *USUAL):
            yield Task(run_of(size, data, setting, seed), ("test", "autoattack"), "fronts")


def wrong_labels(size: Size, data: str, choice: dict[tuple[str, float], Setting]) -> Iterator[Task]:
    """The same settings, trained with some labels wrong."""
    for seed in size.seeds:
        for share in WRONG_LABELS:
            for setting in (*choice.values(), *USUAL):
                yield Task(run_of(size, data, setting, seed, wrong_labels=share), ("clean",), "wrong_labels")


def middle(size: Size, choice: dict[tuple[str, float], Setting]) -> list[Setting]:
    """The setting of each loss that gives up a middling accuracy."""
    return [setting for (_, given_up), setting in choice.items() if given_up == GIVEN_UP[MIDDLE]]


def residual(size: Size, data: str, choice: dict[tuple[str, float], Setting]) -> Iterator[Task]:
    """The other network, at one setting of each loss."""
    for seed in size.seeds:
        for setting in middle(size, choice):
            yield Task(run_of(size, data, setting, seed, model="residual"), ("test", "autoattack"), "residual")


def adversarial(size: Size, data: str, choice: dict[tuple[str, float], Setting]) -> Iterator[Task]:
    """Adversarial training with the larger epsilon, for a few losses."""
    changes = {"training": "pgd", "train_epsilon": EPSILONS[data][1]}
    for seed in size.seeds:
        for setting in choice.values():
            if setting.loss in ADVERSARIAL_LOSSES:
                yield Task(run_of(size, data, setting, seed, **changes), ("test", "autoattack"), "adversarial")


def confirm(size: Size, data: str, choice_of_other: dict[tuple[str, float], Setting]) -> Iterator[Task]:
    """Settings that the other data set chose."""
    for seed in size.seeds:
        for setting in middle(size, choice_of_other):
            yield Task(run_of(size, data, setting, seed), ("test", "autoattack"), "confirm")


def likelihood(size: Size) -> Iterator[Task]:
    """The language model, with every setting of its grid."""
    for seed in size.seeds:
        for setting in language.SETTINGS:
            yield Task(language.run_of(setting, seed), ("nll",), "likelihood")


def tasks(size: Size, stage: str, data: str, folder: Path) -> list[Task]:
    """The tasks of a stage, in the order in which they are done; without repetition."""
    if (stage == "likelihood") != (data == language.DATA):
        return []
    if stage == "likelihood":
        found = likelihood(size)
    elif stage == "search":
        found = search(size, data)
    else:
        found = STAGES[stage](size, data, chosen(folder, size, OTHER[data] if stage == "confirm" else data))
    return list({results.key_of(task.run, ""): task for task in found}.values())


STAGES = {stage.__name__: stage for stage in (search, fronts, likelihood, residual, adversarial, confirm, wrong_labels)}
SETS = (*EPSILONS, language.DATA)


def seconds(task: Task, size: Size) -> float:
    """The prediction: what a task takes of one core."""
    run = task.run
    if run.data == language.DATA:
        return LANGUAGE_SECONDS
    passes = 1 + ATTACK_STEPS if run.training == "pgd" else 1
    training = run.examples * run.epochs * passes * TRAINING_US[run.model]
    of_test = {"clean": 2e3, "test": 700 * size.attacked + 100e3, "autoattack": 5200 * size.attacked}
    images = {"validation": 40 * size.validated, **of_test}
    return 1e-6 * (training + sum(images[group] for group in task.groups) * ATTACK_US[run.model])
