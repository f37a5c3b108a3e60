"""Gemma 3 (text): Gemma 2 with norms on the heads of q and k, and other positions on layers with a window."""

from __future__ import annotations

from jaxdecode.layers import SandwichLayer
from jaxdecode.models.decoder import Decoder


class Gemma3Text(Decoder):
    """Gemma 3 (text): Gemma 2 with norms on the heads of q and k, and other positions on layers with a window."""

    layer_type = SandwichLayer
