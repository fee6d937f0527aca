"""What is compiled: the same numbers as uncompiled, few compilations, and none where there is no compiler."""

import concurrent.futures
import errno
import gc
import itertools
import math
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import unittest.mock
import warnings

import pytest
import torch
from helpers import OPTIONS, loss_and_gradient, problem, truth
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from sre_triton import linear_self_regularized_entropy, self_regularized_entropy
from sre_triton.compiled import inductor, passes
from sre_triton.compiled import primitives as compiled_primitives


def compilations():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh(monkeypatch):
    """Nothing compiled yet, and every compilation counted."""
    torch.compiler.reset()
    monkeypatch.setattr(inductor, "_compiled", {})
    counters.clear()
    metrics.reset()
    yield
    torch.compiler.reset()


SHAPES = [
    *[(N, K) for N in (2, 7, 64, 300) for K in (8, 9, 16, 100, 1000, 1024, 1025, 4096, 5003)],
    *[(N, N) for N in (8, 16, 512, 1300)],
    *[(N, K) for N in (0, 1, 2, 40) for K in (1, 2, 3, 7, 12)],
]


@pytest.mark.parametrize("first", [(512, 512), (1, 1)], ids=str)
def test_any_number_of_shapes_is_compiled_twice(first, fresh):
    for N, K in [first, *SHAPES]:
        logits, target, _ = problem(N, K, {})
        _, _, gradient = loss_and_gradient(logits, target, backend="compile", reduction="sum", recompute=False)
        true_gradient = truth(logits, target, reduction="sum")[2]
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-3, atol=1e-6)
    assert compilations() == 2
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@pytest.fixture
def general(monkeypatch):
    """Whether each version that is compiled was found to be right for all shapes."""
    found = []
    judge = inductor._hold_for_all_shapes
    monkeypatch.setattr(inductor, "_hold_for_all_shapes", lambda *args: found.append(judge(*args)) or found[-1])
    return found


def test_sets_of_options_do_not_push_each_other_out(fresh, general):
    cases = [(torch.float32, True, "default"), (torch.bfloat16, False, "softcap"), (torch.float32, False, "weight")]
    kept = {}
    for again in (False, True):
        for dtype, probabilities, name in cases:
            logits, target, options = problem(33, 200, OPTIONS[name], probabilities=probabilities, dtype=dtype)
            with torch._dynamo.config.patch(recompile_limit=2):  # of the versions of a function
                loss, _, gradient = loss_and_gradient(logits, target, backend="compile", **options)
            true_loss, _, true_gradient = truth(logits, target, **options)
            torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
            tolerance = 1e-4 if dtype == torch.float32 else 0.01
            torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=1e-6)
        kept[again] = compilations()
    assert kept[False] == len(cases)
    assert kept[True] == kept[False]
    assert general == [True] * len(cases)
    assert not counters["graph_break"]


def pass_with_a_limit(logits, target, weight, stats, scale, out, scalars):
    """loss_pass with another branch for large batches."""
    logits = logits if logits.shape[0] <= 700 else logits + torch.nan
    return passes.loss_pass(logits, target, weight, stats, scale, out, scalars)


def test_what_is_not_for_all_shapes_is_checked_at_every_call(fresh, general, monkeypatch):
    limited = compiled_primitives.LOSS._replace(compiled=pass_with_a_limit)
    monkeypatch.setattr(compiled_primitives, "LOSS", limited)
    for N in (10, 800, 20, 900):
        logits, target, _ = problem(N, 100, {})
        loss = self_regularized_entropy(logits, target, backend="compile")
        assert loss.isnan() == (N in (800, 900))
    assert general == [False, False]
    assert compilations() == 2


def test_modes_are_not_compiled_for(fresh):
    logits, target, _ = problem(10, 100, {})
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()

    def step():
        loss_and_gradient(logits, target, backend="compile")

    step()
    for autocast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", autocast):
            step()
    try:
        torch.use_deterministic_algorithms(False)
        step()
        torch.set_num_threads(threads + 1)
        step()
        torch.set_default_dtype(torch.float64)
        step()
    finally:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
    assert compilations() == 1
    expected = self_regularized_entropy(logits, target, backend="compile")
    assert compilations() == 2  # without a gradient
    with torch.inference_mode():
        for z in (logits, logits * 1):
            for y in (target, target + 0):
                assert torch.equal(self_regularized_entropy(z, y, backend="compile"), expected)
        of_inference = logits * 1
    assert torch.equal(self_regularized_entropy(of_inference, target, backend="compile"), expected)
    assert compilations() == 2


