"""GLM-4: Llama with biases on q, k and v, whose heads turn in part."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class GLM(Decoder):
    """GLM-4: Llama with biases on q, k and v, whose heads turn in part."""
