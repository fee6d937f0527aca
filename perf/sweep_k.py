"""Forward + backward against the number of classes, under the machine's own copy bandwidth.

    python perf/sweep_k.py                 the GPU if there is one, else the CPU
    python perf/sweep_k.py --quick         fewer and smaller cases, to see that it works
    python perf/sweep_k.py --classes 1000 --out FOLDER
                                           these numbers of classes alone, and the small batches below

Writes sweep_k.csv and roofline.png to perf/out/<device>/ (--out FOLDER for another) and prints a table; another dtype
than the device's default, huge pages and --quick have a folder of their own in there.

The roof: a step must read the logits once and write their gradient once, 2 N K times the bytes of an element. That,
divided by the time of a step, is the bandwidth shown here, for every contender, however often it really moves the
matrix. Copying the logits moves as much and computes nothing. It is timed in the same rounds, into memory in use and,
as for a gradient, into new memory, whose page faults cost a CPU more than the copy. N K is the same for all K, and
so is what a copy takes: the figure's roof is the median of them all; ``times_copy`` has the copy of the same rounds.

On a GPU other libraries take part where they import (peers.py), and ``peak_MB`` is the memory that a step needs beside
the logits. ``moves`` counts how often a contender reads or writes a matrix as large as they are, the least being 2: a
reader of ``times_copy`` can see how much of it is traffic. The matrices are larger than caches by far, so that nothing
of one step is left for the next.

"exp, log, 1 / x" is the arithmetic that no such loss seems to do without, one of each for every logit, by PyTorch's
own vectorised loops. On a CPU they run over a piece that stays in the cache, so it is a floor for the milliseconds as
the copy is. (This project's loss goes below it: where its values are bounded, a polynomial replaces the logarithm.)

On a CPU, batches from 4096 rows of 1000 classes down to 32 rows of 10, as small as people train with, are in the table
as well, though not in the figure, and there "uncompiled" is what is computed before it pays to compile. A turn on them
is many steps, after a few that are not counted, in which heap and caches are still as another contender left them: up
to 0.6 ms. On 256 rows, with ``OMP_NUM_THREADS=1``, "eager" is to take at most twice the time of the source's formula.
``THP_MEM_ALLOC_ENABLE=1 python perf/sweep_k.py`` has PyTorch ask Linux for huge pages.

All contenders take their turn in every round, so that a disturbance meets all of them; the slow ones sit out most
rounds. What counts is the ratio of two medians of one run: ``times_copy`` and ``times_ours`` (this project's default).
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import peers
import torch
from output import HUGE_PAGES, add_arguments, collect, folder_of, positive, replacing, run_script, versions_of
from torch import Tensor
from tqdm import tqdm

import sre_triton
from sre_triton.reference import source_formula

CLASSES = (10, 32, 100, 320, 1000, 4096, 10000, 21841, 32768, 50257, 128256, 262144)
# On a GPU, where that takes no time, the vocabularies that people have as well.
GPU_CLASSES = (
    10, 32, 100, 320, 1000, 1823, 4096, 5003, 8192, 16384, 21841, 32000, 49152, 50257, 50304, 64000, 100277, 128256,
    129280, 131072, 151936, 152064, 200064, 201088, 256000, 262144,
)  # fmt: skip
QUICK_CLASSES = (100, 1000, 50257)
BATCHES = ((1000, 4096), (1000, 256), (100, 128), (10, 128), (10, 32))  # K, N

COPY, CLONE, MATH = "copy", "copy to new memory", "exp, log, 1 / x"
UNCOUNTED, MOST = 5, 400  # steps at the beginning of a turn on a small batch, and in it
PIECE = 2**18  # logits that stay in the cache of a CPU's core


class Reused(torch.autograd.Function):
    """Memory in use as a result, of which a loss may take the storage: that of a leaf it must not."""

    @staticmethod
    def forward(ctx, source: Tensor, memory: Tensor) -> Tensor:
        """``memory``, as if it had been computed from ``source``."""
        return memory.detach()

    @staticmethod
    def backward(ctx, *_: Tensor) -> tuple[None, None]:
        """Nothing: the gradient of the result itself is asked for."""
        return None, None


class Contender(NamedTuple):
    """A loss, and how it is drawn."""

    loss: Callable[[Tensor, Tensor], Tensor]
    color: str
    marker: str
    moves: float | str = ""
    slow: bool = False
    ours: bool = False
    inplace: bool = False  # it writes into the logits
    stance: str = "default"  # of torch.compile
    small: bool = False  # it takes part on small batches alone


def ours(backend: str | None, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    """This project's loss."""
    return lambda z, target: sre_triton.self_regularized_entropy(z, target, class_mean=True, backend=backend, **options)


