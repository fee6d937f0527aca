"""``ramp`` grows from 0 to 1 at the steps that it says, and refuses others."""

import itertools
import math

import pytest

from sre_triton import ramp
from sre_triton.schedule import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_it_grows_to_1_and_stays_there(shape):
    values = [ramp(step, 100, shape) for step in range(150)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[100:] == [1.0] * 50
    assert values[0] == (0 if shape != "sigmoid" else math.exp(-5))
    assert ramp(0, 0, shape) == 1


def test_half_way():
    assert ramp(0.5, 1) == 0.5
    assert ramp(1, 2, "cosine") == pytest.approx(0.5)
    assert ramp(1, 4, "cosine") == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert ramp(1, 2, "sigmoid") == pytest.approx(math.exp(-1.25))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 2), ValueError, "step: expected a number of 0 or more, got -1"),
        ((1, math.nan), ValueError, "num_steps: expected a number of 0 or more, got nan"),
        (("1", 2), TypeError, "step: expected a number of 0 or more, got '1'"),
        ((1, 2, "square"), ValueError, "shape: expected one of 'linear', 'cosine', 'sigmoid', got 'square'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error) as raised:
        ramp(*arguments)
    assert str(raised.value) == message
