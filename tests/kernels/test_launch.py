"""The kernels as they are launched: every tile and its edges, memory that is not theirs, what goes wrong on GPUs."""

import numpy as np
import pytest
import torch
from helpers import OPTIONS, assert_within_bounds, loss_and_gradient, options_of, problem, truth

from sre_triton import self_regularized_entropy
from sre_triton.backend import primitives

tl = pytest.importorskip("triton.language")
arithmetic = pytest.importorskip("sre_triton.kernels.arithmetic")
formulas = pytest.importorskip("sre_triton.kernels.formulas")
launch = pytest.importorskip("sre_triton.kernels.launch")
rows = pytest.importorskip("sre_triton.kernels.rows")

both_targets = pytest.mark.parametrize("probabilities", [False, True], ids=["indices", "probabilities"])

# The tiles' widths, one less and one more, and what people have.
POWERS = [2**i for i in range(4, 15)]
EDGES = sorted({1, 2, 3, 123, 507, 1823, 5003, *(K + i for K in POWERS for i in (-1, 0, 1))})
CLOSE = {"rtol": 1e-4, "atol": 1e-7}
LONG = [50257, 65535, 65536, 65537, 131073, 262144, 262145]


@pytest.fixture
def kernels(on_triton):
    return primitives(on_triton)


@pytest.fixture(params=["clusters", "loops", "wide warps"])
def device(request, on_triton, monkeypatch):
    """The ways of different GPUs: the interpreter can go all of them."""
    if not launch.INTERPRETED:
        pytest.skip("a GPU is what it is")
    new = request.param == "clusters"
    wide = request.param == "wide warps"
    device = launch.Device(
        warp_size=64 if wide else 32,
        multiprocessors=2,
        largest_cluster=16 if new else 1,
        shared_bytes=0 if wide else 227 << 10,
    )
    monkeypatch.setattr(launch, "device_of", lambda index: device)
    monkeypatch.setattr(launch, "_prepared", {})
    return device


def assert_close_rows(gradient, expected):
    """To the bounds of float32, or one rounding. (To bf16 the interpreter cuts digits off where a GPU rounds.)"""
    bound = 5e-6 if gradient.dtype == torch.float32 else 2**-7
    assert ((gradient.double() - expected).norm(dim=1) <= bound * expected.norm(dim=1) + 3e-7).all()


@pytest.mark.parametrize(
    ("K", "dtype"),
    [
        *((K, torch.float32) for K in (16, 129, 1000, 8192, 16384, 20000, 131073)),
        *((K, torch.bfloat16) for K in (1024, 4097, 10001, 16384, 32771)),
    ],
    ids=str,
)
def test_every_line_of_the_table(K, dtype, device, on_triton):
    # More rows than programs at a time; one that is ignored among them.
    logits, target, _ = problem(6, K, {}, dtype=dtype)
    target[0], target[1], target[3], target[5] = 0, K - 1, -100, K // 2
    logits[3] = torch.nan
    kept = target != -100
    loss, _, gradient = loss_and_gradient(logits, target, reduction="sum", recompute=False, backend=on_triton)
    true_loss, _, true_gradient = truth(logits[kept], target[kept], reduction="sum")
    torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
    assert_close_rows(gradient[kept], true_gradient)
    assert (gradient[3] == 0).all()


def test_rows_of_any_offset(device, on_triton):
    # K and the distance of rows are odd: every row begins at another offset from multiples of 16 bytes.
    for dtype, K in ((torch.float32, 1021), (torch.bfloat16, 1021), (torch.bfloat16, 20011), (torch.bfloat16, 1028)):
        logits, _, _ = problem(9, K, {}, dtype=dtype)
        target = torch.tensor([0, K - 1, 7, 8, 9, 1, K - 2, K - 8, K - 9])
        for matrix in (logits, torch.cat([logits, logits], 1)[:, :K], logits[3:]):
            g = target[-matrix.shape[0] :]
            _, _, gradient = loss_and_gradient(matrix, g, reduction="sum", recompute=False, backend=on_triton)
            assert_close_rows(gradient, truth(matrix, g, reduction="sum")[2])


@pytest.mark.parametrize("K", [521, 525, 526, 1036, 8198, 8203])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_longer_than_the_steps_of_a_walk(K, dtype, on_triton):
    # In some rows a window is a vector longer than in the others; with the ends of steps there, it has its own step.
    for num_classes in (K, K - K % 8 + 5):
        logits, target, _ = problem(9, num_classes, {}, dtype=dtype)
        _, _, gradient = loss_and_gradient(logits, target, reduction="sum", recompute=True, backend=on_triton)
        assert_close_rows(gradient, truth(logits, target, reduction="sum")[2])


