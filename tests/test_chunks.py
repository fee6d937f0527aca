"""Chunks have rows enough, the op of a linear layer keeps PyTorch's rules, and a step takes the memory of a chunk."""

import subprocess
import sys

import pytest
import torch
from helpers import OPTIONS, linear_problem, options_of

from sre_triton import chunks, linear_primitive

N, D, K = 6, 8, 20
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_are_of_about_one_size_and_have_rows_enough(device):
    device = torch.device(device)
    logits, least = {"cpu": (2**24, 512), "cuda": (2**28, 1024)}[device.type]
    for num_classes in (2, 1000, 50257, 128256, 262144, 2**22):
        most = max(least, logits // num_classes)
        for num_rows in (1, 63, 64, 65, least, least + 1, 8192, 100_000, 1_000_003):
            size = chunks.rows_of_chunk(num_rows, num_classes, device)
            assert size % chunks.MULTIPLE == 0
            assert min(num_rows, least // 2) <= size <= most + chunks.MULTIPLE
            # No more chunks than needed, and the last is short by less than one multiple for each of them.
            count = -(-num_rows // size)
            assert count <= -(-num_rows // most)
            assert num_rows > size * count - chunks.MULTIPLE * count
    assert chunks.rows_of_chunk(0, 10, device) == 0


def arguments(probabilities, dtype, wanted, backend, **changed):
    *tensors, target, keywords = linear_problem((N,), D, K, OPTIONS["all"], probabilities=probabilities, dtype=dtype)
    tensors = [tensor.detach() for tensor in tensors]
    given = *tensors, target, keywords["weight"], torch.rand(()), torch.rand(N)
    how = backend, 4, changed.get("logits", dtype), list(wanted), True, "", False
    return *given, *how, *options_of(**keywords)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, False)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])
def test_opcheck(probabilities, wanted, row_backend):
    torch.library.opcheck(linear_primitive._op, arguments(probabilities, torch.float32, wanted, row_backend))


@pytest.mark.parametrize("logits", [torch.float16, torch.bfloat16, None], ids=str)
@dtypes
def test_fakes_have_the_shapes_and_dtypes_of_the_results(dtype, logits, uncompiled):
    given = arguments(False, dtype, (True, True, True), "compile", logits=logits or dtype)
    real = linear_primitive._op(*given)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = linear_primitive._op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given])
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


PEAK = """
import re, sys, torch
from pathlib import Path
from sre_triton import linear_self_regularized_entropy
from sre_triton.compiled import inductor

def kibibytes(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # what is allocated is filled, and so counts
x, W, t = torch.randn(2048, 16, requires_grad=True), torch.randn(16384, 16, requires_grad=True), torch.arange(2048)
for rows in (64, 2048):  # the first time, memory of all kinds is taken for good
    linear_self_regularized_entropy(x[:rows], W, t[:rows], chunk_rows=64, class_mean=True).backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kibibytes("VmRSS")
linear_self_regularized_entropy(x, W, t, chunk_rows=64, class_mean=True).backward()
print(kibibytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_chunk():
    chunk, logits = 64 * 16384 * 4, 2048 * 16384 * 4
    out = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) * 1024 < 4 * chunk < logits / 6
