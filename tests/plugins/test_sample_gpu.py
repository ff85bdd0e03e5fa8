"""The `sample` kernels against their numpy reference on the GPU: every feature, rings, seeds, graphs, batch mates."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qwen_rt.errors import MissingDependencyError, QwenRtError, UnsupportedModelError
from qwen_rt.plugins.library import load
from qwen_rt.plugins.reference_sample import BAD_ROW, NUM_TOP, sample

if TYPE_CHECKING:
    from qwen_rt.benchmarks.kernel_step import OpCaller

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch", reason="torch is not installed")
DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU here", allow_module_level=True)
kernel_step = importlib.import_module("qwen_rt.benchmarks.kernel_step")

Arrays = dict[str, NDArray[Any]]
RING = 3
FOREVER = 2**31 - 1
VOCABS = (1152, 151936, 152064)
SETTINGS: dict[str, tuple[float, ...]] = {
    "temperature": (0.7, 1.0, 0.0, 2.5, 0.3),
    "top_k": (20, 1, 0, 1000, 10**6),
    "top_p": (0.8, 1e-9, 0.999, 1.0, 0.3),
    "min_p": (0.05, 0.0, 0.7, 1.0, 1e-4),
}
FEATURES = {
    "temperature": ("temperature",),
    "top_k": ("temperature", "top_k"),
    "top_p": ("temperature", "top_p"),
    "min_p": ("temperature", "min_p"),
    "filters": ("temperature", "top_k", "top_p", "min_p"),
    "penalties": ("temperature", "penalties"),
    "edits": ("temperature", "edits"),
    "greedy with edits": ("penalties", "edits"),
    "logprobs": ("logprobs",),
    "all": ("temperature", "top_k", "top_p", "min_p", "penalties", "edits", "logprobs"),
}
CHI_SQUARE_7 = 24.3  # 99.9 % point for 7 degrees of freedom; fewer have a lower one. Seeds are fixed


@pytest.fixture(scope="module")
def call() -> OpCaller:
    try:
        library = load()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    capability = torch.cuda.get_device_capability()
    if capability[0] * 10 + capability[1] not in library.sms:
        pytest.skip(f"the plugin library is for SMs {library.sms}, this GPU is {capability}")
    return kernel_step.OpCaller(library)


@pytest.fixture(autouse=True)
def finish() -> Iterator[None]:
    yield
    torch.cuda.synchronize()


def logits_of(rng: np.random.Generator, rows: int, vocab: int) -> NDArray[np.float32]:
    """Peaked and flat rows by turns: smooth, with many equals, all equal, half of it -inf."""
    x = rng.normal(0, 1, (rows, vocab)) * np.resize([4.0, 0.5, 1.0, 0.0, 10.0], rows)[:, None]
    x[2::3] = np.round(x[2::3])
    x[1::4, rng.integers(0, vocab, vocab // 2)] = -np.inf
    x[:, 7] = np.maximum(x[:, 7], 0)
    return x.astype(np.float32)


def arrays_of(rng: np.random.Generator, rows: int, vocab: int, features: tuple[str, ...], num_tokens: int) -> Arrays:
    """Random tensors of the op, in which settings differ from row to row."""
    given: Arrays = {
        "logits": logits_of(rng, rows, vocab),
        "positions": np.arange(rows) - 1,
        "num_outputs": rng.integers(0, 9, rows),
        "step": np.array([10 * RING + 1]),
        "history": np.full((RING, rows), -9),
    }
    given["logits"][:, num_tokens:] = np.nan
    start = int(rng.integers(5))
    for turn, (name, values) in enumerate(SETTINGS.items()):
        if name in features:
            dtype = np.int32 if name == "top_k" else np.float32
            given[name] = np.resize(np.roll(values, start * turn), rows).astype(dtype)
    if "temperature" in features:
        given["seeds"] = rng.integers(-(2**63), 2**63, rows)
    if "penalties" in features:
        counts = np.zeros((rows, vocab), np.uint32)
        for slot in counts:
            slot[rng.integers(0, vocab, 200)] = rng.integers(0, 3, 200)
            slot[rng.integers(0, vocab, 200)] += np.uint32(2**31)
        given["counts"] = counts.view(np.int32)
        given["count_slots"] = rng.permutation(rows).astype(np.int32)
        given["count_slots"][given["count_slots"] == 1] = -1
        given["penalties"] = np.array(
            [np.resize([1.3, 1.0, 0.7], rows), np.resize([0.5, -1.0], rows), np.resize([0.0, 1.5, -0.5, 0.0], rows)],
            np.float32,
        ).T.copy()
    if "edits" in features:
        best = np.nanargmax(given["logits"], axis=1)
        given["edit_ids"] = rng.integers(-1, num_tokens, (rows, 300)).astype(np.int32)
        given["edit_ids"][:, [3, 40, 280]] = best[:, None]  # one id thrice: additions in order
        given["edit_values"] = rng.choice([-np.inf, 5.0, -100.0, 0.1, 1e-4], (rows, 300)).astype(np.float32)
        given["edit_until"] = rng.choice([0, 5, FOREVER], (rows, 300)).astype(np.int32)
    if "logprobs" in features:
        given["logprobs"] = np.zeros((RING, rows), np.float32)
        given["top_ids"] = np.zeros((RING, rows, NUM_TOP), np.int32)
        given["top_logprobs"] = np.zeros((RING, rows, NUM_TOP), np.float32)
    return given


def on_device(given: Arrays) -> dict[str, Any]:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE).clone() for name, array in given.items()}
    return tensors | {"next_ids": torch.full((len(given["logits"]),), -7, dtype=torch.int64, device=DEVICE)}


def run(call: OpCaller, given: Arrays, num_tokens: int = 0) -> Arrays:
    """Call the op on copies and return all tensors as they are then."""
    tensors = on_device(given)
    call("sample", tensors, num_tokens=num_tokens)
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def check(got: Arrays, want: dict[str, Any]) -> None:
    """Compare every tensor that the op writes; a bad row's `next_ids` may be any id."""
    for name, array in want.items():
        if array.dtype == np.float32:
            np.testing.assert_allclose(got[name], array, atol=2e-5, rtol=1e-5, err_msg=name)
        elif name == "next_ids" and "history" in want:
            good = (want["history"] != BAD_ROW).all(axis=0)
            np.testing.assert_array_equal(got[name][good], array[good], name)
        else:
            np.testing.assert_array_equal(got[name], array, name)


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", [1, 3, 5, 64])
def test_greedy(call: OpCaller, rows: int, vocab: int) -> None:
    """Equals far apart, NaN, infinities, padding; all launch shapes."""
    num_tokens = vocab - 131
    given = arrays_of(np.random.default_rng(rows), rows, vocab, (), num_tokens)
    check(run(call, given, num_tokens), sample(given, num_tokens))
    x = given["logits"]
    x[0, [num_tokens - 1, vocab // 2, 500]] = 99.0
    if rows > 1:
        x[1, 300] = np.nan
        x[2, :num_tokens] = -np.inf
    if rows > 4:
        x[3, 301] = np.inf
        x[4, num_tokens - 1] = 99.0
    want, got = sample(given, num_tokens), run(call, given, num_tokens)
    check(got, want)
    assert got["history"][1, :5].tolist() == [500, BAD_ROW, BAD_ROW, BAD_ROW, num_tokens - 1][:rows]
    assert got["next_ids"].min() >= 0
    assert got["next_ids"].max() < num_tokens


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(call: OpCaller, feature: str, rows: int, vocab: int) -> None:
    rng = np.random.default_rng([rows, vocab])
    for num_tokens in (vocab, vocab - 131):
        given = arrays_of(rng, rows, vocab, FEATURES[feature], num_tokens)
        check(run(call, given, num_tokens), sample(given, num_tokens))


@pytest.mark.parametrize("feature", ["filters", "all"])
@pytest.mark.parametrize("vocab", [1152, 151936])
def test_64_rows(call: OpCaller, vocab: int, feature: str) -> None:
    given = arrays_of(np.random.default_rng(64), 64, vocab, FEATURES[feature], vocab)
    check(run(call, given), sample(given))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("top_k", [0, 3000])
def test_equals_at_the_bound(call: OpCaller, levels: int, top_k: int) -> None:
    """top_p ends amid equals that lie in several slices: those of the lowest ids are kept, and just so many.

    One level at 0.5 is exact: half of them reach it.
    """
    rng, rows, vocab = np.random.default_rng([levels, top_k]), 64, 10000
    given: Arrays = {
        "logits": rng.integers(0, levels, (rows, vocab)).astype(np.float32),
        "temperature": np.ones(rows, np.float32),
        "top_k": np.full(rows, top_k, np.int32),
        "top_p": np.resize(np.array([0.5, 0.3, 0.9, 0.0001], np.float32), rows),
        "seeds": rng.integers(0, 2**62, rows),
        "num_outputs": np.zeros(rows, np.int64),
    }
    tensors = on_device(given)
    for _ in range(4):
        call("sample", tensors)
        want = sample(given)
        np.testing.assert_array_equal(tensors["next_ids"].cpu().numpy(), want["next_ids"])
        given |= {"num_outputs": want["num_outputs"]}


def test_bad_rows(call: OpCaller) -> None:
    """NaN, +inf and nothing above -inf, before or after edits; their neighbours are as ever."""
    given = arrays_of(np.random.default_rng(5), 7, 5000, FEATURES["all"], 5000)
    x, values = given["logits"], given["edit_values"]
    x[1, 4999], x[2, 0], x[3] = np.nan, np.inf, -np.inf
    values[:] = 0.0
    given["edit_until"][:] = FOREVER
    values[4, 3], values[5, 3] = np.nan, np.inf
    got = run(call, given)
    check(got, sample(given))
    assert (got["history"][1] == BAD_ROW).tolist() == [False, True, True, True, True, True, False]
    assert np.isnan(got["logprobs"][1, 1:6]).all()


def test_fewer_tokens_than_top_ids(call: OpCaller) -> None:
    given = arrays_of(np.random.default_rng(6), 3, 8, FEATURES["all"], 8)
    check(run(call, given), sample(given))


# ---------------------------------------------------------------- over several steps


@pytest.mark.parametrize("features", [{}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(call: OpCaller, features: dict[str, float]) -> None:
    logits = np.array([1.0, 0.5, 2.0, -0.5, 0.0, 1.5, -1.0, 0.7], np.float32)
    rows, steps = 64, 125
    given: Arrays = {
        "logits": np.tile(logits, (rows, 1)),
        "temperature": np.full(rows, 1.5, np.float32),
        "seeds": np.arange(rows),
        "num_outputs": np.zeros(rows, np.int64),
        "step": np.zeros(1, np.int64),
        "history": np.zeros((steps, rows), np.int64),
    }
    for name, value in features.items():
        given[name] = np.full(rows, value, np.int32 if name == "top_k" else np.float32)
    tensors = on_device(given)
    for _ in range(steps):
        call("sample", tensors)
    counts = np.bincount(tensors["history"].cpu().numpy().ravel(), minlength=8)
    p = np.exp((logits.astype(float) - 2) / 1.5)
    order = np.argsort(-p)
    if "top_k" in features:
        p[order[6:]] = 0
    if "top_p" in features:
        p[order[np.cumsum(p[order]) - p[order] >= 0.9 * p.sum()]] = 0
    p[p < features.get("min_p", 0)] = 0
    expected = rows * steps * p / p.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < CHI_SQUARE_7


@pytest.mark.parametrize("feature", ["greedy", "all"])
def test_state_moves_on_by_itself(call: OpCaller, feature: str) -> None:
    """Seven steps on the same device tensors: positions, outputs, counts, step and ring are ready for the next."""
    features = FEATURES.get(feature, ())
    given = arrays_of(np.random.default_rng(8), 5, 1152, features, 1152)
    tensors = on_device(given)
    for _ in range(7):
        given |= sample(given)
        call("sample", tensors)
        check({name: tensor.cpu().numpy() for name, tensor in tensors.items()}, given)


def one_row_for(steps: int, **given: Any) -> Any:
    dtypes = {"num_outputs": np.int64, "count_slots": np.int32, "counts": np.int32, "edit_ids": np.int32}
    dtypes |= {"edit_until": np.int32, "step": np.int64, "history": np.int64}
    given |= {"step": [0], "history": [[0]] * steps}
    return on_device({name: np.array(value, dtypes.get(name, np.float32)) for name, value in given.items()})


def test_penalties_follow_the_output(call: OpCaller) -> None:
    logits, counts = [[2.5, 2.0, 0.1, -9.0]], [[0] * 4] * 2
    tensors = one_row_for(6, logits=logits, penalties=[[1, 1, 0]], count_slots=[1], counts=counts)
    for _ in range(6):
        call("sample", tensors)
    assert tensors["history"].flatten().tolist() == [0, 1, 0, 1, 0, 2]
    assert tensors["counts"].tolist() == [[0, 0, 0, 0], [3, 2, 1, 0]]


def test_edits_end(call: OpCaller) -> None:
    """A stop token is out of reach until three tokens are out, a bias goes on."""
    edits = {"edit_ids": [[1, -1, 2]], "edit_values": [[-np.inf, 99, 1]], "edit_until": [[3, FOREVER, FOREVER]]}
    tensors = one_row_for(5, logits=[[1.0, 5.0, 2.0, 2.5]], num_outputs=[0], **edits)
    for _ in range(5):
        call("sample", tensors)
    assert tensors["history"].flatten().tolist() == [2, 2, 2, 1, 1]


def test_logprobs_against_torch(call: OpCaller) -> None:
    given = arrays_of(np.random.default_rng(9), 3, 152064, FEATURES["all"], 152064)
    given["logits"] = np.random.default_rng(9).normal(0, 3, (3, 152064)).astype(np.float32)
    got = run(call, given)
    want = torch.from_numpy(given["logits"]).double().log_softmax(-1)
    top = want.topk(NUM_TOP)
    assert got["top_ids"][1].tolist() == top.indices.tolist()
    np.testing.assert_allclose(got["top_logprobs"][1], top.values.numpy(), atol=2e-5)
    chosen = torch.from_numpy(got["history"][1])[:, None]
    np.testing.assert_allclose(got["logprobs"][1], want.gather(1, chosen)[:, 0].numpy(), atol=2e-5)


# ---------------------------------------------------------------- promises about bits


@pytest.mark.parametrize("feature", ["greedy", "filters", "all"])
def test_a_row_does_not_depend_on_its_batch_mates(call: OpCaller, feature: str) -> None:
    features, vocab = FEATURES.get(feature, ()), 151936
    given = arrays_of(np.random.default_rng(10), 64, vocab, features, vocab)
    together = run(call, given)
    again = run(call, given)
    for name, array in together.items():
        assert array.tobytes() == again[name].tobytes(), f"{name} differs from run to run"
    ringed = ("history", "logprobs", "top_ids", "top_logprobs")
    for row in (0, 1, 2, 5, 30, 63):
        alone = {
            name: array[:, row : row + 1]
            if name in ringed
            else array
            if name in ("step", "counts")
            else array[row : row + 1]
            for name, array in given.items()
        }
        got = run(call, alone)
        for name in ("next_ids", "positions", "num_outputs"):
            assert got[name][0] == together[name][row], f"{name} of row {row}"
        for name in ringed:
            if name in got:
                assert got[name][1, 0].tobytes() == together[name][1, row].tobytes(), f"{name} of row {row}"


@pytest.mark.parametrize("feature", ["greedy", "all"])
@pytest.mark.parametrize("rows", [1, 64])
def test_a_captured_graph_does_the_same(call: OpCaller, rows: int, feature: str) -> None:
    """Results go to page-locked host memory, as they do in the runtime."""
    features = FEATURES.get(feature, ())
    given = arrays_of(np.random.default_rng(11), rows, 151936, features, 151936)
    results = [name for name in ("history", "logprobs", "top_ids", "top_logprobs") if name in given]

    def pinned() -> dict[str, Any]:
        return on_device(given) | {name: torch.from_numpy(given[name].copy()).pin_memory() for name in results}

    eager, captured = pinned(), pinned()
    graph = kernel_step.capture(lambda: call("sample", captured))
    for name, array in given.items():
        captured[name].copy_(torch.from_numpy(array))  # the capture's warm-up has moved them
    for _ in range(5):
        call("sample", eager)
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    for name, tensor in eager.items():
        assert tensor.cpu().numpy().tobytes() == captured[name].cpu().numpy().tobytes(), name
    assert (captured["history"] != -9).all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("seeds", "seeds is NULL; expected a device pointer beside temperature"),
        ("counts", "counts is NULL; expected a device pointer beside penalties"),
        ("edit_until", "edit_until is NULL; expected a device pointer beside edit_ids"),
        ("step", "step is NULL; expected a device pointer beside history"),
        ("next_ids", "next_ids is NULL; expected a device pointer"),
    ],
)
def test_what_belongs_together_is_asked_for(call: OpCaller, missing: str, message: str) -> None:
    tensors = on_device(arrays_of(np.random.default_rng(12), 2, 64, FEATURES["all"], 64))
    del tensors[missing]
    with pytest.raises(QwenRtError, match=message):
        call("sample", tensors)


def test_what_is_unsupported_is_refused(call: OpCaller) -> None:
    def greedy(rows: int, vocab: int, **attributes: float) -> None:
        call("sample", on_device({"logits": np.zeros((rows, vocab), np.float32)}), **attributes)

    with pytest.raises(UnsupportedModelError, match="rows=65; expected 1 to 64"):
        greedy(65, 8)
    with pytest.raises(UnsupportedModelError, match="vocab=6; expected a multiple of 4"):
        greedy(1, 6)
    with pytest.raises(UnsupportedModelError, match="vocab=262148; expected a multiple of 4, at most 262144"):
        greedy(1, 262148)
    with pytest.raises(QwenRtError, match="num_tokens=9; expected 0 to vocab=8"):
        greedy(1, 8, num_tokens=9)
