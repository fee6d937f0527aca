"""On a GPU every path is right, nothing waits, graphs can be captured, and writing in place does not race."""

import pytest
import torch
from helpers import OPTIONS, assert_within_bounds, linear_problem, loss_and_gradient, problem, truth

from sre_triton import SelfRegularizedEntropyLoss, backend, linear_self_regularized_entropy, self_regularized_entropy

pytestmark = pytest.mark.gpu

modes = pytest.mark.parametrize("recompute", [False, True], ids=["single pass", "recompute"])


def test_triton_is_chosen():
    logits, _, _ = problem(4, 10, {})
    assert backend.choose(None, logits, False) == "triton"
    assert backend.choose(None, logits.double(), False) == "compile"


# Where the table of plan.py changes from one line to the next.
BOUNDARIES = (1, 16, 17, 128, 129, 4096, 4097, 8192, 8193, 16384, 16385, 65536, 65537, 131072, 131073, 262144, 262145)


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("K", BOUNDARIES)
def test_boundaries_of_the_table(K, dtype, recompute):
    # More rows than there are programs at a time, so that those which go from row to row do.
    logits, target, _ = problem(300 if 4096 < K <= 16384 else 20, K, {"class_mean": True}, dtype=dtype)
    target[0], target[1], target[2] = 0, K - 1, -100
    logits[2] = torch.nan
    options = {"class_mean": True, "recompute": recompute, "reduction": "sum"}
    loss, _, gradient = loss_and_gradient(logits, target, **options)
    kept = target != -100
    del options["recompute"]
    true_loss, _, true_gradient = truth(logits[kept], target[kept], **options)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 5e-6}[dtype]
    difference = (gradient[kept].double() - true_gradient).norm(dim=1)
    assert (difference <= rounding * true_gradient.norm(dim=1) + 3e-7 * K**0.5).all()
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("K", [129, 525, 8193, 16385, 65537, 262144])
def test_short_run(K):
    # Of every way through the table one, for compute-sanitizer: see perf/gpu.sh.
    logits, target, _ = problem(9, K, {}, dtype=torch.bfloat16)
    for recompute in (False, True):
        gradient = loss_and_gradient(logits, target, class_mean=True, recompute=recompute)[2]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("K", [50257, 65536, 262144])
@pytest.mark.parametrize("N", [1, 3, 9])
def test_few_rows(N, K):
    logits, target, _ = problem(N, K, {})
    assert_within_bounds(logits, target, "triton", recompute=False)


@pytest.mark.parametrize("K", [1000, 16384, 32768, 262144])
def test_the_same_again(K):
    # A race would show in some of many runs.
    logits, target, _ = problem(400, K, {}, dtype=torch.bfloat16)
    first = loss_and_gradient(logits, target, class_mean=True)
    for _ in range(20):
        again = loss_and_gradient(logits, target, class_mean=True)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[2], first[2])


@modes
def test_on_another_stream(recompute):
    logits, target, _ = problem(512, 50257, {}, dtype=torch.bfloat16)
    expected = loss_and_gradient(logits, target, class_mean=True, recompute=recompute)[2]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # what the current stream does meanwhile must not wait for it, nor come before
        delayed = logits * 1.0
        gradient = loss_and_gradient(delayed, target, class_mean=True, recompute=recompute)[2]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(gradient, expected)


def test_a_step_is_four_launches():
    torch.use_deterministic_algorithms(False)  # under which new memory is filled
    logits, target, _ = problem(64, 1000, {})
    logits.requires_grad_()
    one = torch.ones(())

    def step():
        self_regularized_entropy(logits, target, class_mean=True).backward(one)
        logits.grad = None

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 4, kernels


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
        criterion.reg_weight = 2 * factor
        graph.replay()
        true_loss, _, true_gradient = truth(logits * factor, target, class_mean=True, reg_weight=2 * factor)
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

    criterion = SelfRegularizedEntropyLoss(class_mean=True)

    def loss(features):
        return criterion(layer(features), target)

    loss(features).backward()
    expected = layer.weight.grad.clone()
    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for _ in range(3):
        layer.weight.grad = None
        compiled(features).backward()
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-6)


# -- linear layer and loss --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["default", "all"])
def test_linear_loss_does_not_wait_for_the_gpu(name, reduction):
    input, W, b, target, options = linear_problem((64,), 32, 1000, OPTIONS[name])
    options |= {"class_mean": True, "reg_weight": torch.tensor(0.5), "reduction": reduction, "chunk_rows": 24}

    def step():
        return torch.autograd.grad(
            linear_self_regularized_entropy(input, W, target, linear_bias=b, **options).sum(), (input, W, b)
        )

    expected = step()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        gradients = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_loss_in_the_memory_of_a_chunk(dtype):
    N, D, K = 4096, 256, 50257
    input, W, _, target, _ = linear_problem((N,), D, K, {}, dtype=dtype)
    options = {"class_mean": True, "reduction": "sum"}  # whose gradients float16 can hold
    exact = [tensor.detach().double().requires_grad_() for tensor in (input, W)]
    self_regularized_entropy(torch.nn.functional.linear(*exact), target, backend="compile", **options).backward()
    expected = [tensor.grad for tensor in exact]
    del exact
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_self_regularized_entropy(input, W, target, chunk_rows=256, **options)
    gradients = torch.autograd.grad(loss, (input, W))
    peak = torch.cuda.max_memory_allocated() - before
    rounding = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[dtype]
    for ours, true in zip(gradients, expected, strict=True):
        assert (ours.double() - true).norm() <= rounding * true.norm()
    assert peak < N * K * dtype.itemsize / 2


def test_linear_loss_in_a_cuda_graph():
    input, W, _, target, _ = linear_problem((64,), 32, 1000, {})
    input, W = (tensor.detach().requires_grad_() for tensor in (input, W))

    def step():
        return torch.autograd.grad(
            linear_self_regularized_entropy(input, W, target, class_mean=True, chunk_rows=24), (input, W)
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        input.neg_()
    graph.replay()
    torch.testing.assert_close(captured, step())