def test_huge_logits_with_a_tiny_c(on_triton):
    logits = torch.zeros(1, 300)
    logits[0, 0] = 400000416.0
    loss, _, gradient = loss_and_gradient(logits, torch.tensor([0]), c=1e-30, backend=on_triton)
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("size", [1e4, 1e9, 3e9, 1e20, 1e38])
def test_huge_logits(size, kernels, on_triton):
    logits = torch.tensor([0.3, 1.0, -1.0, 0.999, -0.7] * 40)[None] * size
    for target in ([1], [3], [2]):
        for recompute in (False, True):
            loss, _, gradient = loss_and_gradient(
                logits, torch.tensor(target), recompute=recompute, reg_weight=0.0, backend=on_triton
            )
            expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(target))
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
            expected = truth(logits, torch.tensor(target), reg_weight=0.0)[2]
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("K", EDGES + LONG)
def test_bounds_at_the_edges_of_tiles(K, on_triton):
    logits, target, _ = problem(3, K, {})
    target[0], target[1] = 0, K - 1
    assert_within_bounds(logits, target, on_triton)
    assert_within_bounds(logits, target, on_triton, recompute=False)


@pytest.mark.parametrize(
    ("K", "spread", "lead"), [(131072, 3, 0), (1000, 3, 0), (1000, 1, 29), (1000, 1, 33), (50256, 0, 33)]
)
def test_bounds_with_the_errors_that_instructions_may_have(K, spread, lead, on_triton, monkeypatch):
    # PTX ISA: ex2.approx is right to 2^-22 of its result, rcp.approx to 2^-23, lg2.approx to 2^-22 absolutely.
    if not launch.INTERPRETED:
        pytest.skip("the instructions are there")

    def error(x, largest):
        return largest * tl.sin(x * 1e5)

    def inexact_exp2(x):
        e = tl.exp2(x)
        return e + e * error(tl.maximum(x, -1e4), 2**-22)  # of 2^-inf there is none

    def inexact_reciprocal(x, PTX):
        return 1.0 / x + error(x, 2**-23) / x

    def inexact_log2(x, PTX):
        return tl.log2(x) + error(x, 2**-22)

    for name, function in (("exp2", inexact_exp2), ("reciprocal", inexact_reciprocal), ("log2", inexact_log2)):
        for module in (arithmetic, formulas, rows):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)
    logits, target, _ = problem(2, K, {}, spread=spread)
    logits[torch.arange(2), target] += lead
    assert_within_bounds(logits, target, on_triton, recompute=False)


@both_targets
@pytest.mark.parametrize("K", [1, 16, 17, 123, 300, 1000, 8192, 8193, 20000])
def test_all_options_at_the_edges_of_tiles(K, probabilities, on_triton):
    logits, target, options = problem(3, K, OPTIONS["all"], probabilities=probabilities, spread=1.0)
    logits[:, 8192:] += 2.0  # a maximum that a later tile raises
    for recompute in (False, True):
        loss, _, gradient = loss_and_gradient(logits, target, backend=on_triton, recompute=recompute, **options)
        true_loss, _, true_gradient = truth(logits, target, **options)
        torch.testing.assert_close(loss.double(), true_loss, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(gradient.double(), true_gradient, **CLOSE)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 40])
def test_rows_that_share_a_program(N, on_triton):
    logits, target, _ = problem(N, 10, {})
    target[::4] = -100
    logits[::4] = torch.nan
    _, _, gradient = loss_and_gradient(logits, target, backend=on_triton, reduction="sum")
    kept = target != -100
    assert (gradient[~kept] == 0).all()
    torch.testing.assert_close(gradient[kept].double(), truth(logits[kept], target[kept], reduction="sum")[2], **CLOSE)


def guarded(shape, dtype, pad=5):
    """A matrix in the middle of a larger one, and a check that nothing around it has changed."""
    N, K = shape
    band = torch.full((N + 4, K + 2 * pad), torch.nan, dtype=dtype)
    matrix = band[2 : N + 2, pad : pad + K]

    def untouched():
        outside = torch.ones(band.shape, dtype=torch.bool)
        outside[2 : N + 2, pad : pad + K] = False
        return band[outside].isnan().all()

    return matrix, untouched


