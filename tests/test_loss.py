"""The public contract, sentence by sentence, apart from the numbers themselves."""

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, loss_and_gradient, problem, truth
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from sre_triton import Parts, SelfRegularizedEntropyLoss, messages, reference, self_regularized_entropy
from sre_triton.compiled import inductor
from sre_triton.compiled import uncompiled as uncompiled_passes

modes = pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])


@pytest.fixture
def rows():
    logits, target, _ = problem(6, 20, {})
    return logits.requires_grad_(), target


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(20,), (6, 20), (2, 20, 3)], ids=str)
def test_parts_are_detached_and_add_up(shape, reduction, quick_backend):
    dim = min(1, len(shape) - 1)
    logits = torch.randn(shape).requires_grad_()
    target = torch.randint(20, shape[:dim] + shape[dim + 1 :])
    keywords = {"reg_weight": 0.5, "z_loss": 0.1, "class_mean": True, "reduction": reduction, "backend": quick_backend}
    loss, parts = self_regularized_entropy(logits, target, return_parts=True, **keywords)
    assert isinstance(parts, Parts)
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts)
    assert all(part.shape == loss.shape for part in parts)
    torch.testing.assert_close(loss.detach(), parts.cross_entropy - 0.5 * parts.regularizer + parts.z_loss)
    torch.testing.assert_close(self_regularized_entropy(logits, target, **keywords), loss)


def test_reg_weight_as_tensor_gets_no_gradient(rows, quick_backend):
    logits, target = rows
    reg_weight = torch.tensor(0.3, requires_grad=True)
    loss = self_regularized_entropy(logits, target, reg_weight=reg_weight, backend=quick_backend)
    loss.backward()
    assert reg_weight.grad is None
    torch.testing.assert_close(loss, self_regularized_entropy(logits, target, reg_weight=0.3, backend=quick_backend))


@pytest.mark.parametrize("denominator", [7, 2.5, torch.tensor(4), torch.tensor(3.0)], ids=str)
def test_denominator(denominator, rows, quick_backend):
    logits, target = rows
    mean = loss_and_gradient(logits, target, denominator=denominator, backend=quick_backend)
    total = loss_and_gradient(logits, target, reduction="sum", backend=quick_backend)
    torch.testing.assert_close(mean[0], total[0] / denominator)
    torch.testing.assert_close(torch.stack(mean[1]), torch.stack(total[1]) / denominator)
    torch.testing.assert_close(mean[2], total[2] / denominator)


def test_gradient_accumulation_equals_one_batch(quick_backend):
    logits, target, _ = problem(8, 20, {})
    target[[1, 2, 6]] = -100
    items = (target != -100).sum()
    _, _, whole = loss_and_gradient(logits, target, backend=quick_backend)
    for how in ({"denominator": items}, {"reduction": "sum", "upstream": 1 / items}):
        parts = [
            loss_and_gradient(logits[i : i + 4], target[i : i + 4], backend=quick_backend, **how)[2] for i in (0, 4)
        ]
        torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tensor_options_of_another_dtype(dtype, quick_backend):
    logits, target, _ = problem(6, 300, {})
    keywords = {"class_mean": True, "backend": quick_backend}
    options = {"reg_weight": torch.tensor(1.0, dtype=dtype), "denominator": torch.tensor(6.0, dtype=dtype)}
    loss, _, gradient = loss_and_gradient(logits, target, **keywords, **options)
    assert loss.dtype == torch.float32
    expected, _, expected_gradient = loss_and_gradient(logits, target, **keywords)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_class_mean_divides_by_the_wrong_classes(rows, quick_backend):
    logits, target = rows
    _, plain = self_regularized_entropy(logits, target, return_parts=True, backend=quick_backend)
    _, mean = self_regularized_entropy(logits, target, class_mean=True, return_parts=True, backend=quick_backend)
    torch.testing.assert_close(mean.regularizer, plain.regularizer / 19)
    one = torch.randn(3, 1)
    loss, parts = self_regularized_entropy(one, torch.zeros(3).long(), class_mean=True, return_parts=True)
    assert loss == 0
    assert parts.regularizer == 0


