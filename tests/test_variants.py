"""The kernels compile for GPUs that are not here, as the launcher would launch them: see variants.py."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sre_triton.kernels.plan
from sre_triton.kernels.plan import Device, plan

FOLDER = Path(__file__).parent


def run(*command, status=0):
    """A process of its own, as Triton reads once whether it interprets."""
    path = os.pathsep.join((str(FOLDER), str(FOLDER.parent / "perf"), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stderr[-3000:]
    return result.stdout


def lines_of(*arguments):
    return [json.loads(line) for line in run(FOLDER / "variants.py", *arguments).splitlines()]


def has_clusters(triton):
    """Rows over several programs need what Triton 3.8 was the first to have."""
    return tuple(map(int, triton.split(".")[:2])) >= (3, 8)


def assert_can_be_launched(line):
    nvidia = line["gpu"].startswith("sm_")
    assert line["fusion"], line
    assert line["warps"] * (32 if nvidia else 64) <= 1024, line
    assert line["shared"] <= line["most_shared"], line
    if nvidia:
        # What Triton 3.8 cannot compile for Blackwell, if it does not see it early enough. (3.6 and 3.7 take -y for
        # 0 - y, also of a product.)
        assert line["subtracted_products"] == 0 or not line["triton"].startswith("3.8"), line
        # Bytes: on sm_100 where a thread holds 50 classes, and with Triton before 3.8 elsewhere.
        assert line["spill"] <= (16 if has_clusters(line["triton"]) else 32), line
        variant = line["variant"]
        # Rows so short that no thread has 16 bytes, or that share a program, and are read as they lie.
        narrow = variant and (
            variant["TILES"] == 0 or (variant["ROWS"] > 1 and 1 << variant["ADJACENT"] < variant["VECTOR"])
        )
        assert line["widest"] >= 16 or line["less"] != "0" or narrow, line


def test_variants_compile():
    targets = ["sm_80", "sm_90", "sm_100", "gfx942"]
    lines = lines_of(*targets, "--values")
    for target in targets:
        assert {line["kernel"] for line in lines if line["gpu"] == target} == {
            "row_loss_kernel",
            "row_lse_kernel",
            "row_sums_kernel",
            "row_gradient_kernel",
            "scale_gradient_kernel",
        }
    for line in lines:
        assert_can_be_launched(line)
        if line["primitive"] == "row_gradient" and line["target"] == "indices" and line["gpu"].startswith("sm_"):
            # After the targets' logits are read, which in place the gradient is about to overwrite.
            assert line["barriers"] == 1, line


slow = pytest.mark.slow  # more dtypes, of which test_variants_compile has a few kernels


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=slow), pytest.param("float32", marks=slow)]
)
def test_every_way_to_hold_rows_compiles_for_blackwell(dtype):
    lines = lines_of("sm_100", "--ways", dtype)
    largest = 16 if has_clusters(lines[0]["triton"]) else 1
    device = Device(warp_size=32, multiprocessors=148, largest_cluster=largest, shared_bytes=227 << 10)
    ways, tiles, size = set(), set(), 4 if dtype == "float32" else 2
    for K in range(1, 2**18 + 2):
        for at_once in [2**i for i in range(5) if 2**i <= 16 // size]:
            how = plan(K, size, holds_rows=True, at_once=at_once, plain=True, device=device)
            width = how.block_k // how.groups
            if at_once == 16 // size:
                ways |= {(window, width, how.num_warps, how.num_ctas) for window in {False, how.rows == 1}}
                if K % at_once == 0 or how.rows == 1:
                    tiles.add((width, how.tiles, how.tail))
            elif how.rows > 1:
                ways.add((False, width, how.num_warps, how.num_ctas))
    found, found_tiles = set(), set()
    for line in lines:
        assert_can_be_launched(line)
        variant = line["variant"]
        width = variant["BLOCK_K"] // variant["GROUPS"]
        found.add((variant["WINDOW"], width, line["warps"], line["ctas"]))
        found_tiles.add((width, variant["TILES"], variant["TAIL"]))
    assert found == ways
    assert found_tiles >= tiles


def test_common_numbers_of_classes_compile_for_every_gpu():
    sizes = ["1823", "4095", "8191", "50257"]
    lines = lines_of("all", "--at", *sizes)
    gpus = ("sm_80", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
    assert [(line["gpu"], line["width"]) for line in lines] == list(itertools.product(gpus, sizes))
    for line in lines:
        assert_can_be_launched(line)


def test_a_compiler_that_ends_its_process_does_not_end_the_table(tmp_path):
    code = """
