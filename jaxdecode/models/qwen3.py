"""Qwen3 (dense): Llama with a norm on the heads of q and k."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class Qwen3(Decoder):
    """Qwen3 (dense): Llama with a norm on the heads of q and k."""
