"""Attention of a chunk of queries over a cache."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
