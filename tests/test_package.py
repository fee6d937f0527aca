"""What is shipped: imports, exports, docstrings, the README's code, the example."""

import ast
import csv
import doctest
import inspect
import json
import math
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sre_triton
from sre_triton import backend, functional, modules, schedule
from sre_triton.compiled import inductor, waiting

ROOT = Path(__file__).parents[1]
# Of processes that compile nothing: mnist.py does, and test_integrations.py runs a page that does.
UNCOMPILED = {"TORCHDYNAMO_DISABLE": "1"}
# Each file imports only from those before it.
ORDER = [
    "internals",
    "messages",
    "reference",
    "primitives",
    "eager",
    "compiled.columns",
    "compiled.formulas",
    "compiled.passes",
    "compiled.uncompiled",
    "compiled.waiting",
    "compiled.inductor",
    "compiled.primitives",
    "kernels.groups",
    "kernels.arithmetic",
    "kernels.formulas",
    "kernels.rows",
    "kernels.memory",
    "kernels.walks",
    "kernels.kernels",
    "kernels.small",
    "kernels.plan",
    "kernels.launch",
    "kernels.primitives",
    "backend",
    "sharding.shard",
    "checks",
    "options",
    "layer",
    "sharding.collectives",
    "sharding.dtensor",
    "arguments",
    "results",
    "autograd",
    "flops",
    "chunks",
    "linear_primitive",
    "linear",
    "functional",
    "modules",
    "schedule",
    "__main__",
]


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


def test_a_report_of_the_machine():
    out = subprocess.check_output([sys.executable, "-m", "sre_triton"], text=True)
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert lines["sre_triton"].endswith(sre_triton.__version__)
    assert torch.__version__ in lines["torch"]
    assert re.search(r"\d+\.\d+", lines["compiler"])
    assert lines["compiles"].split(maxsplit=1)[1].startswith(waiting.WHEN)
    assert lines["cpu:"].startswith("cpu: backend='")
    environment = os.environ | {"CXX": "/nonexistent", "TRITON_INTERPRET": "1"}
    out = subprocess.check_output([sys.executable, "-m", "sre_triton"], text=True, env=environment)
    assert re.search(r"^variables +CXX=/nonexistent .*TRITON_INTERPRET=1$", out, re.MULTILINE)
    assert "cpu: backend='compile', uncompiled, as Triton's interpreter is for tests" in out
    assert f"backend={backend.choose(None, torch.zeros(1, 2), False)!r}" in lines["cpu:"]


USE = """
import torch
from torch import Tensor

import sre_triton
from sre_triton import LinearSelfRegularizedEntropyLoss, Parts, VocabShard, self_regularized_entropy
{readme}
criterion.reg_weight = 0.5
criterion.reg_weight = torch.tensor(0.5)
number: float = criterion.reg_weight.item()
target = torch.randint(1000, (32,))
alone: Tensor = self_regularized_entropy(logits, target, class_mean=True, c=1e-6, inplace=False)
total, parts = self_regularized_entropy(logits, target, return_parts=True)
entropy: Tensor = parts.cross_entropy
both: Parts = parts
weight = torch.randn(1000, 64)
fused: Tensor = sre_triton.linear_self_regularized_entropy(torch.randn(32, 64), weight, target, chunk_rows=16)
_, linear_parts = sre_triton.linear_self_regularized_entropy(torch.randn(3, 64), weight, target, return_parts=True)
module = LinearSelfRegularizedEntropyLoss(64, 1000, z_loss=1e-4)
module.reg_weight = sre_triton.ramp(3, 10)


def either(which: bool, shard: VocabShard | None = None) -> Tensor:
    found = self_regularized_entropy(logits, target, return_parts=which, shard=shard)
    return found if isinstance(found, Tensor) else found[0]
"""


@pytest.fixture
def users_files(tmp_path):
    """A folder with use.py, which is right, and wrong.py, whose lines 4 and 5 are not."""
    page = (ROOT / "README.md").read_text()
    first = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "use.py").write_text(USE.format(readme=first))
    (tmp_path / "wrong.py").write_text(
        "import torch\nfrom sre_triton import self_regularized_entropy\n"
        "x, y = torch.zeros(2, 3), torch.zeros(2)\n"
        "self_regularized_entropy(x, y).cross_entropy\nself_regularized_entropy(x, y, lambda_=1)\n"
    )
    return tmp_path


