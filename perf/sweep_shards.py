"""Classes sharded over ranks: time of a step, and what the ranks send each other, against the number of ranks.

    python perf/sweep_shards.py                 GPUs with NCCL if there are any, else 1, 2 and 4 processes with gloo
    python perf/sweep_shards.py --quick         small cases, to see that it works

Writes sweep_shards.csv and shards.png to perf/out/<device>/ (--out FOLDER for another) and prints a table. A step
is forward + backward of the loss, with the gradient of a rank's logits.

    strong    all classes together are as many, whatever the number of ranks: the more ranks, the shorter
    weak      each rank has as many classes: no longer with more ranks
    small     as strong, with so little to do that the collectives decide

"all logits on every rank" gathers the logits first, which is what there is to do without a loss of shards.

Milliseconds are the slowest rank's, medians of one interleaved run in which all numbers of ranks take turns; a process
on a CPU computes with one thread, so that more ranks than cores share them. ``collectives`` and ``buffer_bytes`` are
counted by PyTorch's profiler: the calls that a rank makes in a step, and the bytes it hands to them. ``ring_bytes`` is
what it sends of them in a ring: W - 1 times what is gathered, 2 (W - 1) / W times what is reduced.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import sweep_k
import torch
import torch.distributed as dist
import torch.nn.functional as F
from output import add_arguments, collect, folder_of, positive, replacing, run_script, versions_of
from torch import Tensor
from tqdm import tqdm

import sre_triton

# How the classes grow with the ranks; N, and K of one rank.
CASES = {
    "cuda": [("strong", 8192, 131072), ("weak", 8192, 32768), ("small", 512, 8192)],
    "cpu": [("strong", 1024, 65536), ("weak", 1024, 16384), ("small", 64, 4096)],
}
QUICK = [("strong", 64, 4096), ("weak", 64, 1024)]
MOST_RANKS = 64
CPU_RANKS = (1, 2, 4)
ROUNDS, QUICK_ROUNDS = 9, 2

OURS, LOSS_PARALLEL = "sre_triton", "F.cross_entropy, loss_parallel"
GATHERED, UNSHARDED = "sre_triton, all logits on every rank", "sre_triton, without shards"
STYLES = {
    OURS: ("#0072B2", "o"),
    LOSS_PARALLEL: ("#D55E00", "v"),
    GATHERED: ("#E69F00", "s"),
    UNSHARDED: ("0.4", "D"),
}
BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "unsigned char": 1}

Step = Callable[[], object]


def collectives_of(step: Step) -> list[tuple[str, int]]:
    """Those that a step asks of the backend: all_gather or another, and the bytes that this rank gives."""
    with torch.profiler.profile(record_shapes=True) as profile:
        step()
    calls = []
    for event in profile.profiler.kineto_results.events():
        # A barrier before the step may still be seen, and has no shapes.
        is_call = re.match("(gloo|nccl):(?!barrier)", event.name()) and event.shapes()
        if is_call and event.device_type() == torch.autograd.DeviceType.CPU:
            name = event.name().split(":")[1].strip("_").removesuffix("_base")
            calls.append((name, math.prod(event.shapes()[0]) * BYTES[event.dtypes()[0]]))
    return calls


def ring_bytes(calls: list[tuple[str, int]], ranks: int) -> float:
    """What a rank sends in a ring."""
    return sum(nbytes * (ranks - 1) * (1 if name == "all_gather" else 2 / ranks) for name, nbytes in calls)


def steps_of(mesh: "dist.device_mesh.DeviceMesh", N: int, K: int, dtype: torch.dtype) -> dict[str, Step]:
    """The contenders, on the ranks of a mesh; K is of all of them together."""
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    shard = sre_triton.VocabShard.even(K, mesh.get_group())
    generator = torch.Generator(mesh.device_type).manual_seed(0)
    target = torch.randint(K, (N,), generator=generator, device=mesh.device_type)
    logits = (3 * torch.randn(N, shard.stop - shard.start, device=mesh.device_type)).to(dtype).requires_grad_()
    whole = DTensor.from_local(logits.detach(), mesh, [Shard(1)], run_check=False).requires_grad_()

    def ours() -> Tensor:
        loss = sre_triton.self_regularized_entropy(logits, target, class_mean=True, shard=shard)
        return torch.autograd.grad(loss, logits)[0]

    def gathered() -> Tensor:
        everything = whole.redistribute(placements=[Replicate()]).to_local()
        loss = sre_triton.self_regularized_entropy(everything, target, class_mean=True)
        return torch.autograd.grad(loss, whole)[0]

    def parallel() -> Tensor:
        with loss_parallel():
            return torch.autograd.grad(F.cross_entropy(whole, target), whole)[0]

    def alone() -> Tensor:
        loss = sre_triton.self_regularized_entropy(logits, target, class_mean=True)
        return torch.autograd.grad(loss, logits)[0]

    steps = {OURS: ours, LOSS_PARALLEL: parallel, GATHERED: gathered}
    return steps if mesh.size() > 1 else steps | {UNSHARDED: alone}


def measure(args: argparse.Namespace, meshes: dict[int, object]) -> Iterator[list[dict[str, object]]]:
    """The table, case by case, on every rank of the largest mesh; on the others no more than their part in it."""
    rank = dist.get_rank()
    names = {ranks: [name for name in STYLES if name != UNSHARDED or ranks == 1] for ranks in meshes}
    total = len(args.cases) * sum(map(len, names.values())) * (args.rounds + 1)
    with tqdm(total=total, unit="step", mininterval=1, disable=rank > 0) as progress:
        for scaling, N, of_one in args.cases:
            classes = {ranks: of_one * (ranks if scaling == "weak" else 1) for ranks in meshes}
            steps = {
                ranks: steps_of(meshes[ranks], N, classes[ranks], args.dtype) if rank < ranks else {}
                for ranks in meshes
            }
            seconds = {(ranks, name): [] for ranks in meshes for name in names[ranks]}
            calls = {}
            for round_ in range(-1, args.rounds):  # -1 compiles and warms up
                for ranks, name in seconds:
                    progress.set_description(f"{scaling}, {ranks} ranks", refresh=False)
                    progress.update()
                    dist.barrier()
                    if rank >= ranks:
                        continue
                    step = steps[ranks][name]
                    repeats = max(1, args.logits // (N * classes[ranks])) if round_ >= 0 else 1
                    elapsed = sweep_k.seconds_of(step, args.device, repeats)
                    if round_ >= 0:
                        seconds[ranks, name].append(elapsed)
                    else:
                        calls[ranks, name] = collectives_of(step)
            of_ranks = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, seconds)
            slowest = {
                (ranks, name): [max(times) for times in zip(*(of[ranks, name] for of in of_ranks[:ranks]), strict=True)]
                for ranks, name in seconds
            }
            yield [
                row_of(args, scaling, N, classes[ranks], ranks, name, times, calls.get((ranks, name), []), slowest)
                for (ranks, name), times in slowest.items()
            ]


def row_of(
    args: argparse.Namespace,
    scaling: str,
    N: int,
    K: int,
    ranks: int,
    name: str,
    times: list[float],
    calls: list[tuple[str, int]],
    all_times: dict[tuple[int, str], list[float]],
) -> dict[str, object]:
    """A row of the table."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "scaling": scaling,
        "ranks": ranks,
        "N": N,
        "K": K,
        "dtype": args.dtype_name,
        "backend": "nccl" if args.device.type == "cuda" else "gloo",
        "contender": name,
        "rounds": len(times),
        "median_ms": f"{1e3 * median:.4g}",
        "quartile1_ms": f"{1e3 * low:.4g}",
        "quartile3_ms": f"{1e3 * high:.4g}",
        "times_one_rank": f"{median / statistics.median(all_times[1, UNSHARDED]):.3g}",
        "collectives": len(calls),
        "buffer_bytes": sum(nbytes for _, nbytes in calls),
        "ring_bytes": f"{ring_bytes(calls, ranks):.0f}",
    }


