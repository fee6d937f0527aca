"""Every K has the path that the table of plan.py says, and no path has more registers or memory than there is."""

import itertools
import math

import pytest

from sre_triton.kernels.plan import Device, plan

H100 = Device(warp_size=32, multiprocessors=132, largest_cluster=16, shared_bytes=227 << 10)
A100 = Device(warp_size=32, multiprocessors=108, largest_cluster=1, shared_bytes=163 << 10)
RTX = Device(warp_size=32, multiprocessors=170, largest_cluster=1, shared_bytes=99 << 10)
OLD = Device(warp_size=32, multiprocessors=68, largest_cluster=1, shared_bytes=0)
MI300X = Device(warp_size=64, multiprocessors=304, largest_cluster=1, shared_bytes=0)


def of(num_classes, device=H100, element_size=2, holds_rows=True, plain=True, at_once=None, window=0):
    return plan(
        num_classes, element_size,
        holds_rows=holds_rows, at_once=at_once or 16 // element_size, plain=plain, device=device, window=window,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [
        # path, rows, classes of a tile, groups, tiles, tail, warps, blocks, stages, programs, registers
        (1, ("resident", 128, 8, 1, 0, 1, 4, 1, 0, 0, 168)),
        (10, ("resident", 128, 8, 1, 1, 2, 4, 1, 0, 0, 168)),
        (32, ("resident", 128, 8, 1, 4, 0, 4, 1, 0, 0, 168)),
        (33, ("resident", 64, 16, 2, 2, 1, 4, 1, 0, 0, 168)),
        (128, ("resident", 32, 32, 4, 4, 0, 4, 1, 0, 0, 168)),
        (1000, ("resident", 4, 256, 32, 4, 0, 4, 1, 0, 0, 168)),
        (1024, ("resident", 4, 256, 32, 4, 0, 4, 1, 0, 0, 168)),
        (1025, ("resident", 1, 512, 32, 2, 2, 1, 1, 0, 0, 168)),
        (4096, ("resident", 1, 1024, 128, 4, 0, 4, 1, 0, 0, 128)),
        (6400, ("resident", 1, 2048, 128, 3, 2, 4, 1, 0, 0, 168)),
        (6401, ("resident", 1, 2048, 256, 3, 2, 8, 1, 2, 264, 128)),
        (8192, ("resident", 1, 2048, 256, 4, 0, 8, 1, 2, 264, 128)),
        (8193, ("resident", 1, 4096, 256, 2, 2, 8, 1, 2, 132, 255)),
        (16384, ("resident", 1, 4096, 512, 4, 0, 16, 1, 2, 132, 128)),
        (16385, ("cluster", 1, 8192, 512, 2, 2, 4, 4, 0, 0, 168)),
        (50304, ("cluster", 1, 16384, 1024, 3, 2, 4, 8, 0, 0, 168)),
        (102400, ("cluster", 1, 32768, 2048, 3, 2, 4, 16, 0, 0, 168)),
        (102401, ("cluster", 1, 32768, 4096, 3, 2, 8, 16, 0, 0, 128)),
        (131073, ("cluster", 1, 65536, 4096, 2, 2, 8, 16, 2, 8, 255)),
        (204801, ("cluster", 1, 65536, 8192, 3, 2, 16, 16, 2, 8, 128)),
        (262144, ("cluster", 1, 65536, 8192, 4, 0, 16, 16, 2, 8, 128)),
        (262145, ("loop", 1, 8192, 1024, 2, 0, 32, 1, 0, 0, 64)),
    ],
)
def test_table_of_an_h100(num_classes, expected):
    assert of(num_classes) == expected


@pytest.mark.parametrize(
    ("num_classes", "element_size", "threads"),
    [(16385, 2, 256), (32768, 2, 256), (32769, 2, 512), (65536, 2, 512), (16385, 4, 512), (10**6, 4, 1024)],
)  # fmt: skip
def test_loops_have_more_threads_the_longer_a_row(num_classes, element_size, threads):
    for device in (A100, OLD, MI300X):
        how = of(num_classes, device, element_size=element_size)
        assert (how.path, how.num_warps * device.warp_size, how.num_ctas, how.stages) == ("loop", threads, 1, 0)


