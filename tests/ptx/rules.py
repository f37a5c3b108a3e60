"""How instructions are looked up: by name, each a function that makes a function of the block."""

from __future__ import annotations

from collections.abc import Callable

from ptx.parser import Instruction
from ptx.values import reader, writer

Run = Callable[..., None]
RULES: dict[str, Callable[[Instruction], Run]] = {}


def rule(*names: str):
    """Registers how instructions of these names are turned into functions of the block."""

    def register(build):
        RULES.update(dict.fromkeys(names, build))
        return build

    return register


def elementwise(instruction: Instruction, compute: Callable, types: list[str], result: str) -> Run:
    """d = compute(a, b, …), the operands read as `types`."""
    reads = [reader(operand, type_) for operand, type_ in zip(instruction.operands[1:], types, strict=True)]
    write = writer(instruction.operands[0], result)

    def run(block):
        write(block, compute(*[read(block) for read in reads]))

    return run
