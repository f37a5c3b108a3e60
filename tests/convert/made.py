"""Sources made for tests: tiny Hugging Face directories, torch archives written without torch, GGUF files."""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))  # shared with a Python that cannot import us
import tiny_hf

STORAGES = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def small_case(**changes) -> dict:
    """A config.json of a one-layer model."""
    return tiny_hf.CASES["llama"] | {"num_hidden_layers": 1} | changes


def write_directory(
    folder: Path, config: dict | None = None, weights: dict | None = None, dtype: str | None = None
) -> Path:
    """config.json and model.safetensors; `weights` replaces the config's own."""
    from safetensors.numpy import save_file

    config = config or small_case()
    weights = tiny_hf.hf_weights(config) if weights is None else weights
    if dtype:
        weights = {name: array.astype(np.dtype(getattr(ml_dtypes, dtype, dtype))) for name, array in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_sparse(folder: Path, config: dict, shapes: dict[str, tuple[int, ...]]) -> Path:
    """config.json and a float16 model.safetensors of any size whose numbers take no room on the disk."""
    from jaxdecode.safetensors_file import plan_header

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, entries = plan_header({name: ("float16", shape) for name, shape in shapes.items()})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(max(entry.stop for entry in entries.values()))
    return folder


def write_sharded(folder: Path, config: dict | None = None, shards: int = 3) -> Path:
    """config.json, an index and `shards` safetensors files."""
    from safetensors.numpy import save_file

    config = config or small_case()
    weights = tiny_hf.hf_weights(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        names = list(weights)[index::shards]
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_bin(folder: Path, config: dict | None = None) -> Path:
    """config.json and pytorch_model.bin."""
    config = config or small_case()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_torch_zip(folder / "pytorch_model.bin", tiny_hf.hf_weights(config))
    return folder


def write_torch_zip(path: Path, tensors: dict[str, np.ndarray], pickled: bytes | None = None) -> None:
    """A torch zip archive, opcode by opcode; `pickled` replaces data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle_of(tensors) if pickled is None else pickled)
        archive.writestr("archive/byteorder", "little")
        for index, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{index}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def pickle_of(tensors: dict[str, np.ndarray]) -> bytes:
    """data.pkl of a dict of contiguous tensors, as `torch.save` would write it."""
    body = b"".join(
        text(name)
        + named("torch._utils", "_rebuild_tensor_v2")
        + b"((" + text("storage") + named("torch", STORAGES[array.dtype.name]) + text(str(index)) + text("cpu")
        + number(array.size) + b"tQ" + number(0) + numbers(array.shape)
        + numbers([stride // array.itemsize for stride in array.strides]) + b"\x89"
        + named("collections", "OrderedDict") + b")RtR"
        for index, (name, array) in enumerate(tensors.items())
    )  # fmt: skip
    return b"\x80\x02}(" + body + b"u."


def text(value: str) -> bytes:
    """Pickle opcode BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """Pickle opcode GLOBAL."""
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    """Pickle opcode BININT."""
    return b"J" + struct.pack("<i", value)


def numbers(values) -> bytes:
    """A tuple of numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    module, _, suffix = name.rpartition(".")
    if module in GGUF_NAMES:
        return f"{GGUF_NAMES[module]}.{suffix}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{suffix}"


def permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows, in the words of its convert_hf_to_gguf.py."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write_gguf(path: Path, config: dict, quantised: str = "F32", extra=None, skip=(), tokens: bool = True) -> Path:
    """A GGUF file of a case, written by the gguf library.

    Args:
      extra: a function of the writer, called last, before anything reaches the disk.
      skip: metadata keys (without the architecture) and tensor names to leave out.
    """
    import gguf

    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    numbers_of = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"], "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim, "rope.dimension_count": head_dim,
    }  # fmt: skip
    for key, value in numbers_of.items():
        if key not in skip:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32(f"{architecture}.rope.freq_base", config["rope_theta"])
    if tokens:
        _add_tokenizer(writer, config["vocab_size"])
    for name, array in tiny_hf.hf_weights(config).items():
        if name in skip:
            continue
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
            array = permuted(array, heads)
        kind = gguf.GGMLQuantizationType[quantised if array.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, vocab_size: int) -> None:
    letters = [chr(ord("!") + index) for index in range(vocab_size - 5)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, "ab", "abc"])
    writer.add_token_types([2, 3, 3, *[1] * (vocab_size - 3)])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
