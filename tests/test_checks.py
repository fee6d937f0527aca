"""Wrong arguments: the error's type, and a text that names the argument, what was expected and what came."""

from fractions import Fraction

import pytest
import torch

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    linear_self_regularized_entropy,
    self_regularized_entropy,
)

z, y, P, w = torch.randn(4, 7), torch.arange(4), torch.rand(4, 7), torch.rand(7)
x, W, b = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
nan, inf = float("nan"), float("inf")

OPTIONS = [
    ({"c": 0.0}, ValueError, r"c: expected a number from 1e-30 to 1, got 0\.0"),
    ({"c": 2}, ValueError, r"c: expected a number from 1e-30 to 1, got 2"),
    ({"c": nan}, ValueError, "c: expected a number from 1e-30 to 1, got nan"),
    ({"c": "1e-7"}, TypeError, "c: expected a number from 1e-30 to 1, got '1e-7'"),
    ({"c": True}, TypeError, "c: expected a number from 1e-30 to 1, got True"),
    ({"reg_weight": inf}, ValueError, "reg_weight: expected a finite number or a tensor of 0 dimensions, got inf"),
    ({"reg_weight": None}, TypeError, "reg_weight: expected a finite number or a tensor of 0 dimensions, got None"),
    (
        {"reg_weight": torch.ones(2)},
        ValueError,
        r"reg_weight: expected a number or a real tensor of 0 dimensions, got a float32 tensor of shape \(2,\)",
    ),
    ({"class_mean": 1}, TypeError, "class_mean: expected True, False or None, got 1"),
    ({"recompute": "yes"}, TypeError, "recompute: expected True, False or None, got 'yes'"),
    ({"inplace": None}, TypeError, "inplace: expected True or False, got None"),
    ({"return_parts": 0}, TypeError, "return_parts: expected True or False, got 0"),
    ({"ignore_index": 1.5}, TypeError, r"ignore_index: expected an int, got 1\.5"),
    ({"ignore_index": False}, TypeError, "ignore_index: expected an int, got False"),
    ({"reduction": "avg"}, ValueError, "reduction: expected 'none', 'mean' or 'sum', got 'avg'"),
    ({"reduction": None}, ValueError, "reduction: expected 'none', 'mean' or 'sum', got None"),
    (
        {"denominator": 0},
        ValueError,
        "denominator: expected a number of at least 1e-30 or .*, got 0",
    ),
    (
        {"denominator": nan},
        ValueError,
        "denominator: expected a number of at least 1e-30 or .*, got nan",
    ),
    ({"denominator": torch.ones(1)}, ValueError, "denominator: expected a number or a real tensor of 0 dimensions"),
    (
        {"denominator": 3, "reduction": "sum"},
        ValueError,
        "denominator: expected None with reduction='sum', got 3",
    ),
    ({"label_smoothing": -0.1}, ValueError, r"label_smoothing: expected a number from 0 to 1, got -0\.1"),
    ({"label_smoothing": nan}, ValueError, "label_smoothing: expected a number from 0 to 1, got nan"),
    ({"z_loss": -1}, ValueError, "z_loss: expected a finite number of at least 0, got -1"),
    ({"z_loss": inf}, ValueError, "z_loss: expected a finite number of at least 0, got inf"),
    ({"softcap": 0}, ValueError, "softcap: expected None or a number from 1e-30 to 1e30, got 0"),
    ({"softcap": [1]}, TypeError, r"softcap: expected None or a number from 1e-30 to 1e30, got \[1\]"),
    ({"softcap": 1e39}, ValueError, r"softcap: expected None or a number from 1e-30 to 1e30, got 1e\+39"),
    (
        {"reg_weight": Fraction(1, 2)},
        TypeError,
        "reg_weight: expected a finite number or a tensor of 0 dimensions, got",
    ),
    ({"ignore_index": 2**70}, ValueError, "ignore_index: expected an int of 64 bits, got"),
    ({"backend": "cuda"}, ValueError, "backend: expected None, 'triton', 'compile' or 'eager', got 'cuda'"),
]


