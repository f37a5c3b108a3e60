"""GPT-NeoX and Pythia: LayerNorms and biases, a plain MLP beside the attention, heads that turn in part."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class GPTNeoX(Decoder):
    """GPT-NeoX and Pythia: LayerNorms and biases, a plain MLP beside the attention, heads that turn in part."""