STYLES = {
    "F.cross_entropy, compiled": ("#E69F00", "^"),
    "F.cross_entropy": ("#D55E00", "v"),
    "Liger": ("#CC79A7", "P"),
    "Quack": ("#009E73", "X"),
}


def contenders(on_gpu: bool) -> dict[str, Contender]:
    """Who takes part. On a CPU Triton's interpreter shows correctness, not speed."""
    field = {}
    if on_gpu:
        field["sre_triton (triton)"] = Contender(ours("triton"), "#0072B2", "o", 2, ours=True)
        field["sre_triton (triton, recompute)"] = Contender(ours("triton", recompute=True), "#0072B2", "d", 3)
    field["sre_triton (compile)"] = Contender(ours("compile"), "#56B4E9" if on_gpu else "#0072B2", "s", ours=True)
    if not on_gpu:
        field["sre_triton (uncompiled)"] = Contender(
            ours(None), "0.3", "h", ours=True, stance="force_eager", small=True
        )
        field["sre_triton (compile, in place)"] = Contender(ours("compile", inplace=True), "#0072B2", "d", inplace=True)
    for name, (loss, peer) in peers.available()[0].items():
        if on_gpu or name.startswith("F."):
            field[name] = Contender(loss, *STYLES[name], peer.moves, inplace=peer.inplace)
    field["sre_triton (eager)"] = Contender(ours("eager"), "0.55", "D", slow=True)
    formula = Contender(lambda z, target: source_formula(z.float(), target), "k", "x", slow=True)
    return field | {"the source's formula": formula}


def compute_all(source: Tensor, scratch: Tensor) -> None:
    """One exponential, one logarithm and one reciprocal for each element."""
    for piece in source.view(-1).split(scratch.numel()):
        into = scratch[: piece.numel()]
        torch.exp(piece, out=into).log_().reciprocal_()


def seconds_of(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """How long a step takes on the device: on a GPU without what Python needs to launch it."""
    if device.type == "cpu":
        for _ in range(UNCOUNTED if repeats > 1 else 0):
            step()
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - start) / repeats
    module = torch.get_device_module(device)
    start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    if device.type == "cuda":
        torch.cuda._sleep(10**7)  # some 5 ms, in which the whole step is launched
    start.record()
    step()
    end.record()
    module.synchronize()
    return start.elapsed_time(end) / 1e3


