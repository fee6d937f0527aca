"""What two losses are compared by: means over seeds, differences paired by seed and image, fronts."""

import math

import numpy as np
import pandas as pd
from losses import Setting
from plan import Choice
from scipy import stats

VERDICT = "after_square"  # what AutoAttack leaves
STRONG = (VERDICT, "pgd", "transfer", "apgd-ce_divided")  # an image counts as robust if it withstands all of these
SETTING = list(Setting._fields)
LEVELS = (0.005, 0.015, 0.03)  # of clean accuracy, given up for robustness
BOOTSTRAPS = 1000
BySeed = dict[int, np.ndarray]  # what was found of each image (images,), or of all of them (1,)


def of_setting(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The lines of a setting."""
    same = np.ones(len(table), bool)
    for column, value in zip(SETTING, setting, strict=True):
        missing = isinstance(value, float) and math.isnan(value)
        same &= (table[column].isna() if missing else table[column] == value).to_numpy()
    return table[same]


def of_measure(table: pd.DataFrame, setting: Setting, measure: str, epsilon: float | None) -> pd.DataFrame:
    """The lines of a measure of a setting, at one epsilon if it has any."""
    lines = of_setting(table[table.measure == measure], setting)
    return lines if epsilon is None else lines[lines.epsilon == epsilon]


def values(table: pd.DataFrame, setting: Setting, measure: str, epsilon: float | None = None) -> pd.Series:
    """A measure of a setting, by seed."""
    return of_measure(table, setting, measure, epsilon).set_index("seed").value.sort_index()


def images(table: pd.DataFrame, setting: Setting, measure: str, epsilon: float | None = None) -> BySeed:
    """Which images count for a measure of a setting."""
    lines = of_measure(table, setting, measure, epsilon)
    return {
        seed: np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8))[:count].astype(float)
        for seed, kept, count in zip(lines.seed, lines.kept, lines["count"], strict=True)
    }


def robust(table: pd.DataFrame, setting: Setting, epsilon: float) -> BySeed:
    """Which images keep their label under every strong attack, for the seeds that all of these were tried on."""
    found = [images(table, setting, measure, epsilon) for measure in STRONG]
    return {seed: np.min([of[seed] for of in found], 0) for seed in sorted(set.intersection(*map(set, found)))}


def scalars(table: pd.DataFrame, setting: Setting, measure: str) -> BySeed:
    """A measure that is not one of images."""
    return {seed: np.array([value]) for seed, value in values(table, setting, measure).items()}


def interval(sample: pd.Series) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over the seeds (Student's t)."""
    if len(sample) < 2:
        return sample.mean(), math.nan
    return sample.mean(), stats.t.ppf(0.975, len(sample) - 1) * sample.sem()


def paired(ours: BySeed, rival: BySeed) -> tuple[float, float]:
    """The mean of ours less the rival's, over the seeds of both, and half the width of its 95 % interval.

    The variance over seeds and that over images add up; the interval is Student's, with one degree of freedom less than
    there are seeds.
    """
    gains = np.array([ours[seed] - rival[seed] for seed in sorted(set(ours) & set(rival))])
    if len(gains) < 2:
        return math.nan, math.nan
    variance = gains.mean(1).var(ddof=1) / len(gains)
    if gains.shape[1] > 1:
        variance += gains.mean(0).var(ddof=1) / gains.shape[1]
    return gains.mean(), stats.t.ppf(0.975, len(gains) - 1) * math.sqrt(variance)


def envelope(clean: np.ndarray, robust: np.ndarray, level: float) -> np.ndarray:
    """The most robust accuracy at a clean accuracy of ``level``, (..., settings) -> (...,).

    Whoever flips a coin between two networks gets every accuracy between theirs, so a front is the upper hull of its
    points. nan where no setting is as accurate.
    """
    reached = clean >= level
    best = np.where(reached, robust, -np.inf).max(-1)
    for i in range(clean.shape[-1]):
        for j in range(clean.shape[-1]):
            above, below = clean[..., i], clean[..., j]
            between = reached[..., i] & ~reached[..., j]
            share = np.where(between, (above - level) / np.where(between, above - below, 1), 0)
            mixed = robust[..., i] + share * (robust[..., j] - robust[..., i])
            best = np.where(between, np.maximum(best, mixed), best)
    return np.where(np.isfinite(best), best, np.nan)


class Front:
    """A loss at one epsilon: which images its chosen settings get right, clean and under the strongest attack.

    ``clean`` and ``robust`` are (seeds, settings, images); the robust images are the first of the clean ones.
    """

    def __init__(self, table: pd.DataFrame, settings: list[Setting], epsilon: float) -> None:
        clean = [images(table, setting, "clean") for setting in settings]
        left = [robust(table, setting, epsilon) for setting in settings]
        self.seeds = sorted(set.intersection(*map(set, (*clean, *left))))
        self.clean = np.array([[by_seed[seed] for by_seed in clean] for seed in self.seeds])
        self.robust = np.array([[by_seed[seed] for by_seed in left] for seed in self.seeds])

    def points(self, seeds: list[int], weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean clean and robust accuracy of each setting, over these seeds, with images weighted (..., images)."""
        rows = [self.seeds.index(seed) for seed in seeds]
        clean, robust = self.clean[rows].mean(0), self.robust[rows].mean(0)
        if weights is None:
            return clean.mean(-1), robust.mean(-1)
        few = weights[..., : robust.shape[-1]]
        return weights @ clean.T / weights.sum(-1, keepdims=True), few @ robust.T / few.sum(-1, keepdims=True)


def front_of(table: pd.DataFrame, choice: Choice, loss: str, epsilon: float) -> Front:
    """The front of a loss: of what was chosen on the validation set, not of what is usual."""
    return Front(table, list(dict.fromkeys(setting for (of, _), setting in choice.items() if of == loss)), epsilon)


def difference(ours: Front, rival: Front, level: float) -> tuple[float, float]:
    """How far our front is above a rival's at a clean accuracy, and half of its 95 % interval.

    Fronts are hulls of means over seeds. Both are drawn again together: without each seed (the jackknife), and by a
    bootstrap over images, which all networks share, and which moves clean and robust accuracy alike. The two variances
    add up; the interval is Student's, with one degree of freedom less than there are seeds.
    """
    seeds = sorted(set(ours.seeds) & set(rival.seeds))
    if len(seeds) < 2:
        return math.nan, math.nan

    def between(seeds: list[int], weights: np.ndarray | None = None) -> np.ndarray:
        return envelope(*ours.points(seeds, weights), level) - envelope(*rival.points(seeds, weights), level)

    left_out = np.array([between([seed for seed in seeds if seed != out]) for out in seeds])
    over_seeds = (len(seeds) - 1) * left_out.var()
    count = ours.clean.shape[-1]
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), BOOTSTRAPS).astype(float)
    over_images = between(seeds, weights).var(ddof=1)
    return between(seeds).item(), stats.t.ppf(0.975, len(seeds) - 1) * math.sqrt(over_seeds + over_images)
