"""Network → engine: profiles, flags, progress, and a writer that takes the engine piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_rt.engine_card import EngineProfile
from qwen_rt.errors import GraphError, StorageError
from qwen_rt.export.tensorrt.flavour import Flavour
from qwen_rt.export.tensorrt.histogram import engine_layers
from qwen_rt.export.tensorrt.messages import reason_of
from qwen_rt.export.tensorrt.network import Network
from qwen_rt.export.tensorrt.progress import make_monitor
from qwen_rt.export.tensorrt.timing_cache import load_cache, save_cache
from qwen_rt.progress import Progress

__all__ = ["BuildPlan", "compile_engine"]

_NO_MEMORY = "OutOfMemory"  # as the library calls it, of the GPUs or of this machine
_WAIT_S = 0.01


@dataclass(frozen=True)
class BuildPlan:
    """How to compile.

    Attributes:
        compute_capabilities: To compile for; empty where the library compiles for the GPU that is present.
        profiles: Name → shapes, in order.
        timing_cache: File of measurements; None for a library that makes none.
        optimization_level: 0 to 5; None for the library's default.
    """

    compute_capabilities: Sequence[str]
    profiles: dict[str, EngineProfile]
    timing_cache: Path | None
    optimization_level: int | None = None


@dataclass
class _Run:
    """What the builder's thread leaves."""

    done: bool = False
    error: BaseException | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


def compile_engine(
    flavour: Flavour,
    network: Network,
    plan: BuildPlan,
    bar: Progress,
    write: Callable[[bytes], object],
    idle: Callable[[], object],
) -> dict[str, dict[str, int]]:
    """Compile a network.

    Args:
        flavour: The library.
        network: What to compile.
        plan: For what.
        bar: Is told of `qwen_rt.export.tensorrt.progress.STEPS` steps.
        write: Takes the bytes of the engine, in order, from another thread.
        idle: Called now and then while the library works.

    Returns:
        Profile → kind of the compiled layers → number; empty where the library does not tell.

    Raises:
        GraphError: The library refuses, with the name of the layer where it says so.
        KeyboardInterrupt: The build was interrupted; the library has stopped.
    """
    config = _configure(flavour, network, plan)
    cache = None if plan.timing_cache is None else load_cache(config, plan.timing_cache)
    run = _Run()
    config.progress_monitor = make_monitor(flavour.module, bar, run.cancelled)
    writer = _make_writer(flavour.module, write, run)

    def build() -> None:
        try:
            build_to_stream = getattr(network.builder, "build_serialized_network_to_stream", None)
            if build_to_stream is not None:
                run.done = bool(build_to_stream(network.network, config, writer))
            elif (plan_bytes := network.builder.build_serialized_network(network.network, config)) is not None:
                writer.write(memoryview(plan_bytes))
                run.done = run.error is None
        except BaseException as error:  # handed to the thread that waits
            run.error = run.error or error
        finally:
            run.ended.set()

    # In a thread of its own: an interrupt then reaches this one at once, and not when the library comes back. (An
    # interrupted `Thread.join` takes the thread for ended, so an event is waited for.)
    threading.Thread(target=build, name="tensorrt", daemon=True).start()
    try:
        while not run.ended.wait(_WAIT_S):
            idle()
    except BaseException:
        run.cancelled.set()
        run.ended.wait()
        raise
    if run.error is not None:
        raise run.error
    if not run.done:
        reason = reason_of(network.log.errors, network.layer_names())
        if _NO_MEMORY in reason:
            raise GraphError(
                f"{flavour.title} has not the memory to build the engine: {reason}",
                fix="choose a smaller --max-batch, --prefill-tokens or --max-length",
            )
        raise GraphError(
            f"{flavour.title} does not build {reason or 'the engine, and does not say why'}",
            fix="choose another --precision, or another --compute-capability",
        )
    if cache is not None and plan.timing_cache is not None:
        save_cache(config, plan.timing_cache)
    return engine_layers(network.log.engine_lists, plan.profiles)


def _configure(flavour: Flavour, network: Network, plan: BuildPlan) -> Any:
    module, config = flavour.module, network.builder.create_builder_config()
    if flavour.known_capabilities and plan.compute_capabilities:
        config.num_compute_capabilities = len(plan.compute_capabilities)
        for index, one in enumerate(plan.compute_capabilities):
            config.set_compute_capability(flavour.capability(one), index)
    if plan.optimization_level is not None:
        config.builder_optimization_level = plan.optimization_level
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # or the compiled layers have no names
    if hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it a step cannot be captured
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for shapes in plan.profiles.values():
        profile = network.builder.create_optimization_profile()
        for value in network.graph.inputs:
            assert value.shape is not None
            assert value.name is not None
            dims = [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape]
            most = {"B": shapes.max_batch, "S": shapes.max_tokens}
            limits = [[dim if isinstance(dim, int) else size(dim, most) for dim in dims] for size in _SIZES]
            profile.set_shape(value.name, *limits)
        if config.add_optimization_profile(profile) < 0:
            raise GraphError(f"{flavour.title} refuses an optimization profile: {reason_of(network.log.errors)}")
    return config


# Least, best and most of a dimension: one row is what is tuned for, of as many tokens as there can be.
_SIZES: tuple[Callable[[str, dict[str, int]], int], ...] = (
    lambda _, __: 1,
    lambda dim, most: 1 if dim == "B" else most[dim],
    lambda dim, most: most[dim],
)


def _make_writer(module: Any, write: Callable[[bytes], object], run: _Run) -> Any:
    """Return what the library writes the engine to; an error of `write` stops it and is kept in `run`."""

    def put(data: Any) -> int:
        try:
            if run.cancelled.is_set():
                raise StorageError("the build was interrupted")
            write(data)
        except BaseException as error:
            run.error = run.error or error
            return 0
        return len(data)

    if not hasattr(module, "IStreamWriter"):
        return type("Writer", (), {"write": staticmethod(put)})()

    class Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            return put(data)

    return Writer()
