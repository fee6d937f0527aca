"""Without any one of PyTorch's private names, both losses and their gradients are those of float64."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


# The names that PyTorch keeps private, as they are written in code.
PRIVATE = re.compile(
    r"torch\._(?!_)|_dynamo_marked|forward_ad\._|\._stance|fx\._|fx\.experimental|distributed_c10d\._|_global_\w*hook|_pytree|"
    r"_opoverload"
)


def code_of(path):
    """The lines of a file without comments and strings, other than those that are looked up."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return ast.unparse(tree)


def test_no_other_file_reads_a_private_name():
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "internals.py"]
    assert len(files) > 30
    found = {path: sorted(set(PRIVATE.findall(code_of(path)))) for path in files}
    assert {str(path.relative_to(PACKAGE)): names for path, names in found.items() if names} == {}


def test_answers_that_a_public_route_gives_too():
    tensor = torch.ones(())

    def answers():
        return internals._legacy_function_fails(), internals._dual_number_is_made(), internals.would_compile()

    assert answers() == (False, False, True)
    assert internals.under_functorch() is internals.in_forward_mode() is False
    seen = []

    def look(x):
        known = internals.under_functorch(), internals.in_forward_mode()
        seen.append((known, answers()[:2]))
        return x * 2

    torch.func.vmap(look)(torch.ones(2))
    torch.func.grad(look)(tensor)
    torch.func.jvp(look, (tensor,), (tensor,))
    with torch.autograd.forward_ad.dual_level():
        look(tensor)
    assert [known for known, _ in seen] == [known for _, known in seen]
    assert [known for known, _ in seen] == [(True, False), (True, False), (True, True), (False, True)]
    with torch.compiler.set_stance("force_eager"):
        assert not internals.would_compile()