def test_a_users_file_passes_a_strict_type_checker(users_files):
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", users_files / "cache"]
    done = subprocess.run([*command, "use.py", "wrong.py"], cwd=users_files, capture_output=True, text=True)
    said = [line.split(": error: ") for line in done.stdout.splitlines() if ": error: " in line]
    assert {place for place, _ in said} == {"wrong.py:4", "wrong.py:5"}, done.stdout
    assert "cross_entropy" in said[0][1]
    assert "lambda_" in said[1][1]


def basedpyright(*arguments, cwd):
    """What it says. With --verifytypes it looks for packages where the first python of PATH does."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "basedpyright", "--outputjson", *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_a_users_file_passes_another_type_checker(users_files):
    found = basedpyright("use.py", "wrong.py", cwd=users_files)["generalDiagnostics"]
    said = [one for one in found if one["severity"] == "error"]
    places = [(Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in said]
    assert places == [("wrong.py", 4), ("wrong.py", 5)], said
    assert "cross_entropy" in said[0]["message"]
    assert said[1]["rule"] == "reportCallIssue"


def test_every_name_has_a_type(tmp_path):
    found = basedpyright("--verifytypes", "sre_triton", "--ignoreexternal", cwd=tmp_path)["typeCompleteness"]
    assert Path(found["packageRootDirectory"]) == Path(sre_triton.__file__).parent
    assert [symbol["name"] for symbol in found["symbols"] if not symbol["isTypeKnown"]] == []
    assert found["completenessScore"] == 1


def test_exports():
    assert set(sre_triton.__all__) == {
        "LinearSelfRegularizedEntropyLoss",
        "Parts",
        "SelfRegularizedEntropyLoss",
        "VocabShard",
        "linear_self_regularized_entropy",
        "ramp",
        "self_regularized_entropy",
    }
    assert all(getattr(sre_triton, name).__doc__ for name in sre_triton.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", sre_triton.__version__)


def test_imports_run_one_way():
    package = Path(sre_triton.__file__).parent
    paths = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    rooms = {name: path for name, path in paths.items() if path.stem != "__init__"}
    assert set(rooms) == set(ORDER)
    for room, path in rooms.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = room.split(".")[: -node.level]
                module = ".".join([*folder, *filter(None, [node.module])])
                names = [module] if module in rooms else [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
                for name in names:
                    assert ORDER.index(name) < ORDER.index(room), f"{room} imports {name}"


@pytest.mark.parametrize("module", [functional, modules, schedule], ids=lambda module: module.__name__)
def test_docstring_examples(module, uncompiled):
    result = doctest.testmod(module, extraglobs={"torch": torch, **vars(sre_triton)})
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", ["self_regularized_entropy", "linear_self_regularized_entropy"])
def test_docstring_names_every_argument(name):
    function = getattr(sre_triton, name)
    documented = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^    {name}: ", documented, re.MULTILINE), name


def test_readme_code_runs(uncompiled):
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)


def test_mnist_example(tmp_path):
    figure = tmp_path / "mnist.png"
    command = [sys.executable, ROOT / "examples" / "mnist.py", "--epochs", "2", "--seeds", "1", "--out", figure]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    out = subprocess.check_output(command, text=True, cwd=tmp_path, env=environment)
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name in ("cross entropy", "self-regularized entropy"):
        assert rows[name][0] == "1"
        assert float(rows[name][1].rstrip("%")) > 60
    # Two epochs suffice for the regularizer to bring the wrong classes near c.
    assert 1e-8 < float(rows["self-regularized entropy"][-1]) < 1e-5
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_sweep_writes_its_table_and_its_picture(tmp_path, monkeypatch, capsys, uncompiled):
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import sweep_k
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(sweep_k, "QUICK_CLASSES", (10, 100))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    arguments = ["sweep_k.py", "--quick", "--device", "cpu", "--dtype", "bfloat16", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    sweep_k.main()
    with (tmp_path / "quick" / "sweep_k.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    contenders = {
        "copy",
        "copy to new memory",
        "exp, log, 1 / x",
        "sre_triton (compile)",
        "sre_triton (compile, in place)",
        "sre_triton (eager)",
        "F.cross_entropy",
        "F.cross_entropy, compiled",
        "the source's formula",
    }
    assert {(row["K"], row["contender"]) for row in table} == {(K, name) for K in ("10", "100") for name in contenders}
    for row in table:
        nbytes = 2 * int(row["N"]) * int(row["K"]) * 2  # in bfloat16
        assert float(row["GB_per_s"]) == pytest.approx(nbytes / float(row["median_ms"]) / 1e6, rel=1e-2)
        assert float(row["quartile1_ms"]) <= float(row["median_ms"]) <= float(row["quartile3_ms"])
        assert row["dtype"] == "bfloat16"
        assert row["torch"] == torch.__version__
    assert (tmp_path / "quick" / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "quick" / "sweep_k.csv") in capsys.readouterr().out


def test_language_model_example(tmp_path):
    command = [sys.executable, ROOT / "examples" / "lm.py", "--device", "cpu", "--bf16", "--steps", "40"]
    size = ["--layers", "1", "--features", "16", "--heads", "2", "--context", "8", "--batch", "4"]
    out = subprocess.check_output([*command, *size], text=True, cwd=tmp_path, env={**os.environ, **UNCOMPILED})
    rows = {line[:26].strip(): line[26:].split() for line in out.splitlines()}
    for name in ("cross entropy", "self-regularized entropy"):
        cross_entropy, perplexity, regularizer, _, peak, unit = rows[name]
        # Forty steps teach it little more than which tokens are frequent: ln 50257 is 10.8, and S / (K - 1) < ln 2.
        assert 5 < float(cross_entropy) < 10.5
        assert float(perplexity) == pytest.approx(math.exp(float(cross_entropy)), rel=0.01)
        assert 0 < float(regularizer) < math.log(2)
        assert float(peak) > 100
        assert unit == "MB"


def test_linear_sweep_writes_its_table_and_its_picture(tmp_path, monkeypatch, uncompiled):
    monkeypatch.setenv("SRE_TRITON_COMPILE", "1")  # which it sets, is gone afterwards
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import sweep_linear
    finally:
        sys.path.pop(0)
    fused, plain, reference = f"{sweep_linear.FUSED}, 64 rows", sweep_linear.PLAIN, sweep_linear.REFERENCE
    field, _ = sweep_linear.contenders([64])
    monkeypatch.setattr(
        sweep_linear, "contenders", lambda _: ({name: field[name] for name in (fused, plain, reference)}, {})
    )
    K, N, D = 5000, 2048, 8
    monkeypatch.setattr(sweep_linear, "QUICK", (D, [(K, N)]))
    arguments = ["sweep_linear.py", "--quick", "--device", "cpu", "--chunk-rows", "64", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    sweep_linear.main()
    with (tmp_path / "quick" / "sweep_linear.csv").open(newline="") as file:
        table = {row["contender"]: row for row in csv.DictReader(file)}
    assert set(table) == {fused, plain, reference}
    for row in table.values():
        assert float(row["quartile1_ms"]) <= float(row["median_ms"]) <= float(row["quartile3_ms"])
    logits = N * K * 4 / 1e6
    assert 1.5 * logits < float(table[plain]["peak_MB"]) < 3 * logits  # and their gradient
    assert float(table[fused]["peak_MB"]) < logits / 3
    assert float(table[plain]["times_plain_peak"]) == 1
    assert (tmp_path / "quick" / "linear.png").read_bytes().startswith(b"\x89PNG")


def test_tensor_parallel_example(monkeypatch, capsys, uncompiled):
    script = ROOT / "examples" / "tensor_parallel.py"
    docstring = ast.get_docstring(ast.parse(script.read_text()), clean=False)
    plain, fused = (line.split("   ")[0].split() for line in re.findall(r"^    torchrun (.*)", docstring, re.MULTILINE))
    # Two ranks with their logits, as the docstring says; one without them, in this process.
    torchrun = Path(sys.executable).with_name("torchrun")
    environment = {**os.environ, **UNCOMPILED, "PET_STANDALONE": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.check_output([torchrun, *plain, "--steps", "5"], text=True, cwd=ROOT, env=environment)
    assert out.startswith("2 ranks on ")
    outputs = [out]
    monkeypatch.syspath_prepend(script.parent)
    import tensor_parallel

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", [*fused[2:], "--steps", "5"])
    tensor_parallel.main()
    outputs.append(capsys.readouterr().out)
    assert outputs[1].startswith("1 ranks on ")
    two, one = ([float(n) for n in re.search(r"H (\S+) -> ([\d.]+),", out).groups()] for out in outputs)
    assert two == pytest.approx(one, abs=1e-3)
    assert one[0] == pytest.approx(math.log(50257), abs=0.02)
    assert one[1] < one[0] - 0.1


def sweep_shards(_, *given):
    import sweep_shards

    sweep_shards.sweep(*given)


def test_shards_sweep_writes_its_table_and_its_picture(tmp_path, monkeypatch, ranks, uncompiled):
    monkeypatch.setenv("SRE_TRITON_COMPILE", "1")  # which it sets, is gone afterwards
    monkeypatch.syspath_prepend(ROOT / "perf")
    import sweep_shards as script

    monkeypatch.setattr(script, "QUICK", [("strong", 16, 65536), ("weak", 16, 32768)])
    monkeypatch.setattr(sys, "argv", ["sweep_shards.py", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    # The tests' ranks take the place of those that it starts.
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda _, given, count: ranks.run(count, sweep_shards, *given[:3])
    )
    script.main()
    with (tmp_path / "quick" / "sweep_shards.csv").open(newline="") as file:
        table = {(row["scaling"], row["ranks"], row["contender"]): row for row in csv.DictReader(file)}
    contenders = ("sre_triton", "F.cross_entropy, loss_parallel", "sre_triton, all logits on every rank")
    cases = {(scaling, ranks, name) for scaling in ("strong", "weak") for ranks in "124" for name in contenders}
    assert set(table) == cases | {(scaling, "1", "sre_triton, without shards") for scaling in ("strong", "weak")}
    for (scaling, ranks, name), row in table.items():
        N, K, W = int(row["N"]), int(row["K"]), int(ranks)
        assert (65536 if scaling == "strong" else 32768 * W) == K
        assert float(row["quartile1_ms"]) <= float(row["median_ms"]) <= float(row["quartile3_ms"])
        gathered, reduced = 4 * (11 + 4 * N), 4 * 2 * N
        calls, nbytes, in_a_ring = {
            "sre_triton": (2, gathered + reduced, (W - 1) * gathered + 2 * (W - 1) / W * reduced),
            "F.cross_entropy, loss_parallel": (3, 3 * 4 * N, 2 * (W - 1) / W * 3 * 4 * N),
            "sre_triton, all logits on every rank": (1, 4 * N * K // W, (W - 1) * 4 * N * K // W),
            "sre_triton, without shards": (0, 0, 0),
        }[name]
        if W == 1 and "all logits" in name:
            calls, nbytes = 0, 0  # they are
        assert (int(row["collectives"]), int(row["buffer_bytes"])) == (calls, nbytes)
        assert float(row["ring_bytes"]) == pytest.approx(in_a_ring, abs=1)
    assert (tmp_path / "quick" / "shards.png").read_bytes().startswith(b"\x89PNG")


def test_profile_shows_the_loop_and_the_faults(monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "perf"))
    try:
        import profile_cpu
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(sys, "argv", ["profile_cpu.py", "4", "16"])
    monkeypatch.setattr(inductor, "_compiled", {})  # what was compiled before has no name in the profile
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": False}):  # and as it was afterwards
        profile_cpu.main()
    out = capsys.readouterr().out
    assert "_cpp_fused_" in out
    assert "page faults a step" in out
    sources = map(Path, out.rsplit("compiled from", 1)[1].split())
    assert any("omp for" in source.read_text() for source in sources if source.exists())
