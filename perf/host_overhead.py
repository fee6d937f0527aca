"""What a step costs in Python and in PyTorch, outside the arithmetic; no GPU is needed.

    python perf/host_overhead.py               microseconds for each step, ours and F.cross_entropy's
    python perf/host_overhead.py --profile     and where ours go, as on a GPU

First on this CPU, for small batches, with the arithmetic: compiled, and uncompiled, as it is before it pays to compile.
Then as on a GPU, with a driver that does nothing: on 2 rows of 16 classes, beside F.cross_entropy on a CPU. What
Triton's C code takes to hand a kernel to a real driver is not in it. On a GPU all of this happens while the GPU is
still at the step before, unless steps are shorter than these times.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from cross_compile import compile_only, pretend
from output import run_script

from sre_triton import backend, self_regularized_entropy

STEPS, ROUNDS = 300, 15
BATCHES = ((32, 10), (128, 10), (128, 100), (256, 1000))
RECOMPUTE = {"sre_triton": False, "sre_triton, recompute": True}


def step(loss: Callable, logits: torch.Tensor, target: torch.Tensor) -> None:
    """Forward and backward."""
    logits.grad = None
    loss(logits, target).backward()


def ours(backend: str | None, **options: object) -> Callable:
    """This project's loss."""
    return lambda logits, target: self_regularized_entropy(logits, target, class_mean=True, backend=backend, **options)


def compare(losses: dict[str, tuple[Callable, str]], num_rows: int, num_classes: int) -> None:
    """Time the losses in turns, each with its stance of torch.compile; print medians."""
    logits, target = 3 * torch.randn(num_rows, num_classes), torch.randint(num_classes, (num_rows,))
    logits.requires_grad_()
    times = {name: [] for name in losses}
    for round_ in range(-1, ROUNDS):  # round -1 compiles
        for name, (loss, stance) in losses.items():
            with torch.compiler.set_stance(stance):
                start = time.perf_counter()
                for _ in range(STEPS):
                    step(loss, logits, target)
                if round_ >= 0:
                    times[name].append((time.perf_counter() - start) / STEPS)
    reference = statistics.median(times["F.cross_entropy"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:24}{median * 1e6:7.1f} us{median / reference:7.2f} times F.cross_entropy")


def main() -> None:
    """Measure in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", action="store_true", help="the functions that take the most of ours")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = {"F.cross_entropy": (F.cross_entropy, "default")}
    print("Forward + backward in one thread, microseconds of a step.")
    for N, K in BATCHES:
        print(f"On this CPU, {N} rows of {K} classes, arithmetic included:")
        losses = {"compiled": (ours("compile"), "default"), "uncompiled": (ours(None), "force_eager")}
        compare(reference | losses, N, K)

    launches = compile_only("sm_90")
    backend.has_triton = lambda device: True
    tensors = torch.zeros(2, 16, requires_grad=True), torch.zeros(2, dtype=torch.long)
    step(ours("triton"), *tensors)
    print("As on a GPU, up to the driver, without the kernels", *(launch.name for launch in launches))
    pretend("sm_90")
    losses = {name: (ours("triton", recompute=again), "default") for name, again in RECOMPUTE.items()}
    compare(reference | losses, 2, 16)
    if args.profile:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(STEPS):
            step(ours("triton"), *tensors)
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    run_script(main)
