"""Mistral 7B: Llama with a sliding window over every layer."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class Mistral(Decoder):
    """Mistral 7B: Llama with a sliding window over every layer."""
