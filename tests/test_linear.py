"""The linear layer and its loss: the plain path's numbers, in the memory of a chunk, and no work that nobody wants."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, ROUNDING, assert_linear_within_bounds, linear_problem, linear_truth
from torch._dynamo.testing import CompileCounterWithBackend

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    Parts,
    SelfRegularizedEntropyLoss,
    chunks,
    linear_primitive,
    linear_self_regularized_entropy,
    self_regularized_entropy,
)
from sre_triton.compiled import primitives as compiled_primitives

N, D, K = 11, 16, 40

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
all_chunks = pytest.mark.parametrize("chunk_rows", [None, 1, 4, 100], ids=str)
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def loss_and_gradients(input, linear_weight, linear_bias, target, *, upstream=None, **options):
    leaves = [None if tensor is None else tensor.detach().clone() for tensor in (input, linear_weight, linear_bias)]
    leaves = [None if leaf is None else leaf.requires_grad_() for leaf in leaves]
    loss, parts = linear_self_regularized_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], return_parts=True, **options
    )
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), parts, [None if leaf is None else leaf.grad for leaf in leaves]


def assert_equal_the_truth(tensors, target, *, upstream=None, **options):
    found = loss_and_gradients(*tensors, target, upstream=upstream, **options)
    options = {name: value for name, value in options.items() if name not in ("backend", "chunk_rows")}
    assert_linear_within_bounds(found, tensors, target, upstream=upstream, **options)


# -- the numbers ------------------------------------------------------------------------------------------------------


@all_chunks
@both_targets
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_plain_path(name, probabilities, chunk_rows, quick_backend):
    *tensors, target, options = linear_problem((N,), D, K, OPTIONS[name], probabilities=probabilities)
    assert_equal_the_truth(tensors, target, chunk_rows=chunk_rows, backend=quick_backend, **options)


@reductions
@both_targets
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_dtype(dtype, probabilities, reduction, quick_backend):
    if dtype == torch.float64 and quick_backend == "triton":
        pytest.skip("refused")
    *tensors, target, options = linear_problem((N,), D, K, OPTIONS["all"], probabilities=probabilities, dtype=dtype)
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(-3.0)
    keywords = {"chunk_rows": 4, "backend": quick_backend, "reduction": reduction, **options}
    assert_equal_the_truth(tensors, target, upstream=upstream.to(torch.promote_types(dtype, torch.float32)), **keywords)


@all_chunks
@pytest.mark.parametrize("upstream", [torch.randn(N), torch.zeros(N), torch.ones(1).expand(N)], ids=["", "0", "1"])
def test_without_reduction(upstream, chunk_rows, quick_backend):
    *tensors, target, options = linear_problem((N,), D, K, {"label_smoothing": 0.1})
    upstream = upstream.to(target.device)
    keywords = {"reduction": "none", "chunk_rows": chunk_rows, "backend": quick_backend}
    assert_equal_the_truth(tensors, target, upstream=upstream, **keywords, **options)


@pytest.mark.parametrize("name", ["default", "all"])
def test_compiled(name):
    *tensors, target, options = linear_problem((300,), D, 1500, OPTIONS[name])
    assert_equal_the_truth(tensors, target, chunk_rows=128, backend="compile", **options)


@reductions
@both_targets
@pytest.mark.parametrize("shape", [(), (0,), (1,), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_shapes(shape, probabilities, reduction, quick_backend):
    *tensors, target, _ = linear_problem(shape, D, K, {}, probabilities=probabilities)
    keywords = {"reduction": reduction, "chunk_rows": 2, "backend": quick_backend}
    loss, parts, gradients = loss_and_gradients(
        *tensors, target, **keywords, upstream=torch.tensor(1.0).expand(shape if reduction == "none" else ())
    )
    assert loss.shape == (shape if reduction == "none" else ())
    assert isinstance(parts, Parts)
    assert all(part.shape == loss.shape and not part.requires_grad for part in parts)
    true_loss, _, true_gradients, _ = linear_truth(
        *tensors, target, reduction=reduction, upstream=torch.ones_like(loss)
    )
    torch.testing.assert_close(loss.flatten().double(), true_loss.flatten(), rtol=1e-5, atol=1e-5, equal_nan=True)
    for ours, true, tensor in zip(gradients, true_gradients, tensors, strict=True):
        assert ours.shape == tensor.shape
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)


def test_one_target_for_one_row_of_features(quick_backend):
    *tensors, target, _ = linear_problem((), D, K, {})
    once, again = (loss_and_gradients(*tensors, t, backend=quick_backend) for t in (target, target.reshape(1)))
    assert torch.equal(once[0], again[0])


def test_bytes_as_class_indices(quick_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    keywords = {"ignore_index": 256 + target[0].item(), "backend": quick_backend}
    ours = loss_and_gradients(*tensors, target.to(torch.uint8), **keywords)
    torch.testing.assert_close(ours, loss_and_gradients(*tensors, target, **keywords))


def test_strided_tensors(quick_backend):
    *tensors, target, _ = linear_problem((3, 4), D, K, {})
    strided = [tensor.detach().clone().t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in tensors]
    strided[0] = tensors[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    for case in (target, target.t().contiguous().t()):
        ours = loss_and_gradients(*strided, case, backend=quick_backend)
        torch.testing.assert_close(ours, loss_and_gradients(*tensors, target, backend=quick_backend))


@pytest.mark.parametrize("name", ["default", "all"])
def test_chunks_change_nothing_but_roundings(name, row_backend):
    *tensors, target, options = linear_problem((32,), D, K, OPTIONS[name])
    results = [
        loss_and_gradients(*tensors, target, chunk_rows=chunk_rows, backend=row_backend, **options)
        for chunk_rows in (1, 7, 31, 32, 33)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_options_mean_what_they_mean_elsewhere(quick_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    logits = F.linear(*tensors).detach()
    for options in ({"denominator": 3}, {"reg_weight": torch.tensor(0.3)}, {"ignore_index": target[0].item()}):
        ours = loss_and_gradients(*tensors, target, backend=quick_backend, **options)
        expected = self_regularized_entropy(logits, target, return_parts=True, backend=quick_backend, **options)
        torch.testing.assert_close(ours[:2], expected)


@pytest.mark.parametrize("chunk_rows", [8, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_parameters_are_summed_in_float32(dtype, chunk_rows, uncompiled):
    # Every row adds 1 / 65536 to what becomes 1 / 16: summed in half precision, most of it would be lost.
    tensors = torch.ones(4096, 8, dtype=dtype), torch.zeros(16, 8, dtype=dtype), torch.zeros(16, dtype=dtype)
    target = torch.zeros(4096, dtype=torch.long)
    _, _, (_, of_weight, of_bias) = loss_and_gradients(*tensors, target, chunk_rows=chunk_rows, reg_weight=0)
    expected = torch.full((16,), 1 / 16)
    expected[0] -= 1
    torch.testing.assert_close(of_weight.float(), expected[:, None].expand(16, 8), rtol=ROUNDING[dtype], atol=0)
    torch.testing.assert_close(of_bias.float(), expected, rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_less_accurate_than_the_plain_path(dtype, row_backend):
    input, W, _, target, _ = linear_problem((64,), 32, 200, {}, dtype=dtype)
    zero = torch.zeros(200, dtype=dtype)
    true = linear_truth(input, W, zero, target, upstream=torch.tensor(64.0))[2]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (input, W)]
    keywords = {"recompute": True, "backend": row_backend}
    (64 * self_regularized_entropy(F.linear(*leaves), target, **keywords)).backward()
    for chunk_rows in (1, 5, 64):
        ours = loss_and_gradients(
            input, W, None, target, upstream=torch.tensor(64.0), chunk_rows=chunk_rows, backend=row_backend
        )[2]
        for gradient, leaf, expected in zip(ours, leaves, true, strict=False):
            plain = (leaf.grad.double() - expected).norm()
            assert (gradient.double() - expected).norm() <= 1.25 * plain


# -- ignored rows -----------------------------------------------------------------------------------------------------


@reductions
@pytest.mark.parametrize("chunk_rows", [1, 4, None], ids=str)
def test_nothing_of_an_ignored_row_reaches_a_gradient(chunk_rows, reduction, quick_backend):
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    ignored = torch.arange(N) % 3 == 1
    clean = loss_and_gradients(
        input[~ignored],
        W,
        b,
        target[~ignored],
        reduction=reduction,
        backend=quick_backend,
        upstream=torch.ones(()).expand((~ignored).sum() if reduction == "none" else ()),
    )
    poisoned = torch.where(ignored[:, None], torch.nan, input)
    labels = torch.where(ignored, -100, target)
    keywords = {"reduction": reduction, "chunk_rows": chunk_rows, "backend": quick_backend}
    loss, parts, gradients = loss_and_gradients(
        poisoned, W, b, labels, **keywords, upstream=torch.ones(()).expand(N if reduction == "none" else ())
    )
    if reduction == "none":
        assert not loss[ignored].any()
        assert not any(part[ignored].any() for part in parts)
        loss = loss[~ignored]
    torch.testing.assert_close(loss, clean[0])
    assert not gradients[0][ignored].any()
    torch.testing.assert_close([gradients[0][~ignored], *gradients[1:]], clean[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_row_at_all(dtype, quick_backend):
    input, W, b, target, _ = linear_problem((N,), D, K, {}, dtype=dtype)
    loss, _, gradients = loss_and_gradients(input, W, b, target * 0 - 100, backend=quick_backend)
    assert loss.isnan()  # as F.cross_entropy
    assert not any(gradient.any() for gradient in gradients)


def test_no_time_is_spent_on_ignored_rows(monkeypatch, uncompiled):
    input, W, b, target, _ = linear_problem((N,), D, K, {})
    rows = []
    compute = compiled_primitives.row_loss_and_gradient_
    monkeypatch.setattr(
        compiled_primitives, "row_loss_and_gradient_", lambda z, *args: rows.append(len(z)) or compute(z, *args)
    )
    loss_and_gradients(input, W, b, torch.where(torch.arange(N) < 4, target, -100), chunk_rows=3)
    assert rows == [3, 1]


# -- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
@reductions
def test_only_gradients_that_are_wanted_are_computed(reduction, wanted, monkeypatch, quick_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    expected = loss_and_gradients(
        *tensors,
        target,
        backend=quick_backend,
        reduction=reduction,
        upstream=torch.ones(()).expand(N if reduction == "none" else ()),
    )
    leaves = [tensor.detach().requires_grad_(bool(want)) for tensor, want in zip(tensors, wanted, strict=True)]
    found = []
    compute = chunks.losses_and_gradients

    def spy(*args):
        outs = compute(*args)
        found.append([out.numel() > 0 for out in outs[1:4]])
        return outs

    monkeypatch.setattr(linear_primitive, "losses_and_gradients", spy)
    loss = linear_self_regularized_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], reduction=reduction, backend=quick_backend
    )
    assert loss.requires_grad == any(wanted)
    torch.testing.assert_close(loss.detach(), expected[0])
    if any(wanted):
        loss.sum().backward()
    for leaf, gradient, want in zip(leaves, expected[2], wanted, strict=True):
        assert (leaf.grad is not None) == bool(want)
        if want:
            torch.testing.assert_close(leaf.grad, gradient)
    if quick_backend != "eager":
        assert found[-1] == [bool(want) for want in wanted]
        assert len(found) == (2 if reduction == "none" and any(wanted) else 1)


def test_no_grad_computes_no_gradient(monkeypatch, row_backend):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    monkeypatch.setattr(chunks, "_add_product", None)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = linear_self_regularized_entropy(input, W, target, backend=row_backend)
        assert not loss.requires_grad


def test_gradients_are_handed_over_once(row_backend):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    loss = linear_self_regularized_entropy(input, W, target, backend=row_backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()
    rows = linear_self_regularized_entropy(input, W, target, reduction="none", backend=row_backend)
    W.grad = None
    rows.sum().backward(retain_graph=True)
    once = W.grad.clone()
    rows.sum().backward()
    torch.testing.assert_close(W.grad, 2 * once)


# -- a backward in parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_each_gradient_is_handed_over_when_it_is_asked_for(reduction, order, upstream, uncompiled):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    options = {"reduction": reduction}
    of_rows = torch.full((N,) if reduction == "none" else (), upstream)
    expected = loss_and_gradients(*tensors, target, upstream=of_rows, **options)[2]
    x, W, b = (tensor.detach().requires_grad_() for tensor in tensors)
    features = x * 1  # one gradient is a leaf's, one is on its way
    for ask in (torch.autograd.grad, torch.autograd.backward):
        loss = linear_self_regularized_entropy(features, W, target, linear_bias=b, **options)
        found = {}
        for i in order:
            leaf = (x, W, b)[i]
            if ask is torch.autograd.grad:
                (found[i],) = ask(loss, leaf, of_rows, retain_graph=True)
            else:
                ask(loss, of_rows, inputs=[leaf], retain_graph=True)
                found[i], leaf.grad = leaf.grad, None
        for i, gradient in found.items():
            torch.testing.assert_close(gradient, expected[i])
            if reduction != "none":
                with pytest.raises(RuntimeError, match="reduction='none'"):
                    torch.autograd.grad(loss, (x, W, b)[i], of_rows, retain_graph=True)
        if reduction != "none":
            with pytest.raises(RuntimeError, match="reduction='none'"):
                loss.backward()


def test_only_gradients_that_are_asked_for_are_computed_again(monkeypatch, uncompiled):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    loss = linear_self_regularized_entropy(input, W, target, reduction="none").sum()
    found, compute = [], chunks.losses_and_gradients
    monkeypatch.setattr(
        linear_primitive, "losses_and_gradients", lambda *args: found.append(args[7].wanted) or compute(*args)
    )
    torch.autograd.grad(loss, input, retain_graph=True)
    torch.autograd.grad(loss, W)
    assert found == [(True, False, False), (False, True, False)]


def test_the_last_part_is_not_copied(uncompiled):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    loss = linear_self_regularized_entropy(input, W, target)
    saved = loss.grad_fn.saved_tensors
    torch.autograd.grad(loss, input, retain_graph=True)
    (of_weight,) = torch.autograd.grad(loss, W)
    assert of_weight.data_ptr() == saved[2].data_ptr()


def stage_of(fused, last):
    class Stage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(D, D), None
            if last:
                self.head = LinearSelfRegularizedEntropyLoss(D, K, bias=True, reduction="sum")
                self.loss = SelfRegularizedEntropyLoss(reduction="sum")

        def forward(self, x, labels):
            x = self.body(x).relu()
            if not last:
                return x
            return self.head(x, labels) if fused else self.loss(self.head.linear(x), labels)

    return Stage()


def splits_functions():
    """Whether this PyTorch's pipelines split the backward of any Function that is written in Python."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, gradient):
            x, w = ctx.saved_tensors
            return gradient * w, gradient * x

    x, w = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    _, groups = stage_backward_input([Product.apply(x, w)], None, [x], iter([w]))
    try:
        stage_backward_weight(iter([w]), groups)
    except RuntimeError as error:
        return "_input_metadata" not in str(error)
    return True