def test_warns_once_of_many_classes(monkeypatch, uncompiled):
    target = torch.tensor([3])

    def warned(K, **keywords):
        monkeypatch.setattr(messages, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                self_regularized_entropy(torch.zeros(1, K), target, **keywords)
        assert all("class_mean=True" in str(warning.message) for warning in caught)
        assert all(warning.filename == __file__ for warning in caught)
        return len(caught)

    for reg_weight in (1.0, 0.9, 0.5, 2, -0.5, 1e-9, torch.tensor(0.5)):
        assert warned(256, reg_weight=reg_weight) == 1
        for silent in ({"K": 255}, {"K": 1000, "class_mean": True}, {"K": 1000, "class_mean": False}):
            assert warned(reg_weight=reg_weight, **silent) == 0
    for nothing in (0, 0.0, -0.0, torch.tensor(0.0), torch.tensor(0)):
        assert warned(1000, reg_weight=nothing) == 0


def test_warns_of_many_classes_where_reg_weight_is_not_read(monkeypatch, uncompiled):
    def warned(function, K, reg_weight):
        monkeypatch.setattr(messages, "_warned", set())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function(torch.zeros(2, K), torch.zeros(2, dtype=torch.long), reg_weight)
        assert all(warning.filename == __file__ for warning in caught)
        return len(caught)

    def loss(z, t, reg_weight):
        return self_regularized_entropy(z, t, reg_weight=reg_weight)

    # A meta tensor has no value, as if it were on a GPU.
    assert warned(lambda z, t, _: loss(z.to("meta"), t.to("meta"), torch.zeros((), device="meta")), 300, None) == 1
    assert warned(torch.vmap(loss, in_dims=(None, None, 0)), 300, torch.zeros(2)) == 1

    torch.compiler.reset()
    counter = CompileCounter()
    graph = torch.compile(loss, fullgraph=True, backend=counter)
    assert warned(graph, 300, torch.tensor(0.0)) == 1
    assert counter.frame_count == 1
    for value in (0.5, 0.0, 1.0):
        assert warned(graph, 300, torch.tensor(value)) == 0  # it is said as the graph is traced
    assert counter.frame_count == 1
    torch.compiler.reset()
    assert warned(torch.compile(loss, fullgraph=True, backend="eager"), 255, torch.tensor(0.5)) == 0


def test_a_z_loss_that_is_not_in_use_is_0_in_a_row_of_nan_too(quick_backend):
    logits, target, _ = problem(3, 20, {})
    logits[1, 4] = torch.nan
    _, parts = self_regularized_entropy(logits, target, reduction="none", return_parts=True, backend=quick_backend)
    assert parts.cross_entropy.isnan().tolist() == [False, True, False]
    assert (parts.z_loss == 0).all()
    _, parts = reference.self_regularized_entropy(logits, target, reduction="none")
    assert (parts.z_loss == 0).all()


def test_out_of_range_target_while_compiling_spoils_its_own_row_only(backend):
    logits, target, _ = problem(4, 20, {})
    target[1], target[2] = 20, -7
    loss = torch.compile(
        lambda z: self_regularized_entropy(z, target, backend=backend), fullgraph=True, backend="aot_eager"
    )
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert value.isnan()
    assert leaf.grad[[1, 2]].isnan().all()
    _, _, gradient = loss_and_gradient(logits[[0, 3]], target[[0, 3]], denominator=4)
    torch.testing.assert_close(leaf.grad[[0, 3]], gradient)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradcheck(uncompiled):
    logits, target, options = problem(3, 5, OPTIONS["all"], dtype=torch.float64)
    for reduction in ("mean", "none"):

        def loss(z, reduction=reduction):
            return self_regularized_entropy(z, target, recompute=True, reduction=reduction, **options)

        assert torch.autograd.gradcheck(loss, logits.requires_grad_(), fast_mode=True)


@modes
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0])
def test_upstream_gradient(factor, recompute, rows, quick_backend):
    logits, target = rows
    _, _, gradient = loss_and_gradient(
        logits, target, upstream=torch.tensor(factor), recompute=recompute, backend=quick_backend
    )
    torch.testing.assert_close(gradient.double(), factor * truth(logits, target)[2], rtol=1e-4, atol=1e-7)