SHORT, LONG, HALF = (100, torch.float32), (2000, torch.float32), (100, torch.bfloat16)


# Each with each of another kind once.
@pytest.mark.parametrize(
    ("name", "probabilities", "num_classes", "dtype"),
    [
        ("default", False, *SHORT),
        ("default", True, *LONG),
        ("default", False, *HALF),
        ("all", True, *SHORT),
        ("all", False, *LONG),
        ("all", True, *HALF),
    ],
)
def test_all_loops_are_one_loop_over_the_rows(name, probabilities, num_classes, dtype, fresh):
    # Else the matrix crosses the memory bus, and is stored, several times over.
    torch.use_deterministic_algorithms(False)  # which makes several loops over the targets of one
    logits, target, options = problem(33, num_classes, OPTIONS[name], probabilities=probabilities, dtype=dtype)
    with torch._inductor.config.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        _, (code,) = run_and_get_code(lambda: loss_and_gradient(logits, target, backend="compile", **options))
    assert len(metrics.cpp_outer_loop_fused_inner_counts) == 1
    # Only capped logits, of which there is a block at a time, and the sum of class weights are loops of their own; and
    # over no classes, that which writes the gradients of the targets.
    blocks = "softcap" in options
    others = blocks + (not probabilities) * ("weight" in options) + (not probabilities) * (not blocks)
    assert 1 <= code.count("#pragma omp for") <= 1 + others


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_what_a_mode_compiled_serves_without_it(mode, fresh):
    logits, target, _ = problem(10, 100, {})
    with mode():
        inside = self_regularized_entropy(logits, target, backend="compile")
    outside, _, gradient = loss_and_gradient(logits, target, backend="compile", recompute=True)
    assert torch.equal(inside, outside)
    torch.testing.assert_close(gradient.double(), truth(logits, target)[2], rtol=1e-4, atol=1e-6)
    assert compilations() == 2  # without a gradient, and the gradient


def test_numbers_are_not_compiled_in(fresh):
    logits, target, _ = problem(33, 200, {})
    for value in (0.1, 0.2, 0.3):
        keywords = {
            "c": value / 1e6,
            "reg_weight": value,
            "z_loss": value,
            "label_smoothing": value,
            "softcap": 9 * value,
        }
        loss, _, _ = loss_and_gradient(logits, target, backend="compile", ignore_index=int(10 * value), **keywords)
        true_loss, _, _ = truth(logits, target, ignore_index=int(10 * value), **keywords)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
    assert compilations() == 1


def test_one_row_and_few_classes(fresh):
    for N, K in ((1, 1), (1, 2), (1, 1000), (5, 1), (5, 2), (5, 7), (2, 8), (1, 7)):  # few of them are compiled
        logits, target, _ = problem(N, K, {})
        loss, _, gradient = loss_and_gradient(logits, target, backend="compile")
        true_loss, _, true_gradient = truth(logits, target)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


WARNINGS_OF_CALLS = """
import warnings, torch
from sre_triton import self_regularized_entropy
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for K in (20, 30):
        z = torch.arange(3.0 * K).reshape(3, K).requires_grad_()
        for target in (torch.tensor([0, 1, 2]), torch.full((3, K), 1 / K)):
            self_regularized_entropy(z, target, backend="compile").backward()
caught = [warning for warning in caught if not issubclass(warning.category, DeprecationWarning)]  # torch 2.11's own
print([f"{warning.category.__name__}: {warning.message}" for warning in caught])
"""


@pytest.mark.parametrize("folder", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_when_torch_compile_is_imported_is_one_warning(folder, tmp_path):
    (tmp_path / "file").touch()
    out = run(WARNINGS_OF_CALLS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / folder))
    assert out.count("Warning: ") == 1
    assert "RuntimeWarning: sre_triton runs uncompiled" in out
    assert "Set TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in out


def test_without_a_compiler_the_blocks_run_uncompiled_with_one_warning(tmp_path):
    cache, nothing = str(tmp_path), "/nonexistent"
    out = run(WARNINGS_OF_CALLS, CXX=f"{nothing}/compiler", TORCHINDUCTOR_CACHE_DIR=cache, PATH=nothing)
    assert out.count("RuntimeWarning") == 1
    assert "g++" in out
    assert out.count("Warning: ") == 1


