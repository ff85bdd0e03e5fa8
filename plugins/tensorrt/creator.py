"""Creators of the plugins, one an op, and their registration with TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qwen_rt.errors import MissingDependencyError, QwenRtError
from qwen_rt.ops import DOMAIN, OPS, PluginOp
from qwen_rt.plugins.library import PluginLibrary
from qwen_rt.plugins.tensorrt.plugin import INPUT_NAMES, OUTPUT_NAMES, NodeSettings, plugin_class

__all__ = ["creator_class", "read_fields", "register", "register_with", "takes_plugins", "unregister"]


def takes_plugins(trt: Any) -> bool:
    """Say whether this flavour takes plugins; TensorRT-RTX ends the process when its ONNX parser meets one."""
    return hasattr(trt.INetworkDefinition, "add_plugin_v3")


def read_fields(trt: Any, collection: Any) -> dict[str, str | float]:
    """Read the fields of a node, as the ONNX parser or an engine gives them."""
    found: dict[str, str | float] = {}
    for field in collection:
        data = field.data
        if field.type == trt.PluginFieldType.CHAR:
            text = data if isinstance(data, str | bytes) else np.asarray(data).astype(np.uint8).tobytes()
            found[field.name] = (text.decode() if isinstance(text, bytes) else text).rstrip("\0")
        else:
            found[field.name] = float(np.asarray(data).reshape(-1)[0])
    return found


def creator_class(trt: Any, op: PluginOp, library: PluginLibrary, fill: Callable[[int, int, int, int], None]) -> Any:
    """Make the creator class of an op; see `plugin_class` for the arguments."""
    made = plugin_class(trt, op, library, fill)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = op.name, str(op.version), DOMAIN
            kinds = trt.PluginFieldType
            named = [(INPUT_NAMES, kinds.CHAR), (OUTPUT_NAMES, kinds.CHAR)]
            named += [(name, kinds.FLOAT32) for name, _ in op.attributes]
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, np.array([]), kind) for name, kind in named]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            # The parser adds what every plugin node has.
            given = {
                key: value
                for key, value in read_fields(trt, fields).items()
                if key not in ("plugin_version", "plugin_namespace")
            }
            return made(NodeSettings.from_fields(op, given))

    Creator.__name__ = Creator.__qualname__ = made.__name__ + "Creator"
    return Creator


def register(trt: Any, library: PluginLibrary, fill: Callable[[int, int, int, int], None]) -> list[Any]:
    """Register the creators of all ops, in the namespace `qwen_rt`, each with its op's version.

    Args:
        trt: The full TensorRT's module.
        library: Launches the ops, while engines are built and run.
        fill: As for `plugin_class`.

    Returns:
        The creators. Keep them as long as TensorRT may use them, and give them to `unregister` then.

    Raises:
        MissingDependencyError: This flavour takes no plugins.
        QwenRtError: Creators of these names are registered already.
    """
    if not takes_plugins(trt):
        raise MissingDependencyError(
            f"{trt.__name__} {trt.__version__} takes no plugins", "the full TensorRT", "build with --target tensorrt"
        )
    return register_with(trt.get_plugin_registry(), trt, library, fill)


def register_with(
    registry: Any, trt: Any, library: PluginLibrary, fill: Callable[[int, int, int, int], None]
) -> list[Any]:
    """Register the creators of all ops with a registry."""
    creators: list[Any] = []
    for op in OPS:
        creator = creator_class(trt, op, library, fill)()
        if not registry.register_creator(creator, DOMAIN):
            unregister(registry, creators)
            raise QwenRtError(f"a plugin {op.name} of version {op.version} is registered already", "none", "unregister")
        creators.append(creator)
    return creators


def unregister(registry: Any, creators: list[Any]) -> None:
    """Take creators out of a registry."""
    for creator in creators:
        registry.deregister_creator(creator)
