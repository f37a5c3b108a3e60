"""config.json in all its spellings."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made import small_case, tiny_hf

from convert import ConversionError
from convert.hf_config import parse_config, to_hf_config
from jaxdecode.config import ModelConfig, RopeConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = {"short_factor": [1, 1.5, 2], "long_factor": [1.5, 4, 7]}


def longrope(original: int, max_position: int = 120, **changes) -> RopeConfig:
    magnitude = math.sqrt(1 + math.log(max(max_position / original, 1)) / math.log(original))
    fields = {"attention_factor": magnitude} | changes
    return RopeConfig(
        kind="longrope", theta=100.0, original_max_len=original, short_factors=(1.0, 1.5, 2.0),
        long_factors=(1.5, 4.0, 7.0), **fields,
    )  # fmt: skip


YARN_FACTOR = 0.1 * math.log(4) + 1
# changes to a config.json of max_position_embeddings 64 and rope_theta 10000 -> what they mean
ROPES: dict[str, tuple[dict, RopeConfig]] = {
    "nothing said": ({"rope_theta": None}, RopeConfig()),
    "theta": ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
    "theta in rope_parameters wins": ({"rope_parameters": {"rope_theta": 7.0}}, RopeConfig(theta=7.0)),
    "rope_scaling wins over rope_parameters": (
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 7.0}},
        RopeConfig(kind="linear", factor=2.0),
    ),
    "empty rope_scaling is none": ({"rope_scaling": {}, "rope_parameters": {"rope_theta": 7}}, RopeConfig(theta=7.0)),
    "type default": ({"rope_scaling": {"rope_type": "default"}}, RopeConfig()),
    "rope_type wins over type": (
        {"rope_scaling": {"type": "su", "rope_type": "linear", "factor": 3.0}},
        RopeConfig(kind="linear", factor=3.0),
    ),
    "dynamic starts at max_position_embeddings": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
        RopeConfig(kind="dynamic", factor=2.0, original_max_len=64),
    ),
    "llama3 without an original length": (
        {"rope_scaling": LLAMA3}, RopeConfig(kind="llama3", factor=8.0, original_max_len=64),
    ),
    "the original length beside the parameters wins": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "original_max_position_embeddings": 32},
        RopeConfig(kind="llama3", factor=8.0, original_max_len=32),
    ),
    "yarn": (
        {"rope_scaling": YARN}, RopeConfig(kind="yarn", factor=4.0, original_max_len=16, attention_factor=YARN_FACTOR),
    ),
    "yarn with nulls": (
        {"rope_scaling": YARN | {"beta_fast": None, "attention_factor": None, "mscale": None}},
        RopeConfig(kind="yarn", factor=4.0, original_max_len=16, attention_factor=YARN_FACTOR),
    ),
    "yarn's factor from the lengths": (
        {"rope_scaling": YARN | {"factor": None}},
        RopeConfig(kind="yarn", factor=4.0, original_max_len=16, attention_factor=YARN_FACTOR),
    ),
    "yarn, everything said": (
        {"rope_parameters": YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False, "attention_factor": 1.5}},
        RopeConfig(kind="yarn", factor=4.0, original_max_len=16, beta_fast=8.0, beta_slow=2.0, truncate=False,
                   attention_factor=1.5),
    ),
    "yarn with mscale": (
        {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}},
        RopeConfig(kind="yarn", factor=4.0, original_max_len=16,
                   attention_factor=(0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    ),
    "mscale alone counts for nothing": (
        {"rope_scaling": YARN | {"mscale": 2.0}},
        RopeConfig(kind="yarn", factor=4.0, original_max_len=16, attention_factor=YARN_FACTOR),
    ),
    "the same rule for both layer types": (
        {"rope_parameters": {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 7.0}}},
        RopeConfig(theta=7.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rope(name):
    changes, expected = ROPES[name]
    rope = parse_config(small_case(**changes), {}).rope
    assert rope.attention_factor == pytest.approx(expected.attention_factor)
    assert dataclasses.replace(rope, attention_factor=1.0) == dataclasses.replace(expected, attention_factor=1.0)


WINDOWS = {
    "mistral says nothing: its default": ("mistral", {"sliding_window": ...}, (4096, 4096)),
    "mistral null": ("mistral", {"sliding_window": None}, ()),
    "mistral": ("mistral", {"sliding_window": 7}, (7, 7)),
    "llama has none": ("llama", {"sliding_window": 7}, ()),
    "qwen2 off": ("qwen2", {"sliding_window": 7, "max_window_layers": 0}, ()),
    "qwen2 on": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, (None, 7)),
    "qwen2 beyond the last layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 7}, ()),
    "qwen3 layer_types": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
        (7, None),
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name):
    family, changes, expected = WINDOWS[name]
    config = {key: value for key, value in (tiny_hf.CASES[family] | changes).items() if value is not ...}
    assert parse_config(config, {}).layer_windows == expected


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("llama", {"num_key_value_heads": None}, {"num_kv_heads": 4}),
        *[(case, {"num_key_value_heads": None, "num_attention_heads": 16, "head_dim": 8}, {"num_kv_heads": 16})
          for case in ("llama", "mistral", "qwen2", "qwen3", "phi3")],
        *[(case, {"num_key_value_heads": ..., "num_attention_heads": 64, "head_dim": 8}, {"num_kv_heads": count})
          for case, count in {"llama": 64, "mistral": 8, "qwen2": 32, "qwen3": 32, "phi3": 64, "glm": 2}.items()],
        ("llama", {"head_dim": None}, {"head_dim": 8}),
        ("qwen3", {"head_dim": None}, {"head_dim": 128}),
        ("llama", {"rms_norm_eps": None}, {"norm_eps": 1e-6}),
        ("llama", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True, "mlp_bias": False}),
        ("llama", {"mlp_bias": True}, {"qkv_bias": False, "out_bias": False, "mlp_bias": True}),
        ("qwen2", {"attention_bias": False}, {"qkv_bias": True, "out_bias": False, "qk_norm": False}),
        ("qwen3", {"attention_bias": True}, {"qkv_bias": True, "out_bias": True, "qk_norm": True}),
        ("llama", {"hidden_act": "gelu_new"}, {"activation": "gelu_tanh"}),
        ("llama", {"eos_token_id": [3, 4]}, {"eos_token_ids": (3, 4)}),
        ("llama", {"eos_token_id": None}, {"eos_token_ids": ()}),
        ("opt", {}, {"norm": "layer", "gated_mlp": False, "activation": "relu", "rope": None, "token_dim": None}),
        ("opt", {"word_embed_proj_dim": None, "activation_function": ...}, {"token_dim": None, "activation": "relu"}),
        ("opt", {"do_layer_norm_before": ..., "enable_bias": ...}, {"post_norm": False, "mlp_bias": True}),
        ("opt", {"tie_word_embeddings": ..., "max_position_embeddings": ...}, {"tied_embeddings": True,
                                                                               "max_position": 2048}),
        ("opt_350m", {}, {"post_norm": True, "final_norm": False, "token_dim": 12, "norm_eps": 1e-5, "head_dim": 6}),
        ("chatglm", {}, {"num_kv_heads": 2, "head_dim": 16, "rope": RopeConfig(rotary_dim=8), "qkv_bias": True}),
        ("chatglm", {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm3-6b-32k"},
         {"rope": RopeConfig(theta=500_000.0, rotary_dim=8)}),
        ("chatglm", {"post_layer_norm": False, "add_bias_linear": True}, {"final_norm": False, "out_bias": True}),
        ("glm", {}, {"rope": RopeConfig(rotary_dim=8), "qkv_bias": True, "out_bias": False}),
        ("glm", {"partial_rotary_factor": ..., "attention_bias": ...}, {"rope": RopeConfig(rotary_dim=8),
                                                                        "qkv_bias": True}),
        ("glm", {"partial_rotary_factor": 1.0}, {"rope": RopeConfig()}),
        ("phi3", {}, {"layer_windows": (5, 5), "rope": RopeConfig(), "qkv_bias": False}),
        ("phi3", {"sliding_window": ...}, {"layer_windows": ()}),
        ("phi3_longrope", {}, {"rope": longrope(60)}),
        ("phi3_longrope", {"original_max_position_embeddings": 240}, {"rope": longrope(240, attention_factor=1.0)}),
        ("phi3_longrope", {"rope_scaling": FACTORS | {"type": "su", "attention_factor": 1.5}},
         {"rope": longrope(60, attention_factor=1.5)}),
        ("phi3_longrope", {"rope_scaling": FACTORS | {"type": "yarn", "factor": 8.0}},
         {"rope": longrope(60, attention_factor=math.sqrt(1 + math.log(8) / math.log(60)))}),
        ("phi3_longrope", {"original_max_position_embeddings": ..., "max_position_embeddings": 8192,
                           "rope_scaling": FACTORS | {"rope_type": "longrope", "original_max_position_embeddings": 9}},
         {"rope": longrope(4096, attention_factor=math.sqrt(1 + math.log(2) / math.log(4096)))}),
        ("phi3_longrope_part", {}, {"rope": longrope(12, rotary_dim=6, max_position=120)}),
        ("gemma2", {}, {"layer_windows": (5, None, 5), "scale_dim": 12, "attention_soft_cap": 2.0,
                        "logit_soft_cap": 5.0, "norm_offset": 1.0, "embed_scale": 24**0.5, "activation": "gelu_tanh"}),
        ("gemma2", {"final_logit_softcapping": ..., "attn_logit_softcapping": ..., "query_pre_attn_scalar": ...,
                    "sliding_window": ..., "head_dim": ..., "tie_word_embeddings": ...},
         {"logit_soft_cap": 30.0, "attention_soft_cap": 50.0, "scale_dim": 256, "layer_windows": (4096, None, 4096),
          "head_dim": 256, "tied_embeddings": True}),
        ("gemma2_uncapped", {}, {"layer_windows": (None, 5, 5), "attention_soft_cap": None, "logit_soft_cap": None,
                                 "qkv_bias": True, "out_bias": True}),
        ("gemma3", {}, {"layer_windows": (5, None, 5), "qk_norm": True, "attention_soft_cap": None,
                        "rope": RopeConfig(kind="linear", theta=1000.0, factor=3.0),
                        "local_rope": RopeConfig(theta=10.0)}),
        ("gemma3", {"sliding_window_pattern": ..., "rope_theta": ..., "rope_local_base_freq": ...},
         {"layer_windows": (5, 5, 5), "rope": RopeConfig(kind="linear", theta=1e6, factor=3.0),
          "local_rope": RopeConfig(theta=1e4)}),
        ("gemma3", {"layer_types": ["full_attention"] * 3}, {"layer_windows": (), "local_rope": None}),
        ("gemma3", {"rope_parameters": {"sliding_attention": None, "full_attention": {"rope_theta": 7.0}}},
         {"rope": RopeConfig(kind="linear", theta=7.0, factor=3.0), "local_rope": RopeConfig(theta=10.0)}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 7.0}, "full_attention": None}},
         {"rope": RopeConfig(kind="linear", theta=1000.0, factor=3.0), "local_rope": RopeConfig(theta=7.0)}),
        ("gemma3_parameters", {}, {"layer_windows": (None, 5, 5), "logit_soft_cap": 5.0,
                                   "rope": RopeConfig(theta=100.0), "local_rope": RopeConfig(theta=1000.0)}),
        ("gpt_neox", {}, {"norm": "layer", "parallel": True, "rope": RopeConfig(rotary_dim=6), "norm_eps": 1e-5,
                          "num_kv_heads": 2, "head_dim": 12, "gated_mlp": False, "activation": "gelu"}),
        ("gpt_neox", {"use_parallel_residual": False, "rotary_emb_base": 500, "layer_norm_eps": 0.1},
         {"parallel": False, "rope": RopeConfig(theta=500.0, rotary_dim=6), "norm_eps": 0.1}),
        ("gpt_neox", {"rotary_pct": ..., "hidden_size": 32, "num_attention_heads": 2, "attention_bias": ...,
                      "use_parallel_residual": ..., "hidden_act": ..., "rotary_emb_base": ...},
         {"rope": RopeConfig(rotary_dim=4), "parallel": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True,
          "activation": "gelu"}),
        ("gpt_neox", {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 1 / 6, "rope_type": "default"}},
         {"rope": RopeConfig(theta=7.0, rotary_dim=2)}),
        ("gpt_neox_bare", {}, {"qkv_bias": False, "out_bias": False, "mlp_bias": True, "tied_embeddings": True}),
        ("glm_bare", {}, {"rope": RopeConfig(kind="linear", factor=3.0, theta=100.0), "qkv_bias": False}),
        ("chatglm", {"layernorm_epsilon": ..., "kv_channels": ...}, {"norm_eps": 1e-5, "head_dim": 128}),
    ],
)
def test_fields(case, changes, expected):
    said = {key: value for key, value in (tiny_hf.CASES[case] | changes).items() if value is not ...}
    config = parse_config(said, {})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192])
def test_any_even_part_of_a_head_may_turn(head_dim):
    for turned in range(2, head_dim + 1, 2):
        config = parse_config(tiny_hf.CASES["glm"] | {"head_dim": head_dim}, {})
        config = dataclasses.replace(config, rope=RopeConfig(rotary_dim=turned if turned < head_dim else None))
        assert parse_config(to_hf_config(config, "float32"), {}) == config


def test_eos_tokens_of_both_files():
    assert parse_config(small_case(eos_token_id=2), {"eos_token_id": [7, 2]}).eos_token_ids == (7, 2)
    assert parse_config(small_case(eos_token_id=[2, 9]), {"eos_token_id": 7}).eos_token_ids == (7, 2, 9)


@pytest.mark.parametrize("case", tiny_hf.CASES)
def test_there_and_back(case):
    config = parse_config(tiny_hf.CASES[case], {})
    assert parse_config(to_hf_config(config, "float32"), {}) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "unknown model_type 'gpt2'"),
        ({"model_type": "opt"}, "no opt config.json means"),
        ({"model_type": "chatglm"}, "no chatglm config.json means"),
        ({"model_type": "chatglm", "rope": None}, "chatglm has rotary positions"),
        ({"model_type": "llama", "qkv_bias": True}, "no llama config.json means"),
        ({"model_type": "llama", "layer_windows": (5, 5)}, "no llama config.json means"),
        ({"model_type": "mistral", "layer_windows": (5, None)}, "no mistral config.json means"),
        ({"model_type": "qwen3", "qk_norm": True, "layer_windows": (5, 6)}, r"one window length .* \[5, 6\]"),
        ({"model_type": "phi3", "layer_windows": (5, None)}, "no phi3 config.json means"),
        ({"model_type": "phi3", "rope": RopeConfig(kind="linear", factor=2.0)}, "rope_type 'linear' is not supported"),
        ({"model_type": "gemma2"}, "no gemma2 config.json means"),
        ({"model_type": "gpt_neox"}, "no gpt_neox config.json means"),
        ({"model_type": "llama", "rope": RopeConfig(kind="dynamic", factor=2.0, original_max_len=5)}, "dynamic rope"),
    ],
)
def test_what_a_config_json_cannot_say(changes, message):
    fields = dict(vocab_size=72, embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    with pytest.raises(ConversionError, match=message):
        to_hf_config(ModelConfig(**fields, max_position=64, **changes), "float32")