def pipelined(group, name, fused):
    """Of the stages of this rank: gradients, and those without a pipeline; and the losses of micro-batches."""
    from torch.distributed import pipelining

    count, rank, device = 4, group.rank(), torch.device("cpu")
    torch.manual_seed(0)
    stages, alone = ([stage_of(fused, last=i == count - 1) for i in range(count)] for _ in range(2))
    for stage, other in zip(stages, alone, strict=True):
        other.load_state_dict(stage.state_dict())
    x, labels = torch.randn(8, D), torch.randint(K, (8,))
    whole = x
    for stage in alone:
        whole = stage(whole, labels)
    (whole / count).backward()

    mine = ([0, 3], [1, 2])[rank] if "ZBV" in name else (rank, rank + 2)
    here = [pipelining.PipelineStage(stages[i], i, count, device, group=group) for i in mine]
    schedule = getattr(pipelining, name)(here, n_microbatches=count, loss_fn=lambda loss, _: loss)
    losses = []
    first, more = (x,) if 0 in mine else (), {"losses": losses} if 3 in mine else {}
    schedule.step(*first, target=labels, labels=labels, return_outputs=False, **more)
    gradients = [[p.grad for i in mine for p in network[i].parameters()] for network in (stages, alone)]
    return *gradients, losses, whole


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("ScheduleInterleavedZeroBubble", False),
        ("ScheduleInterleavedZeroBubble", True),
        ("ScheduleZBVZeroBubble", True),
    ],
)
def test_pipelines_with_a_backward_in_two_parts(name, fused, ranks):
    if fused and not splits_functions():
        pytest.skip("this PyTorch splits the backward of no autograd.Function")
    for found, alone, losses, whole in ranks.run(2, pipelined, name, fused):
        torch.testing.assert_close(found, alone)
        if losses:
            torch.testing.assert_close(sum(losses), whole)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_cannot_be_differentiated(reduction, row_backend):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    loss = linear_self_regularized_entropy(input, W, target, reduction=reduction, backend=row_backend).sum()
    gradients = torch.autograd.grad(loss, (input, W), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="backend='eager'"):
            gradient.norm().backward(retain_graph=True)