@both_targets
@pytest.mark.parametrize("name", ["default", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 7, 123, 1000, 9001])
def test_nothing_outside_the_arguments_is_read_or_written(K, dtype, name, probabilities, kernels, monkeypatch):
    N = 3
    values, target, keywords = problem(N, K, OPTIONS[name], probabilities=probabilities, dtype=dtype)
    options = options_of(**keywords)
    logits, logits_untouched = guarded((N, K), dtype)
    logits.copy_(values)
    weight, scale = keywords.get("weight"), torch.rand(N + 2)[1:-1]
    if weight is not None:
        weight = torch.cat([weight.new_full((3,), torch.nan), weight, weight.new_full((3,), torch.nan)])[3:-3]
    if probabilities:
        own, target = target, guarded((N, K), torch.float32)[0]
        target.copy_(own)
    checks = [logits_untouched]

    def new_matrix(shape, dtype):
        matrix, untouched = guarded(shape, dtype, pad=0)  # outputs are contiguous: guard rows only
        checks.append(untouched)
        return matrix

    monkeypatch.setattr(kernels, "new_per_row", lambda z, count: new_matrix((count, N), torch.float32))
    monkeypatch.setattr(kernels, "new_gradient", lambda z: new_matrix(z.shape, z.dtype))
    losses, stats = kernels.row_loss(logits, target, weight, options)
    fused_losses, fused_gradient = kernels.row_loss_and_gradient(logits, target, weight, scale, options)
    gradient = kernels.row_gradient(logits, target, weight, stats, scale, options)
    lse = kernels.row_lse(logits, target, weight, options)
    sums = kernels.row_sums(logits, target, lse, options)
    assert all(untouched() for untouched in checks)
    for output in (losses, stats, fused_losses, fused_gradient, gradient, lse, sums):
        assert output.isfinite().all()
    assert torch.equal(logits, values)
    kernels.row_loss_and_gradient_(logits, target, weight, scale, options)
    torch.testing.assert_close(logits, fused_gradient)
    kernels.scale_gradient_(logits, torch.tensor(2.0))
    torch.testing.assert_close(logits, 2 * fused_gradient)
    assert all(untouched() for untouched in checks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_and_weights_of_every_dtype(dtype, on_triton):
    logits, target, options = problem(4, 50, {"weight": True}, probabilities=True)
    target, weight = target.to(dtype), options["weight"].to(dtype)
    _, _, gradient = loss_and_gradient(logits, target, weight=weight, backend=on_triton)
    torch.testing.assert_close(gradient.double(), truth(logits, target, weight=weight)[2], **CLOSE)


def test_weights_of_any_strides(on_triton):
    logits, target, options = problem(6, 20, {"weight": True, "label_smoothing": 0.1})
    weight = options["weight"]
    strided = torch.stack([weight, torch.full((20,), torch.nan)], 1)[:, 0]
    results = [
        loss_and_gradient(logits, target, weight=w, label_smoothing=0.1, backend=on_triton)[2]
        for w in (weight, strided)
    ]
    assert torch.equal(*results)
    results = [
        loss_and_gradient(logits, target, weight=w, backend=on_triton)[2]
        for w in (torch.tensor([2.0]).expand(20), torch.full((20,), 2.0))
    ]
    assert torch.equal(*results)


def test_probabilities_of_any_strides(on_triton):
    logits, target, _ = problem(6, 16, {}, probabilities=True)
    expected = loss_and_gradient(logits, target, backend=on_triton)[2]
    wide = torch.full((6, 40), torch.nan)
    wide[:, 3:19] = target
    for view in (target.t().contiguous().t(), wide[:, 3:19]):
        assert torch.equal(loss_and_gradient(logits, view, backend=on_triton)[2], expected)
    expected = loss_and_gradient(logits, target[:1].repeat(6, 1), backend=on_triton)[2]
    assert torch.equal(loss_and_gradient(logits, target[:1].expand(6, 16), backend=on_triton)[2], expected)


@pytest.mark.parametrize("where", [0, 17, 8191, 8192, 8999])
@pytest.mark.parametrize("K", [20, 1000, 9000])
def test_nan_is_not_lost_in_any_tile(K, where, on_triton):
    logits, target, _ = problem(3, K, {})
    logits[1, where % K] = torch.nan
    for recompute in (False, True):
        loss, parts, gradient = loss_and_gradient(
            logits, target, reduction="none", recompute=recompute, backend=on_triton
        )
        assert loss.isnan().tolist() == [False, True, False]
        assert parts.regularizer.isnan().tolist() == [False, True, False]
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("tile", [0, 1, 2])
def test_a_whole_tile_of_masked_classes(tile, on_triton):
    logits, target, _ = problem(2, 3 * 8192, {})
    logits[:, tile * 8192 : (tile + 1) * 8192] = -torch.inf
    kept = logits[0] != -torch.inf
    target[:] = 8192 * ((tile + 1) % 3) + 5
    place = kept[: target[0]].sum()
    for recompute in (False, True):
        loss, _, gradient = loss_and_gradient(logits, target, recompute=recompute, backend=on_triton)
        true_loss, _, true_gradient = truth(logits[:, kept], place.expand(2))
        torch.testing.assert_close(loss.double(), true_loss, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(gradient[:, kept].double(), true_gradient, rtol=1e-4, atol=1e-6)
        assert (gradient[:, ~kept] == 0).all()


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 100.0])
def test_softcap_keeps_its_digits_near_and_far_from_zero(size, softcap, on_triton):
    logits, target, _ = problem(4, 1000, {}, spread=size)
    assert_within_bounds(logits, target, on_triton, softcap=softcap)


