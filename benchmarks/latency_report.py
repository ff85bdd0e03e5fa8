"""The rows of `latency.jsonl` as text, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_rt.benchmarks.harness import gpu_of, number_of, settings_of
from qwen_rt.errors import MissingDependencyError, UsageError

__all__ = ["draw_latency", "gpu_line", "latency_tables", "latency_text", "load_pyplot"]

Row = Mapping[str, Any]

_STORED = (("model", "model"), ("weights", "weights"), ("kv_cache", "KV cache"), ("source", "from"))

# By `settings.what`: settings, then metrics, each with its title.
_SECTIONS: dict[str, tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]] = {
    "decode": (
        (*_STORED, ("rows", "rows"), ("prompt", "prompt")),
        (
            ("itl_ms", "ms a token"),
            ("device_ms", "device, ms"),
            ("floor_ms", "floor, ms"),
            ("itl_to_floor_ratio", "× floor"),
            ("itl_to_floor_with_kv_ratio", "× floor with KV"),
            ("kv_part_ms", "KV, ms"),
            ("decode_tok_s", "tok/s"),
            ("host_us", "host, µs"),
        ),
    ),
    "prefill": (
        (*_STORED, ("prompt", "prompt")),
        (
            ("first_token_ms", "first token, ms"),
            ("first_token_back_to_back_ms", "back to back, ms"),
            ("prefill_tflop_s", "TFLOP/s"),
            ("matrix_tflop_s", "8192³, TFLOP/s"),
            ("share_of_matrix_ratio", "share"),
            ("matrix_fp8_tflop_s", "fp8, TFLOP/s"),
        ),
    ),
    "session": (
        _STORED,
        (
            ("load_s", "load, s"),
            ("start_to_first_token_s", "to first token, s"),
            ("weights_load_gb_s", "weights, GB/s"),
            ("weights_gb", "weights, GB"),
            ("kv_cache_gb", "KV cache, GB"),
            ("workspace_gb", "workspace, GB"),
            ("buffers_gb", "buffers, GB"),
            ("runtime_gb", "runtime, GB"),
            ("total_gb", "sum, GB"),
            ("kv_tokens", "tokens of KV"),
            ("chunk_tokens", "of a chunk"),
            ("driver_gb", "driver, GB"),
            ("memory_difference_ratio", "difference"),
        ),
    ),
}


def _show(value: object) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _sections(rows: Sequence[Row]) -> list[tuple[list[str], int, list[list[str]]]]:
    """Return titles, the number of columns that are text, and cells, for each kind of row that there is.

    Rows of several GPUs have a column for it.
    """
    found = []
    gpus = [("gpu", "GPU")] if len({gpu_of(row) for row in rows}) > 1 else []
    for what, (settings, metrics) in _SECTIONS.items():
        chosen = [row for row in rows if row["settings"].get("what") == what]
        if not chosen:
            continue
        used = [(name, title) for name, title in metrics if any(name in row["metrics"] for row in chosen)]
        cells = [
            [gpu_of(row) for _ in gpus]
            + [str(settings_of(row).get(name, "–")) for name, _ in settings]
            + [_show(number_of(row, name)) for name, _ in used]
            for row in chosen
        ]
        found.append(([title for _, title in (*gpus, *settings, *used)], len(gpus) + len(_STORED), cells))
    return found


def gpu_line(gpu: Mapping[str, Any]) -> str:
    """Return what was measured of a GPU, as a row describes it."""
    rate = f", bf16 products of 8192³ {gpu['matrix_tflop_s']:.0f} TFLOP/s" if "matrix_tflop_s" in gpu else ""
    fp8 = f", fp8 {gpu['matrix_fp8_tflop_s']:.0f}" if "matrix_fp8_tflop_s" in gpu else ""
    return f"{gpu['name']}: reads {gpu['read_gb_s'] / 1e3:.3f} TB/s{rate}{fp8}"


def latency_text(rows: Sequence[Row]) -> str:
    """Return aligned tables for a terminal, under a line about the GPU.

    Args:
        rows: Of one run.
    """
    blocks = [gpu_line(rows[0]["device"]["gpu"])]
    for titles, num_texts, cells in _sections(rows):
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if index < num_texts else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (titles, *cells)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def latency_tables(rows: Sequence[Row]) -> str:
    """Return Markdown tables, one for each kind of row."""
    tables = []
    for titles, num_texts, cells in _sections(rows):
        rule = "|---" * num_texts + "|--:" * (len(titles) - num_texts) + "|"
        first, *rest = ("| " + " | ".join(line) + " |" for line in (titles, *cells))
        tables.append("\n".join([first, rule, *rest]))
    return "\n\n".join(tables) + "\n"


def load_pyplot() -> Any:
    """Import matplotlib for files, without a display.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        fix = 'pip install "qwen-rt[bench]"'
        raise MissingDependencyError("matplotlib is not installed", fix=fix) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_latency(rows: Sequence[Row], file: Path) -> None:
    """Draw the ratio to the floor by rows, and that to the floor with keys and values by prompt.

    Args:
        rows: Any; each GPU that has decode rows gets a line of two panels, each model and its formats a colour.
        file: .svg or .png.

    Raises:
        UsageError: No decode row.
        MissingDependencyError: matplotlib is not installed.
    """
    decode = [row for row in rows if row["settings"].get("what") == "decode"]
    if not decode:
        raise UsageError("no decode rows to draw", "rows of `qwen-rt bench latency`", "run it first")
    names = {gpu_of(row): str((row["device"].get("gpu") or {}).get("name", "GPU")) for row in decode}
    pyplot = load_pyplot()
    palette = pyplot.get_cmap("tab20").colors
    stored = sorted({_stored(row) for row in decode})
    colors = {name: palette[number % len(palette)] for number, name in enumerate(stored)}
    figure, panels = pyplot.subplots(
        len(names), 2, figsize=(9, 3.6 * len(names)), layout="constrained", squeeze=False, sharey="col"
    )
    for (gpu, name), (by_rows, by_prompt) in zip(sorted(names.items()), panels, strict=True):
        _draw_gpu(by_rows, by_prompt, [row for row in decode if gpu_of(row) == gpu], colors)
        by_rows.set_title(f"one {name}", fontsize=9, loc="left")
    figure.suptitle("Decode, random weights unless a bundle is named", fontsize=10)
    # Without a date in it, the same rows give the same file.
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _draw_gpu(by_rows: Any, by_prompt: Any, decode: Sequence[Row], colors: Mapping[str, Any]) -> None:
    base = {row["settings"]["prompt"] for row in decode if row["settings"]["rows"] > 1}
    fewest = min(row["settings"]["rows"] for row in decode)
    _lines(by_rows, decode, "rows", "itl_to_floor_ratio", lambda s: not base or s["prompt"] in base, colors)
    _lines(by_prompt, decode, "prompt", "itl_to_floor_with_kv_ratio", lambda s: s["rows"] == fewest, colors)
    by_rows.set(xlabel="rows", ylabel="ms a token / floor")
    by_prompt.set(xlabel="tokens of the prompt", ylabel="ms a token / floor with keys and values")
    for axes in (by_rows, by_prompt):
        axes.axhline(1.0, color="#5a6468", linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0.9)
        axes.spines[["top", "right"]].set_visible(False)
    counts = sorted({row["settings"]["rows"] for row in decode})
    by_rows.set_xscale("log", base=2)
    by_rows.set_xticks(counts, [str(count) for count in counts])
    by_rows.legend(frameon=False, fontsize=7)


def _lines(
    axes: Any,
    rows: Sequence[Row],
    setting: str,
    metric: str,
    wanted: Callable[[Mapping[str, Any]], bool],
    colors: Mapping[str, Any],
) -> None:
    for stored in sorted({_stored(row) for row in rows}):
        chosen = [row for row in rows if _stored(row) == stored and wanted(row["settings"])]
        points = sorted((row["settings"][setting], number_of(row, metric)) for row in chosen)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=stored, color=colors[stored])


def _stored(row: Row) -> str:
    """Model and formats, as in a legend."""
    settings = settings_of(row)
    cache = "" if settings["kv_cache"] == "bf16" else f", {settings['kv_cache']} KV"
    return f"{settings['model']} {settings.get('weights', '')}{cache}"
