"""What a compiled kernel costs, read from its machine code: no GPU is needed.

A multiprocessor has four schedulers, and each issues one instruction of one warp a cycle: a slot. What surrounds the
matrix products of a tile is measured in slots per logit, on the path that nearly all tiles take.

A binary does not say which path that is. Here it is the shortest way round the loop over tiles that goes through the
loop over d and no other, and has an exponential for every logit: kernels send a tile with positives, an edge or a wide
range through a loop over its strips. The loop over d is the innermost one with matrix instructions, the loop over
tiles the smallest around it. Instructions whose predicate is off take their slot too.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

WARP = 32
MATRIX = re.compile(r"[HIQDB]?G?MMA|UTC\w+MMA")
EXPONENTIAL = "MUFU.EX2"
LOCAL_MEMORY = ("LDL", "STL")  # spilled registers
ENDS = ("BRA", "BRX", "EXIT", "RET", "JMP")

# Per multiprocessor (CUDA C++ programming guide, table of compute capabilities; the same for 8.0, 9.0 and 10.0).
REGISTERS = 65536
REGISTER_STEP = 256  # a warp's registers are given out in multiples
WARPS = 64
RESERVED_SHARED = 1024  # bytes of each program

LINE = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?) ?;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* (?P<encoding>0x[0-9a-f]{16}) \*/",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly; `control` is what the compiler tells the scheduler, 21 bits."""

    address: int
    predicate: str
    opcode: str
    operands: str
    control: int = 0

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def label(self) -> str:
        """Where it jumps to; empty if it does not."""
        found = re.search(r"`\((\.L\w+)\)", self.operands)
        # Of a branch that only diverging warps take, no warp is one here.
        return found[1] if found and self.name == "BRA" and ".DIV" not in self.opcode else ""

    @property
    def falls_through(self) -> bool:
        conditional = self.predicate or self.operands.startswith(("P", "!P", "UP", "!UP")) or ".DIV" in self.opcode
        return self.name not in ENDS or bool(conditional)


Code = tuple[Instruction, ...]


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and the addresses of the blocks that may follow."""

    code: Code
    successors: tuple[int, ...]

    @cached_property
    def exponentials(self) -> int:
        return sum(i.opcode.startswith(EXPONENTIAL) for i in self.code)

    @cached_property
    def multiplies(self) -> bool:
        return any(MATRIX.fullmatch(i.name) for i in self.code)


Blocks = dict[int, Block]


@dataclass(frozen=True)
class CommonPath:
    """What a warp issues for a tile."""

    outside: tuple[Code, ...]  # before each loop over d, and after the last
    steps: tuple[Code, ...]  # of each such loop, once

    @property
    def slots(self) -> int:
        """Outside the loops over d."""
        return sum(map(len, self.outside))

    @property
    def spills(self) -> int:
        return sum(i.name in LOCAL_MEMORY for code in (*self.outside, *self.steps) for i in code)


def tool(name: str) -> Path:
    """A program of the CUDA toolkit, as it comes with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def read(program: str, option: str, cubin: bytes) -> str:
    """What a program of the toolkit prints of a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.run(
            [tool(program), *option.split(), file.name], check=True, capture_output=True, text=True
        ).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, per thread."""
    usage = read("cuobjdump", "--dump-resource-usage", cubin)
    registers, stack = (int(re.findall(rf"\b{what}:(\d+)", usage)[-1]) for what in ("REG", "STACK"))
    return registers, stack


