"""An emulator of PTX on NumPy, with a detector of races: it runs what Triton compiled, on a machine without a GPU.

One value of a register is an array, a number for each thread of the programs that run at the same time. Where threads
part, those at the lowest program counter go on. Only what Triton 3.8 makes of the kernels at hand is there; anything
else raises. What it does not see is what ptxas makes of the PTX: another order of memory accesses that PTX allows,
and, unless ``contract`` is set, additions that become one instruction with a multiplication.

Happens-before is exact for what occurs here (bar.sync of a whole block, bar.warp.sync of a whole warp,
barrier.cluster): an access by thread a comes before one by thread b if both have passed a barrier in between. A shuffle
is no barrier.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

SHARED_BASE = 1024  # where global_smem lies in the window of a block; lower addresses are of nobody
WINDOW = 24  # bits of an address of shared memory within its block; above them 1 + the block's rank in the cluster
WARP = 32

STORAGE = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {"f32": np.float32, "f64": np.float64, "f16": np.float16}


class EmulationError(Exception):
    """The program does what it must not, or what this does not know."""


def _dtype(name: str):
    """As NumPy sees an operand of this type."""
    if name == "pred":
        return np.bool_
    if name in FLOATS:
        return FLOATS[name]
    if name == "bf16":
        return np.uint16
    kind, bits = name[0], int(name[1:])
    return (SIGNED if kind == "s" else STORAGE)[bits]


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    """Exactly."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become 0, of the same sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _noise(bits: np.ndarray, salt: int) -> np.ndarray:
    """A number in [-1, 1] for each of the bit patterns, the same for the same pattern."""
    h = bits.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt * 0x632BE59BD9B4E019 % 2**64)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(32)
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


class Special:
    """ex2.approx, lg2.approx, rcp.approx, div.full: exact, or off by as much as the PTX ISA allows."""

    def __init__(self, mode: str = "exact", seed: int = 0) -> None:
        # "random/rcp" is random for rcp, and exact for all others.
        self.mode, _, only = mode.partition("/")
        self.seed, self.only = seed, ("ex2", "lg2", "rcp", "div").index(only) if only else None

    def _off(self, bits: np.ndarray, salt: int):
        if self.mode == "exact" or self.only not in (None, salt):
            return 0.0
        if self.mode == "random":
            return _noise(bits, salt + 16 * self.seed)
        if self.mode == "extreme":  # at the end of what is allowed, the sign at random
            return np.sign(_noise(bits, salt + 16 * self.seed))
        # One after another: all too large, or all too small, each of the four by itself.
        return 1.0 if int(self.mode, 16) >> salt & 1 else -1.0

    def ex2(self, x: np.ndarray) -> np.ndarray:
        x = _flush(x)
        y = np.exp2(x.astype(np.float64)) * (1.0 + np.where(x == 0, 0.0, self._off(x.view(np.uint32), 0)) * 2.0**-22)
        return _flush(y.astype(np.float32))

    def lg2(self, x: np.ndarray) -> np.ndarray:
        x = _flush(x)
        y = np.log2(x.astype(np.float64))
        off = self._off(x.view(np.uint32), 1) * 2.0**-22
        return (y + off * np.where((x > 0.5) & (x < 2.0), 1.0, np.abs(y))).astype(np.float32)

    def rcp(self, x: np.ndarray) -> np.ndarray:
        x = _flush(x)
        # Of powers of 2 it is exact, which makes 1 / 1 = 1.
        off = np.where(x.view(np.uint32) & np.uint32(0x7FFFFF), self._off(x.view(np.uint32), 2), 0.0)
        y = (1.0 / x.astype(np.float64)) * (1.0 + off * 2.0**-23)
        return _flush(y.astype(np.float32))

    def div_full(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        bits = x.view(np.uint32) ^ (y.view(np.uint32) * np.uint32(2654435761))
        off = np.where(y.view(np.uint32) & np.uint32(0x7FFFFF), self._off(bits, 3), 0.0)
        quotient = (x.astype(np.float64) / y.astype(np.float64)) * (1.0 + off * 2.0**-22)
        return quotient.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Segment:
    """Tensors that lie in one piece of memory; a copy of it."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end
        self.base = begin & ~15
        size = (end - self.base + 31) & ~15
        self.data = np.zeros(size, np.uint8)
        self.readable = np.zeros(size, np.bool_)
        self.writable = np.zeros(size, np.bool_)
        self.tracker: Tracker | None = None
        self.dirty = False
        self.views = {width: self.data[: size // width * width].view(STORAGE[8 * width]) for width in (1, 2, 4, 8)}


class Tracker:
    """Who wrote each unit of a memory last, who has read it since, and at which epochs of their barriers."""

    def __init__(self, size: int, shift: int) -> None:
        self.shift = shift
        n = (size >> shift) + 1
        self.writer, self.reader = np.full(n, -1, np.int32), np.full(n, -1, np.int32)
        # Of each access: the epochs of the warp, the block and the cluster, and where it stands.
        self.written, self.read = np.zeros((n, 4), np.int32), np.zeros((n, 4), np.int32)
        self.spread = np.zeros(n, np.uint8)  # of the readers: 0 one thread, 1 a warp, 2 a block, 3 a cluster, 4 more

    def units(self, offsets: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """The units of accesses of so many bytes, and how many each has."""
        count = max(1, size >> self.shift)
        first = offsets >> self.shift
        if count == 1:
            return first, 1
        return (first[:, None] + np.arange(count)).ravel(), count


class Launch(NamedTuple):
    """What is to be run."""

    code: "Code"
    num_programs: int
    num_ctas: int
    num_warps: int
    shared: int
    arguments: list  # a number, or the address of a tensor, per parameter


# ---------------------------------------------------------------------------------------------------------------------
# The text


class Instruction(NamedTuple):
    """One."""

    predicate: str | None
    negated: bool
    opcode: str
    operands: list[str]
    line: int
    source: str


def _operands(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


class Code:
    """The entry of a PTX text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.params: list[tuple[str, str]] = []  # type, name
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.cta_threads, self.cluster = None, 1
        self._parse(text)
        self.steps = [Step(self, pc, instruction) for pc, instruction in enumerate(self.instructions)]

    def _parse(self, text: str) -> None:
        state, source, files = "before", "?", {}
        for match in re.finditer(r'^\s*\.file\s+(\d+)\s+"[^"]*"(?:\s+"([^"]*)")?', text, re.M):
            files[match[1]] = match[2] or ""
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
                comment = re.search(r"//\s*(\S+:\d+):\d+\s*$", line)
                source = comment[1] if comment else f"{files.get(match[1], match[1])}:{match[2]}"
                continue
            line = line.split("//")[0].strip()
            if not line:
                continue
            if state == "before":
                if line.startswith(".visible .entry"):
                    state = "params"
                elif re.match(r"\.shared", line):
                    raise EmulationError(f"shared memory of its own: {line}")
                continue
            if state == "params":
                if match := re.match(r"\.param \.(\w+)(?: \.ptr[^,]*?)? (\w+),?$", line):
                    self.params.append((match[1], match[2]))
                elif match := re.match(r"\.reqntid (\d+)", line):
                    self.cta_threads = int(match[1])
                elif match := re.match(r"\.reqnctapercluster (\d+)", line):
                    self.cluster = int(match[1])
                elif line == "{":
                    state = "body"
                elif line != ")" and not line.startswith((".maxnreg", ".explicitcluster", ".minnctapersm", ".maxntid")):
                    raise EmulationError(f"not understood: {line}")
                continue
            if state == "after":
                continue
            if line == "}":
                state = "after"
                continue
            if match := re.match(r"(\$?\w+):$", line):
                self.labels[match[1]] = len(self.instructions)
                continue
            if line.startswith(".reg"):
                continue
            if line.startswith(".") or "{ ." in line:
                raise EmulationError(f"not understood: {line}")
            for statement in line.split(";"):
                if statement := statement.strip():
                    match = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)$", statement, re.S)
                    if not match:
                        raise EmulationError(f"not understood: {statement}")
                    self.instructions.append(
                        Instruction(match[2], match[1] == "!", match[3], _operands(match[4]), number, source)
                    )


