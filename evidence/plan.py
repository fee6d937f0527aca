"""Which runs there are: a search on the validation set, then, with what it chose, everything else."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import language
import numpy as np
import pandas as pd
import results
from losses import OURS, SPACES, USUAL, Setting, draw, narrowed, whole_box
from measures import EPSILONS, OTHER
from training import ATTACK_STEPS, Run

# How much clean accuracy, on the validation set, a setting may have less than the best of cross entropy; at 0, the most
# accurate setting of a loss, whatever that of cross entropy.
GIVEN_UP = (0.0, 0.015, 0.03)
MIDDLE = 0.015  # where only one of them is tried
WORTH_REFINING = 0.04  # settings of less accuracy than this are on no front
SEARCH_SEED = 0
WRONG_LABELS = (0.2, 0.4)
ADVERSARIAL_LOSSES = ("cross entropy", "label smoothing", OURS)

# Microseconds of one core that an image takes, in training and under attack: AMD EPYC with AVX-512, torch 2.14.1.
TRAINING_US = {"small": 75, "residual": 340}
ATTACK_US = {"small": 85, "residual": 230}
LANGUAGE_SECONDS = 240.0


Choice = dict[tuple[str, float], Setting]  # what was chosen, by loss and accuracy given up


class Recipe(NamedTuple):
    """How much of a data set."""

    examples: int
    epochs: int
    attacked: int  # images of the test set


class Size(NamedTuple):
    """How much of everything."""

    recipes: dict[str, Recipe]  # by data set
    losses: tuple[str, ...]
    trials: int  # for each loss, in all of its space
    refined: int  # more of them, around its front
    seeds: tuple[int, ...]
    given_up: tuple[float, ...]
    usual: tuple[Setting, ...]  # what stands beside the chosen settings
    validated: int  # images of the validation set that are attacked


FULL = Size(
    recipes={"fashion-mnist": Recipe(50000, 8, 500), "mnist": Recipe(3000, 40, 250)},
    losses=tuple(SPACES),
    trials=24,
    refined=12,
    seeds=(1, 2, 3, 4, 5),
    given_up=GIVEN_UP,
    usual=USUAL,
    validated=2000,
)
QUICK = Size(
    recipes={"fashion-mnist": Recipe(10000, 3, 30), "mnist": Recipe(3000, 10, 30)},
    losses=ADVERSARIAL_LOSSES,
    trials=4,
    refined=2,
    seeds=(1, 2),
    given_up=(0.0, MIDDLE),
    usual=USUAL[-1:],
    validated=500,
)
LANGUAGE_SEEDS = (1, 2, 3)
BATCH, LEARNING_RATE = 128, 2e-3


class SearchMissingError(Exception):
    """What a stage tries is chosen by a search that has not been done."""


class Task(NamedTuple):
    """A run, and the groups of measures to take."""

    run: Run
    groups: tuple[str, ...]


def run_of(size: Size, data: str, setting: Setting, seed: int, **changes: object) -> Run:
    """A run of the small network with standard training, but for the changes."""
    recipe = size.recipes[data]
    run = Run(
        data, "small", "standard", 0.0, *setting, seed, recipe.examples, recipe.epochs, BATCH, LEARNING_RATE, math.nan
    )
    return run._replace(**changes)


def trials(folder: Path, data: str, stage: str = "*") -> pd.DataFrame:
    """What the search found: a line for each setting, its clean accuracy, and its mean under attack."""
    table = results.read(folder, stage)
    table = table[(table.data == data) & (table.group == "validation")]
    setting = list(Setting._fields)
    means = table.groupby([*setting, "measure"], dropna=False, sort=False).value.mean().unstack("measure")
    return means.reset_index().reindex(columns=[*setting, "clean", "pgd"])


def setting_of(row: pd.Series) -> Setting:
    """The setting of a line."""
    setting = Setting(*row[list(Setting._fields)])
    return setting._replace(class_mean=bool(row.class_mean), ramp=bool(row.ramp))


def check(table: pd.DataFrame, size: Size, count: int, data: str) -> None:
    """Every loss must have been tried as often as this."""
    if table.groupby("loss").size().reindex(size.losses).fillna(0).min() < count:
        raise SearchMissingError(f"python evidence/run.py --stages search refine --sets {data} comes first")


def chosen(folder: Path, size: Size, data: str) -> Choice:
    """By loss and accuracy given up: the most robust setting that still has that accuracy, on the validation set.

    Robust is the mean accuracy under PGD of 20 steps, with both objectives, at the two epsilons. A loss that reaches
    the accuracy with none of its settings is represented by the most accurate one.
    """
    table = trials(folder, data)
    check(table, size, size.trials + size.refined, data)
    best = table[table.loss == "cross entropy"].clean.max()
    choice = {}
    for loss in size.losses:
        of_loss = table[table.loss == loss]
        for given_up in size.given_up:
            allowed = of_loss[of_loss.clean >= best - given_up] if given_up else of_loss.head(0)
            row = allowed.loc[allowed.pgd.idxmax()] if len(allowed) else of_loss.loc[of_loss.clean.idxmax()]
            choice[loss, given_up] = setting_of(row)
    return choice


def choice_for(stage: str, folder: Path, size: Size, data: str) -> Choice:
    """What a stage that comes after the search takes: what the same data chose, or the other, if it is to confirm."""
    return chosen(folder, size, OTHER[data] if stage == "confirm" else data)


def front(table: pd.DataFrame) -> pd.DataFrame:
    """The lines that no other one beats in both accuracies."""
    beaten = [((table.clean > row.clean) & (table.pgd > row.pgd)).any() for row in table.itertuples()]
    return table[~np.array(beaten)]


def search(size: Size, data: str) -> Iterator[Task]:
    """Every trial once."""
    return alternating(size, data, {loss: draw(loss, size.trials, whole_box(loss), 0) for loss in size.losses})


def refine(size: Size, data: str, folder: Path) -> Iterator[Task]:
    """More trials, around what a first search found best of each loss."""
    table = trials(folder, data, "search")
    check(table, size, size.trials, data)
    drawn = {}
    for loss in size.losses:
        of_loss = table[table.loss == loss]
        best = front(of_loss[of_loss.clean >= of_loss.clean.max() - WORTH_REFINING])
        box = narrowed(loss, [setting_of(row) for _, row in best.iterrows()])
        drawn[loss] = draw(loss, size.refined, box, 1)
    return alternating(size, data, drawn)


def alternating(size: Size, data: str, drawn: dict[str, list[Setting]]) -> Iterator[Task]:
    """One trial of each loss, then the next of each."""
    for settings in zip(*drawn.values(), strict=True):
        for setting in settings:
            yield Task(run_of(size, data, setting, SEARCH_SEED), ("validation",))


def fronts(size: Size, data: str, choice: Choice) -> Iterator[Task]:
    """What was chosen, and what is usual, with everything measured."""
    for seed in size.seeds:
        for setting in (*choice.values(), *size.usual):
            yield Task(run_of(size, data, setting, seed), ("test", "autoattack"))


def wrong_labels(size: Size, data: str, choice: Choice) -> Iterator[Task]:
    """The same settings, trained with some labels wrong."""
    for seed in size.seeds:
        for share in WRONG_LABELS:
            for setting in (*choice.values(), *size.usual):
                yield Task(run_of(size, data, setting, seed, wrong_labels=share), ("clean",))


def middle(choice: Choice) -> list[Setting]:
    """The setting of each loss that gives up a middling accuracy."""
    return [setting for (_, given_up), setting in choice.items() if given_up == MIDDLE]


def residual(size: Size, data: str, choice: Choice) -> Iterator[Task]:
    """The other network, at one setting of each loss."""
    for seed in size.seeds:
        for setting in middle(choice):
            yield Task(run_of(size, data, setting, seed, model="residual"), ("test", "autoattack"))


def adversarial(size: Size, data: str, choice: Choice) -> Iterator[Task]:
    """Adversarial training with the larger epsilon, for a few losses."""
    changes = {"training": "pgd", "train_epsilon": EPSILONS[data][1]}
    for seed in size.seeds:
        for setting in middle(choice):
            if setting.loss in ADVERSARIAL_LOSSES:
                yield Task(run_of(size, data, setting, seed, **changes), ("test", "autoattack"))


def confirm(size: Size, data: str, choice_of_other: Choice) -> Iterator[Task]:
    """Settings that the other data set chose."""
    for seed in size.seeds:
        for setting in middle(choice_of_other):
            yield Task(run_of(size, data, setting, seed), ("test", "autoattack"))


def likelihood() -> Iterator[Task]:
    """The language model, with every setting of its grid."""
    for seed in LANGUAGE_SEEDS:
        for setting in language.SETTINGS:
            yield Task(language.run_of(setting, seed), ("nll",))


def tasks(size: Size, stage: str, data: str, folder: Path) -> list[Task]:
    """The tasks of a stage, in the order in which they are done; without repetition."""
    if data not in sets_of(stage, size):
        return []
    if stage == "search":
        found = search(size, data)
    elif stage == "refine":
        found = refine(size, data, folder)
    elif stage == "likelihood":
        found = likelihood()
    else:
        choice = choice_for(stage, folder, size, data)
        found = {
            "fronts": fronts,
            "residual": residual,
            "adversarial": adversarial,
            "confirm": confirm,
            "wrong_labels": wrong_labels,
        }[stage](size, data, choice)
    return list({results.key_of(task.run, ""): task for task in found}.values())


def lines_of(stages: Sequence[str], folder: Path, size: Size, data: str) -> pd.DataFrame:
    """The lines of the stages' runs, whichever file they stand in: a run that two stages ask for was done once."""
    wanted = []
    for stage in stages:
        with contextlib.suppress(SearchMissingError):
            wanted += tasks(size, stage, data, folder)
    groups = {group for task in wanted for group in task.groups}
    table = results.read(folder)
    table = table[table.group.isin(groups)]
    if not len(table):  # without lines or tasks there are no types to compare
        return table
    return table.merge(pd.DataFrame([task.run for task in wanted]).drop_duplicates())  # where nan equals nan


