"""TensorRT and TensorRT-RTX: two modules with one API. Which is installed, and which GPUs it compiles for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_rt.errors import MissingDependencyError, UsageError

__all__ = ["FLAVOURS", "Flavour", "load_flavour"]


@dataclass(frozen=True)
class _Library:
    """Where a flavour comes from: its module, its name in text, the oldest version that has what we call."""

    module: str
    title: str
    oldest: str
    install: str


FLAVOURS = {
    "tensorrt": _Library("tensorrt", "TensorRT", "10.15", "pip install 'tensorrt>=10.15'"),
    "tensorrt-rtx": _Library("tensorrt_rtx", "TensorRT-RTX", "1.7", "pip install 'tensorrt-rtx>=1.7'"),
}
"""Target → library."""


@dataclass(frozen=True)
class Flavour:
    """A flavour that is installed.

    Attributes:
        target: `tensorrt` or `tensorrt-rtx`.
        title: Its name in text, with the version.
        version: `__version__` of the module.
        module: The module.
        known_capabilities: Compute capabilities that it can be told to compile for, without a GPU; empty for one that
            compiles for the GPU that is present.
    """

    target: str
    title: str
    version: str
    module: Any
    known_capabilities: tuple[str, ...]

    def choose_capabilities(self, wanted: Sequence[str], present: Callable[[], str | None]) -> tuple[str, ...]:
        """The compute capabilities to compile for.

        Args:
            wanted: As asked for; empty for what the flavour does by itself.
            present: Tells the compute capability of this machine's GPU; None without one.

        Raises:
            UsageError: One that the flavour does not compile for.
            MissingDependencyError: It needs a GPU, and there is none.
        """
        if self.known_capabilities:
            for one in wanted:
                if one not in self.known_capabilities:
                    known = ", ".join(self.known_capabilities)
                    raise UsageError(f"compute-capability={one} with {self.title}", f"one of {known}")
            return tuple(sorted(set(wanted), key=_order)) if wanted else ()
        found = present()
        if found is None:
            raise MissingDependencyError(
                f"{self.title} compiles for the GPU of the machine that it runs on, and this one has none",
                "an NVIDIA GPU with its driver",
                "build there, or build with --target tensorrt-rtx, which needs no GPU",
            )
        if any(one != found for one in wanted):
            asked = ", ".join(wanted)
            raise UsageError(
                f"compute-capability={asked} with {self.title}", f"{found}, that of this GPU", "leave the option out"
            )
        return (found,)

    def capability(self, name: str) -> Any:
        """The module's constant of a compute capability such as `8.9`."""
        return getattr(self.module.ComputeCapability, "SM" + name.replace(".", ""))


def load_flavour(target: str) -> Flavour:
    """Import what compiles for a target.

    Raises:
        MissingDependencyError: It is not installed, does not import, or is too old; with the install command.
    """
    library = FLAVOURS[target]
    fix = f"{library.install}, which --target {target} needs"
    try:
        module = importlib.import_module(library.module)
    except ModuleNotFoundError as error:
        if error.name == library.module:
            raise MissingDependencyError(f"{library.title} is not installed", "", fix) from None
        raise MissingDependencyError(f"{library.title} does not import: {error}", "", fix) from None
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(f"{library.title} does not import: {error}", "", fix) from None
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder"):  # the stub on PyPI, whose libraries come from elsewhere
        raise MissingDependencyError(f"{library.title} has no builder here", "the whole package", fix)
    if _numbers(version) < _numbers(library.oldest):
        raise MissingDependencyError(f"{library.title} {version} is too old", f"{library.oldest} or newer", fix)
    return Flavour(target, f"{library.title} {version}", version, module, _known_capabilities(module))


def _known_capabilities(module: Any) -> tuple[str, ...]:
    if not hasattr(module, "ComputeCapability") or not hasattr(module.IBuilderConfig, "num_compute_capabilities"):
        return ()
    names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(module.ComputeCapability))
    return tuple(sorted((f"{found[1]}.{found[2]}" for found in names if found), key=_order))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _order(capability: str) -> tuple[int, ...]:
    return _numbers(capability)
