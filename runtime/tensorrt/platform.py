"""What a session stands on: TensorRT's module, the full one or the one for RTX GPUs, and the CUDA runtime."""

from __future__ import annotations

import contextlib
import importlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from qwen_rt.errors import MissingDependencyError, one_line
from qwen_rt.runtime.cuda.cudart import Cudart

__all__ = ["FLAVOURS", "Platform", "load_flavour", "make_log"]

FLAVOURS = {
    "tensorrt": ("tensorrt", (10, 15), "pip install 'tensorrt>=10.15'"),
    "tensorrt-rtx": ("tensorrt_rtx", (1, 7), "pip install 'tensorrt-rtx>=1.7'"),
}
"""Target → module, oldest version whose engines update a KV cache in place, and the command that installs it."""

_KEPT_MESSAGES = 4


@dataclass(frozen=True)
class Platform:
    """What a session stands on; tests stand it on something else.

    Attributes:
        cuda: The CUDA runtime.
        trt: TensorRT's module.
    """

    cuda: Cudart
    trt: Any

    @classmethod
    def real(cls, flavour: str) -> Platform:
        """Return that of this machine.

        Raises:
            MissingDependencyError: TensorRT of this flavour is not installed, or there is no CUDA runtime.
        """
        return cls(trt=load_flavour(flavour), cuda=Cudart())


def load_flavour(flavour: str) -> Any:
    """Import the module of a flavour, a key of `FLAVOURS`.

    Raises:
        MissingDependencyError: It is not installed, does not load, or is too old; the message has the command.
    """
    name, oldest, command = FLAVOURS[flavour]
    least = ".".join(map(str, oldest))
    try:
        module: Any = importlib.import_module(name)
        version = str(module.__version__)
        found = tuple(int(part) for part in version.split(".")[:2])
    except ModuleNotFoundError as error:
        what = f"{name} is not installed" if error.name == name else f"{name} cannot be loaded: {error}"
        raise MissingDependencyError(what, f"{least} or newer, to run a bundle of target {flavour}", command) from None
    except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
        # NVIDIA's packages on PyPI may be stubs that hold no library and raise one of these.
        raise MissingDependencyError(f"{name} cannot be loaded: {error}", f"{least} or newer", command) from None
    if found < oldest:
        raise MissingDependencyError(f"{name} {version} is too old", f"{least} or newer", command)
    return module


def make_log(trt: Any) -> Any:
    """Return a logger for TensorRT that prints nothing and keeps the last errors: `last()` gives them as one line."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._kept: deque[str] = deque(maxlen=_KEPT_MESSAGES)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                with contextlib.suppress(Exception):  # called from C++, where nothing may be raised
                    self._kept.append(one_line(str(message)))

        def last(self) -> str:
            """Return the errors since the call before, and forget them."""
            text = "; ".join(self._kept) or "TensorRT gives no reason"
            self._kept.clear()
            return text

    return Log()
