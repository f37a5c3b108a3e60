"""The persistent compilation cache: on by default, movable, and never against the user's own settings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPORT = "; print(jaxdecode.compilation.enable_cache(), jax.config.jax_compilation_cache_dir)"


def run(code, tmp_path, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "JAXDECODE_", "XDG_"))}
    env = kept | {"HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | variables
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "{home}/.cache/jaxdecode/xla"),
        ({"XDG_CACHE_HOME": "{home}/xdg"}, "{home}/xdg/jaxdecode/xla"),
        ({"JAXDECODE_CACHE_DIR": "~/mine"}, "{home}/mine"),
        ({"JAXDECODE_CACHE_DIR": "off"}, "None"),
        ({"JAX_COMPILATION_CACHE_DIR": "{home}/theirs"}, "{home}/theirs"),
        ({"JAX_COMPILATION_CACHE_DIR": "{home}/theirs", "JAXDECODE_CACHE_DIR": "~/mine"}, "{home}/theirs"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, "None"),
    ],
)
def test_where_the_cache_goes(tmp_path, variables, folder):
    variables = {name: value.format(home=tmp_path) for name, value in variables.items()}
    expected = folder.format(home=tmp_path)
    found = run("import jax, jaxdecode, jaxdecode.compilation" + REPORT, tmp_path, **variables)
    assert found == [expected, expected]


def test_a_folder_set_in_jax_config_stays(tmp_path):
    code = "import jax, jaxdecode.compilation; jax.config.update('jax_compilation_cache_dir', 'theirs')"
    assert run(code + REPORT, tmp_path) == ["theirs", "theirs"]


def test_importing_sets_nothing(tmp_path):
    code = "import jax, jaxdecode; jaxdecode.generate, jaxdecode.load; print(jax.config.jax_compilation_cache_dir)"
    assert run(code, tmp_path) == ["None"]
    assert not (tmp_path / ".cache").exists()


def test_programs_are_kept_even_if_jax_compiled_something_before(tmp_path):
    code = """if True:
        import jax, jax.numpy as jnp
        from jaxdecode.compilation import enable_cache
        jax.jit(lambda x: x + 1)(1.0)
        enable_cache()
        x = jnp.ones((64, 64))
        jax.jit(lambda x: jnp.linalg.qr(jnp.sort(x @ x, axis=0))[0] @ jnp.cumsum(jnp.tanh(x), 0))(x)
    """
    run(code, tmp_path)
    assert list((tmp_path / ".cache/jaxdecode/xla").glob("*-cache"))


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    code = """if True:
        import warnings, jaxdecode.compilation as c
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(c.enable_cache())
        print(str(caught[0].message)[:20])
    """
    found = run(code, tmp_path, JAXDECODE_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert " ".join(found) == "None no compilation cache"
