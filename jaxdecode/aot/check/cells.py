"""The cells of a check: a model on a card with a batch and a context."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import Any

from jaxdecode.aot.check import program
from jaxdecode.aot.check.fit import Fit, find_fit
from jaxdecode.aot.check.kernels import KernelUse, Step
from jaxdecode.aot.check.least import step_bytes, step_operations
from jaxdecode.aot.check.loop import DecodeLoop, ProgramFacts
from jaxdecode.aot.check.prefill import chunk_sizes, prefill_seconds
from jaxdecode.aot.compiler import CompileError, compile_programs
from jaxdecode.aot.cost import Assumptions, add_up, tensor_rate
from jaxdecode.aot.job import Job
from jaxdecode.aot.program import CompiledProgram
from jaxdecode.config import ModelConfig
from pallas_kernels.targets import TARGETS, Target

DTYPES = ("float16", "bfloat16", "float32")
_MOST_BYTES = 1.02  # times the least that a product may ask for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A cell to check."""

    model: str
    config: ModelConfig
    dtype: str
    target: Target
    batch: int
    context: int

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1; got {self.batch}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2: a token of prompt and one of text; got {self.context}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")

    def refusal(self) -> str | None:
        """Why generation would refuse it: more tokens than there are learned positions."""
        lack = self.config.lacks_positions(self.context)
        return lack and f"{lack} (--extend-positions makes more)"

    def with_positions(self) -> Question:
        """The same for a model with as many learned positions as the context asks for."""
        if self.config.rope is not None or self.config.max_position >= self.context:
            return self
        config = dataclasses.replace(self.config, max_position=self.context)
        return dataclasses.replace(self, model=f"{self.model} with {self.context} positions", config=config)


