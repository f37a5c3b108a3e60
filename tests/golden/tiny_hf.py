"""Random tiny models as Hugging Face stores them: a `config.json` and weights made from their names alone.

numpy only, so that the environment that makes the golden files and the one that tests against them build the
same weights: `RandomState` streams never change between numpy versions. The words here are Hugging Face's.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

PROMPT_LENGTHS = (1, 6, 19)
NEW_TOKENS = 12
TOLERANCE = (
    1e-4  # largest difference of a float32 logit or activation (they are of order 1) from transformers'
)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "glm": "GlmForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_COMMON = {
    "num_attention_heads": 4,
    "hidden_size": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "torch_dtype": "float32",
}


def _opt(**changes) -> dict:
    config = {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": 48,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "max_position_embeddings": 73,
        "word_embed_proj_dim": 24,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "activation_function": "relu",
        "tie_word_embeddings": True,
    }
    return _COMMON | config | changes


def _chatglm(**changes) -> dict:
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "padded_vocab_size": 48,
        "ffn_hidden_size": 40,
        "num_layers": 2,
        "kv_channels": 16,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "seq_length": 73,
        "layernorm_epsilon": 1e-5,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "post_layer_norm": True,
        "rmsnorm": True,
        "original_rope": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "quantization_bit": 0,
        "pre_seq_len": None,
        "tie_word_embeddings": False,
    }
    return _COMMON | config | changes


def _case(model_type: str, **changes) -> dict:
    config = {
        "model_type": model_type,
        "architectures": [_ARCHITECTURES[model_type]],
        "vocab_size": 72,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    return config | changes


def _gpt_neox(**changes) -> dict:
    config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 73,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return _COMMON | config | changes


def _small(model_type: str, **changes) -> dict:
    # Golden files of the later families are to be small.
    return _case(model_type, **_COMMON | {"vocab_size": 48, "intermediate_size": 40} | changes)


def _llama_rope(max_position: int = 64, **scaling) -> dict:
    # A small base and eight pairs: 19 positions tell the variants apart.
    rope = {"rope_theta": 100.0, "rope_scaling": scaling or None}
    return _case("llama", max_position_embeddings=max_position, head_dim=16, **rope)


def _phi3_longrope(original: int, **changes) -> dict:
    factors = {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.5, 4.0, 7.0]}
    lengths = {"max_position_embeddings": 120, "original_max_position_embeddings": original}
    return _small("phi3", rope_theta=100.0, rope_scaling={"type": "longrope", **factors}, **lengths, **changes)


def _gemma(model_type: str, **changes) -> dict:
    config = {"num_hidden_layers": 3, "head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5}
    config |= {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    return _small(model_type, **config | changes)


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3}

CASES: dict[str, dict] = {
    "llama": _case("llama"),
    "llama_tied": _case("llama", tie_word_embeddings=True),
    "llama_mha": _case("llama", num_key_value_heads=4),
    "llama_mqa": _case("llama", num_key_value_heads=1),
    "llama_head_dim": _case("llama", head_dim=12),
    "llama_bias": _case("llama", attention_bias=True, mlp_bias=True),
    "llama_attention_bias": _case("llama", attention_bias=True),
    "llama_mlp_bias": _case("llama", mlp_bias=True),
    "llama_gelu": _case("llama", hidden_act="gelu"),
    "llama_gelu_tanh": _case("llama", hidden_act="gelu_pytorch_tanh"),
    "llama_relu": _case("llama", hidden_act="relu"),
    "llama_eps": _case("llama", rms_norm_eps=0.3),
    "mistral": _case("mistral", sliding_window=None),
    "mistral_window": _case("mistral", sliding_window=5, num_hidden_layers=3),
    "mistral_head_dim": _case("mistral", sliding_window=16, head_dim=16, num_key_value_heads=1),
    "qwen2": _case("qwen2"),
    "qwen2_tied": _case("qwen2", tie_word_embeddings=True, num_key_value_heads=1),
    "qwen2_windows": _case("qwen2", max_window_layers=1, **_WINDOWS),
    "qwen2_windows_unused": _case("qwen2", sliding_window=5, use_sliding_window=False, max_window_layers=1),
    "qwen2_layer_types": _case(
        "qwen2", layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_WINDOWS
    ),
    "qwen3": _case("qwen3", head_dim=8),
    "qwen3_head_dim": _case("qwen3", head_dim=16, tie_word_embeddings=True),
    "qwen3_bias": _case("qwen3", head_dim=8, attention_bias=True),
    "qwen3_windows": _case("qwen3", head_dim=8, max_window_layers=2, **_WINDOWS),
    "rope_theta": _llama_rope(),
    "rope_parameters": _case(
        "llama", rope_theta=None, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 100.0}
    ),
    "rope_linear": _llama_rope(type="linear", factor=3.0),
    "rope_dynamic_below": _llama_rope(rope_type="dynamic", factor=3.0),
    "rope_dynamic_above": _llama_rope(max_position=12, rope_type="dynamic", factor=3.0),
    "rope_llama3": _llama_rope(rope_type="llama3", **_LLAMA3),
    "rope_yarn": _llama_rope(**_YARN, beta_fast=4.0, beta_slow=1.0),
    "rope_yarn_defaults": _llama_rope(**_YARN),
    "rope_yarn_attention_factor": _llama_rope(**_YARN, attention_factor=1.7),
    "rope_yarn_no_truncate": _llama_rope(**_YARN, beta_fast=4.0, beta_slow=1.0, truncate=False),
    "rope_yarn_mscale": _llama_rope(**_YARN, mscale=1.5, mscale_all_dim=0.4),
    "rope_yarn_qwen3": _case(
        "qwen3",
        head_dim=16,
        rope_parameters={**_YARN, "rope_theta": 100.0, "beta_fast": 8.0},
        rope_theta=None,
    ),
    "opt": _opt(),
    "opt_350m": _opt(do_layer_norm_before=False, word_embed_proj_dim=12),
    "opt_bare": _opt(enable_bias=False, _remove_final_layer_norm=True, tie_word_embeddings=False),
    "chatglm": _chatglm(),
    "chatglm_ratio": _chatglm(rope_ratio=0.01, kv_channels=24, multi_query_group_num=1, _name_or_path="chatglm3"),
    "glm": _small("glm", head_dim=16, attention_bias=True, partial_rotary_factor=0.5),
    "glm_bare": _small(
        "glm",
        head_dim=12,
        attention_bias=False,
        rope_theta=None,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        tie_word_embeddings=True,
    ),
    "gpt_neox": _gpt_neox(),
    "gpt_neox_sequential": _gpt_neox(use_parallel_residual=False, hidden_act="gelu_pytorch_tanh", rotary_emb_base=100),
    "gpt_neox_bare": _gpt_neox(attention_bias=False, num_attention_heads=3, rotary_pct=0.25, tie_word_embeddings=True),
    "phi3": _small("phi3", sliding_window=5, tie_word_embeddings=True),
    "phi3_longrope": _phi3_longrope(60),
    "phi3_longrope_long": _phi3_longrope(12),
    "phi3_longrope_part": _phi3_longrope(12, hidden_size=32, partial_rotary_factor=0.75),
    "gemma2": _gemma("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma2_uncapped": _gemma(
        "gemma2",
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "gemma3": _gemma(
        "gemma3_text",
        sliding_window_pattern=2,
        rope_theta=1000.0,
        rope_local_base_freq=10.0,
        rope_scaling={"rope_type": "linear", "factor": 3.0},
    ),
    "gemma3_parameters": _gemma(
        "gemma3_text",
        rope_theta=None,
        rope_parameters={"full_attention": {"rope_theta": 100.0}, "sliding_attention": {"rope_theta": 1000.0}},
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        final_logit_softcapping=5.0,
        tie_word_embeddings=True,
    ),
}
for _config in CASES.values():
    if _config.get("rope_theta", 1) is None:
        del _config["rope_theta"]


def vocab_size(config: dict) -> int:
    return config["padded_vocab_size" if config["model_type"] == "chatglm" else "vocab_size"]


def weight_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every weight of a case by its Hugging Face name, [out, in]."""
    own = {"opt": _opt_shapes, "chatglm": _chatglm_shapes, "gpt_neox": _gpt_neox_shapes}.get(config["model_type"])
    return own(config) if own else _llama_shapes(config)


