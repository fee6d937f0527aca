"""Plain autograd against the definition: values, any number of derivatives, every transform, and what it costs."""

import warnings

import pytest
import torch
from helpers import OPTIONS, problem
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sre_triton import (
    LinearSelfRegularizedEntropyLoss,
    SelfRegularizedEntropyLoss,
    eager,
    linear_self_regularized_entropy,
    messages,
    reference,
    self_regularized_entropy,
)
from sre_triton.primitives import RowOptions

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
N, K = 4, 7


def ours(*tensors, **options):
    return self_regularized_entropy(*tensors, backend="eager", return_parts=True, **options)


def derivatives(loss, logits, target, weight, options):
    """The loss, its parts, and three derivatives in directions that depend on nothing but the shapes."""
    tensors = [logits, target, weight]
    inputs = [logits] if target.dim() == 1 else [tensor for tensor in tensors if tensor is not None]
    leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in inputs}
    value, parts = loss(*(leaves.get(id(tensor), tensor) for tensor in tensors), **options)
    found, leaves = [value, *parts], tuple(leaves.values())
    for _ in range(3):
        direction = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).cos().reshape(value.shape)
        gradients = torch.autograd.grad((value * direction).sum(), leaves, create_graph=True, materialize_grads=True)
        found += gradients
        value = torch.cat([gradient.flatten() for gradient in gradients])
    return found


@both_targets
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("case", ["plain", "masked", "ignored", "one class"])
def test_is_the_definition(case, name, probabilities):
    logits, target, options = problem(
        N, 1 if case == "one class" else K, OPTIONS[name], probabilities=probabilities, spread=6, dtype=torch.float64
    )
    weight = options.pop("weight", None)
    if case == "masked":
        logits[:, 5] = -torch.inf
        target = target.index_fill(1, torch.tensor(5), 0) if probabilities else target % 5
    if case == "ignored":
        logits[1] = torch.nan
        if not probabilities:  # which then are poisoned
            target[1] = -100
    for reduction in ("none", "mean", "sum"):
        options["reduction"] = reduction
        arguments = logits, target.double() if probabilities else target, weight, options
        expected = derivatives(reference.self_regularized_entropy, *arguments)
        for found, true in zip(derivatives(ours, *arguments), expected, strict=True):
            torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12, equal_nan=True)
            # At a mask, label smoothing and weights without it make H infinite.
            assert case != "masked" or "smoothing" in name or name == "all" or torch.isfinite(found).all()


def test_second_derivative_where_p_is_c():
    # There -|t| has none, and h'' is -1/4.
    t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(eager.coin_entropy(t), t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    assert (first.item(), second.item()) == (0, -0.25)


@both_targets
def test_every_transform(probabilities):
    logits, target, options = problem(N, K, OPTIONS["all"], probabilities=probabilities, dtype=torch.float64)
    target = target.double() if probabilities else target
    options["reduction"] = "sum"

    def loss(z, y=target):
        return self_regularized_entropy(z, y, backend="eager", **options)

    def truth(z):
        return reference.self_regularized_entropy(z, target, **options)[0]

    gradient = torch.autograd.functional.jacobian(truth, logits)
    hessian = torch.autograd.functional.hessian(truth, logits)
    direction = torch.linspace(-1, 1, N * K, dtype=torch.float64).reshape(N, K)
    close = torch.testing.assert_close
    close(torch.func.hessian(loss)(logits), hessian)  # forward over reverse
    close(torch.func.jacrev(torch.func.jacrev(loss))(logits), hessian)
    close(torch.func.jacfwd(torch.func.jacfwd(loss))(logits), hessian)
    close(torch.func.jvp(loss, (logits,), (direction,)), (truth(logits), (gradient * direction).sum()))
    close(torch.vmap(torch.func.grad(loss))(logits, target), gradient)
    own = torch.stack([hessian[n, :, n] for n in range(N)])
    close(torch.vmap(torch.func.hessian(loss))(logits, target), own)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, direction))).tangent
    close(tangent, (gradient * direction).sum())


def test_second_derivative_inside_compile():
    logits, target, _ = problem(N, K, {}, dtype=torch.float64)

    def gradient(z):
        return torch.func.grad(self_regularized_entropy)(z, target)

    def of_norm(z):
        return torch.func.grad(lambda z: gradient(z).norm())(z)

    torch.compiler.reset()
    found = torch.compile(of_norm, backend="aot_eager", fullgraph=True)(logits)
    leaf = logits.requires_grad_()
    (first,) = torch.autograd.grad(reference.self_regularized_entropy(leaf, target)[0], leaf, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(first.norm(), leaf)[0])


def test_an_index_that_is_no_class_is_nan_in_its_own_row():
    logits, target, _ = problem(N, K, {})
    target[0], target[1], target[2] = K, -100, -1
    leaf = logits.requires_grad_()
    loss, losses = eager.losses_of_rows(leaf, target, None, False, RowOptions(1e-7, 1.0, -100))
    loss.sum().backward()
    for numbers in (loss, losses[1], losses[2], leaf.grad[:, 0], leaf.grad[:, -1]):
        assert numbers.isnan().tolist() == [True, False, True, False]
    assert loss[1] == 0
    assert (leaf.grad[1] == 0).all()


class Passes(TorchDispatchMode):
    """Counts the operations that write a matrix of the logits' size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        written = isinstance(out, torch.Tensor) and not function.is_view and out.numel() == N * K
        self.count += written
        return out


def test_is_few_passes_over_the_logits():
    logits, target, _ = problem(N, K, {})
    leaf = logits.requires_grad_()

    def passes(loss):
        with Passes() as counter:
            torch.autograd.grad(loss(leaf, target), leaf)
        return counter.count

    assert passes(lambda *a: ours(*a)[0]) <= passes(reference.source_formula)


def test_says_once_that_a_gradient_to_the_target_is_slow(monkeypatch, uncompiled):
    logits, target, _ = problem(N, K, {}, probabilities=True)
    logits.requires_grad_()
    W, wide = torch.ones(K, 3), torch.ones(N, 3)
    teacher, weight = target.clone().requires_grad_(), torch.ones(K, requires_grad=True)

    def said(call, *arguments, **options):
        monkeypatch.setattr(messages, "_warned", {"many classes"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                call(*arguments, **options)
        for warning in caught:
            assert warning.category is UserWarning
            assert warning.filename == __file__
        return ["target.detach()" in str(warning.message) for warning in caught]

    torch.compiler.reset()
    compiled = torch.compile(self_regularized_entropy, backend="aot_eager", fullgraph=True)
    per_sample = torch.vmap(torch.func.grad(self_regularized_entropy, argnums=1))
    for loss in (self_regularized_entropy, SelfRegularizedEntropyLoss(), compiled):
        assert said(loss, logits, teacher) == [True]
        assert said(loss, logits, teacher.detach()) == []
    assert said(self_regularized_entropy, logits, target, weight) == [True]
    assert said(linear_self_regularized_entropy, wide, W, teacher) == [True]
    assert said(LinearSelfRegularizedEntropyLoss(3, K), wide, teacher) == [True]
    assert said(per_sample, logits.detach(), target) == [True]
    for loss in (self_regularized_entropy, compiled):
        assert said(loss, logits, teacher, backend="eager") == []
    with torch.no_grad():
        assert said(self_regularized_entropy, logits, teacher) == []
