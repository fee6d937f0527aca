"""The CSV files: a line is one measure of one run, with all that the run depends on. The commit tells the attacks.

A stage has a file. Lines are only ever appended, a whole group of measures at a time, whose last line is the measure
"seconds". Whatever a kill left unfinished is removed at the next start.
"""

import csv
import importlib.metadata
import io
import math
import subprocess
from pathlib import Path

import pandas as pd
from measures import Measure
from training import Run

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
VERSIONS = ("sre_triton", "torch", "pyautoattack")
COLUMNS = (*Run._fields, "group", *Measure._fields, "weights", "commit", *VERSIONS)
LAST = "seconds"  # the last measure of a group


def text_of(value: object) -> str:
    """How a value stands in a file: a number in six digits, nothing for nan."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def key_of(run: Run, group: str) -> tuple[str, ...]:
    """What tells a group of a run from all others; texts, because nan does not equal itself."""
    return (*map(text_of, run), group)


def commit() -> str:
    """Of the code that runs, with a plus where it was changed since; empty outside of a repository."""

    def git(*command: str) -> str:
        done = subprocess.run(("git", *command), cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "sre_triton", "evidence/*.py")
    return git("rev-parse", "--short=8", "HEAD") + "+" * bool(changed)


def versions() -> tuple[str, ...]:
    """Of the packages that the numbers depend on."""
    return tuple(importlib.metadata.version(package) for package in VERSIONS)


def append(path: Path, run: Run, group: str, measures: list[Measure], weights: str, origin: tuple[str, ...]) -> None:
    """Adds the measures of a group in one piece."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writerow(COLUMNS)
    writer.writerows((*key_of(run, group), *map(text_of, measure), weights, *origin) for measure in measures)
    with path.open("a") as file:
        file.write(lines.getvalue())


def repair(path: Path) -> None:
    """Removes what a kill left: half a line, and groups without their last."""
    *lines, rest = path.read_text().split("\n")
    kept, group = [], []
    for line in lines:
        group.append(line)
        if line == ",".join(COLUMNS) or dict(zip(COLUMNS, next(csv.reader([line])), strict=False))["measure"] == LAST:
            kept, group = kept + group, []
    if rest or group:
        mended = path.with_suffix(".mended")
        mended.write_text("".join(f"{line}\n" for line in kept))
        mended.replace(path)


def read(folder: Path, stage: str = "*") -> pd.DataFrame:
    """The lines of one stage, or of all: numbers as numbers, nan where there is none."""
    texts = {"commit": str, "weights": str, "kept": str}
    tables = [pd.read_csv(path, dtype=texts) for path in sorted(folder.glob(f"{stage}.csv"))]
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.concat(tables, ignore_index=True)
    block = (table.measure == LAST).shift(fill_value=False).cumsum()  # the number of the group of each line
    first = block.groupby([table[name] for name in (*Run._fields, "group")], dropna=False).transform("min")
    return table[block == first].reset_index(drop=True)  # once, if two programs measured it side by side


def finished(folder: Path) -> set[tuple[str, ...]]:
    """Keys of all groups that stand in the files."""
    keys = set()
    for path in folder.glob("*.csv"):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if line["measure"] == LAST:
                    keys.add(tuple(line[name] for name in (*Run._fields, "group")))
    return keys
