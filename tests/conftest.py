"""Fixtures for all tests."""

import pytest
import torch

from sre_triton import checks, fallback

torch.set_num_threads(1)  # The tests run in two processes.


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that is not written holds NaN, so an output that nobody computes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _warned(monkeypatch):
    """The once-a-process warning is spent; tests of it set this back."""
    monkeypatch.setattr(checks, "_warned_of_many_classes", True)


@pytest.fixture
def uncompiled(monkeypatch):
    """The blocks run as on a machine without a compiler, which takes no time to compile."""
    monkeypatch.setattr(fallback, "_has_compiler", False)


@pytest.fixture(params=["eager", "compile", "uncompiled"])
def backend(request):
    """The backends that compute; "uncompiled" is "compile" where there is no compiler."""
    if request.param == "uncompiled":
        request.getfixturevalue("uncompiled")
        return "compile"
    return request.param


@pytest.fixture(params=["eager", "uncompiled"])
def quick_backend(request):
    """Both ways to compute, without the time to compile: for tests over very many options."""
    if request.param == "uncompiled":
        request.getfixturevalue("uncompiled")
        return "compile"
    return request.param
