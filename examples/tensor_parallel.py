"""Tensor parallelism: a vocabulary of 50257 of which each rank has its own part, in embedding, head and loss.

The model predicts a token from the eight before it: their embeddings, a perceptron, a linear layer. parallelize_module
shards the embedding by rows and the layer by columns, so no rank ever has all logits: they are a DTensor, and the loss
takes it as it takes a tensor. The text is that of lm.py.

    pip install 'sre_triton[lm]'
    torchrun --nproc-per-node 2 examples/tensor_parallel.py              40 seconds on two cores
    torchrun --nproc-per-node 2 examples/tensor_parallel.py --fused      the same without logits

Where there are as many GPUs, each rank takes one. Prints H before and after: the same on any number of ranks, and on 1.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import os
import sys
import time

import torch
import torch.distributed as dist
from lm import VOCABULARY, load_tokens, peak_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from tqdm import tqdm

from sre_triton import linear_self_regularized_entropy, self_regularized_entropy

CONTEXT, BATCH, FEATURES, LEARNING_RATE = 8, 512, 128, 3e-3
REG_WEIGHT = 0.1  # over so many classes, more would cost likelihood: see lm.py


class Model(nn.Module):
    """The token after CONTEXT others."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, FEATURES)
        self.perceptron = nn.Sequential(
            nn.Flatten(), nn.Linear(CONTEXT * FEATURES, 4 * FEATURES), nn.GELU(), nn.Linear(4 * FEATURES, FEATURES)
        )
        self.head = nn.Linear(FEATURES, VOCABULARY)

    def forward(self, tokens: Tensor, labels: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        """(N, CONTEXT), (N,) -> the loss, and its cross entropy."""
        features = self.perceptron(self.tokens(tokens))
        options = {"reg_weight": REG_WEIGHT, "class_mean": True, "return_parts": True}
        if fused:
            head = self.head
            loss, parts = linear_self_regularized_entropy(
                features, head.weight, labels, linear_bias=head.bias, **options
            )
        else:
            loss, parts = self_regularized_entropy(self.head(features), labels, **options)
        return loss, parts.cross_entropy


def batch(tokens: Tensor, generator: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    """(N, CONTEXT) and (N,): the same on all ranks."""
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)].to(device)
    return windows[:, :-1], windows[:, -1]


def main() -> None:
    """Trains on all ranks; the first prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--fused", action="store_true", help="linear layer and loss in one, without logits")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps: expected 1 or more, got {args.steps}")
    if "RANK" not in os.environ:
        sys.exit("start it with: torchrun --nproc-per-node 2 examples/tensor_parallel.py")
    device = "cuda" if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))

    torch.manual_seed(0)
    model = Model().to(device)
    # Where logits are made, they stay a DTensor, each rank's of its own classes.
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    # One parameter at a time: those of a rank and those of all do not mix.
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1, foreach=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.steps + 1)

    tokens, generator = load_tokens(), torch.Generator().manual_seed(0)
    losses = []
    progress = tqdm(range(args.steps), unit="step", disable=dist.get_rank() > 0)
    for step in progress:
        if step == min(5, args.steps - 1):  # after what compiles
            started = time.perf_counter()
        loss, cross_entropy = model(*batch(tokens, generator, device), args.fused)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(cross_entropy.full_tensor())
        if step % 10 == 0:
            progress.set_postfix(H=f"{losses[-1].item():.3f}", refresh=False)
    first, last = losses[0].item(), torch.stack(losses[-10:]).mean().item()
    milliseconds = 1e3 * (time.perf_counter() - started) / (args.steps - min(5, args.steps - 1))
    peaks = [None] * mesh.size()
    dist.all_gather_object(peaks, peak_bytes(torch.device(device)))
    if dist.get_rank() == 0:
        here = sum(p.to_local().numel() for p in model.head.parameters())
        print(f"{mesh.size()} ranks on {device}, {here / 1e6:.1f} million parameters of the head on the first")
        print(f"H {first:.4f} -> {last:.4f}, perplexity {math.exp(first):.0f} -> {math.exp(last):.0f}")
        print(f"{milliseconds:.0f} ms a step, at most {max(peaks) / 1e6:.0f} MB a rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