def test_without_a_compiler_a_warning_that_is_an_error_is_one_at_the_users_line(tmp_path):
    code = """
import sys, traceback, warnings, torch
from sre_triton import self_regularized_entropy
z, target = torch.zeros(3, 20, requires_grad=True), torch.tensor([0, 1, 2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    self_regularized_entropy(z, target, backend="compile")
print(*(warning.filename for warning in caught if issubclass(warning.category, RuntimeWarning)))
from sre_triton.compiled import inductor
inductor._uncompiled.clear()
inductor._compiled.clear()
warnings.simplefilter("error", RuntimeWarning)
try:
    self_regularized_entropy(z, target, backend="compile")
except RuntimeWarning:
    print("raised", "torch._dynamo.convert_frame" in sys.modules and bool(torch._dynamo.utils.counters["frames"]))
self_regularized_entropy(z, target, backend="compile").backward()
print(z.grad.isfinite().all().item())
"""
    out = run(code, CXX="/nonexistent/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PATH="/nonexistent")
    assert out.splitlines() == ["<string>", "raised False", "True"]  # nothing was traced


def test_without_triton_everything_but_triton_works(tmp_path):
    # As on macOS and Windows, for which there is no Triton; without a compiler, then with one.
    code = """
import os
import sys
from pathlib import Path
sys.modules["triton"] = None
import torch
from sre_triton import self_regularized_entropy
from sre_triton.compiled import inductor
for uncompiled in ({"cpu"}, set()):
    inductor._uncompiled = uncompiled
    for backend in (None, "compile", "eager"):
        z = torch.randn(3, 20, requires_grad=True)
        self_regularized_entropy(z, torch.tensor([0, 1, 2]), backend=backend).backward()
        assert z.grad.isfinite().all()
    # What was compiled is kept where the user wants it to be.
    libraries = list(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so"))
    print(len(inductor._compiled), all(inductor._compiled.values()), bool(libraries), inductor._uncompiled)
"""
    # In a new folder Inductor would compile for ten seconds what tells whether a compiler knows the CPU, and headers.
    quickly = {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    out = run(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **quickly)
    assert out.splitlines() == ["0 True False {'cpu'}", "1 True True set()"]


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_a_gpu_that_torch_compile_cannot_serve_runs_uncompiled_with_one_warning(monkeypatch, fresh):
    monkeypatch.setattr(inductor, "_uncompiled", set())
    monkeypatch.setattr(inductor, "_compile", raising(torch._inductor.exc.TritonMissing(None)))
    logits, target, _ = problem(4, 20, {})
    with pytest.warns(RuntimeWarning, match="uncompiled, .* triton") as caught:
        _, _, gradient = loss_and_gradient(logits, target, backend="compile")
    assert len(caught) == 1
    torch.testing.assert_close(gradient, truth(logits, target)[2].float())


def test_other_failures_of_torch_compile_leave_the_blocks_uncompiled_with_one_warning(monkeypatch, fresh, caplog):
    monkeypatch.setattr(inductor, "_uncompiled", set())
    monkeypatch.setattr(inductor.internals, "compile_and_catch", raising(ValueError("broken")))
    with pytest.warns(RuntimeWarning, match="torch.compile failed .ValueError: broken.; the logger sre_triton has"):
        steps()
    assert "Traceback" in caplog.text
    assert not inductor._uncompiled
    steps()  # in silence


@pytest.mark.parametrize("folder", ["/dev/null/folder", "full"])
def test_without_a_folder_to_write_to_the_blocks_run_uncompiled_with_one_warning(folder, monkeypatch, fresh, tmp_path):
    monkeypatch.setattr(inductor, "_uncompiled", set())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path) if folder == "full" else folder)
    if folder == "full":
        monkeypatch.setattr("torch._inductor.codecache.write_atomic", raising(OSError(errno.ENOSPC, "No space left")))
        reason = "No space left"
    else:
        reason = "Not a directory"
    logits, target, _ = problem(4, 22, {})
    with pytest.warns(RuntimeWarning, match=f"cannot write its files .*{reason}.*TORCHINDUCTOR_CACHE_DIR"):
        loss_and_gradient(logits, target, backend="compile")
    for recompute in (False, True):  # in silence
        _, _, gradient = loss_and_gradient(logits, target, backend="compile", recompute=recompute)
        torch.testing.assert_close(gradient, truth(logits, target)[2].float())


