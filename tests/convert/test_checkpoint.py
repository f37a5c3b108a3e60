"""Our checkpoint on disk: aligned, complete or refused, readable by Orbax and by the safetensors library."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import made
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from made import tiny_hf

from convert import convert
from jaxdecode import checkpoint, safetensors_file
from jaxdecode.checkpoint import flatten, load_config, load_params, unflatten
from jaxdecode.models import init_params

CASE = tiny_hf.CASES["qwen3_bias"]


@pytest.fixture
def ours(tmp_path) -> Path:
    convert(made.write_directory(tmp_path / "hf", CASE), tmp_path / "ours")
    return tmp_path / "ours"


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("model",))


def by_rows(name: str) -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec("model") if name.endswith("qkv.weight") else PartitionSpec())


def test_weights_are_used_in_place(ours):
    views = checkpoint.tensor_views(ours)
    aligned = {name for name, view in views.items() if view.nbytes % safetensors_file.ALIGNMENT == 0}
    assert {"embed.weight", "layers.0.attention.qkv.weight", "layers.1.mlp.down.weight"} <= aligned
    for name in aligned:
        assert views[name].ctypes.data % safetensors_file.ALIGNMENT == 0, name
        placed = checkpoint._place(views[name], None, None)
        assert placed.unsafe_buffer_pointer() == views[name].ctypes.data, name


@pytest.mark.parametrize("name_length", range(1, 70, 7))
def test_whole_tensors_start_aligned(name_length):
    shapes = {"odd" * name_length: (1000, 3), "a": (16,), "b": (3,), "c": (8, 64), "empty": (0, 5)}
    tensors = {name: ("bfloat16" if name != "a" else "float32", shape) for name, shape in shapes.items()}
    header, entries = safetensors_file.plan_header(tensors)
    assert len(header) % safetensors_file.ALIGNMENT == 0
    for entry in entries.values():
        whole = (entry.stop - entry.start) % safetensors_file.ALIGNMENT == 0
        assert not whole or entry.start % safetensors_file.ALIGNMENT == 0
    spans = sorted((entry.start, entry.stop) for entry in entries.values())
    assert spans[0][0] == len(header) and all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_mapped_weights_outlive_what_mapped_them(ours):
    params, _ = load_params(ours)
    expected = np.array(checkpoint.tensor_views(ours)["layers.1.mlp.gate_up.weight"])
    for file in (ours / "weights").iterdir():
        file.unlink()  # the mapping keeps the bytes
    np.testing.assert_array_equal(params["layers"][1]["mlp"]["gate_up"]["weight"], expected)


def test_fused_rows(ours):
    weights = tiny_hf.hf_weights(CASE)
    params, config = load_params(ours)
    layer, prefix = params["layers"][1], "model.layers.1."
    qkv = np.concatenate([weights[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv"])
    np.testing.assert_array_equal(layer["attention"]["qkv"]["bias"], qkv)
    gate_up = np.concatenate([weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    np.testing.assert_array_equal(layer["mlp"]["gate_up"]["weight"], gate_up)
    assert config.qk_norm and layer["attention"]["q_norm"]["weight"].shape == (config.head_dim,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16", np.float32])
def test_cast_on_load(ours, dtype):
    params, _ = load_params(ours, dtype=dtype)
    for name, array in flatten(params).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, checkpoint.tensor_views(ours)[name].astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("sharding", [NamedSharding(mesh(), PartitionSpec()), by_rows])
def test_load_with_shardings(ours, sharding):
    params, _ = load_params(ours, sharding=sharding, dtype=jnp.bfloat16)
    for name, array in flatten(params).items():
        expected = sharding if isinstance(sharding, NamedSharding) else sharding(name)
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        np.testing.assert_array_equal(array, checkpoint.tensor_views(ours)[name].astype(jnp.bfloat16))


def test_orbax_reads_the_json_items(ours):
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        names = {"config": ocp.args.JsonRestore(), "manifest": ocp.args.JsonRestore()}
        items = checkpointer.restore(ours.absolute(), args=ocp.args.Composite(**names))
    assert items["config"] == json.loads((ours / "config" / "metadata").read_text())
    assert items["manifest"]["tensors"] == checkpoint.load_manifest(ours)["tensors"]


def test_orbax_reads_the_weights_with_shardings(ours):
    from orbax.checkpoint.experimental import v1

    views = checkpoint.tensor_views(ours)
    abstract = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=by_rows(name)) for name, v in views.items()}
    with v1.Context(checkpoint_layout=v1.options.CheckpointLayout.SAFETENSORS):
        arrays = v1.load((ours / "weights").absolute(), abstract)
    assert set(arrays) == set(views)
    for name, array in arrays.items():
        assert array.sharding.is_equivalent_to(by_rows(name), array.ndim)
        np.testing.assert_array_equal(array, views[name])


def test_the_safetensors_library_reads_the_weights(ours):
    from safetensors.numpy import load_file

    views = checkpoint.tensor_views(ours)
    found = {}
    for file in (ours / "weights").iterdir():
        found |= load_file(file)
    assert set(found) == set(views)
    for name, array in found.items():
        np.testing.assert_array_equal(array, views[name])


def test_loading_imports_neither_orbax_nor_transformers(ours):
    script = (
        "import sys; from jaxdecode.checkpoint import load_params; load_params(sys.argv[1]);"
        "print([name for name in ('orbax', 'transformers', 'safetensors', 'convert') if name in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, str(ours)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr


def test_save_and_load(tmp_path):
    convert(made.write_directory(tmp_path / "hf", CASE), tmp_path / "ours")
    config = load_config(tmp_path / "ours")
    params = init_params(config, jax.random.key(1), jnp.bfloat16)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    checkpoint.save(tmp_path / "tuned", params, config, tokenizer_dir=tmp_path / "tokenizer")
    loaded, loaded_config = load_params(tmp_path / "tuned")
    assert loaded_config == config and (tmp_path / "tuned" / "tokenizer" / "tokenizer.json").exists()
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert checkpoint.verify_hashes(tmp_path / "tuned") == len(jax.tree.leaves(params))
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path / "tuned", params, config)
    del params["layers"][1]["mlp"]["down"]
    with pytest.raises(ValueError, match=r"missing tensor layers.1.mlp.down.weight\[32, 48\]"):
        checkpoint.save(tmp_path / "other", params, config)
    assert not list(tmp_path.glob("other*"))


def test_flatten_and_unflatten():
    tree = {"embed": {"weight": 1}, "layers": [{"a": {"b": 2}}, {"a": {"b": 3}}]}
    assert flatten(tree) == {"embed.weight": 1, "layers.0.a.b": 2, "layers.1.a.b": 3}
    assert unflatten(flatten(tree)) == tree


def edit(file: Path, change) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def delete_row(manifest: dict) -> None:
    del manifest["tensors"]["norm.weight"]


def change_shape(manifest: dict) -> None:
    manifest["tensors"]["norm.weight"]["shape"] = [33]


def point_outside(manifest: dict) -> None:
    manifest["tensors"]["norm.weight"]["file"] = "../norm.safetensors"


def manifest(**changes):
    return lambda path: edit(path / "manifest" / "metadata", lambda fields: fields.update(changes))


def config(**changes):
    return lambda path: edit(path / "config" / "metadata", lambda fields: fields.update(changes))


def in_manifest(change):
    return lambda path: edit(path / "manifest" / "metadata", change)


def rename_weights(path: Path) -> None:
    (path / "weights" / "norm.safetensors").rename(path / "weights" / "head.safetensors")


DAMAGES = {
    "no manifest": (lambda path: (path / "manifest" / "metadata").unlink(), "manifest/metadata is missing"),
    "no config": (lambda path: (path / "config" / "metadata").unlink(), "config/metadata is missing"),
    "manifest is not JSON": (lambda path: (path / "manifest" / "metadata").write_text("{"), "is damaged"),
    "config is a list": (lambda path: (path / "config" / "metadata").write_text("[]"), "not an object"),
    "format": (manifest(format_version=9), "format 9; .* reads format 1"),
    "no table": (manifest(tensors={"norm.weight": {}}), "no complete table"),
    "unknown field": (config(color=1), "color"),
    "missing file": (lambda path: (path / "weights" / "layer_00001.safetensors").unlink(), "layer_00001.* is missing"),
    "truncated file": (lambda path: truncate(path / "weights" / "norm.safetensors"), "norm.safetensors: truncated"),
    "renamed file": (rename_weights, "norm.safetensors is missing"),
    "manifest lacks a tensor": (in_manifest(delete_row), r"missing tensor norm.weight\[32\]"),
    "manifest shape": (in_manifest(change_shape), r"says float32\[33\]"),
    "path outside": (in_manifest(point_outside), "outside the checkpoint"),
    "config shape": (config(mlp_dim=50), r"mlp.down.weight is \[32, 48\], .* \[32, 50\]"),
    "config layers": (config(num_layers=1, layer_windows=[]), "unexpected tensor layers.1"),
}


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage, ours):
    break_it, message = DAMAGES[damage]
    load_params(ours)
    break_it(ours)
    with pytest.raises(ValueError, match=message) as error:
        load_params(ours)
    assert str(ours) in str(error.value)


def test_hugging_face_directory_is_named_as_such(tmp_path):
    source = made.write_directory(tmp_path / "hf", CASE)
    with pytest.raises(ValueError, match="run `jaxdecode convert`"):
        load_params(source)
    with pytest.raises(ValueError, match="does not exist"):
        load_params(tmp_path / "nothing")


def test_a_flipped_bit_is_found(ours):
    seen = []
    assert checkpoint.verify_hashes(ours, seen.append) == len(checkpoint.tensor_views(ours))
    assert seen[-1] == checkpoint.load_manifest(ours)["total_bytes"]
    file = ours / "weights" / "layer_00001.safetensors"
    entry = safetensors_file.read_header(file)["layers.1.mlp.down.weight"]
    data = bytearray(file.read_bytes())
    data[entry.start + 17] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"1 tensors differ .*: layers\.1\.mlp\.down\.weight$"):
        checkpoint.verify_hashes(ours)
