"""`qwen-rt verify`: logits and greedy tokens of a bundle beside those of transformers on the same checkpoint."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt._version import __version__
from qwen_rt.bundle import Bundle
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.progress import track
from qwen_rt.runtime.executor import RowState
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.sampling_params import SamplingParams
from qwen_rt.tolerances import VERIFY, verify_kind

__all__ = ["Check", "VerifyResult", "verify"]

DEFAULT_TEXT = """\
A farmer has 48 apples and sells a third of them on Monday. On Tuesday she sells half of what is left.
How many apples does she keep? First find a third of 48: 48 / 3 = 16, so 48 - 16 = 32 apples stay on Monday.
Half of 32 is 16, so she keeps 16 apples. The answer is \\boxed{16}.

To solve 3x + 5 = 20, subtract 5 from both sides: 3x = 15. Divide by 3: x = 5. Check: 3 * 5 + 5 = 20.
A rectangle of sides 7 and 12 has area 7 * 12 = 84 and perimeter 2 * (7 + 12) = 38.
Let f(n) = n^2 + 1 for every integer n. Then f(2) = 5, f(3) = 10, and f(f(1)) = f(2) = 5.
def gcd(a, b): return a if b == 0 else gcd(b, a % b)
Das Quadrat der Zahl 15 ist 225. Le carré de 12 est 144. 三乘以七等于二十一。
"""

_NUM_PREFILL_POSITIONS = 8


@dataclass(frozen=True)
class Check:
    """One line of the table: a measured value, its bound, and whether it holds."""

    name: str
    value: float
    bound: str
    passed: bool


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found.

    Attributes:
        bundle, checkpoint: What was compared.
        kind: Row of `tolerances.VERIFY` that applied, `reason` why.
        num_tokens: Positions compared.
        checks: The lines of the table.
        versions: Package → version.
    """

    bundle: str
    checkpoint: str
    kind: str
    reason: str
    num_tokens: int
    checks: tuple[Check, ...]
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every line is within tolerance."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self) | {"passed": self.passed}

    def table(self) -> str:
        """The lines for a person."""
        width = max(len(check.name) for check in self.checks)
        rows = [f"{self.bundle} against transformers on {self.checkpoint}, {self.num_tokens} positions", ""]
        for check in self.checks:
            verdict = "ok" if check.passed else "OUT OF TOLERANCE"
            rows.append(f"  {check.name:<{width}}  {check.value:>12.6g}  {check.bound:<12}  {verdict}")
        rows += ["", f"tolerances: {self.kind} ({self.reason})", "passed" if self.passed else "FAILED"]
        return "\n".join(rows)


def verify(
    bundle: str | Path,
    *,
    checkpoint: str | Path | None = None,
    text_file: Path | None = None,
    num_tokens: int = 256,
    greedy_tokens: int = 256,
    num_threads: int = 0,
    device: int = 0,
    quiet: bool = False,
) -> VerifyResult:
    """Compare a bundle with transformers in float32.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint it was built from; None takes the path in the manifest.
        text_file: UTF-8 text to read; None takes a built-in one.
        num_tokens: Positions to compare.
        greedy_tokens: Tokens to continue the text by.
        num_threads: Threads of what runs on the CPU; 0 for all cores.
        device: Target cuda: number of the GPU.
        quiet: No progress.

    Returns:
        The measured values beside their bounds.

    Raises:
        UsageError: The text is too short or the context too small.
        CheckpointError: The checkpoint is not the one that the bundle was built from.
    """
    if num_tokens < 2 or greedy_tokens < 1:
        raise UsageError(f"num_tokens={num_tokens}, greedy_tokens={greedy_tokens}", "at least 2 and 1")
    on_gpu = Bundle.open(bundle, "size", checkpoint).manifest.target == "cuda"
    options: dict[str, Any] = {"device": device} if on_gpu else {"num_threads": num_threads, "device": device}
    with LLM(bundle, max_num_seqs=1, checkpoint=checkpoint, quiet=quiet, **options) as llm:
        return _verify(llm, checkpoint, text_file, num_tokens, greedy_tokens, num_threads, quiet)


def _verify(
    llm: LLM,
    checkpoint: str | Path | None,
    text_file: Path | None,
    num_tokens: int,
    greedy_tokens: int,
    num_threads: int,
    quiet: bool,
) -> VerifyResult:
    link = llm.bundle.manifest.checkpoint
    source = Checkpoint.open(checkpoint if checkpoint is not None else link.path)
    if source.fingerprint() != link.fingerprint:
        raise CheckpointError(
            f"{source.path} is not the checkpoint of {llm.bundle.path}",
            link.fingerprint[:12],
            "pass --checkpoint FOLDER",
        )
    ids = _read_ids(llm, text_file, num_tokens)
    model = _load_reference(source.path, num_threads)
    expected = _reference_logits(model, ids)
    actual = _stepwise_logits(llm, ids, quiet)
    num_prefill = min(_NUM_PREFILL_POSITIONS, len(ids))
    positions = np.unique(np.linspace(0, len(ids) - 1, num_prefill).astype(int))
    prefill = _prefill_logits(llm, ids, positions)
    kind, reason = _kind(llm, source)
    tolerance = VERIFY[kind]
    scale = float(np.abs(expected).max())
    error = np.abs(actual - expected)
    cosine = _cosine(actual, expected)
    top1 = float((actual.argmax(-1) == expected.argmax(-1)).mean())
    prefill_error = float(np.abs(prefill - expected[positions]).max()) / scale
    continued = min(greedy_tokens, llm.max_length - len(ids))
    greedy = _greedy_agreement(llm, model, ids, continued)
    checks = (
        _at_most("largest error of a logit, relative", error.max() / scale, tolerance.max_relative),
        _at_most("mean error of a logit, relative", error.mean() / scale, tolerance.max_relative),
        _at_most("largest error through prefill, relative", prefill_error, tolerance.max_relative),
        _at_least("smallest cosine of a position", cosine.min(), tolerance.min_cosine),
        _at_least("positions with the same best token", top1, tolerance.min_top1),
        _at_least(f"greedy tokens before a difference, of {continued}", greedy, tolerance.min_greedy),
    )
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "torch", "transformers")}
    return VerifyResult(
        bundle=str(llm.bundle.path),
        checkpoint=str(source.path),
        kind=kind,
        reason=reason,
        num_tokens=len(ids),
        checks=checks,
        versions={"qwen-rt": __version__} | versions,
    )


