"""Small problems wait for no compiler: they are computed uncompiled until it pays, after calls that can be counted."""

import importlib
import logging

import pytest
import torch
from helpers import assert_within_bounds, loss_and_gradient, problem, truth

from sre_triton import self_regularized_entropy
from sre_triton.compiled import inductor, waiting


@pytest.fixture
def asked(monkeypatch):
    """Which passes were compiled, and for how many logits; in place of Inductor the pass itself is called."""
    compiled = []

    def compile(function, args):
        compiled.append((function.__name__, args[0].numel()))
        return lambda args: function(*args)

    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_compile", compile)
    monkeypatch.setattr(waiting, "_waited", {})
    return compiled


def steps_until_compiled(asked, N, K, most=1000):
    """How many steps go by before one compiles."""
    logits, target, _ = problem(N, K, {})
    for step in range(most):
        loss_and_gradient(logits, target)
        if asked:
            return step
    return most


@pytest.mark.parametrize(("N", "K"), [(32, 10), (300, 1000)])
def test_it_is_compiled_after_a_number_of_logits(N, K, asked, monkeypatch):
    monkeypatch.setattr(waiting, "ENOUGH", 20 * (waiting.CALL + N * K))
    assert [steps_until_compiled(asked, N, K), steps_until_compiled(asked, N, K)] == [19, 0]
    assert asked == [("loss_and_gradient_pass", N * K)]


def test_each_set_of_options_is_counted_for_itself(asked, monkeypatch):
    monkeypatch.setattr(waiting, "ENOUGH", 3 * (waiting.CALL + 4 * 9))
    logits, target, _ = problem(4, 9, {})
    for _ in range(2):
        loss_and_gradient(logits, target)
        loss_and_gradient(logits, target, z_loss=0.1)
        self_regularized_entropy(logits, target)
    assert not asked
    loss_and_gradient(logits, target, c=1e-3, reg_weight=0.3)  # numbers are not compiled in
    assert asked == [("loss_and_gradient_pass", 36)]


def test_many_logits_are_compiled_for_at_once(asked):
    logits, target = torch.zeros(2, waiting.MANY // 2), torch.zeros(2, dtype=torch.long)
    self_regularized_entropy(logits[:, 1:], target, class_mean=True)
    assert not asked
    self_regularized_entropy(logits, target, class_mean=True)
    assert asked == [("loss_pass", waiting.MANY)]


def test_what_is_asked_for_is_compiled_at_the_first_call(asked):
    logits, target, _ = problem(4, 9, {})
    loss_and_gradient(logits, target, backend="compile")
    assert asked == [("loss_and_gradient_pass", 36)]
    loss_and_gradient(logits, target)  # then there is a version
    assert len(asked) == 1


def test_a_compiled_model_does_not_wait(asked):
    logits, target, _ = problem(4, 9, {})
    graph = torch.compile(lambda z: self_regularized_entropy(z, target), backend="aot_eager")
    graph(logits.requires_grad_()).backward()
    assert asked == [("loss_and_gradient_pass", 36)]


@pytest.mark.parametrize(("value", "first"), [("1", True), ("0", False), ("", False)])
def test_the_environment_fixes_the_way(value, first, asked, monkeypatch):
    monkeypatch.setenv(waiting.VARIABLE, value)
    try:
        importlib.reload(waiting)
        monkeypatch.setattr(inductor, "pays", waiting.pays)
        logits, target, _ = problem(4, 9, {})
        loss_and_gradient(logits, target)
        assert bool(asked) == first
        if value == "0":
            assert not waiting.pays(0, 2**60)
        loss_and_gradient(logits, target, backend="compile")
        assert asked == [("loss_and_gradient_pass", 36)]
    finally:
        monkeypatch.delenv(waiting.VARIABLE)
        importlib.reload(waiting)


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv(waiting.VARIABLE, "yes")
    with pytest.raises(
        ValueError, match=r"^SRE_TRITON_COMPILE: expected .*; 1 \(compile at the first call\); .* got 'yes'"
    ):
        importlib.reload(waiting)
    monkeypatch.delenv(waiting.VARIABLE)
    importlib.reload(waiting)


def test_nothing_is_said_before_something_is_compiled(monkeypatch, caplog):
    torch.compiler.reset()
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(waiting, "_waited", {})
    monkeypatch.setattr(waiting, "ENOUGH", 2 * (waiting.CALL + 40 * 100))
    logits, target, _ = problem(40, 100, {})
    _, _, true_gradient = truth(logits, target)
    for step in range(3):
        with caplog.at_level(logging.INFO, logger="sre_triton"):
            caplog.clear()
            _, _, gradient = loss_and_gradient(logits, target)
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-8)
        texts = [record.getMessage() for record in caplog.records]
        assert any(text.startswith("compiled loss_and_gradient_pass") for text in texts) == (step == 1)
        assert bool(texts) == (step == 1)


# On either side of what needs scratch, and of rows whose sums are taken as of any.
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 7), (200, 300), (300, 1000), (40, 1025), (3, 40000)])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_uncompiled_keeps_the_bounds(N, K, spread, asked):
    logits, target, _ = problem(N, K, {}, spread=spread)
    assert_within_bounds(logits, target, None, class_mean=True)
    assert_within_bounds(logits, target, None, recompute=True, c=1e-3, reg_weight=2.0, class_mean=True)
    assert not asked


@pytest.mark.parametrize("shape", [(5, 7), (200, 300)])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)]
)
def test_ordinary_calls_in_each_dtype(shape, dtype, rounding, asked):
    logits, target, _ = problem(*shape, {}, dtype=dtype)
    logits[1, 2:4] = -torch.inf
    target[1] = 0
    loss, parts, gradient = loss_and_gradient(logits, target)
    true_loss, true_parts, true_gradient = truth(logits, target)
    exact = max(1e-13, rounding if dtype != torch.bfloat16 else 1e-6)
    torch.testing.assert_close(loss.double(), true_loss, rtol=exact, atol=exact)
    for part, true_part in zip(parts, true_parts, strict=True):
        torch.testing.assert_close(part.double(), true_part, rtol=10 * exact, atol=exact)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=10 * rounding, atol=rounding / 100)
    assert gradient.dtype == dtype
    assert not asked


@pytest.mark.parametrize("N", [4, 400])
def test_what_is_wrong_with_a_row_stays_there(N, asked):
    logits, target, _ = problem(N, 100, {})
    logits[1, 5] = torch.nan
    logits[2, 5] = torch.inf
    leaf = logits.clone().requires_grad_()
    losses = self_regularized_entropy(leaf, target, reduction="none", recompute=False)
    losses.backward(torch.ones(N))
    spoilt = torch.tensor([1, 2])
    assert losses.isnan().nonzero().flatten().tolist() == spoilt.tolist()
    assert leaf.grad[spoilt].isnan().all()
    kept = torch.ones(N, dtype=torch.bool).index_fill(0, spoilt, False)
    true_gradient = truth(logits[kept], target[kept], reduction="sum")[2]
    torch.testing.assert_close(leaf.grad[kept].double(), true_gradient, rtol=1e-4, atol=1e-5)
