"""What one family of models is called and shaped like in Hugging Face's words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from convert.rows import Order
from jaxdecode.config import ModelConfig, RopeKind

# The largest number that a field may hold, by Llama's name for it; beyond any model, and within what an array can be.
_SIZE = 1 << 24
_MOST = {
    "vocab_size": _SIZE, "hidden_size": _SIZE, "intermediate_size": _SIZE, "num_attention_heads": _SIZE,
    "num_key_value_heads": _SIZE, "head_dim": _SIZE, "word_embed_proj_dim": _SIZE, "num_hidden_layers": 10_000,
}  # fmt: skip
_MOST_TOKENS = (1 << 31) - 1
_FLOAT32 = (1.2e-38, 3.4e38)  # positive numbers that it holds


class Fields:
    """A `config.json` with types checked: what is wrong goes into `problems`, a usable value comes back.

    Fields are asked for by Llama's names for them; `names` says what a family calls them, None for not at all.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        problems: list[str],
        names: Mapping[str, str | None] = {},
    ):
        self.config, self.defaults, self.problems, self.names = config, defaults, problems, names

    def key(self, name: str) -> str | None:
        """What this config.json calls a field; None if its family knows no such field."""
        return self.names.get(name, name)

    def get(self, name: str) -> Any:
        """What it says, or else the default, of whatever type."""
        key = self.key(name)
        value = None if key is None else self.config.get(key)
        return self.defaults.get(name) if value is None else value

    def integer(self, name: str) -> int:
        """A positive integer of reasonable size; a problem if absent without a default."""
        value, most = self.get(name), _MOST.get(name, _MOST_TOKENS)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most:
            return value
        large = isinstance(value, int) and value > most
        self._complain(name, f"a positive integer, at most {most:,}" if large else "a positive integer", value)
        return 2

    def number(self, name: str) -> float:
        """A positive number that float32 can hold."""
        value, (least, most) = self.get(name), _FLOAT32
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        self._complain(name, "a positive number", value)
        return 1.0

    def flag(self, name: str) -> bool:
        """True or false; absent without a default is false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self._complain(name, "true or false", value)
        return value is True

    def optional_integer(self, name: str) -> int | None:
        """A positive integer or None, where null is a statement and only absence takes the default."""
        value = self.config[name] if name in self.config else self.defaults.get(name)
        return None if value is None else Fields({name: value}, {}, self.problems).integer(name)

    def optional_number(self, name: str) -> float | None:
        """A positive number or None, where null is a statement and only absence takes the default."""
        value = self.config[name] if name in self.config else self.defaults.get(name)
        return None if value is None else Fields({name: value}, {}, self.problems).number(name)

    def require(self, name: str, wanted: Any) -> None:
        """Complains unless a field says what alone is supported."""
        value = self.get(name)
        if value != wanted:
            self._complain(name, f"{json.dumps(wanted)} to be supported", value)

    def _complain(self, name: str, expected: str, value: Any) -> None:
        found = "is missing" if value is None else f"is {value!r:.80}"
        self.problems.append(f"config.json: {self.key(name)} must be {expected}; it {found}")


class Part(NamedTuple):
    """What one of their tensors brings to one of ours.

    Attributes:
      name: theirs.
      rows: how many.
      order: where rows of ours stand in their tensor; None if they are in the same order.
    """

    name: str
    rows: int
    order: Order | None


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
      names: Llama's name of a field of config.json -> this family's, None if it has no such field.
      layers: their name of the list of layers.
      renamed: a beginning of tensor names that some publishers use, and the one of this table that it stands for.
      rope_keys: whether config.json says positions as Llama's does; if not, `features` and `to_hf` see to them.
      rope_kinds: their names of the rules that stretch positions -> ours.
      partial_rotary: the share of a head that turns when config.json says nothing; None if all of it always does.
      qkv_rows: where rows of our query, key and value product stand in theirs; None for the same order.
    """

    model_type: str
    architecture: str
    model: Mapping[str, str]
    layer: Mapping[str, tuple[str, ...]]
    ignored: tuple[str, ...]
    defaults: Mapping[str, Any]
    features: Callable[[Fields], dict[str, Any]]
    to_hf: Callable[[ModelConfig], dict[str, Any]]
    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    layers: str = "model.layers"
    renamed: tuple[str, str] = ("", "")
    rope_keys: bool = True
    rope_kinds: Mapping[str, RopeKind] = dataclasses.field(default_factory=lambda: {k: k for k in get_args(RopeKind)})
    partial_rotary: float | None = None
    qkv_rows: Callable[[ModelConfig, np.ndarray], np.ndarray] | None = None

    def sources(self, target: str) -> list[str]:
        """Names of the source tensors whose rows make one of ours ("layers.3.mlp.gate_up.weight")."""
        module, _, suffix = target.rpartition(".")
        if not module.startswith("layers."):
            return [f"{self.model[module]}.{suffix}"]
        _, index, inner = module.split(".", 2)
        return [f"{self.layers}.{index}.{part}.{suffix}" for part in self.layer[inner]]

    def full_name(self, name: str) -> str:
        """The name in this table of a tensor that a publisher called `name`."""
        published, ours = self.renamed
        return ours + name.removeprefix(published) if published and name.startswith(published) else name

    def parts(self, config: ModelConfig, target: str, rows: int) -> list[Part]:
        """The source tensors whose rows make the `rows` of one of our tensors."""
        names = self.sources(target)
        counts, parts = _part_rows(config, target, len(names), rows), []
        for name, count, start in zip(names, counts, np.cumsum((0, *counts)), strict=False):
            parts.append(Part(name, count, self._order(config, target, int(start))))
        return parts

    def _order(self, config: ModelConfig, target: str, start: int) -> Order | None:
        """Where rows of a part that begins at row `start` of ours stand in it."""
        places = self.qkv_rows
        if places is None or ".attention.qkv." not in target:
            return None
        return lambda rows: places(config, rows + start) - start


def _part_rows(config: ModelConfig, target: str, parts: int, rows: int) -> tuple[int, ...]:
    """How many rows of one of our fused tensors each of its `parts` brings."""
    if parts == 1:
        return (rows,)
    if ".attention.qkv." in target:
        return (config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2)
    return (rows // parts,) * parts  # gate and up
