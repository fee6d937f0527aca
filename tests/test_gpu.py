"""What only a GPU shows."""

import pytest
import torch
from helpers import OPTIONS, loss_and_gradient, problem, truth

from sre_triton import SelfRegularizedEntropyLoss, backend, self_regularized_entropy

pytestmark = pytest.mark.gpu

modes = pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])


def test_triton_is_chosen():
    logits, _, _ = problem(4, 10, {})
    assert backend.choose(None, logits, False) == "triton"
    assert backend.choose(None, logits.double(), False) == "compile"


@modes
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", ["default", "all"])
def test_nothing_waits_for_the_gpu(name, recompute):
    logits, target, options = problem(64, 1000, OPTIONS[name])
    options |= {"class_mean": True, "recompute": recompute, "reg_weight": torch.tensor(0.5)}
    logits.requires_grad_()
    upstream = torch.tensor(2.0)
    self_regularized_entropy(logits, target, **options).backward(upstream)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        self_regularized_entropy(logits, target, **options).backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@modes
def test_cuda_graph(recompute):
    logits, target, _ = problem(64, 1000, {})
    criterion = SelfRegularizedEntropyLoss(class_mean=True, recompute=recompute)
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss = criterion(leaf, target)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for factor in (1.0, 0.5):
        with torch.no_grad():
            leaf.copy_(logits * factor)
        graph.replay()
        true_loss, _, true_gradient = truth(logits * factor, target, class_mean=True)
        torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), true_gradient, rtol=1e-4, atol=1e-7)


@modes
@pytest.mark.parametrize("K", [1000, 16384, 50257])
def test_inplace_does_not_race(K, recompute):
    logits, target, _ = problem(256, K, {"class_mean": True}, dtype=torch.bfloat16)
    expected = loss_and_gradient(logits, target, class_mean=True, recompute=recompute)[2]
    for _ in range(20):
        leaf = logits.clone().requires_grad_()
        self_regularized_entropy(leaf * 1, target, class_mean=True, inplace=True, recompute=recompute).backward()
        assert torch.equal(leaf.grad, expected)


def test_more_than_2_to_the_31_logits():
    K = 131072
    N = 2**31 // K + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(N, K, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(K, (N,))
    self_regularized_entropy(logits, target, class_mean=True, reduction="sum").backward()
    last = slice(N - 2, N)
    expected = truth(logits.detach()[last], target[last], class_mean=True, reduction="sum")[2]
    torch.testing.assert_close(logits.grad[last].double(), expected, rtol=0.01, atol=1e-6)


def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, target, _ = problem(4, 1000, {})
    expected = loss_and_gradient(logits, target, class_mean=True)[2]
    moved = loss_and_gradient(logits.to("cuda:1"), target.to("cuda:1"), class_mean=True)[2]
    assert moved.device.index == 1
    torch.testing.assert_close(moved.to(expected.device), expected)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model(mode):
    layer = torch.nn.Linear(32, 1000)
    features, target = torch.randn(64, 32), torch.randint(1000, (64,))

    def loss(features):
        return self_regularized_entropy(layer(features), target, class_mean=True)

    loss(features).backward()
    expected = layer.weight.grad.clone()
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(3):
        layer.weight.grad = None
        compiled(features).backward()
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-6)
