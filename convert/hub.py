"""Fetch a model's files from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from convert.errors import ConversionError

_METADATA = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


def download(name: str) -> Path:
    """Download `owner/model` or `owner/model@revision` into huggingface_hub's cache; never its code.

    Raises:
      ConversionError: no such model, or the hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, as the hub's version has it
    )

    repository, _, revision = name.partition("@")
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            path = Path(
                huggingface_hub.snapshot_download(
                    repository,
                    revision=revision or None,
                    allow_patterns=[*_METADATA, weights],
                    ignore_patterns=["*/*"],
                )
            )
            if any(path.glob(weights)):
                break
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
            raise ConversionError(f"the hub refuses {name}: {error}".split("\n")[0]) from error
        raise ConversionError(
            f"{name} is no local path, and the Hugging Face hub cannot be reached to look for it "
            f"({str(error).splitlines()[0]}); check the path or the network"
        ) from error
    except HFValidationError as error:
        raise ConversionError(f"{name} is neither a local path nor a valid hub name: {error}") from error
    return path
