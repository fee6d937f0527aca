"""Figures: first the points that each shows, as numbers that can be compared, then the drawing."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import plan
from comparison import LEVELS, envelope, front_of, of_setting
from losses import OURS, SPACES, name_of
from matplotlib import pyplot as plt
from measures import EPSILONS
from plan import Choice, Size

COLORS = dict(zip(SPACES, ("#000000", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#D55E00"), strict=True))
TITLES = {loss: loss + " (this loss)" * (loss == OURS) for loss in SPACES}
MARKERS = dict(zip(SPACES, "osvPDX*", strict=True))
Point = dict[str, str | float]


def rounded(values: Iterable[float]) -> list[float]:
    """To four digits: what a figure shows, and the same on every machine."""
    return [round(float(value), 4) for value in values]


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
    limits = best - 2.5 * max(LEVELS), table.clean.max() + max(LEVELS) / 5
    axes.set(xlabel="clean accuracy", ylabel="accuracy under PGD-20, mean of two ε", xlim=limits)
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


def all_points(folder: Path, size: Size) -> dict[str, list[Point]]:
    """What each figure shows for which there are lines, by the name of its file."""
    found = {}
    for data in size.recipes:
        found[f"search_{data}"] = search_points(folder, data)
        lines = plan.lines_of(["fronts"], folder, size, data)
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