def test_second_backward_in_a_single_pass_names_recompute(rows):
    logits, target = rows
    for retain in (False, True):
        loss = self_regularized_entropy(logits, target)
        loss.backward(retain_graph=retain)
        with pytest.raises(RuntimeError, match="recompute=True"):
            loss.backward()


def test_second_backward_works_with_recompute(rows):
    logits, target = rows
    loss = self_regularized_entropy(logits, target, recompute=True)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


@modes
def test_double_backward_names_eager(recompute, rows):
    logits, target = rows
    loss = self_regularized_entropy(logits, target, recompute=recompute)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    torch.testing.assert_close(gradient, truth(logits, target)[2].float())
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.square().sum().backward()


def test_eager_is_differentiable_twice():
    logits, target, _ = problem(3, 5, {}, dtype=torch.float64)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: self_regularized_entropy(z, target, backend="eager"), leaf)


def test_stored_gradient_is_handed_over_without_a_copy(rows, row_backend):
    stored = []

    def pack(tensor):
        stored.append(tensor.data_ptr())
        return tensor

    logits, target = rows
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = self_regularized_entropy(logits, target, backend=row_backend)
    loss.backward(torch.tensor(2.0))
    assert stored == [logits.grad.data_ptr()]
    assert logits.grad.grad_fn is None


def test_no_gradient_is_computed_that_nobody_wants(rows, monkeypatch, uncompiled):
    monkeypatch.setattr(uncompiled_passes._Block, "gradient", lambda *_: pytest.fail("a gradient was computed"))
    monkeypatch.setattr(uncompiled_passes, "ordinary", lambda *_: pytest.fail("a gradient was computed"))
    logits, target = rows
    expected = truth(logits, target)[0].float()
    with torch.no_grad():
        torch.testing.assert_close(self_regularized_entropy(logits, target, inplace=True), expected)
    with torch.inference_mode():
        torch.testing.assert_close(self_regularized_entropy(logits, target), expected)
    torch.testing.assert_close(self_regularized_entropy(logits.detach(), target), expected)


@pytest.mark.parametrize(
    ("dtype", "reduction", "recomputes"),
    [
        (torch.float32, "mean", False),
        (torch.bfloat16, "sum", False),
        (torch.float16, "mean", True),
        (torch.float32, "none", True),
    ],
    ids=str,
)
def test_recompute_chosen_by_dtype_and_reduction(dtype, reduction, recomputes, rows, row_backend):
    logits, target = rows
    logits = logits.detach().to(dtype).requires_grad_()
    loss = self_regularized_entropy(logits, target, reduction=reduction, backend=row_backend).sum()
    loss.backward(retain_graph=True)
    if recomputes:
        loss.backward()
    else:
        with pytest.raises(RuntimeError, match="recompute=True"):
            loss.backward()


def test_loss_may_be_changed_in_place(rows, quick_backend):
    logits, target = rows
    for reduction in ("mean", "none"):
        loss = self_regularized_entropy(logits, target, reduction=reduction, backend=quick_backend)
        loss /= 2
        loss.sum().backward()


@modes
@pytest.mark.parametrize("name", ["default", "all"])
def test_no_value_is_read_on_a_device(name, recompute, backend):
    # A meta tensor has no values: reading one raises. (inplace does nothing there.)
    logits, target, options = problem(6, 20, OPTIONS[name])
    options = {name: value.to("meta") if name == "weight" else value for name, value in options.items()}
    leaf = logits.to("meta").requires_grad_()
    options |= {"recompute": recompute, "backend": backend, "inplace": True}
    loss = self_regularized_entropy(leaf * 1, target.to("meta"), **options)
    loss.backward()
    assert (loss.shape, leaf.grad.shape, leaf.grad.device.type) == ((), (6, 20), "meta")