import os
import sys

import variants


def compiled(target, call):
    if call["width"] == 7:
        sys.stderr.write("Assertion failed")
        sys.stderr.flush()
        os.abort()
    return {"process": os.getpid()}


variants.warm_up = lambda: None
variants.compiled = compiled
variants.main()
"""
    path = tmp_path / "table.jsonl"
    run("-c", code, "sm_90", "sm_100", "--at", 5, 7, "--resume", path, status=1)
    before = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["gpu"], line["width"], "died" in line) for line in before] == [
        ("sm_90", "5", False), ("sm_90", "7", True), ("sm_100", "5", False), ("sm_100", "7", True)
    ]  # fmt: skip
    assert "Assertion failed" in before[1]["died"]
    run("-c", code, "sm_90", "sm_100", "--at", 5, 7, 9, "--resume", path, status=1)
    after = [json.loads(line) for line in path.read_text().splitlines()]
    assert after[:4] == before
    assert [(line["gpu"], line["width"]) for line in after[4:]] == [("sm_90", "9"), ("sm_100", "9")]


def test_the_whole_table_is_laid_out():
    code = """
import variants
from cross_compile import compile_only

compile_only("sm_90")
print(min(len(variants.every_way(variants.STEP | other)) for other in variants.OTHERS))
"""
    assert int(run("-c", code)) > 0


def test_numbers_are_not_compiled_in():
    code = """
import warnings

import torch
from cross_compile import compile_only
from helpers import options_of
from sre_triton.kernels import primitives

warnings.simplefilter("error")  # Triton warns where it is left to it whether products and sums are fused
warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.13's ast, by Triton 3.8
compiled = compile_only("sm_90")
for i, N in enumerate((3, 5, 7)):
    logits, target = torch.zeros(N, 1000, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.long)
    options = options_of(
        c=(0.5, 1e-7, 1e-3)[i], reg_weight=(0.0, 1.0, 0.3)[i], ignore_index=(-100, -2, -3)[i],
        label_smoothing=(0.1, 0.5, 1.0)[i], z_loss=(0.5, 1.0, 0.1)[i], softcap=(1.0, 2.0, 30.0)[i],
    )
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(N), options)
    primitives.scale_gradient_(torch.zeros(N, 1000), torch.tensor(0.5))
    primitives.inverse_count(target, None, 1000, (-100, -2, -3)[i])
    primitives.scaled_sum(torch.zeros(N), torch.tensor(0.5))
print(len(compiled), len({id(launch.compiled) for launch in compiled}))
"""
    assert run("-c", code).split() == ["12", "4"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_target_is_written_by_the_thread_that_wrote_its_tile(dtype):
    # Scalars are stored by one thread, in a cluster by its first block: a race with whoever stores the tile.
    code = f"""
import torch
from cross_compile import compile_only
from helpers import options_of
from sre_triton.kernels import primitives

launches = compile_only("sm_90")
for num_classes in (24, 1000, 1400, 5003, 16384, 21841, 32768, 50257, 262144, 300000):
    logits, target = torch.empty(600, num_classes, dtype=torch.{dtype}), torch.zeros(600, dtype=torch.long)
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(600), options_of())
    print(launches[-1].arguments["VARIANT"].GROUPS, launches[-1].compiled.asm["ttgir"], "-- the next --")
"""
    texts = run("-c", code).split("-- the next --")[:-1]
    assert len(texts) == 10
    element = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
    at_once = 4 if dtype == "float32" else 8
    for text in texts:
        groups = int(text.split(maxsplit=1)[0])
        pattern = rf"tt\.store .*?: (tensor<((?:\d+x)+)!tt\.ptr<{element}>, (#\w+)>|!tt\.ptr<{element}>)"
        stores = [
            ([int(size) for size in shape.split("x")[:-1]], layout) for _, shape, layout in re.findall(pattern, text)
        ]
        several = any(len(shape) == 3 for shape, _ in stores)
        if dtype == "float32":  # so are the four losses: a number for each row
            losses = [shape for shape, _ in stores if len(shape) == several]
            assert len(losses) in (4, 8)  # a row that is ignored has stores of its own
            stores = [store for store in stores if len(store[0]) != several]
        # Of one row a tile is a vector; of several it has three dimensions, rows, threads, and classes of a thread.
        assert {len(shape) for shape, _ in stores} == {3 if several else 1}
        widths = [(shape[-1] if several else shape[0] // groups, layout) for shape, layout in stores]
        for width, layout in widths:  # 1: the edges of a window
            assert width in (1, 2, 4, 8, 16)
            of_thread = ", ".join(["1"] * (2 * several) + [str(min(width, at_once))])
            assert f"sizePerThread = [{of_thread}]" in re.search(rf"{layout} = (.*)", text)[1]
        layouts = [layout for width, layout in widths if width >= at_once]
        assert len(layouts) >= 2
        assert len(set(layouts)) == 1


def test_clusters_meet_as_often_as_the_table_says_and_at_the_end():
    # A thread block that ends while another still reads its shared memory is a launch failure that stays.
    code = """
