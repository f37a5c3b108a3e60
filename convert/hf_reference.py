"""The source implementation's answers: transformers + torch on the original checkpoint, in their own process.

This file is a script as much as a module: it imports nothing of ours, so any Python ≥ 3.10 that has torch and
transformers can run it, whatever the versions of JAX and numpy here. `run_reference` starts such a process.

    python hf_reference.py JOB.json        (or - for standard input)

A job file holds {"jobs": [job, …]}; the keys of one job, with their defaults:

    source           a Hugging Face model directory or a GGUF file; ChatGLM2 and 3 run as the GLM of transformers
    output           the .npz file to write
    prompts          a list of lists of token ids; each runs alone, never padded
    dtype            "float32": what the weights are loaded and computed in
    weights_dtype    null; "bfloat16" or "float16" rounds the weights through that type first
    attention        "eager" or "sdpa"
    max_new_tokens   0: greedy tokens to generate after each prompt; eos does not stop it
    step_logits      true: keep the logits of each greedy step
    forward          null; "prompt" or "sequence": one teacher-forced pass over the prompt, or over the
                     prompt and its greedy tokens
    positions        null for all; or a list per prompt: which positions' logits the teacher-forced pass keeps
    stages           false: keep the outputs of the embedding, the first and last layer and the final norm
    top_k            10: how many best ids of each teacher-forced position to keep
    weight_hashes    false: SHA-256 of every weight's little-endian float32 bytes

Arrays in the output, i counting the prompts:

    tokens/i, step_logprobs/i [n]; step_logits/i [n, vocab_size]
    positions/i [p], logits/i [p, vocab_size], top_ids/i [p, top_k], logprobs/i [length - 1]
    embed/i, layer_0/i, layers/i, norm/i [length, embed_dim]; no norm/i of a model without a final one
    meta: a JSON string, versions and what was loaded
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PYTHON_VARIABLE = "JAXDECODE_HF_PYTHON"
DEFAULTS: dict[str, Any] = {
    "dtype": "float32", "weights_dtype": None, "attention": "eager", "max_new_tokens": 0, "step_logits": True,
    "forward": None, "positions": None, "stages": False, "top_k": 10, "weight_hashes": False,
}  # fmt: skip


class ReferenceUnavailable(RuntimeError):
    """There is no Python with torch to ask, or it failed; the message says what to do."""


def find_python() -> str:
    """The interpreter that runs transformers + torch: $JAXDECODE_HF_PYTHON, else this one if it has torch.

    Raises:
      ReferenceUnavailable: neither exists.
    """
    chosen = os.environ.get(PYTHON_VARIABLE)
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise ReferenceUnavailable(f"{PYTHON_VARIABLE} names {chosen!r}, which is not an executable file")
        return str(Path(chosen).absolute())
    if importlib.util.find_spec("torch") is None:
        raise ReferenceUnavailable(
            "comparing with the source implementation needs torch: pip install 'jaxdecode[verify]', or set "
            f"{PYTHON_VARIABLE} to the Python of an environment that has torch and transformers"
        )
    return sys.executable


def run_reference(jobs: list[dict[str, Any]], *, python: str | None = None) -> None:
    """Run jobs (keys in the module's docstring) in one reference process; each writes its `output`.

    Raises:
      ReferenceUnavailable: no such Python, or the process failed (its last lines are in the message).
    """
    with tempfile.TemporaryDirectory(prefix="jaxdecode-reference-") as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps({"jobs": jobs}))
        # Another Python must not see our packages, and nothing here may reach for a network.
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
        }
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python or find_python(), str(Path(__file__).resolve()), str(job_file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise ReferenceUnavailable(
            f"the reference process {command[0]} ended with code {done.returncode}:\n{tail}"
        )


def load_model(
    source: str | Path, dtype: str = "float32", attention: str = "eager", weights_dtype: str | None = None
):
    """A transformers model in evaluation mode, its weights dense in `dtype`: GGUF blocks are unpacked.

    Raises:
      ValueError: a weight is missing from the source, or came out in another type.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    source, kwargs = Path(source), {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    if _is_chatglm(source):
        return _rounded(_load_chatglm(source, **kwargs), weights_dtype)
    if source.suffix == ".gguf":
        kwargs["gguf_file"] = source.name
        if hasattr(transformers, "GgufConfig"):  # since 5.x the blocks stay packed unless told otherwise
            kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
    folder = str(source.parent if source.suffix == ".gguf" else source)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **kwargs
    )
    problems = {
        name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys") if info.get(name)
    }
    if problems:
        raise ValueError(f"transformers did not find its own weights in {source}: {problems}")
    for name, weight in model.state_dict().items():
        if weight.dtype != getattr(torch, dtype):
            raise ValueError(f"{name} of {source} was loaded as {weight.dtype}, not {dtype}")
    # Mapped weights begin at any byte and torch sums differently by alignment: copies make equal weights, however
    # they were stored, give equal results.
    for weight in model.parameters():
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return _rounded(model, weights_dtype)


def _rounded(model, weights_dtype: str | None):
    """The model in evaluation mode, its weights rounded through a narrower type if one is given."""
    import torch  # pyright: ignore[reportMissingImports]

    if weights_dtype:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.to(getattr(torch, weights_dtype)))
    return model.eval()


