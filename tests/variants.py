"""Compiles the kernels for GPUs that are not here, through the launcher, and reports what came out.

    python tests/variants.py sm_90 > /tmp/sm_90.jsonl          variants in which any two settings meet
    python tests/variants.py sm_90 --random 4000 > ...         as many at random, about one a second
    python tests/variants.py all --boundaries --others --resume /tmp/table.jsonl
                                                               a training step of each dtype, at every boundary of
                                                               plan.py and in every quarter between two; then the other
                                                               kernels and options, once with each way to hold rows

The last is the whole table, up to 1200 kernels for each GPU; called again, it goes on where it was stopped. With
another Triton than the installed one:

    pip install --no-deps --target /tmp/triton36 triton==3.6.0
    PYTHONPATH=/tmp/triton36 python tests/variants.py all --boundaries --others --resume /tmp/table.jsonl

One JSON object a line: Triton, the GPU, the call, the kernel, its variant, and what its code is like. Every kernel is
compiled in a process of its own. Where that ends without an answer, its last words are in the line, as "died", and the
exit status will be 1.
"""

import signal

if __name__ == "__main__":  # Ctrl-C ends the process without a word: what was found is written line by line
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from helpers import options_of
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
from cross_compile import SHARED, TARGETS, Code, Launch, OnGpu, compile_only

from sre_triton.kernels import kernels, launch, primitives
from sre_triton.kernels.plan import Plan, plan
from sre_triton.primitives import RowOptions

