"""The architecture of a decoder-only language model, in our own words.

Nothing here knows Hugging Face: `convert.hf_config` translates a `config.json` into a `ModelConfig`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["rms", "layer"]
_FLOAT32_MAX = 3.4e38


def positions_needed(prompt_tokens: int, new_tokens: int) -> int:
    """Tokens that are fed to continue a prompt: all but the last, which nothing follows."""
    return prompt_tokens + max(new_tokens - 1, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (half-split pairs) and how it is stretched beyond the trained context.

    Attributes:
      kind: which rule stretches the frequencies; `default` stretches nothing.
      theta: base of the frequencies.
      factor: how many times longer the context becomes (all kinds but `default`).
      original_max_len: context the model was trained on before stretching (dynamic, llama3, yarn, longrope).
      low_freq_factor, high_freq_factor: band limits of `llama3`.
      beta_fast, beta_slow, truncate: band limits of `yarn`, in rotations over the original context.
      attention_factor: multiplier of cos and sin (`yarn`, `longrope`).
      short_factors, long_factors: what each pair's frequency is divided by in sequences of up to original_max_len
        tokens, and in longer ones (`longrope`).
      rotary_dim: how many dimensions of a head turn, the first ones; None for all.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    rotary_dim: int | None = None

    def __post_init__(self):
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"rope kind must be one of {', '.join(get_args(RopeKind))}; got {self.kind!r}")
        if self.theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope theta and factor must be positive; got {self.theta=}, {self.factor=}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "attention_factor"):  # fmt: skip
            if not abs(getattr(self, name)) <= _FLOAT32_MAX:
                raise ValueError(f"rope {name} must be a float32; got {getattr(self, name)}")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and not self.original_max_len:
            raise ValueError(f"rope kind {self.kind!r} needs original_max_len; got {self.original_max_len}")
        factors = self.short_factors + self.long_factors
        if bool(factors) != (self.kind == "longrope") or not all(factor > 0 for factor in factors):
            raise ValueError(f"a longrope, and no other, has positive factors; got {factors} for {self.kind!r}")

    def turned(self, head_dim: int) -> int:
        """How many dimensions of a head of `head_dim` turn."""
        return head_dim if self.rotary_dim is None else self.rotary_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnifiedMax:
    """A statistic of a layer's attention: the maximum that all its softmaxes may share (arXiv 2311.01282, section 3).

    Attributes:
      value: taken off every score, usually the lowest.
      lowest, highest: the range of the scores; a row of attention with a higher one is computed again.
    """

    value: float
    lowest: float
    highest: float

    def __post_init__(self):
        if not self.lowest < self.highest:
            raise ValueError(f"a range of scores goes from lowest up to highest; got {self.lowest} and {self.highest}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that fixes a model's shapes and mathematics; hashable, so it is a static argument of `jit`.

    Attributes:
      model_type: which row of `jaxdecode.models.MODELS` builds it ("llama", "mistral", "qwen2", "qwen3", …).
      max_position: longest context the positions were made for, in tokens.
      norm: "rms", or "layer" with a mean taken off and a bias.
      post_norm: each half of a layer norms its result with the residual in it, rather than its input.
      parallel: both halves of a layer read what the layer was given, rather than the second the first's result.
      norm_offset: added to the gain of every RMSNorm, which is stored as its distance from it.
      final_norm: whether a norm stands before the output head.
      gated_mlp: down(activation(gate(x)) * up(x)), else down(activation(up(x))).
      embed_scale: what token embeddings are multiplied by, rounded to their type; None for nothing.
      scale_dim: scores of attention are divided by its square root; None for that of head_dim.
      attention_soft_cap, logit_soft_cap: cap * tanh(x / cap) of scores and logits; None for x itself.
      rope: rotary positions; None for a learned table, one row a position.
      local_rope: those of the layers with a window, if they are others.
      position_offset: rows of the learned table that stand before position 0.
      token_dim: width of the token embeddings and of the output head, which a product leads into and out of
        embed_dim; None where they have embed_dim themselves.
      layer_windows: sliding-window length per layer in tokens, None for full attention; empty means all full.
      unified_max: per layer, None for the online softmax; empty means online everywhere.
      eos_token_ids: tokens that end a sequence; the default of the text layer.
    """

    model_type: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    norm: NormKind = "rms"
    norm_offset: float = 0.0
    post_norm: bool = False
    parallel: bool = False
    final_norm: bool = True
    gated_mlp: bool = True
    tied_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embed_scale: float | None = None
    scale_dim: int | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None
    position_offset: int = 0
    token_dim: int | None = None
    layer_windows: tuple[int | None, ...] = ()
    unified_max: tuple[UnifiedMax | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "embed_dim",
            "mlp_dim",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position",
        ):
            _require_positive(name, getattr(self, name))
        for name in ("token_dim", "scale_dim"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        for name in ("embed_scale", "attention_soft_cap", "logit_soft_cap"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be positive; got {value}")
        if self.norm_offset and self.norm != "rms":
            raise ValueError(f"norm_offset belongs to RMSNorms; got {self.norm_offset} for {self.norm!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        self._check_positions()
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be positive; got {self.norm_eps}")
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}; got {self.activation!r}")
        if self.norm not in get_args(NormKind):
            raise ValueError(f"norm must be one of {', '.join(get_args(NormKind))}; got {self.norm!r}")
        if self.post_norm and self.parallel:
            raise ValueError("post_norm and parallel exclude each other; got both")
        for name in ("layer_windows", "unified_max"):
            if (given := getattr(self, name)) and len(given) != self.num_layers:
                raise ValueError(f"{name} must name {self.num_layers} layers; got {len(given)}")
        for window in self.layer_windows:
            if window is not None and window <= 0:
                raise ValueError(f"a sliding window must be a positive number of tokens; got {window}")

    def _check_positions(self) -> None:
        if self.local_rope is not None and (self.rope is None or self.local_rope.kind not in ("default", "linear")):
            raise ValueError(f"local_rope is default or linear, beside a rope; got {self.local_rope} and {self.rope}")
        if self.rope is None:
            if self.position_offset < 0:
                raise ValueError(f"position_offset must not be negative; got {self.position_offset}")
            return
        turned = self.rope.turned(self.head_dim)
        if turned % 2 or not 0 < turned <= self.head_dim:
            raise ValueError(
                f"rotary_dim or else head_dim must be even, and at most head_dim; got {turned} of {self.head_dim}"
            )
        if self.rope.kind == "longrope" and not (
            len(self.rope.short_factors) == len(self.rope.long_factors) == turned // 2
        ):
            raise ValueError(
                f"a longrope needs a short and a long factor for each of {turned // 2} pairs; got "
                f"{len(self.rope.short_factors)} and {len(self.rope.long_factors)}"
            )
        if self.position_offset:
            raise ValueError(f"position_offset belongs to learned positions; got {self.position_offset} beside a rope")

    def require_positions(self, count: int) -> None:
        """Refuses a sequence of more tokens than there are learned positions; a rope has one for any.

        Raises:
          ValueError: the sequence is too long.
        """
        lack = self.lacks_positions(count)
        if lack:
            raise ValueError(f"{lack}: {self.ways_to_fit}")

    def lacks_positions(self, count: int) -> str | None:
        """What to say of a sequence of more tokens than there are learned positions; None if there are enough."""
        if self.rope is not None or count <= self.max_position:
            return None
        return f"the model has {self.max_position} learned positions; {count} were asked for"

    @property
    def ways_to_fit(self) -> str:
        """What to do about more tokens than positions."""
        more = ", or convert with --extend-positions to measure speed only" if self.rope is None else ""
        return f"take a shorter prompt or fewer new tokens{more}"

    def require_growth(self, first: int, last: int) -> None:
        """Refuses a sequence that grows from `first` to `last` tokens past the length where a longrope changes.

        Raises:
          ValueError: the keys in its cache would be turned by the frequencies for short sequences, the new ones by
            those for long ones, which the model was not made for.
        """
        if self.rope is None or self.rope.kind != "longrope" or not self.rope.original_max_len:
            return
        if first <= self.rope.original_max_len < last:
            raise ValueError(
                f"the model turns by other frequencies beyond {self.rope.original_max_len} tokens: a sequence cannot "
                f"grow from {first} to {last}; ask for fewer new tokens, then give all of it again as a longer prompt"
            )

    @property
    def attention_scale(self) -> float:
        """What scores of attention are multiplied by."""
        return (self.scale_dim or self.head_dim) ** -0.5

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """Rotary positions of one layer, None for learned ones."""
        return self.rope if self.local_rope is None or self.window(layer) is None else self.local_rope

    def window(self, layer: int) -> int | None:
        """Sliding-window length of one layer in tokens, None for full attention."""
        return self.layer_windows[layer] if self.layer_windows else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; `ModelConfig.from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`.

        Raises:
          ValueError: a field is missing, unknown or out of range.
        """
        fields = dict(fields)
        for name, missing in (("rope", {}), ("local_rope", None)):
            rope = fields.get(name, missing)
            fields[name] = None if rope is None else _rope_from_dict(rope)
        ranges = fields.get("unified_max") or ()
        fields["unified_max"] = tuple(None if part is None else _build(UnifiedMax, part) for part in ranges)
        for name in ("layer_windows", "eos_token_ids"):
            fields[name] = tuple(fields.get(name) or ())
        return _build(cls, fields)


def _rope_from_dict(fields: dict[str, Any]) -> RopeConfig:
    factors = {name: tuple(fields.get(name) or ()) for name in ("short_factors", "long_factors")}
    return _build(RopeConfig, {**fields, **factors})


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")


def _build(cls, fields: dict[str, Any]):
    try:
        return cls(**fields)
    except TypeError as error:  # a missing or unknown field
        raise ValueError(f"{cls.__name__}: {str(error).replace(f'{cls.__name__}.__init__() ', '')}") from error
