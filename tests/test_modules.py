"""A module gives what the function gives with the same keywords, checks them, and keeps λ in every copy."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    linear_self_regularized_entropy,
    messages,
    ramp,
    self_regularized_entropy,
)

z, y = torch.randn(6, 20), torch.arange(6)

CHANGED = {
    "c": 1e-5,
    "reg_weight": 0.5,
    "class_mean": True,
    "ignore_index": 3,
    "reduction": "sum",
    "denominator": 3.0,
    "label_smoothing": 0.1,
    "z_loss": 0.1,
    "softcap": 5.0,
    "inplace": True,
    "recompute": True,
    "return_parts": True,
    "shard": None,
    "backend": "eager",
}


def test_signature_is_the_functions():
    function = inspect.signature(self_regularized_entropy).parameters
    module = inspect.signature(SelfRegularizedEntropyLoss).parameters
    assert {name: p.default for name, p in module.items()} == {
        name: p.default for name, p in function.items() if name not in ("input", "target")
    }
    assert set(CHANGED) == set(module) - {"weight"}


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.default, p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_the_linear_loss_has_the_same_keywords():
    plain, linear = keywords(self_regularized_entropy), keywords(linear_self_regularized_entropy)
    assert set(plain) - set(linear) == {"inplace", "recompute"}
    assert set(linear) - set(plain) == {"linear_bias", "weight", "chunk_rows"}
    assert plain | linear == linear | plain
    module = keywords(LinearSelfRegularizedEntropyLoss)
    assert set(module) - set(linear) == {"bias", "device", "dtype"}
    assert set(linear) - set(module) == {"linear_bias"}
    assert linear | module == module | linear


@pytest.mark.parametrize("name", sorted((set(CHANGED) | {"chunk_rows"}) - {"inplace", "recompute"}))
def test_every_keyword_reaches_the_linear_function(name, uncompiled):
    options = {name: CHANGED.get(name, 2)}
    module = LinearSelfRegularizedEntropyLoss(5, 20, **options)
    features = torch.randn(6, 5)
    expected = linear_self_regularized_entropy(features, module.linear.weight, y, **options)
    torch.testing.assert_close(module(features, y), expected)
    assert getattr(module, name) == options[name]


@pytest.mark.parametrize("name", CHANGED)
def test_every_keyword_reaches_the_function(name, uncompiled):
    options = {name: CHANGED[name]}
    ours = SelfRegularizedEntropyLoss(**options)(z, y)
    torch.testing.assert_close(ours, self_regularized_entropy(z, y, **options))
    assert getattr(SelfRegularizedEntropyLoss(**options), name) == CHANGED[name]


def test_options_may_change_between_steps(row_backend):
    z, y = torch.randn(6, 20), torch.arange(6)
    criterion = SelfRegularizedEntropyLoss(backend=row_backend)
    for value in (0.0, 0.5, torch.tensor(1.0)):
        criterion.reg_weight = value
        torch.testing.assert_close(
            criterion(z, y), self_regularized_entropy(z, y, reg_weight=value, backend=row_backend)
        )


@pytest.fixture(params=["plain", "linear"])
def make(request):
    """Either module, for 20 features or classes and 20 classes."""

    def linear(**options):
        torch.manual_seed(0)
        return LinearSelfRegularizedEntropyLoss(20, 20, **options)

    return SelfRegularizedEntropyLoss if request.param == "plain" else linear


def test_reg_weight_is_a_buffer(make, uncompiled):
    criterion = make(reg_weight=0.1)
    buffer, address = criterion.reg_weight, criterion.reg_weight.data_ptr()
    assert dict(criterion.named_buffers())["reg_weight"] is buffer
    for value in (0.5, torch.tensor(0.25, dtype=torch.float64)):
        criterion.reg_weight = value
        assert criterion.reg_weight.data_ptr() == address
        assert torch.equal(criterion(z, y), make(reg_weight=value)(z, y))
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other.reg_weight, torch.tensor(0.25))
        assert other.reg_weight.data_ptr() != address
    for convert in (criterion.half, criterion.bfloat16, criterion.double):
        assert convert().reg_weight is buffer
        assert buffer.dtype == torch.float32
    meta = criterion.to("meta")
    assert meta.reg_weight.is_meta
    assert "reg_weight=0.25" in repr(meta)
    assert torch.equal(meta.to_empty(device="cpu").reg_weight, torch.tensor(0.25))
    meta = criterion.to("meta")
    meta.reg_weight = 0.5
    assert torch.equal(meta.to_empty(device="cpu").reg_weight, torch.tensor(0.5))
    meta = make(reg_weight=0.5).to("meta")
    meta.reg_weight = torch.tensor(0.125)
    assert torch.equal(meta.to_empty(device="cpu").reg_weight, torch.tensor(0.125))
    given = torch.tensor(0.75, requires_grad=True)
    criterion = make(reg_weight=given)
    assert criterion.reg_weight.data_ptr() == given.data_ptr()
    assert not criterion.reg_weight.requires_grad


def test_checkpoints_do_not_have_reg_weight(make):
    criterion = make(reg_weight=0.1)
    state = criterion.state_dict()
    assert set(state) <= {"linear.weight"}
    with torch.device("meta"):
        loaded = make(reg_weight=0.1)
    loaded.to_empty(device="cpu")
    loaded.load_state_dict(state, strict=True)
    assert torch.equal(loaded(z, y), criterion(z, y))


def test_errors_of_reg_weight(make):
    message = "reg_weight: expected a finite number or a tensor of 0 dimensions, got "
    criterion = make()
    for value, error in ((float("nan"), ValueError), (1e39, ValueError), ("1", TypeError)):
        for act in (
            lambda value=value: make(reg_weight=value),
            lambda value=value: setattr(criterion, "reg_weight", value),
        ):
            with pytest.raises(error) as raised:
                act()
            assert str(raised.value) == message + repr(value)
    with pytest.raises(
        ValueError, match=r"^reg_weight: expected a number or a real tensor of 0 dimensions, got a float32"
    ):
        criterion.reg_weight = torch.ones(1)


def test_reg_weight_may_be_set_before_the_backward(make, quick_backend):
    gradients = []
    for changed in (False, True):
        criterion, leaf = make(reg_weight=0.5, backend=quick_backend), z.clone().requires_grad_()
        loss = criterion(leaf, y)
        if changed:
            criterion.reg_weight = 7.0
        loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_schedule_compiles_nothing_again(make):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    criterion = make(reg_weight=0.0)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(criterion, backend=counter, fullgraph=True)
    losses = []
    for i in range(5):
        criterion.reg_weight = ramp(i, 4)
        losses.append(step(z, y))
        torch.testing.assert_close(losses[-1], criterion(z, y))
    assert losses == sorted(losses, reverse=True)
    assert counter.frame_count == 1


def test_options_are_set_through_a_compiled_module(uncompiled):
    torch.compiler.reset()
    criterion = SelfRegularizedEntropyLoss()
    step = torch.compile(criterion, backend="eager", fullgraph=True)
    losses = [step(z, y)]
    for name, value in (("reduction", "sum"), ("reg_weight", 0.25)):
        setattr(step, name, value)
        losses.append(step(z, y))
        torch.testing.assert_close(losses[-1], criterion(z, y))
    assert len(set(losses)) == 3
    with pytest.raises(ValueError, match="^c: expected a number from 1e-30 to 1, got -5"):
        step.c = -5
    assert criterion.c == 1e-7


def test_the_plain_sum_over_many_classes_warns(make, monkeypatch, uncompiled):
    def warned(criterion):
        monkeypatch.setattr(messages, "_warned", set())
        features = torch.zeros(2, 256 if make is SelfRegularizedEntropyLoss else 20)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                criterion(features, torch.zeros(2, dtype=torch.long))
        assert all("class_mean=True" in str(warning.message) for warning in caught)
        assert all(warning.filename == __file__ for warning in caught)
        return len(caught)

    def of_many(**options):
        if make is SelfRegularizedEntropyLoss:
            return make(**options)
        return LinearSelfRegularizedEntropyLoss(20, 256, **options)

    for value in (1.0, 0.9, 0.5, 2, -0.5, torch.tensor(0.5)):
        assert warned(of_many(reg_weight=value)) == 1
        for class_mean in (True, False):
            assert warned(of_many(reg_weight=value, class_mean=class_mean)) == 0
    assert warned(of_many(reg_weight=0)) == 0
    assert warned(of_many(reg_weight=0.5).to("meta").to_empty(device="cpu")) == 1

    scheduled = of_many(reg_weight=0.0)
    counts = []
    for step in range(3):
        scheduled.reg_weight = ramp(step, 10)
        counts.append(warned(scheduled))
    assert counts == [0, 1, 1]
    scheduled = of_many(reg_weight=0.0)
    scheduled.reg_weight.fill_(0.1)  # behind the module's back
    assert warned(scheduled) == 1

    torch.compiler.reset()
    counter = CompileCounter()
    scheduled = of_many(reg_weight=0.0)
    graph = torch.compile(scheduled, backend=counter, fullgraph=True)
    assert warned(graph) == 1
    for value in (0.5, 0.0, 1.0):
        scheduled.reg_weight = value
        assert warned(graph) == 0  # it is said as the graph is traced
    assert counter.frame_count == 1


def test_weight_is_a_buffer(uncompiled):
    weight = torch.rand(20)
    criterion = SelfRegularizedEntropyLoss(weight)
    assert set(criterion.state_dict()) == {"weight"}
    assert not SelfRegularizedEntropyLoss().state_dict()
    assert criterion.double().weight.dtype == torch.float64
    torch.testing.assert_close(criterion(z.double(), y), self_regularized_entropy(z.double(), y, weight.double()))


def test_copies_and_pickles(uncompiled):
    criterion = SelfRegularizedEntropyLoss(torch.rand(20), class_mean=True, label_smoothing=0.1)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(z, y), criterion(z, y))


def test_repr_shows_what_is_not_default():
    assert repr(SelfRegularizedEntropyLoss()) == "SelfRegularizedEntropyLoss()"
    criterion = SelfRegularizedEntropyLoss(reg_weight=0.3, class_mean=True)
    assert repr(criterion) == "SelfRegularizedEntropyLoss(reg_weight=0.3, class_mean=True)"
