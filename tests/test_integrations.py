"""In the tools that people train with: the pages of docs/ run, and what they compute is right."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import loss_and_gradient
from torch._dynamo.utils import counters

from sre_triton import LinearSelfRegularizedEntropyLoss, SelfRegularizedEntropyLoss, self_regularized_entropy

ROOT = Path(__file__).parents[1]
PAGES = {"lightning", "monitoring", "pytorch", "sharded_classes", "timm", "transformers"}

pytestmark = pytest.mark.filterwarnings("ignore")  # those tools' own


def code_of(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert len(page.splitlines()) <= 30
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


def run(name):
    """The page's names after its code has run."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    names = {}
    exec(compile(code_of(name), name, "exec"), names)
    return names


def test_no_page_is_forgotten():
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == PAGES | {"evidence"}  # which test_evidence.py reads


def test_derivation_of_a_million_classes(capsys):
    run("sharded_classes")
    lines = (ROOT / "docs" / "sharded_classes.md").read_text().splitlines(keepends=True)
    assert "".join(line for line in lines if re.match(r"\| \d", line)) == capsys.readouterr().out


def test_monitoring(capsys, uncompiled):
    names = run("monitoring")
    numbers = [
        [float(n) for n in re.findall(r" ([\d.e-]+)(?= |$)", " " + line)]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert numbers[0][-1] == 1e-3  # all classes are as probable, the right one too
    _, H, S, wrong_p = numbers[-1]
    assert H < 0.01  # the page's first reading: every wrong class is at c
    assert 0.69 < S <= 0.6932
    assert 0.5e-7 < wrong_p < 2e-7
    logits, labels, wrong_p = names["logits"].detach(), names["labels"], names["wrong_p"]
    wrong = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    assert wrong_p.log().item() == pytest.approx(logits.double().log_softmax(1)[wrong].mean().item(), abs=0.2)


def test_pytorch(uncompiled):
    torch.compiler.reset()
    counters.clear()
    names = run("pytorch")
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    model, x, y = names["model"], names["x"], names["y"]
    accumulated = model.weight.grad.clone()
    names["optimizer"].zero_grad()
    self_regularized_entropy(model(x), y, class_mean=True).backward()
    torch.testing.assert_close(accumulated, model.weight.grad)


def test_timm(uncompiled):
    pytest.importorskip("timm")
    names = run("timm")
    task, mixup, images, labels = (names[name] for name in ("task", "mixup", "images", "labels"))
    task.eval()
    inputs, target = mixup(images.clone(), labels)
    assert target.shape == (8, 10)
    for x, y in ((images, labels), (inputs, target)):
        found = task(x, y)
        true = loss_and_gradient(
            found["output"].detach().double(), y.double() if y.dim() == 2 else y, backend="eager", class_mean=True
        )
        torch.testing.assert_close(found["loss"].double(), true[0], rtol=1e-5, atol=1e-6)


@pytest.fixture
def imagenet(tmp_path):
    """The path of the example, with its arguments for a small model on random images."""
    pytest.importorskip("timm")
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        for k in range(6):
            folder = tmp_path / "images" / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (40, 40, 3), generator=generator).byte()
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    arguments = [ROOT / "examples" / "imagenet.py", tmp_path / "images", "--out", tmp_path, "--workers", "0"]
    arguments += ["--model", "test_resnet", "--image-size", "32", "--batch-size", "6", "--ema-decay", "0.5"]
    return [str(argument) for argument in arguments]


