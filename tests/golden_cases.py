"""The golden cases as our models: written as a Hugging Face directory, converted and loaded as users do."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxdecode import engine
from jaxdecode.cache import init_cache
from jaxdecode.config import ModelConfig
from jaxdecode.models import Params, bind_model

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(
    0, str(GOLDEN)
)  # the folder is shared with a Python that cannot import us, so it is no package

import tiny_hf  # noqa: E402

__all__ = ["GOLDEN", "load_converted", "our_stages", "ragged", "tiny_hf"]


def load_converted(folder: Path, case: str, **options) -> tuple[Params, ModelConfig]:
    """Parameters and configuration of one case, through the converter and back from disk."""
    from convert import convert
    from jaxdecode.checkpoint import load_params

    source = tiny_hf.write_hf_directory(folder / "source", tiny_hf.CASES[case])
    convert(source, folder / "converted", **options)
    return load_params(folder / "converted")


def ragged(prompts: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """Prompts as one batch: tokens [batch, longest] and lengths [batch]."""
    lengths = [len(prompt) for prompt in prompts]
    # Padded with a token that occurs elsewhere: what stands behind a row's length must not matter.
    rows = [prompt + [3] * (max(lengths) - len(prompt)) for prompt in prompts]
    return jnp.asarray(rows, jnp.int32), jnp.asarray(lengths, jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def our_stages(
    params: Params, config: ModelConfig, tokens: jax.Array, lengths: jax.Array
) -> dict[str, jax.Array]:
    """What our engine computes for a ragged batch, by the reference script's names of the stages."""
    model = bind_model(config, params)

    def through(num_layers: int):
        some = {**params, "layers": params["layers"][:num_layers]}
        cache = init_cache(config, *tokens.shape, jnp.float32)
        return engine.extend(some, config, cache, tokens, jnp.int32(0), lengths)[0]

    last = through(config.num_layers)
    stages = {"embed": model.embed(tokens), "layer_0": through(1), "layers": last}
    if config.final_norm:
        stages["norm"] = model.norm(last)
    return stages | {"logits": engine.logits(params, config, last)}
