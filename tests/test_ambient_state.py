"""What surrounds a call changes nothing: not the call itself, and no later one."""

import contextlib

import pytest
import torch
from helpers import linear_problem, linear_truth, problem, truth
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sre_triton import linear_self_regularized_entropy, self_regularized_entropy
from sre_triton.compiled import inductor


class Doubling(TorchFunctionMode):
    """Doubles every number of every result."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if isinstance(result, torch.Tensor) and result.is_floating_point() else result


class Watching(TorchDispatchMode):
    """Looks on, so that calls pass the dispatcher."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(get, set_, value):
    """A setting of the process or thread that has no context manager."""
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


def deterministic(mode):
    return setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, mode)


STATES = {
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "function mode": Doubling,
    "dispatch mode": Watching,
    "device": lambda: torch.device("meta"),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "autocast": lambda: torch.autocast("cpu"),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "not deterministic": lambda: deterministic(False),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 2),
    "matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "flush denormal": lambda: setting(lambda: False, torch.set_flush_denormal, True),
    "no gradient": torch.no_grad,
    "inference mode": torch.inference_mode,
}


def inside(names):
    """The surroundings of those names, one within another."""
    stack = contextlib.ExitStack()
    for name in names:
        stack.enter_context(STATES[name]())
    return stack


def step(backend, names):
    """The losses in some surroundings, with their gradients where there are any, held to float64."""
    logits, target, options = problem(8, 32, {"label_smoothing": 0.1, "z_loss": 0.1})
    true_loss, _, true_gradient = truth(logits, target, **options)
    leaf = logits.clone().requires_grad_()
    with inside(names):
        loss = self_regularized_entropy(leaf, target, **options, backend=backend)
        gradients = torch.autograd.grad(loss, leaf) if loss.requires_grad else ()
    torch.testing.assert_close(loss.detach().double(), true_loss, rtol=5e-6, atol=1e-6)
    for gradient in gradients:
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-4, atol=1e-6)


def linear_step(backend, names):
    input, W, b, target, options = linear_problem((2, 4), 5, 32, {"class_mean": True})
    true_loss, _, true_gradients, _ = linear_truth(input, W, b, target, **options)
    with inside(names):
        loss = linear_self_regularized_entropy(input, W, target, linear_bias=b, **options, backend=backend)
        gradients = torch.autograd.grad(loss, (input, W, b)) if loss.requires_grad else ()
    tolerance = 0.02 if "autocast" in names else 1e-4  # in bfloat16
    torch.testing.assert_close(loss.detach().double(), true_loss, rtol=tolerance, atol=1e-6)
    for gradient, true_gradient in zip(gradients, true_gradients, strict=False):
        torch.testing.assert_close(gradient.double(), true_gradient, rtol=tolerance, atol=tolerance / 10)


# Together, so that little is compiled. What passes the dispatcher is called with none of most others, a device is a
# default device, and without gradients there is nothing to see of them.
TOGETHER = [name for name in STATES if name not in ("dispatch mode", "device", "no gradient", "inference mode")]


@pytest.mark.parametrize("first", [TOGETHER, [*TOGETHER, "dispatch mode"], []], ids=["inside", "dispatched", "outside"])
def test_what_surrounds_the_first_call_is_not_compiled_in(first, monkeypatch):
    monkeypatch.setattr(inductor, "_compiled", {})
    for names in (first, TOGETHER, []):
        step("compile", names)


def test_a_device_context_changes_no_class_of_tensors(uncompiled):
    class Kind(torch.Tensor):
        pass

    logits, target, _ = problem(4, 20, {})
    with torch.device("cpu"):
        inside = self_regularized_entropy(logits.as_subclass(Kind), target)
    assert type(inside) is type(self_regularized_entropy(logits.as_subclass(Kind), target)) is Kind


@pytest.mark.parametrize("name", STATES)
def test_what_surrounds_a_call_changes_nothing(name, row_backend):
    step(row_backend, [name])
    linear_step(row_backend, [name])