def ask(
    model: tuple[str, ModelConfig, str],
    *,
    targets: Sequence[Target],
    batches: Sequence[int],
    contexts: Sequence[int],
    dtype: str | None = None,
) -> list[Question]:
    """A question for each card, batch and context; `model` is its name, config and own dtype.

    Raises:
      ValueError: a number or the dtype is out of range.
    """
    name, config, own = model
    return [
        Question(model=name, config=config, dtype=dtype or own, target=target, batch=batch, context=context)
        for target in targets
        for batch in batches
        for context in contexts
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modelled:
    """What the cost model says of a step at the end, when every row's cache holds `context` tokens. Not measured.

    Attributes:
      seconds_per_token: a decode step, fewest and most; every row gets a token. They differ where XLA's own products
        run, which are tuned on the card only.
      tokens_per_second: over all rows, fewest and most.
      roofline_seconds: a lower bound: weights, keys and values at the card's nominal bandwidth, or the arithmetic at
        the peak of its tensor cores if that is longer.
      roofline_share: roofline_seconds over the fewest seconds.
      binds: what most of the rest is spent on.
      spent_seconds: the fewest seconds by what they are spent on.
      prefill_seconds: fewest and most, to read a prompt that fills the cache but for the tokens generated.
    """

    seconds_per_token: tuple[float, float]
    tokens_per_second: tuple[float, float]
    roofline_seconds: float
    roofline_share: float
    binds: str
    spent_seconds: dict[str, float]
    prefill_seconds: tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The answer; `program`, `kernels` and `modelled` are there where the program fits and compiles.

    Attributes:
      card: its short name, or its own where it came from a file.
      max_position: tokens that the model was made for.
      error: why it did not compile.
      faults: what is wrong with its kernels: spills, copies of weights or caches, more bytes than there are, ….
      bytes_per_token: least bytes of weights, keys and values that a decode step reads.
      operations_per_token: of its products and attention, multiplications and additions.
    """

    model: str
    card: str
    dtype: str
    batch: int
    context: int
    max_position: int
    fit: Fit
    error: str | None = None
    faults: tuple[str, ...] = ()
    program: ProgramFacts | None = None
    kernels: tuple[KernelUse, ...] = ()
    bytes_per_token: int | None = None
    operations_per_token: int | None = None
    modelled: Modelled | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        fit = {name: getattr(self.fit, name) for name in ("total_bytes", "fits", "memory_fraction")}
        whole = dataclasses.asdict(self)
        return whole | {"fit": whole["fit"] | fit}


def check_cells(
    questions: Sequence[Question],
    *,
    assumed: Assumptions,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Compiles every cell whose weights and caches fit, and reads what would run.

    Args:
      progress: called with the number of programs that are done, and of all.

    Raises:
      MissingCompilerError: the extra `check` is not installed.
    """
    bare = [_fit(question) for question in questions]
    compiled = [q for q, fit in zip(questions, bare, strict=True) if fit.fits and not q.refusal()]
    jobs = [
        Job(build=program.generation, target=q.target, args=(q.config, q.batch, q.context, q.dtype)) for q in compiled
    ]
    done: list[int] = []

    def tell(index: int) -> None:
        done.append(index)
        if progress:
            progress(len(done), len(jobs))

    programs = compile_programs(jobs, workers=workers, done=tell) if jobs else []
    outcomes = dict(zip(compiled, programs, strict=True))
    pairs = zip(questions, bare, strict=True)
    return [_cell(question, fit, outcomes.get(question), assumed) for question, fit in pairs]


def versions() -> dict[str, str]:
    """Of what decides how a program compiles, as far as it is installed."""
    names = ("jaxdecode", "jax", "jaxlib", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12")
    return {found.name: found.version for found in importlib.metadata.distributions() if found.name in names}


def _fit(question: Question, outcome: CompiledProgram | None = None) -> Fit:
    return find_fit(
        question.config,
        question.dtype,
        batch=question.batch,
        context=question.context,
        target=question.target,
        compiled=outcome.memory if outcome else None,
    )


def _cell(
    question: Question, fit: Fit, outcome: CompiledProgram | CompileError | None, assumed: Assumptions
) -> Cell:
    card = next((name for name, target in TARGETS.items() if target == question.target), question.target.name)
    cell = Cell(
        model=question.model,
        card=card,
        dtype=question.dtype,
        batch=question.batch,
        context=question.context,
        max_position=question.config.max_position,
        fit=fit,
        error=question.refusal(),
    )
    if outcome is None:
        return cell
    if isinstance(outcome, CompileError):
        errors = re.findall(r"(?m)^[\w.]*(?:Error|Exception)\b.*", str(outcome)) or [str(outcome)[-200:]]
        return dataclasses.replace(cell, error=errors[-1])
    try:
        return _read_program(question, cell, outcome, assumed)
    except ValueError as error:
        return dataclasses.replace(cell, error=f"the compiled program cannot be read: {error}")


def _read_program(question: Question, cell: Cell, compiled: CompiledProgram, assumed: Assumptions) -> Cell:
    config, dtype, batch, context = question.config, question.dtype, question.batch, question.context
    loop = DecodeLoop(compiled, config, program.weight_names(config, dtype), batch=batch, context=context)
    shape = {"dtype": dtype, "batch": batch, "context": context}
    step = Step(config=config, target=question.target, assumed=assumed, **shape)
    prompt = program.prompt_len(context)
    facts, uses = loop.facts(chunk_sizes(prompt)), [step.use(part) for part in loop.launches()]
    excess = [
        f"{use.name} asks for {use.requested_bytes / use.least_bytes:.3f} times the bytes there are"
        for use in uses
        if use.weight and use.requested_bytes > _MOST_BYTES * use.least_bytes
    ]
    least, operations = step_bytes(config, dtype, batch, context), step_operations(config, batch, context)
    prefill = prefill_seconds(
        config,
        dtype,
        batch=batch,
        prompt_len=prompt,
        kernels=facts.prefill_kernels,
        target=question.target,
        assumed=assumed,
    )
    return dataclasses.replace(
        cell,
        fit=_fit(question, compiled),
        faults=tuple(dict.fromkeys([*loop.faults(), *excess])),
        program=facts,
        kernels=tuple(uses),
        bytes_per_token=least,
        operations_per_token=operations,
        modelled=_model(step, uses, facts.round_trips, least=least, operations=operations, prefill=prefill),
    )


def _model(
    step: Step, uses: list[KernelUse], round_trips: int, *, least: int, operations: int, prefill: tuple[float, float]
) -> Modelled:
    """Sums up; keys and values that XLA's own attention reads, in loops that are counted once, come on top."""
    assumed, target = step.assumed, step.target
    spent: dict[str, float] = {"host": round_trips * assumed.round_trip}
    most = spent["host"]
    for use in uses:
        add_up(use.modelled_spent_seconds, spent, use.launches)
        most += use.launches * use.modelled_seconds[1]
    unread = max(0, least - sum(use.launches * use.least_bytes for use in uses)) / (target.bandwidth * 1e9)
    low, high = (share * assumed.dram_share for share in assumed.product_share)
    add_up({"bytes": unread, "memory efficiency": unread / high - unread}, spent)
    seconds, most = sum(spent.values()), most + unread / low
    roofline = max(least / (target.bandwidth * 1e9), operations / tensor_rate(target, step.dtype))
    return Modelled(
        seconds_per_token=(seconds, most),
        tokens_per_second=(step.batch / most, step.batch / seconds),
        roofline_seconds=roofline,
        roofline_share=roofline / seconds,
        binds=max((name for name in spent if name != "bytes"), key=lambda name: spent[name]),
        spent_seconds=spent,
        prefill_seconds=prefill,
    )
