"""rope_kv_append_attention with more rows than sequences: against float64 over a paged cache full of poison."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from qwen_rt.errors import MissingDependencyError, QwenRtError
from qwen_rt.plugins.library import load

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
kernel_step = importlib.import_module("qwen_rt.benchmarks.kernel_step")

HEADS = {"0.5b": (14, 2, 64), "1.5b": (12, 2, 128), "7b": (28, 4, 128), "72b": (64, 8, 128), "nano": (4, 2, 128)}
LENGTHS = {
    "two": ([2], [0]),
    "a tile": ([128], [0]),
    "a tile and one": ([129], [0]),
    "behind earlier tokens": ([200], [77]),
    "ragged": ([5, 130, 1, 300], [0, 64, 100, 3]),
    "many tiles": ([1000], [513]),
}
RELATIVE = 6e-3
"""Keys, queries, probabilities and the output are rounded to bf16 (2^-9 each); the rest is f32 or wider."""


@pytest.fixture(scope="module")
def call() -> OpCaller:
    try:
        library = load()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return kernel_step.OpCaller(library)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(20261124)
    yield
    torch.cuda.synchronize()


@dataclass
class Case:
    lengths: list[int]
    starts: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 64

    def __post_init__(self) -> None:
        size, pairs = self.block_size, list(zip(self.lengths, self.starts, strict=True))
        self.max_blocks = max(-(-(length + start) // size) for length, start in pairs) + 1
        num_blocks = len(pairs) * self.max_blocks + 3
        shape = (num_blocks, self.kv_heads, size, self.head_dim)
        self.k_cache, self.v_cache = kernel_step.random_bf16(*shape), kernel_step.random_bf16(*shape)
        order = torch.randperm(num_blocks, device="cuda")[: len(pairs) * self.max_blocks]
        self.tables = order.int().view(len(pairs), self.max_blocks).contiguous()
        for row, (_, start) in enumerate(pairs):
            for index in range(self.max_blocks):
                first = min(size, max(0, start - index * size))
                for cache in (self.k_cache, self.v_cache):
                    cache[self.tables[row, index], :, first:] = float("nan")
        self.qkv = (
            kernel_step.random_bf16(sum(self.lengths), (self.heads + 2 * self.kv_heads) * self.head_dim) * 2
        )  # sharper attention than unit scores give
        self.positions = torch.cat([torch.arange(start, start + length) for length, start in pairs]).cuda()
        ends = torch.tensor(self.lengths).cumsum(0)
        self.query_starts = torch.cat([torch.zeros(1), ends]).int().cuda()
        half = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device="cuda") / self.head_dim
        self.inv_freq = (1e6**-half).float()

    def run(self, call: OpCaller, rows: slice = slice(None), sequences: slice = slice(None)) -> torch.Tensor:
        """Returns the output; caches are changed in copies, which `caches` keeps."""
        starts = self.query_starts[sequences.start : None if sequences.stop is None else sequences.stop + 1]
        qkv = self.qkv[rows].contiguous()
        out = torch.full((qkv.shape[0], self.heads * self.head_dim), float("nan"), device="cuda").bfloat16()
        self.caches = self.k_cache.clone(), self.v_cache.clone()
        tensors = {
            "qkv": qkv,
            "positions": self.positions[rows].contiguous(),
            "query_starts": (starts - starts[0]).contiguous(),
            "inv_freq": self.inv_freq,
            "block_tables": self.tables[sequences].contiguous(),
            "k_cache": self.caches[0],
            "v_cache": self.caches[1],
            "out": out,
        }
        call("rope_kv_append_attention", tensors, scale=self.head_dim**-0.5, rope_scaling=1.25)
        return out

    def reference(self) -> torch.Tensor:
        """float64 on rotated queries and keys that are rounded to bf16, as the cache holds them."""
        d, kv_width = self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.qkv.double().split((self.heads * d, kv_width, kv_width), dim=1)
        angles = self.positions.double()[:, None, None] * self.inv_freq.double()
        cos, sin = angles.cos() * 1.25, angles.sin() * 1.25

        def turn(x: torch.Tensor) -> torch.Tensor:
            first, second = x.view(len(x), -1, d).split(d // 2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).bfloat16().double()

        q, k, v = turn(q), turn(k), v.view(len(v), -1, d)
        outs, row = [], 0
        for index, (length, start) in enumerate(zip(self.lengths, self.starts, strict=True)):
            past = torch.arange(start, device="cuda")
            block, at = self.tables[index].long()[past // self.block_size], past % self.block_size
            keys = torch.cat([self.k_cache[block, :, at].double(), k[row : row + length]])
            values = torch.cat([self.v_cache[block, :, at].double(), v[row : row + length]])
            group = self.heads // self.kv_heads
            scores = torch.einsum("qhd,khd->hqk", q[row : row + length], keys.repeat_interleave(group, 1)) * d**-0.5
            visible = torch.arange(start, start + length, device="cuda")[:, None]
            scores = scores.masked_fill(torch.arange(start + length, device="cuda") > visible, -math.inf)
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.repeat_interleave(group, 1)))
            row += length
        return torch.cat(outs).flatten(1)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    assert bool(out.isfinite().all()), "not finite"
    return float((out.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("model", HEADS)
def test_prefill_equals_reference(call: OpCaller, model: str, lengths: str) -> None:
    case = Case(*LENGTHS[lengths], *HEADS[model])
    out = case.run(call)
    assert relative_error(out, case.reference()) < RELATIVE
    assert torch.equal(out, case.run(call)), "a second run differs"
    assert call.counters_are_zero()


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_blocks_that_only_the_general_kernel_takes(call: OpCaller, model: str, block_size: int) -> None:
    case = Case(*LENGTHS["ragged"], *HEADS[model], block_size)
    assert relative_error(case.run(call), case.reference()) < RELATIVE


@pytest.mark.parametrize("model", ["0.5b", "7b"])
def test_cache_holds_turned_keys_and_values(call: OpCaller, model: str) -> None:
    case = Case(*LENGTHS["ragged"], *HEADS[model])
    case.run(call)
    width, row = case.kv_heads * case.head_dim, 0
    keys, values = case.qkv[:, case.heads * case.head_dim :].split(width, dim=1)
    for index, (length, start) in enumerate(zip(case.lengths, case.starts, strict=True)):
        at = torch.arange(start, start + length, device="cuda")
        block = case.tables[index].long()[at // 64]
        stored_keys = case.caches[0][block, :, at % 64].double().flatten(1)
        assert torch.equal(case.caches[1][block, :, at % 64].flatten(1), values[row : row + length])
        # A rotation keeps the length of every pair, times rope_scaling.
        new = keys[row : row + length].double()
        assert torch.allclose(stored_keys.norm(dim=1), 1.25 * new.norm(dim=1), rtol=5e-3)
        untouched = torch.ones(case.k_cache.shape[0], 64, dtype=torch.bool, device="cuda")
        for other, (other_length, other_start) in enumerate(zip(case.lengths, case.starts, strict=True)):
            positions = torch.arange(other_start, other_start + other_length, device="cuda")
            untouched[case.tables[other].long()[positions // 64], positions % 64] = False
        row += length
    before, after = case.k_cache.permute(0, 2, 1, 3)[untouched], case.caches[0].permute(0, 2, 1, 3)[untouched]
    assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


def test_batch_mates_do_not_change_a_bit(call: OpCaller) -> None:
    case = Case(*LENGTHS["ragged"], *HEADS["7b"])
    together = case.run(call)
    alone = case.run(call, rows=slice(5, 135), sequences=slice(1, 2))
    assert torch.equal(together[5:135], alone)


def test_chunks_equal_one_call(call: OpCaller) -> None:
    whole = Case([600], [0], *HEADS["7b"])
    reference = whole.reference()
    outs = []
    for first, last in ((0, 200), (200, 201), (201, 600)):  # the middle one is a decode step
        whole.query_starts = torch.tensor([0, last - first], dtype=torch.int32, device="cuda")
        outs.append(whole.run(call, rows=slice(first, last)))
        whole.k_cache, whole.v_cache = whole.caches
    assert relative_error(torch.cat(outs), reference) < RELATIVE


def test_idle_and_overlong_sequences(call: OpCaller) -> None:
    case = Case([40, 70, 30], [0, 0, 0], *HEADS["nano"])
    case.positions[40:110] += case.max_blocks * 64
    case.positions[110:] = -1
    out = case.run(call)
    assert bool(out[:40].isfinite().all())
    assert bool(out[40:110].isnan().all())
    assert not bool(out[110:].any())


def test_refuses_what_it_cannot_do(call: OpCaller) -> None:
    case = Case([40], [0], *HEADS["nano"], 24)
    with pytest.raises(QwenRtError, match="block_size=24; expected a multiple of 16"):
        case.run(call)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_decode_step_of_many_pieces(call: OpCaller, kv_heads: int) -> None:
    case = Case([1, 1], [30000, 700], 8, kv_heads, 128)
    assert relative_error(case.run(call), case.reference()) < RELATIVE
    assert call.counters_are_zero()
