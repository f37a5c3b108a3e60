"""Samplers: pytrees that turn logits into tokens; numbers are traced, which features they have is static.

A sampler is any registered pytree with two functions, `init_(batch) -> state` and
`sample(state, logits, key) -> (token, state)`; a third, `observe(state, tokens, lengths) -> state`, is
called once with the prompt if it exists. One of your own takes a few lines:

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class NoImmediateRepeat:
        temperature: float | jax.Array

        def init_(self, batch):
            return jnp.full((batch,), 2**30, jnp.int32)   # leaves lead with the batch axis

        def sample(self, state, logits, key):   # logits [batch, vocab], key [batch]
            logits = logits.at[jnp.arange(len(state)), state].set(-jnp.inf, mode="drop")
            token = jaxdecode.sampling.categorical(key, logits / self.temperature)
            return token, token
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Number = float | Sequence[float] | np.ndarray | jax.Array  # a scalar, or one number per row
State = Any

_CDF_BLOCK = 256  # a prefix sum over vocab / 256 block masses, then one inside the chosen block


@runtime_checkable
class Sampler(Protocol):
    """What the engine calls; `observe(state, tokens, lengths) -> state` may exist besides."""

    def init_(self, batch: int) -> State: ...

    def sample(self, state: State, logits: jax.Array, key: jax.Array) -> tuple[jax.Array, State]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The best token, the first of equals; needs no key."""

    def init_(self, batch: int) -> State:
        return ()

    def sample(self, state: State, logits: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), state