def test_threads(uncompiled):
    logits, target, _ = problem(64, 300, {})
    expected = loss_and_gradient(logits, target)[2]
    with ThreadPoolExecutor(4) as pool:
        for gradient in pool.map(lambda _: loss_and_gradient(logits, target)[2], range(16)):
            assert torch.equal(gradient, expected)


# -- inplace ----------------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("view", ["itself", "view", "columns"])
def test_inplace_takes_the_storage_of_the_logits(view, reduction, recompute, row_backend):
    source, target, _ = problem(6, 20, {})
    source.requires_grad_()
    logits = source * 1.0
    seen = {"itself": lambda: logits, "view": lambda: logits.view(-1, 20), "columns": lambda: logits[:, :15]}[view]()
    target = target % seen.shape[1]
    values, version = seen.detach().clone(), logits._version
    caught = []
    logits.register_hook(lambda gradient: caught.append(gradient.clone()))
    loss = self_regularized_entropy(
        seen, target, inplace=True, recompute=recompute, reduction=reduction, backend=row_backend
    )
    if recompute:
        assert logits._version == version
    loss.sum().backward()
    assert logits._version > version
    _, _, gradient = loss_and_gradient(values, target, reduction=reduction, backend=row_backend)
    torch.testing.assert_close(seen.detach(), gradient)
    torch.testing.assert_close(caught[0][:, : seen.shape[1]], gradient)
    torch.testing.assert_close(source.grad[:, : seen.shape[1]], gradient)


@pytest.mark.parametrize("uncompiled", [set(), {"cpu"}], ids=["compiled", "uncompiled"])
def test_inplace_is_seen_by_autograd(uncompiled, monkeypatch):
    monkeypatch.setattr(inductor, "_uncompiled", uncompiled)
    monkeypatch.setattr(inductor, "_compiled", {})
    source, target, _ = problem(6, 20, {}, probabilities=True)
    logits = source.requires_grad_().exp()  # whose backward reads its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        self_regularized_entropy(logits, target, inplace=True).backward()


def test_inplace_refuses_leaves_and_transforms(rows):
    logits, target = rows
    for leaf in (logits, logits.view(-1, 20)):
        with pytest.raises(ValueError, match="inplace: expected False for logits that are a leaf"):
            self_regularized_entropy(leaf, target, inplace=True)
    with pytest.raises(ValueError, match=r"inplace: expected False under torch.func"):
        torch.func.grad(lambda z: self_regularized_entropy(z, target, inplace=True))(logits.detach())


def test_without_inplace_the_logits_stay(rows, quick_backend):
    logits, target = rows
    values, version = logits.detach().clone(), logits._version
    self_regularized_entropy(logits * 1, target, backend=quick_backend).backward()
    self_regularized_entropy(logits, target, backend=quick_backend).backward()
    assert torch.equal(logits.detach(), values)
    assert logits._version == version


def test_inplace_on_overlapping_rows_is_out_of_place(row_backend):
    source = torch.randn(1, 20).requires_grad_()
    logits = (source * 1).expand(4, 20)
    self_regularized_entropy(logits, torch.arange(4), inplace=True, backend=row_backend).backward()
    expected = source.detach().clone().requires_grad_()
    self_regularized_entropy(expected.expand(4, 20), torch.arange(4), backend=row_backend).backward()
    torch.testing.assert_close(source.grad, expected.grad)


# -- with the rest of PyTorch -----------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("name", ["default", "all"])
def test_fullgraph_compile(name, recompute, quick_backend):
    assert_graph_is_the_loss(name, recompute, quick_backend)


