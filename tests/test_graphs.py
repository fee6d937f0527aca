"""Options within a graph of the user's own: no value of theirs is compiled in."""

import functools

import pytest
import torch
from helpers import linear_problem, linear_truth, problem, truth
from torch._dynamo.testing import CompileCounterWithBackend

from sre_triton import SelfRegularizedEntropyLoss, linear_self_regularized_entropy, self_regularized_entropy

N, D, K = 6, 4, 20
OPTIONS = [
    {
        "c": 10.0**-i,
        "reg_weight": 0.3 * i,
        "label_smoothing": 0.1 * i,
        "z_loss": 0.2 / i,
        "softcap": 7.0 - i,
        "ignore_index": i,
        "denominator": 2 + i,
    }
    for i in range(2, 5)
]


def graphs(kind, backend, of_tensors):
    """Steps with all OPTIONS, held against the truth; how many graphs there were after each.

    ``of_tensors``: the options are computed in the graph, from tensors.
    """
    torch.compiler.reset()
    keywords = {"backend": backend, "reduction": "none" if kind == "linear, none" else "mean"}
    if kind.startswith("linear"):
        *tensors, target, _ = linear_problem((N,), D, K, {})
        true = functools.partial(linear_truth, *tensors, target, reduction=keywords["reduction"])

        def loss(input, W, b, **options):
            return linear_self_regularized_entropy(input, W, target, linear_bias=b, **keywords, **options)

    else:
        logits, target, _ = problem(N, K, {})
        tensors, true = [logits.requires_grad_()], functools.partial(truth, logits, target)
        loss = functools.partial(self_regularized_entropy, target=target, recompute=kind == "recompute", **keywords)

    def step(*tensors, **options):
        return loss(*tensors, **{name: x.item() if of_tensors else x for name, x in options.items()})

    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for options in OPTIONS:
        if kind == "linear, none":
            options = {name: value for name, value in options.items() if name != "denominator"}
        given = {name: torch.tensor(value) if of_tensors else value for name, value in options.items()}
        found = compiled(*tensors, **given)
        gradients = torch.autograd.grad(found.sum(), tensors)
        true_loss, _, *true_gradients = true(**options)
        true_gradients = true_gradients[0] if kind.startswith("linear") else true_gradients
        torch.testing.assert_close(found.double(), true_loss, rtol=1e-5, atol=1e-6)
        for gradient, true_gradient in zip(gradients, true_gradients, strict=True):
            torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)
        counts.append(counter.frame_count)
    return counts


def test_numbers_make_two_graphs(quick_backend):
    assert graphs("single pass", quick_backend, of_tensors=False) == [1, 2, 2]  # of the first values, and of all others


def test_numbers_of_a_linear_layers_loss_make_two_graphs(uncompiled):
    assert graphs("linear, none", "compile", of_tensors=False) == [1, 2, 2]


@pytest.mark.parametrize(
    ("kind", "backend"), [("recompute", "compile"), ("linear", "compile"), ("single pass", "eager")]
)
def test_numbers_that_a_graph_computes_make_one(kind, backend, uncompiled):
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert graphs(kind, backend, of_tensors=True) == [1, 1, 1]


def test_attributes_of_a_module_make_two_graphs(uncompiled):
    torch.compiler.reset()
    logits, target, _ = problem(N, K, {})
    criterion = SelfRegularizedEntropyLoss()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    for options in OPTIONS:
        # To PyTorch, whole numbers of a module are constants: so is ignore_index, and the others are kept as floats.
        options = {name: value for name, value in options.items() if name != "ignore_index"}
        for name, value in options.items():
            setattr(criterion, name, value)
        torch.testing.assert_close(
            compiled(logits, target).double(), truth(logits, target, **options)[0], rtol=1e-5, atol=1e-6
        )
    assert counter.frame_count == 2
