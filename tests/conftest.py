"""Fixtures for all tests, and the summary of the skipped ones: a line for each reason."""

import collections
import os
import sys

import pytest
import torch

# Triton reads it once. Where there is a GPU the kernels are compiled, and the tests of them run there.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tests run in two processes: what they start takes one core, too. Two threads of it would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from interpreter import patch_once_a_launch
from ranks import Ranks

from sre_triton import messages
from sre_triton.compiled import inductor

torch.set_num_threads(1)
patch_once_a_launch()

if sys.version_info[:3] == (3, 13, 0):
    torch._dynamo.config.issue_3_13_0_warning = False  # Dynamo warns that its guards are slow there


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Memory that is not written holds NaN, so an output that nobody computes cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _warned(monkeypatch):
    """What is said once a process has been said; tests of it set this back."""
    monkeypatch.setattr(messages, "_warned", set(messages.ONCE))


@pytest.fixture
def uncompiled(monkeypatch):
    """Everything runs as on a machine without a compiler, which takes no time to compile."""
    monkeypatch.setattr(inductor, "_compiled", {})
    monkeypatch.setattr(inductor, "_uncompiled", {"cpu"})


# "triton" is the kernels in Triton's interpreter, "gpu" the same tests with their tensors on a GPU.
ON_TRITON = [
    pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def _device(request):
    """Tests marked gpu make their tensors there."""
    if request.node.get_closest_marker("gpu"):
        torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def _use(backend, request):
    if backend == "uncompiled":
        request.getfixturevalue("uncompiled")
        return "compile"
    return "triton" if backend == "gpu" else backend


@pytest.fixture(params=["eager", "compile", "uncompiled", *ON_TRITON])
def backend(request):
    """The backends that compute; "uncompiled" is "compile" where there is no compiler."""
    return _use(request.param, request)


@pytest.fixture(params=["eager", "uncompiled", *ON_TRITON])
def quick_backend(request):
    """All ways to compute, without the time to compile: for tests over very many options."""
    return _use(request.param, request)


@pytest.fixture(params=["uncompiled", *ON_TRITON])
def row_backend(request):
    """The backends made of row primitives."""
    return _use(request.param, request)


@pytest.fixture(params=ON_TRITON)
def on_triton(request):
    """The kernels, interpreted or on a GPU."""
    return _use(request.param, request)


@pytest.fixture(scope="session")
def _ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    made = {"gloo": Ranks(4, "gloo", folder), "nccl": Ranks(torch.cuda.device_count(), "nccl", folder)}
    yield made
    for ranks in made.values():
        ranks.close()


@pytest.fixture
def ranks(request, _ranks):
    """Processes that are the ranks of groups of 1 to 4: on CPUs with gloo, in tests marked gpu with NCCL."""
    return _ranks["nccl" if request.node.get_closest_marker("gpu") else "gloo"]


# Files of tests that take seconds each, in processes of their own.
LONG = ("test_variants", "test_barriers", "test_kernel_budget", "test_package", "test_integrations", "test_output")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With -n: a test goes to whoever is free; those that share a server (ranks.py, without.py) stay together."""
    if config.option.dist != "load" or torch.cuda.is_available():
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((name for name in ("sharding", "test_internals") if name in nodeid.split("::")[0]), nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(items):
    """Long tests come first, so that no process ends long before another; those marked gpu need one."""
    items.sort(key=lambda item: item.path.stem not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter):
    """One line for each reason to skip, and not for each place of it."""
    reasons = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", ()))
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
