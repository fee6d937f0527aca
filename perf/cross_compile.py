"""Compile the kernels for a GPU that is not there, through the launcher, and read what came out.

What is counted is what a thread executes, not what is printed: of two branches the heavier one, and the body of a loop
as often as it runs.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

from sre_triton.kernels import launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_103": GPUTarget("cuda", 103, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# A100, H100 SXM, B200, B300, RTX 5090, MI300X, MI355X.
MULTIPROCESSORS = {
    "sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_103": 148, "sm_120": 170, "gfx942": 304, "gfx950": 256,
}  # fmt: skip
# KiB that a thread block may have.
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}


# Multiprocessors of one of the parts of a GPU in which a cluster must lie, at most: of an H100.
PART = 18


class Driver:
    """As much of a driver as it takes to compile, and to launch what is compiled into the void."""

    def __init__(self, name: str) -> None:
        self.name, self.utils = name, self
        self.multiprocessors = MULTIPROCESSORS[name]

    def get_current_target(self) -> GPUTarget:
        """The GPU."""
        return TARGETS[self.name]

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The only one."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What plan.py asks for."""
        return {"multiprocessor_count": self.multiprocessors, "max_shared_mem": SHARED[self.name] << 10}

    def launcher_cls(self, source: object, metadata: object) -> Callable:
        """What takes a kernel to the void."""
        return lambda *arguments: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spilled bytes, the most threads of a block."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def cuOccupancyMaxActiveClusters(self, function: int, shared: int, num_ctas: int) -> int:
        """With one thread block on each multiprocessor, as the longest rows have."""
        return max(1, self.multiprocessors // PART * (PART // num_ctas))


class Launch(NamedTuple):
    """What would have been launched."""

    name: str
    programs: int
    arguments: dict[str, object]
    compiled: triton.compiler.CompiledKernel


_enqueue = launch.enqueue


def pretend(target: str) -> None:
    """From here on kernels are compiled for the target, and launched into the void."""
    triton.runtime.driver.set_active(Driver(target))
    launch.enqueue = _enqueue
    forget()


def compile_only(target: str) -> list[Launch]:
    """From here on kernels are compiled for the target, and what would be launched is appended to the list."""
    pretend(target)
    launches = []

    def record(kernel, programs, arguments):
        launches.append(Launch(kernel.src.fn.__name__, programs, arguments, kernel))

    launch.enqueue = record
    return launches


def forget() -> None:
    """What was prepared for another GPU."""
    launch._prepared.clear()
    launch._gpu.cache_clear()
    launch.device_of.cache_clear()


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.dtype = tensor, tensor.dtype

    def data_ptr(self) -> int:
        """Of a tensor that is not there."""
        return self.tensor.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """As large as that of the tensor that is there."""
        return self.tensor.untyped_storage()


# ---------------------------------------------------------------------------------------------------------------------
# The code


class Instruction(NamedTuple):
    """One line."""

    text: str  # without a predicate
    target: str | None  # the label it may go to
    falls_through: bool  # the next line may follow


def _sass(text: str) -> Iterator[Instruction | str]:
    """The instructions, and between them the labels."""
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            yield label[1]
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@\S+ )?\s*(.*?)\s*;", line):
            predicate, code = match.groups()
            if code.startswith("NOP"):
                continue
            jump = re.match(r"(?:BRA|CALL\.REL\.NOINC)\b(.*)`\((\.L_\w+)\)", code)
            leaves = code.startswith(("BRA", "EXIT", "RET"))
            # A condition stands before the instruction or among its operands.
            conditional = bool(predicate) or (jump and re.search(r"\bU?P\d", jump[1]))
            yield Instruction(code, jump[2] if jump else None, bool(conditional) or not leaves)


def _gcn(text: str) -> Iterator[Instruction | str]:
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield label[1]
        elif match := re.match(r"\t([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|flat_\w+|scratch_\w+)(.*?)(?:;.*)?$", line):
            code = match[1] + match[2]
            if match[1] == "s_nop":
                continue
            jump = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", code)
            yield Instruction(code, jump[1] if jump else None, match[1] not in ("s_branch", "s_endpgm"))
        if line.startswith(".Lfunc_end"):
            return


class _Block:
    """Instructions that are executed one after another."""

    def __init__(self) -> None:
        self.count, self.labels, self.target, self.falls_through = Counter(), [], None, True


def _blocks(lines: Iterator[Instruction | str]) -> list[_Block]:
    blocks = [_Block()]
    for line in lines:
        if isinstance(line, str):
            blocks.append(_Block())
            blocks[-1].labels.append(line)
            continue
        blocks[-1].count[line.text] += 1
        if line.target or not line.falls_through:
            blocks[-1].target, blocks[-1].falls_through = line.target, line.falls_through
            blocks.append(_Block())
    return blocks


