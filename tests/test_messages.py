"""What an error says of a value is short, whatever the value."""

import inspect
import types

import numpy as np
import pytest
import torch

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    VocabShard,
    linear_self_regularized_entropy,
    ramp,
    self_regularized_entropy,
)
from sre_triton.messages import LONGEST, short
from sre_triton.sharding.shard import wrong_placements


class Broken:
    def __repr__(self):
        raise RuntimeError("no")


class Endless:
    def __repr__(self):
        return "x" * 10**4


class ListOfItsOwn(list):
    pass


HUGE = {
    "nested list": [[0.5] * 100] * 100,
    "deep list": [[[[[[[["x" * 100] * 20] * 20] * 20] * 20] * 20] * 20] * 20] * 20,
    "subclass of list": ListOfItsOwn([1] * 1000),
    "tuple": ("x" * 1000,) * 1000,
    "string": "x" * 10**4,
    "bytes": b"x" * 10**4,
    "dict": {i: [i] * 10 for i in range(10**3)},
    "set": set(range(10**4)),
    "array": np.zeros((30, 30)),
    "array of strings": np.array(["x" * 10**4] * 10),
    "array of objects": np.array([Endless()] * 10),
    "tensors": [torch.zeros(3)] * 10**3,
    "int": 10**4000,
    "int that Python does not write": -(10**5000),
    "broken": Broken(),
    "endless": Endless(),
    "class": type("X" * 10**4, (), {}),
    "object of a class": type("X" * 10**4, (Broken,), {})(),
    "dimensions": torch.zeros([1] * 1000),
}


@pytest.mark.parametrize("name", HUGE)
def test_every_value_is_short(name):
    assert 0 < len(short(HUGE[name])) <= LONGEST + 3


def test_what_is_short_is_as_python_writes_it():
    for value in (None, True, 1, -0.5, float("nan"), "mean", [1.0, 2], (2, 7, 3, 4), {"a": 1}, torch.float32):
        assert short(value) == repr(value)
    assert (
        short([torch.zeros(2, 3), torch.tensor(1)]) == "[a float32 tensor of shape (2, 3), an int64 tensor of shape ()]"
    )
    assert short(torch.zeros(2, dtype=torch.uint8)) == "a uint8 tensor of shape (2,)"


z, y, x, W = torch.randn(4, 7), torch.arange(4), torch.randn(4, 3), torch.randn(7, 3)
# Every public function and the arguments with which it works.
FUNCTIONS = {
    self_regularized_entropy: {"input": z, "target": y},
    linear_self_regularized_entropy: {"input": x, "linear_weight": W, "target": y},
    SelfRegularizedEntropyLoss: {},
    LinearSelfRegularizedEntropyLoss: {"in_features": 3, "num_classes": 7},
    ramp: {"step": 1, "num_steps": 2},
    VocabShard: {"start": 0, "stop": 1, "num_classes": 2},
}
# What PyTorch looks at alone, and what takes any number.
NOT_OURS = {"bias", "device"}
VALID = {("step", "int"), ("num_steps", "int"), ("stop", "int"), ("num_classes", "int")}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_argument_has_a_short_error(function):
    for argument in set(inspect.signature(function).parameters) - NOT_OURS:
        for name, value in HUGE.items():
            if function in (ramp, VocabShard) and (argument, name) in VALID:
                continue
            with pytest.raises((TypeError, ValueError)) as raised:
                function(**FUNCTIONS[function] | {argument: value})
            assert len(str(raised.value)) < 3 * LONGEST, (argument, name)


def test_placements_are_short():
    tensor = types.SimpleNamespace(placements=("Shard(dim=0)",) * 1000)
    assert len(str(wrong_placements("input", tensor, "that is sharded"))) < 2 * LONGEST
