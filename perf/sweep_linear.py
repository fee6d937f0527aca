"""A linear layer and its loss: time and peak memory against the number of classes and of rows.

    python perf/sweep_linear.py                 the GPU if there is one, else the CPU
    python perf/sweep_linear.py --quick         small cases, to see that it works
    python perf/sweep_linear.py --chunk-rows 256 1024 4096      chunks of other sizes as well

Writes sweep_linear.csv and linear.png to perf/out/<device>/ (--out FOLDER for another) and prints a table. A step
is forward + backward with the gradients of features (N, D) and weight (K, D).

"F.linear_cross_entropy" chooses its chunks itself, as small as the features; "our chunks" gives it those of this
project, and sums in float32.

Milliseconds are medians of one interleaved run: ``times_plain`` is the ratio to F.linear and F.cross_entropy.

``peak_MB`` is what a step needs beside the features, the weight and their gradients: logits and what is made of them.
On a GPU PyTorch counts it. On a CPU it is the peak of a process's resident memory, of a new process for every case and
contender, that has done a small step before; on Linux alone. ``times_plain_peak`` is the ratio to a linear layer and
this project's loss of its logits.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import functools
import gc
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import peers
import sweep_k
import torch
import torch.nn.functional as F
from output import add_arguments, collect, folder_of, positive, replacing, run_script, versions_of
from torch import Tensor
from tqdm import tqdm

import sre_triton

# K, N; features D. At N of the middle over K, and at a large K over N.
CASES = {
    "cuda": (4096, [(8192, 8192), (32768, 8192), (50257, 8192), (128256, 8192), (262144, 8192)]),
    "cpu": (256, [(1000, 4096), (8192, 4096), (50257, 4096), (128256, 4096)]),
}
ROW_CASES = {
    "cuda": [(128256, 512), (128256, 2048), (128256, 16384)],
    "cpu": [(50257, 64), (50257, 256), (50257, 1024)],
}
QUICK = (64, [(1000, 256), (8192, 256)])
ROUNDS, FEW_ROUNDS = 9, 3  # few where a round takes a minute
MANY_LOGITS = 2**28  # from here on, on a CPU

FUSED, PLAIN, REFERENCE = "sre_triton, linear + loss", "F.linear, sre_triton", "F.linear, F.cross_entropy"
STYLES = {
    FUSED: ("#0072B2", "o"),
    PLAIN: ("#56B4E9", "s"),
    f"{PLAIN} in place": ("#56B4E9", "d"),
    REFERENCE: ("#D55E00", "v"),
    f"{REFERENCE}, compiled": ("#E69F00", "^"),
    "F.linear_cross_entropy": ("0.3", "D"),
    "F.linear_cross_entropy, our chunks": ("0.6", "D"),
    "Liger": ("#CC79A7", "P"),
    "ml-cross-entropy": ("#009E73", "X"),
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def fused(chunk_rows: int | None = None) -> Loss:
    """This project's, without logits."""
    return lambda x, W, target: sre_triton.linear_self_regularized_entropy(
        x, W, target, class_mean=True, chunk_rows=chunk_rows
    )


def plain(**options: object) -> Loss:
    """This project's, with them."""
    return lambda x, W, target: sre_triton.self_regularized_entropy(F.linear(x, W), target, class_mean=True, **options)


