"""Finds and loads libqwen_rt_plugins.so, made of these sources, and calls its ops on raw device pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

from qwen_rt.errors import MissingDependencyError, QwenRtError, UnsupportedModelError, UsageError
from qwen_rt.ops import OPS, find_op
from qwen_rt.plugins.build import ABI, built_libraries, find_library, library_info, source_hash

__all__ = ["NO_DEPENDENT_LAUNCH", "PluginLibrary", "load"]

NO_DEPENDENT_LAUNCH = 1
"""Flag: start only when all work before on the stream is complete."""

_MESSAGE_BYTES = 512
_BUILD = "python -m qwen_rt.plugins.build"
_REBUILD = f"run `{_BUILD}`"
_UNSUPPORTED = 2


class _Call(ctypes.Structure):
    """QwenRtCall of capi.h."""

    _fields_ = (
        ("abi", ctypes.c_int32),
        ("num_tensors", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("num_attributes", ctypes.c_int32),
        ("tensors", ctypes.c_void_p),
        ("dims", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("flags", ctypes.c_int64),
        ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_int64),
    )


class PluginLibrary:
    """The loaded library.

    Args:
        path: The shared object; kept as `path`.
        check_sources: Whether it must be built from the sources beside this module.

    Raises:
        MissingDependencyError: No file there, one that cannot be loaded, or one of other sources.
    """

    def __init__(self, path: Path, *, check_sources: bool = True) -> None:
        self.path = path
        if not path.is_file():
            raise MissingDependencyError(f"the plugin library {path.name} is not built", "", _REBUILD)
        try:
            self._library = ctypes.CDLL(str(path))
            self._library.qwen_rt_build_info.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise MissingDependencyError(f"{path.name} cannot be loaded: {error}", "", _REBUILD) from error
        info = self._library.qwen_rt_build_info().decode()
        self.build_info: dict[str, str] = dict(item.split("=", 1) for item in info.split() if "=" in item)
        self._check(path.name, check_sources)
        self._library.qwen_rt_workspace_bytes.restype = ctypes.c_int64

    def _check(self, name: str, check_sources: bool) -> None:
        found = self.build_info
        if found.get("abi") != str(ABI):
            raise MissingDependencyError(f"{name} has abi={found.get('abi')}", f"abi={ABI}", _REBUILD)
        versions = ",".join(f"{op.name}:{op.version}" for op in OPS)
        if found.get("ops") != versions:
            raise MissingDependencyError(f"{name} has the ops {found.get('ops')}", versions, _REBUILD)
        if check_sources and found.get("sources") != source_hash():
            raise MissingDependencyError(
                f"{name} was built from sources {found.get('sources')}", f"{source_hash()}, the present ones", _REBUILD
            )

    @property
    def sms(self) -> tuple[int, ...]:
        """Compute capabilities it has code for, 90 for 9.0."""
        return tuple(int(sm) for sm in self.build_info.get("sms", "").split(",") if sm)

    def workspace_bytes(self, op: str, dims: Sequence[int]) -> int:
        """Return the device bytes, zeroed once, that an op wants; 0 for most.

        Raises:
            UsageError: The op is unknown or takes another number of dims.
        """
        values = (ctypes.c_int64 * len(dims))(*dims)
        needed = int(self._library.qwen_rt_workspace_bytes(op.encode(), values, len(dims)))
        if needed < 0:
            raise UsageError(f"workspace of {op} for {len(dims)} dims", ", ".join(find_op(op).dims), "pass all of them")
        return needed

    def launch(
        self,
        op: str,
        tensors: Sequence[int | None],
        dims: Sequence[int],
        attributes: Sequence[float] = (),
        *,
        stream: int = 0,
        workspace: int | None = None,
        workspace_bytes: int = 0,
        flags: int = 0,
    ) -> None:
        """Enqueue an op on a stream; see `core/ops.py` for what it takes.

        Args:
            op: Its name.
            tensors: Device addresses of inputs and outputs in table order; None for an absent optional one.
            dims: In table order.
            attributes: In table order.
            stream: The CUDA stream's handle.
            workspace: Device address.
            workspace_bytes: Its size.
            flags: 0 or `NO_DEPENDENT_LAUNCH`.

        Raises:
            UnsupportedModelError: No kernel is made for the shape.
            QwenRtError: An argument that cannot be, or the driver refused.
        """
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        pointers = (ctypes.c_void_p * len(tensors))(*tensors)
        values = (ctypes.c_int64 * len(dims))(*dims)
        numbers = (ctypes.c_double * max(1, len(attributes)))(*attributes)
        call = _Call(
            ABI,
            len(tensors),
            len(dims),
            len(attributes),
            ctypes.addressof(pointers),
            ctypes.addressof(values),
            ctypes.addressof(numbers),
            workspace,
            workspace_bytes,
            stream,
            flags,
            ctypes.addressof(message),
            _MESSAGE_BYTES,
        )
        status = self._library.qwen_rt_launch(op.encode(), ctypes.byref(call))
        if status:
            text = f"{op}: {message.value.decode(errors='replace')}"
            raise UnsupportedModelError(text) if status == _UNSUPPORTED else QwenRtError(text)

    def read_probe(self, data: int, num_bytes: int, sink: int, variant: int, stream: int) -> None:
        """Enqueue a kernel that reads `num_bytes` once; variants 0 to 5 differ in loads in flight.

        Raises:
            QwenRtError: The driver refused.
        """
        status = self._library.qwen_rt_read_probe(
            ctypes.c_void_p(data), ctypes.c_int64(num_bytes), ctypes.c_void_p(sink), variant, ctypes.c_void_p(stream)
        )
        if status:
            raise QwenRtError(f"read_probe: status {status}")


def load(sm: int | None = None) -> PluginLibrary:
    """Load the newest library of the present sources.

    Args:
        sm: Compute capability of the GPU that it must have code for, 90 for 9.0; None for any.

    Raises:
        MissingDependencyError: None is built, or only of other sources or for other GPUs; the message has the command.
    """
    path = find_library(None if sm is None else (sm,))
    if path is not None:
        return PluginLibrary(path)
    fix = _REBUILD if sm is None else f"run `{_BUILD} --sm {sm}`"
    other = find_library()
    if other is not None and sm is not None:
        have = ", ".join(_capability(int(one)) for one in library_info(other).get("sms", "").split(",") if one)
        raise MissingDependencyError(
            f"the plugin library has code for SM {have}, this GPU is SM {_capability(sm)}", fix=fix
        )
    if built_libraries():
        raise MissingDependencyError(
            "the plugin library is of other sources than these", "one of the present sources", fix
        )
    raise MissingDependencyError("the plugin library is not built", fix=fix)


def _capability(sm: int) -> str:
    return f"{sm // 10}.{sm % 10}"
