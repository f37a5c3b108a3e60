"""ChatGLM2-6B at its real size, with random weights: written in the publisher's names, converted, run for one token.

    python tests/convert/full_size.py FOLDER    # needs 25 GB of disk there and 18 GB of memory; some ten minutes

The token and its probability are compared with a pass in NumPy and float32 over the files as they were published, and
the memory of the conversion with what `jaxdecode convert --dry-run` announces. Exit code 1 if one of them is off.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from made import tiny_hf
from published import CHATGLM2_6B as CONFIG

from convert import convert

SHARDS = 7
TOKENS = [64790, 64792, 30910, 13, 54591, 32024, 34480]  # of 65,024; any will do
TOLERANCE = 0.02  # of a log-probability: 28 layers in float16 against float32


def write_source(folder: Path) -> None:
    """Seven shards of float16 and their index, as the publisher has them."""
    from safetensors.numpy import save_file

    shapes = tiny_hf.weight_shapes(CONFIG)
    total, places, shards = sum(map(_bytes, shapes.values())), {}, [{} for _ in range(SHARDS)]
    done = 0
    for name, shape in shapes.items():
        shards[min(done * SHARDS // total, SHARDS - 1)][name] = shape
        done += _bytes(shape)
    folder.mkdir(parents=True)
    for number, part in enumerate(shards, 1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        rng = np.random.default_rng(number)
        save_file({name: _random(rng, name, shape) for name, shape in part.items()}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
        print(f"  {file}: {len(part)} tensors", flush=True)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float16"}))


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= 0.02 if len(shape) == 2 else 0.1
    return (values + 1 if "norm" in name else values).astype(np.float16)


def convert_watched(source: Path, target: Path) -> tuple[int, float]:
    """Converts with the command; returns the most anonymous memory it held, in bytes, and the seconds it took."""
    command = [str(Path(sys.executable).with_name("jaxdecode")), "convert", str(source), str(target)]
    started, most = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # it has just ended
            break
        most = max(most, 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\s+(\d+)", status))))
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the conversion ended with {process.returncode}")
    return most, time.monotonic() - started


def expected(source: Path) -> np.ndarray:
    """Log-probabilities of the token after TOKENS, [vocab] float32: ChatGLM2's mathematics, a tensor at a time."""
    from safetensors import safe_open

    places = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]

    def read(name: str) -> np.ndarray:
        with safe_open(source / places[name], "np") as file:
            return file.get_tensor(name).astype(np.float32)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + CONFIG["layernorm_epsilon"]) * read(f"{name}.weight")

    heads, groups, width = CONFIG["num_attention_heads"], CONFIG["multi_query_group_num"], CONFIG["kv_channels"]
    angle = np.arange(len(TOKENS))[:, None] * 10_000.0 ** (-np.arange(0, width // 2, 2) / (width // 2))
    turn = np.exp(1j * angle)[:, None]  # [tokens, 1, pairs]

    def rotate(x: np.ndarray) -> np.ndarray:
        """The first half of each head, pair by pair, as complex numbers."""
        turned = (x[..., 0 : width // 2 : 2] + 1j * x[..., 1 : width // 2 : 2]) * turn
        pairs = np.stack([turned.real, turned.imag], -1).reshape(*x.shape[:-1], width // 2)
        return np.concatenate([pairs, x[..., width // 2 :]], -1).astype(np.float32)

    x = read("transformer.embedding.word_embeddings.weight")[TOKENS]
    hidden_future = np.triu(np.full((len(TOKENS),) * 2, -np.inf, np.float32), 1)
    for layer in range(CONFIG["num_layers"]):
        name = f"transformer.encoder.layers.{layer}"
        attention = f"{name}.self_attention.query_key_value"
        qkv = norm(x, f"{name}.input_layernorm") @ read(f"{attention}.weight").T + read(f"{attention}.bias")
        q, k, v = np.split(qkv.reshape(len(TOKENS), -1, width), [heads, heads + groups], 1)
        k, v = (np.repeat(part, heads // groups, 1) for part in (rotate(k), v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(width) + hidden_future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v).reshape(len(TOKENS), -1)
        x = x + mixed @ read(f"{name}.self_attention.dense.weight").T
        up = norm(x, f"{name}.post_attention_layernorm") @ read(f"{name}.mlp.dense_h_to_4h.weight").T
        gate, up = np.split(up, 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ read(f"{name}.mlp.dense_4h_to_h.weight").T
    logits = norm(x[-1], "transformer.encoder.final_layernorm") @ read("transformer.output_layer.weight").T
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted.astype(np.float64)).sum())


def generate_one(target: Path) -> tuple[int, float]:
    """The first token that the checkpoint generates after TOKENS, and its log-probability."""
    import jax

    import jaxdecode

    params, config = jaxdecode.load_params(target)
    generate = functools.partial(jaxdecode.generate, max_new_tokens=1)
    done = jax.jit(generate, static_argnums=1)(
        params, config, np.array([TOKENS]), np.array([len(TOKENS)]), jax.random.key(0)
    )
    return int(done.tokens[0, 0]), float(done.logprobs[0, 0])


def main(folder: Path) -> int:
    source, target = folder / "chatglm2-6b", folder / "ours"
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} must be empty or absent")
    print("writing seven shards", flush=True)
    write_source(source)
    plan = convert(source, target, dry_run=True)
    most, seconds = convert_watched(source, target)
    print(f"{plan.parameters:,} parameters, {plan.disk_bytes / 1e9:.2f} GB, converted in {seconds:.0f} s; most memory "
          f"{most / 1e6:.0f} MB, announced {plan.peak_bytes / 1e6:.0f} MB", flush=True)  # fmt: skip
    started = time.monotonic()
    token, logprob = generate_one(target)
    print(f"loaded, compiled, and generated token {token} (log-probability {logprob:.4f}) in "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    wanted = expected(source)
    first, second = np.sort(wanted)[::-1][:2]
    print(f"NumPy in float32: token {wanted.argmax()} ({first:.4f}; the next has {second:.4f}); ours has "
          f"{wanted[token]:.4f} there", flush=True)  # fmt: skip
    good = most <= plan.peak_bytes and abs(wanted[token] - logprob) < TOLERANCE and first - wanted[token] < TOLERANCE
    print("as it must be" if good else "WRONG")
    shutil.rmtree(folder)
    return not good


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
