"""transformers + torch as a benchmark worker: its own model and caches, greedy, no end token.

    python transformers_engine.py HF_DIRECTORY THREADS

A plain loop over the model, which is faster than `model.generate` (no logits processors, no stopping criteria). Nothing
of ours is imported but the line protocol.
"""

from __future__ import annotations

import platform
import sys
import time
from typing import Any

import torch
import transformers
from worker import serve

# How it can be run; the benchmark takes the fastest.
CONFIGURATIONS = {
    "sdpa, dynamic cache": ("sdpa", "dynamic", False),
    "sdpa, static cache": ("sdpa", "static", False),
    "eager attention, dynamic cache": ("eager", "dynamic", False),
    "sdpa, static cache, torch.compile": ("sdpa", "static", True),
}


def main(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for weight in model.parameters():  # out of the mapped file, into aligned memory
        weight.data = weight.data.clone()
    compiled = torch.compile(model.forward, dynamic=False)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "describe":
            versions = {"transformers": transformers.__version__, "torch": torch.__version__}
            versions["python"] = platform.python_version()
            return {"versions": versions, "configurations": list(CONFIGURATIONS), "threads": torch.get_num_threads()}
        attention, cache, use_compiled = CONFIGURATIONS[request["configuration"]]
        model.set_attn_implementation(attention)
        step = compiled if use_compiled else model.forward
        with torch.inference_mode():
            return run(model, step, cache, request["prompts"], request["new_tokens"])

    serve(answer)


def run(model, step, cache: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Tokens, and seconds to the first token and from there to the last."""
    ids = torch.tensor(prompts)
    length = ids.shape[1]
    started = time.perf_counter()
    if cache == "static":
        past = transformers.StaticCache(config=model.config, max_cache_len=length + new_tokens)
    else:
        past = transformers.DynamicCache(config=model.config)
    positions = torch.arange(length)[None]
    out = model(ids, past_key_values=past, position_ids=positions, use_cache=True, logits_to_keep=1)
    made = torch.empty((len(prompts), new_tokens), dtype=torch.long)
    made[:, 0] = out.logits[:, -1].argmax(-1)
    first = time.perf_counter()
    for index in range(1, new_tokens):
        positions = torch.tensor([[length + index - 1]])
        newest = made[:, index - 1 : index]
        out = step(newest, past_key_values=past, position_ids=positions, use_cache=True, logits_to_keep=1)
        made[:, index] = out.logits[:, -1].argmax(-1)
    tokens = made.tolist()
    ended = time.perf_counter()
    return {"tokens": tokens, "first_token_seconds": first - started, "decode_seconds": ended - first}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
