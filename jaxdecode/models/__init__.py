"""Model families: one file each, named like the Hugging Face `model_type`, one row in `MODELS`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jaxdecode.config import ModelConfig
from jaxdecode.models.chatglm import ChatGLM
from jaxdecode.models.decoder import Decoder, Params, bind, params_of, project
from jaxdecode.models.gemma2 import Gemma2
from jaxdecode.models.gemma3_text import Gemma3Text
from jaxdecode.models.glm import GLM
from jaxdecode.models.gpt_neox import GPTNeoX
from jaxdecode.models.llama import Llama
from jaxdecode.models.mistral import Mistral
from jaxdecode.models.opt import OPT
from jaxdecode.models.phi3 import Phi3
from jaxdecode.models.qwen2 import Qwen2
from jaxdecode.models.qwen3 import Qwen3

__all__ = [
    "MODELS",
    "Decoder",
    "Params",
    "abstract_params",
    "bind_layer",
    "bind_model",
    "build",
    "init_params",
    "project",
]

MODELS: dict[str, type[Decoder]] = {
    "chatglm": ChatGLM,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3Text,
    "glm": GLM,
    "gpt_neox": GPTNeoX,
    "llama": Llama,
    "mistral": Mistral,
    "opt": OPT,
    "phi3": Phi3,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}


def build(config: ModelConfig, params: Params) -> Decoder:
    """The model as a Flax NNX module holding `params`, for use outside the decode loop."""
    return bind(nnx.eval_shape(functools.partial(_create, config, jnp.float32)), params)


def init_params(config: ModelConfig, key: Array, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters of the right shapes, as a plain nested dict."""
    return jax.jit(lambda key: params_of(_create(config, dtype, key)))(key)


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Params:
    """`init_params` without the memory: the same tree of `jax.ShapeDtypeStruct`."""
    params = jax.eval_shape(lambda: params_of(_create(_one_layer(config), dtype)))
    return {**params, "layers": params["layers"] * config.num_layers}


def bind_model(config: ModelConfig, params: Params) -> Decoder:
    """The model around `params`, its layers left abstract: embedding, positions and head of a traced step."""
    model = nnx.eval_shape(functools.partial(_create, _one_layer(config), jnp.float32))
    return bind(model, {name: part for name, part in params.items() if name != "layers"})


def bind_layer(config: ModelConfig, params: Params):
    """One layer around its own `params`, for use inside a traced step."""
    layer_type = _row(config).layer_type
    return bind(nnx.eval_shape(lambda: layer_type(config, dtype=jnp.float32, rngs=nnx.Rngs(0))), params)


def _one_layer(config: ModelConfig) -> ModelConfig:
    """All layers have one shape, so a skeleton needs only the first."""
    return dataclasses.replace(config, num_layers=1, layer_windows=config.layer_windows[:1], unified_max=())


def _create(config: ModelConfig, dtype: DTypeLike, key: Array | int = 0) -> Decoder:
    return _row(config)(config, dtype=dtype, rngs=nnx.Rngs(params=key))


def _row(config: ModelConfig) -> type[Decoder]:
    if config.model_type not in MODELS:
        raise NotImplementedError(
            f"no model for model_type {config.model_type!r}; there are {', '.join(sorted(MODELS))}"
        )
    return MODELS[config.model_type]