# ---------------------------------------------------------------------------------------------------------------------
# The machine


class Machine:
    """Runs a launch; ``hazards`` and ``notes`` count what was seen."""

    def __init__(self, segments: list[Segment], *, special: Special | None = None, contract: bool = False,
                 track: bool = True, seed: int = 0, max_lanes: int = 8192) -> None:  # fmt: skip
        self.segments = sorted(segments, key=lambda segment: segment.base)
        self.starts = np.array([segment.base for segment in self.segments], np.int64)
        self.special, self.contract, self.track = special or Special(), contract, track
        self.random, self.max_lanes = np.random.default_rng(seed), max_lanes
        self.hazards: Counter = Counter()
        self.examples: dict = {}
        self.notes: Counter = Counter()
        self.executed = 0

    def run(self, launch: Launch, order: np.ndarray | None = None) -> None:
        """All programs, some at the same time."""
        threads = launch.num_ctas * launch.num_warps * WARP
        at_once = max(1, self.max_lanes // threads)
        if order is None:
            order = self.random.permutation(launch.num_programs)
        with np.errstate(all="ignore"):
            for start in range(0, launch.num_programs, at_once):
                self._run(launch, order[start : start + at_once])

    # The threads of some programs.

    def _run(self, launch: Launch, programs: np.ndarray) -> None:
        code = launch.code
        self.code, self.launch = code, launch
        self.T, self.C = launch.num_warps * WARP, launch.num_ctas
        self.n = n = len(programs) * self.C * self.T
        lane = np.arange(n)
        self.tid = (lane % self.T).astype(np.uint32)
        self.cta = (lane // self.T).astype(np.int32)
        self.rank = (self.cta % self.C).astype(np.uint32)
        self.cluster = (self.cta // self.C).astype(np.int32)
        self.warp = (lane // WARP).astype(np.int32)
        self.program = programs[self.cluster].astype(np.uint32)
        # Of all threads of the launch.
        self.gid = (self.program.astype(np.int64) * (self.C * self.T) + lane % (self.C * self.T)).astype(np.int32)
        self.all = lane

        self.stride = (launch.shared + 15) // 16 * 16 + 16
        self.num_blocks = len(programs) * self.C
        self.shared = np.full(self.num_blocks * self.stride, 0xFF, np.uint8)
        self.shared_views = {width: self.shared.view(STORAGE[8 * width]) for width in (1, 2, 4, 8)}
        self.shared_tracker = Tracker(self.shared.size, 0)
        self.pending = np.zeros(self.shared.size, np.bool_)
        self.copies: list[Copy] = []
        self.commits = np.zeros(n, np.int32)

        # Epochs: of a warp's barriers, a block's, and a cluster's arrivals and waits.
        self.epoch_warp, self.epoch_block = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.arrived, self.waited = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.remote = np.full(self.num_blocks, -1, np.int32)  # the last arrival before another block's access to it
        self.gone = np.zeros(n, np.bool_)

        self.R: dict[str, np.ndarray] = {}
        self.products: dict[str, tuple] = {}
        params = {}
        for (kind, name), value in zip(code.params, launch.arguments, strict=True):
            if kind in ("f32", "f64"):
                bits = FLOATS[kind](value).view(STORAGE[int(kind[1:])])
            else:
                bits = STORAGE[int(kind[1:])](int(value) % (1 << int(kind[1:])))
            params[name] = bits
        self.params = params

        groups: dict[int, np.ndarray | None] = {0: None}  # a mask for each program counter; None is all threads
        self.waiting: dict[int, tuple[str, np.ndarray]] = {}  # threads at a barrier, by its program counter
        steps = code.steps
        while groups:
            pc = min(groups)
            mask = groups.pop(pc)
            stop = min(groups, default=len(steps))
            while True:
                if pc >= len(steps):
                    raise EmulationError("past the end")
                step = steps[pc]
                self.executed += 1
                if step.moves is None:
                    step.run(self, mask)
                    pc += 1
                    if pc == stop:
                        self._join(groups, pc, mask)
                        break
                    continue
                self.here = pc
                for place, who in step.moves(self, mask, pc):
                    self._join(groups, place, who)
                break
            if not groups and self.waiting:
                stuck = {code.instructions[pc].line: int(m.sum()) for pc, (_, m) in self.waiting.items()}
                raise EmulationError(f"threads wait for ever, by line: {stuck}")
        if not self.gone.all():
            raise EmulationError("threads are left")
        if any(not copy.done.all() for copy in self.copies):
            self.note("copies under way at the end", 0)

    def _join(self, groups: dict, pc: int, mask: np.ndarray | None) -> None:
        if mask is not None and not mask.any():
            return
        if pc in groups:
            other = groups[pc]
            mask = None if mask is None or other is None else mask | other
            if mask is not None and mask.all():
                mask = None
        groups[pc] = mask

    # What was seen.

    def hazard(self, kind: str, first: int, second: int, count: int, example: str = "") -> None:
        ins = self.code.instructions
        name = "start" if first < 0 else f"{ins[first].opcode} line {ins[first].line} ({ins[first].source})"
        key = (kind, name, f"{ins[second].opcode} line {ins[second].line} ({ins[second].source})")
        self.hazards[key] += count
        self.examples.setdefault(key, example)

    def note(self, text: str, pc: int, count: int = 1) -> None:
        self.notes[(text, self.code.instructions[pc].line)] += count

    # Registers.

    def lanes(self, mask: np.ndarray | None, step: "Step") -> np.ndarray:
        """Those that execute an instruction."""
        if step.predicate is not None:
            p = self.R[step.predicate]
            p = ~p if step.negated else p
            return np.nonzero(p if mask is None else p & mask)[0]
        return self.all if mask is None else np.nonzero(mask)[0]

    def masked(self, mask: np.ndarray | None, step: "Step") -> np.ndarray | None:
        if step.predicate is None:
            return mask
        p = self.R[step.predicate]
        p = ~p if step.negated else p
        return p if mask is None else p & mask

    def set(self, name: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if self.products:
            self.products.pop(name, None)
        if value.shape != (self.n,):
            value = np.broadcast_to(value, (self.n,))
        if mask is not None:
            old = self.R.get(name)
            if old is None:
                old = np.zeros(self.n, value.dtype)
                if value.dtype != np.bool_:
                    old = ~old
            value = np.where(mask, value, old)
        self.R[name] = value

    def undefined(self, name: str, storage: np.dtype, pc: int) -> np.ndarray:
        """What a register holds that nobody wrote: NaN. LLVM leaves such registers where a value does not matter."""
        if storage == np.bool_:
            raise EmulationError(f"{name} is read before it is written, line {self.code.instructions[pc].line}")
        self.note("a register is read that nobody wrote", pc)
        self.R[name] = np.full(self.n, ~storage.type(0))
        return self.R[name]

    def set_lanes(self, name: str, lanes: np.ndarray, value: np.ndarray) -> None:
        if self.products:
            self.products.pop(name, None)
        if lanes is self.all:
            self.R[name] = value
            return
        old = self.R.get(name)
        new = np.full(self.n, ~value.dtype.type(0)) if old is None else old.copy()
        new[lanes] = value
        self.R[name] = new

    # Barriers.

    def whole_warps(self, lanes: np.ndarray, pc: int) -> None:
        """Raise unless each warp is there with all threads."""
        if lanes is not self.all and (np.bincount(self.warp[lanes], minlength=self.n // WARP) % WARP).any():
            raise EmulationError(f"a part of a warp is at line {self.code.instructions[pc].line}")

    def at_block_barrier(self, mask: np.ndarray | None, pc: int) -> list:
        return self._at_barrier("bar", mask, pc, self.cta, self.T)

    def at_cluster_wait(self, mask: np.ndarray | None, pc: int) -> list:
        return self._at_barrier("cluster", mask, pc, self.cluster, self.T * self.C)

    def _at_barrier(self, kind: str, mask, pc: int, member: np.ndarray, count: int) -> list:
        here = np.ones(self.n, np.bool_) if mask is None else mask
        self.whole_warps(np.nonzero(here)[0], pc)
        if pc in self.waiting:
            here = here | self.waiting.pop(pc)[1]
        if kind == "bar":
            # Any bar.sync 0 will do for the hardware; threads of one block at two of them are worth a word.
            for other, (_, there) in self.waiting.items():
                both = np.intersect1d(member[here], member[there])
                if len(both):
                    raise EmulationError(f"threads of a block wait at two barriers, {pc} and {other}")
            complete = np.bincount(member[here], minlength=member[-1] + 1) == count
            free = here & complete[member]
            self.epoch_block[free] += 1
            self.epoch_warp[free] += 1
        else:
            # All threads must have arrived once more than they have waited.
            lowest = np.full(member[-1] + 1, np.iinfo(np.int32).max)
            np.minimum.at(lowest, member, self.arrived)
            if (self.arrived[here] <= self.waited[here]).any():
                raise EmulationError("a wait without an arrival")
            free = here & (lowest[member] > self.waited)
            self.waited[free] += 1
            self.epoch_warp[free] += 1
        left = here & ~free
        if left.any():
            self.waiting[pc] = (kind, left)
        if kind == "cluster":
            # Others that wait at this barrier elsewhere, or here, may go as well: look again.
            pass
        return [(pc + 1, None if free.all() else free)]

    def arrive(self, lanes: np.ndarray, pc: int) -> list:
        self.whole_warps(lanes, pc)
        if (self.arrived[lanes] != self.waited[lanes]).any():
            raise EmulationError("arrives twice")
        self.arrived[lanes] += 1
        # Who waits may be free now.
        moves = []
        for place, (kind, there) in list(self.waiting.items()):
            if kind == "cluster":
                del self.waiting[place]
                moves += self._at_barrier("cluster", there, place, self.cluster, self.T * self.C)
        return moves

    # Races.

    def _before(self, level: np.ndarray, epochs: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        """Whether an access at these epochs comes before anything that the lanes do now."""
        return (
            ((level <= 1) & (epochs[:, 0] < self.epoch_warp[lanes]))
            | ((level <= 2) & (epochs[:, 1] < self.epoch_block[lanes]))
            | ((level <= 3) & (epochs[:, 2] < self.waited[lanes]))
        )

    def _level(self, other: np.ndarray, gid: np.ndarray) -> np.ndarray:
        """How far apart two threads are: 0 the same, 1 in a warp, 2 in a block, 3 in a cluster, 4 farther."""
        return (
            (other != gid).astype(np.uint8)
            + (other // WARP != gid // WARP)
            + (other // self.T != gid // self.T)
            + (other // (self.T * self.C) != gid // (self.T * self.C))
        ).astype(np.uint8)

    def _report(self, kind: str, bad: np.ndarray, before: np.ndarray, other: np.ndarray, lanes: np.ndarray, pc: int):
        for first in np.unique(before[bad]):
            chosen = np.nonzero(bad & (before == first))[0]
            a, b = int(other[chosen[0]]), int(self.gid[lanes[chosen[0]]])
            size = self.T * self.C
            words = [f"program {x // size} block {x % size // self.T} thread {x % self.T}" for x in (a, b)]
            self.hazard(kind, int(first), pc, len(chosen), " and ".join(words))

    def on_read(self, tracker: Tracker, space: str, lanes, offsets, size: int, pc: int) -> None:
        units, count = tracker.units(offsets, size)
        if count > 1:
            lanes = np.repeat(lanes, count)
        gid = self.gid[lanes]
        writer = tracker.writer[units]
        level = self._level(writer, gid)
        epochs = tracker.written[units]
        bad = (writer >= 0) & (level > 0) & ~self._before(level, epochs, lanes)
        if bad.any():
            self._report(f"{space}: read after write", bad, epochs[:, 3], writer, lanes, pc)
        # The set of readers.
        reader, spread, epochs = tracker.reader[units], tracker.spread[units], tracker.read[units]
        level = np.maximum(spread, self._level(reader, gid))
        fresh = (reader < 0) | (level == 0) | self._before(level, epochs, lanes)
        mine = np.stack(
            [self.epoch_warp[lanes], self.epoch_block[lanes], self.arrived[lanes], np.full(len(lanes), pc)], axis=1
        )
        tracker.spread[units] = 0
        if not fresh.all():
            np.maximum.at(tracker.spread, units[~fresh], level[~fresh])
            mine[~fresh, :3] = np.maximum(mine[~fresh, :3], epochs[~fresh, :3])
        tracker.reader[units] = gid
        tracker.read[units] = mine
        several = tracker.reader[units] != gid
        if several.any():
            np.maximum.at(tracker.spread, units[several], self._level(tracker.reader[units[several]], gid[several]))

    def on_write(self, tracker: Tracker, space: str, lanes, offsets, size: int, pc: int, data: np.ndarray) -> None:
        """``data`` are the units that each lane writes, (lanes, units), to see whether two write the same.

        All NaN are the same to the hardware, and 0 is where it takes the larger of 0 and -0.
        """
        units, count = tracker.units(offsets, size)
        if count > 1:
            lanes = np.repeat(lanes, count)
        gid = self.gid[lanes]
        for kind, other, spread, epochs in (
            ("write after write", tracker.writer[units], np.uint8(0), tracker.written[units]),
            ("write after read", tracker.reader[units], tracker.spread[units], tracker.read[units]),
        ):
            level = np.maximum(spread, self._level(other, gid))
            bad = (other >= 0) & (level > 0) & ~self._before(level, epochs, lanes)
            if bad.any():
                self._report(f"{space}: {kind}", bad, epochs[:, 3], other, lanes, pc)
        tracker.writer[units] = gid
        tracker.written[units] = np.stack(
            [self.epoch_warp[lanes], self.epoch_block[lanes], self.arrived[lanes], np.full(len(lanes), pc)], axis=1
        )
        tracker.reader[units] = -1
        tracker.spread[units] = 0
        several = tracker.writer[units] != gid
        if several.any():
            words = data.view(np.uint32 if size >= 4 else data.dtype).copy()
            if size >= 4:
                words[(words & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)] = 0x7FFFFFFF
                words[words == np.uint32(0x80000000)] = 0
            flat = words.view(data.dtype).ravel()
            last = np.zeros(tracker.writer.size, flat.dtype)
            last[units] = flat
            differ = several & (last[units] != flat)
            if differ.any() and size >= 4:
                # A sum over a warp whose first addition was fused with a multiplication is not the same in all threads.
                a, b = (x.view(np.uint8).reshape(-1, words.dtype.itemsize) for x in (last[units], flat))
                a, b = (np.ascontiguousarray(x).view(np.uint32).ravel().astype(np.int64) for x in (a, b))
                near = np.repeat(np.abs(a - b) <= 4, len(differ) // len(a))
                if (differ & near).any():
                    self.note(f"{space}: several threads write numbers that differ in the last place", pc,
                              int((differ & near).sum()))  # fmt: skip
                differ &= ~near
                several &= ~near
            if differ.any():
                self._report(f"{space}: two write at once", differ, np.full(len(units), pc), tracker.writer[units],
                             lanes, pc)  # fmt: skip
            elif several.any():
                self.note(f"{space}: several threads write the same number at once", pc, int(several.sum()))

    # Global memory.

    def _segment(self, address: np.ndarray, size: int, pc: int) -> list[tuple[Segment, np.ndarray]]:
        """Which accesses lie in which segment."""
        signed = address.astype(np.int64)
        if (signed & (size - 1)).any():
            raise EmulationError(f"not aligned to {size}: line {self.code.instructions[pc].line}")
        index = np.searchsorted(self.starts, signed, "right") - 1
        found = []
        for i in np.unique(index):
            segment = self.segments[i] if i >= 0 else None
            chosen = slice(None) if (index == i).all() else index == i
            inside = signed[chosen]
            if segment is None or (inside < segment.begin).any() or (inside + size > segment.end).any():
                lane = int(np.nonzero(chosen)[0][0]) if isinstance(chosen, np.ndarray) else 0
                raise EmulationError(
                    f"outside of all tensors: {self.code.instructions[pc]}, address {int(signed[lane]):#x}, "
                    f"{None if segment is None else int(inside.max() + size - segment.end)} bytes behind a tensor"
                )
            found.append((segment, chosen))
        return found

    def _allowed(self, which: np.ndarray, offsets: np.ndarray, size: int, pc: int, what: str) -> None:
        for i in range(0, size, 2 if size > 1 else 1):
            ok = which[offsets + i]
            if not ok.all():
                self.hazard(f"global: {what}", -1, pc, int((~ok).sum()), f"offset {int(offsets[~ok][0]) + i}")

    def load_global(self, lanes, address, width: int, count: int, pc: int) -> list[np.ndarray]:
        """``count`` numbers of ``width`` bytes for each of the lanes."""
        outs = [np.empty(len(lanes), STORAGE[8 * width]) for _ in range(count)]
        size = width * count
        for segment, chosen in self._segment(address, size, pc):
            offsets = address[chosen].astype(np.int64) - segment.base
            self._allowed(segment.readable, offsets, size, pc, "read of what is no element")
            view = segment.views[width]
            for i, out in enumerate(outs):
                out[chosen] = view[offsets // width + i]
            if self.track and segment.tracker is not None:
                self.on_read(segment.tracker, "global", lanes[chosen], offsets, size, pc)
        return outs

    def store_global(self, lanes, address, width: int, values: list[np.ndarray], pc: int) -> None:
        size = width * len(values)
        for segment, chosen in self._segment(address, size, pc):
            offsets = address[chosen].astype(np.int64) - segment.base
            self._allowed(segment.writable, offsets, size, pc, "write to what is not to be written")
            view = segment.views[width]
            here = [value[chosen] for value in values]
            for i, value in enumerate(here):
                view[offsets // width + i] = value
            segment.dirty = True
            if self.track and segment.tracker is not None:
                data = np.stack(here, axis=1).view(np.uint16) if width > 1 else np.stack(here, axis=1)
                self.on_write(segment.tracker, "global", lanes[chosen], offsets, size, pc, data)

    # Shared memory.

    def shared_offsets(self, lanes, address, size: int, pc: int, space: str) -> np.ndarray:
        """Where in the memory of all blocks."""
        address = address.astype(np.int64)
        window = address >> WINDOW
        rank = np.where(window == 0, self.rank[lanes], window - 1)
        local = (address & ((1 << WINDOW) - 1)) - SHARED_BASE
        line = self.code.instructions[pc].line
        if (local < 0).any() or (local + size > self.launch.shared).any():
            raise EmulationError(
                f"outside of shared memory: line {line}, offset {int(local.min())} to {int(local.max())}"
            )
        if (local & (size - 1)).any():
            raise EmulationError(f"not aligned to {size} in shared memory: line {line}")
        if (rank >= self.C).any():
            raise EmulationError(f"no such block: line {line}")
        if space != "cluster" and (rank != self.rank[lanes]).any():
            raise EmulationError(f"another block's memory without shared::cluster: line {line}")
        block = self.cluster[lanes] * self.C + rank
        far = block != self.cta[lanes]
        if far.any():
            np.maximum.at(self.remote, block[far], self.arrived[lanes[far]])
            if self.gone[block[far] * self.T].any():
                self.hazard("shared: of a block that is gone", -1, pc, int(far.sum()))
        return block * self.stride + local

    def load_shared(self, lanes, address, width: int, count: int, pc: int, space: str) -> list[np.ndarray]:
        offsets = self.shared_offsets(lanes, address, width * count, pc, space)
        if self.track:
            self._shared_read(lanes, offsets, width * count, pc)
        view = self.shared_views[width]
        return [view[offsets // width + i] for i in range(count)]

    def _shared_read(self, lanes, offsets, size: int, pc: int) -> None:
        bytes_of = (offsets[:, None] + np.arange(size)).ravel()
        if self.pending[bytes_of].any():
            self.hazard("shared: read of what is still being copied", -1, pc, int(self.pending[bytes_of].sum()))
        empty = self.shared_tracker.writer[bytes_of] < 0
        if empty.any():
            self.note("shared: read before anything is written", pc, int(empty.sum()))
        self.on_read(self.shared_tracker, "shared", lanes, offsets, size, pc)

    def store_shared(self, lanes, address, width: int, values: list[np.ndarray], pc: int, space: str) -> None:
        offsets = self.shared_offsets(lanes, address, width * len(values), pc, space)
        for i, value in enumerate(values):
            self.shared_views[width][offsets // width + i] = value
        if self.track:
            self._shared_write(lanes, offsets, width * len(values), pc, np.stack(values, axis=1).view(np.uint8))

    def _shared_write(self, lanes, offsets, size: int, pc: int, data: np.ndarray) -> None:
        bytes_of = (offsets[:, None] + np.arange(size)).ravel()
        if self.pending[bytes_of].any():
            self.hazard("shared: write over what is still being copied", -1, pc, int(self.pending[bytes_of].sum()))
        self.on_write(self.shared_tracker, "shared", lanes, offsets, size, pc, data)

    # Copies that arrive later.

    def start_copy(self, lanes, shared_address, address, size: int, sizes: np.ndarray, pc: int) -> None:
        """Of ``sizes`` bytes, with zeros up to ``size``. It arrives when it is waited for, and not a moment earlier."""
        offsets = self.shared_offsets(lanes, shared_address, size, pc, "cta")
        data = np.zeros((len(lanes), size), np.uint8)
        for n in np.unique(sizes):
            if n not in (0, size):
                raise EmulationError(f"a copy of {n} bytes of {size}")
        some = np.nonzero(sizes)[0]
        if len(some):
            width = min(size, 8)
            words = self.load_global(lanes[some], address[some], width, size // width, pc)
            data[some] = np.stack(words, axis=1).view(np.uint8)
        bytes_of = (offsets[:, None] + np.arange(size)).ravel()
        if self.track:
            self._shared_write(lanes, offsets, size, pc, data)
        self.shared[bytes_of] = 0xFF
        self.pending[bytes_of] = True
        self.copies.append(
            Copy(
                lanes, offsets, data, address, sizes > 0, self.commits[lanes].copy(), np.zeros(len(lanes), np.bool_), pc
            )
        )

    def commit(self, lanes: np.ndarray) -> None:
        self.commits[lanes] += 1

    def wait_copies(self, lanes: np.ndarray, left: int | None, pc: int) -> None:
        here = np.zeros(self.n, np.bool_)
        here[lanes] = True
        for copy in self.copies:
            arrives = here[copy.lanes] & ~copy.done
            if left is not None:
                arrives &= copy.group < self.commits[copy.lanes] - left
            if not arrives.any():
                continue
            copy.done[arrives] = True
            offsets, data = copy.offsets[arrives], copy.data[arrives]
            bytes_of = (offsets[:, None] + np.arange(data.shape[1])).ravel()
            self.shared[bytes_of] = data.ravel()
            self.pending[bytes_of] = False
            if self.track:
                self._shared_write(copy.lanes[arrives], offsets, data.shape[1], pc, data)
                # What it read must be what is there still.
                chosen = arrives & copy.reads
                if chosen.any():
                    width = min(data.shape[1], 8)
                    words = self.load_global(copy.lanes[chosen], copy.address[chosen], width,
                                             data.shape[1] // width, copy.pc)  # fmt: skip
                    if (np.stack(words, axis=1).view(np.uint8) != copy.data[chosen]).any():
                        self.hazard("global: written while it is copied", copy.pc, pc, 1)
        self.copies = [copy for copy in self.copies if not copy.done.all()]

    # The end.

    def leave(self, lanes: np.ndarray, pc: int) -> None:
        self.gone[lanes] = True
        early = self.waited[lanes] <= self.remote[self.cta[lanes]]
        if early.any():
            self.hazard("shared: a block ends while others may look into it", -1, pc, int(early.sum()))


class Copy(NamedTuple):
    """Under way: cp.async of some threads."""

    lanes: np.ndarray
    offsets: np.ndarray
    data: np.ndarray
    address: np.ndarray
    reads: np.ndarray
    group: np.ndarray
    done: np.ndarray
    pc: int


# ---------------------------------------------------------------------------------------------------------------------
# Instructions

_CACHE = re.compile(r"\.(L1::\w+|L2::\w+|ca|cg|cs|cv|nc|lu|wb|wt|volatile|weak|relaxed|gpu|sys|cta|uni)(?=\.|$)")
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_SPECIAL_REGISTERS = {
    "%tid.x": lambda m: m.tid,
    "%laneid": lambda m: m.tid % np.uint32(WARP),
    "%ctaid.x": lambda m: m.program * np.uint32(m.C) + m.rank,
    "%clusterid.x": lambda m: m.program,
    "%cluster_ctarank": lambda m: m.rank,
    "%cluster_ctaid.x": lambda m: m.rank,
    "%nctaid.x": lambda m: np.uint32(m.launch.num_programs * m.C),
    "%nclusterid.x": lambda m: np.uint32(m.launch.num_programs),
    "%cluster_nctaid.x": lambda m: np.uint32(m.C),
    "%ntid.x": lambda m: np.uint32(m.T),
}


class Step:
    """One instruction, ready to be run: ``run(machine, mask)``, or ``moves`` where it may lead elsewhere."""

    def __init__(self, code: Code, pc: int, instruction: Instruction) -> None:
        self.pc, self.instruction = pc, instruction
        self.predicate, self.negated = instruction.predicate, instruction.negated
        self.moves = self.run = None
        self.ops = instruction.operands
        try:
            self._decode(code, instruction.opcode)
        except (KeyError, ValueError, IndexError) as error:
            raise EmulationError(f"unknown instruction: {instruction} ({error!r})") from error
        if self.moves is None and self.run is None:
            raise EmulationError(f"unknown instruction: {instruction}")

    # Operands.

    def _reader(self, text: str, kind: str):
        """A function of the machine: the operand, as the type says."""
        dtype = _dtype(kind)
        if text.startswith("%"):
            if text in _SPECIAL_REGISTERS:
                special = _SPECIAL_REGISTERS[text]
                return lambda m: special(m).view(dtype)
            storage = np.dtype(np.bool_ if kind == "pred" else STORAGE[8 * np.dtype(dtype).itemsize])

            def read(m):
                try:
                    value = m.R[text]
                except KeyError:
                    value = m.undefined(text, storage, self.pc)
                if value.itemsize > storage.itemsize:  # the register may be wider than the type
                    value = value.astype(storage)
                return value.view(dtype)

            return read
        value = self._immediate(text, kind)
        return lambda m: value

    @staticmethod
    def _immediate(text: str, kind: str):
        dtype = _dtype(kind)
        if kind == "pred":
            return np.bool_(int(text, 0) != 0)
        bits = 8 * np.dtype(dtype).itemsize
        if text.startswith("0f"):
            return STORAGE[32](int(text[2:], 16)).view(dtype)
        if text.startswith("0d"):
            return STORAGE[64](int(text[2:], 16)).view(dtype)
        if text == "global_smem":
            return STORAGE[bits](SHARED_BASE).view(dtype)
        return STORAGE[bits](int(text.rstrip("U"), 0) % (1 << bits)).view(dtype)

    def _address(self, text: str, kind: str):
        match = re.fullmatch(r"\[\s*([%\w.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not match:
            raise EmulationError(f"not an address: {text}")
        base, offset = self._reader(match[1], kind), self._immediate(match[2] or "0", kind)
        if match[2] in (None, "0"):
            return base
        return lambda m: base(m) + offset

    def _write(self, name: str, kind: str, function) -> None:
        """The result of the function is what the register holds from now on."""
        if kind == "pred":
            self.run = lambda m, mask: m.set(name, function(m), m.masked(mask, self))
        else:
            storage = STORAGE[8 * np.dtype(_dtype(kind)).itemsize]
            if self.predicate is None:
                self.run = lambda m, mask: m.set(name, function(m).view(storage), mask)
            else:
                self.run = lambda m, mask: m.set(name, function(m).view(storage), m.masked(mask, self))

    # Decoding.

    def _decode(self, code: Code, opcode: str) -> None:
        parts = opcode.split(".")
        handler = getattr(self, "_" + parts[0], None)
        if handler is None:
            raise EmulationError(f"unknown instruction: {self.instruction}")
        handler(code, parts)

    def _bra(self, code, parts) -> None:
        label = self.ops[0]
        target = None

        def moves(m, mask, pc):
            nonlocal target
            if target is None:
                target = code.labels[label]
            if self.predicate is None:
                return [(target, mask)]
            taken = m.masked(mask, self)
            if taken.all():
                return [(target, None)]
            stays = ~taken if mask is None else mask & ~taken
            return [(target, taken), (pc + 1, None if stays.all() else stays)]

        self.moves = moves

    def _ret(self, code, parts) -> None:
        if self.predicate is not None:
            raise EmulationError("a conditional ret")

        def moves(m, mask, pc):
            m.leave(m.lanes(mask, self), pc)
            return []

        self.moves = moves

    def _trap(self, code, parts) -> None:
        def moves(m, mask, pc):
            if len(m.lanes(mask, self)):
                raise EmulationError(f"trap, line {self.instruction.line}")
            return [(pc + 1, mask)]

        self.moves = moves

    def _bar(self, code, parts) -> None:
        if parts[1:] == ["sync"] and self.ops == ["0"] and self.predicate is None:
            self.moves = lambda m, mask, pc: m.at_block_barrier(mask, pc)
        elif parts[1:] == ["warp", "sync"] and self.ops == ["-1"] and self.predicate is None:

            def run(m, mask):
                lanes = m.lanes(mask, self)
                m.whole_warps(lanes, self.pc)
                m.epoch_warp[lanes] += 1

            self.run = run

    def _barrier(self, code, parts) -> None:
        if self.predicate is not None:
            return
        if parts[1:] == ["cluster", "arrive", "aligned"]:
            self.moves = lambda m, mask, pc: [(pc + 1, mask), *m.arrive(m.lanes(mask, self), pc)]
        elif parts[1:] == ["cluster", "wait", "aligned"]:
            self.moves = lambda m, mask, pc: m.at_cluster_wait(mask, pc)

    # Memory.

    def _vector(self, text: str) -> list[str]:
        return [name.strip() for name in text.strip("{} ").split(",")]

    def _ld(self, code, parts) -> None:
        if parts[1] == "param":
            kind, name = parts[2], self.ops[1].strip("[] ")
            wide = 64 if self.ops[0].startswith("%rd") else 32 if self.ops[0].startswith("%r") else 16
            if self.ops[0].startswith("%rs"):
                wide = 16

            def run(m, mask):
                bits = m.params[name]
                if 8 * bits.itemsize != int(kind[1:]):
                    raise EmulationError(f"parameter {name} is read as {kind}")
                value = bits.view(_dtype(kind)).astype(SIGNED[wide] if kind[0] == "s" else STORAGE[wide])
                m.set(self.ops[0], value.view(STORAGE[wide]), mask)

            if self.predicate is None:
                self.run = run
            return
        space, width, count, kind = self._access(parts)
        names, address = self._vector(self.ops[0]), self._address(self.ops[1], "u64" if space == "global" else "u32")
        if len(names) != count:
            raise ValueError("a vector of another length")
        wide = {"%rs": 16, "%rd": 64}.get(names[0][:3], 32)

        def run(m, mask):
            lanes = m.lanes(mask, self)
            if len(lanes) == 0:
                for name in names:
                    if name not in m.R:
                        m.R[name] = np.full(m.n, ~STORAGE[wide](0))
                return
            where = np.broadcast_to(address(m), (m.n,))[lanes]
            if space == "global":
                values = m.load_global(lanes, where, width, count, self.pc)
            else:
                values = m.load_shared(lanes, where, width, count, self.pc, space)
            for name, value in zip(names, values, strict=True):
                if 8 * width != wide:
                    value = value.view(_dtype(kind)).astype(SIGNED[wide] if kind[0] == "s" else STORAGE[wide])
                m.set_lanes(name, lanes, value.view(STORAGE[wide]))

        self.run = run

    def _access(self, parts) -> tuple[str, int, int, str]:
        """The space, the bytes of a number, how many, and their type."""
        rest = _CACHE.sub("", "." + ".".join(parts[1:])).strip(".").split(".")
        text = ".".join(parts[1:])
        if rest[0] == "global":
            space = "global"
        elif rest[0].startswith("shared"):
            space = "cluster" if "shared::cluster" in text else "cta"
        else:
            raise ValueError("a space")
        count = int(rest[1][1:]) if rest[1].startswith("v") else 1
        if len(rest) != (3 if rest[1].startswith("v") else 2):
            raise ValueError("something more")
        return space, int(rest[-1][1:]) // 8, count, rest[-1]

    def _st(self, code, parts) -> None:
        space, width, count, _kind = self._access(parts)
        address = self._address(self.ops[0], "u64" if space == "global" else "u32")
        values = [self._source(name, width) for name in self._vector(self.ops[1])]
        if len(values) != count:
            raise ValueError("a vector of another length")

        def run(m, mask):
            lanes = m.lanes(mask, self)
            if len(lanes) == 0:
                return
            where = np.broadcast_to(address(m), (m.n,))[lanes]
            data = [np.broadcast_to(value(m), (m.n,))[lanes].astype(STORAGE[8 * width]) for value in values]
            if space == "global":
                m.store_global(lanes, where, width, data, self.pc)
            else:
                m.store_shared(lanes, where, width, data, self.pc, space)

        self.run = run

    def _source(self, name: str, width: int):
        if name.startswith("%"):
            return lambda m: m.R[name]
        value = self._immediate(name, f"b{8 * width}")
        return lambda m: value

    def _cp(self, code, parts) -> None:
        text = ".".join(parts[1:])
        if text in ("async.cg.shared.global", "async.ca.shared.global"):
            to, source = self._address(self.ops[0], "u32"), self._address(self.ops[1], "u64")
            size = int(self.ops[2], 0)
            if (parts[2] == "cg" and size != 16) or size not in (4, 8, 16):
                raise ValueError("a size")
            sizes = self._reader(self.ops[3], "u32") if len(self.ops) > 3 else lambda m: np.uint32(size)

            def run(m, mask):
                lanes = m.lanes(mask, self)
                if len(lanes) == 0:
                    return
                every = [np.broadcast_to(x, (m.n,))[lanes] for x in (to(m), source(m), sizes(m))]
                m.start_copy(lanes, every[0], every[1], size, every[2], self.pc)

            self.run = run
        elif text == "async.commit_group":
            self.run = lambda m, mask: m.commit(m.lanes(mask, self))
        elif text == "async.wait_group":
            left = int(self.ops[0])
            self.run = lambda m, mask: m.wait_copies(m.lanes(mask, self), left, self.pc)
        elif text == "async.wait_all":
            self.run = lambda m, mask: m.wait_copies(m.lanes(mask, self), None, self.pc)

    def _mapa(self, code, parts) -> None:
        if parts[1:] != ["shared::cluster", "u32"]:
            return
        address, rank = self._reader(self.ops[1], "u32"), self._reader(self.ops[2], "u32")

        def run(m, mask):
            local, lanes = np.broadcast_to(address(m), (m.n,)), m.lanes(mask, self)
            if (local[lanes] >> np.uint32(WINDOW)).any():
                raise EmulationError("mapa of what is mapped")
            m.set(self.ops[0], local + ((rank(m) + np.uint32(1)) << np.uint32(WINDOW)), m.masked(mask, self))

        self.run = run

    def _matrix(self, parts) -> tuple[int, bool]:
        """How many matrices, and whether they are transposed."""
        rest = [part for part in parts if part != "trans"]
        if rest[1:3] != ["sync", "aligned"] or rest[3] != "m8n8" or rest[-2:] != ["shared", "b16"] or len(rest) != 7:
            raise ValueError("a shape")
        if self.predicate is not None:
            raise ValueError("a condition")
        return int(rest[4][1:]), "trans" in parts

    @staticmethod
    def _elements(m: "Machine", where: np.ndarray, lanes: np.ndarray, i: int, transposed: bool) -> list[np.ndarray]:
        """The addresses of what each thread has of matrix i: of four bytes, or if it is transposed of two and two.

        Row r begins where thread 8 i + r says. Thread t has the elements 2 (t % 4) and the next of row t / 4, or of
        column t / 4.
        """
        warps, thread = np.repeat(lanes[::WARP], WARP), np.tile(np.arange(WARP), len(lanes) // WARP)
        rows = (
            [where[warps + 8 * i + 2 * (thread % 4) + j] for j in (0, 1)]
            if transposed
            else [where[warps + 8 * i + thread // 4]]
        )
        if any((row & np.uint32(15)).any() for row in rows):
            raise EmulationError("a row of a matrix is not aligned")
        across = (2 * (thread // 4) if transposed else 4 * (thread % 4)).astype(np.uint32)
        return [row + across for row in rows]

    def _stmatrix(self, code, parts) -> None:
        count, transposed = self._matrix(parts)
        address, names = self._address(self.ops[0], "u32"), self._vector(self.ops[1])

        def run(m, mask):
            lanes = m.lanes(mask, self)
            m.whole_warps(lanes, self.pc)
            where = np.broadcast_to(address(m), (m.n,))
            for i in range(count):
                places, value = self._elements(m, where, lanes, i, transposed), m.R[names[i]][lanes]
                if transposed:
                    for j, place in enumerate(places):
                        half = (value >> np.uint32(16 * j)).astype(np.uint16)
                        m.store_shared(lanes, place, 2, [half], self.pc, "cta")
                else:
                    m.store_shared(lanes, places[0], 4, [value], self.pc, "cta")

        self.run = run

    def _ldmatrix(self, code, parts) -> None:
        count, transposed = self._matrix(parts)
        address, names = self._address(self.ops[1], "u32"), self._vector(self.ops[0])

        def run(m, mask):
            lanes = m.lanes(mask, self)
            m.whole_warps(lanes, self.pc)
            where = np.broadcast_to(address(m), (m.n,))
            values = []
            for i in range(count):
                places = self._elements(m, where, lanes, i, transposed)
                loaded = [m.load_shared(lanes, place, 4 // len(places), 1, self.pc, "cta")[0] for place in places]
                if transposed:
                    loaded = [loaded[0].astype(np.uint32) | (loaded[1].astype(np.uint32) << np.uint32(16))]
                values += loaded
            for name, value in zip(names, values, strict=True):
                m.set_lanes(name, lanes, value)

        self.run = run

    # Between threads of a warp.

    def _shfl(self, code, parts) -> None:
        if parts[1] != "sync" or parts[3] != "b32" or len(self.ops) != 5 or self.ops[4] != "-1" or self.predicate:
            return
        mode, source, clamp = parts[2], self._reader(self.ops[1], "u32"), self._immediate(self.ops[3], "u32")
        by = self._reader(self.ops[2], "u32")
        if "|" in self.ops[0] or (mode in ("bfly", "idx") and int(clamp) != 31) or (mode not in ("bfly", "idx")):
            return

        def run(m, mask):
            m.whole_warps(m.lanes(mask, self), self.pc)
            lane = m.tid & np.uint32(31)
            other = lane ^ by(m) if mode == "bfly" else by(m) & np.uint32(31)
            if (other > 31).any():
                raise EmulationError("a lane above 31")
            m.set(self.ops[0], source(m)[m.all - lane + other.astype(np.int64)], mask)

        self.run = run

    def _redux(self, code, parts) -> None:
        if parts[1] != "sync" or len(self.ops) != 3 or self.predicate:
            return
        operation, kind = parts[2], parts[-1]
        source, members = self._reader(self.ops[1], kind), self._reader(self.ops[2], "u32")
        if kind == "f32":
            function = {
                "max": np.maximum if "NaN" in parts else np.fmax,
                "min": np.minimum if "NaN" in parts else np.fmin,
            }
        else:
            function = {"max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and}
        if len(parts) - ("NaN" in parts) != 4:
            return
        function = function[operation]

        def run(m, mask):
            m.whole_warps(m.lanes(mask, self), self.pc)
            if (np.broadcast_to(members(m), (m.n,))[m.lanes(mask, self)] != 0xFFFFFFFF).any():
                raise EmulationError("redux of a part of a warp")
            value = function.reduce(np.broadcast_to(source(m), (m.n,)).reshape(-1, WARP), axis=1)
            m.set(self.ops[0], np.repeat(value.astype(_dtype(kind)), WARP).view(np.uint32), mask)

        self.run = run

    # Moves.

    def _mov(self, code, parts) -> None:
        kind, to, source = parts[1], self.ops[0], self.ops[1]
        if to.startswith("{"):  # unpack
            names = self._vector(to)
            value = self._reader(source, kind)
            bits = int(kind[1:]) // len(names)

            def run(m, mask):
                x = value(m)
                for i, name in enumerate(names):
                    if name != "_":
                        part = (x >> x.dtype.type(i * bits)).astype(STORAGE[bits])
                        m.set(name, part, m.masked(mask, self))

            self.run = run
        elif source.startswith("{"):  # pack
            bits = int(kind[1:])
            names = self._vector(source)
            values = [self._reader(name, f"b{bits // len(names)}") for name in names]

            def function(m):
                x = STORAGE[bits](0)
                for i, value in enumerate(values):
                    x = x | (value(m).astype(STORAGE[bits]) << STORAGE[bits](i * (bits // len(values))))
                return x

            self._write(to, kind, function)
        else:
            self._write(to, kind, self._reader(source, kind))

    def _selp(self, code, parts) -> None:
        a, b, p = (*(self._reader(x, parts[1]) for x in self.ops[1:3]), self._reader(self.ops[3], "pred"))
        self._write(self.ops[0], parts[1], lambda m: np.where(p(m), a(m), b(m)))

    def _setp(self, code, parts) -> None:
        comparison, kind = parts[1], parts[-1]
        if len(parts) != 3 or "|" in self.ops[0] or len(self.ops) != 3:
            return
        a, b = (self._reader(x, kind) for x in self.ops[1:3])
        if kind == "bf16":
            a, b = (lambda m, x=x: bf16_to_f32(x(m)) for x in (a, b))
        floating = kind in ("f32", "f64", "f16", "bf16")
        if floating and comparison in ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
            if comparison in ("num", "nan"):
                both = lambda m: np.isnan(a(m)) | np.isnan(b(m))  # noqa: E731
                self._write(self.ops[0], "pred", both if comparison == "nan" else lambda m: ~both(m))
            else:
                compare = _COMPARE[comparison[:2]]
                self._write(self.ops[0], "pred", lambda m: compare(a(m), b(m)) | np.isnan(a(m)) | np.isnan(b(m)))
            return
        compare = _COMPARE[comparison]
        if floating and comparison == "ne":
            self._write(self.ops[0], "pred", lambda m: (a(m) != b(m)) & ~np.isnan(a(m)) & ~np.isnan(b(m)))
        else:
            self._write(self.ops[0], "pred", lambda m: compare(a(m), b(m)))

    def _prmt(self, code, parts) -> None:
        if parts[1:] != ["b32"]:
            return
        a, b = self._two("u32")
        selector = self._reader(self.ops[3], "u32")

        def function(m):
            both = a(m).astype(np.uint64) | (b(m).astype(np.uint64) << np.uint64(32))
            chosen, x = selector(m), np.uint32(0)
            for i in range(4):
                which = (chosen >> np.uint32(4 * i)) & np.uint32(15)
                byte = ((both >> (8 * (which & np.uint32(7))).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
                sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
                x = x | (np.where(which & np.uint32(8), sign, byte) << np.uint32(8 * i))
            return x

        self._write(self.ops[0], "u32", function)

    # Numbers.

    def _two(self, kind: str):
        return (self._reader(x, kind) for x in self.ops[1:3])

    def _logic(self, parts, function) -> None:
        if len(parts) != 2:
            return
        a, b = self._two(parts[1])
        self._write(self.ops[0], parts[1], lambda m: function(a(m), b(m)))

    def _and(self, code, parts) -> None:
        self._logic(parts, np.bitwise_and)

    def _or(self, code, parts) -> None:
        self._logic(parts, np.bitwise_or)

    def _xor(self, code, parts) -> None:
        self._logic(parts, np.bitwise_xor)

    def _not(self, code, parts) -> None:
        a = self._reader(self.ops[1], parts[1])
        self._write(self.ops[0], parts[1], lambda m: ~a(m))

    def _shift(self, parts, left: bool) -> None:
        kind = parts[1]
        bits = int(kind[1:])
        a, by = self._reader(self.ops[1], kind), self._reader(self.ops[2], "u32")
        dtype = _dtype(kind)
        signed = kind[0] == "s"

        def function(m):
            x, n = a(m), by(m)
            within = np.minimum(n, np.uint32(bits - 1)).astype(dtype)
            shifted = x << within if left else x >> within
            if not signed:
                shifted = np.where(n >= bits, dtype(0), shifted)
            return shifted

        self._write(self.ops[0], kind, function)

    def _shl(self, code, parts) -> None:
        self._shift(parts, True)

    def _shr(self, code, parts) -> None:
        self._shift(parts, False)

    def _bfe(self, code, parts) -> None:
        kind = parts[1]
        bits = int(kind[1:])
        a, start, length = self._reader(self.ops[1], kind), int(self.ops[2], 0), int(self.ops[3], 0)
        if start + length > bits or length == 0:
            return
        dtype = _dtype(kind)
        self._write(
            self.ops[0], kind, lambda m: (a(m) << dtype(bits - start - length)) >> dtype(bits - length)
        )  # fmt: skip

    def _arithmetic(self, parts, function, name: str) -> None:
        """add, sub, mul, min, max of one type."""
        kind = parts[-1]
        modifiers = [x for x in parts[1:-1] if x not in ("rn", "lo")]
        if kind == "f32x2" and not modifiers:
            a, b = self._two("u64")

            def both(m):
                return function(
                    *np.broadcast_arrays(*(np.broadcast_to(x(m), (m.n,)).copy().view(np.float32) for x in (a, b)))
                )

            self._write(self.ops[0], "u64", lambda m: both(m).view(np.uint64))
            return
        if kind in ("bf16", "f16") and modifiers == ["f32"]:
            # The first operand is converted, exactly.
            a, b = self._reader(self.ops[1], kind), self._reader(self.ops[2], "f32")
            wide = bf16_to_f32 if kind == "bf16" else lambda x: x.astype(np.float32)
            self._write(self.ops[0], "f32", lambda m: function(wide(a(m)), b(m)))
            return
        if modifiers == ["ftz"] and kind == "f32":
            a, b = self._two(kind)
            self._write(self.ops[0], kind, lambda m: _flush(function(_flush(a(m)), _flush(b(m)))))
            return
        if modifiers or kind in ("f16", "bf16", "f16x2", "bf16x2"):
            return
        a, b = self._two(kind)
        self._write(self.ops[0], kind, lambda m: function(a(m), b(m)))
        # ptxas may make one instruction of a multiplication and an addition that do not say how they round.
        if kind == "f32" and "rn" not in parts and self.predicate is None:
            plain = self.run
            if name == "mul":

                def run(m, mask):
                    plain(m, mask)
                    if m.contract and mask is None:
                        m.products[self.ops[0]] = (a(m), b(m))

                self.run = run
            elif name in ("add", "sub"):
                sign = -1.0 if name == "sub" else 1.0

                def run(m, mask):
                    for i, (_this, other) in enumerate(((a, b), (b, a))):
                        product = m.products.get(self.ops[1 + i]) if m.contract and mask is None else None
                        if product is not None:
                            x, y = (factor.astype(np.float64) for factor in product)
                            rest = other(m).astype(np.float64)
                            total = x * y + sign * rest if i == 0 else rest + sign * (x * y)
                            m.set(self.ops[0], total.astype(np.float32).view(np.uint32), None)
                            return
                    plain(m, mask)

                self.run = run

    def _add(self, code, parts) -> None:
        self._arithmetic(parts, np.add, "add")

    def _sub(self, code, parts) -> None:
        self._arithmetic(parts, np.subtract, "sub")

    def _mul(self, code, parts) -> None:
        if parts[1] in ("wide", "hi"):
            if parts[1] == "hi":
                return
            self._wide(parts, None)
        else:
            self._arithmetic(parts, np.multiply, "mul")

    def _wide(self, parts, c) -> None:
        kind = parts[2]
        if kind[1:] != "32":
            return
        a, b = self._two(kind)
        to = np.int64 if kind[0] == "s" else np.uint64

        def function(m):
            product = a(m).astype(to) * b(m).astype(to)
            return product if c is None else product + c(m).view(to)

        self._write(self.ops[0], "b64", function)

    def _mad(self, code, parts) -> None:
        kind = parts[2]
        if parts[1] == "wide":
            self._wide(parts, self._reader(self.ops[3], "u64"))
        elif parts[1] == "lo":
            a, b = self._two(kind)
            c = self._reader(self.ops[3], kind)
            self._write(self.ops[0], kind, lambda m: a(m) * b(m) + c(m))

    def _fma(self, code, parts) -> None:
        if parts[1:] == ["rn", "f32"]:
            a, b, c = (self._reader(x, "f32") for x in self.ops[1:4])
            self._write(
                self.ops[0], "f32",
                lambda m: (a(m).astype(np.float64) * b(m) + c(m).astype(np.float64)).astype(np.float32),
            )  # fmt: skip
        elif parts[1:] == ["rn", "f32x2"]:
            operands = [self._reader(x, "u64") for x in self.ops[1:4]]

            def function(m):
                a, b, c = (np.broadcast_to(x(m), (m.n,)).copy().view(np.float32).astype(np.float64) for x in operands)
                return (a * b + c).astype(np.float32).view(np.uint64)

            self._write(self.ops[0], "u64", function)

    def _extreme(self, parts, plain, nan) -> None:
        kind = parts[-1]
        if kind == "f32":
            function = nan if "NaN" in parts else plain
            if set(parts[1:-1]) - {"NaN"} or len(self.ops) not in (3, 4):
                return
            a, b, *more = (self._reader(x, "f32") for x in self.ops[1:])
            if more:
                self._write(self.ops[0], "f32", lambda m: function(function(a(m), b(m)), more[0](m)))
            else:
                self._write(self.ops[0], "f32", lambda m: function(a(m), b(m)))
        elif len(parts) == 2 and kind[0] in "su":
            a, b = self._two(kind)
            self._write(self.ops[0], kind, lambda m: nan(a(m), b(m)))

    def _max(self, code, parts) -> None:
        self._extreme(parts, np.fmax, np.maximum)

    def _min(self, code, parts) -> None:
        self._extreme(parts, np.fmin, np.minimum)

    def _neg(self, code, parts) -> None:
        if len(parts) != 2 or parts[1] in ("f16", "bf16"):
            return
        a = self._reader(self.ops[1], parts[1])
        self._write(self.ops[0], parts[1], lambda m: -a(m))

    def _abs(self, code, parts) -> None:
        if len(parts) != 2 or parts[1] in ("f16", "bf16"):
            return
        a = self._reader(self.ops[1], parts[1])
        self._write(self.ops[0], parts[1], lambda m: np.abs(a(m)))

    def _ex2(self, code, parts) -> None:
        if parts[1:] == ["approx", "ftz", "f32"]:
            a = self._reader(self.ops[1], "f32")
            self._write(self.ops[0], "f32", lambda m: m.special.ex2(np.broadcast_to(a(m), (m.n,))))

    def _lg2(self, code, parts) -> None:
        if parts[1:] == ["approx", "ftz", "f32"]:
            a = self._reader(self.ops[1], "f32")
            self._write(self.ops[0], "f32", lambda m: m.special.lg2(np.broadcast_to(a(m), (m.n,))))

    def _rcp(self, code, parts) -> None:
        a = self._reader(self.ops[1], "f32")
        if parts[1:] == ["approx", "ftz", "f32"]:
            self._write(self.ops[0], "f32", lambda m: m.special.rcp(np.broadcast_to(a(m), (m.n,))))
        elif parts[1:] == ["rn", "f32"]:
            self._write(self.ops[0], "f32", lambda m: np.float32(1.0) / a(m))

    def _div(self, code, parts) -> None:
        if parts[-1] != "f32":
            return
        a, b = self._two("f32")
        if parts[1] == "full" and len(parts) == 3:
            self._write(
                self.ops[0], "f32",
                lambda m: m.special.div_full(*(np.broadcast_to(x(m), (m.n,)) for x in (a, b))),
            )  # fmt: skip
        elif parts[1] == "rn" and len(parts) == 3:
            self._write(self.ops[0], "f32", lambda m: a(m) / b(m))

    def _cvt(self, code, parts) -> None:
        *modifiers, to, source = parts[1:]
        if to in ("bf16x2", "f16x2"):
            if modifiers != ["rn"] or source != "f32":
                return
            narrow = f32_to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            high, low = self._two("f32")
            self._write(
                self.ops[0], "u32",
                lambda m: (narrow(high(m)).astype(np.uint32) << np.uint32(16)) | narrow(low(m)).astype(np.uint32),
            )  # fmt: skip
            return
        a = self._reader(self.ops[1], source)
        if to == "bf16":
            if source == "f32" and modifiers == ["rn"]:
                self._write(self.ops[0], "bf16", lambda m: f32_to_bf16(a(m)))
            return
        if source == "bf16":
            if to == "f32" and not modifiers:
                self._write(self.ops[0], "f32", lambda m: bf16_to_f32(a(m)))
            return
        if to in FLOATS:
            narrowing = source not in FLOATS or np.dtype(FLOATS[to]).itemsize < np.dtype(FLOATS[source]).itemsize
            if modifiers == (["rn"] if narrowing else []):
                self._write(self.ops[0], to, lambda m: a(m).astype(FLOATS[to]))
            return
        if source in FLOATS or modifiers:
            return
        self._write(self.ops[0], to, lambda m: a(m).astype(_dtype(to)))