def test_fullgraph_compile_with_inductor():
    assert_graph_is_the_loss("default", False, "compile")  # other options change nothing of the graph but the op


def assert_graph_is_the_loss(name, recompute, backend):
    torch.compiler.reset()
    logits, target, options = problem(6, 20, OPTIONS[name])
    options |= {"recompute": recompute, "backend": backend, "return_parts": True}
    compiler = "inductor" if backend == "compile" and not recompute else "aot_eager"
    compiled = torch.compile(lambda z, t: self_regularized_entropy(z, t, **options), fullgraph=True, backend=compiler)
    _, _, gradient = truth(logits, target, **{name: options[name] for name in options if name in OPTIONS["all"]})
    for dtype in (torch.float32, torch.bfloat16) if name == "default" else (torch.float32,):
        leaf = logits.detach().clone().to(dtype).requires_grad_()
        loss, parts = compiled(leaf, target)
        loss.backward(torch.tensor(2.0))
        eager_loss, eager_parts = self_regularized_entropy(leaf.detach(), target, **options)
        torch.testing.assert_close((loss.detach(), *parts), (eager_loss, *eager_parts))
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(leaf.grad.double(), 2 * gradient, rtol=tolerance, atol=tolerance / 100)


def test_compiled_graph_is_not_compiled_again_for_another_reg_weight(row_backend):
    torch.compiler.reset()
    counter = CompileCounter()
    logits, target, _ = problem(6, 20, {})
    compiled = torch.compile(
        lambda z, weight: self_regularized_entropy(z, target, reg_weight=weight, backend=row_backend),
        fullgraph=True,
        backend=counter,
    )
    for value in (0.1, 0.2, 0.3, 0.4):
        loss = compiled(logits, torch.tensor(value))
        torch.testing.assert_close(
            loss, self_regularized_entropy(logits, target, reg_weight=value, backend=row_backend)
        )
    assert counter.frame_count == 1


@modes
def test_compiled_graph_takes_every_batch_size(recompute, row_backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda z, t: self_regularized_entropy(z, t, recompute=recompute, backend=row_backend),
        fullgraph=True,
        backend=counter,
    )
    for N in (6, 7, 20, 3):
        logits, target, _ = problem(N, 20, {})
        leaf = logits.clone().requires_grad_()
        compiled(leaf, target).backward()
        torch.testing.assert_close(leaf.grad, loss_and_gradient(logits, target, backend=row_backend)[2])
    assert counter.frame_count <= 2  # one for the first size, one for all


@pytest.mark.parametrize("case", ["probabilities", "denominator"])
def test_compiled_graph_takes_every_number_of_rows(case, row_backend):
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(self_regularized_entropy, fullgraph=True, backend=counter)
    for N in range(4, 10):
        logits, target, _ = problem(6 if case == "denominator" else N, 20, {}, probabilities=case == "probabilities")
        keywords = {"denominator": N} if case == "denominator" else {}
        torch.testing.assert_close(
            compiled(logits, target, **keywords),
            self_regularized_entropy(logits, target, **keywords, backend=row_backend),
        )
    assert counter.frame_count <= 2


