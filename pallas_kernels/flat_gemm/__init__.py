"""Products of a few activations with a large weight matrix."""

from pallas_kernels.flat_gemm.api import gated_linear, linear

__all__ = ["gated_linear", "linear"]