def test_eager_is_differentiable_twice():
    *tensors, target, _ = linear_problem((3,), 4, 5, {}, dtype=torch.float64)

    def loss(*tensors):
        return linear_self_regularized_entropy(
            tensors[0], tensors[1], target, linear_bias=tensors[2], backend="eager", c=0.1
        )

    assert torch.autograd.gradgradcheck(loss, tuple(tensor.detach().requires_grad_() for tensor in tensors))


def test_probabilities_that_want_a_gradient_take_the_plain_path():
    input, W, _, target, _ = linear_problem((N,), D, K, {}, probabilities=True)
    target.requires_grad_()
    linear_self_regularized_entropy(input, W, target).backward()
    assert target.grad is not None
    with pytest.raises(ValueError, match="backend: expected 'eager' or None"):
        linear_self_regularized_entropy(input, W, target, backend="compile")


def test_backward_does_nothing_where_the_upstream_gradient_is_1(monkeypatch, uncompiled):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    found = []
    compute = chunks.losses_and_gradients
    monkeypatch.setattr(
        linear_primitive, "losses_and_gradients", lambda *args: found.append(compute(*args)) or found[-1]
    )
    loss = linear_self_regularized_entropy(input, W, target)
    of_weight = found[0][2]
    address, version = of_weight.data_ptr(), of_weight._version
    loss.backward()
    assert W.grad.data_ptr() == address
    assert of_weight._version == version


