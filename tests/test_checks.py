"""Wrong arguments: the error's type, and a text that names the argument, what was expected and what came."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    linear_self_regularized_entropy,
    messages,
    self_regularized_entropy,
)

z, y, P, w = torch.randn(4, 7), torch.arange(4), torch.rand(4, 7), torch.rand(7)
x, W, b = torch.randn(4, 3), torch.randn(7, 3), torch.randn(7)
nan, inf = float("nan"), float("inf")

OPTIONS = [
    ({"c": 0.0}, ValueError, r"c: expected a number from 1e-30 to 1, got 0\.0; for plain .* pass reg_weight=0$"),
    ({"c": 2}, ValueError, r"c: expected a number from 1e-30 to 1, got 2$"),
    ({"c": torch.tensor(0.5)}, TypeError, r"c: expected a number .* of shape \(\); c\.item\(\) makes a number of it$"),
    ({"z_loss": torch.tensor(0.5)}, TypeError, r"z_loss: expected a finite number .*; z_loss\.item\(\) makes a number"),
    ({"softcap": torch.tensor(5)}, TypeError, r"softcap: expected None or .* an int64 .*; softcap\.item\(\) makes"),
    (
        {"label_smoothing": torch.tensor(0.5)},
        TypeError,
        r"label_smoothing: .*; label_smoothing\.item\(\) makes",
    ),
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
    ({"backend": np.ones(3)}, ValueError, "backend: expected None, 'triton', 'compile' or 'eager', got array"),
    (
        {"denominator": torch.ones(2, 1)[:1]},
        ValueError,
        r"denominator: .* \(1, 1\); denominator\.squeeze\(\)",
    ),
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
    ((z.long(), y), TypeError, r"input: expected float16, bfloat16, .* got an int64 tensor of shape \(4, 7\)"),
    ((z[0, 0], y[0]), ValueError, r"input: expected logits of shape \(K,\), \(N, K\) or .* of shape \(\)"),
    ((z[:, :0], y), ValueError, r"input: expected at least one class, got a float32 tensor of shape \(4, 0\)"),
    (
        (z, y.to(torch.uint16)),
        TypeError,
        r"target: expected int64, int32, int16, int8 or uint8 .*long\(\)",
    ),
    (
        (z, y.float()),
        TypeError,
        r"target: .* got a float32 tensor of shape \(4,\); target\.long\(\) makes class",
    ),
    (
        (z, y.bool()),
        TypeError,
        r"target: .* got a bool tensor of shape \(4,\); target\.long\(\) makes class",
    ),
    ((z, P[:, :5]), TypeError, r"target: expected int64, .* got a float32 tensor of shape \(4, 5\)$"),
    (
        (z, P.long()),
        TypeError,
        r"target: expected floating-point probabilities, .* an int64 .*; target\.float\(\)",
    ),
    (
        (z, P.bool()),
        TypeError,
        r"target: expected floating-point probabilities, .* a bool .*; target\.float\(\)",
    ),
    (
        (z.view(2, 2, 7), y.view(2, 2)),
        ValueError,
        r"target: expected .* got an int64 tensor of shape \(2, 2\); dimension 1 .* pass input\.movedim\(-1, 1\)$",
    ),
    ((z.view(2, 2, 7), y.view(2, 2).float()), TypeError, r"target: .* target\.long\(\) makes class indices of it$"),
    ((z.view(2, 2, 7), y.view(2, 2)[:, :1]), ValueError, r"target: expected .* got an int64 tensor of shape \(2, 1\)$"),
    ((z, y[:3]), ValueError, r"target: expected class indices of shape \(4,\) or probabilities of shape \(4, 7\), got"),
    ((z, y, w[:3]), ValueError, r"weight: expected a tensor of shape \(7,\), got a float32 tensor of shape \(3,\)"),
    ((z, P, w.long()), TypeError, "weight: expected a floating-point tensor, got an int64 tensor"),
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
    ((x.long(), W, y), {}, TypeError, "input: expected float16, bfloat16, float32 or float64 features, got an int64"),
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
        (x, W, y.float()),
        {},
        TypeError,
        r"target: expected int64, int32, int16, int8 or uint8 .*; target\.long\(\)",
    ),
    (
        (x, W, P.long()),
        {},
        TypeError,
        r"target: expected floating-point probabilities, .*; target\.float\(\)",
    ),
    (
        (x, W[:, :2], y),
        {},
        ValueError,
        r"linear_weight: .* \(K, 3\), .* for input of shape \(4, 3\), .* \(7, 2\)",
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


def nested(tensor, layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor, tensor[:2]], layout=layout)


# What a tensor may be made into that nothing here computes with, and how to mend it.
KINDS = {
    "sparse_coo tensor": (torch.Tensor.to_sparse, r"\.to_dense\(\) is one"),
    "sparse_csr tensor": (torch.Tensor.to_sparse_csr, r"\.to_dense\(\) is one"),
    "mkldnn tensor": (torch.Tensor.to_mkldnn, r"\.to_dense\(\) is one"),
    "nested tensor": (lambda t: nested(t, torch.strided), r"to_padded_tensor\(.*\) is one"),
    "float32 nested tensor": (lambda t: nested(t, torch.jagged), r"to_padded_tensor\(.*\) is one"),
    "MaskedTensor of float32": (lambda t: torch.masked.masked_tensor(t, t > 0), r"\.to_tensor\(.*\) is one"),
    "uninitialized parameter": (
        lambda t: torch.nn.UninitializedParameter(),
        "the first forward of its module makes it one",
    ),
    "quint8 tensor": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), r"\.dequantize\(\) converts it"),
    "complex64 tensor": (lambda t: t + 0j, r"\.real and .*\.abs\(\) are real"),
}


def made(tensor, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of these are called a prototype by PyTorch
        return KINDS[kind][0](tensor)


MATRICES, VECTORS = ("input", "target", "linear_weight"), ("weight", "linear_bias")
PAIRS = [(a, kind) for a in (*MATRICES, *VECTORS) for kind in KINDS if a in MATRICES or kind != "sparse_csr tensor"]


@pytest.mark.parametrize(("argument", "kind"), PAIRS)
def test_tensors_that_are_not_dense_or_not_real(argument, kind):
    tensors = {"input": z, "target": P, "weight": w}
    linear = {"input": x, "linear_weight": W, "target": P, "linear_bias": b, "weight": w}
    calls = []
    if argument in tensors:
        given = tensors | {argument: made(tensors[argument], kind)}
        calls.append(lambda: self_regularized_entropy(**given))
        calls.append(lambda: SelfRegularizedEntropyLoss(given["weight"])(given["input"], given["target"]))
    given_linear = linear | {argument: made(linear[argument], kind)}
    calls.append(lambda: linear_self_regularized_entropy(**given_linear))
    if argument in ("input", "target", "weight"):
        of_module = {"input": given_linear["input"], "target": given_linear["target"]}
        calls.append(lambda: LinearSelfRegularizedEntropyLoss(3, 7, weight=given_linear["weight"])(**of_module))
    for call in calls:
        with pytest.raises(TypeError, match=rf"^{argument}: expected .*, got an? .*{kind}.*; .*{KINDS[kind][1]}$"):
            call()


@pytest.mark.parametrize("kind", ["sparse_coo tensor", "sparse_csr tensor", "nested tensor"])
def test_class_indices_that_are_not_dense(kind):
    labels = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=f"^target: expected a dense tensor, got an int64 {kind}"):
        self_regularized_entropy(torch.randn(2, 7, 3), made(labels, kind))


@pytest.mark.parametrize("argument", ["reg_weight", "denominator"])
def test_numbers_in_tensors_that_are_not_dense_or_not_real(argument):
    for kind in ("sparse_coo tensor", "mkldnn tensor", "nested tensor", "uninitialized parameter"):
        value = made(w[0] if kind == "sparse_coo tensor" else w, kind)
        with pytest.raises(TypeError, match=f"^{argument}: expected a dense tensor, got .*{kind}"):
            self_regularized_entropy(z, y, **{argument: value})
    for kind in ("quint8 tensor", "complex64 tensor"):
        with pytest.raises(ValueError, match=f"^{argument}: expected a number or a real tensor .*, got a {kind}"):
            self_regularized_entropy(z, y, **{argument: made(w, kind)[0]})


MODULES = [
    (lambda: SelfRegularizedEntropyLoss(1e-7), TypeError, "weight: expected a tensor .*, got 1e-07; .* such as c=1e-7"),
    (
        lambda: SelfRegularizedEntropyLoss("mean"),
        TypeError,
        "weight: expected a tensor .*, got 'mean'; .* keywords",
    ),
    (
        lambda: SelfRegularizedEntropyLoss([1.0, 2.0]),
        TypeError,
        r"weight: .*, got \[1\.0, 2\.0\]; torch\.as_tensor",
    ),
    (
        lambda: SelfRegularizedEntropyLoss(np.ones(2)),
        TypeError,
        r"weight: .*, got array\(.*; torch\.as_tensor",
    ),
    (
        lambda: SelfRegularizedEntropyLoss(y),
        TypeError,
        r"weight: expected a floating-.*; weight\.float\(\) conv",
    ),
    (lambda: SelfRegularizedEntropyLoss(P), ValueError, r"weight: expected a tensor of shape \(K,\), got .* \(4, 7\)"),
    (lambda: LinearSelfRegularizedEntropyLoss(3, 7, weight=0.1), TypeError, "weight: expected a tensor .*, got 0.1"),
    (
        lambda: LinearSelfRegularizedEntropyLoss(3, 8, weight=w),
        ValueError,
        r"weight: .* shape \(8,\), got .* \(7,\)",
    ),
    (lambda: LinearSelfRegularizedEntropyLoss("3", 7), TypeError, "in_features: expected an int, got '3'"),
    (lambda: LinearSelfRegularizedEntropyLoss(3.0, 7), TypeError, "in_features: expected an int, got 3.0"),
    (lambda: LinearSelfRegularizedEntropyLoss(3, True), TypeError, "num_classes: expected an int, got True"),
    (lambda: LinearSelfRegularizedEntropyLoss(3, None), TypeError, "num_classes: expected an int, got None"),
    (lambda: LinearSelfRegularizedEntropyLoss(3, -7), ValueError, "num_classes: expected an int of at least 1, got -7"),
    (lambda: LinearSelfRegularizedEntropyLoss(0, 7), ValueError, "in_features: expected an int of at least 1, got 0"),
    (lambda: LinearSelfRegularizedEntropyLoss(3, 2**63), ValueError, "num_classes: expected an int of 64 bits, got 92"),
    (
        lambda: LinearSelfRegularizedEntropyLoss(3, 7, dtype=torch.int8),
        TypeError,
        "dtype: expected None, torch.float1",
    ),
    (lambda: LinearSelfRegularizedEntropyLoss(3, 7, dtype="half"), TypeError, "dtype: expected None, .* got 'half'"),
    (
        lambda: LinearSelfRegularizedEntropyLoss(5, 7)(x, y),
        ValueError,
        r"input: expected features of shape \(.*, 5\), as",
    ),
]


@pytest.mark.parametrize(("act", "error", "text"), MODULES)
def test_modules(act, error, text):
    with pytest.raises(error, match=f"^{text}"):
        act()


def test_sizes_of_numpy(uncompiled):
    head = LinearSelfRegularizedEntropyLoss(np.int64(3), np.int32(7), dtype=torch.float64, weight=w.double())
    assert head(x.double(), y).dtype == torch.float64


@pytest.mark.parametrize(
    ("tensors", "keywords", "text"),
    [
        ((z, y), {"softcap": [[1] * 100] * 100}, "softcap: expected None or a number from 1e-30 to 1e30, got a list"),
        ((z, y), {"reg_weight": torch.ones(2)}, "reg_weight: expected a number or .*, got a float32 tensor of shape"),
        (
            (z, y.float()),
            {},
            r"target: expected int64, .* got a float32 tensor of shape .*; target\.long\(\) makes class",
        ),
    ],
)
def test_errors_while_compiling_say_the_same(tensors, keywords, text):
    torch.compiler.reset()
    function = torch.compile(self_regularized_entropy, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=text):
        function(*tensors, **keywords)


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


def test_class_weights_that_are_set_later_have_the_layers_size():
    head = LinearSelfRegularizedEntropyLoss(3, 7)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor of shape \(7,\), got a float32 tensor of shape"):
        head.weight = torch.ones(3)
    head.weight = torch.ones(7)


def test_dtypes_under_autocast(uncompiled):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_self_regularized_entropy(x, W.bfloat16(), y, linear_bias=b)
        linear_self_regularized_entropy(x.double(), W.double(), y)
        with pytest.raises(TypeError, match="linear_weight: expected the input's dtype, torch.float32"):
            linear_self_regularized_entropy(x, W.double(), y)


def test_ignore_index_with_probabilities():
    with pytest.raises(ValueError, match="^ignore_index: expected a negative number with target probabilities, got 3"):
        self_regularized_entropy(z, P, ignore_index=3)


@pytest.mark.parametrize("value", [1, 0.5, torch.tensor(0.5).item(), np.float32(0.5)])
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


# -- what is said once a process --------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    """Calls a function as in a new process: what it warns of, all at the line of the test."""

    def run(function, *args, **keywords):
        monkeypatch.setattr(messages, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            for _ in range(2):
                function(*args, **keywords)
        assert all(warning.filename == __file__ for warning in caught)
        return [str(warning.message) for warning in caught]

    return run


@pytest.mark.parametrize("argument", ["reg_weight", "denominator"])
def test_numbers_that_require_a_gradient_get_none(argument, said, quick_backend):
    number = torch.tensor(0.5, requires_grad=True)
    keywords = {argument: number, "backend": quick_backend}
    (message,) = said(lambda: self_regularized_entropy(z, y, **keywords))
    assert message.startswith(f"{argument} requires a gradient and gets none")
    assert f"{argument}.detach()" in message
    assert said(lambda: linear_self_regularized_entropy(x, W, y, **keywords)) == [message]

    def set_later(criterion, features):
        setattr(criterion, argument, number)
        criterion(features, y)

    def linear(**given):
        return LinearSelfRegularizedEntropyLoss(3, 7, **given)

    for module, features in ((SelfRegularizedEntropyLoss, z), (linear, x)):
        assert said(module, **keywords) == [message]
        assert said(set_later, module(backend=quick_backend), features) == [message]
    assert said(lambda: self_regularized_entropy(z, y, **keywords | {argument: number.detach()})) == []
    with torch.no_grad():
        assert said(lambda: self_regularized_entropy(z, y, **keywords)) == []


def test_of_gradients_it_is_said_under_transforms_and_while_compiling(said, uncompiled):
    def loss(number):
        return self_regularized_entropy(z, y, denominator=number)

    number = torch.tensor(3.0)
    assert len(said(lambda: torch.func.grad(loss)(number))) == 1
    assert torch.func.grad(loss)(number) == 0
    torch.compiler.reset()
    graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert said(graph, number) == []
    assert len(said(graph, number.requires_grad_())) == 1
    torch.testing.assert_close(graph(number), loss(number))
