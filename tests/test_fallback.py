"""The compiled blocks: the same numbers as uncompiled, few compilations, and none where there is no compiler."""

import functools
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import OPTIONS, loss_and_gradient, problem, truth
from torch._dynamo.utils import counters

from sre_triton import fallback, self_regularized_entropy


def compilations():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh():
    """Nothing compiled yet, and every compilation counted."""
    compiled = fallback._compiled
    torch.compiler.reset()
    compiled.cache_clear()
    counters.clear()
    yield
    torch.compiler.reset()
    compiled.cache_clear()


def test_twenty_shapes_stay_compiled(fresh):
    shapes = [(N, K) for N in (2, 7, 64, 300) for K in (12, 100, 1000, 4096, 5003)]
    for N, K in shapes:
        logits, target, _ = problem(N, K, {})
        _, _, gradient = loss_and_gradient(logits, target, backend="compile")
        torch.testing.assert_close(gradient.double(), truth(logits, target)[2], rtol=1e-3, atol=1e-6)
    # Three passes, each for any N and K.
    assert compilations() == 3
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


def test_twelve_sets_of_options_stay_compiled(fresh):
    cases = [
        (dtype, probabilities, name)
        for dtype in (torch.float32, torch.bfloat16)
        for probabilities in (False, True)
        for name in ("default", "weight+smoothing", "softcap")
    ]
    assert len(cases) == 12
    kept = {}
    for again in (False, True):
        for dtype, probabilities, name in cases:
            logits, target, options = problem(33, 200, OPTIONS[name], probabilities=probabilities, dtype=dtype)
            loss, _, gradient = loss_and_gradient(logits, target, backend="compile", **options)
            true_loss, _, true_gradient = truth(logits, target, **options)
            torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
            tolerance = 1e-4 if dtype == torch.float32 else 0.01
            torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=1e-6)
        kept[again] = compilations()
    assert kept[False] <= 3 * 12
    assert kept[True] == kept[False]
    assert not counters["graph_break"]


def test_modes_and_shapes_do_not_use_up_the_limit_of_compilations(fresh, monkeypatch):
    # Compiled by Dynamo, which sets the limit, and not further, which takes the time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for K in (1, 10, 100):
        for N in (1, 8, 10):
            logits, target, _ = problem(N, K, {})
            for dtype in (None, torch.bfloat16, torch.float16):
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss_and_gradient(logits, target, backend="compile")
            with torch.inference_mode():
                self_regularized_entropy(logits, target, backend="compile")
                self_regularized_entropy(logits * 1, target, backend="compile")
            torch.use_deterministic_algorithms(False)
            loss_and_gradient(logits, target, backend="compile")
            torch.use_deterministic_algorithms(True)


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
    assert compilations() == 3


def test_one_row_and_few_classes(fresh):
    for N, K in ((1, 1), (1, 2), (1, 1000), (5, 1), (5, 2), (5, 7), (2, 8), (1, 7)):
        logits, target, _ = problem(N, K, {})
        loss, _, gradient = loss_and_gradient(logits, target, backend="compile")
        true_loss, _, true_gradient = truth(logits, target)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("block_bytes", [1, 4000, 10**9])
def test_blocks_change_nothing(block_bytes, monkeypatch, uncompiled):
    logits, target, options = problem(37, 50, OPTIONS["all"])
    target[5] = -100
    for recompute in (False, True):
        expected = loss_and_gradient(logits, target, recompute=recompute, **options)
        with monkeypatch.context() as patch:
            patch.setattr(fallback, "BLOCK_BYTES", block_bytes)
            blocks = loss_and_gradient(logits, target, recompute=recompute, **options)
        assert torch.equal(blocks[2], expected[2])
        torch.testing.assert_close(blocks, expected)


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout


def test_without_a_compiler_the_blocks_run_uncompiled_with_one_warning(tmp_path):
    code = """
import warnings, torch
from sre_triton import self_regularized_entropy
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for K in (20, 30):
        z = torch.arange(3.0 * K).reshape(3, K).requires_grad_()
        for target in (torch.tensor([0, 1, 2]), torch.full((3, K), 1 / K)):
            self_regularized_entropy(z, target).backward()
print([f"{warning.category.__name__}: {warning.message}" for warning in caught])
"""
    out = run(code, CXX="/nonexistent/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), PATH="/nonexistent")
    assert out.count("RuntimeWarning") == 1
    assert "g++" in out
    assert out.count("Warning: ") == 1


def test_without_triton_everything_but_triton_works():
    code = """
import sys
sys.modules["triton"] = None
import torch
from sre_triton import self_regularized_entropy, fallback
fallback._has_compiler = False
z = torch.randn(3, 20, requires_grad=True)
self_regularized_entropy(z, torch.tensor([0, 1, 2])).backward()
self_regularized_entropy(z, torch.tensor([0, 1, 2]), backend="eager").backward()
print(z.grad.isfinite().all().item())
"""
    assert run(code).strip() == "True"


def test_a_gpu_that_torch_compile_cannot_serve_runs_uncompiled_with_one_warning(monkeypatch):
    def broken(*_):
        raise torch._inductor.exc.TritonMissing(None)

    monkeypatch.setattr(fallback, "_has_compiler", True)
    monkeypatch.setattr(fallback, "_compiled", lambda *_: broken)
    logits, target, _ = problem(4, 20, {})
    with pytest.warns(RuntimeWarning, match="uncompiled, .* triton") as caught:
        _, _, gradient = loss_and_gradient(logits, target, backend="compile")
    assert len(caught) == 1
    torch.testing.assert_close(gradient, truth(logits, target)[2].float())


def test_other_failures_of_the_compiler_are_raised(monkeypatch, fresh):
    def broken(*_):
        raise torch._dynamo.exc.BackendCompilerFailed(str, ValueError("broken"), None)

    monkeypatch.setattr(fallback, "_compiled", lambda *_: broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        self_regularized_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), backend="compile")
    assert fallback._has_compiler


def test_compiled_code_raises_no_warning(fresh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features, weight = torch.randn(6, 5), torch.randn(5, 20).requires_grad_()
        self_regularized_entropy(features @ weight, torch.arange(6), backend="compile").backward()
