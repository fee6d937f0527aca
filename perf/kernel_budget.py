"""What the kernels cost, counted in their code; no GPU is needed.

    python perf/kernel_budget.py > /tmp/sm_90.csv             every kernel as it would be launched, a line each
    python perf/kernel_budget.py --target gfx942              or sm_80, sm_100, sm_103, sm_120, gfx950
    python perf/kernel_budget.py --options                    the options' prices: a table of its own
    python perf/kernel_budget.py --small                      the kernels that count the rows and sum their losses
    python perf/kernel_budget.py --plot /tmp/budget.png       and drawn
    python perf/kernel_budget.py --against sweep_k.csv        predictions beside what a GPU did

Instructions and special functions (exponentials, logarithms, reciprocals) are those that all threads of a row execute,
divided by its classes. What a row needs once is in it, the start of a program that goes from row to row divided by its
rows. ``lanes_per_logit`` says for how many classes there is room in registers, for each that there is;
``vector_loads`` which share of the bytes of tiles is read sixteen at a time, of those where a thread has as many.

THE LAST COLUMN IS A PREDICTION, of the share of an H100's copy bandwidth that a step would reach; nothing here was
measured on one. For each multiprocessor it takes the slowest of

    memory    the bytes of a row, read and written once, at 1/132 of 3.0 TB/s
    L2        all it moves, at 1/132 of 5.5 TB/s; a loop's second and third reads are of the L2 cache while the rows
              under way fill no more than 35 MB of it, else they are of memory
    issue     its instructions, four a cycle at 1.755 GHz
    special   its special functions, sixteen lanes a cycle
    latency   the time from the first load of a row to its last store, divided by the thread blocks that are at it at
              the same time: 0.8 us for memory (three times in a loop), the row at 64 bytes a cycle, its instructions,
              0.05 us for each barrier and 0.3 us for each that a cluster waits at (these two are guesses). Where the
              next row is on its way meanwhile, only the longer of its loads and the arithmetic of this row counts.

So loads and arithmetic overlap perfectly wherever two rows are under way. They never quite do.

The small kernels of a mean are one program, which has nothing to overlap with. Their microseconds, PREDICTED too, are
what their bytes take at 3.0 TB/s or at 64 bytes a cycle for each of their thread blocks, whichever is more; and 0.7 us
for each round of loads that waits for another: how many follow from one another, times the steps of the loop.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from cross_compile import MULTIPROCESSORS, SHARED, TARGETS, Code, compile_only
from output import file, positive, replacing, run_script
from tqdm import tqdm

from sre_triton.kernels import primitives
from sre_triton.primitives import RowOptions

# Yes and no, digits, small pictures, ImageNet and its 21841 classes, a speech model's 1823, products, and the
# vocabularies of language models.
CLASSES = (
    2, 10, 32, 100, 128, 1000, 1823, 4096, 5003, 8192, 16384, 21841, 32000, 49152, 50257, 50304, 64000, 100277, 128256,
    129280, 131072, 151936, 152064, 200064, 201088, 256000, 262144,
)  # fmt: skip
DTYPES = ("bfloat16", "float32")
KERNELS = ("row_loss_and_gradient", "row_loss", "row_lse", "row_sums", "row_gradient", "scale_gradient")
COLUMNS = (
    "kernel", "path", "dtype", "K", "rows_per_program", "block_k", "num_warps", "num_ctas", "target", "triton",
    "registers", "spill_bytes", "ctas_per_sm", "lanes_per_logit", "instructions_per_logit", "special_per_logit",
    "barriers_per_row", "vector_loads", "bound", "predicted_fraction_of_copy",
)  # fmt: skip
ELEMENTS = 2**28

# The options' prices, where K is not odd and where it is, in registers, in a cluster, and in a loop.
OPTIONS = {
    "default": {},
    "z_loss": {"z_loss": 1e-4},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 30.0},
    "weight": {"weight": True},
    "weight + label_smoothing": {"weight": True, "label_smoothing": 0.1},
    "probabilities": {"probabilities": True},
    "probabilities + label_smoothing": {"probabilities": True, "label_smoothing": 0.1},
}
OPTION_CLASSES = (1000, 8192, 50257, 65536, 300000)

# What a multiprocessor has: warps, thread blocks, bytes of shared memory.
LIMITS = {"sm_80": (64, 32, 164 << 10), "sm_120": (48, 24, 100 << 10)}
LIMITS |= dict.fromkeys(("sm_90", "sm_100", "sm_103"), (64, 32, 228 << 10))

# The H100 of the prediction.
H100, CLOCK, COPY, L2, L2_SIZE = "sm_90", 1.755e9, 3.0e12, 5.5e12, 35e6
MEMORY_LATENCY, BARRIER, CLUSTER_BARRIER = 0.8e-6, 0.05e-6, 0.3e-6
LOAD_ROUND, BYTES_PER_CYCLE = 0.7e-6, 64


def ctas_per_multiprocessor(target: str, code: Code, num_warps: int) -> int:
    """As many thread blocks as its registers, its shared memory and its warps suffice for."""
    if target not in LIMITS:  # AMD: 512 registers for each of 4 SIMDs, 8 waves each
        waves = 4 * min(8, 512 // (-(-code.registers // 8) * 8))
        return max(1, min(waves // num_warps, (SHARED[target] << 10) // max(1, code.shared_bytes)))
    warps, blocks, shared = LIMITS[target]
    registers = -(-code.registers // 8) * 8 * 32
    return min(warps // num_warps, blocks, 65536 // (registers * num_warps), shared // (code.shared_bytes + 1024))


def call(kernel: str, num_classes: int, dtype: torch.dtype, options: dict[str, object]) -> None:
    """Launch a kernel on tensors that nobody looks into."""
    num_rows = ELEMENTS // num_classes
    options = dict(options)
    weight = torch.empty(num_classes) if options.pop("weight", False) else None
    logits, target = torch.empty(num_rows, num_classes, dtype=dtype), torch.empty(num_rows, dtype=torch.long)
    if options.pop("probabilities", False):
        target = torch.empty(num_rows, num_classes, dtype=dtype)
    scalars = RowOptions(1e-7, 1.0, -100, **options)
    stats, scale = torch.empty(7, num_rows), torch.ones(()).expand(num_rows)
    given = {
        "row_loss_and_gradient": (target, weight, scale, scalars),
        "row_loss": (target, weight, scalars),
        "row_lse": (target, weight, scalars),
        "row_sums": (target, stats[:5], scalars),
        "row_gradient": (target, weight, stats, scale, scalars),
        "scale_gradient": (torch.ones(()),),
    }[kernel]
    getattr(primitives, {"scale_gradient": "scale_gradient_"}.get(kernel, kernel))(logits, *given)


def line(target: str, kernel: str, dtype: str, num_classes: int, options: str = "default") -> dict[str, object]:
    """The row of the table."""
    launches = compile_only(target)
    call(kernel, num_classes, getattr(torch, dtype), dict(OPTIONS[options]))
    made = launches[-1]
    code, metadata, variant = Code(made.compiled), made.compiled.metadata, made.arguments.get("VARIANT")
    size = getattr(torch, dtype).itemsize
    if variant is None:  # rows of a stored gradient, and as many tiles as a row has
        rows, block_k, path, stages = made.arguments["ROWS"], made.arguments["BLOCK_K"], "other", 1
        steps, tiles, edge, vectors = -(-num_classes // block_k), 1, 0, 1
    else:
        rows, block_k, stages = variant.ROWS, variant.BLOCK_K, variant.STAGES
        whole = 16 // size  # classes in as many bytes
        eighths = [width for width in (8, 4, 2, 1) if variant.TAIL & width]
        tiles = variant.TILES + variant.TAIL * variant.GROUPS / block_k
        vectors = variant.TILES + sum(width for width in eighths if width >= whole) * variant.GROUPS / block_k
        edge = variant.WINDOW * variant.GROUPS
        resident = variant.RESIDENT
        steps = 1 if resident else -(-num_classes // (block_k * tiles))
        path = "other"
        if kernel in ("row_loss", "row_loss_and_gradient"):
            path = "loop" if not resident else "resident" if metadata.num_ctas == 1 else "cluster"
    num_rows = ELEMENTS // num_classes
    turns = -(-num_rows // (rows * made.programs)) if stages else 1

    def trips(depth: int) -> float:
        """How often a loop runs: those over rows are the outermost, and the last step of a walk is not in its loop."""
        if stages and depth == 0:
            return turns
        return steps if variant is None else max(steps - 1, 0)

    executed = code.executed(trips)
    warp_size = metadata.target.warp_size
    threads = metadata.num_warps * metadata.num_ctas * warp_size
    could_be = size * rows * block_k * vectors * steps / threads * turns * (3 if path == "loop" else 1)
    per_logit, special = (n * threads / turns / rows / num_classes for n in (executed.total(), executed.special))
    lanes_per_logit = (block_k * tiles * steps + edge) / num_classes
    barriers = executed.barriers / turns / rows
    ctas = ctas_per_multiprocessor(target, code, metadata.num_warps)
    row = {
        "kernel": kernel,
        "path": path,
        "dtype": dtype,
        "K": num_classes,
        "rows_per_program": rows,
        "block_k": block_k,
        "num_warps": metadata.num_warps,
        "num_ctas": metadata.num_ctas,
        "target": target,
        "triton": triton.__version__,
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "ctas_per_sm": ctas,
        "lanes_per_logit": f"{lanes_per_logit:.3f}",
        "instructions_per_logit": f"{per_logit:.2f}",
        "special_per_logit": f"{special:.2f}",
        "barriers_per_row": f"{barriers:.1f}",
        "vector_loads": f"{min(1.0, executed.vector_bytes_loaded / could_be) if could_be else 1.0:.2f}",
        "bound": "",
        "predicted_fraction_of_copy": "",
    }
    if target == H100 and options == "default":
        writes = kernel in ("row_loss_and_gradient", "row_gradient", "scale_gradient")
        reads = {"loop": 3 if writes else 2}.get(path, 1)
        if kernel == "scale_gradient":
            turns, steps = 1, 1
        row |= prediction(
            row_bytes=rows * num_classes * size / metadata.num_ctas,
            reads=reads,
            writes=writes,
            instructions=per_logit * rows * num_classes / metadata.num_ctas / 32,
            special=special * rows * num_classes / metadata.num_ctas / 32,
            barriers=barriers * rows,
            cluster_barriers=executed.cluster_barriers / turns,
            prefetched=bool(variant) and stages > 0,
            ctas=ctas,
        )
    return row


def loads_in_turn(ptx: str) -> int:
    """Of how many loads from memory each needs what the one before it brought; the body of a loop is read once."""
    after = {}  # by register
    for line in re.finditer(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(\{.*?\}|[^,;]*)(.*?);", ptx, re.MULTILINE):
        name, outputs, _ = line.groups()
        if not name.startswith("st."):
            depth = max((after.get(register, 0) for register in re.findall(r"%[a-z]+\d+", line[0])), default=0)
            for register in re.findall(r"%[a-z]+\d+", outputs):
                after[register] = depth + name.startswith("ld.global")
    return max(after.values(), default=0)


def small(target: str, num_rows: int = primitives.FEW_ROWS) -> list[dict[str, object]]:
    """The table of the small kernels, for as many rows as they are used for."""
    launches = compile_only(target)
    classes, weight, losses = torch.zeros(num_rows, dtype=torch.long), torch.ones(1000), torch.empty(num_rows)
    factor = primitives.inverse_count(classes, None, 1000, -100)
    primitives.inverse_count(classes, weight, 1000, -100)
    primitives.scaled_sum(losses, factor)
    sizes = {"inverse_count": 8 * num_rows, "inverse_count, weights": 12 * num_rows, "scaled_sum": 4 * num_rows}
    rows = []
    for (name, size), made in zip(sizes.items(), launches, strict=True):
        code, metadata, block = Code(made.compiled), made.compiled.metadata, made.arguments["BLOCK"]
        rounds = -(-num_rows // block) * loads_in_turn(made.compiled.asm["ptx"])
        seconds = max(size / COPY, size / (metadata.num_ctas * BYTES_PER_CYCLE * CLOCK)) + rounds * LOAD_ROUND
        rows.append(
            {
                "kernel": name,
                "rows": num_rows,
                "num_warps": metadata.num_warps,
                "num_ctas": metadata.num_ctas,
                "target": target,
                "triton": triton.__version__,
                "registers": code.registers,
                "spill_bytes": code.spill_bytes,
                "rounds": rounds,
                "predicted_us": f"{seconds * 1e6:.2f}",
            }
        )
    return rows


def prediction(
    *, row_bytes, reads, writes, instructions, special, barriers, cluster_barriers, prefetched, ctas
) -> dict[str, object]:
    """Which of the bounds is the slowest for the rows of a thread block, and the copy's share of it."""
    share = MULTIPROCESSORS[H100]
    in_l2 = ctas * row_bytes * share <= L2_SIZE
    from_memory = 1 if in_l2 else reads
    load = MEMORY_LATENCY * reads + reads * row_bytes / (64 * CLOCK)
    waits = barriers * BARRIER + cluster_barriers * (CLUSTER_BARRIER - BARRIER)
    arithmetic = max(instructions, special * 8) / 4 / CLOCK + waits
    bounds = {
        "memory": (from_memory + writes) * row_bytes / (COPY / share),
        "L2": (reads + writes) * row_bytes / (L2 / share),
        "issue": instructions / 4 / CLOCK,
        "special": special * 8 / 4 / CLOCK,
        "latency": (max(load, arithmetic) if prefetched else load + arithmetic) / ctas,
    }
    bound = max(bounds, key=bounds.get)
    ideal = (1 + writes) * row_bytes / (COPY / share)
    return {"bound": bound, "predicted_fraction_of_copy": f"{ideal / bounds[bound]:.2f}"}


