"""Our checkpoint on disk: reading it.

    config/                  Orbax JSON item: the model's configuration
    manifest/                Orbax JSON item: dtype, shape, bytes, file and SHA-256 of every tensor
    _CHECKPOINT_METADATA     Orbax's own
    weights/*.safetensors    one file per item (embed, layer_00000, …, norm, head), to be used in place
    tokenizer/               whatever `transformers.AutoTokenizer` reads; may be absent
    verification.json        what `jaxdecode verify` found last; may be absent

Orbax's JSON items are plain JSON files, read here without importing Orbax (1.4 s). The weights are
safetensors, which Orbax reads too (`CheckpointLayout.SAFETENSORS`), because mapping them takes a fraction of the
time of an Orbax array restore.
Writing is in `checkpoint_writer`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from jaxdecode import safetensors_file
from jaxdecode.config import ModelConfig

FORMAT_VERSION = 1
Params = dict[str, Any]


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint.

    Raises:
      ValueError: `path` is not a checkpoint of ours, or its configuration is invalid.
    """
    fields = _read_json(Path(path), "config")
    try:
        return ModelConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its config is not one of this version's: {error}") from error


def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint: format_version, dtype, source, and `tensors` by flat name.

    Raises:
      ValueError: `path` is not a checkpoint of ours, or of a format this version cannot read.
    """
    manifest = _read_json(Path(path), "manifest")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: checkpoint format {version!r}; this version reads format {FORMAT_VERSION}")
    tensors = manifest.get("tensors")
    keys = {"dtype", "shape", "bytes", "file", "sha256"}
    if not isinstance(tensors, dict) or not all(isinstance(row, dict) and keys <= set(row) for row in tensors.values()):
        raise ValueError(f"{path}: its manifest has no complete table of tensors")
    return manifest


def load_params(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    sharding: Sharding | Callable[[str], Sharding] | None = None,
) -> tuple[Params, ModelConfig]:
    """Load a checkpoint's weights from mapped files; on the CPU nothing is copied.

    Args:
      dtype: cast every tensor to this type, one at a time; None keeps the stored types.
      sharding: where tensors go: one Sharding, or a function of the flat name
        ("layers.3.attention.qkv.weight"). Every process reads only the rows its devices hold.

    Returns:
      (params, config): the nested dict of arrays that `generate` takes.

    Raises:
      ValueError: not a checkpoint; or a weight file is missing, truncated, or not what the manifest or the
        model says.
    """
    views, placed = tensor_views(path), {}
    for name, array in views.items():
        where = sharding if isinstance(sharding, Sharding) or sharding is None else sharding(name)
        placed[name] = _place(array, dtype, where)
    return unflatten(placed), load_config(path)


def verify_hashes(path: str | Path, progress: Callable[[int], None] | None = None) -> int:
    """Read every weight and compare its SHA-256 with the manifest's.

    Args:
      progress: called with the bytes read so far.

    Returns:
      The number of tensors checked.

    Raises:
      ValueError: as `load_params`; or a tensor's bytes are not those that were written (all such are named).
    """
    manifest, done, wrong = load_manifest(path), 0, []
    for name, array in _views(Path(path), manifest).items():
        flat, digest = array.reshape(-1).view(np.uint8), hashlib.sha256()
        for start in range(0, len(flat), 1 << 24):
            digest.update(flat[start : start + (1 << 24)])
        if digest.hexdigest() != manifest["tensors"][name]["sha256"]:
            wrong.append(name)
        done += len(flat)
        if progress:
            progress(done)
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors differ from their recorded SHA-256: {', '.join(wrong)}")
    return len(manifest["tensors"])


def tensor_views(path: str | Path) -> dict[str, np.ndarray]:
    """Every weight by flat name as a read-only array over its mapped file, checked as in `load_params`.

    Raises:
      ValueError: as `load_params`.
    """
    from jaxdecode.models import abstract_params

    config, views = load_config(path), _views(Path(path), load_manifest(path))
    _check_complete(Path(path), views, flatten(abstract_params(config)))
    return views


def flatten(params: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists to {"layers.3.attention.qkv.weight": leaf}."""
    pairs: Iterator[tuple[str, Any]]
    if isinstance(params, Mapping):
        pairs = iter(params.items())
    elif isinstance(params, list | tuple):
        pairs = ((str(index), value) for index, value in enumerate(params))
    else:
        return {prefix: params}
    flat = {}
    for name, value in pairs:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten`: "layers" becomes a list."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)[last] = leaf
    layers = params.get("layers", {})
    params["layers"] = [layers[str(index)] for index in range(len(layers))]
    return params


def item_of(name: str) -> str:
    """The file, without suffix, that holds a tensor: "layer_00003" for "layers.3.…", else the first word."""
    first, *rest = name.split(".")
    return f"layer_{int(rest[0]):05d}" if first == "layers" else first


def _read_json(path: Path, item: str) -> dict[str, Any]:
    file = path / item / "metadata"
    try:
        fields = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = (
            "; it is a Hugging Face directory: run `jaxdecode convert` on it" if (path / "config.json").exists() else ""
        )
        found = "it does not exist" if not path.exists() else f"{item}/metadata is missing{hint}"
        raise ValueError(f"{path} is not a jaxdecode checkpoint: {found}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(fields).__name__}, not an object")
    return fields


def _views(path: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """Map every weight file and check it against the manifest; all problems in one error."""
    problems: list[str] = []
    views: dict[str, np.ndarray] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, row in manifest["tensors"].items():
        rows.setdefault(row["file"], {})[name] = row
    for file, tensors in rows.items():
        try:
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise ValueError(f"the manifest names a file outside the checkpoint: {file}")
            entries, mapped = (
                safetensors_file.read_header(path / file),
                safetensors_file.map_file(path / file),
            )
        except FileNotFoundError:
            problems.append(f"weight file {file} is missing")
            continue
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for name, row in tensors.items():
            entry = entries.get(name)
            if entry is None or (entry.dtype, list(entry.shape)) != (row["dtype"], row["shape"]):
                found = f"{entry.dtype}{list(entry.shape)}" if entry else "nothing of that name"
                problems.append(f"{name}: the manifest says {row['dtype']}{row['shape']}, {file} holds {found}")
            else:
                views[name] = safetensors_file.view(mapped, entry)
    if problems:
        raise ValueError(f"{path} is damaged:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return views


def _check_complete(path: Path, views: Mapping[str, np.ndarray], targets: Mapping[str, Any]) -> None:
    problems = [f"missing tensor {name}{list(targets[name].shape)}" for name in targets if name not in views]
    problems += [f"unexpected tensor {name}{list(views[name].shape)}" for name in views if name not in targets]
    problems += [
        f"{name} is {list(views[name].shape)}, the config needs {list(target.shape)}"
        for name, target in targets.items()
        if name in views and views[name].shape != target.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit its config:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _place(array: np.ndarray, dtype: DTypeLike | None, sharding: Sharding | None) -> jax.Array:
    if sharding is not None:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: _cast(array[index], dtype))
    # device_put, unlike asarray, keeps an aligned read-only buffer in place on the CPU
    return jax.device_put(_cast(array, dtype))


def _cast(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    return array if dtype is None else array.astype(jax.dtypes.canonicalize_dtype(dtype), copy=False)


def save(path: str | Path, params: Params, config: ModelConfig, *, tokenizer_dir: str | Path | None = None) -> None:
    """Write arrays in memory (fine-tuned weights) as a checkpoint; atomic.

    Raises:
      ValueError: `path` exists, or `params` is not what `config` needs (all differences are named).
    """
    from jaxdecode.checkpoint_writer import CheckpointWriter
    from jaxdecode.models import abstract_params

    flat = flatten(params)
    _check_complete(Path(path), flat, flatten(abstract_params(config)))
    items: dict[str, list[str]] = {}
    for name in flat:
        items.setdefault(item_of(name), []).append(name)
    with CheckpointWriter(path, config=config, identity=None, source={"kind": "memory"}) as writer:
        for item, names in items.items():
            specs = {name: (np.dtype(flat[name].dtype).name, tuple(flat[name].shape)) for name in names}
            writer.write_item(item, specs, lambda name: iter([np.asarray(flat[name])]))
        if tokenizer_dir is not None:
            writer.copy_tokenizer(Path(tokenizer_dir))
        writer.finish()