def _opt_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, tokens = config["hidden_size"], config["ffn_dim"], config["word_embed_proj_dim"]
    shapes = {
        "embed_tokens.weight": (config["vocab_size"], tokens),
        "embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    if tokens != hidden:
        shapes |= {"project_in.weight": (hidden, tokens), "project_out.weight": (tokens, hidden)}
    norms = ["final_layer_norm"] if config["do_layer_norm_before"] and not config["_remove_final_layer_norm"] else []
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    linears |= {"fc1": (mlp, hidden), "fc2": (hidden, mlp)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if config["enable_bias"]:
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        norms += [f"layers.{layer}.{norm}" for norm in ("self_attn_layer_norm", "final_layer_norm")]
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    shapes = {f"model.decoder.{name}": shape for name, shape in shapes.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (config["vocab_size"], tokens)}


def _chatglm_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    heads, kv_heads, head_dim = (
        config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
    )
    shapes = {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }
    for layer in range(config["num_layers"]):
        prefix, qkv = f"transformer.encoder.layers.{layer}.", (heads + 2 * kv_heads) * head_dim
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attention.query_key_value.weight": (qkv, hidden),
            f"{prefix}self_attention.query_key_value.bias": (qkv,),
            f"{prefix}self_attention.dense.weight": (hidden, heads * head_dim),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * mlp, hidden),
            f"{prefix}mlp.dense_4h_to_h.weight": (hidden, mlp),
        }
    return shapes


