"""The compiled kernels are right on every path: emulated from their PTX, against float64 (check.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


def has_clusters():
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@pytest.mark.skipif(not has_clusters(), reason="the emulator knows the PTX of Triton 3.8 and later")
def test_smoke():
    command = [sys.executable, Path(__file__).with_name("check.py"), "--smoke"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "12 cases" in result.stdout
    assert "0 failures, 0 kinds of hazards" in result.stdout