def test_compiling_ignores_inplace(row_backend):
    torch.compiler.reset()
    logits, target, _ = problem(6, 20, {})
    leaf = logits.clone().requires_grad_()
    torch.compile(
        lambda z: self_regularized_entropy(z, target, inplace=True, backend=row_backend), backend="aot_eager"
    )(leaf).backward()
    assert torch.equal(leaf.detach(), logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_logits_that_numpy_changes_change_a_gradient_that_is_still_to_be_computed(recompute, uncompiled):
    logits, target, _ = problem(6, 20, {})
    _, _, gradient = loss_and_gradient(logits, target, recompute=recompute)
    leaf = logits.clone().requires_grad_()
    loss = self_regularized_entropy(leaf, target, recompute=recompute)
    leaf.detach().numpy()[:] *= 2
    loss.backward()
    assert torch.equal(leaf.grad, gradient) != recompute
    assert "NumPy" in self_regularized_entropy.__doc__.split("recompute:")[1].split("return_parts:")[0]


@modes
def test_functorch(recompute, rows, quick_backend):
    logits, target = rows[0].detach(), rows[1]
    keywords = {"recompute": recompute, "backend": quick_backend}
    _, _, gradient = loss_and_gradient(logits, target, reduction="sum", backend="eager")

    def loss(z, t):
        return self_regularized_entropy(z, t, **keywords)

    torch.testing.assert_close(torch.func.grad(loss)(logits, target), gradient / 6)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(logits, target), gradient)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(logits[:, None], target[:, None])[:, 0], gradient)
    torch.testing.assert_close(
        torch.vmap(loss, in_dims=(None, 1))(logits, torch.stack([target, target.flip(0)], 1)),
        torch.stack([loss(logits, target), loss(logits, target.flip(0))]),
    )
    batched = torch.vmap(lambda weight: self_regularized_entropy(logits, target, reg_weight=weight, **keywords))
    expected = [self_regularized_entropy(logits, target, reg_weight=weight, **keywords) for weight in (0.0, 2.0)]
    torch.testing.assert_close(batched(torch.tensor([0.0, 2.0])), torch.stack(expected))
    narrow = target.to(torch.int8)
    assert torch.equal(
        torch.vmap(torch.func.grad(loss))(logits, narrow), torch.func.vmap(torch.func.grad(loss))(logits, target)
    )
    jacobian = torch.func.jacrev(lambda z: self_regularized_entropy(z, target, reduction="none", **keywords))(logits)
    torch.testing.assert_close(jacobian.diagonal(dim1=0, dim2=1).T, gradient)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8], ids=str)
def test_fullgraph_compile_of_class_indices_of_other_widths(dtype, row_backend):
    torch.compiler.reset()
    logits, target, _ = problem(6, 20, {})
    target[1] = -100
    graph = torch.compile(
        lambda z, t: self_regularized_entropy(z, t, backend=row_backend), fullgraph=True, backend="aot_eager"
    )
    leaf = logits.clone().requires_grad_()
    loss = graph(leaf, target.to(dtype))
    loss.backward()
    expected, _, gradient = loss_and_gradient(logits, target, backend=row_backend)
    torch.testing.assert_close((loss.detach(), leaf.grad), (expected, gradient))


def test_transforms_inside_compile(rows):
    torch.compiler.reset()
    logits, target = rows[0].detach(), rows[1]
    _, _, gradient = loss_and_gradient(logits, target, reduction="sum", backend="eager")
    for transform in (
        lambda z, t: torch.func.grad(lambda a: self_regularized_entropy(a, t, reduction="sum"))(z),
        lambda z, t: torch.vmap(torch.func.grad(self_regularized_entropy))(z, t),
    ):
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(logits, target), gradient)


@modes
def test_batched_gradients(recompute, rows, row_backend):
    logits, target = rows
    loss = self_regularized_entropy(logits, target, reduction="none", recompute=recompute, backend=row_backend)
    (jacobian,) = torch.autograd.grad(loss, logits, torch.eye(6), is_grads_batched=True)
    _, _, gradient = loss_and_gradient(logits, target, reduction="sum", backend=row_backend)
    torch.testing.assert_close(jacobian, torch.diag_embed(gradient.T).permute(1, 2, 0))


@modes
def test_backward_can_be_traced(recompute, rows, row_backend):
    logits, target = rows[0].detach(), rows[1]

    def gradient(z):
        z = z.detach().requires_grad_()
        return torch.autograd.grad(self_regularized_entropy(z, target, recompute=recompute, backend=row_backend), z)[0]

    traced = torch.fx.experimental.proxy_tensor.make_fx(gradient)(logits)
    torch.testing.assert_close(traced(logits), gradient(logits))


