"""Hugging Face's ways to say how rotary positions are stretched, resolved into one `RopeConfig` and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from convert.family import Family, Fields
from jaxdecode.config import ModelConfig, RopeConfig


def parse_rope(fields: Fields, family: Family, max_position: int, head_dim: int) -> RopeConfig:
    """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, as transformers resolves them.

    What cannot be read becomes a problem and the default comes back.
    """
    found: list[str] = []
    config, partial = fields.config, family.partial_rotary
    parameters = _parameters(config, found)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in family.rope_kinds:
        found.append(
            f"config.json: rope_type {kind!r:.80} is not supported; supported are {', '.join(family.rope_kinds)}"
        )
    beside = {name: config.get(fields.key(name) or name) for name in ("rope_theta", "partial_rotary_factor")}
    own = Fields({**beside, **parameters}, {"rope_theta": 10000.0, "partial_rotary_factor": partial}, found)
    values = {"theta": own.number("rope_theta"), "rotary_dim": _rotary_dim(own, head_dim, partial)}
    if not found:
        values["kind"] = family.rope_kinds[kind]
        values |= _KINDS[values["kind"]](own, fields.get("original_max_position_embeddings"), max_position)
    if not found:
        try:
            return RopeConfig(**values)
        except ValueError as error:
            found.append(f"config.json: {error}")
    fields.problems += found
    return RopeConfig()


def _parameters(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    for key in ("rope_scaling", "rope_parameters"):  # transformers prefers the older key where both are given
        value = config.get(key)
        if value is not None and not isinstance(value, dict):
            problems.append(f"config.json: {key} must be an object or null; it is {value!r:.80}")
        elif value:
            return _same_for_all_layers(key, value, problems)
    return {}


def _same_for_all_layers(key: str, value: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`rope_parameters` may be nested by layer type; we have one rule for all layers."""
    nested = [inner for name, inner in value.items() if name in ("full_attention", "sliding_attention")]
    if not nested:
        return {name: inner for name, inner in value.items() if inner is not None}
    if any(inner != nested[0] for inner in nested) or not isinstance(nested[0], dict):
        problems.append(f"config.json: {key} differs between layer types, which is not supported")
        return {}
    return {name: inner for name, inner in nested[0].items() if inner is not None}


def _rotary_dim(fields: Fields, head_dim: int, partial: float | None) -> int | None:
    """How many dimensions of a head turn, None for all."""
    said = fields.get("partial_rotary_factor")
    if said in (None, 1):
        return None
    if partial is None:
        fields.problems.append(
            f"config.json: partial_rotary_factor {said!r:.80} is not supported; it must be 1 or absent"
        )
        return None
    turned = int(head_dim * fields.number("partial_rotary_factor"))
    return None if turned == head_dim else turned


def partial_to_hf(config: ModelConfig) -> float:
    """The share of a head that turns, such that `int(head_dim * share)` is the number of dimensions that do."""
    assert config.rope is not None  # rope_to_hf has refused that
    turned = config.rope.turned(config.head_dim)
    share = turned / config.head_dim
    return share if int(config.head_dim * share) == turned else math.nextafter(share, 2)


def _linear(fields: Fields, beside: Any, max_position: int) -> dict[str, Any]:
    return {"factor": fields.number("factor")}


def _dynamic(fields: Fields, beside: Any, max_position: int) -> dict[str, Any]:
    return {"factor": fields.number("factor"), "original_max_len": max_position}


def _llama3(fields: Fields, beside: Any, max_position: int) -> dict[str, Any]:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low == high:
        fields.problems.append(f"config.json: low_freq_factor and high_freq_factor must differ; both are {low}")
    return {"factor": fields.number("factor"), "low_freq_factor": low, "high_freq_factor": high,
            "original_max_len": _original(fields, beside, max_position)}  # fmt: skip


def _yarn(fields: Fields, beside: Any, max_position: int) -> dict[str, Any]:
    original, given = _original(fields, beside, max_position), fields.config
    factor = fields.number("factor") if given.get("factor") is not None else max_position / original
    return {
        "factor": factor, "original_max_len": original, "attention_factor": _attention_factor(fields, factor),
        "beta_fast": fields.number("beta_fast") if given.get("beta_fast") else 32.0,
        "beta_slow": fields.number("beta_slow") if given.get("beta_slow") else 1.0,
        "truncate": fields.flag("truncate") if "truncate" in given else True,
    }  # fmt: skip


def _attention_factor(fields: Fields, factor: float) -> float:
    if fields.config.get("attention_factor") is not None:
        return fields.number("attention_factor")

    def magnitude(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if fields.config.get("mscale") and fields.config.get("mscale_all_dim"):
        return magnitude(fields.number("mscale")) / magnitude(fields.number("mscale_all_dim"))
    return magnitude()


def _longrope(fields: Fields, beside: Any, max_position: int) -> dict[str, Any]:
    original, factors = _original(fields, beside, max_position), {}
    for name in ("short_factor", "long_factor"):
        given = fields.get(name)
        good = isinstance(given, list) and len(given) and all(map(_is_factor, given))
        if not good:
            fields.problems.append(f"config.json: {name} must be a list of positive numbers; it is {given!r:.80}")
        factors[f"{name}s"] = tuple(map(float, given)) if good else (1.0,)
    if fields.config.get("attention_factor") is not None:
        magnitude = fields.number("attention_factor")
    else:
        factor = fields.number("factor") if fields.config.get("factor") is not None else max_position / original
        magnitude = _longrope_magnitude(factor, original)
    if magnitude == math.inf:
        fields.problems.append("config.json: original_max_position_embeddings of a longrope must exceed 1; it is 1")
    return {"original_max_len": original, "attention_factor": magnitude, **factors}


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _longrope_magnitude(factor: float, original: int) -> float:
    if factor <= 1:
        return 1.0
    return math.inf if original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original(fields: Fields, beside: Any, max_position: int) -> int:
    key = "original_max_position_embeddings"  # beside the parameters (as Phi3 writes it), it wins
    return Fields({key: beside or fields.config.get(key)}, {key: max_position}, fields.problems).integer(key)


_KINDS = {
    "default": lambda *_: {}, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip


def rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which old and new transformers both read.

    Raises:
      ValueError: no rope, or a dynamic one whose original length is not `max_position`; a config.json cannot say that.
    """
    rope = config.rope
    if rope is None:
        raise ValueError(f"{config.model_type} has rotary positions; got learned ones")
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.kind == "dynamic" and rope.original_max_len != config.max_position:
        raise ValueError(
            f"a dynamic rope starts at max_position; got {rope.original_max_len} and {config.max_position}"
        )
    if rope.kind == "longrope":
        return _longrope_to_hf(config, rope)
    if rope.kind in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_max_len
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        scaling |= {
            "attention_factor": rope.attention_factor,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "truncate": rope.truncate,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _longrope_to_hf(config: ModelConfig, rope: RopeConfig) -> dict[str, Any]:
    """As Phi3 publishes it: older transformers take no other keys, so what they would compute is left out."""
    original = rope.original_max_len
    assert original is not None
    scaling: dict[str, Any] = {
        "type": "longrope", "short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)
    }  # fmt: skip
    if rope.attention_factor != _longrope_magnitude(config.max_position / original, original):
        scaling["attention_factor"] = rope.attention_factor
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "original_max_position_embeddings": original}