def _is_chatglm(source: Path) -> bool:
    config = source / "config.json"
    return config.exists() and json.loads(config.read_text()).get("model_type") == "chatglm"


def _load_chatglm(source: Path, dtype, attn_implementation: str):
    """A ChatGLM2 or ChatGLM3 as the GLM of transformers, made from the publisher's tensors without any code of theirs.

    The mathematics are the same: pairs that stand side by side turn in the first half of a head, one matrix holds gate
    and up. The publisher's code differs in what half precision rounds: its table of cos and sin has the type of the
    weights, and scores are divided by the number of their layer before the product and multiplied after it. Neither
    shows in float32.

    Raises:
      ValueError: biases or norms that GLM does not have.
    """
    import transformers

    said = json.loads((source / "config.json").read_text())
    said = _CHATGLM_DEFAULTS | {key: value for key, value in said.items() if value is not None}
    if said["add_bias_linear"] or not said["post_layer_norm"]:
        raise ValueError(f"{source}: transformers has no ChatGLM with biases everywhere or without a final norm")
    heads, kv_heads, head_dim = (
        said[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels")
    )
    fields = {
        "vocab_size": said["padded_vocab_size"], "hidden_size": said["hidden_size"], "head_dim": head_dim,
        "num_hidden_layers": said["num_layers"], "intermediate_size": said["ffn_hidden_size"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": said["seq_length"],
        "rms_norm_eps": said["layernorm_epsilon"], "attention_bias": said["add_qkv_bias"],
        "rope_parameters": _chatglm_rope(source, said["rope_ratio"]),
        "tie_word_embeddings": said["tie_word_embeddings"], "pad_token_id": None,
        "attn_implementation": attn_implementation,
    }  # fmt: skip
    config = transformers.GlmConfig(**fields)
    model = transformers.GlmForCausalLM(config).to(dtype)
    weights = {}
    for name, weight in _chatglm_weights(source):
        if name.endswith("inv_freq"):
            continue
        for theirs, glms in _GLM_NAMES.items():
            name = name.replace(theirs, glms)
        if "query_key_value" in name:
            parts = weight.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])
            weights |= {name.replace("query_key_value", f"{x}_proj"): y for x, y in zip("qkv", parts, strict=True)}
        else:
            weights[name] = weight
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()})
    return model


# configuration_chatglm.py's own
_CHATGLM_DEFAULTS = {
    "kv_channels": 128, "multi_query_group_num": 1, "seq_length": 2048, "layernorm_epsilon": 1e-5, "rope_ratio": 1,
    "add_qkv_bias": False, "add_bias_linear": False, "post_layer_norm": True, "tie_word_embeddings": False,
}  # fmt: skip


def _chatglm_rope(source: Path, ratio: float) -> dict[str, Any]:
    """ChatGLM2-32k's code divides positions by rope_ratio, ChatGLM3's multiplies the base of the frequencies.

    Raises:
      ValueError: nothing in the directory says which of the two it is.
    """
    plain = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if ratio == 1:
        return plain
    settings, code = source / "tokenizer_config.json", source / "tokenization_chatglm.py"
    text = settings.read_text() if settings.exists() else "{}"
    files = [json.loads(text), json.loads((source / "config.json").read_text())]
    names = [file.get(key) or "" for file in files for key in ("name_or_path", "_name_or_path")]
    lasts = [name.rstrip("/").split("/")[-1].lower() for name in names]
    telling = [name for name in lasts if ("chatglm2" in name or "codegeex2" in name) != ("chatglm3" in name)]
    if "<|observation|>" in text:
        third = True
    elif telling:
        third = "chatglm3" in telling[0]
    elif code.exists():
        third = "<|observation|>" in code.read_text()
    else:
        raise ValueError(f"{source}: nothing says whether rope_ratio {ratio} is ChatGLM2's or ChatGLM3's")
    changed = {"rope_theta": 10000.0 * ratio} if third else {"rope_type": "linear", "factor": float(ratio)}
    return plain | changed


_GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "self_attention": "self_attn",
    "dense_h_to_4h": "gate_up_proj",
    "dense_4h_to_h": "down_proj",
}


def _chatglm_weights(source: Path):
    """Yields (name, tensor) of every file of weights."""
    import torch  # pyright: ignore[reportMissingImports]

    for file in sorted(source.glob("*.safetensors")):
        from safetensors.torch import load_file

        yield from load_file(file).items()
    for file in sorted(source.glob("pytorch_model*.bin")):
        yield from torch.load(file, map_location="cpu", weights_only=True).items()


