"""What is shipped: imports, exports, docstrings, the README's code, the example."""

import ast
import doctest
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import sre_triton
from sre_triton import loss, modules

ROOT = Path(__file__).parents[1]
# Each file imports only from those before it.
ORDER = ["reference", "ops", "passes", "fallback", "tiles", "kernels", "launch", "backend", "checks", "loss", "modules"]


def test_import_loads_nothing_heavy():
    heavy = ("triton", "torch._inductor", "torch._dynamo", "torch.distributed.tensor", "matplotlib", "numpy.testing")
    code = (
        "import torch, sys; before = set(sys.modules); import sre_triton; "
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_dependencies_are_torch_and_triton():
    needed = [line for line in metadata.requires("sre_triton") if "extra ==" not in line]
    assert sorted(re.match(r"\w+", line)[0] for line in needed) == ["torch", "triton"]


def test_exports():
    assert set(sre_triton.__all__) == {"Parts", "SelfRegularizedEntropyLoss", "self_regularized_entropy"}
    assert all(getattr(sre_triton, name).__doc__ for name in sre_triton.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", sre_triton.__version__)


def test_imports_run_one_way():
    package = Path(sre_triton.__file__).parent
    assert {path.stem for path in package.glob("*.py")} == {"__init__", *ORDER}
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names if path.stem != "__init__" else []:
                    assert ORDER.index(name) < ORDER.index(path.stem), f"{path.stem} imports {name}"


@pytest.mark.parametrize("module", [loss, modules], ids=lambda module: module.__name__)
def test_docstring_examples(module, uncompiled):
    result = doctest.testmod(module, extraglobs={"torch": __import__("torch"), **vars(sre_triton)})
    assert result.attempted
    assert not result.failed


def test_docstring_names_every_argument():
    documented = inspect.getdoc(sre_triton.self_regularized_entropy)
    for name in inspect.signature(sre_triton.self_regularized_entropy).parameters:
        assert re.search(rf"^    {name}: ", documented, re.MULTILINE), name


def test_readme_code_runs(uncompiled):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_mnist_example(tmp_path):
    figure = tmp_path / "mnist.png"
    command = [sys.executable, ROOT / "examples" / "mnist.py", "--epochs", "2", "--out", figure]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    out = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name in ("cross entropy", "self-regularized entropy"):
        assert float(rows[name][0].rstrip("%")) > 60
    # Two epochs suffice for the regularizer to bring the wrong classes near c.
    assert 1e-8 < float(rows["self-regularized entropy"][-1]) < 1e-5
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_step_cpu_writes_its_table(tmp_path, monkeypatch, uncompiled):
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import step_cpu
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(step_cpu, "ELEMENTS", 4096)
    monkeypatch.setattr(step_cpu, "CLASSES", (10, 100))
    monkeypatch.setattr(sys, "argv", ["step_cpu.py", "--rounds", "1", "--out", str(tmp_path)])
    step_cpu.main()
    lines = (tmp_path / "step_cpu.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert lines[0].startswith("K,N,contender,median_ms")
