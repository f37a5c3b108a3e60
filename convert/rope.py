"""Hugging Face's ways to say how rotary positions are stretched, resolved into one `RopeConfig` and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args

from convert.family import Fields
from jaxdecode.config import ModelConfig, RopeConfig, RopeKind


def parse_rope(config: Mapping[str, Any], max_position: int, problems: list[str]) -> RopeConfig:
    """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, as transformers resolves them.

    What cannot be read becomes a problem and the default comes back.
    """
    found: list[str] = []
    parameters = _parameters(config, found)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in get_args(RopeKind):
        found.append(
            f"config.json: rope_type {kind!r:.80} is not supported; supported are {', '.join(get_args(RopeKind))}"
        )
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        found.append(f"config.json: partial_rotary_factor {partial!r:.80} is not supported; it must be 1 or absent")
    fields = Fields({"rope_theta": config.get("rope_theta"), **parameters}, {"rope_theta": 10000.0}, found)
    values = {"theta": fields.number("rope_theta"), "kind": kind}
    if not found:
        values |= _KINDS[kind](fields, config, max_position)
    if not found:
        try:
            return RopeConfig(**values)
        except ValueError as error:
            found.append(f"config.json: {error}")
    problems += found
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


def _linear(fields: Fields, config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    return {"factor": fields.number("factor")}


def _dynamic(fields: Fields, config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    return {"factor": fields.number("factor"), "original_max_len": max_position}


def _llama3(fields: Fields, config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low == high:
        fields.problems.append(f"config.json: low_freq_factor and high_freq_factor must differ; both are {low}")
    return {"factor": fields.number("factor"), "low_freq_factor": low, "high_freq_factor": high,
            "original_max_len": _original(fields, config, max_position)}  # fmt: skip


def _yarn(fields: Fields, config: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    original, given = _original(fields, config, max_position), fields.config
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


def _original(fields: Fields, config: Mapping[str, Any], max_position: int) -> int:
    key = "original_max_position_embeddings"  # beside the parameters (as Phi3 writes it), it wins
    return Fields({key: config.get(key) or fields.config.get(key)}, {key: max_position}, fields.problems).integer(key)


_KINDS = {"default": lambda *_: {}, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}


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
