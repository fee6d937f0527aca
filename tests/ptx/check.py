"""Run the library's compiled kernels in the emulator of PTX, and compare them with float64.

    python tests/ptx/check.py --smoke                a case of every path, in seconds; with the library installed
    python tests/ptx/check.py --target sm_90         every group of cases, for hours
    python tests/ptx/check.py --mutate               without each barrier in turn: whether that is noticed; a minute
    python tests/ptx/check.py --target sm_90 --groups cluster --special extreme --contract

What is compared: H, S and the loss of each row to 2e-6 (H + S) + 3e-7 (the loss 5e-6 (H + S + Z) + 1e-6), the
statistics, and the gradient to 5e-6 of its norm + 3e-7, plus what rounding the true one to bf16 or fp16 costs. What is
watched: accesses outside of the tensors' elements, races in shared and global memory, copies that nobody waits for.
"""

import argparse
import ast
import contextlib
import ctypes
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

# Kernels are compiled down to PTX and no farther; what is half compiled must not lie in Triton's own cache.
os.environ["TRITON_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "ptx-emulator-cache")

import numpy as np
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

CUDABackend.make_cubin = lambda *_: b""

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "perf")]
from cross_compile import Driver, OnGpu, forget  # noqa: E402
from emulator import Code, EmulationError, Launch, Machine, Segment, Special, Tracker  # noqa: E402

import sre_triton  # noqa: E402
from sre_triton.kernels import launch  # noqa: E402

INF = float("inf")
FAR = 2**20  # elements between rows
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ---------------------------------------------------------------------------------------------------------------------
# The GPU that is not there


def _flat(value):
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _bytes(array_of: torch.Tensor) -> np.ndarray:
    """The memory from the first element to the last, whatever lies between."""
    extent = sum((n - 1) * s for n, s in zip(array_of.shape, array_of.stride(), strict=True)) + 1
    size = extent * array_of.element_size()
    return np.frombuffer((ctypes.c_char * size).from_address(array_of.data_ptr()), np.uint8)


# What a kernel may write; what of that it reads as well.
WRITES = {
    "row_loss_kernel": {"losses_ptr", "stats_ptr", "gradient_ptr"},
    "row_lse_kernel": {"stats_ptr"},
    "row_sums_kernel": {"sums_ptr"},
    "row_gradient_kernel": {"gradient_ptr"},
    "scale_gradient_kernel": {"gradient_ptr"},
    "inverse_count_kernel": {"factor_ptr"},
    "scaled_sum_kernel": {"sum_ptr"},
}


