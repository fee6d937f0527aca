"""Tables and figures of what stands in the CSV files; no number in them is typed by hand.

    python evidence/report.py                  evidence/results: its figures, and the tables in docs/evidence.md
    python evidence/report.py evidence-quick --quick      another folder: its figures, and its report.md

A table in docs/evidence.md stands between two comments with its name, and is written anew.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
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
STRONG = (VERDICT, "pgd", "transfer", "apgd-ce_divided")  # an image counts as robust if it withstands all of these
LEVELS = (0.005, 0.015, 0.03)  # of clean accuracy, given up for robustness
COLORS = dict(zip(SPACES, ("#000000", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#D55E00"), strict=True))
TITLES = {loss: loss + " (this loss)" * (loss == OURS) for loss in SPACES}
MARKERS = dict(zip(SPACES, "osvPDX*", strict=True))
SETTING = list(Setting._fields)
BOOTSTRAPS = 1000
Point = dict[str, str | float]  # of a figure
Choice = dict[tuple[str, float], Setting]  # what was chosen, by loss and accuracy given up


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


def rounded(values: Iterable[float]) -> list[float]:
    """To four digits: what a figure shows, and the same on every machine."""
    return [round(float(value), 4) for value in values]


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


def flags(
    table: pd.DataFrame, setting: Setting, measure: str, epsilon: float | None, count: int
) -> dict[int, np.ndarray]:
    """Which of ``count`` images count for a measure, by seed."""
    lines = of_setting(table[table.measure == measure], setting)
    lines = lines if epsilon is None else lines[lines.epsilon == epsilon]
    return {
        seed: np.unpackbits(np.frombuffer(bytes.fromhex(kept), np.uint8))[:count].astype(float)
        for seed, kept in zip(lines.seed, lines.kept, strict=True)
    }


class Front:
    """A loss at one epsilon: which images its chosen settings get right, clean and under the strongest attack.

    ``clean`` and ``robust`` are (seeds, settings, images); the robust images are the first of the clean ones.
    """

    def __init__(self, table: pd.DataFrame, settings: list[Setting], epsilon: float) -> None:
        counts = {measure: int(table[table.measure == measure]["count"].max()) for measure in ("clean", VERDICT)}
        clean = [flags(table, setting, "clean", None, counts["clean"]) for setting in settings]
        attacked = [
            [flags(table, setting, measure, epsilon, counts[VERDICT]) for measure in STRONG] for setting in settings
        ]
        complete = [
            set(clean_by_seed).intersection(*by_measure)
            for clean_by_seed, by_measure in zip(clean, attacked, strict=True)
        ]
        self.seeds = sorted(set.intersection(*complete))
        self.clean = np.array([[by_seed[seed] for by_seed in clean] for seed in self.seeds])
        self.robust = np.array(
            [[np.min([by_seed[seed] for by_seed in measures], 0) for measures in attacked] for seed in self.seeds]
        )

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


def levels(table: pd.DataFrame, choice: Choice) -> list[float]:
    """The clean accuracies at which fronts are compared: the best mean of cross entropy, less what is given up."""
    settings = {setting for (loss, _), setting in choice.items() if loss == "cross entropy"}
    best = max(values(table, setting, "clean").mean() for setting in settings)
    return [round(best - given_up, 4) for given_up in LEVELS]


def verdict(ours: Front, rival: Front, level: float) -> str:
    """Who is ahead, in the words of the table."""
    seeds = sorted(set(ours.seeds) & set(rival.seeds))
    if len(seeds) < 2:
        return "not measured"
    for front, words in ((ours, "not reached by this loss"), (rival, "not reached by it")):
        if math.isnan(envelope(*front.points(seeds), level)):
            return words
    mean, half = difference(ours, rival, level)
    if math.isnan(half):
        return f"{mean:+.3f}, reached by some seeds only"
    words = "no difference" if abs(mean) <= half else "ahead" if mean > 0 else "behind"
    return f"{mean:+.3f} ± {half:.3f} {words}"


def differences(table: pd.DataFrame, choice: Choice, data: str) -> str:
    """This loss against each other, at equal clean accuracy."""
    columns = [(eps, level) for eps in EPSILONS[data] for level in levels(table, choice)]
    losses = list(dict.fromkeys(loss for loss, _ in choice))
    fronts = {(loss, eps): front_of(table, choice, loss, eps) for loss in losses for eps in EPSILONS[data]}
    rows = [
        [rival, *(verdict(fronts[OURS, eps], fronts[rival, eps], level) for eps, level in columns)]
        for rival in losses
        if rival != OURS
    ]
    return markdown(["this loss less", *(f"ε = {eps:g}, clean {level:.3f}" for eps, level in columns)], rows)


def accuracies(table: pd.DataFrame, _: Choice, data: str) -> str:
    """Every setting, clean and attacked."""
    attacked = [(measure, eps) for eps in EPSILONS[data] for measure in ("fgsm", "pgd", "transfer", VERDICT)]
    titles = {"fgsm": "FGSM", "pgd": "PGD-40, 4 starts", "transfer": "transfer", VERDICT: "AutoAttack"}
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
    "after_apgd-ce": "APGD-CE",
    "apgd-ce_divided": "APGD-CE, logits of size 1",
    "pgd_large_epsilon": "PGD at ε = 0.5",
}

AT_EPSILON = ("square_alone", "after_apgd-ce", "apgd-ce_divided")


def beyond(table: pd.DataFrame, *_: object) -> str:
    """Calibration, unknown images, corruptions."""
    rows = [
        [setting.loss, name_of(setting), *(cell(values(table, setting, measure)) for measure in BEYOND)]
        for setting in settings_of(table)
    ]
    return markdown(["loss", "setting", *BEYOND.values()], rows)


def masking(table: pd.DataFrame, _: Choice, data: str) -> str:
    """Signs of masked gradients, at the larger epsilon."""
    eps = EPSILONS[data][1]
    steps = table[(table.measure == "pgd_steps") & (table.epsilon == eps)]
    counts = sorted(steps.level.unique())
    rows = [
        [setting.loss, name_of(setting)]
        + [cell(of_setting(steps[steps.level == count], setting).value) for count in counts]
        + [cell(values(table, setting, measure, eps if measure in AT_EPSILON else None)) for measure in MASKING]
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
        for data in plan.sets_of(stage, size):
            try:
                tasks = plan.tasks(size, stage, data, folder)
            except plan.SearchMissingError:
                rows.append([stage, data, "0", "after the search"])
                continue
            groups = [results.key_of(task.run, group) for task in tasks for group in task.groups]
            rows.append([stage, data, str(sum(key in finished for key in groups)), str(len(groups))])
    return markdown(["stage", "data", "finished", "planned"], rows)


def front_points(table: pd.DataFrame, choice: Choice, data: str) -> list[Point]:
    """The chosen settings: means over seeds of clean and robust accuracy, and standard deviations."""
    found = []
    for eps in EPSILONS[data]:
        for loss in dict.fromkeys(loss for loss, _ in choice):
            front = front_of(table, choice, loss, eps)
            if len(front.seeds) < 2:
                continue
            spreads = [part.mean(-1).std(0, ddof=1) for part in (front.clean, front.robust)]
            for values in zip(*front.points(front.seeds), *spreads, strict=True):
                names = ("clean", "robust", "clean_spread", "robust_spread")
                found.append({"epsilon": eps, "loss": loss} | dict(zip(names, rounded(values), strict=True)))
    return found


def draw_fronts(points: list[Point], path: Path) -> None:
    """Robust against clean accuracy: the chosen settings, their spread over the seeds, and the hull of each loss."""
    table = pd.DataFrame(points)
    epsilons = table.epsilon.unique()
    figure, panels = plt.subplots(1, len(epsilons), figsize=(11, 4.8), layout="constrained", squeeze=False)
    for axes, eps in zip(panels[0], epsilons, strict=True):
        for loss, part in table[table.epsilon == eps].groupby("loss", sort=False):
            style = {"color": COLORS[loss], "zorder": 3 if loss == OURS else 2}
            bars = {"xerr": part.clean_spread, "yerr": part.robust_spread, "elinewidth": 0.8, "ls": ""}
            marker = {"marker": MARKERS[loss], "mec": "black", "mew": 0.5, "ms": 8, "label": TITLES[loss]}
            axes.errorbar(part.clean, part.robust, **bars, **marker, **style)
            grid = np.linspace(part.clean.min(), part.clean.max(), 100)
            hull = [envelope(part.clean.to_numpy(), part.robust.to_numpy(), level) for level in grid]
            axes.plot(grid, hull, lw=1.5, **style)
        axes.set(xlabel="clean accuracy", ylabel="accuracy under the strongest attack", title=rf"$\epsilon$ = {eps:g}")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def search_points(folder: Path, data: str) -> list[Point]:
    """Every trial on the validation set."""
    return [
        {"loss": row.loss, "clean": row.clean, "pgd": round(row.pgd, 4)}
        for row in plan.trials(folder, data).itertuples()
    ]


def draw_search(points: list[Point], path: Path) -> None:
    """Robust against clean accuracy, and, dotted, what is given up against the best of cross entropy."""
    table = pd.DataFrame(points)
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    for loss in (loss for loss in SPACES if loss in set(table.loss)):
        part = table[table.loss == loss]
        style = {"color": COLORS[loss], "zorder": 3 if loss == OURS else 2, "label": TITLES[loss]}
        axes.scatter(part.clean, part.pgd, marker=MARKERS[loss], ec="black", lw=0.4, **style)
    best = table[table.loss == "cross entropy"].clean.max()
    for given_up in LEVELS:
        axes.axvline(best - given_up, color="0.6", ls=":", lw=1)
    low = best - 2.5 * max(LEVELS)
    axes.set(xlabel="clean accuracy", ylabel="accuracy under PGD-20, mean of two ε", xlim=(low, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def probability_points(table: pd.DataFrame, choice: Choice) -> list[Point]:
    """Quantiles of log10 p over the wrong classes, and accuracy by confidence, of the most accurate settings."""
    found = []
    for (loss, given_up), setting in choice.items():
        lines = of_setting(table, setting)
        if given_up or lines.empty:
            continue
        names = {"loss": loss, "setting": name_of(setting)}
        means = lines.groupby(["measure", "level"]).value.mean()
        for level, value in means["wrong_log10_p"].items():
            found.append({**names, "figure": "quantiles", "x": level, "y": round(value, 3)})
        for level, value in means["reliability"].items():
            x, y = rounded((means["confidence", level], value))
            found.append({**names, "figure": "reliability", "x": x, "y": y})
    return found


def draw_probabilities(points: list[Point], path: Path) -> None:
    """Both, side by side."""
    table = pd.DataFrame(points)
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, name in zip(panels, ("quantiles", "reliability"), strict=True):
        for (loss, setting), part in table[table.figure == name].groupby(["loss", "setting"], sort=False):
            style = {"color": COLORS[loss], "marker": MARKERS[loss], "ms": 4}
            axes.plot(part.x, part.y, label=f"{TITLES[loss]}, {setting}", **style)
    panels[0].set(xlabel="quantile", ylabel=r"log$_{10}$ of wrong-class probability")
    panels[1].plot([0, 1], [0, 1], color="0.6", lw=1, ls=":")
    panels[1].set(xlabel="confidence", ylabel="accuracy")
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=160)
    plt.close(figure)


TABLES: dict[str, tuple[str, Callable[[pd.DataFrame, Choice, str], str]]] = {
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


def lines_of(stage: str, folder: Path, size: Size, data: str) -> pd.DataFrame:
    """The lines of a stage's runs, whichever file they stand in: a run that two stages ask for was done once."""
    try:
        tasks = plan.tasks(size, stage, data, folder)
    except plan.SearchMissingError:
        tasks = []
    groups = {group for task in tasks for group in task.groups}
    table = results.read(folder)
    table = table[table.group.isin(groups)]
    # Where nan equals nan. Without lines or tasks there are no types to compare.
    return table.merge(pd.DataFrame([task.run for task in tasks])) if len(table) else table


