"""Tables and figures of what stands in the CSV files; no number in them is typed by hand.

    python evidence/report.py                  evidence/results: its figures, and the tables in docs/evidence.md
    python evidence/report.py evidence-quick   another folder: its figures, and its report.md

A table in docs/evidence.md stands between two comments with its name, and is written anew.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import language
import numpy as np
import pandas as pd
import plan
import results
from losses import OURS, SPACES, Setting
from matplotlib import pyplot as plt
from measures import EPSILONS
from plan import Size
from scipy import stats

PAGE = results.ROOT / "docs" / "evidence.md"
VERDICT = "after_square"  # what AutoAttack leaves
COLORS = dict(zip(SPACES, ("#000000", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#D55E00"), strict=True))
MARKERS = dict(zip(SPACES, "osvPDX*", strict=True))
SETTING = list(Setting._fields)
BOOTSTRAPS = 1000


def name_of(setting: Setting) -> str:
    """A setting as a reader wants it: its symbols, then the weight decay."""
    symbol = SPACES[setting.loss].symbol
    parts = [f"{symbol} = {setting.strength:g}"] if symbol else []
    parts += [f"c = {setting.c:g}"] if not math.isnan(setting.c) else []
    return ", ".join(
        [*parts, *["class mean"] * setting.class_mean, *["ramp"] * setting.ramp, f"decay {setting.weight_decay:g}"]
    )


def of_setting(table: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The lines of a setting."""
    same = np.ones(len(table), bool)
    for column, value in zip(SETTING, setting, strict=True):
        missing = isinstance(value, float) and math.isnan(value)
        same &= (table[column].isna() if missing else table[column] == value).to_numpy()
    return table[same]


def settings_of(table: pd.DataFrame) -> list[Setting]:
    """The settings that occur, losses in the order of SPACES."""
    order = {loss: number for number, loss in enumerate(SPACES)}
    found = [Setting(*row) for row in table[SETTING].drop_duplicates().itertuples(index=False)]
    return sorted(found, key=lambda setting: (order[setting.loss], setting.weight_decay))


def values(table: pd.DataFrame, setting: Setting, measure: str, epsilon: float | None = None) -> pd.Series:
    """A measure of a setting, by seed."""
    lines = of_setting(table[table.measure == measure], setting)
    lines = lines if epsilon is None else lines[lines.epsilon == epsilon]
    return lines.set_index("seed").value.sort_index()


def interval(sample: pd.Series) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over the seeds (Student's t)."""
    if len(sample) < 2:
        return sample.mean(), math.nan
    return sample.mean(), stats.t.ppf(0.975, len(sample) - 1) * sample.sem()


def cell(sample: pd.Series, digits: int = 3) -> str:
    """A mean and half its interval, as text."""
    mean, half = interval(sample)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    """What AutoAttack leaves of a loss: clean (seeds, settings), kept (seeds, settings, images)."""

    def __init__(self, table: pd.DataFrame, loss: str, epsilon: float) -> None:
        self.clean, self.kept = [], []
        table = table[table.loss == loss]
        settings = settings_of(table)
        lines = table[(table.measure == VERDICT) & (table.epsilon == epsilon)]
        by_setting = [of_setting(lines, setting).set_index("seed").kept for setting in settings]
        common = set.intersection(*(set(kept.index) for kept in by_setting)) if by_setting else set()
        self.seeds = sorted(common)
        self.settings = settings
        clean = [values(table, setting, "clean") for setting in settings]
        self.clean = np.array([[accuracy[seed] for accuracy in clean] for seed in self.seeds])
        self.kept = np.array([[[*map(int, kept[seed])] for kept in by_setting] for seed in self.seeds], float)

    def at(self, level: float, weights: np.ndarray) -> np.ndarray:
        """The hull at a clean accuracy, by seed, with images weighted: (..., images) -> (..., seeds)."""
        robust = np.einsum("spi,...i->...sp", self.kept, weights)
        return envelope(np.broadcast_to(self.clean, robust.shape), robust, level)


def difference(ours: Front, rival: Front, level: float) -> tuple[float, float]:
    """How far our front is above a rival's, and half of its 95 % interval.

    Paired by seed and by image. The variance of the mean is that over seeds, plus that of a bootstrap over images,
    which are the same for all seeds.
    """
    seeds = [seed for seed in ours.seeds if seed in rival.seeds]
    images = ours.kept.shape[-1] if seeds else 0
    if len(seeds) < 2:
        return math.nan, math.nan
    weights = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), BOOTSTRAPS) / images
    weights = np.concatenate([np.full((1, images), 1 / images), weights])
    rows = [[front.seeds.index(seed) for seed in seeds] for front in (ours, rival)]
    by_seed = ours.at(level, weights)[:, rows[0]] - rival.at(level, weights)[:, rows[1]]
    variance = by_seed[0].var(ddof=1) / len(seeds) + by_seed[1:].mean(1).var(ddof=1)
    return by_seed[0].mean(), stats.t.ppf(0.975, len(seeds) - 1) * math.sqrt(variance)


