"""What the scripts of this folder share: their arguments, where they write, and what is left when somebody interrupts.

Results go to perf/out/<device>/, which git ignores; those of --quick to a folder "quick" in there. --out says another
folder, as perf/results/<device> for what is committed. A file appears whole or not at all: a table grows as
NAME.partial.csv, and takes the place of NAME.csv once it is complete.
"""

import argparse
import contextlib
import csv
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import sre_triton

HUGE_PAGES = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"


def device(name: str) -> torch.device:
    """An argument's value: a device of this machine."""
    try:
        found = torch.device(name)
        if found.type != "cpu":
            torch.get_device_module(found).get_device_name(torch.empty(0, device=found).device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {name!r} ({reason})") from None
    return found


def positive(number: str) -> int:
    """An argument's value: a whole number from 1 on."""
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {number!r}")
    return int(number)


def file(name: str) -> Path:
    """An argument's value: a file that is there."""
    if not Path(name).is_file():
        raise argparse.ArgumentTypeError(f"expected a file that is there, got {name!r}")
    return Path(name)


def add_arguments(parser: argparse.ArgumentParser, quick: str) -> None:
    """``--device``, ``--out`` and ``--quick``, whose help is ``quick``."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=found, help="default: %(default)s, which was found")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, help="folder for the CSV and the figure (default: perf/out/<device>)")


def folder_of(args: argparse.Namespace, *own: str) -> Path:
    """Where the results go, made if it is not there; ``own`` are folders for what is unlike the device's usual run."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(args.device)).strip("-")
    folder = args.out or Path(__file__).parent.joinpath("out", name, *own)
    folder = folder / "quick" if args.quick else folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out: expected a folder that is there or can be made, got {folder} ({error.strerror})")
    return folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of ``path`` at the end; nothing of it is left where that fails."""
    unfinished = path.with_name(f".{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """The file of a table that is not complete."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


def write_csv(table: list[dict[str, object]], versions: dict[str, object], path: Path) -> None:
    """The table, each row with what it was measured on."""
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *versions], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | versions for row in table)


def collect(
    cases: Iterable[list[dict[str, object]]], versions: dict[str, object], path: Path
) -> list[dict[str, object]]:
    """Write the rows of every case as they come, and return all of them; Ctrl-C ends the script, and leaves these."""
    table, partial = [], partial_of(path)
    try:
        for rows in cases:
            table += rows
            write_csv(table, versions, partial)
    except KeyboardInterrupt:
        sys.exit(
            f"interrupted; what was measured is in {partial}" if table else "interrupted; nothing was measured yet"
        )
    partial.replace(path)
    return table


def run_script(main: Callable[[], None]) -> None:
    """Run a script's ``main``; Ctrl-C ends it with one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")


def device_name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads."""
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def versions_of(device: torch.device) -> dict[str, object]:
    """What the figures depend on."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    try:
        git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": device_name(device),
        "runtime": torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "sre_triton": sre_triton.__version__,
        "huge_pages": HUGE_PAGES,
        "commit": commit,
    }