# Every width of a tile, in registers and in a loop, short and long; less a few classes, every alignment.
WIDTHS = (*(2**i for i in range(4, 15)), 32768, 131072)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SETTINGS = {
    "primitive": ("row_loss_and_gradient", "row_loss", "row_lse", "row_sums", "row_gradient", "scale_gradient_"),
    "width": WIDTHS,
    "less": (0, 4, 2, 1),
    "dtype": DTYPES,
    "target": ("indices", torch.float32, torch.bfloat16, torch.float64),
    "weight": (False, True),
    "label_smoothing": (None, 0.1),
    "softcap": (None, 30.0),
    "scalars": ("on the CPU", "on the GPU"),
    "rows": (3, 1, 16),
    "ignore_index": (-100, 1, 2**40),
    "shard": (None, 5, 2**20),  # its first class
}
# A training step, of more rows than it takes to fill a GPU with the smallest clusters.
STEP = {name: values[0] for name, values in SETTINGS.items()} | {"rows": 20}
# What else there is to compile.
OTHERS = (
    {"rows": 3},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"softcap": 30.0},
    {"weight": True, "label_smoothing": 0.1},
    {"target": torch.float32},
    {"target": torch.float32, "label_smoothing": 0.1},
    {"primitive": "row_loss"},
    {"primitive": "row_gradient"},
    {"primitive": "row_gradient", "target": torch.float32},
    {"primitive": "row_gradient", "shard": 5},
    {"primitive": "row_sums", "shard": 5},
    {"primitive": "row_lse", "shard": 5},
)
# What says which of the lines is meant.
LINE = ("triton", "gpu", *SETTINGS)
# Longer rows are held as those of so many classes are.
MANY_CLASSES = 2**19


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def every_value(settings: dict) -> list[dict]:
    """As few calls as bring every value of every setting, in a mixture."""
    longest = max(map(len, settings.values()))
    return [
        {name: values[(i + i // len(values)) % len(values)] for name, values in settings.items()}
        for i in range(longest)
    ]


def every_pair(settings: dict, seed: int = 0) -> list[dict]:
    """Few calls in which any two values of two settings come together once."""
    generator = random.Random(seed)
    names = list(settings)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in settings[a] for y in settings[b]}
    calls = []
    while missing:
        # A call that has one of the missing pairs for certain, the best of some.
        candidates = []
        for _ in range(50):
            call = {name: generator.choice(values) for name, values in settings.items()}
            call.update(generator.choice(sorted(missing, key=str)))
            candidates.append((missing & set(itertools.combinations(call.items(), 2)), call))
        found, call = max(candidates, key=lambda candidate: len(candidate[0]))
        missing -= found
        calls.append(call)
    return calls


def plan_of(call: dict, num_classes: int, at_once: int = 0) -> Plan:
    """How plan.py holds the rows of a call, if they were of so many classes, and aligned: 16 bytes are read at once."""
    has_y = call["target"] != "indices" or bool(call["weight"] and call["label_smoothing"])
    return plan(
        num_classes,
        call["dtype"].itemsize,
        holds_rows=call["primitive"] in ("row_loss", "row_loss_and_gradient"),
        at_once=at_once or 16 // call["dtype"].itemsize,
        plain=not has_y and not call["softcap"],
        device=launch.device_of(None),
    )


def starts_of(call: dict) -> list[int]:
    """The numbers of classes from which on plan.py holds the rows of a call in another way than before, and 1.

    How many classes each thread has is not counted among the ways: there are too many.
    """

    def way(num_classes: int) -> tuple:
        return plan_of(call, num_classes)._replace(programs=0, tiles=0, tail=0)

    def changes(low: int, high: int) -> list[int]:
        # What two numbers have in common, all between them have.
        if way(low) == way(high):
            return []
        middle = (low + high) // 2
        return [high] if middle == low else changes(low, middle) + changes(middle, high)

    return [1, *changes(1, MANY_CLASSES)]


def stretches(call: dict) -> Iterator[tuple[int, int, int]]:
    """Where the classes begin and end that are held in the same way, and how many are in 16 bytes."""
    for start, end in itertools.pairwise([*starts_of(call), MANY_CLASSES]):
        yield start, end, 16 // call["dtype"].itemsize


def every_way(call: dict) -> list[dict]:
    """The call with as many classes as each way to hold rows takes, in a window and without one.

    And once with each number of tiles and each tail.
    """
    sizes, seen = set(), set()
    for start, end, vector in stretches(call):
        longest = (end - 1) // vector * vector
        sizes.add(longest)
        if plan_of(call, start).rows == 1:
            sizes.add((end - 2) | 1)
        else:  # they have no window; the shortest of each number of classes that are read at once
            short = range(start, start + 2 * vector)
            sizes |= {next(K for K in short if math.gcd(K, vector) == 1 << i) for i in range(vector.bit_length() - 1)}
        step = -(-max(1, (end - start) // 64) // vector) * vector
        for K in (longest, *range(-(-start // vector) * vector, end, step)):
            how = plan_of(call, K)
            tiles = how.block_k // how.groups, how.tiles, how.tail
            if tiles not in seen:
                seen.add(tiles)
                sizes.add(K)
    return [call | {"width": K} for K in sorted(sizes)]


def every_boundary(call: dict) -> list[dict]:
    """The call just below, at and above each boundary, and in each quarter between two, in a window and without one."""
    sizes = set()
    for start, end, vector in stretches(call):
        sizes |= {start - 1, start, start + 1}
        for eighths in (1, 3, 5, 7):
            K = start + (end - start) * eighths // 8
            sizes |= {K | 1, K // vector * vector}
    return [call | {"width": K} for K in sorted(sizes - {0})]


def make(call: dict) -> None:
    """Call a primitive on tensors that nobody looks into."""
    N, K = call["rows"], call["width"] - call["less"]
    logits = torch.zeros(N, K, dtype=call["dtype"])
    if call["primitive"] == "scale_gradient_":
        primitives.scale_gradient_(logits, torch.ones(()) if call["weight"] else torch.ones(N))
        return
    indices = call["target"] == "indices"
    target = torch.zeros(N, dtype=torch.long) if indices else torch.zeros(N, K, dtype=call["target"])
    weight = torch.ones(K) if call["weight"] else None
    stats, scale = torch.zeros(7, N), torch.ones(N) if N == 16 else torch.ones(()).expand(N)
    options = options_of(**{name: call[name] for name in ("label_smoothing", "softcap", "ignore_index")})
    if call["scalars"] == "on the GPU":
        options = RowOptions(*(OnGpu(option) if isinstance(option, torch.Tensor) else option for option in options))
    first, parts_of_a_step = call["shard"], ("row_lse", "row_sums", "row_gradient")
    if first is not None and call["primitive"] in parts_of_a_step:
        options = options._replace(first_class=first, all_classes=first + K + 7)
    given = {
        "row_lse": (weight,),
        "row_sums": (stats[:5].contiguous(),),
        "row_loss": (weight,),
        "row_gradient": (weight, stats, scale),
        "row_loss_and_gradient": (weight, scale),
    }[call["primitive"]]
    getattr(primitives, call["primitive"])(logits, target, *given, options)


def subtracted_products(llir: str) -> int:
    """How often a product is subtracted, or something from it, in two operations: formulas.py, ``less_product``."""
    products, count = set(), 0
    for name, operation, operands in re.findall(r"^\s*(%\w+) = (\w+) (.*)", llir, re.MULTILINE):
        of_products = not products.isdisjoint(re.findall(r"%\w+", operands))
        if operation == "fmul" or (of_products and operation in ("shufflevector", "insertelement", "extractelement")):
            products.add(name)
        count += of_products and operation == "fsub"
    return count


def digest(text: str) -> str:
    """What tells code from other code, whatever its functions and files are called and wherever they stand."""
    text = re.split(r"^\s*\.section\s+\.debug", text, maxsplit=1, flags=re.MULTILINE)[0]
    text = re.sub(r"\s*(//|;).*", "", text)
    lines = (line.strip() for line in text.splitlines())
    said = [line for line in lines if line and not re.match(r"\.(loc|file)\b|\S*tmp\d+:$|\.Lfunc\S*:$", line)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def report(made: Launch, target: str) -> dict:
    """What its code is like. (Lines of two versions of the package with the same "code" are of the same code.)"""
    code, metadata, asm = Code(made.compiled), made.compiled.metadata, made.compiled.asm
    text = asm["ptx"] if code.is_cuda else asm["amdgcn"]  # what it takes long to disassemble says no more
    widths = [4 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text)]
    widths += [int(n) * int(bits) // 8 for n, bits in re.findall(r"ld\.global\S*?\.v(\d)\.b(\d+)", text)]
    widths += [int(size, 16) for size in re.findall(r"cp\.async\..*?(0x\w+)", text)]
    return {
        "kernel": made.name,
        "variant": made.arguments["VARIANT"]._asdict() if "VARIANT" in made.arguments else {},
        "warps": metadata.num_warps,
        "ctas": metadata.num_ctas,
        "fusion": metadata.enable_fp_fusion,
        "shared": code.shared_bytes,
        "most_shared": SHARED[target] << 10,
        "subtracted_products": subtracted_products(asm["llir"]),
        "registers": code.registers,
        "spill": code.spill_bytes,
        "widest": max([4, *widths]),
        "barriers": len(re.findall(r"\bbar\.sync\b", text)),
        "code": digest(text),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def apart(function: Callable[[], object]) -> tuple[object, str]:
    """What a function returns in a process of its own, a copy of this one; or None, and its last words."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as errors:

        def run() -> None:
            os.dup2(errors.fileno(), 2)
            sender.send(function())

        process = fork.Process(target=run)
        process.start()
        sender.close()
        try:
            return receiver.recv(), ""
        except EOFError:
            process.join()
            errors.seek(0)
            return None, f"exit status {process.exitcode}: {errors.read()[-500:]}"
        finally:
            process.join()


def warm_up() -> None:
    """What all copies of this process would do once."""
    gc.disable()  # which takes a fifth of the time, in processes that live for a second
    for kernel in (
        kernels.row_loss_kernel,
        kernels.row_lse_kernel,
        kernels.row_sums_kernel,
        kernels.row_gradient_kernel,
    ):
        kernel.cache_key  # noqa: B018
    for target in ("sm_90", "gfx942"):
        compile_only(target)
        primitives.scaled_sum(torch.zeros(3), torch.ones(()))


def calls_of(target: str, args: argparse.Namespace) -> list[dict]:
    """Those that were asked for."""
    compile_only(target)  # plan.py is asked for its device
    calls = [STEP | {"width": K} for K in args.at]
    if args.ways:
        calls += every_way(STEP | {"dtype": getattr(torch, args.ways)})
    if args.values:
        calls += every_value(SETTINGS)
    if args.random:
        calls += [{name: random.choice(values) for name, values in SETTINGS.items()} for _ in range(args.random)]
    if args.boundaries:
        calls += [call for dtype in DTYPES for call in every_boundary(STEP | {"dtype": dtype})]
    if args.others:
        others = zip(OTHERS, itertools.cycle(DTYPES), strict=False)
        calls += [call for other, dtype in others for call in every_way(STEP | {"dtype": dtype} | other)]
    return calls or every_pair(SETTINGS)


def compiled(target: str, call: dict) -> dict:
    """The report of a call."""
    launches = compile_only(target)
    make(call)
    return report(launches[-1], target)


def main() -> None:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "targets", nargs="+", choices=[*TARGETS, "all"], metavar="GPU", help=f"{', '.join(TARGETS)}, all"
    )
    parser.add_argument("--values", action="store_true", help="only as many variants as show every value of a setting")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N variants at random")
    parser.add_argument("--at", type=int, nargs="+", default=[], metavar="K", help="a training step of K classes")
    parser.add_argument("--ways", metavar="DTYPE", help="a training step, once with each way to hold its rows")
    parser.add_argument(
        "--boundaries", action="store_true", help="a training step at and between the bounds of plan.py"
    )
    parser.add_argument("--others", action="store_true", help="other kernels and options, once with each way")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="append to a file what is not yet there")
    args = parser.parse_args()

    warm_up()
    tqdm.monitor_interval = 0  # its thread would be in the way of a fork
    written = args.resume.read_text().splitlines() if args.resume and args.resume.exists() else []
    done = {tuple(line[name] for name in LINE): line for line in map(json.loads, written)}
    lines, died = [], 0
    for target in TARGETS if "all" in args.targets else args.targets:
        calls, last_words = apart(lambda target=target: calls_of(target, args))
        assert calls is not None, last_words
        for call in calls:
            settings = {setting: str(value) for setting, value in call.items()}
            lines.append((target, call, {"triton": triton.__version__, "gpu": target} | settings))
    with args.resume.open("a") if args.resume else contextlib.nullcontext(sys.stdout) as file:
        for target, call, line in tqdm(lines, unit="kernel", disable=not sys.stderr.isatty()):
            if tuple(line.values()) in done:
                line = done[tuple(line.values())]
            else:
                found, last_words = apart(lambda target=target, call=call: compiled(target, call))
                line |= found or {"died": last_words}
                print(json.dumps(line), file=file, flush=True)
            if "died" in line:
                died += 1
                tqdm.write(f"{line}", file=sys.stderr)
    if died:
        sys.exit(f"{died} of {len(lines)} died")


if __name__ == "__main__":
    main()
