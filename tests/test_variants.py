"""The kernels compile for GPUs that are not here, as the launcher would launch them: see cross_compile.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run(*command):
    """A process of its own, as Triton reads once whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(FOLDER)}
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_variants_compile(target):
    # On the most common GPU all pairs of settings, on the others every value.
    arguments = [] if target == "sm_90" else ["--values"]
    lines = [json.loads(line) for line in run(FOLDER / "cross_compile.py", target, *arguments).splitlines()]
    warp_size = 64 if target == "gfx942" else 32
    assert {line["kernel"] for line in lines} == {
        "row_loss_kernel",
        "row_lse_kernel",
        "row_sums_kernel",
        "row_gradient_kernel",
        "scale_gradient_kernel",
    }
    for line in lines:
        assert line["fusion"], line
        assert line["warps"] * warp_size <= 1024, line
        if target != "gfx942":
            assert line["spill"] == 0, line
            assert line["widest"] == 16 or line["less"] != "0", line
            if line["primitive"] == "row_gradient" and line["target"] == "indices":
                # After the targets' logits are read, and before their gradients are written.
                assert line["barriers"] == 2, line
    if target == "sm_90":
        resident, loops = (
            {line["variant"]["BLOCK_K"] for line in lines if line["variant"].get("RESIDENT") is kind}
            for kind in (True, False)
        )
        assert resident == {2**i for i in range(4, 15)}
        assert {8192, 16384} <= loops


def test_numbers_are_not_compiled_in():
    code = """
import torch
from cross_compile import TARGETS, compile_only
from helpers import options_of
from sre_triton import launch

compiled = compile_only(TARGETS["sm_90"])
for i, N in enumerate((3, 5, 7)):
    logits, target = torch.zeros(N, 1000, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.long)
    options = options_of(
        c=(0.5, 1e-7, 1e-3)[i], reg_weight=(0.0, 1.0, 0.3)[i], ignore_index=(-100, -2, -3)[i],
        label_smoothing=(0.1, 0.5, 1.0)[i], z_loss=(0.0, 1.0, 0.1)[i], softcap=(1.0, 2.0, 30.0)[i],
    )
    launch.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(N), *options)
    launch.scale_gradient_(torch.zeros(N, 1000), torch.tensor(0.5))
print(len(compiled), len({id(kernel) for _, _, kernel in compiled}))
"""
    assert run("-c", code).split() == ["6", "2"]