IMAGES = tuple(EPSILONS)
STAGES = {  # and the data sets that each is done with
    "search": IMAGES,
    "refine": IMAGES,
    "fronts": IMAGES,
    "likelihood": (language.DATA,),
    "confirm": IMAGES,
    "residual": IMAGES[:1],
    "adversarial": IMAGES[:1],
    "wrong_labels": IMAGES[:1],
}
SETS = (*IMAGES, language.DATA)


def sets_of(stage: str, size: Size) -> list[str]:
    """The data sets that a stage is done with at this size."""
    return [data for data in STAGES[stage] if data in size.recipes or data == language.DATA]


def seconds(task: Task, size: Size) -> float:
    """The prediction: what a task takes of one core."""
    run = task.run
    if run.data == language.DATA:
        return LANGUAGE_SECONDS
    passes = 1 + ATTACK_STEPS if run.training == "pgd" else 1
    training = run.examples * run.epochs * passes * TRAINING_US[run.model]
    attacked = size.recipes[run.data].attacked
    of_test = {"clean": 2e3, "test": 1000 * attacked + 100e3, "autoattack": 5200 * attacked}
    images = {"validation": 80 * size.validated, **of_test}
    return 1e-6 * (training + sum(images[group] for group in task.groups) * ATTACK_US[run.model])
