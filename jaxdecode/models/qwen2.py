"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows on some layers."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class Qwen2(Decoder):
    """Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows on some layers."""
