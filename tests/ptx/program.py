"""A kernel made ready to run: each instruction as a function of the block, or as a change of control."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from ptx import arithmetic, choices, integers, memory_ops, moves, warp_ops  # noqa: F401  each adds its rules
from ptx.faults import UnknownInstruction
from ptx.parser import Immediate, Instruction, Kernel, Register, Symbol, Variable
from ptx.rules import RULES
from ptx.values import UNSIGNED, known, reader, writer


@dataclasses.dataclass(frozen=True)
class Branch:
    target: int


@dataclasses.dataclass(frozen=True)
class Exit:
    pass


@dataclasses.dataclass(frozen=True)
class Trap:
    pass


@dataclasses.dataclass(frozen=True)
class Reduction:
    """`combine` of all threads' predicates ([n] bool -> one value), written to each."""

    read: Callable
    combine: Callable
    write: Callable


@dataclasses.dataclass(frozen=True)
class Barrier:
    """bar.sync, bar.arrive, which does not wait, or bar.red, which hands out a reduction of a predicate.

    `count` None: every thread of the block.
    """

    number: Callable
    count: Callable | None
    arrive: bool
    aligned: bool
    reduce: Reduction | None = None


Control = Branch | Exit | Trap | Barrier


@dataclasses.dataclass(frozen=True)
class Step:
    """What to do at one program counter: `run` or `control`.

    `members` gives the lanes that must take part, for instructions of a whole warp; `yields` marks those after which
    another block may go on: atomics, volatile accesses.
    """

    predicate: Register | None
    run: Callable | None = None
    control: Control | None = None
    members: Callable | None = None
    aligned: bool = False
    yields: bool = False


class Program:
    """A kernel's steps.

    Raises:
      UnknownInstruction: an instruction, or a modifier of one, that has no rule.
    """

    def __init__(self, kernel: Kernel, variables: list[Variable]) -> None:
        self.kernel = kernel
        self.shared = kernel.shared + [v for v in variables if v.space == "shared"]
        self.register_types = [UNSIGNED[bits] for bits in kernel.registers]
        self.steps = [self._step(instruction) for instruction in kernel.instructions]
        self.steps.append(Step(None, control=Exit()))

    def text(self, at: int) -> str:
        return self.kernel.instructions[at].text if at < len(self.kernel.instructions) else "end of the kernel"

    def _step(self, instruction: Instruction) -> Step:
        control = self._control(instruction)
        if control is not None:
            return Step(instruction.predicate, control=control, aligned=getattr(control, "aligned", False))
        if instruction.name not in RULES:
            raise UnknownInstruction(instruction.text)
        run = RULES[instruction.name](instruction)
        return Step(
            instruction.predicate,
            run=run,
            members=getattr(run, "warp", None),
            aligned="aligned" in instruction.modifiers,
            yields=getattr(run, "yields", False),
        )

    def _control(self, instruction: Instruction) -> Control | None:
        match instruction.name:
            case "bra":
                known(instruction, "uni")
                (target,) = instruction.operands
                assert isinstance(target, Symbol)
                return Branch(self.kernel.target(instruction, target.name))
            case "ret" | "exit":
                known(instruction, "uni")
                return Exit()
            case "trap":
                return Trap()
            case "bar" | "barrier":
                if "warp" not in instruction.modifiers:
                    return _barrier(instruction)
        return None


def _barrier(instruction: Instruction) -> Barrier:
    known(instruction, "sync", "arrive", "red", "popc", "and", "or", "aligned", "cta")
    operands, reduction = list(instruction.operands), None
    if "red" in instruction.modifiers:
        combine = {"popc": np.count_nonzero, "and": np.all, "or": np.any}
        combine = combine[next(m for m in instruction.modifiers if m in combine)]
        write = writer(operands[0], "u32" if combine is np.count_nonzero else "pred")
        reduction = Reduction(reader(operands[-1], "pred"), combine, write)
        operands = operands[1:-1]
    number, *count = operands or (Immediate(0),)
    return Barrier(
        reader(number, "u32"),
        reader(count[0], "u32") if count else None,
        "arrive" in instruction.modifiers,
        instruction.name == "bar" or "aligned" in instruction.modifiers,
        reduction,
    )