def programs_per_processor(warps: int, registers: int, shared: int, shared_limit: int) -> int:
    """How many programs a multiprocessor holds at once.

    Args:
        warps: of a program.
        registers: of a thread.
        shared: bytes of a program.
        shared_limit: the most that one program can have.
    """
    of_warp = -(-registers * WARP // REGISTER_STEP) * REGISTER_STEP
    by_shared = (shared_limit + RESERVED_SHARED) // (shared + RESERVED_SHARED)
    return min(REGISTERS // (of_warp * warps), by_shared, WARPS // warps)


def disassemble(cubin: bytes) -> str:
    """The text with labels and encodings, of a binary with one kernel."""
    return read("nvdisasm", "-c -hex", cubin)


def blocks_of(text: str) -> Blocks:
    """The basic blocks of a disassembly, by address, the entry first."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in LINE.finditer(text):
        if line["label"]:
            waiting.append(line["label"])
            continue
        address, control = int(line["address"], 16), int(line["encoding"], 16) >> 41 & 0x1FFFFF
        labels |= dict.fromkeys(waiting, address)
        waiting = []
        code.append(Instruction(address, line["predicate"] or "", line["opcode"], line["operands"], control))
    targets = {labels[i.label] for i in code if i.label}
    blocks: Blocks = {}
    run: list[Instruction] = []
    for i, following in zip(code, [*code[1:], None], strict=True):
        run.append(i)
        if following is None or i.name in ENDS or following.address in targets:
            after = [following.address] if following and i.falls_through else []
            blocks[run[0].address] = Block(tuple(run), tuple([*after, labels[i.label]] if i.label else after))
            run = []
    return blocks


def loops_of(blocks: Blocks) -> dict[int, frozenset[int]]:
    """The natural loops: the blocks of each, by its head's address."""
    entry = next(iter(blocks))
    predecessors: dict[int, list[int]] = {address: [] for address in blocks}
    for address, block in blocks.items():
        for following in block.successors:
            predecessors[following].append(address)
    forward = {address: block.successors for address, block in blocks.items()}
    loops: dict[int, frozenset[int]] = {}
    for address in _reached(forward, entry):
        for head in blocks[address].successors:
            # It is a way back if every way to it leads through the head.
            if address == head or address not in _reached(forward, entry, without=head):
                loops[head] = loops.get(head, frozenset({head})) | _reached(predecessors, address, without=head)
    return loops


def _reached(edges: Mapping[int, Iterable[int]], start: int, without: int | None = None) -> frozenset[int]:
    """The start and what can be reached from it, also where one block is missing."""
    found = {start} - {without}
    todo = list(found)
    while todo:
        new = set(edges[todo.pop()]) - found - {without}
        found |= new
        todo += new
    return frozenset(found)


def common_path(text: str, logits: int, products: int = 1) -> CommonPath:
    """What a warp issues for a tile on the path that nearly all tiles take.

    Args:
        text: the disassembly of one kernel.
        logits: of the tile, per thread.
        products: loops over d for a tile.

    Raises:
        LookupError: the kernel has no such path.
    """
    blocks = blocks_of(text)
    loops = loops_of(blocks)
    multiplying = {head: body for head, body in loops.items() if any(blocks[b].multiplies for b in body)}
    over_d = {h: body for h, body in multiplying.items() if not any(other < body for other in multiplying.values())}
    others = [body for h, body in loops.items() if h not in multiplying]
    # Over tiles: the smallest around one over d.
    around = {
        min(outer, key=lambda h: len(loops[h]))
        for body in over_d.values()
        if (outer := [h for h in multiplying if body < multiplying[h]])
    }
    walks = [
        walk
        for head in around
        if (walk := _shortest(blocks, loops, head, loops[head].difference(*others), set(over_d), logits, products))
    ]
    if not walks:
        raise LookupError("no way round a loop over tiles has a product and an exponential of every logit")
    walk = min(walks, key=lambda walk: sum(len(blocks[b].code) for b in walk))
    outside: list[list[Instruction]] = [[]]
    steps: list[Code] = []
    for address in walk:
        if address in over_d:
            step = _shortest(blocks, loops, address, loops[address], {address}, 0, 1)
            assert step is not None
            steps.append(tuple(i for b in step for i in blocks[b].code))
            outside.append([])
        elif not any(address in body for body in over_d.values()):
            outside[-1] += blocks[address].code
    return CommonPath(tuple(map(tuple, outside)), tuple(steps))


def _shortest(
    blocks: Blocks,
    loops: Mapping[int, frozenset[int]],
    head: int,
    allowed: frozenset[int],
    over_d: set[int],
    logits: int,
    products: int,
) -> list[int] | None:
    """Once round a loop with the fewest instructions, by Dijkstra's algorithm over (block, products, exponentials)."""
    queue: list[tuple[int, int, int, int, tuple[int, ...]]] = [(0, head, 0, 0, (head,))]
    done = set()
    while queue:
        cost, address, multiplied, exponentials, walk = heapq.heappop(queue)
        if (address, multiplied, exponentials) in done:
            continue
        done.add((address, multiplied, exponentials))
        block = blocks[address]
        multiplied = min(products, multiplied + (address in over_d))
        exponentials = min(logits, exponentials + block.exponentials)
        for following in block.successors:
            if following == head and (multiplied, exponentials) == (products, logits):
                return list(walk)
            # Straight on: no way back, to whatever loop.
            if following in allowed and address not in loops.get(following, ()):
                then = (cost + len(block.code), following, multiplied, exponentials, (*walk, following))
                heapq.heappush(queue, then)
    return None
