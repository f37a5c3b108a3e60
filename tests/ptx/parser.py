"""PTX text to kernels: instructions with typed operands, labels resolved, scopes flattened."""

from __future__ import annotations

import dataclasses
import re
import struct

from ptx.faults import UnknownInstruction

TOKEN = re.compile(
    r"""\s+|//[^\n]*|/\*.*?\*/
    |(?P<string>"[^"]*")
    |(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+\.\d+(?:[eE][-+]?\d+)?|\d+U?(?![\w.$]))
    |(?P<word>[%.]?[A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*|\.[A-Za-z_][\w.]*|_)
    |(?P<mark>[{}()\[\];:,=+\-|!@<>*])""",
    re.VERBOSE | re.DOTALL,
)

# Source positions, a line each, and hints to the optimiser change nothing.
IGNORED = re.compile(r"^\s*\.(?:(?:loc|file)\b[^\n]*$|pragma\b[^;]*;)", re.MULTILINE)

BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32}
BITS |= {"u32": 32, "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}


@dataclasses.dataclass(frozen=True)
class Register:
    """An index into the register file and its width in bits (1 for a predicate)."""

    index: int
    bits: int
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Immediate:
    """A number: an int, or the bits of a float with their width."""

    value: int
    float_bits: int = 0


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A variable's name, or a special register's (%tid.x), or a label's."""

    name: str


@dataclasses.dataclass(frozen=True)
class Address:
    """[base + offset]"""

    base: Register | Symbol | Immediate
    offset: int


@dataclasses.dataclass(frozen=True)
class Vector:
    """{a, b, …}"""

    parts: tuple


@dataclasses.dataclass(frozen=True)
class Pair:
    """a|b: a result and the predicate that goes with it."""

    first: object
    second: object


Operand = Register | Immediate | Symbol | Address | Vector | Pair


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name.modifiers operands`, run where `predicate` holds; `scope`: the braces it stands in, from outside."""

    name: str
    modifiers: tuple[str, ...]
    operands: tuple
    predicate: Register | None
    text: str
    scope: tuple[int, ...]


@dataclasses.dataclass
class Variable:
    """A named piece of memory: `space` is global, const, shared, local or param; `data` its initial bytes if any."""

    name: str
    space: str
    align: int
    size: int
    data: bytes | None = None


@dataclasses.dataclass
class Kernel:
    """An entry point; `registers[i]` is the width in bits of register i, `labels[scope, name]` an instruction."""

    name: str
    params: list[Variable]
    shared: list[Variable]
    local: list[Variable]
    registers: list[int]
    instructions: list[Instruction]
    labels: dict[tuple[tuple[int, ...], str], int]
    max_threads: int | None = None

    def target(self, instruction: Instruction, name: str) -> int:
        """Where a branch goes: the label of the innermost braces around it that have one of that name."""
        for depth in range(len(instruction.scope), -1, -1):
            if (instruction.scope[:depth], name) in self.labels:
                return self.labels[instruction.scope[:depth], name]
        raise UnknownInstruction(f"no label {name} for `{instruction.text}`")


@dataclasses.dataclass
class Module:
    """A PTX file: its kernels by name and its module-level variables."""

    target: str
    kernels: dict[str, Kernel]
    variables: list[Variable]


def parse(text: str) -> Module:
    """Reads a PTX file.

    Raises:
      UnknownInstruction: something in it has no rule here.
    """
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text = IGNORED.sub("", text)
        self.tokens: list[tuple[str, str, int]] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                raise UnknownInstruction(f"unreadable PTX: {text[at : at + 60]!r}")
            if match.lastgroup:
                self.tokens.append((match.lastgroup, match.group(), at))
            at = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][1]

    def take(self, mark: str) -> bool:
        if self.peek() == mark:
            self.at += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            start = self.tokens[min(self.at, len(self.tokens) - 1)][2]
            raise UnknownInstruction(f"expected {mark!r} before {self.text[start : start + 60]!r}")

    def skip_statement(self) -> None:
        """To the end of a statement, or of the braces it opens first."""
        depth = 0
        while True:
            word = self.next()
            depth += (word == "{") - (word == "}")
            if depth == 0 and word in (";", "}"):
                return

    def module(self) -> Module:
        self.found = Module("", {}, [])
        linkage = (".visible", ".weak", ".extern", ".common")
        while self.at < len(self.tokens):
            word = self.next()
            if word in linkage:
                continue
            if word == ".version":
                self.next()
            elif word == ".target":
                self.found.target = self.next()
                while self.take(","):
                    self.next()
            elif word == ".address_size":
                self.next()
            elif word == ".section":
                self.skip_statement()
            elif word == ".entry":
                kernel = self.kernel()
                self.found.kernels[kernel.name] = kernel
            elif word == ".func":
                self.skip_statement()  # a call of it is an unknown instruction
            elif word in (".global", ".const", ".shared"):
                self.found.variables.append(self.variable(word[1:]))
                self.expect(";")
            elif word != ";":
                raise UnknownInstruction(f"unknown directive {word}")
        return self.found

    def variable(self, space: str) -> Variable:
        """`.align 16 .b8 name[128] = {…}`, the space already read."""
        align, bits, count = 0, 0, 1
        name = None
        while name is None:
            word = self.next()
            if word == ".align":
                align = int(self.next())
            elif word in (".ptr", ".global", ".shared", ".const"):
                continue
            elif word in (".v2", ".v4"):
                count = int(word[2])
            elif word[1:] in BITS:
                bits = BITS[word[1:]]
            elif word.startswith("."):
                raise UnknownInstruction(f"unknown attribute {word} of a variable")
            else:
                name = word
        while self.take("["):
            if not self.take("]"):
                count *= int(self.next().rstrip("U"), 0)
                self.expect("]")
            else:
                count = 0
        data = None
        if self.take("="):
            data = self.initial(bits // 8).ljust(count * bits // 8, b"\0")
        return Variable(name, space, align or max(bits // 8, 1), count * bits // 8, data)

    def initial(self, width: int) -> bytes:
        if self.take("{"):
            parts = []
            while not self.take("}"):
                parts.append(self.initial(width))
                self.take(",")
            return b"".join(parts)
        number = self.number()
        return (number.value % (1 << (8 * width))).to_bytes(width, "little")

    def number(self) -> Immediate:
        sign = -1 if self.take("-") else 1
        kind, word, _ = self.tokens[self.at]
        if kind != "number":
            raise UnknownInstruction(f"expected a number, found {word!r}")
        self.at += 1
        if word[:2] in ("0f", "0F"):
            return Immediate(int(word[2:], 16) ^ (0x80000000 if sign < 0 else 0), 32)
        if word[:2] in ("0d", "0D"):
            return Immediate(int(word[2:], 16) ^ (1 << 63 if sign < 0 else 0), 64)
        if "." in word:
            return Immediate(struct.unpack("<Q", struct.pack("<d", sign * float(word)))[0], 64)
        word = word.rstrip("U")
        octal = len(word) > 1 and word[0] == "0" and word.isdigit()
        return Immediate(sign * int(word, 8 if octal else 0))

    def kernel(self) -> Kernel:
        self.current = Kernel(self.next(), [], [], [], [], [], {})
        self.expect("(")
        while not self.take(")"):
            self.expect(".param")
            self.current.params.append(self.variable("param"))
            self.take(",")
        while not self.take("{"):
            word = self.next()
            if word not in (".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".noreturn"):
                raise UnknownInstruction(f"unknown directive {word} of kernel {self.current.name}")
            sizes = []
            while self.tokens[self.at][0] == "number":
                sizes.append(int(self.next()))
                self.take(",")
            if word in (".reqntid", ".maxntid"):
                self.current.max_threads = sizes[0] * (sizes[1] if len(sizes) > 1 else 1) * (*sizes, 1, 1)[2]
        self.scopes: list[dict[str, Register]] = [{}]
        self.scope: tuple[int, ...] = ()
        self.body()
        return self.current

    def body(self) -> None:
        made = 0
        while self.scopes:
            kind, word, _ = self.tokens[self.at]
            if self.take("{"):
                made += 1
                self.scopes.append({})
                self.scope = (*self.scope, made)
            elif self.take("}"):
                self.scopes.pop()
                self.scope = self.scope[:-1]
            elif self.take(";"):
                continue
            elif word == ".reg":
                self.declare_registers()
            elif word in (".shared", ".local"):
                self.next()
                variables = self.current.shared if word == ".shared" else self.current.local
                variables.append(self.variable(word[1:]))
                self.expect(";")
            elif kind == "word" and self.tokens[self.at + 1][1] == ":":
                self.current.labels[self.scope, word] = len(self.current.instructions)
                self.at += 2
            elif word.startswith("."):
                raise UnknownInstruction(f"unknown directive {word} in kernel {self.current.name}")
            else:
                self.current.instructions.append(self.instruction())

    def declare_registers(self) -> None:
        self.next()
        bits = BITS[self.next()[1:]]
        while True:
            name = self.next()
            names = [name]
            if self.take("<"):
                names = [f"{name}{i}" for i in range(int(self.next()))]
                self.expect(">")
            for each in names:
                self.scopes[-1][each] = Register(len(self.current.registers), bits)
                self.current.registers.append(bits)
            if self.take(";"):
                return
            self.expect(",")

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def instruction(self) -> Instruction:
        start = self.tokens[self.at][2]
        predicate = None
        if self.take("@"):
            negated = self.take("!")
            register = self.register(self.next())
            assert register is not None and register.bits == 1
            predicate = dataclasses.replace(register, negated=negated)
        name, *modifiers = re.split(r"\.|::", self.next())
        operands = []
        while not self.take(";"):
            operands.append(self.operand())
            self.take(",")
        end = self.tokens[self.at - 1][2]
        text = " ".join(self.text[start:end].split())
        return Instruction(name, tuple(modifiers), tuple(operands), predicate, text, self.scope)

    def operand(self) -> Operand:
        if self.take("["):
            base, offset = self.simple(), 0
            while self.peek() in ("+", "-"):
                self.take("+")
                offset += self.number().value
            self.expect("]")
            return Address(base, offset)
        if self.take("{"):
            parts = []
            while not self.take("}"):
                parts.append(self.simple())
                self.take(",")
            return Vector(tuple(parts))
        first = self.simple()
        if self.take("|"):
            return Pair(first, self.simple())
        return first

    def simple(self) -> Operand:
        if self.take("!"):
            register = self.register(self.next())
            assert register is not None
            return dataclasses.replace(register, negated=True)
        if self.tokens[self.at][0] == "number" or self.peek() == "-":
            return self.number()
        name = self.next()
        return self.register(name) or Symbol(name)