def levels(table: pd.DataFrame, size: Size) -> list[float]:
    """The clean accuracies at which fronts are compared: the best of cross entropy, less what is given up."""
    of_cross_entropy = table[table.loss == "cross entropy"]
    best = max(values(of_cross_entropy, setting, "clean").mean() for setting in settings_of(of_cross_entropy))
    return [best - given_up for given_up in size.given_up]


def verdict(mean: float, half: float) -> str:
    """Who is ahead, in the words of the table."""
    if math.isnan(mean):
        return "not reached"
    words = "no difference" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
    return f"{mean:+.3f} ± {half:.3f} {words}"


def differences(table: pd.DataFrame, size: Size, data: str) -> str:
    """This loss against each other, at equal clean accuracy."""
    header = [
        "this loss less",
        *(f"ε = {eps:g}, clean {level:.3f}" for eps in EPSILONS[data] for level in levels(table, size)),
    ]
    fronts = {(loss, eps): Front(table, loss, eps) for loss in size.losses for eps in EPSILONS[data]}
    rows = [
        [
            rival,
            *(
                verdict(*difference(fronts[OURS, eps], fronts[rival, eps], level))
                for eps in EPSILONS[data]
                for level in levels(table, size)
            ),
        ]
        for rival in size.losses
        if rival != OURS
    ]
    return markdown(header, rows)


def accuracies(table: pd.DataFrame, _: Size, data: str) -> str:
    """Every setting, clean and attacked."""
    attacked = [(measure, eps) for eps in EPSILONS[data] for measure in ("fgsm", "pgd", "transfer", VERDICT)]
    titles = {"fgsm": "FGSM", "pgd": "PGD-40 x 3", "transfer": "transfer", VERDICT: "AutoAttack"}
    header = ["loss", "setting", "clean", *(f"ε = {eps:g}: {titles[measure]}" for measure, eps in attacked)]
    rows = [
        [setting.loss, name_of(setting), cell(values(table, setting, "clean"))]
        + [cell(values(table, setting, measure, eps)) for measure, eps in attacked]
        for setting in settings_of(table)
    ]
    return markdown(header, rows)


BEYOND = {
    "nll": "NLL",
    "ece": "ECE",
    "temperature": "T",
    "nll_scaled": "NLL at T",
    "ece_scaled": "ECE at T",
    "auroc_probability": "AUROC, probability",
    "auroc_entropy": "AUROC, entropy",
    "corrupted_noise": "noise",
    "corrupted_blur": "blur",
    "corrupted_contrast": "contrast",
}
MASKING = {
    "gradient_norm": "gradient",
    "gradient_zero": "zero gradients",
    "square_alone": "Square alone",
    "apgd-ce_divided": "APGD-CE, logits of size 1",
    "pgd_large_epsilon": "PGD at ε = 0.5",
}


def beyond(table: pd.DataFrame, _: Size, data: str) -> str:
    """Calibration, unknown images, corruptions."""
    del data
    rows = [
        [setting.loss, name_of(setting), *(cell(values(table, setting, measure)) for measure in BEYOND)]
        for setting in settings_of(table)
    ]
    return markdown(["loss", "setting", *BEYOND.values()], rows)