@pytest.mark.parametrize(("keywords", "error", "text"), OPTIONS)
def test_options(keywords, error, text):
    with pytest.raises(error, match=f"^{text}"):
        self_regularized_entropy(z, y, **keywords)
    with pytest.raises(error, match=f"^{text}"):
        SelfRegularizedEntropyLoss(**keywords)
    if not set(keywords) & {"inplace", "recompute"}:
        with pytest.raises(error, match=f"^{text}"):
            linear_self_regularized_entropy(x, W, y, **keywords)
        with pytest.raises(error, match=f"^{text}"):
            LinearSelfRegularizedEntropyLoss(3, 7, **keywords)


TENSORS = [
    (([1.0], y), TypeError, r"input: expected a tensor, got \[1\.0\]"),
    ((z, [1]), TypeError, r"target: expected a tensor, got \[1\]"),
    ((z, y, [1.0]), TypeError, r"weight: expected a tensor or None, got \[1\.0\]"),
    ((z.long(), y), TypeError, r"input: expected float16, bfloat16, .* got a int64 tensor of shape \(4, 7\)"),
    ((z[0, 0], y[0]), ValueError, r"input: expected logits of shape \(K,\), \(N, K\) or .* of shape \(\)"),
    ((z[:, :0], y), ValueError, r"input: expected at least one class, got a float32 tensor of shape \(4, 0\)"),
    ((z, y.int()), TypeError, r"target: expected int64 or uint8 class indices, .* got a int32 tensor of shape \(4,\)"),
    ((z, P.long()), TypeError, r"target: expected floating-point probabilities, .* got a int64 tensor"),
    ((z, y[:3]), ValueError, r"target: expected class indices of shape \(4,\) or probabilities of shape \(4, 7\), got"),
    ((z, y, w[:3]), ValueError, r"weight: expected a tensor of shape \(7,\), got a float32 tensor of shape \(3,\)"),
    ((z, P, w.long()), TypeError, "weight: expected a floating-point tensor, got a int64 tensor"),
    ((z, y, w.double()), TypeError, r"weight: expected the input's dtype, torch.float32, with class indices, got"),
    ((z, y, w.clone().requires_grad_()), ValueError, "weight: expected one that requires no gradient"),
    ((z, y.to("meta")), ValueError, "target: expected a tensor on cpu, as input, got one on meta"),
    ((z, y, w.to("meta")), ValueError, "weight: expected a tensor on cpu, as input, got one on meta"),
    ((z, y + 5), IndexError, "target: expected class indices from 0 to 6 or ignore_index=-100, got 7"),
    ((z, y - 2), IndexError, "target: expected class indices from 0 to 6 or ignore_index=-100, got -2"),
]


@pytest.mark.parametrize(("tensors", "error", "text"), TENSORS)
def test_tensors(tensors, error, text):
    with pytest.raises(error, match=f"^{text}"):
        self_regularized_entropy(*tensors)


LINEAR = [
    ((x.tolist(), W, y), {}, TypeError, r"input: expected a tensor, got \[\["),
    ((x, None, y), {}, TypeError, "linear_weight: expected a tensor, got None"),
    ((x, W, y), {"linear_bias": 1.0}, TypeError, r"linear_bias: expected a tensor or None, got 1\.0"),
    ((x.long(), W, y), {}, TypeError, "input: expected float16, bfloat16, float32 or float64 features, got a int64"),
    ((x[0, 0], W, y[0]), {}, ValueError, r"input: expected features of shape \(\.\.\., D\), got .* of shape \(\)"),
    ((x, W.t(), y), {}, ValueError, r"linear_weight: expected a tensor of shape \(K, 3\), .* of shape \(3, 7\)"),
    ((x, W[0], y), {}, ValueError, r"linear_weight: expected a tensor of shape \(K, 3\), .* of shape \(3,\)"),
    ((x, W[:0], y), {}, ValueError, r"linear_weight: expected .* K at least 1, .* of shape \(0, 3\)"),
    ((x, W, y), {"linear_bias": b[:3]}, ValueError, r"linear_bias: expected a tensor of shape \(7,\), got"),
    ((x, W.half(), y), {}, TypeError, "linear_weight: expected the input's dtype, torch.float32, got a float16"),
    ((x, W, y), {"linear_bias": b.double()}, TypeError, "linear_bias: expected the input's dtype, torch.float32, got"),
    ((x, W.to("meta"), y), {}, ValueError, "linear_weight: expected a tensor on cpu, as input, got one on meta"),
    ((x, W, y.to("meta")), {}, ValueError, "target: expected a tensor on cpu, as input, got one on meta"),
    (
        (x, W, y[:3]),
        {},
        ValueError,
        r"target: expected class indices of shape \(4,\) or probabilities of shape \(4, 7\)",
    ),
    ((x[None], W, y), {}, ValueError, r"target: expected class indices of shape \(1, 4\) or probabilities of shape"),
    (
        (x, W, y.int()),
        {},
        TypeError,
        "target: expected int64 or uint8 class indices, or probabilities shaped as the logi",
    ),
    ((x, W, y), {"weight": w[:3]}, ValueError, r"weight: expected a tensor of shape \(7,\), got"),
    ((x, W, P), {"ignore_index": 3}, ValueError, "ignore_index: expected a negative number with target probabilities"),
    ((x, W, y + 5), {}, IndexError, "target: expected class indices from 0 to 6 or ignore_index=-100, got 7"),
    ((x, W, y), {"chunk_rows": 0}, ValueError, "chunk_rows: expected None or an int of at least 1, got 0"),
    ((x, W, y), {"chunk_rows": 2.0}, TypeError, r"chunk_rows: expected None or an int, got 2\.0"),
]


