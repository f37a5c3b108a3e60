"""Hugging Face's `config.json` to `ModelConfig` and back; their words stop here and in the family tables."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from convert import chatglm, gemma2, gemma3_text, glm, gpt_neox, llama, mistral, opt, phi3, qwen2, qwen3
from convert.errors import ConversionError
from convert.family import Family, Fields
from convert.rope import parse_rope, partial_to_hf, rope_to_hf
from jaxdecode.config import ModelConfig

_TABLES = (llama, mistral, qwen2, qwen3, opt, chatglm, glm, gpt_neox, phi3, gemma2, gemma3_text)
FAMILIES: dict[str, Family] = {table.FAMILY.model_type: table.FAMILY for table in _TABLES}
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu",
}  # fmt: skip
_TO_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def find_family(config: Mapping[str, Any]) -> Family:
    """The table for a config.json.

    Raises:
      ConversionError: an unsupported model_type; names those supported and the nearest.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    supported = f"supported are {', '.join(FAMILIES)}"
    if not isinstance(model_type, str):
        raise ConversionError(f"config.json: model_type must be a string; it is {model_type!r:.80}; {supported}")
    nearest = difflib.get_close_matches(model_type[:40].lower(), FAMILIES, n=1, cutoff=0.5)
    hint = f"; the nearest is {nearest[0]}" if nearest else ""
    raise ConversionError(f"config.json: unknown model_type {model_type!r:.80}; {supported}{hint}")


def parse_config(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> ModelConfig:
    """Translate a config.json.

    Raises:
      ConversionError: everything that is missing, of the wrong type or not supported, at once.
    """
    family, problems = find_family(config), list[str]()
    fields = Fields(config, family.defaults, problems, family.names)
    heads, embed_dim = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    max_position = fields.integer("max_position_embeddings")
    values = {
        "model_type": family.model_type,
        "vocab_size": fields.integer("vocab_size"),
        "embed_dim": embed_dim,
        "mlp_dim": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _kv_heads(fields, heads),
        "head_dim": _head_dim(fields, embed_dim, heads),
        "max_position": max_position,
        "norm_eps": fields.number("rms_norm_eps"),
        "activation": _activation(fields),
        "tied_embeddings": fields.flag("tie_word_embeddings"),
        "eos_token_ids": _eos_token_ids(generation_config, config, problems),
        **family.features(fields),
    }
    if family.rope_keys:
        values["rope"] = parse_rope(fields, family, max_position, values["head_dim"])
    _refuse_quantised(config, problems)
    if problems:
        raise ConversionError(list(dict.fromkeys(problems)))
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ConversionError(f"config.json: {error}") from error


def to_hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json that `parse_config` reads back as `config`.

    Raises:
      ConversionError: the family's config.json cannot say what `config` says.
    """
    if config.model_type not in FAMILIES:
        raise ConversionError(
            f"unknown model_type {config.model_type!r}; supported are {', '.join(FAMILIES)}", "cannot export"
        )
    family, eos = FAMILIES[config.model_type], list(config.eos_token_ids)
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": _TO_ACTIVATION[config.activation],
        "tie_word_embeddings": config.tied_embeddings,
    }
    fields = {
        "architectures": [family.architecture],
        "model_type": config.model_type,
        **{key: value for name, value in values.items() if (key := family.names.get(name, name)) is not None},
        "torch_dtype": dtype,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    try:
        fields |= (_rope_fields(config, family) if family.rope_keys else {}) | family.to_hf(config)
    except ValueError as error:
        raise ConversionError(str(error), "cannot export") from error
    if parse_config(fields, {}) != config:
        raise ConversionError(f"no {config.model_type} config.json means {config}", "cannot export")
    return fields


def _rope_fields(config: ModelConfig, family: Family) -> dict[str, Any]:
    fields = rope_to_hf(config)
    if family.partial_rotary is not None:
        fields["partial_rotary_factor"] = partial_to_hf(config)
    return {family.names.get(name) or name: value for name, value in fields.items()}


def _kv_heads(fields: Fields, heads: int) -> int:
    """As many as heads where config.json says null, as in transformers; only absence takes the family's default."""
    key = fields.key("num_key_value_heads")
    said = fields.config.get(key, fields.defaults.get("num_key_value_heads")) if key else None
    return heads if said is None else fields.integer("num_key_value_heads")


def _head_dim(fields: Fields, embed_dim: int, heads: int) -> int:
    if fields.get("head_dim") is None:
        if embed_dim % heads:
            fields.problems.append(
                f"config.json: without head_dim, hidden_size must be a multiple of num_attention_heads; got "
                f"{embed_dim} and {heads}"
            )
        return max(embed_dim // heads, 1)
    return fields.integer("head_dim")


def _activation(fields: Fields) -> str:
    key = fields.key("hidden_act")
    name = fields.config.get(key, fields.defaults.get("hidden_act", "silu")) if key else "silu"
    if not isinstance(name, str) or name not in ACTIVATIONS:
        fields.problems.append(
            f"config.json: {key} {name!r:.80} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
        return "silu"
    return ACTIVATIONS[name]


def _eos_token_ids(generation: Mapping[str, Any], config: Mapping[str, Any], problems: list[str]) -> tuple[int, ...]:
    """Every end-of-sequence token that either file names, generation_config.json's first."""
    ids: dict[int, None] = {}
    for file, fields in (("generation_config.json", generation), ("config.json", config)):
        value = fields.get("eos_token_id")
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 31:
                ids[token] = None
            else:
                problems.append(f"{file}: eos_token_id must be a token or a list of tokens; it is {value!r:.80}")
    return tuple(ids)


def _refuse_quantised(config: Mapping[str, Any], problems: list[str]) -> None:
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        problems.append(
            f"config.json: the weights are quantised ({method!r:.80}), which is not supported; convert the "
            "original or a GGUF file"
        )
