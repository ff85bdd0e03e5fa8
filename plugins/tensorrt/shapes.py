"""Output shapes of an op as expressions of its input shapes, while the sizes are not known yet.

`PluginOp.dims_of` does this with numbers; here a size is whatever an `Arithmetic` computes with, such as TensorRT's
dimension expressions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwen_rt.errors import UsageError
from qwen_rt.ops import OpTensor, PluginOp

__all__ = ["Arithmetic", "ExprArithmetic", "output_shapes", "untold_outputs"]


class Arithmetic(Protocol):
    """Whole numbers that may be unknown."""

    def constant(self, value: int) -> Any:
        """Make a known one."""
        ...

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        ...

    def subtract(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        ...

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a · b."""
        ...


@dataclass(frozen=True)
class ExprArithmetic:
    """That of TensorRT.

    Attributes:
        trt: TensorRT's module.
        builder: Its IExprBuilder.
    """

    trt: Any
    builder: Any

    def constant(self, value: int) -> Any:
        """Make a known number."""
        return self.builder.constant(value)

    def add(self, a: Any, b: Any) -> Any:
        """Return a + b."""
        return self.builder.operation(self.trt.DimensionOperation.SUM, a, b)

    def subtract(self, a: Any, b: Any) -> Any:
        """Return a - b."""
        return self.builder.operation(self.trt.DimensionOperation.SUB, a, b)

    def multiply(self, a: Any, b: Any) -> Any:
        """Return a · b."""
        return self.builder.operation(self.trt.DimensionOperation.PROD, a, b)


def _terms(size: str) -> list[list[str]]:
    """Split a sum of products: `"a + 2 * b"` is [["a"], ["2", "b"]]."""
    return [[factor.strip() for factor in term.split("*")] for term in size.split("+")]


def _symbols(sizes: Sequence[str]) -> set[str]:
    return {factor for size in sizes for term in _terms(size) for factor in term if not factor.isdecimal()}


def untold_outputs(op: PluginOp) -> tuple[str, ...]:
    """Name the outputs whose shape no input tells; a graph cannot have them."""
    told = {symbol for tensor in op.inputs for symbol in _symbols(tensor.shape)}
    return tuple(tensor.name for tensor in op.outputs if _symbols(tensor.shape) - told)


def output_shapes(
    op: PluginOp, inputs: Mapping[str, Sequence[Any]], outputs: Sequence[OpTensor], arithmetic: Arithmetic
) -> list[list[Any]]:
    """Work out the shapes of outputs.

    Args:
        op: The op.
        inputs: Name → sizes of every input that is there.
        outputs: Those whose shapes are wanted.
        arithmetic: What the sizes are numbers of.

    Returns:
        Their sizes, in order.

    Raises:
        UsageError: An input of another rank, or an output that only absent inputs would tell.
    """
    known: dict[str, Any] = {}
    sums: list[tuple[str, Any]] = []
    for tensor in op.inputs:
        if tensor.name not in inputs:
            continue
        sizes = inputs[tensor.name]
        if len(sizes) != len(tensor.shape):
            raise UsageError(f"{op.name}: {tensor.name} has {len(sizes)} axes", f"[{', '.join(tensor.shape)}]")
        for value, size in zip(sizes, tensor.shape, strict=True):
            if size.isidentifier():
                known.setdefault(size, value)
            else:
                sums.append((size, value))
    for size, value in sums:
        unknown = [term for term in _terms(size) if len(term) == 1 and term[0].isidentifier() and term[0] not in known]
        if len(unknown) == 1:
            rest = [term for term in _terms(size) if term != unknown[0]]
            known[unknown[0][0]] = arithmetic.subtract(value, _evaluate(op, rest, known, arithmetic))
    return [[_evaluate(op, _terms(size), known, arithmetic) for size in tensor.shape] for tensor in outputs]


def _evaluate(op: PluginOp, terms: Sequence[Sequence[str]], known: Mapping[str, Any], arithmetic: Arithmetic) -> Any:
    total: Any = None
    for term in terms:
        product: Any = None
        for factor in term:
            if not factor.isdecimal() and factor not in known:
                raise UsageError(f"{op.name}: no input tells {factor}", "all inputs that its outputs need", "pass them")
            value = arithmetic.constant(int(factor)) if factor.isdecimal() else known[factor]
            product = value if product is None else arithmetic.multiply(product, value)
        total = product if total is None else arithmetic.add(total, product)
    return total
