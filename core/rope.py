"""Rotary position embedding: which frequencies a checkpoint asks for, and what scales cos and sin.

Source: Hugging Face transformers 5.23.0, `modeling_rope_utils.py` (`_compute_linear_scaling_rope_parameters`,
`_compute_yarn_parameters`, `standardize_rope_params`); YaRN, arXiv:2309.00071 (NTK-by-parts and attention temperature).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, UnsupportedModelError
from qwen_rt.strict_json import check_bool, check_float, check_int, name_some, show

__all__ = ["RopeKind", "RopeSpec", "check_head_dim"]

RopeKind = Literal["default", "linear", "yarn"]

_MAX_HEAD_DIM = 65_536
_MAX_THETA = 1e12
_MAX_FACTOR = 1e6
_KEYS_OF_ALL_KINDS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS_OF_KIND = {
    "default": _KEYS_OF_ALL_KINDS,
    "linear": _KEYS_OF_ALL_KINDS | {"factor"},
    "yarn": _KEYS_OF_ALL_KINDS
    | {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}
    | {"attention_factor", "mscale", "mscale_all_dim", "truncate"},
}
_FIX_CHOOSE = "choose a checkpoint with plain, linear or YaRN rope over whole heads"
_FIX_BOTH = "keep one of the two in config.json"


@dataclass(frozen=True)
class RopeSpec:
    """The rotary embedding of one model, every value checked.

    Attributes:
        theta: Base of the geometric series of wavelengths.
        kind: Which formula; `factor` counts for linear and yarn, the fields after it for yarn alone.
        factor: How many times longer the context is than it was in training, at least 1.
        original_max_position_embeddings: Positions in training, before the extension.
        beta_fast: Turns over the original context above which a dimension keeps its frequency.
        beta_slow: Turns below which a dimension is interpolated by the whole `factor`.
        attention_factor: What multiplies cos and sin; None derives it.
        mscale: Weight in the numerator of the derived factor.
        mscale_all_dim: Weight in its denominator; both or neither count.
        truncate: Whether the bounds of the ramp are rounded outwards to whole dimensions.
    """

    theta: float = 10_000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        self._check_float("theta", 1.0, _MAX_THETA)
        if self.kind not in get_args(RopeKind):
            raise _unsupported_kind(self.kind)
        self._check_float("factor", 0.0, _MAX_FACTOR)
        if self.factor < 1.0 or (self.kind == "default" and self.factor != 1.0):
            expected = "1 for the default rope" if self.kind == "default" else "1 or more"
            raise CheckpointError(f"rope factor={show(self.factor)}", expected, "correct rope_scaling in config.json")
        if self.kind == "yarn" or self.original_max_position_embeddings is not None:
            check_int("original_max_position_embeddings", self.original_max_position_embeddings)
        self._check_float("beta_fast", 0.0, _MAX_FACTOR)
        self._check_float("beta_slow", 0.0, self.beta_fast)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                self._check_float(name, 0.0, _MAX_FACTOR)
        check_bool("truncate", self.truncate)

    def _check_float(self, name: str, low: float, high: float) -> None:
        """Check a field and make it a float: JSON may write 10000 for 10000.0."""
        value = check_float("rope_theta" if name == "theta" else name, getattr(self, name), low, high)
        object.__setattr__(self, name, value)

    @classmethod
    def from_config(cls, config: dict[str, Any], max_position_embeddings: int) -> RopeSpec:
        """Read `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

        Args:
            config: The parsed `config.json`.
            max_position_embeddings: The default of `original_max_position_embeddings`.

        Raises:
            UnsupportedModelError: A kind other than default, linear and yarn, or a key that its formula does not take.
            CheckpointError: A value of the wrong type or range, or two keys that contradict each other.
        """
        source, given = _rope_object(config)
        kind = _agree(source, "rope_type", given.get("rope_type"), "type", given.get("type"))
        kind = cls.kind if kind is None else kind
        if not isinstance(kind, str) or kind not in _KEYS_OF_KIND:
            raise _unsupported_kind(kind)
        unknown = {key for key, value in given.items() if value is not None and key not in _KEYS_OF_KIND[kind]}
        if unknown:
            raise UnsupportedModelError(
                f"{source} has {name_some(unknown)}, which rope_type={show(kind)} does not take",
                name_some(_KEYS_OF_KIND[kind] - _KEYS_OF_ALL_KINDS) or "no further keys",
                _FIX_CHOOSE,
            )
        for where, values in ((source, given), ("config.json", config)):
            if values.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise UnsupportedModelError(
                    f"partial_rotary_factor={show(values['partial_rotary_factor'])} in {where}", "1", _FIX_CHOOSE
                )
        theta = _agree(source, "rope_theta", given.get("rope_theta"), "rope_theta", config.get("rope_theta"))
        fields: dict[str, Any] = {"theta": cls.theta if theta is None else theta, "kind": kind}
        fields |= {
            field.name: given[field.name]
            for field in dataclasses.fields(cls)
            if field.name not in fields and given.get(field.name) is not None
        }
        if kind == "yarn":
            key = "original_max_position_embeddings"
            original = _agree(source, key, given.get(key), key, config.get(key))
            fields[key] = check_int(key, max_position_embeddings if original is None else original)
            if "factor" in given:
                fields.setdefault("factor", max_position_embeddings / fields[key])
        if kind != "default" and "factor" not in fields:
            raise CheckpointError(
                f"{source} lacks factor", f"a number for rope_type={show(kind)}", f"add it to {source}"
            )
        return cls(**fields)

    @property
    def attention_scaling(self) -> float:
        """What multiplies cos and sin: 1, or YaRN's 0.1 ln(factor) + 1."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        log_factor = 0.1 * math.log(self.factor)
        if self.mscale is not None and self.mscale_all_dim is not None:
            return (log_factor * self.mscale + 1.0) / (log_factor * self.mscale_all_dim + 1.0)
        return log_factor + 1.0

    def inv_freq(self, head_dim: int) -> NDArray[np.float32]:
        """Compute the angle in radians that each pair of dimensions turns per position.

            default  theta^(-2i/D)
            linear   theta^(-2i/D) / factor
            yarn     theta^(-2i/D) · ((1 - r_i) + r_i / factor), r the ramp from 0 (fast) to 1 (slow dimensions)

        Computed in float64 and rounded once, so that it does not depend on the machine's vector `pow`; transformers
        computes in float32 and lands within a few units in the last place.

        Args:
            head_dim: D, even.

        Returns:
            f32[D/2], from the fastest to the slowest.

        Raises:
            CheckpointError: `head_dim` is not in 2..65536.
            UnsupportedModelError: `head_dim` is odd.
        """
        check_head_dim(head_dim)
        frequencies = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [D/2]
        if self.kind == "linear":
            frequencies /= self.factor
        elif self.kind == "yarn":
            ramp = self._yarn_ramp(head_dim)
            frequencies *= (1.0 - ramp) + ramp / self.factor
        return frequencies.astype(np.float32)

    def _yarn_ramp(self, head_dim: int) -> NDArray[np.float64]:
        """How far each pair of dimensions is interpolated, 0 to 1: f64[D/2] (YaRN's 1 - gamma)."""
        original = self.original_max_position_embeddings or 1

        def dimension_of(num_turns: float) -> float:
            """The dimension that makes `num_turns` turns over the original context."""
            return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension_of(self.beta_fast), dimension_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001  # as the source does: a step instead of a division by zero
        return np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)


def check_head_dim(head_dim: object) -> None:
    """Refuse a head that cannot be rotated in pairs or would allocate without bound.

    Raises:
        CheckpointError: Not an integer in 2..65536.
        UnsupportedModelError: Odd.
    """
    if check_int("head_dim", head_dim, 1, _MAX_HEAD_DIM) % 2:
        raise UnsupportedModelError(
            f"head_dim={head_dim}", "an even number: rope turns pairs of dimensions", "choose another checkpoint"
        )


def _unsupported_kind(kind: object) -> UnsupportedModelError:
    return UnsupportedModelError(f"rope_type={show(kind)}", "default, linear or yarn", _FIX_CHOOSE)


def _rope_object(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Find the one object that holds the rope settings: (its name, its keys), empty if there is none."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"{name}={show(value)}", "an object or null", "correct config.json")
        if value:
            found.append((name, value))
    if len(found) == 2 and found[0][1] != found[1][1]:
        # transformers would take rope_scaling and silently forget the rope_theta of rope_parameters.
        raise CheckpointError("rope_scaling and rope_parameters differ", "one of them", _FIX_BOTH)
    return found[0] if found else ("rope_scaling", {})


def _agree(source: str, inner_name: str, inner: Any, outer_name: str, outer: Any) -> Any:
    """Return the one value that is not None; refuse two that differ."""
    if inner is not None and outer is not None and inner != outer:
        raise CheckpointError(
            f"{inner_name}={show(inner)} in {source} contradicts {outer_name}={show(outer)}", "equal values", _FIX_BOTH
        )
    return outer if inner is None else inner