def tables(folder: Path, size: Size) -> dict[str, str]:
    """All tables for which there are lines, by name and data set."""
    found = {"progress": progress(folder, size)}
    for name, (stage, make) in TABLES.items():
        for data in plan.sets_of(stage, size):
            lines = lines_of(stage, folder, size, data)
            if len(lines):
                choice = {} if data == language.DATA else plan.chosen(folder, size, data)
                found[f"{name}, {data}"] = make(lines, choice, data)
    return found


def figures(folder: Path, size: Size) -> dict[str, list[Point]]:
    """What each figure shows for which there are lines, by the name of its file."""
    found = {}
    for data in size.recipes:
        found[f"search_{data}"] = search_points(folder, data)
        lines = lines_of("fronts", folder, size, data)
        if len(lines):
            choice = plan.chosen(folder, size, data)
            found[f"fronts_{data}"] = front_points(lines, choice, data)
            found[f"probabilities_{data}"] = probability_points(lines, choice)
    return {name: points for name, points in found.items() if points}


def draw(found: dict[str, list[Point]], folder: Path) -> None:
    """The figures, and what they show beside them."""
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    for name, points in found.items():
        {"search": draw_search, "fronts": draw_fronts, "probabilities": draw_probabilities}[name.split("_")[0]](
            points, folder / f"{name}.png"
        )
        lines = ",\n".join(json.dumps(point) for point in points)
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")
        print(f"figure: {folder / name}.png")


def fill(page: str, found: dict[str, str]) -> str:
    """A page with each table between the comments of its name."""
    for name, table in found.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page, flags=re.DOTALL)
    return page


def main(folder: Path, size: Size) -> None:
    """Draws the figures and writes the tables."""
    found = tables(folder, size)
    draw(figures(folder, size), folder)
    if folder.resolve() == results.RESULTS:
        PAGE.write_text(fill(PAGE.read_text(), found))
        print(f"tables: {PAGE}")
    else:
        report = "\n\n".join(f"## {name}\n\n{table}" for name, table in found.items())
        (folder / "report.md").write_text(f"{report}\n")
        print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=results.RESULTS, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="the folder was made by run.py --quick")
    args = parser.parse_args()
    if not any(args.folder.glob("*.csv")):
        sys.exit(f"{args.folder} has no CSV file: python evidence/run.py makes them")
    main(args.folder, plan.QUICK if args.quick else plan.FULL)
