"""The pickle of a torch archive, read by an interpreter of our own that can build nothing but a dict of tensors.

A pickle is a program. Its instructions are carried out here on plain values: a global is a name in a table, never an
import; calling one makes a record; no instruction sets an attribute. What a dict of tensors has no use for is refused.
"""

from __future__ import annotations

import dataclasses
import pickletools
import warnings
from collections.abc import Callable
from typing import Any

from convert.errors import ConversionError
from jaxdecode.safetensors_file import MAX_RANK

# Instructions, and elements that called functions look at: a value that was noted costs one instruction to use again,
# however long it is. A tensor takes about 45, the largest models in this format have 2,000.
MAX_STEPS = 1_000_000
_STORAGES = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}


@dataclasses.dataclass(frozen=True)
class StorageType:
    dtype: str


@dataclasses.dataclass(frozen=True)
class Storage:
    dtype: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class TensorRecord:
    """Where a tensor's elements are; everything in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(data: bytes) -> dict[str, TensorRecord]:
    """The dict of tensors that a pickle describes.

    Raises:
      ConversionError: it asks for a global that a dict of tensors does not need; the message names it.
      ValueError: it is malformed, or describes something else.
    """
    machine = _Machine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes in protocol 0's strings
        for instruction, argument, _ in pickletools.genops(data):
            machine.count(1)
            if instruction.name not in _INSTRUCTIONS:
                raise ValueError(f"a dict of tensors has no use for the instruction {instruction.name}")
            _INSTRUCTIONS[instruction.name](machine, argument)
    records = machine.pop()
    if not isinstance(records, dict):
        raise ValueError(f"it holds a {type(records).__name__}; expected a dict from names to tensors")
    for name, record in records.items():
        if not isinstance(record, TensorRecord):
            raise ValueError(f"expected a dict from names to tensors; {name!r:.80} is a {type(record).__name__}")
    return records


class _Mark:
    """Where on the stack the elements of a list begin."""


_MARK = _Mark()


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self):
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def count(self, steps: int) -> None:
        """Refuses a pickle whose work grows out of proportion, before it is done."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise ValueError(f"it has more than {MAX_STEPS:,} instructions and elements to handle")

    def pop(self, wanted: type = object) -> Any:
        if not self.stack:
            raise ValueError("it takes more values than it has made")
        return _of_type(self.stack.pop(), wanted)

    def top(self, wanted: type = object) -> Any:
        if not self.stack:
            raise ValueError("it takes more values than it has made")
        return _of_type(self.stack[-1], wanted)

    def pop_to_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while place >= 0 and self.stack[place] is not _MARK:
            place -= 1
        if place < 0:
            raise ValueError("it ends a list that it has not begun")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def recall(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError(f"it recalls value {place}, which it has not noted")
        self.stack.append(self.memo[place])


def _of_type(value: Any, wanted: type) -> Any:
    if value is _MARK or not isinstance(value, wanted):
        raise ValueError(f"it uses a {type(value).__name__} where a {wanted.__name__} belongs")
    return value


def _set_items(fields: dict[str, Any], values: list[Any]) -> None:
    if len(values) % 2:
        raise ValueError("a dict takes a name and a value at a time")
    for name, value in zip(values[::2], values[1::2], strict=True):
        if _of_type(name, str) in fields:
            raise ValueError(f"{name!r:.80} stands in a dict twice")
        fields[name] = value


def _make_dict(machine: _Machine, values: list[Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    _set_items(fields, values)
    return fields


def _find_global(name: str) -> Any:
    """What stands for a global, named "module name"; nothing is imported.

    Raises:
      ConversionError: any that a dict of tensors does not need.
    """
    if name in _STORAGES:
        return StorageType(_STORAGES[name])
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    raise ConversionError(
        f"refused: its pickle asks for {name.replace(' ', '.')!s:.200}, which a dict of tensors does not need and "
        "which could run code"
    )


def _stack_global(machine: _Machine) -> Any:
    name, module = machine.pop(str), machine.pop(str)
    return _find_global(f"{module} {name}")


@dataclasses.dataclass(frozen=True)
class _Function:
    call: Callable[[_Machine, tuple[Any, ...]], Any]


def _reduce(machine: _Machine) -> Any:
    arguments, function = machine.pop(tuple), machine.pop(_Function)
    return function.call(machine, arguments)


def _ordered_dict(machine: _Machine, arguments: tuple[Any, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    pairs = _of_type(arguments[0], list) if arguments else []
    machine.count(len(pairs))
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a dict takes a name and a value at a time")
        _set_items(fields, list(pair))
    return fields


def _rebuild_tensor(machine: _Machine, arguments: tuple[Any, ...]) -> TensorRecord:
    if len(arguments) < 4:
        raise ValueError("a tensor needs a storage, an offset, a shape and strides")
    storage, offset, shape, strides = arguments[:4]
    for value, kind in ((storage, Storage), (shape, tuple), (strides, tuple)):
        _of_type(value, kind)
    if len(shape) != len(strides):
        raise ValueError("a tensor needs as many strides as dimensions")
    if len(shape) > MAX_RANK:
        raise ValueError(f"a tensor has {len(shape):,} dimensions; at most {MAX_RANK} are read")
    machine.count(2 * len(shape))
    return TensorRecord(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides)))


def _rebuild_parameter(machine: _Machine, arguments: tuple[Any, ...]) -> TensorRecord:
    return _of_type(arguments[0] if arguments else None, TensorRecord)


def _storage(pid: tuple[Any, ...]) -> Storage:
    if len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], StorageType) or not isinstance(pid[2], str):
        raise ValueError("it refers to something outside that is no storage")
    return Storage(pid[1].dtype, pid[2], _natural(pid[4]))


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"expected a natural number, got a {type(value).__name__}")
    return value