def masking(table: pd.DataFrame, _: Size, data: str) -> str:
    """Signs of masked gradients, at the larger epsilon."""
    eps = EPSILONS[data][1]
    steps = table[(table.measure == "pgd_steps") & (table.epsilon == eps)]
    counts = sorted(steps.level.unique())
    rows = [
        [setting.loss, name_of(setting)]
        + [cell(of_setting(steps[steps.level == count], setting).value) for count in counts]
        + [
            cell(values(table, setting, measure, eps if measure in ("square_alone", "apgd-ce_divided") else None))
            for measure in MASKING
        ]
        for setting in settings_of(table)
    ]
    return markdown(["loss", "setting", *(f"PGD-{count:g}" for count in counts), *MASKING.values()], rows)


def label_noise(table: pd.DataFrame, *_: object) -> str:
    """Accuracy after a training with wrong labels."""
    shares = sorted(table.wrong_labels.unique())
    rows = [
        [setting.loss, name_of(setting)]
        + [cell(values(table[table.wrong_labels == share], setting, "clean")) for share in shares]
        for setting in settings_of(table)
    ]
    return markdown(["loss", "setting", *(f"{share:.0%} wrong" for share in shares)], rows)


def likelihood(table: pd.DataFrame, *_: object) -> str:
    """H of a language model on unknown text, and how much more than with cross entropy, paired by seed."""
    base = values(table, language.SETTINGS[0], "nll")
    rows = []
    for setting in language.SETTINGS:
        found = values(table, setting, "nll")
        rows.append([setting.loss, name_of(setting), cell(found), cell((found - base).dropna()), str(len(found))])
    return markdown(["loss", "setting", "H, test", "more than cross entropy", "seeds"], rows)


def progress(folder: Path, size: Size) -> str:
    """How much of the plan stands in the files."""
    finished = results.finished(folder)
    rows = []
    for stage in plan.STAGES:
        for data in (*size.recipes, language.DATA):
            try:
                tasks = plan.tasks(size, stage, data, folder)
            except plan.SearchMissingError:
                rows.append([stage, data, "0", "after the search"])
                continue
            if not tasks:
                continue
            groups = [results.key_of(task.run, group) for task in tasks for group in task.groups]
            rows.append([stage, data, str(sum(key in finished for key in groups)), str(len(groups))])
    return markdown(["stage", "data", "finished", "planned"], rows)


