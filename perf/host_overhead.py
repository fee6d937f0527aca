"""What a step costs in Python and in PyTorch, outside the kernels; no GPU is needed.

    python perf/host_overhead.py               microseconds for each step, ours and F.cross_entropy's
    python perf/host_overhead.py --profile     and where ours go

Ours is called as on a GPU, with Triton's launcher up to where it would hand the kernel to the driver. F.cross_entropy
runs on a CPU, on so few logits that its kernels take next to no time. On a GPU all of this happens while the GPU is
still at the step before, unless steps are shorter than these times.
"""

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cross_compile import compile_only
from output import run_script

from sre_triton import backend, self_regularized_entropy

STEPS, ROUNDS = 300, 15


def step(loss: Callable, logits: torch.Tensor, target: torch.Tensor) -> None:
    """Forward and backward."""
    logits.grad = None
    loss(logits, target).backward()


def main() -> None:
    """Measure in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="the functions that take the most of ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    launches = compile_only("sm_90")
    backend.has_triton = lambda device: True

    def ours(logits, target, **options):
        return self_regularized_entropy(logits, target, class_mean=True, backend="triton", **options)

    tensors = torch.zeros(2, 16, requires_grad=True), torch.zeros(2, dtype=torch.long)
    steps = {
        "F.cross_entropy": lambda: step(F.cross_entropy, *tensors),
        "sre_triton": lambda: step(ours, *tensors),
        "sre_triton, recompute": lambda: step(lambda *given: ours(*given, recompute=True), *tensors),
    }
    for run in steps.values():
        run()
    launches.clear()
    steps["sre_triton"]()
    print("kernels of ours in a step:", *(launch.name for launch in launches))
    times = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                run()
            times[name].append((time.perf_counter() - start) / STEPS)
            launches.clear()
    reference = statistics.median(times["F.cross_entropy"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:24}{median * 1e6:7.1f} us{median / reference:7.2f} times F.cross_entropy")
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(STEPS):
            steps["sre_triton"]()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    run_script(main)
