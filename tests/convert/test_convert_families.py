"""What is special about converting OPT and ChatGLM: names, refusals, published sizes, positions added."""

from __future__ import annotations

import collections
import json
import re
import shutil
from pathlib import Path

import made
import numpy as np
import pytest
from made import tiny_hf
from published import CHATGLM2_6B, OPT_6_7B
from sentencepiece_models import train

from convert import ConversionError, convert, export, read_config
from convert.hf_config import FAMILIES, to_hf_config
from convert.hf_reference import _CHATGLM_DEFAULTS, _chatglm_rope
from jaxdecode import checkpoint
from jaxdecode.config import RopeConfig
from jaxdecode.models.known import KNOWN


def hashes(folder) -> dict[str, str]:
    return {name: row["sha256"] for name, row in checkpoint.load_manifest(folder)["tensors"].items()}


@pytest.mark.parametrize(
    ("name", "said", "parameters"),
    [("opt-6.7b", OPT_6_7B, 6_658_473_984), ("chatglm2-6b", CHATGLM2_6B, 6_243_584_000)],
)
def test_published_models_are_planned_whole(name, said, parameters, tmp_path, monkeypatch, run):
    shapes = tiny_hf.weight_shapes(said)
    if name == "chatglm2-6b":
        shapes["transformer.rotary_pos_emb.inv_freq"] = (32,)
        assert sum(2 * int(np.prod(shape)) for shape in shapes.values()) == 12_487_168_064  # their index says so
    made.write_sparse(tmp_path / "hf", said, shapes)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 50, 0, 1 << 50))
    code, out, _ = run("convert", tmp_path / "hf", tmp_path / "ours", "--dry-run")
    assert code == 0 and f"parameters   {parameters:,}" in out
    plan = convert(tmp_path / "hf", tmp_path / "ours", dry_run=True)
    assert plan.parameters == parameters and plan.dtype == "float16" and plan.config == KNOWN[name]
    status = Path("/proc/self/status").read_text()
    present = 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status)))  # by the tests before this one
    assert plan.peak_bytes - present < 1 << 29


def test_opt_under_the_names_of_its_older_files(tmp_path):
    config = tiny_hf.CASES["opt_350m"]
    weights = tiny_hf.hf_weights(config)
    older = {name.removeprefix("model."): array for name, array in weights.items()}
    older |= {"decoder.version": np.ones(1, np.float32), "lm_head.weight": weights["model.decoder.embed_tokens.weight"]}
    convert(made.write_directory(tmp_path / "new", config), tmp_path / "a")
    convert(made.write_directory(tmp_path / "old", config, older), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert tmp_path / "back" == export(tmp_path / "b", tmp_path / "back")
    both = weights | {"decoder.project_in.weight": weights["model.decoder.project_in.weight"]}
    with pytest.raises(ConversionError, match=r"model\.decoder\.project_in\.weight are one tensor"):
        convert(made.write_directory(tmp_path / "both", config, both), tmp_path / "c")


def test_a_head_that_differs_from_tied_embeddings_is_no_opt(tmp_path):
    weights = tiny_hf.hf_weights(tiny_hf.CASES["opt"])
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"] + 1
    with pytest.raises(ConversionError, match="holds both and they differ"):
        convert(made.write_directory(tmp_path / "hf", tiny_hf.CASES["opt"], weights), tmp_path / "ours")


def test_frequencies_of_a_chatglm_are_ignored(tmp_path):
    config = tiny_hf.CASES["chatglm"]
    weights = tiny_hf.hf_weights(config) | {"transformer.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}
    convert(made.write_directory(tmp_path / "hf", config, weights), tmp_path / "ours")
    convert(made.write_directory(tmp_path / "plain", config), tmp_path / "other")
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "other")


def test_a_chatglm_keeps_pairs_half_a_rotation_apart(tmp_path):
    """The rows of the query, key and value product: turned pairs (2j, 2j + 1) become (j, j + 4), the rest stays."""
    config = tiny_hf.CASES["chatglm"]  # 4 heads and 2 KV heads of 16, of which 8 turn
    weights = tiny_hf.hf_weights(config)
    convert(made.write_directory(tmp_path / "hf", config), tmp_path / "ours")
    head = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
    order = [16 * index + row for index in range(6) for row in head] + list(range(96, 128))
    for part in ("weight", "bias"):
        view = checkpoint.tensor_views(tmp_path / "ours")[f"layers.1.attention.qkv.{part}"]
        theirs = weights[f"transformer.encoder.layers.1.self_attention.query_key_value.{part}"]
        np.testing.assert_array_equal(view, theirs[order])


def test_a_glm_keeps_pairs_half_a_rotation_apart_too(tmp_path):
    config = tiny_hf.CASES["glm"]  # the heads of the ChatGLM, each tensor by itself
    weights = tiny_hf.hf_weights(config)
    convert(made.write_directory(tmp_path / "hf", config), tmp_path / "ours")
    head = [0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)]
    for part in ("weight", "bias"):
        names = [f"model.layers.1.self_attn.{name}_proj.{part}" for name in "qkv"]
        turned = [weights[name][[16 * index + row for index in range(heads) for row in head]]
                  for name, heads in zip(names, (4, 2), strict=False)]  # fmt: skip
        view = checkpoint.tensor_views(tmp_path / "ours")[f"layers.1.attention.qkv.{part}"]
        np.testing.assert_array_equal(view, np.concatenate([*turned, weights[names[2]]]))


