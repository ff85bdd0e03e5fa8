"""`qwen-rt verify`: a bundle beside its checkpoint, in weights, logits, greedy tokens and answers.

| what                            | a bundle of floats          | a quantized bundle                                |
|---------------------------------|-----------------------------|---------------------------------------------------|
| weights, by layer and matrix    | –                           | the gate (`export/quantize/gate.py`) on this text |
| errors of the runtime's logits  | against transformers        | against float32 on the bundle's own weights       |
| KL, top-1 and greedy tokens     | against transformers        | against transformers                              |
| exact match on the nano set     | a bundle of nano            | a bundle of nano                                  |

transformers computes in float32 on the checkpoint, which tells what a quantized bundle lost. Its own weights in float32
tell a wrong kernel from a coarse number. Other files: `verify_runtime`, `verify_reference`, `verify_weights`,
`verify_picture`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt._version import __version__
from qwen_rt.benchmarks import verify_reference, verify_runtime
from qwen_rt.benchmarks.verify_weights import compare_weights
from qwen_rt.bundle import Bundle, Manifest
from qwen_rt.checkpoint import NANO, Checkpoint
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import CheckpointError, UsageError
from qwen_rt.gate_result import GateResult
from qwen_rt.runtime.llm import LLM
from qwen_rt.tolerances import RUNTIME, VERIFY, VerifyTolerance, verify_kind, verify_quantized
from qwen_rt.verification_text import VERIFICATION_TEXT

__all__ = ["DEFAULT_EXACT_MATCH", "Check", "VerifyResult", "verify"]

DEFAULT_EXACT_MATCH = 200
"""Problems that a bundle of nano answers unless told otherwise: some seconds on two cores."""

_NUM_PREFILL_POSITIONS = 8
_REPORTED = "reported"


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
        kind: Tolerances that applied, `reason` why.
        num_tokens: Positions compared.
        checks: The lines of the table.
        notes: What was left out, and why.
        versions: Package → version.
        gate: Errors of the weights; None if nothing is quantized.
    """

    bundle: str
    checkpoint: str
    kind: str
    reason: str
    num_tokens: int
    checks: tuple[Check, ...]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    gate: GateResult | None = None

    @property
    def passed(self) -> bool:
        """Whether every line is within tolerance, and the gate passed."""
        return all(check.passed for check in self.checks) and (self.gate is None or self.gate.passed)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready data, with every tensor that the gate compared."""
        found = asdict(self) | {"passed": self.passed, "gate": None}
        if self.gate is not None:
            found["gate"] = self.gate.to_dict() | {"tensors": [asdict(tensor) for tensor in self.gate.tensors]}
        result: dict[str, Any] = _finite(found)
        return result

    def table(self) -> str:
        """The lines for a person."""
        width = max(len(check.name) for check in self.checks)
        rows = [f"{self.bundle} against transformers on {self.checkpoint}, {self.num_tokens} positions", ""]
        if self.gate is not None:
            rows += [self.gate.table(), ""]
        for check in self.checks:
            verdict = "" if check.bound == _REPORTED else "ok" if check.passed else "OUT OF TOLERANCE"
            rows.append(f"  {check.name:<{width}}  {check.value:>12.6g}  {check.bound:<12}  {verdict}".rstrip())
        rows += ["", *self.notes, f"tolerances: {self.kind} ({self.reason})", "passed" if self.passed else "FAILED"]
        return "\n".join(rows)


def verify(
    bundle: str | Path,
    *,
    checkpoint: str | Path | None = None,
    text_file: Path | None = None,
    num_tokens: int = 256,
    greedy_tokens: int = 256,
    exact_match: int | None = None,
    num_threads: int = 0,
    device: int = 0,
    quiet: bool = False,
) -> VerifyResult:
    """Compare a bundle with transformers in float32, and its weights with the checkpoint's.

    Args:
        bundle: The bundle.
        checkpoint: The checkpoint it was built from; None takes the path in the manifest.
        text_file: UTF-8 text to read; None takes a built-in one.
        num_tokens: Positions to compare.
        greedy_tokens: Tokens to continue the text by.
        exact_match: Problems of the nano set to answer; None for `DEFAULT_EXACT_MATCH` of a bundle of nano, and none of
            another, for which the share of right answers is reported and does not decide.
        num_threads: Threads of what runs on the CPU; 0 for all cores.
        device: Targets of GPUs: number of the GPU.
        quiet: No progress.

    Returns:
        The measured values beside their bounds.

    Raises:
        UsageError: The text is too short or the context too small.
        CheckpointError: The checkpoint is not the one that the bundle was built from.
    """
    if num_tokens < 2 or greedy_tokens < 1:
        raise UsageError(f"num_tokens={num_tokens}, greedy_tokens={greedy_tokens}", "at least 2 and 1")
    if exact_match is not None and exact_match < 0:
        raise UsageError(f"exact_match={exact_match}", "0 or more")
    opened = Bundle.open(bundle, "size", checkpoint)
    source = _open_source(opened, checkpoint)
    options: dict[str, Any] = {"device": device, "checkpoint": checkpoint, "quiet": quiet}
    if opened.manifest.target != "cuda":
        options["num_threads"] = num_threads
    with LLM(bundle, max_num_seqs=1, **options) as llm:
        ids = _read_ids(llm, text_file, num_tokens)
        found = _verify(llm, source, ids, greedy_tokens, num_threads, quiet)
    is_nano = source.fingerprint() == Checkpoint.open(NANO).fingerprint()
    count = exact_match if exact_match is not None else DEFAULT_EXACT_MATCH if is_nano else 0
    checks, notes = list(found.checks), list(found.notes)
    if count:
        share, answered = _exact_match(bundle, count, options)
        bound = found.min_exact if is_nano else None
        checks.append(_at_least(f"exact match on the nano set, of {answered}", share, bound))
    else:
        why = "--exact-match 0" if exact_match == 0 else "the checkpoint is not nano (--exact-match N asks for it)"
        notes.append(f"exact match on the nano set: skipped, {why}")
    names = ("onnxruntime", "torch", "transformers")
    return VerifyResult(
        bundle=str(opened.path),
        checkpoint=str(source.path),
        kind=found.kind,
        reason=found.reason,
        num_tokens=len(ids),
        checks=tuple(checks),
        versions={"qwen-rt": __version__} | {name: importlib.metadata.version(name) for name in names},
        notes=tuple(notes),
        gate=found.gate,
    )


@dataclass(frozen=True)
class _Compared:
    """What a text tells."""

    kind: str
    reason: str
    min_exact: float
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    gate: GateResult | None


def _open_source(opened: Bundle, checkpoint: str | Path | None) -> Checkpoint:
    link = opened.manifest.checkpoint
    source = Checkpoint.open(checkpoint if checkpoint is not None else link.path)
    if source.fingerprint() != link.fingerprint:
        raise CheckpointError(
            f"{source.path} is not the checkpoint of {opened.path}", link.fingerprint[:12], "pass --checkpoint FOLDER"
        )
    return source


def _verify(
    llm: LLM, source: Checkpoint, ids: list[int], greedy_tokens: int, num_threads: int, quiet: bool
) -> _Compared:
    """Everything that one text tells: of the weights, of the runtime, of the logits."""
    kind, tolerance = _tolerance(llm.bundle.manifest, source)
    actual = verify_runtime.stepwise_logits(llm, ids, quiet)
    gate, own, notes = None, None, []
    if llm.bundle.manifest.quantization is not None and llm.bundle.manifest.target in ENGINE_TARGETS:
        notes.append("weights on their own: not compared, they are inside of the engine")
    elif llm.bundle.manifest.quantization is not None:
        gate, own = compare_weights(llm.bundle, source, ids, quiet)
        activations = _activations(llm.bundle.manifest)
        notes.append(f"runtime's tolerances: {activations} ({RUNTIME[activations].reason})")
    model = verify_reference.load_reference(source, num_threads)
    expected = verify_reference.reference_logits(model, ids)
    checks = _runtime_checks(llm, ids, actual, expected if own is None else own, tolerance, own is not None)
    checks += _source_checks(actual, expected, tolerance)
    continued = min(greedy_tokens, llm.max_length - len(ids))
    num_known = min(llm.tokenizer.vocab_size, llm.spec.vocab_size)
    ours = verify_runtime.greedy_ids(llm, ids, continued)
    theirs = verify_reference.greedy_ids(model, ids, continued, num_known)
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), continued)
    name = f"greedy tokens before a difference, of {continued}"
    checks.append(_at_least(name, same / continued, tolerance.min_greedy))
    return _Compared(kind, tolerance.reason, tolerance.min_exact, tuple(checks), tuple(notes), gate)


def _tolerance(manifest: Manifest, source: Checkpoint) -> tuple[str, VerifyTolerance]:
    """What applies to the comparison with the source, and its name."""
    quantization = manifest.quantization
    if quantization is not None and not _is_as_stored(manifest):
        formats = sorted({scheme.format for scheme in quantization.weights.values()})
        kind = "+".join([*formats, *([] if quantization.kv_format is None else [f"kv-{quantization.kv_format}"])])
        return kind, verify_quantized(formats, quantization.kv_format, quantization.activations)
    if manifest.target == "cuda" or manifest.compute_dtype != "float32":
        reason = "activations rounded to bfloat16 (u = 2^-8) between steps, which errs as rounded weights do"
        return "rounded-bf16", VerifyTolerance(**{**vars(VERIFY["rounded-bf16"]), "reason": reason})
    if quantization is not None:
        return "lossless", VERIFY["lossless"]
    kind = verify_kind({source.tensors[name].dtype for name in source.spec.parameters()}, manifest.precision)
    return kind, VERIFY[kind]


def _is_as_stored(manifest: Manifest) -> bool:
    """Whether the quantized numbers are the checkpoint's own, and nothing is rounded but what the target rounds."""
    quantization = manifest.quantization
    return (
        quantization is not None
        and quantization.method == "checkpoint"
        and quantization.kv_format is None
        and quantization.activations == manifest.compute_dtype
    )