def table(
    target: str, *, kernels: tuple[str, ...] = KERNELS, classes: list[int] | None = None, options: bool = False
) -> list[dict[str, object]]:
    """All rows."""
    if options:
        cases = [
            (target, "row_loss_and_gradient", "bfloat16", K, name)
            for K in classes or OPTION_CLASSES
            for name in OPTIONS
        ]
    else:
        cases = [(target, kernel, dtype, K) for kernel in kernels for dtype in DTYPES for K in classes or CLASSES]
    with ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)) as pool:
        futures = [pool.submit(line, *case) for case in cases]
        rows = [future.result() for future in tqdm(futures, unit="kernel", disable=None)]
    if options:
        rows = [{"options": case[4]} | row for case, row in zip(cases, rows, strict=True)]
        for row in rows:
            del row["bound"], row["predicted_fraction_of_copy"]
    return rows


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Instructions for each logit under what memory leaves time for, and the prediction."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (slots, share) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for dtype, color in zip(DTYPES, ("#0072B2", "#D55E00"), strict=True):
        lines = [row for row in rows if row["kernel"] == "row_loss_and_gradient" and row["dtype"] == dtype]
        K = [row["K"] for row in lines]
        per_logit = [float(row["instructions_per_logit"]) for row in lines]
        slots.plot(K, per_logit, color=color, marker="o", ms=4, label=dtype)
        budget = MULTIPROCESSORS[H100] * 4 * 32 * CLOCK / (COPY / (2 * getattr(torch, dtype).itemsize))
        slots.axhline(budget, color=color, ls="--", lw=1, label=f"what a copy's time leaves, {dtype}")
        if lines[0]["bound"]:
            share.plot(K, [float(row["predicted_fraction_of_copy"]) for row in lines], color=color, marker="o", ms=4)
    slots.set_ylabel("instructions for each logit, forward + backward")
    slots.set_title(f"Counted, {rows[0]['target']}, Triton {rows[0]['triton']}", loc="left", fontsize=10)
    slots.set_ylim(0)
    slots.legend(frameon=False, loc="upper right")
    share.set_title("PREDICTED share of an H100's copy bandwidth", loc="left", fontsize=10)
    share.set_ylim(0, 1.05)
    for axes in (slots, share):
        axes.set_xscale("log")
        axes.set_xlabel("number of classes K")
        axes.grid(color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=160, format=path.suffix.lstrip(".") or "png")
    plt.close(figure)