def test_a_gpt_neox_keeps_queries_keys_and_values_apart(tmp_path):
    """Two heads of 12: each head's query, key and value stand together in the file."""
    config = tiny_hf.CASES["gpt_neox"]
    weights = tiny_hf.hf_weights(config)
    convert(made.write_directory(tmp_path / "hf", config), tmp_path / "ours")
    order = [36 * head + 12 * part + row for part in range(3) for head in range(2) for row in range(12)]
    for part in ("weight", "bias"):
        view = checkpoint.tensor_views(tmp_path / "ours")[f"layers.1.attention.qkv.{part}"]
        theirs = weights[f"gpt_neox.layers.1.attention.query_key_value.{part}"]
        np.testing.assert_array_equal(view, theirs[order])


def test_what_older_gpt_neox_files_say_is_no_trouble(tmp_path):
    """Masks and frequencies beside the weights, and the head's other name."""
    config = tiny_hf.CASES["gpt_neox"]
    weights = tiny_hf.hf_weights(config)
    convert(made.write_directory(tmp_path / "plain", config), tmp_path / "a")
    older = {("lm_head.weight" if name == "embed_out.weight" else name): array for name, array in weights.items()}
    for layer in range(2):
        older[f"gpt_neox.layers.{layer}.attention.bias"] = np.ones((1, 1, 4, 4), bool)
        older[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.float32([-1e9]).reshape(())
        older[f"gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    convert(made.write_directory(tmp_path / "older", config, older), tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_what_no_phi3_may_say_is_said_at_once(tmp_path):
    said = {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 0, 2.0], "long_factor": 3},
        "intermediate_size": None, "sliding_window": 0,
    }  # fmt: skip
    made.write_directory(tmp_path / "hf", tiny_hf.CASES["phi3"] | said, tiny_hf.hf_weights(tiny_hf.CASES["phi3"]))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "hf", tmp_path / "ours")
    for problem in (
        "short_factor must be a list of positive numbers; it is [1.0, 0, 2.0]", "sliding_window must be a positive",
        "long_factor must be a list of positive numbers; it is 3", "intermediate_size must be a positive integer",
    ):  # fmt: skip
        assert problem in str(caught.value)
    config = tiny_hf.CASES["phi3_longrope"] | {"hidden_size": 32}
    made.write_directory(tmp_path / "more", config, tiny_hf.hf_weights(config))
    with pytest.raises(ConversionError, match="a short and a long factor for each of 4 pairs; got 3 and 3"):
        convert(tmp_path / "more", tmp_path / "ours")