@pytest.mark.parametrize("error", [ValueError("broken"), OSError(errno.ENOSPC, "No space left")], ids=str)
def test_what_has_failed_takes_nothing_from_what_works(error, pretended, monkeypatch):
    steps()
    count = len(pretended)
    monkeypatch.setattr(inductor, "_uncompiled", set())
    monkeypatch.setattr(inductor, "_compile", raising(error))
    logits, target, _ = problem(6, 20, {})
    with pytest.warns(RuntimeWarning, match="broken|No space left") as caught:
        self_regularized_entropy(logits, target, softcap=2.0, backend="compile")
    assert caught[0].filename == __file__
    steps()
    assert len(pretended) == 2 * count


def test_make_fx_is_not_in_the_way_of_later_compilations(pretended):
    logits, target, _ = problem(6, 20, {})
    traced = make_fx(lambda z: self_regularized_entropy(z, target, backend="compile"))(logits)
    assert not pretended
    torch.testing.assert_close(traced(logits).double(), truth(logits, target)[0], rtol=5e-6, atol=1e-6)
    assert pretended
    assert not inductor._uncompiled


# Ways to say that torch.compile is to do nothing, or nothing new.
SWITCHES = {
    "TORCHDYNAMO_DISABLE": lambda: unittest.mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"}),
    "TORCH_COMPILE_DISABLE": lambda: torch._dynamo.config.patch(disable=True),
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "fail_on_recompile": lambda: torch.compiler.set_stance("fail_on_recompile"),
    "eager_then_compile": lambda: torch.compiler.set_stance("eager_then_compile"),
    "another backend": lambda: torch.compiler.set_stance("default", force_backend="eager"),
}


@pytest.fixture(params=SWITCHES)
def switched_off(request, monkeypatch):
    """A context in which torch.compile is switched off in some way."""
    monkeypatch.setattr(inductor, "_said", set())
    return SWITCHES[request.param]


@pytest.fixture
def pretended(monkeypatch):
    """Compilations take no time, and what they made is counted when it is called."""
    calls = []

    def compile(function, args):
        return lambda args: calls.append(function) or function(*args)

    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_compile", compile)
    return calls


def steps(backend="compile"):
    """Steps of both losses, held to float64."""
    logits, target, _ = problem(6, 20, {})
    for recompute in (False, True):
        loss, _, gradient = loss_and_gradient(logits, target, backend=backend, recompute=recompute)
        true_loss, _, true_gradient = truth(logits, target)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)
    weight = logits.t().contiguous().requires_grad_()
    linear_self_regularized_entropy(torch.eye(6), weight, target, backend=backend).backward()
    torch.testing.assert_close(weight.grad.t().double(), true_gradient, rtol=1e-4, atol=1e-6)


def test_nothing_is_compiled_while_torch_compile_is_switched_off(switched_off, pretended, caplog):
    with switched_off():
        steps()
    assert not inductor._compiled
    assert not pretended
    assert [record.levelname for record in caplog.records if record.name == "sre_triton"] == ["WARNING"]
    assert "runs uncompiled" in caplog.text


def test_what_is_compiled_serves_while_torch_compile_is_switched_off(switched_off, pretended, request):
    steps()
    before = len(pretended)
    assert before == 4  # a step that recomputes makes two calls
    with switched_off():
        steps()
    assert len(pretended) == before * (1 if "force_eager" in request.node.name else 2)


@pytest.mark.parametrize("switch", [name for name in SWITCHES if "DISABLE" in name])
def test_torch_compile_is_switched_off_by_the_environment(switch):
    code = """
import torch
from sre_triton import self_regularized_entropy
from sre_triton.compiled import inductor
z = torch.zeros(3, 20, requires_grad=True)
print(self_regularized_entropy(z, torch.tensor([0, 1, 2]), reg_weight=0).item(), len(inductor._compiled))
"""
    loss, count = run(code, **{switch: "1"}).split()
    assert abs(float(loss) - math.log(20)) < 1e-6
    assert count == "0"


def grown(function, count, first=3):
    """Objects and bytes that are there after some calls of a function and were not there after the first of them."""
    for _ in range(first):
        function()
    gc.collect()
    tracemalloc.start()
    before = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        function()
    gc.collect()
    after = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return after[0] - before[0], after[1] - before[1]