# -- with the rest of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@reductions
def test_autocast(reduction, dtype, monkeypatch, quick_backend):
    dtypes, compute = [], chunks.losses_and_gradients
    monkeypatch.setattr(
        linear_primitive, "losses_and_gradients", lambda *args: dtypes.append(args[7].dtype) or compute(*args)
    )
    tensors = [tensor.detach().requires_grad_() for tensor in linear_problem((N,), D, K, {})[:3]]
    target = linear_problem((N,), D, K, {})[3]
    device = target.device.type
    upstream = torch.ones(()).expand(N if reduction == "none" else ())
    keywords = {"reduction": reduction, "chunk_rows": 4, "backend": quick_backend, "upstream": upstream}
    with torch.autocast(device, dtype=dtype):
        loss, _, gradients = loss_and_gradients(*tensors, target, **keywords)
    assert set(dtypes) == (set() if quick_backend == "eager" else {dtype})
    assert loss.dtype == torch.float32
    true_loss, _, true_gradients, _ = linear_truth(*tensors, target, reduction=reduction, upstream=upstream)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    for ours, true in zip(gradients, true_gradients, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - true).norm() <= 4 * ROUNDING[dtype] * true.norm()
    if reduction == "mean" and quick_backend != "eager":  # the gradients of parameters are never rounded
        ours = gradients[1]
        assert not torch.equal(ours, ours.to(dtype).float())