def greedy(model, prompt: list[int], max_new_tokens: int):
    """Greedy continuation of one prompt.

    Returns:
      (tokens [n] int64, logits [n, vocab_size] float32), torch tensors.
    """
    import torch  # pyright: ignore[reportMissingImports]

    ids, cache, tokens, logits = torch.tensor([prompt]), None, [], []
    for _ in range(max_new_tokens):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits.append(out.logits[0, -1].float())
        tokens.append(logits[-1].argmax())
        ids = tokens[-1].reshape(1, 1)
    return torch.stack(tokens), torch.stack(logits)


def run(job: dict[str, Any]) -> None:
    """Run one job in this process (needs torch) and write its output file.

    Raises:
      ValueError: an unknown key, or a source that does not load completely.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    unknown = sorted(set(job) - set(DEFAULTS) - {"source", "output", "prompts"})
    if unknown:
        raise ValueError(
            f"a job has no keys {unknown}; it has source, output, prompts, {', '.join(DEFAULTS)}"
        )
    job = DEFAULTS | job
    model = load_model(job["source"], job["dtype"], job["attention"], job["weights_dtype"])
    meta = {
        "torch": torch.__version__, "transformers": transformers.__version__, "model": type(model).__name__,
        "attention": model.config._attn_implementation,
        "parameters": sum(p.numel() for p in model.parameters()),
        "job": {key: job[key] for key in DEFAULTS if key != "positions"},
    }  # fmt: skip
    if job["weight_hashes"]:
        meta["weight_sha256"] = {name: _sha256(weight) for name, weight in model.state_dict().items()}
    rotary = copy.deepcopy(getattr(model.base_model, "rotary_emb", None))
    with torch.inference_mode(), zipfile.ZipFile(job["output"], "w") as archive:
        for index, prompt in enumerate(job["prompts"]):
            for name, array in _answer(model, rotary, job, index, prompt):
                _write(archive, f"{name}/{index}", array)
        _write(archive, "meta", json.dumps(meta))


def _answer(model, rotary, job, index, prompt):
    """Yields (name, array) of everything the job asks of one prompt."""
    import torch  # pyright: ignore[reportMissingImports]

    sequence = torch.tensor(prompt)
    if job["max_new_tokens"]:
        _reset(model, rotary)
        tokens, logits = greedy(model, prompt, job["max_new_tokens"])
        yield "tokens", tokens
        yield "step_logprobs", logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        if job["step_logits"]:
            yield "step_logits", logits
        if job["forward"] == "sequence":
            sequence = torch.cat([sequence, tokens])
    if not job["forward"]:
        return
    _reset(model, rotary)
    with _stages(model) as stages:
        logits = model(sequence[None], use_cache=False).logits[0].float()
    positions = range(len(sequence)) if job["positions"] is None else job["positions"][index]
    kept = logits[torch.tensor(list(positions))]
    yield "positions", torch.tensor(list(positions))
    yield "logits", kept
    yield "top_ids", kept.topk(job["top_k"], dim=-1).indices
    yield "logprobs", logits[:-1].log_softmax(-1).gather(1, sequence[1:, None])[:, 0]
    if job["stages"]:
        yield from stages.items()


def _reset(model, rotary) -> None:
    """Dynamic positions remember the longest sequence seen; every pass starts from a fresh model's state."""
    if rotary is not None:
        model.base_model.rotary_emb = copy.deepcopy(rotary)


@contextlib.contextmanager
def _stages(model):
    """Collects the outputs of the embedding, the first and last layer and the final norm while it is open."""
    body, stages, handles = getattr(model.base_model, "decoder", model.base_model), {}, []
    watched = {
        "embed": model.get_input_embeddings(),
        "layer_0": body.layers[0],
        "layers": body.layers[-1],
        "norm": body.norm if hasattr(body, "norm") else body.final_layer_norm,
    }
    for name, module in watched.items():
        if module is None:
            continue

        def keep(_module, _inputs, output, name=name):
            stages[name] = (output[0] if isinstance(output, tuple) else output)[0].float()

        handles.append(module.register_forward_hook(keep))
    try:
        yield stages
    finally:
        for handle in handles:
            handle.remove()


def _write(archive: zipfile.ZipFile, name: str, array) -> None:
    # One array at a time: the logits of every position of every prompt need not fit in memory.
    import numpy as np

    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, np.asarray(array, order="C"))


def _sha256(weight) -> str:
    import torch  # pyright: ignore[reportMissingImports]

    return hashlib.sha256(weight.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def main(arguments: list[str]) -> None:
    """Run every job of the file named (or of standard input, for `-`)."""
    text = sys.stdin.read() if arguments == ["-"] else Path(arguments[0]).read_text()
    for job in json.loads(text)["jobs"]:
        run(job)


if __name__ == "__main__":
    # Started as a script, our folder comes first on the path and its file names would shadow real packages.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent
    ]
    main(sys.argv[1:])
