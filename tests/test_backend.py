"""Who computes: chosen, refused, never replaced in silence."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sre_triton import backend, self_regularized_entropy
from sre_triton.compiled import primitives as compiled_primitives

z, y, P = torch.randn(4, 7), torch.arange(4), torch.rand(4, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_none_is_compile_on_a_cpu(dtype):
    assert backend.choose(None, z.to(dtype), False) == "compile"


def test_none_is_eager_where_others_need_a_gradient():
    assert backend.choose(None, z, True) == "eager"


@pytest.mark.parametrize("name", ["compile", "eager"])
def test_an_explicit_backend_is_taken(name, monkeypatch, uncompiled):
    assert backend.choose(name, z, False) == name
    calls = []
    function = compiled_primitives.LOSS.uncompiled
    spy = compiled_primitives.LOSS._replace(uncompiled=lambda *args: calls.append(1) or function(*args))
    monkeypatch.setattr(compiled_primitives, "LOSS", spy)
    self_regularized_entropy(z, y, backend=name)
    assert bool(calls) == (name == "compile")


def test_a_graph_does_not_depend_on_what_was_loaded(monkeypatch, uncompiled):
    monkeypatch.setattr(backend, "_modules", {})
    torch.compiler.reset()
    counter = CompileCounter()
    graph = torch.compile(lambda z: self_regularized_entropy(z, y), fullgraph=True, backend=counter)
    for _ in range(2):
        graph(z.clone().requires_grad_()).backward()
        self_regularized_entropy(z.clone().requires_grad_(), y).backward()
    assert counter.frame_count == 1


def test_compile_refuses_a_gradient_to_the_target():
    with pytest.raises(ValueError, match="^backend: expected 'eager' or None where target or weight require"):
        self_regularized_entropy(z, P.clone().requires_grad_(), backend="compile")
    with torch.no_grad():
        self_regularized_entropy(z, P.clone().requires_grad_(), backend="compile")


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="^backend: expected 'compile' or 'eager' for float64 logits, got 'triton'"):
        self_regularized_entropy(z.double(), y, backend="triton")


@pytest.mark.parametrize("missing", ["interpreter", "package"])
def test_triton_needs_triton(missing):
    code = f"""
import sys, torch
if {missing == "package"}:
    sys.modules["triton"] = None
from sre_triton import self_regularized_entropy
try:
    self_regularized_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), backend="triton")
except ValueError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1" if missing == "package" else "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.startswith("backend: expected None, 'compile' or 'eager' for logits on cpu, got 'triton', which needs")
