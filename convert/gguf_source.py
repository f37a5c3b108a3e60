"""A GGUF file seen as a Hugging Face checkpoint: metadata as config.json, tensors under their first names."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from convert.errors import ConversionError
from convert.gguf_file import GgufTensor, read_gguf
from convert.rows import half_split
from convert.sources import Read, Source, SourceTensor, fingerprint
from jaxdecode.safetensors_file import numpy_dtype

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's models are stored as "llama"
_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_TEXT = ("rope.scaling.type",)  # the only metadata read here that is not one number
_DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_LLAMA3_ORIGINAL_LENGTHS = (8192, 4096, 16384, 32768, 2048, 65536, 131072)


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of a supported architecture.

    Raises:
      ConversionError: not GGUF, damaged, split, of another architecture, or with metadata missing.
    """
    from convert.tokenizer import gguf_tokenizer_bytes, tokenizer_problems, write_gguf_tokenizer

    file = read_gguf(path)
    metadata, tensors = file.metadata, dict(file.tensors)
    if metadata.get("split.count") not in (None, 0, 1):
        raise ConversionError(
            f"{path} is one of {metadata['split.count']!s:.80} parts; merge them first: "
            f"llama-gguf-split --merge {path.name} MERGED.gguf"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ConversionError(
            f"{path} has GGUF architecture {architecture!r:.80}; supported are {', '.join(ARCHITECTURES)}"
        )
    factors = tensors.pop("rope_freqs.weight", None)
    config = _config(path, metadata, architecture, tensors)
    problems = [f"{path}: {problem}" for problem in tokenizer_problems(metadata)]
    if factors is not None:
        config |= _rope_from_factors(path, config, factors)
    return Source(
        path=path,
        kind="GGUF",
        config=config,
        generation_config={},
        tensors=_named(path, tensors, config, architecture, problems),
        problems=problems,
        fingerprint=fingerprint([path]),
        write_tokenizer=lambda target: write_gguf_tokenizer(metadata, target),
        tokenizer_bytes=0 if problems else gguf_tokenizer_bytes(metadata),
    )


def _named(
    path: Path, tensors: dict[str, GgufTensor], config: dict[str, Any], architecture: str, problems: list[str]
) -> dict[str, SourceTensor]:
    """Tensors under their Hugging Face names; llama.cpp interleaves the rows of llama's q and k."""
    named = {}
    for tensor in tensors.values():
        name = _hf_name(tensor.name)
        if name in named:
            problems.append(f"{path}: two tensors are {name!r:.80}, one of them {tensor.name!r:.80}")
        read = _rows(
            tensor, config["head_dim"] if architecture == "llama" and re.search(r"\.attn_[qk]\.", tensor.name) else None
        )
        named[name] = SourceTensor(
            name=name,
            stored=tensor.type_name,
            dtype=_dtype(tensor.type_name),
            shape=tensor.shape,
            where=path.name,
            read=read,
        )
    return named


def _config(path: Path, metadata: dict[str, Any], architecture: str, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """What config.json said before the model became a GGUF file."""
    needed = [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ]
    missing = [
        f"{path}: metadata lacks {architecture}.{key}" for key in needed if f"{architecture}.{key}" not in metadata
    ]
    if missing:
        raise ConversionError(missing)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if (value is not None and isinstance(value, str) != (key in _TEXT)) or isinstance(value, list | bool):
            raise ConversionError(f"{path}: {architecture}.{key} has the wrong type: {value!r:.80}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"{path}: {architecture}.{key} is {value}")
        return value

    heads = get("attention.head_count")
    if not isinstance(heads, int) or heads <= 0:
        raise ConversionError(f"{path}: {architecture}.attention.head_count must be positive; got {heads}")
    head_dim = get("attention.key_length") or get("embedding_length") // heads
    embed = tensors.get("token_embd.weight")
    window = get("attention.sliding_window")
    config = {
        "model_type": "mistral" if architecture == "llama" and window else architecture,
        "vocab_size": embed.shape[0] if embed else get("vocab_size"),
        "hidden_size": get("embedding_length"), "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads), "head_dim": head_dim,
        "max_position_embeddings": get("context_length"), "hidden_act": "silu",
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)), "rope_scaling": _rope_scaling(path, get),
        "sliding_window": window or None,
        "attention_bias": "blk.0.attn_q.bias" in tensors and architecture != "qwen2",
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": _eos(metadata),
    }  # fmt: skip
    if get("rope.dimension_count", head_dim) != head_dim:
        config["partial_rotary_factor"] = get("rope.dimension_count") / max(head_dim, 1)
    if get("expert_count"):
        raise ConversionError(f"{path} is a mixture of {get('expert_count')} experts; only dense models are supported")
    return config


def _shortest(value: Any) -> Any:
    """The shortest decimal that is this float32: metadata stores 1e-5 as 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 3.4e38 else value


def _eos(metadata: dict[str, Any]) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [metadata[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in metadata]
    return found if any(isinstance(token, list) for token in found) else list(dict.fromkeys(found))


def _rope_scaling(path: Path, get) -> dict[str, Any] | None:
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor") or get("rope.scale_linear")
    if kind in (None, "none") and not (kind is None and factor and factor != 1.0):
        return None
    kind = kind or "linear"
    if not factor or factor < 0:
        raise ConversionError(f"{path}: rope scaling {kind!r} needs a positive factor; got {factor}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ConversionError(
            f"{path}: rope scaling {kind!r} of a GGUF file is not supported; linear, yarn and Llama 3's are"
        )
    keys = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow",
            "original_max_position_embeddings": "rope.scaling.original_context_length"}  # fmt: skip
    scaling = {name: get(key) for name, key in keys.items() if get(key) is not None}
    if get("rope.scaling.attn_factor") not in (None, 1.0):
        # llama.cpp multiplies its own 1 + 0.1 ln(factor) by this
        scaling["attention_factor"] = get("rope.scaling.attn_factor") * (1 + 0.1 * math.log(factor))
    return {"rope_type": "yarn", "factor": factor, **scaling}


def _rope_from_factors(path: Path, config: dict[str, Any], table: GgufTensor) -> dict[str, Any]:
    """Llama 3's parameters, found again from the table of divisors that replaces them in a GGUF file.

    Raises:
      ConversionError: no such parameters give this table.
    """
    if config["rope_theta"] <= 0 or config["head_dim"] <= 0:
        return {}  # refused for that
    half = config["head_dim"] // 2
    if table.shape != (half,) or table.type_name not in _DENSE:
        raise ConversionError(
            f"{path}: rope_freqs.weight is {table.type_name}{list(table.shape)}; heads of {config['head_dim']} need "
            f"F32[{half}]"
        )
    factors = _rows(table)(0, half).astype(np.float64)
    if np.allclose(factors, 1.0, rtol=1e-5):
        return {}
    if not (np.isfinite(factors).all() and factors.min() > 0):
        raise ConversionError(f"{path}: rope_freqs.weight holds {factors.min()} to {factors.max()}; expected divisors")
    factor = float(factors.max())
    wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    for original in _LLAMA3_ORIGINAL_LENGTHS:
        smooth = (original / wavelengths - 1.0) / (4.0 - 1.0)
        expected = 1.0 / ((1 - smooth) / factor + smooth)
        expected = np.where(wavelengths < original / 4.0, 1.0, np.where(wavelengths > original, factor, expected))
        if np.allclose(factors, expected, rtol=1e-3):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
            return {"rope_scaling": scaling}
    raise ConversionError(
        f"{path}: rope_freqs.weight does not follow Llama 3's rule (factors from {factors.min():.4g} to "
        f"{factors.max():.4g}); such positions are not supported"
    )


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    module, _, suffix = name.rpartition(".")
    return f"{_MODEL[module]}.{suffix}" if module in _MODEL else name


def _rows(tensor: GgufTensor, head_dim: int | None = None) -> Read:
    """Reader of dense rows; with `head_dim`, from llama.cpp's interleaved order back to half-split.

    A one-dimensional tensor is one row of blocks in the file; its "rows" are its elements.
    """
    flat = len(tensor.shape) == 1

    def split(start: int, stop: int) -> np.ndarray:
        return half_split(np.arange(start, stop), head_dim or 0, head_dim or 0)

    def read(start: int, stop: int) -> np.ndarray:
        if flat:
            values = _dense(tensor.type_name, tensor.rows, tensor.shape[-1])[0]
            return values[split(start, stop)] if head_dim else values[start:stop]
        rows = tensor.rows[split(start, stop) if head_dim else slice(start, stop)]
        return _dense(tensor.type_name, rows, tensor.shape[-1])

    return read


@functools.cache
def _dtype(type_name: str) -> str:
    """The numpy name of what `_dense` makes of a type; of one that it cannot read, the type's own."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if type_name in _DENSE:
        return _DENSE[type_name]
    kind = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return type_name
    return "float32"


def _dense(type_name: str, rows: np.ndarray, columns: int) -> np.ndarray:
    if type_name in _DENSE:
        return np.ascontiguousarray(rows).view(numpy_dtype(_DENSE[type_name])).reshape(-1, columns)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    return dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[type_name])
