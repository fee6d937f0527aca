"""Compiles the kernels for a GPU that is not there, through the launcher, and reports what came out.

    python tests/variants.py sm_90 > sm_90.jsonl               variants in which any two settings meet
    python tests/variants.py sm_90 --random 4000 > ...         as many at random, about one a second

One JSON object a line: the call, the kernel, its variant, and its warps, registers, bytes of spill, widest access and
barriers.
"""

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

import torch
from helpers import options_of
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "perf"))
from cross_compile import TARGETS, Code, OnGpu, compile_only

from sre_triton import launch

# Every width of a tile, in registers and in a loop, short and long; less a few classes, every alignment.
WIDTHS = (*(2**i for i in range(4, 15)), 32768, 131072)
SETTINGS = {
    "primitive": ("row_loss_and_gradient", "row_loss", "row_lse", "row_sums", "row_gradient", "scale_gradient_"),
    "width": WIDTHS,
    "less": (0, 4, 2, 1),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "target": ("indices", torch.float32, torch.bfloat16, torch.float64),
    "weight": (False, True),
    "label_smoothing": (None, 0.1),
    "softcap": (None, 30.0),
    "scalars": ("on the CPU", "on the GPU"),
    "rows": (3, 1, 16),
    "ignore_index": (-100, 1, 2**40),
    "shard": (None, 5, 2**20),  # its first class
}


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


def make(call: dict) -> None:
    """Call a primitive on tensors that nobody looks into."""
    N, K = call["rows"], call["width"] - call["less"]
    logits = torch.zeros(N, K, dtype=call["dtype"])
    if call["primitive"] == "scale_gradient_":
        launch.scale_gradient_(logits, torch.ones(()) if call["weight"] else torch.ones(N))
        return
    indices = call["target"] == "indices"
    target = torch.zeros(N, dtype=torch.long) if indices else torch.zeros(N, K, dtype=call["target"])
    weight = torch.ones(K) if call["weight"] else None
    stats, scale = torch.zeros(7, N), torch.ones(N) if N == 16 else torch.ones(()).expand(N)
    options = options_of(**{name: call[name] for name in ("label_smoothing", "softcap", "ignore_index")})
    if call["scalars"] == "on the GPU":
        options = [OnGpu(option) if isinstance(option, torch.Tensor) else option for option in options]
    first, parts_of_a_step = call["shard"], ("row_lse", "row_sums", "row_gradient")
    if first is not None and call["primitive"] in parts_of_a_step:
        options = (*options, first, first + K + 7)
    given = {
        "row_lse": (weight,),
        "row_sums": (stats[:5].contiguous(),),
        "row_loss": (weight,),
        "row_gradient": (weight, stats, scale),
        "row_loss_and_gradient": (weight, scale),
    }[call["primitive"]]
    getattr(launch, call["primitive"])(logits, target, *given, *options)


def report(code: Code) -> dict:
    """Registers, spill, the widest access and the barriers of a compiled kernel."""
    widths = [4 * int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", code.text)]
    widths += [int(bits) // 8 for bits in re.findall(r"LDG(?:STS)?\.\S*?\b(64|128)\b", code.text)]
    return {
        "registers": code.registers,
        "spill": code.spill_bytes,
        "widest": max([4, *widths]),
        "barriers": len(re.findall(r"\bBAR\.SYNC", code.text)),
    }


def main() -> None:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--values", action="store_true", help="only as many variants as show every value of a setting")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N variants at random")
    args = parser.parse_args()

    launches = compile_only(args.target)
    if args.random:
        calls = [{name: random.choice(values) for name, values in SETTINGS.items()} for _ in range(args.random)]
    else:
        calls = every_value(SETTINGS) if args.values else every_pair(SETTINGS)
    for call in tqdm(calls, unit="kernel", disable=not sys.stderr.isatty()):
        make(call)
        made = launches[-1]
        line = {setting: str(value) for setting, value in call.items()}
        metadata = made.compiled.metadata
        line |= {"kernel": made.name, "variant": made.keywords["V"]._asdict() if "V" in made.keywords else {}}
        line |= {"warps": metadata.num_warps, "ctas": metadata.num_ctas, "fusion": metadata.enable_fp_fusion}
        line |= report(Code(made.compiled))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
