"""The compiled passes by themselves: what they hold (trap 27), that they end when asked (26), what they refuse."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from oracle import features

import clipfast
from clipfast.backends import cpu
from clipfast.block import Block, Weights
from clipfast.problem import NEEDS

if not cpu.instruction_sets():
    pytest.skip("; ".join(clipfast.backends()["cpu"]), allow_module_level=True)

AVAILABLE = [name for name, here in cpu.instruction_sets().items() if here]
ONE = torch.tensor(1.0)

LONG_PASS = """
import sys, torch
from clipfast.backends import cpu
from clipfast.block import Block, Weights
n, d, backward = map(int, sys.argv[1:])
torch.set_num_threads(2)
def block(n, d):
    x = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)), dim=1)
    return Block(x, x, torch.tensor(14.3), torch.tensor(0.0))
def compute(block):
    if not backward:
        return cpu.forward(block).row_lse
    one = torch.ones(block.n, dtype=torch.float64)
    return cpu.backward(block, Weights(one, one, one, one, one), torch.float32).dx
expected = compute(block(300, 40))
long = block(n, d)
print("begins", flush=True)
try:
    compute(long)
    print("not interrupted", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(torch.equal(compute(block(300, 40)), expected), flush=True)
"""


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize(("n", "d", "backward"), [(60_000, 512, 0), (30_000, 512, 1), (1000, 100_000, 1)])
def test_ctrl_c_ends_a_long_pass(instruction_set: str, n: int, d: int, backward: int) -> None:
    """Of many chunks or of one, and the next pass is right."""
    environment = os.environ | {cpu.ENVIRONMENT_VARIABLE: instruction_set, "OMP_WAIT_POLICY": "passive"}
    child = subprocess.Popen(
        [sys.executable, "-c", LONG_PASS, str(n), str(d), str(backward)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begins\n"
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        begin = time.monotonic()
        assert child.stdout.readline() == "interrupted\n"
        assert time.monotonic() - begin < 1.5
        assert child.stdout.read() == "True\n"


MEASURE = """
import ctypes, json, sys, torch
from clipfast import _cpu
from clipfast.backends import cpu
from clipfast.block import Block, Weights
from clipfast.problem import Problem
def status(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
def peak(compute):
    _cpu.release_workspace()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    out = compute()
    held = status("VmHWM") - before
    return held - sum(t.nbytes for t in flat(out))
def flat(out):
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, tuple):
        for part in out:
            yield from flat(part)
for n, m, d, dtype, need in json.loads(sys.argv[1]):
    dtype = getattr(torch, dtype)
    needs = frozenset([need] if need else [])
    predicted = cpu.workspace_bytes(Problem(n, m, d, dtype, torch.device("cpu"), needs))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    x, y, b = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), torch.tensor(0.0, dtype=accumulator)
    one, other = torch.ones(n, dtype=torch.float64), torch.ones(m, dtype=torch.float64)
    weights = Weights(one, one, other, other, one)
    measured = 0
    for scale in (1.0, 1e-31):  # the second is beyond what products of bfloat16 pairs serve
        block = Block(x, y, torch.tensor(scale, dtype=accumulator), b)
        if need == "norms":
            factors = [torch.ones(len(t), dtype=accumulator) for t in (x, y)]
            block = block._replace(x_factor=factors[0], y_factor=factors[1])
        if need == "ranks":
            matches = cpu.matches(block)
            passes = [lambda: cpu.matches(block), lambda: cpu.forward(block, matches)]
        else:
            passes = [lambda: cpu.forward(block)]
        passes.append(lambda: cpu.backward(block, weights, dtype))
        if need == "symmetric":
            passes.append(lambda: cpu.symmetric(block, dtype))
        if need == "sigmoid":
            passes.append(lambda: cpu.sigmoid(block, 1.0, True, dtype))
        if need == "distillation":
            passes.append(lambda: cpu.distillation(block, weights, block, weights, True, dtype))
        cpu.forward(Block(x[:1], y[:1], block.scale, b))
        measured = max(measured, *(peak(compute) for compute in passes))
    print(json.dumps([predicted, measured]), flush=True)