_FUNCTIONS = {
    "collections OrderedDict": _Function(_ordered_dict),
    "torch._utils _rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils _rebuild_parameter": _Function(_rebuild_parameter),
}


def _build(machine: _Machine) -> None:
    """Attributes of an object. A state dict has some, which say nothing of its tensors; nothing else may."""
    machine.pop()
    machine.top(dict)


def _makes(make: Callable[[_Machine], Any]) -> Callable[[_Machine, Any], None]:
    """An instruction that leaves a value on the stack."""
    return lambda machine, argument: machine.stack.append(make(machine))


def _does(act: Callable[[_Machine], Any]) -> Callable[[_Machine, Any], None]:
    def run(machine: _Machine, argument: Any) -> None:
        act(machine)

    return run


def _last(machine: _Machine, count: int) -> tuple[Any, ...]:
    return tuple(machine.pop() for _ in range(count))[::-1]


def _literal(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _append(machine: _Machine) -> None:
    value = machine.pop()
    machine.top(list).append(value)


def _set_item(machine: _Machine) -> None:
    pair = _last(machine, 2)
    _set_items(machine.top(dict), list(pair))


def _appends(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    machine.top(list).extend(values)


def _sets(machine: _Machine) -> None:
    values = machine.pop_to_mark()
    _set_items(machine.top(dict), values)


def _note(machine: _Machine, place: Any) -> None:
    machine.memo[len(machine.memo) if place is None else place] = machine.top()


_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _does(lambda machine: None), "FRAME": _does(lambda machine: None), "STOP": _does(lambda machine: None),
    "MARK": _makes(lambda machine: _MARK), "POP": _does(lambda machine: machine.pop()),
    "POP_MARK": _does(lambda machine: machine.pop_to_mark()),
    "NONE": _makes(lambda machine: None), "NEWTRUE": _makes(lambda machine: True),
    "NEWFALSE": _makes(lambda machine: False),
    "EMPTY_DICT": _makes(lambda machine: {}), "EMPTY_LIST": _makes(lambda machine: []),
    "EMPTY_TUPLE": _makes(lambda machine: ()), "TUPLE": _makes(lambda machine: tuple(machine.pop_to_mark())),
    "TUPLE1": _makes(lambda machine: _last(machine, 1)), "TUPLE2": _makes(lambda machine: _last(machine, 2)),
    "TUPLE3": _makes(lambda machine: _last(machine, 3)), "LIST": _makes(lambda machine: machine.pop_to_mark()),
    "DICT": _makes(lambda machine: _make_dict(machine, machine.pop_to_mark())),
    "APPEND": _does(_append), "APPENDS": _does(_appends), "SETITEM": _does(_set_item), "SETITEMS": _does(_sets),
    "GLOBAL": lambda machine, name: machine.stack.append(_find_global(name)),
    "INST": lambda machine, name: machine.stack.append(_find_global(name)),
    "STACK_GLOBAL": _makes(_stack_global), "REDUCE": _makes(_reduce), "BUILD": _does(_build),
    "BINPERSID": _makes(lambda machine: _storage(machine.pop(tuple))),
    "PUT": _note, "BINPUT": _note, "LONG_BINPUT": _note, "MEMOIZE": _note,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
        _literal,
    ),
}  # fmt: skip
