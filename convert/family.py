"""What one family of models is called and shaped like in Hugging Face's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxdecode.config import ModelConfig


class Fields:
    """A `config.json` with types checked: what is wrong goes into `problems`, a usable value comes back."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], problems: list[str]):
        self.config, self.defaults, self.problems = config, defaults, problems

    def integer(self, name: str) -> int:
        """A positive integer; a problem if absent without a default."""
        value = self._get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        self._complain(name, "a positive integer", value)
        return 2

    def number(self, name: str) -> float:
        """A positive number."""
        value = self._get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
            return float(value)
        self._complain(name, "a positive number", value)
        return 1.0

    def flag(self, name: str) -> bool:
        """True or false; absent is false."""
        value = self._get(name)
        if value is not None and not isinstance(value, bool):
            self._complain(name, "true or false", value)
        return value is True

    def optional_integer(self, name: str) -> int | None:
        """A positive integer or None, where null is a statement and only absence takes the default."""
        value = self.config[name] if name in self.config else self.defaults.get(name)
        return None if value is None else Fields({name: value}, {}, self.problems).integer(name)

    def _get(self, name: str) -> Any:
        value = self.config.get(name)
        return self.defaults.get(name) if value is None else value

    def _complain(self, name: str, expected: str, value: Any) -> None:
        found = "is missing" if value is None else f"is {value!r:.80}"
        self.problems.append(f"config.json: {name} must be {expected}; it {found}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of `hf_config.FAMILIES`.

    Attributes:
      model_type, architecture: as config.json names them.
      model, layer: our module name -> their module names, whose rows stand one after another in ours.
      ignored: regular expressions of tensors that carry nothing (recomputed buffers).
      defaults: what transformers assumes when config.json says nothing.
      features: config.json -> the ModelConfig fields in which families differ.
      to_hf: the inverse of `features`.
    """

    model_type: str
    architecture: str
    model: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    defaults: Mapping[str, Any]
    features: Callable[[Fields], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]

    def sources(self, target: str) -> list[str]:
        """Names of the source tensors whose rows make one of ours ("layers.3.mlp.gate_up.weight")."""
        module, _, suffix = target.rpartition(".")
        if not module.startswith("layers."):
            return [f"{self.model[module]}.{suffix}"]
        _, index, inner = module.split(".", 2)
        return [f"model.layers.{index}.{part}.{suffix}" for part in self.layer[inner]]


def part_rows(config: ModelConfig, target: str, parts: int, rows: int) -> tuple[int, ...]:
    """How many rows of one of our fused tensors each of its `parts` brings."""
    if parts == 1:
        return (rows,)
    if ".attention.qkv." in target:
        return (config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2)
    return (rows // parts,) * parts  # gate and up
