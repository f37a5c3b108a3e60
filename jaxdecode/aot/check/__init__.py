"""How a model would run on a card that is not here: `jaxdecode check`.

    for cell in jaxdecode.check("llama2-7b", gpus=["a100-80gb"], batches=[1, 8], contexts=[1024]):
        print(cell.fit.fits, cell.program.kernels_per_token, cell.modelled.tokens_per_second)

`program` says what is compiled, `loop` and `kernels` read what came out, `least` is what there is to read and compute,
`fit` adds up memory, `prefill` and `jaxdecode.aot.cost` model times; `table` and `plot` show cells.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdecode.aot.check.cells import Cell, Modelled, Question, ask, check_cells, versions
from jaxdecode.aot.check.fit import Fit
from jaxdecode.aot.check.kernels import KernelUse
from jaxdecode.aot.check.loop import ProgramFacts
from jaxdecode.aot.cost import Assumptions
from jaxdecode.config import ModelConfig
from jaxdecode.models.known import KNOWN
from pallas_kernels.targets import Target, find_target

__all__ = [
    "Assumptions",
    "Cell",
    "Fit",
    "KernelUse",
    "Modelled",
    "ProgramFacts",
    "Question",
    "ask",
    "check",
    "check_cells",
    "find_model",
    "versions",
]


def check(
    model: str | Path | ModelConfig,
    *,
    gpus: Sequence[str | Target],
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (1024,),
    dtype: str | None = None,
    assumed: Assumptions = Assumptions(),
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Cell]:
    """Compiles `generate` of a model for cards that need not be here; only shapes are needed, never weights.

    Args:
      model: a converted checkpoint's folder, else a name of `jaxdecode.models.known.KNOWN`; or a config.
      gpus: cards, their short names, or TOML files: see `pallas_kernels.targets`.
      batches: rows.
      contexts: tokens of prompt and text together that each row's cache ends up with.
      dtype: of weights and caches: "float16", "bfloat16" or "float32"; None for the checkpoint's own, else float16.
      assumed: by the cost model.
      workers: compiling processes at a time; None for one a core.
      progress: called with the number of programs that are done, and of all.

    Returns:
      A cell for each card, batch and context.

    Raises:
      MissingCompilerError: the extra `check` is not installed.
      ValueError: there is no such model or card, or a number out of range.
    """
    targets = [find_target(gpu) if isinstance(gpu, str) else gpu for gpu in gpus]
    questions = ask(find_model(model), targets=targets, batches=batches, contexts=contexts, dtype=dtype)
    return check_cells(questions, assumed=assumed, workers=workers or os.cpu_count() or 1, progress=progress)


def find_model(model: str | Path | ModelConfig) -> tuple[str, ModelConfig, str]:
    """A model's name, config and dtype.

    Raises:
      ValueError: it is neither the name of a known model nor a checkpoint.
    """
    if isinstance(model, ModelConfig):
        return model.model_type, model, "float16"
    if Path(model).exists():
        from jaxdecode.checkpoint import load_config, load_manifest

        return Path(model).resolve().name, load_config(model), load_manifest(model)["dtype"]
    if str(model).lower() in KNOWN:
        return str(model).lower(), KNOWN[str(model).lower()], "float16"
    near = difflib.get_close_matches(str(model).lower(), KNOWN, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"no model {str(model)!r}{hint}: neither a checkpoint nor one of {', '.join(KNOWN)}")
