"""`jaxdecode verify`: a checkpoint against what it was converted from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxdecode.cli import options

if TYPE_CHECKING:
    from rich.console import Console


def verify(
    model: options.Model,
    against: Annotated[
        str, typer.Option(help="What it was converted from: Hugging Face folder, GGUF file, or hub name (owner/model).")
    ],
    longest: Annotated[
        int | None,
        typer.Option(metavar="N", help="Compare answers up to N positions; by default 2048, or the model's limit."),
    ] = None,
) -> None:
    """Compare every tensor with the source, answers with transformers, and write MODEL/verification.json."""
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # float32 as exact as the reference's
    find_reference()
    write_certificate(Console(highlight=False), model, against, longest=longest)


def find_reference(context: str = "") -> None:
    """Fail at once if there is nothing to compare with.

    Raises:
      ValueError: no Python with torch; begins with `context`.
    """
    from convert.hf_reference import ReferenceUnavailable, find_python

    try:
        find_python()
    except ReferenceUnavailable as error:
        raise ValueError(f"{context}{error}") from error


def write_certificate(
    console: Console, checkpoint: Path, source: str, context: str = "", *, longest: int | None = None
) -> None:
    """Compare, print the report, and leave the certificate in the checkpoint.

    Raises:
      ValueError: nothing could be compared; begins with `context`.
      typer.Exit: the two differ.
    """
    from convert.certificate import certify
    from convert.hf_reference import ReferenceUnavailable
    from convert.verify import LONGEST

    try:
        with console.status("Reading the weights again …") as status:

            def hashed(done: int, total: int) -> None:
                share = f"Reading the weights again: {done / total:.0%} …"
                status.update(share if done < total else "Comparing with transformers …")

            cap = LONGEST if longest is None else longest
            certificate = certify(checkpoint, source, longest=cap, progress=hashed)
    except ReferenceUnavailable as error:
        raise ValueError(f"{context}{error}") from error
    console.print(str(certificate), markup=False, soft_wrap=True)
    if not certificate.passed:
        raise typer.Exit(1)