def plot(csv_path: Path, path: Path) -> None:
    """Strong and weak scaling, and the bytes sent, from the CSV alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with csv_path.open(newline="") as file:
        table = list(csv.DictReader(file))
    first = table[0]
    cores = int(first["cores"]) if first["backend"] == "gloo" else math.inf
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    for axes, scaling, title, key in (
        (panels[0], "strong", "Time, all ranks share {K} classes", "median_ms"),
        (panels[1], "weak", "Time, {K} classes a rank", "median_ms"),
        (panels[2], "strong", "Sent by a rank in a step (ring)", "ring_bytes"),
    ):
        rows_of_case = [row for row in table if row["scaling"] == scaling]
        K = rows_of_case[0]["K"]
        for name, (color, marker) in STYLES.items():
            rows = [row for row in rows_of_case if row["contender"] == name and float(row[key])]
            ranks = [int(row["ranks"]) for row in rows]
            look = {"color": color, "marker": marker, "zorder": 4 if name == OURS else 3}
            axes.plot(ranks, [float(row[key]) for row in rows], lw=2.2 if name == OURS else 1.2, label=name, **look)
            if key == "median_ms":
                edges = [[float(row[edge]) for row in rows] for edge in ("quartile1_ms", "quartile3_ms")]
                axes.fill_between(ranks, *edges, color=color, alpha=0.15, lw=0)
        counts = sorted({int(row["ranks"]) for row in rows_of_case})
        if key == "median_ms":
            alone = next(float(row[key]) for row in rows_of_case if row["contender"] == UNSHARDED)
            ideal = [alone / (ranks if scaling == "strong" else 1) for ranks in counts]
            axes.plot(counts, ideal, color="0.4", ls=":", label="ideal: without shards, shared by the ranks")
            if counts[-1] > cores:
                axes.axvspan(cores * 1.02, counts[-1] * 1.1, color="0.95", lw=0, zorder=0)
                axes.text(cores * 1.06, 0.98, f"more ranks\nthan cores ({cores})", fontsize=8, color="0.4",
                          transform=axes.get_xaxis_transform(), va="top")  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="bytes" if key == "ring_bytes" else "milliseconds")
        axes.set_xticks(counts, counts)
        axes.minorticks_off()
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
        axes.set_title(title.format(K=K), loc="left", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    machine = (first["device"], first["backend"], first["dtype"], f"N = {first['N']}", f"torch {first['torch']}")
    figure.suptitle("   ".join(machine), fontsize=8, color="0.4", x=0.995, ha="right")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=160, format="png")
    plt.close(figure)


def show(table: list[dict[str, object]]) -> None:
    """A line for each case, number of ranks and contender."""
    width = max(map(len, STYLES))
    print(f"{'':8}{'N':>6}{'K':>8}{'ranks':>7}  {'':{width}}{'ms':>10}{'x one':>8}{'calls':>7}{'ring bytes':>14}")
    for row in table:
        cells = (row["median_ms"], row["times_one_rank"], row["collectives"], row["ring_bytes"])
        print(f"{row['scaling']:8}{row['N']:>6}{row['K']:>8}{row['ranks']:>7}  {row['contender']:{width}}", end="")
        print("{:>10}{:>8}{:>7}{:>14}".format(*cells))


def sweep(args: argparse.Namespace, versions: dict[str, object], folder: Path) -> None:
    """What each rank of the default process group does; the first writes the table."""
    meshes = {}
    for ranks in args.ranks:
        group = dist.new_group(list(range(ranks)))
        among_them = dist.get_rank() < ranks
        meshes[ranks] = dist.device_mesh.DeviceMesh.from_group(group, args.device.type) if among_them else None
    if dist.get_rank() == 0:
        collect(measure(args, meshes), versions, folder / "sweep_shards.csv")
    else:
        list(measure(args, meshes))


def run(rank: int, args: argparse.Namespace, versions: dict[str, object], folder: Path, store: str) -> None:
    """A rank, in a process of its own."""
    torch.manual_seed(rank)
    on_cpu = args.device.type == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl", init_method=store, rank=rank, world_size=max(args.ranks),
        device_id=None if on_cpu else torch.device("cuda", rank),
    )  # fmt: skip
    sweep(args, versions, folder)
    dist.destroy_process_group()


def main() -> None:
    """Measures, writes, draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, quick="small cases, fewer rounds")
    parser.add_argument("--ranks", type=positive, nargs="+", help="default: 1 2 4, on GPUs as many as there are")
    args = parser.parse_args()
    on_cpu = args.device.type == "cpu"
    args.dtype_name = "float32" if on_cpu else "bfloat16"
    args.dtype = getattr(torch, args.dtype_name)
    args.cases = QUICK if args.quick else CASES[args.device.type]
    args.rounds, args.logits = (QUICK_ROUNDS, 2**20) if args.quick else (ROUNDS, 2**24)  # at least, to be timed at once
    usual = CPU_RANKS if on_cpu else [2**i for i in range(torch.cuda.device_count().bit_length())]
    args.ranks = sorted({1, *(args.ranks or usual)})  # what the others are compared with is always there
    if not on_cpu and args.ranks[-1] > torch.cuda.device_count():
        parser.error(f"--ranks: expected no more than there are GPUs, got {args.ranks}")
    if args.ranks[-1] > MOST_RANKS:
        parser.error(f"--ranks: expected at most {MOST_RANKS}, each a process, got {args.ranks[-1]}")
    folder = folder_of(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    os.environ.setdefault("SRE_TRITON_COMPILE", "1")  # few logits are timed as they are after many steps
    if on_cpu and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    versions = versions_of(args.device) | {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        store = (Path(temporary) / "store").as_uri()
        torch.multiprocessing.spawn(run, (args, versions, folder, store), max(args.ranks))
    with (folder / "sweep_shards.csv").open(newline="") as file:
        show(list(csv.DictReader(file)))
    plot(folder / "sweep_shards.csv", folder / "shards.png")
    print(folder / "sweep_shards.csv", folder / "shards.png", sep="\n")


if __name__ == "__main__":
    run_script(main)
