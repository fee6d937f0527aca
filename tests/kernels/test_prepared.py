"""What is kept from one launch to the next: see launch.py. With a driver for a GPU that is not there."""

import json

import pytest
from test_variants import has_clusters, run

triton = pytest.importorskip("triton")

CLUSTERS = has_clusters(triton.__version__)
needs_clusters = pytest.mark.skipif(not CLUSTERS, reason="before Triton 3.8 no kernel has clusters")

BEGIN = """
import json
import cross_compile
import torch
from helpers import options_of
from sre_triton.kernels import launch, primitives

def step(N, K, dtype=torch.bfloat16, offset=0, **options):
    logits = torch.empty(N * K + offset, dtype=dtype)[offset:].view(N, K)
    target = torch.zeros(N, dtype=torch.long)
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()), options_of(**options))
    primitives.inverse_count(target, None, K, -100)
    primitives.scaled_sum(torch.zeros(N), torch.ones(()))
    primitives.scale_gradient_(logits, torch.ones(()))
"""


def test_no_batch_compiles_again():
    # Triton by itself compiles for 1, for multiples of 16, and for others.
    code = """
launches = cross_compile.compile_only("sm_90")
for K in (10, 1000, 5003, 16384, 50257, 262144, 300000):
    for dtype in (torch.bfloat16, torch.float32):
        for N in range(1, 301):
            step(N, K, dtype)
        kernels = {}
        for made in launches:
            kernels.setdefault(made.name, set()).add(id(made.compiled))
        print(json.dumps([K, len(launches), *map(len, kernels.values())]))
        launches.clear()
"""
    lines = [json.loads(line) for line in run("-c", BEGIN + code).splitlines()]
    assert len(lines) == 14
    for line in lines:
        assert line[1:] == [1200, 1, 1, 1, 1], line


def test_the_first_batch_decides_nothing():
    # What is kept of one batch runs others, so nothing of its number of rows may be compiled in.
    code = """
launches = cross_compile.compile_only("sm_90")
for K in (10, 1000, 8192, 50257, 300000):
    for N in (1, 2, 8, 9, 16, 24, 132):
        cross_compile.forget()
        step(N, K)
    kernels = {}
    for made in launches:
        kernels.setdefault(made.name, set()).add(id(made.compiled))
    print(json.dumps([launches[0].compiled.src.signature["num_programs"], *map(len, kernels.values())]))
    launches.clear()
"""
    lines = [json.loads(line) for line in run("-c", BEGIN + code).splitlines()]
    assert lines == [["i32", 1, 1, 1, 1]] * 5


def test_what_is_compiled_in_is_told_apart():
    # A number may take the place of another, but not of a pointer; a row may begin elsewhere; K and strides differ.
    code = """
launches = cross_compile.compile_only("sm_90")
on_gpu = cross_compile.OnGpu(torch.ones(()))
same = [{}, {"reg_weight": 0.5}, {"c": 1e-3}, {"reg_weight": 1.0}]
other = [{"reg_weight": on_gpu}, {"z_loss": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.1}, {"ignore_index": 16},
         {"offset": 1}, {"offset": 4}, {"dtype": torch.float32}]
for how in same + other:
    step(3, 1000, **how)
for K in (1001, 1008, 1024):
    step(3, K)
made = [one for one in launches if one.name == "row_loss_kernel"]
print(json.dumps([[id(one.compiled) for one in made], [one.arguments["scalars"].c for one in made[:4]]]))
"""
    ids, cs = json.loads(run("-c", BEGIN + code))
    assert len(set(ids[:4])) == 1
    assert cs == [1e-7, 1e-7, 1e-3, 1e-7]
    # Both offsets are no multiple of 16 bytes, and what is the same for 1000 and 1008 classes is compiled once.
    assert ids[9] == ids[10]
    assert ids[13] == ids[0]
    assert len(set(ids)) == len(ids) - 5