@pytest.mark.parametrize("chunk_rows", [4, 64])
def test_autocast_to_another_half_precision(chunk_rows, row_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {}, dtype=torch.float16)
    with torch.autocast(target.device.type, dtype=torch.bfloat16):
        _, _, gradients = loss_and_gradients(*tensors, target, chunk_rows=chunk_rows, backend=row_backend)
    for ours, true in zip(gradients, linear_truth(*tensors, target)[2], strict=True):
        assert ours.dtype == torch.float16
        assert (ours.double() - true).norm() <= 4 * ROUNDING[torch.bfloat16] * true.norm()


def test_small_gradients_survive_float16(row_backend):
    # The mean over so many rows takes a gradient below what float16 holds, before the loss scaler multiplies it.
    input, W, b, target, _ = linear_problem((128,), D, 1000, {}, dtype=torch.float16)
    scaled = loss_and_gradients(input, W, b, target, upstream=torch.tensor(2.0**16), backend=row_backend)[2]
    true = linear_truth(input, W, b, target, upstream=torch.tensor(2.0**16))[2]
    for ours, expected in zip(scaled, true, strict=True):
        assert (ours.double() - expected).norm() <= 4 * ROUNDING[torch.float16] * expected.norm()


def test_sums_over_rows_may_be_too_large_for_float16(uncompiled):
    tensors = torch.full((2048, 8), 64.0).half(), torch.zeros(16, 8).half(), torch.zeros(16).half()
    _, _, (_, of_weight, _) = loss_and_gradients(*tensors, torch.zeros(2048, dtype=torch.long), reg_weight=0)
    expected = torch.full((16, 1), 1 / 16)
    expected[0] -= 1
    torch.testing.assert_close(of_weight.float(), 64 * expected.expand(16, 8), rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_in_float16(reduction, uncompiled):
    torch.compiler.reset()
    *tensors, target, _ = linear_problem((N,), D, K, {}, dtype=torch.float16)
    compiled = torch.compile(linear_self_regularized_entropy, fullgraph=True, backend="aot_eager")
    input, W = (tensor.detach().clone().requires_grad_() for tensor in tensors[:2])
    loss = compiled(input, W, target, reduction=reduction)
    upstream = torch.full_like(loss, 1024.0)
    loss.backward(upstream)
    expected = loss_and_gradients(*tensors[:2], None, target, reduction=reduction, upstream=upstream)[2]
    torch.testing.assert_close([input.grad, W.grad], expected[:2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["default", "all"])
def test_fullgraph_compile(name, reduction, row_backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"reduction": reduction, "chunk_rows": 4, "backend": row_backend}
    compiled = torch.compile(
        lambda x, W, b, t, weight: linear_self_regularized_entropy(
            x, W, t, linear_bias=b, return_parts=True, **options, **OPTIONS[name] | {"weight": weight}
        ),
        fullgraph=True,
        backend=counter,
    )
    for rows in (6, 7, 20, 3):
        *tensors, target, given = linear_problem((rows,), D, K, OPTIONS[name])
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        loss, parts = compiled(*leaves, target, given.get("weight"))
        upstream = torch.full_like(loss, 2.0)
        loss.backward(upstream)
        eager = loss_and_gradients(*tensors, target, upstream=upstream, **options, **given)
        torch.testing.assert_close((loss.detach(), parts, [leaf.grad for leaf in leaves]), eager)
    assert counter.frame_count <= 2


def test_inductor(uncompiled):
    torch.compiler.reset()
    *tensors, target, _ = linear_problem((N,), D, K, {}, dtype=torch.bfloat16)
    head = LinearSelfRegularizedEntropyLoss(D, K, dtype=torch.bfloat16, label_smoothing=0.1)
    compiled = torch.compile(lambda x: head(torch.relu(x), target), fullgraph=True)
    compiled(tensors[0]).backward()
    expected = tensors[0].detach().clone().requires_grad_()
    of_weight, head.linear.weight.grad = head.linear.weight.grad, None
    head(torch.relu(expected), target).backward()
    torch.testing.assert_close(tensors[0].grad, expected.grad)
    torch.testing.assert_close(of_weight, head.linear.weight.grad)


def test_functorch(quick_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    tensors = [tensor.detach() for tensor in tensors]
    _, _, expected = loss_and_gradients(*tensors, target, backend="eager")

    def loss(x, W, b, t, reduction="mean"):
        return linear_self_regularized_entropy(x, W, t, linear_bias=b, reduction=reduction, backend=quick_backend)

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors, target)
    torch.testing.assert_close(gradients, tuple(expected))
    of_samples = torch.vmap(torch.func.grad(loss, argnums=(1, 2)), in_dims=(0, None, None, 0))(*tensors, target)
    torch.testing.assert_close(tuple(g.mean(0) for g in of_samples), tuple(expected[1:]))
    batched = torch.vmap(loss, in_dims=(0, None, None, 0))(*tensors, target)
    torch.testing.assert_close(batched, loss(*tensors, target, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_integers_of_other_widths_as_class_indices(dtype, quick_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    target[2] = -100
    for keywords in ({"backend": quick_backend}, {"backend": quick_backend, "reduction": "none"}):
        expected, found = (loss_and_gradients(*tensors, t, **keywords) for t in (target, target.to(dtype)))
        assert all(map(torch.equal, (found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2])))


def test_of_other_widths_in_transforms_and_while_compiling(row_backend):
    *tensors, target, _ = linear_problem((N,), D, K, {})
    x, W, b = (tensor.detach() for tensor in tensors)

    def loss(x, t):
        return linear_self_regularized_entropy(x, W, t, linear_bias=b, backend=row_backend)

    narrow = target.to(torch.int8)
    of_samples = torch.vmap(torch.func.grad(loss))
    assert torch.equal(of_samples(x, narrow), of_samples(x, target))
    torch.compiler.reset()
    graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(graph(x, narrow), loss(x, target))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction, use_reentrant, row_backend):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    loss = torch.utils.checkpoint.checkpoint(
        lambda x, W: linear_self_regularized_entropy(x * 1, W, target, reduction=reduction, backend=row_backend).sum(),
        input,
        W,
        use_reentrant=use_reentrant,
    )
    loss.backward()
    zero = torch.zeros(K)
    factor = N if reduction == "none" else 1
    _, _, (of_input, of_weight, _), _ = linear_truth(input, W, zero, target)
    torch.testing.assert_close(input.grad.double(), factor * of_input, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(W.grad.double(), factor * of_weight, rtol=1e-4, atol=1e-6)


def test_tied_embeddings_receive_their_gradient_once(quick_backend):
    embedding, tokens = torch.nn.Embedding(K, D), torch.randint(K, (2, 9))
    head = LinearSelfRegularizedEntropyLoss(D, K, backend=quick_backend)
    head.linear.weight = embedding.weight
    assert len(list(torch.nn.ModuleList([embedding, head]).parameters())) == 1
    calls = []
    embedding.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    labels = tokens.roll(-1, 1)
    head(embedding(tokens), labels).backward()
    table = embedding.weight.detach().double().requires_grad_()
    logits = F.linear(F.embedding(tokens, table), table)
    self_regularized_entropy(logits.flatten(0, 1), labels.flatten(), backend="eager").backward()
    torch.testing.assert_close(embedding.weight.grad.double(), table.grad, rtol=1e-4, atol=1e-6)
    assert len(calls) == 1


def test_meta_and_fake_tensors(row_backend):
    input, W, _, target, _ = linear_problem((N,), D, K, {})
    on_meta = [tensor.detach().to("meta").requires_grad_() for tensor in (input, W)]
    loss = linear_self_regularized_entropy(*on_meta, target.to("meta"), backend="compile")
    loss.backward()
    assert [leaf.grad.shape for leaf in on_meta] == [(N, D), (K, D)]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(input)
        assert linear_self_regularized_entropy(fake, W, target, backend=row_backend).shape == ()


# -- the module -------------------------------------------------------------------------------------------------------


def test_module_owns_its_layer_as_pytorchs_does(uncompiled):
    module = LinearSelfRegularizedEntropyLoss(D, K, bias=True, weight=torch.rand(K), class_mean=True, chunk_rows=3)
    assert set(module.state_dict()) == {"weight", "linear.weight", "linear.bias"}
    assert module.linear.weight.shape == (K, D)
    features, target = torch.randn(2, 5, D), torch.randint(K, (2, 5))
    plain = SelfRegularizedEntropyLoss(module.weight, class_mean=True)
    logits = module.linear(features).flatten(0, 1)
    torch.testing.assert_close(module(features, target), plain(logits, target.flatten()))
    other = copy.deepcopy(module)
    other.reduction = "none"
    assert other(features, target).shape == (2, 5)
    assert repr(module).startswith(
        "LinearSelfRegularizedEntropyLoss(\n  chunk_rows=3, class_mean=True\n  (linear): Linear("
    )
    assert LinearSelfRegularizedEntropyLoss(D, K, dtype=torch.float64).linear.weight.dtype == torch.float64
