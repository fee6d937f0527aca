"""The compiled kernels are right, and no barrier is missing: emulated from their PTX, against float64 (check.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")


def has_clusters():
    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


pytestmark = pytest.mark.skipif(not has_clusters(), reason="the emulator knows the PTX of Triton 3.8 and later")


def check(*args):
    command = [sys.executable, Path(__file__).with_name("check.py"), *args]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_no_race_and_no_wrong_number_on_any_path():
    said = check("--smoke")
    assert "15 cases" in said
    assert "0 failures, 0 kinds of hazards" in said
    assert "in the last place" not in said  # all lanes have the same bits of a sum, whichever stores it


def test_a_missing_barrier_would_be_noticed():
    # Of a program of one warp and of one that goes from row to row; without --classes all are tried, for a minute.
    said = check("--mutate", "--classes", "507", "8192")
    count = re.search(r"(\d+) barriers, 0 whose absence is not noticed", said)
    assert int(count[1]) >= 8
