"""Make the golden files: what transformers + torch compute for every case of `tiny_hf.py`.

    PYTHON_WITH_TORCH tests/golden/make_golden.py [CASE …]

Run it with the Python of an environment that has torch, transformers and safetensors; of ours it imports only
the reference script and the cases. It fails when two variants of one rule cannot be told apart.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "convert")]

import hf_reference  # noqa: E402
import tiny_hf  # noqa: E402

# A pair that comes out equal would prove nothing about what differs between the two.
DIFFERENT = [
    ("llama", "llama_eps"),
    ("llama", "rope_theta"),
    ("rope_theta", "rope_linear"),
    ("rope_dynamic_below", "rope_dynamic_above"),
    ("rope_theta", "rope_llama3"),
    ("rope_theta", "rope_yarn_defaults"),
    ("rope_linear", "rope_yarn"),
    ("rope_yarn", "rope_yarn_defaults"),
    ("rope_yarn", "rope_yarn_no_truncate"),
    ("rope_yarn_defaults", "rope_yarn_attention_factor"),
    ("rope_yarn_defaults", "rope_yarn_mscale"),
    ("mistral", "mistral_window"),
    ("qwen2", "qwen2_windows"),
    ("qwen2_windows", "qwen2_layer_types"),
    ("qwen3", "qwen3_windows"),
    ("llama", "llama_gelu"),
    ("llama_gelu", "llama_gelu_tanh"),
    ("opt", "opt_350m"),
    ("opt", "opt_bare"),
    ("chatglm", "chatglm_ratio"),
    ("glm", "glm_bare"),
    ("gpt_neox", "gpt_neox_sequential"),
    ("gpt_neox", "gpt_neox_bare"),
    ("gemma2", "gemma2_uncapped"),
    ("gemma3", "gemma3_parameters"),
    ("phi3_longrope", "phi3_longrope_long"),
]
# Rules that must not matter: the same numbers under another name.
EQUAL = [
    ("rope_theta", "rope_parameters"),
    ("rope_theta", "rope_dynamic_below"),
    ("qwen2", "qwen2_windows_unused"),
    ("llama", "mistral"),
]


def job(case: str, folder: Path, output: Path) -> dict:
    config = tiny_hf.CASES[case]
    source = tiny_hf.write_hf_directory(folder, config)
    return {
        "source": str(source), "output": str(output), "prompts": tiny_hf.prompts(config), "forward": "prompt",
        "max_new_tokens": tiny_hf.NEW_TOKENS, "step_logits": False, "stages": True, "top_k": 1,
    }  # fmt: skip


def make(cases: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outputs = {case: Path(folder) / f"{case}.npz" for case in cases}
        for case, output in outputs.items():
            hf_reference.run(job(case, Path(folder) / case, output))
            golden = dict(np.load(output))
            meta = json.loads(str(golden.pop("meta")))
            # tokens as small integers, and what the file can be rebuilt from left out
            kept = {
                name: array
                for name, array in golden.items()
                if name.split("/")[0] not in ("positions", "top_ids")
            }
            kept |= {
                name: array.astype(np.int16) for name, array in kept.items() if name.startswith("tokens/")
            }
            versions = {
                "transformers": meta["transformers"],
                "torch": meta["torch"],
                "attention": meta["attention"],
            }
            header = {"config": tiny_hf.CASES[case], **versions}
            np.savez_compressed(HERE / f"{case}.npz", header=np.array(json.dumps(header)), **kept)


def difference(left: str, right: str) -> float:
    arrays = [np.load(HERE / f"{case}.npz")["logits/2"] for case in (left, right)]
    return float(np.abs(arrays[0] - arrays[1]).max())


def check() -> None:
    """Raises AssertionError when variants that must differ agree, or the other way round."""
    for left, right in DIFFERENT:
        print(f"{left:24} {right:28} differ by {difference(left, right):.2e}")
        assert difference(left, right) > 5 * tiny_hf.TOLERANCE, (left, right)
    for left, right in EQUAL:
        print(f"{left:24} {right:28} differ by {difference(left, right):.2e}")
        assert difference(left, right) < 1e-6, (left, right)
    files = [HERE / f"{case}.npz" for case in tiny_hf.CASES]
    print(f"{len(files)} files, {sum(file.stat().st_size for file in files)} bytes")


if __name__ == "__main__":
    make(sys.argv[1:] or list(tiny_hf.CASES))
    check()
