"""Tables and figures of what stands in the CSV files; no number in them is typed by hand.

    python evidence/report.py                  evidence/results: its figures, and the tables in docs/evidence.md
    python evidence/report.py evidence-quick --quick      another folder: its figures, and its report.md

A table in docs/evidence.md stands between two comments with its name, and is written anew.
"""

import argparse
import functools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

try:
    import figures
    import language
    import numpy as np
    import pandas as pd
    import plan
    import results
    from comparison import (
        LEVELS,
        SETTING,
        VERDICT,
        BySeed,
        Front,
        difference,
        envelope,
        front_of,
        images,
        interval,
        of_setting,
        paired,
        robust,
        scalars,
        values,
    )
    from losses import OURS, SPACES, Setting, name_of
    from measures import EPSILONS, OTHER
    from plan import Choice, Size
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing: pip install '.[evidence]'")

PAGE = results.ROOT / "docs" / "evidence.md"
TITLES = {"fgsm": "FGSM", "pgd": "PGD-40, 4 starts", "transfer": "transfer", VERDICT: "AutoAttack"}
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


Column = tuple[str, Callable[[pd.DataFrame, Setting], BySeed]]  # its title, and what it shows of a setting


def settings_of(table: pd.DataFrame) -> list[Setting]:
    """The settings that occur, losses in the order of SPACES."""
    order = {loss: number for number, loss in enumerate(SPACES)}
    found = [Setting(*row) for row in table[SETTING].drop_duplicates().itertuples(index=False)]
    return sorted(found, key=lambda setting: (order[setting.loss], setting.weight_decay))


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


def gain(ours: BySeed, rival: BySeed, digits: int = 3) -> str:
    """How far ours is above a rival, paired, with half of the interval; bold where zero lies outside of it."""
    mean, half = paired(ours, rival)
    if math.isnan(mean):
        return ""
    text = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{text}**" if abs(mean) > half else text


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
    header = ["loss", "setting", "clean", *(f"ε = {eps:g}: {TITLES[measure]}" for measure, eps in attacked)]
    rows = [
        [setting.loss, name_of(setting), cell(values(table, setting, "clean"))]
        + [cell(values(table, setting, measure, eps)) for measure, eps in attacked]
        for setting in settings_of(table)
    ]
    return markdown(header, rows)


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


def goal(given_up: float) -> str:
    """What a setting was chosen for."""
    return f"robustness for {100 * given_up:g} points" if given_up else "accuracy"


def gains(columns: list[Column], table: pd.DataFrame, choice: Choice) -> str:
    """This loss less each other, of the settings that were chosen for the same goal."""
    rows = []
    for (loss, given_up), setting in choice.items():
        ours = choice[OURS, given_up]
        cells = [gain(of(table, ours), of(table, setting)) for _, of in columns]
        if loss != OURS and any(cells):
            rows.append([loss, goal(given_up), *cells])
    return markdown(["this loss less", "chosen for", *(title for title, _ in columns)], rows)


def attacked(data: str) -> list[Column]:
    """Clean and robust accuracy."""
    at_epsilons = [(f"robust, ε = {eps:g}", functools.partial(robust, epsilon=eps)) for eps in EPSILONS[data]]
    return [("clean", functools.partial(images, measure="clean")), *at_epsilons]


def attacked_gains(table: pd.DataFrame, choice: Choice, data: str) -> str:
    """Clean and robust accuracy, paired."""
    return gains(attacked(data), table, choice)


def beyond_gains(table: pd.DataFrame, choice: Choice, _: str) -> str:
    """Calibration, unknown images, corruptions, paired. Less is better for NLL and ECE."""
    columns = [
        (title, functools.partial(scalars, measure=measure))
        for measure, title in BEYOND.items()
        if measure != "temperature"
    ]
    return gains(columns, table, choice)


def label_noise_gains(table: pd.DataFrame, choice: Choice, _: str) -> str:
    """Accuracy after a training with wrong labels, paired."""

    def accuracy(table: pd.DataFrame, setting: Setting, share: float) -> BySeed:
        return scalars(table[table.wrong_labels == share], setting, "clean")

    shares = sorted(table.wrong_labels.unique())
    return gains([(f"{share:.0%} wrong", functools.partial(accuracy, share=share)) for share in shares], table, choice)


