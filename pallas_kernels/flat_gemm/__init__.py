"""Products with weight matrices [n, k] as checkpoints store them."""

from pallas_kernels.flat_gemm.api import gated_linear, linear, qkv_linear

__all__ = ["gated_linear", "linear", "qkv_linear"]