def against(rows: list[dict[str, object]], path: Path) -> None:
    """Predicted and measured share of the copy's bandwidth, for each K that both have."""
    with path.open(newline="") as table:
        measured = {
            (row["dtype"], int(row["K"])): 1 / float(row["times_copy"])
            for row in csv.DictReader(table)
            if row["contender"] == "sre_triton (triton)"
        }
    print(f"{'dtype':10}{'K':>8}{'predicted':>11}{'measured':>10}")
    for row in rows:
        if (share := measured.get((row["dtype"], row["K"]))) and row["predicted_fraction_of_copy"]:
            print(f"{row['dtype']:10}{row['K']:>8}{row['predicted_fraction_of_copy']:>11}{share:>10.2f}")


def main() -> None:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default=H100, help="default: %(default)s")
    parser.add_argument("--classes", type=positive, nargs="+", metavar="K", help="other numbers of classes")
    parser.add_argument("--options", action="store_true", help="a table of what the options cost")
    parser.add_argument("--small", action="store_true", help="a table of the small kernels")
    parser.add_argument("--against", type=file, metavar="CSV", help="print predictions beside a sweep of sweep_k.py")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table as well")
    args = parser.parse_args()
    if (args.options or args.small) and args.plot:
        parser.error("--plot draws the table without --options or --small")
    if args.small and not args.target.startswith("sm_"):
        parser.error("--small reads NVIDIA's code")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: there is no code to count")
    if args.against:
        against(table(args.target, kernels=("row_loss_and_gradient",)), args.against)
        return
    rows = small(args.target) if args.small else table(args.target, classes=args.classes, options=args.options)
    writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    run_script(main)
