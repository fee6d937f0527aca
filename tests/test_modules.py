"""The module is the function with its keywords kept."""

import copy
import inspect
import pickle

import pytest
import torch

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    linear_self_regularized_entropy,
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
    criterion = SelfRegularizedEntropyLoss(class_mean=True, label_smoothing=0.1)
    assert repr(criterion) == "SelfRegularizedEntropyLoss(class_mean=True, label_smoothing=0.1)"
