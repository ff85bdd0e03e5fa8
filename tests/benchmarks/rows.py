"""Result rows of GPU benchmarks, made up for tests."""

from __future__ import annotations

from typing import Any

from qwen_rt.benchmarks import harness

DATE = "2026-01-02T03:04:05Z"


def gpu_row(
    benchmark: str,
    contender: str,
    metrics: dict[str, Any],
    *,
    run: str = "run-1",
    date: str = DATE,
    passed: bool = True,
    dirty: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """A row with all fields; numbers are given as they are."""
    gpu = {"name": "A GPU", "memory_gb": 100.0, "read_gb_s": 4500.0, "matrix_tflop_s": 700.0}
    return {
        "schema": harness.SCHEMA,
        "benchmark": benchmark,
        "contender": contender,
        "run": run,
        "date": date,
        "commit": "0123456789abcdef",
        "dirty": dirty,
        "command": "qwen-rt bench latency 7b",
        "device": {"cpu": "A CPU", "num_cores": 2, "memory_gb": 25.0, "gpu": gpu},
        "versions": {"python": "3.12"},
        "settings": {"model": "7b", **settings},
        "check": {"passed": passed},
        "metrics": metrics,
    }


def decode_row(rows: int, prompt: int, itl_ms: float, **more: Any) -> dict[str, Any]:
    """A decode row of `latency.jsonl` whose floor is 3 ms."""
    settings = {"weights": "bf16", "source": "random", "layers": 28, "what": "decode", "rows": rows, "prompt": prompt}
    metrics = {
        "itl_ms": {"median": itl_ms, "p10": itl_ms, "p90": itl_ms, "n": 3},
        "floor_ms": 3.0,
        "itl_to_floor_ratio": itl_ms / 3,
        "itl_to_floor_with_kv_ratio": itl_ms / 3.1,
    }
    return gpu_row("latency", "qwen-rt", metrics, **(settings | more))
