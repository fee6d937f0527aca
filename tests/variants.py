"""Compiles the kernels for a GPU that is not there, through the launcher, and reports what came out.

    python tests/cross_compile.py sm_90 > sm_90.jsonl           every tile, and variants in which any two settings meet
    python tests/cross_compile.py sm_90 --random 4000 > ...     as many at random, about one a second

One JSON object a line: the call, the kernel, its variant, and its warps, registers, bytes of spill, widest access and
barriers.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from helpers import options_of
from tqdm import tqdm
from triton.backends.compiler import GPUTarget

from sre_triton import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# Every width of a tile, in registers and in a loop, short and long; less a few classes, every alignment.
WIDTHS = (*(2**i for i in range(4, 15)), 32768, 131072)
SETTINGS = {
    "primitive": ("row_loss_and_gradient", "row_loss", "row_lse", "row_sums", "row_gradient", "scale_gradient_"),
    "width": WIDTHS,
    "less": (0, 4, 2, 1),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "target": ("indices", torch.float32, torch.bfloat16, torch.float64),
    "weight": (False, True),
    "label_smoothing": (0.0, 0.1),
    "softcap": (0.0, 30.0),
    "scalars": ("on the CPU", "on the GPU"),
    "rows": (3, 1, 16),
    "ignore_index": (-100, 1, 2**40),
}


class Driver:
    """As much of a driver as compiling takes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


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


def defaults() -> list[dict]:
    """Every tile with no option set."""
    first = {name: values[0] for name, values in SETTINGS.items()}
    tiles = [
        {"width": width, "dtype": dtype, "less": less}
        for width in WIDTHS
        for dtype in (torch.bfloat16, torch.float32)
        for less in (0, 1)
    ]
    # One class, and one vector of classes: a number that is 1 is compiled in.
    return [first | tile for tile in (*tiles, {"less": 15}, {"less": 8})]


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
        options = (*map(OnGpu, options[:2]), *options[2:])
    given = {
        "row_lse": (weight,),
        "row_sums": (stats[:5].contiguous(),),
        "row_loss": (weight,),
        "row_gradient": (weight, stats, scale),
        "row_loss_and_gradient": (weight, scale),
    }[call["primitive"]]
    getattr(launch, call["primitive"])(logits, target, *given, *options)


def compile_only(target: GPUTarget) -> list:
    """From here on a launch compiles for the target, and appends the kernel's name, keywords and code to the list."""
    triton.runtime.driver.set_active(Driver(target))
    compiled = []
    run = triton.runtime.JITFunction.run

    def compile_and_record(self, *arguments, warmup, **keywords):
        compiled.append((self.fn.__name__, keywords, run(self, *arguments, warmup=True, **keywords)))

    triton.runtime.JITFunction.run = compile_and_record
    return compiled


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype

    def data_ptr(self) -> int:
        return self.tensor.data_ptr()


def report(kernel: object) -> dict:
    """Registers, spill and the widest access of a compiled kernel."""
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        spilled = [int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),
            "spill": 4 * sum(spilled),
            "widest": 4 * max([1, *(int(n) for n in re.findall(r"(?:global|buffer)_load_dwordx(\d)", text))]),
        }
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", path], text=True, stderr=subprocess.STDOUT)
        code = subprocess.check_output([tools / "nvdisasm", "-c", path], text=True)
    widths = [int(bits) for bits in re.findall(r"LDG\.E\.(?:[A-Z.]*?)(64|128)", code)]
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill": int(re.search(r"STACK:(\d+)", usage)[1]) + int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "widest": max([32, *widths]) // 8,
        "barriers": len(re.findall(r"\bBAR\.SYNC", code)),
    }


def main() -> None:
    """Compile and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--values", action="store_true", help="only as many variants as show every value of a setting")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N variants at random")
    args = parser.parse_args()

    compiled = compile_only(TARGETS[args.target])
    if args.random:
        calls = [{name: random.choice(values) for name, values in SETTINGS.items()} for _ in range(args.random)]
    else:
        calls = every_value(SETTINGS) if args.values else [*defaults(), *every_pair(SETTINGS)]
    for call in tqdm(calls, unit="kernel", disable=not sys.stderr.isatty()):
        make(call)
        name, keywords, kernel = compiled[-1]
        line = {setting: str(value) for setting, value in call.items()}
        line |= {"kernel": name, "variant": keywords["V"]._asdict() if "V" in keywords else {}}
        line |= {"warps": kernel.metadata.num_warps}
        line |= {"fusion": kernel.metadata.enable_fp_fusion, **report(kernel)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
