"""Llama 1 to 3 and everything built like it (SmolLM2, TinyLlama, Yi, …)."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class Llama(Decoder):
    """Llama 1 to 3 and everything built like it (SmolLM2, TinyLlama, Yi, …)."""