def take(folder: Path, size: Size) -> str:
    """What to take for which goal, what it costs and what it brings, on the data that chose it and on the other."""
    rows = []
    for data in (data for data in EPSILONS if data in size.recipes):
        lines = plan.lines_of(["fronts"], folder, size, data)
        if not len(lines):
            continue
        choice, others = plan.chosen(folder, size, data), plan.lines_of(["confirm"], folder, size, OTHER[data])
        accurate = choice["cross entropy", 0.0]
        eps, other_eps = EPSILONS[data][1], EPSILONS[OTHER[data]][1]
        for given_up in size.given_up:
            ours, rival = choice[OURS, given_up], choice["cross entropy", given_up]
            shown = [f"{ours.strength:.2g}", f"{ours.c:.1g}", str(ours.class_mean), f"{ours.weight_decay:.2g}"]
            cells = [
                gain(images(lines, ours, "clean"), images(lines, accurate, "clean")),
                gain(robust(lines, ours, eps), robust(lines, accurate, eps)),
                gain(robust(lines, ours, eps), robust(lines, rival, eps)),
                gain(robust(others, ours, other_eps), robust(others, rival, other_eps)),
            ]
            rows.append(["10", data, goal(given_up), *shown, "yes" if ours.ramp else "no", *cells])
    lines = plan.lines_of(["likelihood"], folder, size, language.DATA)
    nll = {setting: scalars(lines, setting, "nll") for setting in language.SETTINGS if setting.class_mean}
    tried = {setting: np.mean([*by_seed.values()]) for setting, by_seed in nll.items() if by_seed}
    if tried:
        best = min(tried, key=tried.get)
        cost = gain(nll[best], scalars(lines, language.SETTINGS[0], "nll"))
        shown = [f"{best.strength:.2g}", f"{best.c:.1g}", str(best.class_mean), f"{best.weight_decay:.2g}", "no"]
        rows.append(["50257", language.DATA, "likelihood", *shown, f"H: {cost}", "", "", ""])
    header = ["K", "data", "goal", "λ", "c", "class_mean", "weight decay", "ramp", "clean accuracy", "robust"]
    return markdown([*header, "robust, less cross entropy for this goal", "the same on the other data"], rows)


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


TABLES: dict[str, tuple[tuple[str, ...], Callable[[pd.DataFrame, Choice, str], str]]] = {
    "differences": (("fronts",), differences),
    "accuracies": (("fronts",), accuracies),
    "beyond": (("fronts",), beyond),
    "beyond, paired": (("fronts",), beyond_gains),
    "masking": (("fronts",), masking),
    "wrong labels": (("wrong_labels", "fronts"), label_noise),
    "wrong labels, paired": (("wrong_labels", "fronts"), label_noise_gains),
    "residual": (("residual",), accuracies),
    "residual, paired": (("residual",), attacked_gains),
    "adversarial": (("adversarial",), accuracies),
    "adversarial, paired": (("adversarial",), attacked_gains),
    "confirm": (("confirm",), accuracies),
    "confirm, paired": (("confirm",), attacked_gains),
    "likelihood": (("likelihood",), likelihood),
}


def tables(folder: Path, size: Size) -> dict[str, str]:
    """All tables for which there are lines, by name and data set."""
    found = {"progress": progress(folder, size)}
    for name, (stages, make) in TABLES.items():
        for data in plan.sets_of(stages[0], size):
            if len(plan.lines_of(stages[:1], folder, size, data)):
                choice = {} if data == language.DATA else plan.choice_for(stages[0], folder, size, data)
                found[f"{name}, {data}"] = make(plan.lines_of(stages, folder, size, data), choice, data)
    if len(found) > 1:
        found["take"] = take(folder, size)
    return found


def fill(page: str, found: dict[str, str]) -> str:
    """A page with each table between the comments of its name."""
    for name, table in found.items():
        pattern = rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)"
        page = re.sub(pattern, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", page, flags=re.DOTALL)
    return page


def main(folder: Path, size: Size) -> None:
    """Draws the figures and writes the tables."""
    found = tables(folder, size)
    figures.draw(figures.all_points(folder, size), folder)
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
