"""Convert a large checkpoint while watching memory; then again, killed at random moments and continued.

    python benchmarks/convert_memory.py --directory /some/disk --kill 10

Makes a sharded bfloat16 Llama of random bytes in the shapes of Llama 3.2 3B (6.4 GB), converts it in a process of its
own and samples that process's anonymous and shared memory: pages of mapped files count as resident but are the page
cache's, to be dropped at will. The bound is 1 GiB plus twice the largest tensor. Needs 13 GB of disk, cleaned up at the
end; ends with exit code 1 if the bound or a hash is broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 3072,
    "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": True, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "eos_token_id": 128001,
}  # fmt: skip
SHARDS = 5
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="where to work (default: the temporary folder)")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="then convert again, killed N times")
    parser.add_argument("--seed", type=int, default=0, help="of the bytes and of the moments to kill at")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], help="fewer make a quick trial")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=arguments.directory))
    try:
        passed = measure(folder, CONFIG | {"num_hidden_layers": arguments.layers}, arguments.kill, arguments.seed)
    finally:
        shutil.rmtree(folder)
    sys.exit(not passed)


def measure(folder: Path, config: dict, kills: int, seed: int) -> bool:
    """Runs both measurements and prints them; returns whether memory and hashes are right."""
    size, largest = write_source(folder / "source", config, seed)
    print(f"source       {size / 1e9:.2f} GB bfloat16 in {SHARDS} shards, largest tensor {largest / 1e6:.0f} MB")
    seconds, peak = convert_watched(folder / "source", folder / "whole")
    bound = (1 << 30) + 2 * largest
    verdict = "inside" if peak <= bound else "OUTSIDE"
    print(f"uninterrupted {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s")
    print(f"peak memory  {peak / 2**20:.0f} MiB anonymous + shared, {verdict} the bound of {bound / 2**20:.0f} MiB")
    expected = hashes(folder / "whole")
    shutil.rmtree(folder / "whole")
    if not kills:
        return peak <= bound
    convert_killed(folder / "source", folder / "killed", kills, size, seed)
    equal = hashes(folder / "killed") == expected
    print(f"after {kills} kills: {len(expected)} hashes {'equal' if equal else 'DIFFER'}")
    return equal and peak <= bound


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors, embeddings tied."""
    hidden, mlp, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    layer = {
        "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def write_source(folder: Path, config: dict, seed: int) -> tuple[int, int]:
    """Writes config.json, an index and shards of random bytes.

    Returns:
      (bytes of all tensors, bytes of the largest).
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes, rng = tensor_shapes(config), np.random.default_rng(seed)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[] for _ in range(SHARDS)]
    for name in sorted(shapes, key=lambda name: -sizes[name]):
        min(shards, key=lambda names: sum(sizes[other] for other in names)).append(name)
    weight_map = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        write_shard(folder / file, {name: shapes[name] for name in names}, sizes, rng)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(sizes.values()), max(sizes.values())


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], rng) -> None:
    """One safetensors file of random bytes, header by hand, a few MB at a time."""
    header, position = {}, 0
    for name, shape in shapes.items():
        offsets = [position, position + sizes[name]]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        position += sizes[name]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, position, 1 << 24):
            file.write(rng.bytes(min(1 << 24, position - start)))


def start(source: Path, target: Path) -> subprocess.Popen:
    """The conversion as a user starts it."""
    command = [sys.executable, "-c", "from jaxdecode.cli import main; main()", "convert", str(source), str(target)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL)


def convert_watched(source: Path, target: Path) -> tuple[float, int]:
    """Converts once; returns (seconds, peak of RssAnon + RssShmem in bytes, sampled every 5 ms)."""
    begin, peak = time.monotonic(), 0
    process = start(source, target)
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"the conversion ended with code {process.returncode}")
    return time.monotonic() - begin, peak


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs; 0 once it has ended."""
    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("RssAnon:", "RssShmem:")))


def convert_killed(source: Path, target: Path, kills: int, size: int, seed: int) -> None:
    """Kills the conversion when random fractions of the bytes are written, continues, and lets the last run finish."""
    rng = random.Random(seed)
    for fraction in sorted(rng.random() for _ in range(kills)):
        process = start(source, target)
        while written(target) < fraction * size and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)  # not always just after a write
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL or target.exists():
            raise SystemExit(f"the conversion ended with code {process.returncode} before it could be killed")
        print(f"killed at    {written(target) / size:.1%} of the bytes; nothing at the destination")
    seconds, peak = convert_watched(source, target)
    print(f"continued    to the end in {seconds:.1f} s, peak {peak / 2**20:.0f} MiB")


def written(target: Path) -> int:
    """Bytes of weights in the unfinished checkpoint."""
    total = 0
    for file in (target.parent / f"{target.name}.partial" / "checkpoint" / "weights").glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed between listing and looking
            continue
    return total


def hashes(checkpoint: Path) -> dict[str, tuple]:
    """Every tensor's dtype, shape, bytes and SHA-256."""
    tensors = json.loads((checkpoint / "manifest" / "metadata").read_text())["tensors"]
    return {name: (row["dtype"], row["shape"], row["bytes"], row["sha256"]) for name, row in tensors.items()}


if __name__ == "__main__":
    main()
