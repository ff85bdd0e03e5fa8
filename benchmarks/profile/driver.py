"""The nodes of a captured CUDA graph, by the driver's API: their order, names of kernels, and taking the last away."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from qwen_rt.errors import QwenRtError

__all__ = ["GraphNode", "destroy_node", "graph_nodes"]

_KERNEL = 0  # CU_GRAPH_NODE_TYPE_KERNEL
_TYPES = {1: "copy", 2: "fill"}


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class GraphNode:
    """A node of a captured graph: its handle, and its kernel's mangled name, `copy`, `fill` or `other`."""

    handle: int
    name: str


def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise QwenRtError(f"the driver's library cannot be loaded: {error}") from None


def _call(driver: Any, name: str, *arguments: Any) -> None:
    status = getattr(driver, name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(text))
        raise QwenRtError(f"{name}: {(text.value or b'').decode() or status}")


def graph_nodes(graph: int) -> list[GraphNode]:
    """Return the nodes of a captured graph in the order in which they run.

    Args:
        graph: Its handle.

    Raises:
        QwenRtError: The driver refuses, or the nodes are no chain.
    """
    driver = _driver()
    count = ctypes.c_size_t()
    handle = ctypes.c_void_p(graph)
    _call(driver, "cuGraphGetNodes", handle, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    _call(driver, "cuGraphGetNodes", handle, nodes, ctypes.byref(count))
    num_edges = ctypes.c_size_t()
    _call(driver, "cuGraphGetEdges_v2", handle, None, None, None, ctypes.byref(num_edges))
    sources, targets = (ctypes.c_void_p * num_edges.value)(), (ctypes.c_void_p * num_edges.value)()
    data = (ctypes.c_uint64 * num_edges.value)()  # CUgraphEdgeData: without room for it, dependent launches are refused
    _call(driver, "cuGraphGetEdges_v2", handle, sources, targets, data, ctypes.byref(num_edges))
    following = dict(zip(sources, targets, strict=True))
    first = set(nodes) - set(targets)
    if len(first) != 1 or len(following) != len(nodes) - 1:
        raise QwenRtError(f"the step's graph has {len(nodes)} nodes and {len(sources)} edges", "a chain")
    order = [first.pop()]
    while order[-1] in following:
        order.append(following[order[-1]])
    return [GraphNode(node, _name(driver, node)) for node in order]


def _name(driver: Any, node: int) -> str:
    kind = ctypes.c_int()
    _call(driver, "cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
    if kind.value != _KERNEL:
        return _TYPES.get(kind.value, "other")
    params, text = _KernelParams(), ctypes.c_char_p()
    _call(driver, "cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
    if params.function:
        _call(driver, "cuFuncGetName", ctypes.byref(text), ctypes.c_void_p(params.function))
    else:
        _call(driver, "cuKernelGetName", ctypes.byref(text), ctypes.c_void_p(params.kernel))
    return (text.value or b"").decode(errors="replace")


def destroy_node(node: GraphNode) -> None:
    """Take a node, and the edges to it, out of its graph."""
    _call(_driver(), "cuGraphDestroyNode", ctypes.c_void_p(node.handle))
