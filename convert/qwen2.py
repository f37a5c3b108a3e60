"""Qwen2's table: Llama's names, biases on q, k and v, sliding windows on some layers."""

from __future__ import annotations

from typing import Any

from convert.family import Family, Fields
from convert.llama import IGNORED, LAYER, MODEL
from jaxdecode.config import ModelConfig

DEFAULTS = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 4096,
    "max_window_layers": 28,
}  # fmt: skip


def layer_windows(fields: Fields) -> tuple[int | None, ...]:
    """The window of each layer, from `layer_types` or the older `max_window_layers`; empty if none."""
    layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window") if fields.flag("use_sliding_window") else None
    types = fields.config.get("layer_types")
    if types is None:
        first = fields.config.get("max_window_layers", fields.defaults["max_window_layers"])
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            fields.problems.append(f"config.json: max_window_layers must be a natural number; it is {first!r:.80}")
            return ()
        types = [
            "full_attention" if layer < first or window is None else "sliding_attention" for layer in range(layers)
        ]
    return typed_windows(fields, types, window)


def typed_windows(fields: Fields, types: Any, window: int | None) -> tuple[int | None, ...]:
    """The window of each layer by what `layer_types` calls it; empty if there is none."""
    layers = fields.integer("num_hidden_layers")
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        fields.problems.append(
            f"config.json: layer_types must name full_attention or sliding_attention for each of {layers} "
            f"layers; it is {types!r:.80}"
        )
        return ()
    if "sliding_attention" in types and window is None:
        fields.problems.append(_no_window(fields))
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _no_window(fields: Fields) -> str:
    """Why layers that have a window have none; some families give windows to layers of which nothing is said."""
    told = "layer_types names sliding_attention" if fields.config.get("layer_types") else (
        f"layer_types is absent, by which some layers of a {fields.config.get('model_type')} have a window"
    )  # fmt: skip
    off = "sliding_window is null" if fields.config.get("sliding_window", 0) is None else "use_sliding_window is false"
    return f"config.json: {told}, but {off}; give its length, or name full_attention for every layer in layer_types"


def windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `layer_windows`, and of `typed_windows`.

    Raises:
      ValueError: layers have windows of different lengths, which these families cannot say.
    """
    lengths = {window for window in config.layer_windows if window is not None}
    if len(lengths) > 1:
        raise ValueError(f"{config.model_type} knows one window length for all layers; got {sorted(lengths)}")
    types = [
        "full_attention" if config.window(layer) is None else "sliding_attention" for layer in range(config.num_layers)
    ]
    window = next(iter(lengths), None)
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}


def _features(fields: Fields) -> dict[str, Any]:
    return {"qkv_bias": True, "layer_windows": layer_windows(fields)}


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    model=MODEL,
    layer=LAYER,
    ignored=IGNORED,
    defaults=DEFAULTS,
    features=_features,
    to_hf=windows_to_hf,
)