class Gpu:
    """From here on a launch on CPU tensors is compiled for the target and runs in the emulator."""

    def __init__(self, target: str) -> None:
        self.driver = Driver(target)
        triton.runtime.driver.set_active(self.driver)
        self.target = target
        self.special, self.contract, self.seed, self.track = Special(), False, 0, True
        self.mutate = None  # a function of the PTX
        self.codes: dict[str, Code] = {}
        self.variants: Counter = Counter()
        self.hazards: Counter = Counter()
        self.examples: dict = {}
        self.notes: Counter = Counter()
        self.paths: Counter = Counter()
        self.found: Counter = Counter()  # the hazards of the last launch that had any
        self.executed = self.launches = 0
        compile_kernel = launch.compile_kernel

        def compile_beside(kernel, arguments, **options):
            # On Blackwell LLVM may fail, and end the process: another one compiles first, into the cache.
            if int(target[3:]) >= 100:
                child = os.fork()
                if child == 0:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                    compile_kernel(kernel, arguments, **options)
                    os._exit(0)
                if status := os.waitpid(child, 0)[1]:
                    self.last = kernel.fn.__name__, "none", None, arguments.get("VARIANT")
                    raise EmulationError(f"the compiler ends with signal {status}: {arguments.get('VARIANT')}")
            return compile_kernel(kernel, arguments, **options)

        launch.compile_kernel = compile_beside
        launch.enqueue = lambda kernel, *given: self.launch(kernel.src.fn.__name__, kernel, *given)

    def multiprocessors(self, count: int) -> None:
        if count != self.driver.multiprocessors:
            self.driver.multiprocessors = count
            forget()

    def launch(self, name: str, compiled, programs: int, keywords: dict) -> None:
        text = compiled.asm["ptx"]
        if self.mutate:
            text = self.mutate(name, text)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.codes:
            self.codes[key] = Code(text)
        code, metadata = self.codes[key], compiled.metadata
        self.variants[(name, key)] += 1
        self.last = name, key, metadata, keywords.get("VARIANT")
        if variant := keywords.get("VARIANT"):
            path = "loop" if not variant.RESIDENT else "cluster" if metadata.num_ctas > 1 else "resident"
            kind = "rows" if variant.ROWS > 1 else "window" if variant.WINDOW else "plain"
            kind = "persistent" if variant.STAGES else kind
            self.paths[(name, path, metadata.num_ctas, kind)] += 1
        if code.cta_threads != 32 * metadata.num_warps or code.cluster != metadata.num_ctas:
            raise EmulationError("metadata and PTX differ")

        arguments, tensors = [], []
        for argument, kind in compiled.src.signature.items():
            value = keywords.get(argument)
            for one, its in zip(_flat(value), _flat(kind), strict=True) if isinstance(kind, tuple) else [(value, kind)]:
                if its == "constexpr":
                    continue
                if its.startswith("*"):
                    tensor = one.tensor if isinstance(one, OnGpu) else one
                    tensors.append((argument, tensor))
                    arguments.append(tensor.data_ptr())
                else:
                    arguments.append(one)
        arguments += [0] * (len(code.params) - len(arguments))  # two scratch buffers, which are not there
        segments = self._segments(name, tensors)
        machine = Machine(segments, special=self.special, contract=self.contract, seed=self.seed, track=self.track)
        self.launches += 1
        try:
            machine.run(Launch(code, programs, metadata.num_ctas, metadata.num_warps, metadata.shared, arguments))
        finally:
            self.found = machine.hazards or self.found
            self.hazards += machine.hazards
            for hazard, example in machine.examples.items():
                self.examples.setdefault((name, key[:8], *hazard), f"{example}; {keywords.get('VARIANT')}")
            self.notes += Counter({(name, text): n for (text, _), n in machine.notes.items()})
            self.executed += machine.executed
        for segment in segments:
            if segment.dirty:
                for argument, tensor, writes in segment.tensors:
                    if writes:
                        mine = _bytes(tensor)
                        start = tensor.data_ptr() - segment.base
                        which = segment.writable[start : start + len(mine)]
                        mine[which] = segment.data[start : start + len(mine)][which]

    def _segments(self, name: str, tensors: list) -> list[Segment]:
        pieces = []
        for argument, tensor in tensors:
            # Rows that lie far apart are pieces of their own.
            far = tensor.dim() == 2 and tensor.stride(0) > tensor.shape[1] + FAR
            for part in tensor if far else [tensor]:
                begin = part.data_ptr()
                pieces.append([begin, begin + len(_bytes(part)), [(argument, part, argument in WRITES[name])]])
        pieces.sort(key=lambda piece: piece[0])
        merged = []
        for piece in pieces:
            if merged and piece[0] < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], piece[1])
                merged[-1][2] += piece[2]
            else:
                merged.append(piece)
        segments = []
        for begin, end, users in merged:
            segment = Segment(begin, end)
            segment.tensors = users
            for argument, tensor, writes in users:
                mine, start = _bytes(tensor), tensor.data_ptr() - segment.base
                segment.data[start : start + len(mine)] = mine
                size = tensor.element_size()
                shape, strides = (*tensor.shape, size), (*(size * s for s in tensor.stride()), 1)
                if not writes or name == "scale_gradient_kernel":
                    np.lib.stride_tricks.as_strided(segment.readable[start:], shape, strides)[...] = True
                if writes:
                    np.lib.stride_tricks.as_strided(segment.writable[start:], shape, strides)[...] = True
            if segment.writable.any():
                segment.data[segment.writable & ~segment.readable] = 0xFF
                # Units of two bytes: the smallest element that is written.
                segment.tracker = Tracker(len(segment.data), 1)
            segments.append(segment)
        return segments


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def rows_of(K: int, N: int, dtype: torch.dtype, seed: int, spread: float, window: int) -> tuple:
    """Logits (N, K) and targets, one row of each kind, over and over."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, K, generator=generator) * spread
    target = torch.randint(K, (N,), generator=generator)
    kinds = []
    for i in range(N):
        kind = KINDS[(i + seed) % len(KINDS)]
        kinds.append(kind)
        if kind == "plain":  # where the narrow tiles are
            target[i] = K - 1 - (K // 7 + 13 * i) % (K // 4 + 1)
        elif kind == "ignored":
            target[i] = -100
            logits[i, : min(K, 3)] = float("nan")
        elif kind == "out of range":
            target[i] = (K, -1, 2**40)[i % 3]
        elif kind == "first":
            target[i] = 0
        elif kind == "last":
            target[i] = K - 1
        elif kind == "in the edge":
            begin = -(i * K) % 8  # where a window of a contiguous tensor begins
            target[i] = (min(begin, K - 1), max(begin - 1, 0), max(K - 1 - (i * K + K) % 8, 0))[(i // len(KINDS)) % 3]
        elif kind == "masked classes":
            logits[i, torch.rand(K, generator=generator) < 0.3] = -INF
            if K > 40:
                logits[i, -19:-1] = -INF
            logits[i, target[i]] = 1.0
        elif kind == "nan":
            logits[i, K // 2] = float("nan")
        elif kind == "offset":
            logits[i] += {torch.float16: 3e4, torch.bfloat16: 1e30, torch.float32: 1e5}[dtype] * (-1) ** (i // 16)
        elif kind == "confident":
            logits[i, target[i]] += 25.0
        elif kind == "wrong":
            logits[i, (target[i] + 1) % K] += 18.0
        elif kind == "flat":
            logits[i] = 0.25
        elif kind == "nothing":
            logits[i] = -INF
        elif kind == "near c" and K > 1:  # where the loss wants to be, and u cancel
            logits[i] *= 0.2
            logits[i, target[i]] = 16.118
        elif kind == "target masked" and K > 1:
            logits[i, target[i]] = -INF
    return logits.to(dtype), target, kinds


KINDS = (
    "plain", "ignored", "first", "last", "out of range", "in the edge", "masked classes", "nan", "offset", "confident",
    "wrong", "flat", "nothing", "target masked", "in the edge", "near c",
)  # fmt: skip


def pitched(matrix: torch.Tensor, more: int, offset: int) -> torch.Tensor:
    """The same numbers with other strides and another beginning; NaN lies between."""
    N, K = matrix.shape
    if more > FAR:  # most of it is never touched
        storage = torch.empty(offset + N * (K + more) + 32, dtype=matrix.dtype)
    else:
        storage = torch.full((offset + N * (K + more) + 32,), float("nan"), dtype=matrix.dtype)
    skip = -(storage.data_ptr() // storage.element_size()) % (16 // storage.element_size())
    out = storage.as_strided((N, K), (K + more, 1), skip + offset)
    out.copy_(matrix)
    return out


DEFAULTS = {"c": 1e-7, "reg_weight": 1.0, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}


def truth(logits, target, weight, scale, options: dict):
    """Losses (4, N) and the gradient of scale * loss, in float64, from the definition."""
    from sre_triton import reference

    leaf = logits.double().requires_grad_()
    keywords = {name: options[name] for name in DEFAULTS}
    keywords["softcap"] = keywords["softcap"] or None
    loss, parts = reference.self_regularized_entropy(
        leaf, target.double() if target.is_floating_point() else target,
        None if weight is None else weight.double(), reduction="none", **keywords,
    )  # fmt: skip
    loss.backward(scale.double().expand(len(logits)))
    losses = torch.stack([loss.detach(), *parts])
    return losses, leaf.grad


def true_stats(logits, target, weight, options: dict):
    """The seven numbers of each row, in float64, and what the errors of the last two are measured by."""
    z = logits.double()
    N, K = z.shape
    if options["softcap"]:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    m = z.amax(1)
    finite = torch.where(m == -INF, 0, m)[:, None]
    e = (z - finite).exp()
    s = e.sum(1)
    ignored = torch.zeros(N, dtype=torch.bool)
    if target.dim() == 1:
        ignored = target == options["ignore_index"]
        inside = (target >= 0) & (target < K)
        y = torch.zeros(N, K, dtype=torch.float64)
        y[torch.arange(N), target.clamp(0, K - 1)] = 1
        y[~inside] = float("nan")
    else:
        y = target.double()
    w = torch.ones(K, dtype=torch.float64) if weight is None else weight.double()
    omega = (w * y).sum(1) if weight is not None or target.dim() == 1 else torch.ones(N, dtype=torch.float64)
    y = (1 - options["label_smoothing"]) * y + options["label_smoothing"] / K
    wy = w * y
    yz = torch.where(wy == 0, 0, wy * (z - finite)).sum(1)
    t = z - finite - torch.where(s == 0, float("nan"), s).log()[:, None] - math.log(options["c"])
    t = torch.where(t == -INF, -1e4, t)
    mu = torch.sigmoid(-t.abs())
    h = t.abs() * mu - torch.log1p(-mu)
    u = t * mu * (1 - mu)
    h_sum, u_sum = ((1 - y) * h).sum(1), ((1 - y) * u).sum(1)
    stats = torch.stack([m, s, wy.sum(1), yz, omega, h_sum, u_sum])
    size = ((1 - y).abs() * u.abs()).sum(1) + wy.sum(1).abs()
    stats[:, ignored] = 0
    return stats, size, ignored


def swing(logits, target, weight, scale, options: dict) -> torch.Tensor:
    """By how much the gradient moves where c or the sum of u does by a unit in the last place of a float32 or a few.

    Rows whose u cancel have small gradients from large numbers: all classes equal, or all wrong ones near p = c.
    """
    z = logits.double()
    if options["softcap"]:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    log_p = z.log_softmax(1)
    t = (log_p - math.log(options["c"])).abs()
    mu = torch.sigmoid(-t)
    moves = (mu * (1 - mu) * (1 + torch.where(t == INF, 0, t))).sum(1) * log_p.exp().norm(dim=1)
    omega = 1.0
    if weight is not None:
        omega = (
            weight.double()[target.clamp(0, len(weight) - 1)]
            if target.dim() == 1
            else (weight.double() * target).sum(1)
        )
    return 7e-7 * abs(options["reg_weight"]) * scale.double().abs() * omega * moves


class Checker:
    """Compares, and keeps the worst of each thing compared."""

    def __init__(self) -> None:
        self.worst: dict = {}
        self.failures: list = []
        self.beyond: list = []  # gradients beyond the bound
        self.rows = 0

    def ratio(self, what: str, error: torch.Tensor, bound: torch.Tensor, context: str, names=None, fails=True) -> None:
        ratio = torch.where(error == 0, 0, error / bound)
        worst = float(ratio.max()) if ratio.numel() else 0.0
        if worst > self.worst.get(what, (-1.0, ""))[0]:
            self.worst[what] = worst, context
        if not worst <= 1.0:
            row = int(ratio.nan_to_num(nan=INF).argmax())
            kind = names[row] if names else ""
            line = f"{what}: {worst:.3g} of the bound, row {row} ({kind}): {context}"
            (self.failures if fails else self.beyond).append(line)

    def same_nan(self, what: str, found: torch.Tensor, true: torch.Tensor, context: str, names=None) -> torch.Tensor:
        """True where both are finite; where not, both must be the same kind of not."""
        differ = (found.isnan() != true.isnan()) | (found.isinf() != true.isinf())
        differ |= found.isinf() & true.isinf() & (found.sign() != true.sign())
        if differ.any():
            row = int(differ.reshape(len(differ), -1).any(1).nonzero()[0])
            kind = names[row] if names else ""
            at = differ[row].nonzero().flatten()[:4].tolist() if differ.dim() > 1 else []
            self.failures.append(
                f"{what}: row {row} ({kind}) at {at}: found {found[row].flatten()[at[0] if at else 0]}, "
                f"true {true[row].flatten()[at[0] if at else 0]}: {context}"
            )
        return found.isfinite() & true.isfinite()

    def losses(self, found, true, context, names) -> None:
        self.rows += found.shape[1]
        good = self.same_nan("losses", found.double().t(), true.t(), context, names).t()
        size = true[1].abs() + true[2].abs()
        for i, what in ((1, "H"), (2, "S")):
            self.ratio(
                what, torch.where(good[i], found[i].double() - true[i], 0).abs(), 2e-6 * size + 3e-7, context, names
            )
        self.ratio(
            "Z", torch.where(good[3], found[3].double() - true[3], 0).abs(), 5e-6 * true[3].abs() + 1e-6, context, names
        )
        bound = 5e-6 * (size + true[3].abs()) + 1e-6
        self.ratio("loss", torch.where(good[0], found[0].double() - true[0], 0).abs(), bound, context, names)

    def gradient(self, found, true, scale, moves, context, names) -> None:
        scale = scale.double().abs().expand(len(true))
        finite = self.same_nan("gradient", found.double(), true.to(found.dtype).double(), context, names)
        clean = finite.all(1)
        difference = torch.where(clean[:, None], found.double() - true, 0)
        norm = torch.where(clean[:, None], true, 0).norm(dim=1)
        bound = 5e-6 * norm + 3e-7 * scale
        if found.dtype != torch.float32:
            # Once more exactly, element by element: between the numbers that the bound allows, and rounded.
            rounding = torch.where(clean[:, None], true.to(found.dtype).double() - true, 0).norm(dim=1)
            bound = bound + 1.05 * rounding
        error = difference.norm(dim=1)
        self.ratio(f"gradient{str(found.dtype)[5:]}", error, bound, context, names, fails=False)
        # What fails is what float32 does not explain.
        self.ratio(f"gradient{str(found.dtype)[5:]} + swing", error, bound + moves.nan_to_num(0, 0), context, names)

    def stats(self, found, true, size, ignored, context, names, c: float) -> None:
        self.rows += found.shape[1]
        # The statistics of ignored rows are nobody's: where rows share a program, some are -inf or NaN.
        true = torch.where(ignored, found.double(), true)
        # Where the target is out of range, ω is NaN and the last two are of no class in particular.
        nobody = true[4].isnan() & (torch.arange(len(true)) >= 5)[:, None]
        # The maximum passes over NaN logits, which come back in the sum of exponentials.
        nobody |= true[0].isnan() & found[1].isnan() & torch.tensor([i in (0, 3) for i in range(len(true))])[:, None]
        true = torch.where(nobody, found.double(), true)
        good = self.same_nan("statistics", found.double().t(), true.t(), context, names).t()
        for i, what in enumerate(("m", "exp_sum", "y_sum", "yz_sum", "omega", "h_sum", "u_sum")[: len(found)]):
            if what == "m":
                bound = 1e-6 * true[0].abs() + 1e-38  # of a softcap, else it is exact
            elif what == "h_sum":
                bound = 2e-6 * true[5].abs() + 3e-7
            elif what == "u_sum":
                bound = 2e-6 * size + 3e-7
            elif what == "yz_sum":
                bound = 2e-6 * true[3].abs() + 3e-7
            else:
                bound = 2e-6 * true[i].abs() + 1e-30
            self.ratio(
                f"statistic {what}", torch.where(good[i], found[i].double() - true[i], 0).abs(), bound, context, names
            )


class Run:
    """All cases on one GPU."""

    def __init__(self, gpu: Gpu, verbose: bool, modes: list[str] = ("exact",)) -> None:
        self.gpu, self.verbose, self.modes = gpu, verbose, modes
        self.checks = {mode: Checker() for mode in modes}
        self.cases = 0
        self.per_kernel: Counter = Counter()
        self.seconds: dict = defaultdict(float)

    def case(self, kernel: str, K: int, dtype: str, N: int = 4, **settings) -> None:
        """One call of a primitive and its comparison, in each mode; races are looked for in the first."""
        for i, mode in enumerate(self.modes):
            name, _, contract = mode.partition("+")
            self.gpu.special, self.gpu.contract, self.gpu.track = Special(name, self.gpu.seed), bool(contract), i == 0
            self.check = self.checks[mode]
            self._one(kernel, K, dtype, N, **settings)

    def _one(self, kernel: str, K: int, dtype: str, N: int, **settings) -> None:
        started = time.time()
        context = f"{self.gpu.target} {kernel} K={K} {dtype} N={N} " + " ".join(f"{k}={v}" for k, v in settings.items())
        failures, hazards = len(self.check.failures), sum(self.gpu.hazards.values())
        try:
            self._case(kernel, K, DTYPES[dtype], N, context, **settings)
        except EmulationError as error:
            self.check.failures.append(f"emulation: {error}: {context}")
        self.cases += 1
        self.per_kernel[kernel] += 1
        context = f"{context} mode={self.gpu.special.mode}"
        self.seconds[kernel] += time.time() - started
        hazard = sum(self.gpu.hazards.values()) - hazards
        bad = self.check.failures[failures:]
        if self.verbose or bad or hazard:
            _, key, metadata, variant = self.gpu.last
            kind = "" if variant is None else (f"stages={variant.STAGES} rows={variant.ROWS} "
                                               f"tiles={variant.TILES}x{variant.BLOCK_K}+{variant.TAIL} window={variant.WINDOW}")  # fmt: skip
            shape = f"warps={metadata.num_warps} ctas={metadata.num_ctas}" if metadata else ""
            print(f"{time.time() - started:6.1f}s {'FAIL' if bad else 'ok'} {hazard} hazards  {context}  "
                  f"[{key[:8]} {shape} {kind}]", flush=True)  # fmt: skip
        for line in bad:
            print("        ", line, flush=True)
        if hazard:
            for what, count in self.gpu.found.items():
                print("         hazard", count, *what, flush=True)

    def _case(self, kernel, K, dtype, N, context, *, seed=0, spread=3.0, pitch=0, offset=0, inplace=False,
              weight=None, target="indices", scale="one", pointers=False, multiprocessors=132, shards=1,
              **given) -> None:  # fmt: skip
        from sre_triton.kernels import primitives
        from sre_triton.primitives import RowOptions

        gpu, check = self.gpu, self.check
        gpu.multiprocessors(multiprocessors)
        options = DEFAULTS | given
        logits, classes, names = rows_of(K, N, dtype, seed, spread, 8)
        if options["ignore_index"] != -100:
            classes = torch.where(classes == -100, options["ignore_index"], classes)
        generator = torch.Generator().manual_seed(seed + 1)
        if target != "indices":
            p = torch.rand(N, K, generator=generator)
            classes = (p / p.sum(1, keepdim=True) * torch.linspace(0.5, 1.5, N)[:, None]).to(DTYPES[target])
            names = list(names)
        if options["z_loss"]:  # its square must be a float32
            logits = torch.where(logits.isinf(), logits, logits.float().clamp(-1e18, 1e18).to(dtype))
        logits = pitched(logits, pitch, offset) if pitch or offset else logits
        w = None if weight is None else (torch.rand(K, generator=generator) + 0.1).to(DTYPES[weight])
        factors = torch.ones(()).expand(N) if scale == "one" else torch.randn(N, generator=generator)
        tensors = torch.tensor(options["c"], dtype=torch.float64), torch.tensor(options["reg_weight"])
        absent = [options[name] or None for name in ("label_smoothing", "z_loss", "softcap")]
        values = RowOptions(*(map(OnGpu, tensors) if pointers else tensors), options["ignore_index"], *absent)
        before = logits.clone()

        if kernel == "row_loss_and_gradient":
            true, true_gradient = truth(before, classes, w, factors, options)
            call = primitives.row_loss_and_gradient_ if inplace else primitives.row_loss_and_gradient
            losses, gradient = call(logits, classes, w, factors, values)
            check.losses(losses, true, context, names)
            check.gradient(
                gradient, true_gradient, factors, swing(before, classes, w, factors, options), context, names
            )
        elif kernel == "row_loss":
            true, _ = truth(before, classes, w, factors, options)
            losses, stats = primitives.row_loss(logits, classes, w, values)
            check.losses(losses, true, context, names)
            check.stats(stats, *true_stats(before, classes, w, options), context, names, options["c"])
        elif kernel == "parts":
            self._parts(logits, before, classes, w, factors, options, values, inplace, shards, context, names)
        elif kernel == "scale_gradient":
            factor = torch.tensor(1.5) if scale == "one" else torch.randn(N, generator=generator)
            if scale == "some ones":
                factor[::2] = 1.0
            if scale == "all ones":
                factor = torch.ones(N)
            true = before.float() * (factor if factor.dim() == 0 else factor[:, None])
            primitives.scale_gradient_(logits, factor)
            check.rows += N
            if not torch.equal(true.to(dtype).nan_to_num(nan=7.0), logits.nan_to_num(nan=7.0)):
                check.failures.append(f"scale_gradient: other numbers: {context}")
        elif kernel == "inverse_count":
            found = primitives.inverse_count(classes, w, K, options["ignore_index"])
            from sre_triton import reference

            true = (
                1
                / reference.sample_weights(classes, None if w is None else w.double(), options["ignore_index"])
                .double()
                .sum()
            )
            check.rows += N
            check.ratio("inverse_count", (found.double() - true).abs(), 1e-6 * true, context)
        elif kernel == "scaled_sum":
            numbers = torch.randn(N, generator=generator)
            factor = torch.tensor(1 / 3)
            found = primitives.scaled_sum(numbers, factor)
            check.rows += N
            check.ratio(
                "scaled_sum", (found.double() - numbers.double().sum() * factor).abs(),
                1e-6 * numbers.double().abs().sum() * factor, context,
            )  # fmt: skip
        # Where it is not in place, nothing else may have changed.
        if not inplace and kernel != "scale_gradient" and not _same(logits, before):
            check.failures.append(f"the logits changed: {context}")

    def _parts(self, logits, before, classes, w, factors, options, values, inplace, shards, context, names) -> None:
        from sre_triton.kernels import primitives

        check = self.check
        N, K = logits.shape
        ends = [round(K * i / shards) for i in range(shards + 1)]
        pieces = []
        for begin, end in itertools.pairwise(ends):
            piece = logits[:, begin:end] if shards == 1 else logits[:, begin:end].contiguous()
            there = classes if classes.dim() == 1 else classes[:, begin:end].contiguous()
            more = (0, None) if shards == 1 else (begin, K)
            pieces.append((piece, there, None if w is None else w[begin:end].contiguous(), more))

        def of_shard(more):
            return values._replace(first_class=more[0], all_classes=more[1])

        each = [primitives.row_lse(z, y, v, of_shard(more)) for z, y, v, more in pieces]
        if shards == 1:
            lse = each[0]
        else:
            m = torch.stack([one[0] for one in each]).amax(0)
            total = torch.zeros(4, N, dtype=torch.float64)
            for one in each:
                shift = torch.where(one[0] == -INF, 0, one[0] - m).double()
                wide = one.double()
                total += torch.stack([wide[1] * shift.exp(), wide[2], wide[3] + wide[2] * shift, wide[4]])
            lse = torch.cat([m[None], total.float()])
            if w is None and classes.dim() == 2:
                lse[4] = 1.0
        sums = [primitives.row_sums(z, y, lse.contiguous(), of_shard(more)) for z, y, _, more in pieces]
        stats = torch.cat([lse, torch.stack(sums).sum(0)])
        true, size, ignored = true_stats(before, classes, w, options)
        check.stats(stats, true, size, ignored, context, names, options["c"])
        call = primitives.row_gradient_ if inplace else primitives.row_gradient
        gradients = [call(z, y, v, stats, factors, of_shard(more)) for z, y, v, more in pieces]
        _, true_gradient = truth(before, classes, w, factors, options)
        check.gradient(
            torch.cat(gradients, 1), true_gradient, factors, swing(before, classes, w, factors, options), context, names
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


CLASSES = (
    1, 2, 3, 10, 17, 100, 123, 128, 129, 507, 1000, 1024, 1400, 1823, 4096, 5003, 8192, 16384, 21841, 32768, 50257,
    50304, 65536, 128256, 131073, 151936, 262144, 300000,
)  # fmt: skip


def smoke():
    """A case of every way."""
    yield "row_loss_and_gradient", 1000, "bf16", {"N": 16}
    yield "row_loss_and_gradient", 1400, "bf16", {"N": 16, "inplace": True}  # with two narrow tiles
    yield "row_loss_and_gradient", 10, "fp32", {"N": 20}
    yield "row_loss_and_gradient", 19, "bf16", {"N": 140}  # a thread for each row
    yield "row_loss_and_gradient", 100, "fp16", {"N": 40, "inplace": True, "scale": "each"}  # four, and a narrow tile
    yield "row_loss_and_gradient", 507, "fp16", {"N": 16, "inplace": True}
    yield "row_loss_and_gradient", 8192, "bf16", {"N": 9, "multiprocessors": 1}
    yield "row_loss_and_gradient", 21841, "bf16", {"N": 6, "seed": 4}
    yield "row_loss_and_gradient", 65536, "bf16", {"N": 3, "inplace": True}
    yield "row_loss_and_gradient", 262144, "bf16", {"N": 3, "multiprocessors": 2, "inplace": True}
    yield "row_loss", 1823, "fp32", {"N": 16}
    yield "parts", 5003, "bf16", {"N": 4, "seed": 2}
    yield "scale_gradient", 1000, "bf16", {"N": 5, "scale": "some ones"}
    yield "inverse_count", 1000, "bf16", {"N": 100}
    yield "scaled_sum", 1000, "fp32", {"N": 1500}


def base(classes=CLASSES):
    """Every K and dtype, of the kernel that trains."""
    for K, dtype in itertools.product(classes, DTYPES):
        N = 35 if K <= 128 else 16 if K <= 16384 else 8
        for seed in (0,) if N >= 16 else (0, 8):
            yield "row_loss_and_gradient", K, dtype, {"N": N, "seed": seed, "scale": "each"}


def inplace(classes=CLASSES):
    """The gradient over the logits."""
    for K, dtype in itertools.product(classes, DTYPES):
        N = 35 if K <= 128 else 16 if K <= 4096 else 5
        yield "row_loss_and_gradient", K, dtype, {"N": N, "seed": 2, "inplace": True}


def pipeline(classes=None):
    """More rows than programs, so that the copies of the next row go round."""
    for K, dtype in itertools.product((4104, 8192, 12296, 16384), DTYPES):
        for inplace in (False, True):
            yield (
                "row_loss_and_gradient",
                K,
                dtype,
                {"N": 17, "multiprocessors": 2, "inplace": inplace, "scale": "each"},
            )
        yield "row_loss", K, dtype, {"N": 11, "multiprocessors": 1, "seed": 4}
    for K in (131080, 200000, 262144):
        for seed in (0, 7):
            yield "row_loss_and_gradient", K, "bf16", {"N": 7, "multiprocessors": 2, "seed": seed, "inplace": seed == 7}
        yield "row_loss_and_gradient", K, "fp32", {"N": 4, "multiprocessors": 2, "seed": 5, "inplace": True}
        yield "row_loss", K, "fp16", {"N": 3, "multiprocessors": 2, "seed": 5}


def cluster(classes=None):
    """Thread blocks that share a row, of every size, aligned or not."""
    for K in (16385, 21841, 32000, 32768, 50257, 65536, 65544, 100003, 128256, 131072):
        for dtype in DTYPES:
            yield (
                "row_loss_and_gradient",
                K,
                dtype,
                {"N": 6, "seed": 1, "inplace": True, "scale": "each", "multiprocessors": 1},
            )
        yield "row_loss", K, "bf16", {"N": 4, "seed": 8}
    for K in (16385, 32768):  # few rows: more blocks
        for N in (1, 2, 4):
            yield "row_loss_and_gradient", K, "bf16", {"N": N, "seed": 2, "inplace": True}
    for threads in (512, 256):  # clusters of 2 and 4, which the table does not have; those of 2 go from row to row
        for K, dtype in ((16385, "bf16"), (21841, "fp32"), (32768, "fp16"), (32768, "bf16"), (50257, "bf16")):
            more = {"CLUSTER_THREADS": threads, "multiprocessors": 1}
            yield "row_loss_and_gradient", K, dtype, dict(N=5, seed=2, inplace=True, **more)
            yield "row_loss_and_gradient", K, dtype, dict(N=3, seed=2, z_loss=0.1, weight="fp32", **more)
            yield "row_loss_and_gradient", K, dtype, dict(N=3, seed=6, target="fp32", **more)


def strides(classes=None):
    """Rows farther apart than they are long, and beginnings that are no multiple of 16 bytes."""
    for K in (3, 10, 100, 128, 507, 1000, 1823, 5003, 8192, 21841, 32768, 65536):
        for dtype in DTYPES:
            for pitch, offset in ((3, 0), (8, 0), (0, 1), (5, 3), (16, 4), (1, 0)):
                if K > 5003 and dtype == "fp16":
                    continue
                N = 19 if K <= 128 else 7 if K < 5003 else 3
                for inplace in (False, True):
                    yield (
                        "row_loss_and_gradient",
                        K,
                        dtype,
                        {"N": N, "pitch": pitch, "offset": offset, "inplace": inplace, "seed": 1 + pitch},
                    )


OPTIONS = {
    "z_loss": {"z_loss": 0.01},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": "fp32"},
    "weight + smoothing": {"weight": "bf16", "label_smoothing": 0.3},
    "probabilities": {"target": "fp32"},
    "probabilities + more": {"target": "bf16", "label_smoothing": 0.1, "weight": "fp16", "z_loss": 0.1},
    "c": {"c": 1e-3},
    "tiny c": {"c": 1e-30},
    "huge c": {"c": 100.0},
    "pointers": {"pointers": True, "c": 1e-5, "reg_weight": 0.3},
    "negative": {"reg_weight": -0.5},
    "ignore_index": {"ignore_index": 2**40},
    "all": {"weight": "fp32", "c": 1e-5, "reg_weight": 0.7, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0},
}


def around(classes=None):
    """Classes next to powers of 2, where paths and tiles change, with settings at random."""
    random = np.random.default_rng(5)
    for width in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144):
        for less in (-15, -8, -7, -4, -1, 0, 1, 8):
            if width + less < 1 or (width > 8192 and less in (-8, -4, 8)):
                continue
            names = list(OPTIONS)
            given = OPTIONS[names[random.integers(len(names))]] if random.random() < 0.4 else {}
            kernel = ("row_loss_and_gradient", "row_loss_and_gradient", "row_loss", "parts")[random.integers(4)]
            more = {"pitch": int(random.choice([0, 0, 1, 8])), "seed": int(random.integers(16))}
            if kernel != "row_loss":
                more |= {"inplace": bool(random.random() < 0.5), "scale": "each"}
            N = int(random.choice([1, 5, 17])) if width < 512 else int(random.choice([1, 2, 5]))
            dtype = list(DTYPES)[random.integers(3)]
            yield kernel, width + less, dtype, dict(N=N, multiprocessors=int(random.choice([1, 132])), **more, **given)


def far(classes=None):
    """More than 2^31 elements from the first row to the last."""
    for K, N in ((10, 20), (100, 17), (507, 3), (1000, 3), (8192, 3), (50257, 3), (65536, 3), (300000, 3)):
        for more in (2**31 // (N - 1), 2**31 // (N - 1) + 1):
            pitch = more + 8 - (K + more) % 8 + (more - 2**31 // (N - 1))
            yield "row_loss_and_gradient", K, "bf16", {"N": N, "pitch": pitch, "inplace": True, "multiprocessors": 1}
            if K in (507, 300000):
                yield "parts", K, "bf16", {"N": N, "pitch": pitch, "inplace": True}
        yield "scale_gradient", K, "bf16", {"N": N, "pitch": pitch, "scale": "each"}


def options(classes=(2, 10, 123, 507, 1000, 1823, 5003, 8192, 21841, 50257, 65536, 131073, 300000)):
    """Every option."""
    for K in classes:
        for i, (_name, given) in enumerate(OPTIONS.items()):
            dtype = list(DTYPES)[(i + K) % 3]
            N = 17 if K <= 128 else 8 if K <= 8192 else 3
            yield "row_loss_and_gradient", K, dtype, dict(N=N, seed=5 + i, scale="each", inplace=i % 2 == 0, **given)
            if K <= 8192:
                yield "row_loss", K, dtype, dict(N=N, seed=i, **given)


def parts(classes=(1, 3, 10, 100, 128, 129, 507, 1000, 1024, 1823, 5003, 16384, 50257, 131073, 300000)):
    """row_lse, row_sums and row_gradient, of whole rows and of shards."""
    for K in classes:
        for dtype in DTYPES:
            N = 17 if K <= 128 else 8 if K <= 5003 else 3
            yield "parts", K, dtype, {"N": N, "seed": K % 16, "inplace": K % 2 == 1, "scale": "each"}
        if K > 3:
            for i, (_name, given) in enumerate(OPTIONS.items()):
                if K > 20000 and i % 4:
                    continue
                dtype = list(DTYPES)[(i + K) % 3]
                more = {} if i % 2 else {"shards": 2 + i % 3}
                yield "parts", K, dtype, dict(N=5 if K > 128 else 18, seed=i, scale="each", **more, **given)


def small(classes=None):
    """The kernels of a step that are not of rows."""
    for K, dtype in itertools.product((1, 3, 10, 100, 507, 1000, 2048, 5003, 70000), DTYPES):
        for scale in ("one", "each", "some ones", "all ones"):
            for pitch, offset in ((0, 0), (3, 1), (8, 0)):
                yield (
                    "scale_gradient",
                    K,
                    dtype,
                    {"N": 70 if K < 20 else 5, "scale": scale, "pitch": pitch, "offset": offset},
                )
    for N in (1, 5, 1000, 1024, 1025, 5000):
        for weight in (None, "fp32", "bf16"):
            yield "inverse_count", 1000, "bf16", {"N": N, "weight": weight}
        yield "scaled_sum", 10, "fp32", {"N": N}


BARRIERS = re.compile(
    r"^\s*(bar\.sync\s+0;|bar\.warp\.sync\s+-1;|barrier\.cluster\.arrive\.aligned;\s*\n\s*barrier\.cluster\.wait\.aligned;"
    r"|cp\.async\.wait_group\s+\d+;)",
    re.M,
)


# Where a barrier may be missing and nothing goes wrong in the cases of smoke(), by file and function.
NEEDLESS = {
    "memory.py at_targets": "needed where the gradient is written over the logits and no other barrier comes between",
    "kernels.py row_loss_kernel": "after the last row no copy is on its way",
    "groups.py sum_pairs": "the barrier of the cluster follows",
}


def function_at(place: str) -> str:
    """The file and function of a line of the library: "groups.py:129" -> "groups.py sum_pairs"."""
    name, _, line = place.partition(":")
    tree = ast.parse((Path(sre_triton.__file__).parent / "kernels" / name).read_text())
    return next(f"{name} {f.name}" for f in tree.body if f.lineno <= int(line) <= f.end_lineno)


def mutate(run: Run, cases: list) -> int:
    """Take every barrier out of every kernel of the cases, one at a time, and see what the emulator says.

    Returns how often it said nothing, apart from the places of ``NEEDLESS``.
    """
    gpu = run.gpu
    total, missed = Counter(), []
    for kernel, K, dtype, settings in cases:
        sites, state = {}, {"kernel": None, "index": None}

        def change(name, text):
            places = list(BARRIERS.finditer(text))
            sites.setdefault(name, [place[1].split()[0].strip(";") for place in places])
            if name == state["kernel"]:
                place = places[state["index"]]
                source = re.findall(r"// (\S+:\d+):\d+\s*$", text[: place.start(1)], re.M)
                state["source"] = source[-1]
                text = text[: place.start(1)] + "\n" * place[1].count("\n") + text[place.end(1) :]
            return text

        gpu.mutate = change
        run.case(kernel, K, dtype, **settings)
        for name, kinds in dict(sites).items():
            for i, kind in enumerate(kinds):
                state["kernel"], state["index"] = name, i
                gpu.hazards, failures = Counter(), len(run.check.failures)
                with contextlib.redirect_stdout(io.StringIO()):
                    run.case(kernel, K, dtype, **settings)
                wrong = run.check.failures[failures:]
                del run.check.failures[failures:]
                said = "hazard" if gpu.hazards else "error" if any("emulation" in w for w in wrong) else ""
                said += " numbers" if any("emulation" not in w for w in wrong) else ""
                total[(kind, said.strip() or "nothing")] += 1
                if not said:
                    place = function_at(state["source"])
                    missed.append((place, f"{name} K={K}: {kind} of {place}, {NEEDLESS.get(place, 'needed?')}"))
        gpu.mutate = None
        print(f"{kernel} K={K}: {dict(total)}", flush=True)
    gpu.hazards = Counter()
    print("nothing was said of:", *(line for _, line in missed), sep="\n  ")
    unexplained = sum(place not in NEEDLESS for place, _ in missed)
    print(f"{sum(total.values())} barriers, {unexplained} whose absence is not noticed")
    return unexplained


GROUPS = {f.__name__: f for f in (base, inplace, pipeline, cluster, strides, around, far, options, parts, small)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90", "sm_100"))
    parser.add_argument("--smoke", action="store_true", help="a case of every way, in seconds")
    parser.add_argument("--mutate", action="store_true", help="take barriers out, and see that it is noticed")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--classes", nargs="+", type=int, help="only these")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["exact"], help="each case in all of them: exact, random, extreme, "
                        "or a digit 0 to f, the signs of the errors of ex2 (1), lg2 (2), rcp (4) and division (8); "
                        "+fma: additions become one instruction with multiplications")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the order of programs and of what is random in special")
    parser.add_argument("--sample", type=float, default=1.0, help="the share of cases that are run")
    parser.add_argument("--seconds", type=float, default=INF, help="stop after so many")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    gpu = Gpu(args.target)
    gpu.seed = args.seed
    torch.set_num_threads(1)
    run = Run(gpu, args.verbose, args.modes)
    few = args.smoke or args.mutate
    cases = list(smoke()) if few else [case for name in args.groups for case in GROUPS[name]()]
    cases = [case for case in cases if case[2] in args.dtypes and (not args.classes or case[1] in args.classes)]
    if not cases:
        parser.error("no case of these groups has these classes and dtypes")
    if args.mutate:
        return 1 if mutate(run, cases) else 0
    if args.sample < 1:
        chosen = np.random.default_rng(args.seed).random(len(cases)) < args.sample
        cases = [case for case, keep in zip(cases, chosen, strict=True) if keep]
    print(f"{args.target}: {len(cases)} cases, modes {args.modes}", flush=True)
    started = last = time.time()
    for i, (kernel, K, dtype, settings) in enumerate(cases):
        if time.time() - started > args.seconds:
            print(f"stopped after {i} cases", flush=True)
            break
        threads = settings.pop("CLUSTER_THREADS", None)
        if threads:
            from sre_triton.kernels import plan

            plan.CLUSTER_THREADS = threads
            forget()
        run.case(kernel, K, dtype, **settings)
        if threads:
            plan.CLUSTER_THREADS = 128
            forget()
        if time.time() - last > 20:
            last = time.time()
            print(f"  {i + 1}/{len(cases)} cases, {last - started:.0f} s, {sum(len(c.failures) for c in run.checks.values())} failures, "
                  f"{sum(gpu.hazards.values())} hazards", flush=True)  # fmt: skip
    report(run, time.time() - started, args)
    return 1 if gpu.hazards or any(check.failures for check in run.checks.values()) else 0


def report(run: Run, seconds: float, args) -> None:
    gpu = run.gpu
    print(f"\n{gpu.target}: {run.cases} cases, {gpu.launches} launches of {len(gpu.variants)} compiled kernels, "
          f"{sum(check.rows for check in run.checks.values())} rows, {gpu.executed / 1e6:.2f} million instructions, "
          f"{seconds:.0f} s")  # fmt: skip
    print("cases:", dict(run.per_kernel))
    print("compiled kernels:", dict(Counter(name for name, _ in gpu.variants)))
    print("paths:", {" ".join(map(str, path)): n for path, n in sorted(gpu.paths.items(), key=str)})
    for mode, check in run.checks.items():
        print(f"{mode}: {len(check.failures)} failures; the worst, as a share of the bound:")
        for what, (worst, context) in sorted(check.worst.items()):
            print(f"  {what:24} {worst:8.3f}  {context}")
        if check.beyond:
            print(f"  {len(check.beyond)} cases with gradients beyond the bound, where u cancel:")
            for line in sorted(check.beyond, key=lambda line: -float(line.split()[1 if "+" not in line else 3]))[:8]:
                print("   ", line)
    for note, count in gpu.notes.items():
        print("note:", *note, count)
    for hazard, count in gpu.hazards.items():
        print("HAZARD:", count, *hazard)
    for key, example in list(gpu.examples.items())[:20]:
        print("     e.g.", *key, "|", example)
    print(f"{sum(len(c.failures) for c in run.checks.values())} failures, {len(gpu.hazards)} kinds of hazards")
    if args.json:
        args.json.write_text(json.dumps({
            "target": gpu.target, "cases": run.cases, "launches": gpu.launches, "compiled": len(gpu.variants),
            "rows": {mode: check.rows for mode, check in run.checks.items()},
            "worst": {mode: check.worst for mode, check in run.checks.items()},
            "beyond": {mode: check.beyond for mode, check in run.checks.items()},
            "failures": {mode: check.failures for mode, check in run.checks.items()},
            "hazards": [[*k, v] for k, v in gpu.hazards.items()],
        }, indent=1))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
