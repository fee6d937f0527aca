"""Where the time of a step goes on a CPU: in compiled code, page faults, or Python.

    python perf/profile_cpu.py [N] [K]

Prints PyTorch's profile of 20 steps, with the page faults of each, and where Inductor has put the C++ of the loop:
"graph_0_cpp_fused..." is that loop, `_OrdinarySinglePass` what Python does around it.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import resource

import torch
from output import positive, run_script
from torch._inductor import config as inductor_config
from torch._inductor.codecache import PyCodeCache

from sre_triton import self_regularized_entropy

STEPS = 20


def page_faults() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=positive, nargs="?", default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("classes", type=positive, nargs="?", default=1000, metavar="K", help="default: %(default)s")
    args = parser.parse_args()
    inductor_config.cpp.enable_kernel_profile = True  # the loop has a name in the profile
    logits = (3 * torch.randn(args.rows, args.classes)).requires_grad_()
    target = torch.randint(args.classes, (args.rows,))

    def step() -> None:
        loss = self_regularized_entropy(logits, target, class_mean=True, backend="compile")
        torch.autograd.grad(loss, logits)

    for _ in range(3):
        step()
    before = page_faults()
    for _ in range(STEPS):
        step()
    faults = (page_faults() - before) / STEPS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS):
            step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
    print(f"{faults:.0f} page faults a step")
    print("compiled from", *(module.__file__ for module in PyCodeCache.modules), sep="\n  ")


if __name__ == "__main__":
    run_script(main)