def test_rows_further_apart_than_32_bits(kernels):
    # Two rows 2^31 + 8 elements apart. The memory between them is never touched.
    K, distance = 100, 2**31 + 8
    if launch.INTERPRETED:
        base = torch.from_numpy(np.empty(distance + K, dtype=np.float16))
    else:
        base = torch.empty(distance + K, dtype=torch.float16)
    logits = base.as_strided((2, K), (distance, 1))
    values, target, _ = problem(2, K, {}, dtype=torch.float16)
    logits.copy_(values)
    given = (target, None, torch.ones(2), options_of())
    expected = kernels.row_loss_and_gradient(values, *given)
    torch.testing.assert_close(kernels.row_loss_and_gradient(logits, *given), expected)
    kernels.row_loss_and_gradient_(logits, *given)
    torch.testing.assert_close(logits, expected[1])
    torch.testing.assert_close(kernels.scale_gradient_(logits, torch.tensor([1.0, 2.0]))[1], 2 * expected[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("K", [100, 20000])
def test_scalars_may_lie_on_the_gpu(K, dtype, kernels, monkeypatch):
    # Under the interpreter, where nothing does, the kernels are told so.
    logits, target, _ = problem(4, K, {})
    others = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}
    for c, used in ((1e-30, ()), (1e-7, others), (0.75, ["z_loss"]), (1.0, ["softcap"])):
        options = options_of(c=c, reg_weight=0.7, **{name: others[name] for name in used})
        expected = kernels.row_loss_and_gradient(logits, target, None, torch.ones(4), options)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "_number_or_pointer", lambda x: x if x is None else x.to(logits.device, dtype))
            losses, gradient = kernels.row_loss_and_gradient(logits, target, None, torch.ones(4), options)
        torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-5, atol=1e-8)


def test_every_write_in_place_moves_the_version(kernels):
    logits, target, _ = problem(4, 100, {})
    _, stats = kernels.row_loss(logits, target, None, options_of())
    for write in (
        lambda: kernels.scale_gradient_(logits, torch.tensor(1.0)),
        lambda: kernels.row_gradient_(logits, target, None, stats, torch.ones(4), options_of()),
        lambda: kernels.row_loss_and_gradient_(logits, target, None, torch.ones(4), options_of()),
    ):
        version = logits._version
        write()
        assert logits._version > version


@pytest.mark.parametrize("factor", [torch.tensor(1.0), torch.ones(40)], ids=["scalar", "rows"])
@pytest.mark.parametrize("K", [10, 5000])
def test_a_factor_of_one_writes_nothing(K, factor, kernels):
    # A signalling NaN that goes through a multiplication comes out as a quiet one.
    signalling = 0x7F800001
    gradient = torch.full((40, K), signalling, dtype=torch.int32).view(torch.float32)
    kernels.scale_gradient_(gradient, factor.to(gradient.device))
    assert (gradient.view(torch.int32) == signalling).all()
    kernels.scale_gradient_(gradient, torch.tensor(2.0))
    assert (gradient.view(torch.int32) != signalling).all()


@pytest.mark.parametrize(("N", "K"), [(1, 1), (300, 10), (5, 123), (3, 5000)])
def test_scaling_by_rows(N, K, kernels):
    gradient, _, _ = problem(N, K, {})
    factor = torch.linspace(0.5, 1.5, N)
    factor[N // 2] = 1.0
    expected = gradient * factor[:, None]
    torch.testing.assert_close(kernels.scale_gradient_(gradient, factor), expected, rtol=0, atol=0)


def test_no_rows(on_triton):
    for probabilities in (False, True):
        logits, target, _ = problem(0, 7, {}, probabilities=probabilities)
        for recompute in (False, True):
            loss, _, gradient = loss_and_gradient(
                logits, target, reduction="sum", recompute=recompute, backend=on_triton
            )
            assert loss == 0
            assert gradient.shape == (0, 7)


def test_the_loss_of_targets_given_as_a_slice(on_triton):
    logits, _, _ = problem(6, 20, {})
    target = torch.arange(12)[::2]
    loss = self_regularized_entropy(logits, target, backend=on_triton)
    torch.testing.assert_close(loss, self_regularized_entropy(logits, target.clone(), backend=on_triton))