@pytest.mark.parametrize(("tensors", "keywords", "error", "text"), LINEAR)
def test_linear(tensors, keywords, error, text):
    with pytest.raises(error, match=f"^{text}"):
        linear_self_regularized_entropy(*tensors, **keywords)


@pytest.mark.parametrize("chunk_rows", [0, True, "4"])
def test_chunk_rows_of_the_module(chunk_rows):
    with pytest.raises((TypeError, ValueError), match="^chunk_rows: expected None or an int"):
        LinearSelfRegularizedEntropyLoss(3, 7, chunk_rows=chunk_rows)


@pytest.mark.parametrize("make", [SelfRegularizedEntropyLoss, lambda: LinearSelfRegularizedEntropyLoss(3, 7)])
def test_what_is_set_on_a_module_is_checked_there(make):
    module = make()
    others = [
        ({"shard": 3}, TypeError, "shard: expected a VocabShard or None, got 3"),
        ({"weight": [1.0]}, TypeError, r"weight: expected a tensor of class weights or None, got \[1\.0\]"),
        ({"chunk_rows": -1}, ValueError, "chunk_rows: expected None or an int of at least 1, got -1"),
    ]
    for keywords, error, text in OPTIONS + others:
        (*possible, (name, value)) = keywords.items()
        if not hasattr(module, name):
            continue
        for first in possible:
            setattr(module, *first)
        before = getattr(module, name)
        with pytest.raises(error, match=f"^{text}"):
            setattr(module, name, value)
        assert getattr(module, name) is before
        for other, _ in possible:
            setattr(module, other, None)
    assert repr(module) == repr(make())


def test_dtypes_under_autocast(uncompiled):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_self_regularized_entropy(x, W.bfloat16(), y, linear_bias=b)
        linear_self_regularized_entropy(x.double(), W.double(), y)
        with pytest.raises(TypeError, match="linear_weight: expected the input's dtype, torch.float32"):
            linear_self_regularized_entropy(x, W.double(), y)


def test_ignore_index_with_probabilities():
    with pytest.raises(ValueError, match="^ignore_index: expected a negative number with target probabilities, got 3"):
        self_regularized_entropy(z, P, ignore_index=3)


@pytest.mark.parametrize("value", [1, 0.5, torch.tensor(0.5).item(), pytest.importorskip("numpy").float32(0.5)])
def test_numbers_of_every_kind(value, uncompiled):
    loss = self_regularized_entropy(z, y, reg_weight=value, z_loss=value, label_smoothing=value, softcap=value)
    expected = float(value)
    again = self_regularized_entropy(
        z, y, reg_weight=expected, z_loss=expected, label_smoothing=expected, softcap=expected
    )
    assert loss == again


def test_nothing_is_lost_by_an_error(uncompiled):
    logits = z.clone().requires_grad_()
    with pytest.raises(ValueError, match="softcap"):
        self_regularized_entropy(logits, y, softcap=-1, inplace=True)
    assert torch.equal(logits.detach(), z)