def test_what_no_gemma_may_say_is_said_at_once(tmp_path):
    said = {"use_bidirectional_attention": True, "attn_logit_softcapping": -1, "sliding_window": None}
    made.write_directory(tmp_path / "hf", tiny_hf.CASES["gemma2"] | said, tiny_hf.hf_weights(tiny_hf.CASES["gemma2"]))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "hf", tmp_path / "ours")
    for problem in (
        "use_bidirectional_attention is not supported", "attn_logit_softcapping must be a positive number; it is -1",
        "layer_types is absent, by which some layers of a gemma2 have a window, but sliding_window is null",
    ):  # fmt: skip
        assert problem in str(caught.value)
    said |= {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": {"rope_theta": 3.0}}
    made.write_directory(tmp_path / "3", tiny_hf.CASES["gemma3"] | said, tiny_hf.hf_weights(tiny_hf.CASES["gemma3"]))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "3", tmp_path / "ours")
    for problem in (
        "use_bidirectional_attention is not supported", "rope_type 'yarn' is not supported; supported are default, lin",
        "rope_parameters must hold an object or null for each of full_attention and sliding_attention",
    ):  # fmt: skip
        assert problem in str(caught.value)


def test_what_no_chatglm_may_say_is_said_at_once(tmp_path):
    said = {
        "quantization_bit": 4, "rmsnorm": False, "apply_residual_connection_post_layernorm": True,
        "multi_query_attention": False, "original_rope": False, "pre_seq_len": 128, "rope_ratio": 16,
        "_name_or_path": "/models/chatglm2/mine",
    }  # fmt: skip
    made.write_directory(tmp_path / "hf", tiny_hf.CASES["chatglm"] | said, tiny_hf.hf_weights(tiny_hf.CASES["chatglm"]))
    with pytest.raises(ConversionError) as caught:
        convert(tmp_path / "hf", tmp_path / "ours")
    for problem in (
        "quantization_bit must be 0 to be supported; it is 4", "rmsnorm must be true to be supported; it is False",
        "apply_residual_connection_post_layernorm must be false", "multi_query_attention must be true",
        "original_rope must be true", "pre_seq_len must be null to be supported; it is 128",
        "rope_ratio 16 divides positions in ChatGLM2 and multiplies the base of the frequencies in ChatGLM3",
        "_name_or_path is '/models/chatglm2/mine': write a name there whose last part holds chatglm2 or chatglm3",
    ):  # fmt: skip
        assert problem in str(caught.value)


LINEAR, HIGHER = RopeConfig(kind="linear", factor=16.0, rotary_dim=8), RopeConfig(theta=160_000.0, rotary_dim=8)
SECOND, THIRD = {"rope_type": "linear", "factor": 16.0}, {"rope_theta": 160_000.0}
RATIOS = {
    "the name": ({"_name_or_path": "THUDM/chatglm2-6b-32k"}, {}, LINEAR, SECOND),
    "a folder's name is none": ({"_name_or_path": "/models/chatglm2/chatglm3-6b-32k/"}, {}, HIGHER, THIRD),
    "nor this one": ({"_name_or_path": "/models/chatglm3/ChatGLM2-6B-32k"}, {}, LINEAR, SECOND),
    "the tokenizer's": (
        {"_name_or_path": "/data/mine"},
        {"tokenizer_config.json": '{"name_or_path": "THUDM/chatglm2-6b-32k"}', "tokenizer.model": None}, LINEAR, SECOND,
    ),
    "the code": ({}, {"tokenization_chatglm.py": "SPECIAL = '<|observation|>'"}, HIGHER, THIRD),
    "the older code": ({}, {"tokenization_chatglm.py": "SPECIAL = 'sop'"}, LINEAR, SECOND),
}  # fmt: skip


@pytest.mark.parametrize("name", RATIOS)
def test_what_the_ratio_of_a_chatglm_means(name, tmp_path):
    says, files, rope, reference = RATIOS[name]
    case = tiny_hf.CASES["chatglm"] | {"padded_vocab_size": 920, "rope_ratio": 16} | says
    source = made.write_directory(tmp_path / "hf", case)
    for file, text in files.items():
        (source / file).write_bytes(train() if text is None else text.encode())
    assert convert(source, tmp_path / "ours").config.rope == rope
    plain = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    assert _chatglm_rope(source, 16) == plain | reference
    export(tmp_path / "ours", tmp_path / "back")
    assert read_config(tmp_path / "back" / "config.json")[0].rope == rope
    assert _chatglm_rope(tmp_path / "back", 16) == plain | reference


