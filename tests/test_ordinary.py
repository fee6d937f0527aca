"""Most calls take a short way at the door (arguments.Plan): values, errors and warnings are those of any other call."""

import warnings

import pytest
import torch
from helpers import loss_and_gradient, problem, truth

from sre_triton import SelfRegularizedEntropyLoss, arguments, messages, self_regularized_entropy
from sre_triton.compiled import inductor, uncompiled, waiting


@pytest.fixture
def ordinary(monkeypatch):
    """How many calls were ordinary, and computed as such without a compiler."""
    calls, compute = [], uncompiled.ordinary
    monkeypatch.setattr(uncompiled, "ordinary", lambda *args: calls.append(1) or compute(*args))
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(waiting, "_waited", {})
    return calls


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"recompute": True}, {"dtype": torch.float16}], ids=str)
def test_who_writes_over_what_is_saved_harms_no_other_call(options):
    dtype = options.pop("dtype", torch.float32)
    logits, target, _ = problem(6, 9, {}, dtype=dtype)
    expected = [self_regularized_entropy(logits, target, reduction=reduction) for reduction in ("mean", "sum", "none")]
    loss = self_regularized_entropy(logits.requires_grad_(), target, **options)
    for saved in loss.grad_fn.saved_tensors:
        if saved is not None and saved.is_floating_point():
            saved.detach().fill_(0)
    logits, _, _ = problem(6, 9, {}, dtype=dtype)
    for reduction, value in zip(("mean", "sum", "none"), expected, strict=True):
        assert torch.equal(self_regularized_entropy(logits, target, reduction=reduction), value)
        leaf = logits.clone().requires_grad_()
        torch.testing.assert_close(
            self_regularized_entropy(leaf, target, reduction=reduction, recompute=False).detach(), value
        )


def test_meta_tensors_are_not_compiled_for(ordinary):
    logits = torch.empty(4096, 1024, device="meta", requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = self_regularized_entropy(logits, torch.empty(4096, dtype=torch.long, device="meta"), class_mean=True)
    assert (loss.shape, loss.device.type) == ((), "meta")
    assert not inductor._compiled


@pytest.mark.parametrize(("N", "K"), [(32, 2), (64, 5), (1, 100)])
def test_what_is_never_compiled_stays_as_it_is(N, K, ordinary, monkeypatch):
    logits, target, _ = problem(N, K, {})
    *_, expected = loss_and_gradient(logits, target)
    monkeypatch.setattr(waiting, "ENOUGH", 0)
    for backend in (None, "compile"):
        assert torch.equal(loss_and_gradient(logits, target, backend=backend)[2], expected)
    assert len(ordinary) == 3
    assert not inductor._compiled


def test_what_has_failed_or_is_switched_off_stays_as_it_is(ordinary, monkeypatch):
    logits, target, _ = problem(32, 10, {})
    *_, expected = loss_and_gradient(logits, target)
    monkeypatch.setattr(waiting, "ENOUGH", 0)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(loss_and_gradient(logits, target)[2], expected)

    def fails(*_):
        raise ValueError("broken")

    monkeypatch.setattr(inductor, "_compile", fails)
    with pytest.warns(RuntimeWarning, match="broken"):
        loss_and_gradient(logits, target)
    assert torch.equal(loss_and_gradient(logits, target)[2], expected)
    assert len(ordinary) == 3


def test_while_torch_compile_is_disabled_it_waits_again(ordinary, monkeypatch):
    logits, target, _ = problem(32, 10, {})
    monkeypatch.setattr(waiting, "ENOUGH", 2 * (waiting.CALL + 320))
    seen = []
    with torch._dynamo.config.patch(disable=True):
        for _ in range(4):
            loss_and_gradient(logits, target)
            seen.append(len(ordinary))
    assert seen == [1, 1, 2, 2]  # every second call asks whether it may be compiled by now
    assert not inductor._compiled


def test_the_first_error_is_that_of_any_call():
    logits, target = torch.zeros(6, 9), torch.full((6,), 99)
    parameter = torch.nn.Parameter(logits)
    for integers in (target, target.int()):
        for options in ({"backend": "triton"}, {"inplace": True}):
            with pytest.raises(IndexError, match="^target: expected class indices from 0 to 8"):
                self_regularized_entropy(parameter, integers, **options)
        with pytest.raises(ValueError, match="^c: "):
            self_regularized_entropy(parameter, integers, c=2.0)


def test_a_call_that_fails_takes_no_warning_away(monkeypatch):
    monkeypatch.setattr(messages, "_warned", set())
    logits = torch.zeros(2, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IndexError):
            self_regularized_entropy(logits, torch.tensor([0, 999]))
    with pytest.warns(UserWarning, match="class_mean"):
        self_regularized_entropy(logits, torch.tensor([0, 99]))


def test_parts_of_one_class_with_a_nan():
    loss, parts = self_regularized_entropy(
        torch.full((2, 1), torch.nan, requires_grad=True), torch.zeros(2, dtype=torch.long), return_parts=True
    )
    assert all(value.isnan() for value in (loss, parts.cross_entropy, parts.regularizer))


def test_a_module_is_ordinary_whatever_its_weight_of_the_regularizer(ordinary):
    logits, target, _ = problem(32, 10, {})
    module = SelfRegularizedEntropyLoss(class_mean=True)
    for reg_weight in (1.0, 0.5, torch.tensor(0.25)):
        module.reg_weight = reg_weight
        leaf = logits.clone().requires_grad_()
        module(leaf, target).backward()
        true_gradient = truth(logits, target, class_mean=True, reg_weight=float(reg_weight))[2]
        torch.testing.assert_close(leaf.grad.double(), true_gradient, rtol=1e-5, atol=1e-8)
    assert len(ordinary) == 3


def test_plans_are_kept_for_few_sets_of_numbers():
    logits, target, _ = problem(4, 9, {})
    for i in range(100):
        self_regularized_entropy(logits, target, reg_weight=i / 100)
    assert arguments._plan.cache_info().currsize <= 64
