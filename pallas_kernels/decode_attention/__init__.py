"""Attention of one query per sequence over a cache."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
