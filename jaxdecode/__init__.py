"""Hugging Face language models in JAX, generating text in one jitted loop.

    model = jaxdecode.load("checkpoint")
    print(model.generate("The capital of France is")[0].text)

Names are imported when first used, so `import jaxdecode` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxdecode.aot.check import check
    from jaxdecode.checkpoint import load_config, load_params, save
    from jaxdecode.config import ModelConfig, RopeConfig
    from jaxdecode.generation import Generation, decode, decode_step, generate, prefill, score, stream
    from jaxdecode.models import abstract_params, init_params
    from jaxdecode.sampling import Greedy, Sampler, sampler
    from jaxdecode.text import Completion, LanguageModel, load

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "Generation",
    "Greedy",
    "LanguageModel",
    "ModelConfig",
    "RopeConfig",
    "Sampler",
    "abstract_params",
    "check",
    "decode",
    "decode_step",
    "generate",
    "init_params",
    "load",
    "load_config",
    "load_params",
    "prefill",
    "sampler",
    "save",
    "score",
    "stream",
]

_HOMES = {
    "aot.check": ("check",),
    "checkpoint": ("load_config", "load_params", "save"),
    "config": ("ModelConfig", "RopeConfig"),
    "generation": ("Generation", "decode", "decode_step", "generate", "prefill", "score", "stream"),
    "models": ("abstract_params", "init_params"),
    "sampling": ("Greedy", "Sampler", "sampler"),
    "text": ("Completion", "LanguageModel", "load"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"jaxdecode.{module}"), name)
            return value
    if name in _HOMES or name == "tokenizer":  # jaxdecode.sampling without importing it first
        return import_module(f"jaxdecode.{name}")
    raise AttributeError(f"module 'jaxdecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
