"""Forward + backward on the CPU, against F.cross_entropy and the source's formula.

    python perf/step_cpu.py

Every contender takes its turn in every round of one process; what counts is the ratio of the medians, as absolute
times depend on the machine and its neighbours. The table is printed and written, with versions, to step_cpu.csv in
perf/results/<device>/ (--out FOLDER for another).

What bounds a step: the loss reads the logits (4 N K bytes in float32) and writes the gradient (as much again); all
passes in between stay in cache. F.cross_entropy also writes and reads the log-probabilities, twice the traffic and
twice the fresh memory, and the source's formula keeps a dozen tensors of N x K.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import sre_triton
from sre_triton.reference import source_formula

ELEMENTS = 2**24  # N x K: 64 MiB of float32, more than caches hold
CLASSES = (1000, 32768, 262144)

CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "F.cross_entropy": F.cross_entropy,
    "sre_triton": lambda z, target: sre_triton.self_regularized_entropy(z, target, class_mean=True, backend="compile"),
    "source formula": source_formula,
}


def device_name() -> str:
    """The processor and the number of threads, fit for a folder's name."""
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        model = platform.processor() or platform.machine()
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{model} {torch.get_num_threads()} threads").strip("-")


def measure(num_classes: int, rounds: int, progress: tqdm) -> list[dict[str, object]]:
    """One row of the table for each contender."""
    num_rows = ELEMENTS // num_classes
    logits = (3 * torch.randn(num_rows, num_classes)).requires_grad_()
    target = torch.randint(num_classes, (num_rows,))
    seconds = {name: [] for name in CONTENDERS}
    for round_ in range(-2, rounds):  # the first two compile and warm up
        for name, loss in CONTENDERS.items():
            logits.grad = None
            start = time.perf_counter()
            loss(logits, target).backward()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
            progress.update()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "K": num_classes,
            "N": num_rows,
            "contender": name,
            "median_ms": round(1e3 * medians[name], 2),
            "min_ms": round(1e3 * min(seconds[name]), 2),
            "max_ms": round(1e3 * max(seconds[name]), 2),
            "times_cross_entropy": round(medians[name] / medians["F.cross_entropy"], 3),
            "times_source_formula": round(medians[name] / medians["source formula"], 4),
        }
        for name in CONTENDERS
    ]


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / device_name()
    parser.add_argument("--out", type=Path, default=default, help="folder of the CSV (default: perf/results/<device>)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be positive")
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    with tqdm(total=len(CLASSES) * len(CONTENDERS) * (args.rounds + 2), unit="step") as progress:
        table = [row for num_classes in CLASSES for row in measure(num_classes, args.rounds, progress)]
    versions = {
        "torch": torch.__version__,
        "sre_triton": sre_triton.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
    }
    path = args.out / "step_cpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *versions], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | versions for row in table)

    print(f"{'K':>7}{'N':>7}  {'contender':<16}{'ms':>9}{'x cross entropy':>17}{'x source formula':>18}")
    for row in table:
        print(
            f"{row['K']:>7}{row['N']:>7}  {row['contender']:<16}{row['median_ms']:>9.1f}"
            f"{row['times_cross_entropy']:>17.2f}{row['times_source_formula']:>18.3f}"
        )
    print(path)


if __name__ == "__main__":
    main()