def _activations(manifest: Manifest) -> str:
    """Key of `RUNTIME` for a quantized bundle."""
    quantization = manifest.quantization
    if quantization is None:
        return manifest.compute_dtype
    kv_format, rounded = quantization.kv_format, quantization.activations
    return rounded if kv_format is None or rounded == "int8" else f"{rounded}-{kv_format}"


def _runtime_checks(
    llm: LLM,
    ids: Sequence[int],
    actual: NDArray[np.float32],
    expected: NDArray[np.float32],
    tolerance: VerifyTolerance,
    is_own: bool,
) -> list[Check]:
    """Errors of single logits, against transformers or against float32 on the bundle's own weights."""
    positions = np.unique(np.linspace(0, len(ids) - 1, min(_NUM_PREFILL_POSITIONS, len(ids))).astype(int))
    prefill = verify_runtime.prefill_logits(llm, ids, positions)
    scale = float(np.abs(expected).max())
    error = np.abs(actual - expected)
    cosine = _cosine(actual, expected)
    prefill_error = np.abs(prefill - expected[positions]).max() / scale
    what, most = "", tolerance.max_relative
    most_mean, cosine_line = most, _at_least("smallest cosine of a position", cosine.min(), tolerance.min_cosine)
    if is_own:
        own = RUNTIME[_activations(llm.bundle.manifest)]
        what, most, most_mean = "own weights: ", own.max_relative, own.max_mean
        cosine_line = _at_least(f"{what}mean cosine of a position", cosine.mean(), own.min_cosine)
    return [
        _at_most(f"{what}largest error of a logit, relative", error.max() / scale, most),
        _at_most(f"{what}mean error of a logit, relative", error.mean() / scale, most_mean),
        _at_most(f"{what}largest error through prefill, relative", prefill_error, most),
        cosine_line,
    ]


