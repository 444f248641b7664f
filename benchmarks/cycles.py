"""A model of one Hopper multiprocessor: the cycles of a tile, from the instructions of its common path.

A model, which no GPU has confirmed. What an instruction needs is assumed, by the tables below; what it waits for is the
compiler's own, from the control words. Each of four schedulers issues one instruction a cycle, of the warp that it
issued last if that can go on, else of the first that can. There is no instruction cache and no bank conflict, and L2
always hits.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.machine_code import CommonPath, Instruction
from clipfast import tuning
from clipfast.tuning import Config

SCHEDULERS = 4
WARPGROUP = 4  # warps that multiply together
TENSOR_PEAK = 2048  # multiply-adds of a multiprocessor in a cycle, of 2-byte operands

# Cycles that a warp holds a scheduler's unit, which has 32 lanes for float32, 16 for integers and float64, 4 for
# functions. The memory unit is one for all schedulers and takes 4 bytes a lane in a cycle.
UNITS = {
    "function": (("MUFU", "I2F", "F2I", "F2F", "FRND"), 8),
    "float32": (("FADD", "FMUL", "FFMA"), 1),
    "integer product": (("IMAD",), 2),
    "float64": (("DADD", "DMUL", "DFMA", "DSETP"), 2),
    "memory": (
        ("LDS", "STS", "ATOMS", "SHFL", "REDUX", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMG"),
        1,
    ),
    "uniform": (("R2UR", "S2UR"), 2),
    "": (("HGMMA", "WARPGROUP", "WARPSYNC", "BAR", "BRA", "SYNCS", "DEPBAR", "LDGDEPBAR", "FENCE", "NOP"), 0),
}
OTHER_UNIT = ("integer", 2)
QUEUES = {"memory": 32, "function": 8}  # cycles of work that may wait in front of a unit

# Cycles from issue until the result is there, of what is waited for by scoreboard.
LATENCY = {"SHFL": 23, "LDS": 28, "LDSM": 32, "STSM": 24, "LDC": 30, "STG": 30, "LDL": 40, "LDG": 290, "ATOMG": 500}
OTHER_LATENCY = 22
OPERANDS_READ = 12
BARRIER = 22  # from the last arrival
BRANCH = 6
LOAD = 650  # from a TMA instruction to its data in shared memory
MULTIPLY, MULTIPLIED = 30, 24  # from the last warp's issue to the product; from its end to the registers
BANDWIDTH = 64.0  # bytes that a multiprocessor has from L2 in a cycle

PRODUCTS = {"distillation": 2}  # of features, for a tile; 1 for others
TILES = 4  # of each program; the first does not count
SHIFT = 900  # cycles from one program's start to the next one's

# Of the whole loss.
N = 32768
VENDOR = 0.75  # of the tensor peak, which the vendor's products reach
LAUNCH = 7000  # cycles for each chunk's kernels to begin and end, 4 us

LOADS = ("UTMALDG", "LDGSTS")
WAIT_FOR_LOADS, WAIT_FOR_PRODUCTS = "SYNCS.PHASECHK", "WARPGROUP.DEPBAR"


@dataclass(frozen=True)
class Step:
    """An instruction as the model sees it."""

    kind: str
    unit: str
    held: int
    latency: int
    stall: int  # cycles until the warp's next
    written: int  # the scoreboard that its result clears; 7: none
    read: int  # the scoreboard that is clear once its operands are read; 7: none
    waits: tuple[int, ...]  # scoreboards
    width: int  # of a product
    pending: int  # groups that a wait leaves
    closes: bool  # a group of products
    loaded: float  # bytes


def step(i: Instruction, loaded: float = 0) -> Step:
    unit, held = next(((unit, held) for unit, (names, held) in UNITS.items() if i.name in names), OTHER_UNIT)
    if i.name.startswith("U"):
        unit, held = "uniform", 2
    if unit == "memory":
        wide = ".128" in i.opcode or i.name in ("LDSM", "STSM")
        held = 4 if wide else 2 if ".64" in i.opcode or i.name in ("LDG", "STG", "LDGSTS", "ATOMG") else 1
    kind = next((kind for kind in (WAIT_FOR_LOADS, WAIT_FOR_PRODUCTS) if i.opcode.startswith(kind)), i.name)
    product = re.search(r"64x(\d+)x", i.opcode)
    return Step(
        kind,
        unit,
        held,
        latency=LATENCY.get(i.name, OTHER_LATENCY),
        stall=max(1, (i.control & 15) + BRANCH * (i.name == "BRA")),
        written=i.control >> 5 & 7,
        read=i.control >> 8 & 7,
        waits=tuple(k for k in range(6) if i.control >> 11 + k & 1),
        width=int(product[1]) if product else 0,
        pending=int(i.operands.split(",")[1], 16) if kind in (WAIT_FOR_PRODUCTS, "DEPBAR") else 0,
        closes="gsb0" in i.operands,
        loaded=loaded,
    )


def trace(path: CommonPath, config: Config, d: int) -> list[Step]:
    """One tile's instructions in their order. A step of a loop over d loads for a later one, the last steps none."""
    depth = -(-d // config.block_d)
    size = (config.block_m + config.block_n) * config.block_d * config.itemsize
    steps: list[Step] = []
    for before, code in zip(path.outside, path.steps, strict=False):
        ahead, of_step = (sum(i.name in LOADS for i in c) for c in (before, code))
        each = size / max(1, of_step)
        # One warp gives a TMA instruction for all.
        loaded = {"UTMALDG": each, "LDGSTS": each / config.num_warps}
        steps += [step(i, loaded.get(i.name, 0)) for i in before]
        for k in range(depth):
            loads = k + ahead // max(1, of_step) < depth
            steps += [step(i, loaded.get(i.name, 0) * loads) for i in code]
    return steps + [step(i) for i in path.outside[-1]]


@dataclass
class Product:
    """Of a warpgroup; begun when all its warps have come."""

    arrived: int = 0
    end: float = math.inf


@dataclass(eq=False)
class Program:
    """Its loads' ends, in order, how many warps are at its barrier, its products, and its tiles' ends."""

    loads: list[float] = field(default_factory=list)
    waiting: list[Warp] = field(default_factory=list)
    products: defaultdict[tuple[int, int], Product] = field(default_factory=lambda: defaultdict(Product))
    tiles: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Warp:
    program: Program
    number: int  # in its program
    ready: float  # not before
    at: int = 0  # in the trace of its tiles
    clear: list[float] = field(default_factory=lambda: [0.0] * 6)  # when each scoreboard is
    multiplied: int = 0
    groups: list[Product] = field(default_factory=list)  # the last of each
    waited: int = 0  # for loads
    copies: list[float] = field(default_factory=list)  # when each group of copies is there
    copied: float = 0.0  # when what was copied last is


class Multiprocessor:
    """Programs that run one trace again and again."""

    def __init__(self, steps: Sequence[Step], warps: int, programs: int, bandwidth: float) -> None:
        self.steps = steps
        self.bandwidth = bandwidth
        loads = sum(s.kind == "UTMALDG" and s.loaded > 0 for s in steps)
        self.loads_per_wait = loads / max(1, sum(s.kind == WAIT_FOR_LOADS for s in steps))
        self.free: defaultdict[tuple[str, int], float] = defaultdict(float)  # when each unit is
        self.link = 0.0  # when L2 has delivered all
        self.programs = [Program() for _ in range(programs)]
        self.warps = warps
        self.schedulers: list[list[Warp]] = [[] for _ in range(SCHEDULERS)]
        for place, program in enumerate(self.programs):
            for number in range(warps):
                self.schedulers[number % SCHEDULERS].append(Warp(program, number, place * SHIFT))

    def run(self, tiles: int) -> None:
        now, end = 0.0, tiles * len(self.steps)
        last: list[list[Warp]] = [[] for _ in range(SCHEDULERS)]
        while any(warp.at < end for warps in self.schedulers for warp in warps):
            soonest = math.inf
            for place, warps in enumerate(self.schedulers):
                for warp in (*last[place], *warps):
                    if warp.at == end:
                        continue
                    ready = warp.ready if warp.ready > now else self._earliest(warp, place)
                    if ready <= now:
                        self._issue(warp, place, now)
                        last[place] = [warp]
                        soonest = now + 1
                        break
                    soonest = min(soonest, ready)
            if soonest == math.inf:
                raise RuntimeError("no warp can go on")
            now = max(now + 1, math.ceil(soonest))

    def _earliest(self, warp: Warp, place: int) -> float:
        """When the warp can issue its next instruction; infinite while that depends on another warp."""
        s = self.steps[warp.at % len(self.steps)]
        earliest = max((warp.clear[k] for k in s.waits), default=0.0)
        if s.unit:
            earliest = max(earliest, self.free[_unit(s, place)] - QUEUES.get(s.unit, 0))
        if s.kind == WAIT_FOR_PRODUCTS and len(warp.groups) > s.pending:
            earliest = max(earliest, warp.groups[-1 - s.pending].end)
        elif s.kind == "DEPBAR" and len(warp.copies) > s.pending:
            earliest = max(earliest, warp.copies[-1 - s.pending])
        elif s.kind == WAIT_FOR_LOADS:
            needed = round((warp.waited + 1) * self.loads_per_wait)
            loads = warp.program.loads
            earliest = max(earliest, loads[needed - 1] if len(loads) >= needed else math.inf)
        return earliest

    def _issue(self, warp: Warp, place: int, now: float) -> None:
        s, program = self.steps[warp.at % len(self.steps)], warp.program
        begin = now
        if s.unit:
            unit = _unit(s, place)
            begin = max(now, self.free[unit])
            self.free[unit] = begin + s.held
        if s.written < 7:
            warp.clear[s.written] = max(warp.clear[s.written], begin + s.held + s.latency)
        if s.read < 7:
            warp.clear[s.read] = max(warp.clear[s.read], begin + OPERANDS_READ)
        warp.ready = now + s.stall
        warp.at += 1
        if s.kind == "BAR":
            program.waiting.append(warp)
            if len(program.waiting) < self.warps:
                warp.ready = math.inf
            else:
                for other in program.waiting:
                    other.ready = now + BARRIER
                program.waiting.clear()
        elif s.kind == "HGMMA":
            self._multiply(warp, s, now)
        elif s.kind == WAIT_FOR_PRODUCTS:
            del warp.groups[: -s.pending or None]
        elif s.kind == WAIT_FOR_LOADS:
            warp.waited += 1
        elif s.kind == "UTMALDG" and s.loaded and not warp.number:
            program.loads.append(self._deliver(s.loaded, now))
        elif s.kind == "LDGSTS" and s.loaded:
            warp.copied = self._deliver(s.loaded, now)
        elif s.kind == "LDGDEPBAR":
            warp.copies.append(warp.copied)
        if warp.at % len(self.steps) == 0 and not warp.number:
            program.tiles.append(now)

    def _deliver(self, size: float, now: float) -> float:
        self.link = max(self.link + size / self.bandwidth, now + LOAD)
        return self.link

    def _multiply(self, warp: Warp, s: Step, now: float) -> None:
        product = warp.program.products[warp.number // WARPGROUP, warp.multiplied]
        warp.multiplied += 1
        product.arrived += 1
        if s.closes:
            warp.groups.append(product)
        if product.arrived == WARPGROUP:
            # Each scheduler's tensor unit has a quarter of the rows.
            begin = max(now + MULTIPLY, self.free["tensor", 0])
            self.free["tensor", 0] = begin + s.width / 2
            product.end = begin + s.width / 2 + MULTIPLIED


def _unit(s: Step, place: int) -> tuple[str, int]:
    return s.unit, 0 if s.unit == "memory" else place


@dataclass(frozen=True)
class Timed:
    """A configuration, how many of its programs run on a multiprocessor, and their cycles from tile to tile."""

    config: Config
    programs: int
    cycles: float  # of one program

    def share_of_peak(self, d: int) -> float:
        products = PRODUCTS.get(self.config.kernel, 1) * self.config.block_m * self.config.block_n * d
        return self.programs * products * self.config.itemsize / 2 / TENSOR_PEAK / self.cycles


def timed(path: CommonPath, config: Config, d: int, fit: int, bandwidth: float = BANDWIDTH) -> Timed:
    """The model's cycles, for as many programs as the configuration wants and `fit`."""
    programs = min(fit, config.per_processor)
    processor = Multiprocessor(trace(path, config, d), config.num_warps, programs, bandwidth)
    processor.run(TILES)
    ends = processor.programs[0].tiles
    return Timed(config, programs, (ends[-1] - ends[0]) / (len(ends) - 1))


def share_at_4p(statistics: Timed, gradient: Timed, d: int, processors: int, vendor: float = VENDOR) -> float:
    """What part of the tensor peak the loss reaches at n = N, forward and backward, counted as 4 P.

    The two products with G reach `vendor` of it. Whole tiles of the busiest program count, as `tuning` shares them out.
    """
    config = statistics.config
    sides = zip(tuning.program_grid(N, N, config, processors), (config.block_m, config.block_n), strict=True)
    tiles = math.prod(-(-N // (side * programs)) for programs, side in sides)
    forward = tiles * statistics.cycles

    config = gradient.config
    rows, cols = tuning.chunk_shape(N, N, config.itemsize, tuning.WORKSPACE_BYTES)
    chunks = -(-N // rows) * -(-N // cols)
    tiles = -(-rows // config.block_m) * -(-cols // config.block_n)
    rounds = -(-tiles // tuning.persistent_programs(rows, cols, config, processors))
    backward = chunks * (rounds * gradient.cycles + LAUNCH)

    product = N * N * d * config.itemsize / 2 / TENSOR_PEAK / processors
    return 4 * product / (forward + backward + 2 * product / vendor)