def test_another_default_device(rows, quick_backend):
    with torch.device("meta"):
        loss = self_regularized_entropy(*rows, z_loss=0.1, backend=quick_backend)
    assert loss.device == rows[0].device


@modes
def test_functorch_says_no_to_second_derivatives(recompute, rows):
    logits, target = rows[0].detach(), rows[1]

    def norm(z):
        return torch.func.grad(lambda z: self_regularized_entropy(z, target, recompute=recompute))(z).norm()

    with pytest.raises(RuntimeError, match="backend='eager'"):
        torch.func.grad(norm)(logits)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda z: self_regularized_entropy(z, target, recompute=recompute), (logits,), (logits,))
    with pytest.raises(NotImplementedError), torch.autograd.forward_ad.dual_level():
        self_regularized_entropy(torch.autograd.forward_ad.make_dual(logits, logits), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, row_backend):
    layer, features = torch.nn.Linear(8, 20), torch.randn(6, 8)
    weight = torch.rand(20)
    target = torch.arange(6)
    with torch.autocast(features.device.type, dtype=dtype):
        logits = layer(features)
        ours = self_regularized_entropy(logits, target, weight, reg_weight=0, backend=row_backend)
        theirs = F.cross_entropy(logits, target, weight)
    assert logits.dtype == dtype
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_grad_scaler_saves_small_half_precision_gradients(row_backend):
    logits, target, _ = problem(64, 10, {}, spread=0.1)
    scaler = torch.amp.GradScaler(logits.device.type, init_scale=2.0**16)
    weight = torch.eye(10).requires_grad_()
    with torch.autocast(logits.device.type, dtype=torch.float16):
        # Divided by so much, a gradient is 0 in float16.
        loss = self_regularized_entropy(logits @ weight, target, denominator=2.0**26, backend=row_backend)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    expected = torch.eye(10, dtype=torch.float64).requires_grad_()
    self_regularized_entropy(logits.double() @ expected, target, denominator=2.0**26).backward()
    assert (weight.grad.double() - expected.grad).norm() <= 5e-3 * expected.grad.norm()


@pytest.mark.parametrize("use_reentrant", [False, True])
@modes
def test_activation_checkpointing(recompute, use_reentrant, rows, row_backend):
    logits, target = rows
    loss = torch.utils.checkpoint.checkpoint(
        lambda z: self_regularized_entropy(z * 1, target, recompute=recompute, backend=row_backend),
        logits,
        use_reentrant=use_reentrant,
    )
    loss.backward()
    torch.testing.assert_close(logits.grad.double(), truth(logits, target)[2], rtol=1e-4, atol=1e-7)


def test_deterministic(quick_backend):
    logits, target, options = problem(16, 300, OPTIONS["all"])
    first, second = (loss_and_gradient(logits, target, backend=quick_backend, **options) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])


BITS = """
import hashlib, torch
from sre_triton import self_regularized_entropy
from sre_triton.compiled import inductor

inductor._uncompiled.add("cpu")  # without the time to compile
torch.manual_seed(0)
logits = torch.randn(50, 300, requires_grad=True)
loss = self_regularized_entropy(logits, torch.arange(50), label_smoothing=0.1, z_loss=0.1, class_mean=True)
loss.backward()
print(hashlib.sha256(loss.detach().numpy().tobytes() + logits.grad.numpy().tobytes()).hexdigest())
"""


def test_the_same_bits_in_every_run():
    digests = {subprocess.check_output([sys.executable, "-c", BITS], text=True) for _ in range(2)}
    assert len(digests) == 1


def test_gradients_of_each_sample(quick_backend):
    model, x, y = torch.nn.Linear(8, 20), torch.randn(6, 8), torch.arange(6)
    criterion = SelfRegularizedEntropyLoss(backend=quick_backend)

    def loss(parameters, x, y):
        return criterion(torch.func.functional_call(model, parameters, (x,)), y)

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(6):
        model.zero_grad()
        criterion(model(x[i]), y[i]).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][i], parameter.grad)