def contenders(chunk_rows: list[int]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Who takes part, and why others do not."""
    field, missing = {FUSED: fused()}, {}
    field |= {f"{FUSED}, {rows} rows": fused(rows) for rows in chunk_rows}
    field |= {PLAIN: plain(), f"{PLAIN} in place": plain(inplace=True)}
    for name, make in peers.LINEAR_PEERS.items():
        try:
            field[name] = make()
        except Exception as error:  # what a foreign package raises on import is its own affair
            missing[name] = f"{type(error).__name__}: {error}"
    return field, missing


def problem(K: int, N: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weight, target; the logits have a variance of about 1."""
    x = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    W = (torch.randn(K, D, device=device) / D**0.5).to(dtype).requires_grad_()
    return x, W, torch.randint(K, (N,), device=device)


def step(loss: Loss, x: Tensor, W: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(loss(x, W, target), (x, W))


def resident(name: str) -> int:
    """VmRSS, the bytes of this process in memory, or VmHWM, their peak."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_of_process(name: str, K: int, N: int, D: int, dtype: torch.dtype, chunk_rows: list[int]) -> int:
    """Bytes that a step needs beside its arguments and results, in this process, which has done nothing else."""
    loss = contenders(chunk_rows)[0][name]
    x, W, target = problem(K, N, D, dtype, torch.device("cpu"))
    for rows in (2, 3):  # compiles, and starts the threads
        step(loss, x[:rows], W, target[:rows])
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    gradients = step(loss, x, W, target)
    return resident("VmHWM") - before - sum(gradient.nbytes for gradient in gradients)


def peaks_of_processes(
    names: list[str], K: int, N: int, args: argparse.Namespace
) -> Iterator[tuple[str, float | None]]:
    """``peak_of_process``, each in its own."""
    for name in names:
        case = {"name": name, "K": K, "N": N, "D": args.features, "chunk_rows": args.chunk_rows}
        command = [sys.executable, __file__, "--dtype", args.dtype_name, "--peak-of", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            tqdm.write(f"{name} at K = {K}, N = {N}: {done.stderr.strip().splitlines()[-1]}")
        yield name, int(done.stdout) if done.returncode == 0 else None


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """The table, case by case."""
    field, missing = contenders(args.chunk_rows)
    for name, reason in missing.items():
        print(f"without {name}: {reason}")
    on_cpu = args.device.type == "cpu"
    rounds = [2 if args.quick else FEW_ROUNDS if on_cpu and K * N >= MANY_LOGITS else ROUNDS for K, N in args.cases]
    own_process = sys.platform == "linux" if on_cpu else False
    steps = sum(len(field) * (count + 1 + own_process) for count in rounds)
    with tqdm(total=steps, unit="step", mininterval=1) as progress:
        for (K, N), count in zip(args.cases, rounds, strict=True):
            progress.set_description(f"K = {K}, N = {N}", refresh=False)
            x, W, target = problem(K, N, args.features, args.dtype, args.device)
            seconds, peaks = {name: [] for name in field}, {}
            for round_ in range(-1, count):  # -1 compiles and warms up
                for name in list(seconds):
                    progress.update()
                    before = sweep_k.reset_peak(args.device)
                    try:
                        elapsed = sweep_k.seconds_of(functools.partial(step, field[name], x, W, target), args.device, 1)
                    except Exception as error:
                        if name.startswith("sre_triton") and not isinstance(error, torch.OutOfMemoryError):
                            raise
                        del seconds[name]  # it has no row for this case
                        progress.write(f"{name} at K = {K}, N = {N}: {type(error).__name__}: {str(error)[:200]}")
                        continue
                    if round_ >= 0:
                        seconds[name].append(elapsed)
                        if not on_cpu:
                            peak = torch.cuda.max_memory_allocated(args.device) - before
                            peaks[name] = peak - x.nbytes - W.nbytes
            if own_process:
                for name, peak in peaks_of_processes(list(seconds), K, N, args):
                    progress.update()
                    peaks[name] = peak
            yield rows_of(args, K, N, seconds, peaks)


def rows_of(
    args: argparse.Namespace, K: int, N: int, seconds: dict[str, list[float]], peaks: dict[str, int | None]
) -> list[dict[str, object]]:
    """A case's rows of the table."""
    table = []
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4, method="inclusive")
        peak, of_plain = peaks.get(name), peaks.get(PLAIN)
        table.append(
            {
                "K": K,
                "N": N,
                "D": args.features,
                "dtype": args.dtype_name,
                "contender": name,
                "rounds": len(times),
                "median_ms": f"{1e3 * median:.4g}",
                "quartile1_ms": f"{1e3 * low:.4g}",
                "quartile3_ms": f"{1e3 * high:.4g}",
                "times_plain": f"{median / medians[REFERENCE]:.3g}" if REFERENCE in medians else "",
                "peak_MB": "" if peak is None else f"{peak / 1e6:.0f}",
                "times_plain_peak": f"{peak / of_plain:.3g}" if peak is not None and of_plain else "",
            }
        )
    return table


def plot(csv_path: Path, path: Path) -> None:
    """Milliseconds and megabytes against K, from the CSV alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with csv_path.open(newline="") as file:
        table = list(csv.DictReader(file))
    N = max({row["N"] for row in table}, key=[row["N"] for row in table].count)
    table = [row for row in table if row["N"] == N]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, key, low, high in (
        (panels[0], "median_ms", "quartile1_ms", "quartile3_ms"),
        (panels[1], "peak_MB", "peak_MB", "peak_MB"),
    ):
        for name, (color, marker) in STYLES.items():
            rows = [row for row in table if row["contender"] == name and row[key]]
            K = [int(row["K"]) for row in rows]
            width = 2.4 if name == FUSED else 1.2
            order = 4 if name == FUSED else 3
            axes.plot(
                K, [float(row[key]) for row in rows], color=color, marker=marker, lw=width, label=name, zorder=order
            )
            edges = [[float(row[edge]) for row in rows] for edge in (low, high)]
            axes.fill_between(K, *edges, color=color, alpha=0.15, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="number of classes K")
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("milliseconds")
    panels[0].set_title("Time of a step", loc="left", fontsize=10)
    panels[1].set_ylabel("MB")
    panels[1].set_title("Peak memory beside arguments and gradients", loc="left", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn = [(handle, label) for handle, label in zip(handles, labels, strict=True) if len(handle.get_xdata())]
    figure.legend(*zip(*drawn, strict=True), loc="outside lower center", ncols=4, frameon=False)
    first = table[0]
    machine = (first["device"], first["dtype"], f"N = {N}", f"D = {first['D']}", f"torch {first['torch']}")
    figure.suptitle("   ".join(machine), fontsize=8, color="0.4", x=0.995, ha="right")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=160, format="png")
    plt.close(figure)


def show(table: list[dict[str, object]]) -> None:
    """A line for each case and contender."""
    width = max(len(row["contender"]) for row in table)
    print(f"{'K':>7}{'N':>7}  {'':{width}}{'ms':>10}{'x F.':>8}{'MB':>8}{'x plain':>10}")
    for row in table:
        cells = (row["median_ms"], row["times_plain"], row["peak_MB"], row["times_plain_peak"])
        print(f"{row['K']:>7}{row['N']:>7}  {row['contender']:{width}}" + "{:>10}{:>8}{:>8}{:>10}".format(*cells))


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, quick="two small cases, fewer rounds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16; on a CPU float32")
    parser.add_argument("--chunk-rows", type=positive, nargs="+", default=[], help="more sizes of chunks")
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    os.environ.setdefault("SRE_TRITON_COMPILE", "1")  # a small step before is to compile for the large one
    args.dtype_name = args.dtype or ("float32" if args.device.type == "cpu" else "bfloat16")
    args.dtype = getattr(torch, args.dtype_name)
    torch.manual_seed(0)
    if args.peak_of:
        print(peak_of_process(dtype=args.dtype, **args.peak_of))
        return
    kind = "cpu" if args.device.type == "cpu" else "cuda"
    args.features, args.cases = QUICK if args.quick else CASES[kind]
    args.cases = args.cases + ([] if args.quick else ROW_CASES[kind])
    own = [] if (args.dtype_name == "float32") == (kind == "cpu") else [args.dtype_name]
    folder = folder_of(args, *own)

    show(collect(measure(args), versions_of(args.device), folder / "sweep_linear.csv"))
    plot(folder / "sweep_linear.csv", folder / "linear.png")
    print(folder / "sweep_linear.csv", folder / "linear.png", sep="\n")


if __name__ == "__main__":
    run_script(main)