def test_on_amd_a_large_batch_has_code_of_its_own():
    # Of tensors in less than 2 GiB Triton cuts offsets to 32 bits.
    code = """
launches = cross_compile.compile_only("gfx942")
for N in (64, 100, 1_500_000, 1_500_001, 64):
    step(N, 1000, torch.float16)
for name in ("row_loss_kernel", "scale_gradient_kernel"):
    print(json.dumps([id(one.compiled) for one in launches if one.name == name]))
"""
    for line in run("-c", BEGIN + code).splitlines():
        few, more, many, again, last = json.loads(line)
        assert few == more == last
        assert many == again != few


def test_a_launch_hands_over_what_tritons_own_would():
    code = """
handed = []
cross_compile.Driver.launcher_cls = lambda self, source, metadata: lambda *given: handed.append(given)
cross_compile.pretend("sm_90")
kept = []
enqueue = launch.enqueue
launch.enqueue = lambda kernel, programs, given: kept.append((kernel, programs, dict(given))) or enqueue(
    kernel, programs, given
)
for K in (10, 5003, 50257, 300000):
    step(7, K, reg_weight=cross_compile.OnGpu(torch.ones(())))

def flat(value):
    if type(value) is int and value > 2**32 or isinstance(value, torch.Tensor):
        return str(value if type(value) is int else value.data_ptr())
    return [flat(part) for part in value] if isinstance(value, (tuple, list)) else repr(value).split(" at 0x")[0]

for (kernel, programs, given), mine in zip(kept, list(handed), strict=True):
    meta = kernel.metadata
    registers = {"maxnreg": meta.maxnreg} if meta.maxnreg else {}
    kernel.src.fn[(programs,)](
        **given, num_warps=meta.num_warps, num_ctas=meta.num_ctas, enable_fp_fusion=True, **registers
    )
    print(meta.name, flat(mine) == flat(handed[-1]), len(handed))
"""
    lines = run("-c", BEGIN + code).splitlines()
    assert len(lines) == 16
    for number, line in enumerate(lines, 17):
        name, same, how_many = line.split()
        assert same == "True", name
        assert int(how_many) == number


@needs_clusters
@pytest.mark.parametrize(
    ("most", "expected"),
    [
        # The largest cluster that the driver has room for, how many of it; for K = 50304 and 262144 then thread blocks
        # of a cluster, tiles in registers, programs for 600 rows.
        ((16, 7), [[8, True, 600], [16, True, 7]]),
        ((16, 1), [[8, True, 600], [16, True, 1]]),
        ((8, 3), [[8, True, 600], [1, False, 600]]),
        ((4, 1), [[4, True, 1], [1, False, 600]]),
        ((0, 0), [[1, False, 600], [1, False, 600]]),
    ],
)
def test_clusters_that_the_gpu_has_no_room_for(most, expected):
    code = f"""
asked = []
def room(self, function, shared, num_ctas):
    asked.append((shared, num_ctas))
    return {most[1]} if num_ctas <= {most[0]} else 0

cross_compile.Driver.cuOccupancyMaxActiveClusters = room
launches = cross_compile.compile_only("sm_90")
found = []
for K in (50304, 262144):
    for N in (600, 599, 2):
        step(N, K)
    made = [one for one in launches if one.name == "row_loss_kernel"]
    assert len({{id(one.compiled) for one in made}}) == 1
    launches.clear()
    found.append([made[0].compiled.metadata.num_ctas, made[0].arguments["VARIANT"].RESIDENT, made[0].programs])
print(json.dumps([found, asked]))
"""
    found, asked = json.loads(run("-c", BEGIN + code))
    assert found == expected
    # Once for each kernel and size, the small kernels among them. As many blocks are to fit into shared
    # memory as have registers: three of 128 threads, one of 256 or 512.
    assert [num_ctas for _, num_ctas in asked] == ([8, 8, 8, 16, 8] if most[0] >= 8 else [8, 4, 8, 8, 16, 8])
    assert [(228 << 10) // (shared + 1024) for shared, _ in asked] == [3] + [1] * (len(asked) - 1)
