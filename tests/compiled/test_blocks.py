"""Rows that are copied block by block have the losses and gradients of rows that lie in one piece."""

import itertools

import pytest
import torch
from helpers import OPTIONS, loss_and_gradient, problem, truth

from sre_triton import self_regularized_entropy
from sre_triton.compiled import primitives as compiled_primitives


@pytest.mark.parametrize("block_bytes", [1, 4000, 10**9])
def test_blocks_change_nothing(block_bytes, monkeypatch, uncompiled):
    logits, target, options = problem(37, 50, OPTIONS["all"], dtype=torch.bfloat16)
    target[5] = -100
    for recompute in (False, True):
        expected = loss_and_gradient(logits, target, recompute=recompute, **options)
        with monkeypatch.context() as patch:
            patch.setattr(compiled_primitives, "BLOCK_BYTES", block_bytes)
            blocks = loss_and_gradient(logits, target, recompute=recompute, **options)
        assert torch.equal(blocks[2], expected[2])
        torch.testing.assert_close(blocks, expected)


# Each of both passes is compiled for either dtype, and for either for few and for many classes.
@pytest.mark.parametrize(
    ("recompute", "dtype", "classes"),
    [
        (False, torch.float32, (8, 100, 2003)),
        (False, torch.bfloat16, (8, 100)),
        (True, torch.float32, (8, 100)),
        (True, torch.bfloat16, (100, 2003)),
    ],
    ids=str,
)
def test_compiled_code_may_write_over_what_it_reads(recompute, dtype, classes):
    for N, K, padding in itertools.product((2, 37), classes, (0, 3)):
        logits, target, _ = problem(N, K, {}, dtype=dtype)
        _, _, expected = loss_and_gradient(logits, target, backend="compile", recompute=recompute)
        source = torch.nn.functional.pad(logits, (0, padding)).requires_grad_()
        made = (source * 1)[:, :K]
        self_regularized_entropy(made, target, backend="compile", recompute=recompute, inplace=True).backward()
        assert torch.equal(made.detach(), expected)
        assert torch.equal(source.grad[:, :K], expected)


@pytest.mark.parametrize(("name", "probabilities"), [("default", False), ("weight", True)])
def test_compiled_code_takes_tensors_as_they_lie(name, probabilities):
    logits, target, options = problem(20, 60, OPTIONS[name], probabilities=probabilities)
    options = {key: torch.stack([value] * 2, -1)[:, 0] if key == "weight" else value for key, value in options.items()}
    for recompute in (False, True):
        _, _, gradient = loss_and_gradient(
            logits.t().contiguous().t(), target.repeat_interleave(2, 0)[::2], recompute=recompute, **options
        )
        torch.testing.assert_close(gradient.double(), truth(logits, target, **options)[2], rtol=1e-4, atol=1e-6)