def test_a_ratio_of_no_known_chatglm(tmp_path):
    source = made.write_directory(tmp_path / "hf", tiny_hf.CASES["chatglm"])
    assert _chatglm_rope(source, 1)["rope_type"] == "default"
    with pytest.raises(ValueError, match="nothing says whether rope_ratio 16 is ChatGLM2's or ChatGLM3's"):
        _chatglm_rope(source, 16)


def test_missing_fields_go_by_the_familys_names(tmp_path):
    for case, names in {"opt": ["ffn_dim"], "chatglm": ["padded_vocab_size", "num_layers", "ffn_hidden_size"]}.items():
        config = {name: value for name, value in tiny_hf.CASES[case].items() if name not in names}
        made.write_directory(tmp_path / case, config, tiny_hf.hf_weights(tiny_hf.CASES[case]))
        with pytest.raises(ConversionError) as caught:
            convert(tmp_path / case, tmp_path / "ours")
        assert all(f"{name} must be a positive integer; it is missing" in str(caught.value) for name in names)


def test_no_affine_no_opt(tmp_path):
    made.write_directory(tmp_path / "hf", tiny_hf.CASES["opt"] | {"layer_norm_elementwise_affine": False})
    with pytest.raises(ConversionError, match="layer_norm_elementwise_affine must be true to be supported"):
        convert(tmp_path / "hf", tmp_path / "ours")


def test_an_exported_chatglm_says_what_its_own_code_reads(tmp_path):
    convert(made.write_directory(tmp_path / "hf", tiny_hf.CASES["chatglm_ratio"]), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back")
    said = json.loads((tmp_path / "back" / "config.json").read_text())
    told = tiny_hf.CASES["chatglm_ratio"]
    unread = {"apply_query_key_layer_scaling", "bos_token_id", "pad_token_id"}
    assert {name: said.get(name) for name in told if name not in unread} == {
        name: value for name, value in told.items() if name not in unread
    }
    assert to_hf_config(KNOWN["chatglm2-6b"], "float16")["rope_ratio"] == 1


@pytest.mark.parametrize("count", [74, 146, 200])
def test_added_positions_repeat_the_trained_ones(count, tmp_path, monkeypatch, run):
    config = tiny_hf.CASES["opt"]
    source = made.write_directory(tmp_path / "hf", config)
    monkeypatch.setattr("convert.weights.CHUNK_BYTES", 1000)
    _, out, _ = run("convert", source, tmp_path / "ours", "--extend-positions", count)
    assert f"positions    {count}; those past the 73 that were trained repeat them" in out
    table = tiny_hf.hf_weights(config)["model.decoder.embed_positions.weight"]
    view = checkpoint.tensor_views(tmp_path / "ours")["positions.weight"]
    np.testing.assert_array_equal(view, np.concatenate([table, *[table[2:]] * 3])[: count + 2])
    assert checkpoint.load_config(tmp_path / "ours").max_position == count
    assert checkpoint.load_manifest(tmp_path / "ours")["source"]["trained_positions"] == 73
    export(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["max_position_embeddings"] == count
    convert(tmp_path / "back", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "ours")


def test_positions_are_added_only_where_there_is_a_table_that_is_too_short(tmp_path):
    opt = made.write_directory(tmp_path / "opt", tiny_hf.CASES["opt"])
    with pytest.raises(ConversionError, match="must exceed the model's 73; got 73"):
        convert(opt, tmp_path / "ours", extend_positions=73)
    llama = made.write_directory(tmp_path / "llama", tiny_hf.CASES["llama"])
    with pytest.raises(ConversionError, match="those of a llama are rotary and have no end"):
        convert(llama, tmp_path / "ours", extend_positions=1000)
    assert not (tmp_path / "ours").exists()


def test_the_reference_takes_the_same_defaults_of_a_chatglm():
    """Those of fields which the publishers leave out."""
    names, defaults = FAMILIES["chatglm"].names, FAMILIES["chatglm"].defaults
    ours = {names.get(name) or name: value for name, value in defaults.items()}
    assert {name: _CHATGLM_DEFAULTS.get(name, value) for name, value in ours.items()} == ours
    assert {"seq_length", "layernorm_epsilon", "kv_channels", "multi_query_group_num"} <= set(_CHATGLM_DEFAULTS)
