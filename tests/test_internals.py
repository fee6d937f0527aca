"""Without any one of PyTorch's private names, both losses and their gradients are those of float64."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import without

from sre_triton import internals

PACKAGE = Path(internals.__file__).parent


def looked_up():
    """The names that internals.py looks up."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(Path(internals.__file__).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    names = [name for name in strings if re.fullmatch(r"torch[\w.]*:[\w.]+", name)]
    hooks = [f"torch.nn.modules.module:{name}" for name in strings if re.fullmatch(r"_global_\w+", name)]
    return sorted({*names, *hooks})


NAMES = [*looked_up(), without.MARK]


@pytest.fixture(scope="module")
def server():
    """Tries the loss without a name (without.py)."""
    command = [sys.executable, without.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


def test_names_are_found():
    assert len(NAMES) > 20


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_right_without_a_private_name(name, server):
    server.stdin.write(f"{name}\n")
    server.stdin.flush()
    answer = server.stdout.readline().strip()
    assert answer == "right", answer.encode().decode("unicode_escape")