def draw_frontier(table: pd.DataFrame, data: str, path: Path) -> None:
    """Robust against clean accuracy: every setting with its spread over the seeds, and the hull of each loss."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, eps in zip(panels, EPSILONS[data], strict=True):
        for loss in (loss for loss in SPACES if loss in set(table.loss)):
            front = Front(table, loss, eps)
            if not front.seeds:
                continue
            robust = front.kept.mean(-1)
            style = {"color": COLORS[loss], "zorder": 3 if loss == OURS else 2}
            points = front.clean.mean(0), robust.mean(0)
            spread = {"xerr": front.clean.std(0), "yerr": robust.std(0), "elinewidth": 0.8}
            label = "self-regularized entropy (this loss)" if loss == OURS else loss
            axes.errorbar(
                *points, **spread, ls="", marker=MARKERS[loss], mec="black", mew=0.5, ms=8, label=label, **style
            )
            grid = np.linspace(points[0].min(), points[0].max(), 100)
            axes.plot(grid, [envelope(*points, level) for level in grid], lw=1.5, **style)
        axes.set(xlabel="clean accuracy", ylabel="accuracy under AutoAttack", title=rf"$\epsilon$ = {eps:g}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_search(folder: Path, size: Size, data: str, path: Path) -> None:
    """Every trial on the validation set."""
    trials = plan.trials(folder, data)
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for loss in size.losses:
        of_loss = trials[trials.loss == loss]
        label = "self-regularized entropy (this loss)" if loss == OURS else loss
        style = {"color": COLORS[loss], "zorder": 3 if loss == OURS else 2, "label": label}
        axes.scatter(of_loss.clean, of_loss.pgd, marker=MARKERS[loss], ec="black", lw=0.4, **style)
    best = trials[trials.loss == "cross entropy"].clean.max()
    for given_up in size.given_up:
        axes.axvline(best - given_up, color="0.6", ls=":", lw=1)
    low = best - 2.5 * max(size.given_up)
    axes.set(xlabel="clean accuracy", ylabel="accuracy under PGD-20, mean of two ε", xlim=(low, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def draw_probabilities(table: pd.DataFrame, size: Size, path: Path) -> None:
    """Quantiles of the probability of a wrong class, and reliability, for the setting of least decay of each loss."""
    figure, (quantiles, reliable) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for loss in size.losses:
        setting = settings_of(table[table.loss == loss])[0]
        lines = of_setting(table, setting)
        style = {"color": COLORS[loss], "marker": MARKERS[loss], "ms": 4, "label": f"{loss}, {name_of(setting)}"}
        wrong = lines[lines.measure == "wrong_log10_p"].groupby("level").value.mean()
        quantiles.plot(wrong.index, wrong, **style)
        for_bin = lines[lines.measure.isin(["reliability", "confidence"])]
        bins = for_bin.groupby(["measure", "level"]).value.mean().unstack(0)
        reliable.plot(bins.confidence, bins.reliability, **style)
    reliable.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
    quantiles.set(xlabel="quantile", ylabel=r"log$_{10}$ of wrong-class probability")
    reliable.set(xlabel="confidence", ylabel="accuracy")
    quantiles.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=160)
    plt.close(figure)


TABLES: dict[str, tuple[str, Callable[[pd.DataFrame, Size, str], str]]] = {
    "differences": ("fronts", differences),
    "accuracies": ("fronts", accuracies),
    "beyond": ("fronts", beyond),
    "masking": ("fronts", masking),
    "wrong labels": ("wrong_labels", label_noise),
    "residual": ("residual", accuracies),
    "adversarial": ("adversarial", accuracies),
    "confirm": ("confirm", accuracies),
    "likelihood": ("likelihood", likelihood),
}


def tables(folder: Path, size: Size) -> dict[str, str]:
    """All tables for which there are lines, by name and data set."""
    found = {"progress": progress(folder, size)}
    for name, (stage, make) in TABLES.items():
        for data in (language.DATA,) if stage == "likelihood" else size.recipes:
            lines = results.read(folder, stage)
            lines = lines[lines.data == data]
            if len(lines):
                found[f"{name}, {data}"] = make(lines, size, data)
    return found


def figures(folder: Path, size: Size) -> list[Path]:
    """Draws everything for which there are lines."""
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    drawn = []
    for data in size.recipes:
        lines = results.read(folder, "fronts")
        lines = lines[lines.data == data]
        if len(plan.trials(folder, data)):
            drawn.append(folder / f"search_{data}.png")
            draw_search(folder, size, data, drawn[-1])
        if len(lines):
            drawn += [folder / f"frontier_{data}.png", folder / f"probabilities_{data}.png"]
            draw_frontier(lines, data, drawn[-2])
            draw_probabilities(lines, size, drawn[-1])
    return drawn


def fill(page: str, found: dict[str, str]) -> str:
    """A page with each table between the comments of its name."""
    for name, table in found.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page, flags=re.DOTALL)
    return page


def main(folder: Path) -> None:
    """Draws the figures and writes the tables."""
    official = folder.resolve() == results.RESULTS
    size = plan.FULL if official else plan.QUICK
    found = tables(folder, size)
    for path in figures(folder, size):
        print(f"figure: {path}")
    if official:
        PAGE.write_text(fill(PAGE.read_text(), found))
        print(f"tables: {PAGE}")
    else:
        report = "\n\n".join(f"## {name}\n\n{table}" for name, table in found.items())
        (folder / "report.md").write_text(f"{report}\n")
        print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=results.RESULTS, help="default: %(default)s")
    folder = parser.parse_args().folder
    if not any(folder.glob("*.csv")):
        sys.exit(f"{folder} has no CSV file: python evidence/run.py makes them")
    main(folder)
