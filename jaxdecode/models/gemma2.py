"""Gemma 2: four norms a layer, soft caps, scaled embeddings, a window on every other layer."""

from __future__ import annotations

from jaxdecode.layers import SandwichLayer
from jaxdecode.models.decoder import Decoder


class Gemma2(Decoder):
    """Gemma 2: four norms a layer, soft caps, scaled embeddings, a window on every other layer."""

    layer_type = SandwichLayer
