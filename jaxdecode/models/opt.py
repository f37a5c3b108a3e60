"""OPT: LayerNorms and biases, a plain MLP, learned positions; the 350M norms after each half of a layer."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class OPT(Decoder):
    """OPT: LayerNorms and biases, a plain MLP, learned positions; the 350M norms after each half of a layer."""
