"""How much each unit of a model suffers from each scheme, measured in one pass over the layers.

The error of a unit (q, k and v; o; gate and up; down) in a scheme is what it alone does to the residual stream after
its layer, the root mean square over tokens of

    ‖h' - h‖ / ‖h‖          h' with this unit's matrices rounded, all others as they are

and of the LM head the same of the logits, their mean over the vocabulary taken off.

A matrix is read once: its blocks of rows are rounded in each scheme, and what each makes of the inputs is carried
through the rest of the layer side by side, ten wide at most with three schemes. Memory is those activations and a few
blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_rt.errors import CheckpointError
from qwen_rt.export.passes.decoder import head_name
from qwen_rt.export.quantize.forward import Forward, LayerPass, read_blocks
from qwen_rt.export.quantize.rounding import quantize_rows
from qwen_rt.export.quantize.texts import Texts, evenly
from qwen_rt.quantization import Scheme, dequantize
from qwen_rt.row_reader import RowSource
from qwen_rt.spec import ModelSpec

__all__ = ["Sensitivity"]

_HEAD_TOKENS = 64


class Sensitivity:
    """Runs texts through a model, layer by layer, and measures.

        sensitivity = Sensitivity(rows, spec, texts)
        for layer in range(spec.num_layers):
            errors = sensitivity.next_layer({"qkv": [int4, int8], ...})

    Args:
        rows: The model's parameters.
        spec: The model.
        texts: What to run.

    Raises:
        UsageError: A token outside the vocabulary.
    """

    def __init__(self, rows: RowSource, spec: ModelSpec, texts: Texts) -> None:
        self._rows, self._texts = rows, texts
        self._forward = Forward(spec, rows)
        self._hidden, self._layer = self._forward.embed(texts.ids), 0

    @torch.no_grad()
    def next_layer(self, schemes: Mapping[str, Sequence[Scheme]]) -> dict[tuple[str, Scheme], float]:
        """Measure the next layer.

        Args:
            schemes: Unit → what to round its matrices to.

        Returns:
            (unit, scheme) → relative error.

        Raises:
            CheckpointError: Weights or activations that are not finite.
        """
        plain = self._forward.layer(self._layer, self._hidden)
        branches: dict[tuple[str, Scheme], LayerPass] = {}
        while plain.unit:
            unit, names = plain.unit, plain.names
            steps = [plain, *branches.values()]
            x = torch.cat([self._texts.take(step.x) for step in steps])  # [steps · n, K]
            products, rounded = self._multiply(names, x, schemes[unit])
            forks = {(unit, scheme): copy.copy(plain) for scheme in schemes[unit]}
            for step, *outputs in zip(steps, *(y.chunk(len(steps)) for y in products), strict=True):
                step.advance([self._texts.put(y) for y in outputs])
            for fork, outputs in zip(forks.values(), rounded, strict=True):
                fork.advance([self._texts.put(y) for y in outputs])
            branches |= forks
        states = self._texts.take(plain.hidden)
        errors = {key: _relative(self._texts.take(step.hidden) - states, states) for key, step in branches.items()}
        if not np.isfinite(list(errors.values())).all() or not torch.isfinite(states.sum()):
            raise CheckpointError(
                f"the output of layer {self._layer} is not finite", "finite weights", "download the checkpoint again"
            )
        self._hidden, self._layer = plain.hidden, self._layer + 1
        return errors

    def _multiply(
        self, names: Sequence[str], x: Tensor, schemes: Sequence[Scheme]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Multiply all inputs by a unit's matrices, and the first n, those of the plain pass, by each rounding of them.

        Args:
            names: The matrices.
            x: f32[m, K], m a multiple of n.
            schemes: What to round to.

        Returns:
            f32[m, N] for each matrix; for each scheme f32[n, N] for each matrix.
        """
        first = x[: self._texts.num_tokens]
        widths = [self._rows.shape(name)[0] for name in names]
        products = {name: x.new_empty(len(x), width) for name, width in zip(names, widths, strict=True)}
        rounded = [
            {name: x.new_empty(len(first), width) for name, width in zip(names, widths, strict=True)} for _ in schemes
        ]
        for block in read_blocks((self._rows,), names):
            place = slice(block.start, block.stop)
            products[block.name][:, place] = x @ block.rows[0].T
            for scheme, outputs in zip(schemes, rounded, strict=True):
                outputs[block.name][:, place] = first @ _rounded(block.name, block.rows[0], scheme, block.start).T
        return list(products.values()), [list(outputs.values()) for outputs in rounded]

    @torch.no_grad()
    def head(self, name: str, schemes: Sequence[Scheme]) -> dict[Scheme, float]:
        """Measure the LM head, after the last layer: scheme → relative error. Sums are kept, and no logits.

        Args:
            name: What to call the matrix in errors.
            schemes: What to round it to.
        """
        x = self._texts.take(self._forward.final_norm(self._hidden))
        x = x[torch.from_numpy(evenly(len(x), _HEAD_TOKENS))]
        sums = torch.zeros(1 + len(schemes), 2, len(x), dtype=torch.float64)  # Σ y and Σ y², of logits, then of errors
        source = head_name(self._forward.spec)
        for block in read_blocks((self._rows,), (source,)):
            weight = block.rows[0]
            changes = [_rounded(name, weight, scheme, block.start) - weight for scheme in schemes]
            for total, matrix in zip(sums, [weight, *changes], strict=True):
                y = (x @ matrix.T).double()
                total += torch.stack([y.sum(-1), y.square().sum(-1)])
        spread = sums[:, 1] - sums[:, 0].square() / self._rows.shape(source)[0]  # [1 + schemes, n]
        ratios = (spread[1:] / spread[0].clamp_min(1e-30)).mean(-1).sqrt()
        return dict(zip(schemes, ratios.tolist(), strict=True))


def _rounded(name: str, weight: Tensor, scheme: Scheme, first_row: int) -> Tensor:
    """Rows f32[n, K] as a scheme gives them back."""
    return torch.from_numpy(dequantize(quantize_rows(name, weight.numpy(), scheme, first_row)))


def _relative(error: Tensor, whole: Tensor) -> float:
    """Root mean square over tokens of ‖error‖ / ‖whole‖, f32[n, C] each."""
    sizes = torch.linalg.vector_norm(whole, dim=-1).clamp_min(1e-30)
    return float((torch.linalg.vector_norm(error, dim=-1) / sizes).square().mean().sqrt())