import json
import torch
from cross_compile import compile_only
from helpers import options_of
from sre_triton.kernels import launch, primitives

launches = compile_only("sm_90")
cases = [(K, dtype, {}) for K in (21841, 50304, 131072, 262144) for dtype in (torch.bfloat16, torch.float32)]
cases += [(K, torch.float16, {"label_smoothing": 0.1}) for K in (21841, 262144)]
cases += [(40001, torch.float16, {"softcap": 3.0})]
for num_classes, dtype, options in cases * (launch.TRITON_VERSION >= (3, 8)):
    logits, target = torch.empty(600, num_classes, dtype=dtype), torch.zeros(600, dtype=torch.long)
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(600), options_of(**options))
    made = launches[-1]
    assert made.compiled.metadata.num_ctas > 1
    print(json.dumps([made.arguments["VARIANT"].STAGES, options, made.compiled.asm["ptx"]]))
"""
    lines = [json.loads(line) for line in run("-c", code).splitlines()]
    assert len(lines) in (0, 11)  # without clusters all take the loop
    assert "seven times a row" in sre_triton.kernels.plan.__doc__
    for stages, options, ptx in lines:
        events = re.findall(r"barrier\.cluster\.(?:arrive|wait)|shared::cluster|mapa|st\.global|\bret;", ptx)
        assert events[-3:] == ["barrier.cluster.arrive", "barrier.cluster.wait", "ret;"]
        assert events.count("ret;") == 1
        # Label smoothing has a sum of its own. A program that goes from row to row meets once more, at its end.
        expected = 7 + 2 * ("label_smoothing" in options) + (stages > 0)
        assert events.count("barrier.cluster.arrive") == events.count("barrier.cluster.wait") == expected, options


def test_what_a_row_needs_last_is_loaded_before_its_threads_meet():
    # scale and λ: behind the last reduction, whose barriers no load passes, their latency would be waited for.
    code = """
import torch
from cross_compile import OnGpu, compile_only
from helpers import options_of
from sre_triton.kernels import primitives

launches = compile_only("sm_90")
options = options_of(reg_weight=OnGpu(torch.ones(())))
for num_classes in (10, 1000, 5003, 16384, 50257, 262144, 300000):
    logits, target = torch.empty(600, num_classes, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.long)
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(600), options)
    print(launches[-1].compiled.asm["ttgir"], "-- the next --")
"""
    texts = run("-c", code).split("-- the next --")[:-1]
    assert len(texts) == 7
    for text in texts:
        # λ is a scalar, scale is one too or has a value for each of the rows that share a program.
        loads = [match.start() for match in re.finditer(r"tt\.load .*: (tensor<\d+x)?!tt\.ptr<f32>", text)]
        assert len(loads) == 2
        assert max(loads) < text.index('"tt.reduce"')


def test_the_next_row_is_on_its_way():
    code = """
import torch
from cross_compile import Code, compile_only
from helpers import options_of
from sre_triton.kernels import launch, primitives

launches = compile_only("sm_90")
for num_classes in (4096, 8192, 16384, *[262144] * (launch.TRITON_VERSION >= (3, 8))):
    logits, target = torch.empty(999, num_classes, dtype=torch.bfloat16), torch.zeros(999, dtype=torch.long)
    primitives.row_loss_and_gradient(logits, target, None, torch.ones(()).expand(999), options_of())
    text = Code(launches[-1].compiled).text
    # Of 16 bytes each: four tiles before the loop over the rows, and four in it; what is loaded directly is not a tile.
    print(text.count("LDGSTS.E.BYPASS.128"), text.count("LDG.E.128"))
"""
    first, second, *others = run("-c", code).split()
    assert (first, second) == ("0", "4")
    assert others in (["8", "0"] * 2, ["8", "0"] * 3)  # the widest row is held, in a cluster, from Triton 3.8 on