def _at_most(name: str, value: float, bound: float) -> Check:
    return Check(name, float(value), f"<= {bound:g}", bool(value <= bound))


def _at_least(name: str, value: float, bound: float) -> Check:
    return Check(name, float(value), f">= {bound:g}", bool(value >= bound))


def _read_ids(llm: LLM, text_file: Path | None, num_tokens: int) -> list[int]:
    try:
        text = DEFAULT_TEXT if text_file is None else text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {text_file} cannot be read: {error}", "a UTF-8 text file") from None
    ids = llm.tokenizer.encode(text)[: min(num_tokens, llm.max_length - 1)]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens", "at least 2", "give a longer text or build a longer bundle")
    return ids


def _load_reference(folder: Path, num_threads: int) -> Any:
    import torch
    from transformers import Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if num_threads:
        torch.set_num_threads(num_threads)
    model: Any = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def _reference_logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].float().numpy()
    return logits


def _kind(llm: LLM, source: Checkpoint) -> tuple[str, str]:
    """Return the row of `VERIFY` that applies, and why."""
    manifest = llm.bundle.manifest
    if manifest.target == "cuda":
        reason = "activations rounded to bfloat16 (u = 2^-8) between steps, which errs as rounded weights do"
        return "rounded-bf16", reason
    kind = verify_kind({source.tensors[name].dtype for name in source.spec.parameters()}, manifest.precision)
    return kind, VERIFY[kind].reason


def _stepwise_logits(llm: LLM, ids: Sequence[int], quiet: bool) -> NDArray[np.float32]:
    """Logits of every position, float32[T, V], each through the cache that the positions before it wrote."""
    feed = (_feed_cuda if llm.bundle.manifest.target == "cuda" else _feed_cpu)(llm.session, ids)
    logits = np.empty((len(ids), llm.spec.vocab_size), np.float32)
    for position in track(range(len(ids)), "reading token by token", quiet=quiet):
        logits[position] = feed(position)
    return logits


def _feed_cpu(session: Any, ids: Sequence[int]) -> Callable[[int], NDArray[np.float32]]:
    cache, zero = session.new_cache(1, len(ids)), np.zeros(1, np.int64)

    def feed(position: int) -> NDArray[np.float32]:
        token = np.array([[ids[position]]], np.int64)
        logits: NDArray[np.float32] = session.run(cache, 0, token, np.array([position]), zero)[0]
        return logits

    return feed


def _feed_cuda(session: Any, ids: Sequence[int]) -> Callable[[int], NDArray[np.float32]]:
    row = _row(session, ids[:1], len(ids))

    def feed(position: int) -> NDArray[np.float32]:
        if position == 0:
            session.prefill(row, np.array(ids[:1], np.int64), 0, is_last=True)
        else:
            row.output_ids.append(ids[position])
            session.set_rows([row])  # anew for every step: what the device has chosen itself is not the text
            session.wait_step(session.launch_step())
        logits: NDArray[np.float32] = session.read_logits(1)[0]
        return logits

    return feed


def _prefill_logits(llm: LLM, ids: Sequence[int], positions: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of some positions of a text that is read in as few calls as can be, float32[P, V]."""
    session, text = llm.session, np.array(ids, np.int64)
    if llm.bundle.manifest.target != "cuda":
        cache, zero = session.new_cache(1, len(ids)), np.zeros(1, np.int64)
        return np.stack([session.run(cache, 0, text[None], zero, np.array([p]))[0].copy() for p in positions])
    found = []
    for stop in (positions + 1).tolist():
        row = _row(session, ids[:stop], stop)
        for start in range(0, stop, session.chunk_tokens):
            chunk = text[start : min(start + session.chunk_tokens, stop)]
            session.prefill(row, chunk, start, is_last=start + len(chunk) == stop)
        found.append(session.read_logits(1)[0])
    return np.stack(found)


def _row(session: Any, prompt_ids: Sequence[int], num_tokens: int) -> RowState:
    """A sequence that has the cache for itself, with room for `num_tokens` tokens and one more, if the context has."""
    num_blocks = -(-min(num_tokens + 1, session.max_length) // session.block_size)
    return RowState(tuple(prompt_ids), SamplingParams(temperature=0.0), 0, tuple(range(1, num_blocks + 1)))


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row, in float64: in float32 the rounding of long sums is as large as what is looked for."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    result: NDArray[np.float64] = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    return result


def _greedy_agreement(llm: LLM, model: Any, ids: Sequence[int], num_tokens: int) -> float:
    """Share of `num_tokens` greedy tokens before the two continuations differ; 1 if they never do."""
    import torch

    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    ours = llm.generate([list(ids)], params)[0].token_ids
    num_known = min(llm.tokenizer.vocab_size, llm.spec.vocab_size)
    theirs: list[int] = []
    past, token = None, torch.tensor([list(ids)])
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(token, past_key_values=past, use_cache=True)
            past = out.past_key_values
            token = out.logits[:, -1:, :num_known].argmax(-1)
            theirs.append(int(token))
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), num_tokens)
    return same / num_tokens
