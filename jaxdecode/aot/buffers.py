"""Where a compiled program keeps what: its allocations, inputs, outputs and constants."""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the names of the types below)
import numpy as np

from jaxdecode.aot.program import Allocation, Endpoint, Slice

# of these types a literal holds numbers, of all others the bytes themselves
_NUMBERS = {"f32": "<f4", "f64": "<f8", "s32": "<i4", "s64": "<i8", "u32": "<u4", "u64": "<u8", "pred": "?"}