"""


def random_problems(count: int) -> list[tuple[int, int, int, str, str | None]]:
    choice = random.Random(0)
    problems = []
    while len(problems) < count:
        n, m, d = (int(2 ** choice.uniform(0, most)) for most in (14, 20, 16))
        if n * m * d < 4e9 and 1e6 < (n + m) * d < 3e7:
            dtype = choice.choice(["float32", "float32", "float64", "bfloat16", "float16"])
            problems.append((n, m, d, dtype, choice.choice([None, *NEEDS[1:]])))
    return problems


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_workspace_is_a_bound() -> None:
    """measured <= predicted <= 1.3 measured, and a few pages, among them what grows with m alone; at every scale."""
    problems = [(8192, 300_000, 4, "float32", None), (1, 65536, 40, "float32", None), *random_problems(60)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-c", MEASURE, json.dumps(problems)]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout.splitlines()
    for problem, line in zip(problems, lines, strict=True):
        predicted, measured = json.loads(line)
        assert measured <= predicted + 2**20, (problem, predicted, measured)
        assert predicted <= 1.3 * measured + 2**20, (problem, predicted, measured)


def test_memory_that_the_system_has_not_is_said_in_bytes() -> None:
    """A row without strides has any length; what it is packed into has not."""
    x = torch.zeros(1, 1).expand(1, 1 << 45)
    with pytest.raises(MemoryError, match=r"needs \d{15,} bytes of workspace for n = 1, m = 1, d = 35184372088832"):
        cpu.forward(Block(x, x, ONE, ONE))


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 3, 0)])
def test_a_block_of_nothing_is_refused(shape: tuple[int, int, int]) -> None:
    n, m, d = shape
    with pytest.raises(ValueError, match=rf"x, y: got \[{n}, {d}\] and \[{m}, {d}\]"):
        cpu.forward(Block(torch.ones(n, d), torch.ones(m, d), ONE, ONE))


def test_a_gradient_beyond_float32_is_infinite() -> None:
    """As the dense formula's."""
    x = torch.full((2, 1), 1e19)
    large = torch.full((2,), 1e30, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    gradients = cpu.backward(Block(x, x, torch.tensor(1e-38), ONE), Weights(zero, large, zero, large, large), x.dtype)
    assert gradients.dscale == torch.inf


@pytest.mark.parametrize("instruction_set", AVAILABLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softplus_and_sigmoid_keep_their_digits(instruction_set: str, dtype: type) -> None:
    """Within four units in the last place, however small."""
    lowest = np.log2(np.finfo(dtype).tiny) + 2
    x = np.concatenate([np.linspace(lowest, 100, 400_001), np.linspace(-2, 2, 40_001)]).astype(dtype)
    softplus, sigmoid = np.empty_like(x), np.empty_like(x)
    addresses = (x.ctypes.data, softplus.ctypes.data, sigmoid.ctypes.data)
    cpu._cpu.softplus_and_sigmoid(instruction_set, x.dtype.name, *addresses, len(x))
    power = np.exp2(-np.abs(x.astype(np.longdouble)))
    exact_softplus = np.maximum(x, 0) * np.log(np.longdouble(2)) + np.log1p(power)
    exact_sigmoid = np.where(x < 0, power, 1) / (1 + power)
    for got, exact in ((softplus, exact_softplus), (sigmoid, exact_sigmoid)):
        assert (np.abs(got - exact) / exact).max() <= 4 * np.finfo(dtype).eps


@pytest.mark.parametrize("instruction_set", AVAILABLE)
def test_softplus_and_sigmoid_at_the_ends(instruction_set: str) -> None:
    x = np.array([-np.inf, -1e30, 0, 1e30, np.inf, np.nan], np.float32)
    softplus, sigmoid = np.empty_like(x), np.empty_like(x)
    addresses = (x.ctypes.data, softplus.ctypes.data, sigmoid.ctypes.data)
    cpu._cpu.softplus_and_sigmoid(instruction_set, "float32", *addresses, len(x))
    half, log2 = np.float32(0.5), np.float32(np.log(2))
    np.testing.assert_allclose(softplus, [0, 0, log2, 1e30 * log2, np.inf, np.nan], rtol=3e-7)
    np.testing.assert_array_equal(sigmoid, [0, 0, half, 1, 1, np.nan])


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), r"\[2, 3\] and \[2, 4\]"),
        (torch.ones(2, 0), torch.ones(2, 0), "at least 1"),
        (torch.ones(6), torch.ones(6), "matrices"),
        (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16), "two dtypes"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 3, dtype=torch.int32), "float32, float64"),
    ],
)
def test_what_cannot_be_read_is_refused(x: torch.Tensor, y: torch.Tensor, says: str) -> None:
    """Where the process would end."""
    with pytest.raises(ValueError, match=says):
        cpu.forward(Block(x, y, ONE, ONE))


def test_ids_of_another_dtype_are_refused() -> None:
    """64 bits each, they would be read as twice as many."""
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="dtype"):
        cpu.forward(Block(torch.ones(3, 2), torch.ones(3, 2), ONE, ONE, row_ids=ids, col_ids=ids))


def test_ids_may_be_cut_out_of_others() -> None:
    x, y = features("random", 30, 40, 20)
    row_ids, col_ids = torch.arange(60, dtype=torch.int32) % 7, torch.arange(80, dtype=torch.int32) % 7
    views = Block(x, y, ONE, ONE, row_ids=row_ids[::2], col_ids=col_ids[::2])
    copies = Block(x, y, ONE, ONE, row_ids=row_ids[::2].clone(), col_ids=col_ids[::2].clone())
    for got, expected in zip(cpu.forward(views)[:3], cpu.forward(copies)[:3], strict=True):
        assert torch.equal(got, expected)
