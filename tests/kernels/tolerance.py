"""How far a kernel's result may be from its definition in float32, by type. Holds no test."""

# of a product, in parts of the largest result
PRODUCT = {"float16": 2e-3, "bfloat16": 1.2e-2}
# of attention over values around 1: the online softmax, and the unified maximum, which rounds its weights to bfloat16
# whatever the cache holds; prefill has more rows to be unlucky with
ONLINE = {"float16": 1e-3, "bfloat16": 1e-2}
UNIFIED = {"float16": 4e-3, "bfloat16": 1e-2}
PREFILL = 1.5
# of the logits, around 1, of a whole decode step
STEP = {"float16": 0.01, "bfloat16": 0.06}