def test_what_a_device_does_not_have():
    assert of(16384, A100).stages == 2
    assert of(16384, OLD).stages == of(16384, MI300X).stages == 0
    assert of(16384, OLD).programs == 0
    for device, longest in ((A100, 16384), (RTX, 12288)):  # whose next row there is shared memory for
        assert [of(K, device, element_size=4).stages for K in (longest - 3, longest)] == [2, 2]
    assert of(16384, RTX).stages == 2
    assert of(12289, RTX, element_size=4).stages == 0


def test_smaller_clusters():
    # As many threads in fewer blocks, as long as a block's registers suffice.
    for largest, expected in ((16, [8, 16, 16, 16]), (8, [8, 8, 8, 1]), (4, [4, 4, 1, 1]), (2, [1, 1, 1, 1])):
        device = H100._replace(largest_cluster=largest)
        plans = [of(num_classes, device) for num_classes in (50304, 60000, 102400, 200000)]
        assert [how.num_ctas for how in plans] == expected
        assert [how.path == "loop" for how in plans] == [how.num_ctas == 1 for how in plans]


def test_small_gpus_have_programs():
    for multiprocessors in range(1, 21):
        for num_classes in (8000, 16384, 200000):
            assert of(num_classes, H100._replace(multiprocessors=multiprocessors)).programs >= 1


def test_options_take_registers():
    assert of(6144, plain=False)[:9] == ("resident", 1, 4096, 256, 1, 8, 8, 1, 0)
    assert of(8192, plain=False)[:9] == ("resident", 1, 4096, 512, 2, 0, 16, 1, 0)
    assert of(8193, plain=False)[:8] == ("cluster", 1, 8192, 512, 1, 2, 4, 4)
    assert of(131073, plain=False).path == "loop"
    assert of(300000, plain=False)[6:] == (16, 1, 0, 0, 128)


def test_an_edge_takes_a_class_for_each_thread():
    # 50257 = 48 x 1024 + 1105: the edge takes 1016 of the rest, so 50 would hold nothing that 48 and 2 do not.
    assert of(50257, at_once=1)[4:6] == (3, 2)
    assert of(49152 + 1016, at_once=1, window=8)[4:6] == (3, 0)
    assert of(49152 + 1017, at_once=1, window=8)[4:6] == (3, 2)


def test_rows_that_are_not_aligned_are_not_on_their_way():
    for num_classes in (5000, 16383, 200000):
        how = of(num_classes)
        assert of(num_classes, at_once=1) == how._replace(stages=0, programs=0)


@pytest.mark.parametrize("device", [H100, A100, RTX, OLD, MI300X])
def test_every_plan_can_be_launched(device):
    sizes = sorted({max(1, 2**i + j) for i in range(21) for j in (-1, 0, 1)} | {1000, 21841, 50257, 128256, 250112})
    for num_classes, element_size, holds_rows, plain in itertools.product(sizes, (2, 4), (False, True), (False, True)):
        at_once = math.gcd(num_classes, 16 // element_size)
        how = of(num_classes, device, element_size, holds_rows, plain, at_once)
        threads = how.num_warps * device.warp_size
        assert threads <= 1024
        assert threads * how.registers <= 65536
        assert how.num_ctas <= 16
        assert (how.programs > 0) == (how.stages > 0)
        places = how.block_k * how.tiles + how.tail * how.groups
        if how.rows > 1:
            # All threads have a row, and of it as many classes at a time as one instruction reads.
            assert how.path == "resident"
            assert how.rows * how.groups == threads
            assert how.block_k == how.groups * at_once
            assert places - how.groups < num_classes <= places
            continue
        assert how.groups == threads * how.num_ctas
        assert how.block_k in (8 * how.groups, 16 * how.groups)
        if how.path != "loop":
            assert holds_rows
            assert places - 2 * how.groups < num_classes <= places
            assert how.tail * how.groups < how.block_k
