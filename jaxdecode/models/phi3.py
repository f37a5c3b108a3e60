"""Phi-3, Phi-3.5 and Phi-4: Llama with positions stretched by two sets of factors, and a sliding window on some."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class Phi3(Decoder):
    """Phi-3, Phi-3.5 and Phi-4: Llama with positions stretched by two sets of factors, and a sliding window on some."""