def test_nothing_grows_while_torch_compile_is_switched_off(switched_off, monkeypatch):
    monkeypatch.setattr(inductor, "_compiled", {})
    with switched_off():
        objects, size = grown(steps, 20)
    assert objects < 50
    assert size < 300_000


def test_nothing_grows_when_compilations_have_failed(monkeypatch, fresh):
    monkeypatch.setattr(inductor, "_compile", raising(ValueError("broken")))
    with pytest.warns(RuntimeWarning, match="broken"):
        steps()
    objects, size = grown(steps, 20)
    assert objects < 50
    assert size < 300_000


def test_nothing_grows_with_values_shapes_and_threads(uncompiled):
    count = itertools.count(1)

    def call():
        i = next(count)
        options = {"c": 1e-7 * i, "reg_weight": 0.1 * i, "z_loss": 0.1 * i, "softcap": 1.0 * i}
        logits, target, _ = problem(2, 2 + i, {})
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(loss_and_gradient, logits, target, **options).result()

    objects, size = grown(call, 50, first=70)  # 64 values of an option are kept
    assert objects < 50
    assert size < 300_000


@torch._inductor.config.patch(cpp_cache_precompile_headers=False)  # which would compile them anew for the folder
def test_the_log_tells_of_compiling(fresh, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    logits, target, _ = problem(4, 20, {})
    with caplog.at_level("INFO", "sre_triton"):
        for _ in range(2):
            self_regularized_entropy(logits, target, backend="compile")
        monkeypatch.setattr(inductor, "_compiled", {})  # as in another process, for which Inductor has the code
        torch.compiler.reset()
        self_regularized_entropy(logits, target, backend="compile")
    before, after, again = (record for record in caplog.records if record.name == "sre_triton")
    assert again.getMessage().startswith("compiled loss_pass")
    assert before.levelname == "WARNING"  # which is shown where nobody has configured logging
    assert before.getMessage().startswith("sre_triton compiles loss_pass for float32 logits on cpu, once for")
    assert re.fullmatch(r"compiled loss_pass for float32 logits on cpu in \d+\.\d s", after.getMessage())


def test_threads_compile_once(fresh, monkeypatch):
    logits, target, _ = problem(33, 100, {})
    asked, compile = [], inductor._compile
    monkeypatch.setattr(inductor, "_compile", lambda *args: asked.append(args) or compile(*args))
    expected = truth(logits, target)[2].float()
    barrier = threading.Barrier(4)

    def step(_):
        barrier.wait()
        return [loss_and_gradient(logits, target, backend="compile")[2] for _ in range(10)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for gradients in pool.map(step, range(4)):
            for gradient in gradients:
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    # While one thread compiles, torch.compiler.is_compiling() is true in all of them. Who comes then calls the op, the
    # factor of which is a vector: for this there is another version.
    dimensions = [args[4].dim() for _, args in asked]
    assert 0 in dimensions
    assert len(dimensions) == len(set(dimensions))


LOADER = """
import torch, warnings
from torch.utils.data import DataLoader
from sre_triton import self_regularized_entropy
from sre_triton.compiled import inductor

def loss_of(i):
    z = torch.arange(64.0).reshape(2, 32).requires_grad_()
    loss = self_regularized_entropy(z, torch.tensor([i, 1]), backend="compile")
    loss.backward()
    return loss.detach(), z.grad

class Losses(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return loss_of(i)

if __name__ == "__main__":
    epochs = []
    for compiled in (0, 1):  # by each worker, then before the fork
        assert len(inductor._compiled) == compiled
        epochs.append(list(DataLoader(Losses(), num_workers=2, multiprocessing_context="fork")))
        self_regularized_entropy(torch.zeros(2, 32, requires_grad=True), torch.tensor([0, 1]), backend="compile")
    expected = [loss_of(i) for i in range(4)]  # after the forks, in front of which there may be no backward
    for batches in epochs:
        for (loss, gradient), (true_loss, true_gradient) in zip(batches, expected, strict=True):
            torch.testing.assert_close(loss[0], true_loss)
            torch.testing.assert_close(gradient[0], true_gradient)
        print("same")
"""


def test_workers_of_a_data_loader(tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert out.stdout.split() == ["same", "same"], out.stderr


def test_compiled_code_raises_no_warning(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features, weight = torch.randn(6, 5), torch.randn(5, 20).requires_grad_()
        self_regularized_entropy(features @ weight, torch.arange(6), backend="compile").backward()