def _components(nodes: list[int], following: Callable[[int], list[int]]) -> list[list[int]]:
    """The strongly connected components, each after those that it leads to: Tarjan's algorithm."""
    number, lowest, stack, components = {}, {}, [], []

    def visit(node: int) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in following(node):
            if other not in number:
                visit(other)
            if other in stack:
                lowest[node] = min(lowest[node], lowest[other])
        if lowest[node] == number[node]:
            place = stack.index(node)
            components.append(stack[place:])
            del stack[place:]

    for node in nodes:
        if node not in number:
            visit(node)
    return components


def _heaviest_path(
    blocks: list[_Block], nodes: list[int], entry: int, trips: Callable[[int], float], depth: int = 0
) -> Counter:
    """Of the paths through some blocks from one of them on, with loops among them taken as often as they run."""
    place = {label: i for i, block in enumerate(blocks) for label in block.labels}

    def following(node: int) -> list[int]:
        jumps = [place[blocks[node].target]] if blocks[node].target in place else []
        falls = [node + 1] if blocks[node].falls_through else []
        # What leads back to the entry makes this the body of a loop, which its caller counts.
        return [i for i in jumps + falls if i in nodes and (i != entry or depth == 0)]

    best = {}
    for component in _components(nodes, following):
        if len(component) > 1 or component[0] in following(component[0]):
            outside = [i for node in nodes if node not in component for i in following(node)]
            head = next((node for node in component if node in outside), component[0])
            body = _heaviest_path(blocks, component, head, trips, depth + 1)
            count = Counter({text: n * trips(depth) for text, n in body.items()})
        else:
            count = blocks[component[0]].count
        ways = [best[i] for node in component for i in following(node) if i not in component]
        whole = count + max(ways, key=Counter.total, default=Counter())
        best |= dict.fromkeys(component, whole)
    return best[entry]


class Code:
    """Of one compiled kernel."""

    def __init__(self, compiled: triton.compiler.CompiledKernel) -> None:
        self.compiled, self.is_cuda = compiled, "cubin" in compiled.asm

    def _of_cubin(self, tool: str, *options: str) -> subprocess.CompletedProcess:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(self.compiled.asm["cubin"])
            return subprocess.run([tools / tool, *options, path], check=True, text=True, capture_output=True)

    @cached_property
    def _usage(self) -> str:
        usage = self._of_cubin("cuobjdump", "-res-usage")
        return usage.stdout + usage.stderr

    @cached_property
    def text(self) -> str:
        """As the disassembler, or AMD's compiler, prints it."""
        # Without its analysis of the data flow, which takes longer and prints the same.
        return self._of_cubin("nvdisasm", "-c", "-ndf").stdout if self.is_cuda else self.compiled.asm["amdgcn"]

    @property
    def registers(self) -> int:
        """Of a thread."""
        pattern, text = (r"REG:(\d+)", self._usage) if self.is_cuda else (r"\.vgpr_count:\s*(\d+)", self.text)
        return int(re.search(pattern, text)[1])

    @property
    def spill_bytes(self) -> int:
        """Of a thread."""
        if self.is_cuda:
            return sum(int(re.search(rf"{kind}:(\d+)", self._usage)[1]) for kind in ("STACK", "LOCAL"))
        return 4 * sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", self.text))

    @property
    def shared_bytes(self) -> int:
        """Of a thread block."""
        return self.compiled.metadata.shared

    def executed(self, trips: Callable[[int], float]) -> "Executed":
        """What a thread executes at most; trips(depth) says how often a loop runs, of 0 if it is in no other."""
        blocks = _blocks(_sass(self.text) if self.is_cuda else _gcn(self.text))
        return Executed(_heaviest_path(blocks, list(range(len(blocks))), 0, trips))


class Executed(NamedTuple):
    """How often each instruction is."""

    count: Counter

    def total(self, pattern: str = "") -> float:
        """Of the instructions that match."""
        return sum(n for text, n in self.count.items() if re.match(pattern, text))

    @property
    def special(self) -> float:
        """Exponentials, logarithms, reciprocals and roots."""
        return self.total(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_")

    @property
    def barriers(self) -> float:
        """At which threads wait for others."""
        return self.total(r"BAR|s_barrier") + self.cluster_barriers

    @property
    def cluster_barriers(self) -> float:
        """At which thread blocks wait for others."""
        return self.total(r"UCGABAR_WAIT")

    @property
    def vector_bytes_loaded(self) -> float:
        """Of a thread, sixteen at a time."""
        return 16 * self.total(r"LDG\.\S*\b128|LDGSTS\.\S*\b128|(global|buffer)_load_(lds_)?dwordx4")
