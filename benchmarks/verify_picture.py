"""Draw what the gate found: the error of every matrix by layer, and how far the two streams are apart behind each."""

from __future__ import annotations

import io
import math
from pathlib import Path

from qwen_rt.benchmarks.latency_report import load_pyplot
from qwen_rt.errors import UsageError
from qwen_rt.gate_result import GateResult, TensorError
from qwen_rt.storage import atomic_write_bytes

__all__ = ["check_picture", "draw_errors"]

# Tableau's colours, told apart by most colour-blind readers with the markers beside them.
_STYLES = {
    "q_proj": ("#4e79a7", "o"),
    "k_proj": ("#59a14f", "s"),
    "v_proj": ("#76b7b2", "D"),
    "o_proj": ("#f28e2b", "^"),
    "gate_proj": ("#b07aa1", "v"),
    "up_proj": ("#9c755f", "P"),
    "down_proj": ("#e15759", "X"),
    "KV cache": ("#24292e", "*"),
}
_NOT_FINITE = 10.0  # where an error that is no number is drawn: above all others


def check_picture(file: Path) -> None:
    """Refuse a name that no picture can be written to, before anything is computed.

    Raises:
        UsageError: It ends in neither .svg nor .png.
        MissingDependencyError: matplotlib is not installed.
    """
    if file.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture {file.name}", "a name ending in .svg or .png", "rename it")
    load_pyplot()


def draw_errors(result: GateResult, title: str, file: Path) -> None:
    """Draw the output errors of all matrices with their limits, and the error of the stream, by layer.

    Args:
        result: With its `tensors`.
        title: What was compared.
        file: .svg or .png.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: The file cannot be written.
    """
    pyplot = load_pyplot()
    from matplotlib import ticker

    figure, (matrices, stream) = pyplot.subplots(
        1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2), sharex=True
    )
    for name, (color, marker) in _STYLES.items():
        points = _points(result, name)
        if points:
            layers = [layer for layer, _ in points]
            errors = [t.output_error if math.isfinite(t.output_error) else _NOT_FINITE for _, t in points]
            matrices.plot(layers, errors, color=color, marker=marker, ms=5, lw=1, label=name)
            matrices.plot(layers, [t.limit for _, t in points], color=color, lw=0.7, ls=":")
            failing = [(layer, error) for (layer, t), error in zip(points, errors, strict=True) if not t.passed]
            if failing:
                matrices.plot(*zip(*failing, strict=True), "o", ms=13, mfc="none", mec="#c00000", mew=1.5)
    matrices.plot([], [], color="#5a6468", lw=0.7, ls=":", label="limits")
    if not result.worst.passed:
        matrices.plot([], [], "o", ms=9, mfc="none", mec="#c00000", mew=1.5, label="out of limits")
    matrices.set(ylabel="output error", yscale="log")
    matrices.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    matrices.yaxis.set_major_formatter("{x:g}")
    matrices.yaxis.set_minor_locator(ticker.NullLocator())
    drift = [layer.stream_error for layer in result.layers]
    stream.plot(range(len(drift)), drift, color="#24292e", marker="o", ms=4, lw=1)
    stream.set(ylabel="error of the residual stream", ylim=(0, None if all(map(math.isfinite, drift)) else 1))
    for axes in (matrices, stream):
        axes.set_xlabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *matrices.get_legend_handles_labels(), loc="outside lower center", ncols=10, frameon=False, fontsize=8
    )
    verdict = "gate passed" if result.passed else "gate FAILED"
    stored = result.precision if result.kv_format is None else f"{result.precision}, KV cache {result.kv_format}"
    figure.suptitle(f"{title}: {stored}, KL {result.kl_mean:.2g} nats, {verdict}", fontsize=10)
    data = io.BytesIO()
    kind = file.suffix[1:]
    # Without a date in it, the same result gives the same file.
    figure.savefig(data, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)
    atomic_write_bytes(file, data.getvalue())


def _points(result: GateResult, name: str) -> list[tuple[int, TensorError]]:
    """A kind of matrix, or the cache: layer and errors of each."""
    if name == "KV cache":
        return [(int(t.name.split()[-1]), t) for t in result.tensors if t.name.startswith(name)]
    return [(int(t.name.split(".")[2]), t) for t in result.tensors if t.name.endswith(f".{name}.weight")]