def _source_checks(
    actual: NDArray[np.float32], expected: NDArray[np.float32], tolerance: VerifyTolerance
) -> list[Check]:
    """What the distributions of the next token differ by from the source's."""
    import torch

    from qwen_rt.export.quantize.gate import compare_logits

    errors = compare_logits(torch.from_numpy(expected), torch.from_numpy(actual))
    confident = f"the same, of {errors.num_confident} confident positions"
    return [
        _at_most("mean KL of the next token, nats", errors.kl_mean, tolerance.max_kl),
        _at_most("largest KL of a position, nats", errors.kl_max, None),
        _at_least("positions with the same best token", errors.top1, tolerance.min_top1),
        _at_least(confident, errors.top1_confident, tolerance.min_confident if errors.num_confident else None),
    ]


def _at_most(name: str, value: float, bound: float | None) -> Check:
    if bound is None:
        return Check(name, float(value), _REPORTED, True)
    return Check(name, float(value), f"<= {bound:g}", bool(value <= bound))


def _at_least(name: str, value: float, bound: float | None) -> Check:
    """A line; a bound of 0 or none decides nothing."""
    if not bound:
        return Check(name, float(value), _REPORTED, True)
    return Check(name, float(value), f">= {bound:g}", bool(value >= bound))


def _read_ids(llm: LLM, text_file: Path | None, num_tokens: int) -> list[int]:
    try:
        text = VERIFICATION_TEXT if text_file is None else text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {text_file} cannot be read: {error}", "a UTF-8 text file") from None
    ids = llm.tokenizer.encode(text)[: min(num_tokens, llm.max_length - 1)]
    if len(ids) < 2:
        raise UsageError(f"the text has {len(ids)} tokens", "at least 2", "give a longer text or build a longer bundle")
    return ids


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row, in float64: in float32 the rounding of long sums is as large as what is looked for."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    result: NDArray[np.float64] = (x * y).sum(-1) / (np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1))
    return result


def _exact_match(bundle: str | Path, count: int, options: dict[str, Any]) -> tuple[float, int]:
    """Share of the first `count` nano problems that a bundle answers right in batches, and how many those are."""
    from qwen_rt.benchmarks.bench_nano_accuracy import answer_all, is_right
    from qwen_rt.benchmarks.nano.heldout import load

    problems = load()[:count]
    with LLM(bundle, **options) as llm:
        outputs = answer_all(llm, problems)
    right = sum(is_right(problem, output.text) for problem, output in zip(problems, outputs, strict=True))
    return right / len(problems), len(problems)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: what is no finite number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
