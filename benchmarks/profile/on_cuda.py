"""Decode steps and prefills of a CUDA session: recorded by CUPTI, or steps cut short where CUPTI is not to be had."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, cast

from qwen_rt.benchmarks.bench_latency import Gpu, Model
from qwen_rt.benchmarks.latency import Plan, check_tokens, tie_of
from qwen_rt.benchmarks.profile.cupti import Activity, Cupti, CuptiError
from qwen_rt.benchmarks.profile.floors import Floors, Rates, decode_floors, prefill_floors
from qwen_rt.benchmarks.profile.gpu_steps import HostSpan, Prefixes, record_decode, record_prefill, time_prefixes
from qwen_rt.benchmarks.profile.kernels import demangle, letter_of, ops_of_kernels, ops_of_step, short_name
from qwen_rt.benchmarks.profile.profile import Profile, Span
from qwen_rt.benchmarks.profile.waterfall import OTHER, Call, Step, make_waterfall, middle_half
from qwen_rt.errors import QwenRtError, UsageError
from qwen_rt.ops import OPS
from qwen_rt.progress import Progress
from qwen_rt.runtime.cuda.session import CudaSession

__all__ = ["calls_of", "cuts_of", "decode_steps", "prefill_steps", "prefix_step", "profile_model", "split_at_embed"]

_PREFILLS = 5
_PREFIX_REPEATS = 7
_WARM_STEPS = 2  # the first recorded ones: the engine's way of running takes up speed
_ORDER = tuple(op.name for op in OPS)
RECORDED = "CUPTI"
CUT_SHORT = "steps cut short (no CUPTI)"


# ---------------------------------------------------------------- from records to steps


def split_at_embed(activities: Sequence[Activity]) -> list[list[Activity]]:
    """Split what ran into passes of the model: each begins with `embed`, and with copies and fills right before it."""
    passes: list[list[Activity]] = []
    waiting: list[Activity] = []
    for activity in activities:
        letter = letter_of(activity.name)
        if letter == "e":
            passes.append([*waiting, activity])
            waiting = []
        elif letter is None:
            waiting.append(activity)
        elif passes:
            passes[-1] += [*waiting, activity]
            waiting = []
    if passes:
        passes[-1] += waiting
    return passes


def calls_of(activities: Sequence[Activity], ops: tuple[str, ...]) -> tuple[Call, ...] | None:
    """Make calls of the kernels of one pass of the model; None if some are missing."""
    places = ops_of_kernels([activity.name for activity in activities], ops)
    if places is None:
        return None
    members: dict[tuple[str, int], list[Activity]] = {}
    for number, (place, activity) in enumerate(zip(places, activities, strict=True)):
        key = (OTHER, number) if place is None else (ops[place], place)  # things of no op are each a call of its own
        members.setdefault(key, []).append(activity)
    calls = []
    for (op, _), group in members.items():
        kernels = tuple((demangle(one.name), 1e-3 * one.start_ns, 1e-3 * one.end_ns) for one in group)
        calls.append(Call(op, min(start for _, start, _ in kernels), max(end for _, _, end in kernels), kernels))
    return tuple(sorted(calls, key=lambda call: call.start_us))


def decode_steps(activities: Sequence[Activity], num_layers: int) -> tuple[list[Step], int]:
    """Make steps of what ran while decoding.

    Args:
        activities: In order of their begin.
        num_layers: L.

    Returns:
        The steps whose kernels, and whose predecessor's, were all recorded; how many were not.
    """
    ops = ops_of_step(num_layers)
    passes = split_at_embed(activities)
    sizes = collections.Counter(len(one) for one in passes)
    usual = sizes.most_common(1)[0][0] if passes else 0
    steps: list[Step] = []
    before: tuple[Call, ...] | None = None
    lost = 0
    for number, one in enumerate(passes):
        calls = calls_of(one, ops) if len(one) == usual else None
        lost += calls is None
        if calls is not None and before is not None and number >= _WARM_STEPS:
            steps.append(Step(max(call.end_us for call in before), calls))
        before = calls
    return steps, lost


def prefill_steps(
    activities: Sequence[Activity], host: Sequence[HostSpan], num_chunks: int, num_layers: int
) -> list[Step]:
    """Make a step of every prefill, from the host's first call on; those of which kernels are missing are left out.

    Args:
        activities: In order of their begin.
        host: A span for each chunk of each prefill.
        num_chunks: Chunks of a prefill.
        num_layers: L.
    """
    steps = []
    passes = split_at_embed(activities)
    for first in range(0, len(host), num_chunks):
        following = host[first + num_chunks :]
        end_ns = following[0].start_ns if following else None
        own = [
            one
            for one in passes
            if host[first].start_ns <= one[0].start_ns and (end_ns is None or one[0].start_ns < end_ns)
        ]
        calls = [
            calls_of(one, ops_of_step(num_layers, samples=number == num_chunks)) for number, one in enumerate(own, 1)
        ]
        if len(own) == num_chunks and None not in calls:
            steps.append(Step(1e-3 * host[first].start_ns, tuple(call for one in calls for call in one or ())))
    return steps


def cuts_of(names: Sequence[str], num_layers: int) -> list[int]:
    """Return how many kernels a step has up to the end of each op.

    Raises:
        QwenRtError: The kernels are not those of such a step.
    """
    places = ops_of_kernels(names, ops_of_step(num_layers))
    if places is None:
        raise QwenRtError(f"the step's {len(names)} kernels are not those of {num_layers} layers")
    ends = {place: number for number, place in enumerate(places, 1) if place is not None}
    return [*(ends[place] for place in sorted(ends)[:-1]), len(names)]


def prefix_step(prefixes: Prefixes, num_layers: int, period_us: float) -> Step:
    """Make a step of times of its first ops: each op gets what it adds.

    Args:
        prefixes: With a time for each of `cuts_of`.
        num_layers: L.
        period_us: Time of whole steps, launched back to back: what it has beyond the last time is between steps.
    """
    ops = ops_of_step(num_layers)
    calls = []
    done_us = 0.0
    for op, end_us in zip(ops, prefixes.us, strict=True):
        end_us = max(done_us, end_us)  # noise: an op that adds nothing
        calls.append(Call(op, done_us, end_us))
        done_us = end_us
    return Step(min(0.0, done_us - period_us), tuple(calls))


# ---------------------------------------------------------------- measuring


def profile_model(
    model: Model,
    gpu: Gpu,
    matrices: Mapping[str, float],
    *,
    rows: int,
    prompt: int,
    steps: int,
    prefill: int | None,
    cupti: Cupti | None,
    why_not: str = "",
    quiet: bool = False,
) -> list[Profile]:
    """Load, check and profile a model.

    Args:
        model: From `find_model`.
        gpu: From `open_gpu`.
        matrices: Op → bytes of a call's matrices.
        rows: Rows that decode at once.
        prompt: Tokens of each before the first step.
        steps: Decode steps that are recorded.
        prefill: Tokens of a prompt whose prefill is recorded too; None: none.
        cupti: Attached before the device was opened; None: steps are cut short instead.
        why_not: What kept CUPTI away.
        quiet: No progress on stderr.

    Returns:
        A profile for each phase.

    Raises:
        VerificationError: The check failed.
        CapacityError: It does not fit.
        UsageError: A prefill without CUPTI.
    """
    if prefill is not None and cupti is None:
        raise UsageError(f"--prefill {prefill} needs CUPTI: {why_not}", fix="without it only decode steps are profiled")
    rates = Rates(gpu.bandwidth, gpu.matrix_rate, gpu.matrix_rate_fp8)
    plan = Plan((rows,), (prompt,), (prefill,) if prefill else (), steps=max(steps + _WARM_STEPS, _PREFIX_REPEATS) + 8)
    settings: dict[str, Any] = {"model": model.name, "precision": model.precision, "kv_cache": model.kv_format}
    settings |= {"layers": model.shape.layers, "source": model.source}
    found = []
    with model.start(gpu, plan) as (timed, _):
        session = cast("CudaSession", timed)
        check_tokens(session, tie=tie_of(model.precision, model.kv_format))
        length = prompt + steps / 2
        floors = decode_floors(model.shape, matrices, model.kv_format, rows, length, rates)
        alone_us = 1e3 * statistics.median(session.time_decode(rows, prompt, max(steps, 8)))
        of_decode = settings | {"rows": rows, "prompt": prompt}
        if cupti is None:
            found.append(_cut_short(session, of_decode, floors, alone_us, why_not, quiet))
        else:
            found.append(_recorded(session, of_decode, floors, alone_us, steps, cupti))
        if prefill is not None and cupti is not None:
            found.append(_recorded_prefill(session, model, settings, matrices, prefill, rates, cupti))
    return found


def _recorded(
    session: CudaSession, settings: dict[str, Any], floors: Floors, alone_us: float, steps: int, cupti: Cupti
) -> Profile:
    activities, host = record_decode(session, settings["rows"], settings["prompt"], steps + _WARM_STEPS, cupti)
    made, lost = decode_steps(activities, settings["layers"])
    if not made:
        raise CuptiError(
            f"no step of {steps} has all its kernels among CUPTI's {len(activities)} records", fix="try --steps 32"
        )
    notes = (f"{lost} steps left out: records of kernels are missing",) if lost else ()
    chosen = middle_half(made)
    fall = make_waterfall(chosen, floors.us, floors.read_bytes, _ORDER)
    tracks = _tracks(activities, host)
    return Profile("decode", settings, RECORDED, fall, tuple(made), tracks, alone_us, notes=notes)


def _cut_short(
    session: CudaSession, settings: dict[str, Any], floors: Floors, alone_us: float, why_not: str, quiet: bool
) -> Profile:
    layers = settings["layers"]
    with Progress(len(ops_of_step(layers)), "ops", quiet=quiet) as done:
        prefixes = time_prefixes(
            session,
            settings["rows"],
            settings["prompt"],
            _PREFIX_REPEATS,
            lambda names: cuts_of(names, layers),
            done.update,
        )
    step = prefix_step(prefixes, layers, alone_us)
    fall = make_waterfall([step], floors.us, floors.read_bytes, _ORDER)
    notes = (f"{why_not}; each op has what it adds to the time of a step that ends before it, gaps included",)
    return Profile("decode", settings, CUT_SHORT, fall, (step,), {}, alone_us, has_gaps=False, notes=notes)


def _recorded_prefill(
    session: CudaSession,
    model: Model,
    settings: dict[str, Any],
    matrices: Mapping[str, float],
    tokens: int,
    rates: Rates,
    cupti: Cupti,
) -> Profile:
    alone_us = 1e3 * statistics.median(session.time_prefill(tokens, _PREFILLS))
    ran, host = record_prefill(session, tokens, _PREFILLS, cupti)
    made = prefill_steps(ran, host, -(-tokens // session.chunk_tokens), model.shape.layers)
    if not made:
        raise CuptiError(f"no prefill of {tokens} tokens has all its kernels among CUPTI's records")
    chunk = session.chunk_tokens
    chunks = [(at, min(chunk, tokens - at)) for at in range(0, tokens, chunk)]
    floors = prefill_floors(model.shape, matrices, model.precision, model.kv_format, chunks, rates)
    notes = () if rates.matrix else ("no matrix rate without torch: floors are those of bytes",)
    fall = make_waterfall(middle_half(made), floors.us, floors.read_bytes, _ORDER)
    of_prefill = settings | {"rows": 1, "prompt": tokens}
    return Profile("prefill", of_prefill, RECORDED, fall, tuple(made), _tracks(ran, host), alone_us, notes=notes)


def _tracks(activities: Sequence[Activity], host: Sequence[HostSpan]) -> dict[str, tuple[Span, ...]]:
    """Make the tracks of a trace: the host, and every stream."""
    tracks: dict[str, list[Span]] = {}
    if host:
        tracks["host"] = [Span(span.name, 1e-3 * span.start_ns, 1e-3 * span.end_ns, {}) for span in host]
    for one in activities:
        details: dict[str, Any] = {"kernel": demangle(one.name), "grid": one.grid, "block": one.block}
        details |= {"shared_bytes": one.shared_bytes, "registers": one.registers, "launch": one.launch}
        span = Span(short_name(one.name), 1e-3 * one.start_ns, 1e-3 * one.end_ns, details)
        tracks.setdefault(f"stream {one.stream}", []).append(span)
    return {name: tuple(spans) for name, spans in tracks.items()}
