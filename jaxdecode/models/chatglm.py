"""ChatGLM2 and ChatGLM3: Llama with biases on q, k and v, whose heads turn by half."""

from __future__ import annotations

from jaxdecode.models.decoder import Decoder


class ChatGLM(Decoder):
    """ChatGLM2 and ChatGLM3: Llama with biases on q, k and v, whose heads turn by half."""