class Transform:
    """One step of a `Chain`: changes logits[batch, vocab]; the default has no state and sees no tokens."""

    def init_(self, batch: int) -> State:
        return ()

    def observe(self, state: State, tokens: jax.Array, lengths: jax.Array) -> State:
        return state

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        raise NotImplementedError(f"{type(self).__name__} needs `apply(state, logits) -> logits`")

    def update(self, state: State, token: jax.Array) -> State:
        return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chain:
    """Applies transforms in order, then draws from what is left; `sampler(...)` builds the usual ones."""

    transforms: tuple[Transform, ...] = ()

    def init_(self, batch: int) -> State:
        return tuple(transform.init_(batch) for transform in self.transforms)

    def observe(self, state: State, tokens: jax.Array, lengths: jax.Array) -> State:
        """The state after seeing prompts tokens[batch, n], of which lengths[batch] are real."""
        return tuple(t.observe(s, tokens, lengths) for t, s in zip(self.transforms, state, strict=True))

    def sample(self, state: State, logits: jax.Array, key: jax.Array) -> tuple[jax.Array, State]:
        """Draws token[batch] from logits[batch, vocab] with key[batch]."""
        logits = logits.astype(jnp.float32)
        for transform, own in zip(self.transforms, state, strict=True):
            logits = transform.apply(own, logits)
        token = categorical(key, logits)
        return token, tuple(t.update(s, token) for t, s in zip(self.transforms, state, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty(Transform):
    """Divides positive and multiplies negative logits of tokens seen, in the prompt or since (CTRL, §4.1)."""

    penalty: Number
    vocab_size: int = dataclasses.field(metadata={"static": True})

    def init_(self, batch: int) -> State:
        return jnp.zeros((batch, self.vocab_size), jnp.bool_)

    def observe(self, state: State, tokens: jax.Array, lengths: jax.Array) -> State:
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        columns = jnp.where(real, tokens, self.vocab_size)  # padding points past the end and is dropped
        return state.at[jnp.arange(tokens.shape[0])[:, None], columns].set(True, mode="drop")

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        penalty = _per_row(self.penalty, logits)
        return jnp.where(state, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def update(self, state: State, token: jax.Array) -> State:
        return state.at[jnp.arange(token.shape[0]), token].set(True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PresenceFrequencyPenalty(Transform):
    """Subtracts `presence` once and `frequency` per occurrence, counting generated tokens only."""

    presence: Number
    frequency: Number
    vocab_size: int = dataclasses.field(metadata={"static": True})

    def init_(self, batch: int) -> State:
        return jnp.zeros((batch, self.vocab_size), jnp.int32)

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        once = jnp.where(state > 0, _per_row(self.presence, logits), 0.0)
        return logits - once - _per_row(self.frequency, logits) * state

    def update(self, state: State, token: jax.Array) -> State:
        return state.at[jnp.arange(token.shape[0]), token].add(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogitBias(Transform):
    """Adds bias[vocab] or bias[batch, vocab]; -inf forbids a token."""

    bias: np.ndarray | jax.Array

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        if self.bias.shape not in (logits.shape, logits.shape[1:]):
            raise ValueError(
                f"logit_bias must be [vocab] or [batch, vocab]; got {list(self.bias.shape)} for logits "
                f"{list(logits.shape)}"
            )
        return logits + jnp.asarray(self.bias, jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Temperature(Transform):
    """Divides by the temperature; 0 leaves only the best token (the first of equals)."""

    temperature: Number

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        temperature = _per_row(self.temperature, logits)
        best = jnp.arange(logits.shape[1]) == jnp.argmax(logits, axis=-1)[:, None]
        scaled = logits / jnp.where(temperature == 0, 1.0, temperature)
        return jnp.where(temperature == 0, jnp.where(best, 0.0, -jnp.inf), scaled)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(Transform):
    """Keeps the k best tokens and whatever ties with the k-th."""

    k: Number

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        k = _per_row(self.k, logits)[..., 0]
        return keep_largest(logits, lambda threshold: jnp.sum(logits >= threshold, axis=-1) >= k)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP(Transform):
    """Keeps the fewest best tokens whose probabilities reach p, and whatever ties with the last of them."""

    p: Number

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        p = _per_row(self.p, logits)[..., 0]
        mass = jax.nn.softmax(logits, axis=-1)

        def enough(threshold: jax.Array) -> jax.Array:
            reached = jnp.sum(jnp.where(logits >= threshold, mass, 0.0), axis=-1) >= p
            return reached & (p < 1)  # rounded sums reach 1 before everything is kept

        return keep_largest(logits, enough)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP(Transform):
    """Keeps tokens at least `min_p` times as probable as the best one."""

    min_p: Number

    def apply(self, state: State, logits: jax.Array) -> jax.Array:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_per_row(self.min_p, logits))
        return jnp.where(logits >= floor, logits, -jnp.inf)


def sampler(
    temperature: Number = 1.0,
    top_k: Number | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
    presence_penalty: Number | None = None,
    frequency_penalty: Number | None = None,
    logit_bias: Mapping[int, float] | np.ndarray | jax.Array | None = None,
    vocab_size: int | None = None,
) -> Chain:
    """Builds penalties → bias → temperature → top-k → top-p → min-p; what is left out costs nothing.

    Every number is a scalar or one per row ([batch]) and is traced: changing it compiles nothing. Setting or
    leaving out a feature is static.

    Args:
      temperature: 0 means the best token.
      top_k: at least 1; for a row without the limit, give the vocabulary's size.
      top_p: in (0, 1]; the best token always stays.
      min_p: in [0, 1].
      repetition_penalty: above 0; 1 changes nothing. Sees the prompt and what was generated.
      presence_penalty, frequency_penalty: any finite number. See what was generated, not the prompt.
      logit_bias: {token: bias}, [vocab] or [batch, vocab].
      vocab_size: the model's (`config.vocab_size`); needed by the penalties and by a dict of biases.

    Raises:
      ValueError: a number known now is out of range, or vocab_size is missing. Traced numbers go unchecked.
    """
    chain: list[Transform] = []
    if repetition_penalty is not None:
        penalty = _checked("repetition_penalty", repetition_penalty, "above 0", lambda x: x > 0)
        chain.append(RepetitionPenalty(penalty, _vocab_size("repetition_penalty", vocab_size)))
    if presence_penalty is not None or frequency_penalty is not None:
        presence, frequency = (0.0 if x is None else x for x in (presence_penalty, frequency_penalty))
        presence = _checked("presence_penalty", presence, "finite", np.isfinite)
        frequency = _checked("frequency_penalty", frequency, "finite", np.isfinite)
        size = _vocab_size("presence_penalty and frequency_penalty", vocab_size)
        chain.append(PresenceFrequencyPenalty(presence, frequency, size))
    if logit_bias is not None:
        chain.append(LogitBias(_bias(logit_bias, vocab_size)))
    chain.append(Temperature(_checked("temperature", temperature, "at least 0", lambda x: x >= 0)))
    if top_k is not None:
        chain.append(TopK(_checked("top_k", top_k, "a whole number, at least 1", lambda x: x >= 1, np.int32)))
    if top_p is not None:
        chain.append(TopP(_checked("top_p", top_p, "in (0, 1]", lambda x: (x > 0) & (x <= 1))))
    if min_p is not None:
        chain.append(MinP(_checked("min_p", min_p, "in [0, 1]", lambda x: (x >= 0) & (x <= 1))))
    return Chain(tuple(chain))


def categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws token[batch] from logits[batch, vocab], row i with key[i] alone: its batch does not matter.

    Inverts the cumulative distribution with one uniform number per row, in two levels (blocks, then inside
    one). On a CPU that costs a sixth (batch 1) to a twentieth (batch 8) of a Gumbel number per entry.

    Raises:
      ValueError: key is not one typed key per row.
    """
    batch, vocab = logits.shape
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != (batch,):
        raise ValueError(f"key must be {batch} typed keys, one per row; got {key.dtype} {list(key.shape)}")
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -vocab % _CDF_BLOCK))).reshape(batch, -1, _CDF_BLOCK)
    block_mass = jnp.sum(mass, axis=-1)
    target = jax.vmap(jax.random.uniform)(key) * jnp.sum(block_mass, axis=-1)
    block, before = _invert_cdf(block_mass, target)
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    offset, _ = _invert_cdf(inside, target - before)
    return (block * _CDF_BLOCK + offset).astype(jnp.int32)


def _invert_cdf(mass: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index whose cumulative mass exceeds target[batch], and the mass before it, both [batch]."""
    cumulative = jnp.cumsum(mass, axis=-1)
    # Rounding may put the target outside the total, or make the sums not quite monotone: only an entry with
    # mass of its own may be chosen, and the heaviest one stands in when no sum exceeds the target.
    inside = (cumulative > target[:, None]) & (mass > 0)
    index = jnp.where(jnp.any(inside, axis=-1), jnp.argmax(inside, axis=-1), jnp.argmax(mass, axis=-1))
    at = index[:, None]
    before = jnp.take_along_axis(cumulative, at, 1) - jnp.take_along_axis(mass, at, 1)
    return index, before[:, 0]


def keep_largest(logits: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keeps the entries at or above the highest threshold that keeps enough of them; the rest become -inf.

    The threshold is found exactly, without sorting, by 32 bisections over the float32 numbers in their order.

    Args:
      logits: [batch, vocab] float32.
      enough: threshold[batch, 1] -> [batch] bool, True for every threshold below one that is True.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # the mean rounded up, without overflow
        holds = enough(_from_ordered(middle)[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    bounds = _to_ordered(jnp.min(logits, axis=-1)), _to_ordered(jnp.max(logits, axis=-1))
    threshold, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(logits >= _from_ordered(threshold)[:, None], logits, -jnp.inf)


def _to_ordered(x: jax.Array) -> jax.Array:
    """int32 numbers in the same order as float32 x: the bits, those below the sign flipped if negative."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_ordered(image: jax.Array) -> jax.Array:
    bits = jnp.where(image < 0, image ^ 0x7FFFFFFF, image)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _per_row(value: Number, logits: jax.Array) -> jax.Array:
    """The number as [1, 1] or [batch, 1]."""
    array = jnp.asarray(value)
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != logits.shape[0]):
        raise ValueError(
            f"a sampler's number must be a scalar or one per row; got shape {list(array.shape)} for a batch "
            f"of {logits.shape[0]}"
        )
    return array.reshape(-1, 1)


def _checked(name: str, value: Any, rule: str, holds: Callable, dtype: type = np.float32) -> Any:
    """The value as an array of one dtype, so that 1 and 1.0 compile the same; checked if it is known now."""
    if isinstance(value, Tracer):
        return value.astype(dtype)
    number = np.asarray(value)
    with np.errstate(invalid="ignore"):
        whole = dtype is not np.int32 or np.all(number == np.trunc(number))
        fine = (
            np.issubdtype(number.dtype, np.number) and whole and np.all(holds(number) & np.isfinite(number))
        )
    if not fine:
        raise ValueError(f"{name} must be {rule}; got {value}")
    return number.astype(dtype)


def _vocab_size(name: str, vocab_size: int | None) -> int:
    if vocab_size is None:
        raise ValueError(f"{name} counts tokens: pass vocab_size=config.vocab_size; got vocab_size=None")
    return vocab_size


def _bias(bias: Any, vocab_size: int | None) -> Any:
    if not isinstance(bias, Mapping):
        return bias if isinstance(bias, jax.Array) else np.asarray(bias, np.float32)
    size = _vocab_size("a dict of logit_bias", vocab_size)
    dense = np.zeros((size,), np.float32)
    for token, amount in bias.items():
        if not 0 <= token < size:
            raise ValueError(f"logit_bias names token {token}, outside the vocabulary of {size}")
        dense[token] = amount
    return dense
