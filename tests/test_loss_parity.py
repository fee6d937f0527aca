"""With reg_weight=0 the loss is F.cross_entropy: values, gradients, shapes, and what raises."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sre_triton import self_regularized_entropy

SHAPES = [(7,), (1, 7), (5, 7), (5, 1), (2, 7, 3), (2, 7, 3, 4), (2, 7, 3, 1, 2), (0, 7), (2, 7, 0)]
ERRORS = (TypeError, ValueError, IndexError)


def random(function, *args, seed=0):
    """The same random numbers on every device."""
    with torch.device("cpu"):
        numbers = function(*args, generator=torch.Generator().manual_seed(seed))
    return numbers.to(torch.get_default_device())


def arguments(shape, probabilities, dtype):
    dim = min(1, len(shape) - 1)
    logits = (random(torch.randn, shape) * 3).to(dtype)
    if probabilities:
        return logits, random(torch.rand, shape).to(dtype)
    return logits, random(torch.randint, shape[dim], shape[:dim] + shape[dim + 1 :])


def both(logits, target, backend, **keywords):
    results = []
    # Theirs on the CPU: on a GPU it refuses to be deterministic.
    for loss, device in (
        (F.cross_entropy, "cpu"),
        (lambda *args, **k: self_regularized_entropy(*args, **k, reg_weight=0, backend=backend), logits.device),
    ):
        moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in keywords.items()}
        leaf = logits.to(device, copy=True).requires_grad_()
        value = loss(leaf, target.to(device), **moved)
        value.backward(random(torch.randn, value.shape, seed=1).to(device, value.dtype))
        results.append((value.detach().cpu(), leaf.grad.cpu()))
    return results


def assert_parity(logits, target, backend, **keywords):
    (theirs, their_gradient), (ours, our_gradient) = both(logits, target, backend, **keywords)
    dtype = logits.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    assert ours.shape == theirs.shape
    assert ours.dtype == (torch.float32 if half else dtype)
    assert our_gradient.dtype == dtype
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps} if half else {}
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, equal_nan=True, **tolerance)
    torch.testing.assert_close(our_gradient, their_gradient, equal_nan=True, **tolerance)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_arguments(shape, probabilities, quick_backend):
    num_classes = shape[min(1, len(shape) - 1)]
    weight = torch.linspace(0.1, 2.0, num_classes)
    logits, target = arguments(shape, probabilities, torch.float32)
    for reduction, smoothing, w in itertools.product(("mean", "sum", "none"), (0.0, 0.3), (None, weight)):
        assert_parity(logits, target, quick_backend, reduction=reduction, label_smoothing=smoothing, weight=w)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype, probabilities, quick_backend):
    if (dtype, quick_backend) == (torch.float64, "triton"):
        pytest.skip("refused")
    for shape in ((5, 7), (2, 7, 3)):
        logits, target = arguments(shape, probabilities, dtype)
        weight = torch.linspace(0.1, 2.0, 7).to(dtype)
        for reduction, smoothing, w in itertools.product(("mean", "none"), (0.0, 0.3), (None, weight)):
            assert_parity(logits, target, quick_backend, reduction=reduction, label_smoothing=smoothing, weight=w)


@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_compiled(probabilities):
    logits, target = arguments((64, 1000), probabilities, torch.float32)
    weight = torch.linspace(0.1, 2.0, 1000)
    assert_parity(logits, target, "compile")
    assert_parity(logits, target, "compile", reduction="none", label_smoothing=0.3, weight=weight)


@pytest.mark.parametrize("ignore_index", [-100, -1, 2, 255])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_rows(ignore_index, smoothing, quick_backend):
    logits, target = arguments((8, 7), False, torch.float32)
    target[::3] = ignore_index
    for weight, reduction in itertools.product((None, torch.linspace(0.1, 2.0, 7)), ("mean", "sum", "none")):
        assert_parity(
            logits,
            target,
            quick_backend,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            weight=weight,
            reduction=reduction,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction, quick_backend):
    logits, _ = arguments((4, 7), False, torch.float32)
    target = torch.full((4,), -100)
    assert_parity(logits, target, quick_backend, reduction=reduction)
    (_, _), (loss, gradient) = both(logits, target, quick_backend, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert (gradient == 0).all()


def test_class_weights_of_zero(quick_backend):
    logits, target = arguments((4, 7), False, torch.float32)
    assert_parity(logits, target, quick_backend, weight=torch.zeros(7))


@pytest.mark.parametrize(("K", "ignore_index"), [(200, -100), (200, 300), (300, -100)])
def test_byte_targets_do_not_wrap_around(K, ignore_index, quick_backend):
    logits, _ = arguments((3, K), False, torch.float32)
    target = torch.tensor([44, 100, 156], dtype=torch.uint8)
    assert_parity(logits, target, quick_backend, ignore_index=ignore_index)


def test_byte_targets_and_one_row_with_a_target_of_one(quick_backend):
    logits, target = arguments((4, 7), False, torch.float32)
    assert_parity(logits, target.byte(), quick_backend)
    # Their backward rejects a target of shape (1,).
    ours = self_regularized_entropy(logits[0], target[:1], reg_weight=0, reduction="none", backend=quick_backend)
    torch.testing.assert_close(ours, F.cross_entropy(logits[0], target[:1], reduction="none"))


def test_masked_logits(quick_backend):
    logits, target = arguments((4, 7), False, torch.float32)
    logits[:, 5:] = -torch.inf
    assert_parity(logits, target % 5, quick_backend)
    assert_parity(logits, torch.full((4,), 6), quick_backend)
    assert_parity(logits, target % 5, quick_backend, label_smoothing=0.1)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "unaligned", "odd stride"])
@pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])
def test_strided_logits(layout, recompute, backend):
    base = random(torch.randn, (12, 12)) * 3
    view = {
        "transposed": lambda b: b.t(),
        "sliced": lambda b: b[1::2, 2:9],
        "expanded": lambda b: b[:1].expand(12, 12),
        "unaligned": lambda b: b.flatten()[1:121].view(12, 10),
        "odd stride": lambda b: b[:, :7],
    }[layout]
    gradients = []
    for loss in (
        F.cross_entropy,
        lambda *a: self_regularized_entropy(*a, reg_weight=0, recompute=recompute, backend=backend),
    ):
        leaf = base.clone().requires_grad_()
        logits = view(leaf)
        loss(logits, torch.arange(logits.shape[0]) % logits.shape[1]).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["random", "zero", "expanded"])
@pytest.mark.parametrize("recompute", [None, False])
def test_upstream_gradients_of_reduction_none(kind, recompute, quick_backend):
    logits, target = arguments((6, 7), False, torch.float32)
    upstream = {"random": torch.randn(6), "zero": torch.zeros(6), "expanded": torch.tensor(2.0).expand(6)}[kind]
    gradients = []
    for loss in (
        F.cross_entropy,
        lambda *a, **k: self_regularized_entropy(*a, **k, reg_weight=0, recompute=recompute, backend=quick_backend),
    ):
        leaf = logits.clone().requires_grad_()
        loss(leaf, target, reduction="none").backward(upstream)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


z, y, P, w = torch.randn(4, 7), torch.arange(4), torch.rand(4, 7), torch.rand(7)
RAISING = {
    "uint16 target": (z, y.to(torch.uint16), {}),
    "bool target": (z, y.bool(), {}),
    "float indices": (z, y.float(), {}),
    "integer probabilities": (z, torch.ones(4, 7, dtype=torch.long), {}),
    "float64 weight": (z, y, {"weight": w.double()}),
    "float32 weight of bfloat16 logits": (z.bfloat16(), y, {"weight": w}),
    "short weight": (z, y, {"weight": w[:3]}),
    "2-D weight": (z, y, {"weight": w[None]}),
    "weight that requires grad": (z, y, {"weight": w.clone().requires_grad_()}),
    "ignore_index with probabilities": (z, P, {"ignore_index": 3}),
    "smoothing of 1.1": (z, y, {"label_smoothing": 1.1}),
    "unknown reduction": (z, y, {"reduction": "avg"}),
    "target too large": (z, y + 10, {}),
    "negative target": (z, y - 10, {}),
    "smoothed target too large": (z, y + 10, {"label_smoothing": 0.1}),
    "scalar logits": (z[0, 0], y[0], {}),
    "short target": (z, y[:3], {}),
    "column target": (z, y[:, None], {}),
    "probabilities of another shape": (z, P[:, :5], {}),
    "spatial target of another shape": (z.view(2, 7, 2), torch.zeros(2, 3, dtype=torch.long), {}),
    "integer logits": (torch.ones(4, 7, dtype=torch.long), y, {}),
    "complex logits": (z.to(torch.complex64), y, {}),
    "ignore_index of None": (z, y, {"ignore_index": None}),
    "ignore_index of 1.0": (z, y, {"ignore_index": 1.0}),
    "a list of logits": ([1.0], y, {}),
    "a list of weights": (z, y, {"weight": [1.0] * 7}),
}


@pytest.mark.parametrize("name", RAISING)
def test_where_cross_entropy_raises_so_do_we(name):
    logits, target, keywords = RAISING[name]
    with pytest.raises((RuntimeError, *ERRORS)):
        F.cross_entropy(logits, target, **keywords)
    with pytest.raises(ERRORS, match="expected .* got|detach"):
        self_regularized_entropy(logits, target, **keywords)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_integers_of_other_widths_that_loaders_make(dtype, quick_backend):
    logits, target = arguments((2, 7, 3), False, torch.float32)
    target[0, 1] = -100
    with pytest.raises(RuntimeError):
        F.cross_entropy(logits, target.to(dtype))
    for keywords in ({}, {"weight": w, "label_smoothing": 0.1}, {"reduction": "none"}, {"ignore_index": 3}):
        keywords = {"backend": quick_backend, "z_loss": 0.1} | keywords
        given = target.clamp(min=0) if "ignore_index" in keywords else target
        found = []
        for indices in (given, given.to(dtype)):
            leaf = logits.clone().requires_grad_()
            loss, parts = self_regularized_entropy(leaf, indices, return_parts=True, **keywords)
            loss.sum().backward()
            found.append((loss, *parts, leaf.grad))
        assert all(map(torch.equal, *found))
    assert_parity(logits[:, :, 1], target[:, 1].clone(), quick_backend)


@pytest.mark.parametrize("needs", ["target", "weight"])
def test_gradient_to_probabilities_and_weight(needs):
    gradients = []
    for loss in (F.cross_entropy, lambda *a, **k: self_regularized_entropy(*a, **k, reg_weight=0)):
        logits, target = arguments((4, 7), True, torch.float32)
        weight = torch.linspace(0.1, 2.0, 7)
        wanted = {"target": target, "weight": weight}[needs].requires_grad_()
        loss(logits, target, weight).backward()
        gradients.append(wanted.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