def _gpt_neox_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes, norms = {"gpt_neox.embed_in.weight": (vocab, hidden)}, ["gpt_neox.final_layer_norm"]
    linears = {
        "attention.query_key_value": (3 * hidden, hidden, config["attention_bias"]),
        "attention.dense": (hidden, hidden, config["attention_bias"]),
        "mlp.dense_h_to_4h": (mlp, hidden, True),
        "mlp.dense_4h_to_h": (hidden, mlp, True),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}."
        for name, (out, inner, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out, inner)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
        norms += [prefix + norm for norm in ("input_layernorm", "post_attention_layernorm")]
    shapes |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    return shapes if config["tie_word_embeddings"] else shapes | {"embed_out.weight": (vocab, hidden)}


def _llama_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kind, kv_heads = config["model_type"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    qkv_bias = kind == "qwen2" or config.get("attention_bias", False)
    out_bias = kind != "qwen2" and config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)
    if kind == "glm":
        qkv_bias, out_bias = config["attention_bias"], False
    linears = {
        "self_attn.q_proj": (heads * head_dim, hidden, qkv_bias),
        "self_attn.k_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.v_proj": (kv_heads * head_dim, hidden, qkv_bias),
        "self_attn.o_proj": (hidden, heads * head_dim, out_bias),
        "mlp.gate_proj": (mlp, hidden, mlp_bias),
        "mlp.up_proj": (mlp, hidden, mlp_bias),
        "mlp.down_proj": (hidden, mlp, mlp_bias),
    }
    if kind == "phi3":
        for name in "qkv":
            del linears[f"self_attn.{name}_proj"]
        linears["self_attn.qkv_proj"] = ((heads + 2 * kv_heads) * head_dim, hidden, False)
    if kind in ("glm", "phi3"):
        del linears["mlp.gate_proj"], linears["mlp.up_proj"]
        linears["mlp.gate_up_proj"] = (2 * mlp, hidden, False)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (out, inner, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out, inner)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind.startswith("gemma"):
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in norms}
        if kind in ("qwen3", "gemma3_text"):
            shapes |= {f"{prefix}self_attn.{norm}.weight": (head_dim,) for norm in ("q_norm", "k_norm")}
    return shapes


def hf_weights(config: dict) -> dict[str, np.ndarray]:
    """Every weight of a case, float32, a function of its name and shape only."""
    return {name: _weight(name, shape) for name, shape in weight_shapes(config).items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(".bias"):
        values = 0.5 * normal
    elif len(shape) == 1:
        values = 1 + 0.3 * normal
    elif "embed" in name and "embed_out" not in name:
        values = normal
    else:
        # Queries and keys are made large, so that attention is sharp and a wrong position shows.
        gain = 2.0 if any(part in name for part in (".q_proj", ".k_proj", "query_key_value", "qkv_proj")) else 1.0
        values = gain * normal / np.sqrt(shape[1])
    return values.astype(np.float32)


def prompts(config: dict) -> list[list[int]]:
    """Token ids, a few lengths; the same for every case of one size of vocabulary."""
    random = np.random.RandomState(0)
    return [random.randint(3, vocab_size(config), size=length).tolist() for length in PROMPT_LENGTHS]


def write_hf_directory(folder: Path, config: dict) -> Path:
    """Writes config.json and model.safetensors of a case, as `save_pretrained` would."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(hf_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
