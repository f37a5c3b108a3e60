"""A reference without torch: answers to a job that are right for one checkpoint, since they are computed from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from convert import verify
from jaxdecode.checkpoint import load_params


def answers(checkpoint: Path, job: dict[str, Any]) -> dict[str, np.ndarray]:
    """What `hf_reference.py` would write if it computed what we do."""
    params, config = load_params(checkpoint)
    made, arrays = verify._greedy(params, config, job["prompts"], job["max_new_tokens"]), {}
    for index, prompt in enumerate(job["prompts"]):
        tokens, logprobs = made[index]
        sequence = [*prompt, *tokens.tolist()]
        logits = verify.full_logits(params, config, sequence, job["positions"][index])
        steps = verify.full_logits(params, config, sequence, range(len(prompt) - 1, len(sequence) - 1))
        top = np.argsort(-logits, axis=-1)[:, : verify.TOP_K]
        arrays |= {f"tokens/{index}": tokens, f"step_logits/{index}": steps, f"logits/{index}": logits}
        arrays |= {f"step_logprobs/{index}": logprobs, f"top_ids/{index}": top}
    versions = {"transformers": "0", "torch": "0", "attention": "none"}
    return arrays | {"meta": np.array(json.dumps(versions))}