def reset_peak(device: torch.device) -> int:
    """The bytes of memory in use on a GPU, from where its peak is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_megabytes(device: torch.device, before: int) -> str:
    """The peak since then, beyond what was in use; nothing on other devices."""
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e6:.0f}" if device.type == "cuda" else ""


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """The table, K by K: a row for every contender, and for the copy."""
    field = contenders(args.device.type != "cpu")
    rounds = dict.fromkeys((COPY, CLONE, MATH), range(-1, args.rounds))  # round -1 compiles and warms up
    rounds |= {name: range(args.slow_rounds) if c.slow else range(-1, args.rounds) for name, c in field.items()}
    on_cpu = args.device.type == "cpu"
    cases = [(K, args.elements // K) for K in args.classes] + [batch for batch in BATCHES if on_cpu and not args.quick]
    # The same memory for all K: how fast it is copied depends on where it lies.
    memory = torch.empty(2, max(K * N for K, N in cases), dtype=args.dtype, device=args.device)
    with tqdm(total=len(cases) * sum(map(len, rounds.values())), unit="step", mininterval=1) as progress:
        for num_classes, num_rows in cases:
            source, copied = memory[:, : num_rows * num_classes].view(2, num_rows, num_classes)
            source.copy_(3 * torch.randn(num_rows, num_classes, device=args.device))
            copied.copy_(source)
            logits = source.detach().requires_grad_()
            target = torch.randint(num_classes, (num_rows,), device=args.device)
            scratch = torch.empty(PIECE if on_cpu else source.numel(), dtype=args.dtype, device=args.device)
            kept = []

            def step(name, logits=logits, target=target, source=source, copied=copied, scratch=scratch, kept=kept):
                kept.clear()
                if name == COPY:
                    copied.copy_(source)
                elif name == CLONE:
                    kept.append(source.clone())
                elif name == MATH:
                    compute_all(source, scratch)
                else:
                    made = Reused.apply(logits, copied) if field[name].inplace else logits
                    kept.extend(torch.autograd.grad(field[name].loss(made, target), made))

            is_small = (num_classes, num_rows) in BATCHES
            seconds, peak = {name: [] for name in rounds if is_small or not (name in field and field[name].small)}, {}
            for round_ in range(-1, args.rounds):
                for name in [name for name in seconds if round_ in rounds[name]]:
                    progress.set_description(f"K = {num_classes}", refresh=False)
                    progress.update()
                    kept.clear()
                    before = reset_peak(args.device)
                    try:
                        repeats = max(1, min(MOST, 2**24 // source.numel())) if round_ >= 0 else 1
                        with torch.compiler.set_stance(field[name].stance if name in field else "default"):
                            elapsed = seconds_of(lambda name=name: step(name), args.device, repeats)
                    except Exception as error:
                        if not isinstance(error, torch.OutOfMemoryError) and (name not in field or field[name].ours):
                            raise
                        del seconds[name]  # it has no row for this K
                        progress.write(f"{name} at K = {num_classes}: {type(error).__name__}: {str(error)[:200]}")
                        continue
                    if round_ >= 0:
                        seconds[name].append(elapsed)
                        peak[name] = peak_megabytes(args.device, before)
            table, first = [], next(name for name in seconds if name in field and field[name].ours)
            for name, times in seconds.items():
                low, median, high = (
                    statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
                )
                table.append(
                    {
                        "K": num_classes,
                        "N": num_rows,
                        "dtype": str(args.dtype).removeprefix("torch."),
                        "contender": name,
                        "rounds": len(times),
                        "median_ms": f"{1e3 * median:.4g}",
                        "quartile1_ms": f"{1e3 * low:.4g}",
                        "quartile3_ms": f"{1e3 * high:.4g}",
                        "GB_per_s": f"{2 * source.nbytes / median / 1e9:.4g}",
                        "times_copy": f"{median / statistics.median(seconds[COPY]):.3g}",
                        "times_ours": f"{median / statistics.median(seconds[first]):.3g}",
                        "moves": field[name].moves if name in field else 1 if name == MATH else 2,
                        "peak_MB": peak[name],
                    }
                )
            yield table


def plot(csv_path: Path, path: Path) -> None:
    """The roofline, from the CSV alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with csv_path.open(newline="") as file:
        table = list(csv.DictReader(file))
    elements = max(int(row["N"]) * int(row["K"]) for row in table)
    table = [row for row in table if int(row["N"]) == elements // int(row["K"])]
    names = list(dict.fromkeys(row["contender"] for row in table))
    field = contenders(any("(triton)" in name for name in names))
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (bandwidth, milliseconds) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in names:
        rows = [row for row in table if row["contender"] == name]
        K = [int(row["K"]) for row in rows]
        times = [[float(row[key]) for row in rows] for key in ("quartile1_ms", "median_ms", "quartile3_ms")]
        if name == COPY and len(rows) > 1:  # of the same memory whatever K is: one roof
            times = [[quartile] * len(rows) for quartile in statistics.quantiles(times[1], n=4, method="inclusive")]
        moved = [float(row["GB_per_s"]) * float(row["median_ms"]) for row in rows]
        rates = [[m / t for m, t in zip(moved, quantile, strict=True)] for quantile in reversed(times)]
        for axes, (low, median, high) in ((bandwidth, rates), (milliseconds, times)):
            contender = field.get(name)
            axes.fill_between(K, low, high, color=contender.color if contender else "0.4", alpha=0.15, lw=0)
            if contender is None:
                dashes = {COPY: "--", CLONE: ":", MATH: "-."}[name]
                label = "copy: the roof" if name == COPY else name
                axes.plot(K, median, color="0.4", lw=1.4, ls=dashes, label=label)
                continue
            axes.plot(
                K,
                median,
                label=name,
                color=contender.color,
                marker=contender.marker,
                ms=5,
                lw=2.2 if contender.ours else 1.2,
                zorder=4 if contender.ours else 3,
            )
    for axes in (bandwidth, milliseconds):
        axes.set_xscale("log")
        axes.set_xlabel("number of classes K")
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_yscale("log")
    bandwidth.set_ylabel("GB/s, for one read + one write of the logits")
    bandwidth.set_title("Achieved bandwidth, forward + backward", loc="left", fontsize=10)
    milliseconds.set_ylabel("milliseconds")
    milliseconds.set_title(f"Time of a step on {elements / 1e6:.0f} million logits", loc="left", fontsize=10)
    figure.legend(*bandwidth.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    huge_pages = ["huge pages"] if table[0]["huge_pages"] == "True" else []
    machine = "   ".join((table[0]["device"], table[0]["dtype"], f"torch {table[0]['torch']}", *huge_pages))
    figure.suptitle(machine, fontsize=8, color="0.4", x=0.995, ha="right")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=160, format="png")
    plt.close(figure)


def show(table: list[dict[str, object]]) -> None:
    """A line for each K: milliseconds, and how many times those of the copy."""
    names = list(dict.fromkeys(row["contender"] for row in table))
    width = max(map(len, names)) + 2
    print(f"{'':17}milliseconds (times the copy's)\n{'K':>7}{'N':>9}" + "".join(f"{name:>{width}}" for name in names))
    field = contenders(False)
    missing = {name: "-" if name in field and field[name].small else "out of memory" for name in names}
    for K, N in dict.fromkeys((row["K"], row["N"]) for row in table):
        rows = {row["contender"]: row for row in table if (row["K"], row["N"]) == (K, N)}
        cells = (
            f"{float(rows[name]['median_ms']):.4g} ({rows[name]['times_copy']})" if name in rows else missing[name]
            for name in names
        )
        print(f"{K:>7}{rows[COPY]['N']:>9}" + "".join(f"{cell:>{width}}" for cell in cells))


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, quick="three K, fewer rows and rounds")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16; on a CPU float32"
    )
    parser.add_argument("--classes", type=positive, nargs="+", metavar="K", help="these numbers of classes alone")
    args = parser.parse_args()
    on_cpu = args.device.type == "cpu"
    default = "float32" if on_cpu else "bfloat16"
    args.dtype = args.dtype or default
    own = [args.dtype] if args.dtype != default else []
    own += ["huge_pages"] if HUGE_PAGES else []
    args.dtype = getattr(torch, args.dtype)
    args.classes = args.classes or (QUICK_CLASSES if args.quick else CLASSES if on_cpu else GPU_CLASSES)
    # More than caches hold: in float32 64 MiB, on a GPU in bfloat16 512 MiB.
    args.elements = 2 ** ((21 if args.quick else 24) if on_cpu else (24 if args.quick else 28))
    if max(args.classes) > args.elements:
        parser.error(f"--classes: expected at most {args.elements}, the logits of a case, got {max(args.classes)}")
    args.rounds, args.slow_rounds = (3, 1) if args.quick else (9, 2) if on_cpu else (30, 5)
    folder = folder_of(args, *own)
    if not on_cpu:
        torch.get_device_module(args.device).set_device(args.device)

    torch.manual_seed(0)
    if not on_cpu:
        for name, reason in peers.available()[1].items():
            print(f"without {name}: {reason}")
    show(collect(measure(args), versions_of(args.device), folder / "sweep_k.csv"))
    plot(folder / "sweep_k.csv", folder / "roofline.png")
    print(folder / "sweep_k.csv", folder / "roofline.png", sep="\n")


if __name__ == "__main__":
    run_script(main)
