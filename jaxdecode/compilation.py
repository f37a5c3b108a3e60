"""JAX's persistent compilation cache: on by default, never against the user's own settings."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax

VARIABLE = "JAXDECODE_CACHE_DIR"
_OFF = ("", "0", "off", "none")


def default_cache_dir() -> Path | None:
    """Where the cache goes: `$JAXDECODE_CACHE_DIR`, else the user's cache folder; None if switched off."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return None if chosen.lower() in _OFF else Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "jaxdecode" / "xla"


def enable_cache() -> Path | None:
    """Turns on JAX's persistent compilation cache unless the user has decided otherwise.

    A folder set through `jax.config` or `JAX_COMPILATION_CACHE_DIR` is left alone, and so is
    `jax_enable_compilation_cache=False`. `JAXDECODE_CACHE_DIR` moves the folder; `off` switches it off.
    Called when a model is loaded and when a command starts, never by an import.

    Returns:
      The folder in use, None if there is no cache.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    folder = default_cache_dir()
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"no compilation cache: {folder} cannot be made ({error.strerror})", stacklevel=2)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return folder
