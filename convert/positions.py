"""More learned positions than a model was trained with: for measuring speed at contexts that it cannot use."""

from __future__ import annotations

import dataclasses

from convert.errors import ConversionError
from convert.sources import SourceTensor
from convert.weights import Plan, Target
from jaxdecode.config import ModelConfig

_TABLE = "positions.weight"
_MOST = 1 << 24


def extend_positions(plan: Plan, config: ModelConfig, count: int) -> tuple[Plan, ModelConfig]:
    """The same conversion with `count` positions, of which those past the trained ones repeat them from the first.

    Repeated rows keep activations as large as they are, zeros would not; what the model says there means nothing.

    Raises:
      ConversionError: the positions are not learned, or there are as many already.
    """
    if config.rope is not None:
        raise ConversionError(
            f"--extend-positions is for learned positions; those of a {config.model_type} are rotary and have no end"
        )
    if count <= config.max_position:
        raise ConversionError(f"--extend-positions must exceed the model's {config.max_position}; got {count}")
    if count > _MOST:
        raise ConversionError(f"--extend-positions must be at most {_MOST:,}; got {count}")
    items = {
        item: [_longer(target, config, count) if target.name == _TABLE else target for target in targets]
        for item, targets in plan.items.items()
    }
    return dataclasses.replace(plan, items=items), dataclasses.replace(config, max_position=count)


def _longer(target: Target, config: ModelConfig, count: int) -> Target:
    [table] = target.parts
    trained, offset = config.max_position, config.position_offset
    repeats = [
        _rows(table, offset, offset + min(trained, count - start)) for start in range(trained, count, trained)
    ]
    return dataclasses.replace(target, shape=(offset + count, *target.shape[1:]), parts=(table, *repeats))


def _rows(tensor: SourceTensor, first: int, end: int) -> SourceTensor:
    """Rows [first, end) of a tensor as one of its own."""

    def read(start: int, stop: int):
        return tensor.read(first + start, first + stop)

    return dataclasses.replace(tensor, shape=(end - first, *tensor.shape[1:]), read=read)
