"""The packages' layout: who may import whom, what stays unloaded, no configuration field without a reader."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdecode.config import ModelConfig, RopeConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "pallas_kernels": set(),
    "jaxdecode": {"pallas_kernels"},
    "convert": {"jaxdecode", "pallas_kernels"},
}
HEAVY = {"transformers", "torch", "safetensors", "gguf"}
# jaxdecode.cli runs the converter, but only inside a command that needs it.
LAZY_CONVERT = "jaxdecode/cli"
TOKENIZER = "jaxdecode/tokenizer.py"
KERNEL_IMPORTS = {"jax", "jaxtyping", "jaxlib", "numpy", "ml_dtypes", "pallas_kernels"}
# Words of other codebases for things that have a name here; the converter must know them, nobody else.
OTHER_WORDS = (
    "hidden_size|intermediate_size|num_hidden_layers|num_attention_heads|num_key_value_heads|max_position_embeddings"
    "|past_key_values?|start_pos|seqlen_[qk]|n_rep|nheads|num_splits|BLOCK_[MNK]|tile_[mnk]|impl_[abc]|n_heads|d_model"
)


def sources(*packages: str) -> list[Path]:
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    assert files, packages
    return files


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(file: Path, *, module_level: bool) -> set[str]:
    """Top-level names a file imports; if `module_level`, only those that importing the file runs."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}:{node.lineno}: relative import"
            found.add((node.module or "").split(".")[0])
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (module_level and (inside_function or type_checking)):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(file.read_text()))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    for file in sources(package):
        lazy = {"convert"} if name_of(file).startswith(LAZY_CONVERT) else set()
        others = set(PACKAGES) - {package} - PACKAGES[package]
        assert not imported(file, module_level=False) & ((others | {"tests", "benchmarks"}) - lazy), name_of(
            file
        )
        assert not imported(file, module_level=True) & others, name_of(file)


def test_kernels_import_only_jax_and_numpy():
    for file in sources("pallas_kernels"):
        lazy = {"numba"} if file.name == "cpu.py" else set()
        allowed = KERNEL_IMPORTS | set(sys.stdlib_module_names) | lazy
        assert not imported(file, module_level=False) - allowed, name_of(file)


def test_heavy_packages_are_imported_late():
    for file in sources("jaxdecode", "pallas_kernels"):
        if name_of(file) != TOKENIZER:
            assert not imported(file, module_level=True) & HEAVY, name_of(file)


def test_importing_jaxdecode_loads_nothing_heavy():
    code = "import sys, jaxdecode; print([name for name in sys.argv[1:] if name in sys.modules])"
    heavy = ["transformers", "torch", "orbax", "safetensors", "gguf", "convert", "typer"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_reference_script_stands_alone():
    """`hf_reference.py` runs under a Python without our packages, and loads nothing until a job does."""
    file = ROOT / "convert/hf_reference.py"
    assert not imported(file, module_level=True) - set(sys.stdlib_module_names)
    assert (
        not imported(file, module_level=False)
        - set(sys.stdlib_module_names)
        - {"torch", "transformers", "numpy", "safetensors"}
    )


@pytest.mark.parametrize("config_type", [ModelConfig, RopeConfig])
def test_every_config_field_has_a_reader(config_type):
    files = [file for file in sources("jaxdecode", "pallas_kernels") if file.name != "config.py"]
    read = {node.attr for file in files for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}  # fmt: skip
    # `window(layer)` is how layer_windows is read, and `attention_scale` how scale_dim is.
    through = {"window": "layer_windows", "attention_scale": "scale_dim"}
    read |= {field for method, field in through.items() if method in read}
    unread = {field.name for field in dataclasses.fields(config_type)} - read
    assert not unread, f"nothing reads {sorted(unread)} of {config_type.__name__}"


def test_other_codebases_words_stay_in_convert():
    for file in sources("jaxdecode", "pallas_kernels"):
        found = re.findall(rf"\b(?:{OTHER_WORDS})\b", file.read_text())
        assert not found, f"{name_of(file)}: {sorted(set(found))}"


def test_no_file_names_a_place_on_someones_machine():
    for file in sources("jaxdecode", "pallas_kernels", "convert", "tests", "benchmarks"):
        found = re.findall(r"(?<![\w.~])/(?:tmp|home|root|work|Users)/[\w/.-]*", file.read_text())
        assert not found, f"{name_of(file)}: {found}"