def test_imagenet_example(tmp_path, imagenet):
    environment = {**os.environ, "CXX": "/nonexistent/compiler", "PET_STANDALONE": "1", "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2"]
    states = []
    for launcher, more in (
        ([sys.executable], ["--epochs", "1", "--mixup", "0", "--cutmix", "0"]),
        (
            torchrun,
            ["--epochs", "3", "--lr", "0", "--resume", tmp_path / "last.pth", "--amp", "bfloat16", "--mixup", "0.2"],
        ),
    ):
        done = subprocess.run([*launcher, *imagenet, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        states.append(torch.load(tmp_path / "last.pth"))
    assert [state["epoch"] for state in states] == [1, 3]
    for name, value in states[0]["model"].items():  # it went on from there, and with a rate of 0 went nowhere
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(states[1]["model"][name], value)
    assert states[1]["optimizer"]["state"].keys() == states[0]["optimizer"]["state"].keys()
    assert not any("reg_weight" in name for name in states[0]["model"])
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["reg_weight"]) == 1
    for row in rows:
        for prefix in ("", "ema_"):
            assert round(18 * float(row[prefix + "top1"]), 6) in range(19)  # every image of val once
            assert float(row[prefix + "top1"]) <= float(row[prefix + "top5"]) <= 1
            assert 0 < float(row[prefix + "S"]) < 0.7


def test_imagenet_resumes_in_the_middle_of_a_ramp(tmp_path, imagenet, monkeypatch, uncompiled):
    monkeypatch.syspath_prepend(ROOT / "examples")
    torch.use_deterministic_algorithms(False)
    import imagenet as example

    def run(out, *options):
        monkeypatch.setattr(sys, "argv", [*imagenet, "--out", str(tmp_path / out), *options])
        example.main()

    def log(out):
        with (tmp_path / out / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    train_epoch, interrupted_at = example.train_epoch, None

    def interrupted(epoch, *args):
        if epoch == interrupted_at:
            raise KeyboardInterrupt
        return train_epoch(epoch, *args)

    monkeypatch.setattr(example, "train_epoch", interrupted)
    options = ["--epochs", "4", "--reg-weight", "0.3", "--reg-warmup", "0.8"]
    run("whole", *options)
    interrupted_at = 2
    with pytest.raises(SystemExit, match=r"interrupted; go on with --resume .*parts.last\.pth"):
        run("parts", *options)
    interrupted_at = None
    assert 0 < float(log("parts")[-1]["reg_weight"]) < 0.3
    run("parts", "--resume", str(tmp_path / "parts" / "last.pth"))
    assert [row["reg_weight"] for row in log("parts")] == [row["reg_weight"] for row in log("whole")]
    assert log("parts") == log("whole")


def test_lightning(tmp_path):
    pytest.importorskip("lightning")
    page = tmp_path / "page.py"
    page.write_text(code_of("lightning") + "\nprint(trainer.callback_metrics)\n")
    environment = {**os.environ, "CXX": "/nonexistent/compiler"}
    done = subprocess.run([sys.executable, page], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert re.search(r"'H': tensor\(\d", done.stdout)
    assert "'accuracy': tensor(" in done.stdout


def test_fabric(uncompiled):
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric

    criterion, z, y = SelfRegularizedEntropyLoss(), torch.randn(4, 20), torch.arange(4)
    wrapped = Fabric(accelerator="cpu", devices=1).setup_module(criterion)
    for reg_weight in (1.0, 0.25):  # a schedule keeps the criterion by name
        criterion.reg_weight = reg_weight
        assert torch.equal(wrapped(z, y), self_regularized_entropy(z, y, reg_weight=reg_weight))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_lightning_modules_are_scripted_and_traced(fused, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            criterion = LinearSelfRegularizedEntropyLoss(8, 20) if fused else SelfRegularizedEntropyLoss()
            self.criterion, self.layer = criterion, criterion.linear if fused else torch.nn.Linear(8, 20)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, _):
            x, y = batch
            return self.criterion(x if fused else self(x), y)

    model, x = Classifier(), torch.randn(3, 8)
    for how in ({"method": "script"}, {"method": "trace", "example_inputs": x}):
        model.to_torchscript(tmp_path / "script.pt", **how)
        assert torch.equal(torch.jit.load(tmp_path / "script.pt")(x), model(x))


def test_transformers(tmp_path, monkeypatch, uncompiled):
    pytest.importorskip("transformers")
    from transformers import ViTConfig, ViTForImageClassification

    monkeypatch.chdir(tmp_path)
    names = run("transformers")
    Llama, Trainer, TrainingArguments = (names[name] for name in ("LlamaForCausalLM", "Trainer", "TrainingArguments"))

    def weights(make, function, batch, micro_batches, devices):
        torch.manual_seed(0)
        model = make(names["config"])
        args = TrainingArguments(
            "trainer", max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=micro_batches,
            optim="sgd", learning_rate=1 / devices, warmup_steps=0, report_to=[], save_strategy="no", max_grad_norm=0.0,
            use_cpu=True,
        )  # fmt: skip
        args._n_gpu = devices  # of DataParallel, by whose number transformers multiplies the loss
        text = [dict(row) for row in names["text"][:8]]
        for i, row in enumerate(text):  # as many labels in none
            row["labels"] = row["labels"].clone()
            row["labels"][:i] = -100
        trainer = Trainer(model.eval(), args, train_dataset=text, compute_loss_func=function)
        model.train = lambda *_: model  # without dropout
        trainer.train()
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def at_once():
        torch.manual_seed(0)
        model = Llama(names["config"]).eval()
        labels = torch.stack([row["labels"] for row in names["text"][:8]])
        tokens = labels.clone()
        for i in range(8):
            labels[i, :i] = -100
        logits = model(tokens).logits[:, :-1].flatten(0, 1)
        SelfRegularizedEntropyLoss(class_mean=True)(logits, labels[:, 1:].flatten()).backward()
        return {name: value.detach() - value.grad for name, value in model.named_parameters()}

    labels, model = torch.randint(300, (2, 16)), Llama(names["config"])
    with torch.no_grad():
        for outputs, head in ((model(labels), None), (model.model(labels), model.lm_head)):
            assert torch.equal(*(names["loss"](outputs, labels, n, head) for n in (None, 2 * 15)))
            for count in (torch.tensor(60), torch.tensor(60).expand(2, 1)):  # the latter is DataParallel's
                assert torch.equal(*(names["loss"](outputs, labels, n, head) for n in (60, count)))

    expected = at_once()
    for make, function in ((Llama, names["loss"]), (names["FusedForCausalLM"], None)):
        for how in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
            found = weights(make, function, *how)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)

    vit = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        num_labels=10,
    )  # fmt: skip
    images = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 10} for i in range(8)]
    args = TrainingArguments(
        "trainer", num_train_epochs=20, learning_rate=0.01, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(ViTForImageClassification(vit), args, train_dataset=images, compute_loss_func=names["loss"])
    trainer.train()
    assert (trainer.predict(images).predictions.argmax(1) == range(8)).all()


@pytest.mark.parametrize("name", ["lora", "dora", "rslora, dropout", "modules_to_save", "merged"])
def test_peft_on_the_heads_layer(name, uncompiled):
    peft = pytest.importorskip("peft")
    N, D, K = 6, 8, 20
    torch.manual_seed(1)
    x, y = torch.randn(N, D), torch.randint(K, (N,))

    def model():
        torch.manual_seed(0)
        body, head = torch.nn.Linear(D, D), LinearSelfRegularizedEntropyLoss(D, K)
        options = {
            "lora": {"target_modules": ["head.linear"], "init_lora_weights": False},
            "dora": {"target_modules": ["head.linear"], "use_dora": True, "init_lora_weights": False},
            "rslora, dropout": {
                "target_modules": ["head.linear"], "use_rslora": True, "lora_dropout": 0.5, "init_lora_weights": False,
            },
            "modules_to_save": {"target_modules": ["body"], "modules_to_save": ["linear"]},
            "merged": {"target_modules": ["head.linear"], "init_lora_weights": False},
        }[name]  # fmt: skip
        layers = torch.nn.ModuleDict({"body": body, "head": head})
        found = peft.get_peft_model(layers, peft.LoraConfig(r=2, **options))
        return found.merge_and_unload().requires_grad_() if name == "merged" else found.base_model.model

    def step(fused):
        network = model()
        torch.manual_seed(2)
        features, head = network["body"](x), network["head"]
        loss = head(features, y) if fused else self_regularized_entropy(head.linear(features), y, backend="eager")
        loss.backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        assert (type(head.linear) is torch.nn.Linear) == (name == "merged")
        return loss.detach(), gradients

    found, expected = step(True), step(False)
    torch.testing.assert_close(found, expected)
    assert found[1]
