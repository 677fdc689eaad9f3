"""One file or shards with an index; each way an index can be wrong has its message (M47)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsafe.errors import CheckpointError
from fastsafe.io import safetensors
from fastsafe.io.checkpoint import INDEX, WEIGHTS, Checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
A, B, C = torch.arange(4.0), torch.ones(2, 2, dtype=torch.bfloat16), torch.zeros(3)


def index(folder: Path, weight_map: Any, **metadata: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 36} | metadata, "weight_map": weight_map})
    (folder / INDEX).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    safetensors.write(tmp_path / FIRST, {"a": A, "b": B})
    safetensors.write(tmp_path / SECOND, {"c": C})
    index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(path)
    assert str(caught.value).startswith(str(path)), "the file or folder must be named"


def test_shards(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.path == folder
    assert checkpoint.names == ("a", "b", "c")
    assert checkpoint.shapes == {"a": (4,), "b": (2, 2), "c": (3,)}
    assert checkpoint.dtypes == {"a": "F32", "b": "BF16", "c": "F32"}
    found = checkpoint.read()
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(found[k], v) for k, v in {"a": A, "b": B, "c": C}.items())
    assert list(checkpoint.read(["c", "b"])) == ["c", "b"]
    with pytest.raises(CheckpointError, match="tensor 'x' is absent"):
        checkpoint.read(["a", "x"])


def test_one_file_by_folder_and_by_name(tmp_path: Path) -> None:
    safetensors.write(tmp_path / WEIGHTS, {"a": A})
    (tmp_path / "config.json").write_text('{"x": 1}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    for path in (tmp_path, tmp_path / WEIGHTS, str(tmp_path)):
        checkpoint = Checkpoint(path)
        assert checkpoint.names == ("a",)
        assert torch.equal(checkpoint.read()["a"], A)
        assert checkpoint.config() == {"x": 1}


def test_links_of_the_hub_cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    snapshot = tmp_path_factory.mktemp("snapshot")
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert torch.equal(Checkpoint(snapshot).read()["c"], C)
    assert Checkpoint(snapshot).sha256() == Checkpoint(folder).sha256()


def test_config_and_generation_config(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    assert checkpoint.config() == {"model_type": "llama"}
    assert checkpoint.generation_config() == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert checkpoint.generation_config() == {"eos_token_id": [1, 2]}
    for text in ('{"a": 1, "a": 2}', '{"a": NaN}', "[]", "[" * 100_000, " " * (4 << 20) + "{}"):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            checkpoint.config()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: file is missing"):
        checkpoint.config()


def test_sha256_sees_every_byte_that_matters(folder: Path) -> None:
    digests = {Checkpoint(folder).sha256()}
    (folder / "README.md").write_text("not part of it")
    digests.add(Checkpoint(folder).sha256())
    assert len(digests) == 1
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    digests.add(Checkpoint(folder).sha256())
    safetensors.write(folder / SECOND, {"c": C + 1})
    digests.add(Checkpoint(folder).sha256())
    (folder / "config.json").unlink()
    digests.add(Checkpoint(folder).sha256())
    assert len(digests) == 4
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_pickles_are_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / name):
        refused(path, f"{name}: weights are a pickle, .* expected safetensors; .*save_pretrained")


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "weights are missing, expected model.safetensors or")
    refused(tmp_path / "absent", "does not exist, expected a folder or a file")
    (tmp_path / "consolidated.safetensors").touch()
    (tmp_path / "training_args.bin").touch()
    refused(tmp_path, "; rename consolidated.safetensors to model.safetensors if these are the")
    refused(tmp_path / "consolidated.safetensors", "has 0 bytes, expected at least 8")
    safetensors.write(tmp_path / WEIGHTS, {})
    refused(tmp_path, "checkpoint has no tensors")
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / WEIGHTS).mkdir()
    refused(tmp_path, "expected a regular file")


BAD_NAMES = [
    "../model.safetensors", "/etc/passwd", "a/model.safetensors", "..", ".", "", "model.bin",
    "a\\b.safetensors", "a\0.safetensors", "\u202e.safetensors", 1, None, ["x"], {},
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_m47_shard_names_stay_in_the_folder(folder: Path, name: Any) -> None:
    index(folder, {"a": FIRST, "b": FIRST, "c": name})
    refused(folder, r"tensor 'c' is in .*, expected the plain name of a \.safetensors file")


def test_m47_missing_and_unlisted_shards(folder: Path) -> None:
    (folder / SECOND).rename(folder / "elsewhere")
    refused(folder, f"shard {SECOND} is missing; download it again")
    (folder / "elsewhere").rename(folder / SECOND)
    index(folder, {"a": FIRST, "b": FIRST}, total_size=24)
    refused(folder, f"shard {SECOND} is in the folder but not in the index")


def test_m47_tensors_where_the_index_does_not_say(folder: Path) -> None:
    index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    refused(folder, f"tensor 'b' is in {FIRST}, expected in {SECOND}")
    index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    refused(folder, f"tensor 'd' is missing, expected in {SECOND}")
    index(folder, {"a": FIRST, "c": SECOND})
    refused(folder, f"tensor 'b' of {FIRST} is unexpected, the index does not list it")


def test_m47_tensor_in_two_shards(folder: Path) -> None:
    safetensors.write(folder / SECOND, {"a": A, "c": C})
    refused(folder, f"tensor 'a' is in {FIRST} and in {SECOND}, expected in one shard")


@pytest.mark.parametrize("total", [35, 37, 0, -36, "36", None, [36], 36.5])
def test_total_size_of_the_index_is_not_read(folder: Path, total: Any) -> None:
    index(folder, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=total)
    assert Checkpoint(folder).names == ("a", "b", "c")


def test_a_tied_table_may_be_in_the_index_alone(folder: Path) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    weight_map = {"a": FIRST, "b": FIRST, head: SECOND, embedding: SECOND}
    for stored, other in ((head, embedding), (embedding, head)):
        safetensors.write(folder / SECOND, {stored: C})
        index(folder, weight_map)
        assert Checkpoint(folder).names == ("a", "b", stored)
        safetensors.write(folder / SECOND, {"c": C})
        index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, other: SECOND})
        refused(folder, f"tensor '{other}' is missing, expected in {SECOND}")


def test_one_shard_without_an_index(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "model-00001-of-00001.safetensors", {"a": A})
    assert Checkpoint(tmp_path).names == ("a",)
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / FIRST)
    refused(tmp_path, f"weights are missing, .*; {INDEX} names the shards, download it too")


def test_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "adapter_model.safetensors", {"a": A})
    refused(tmp_path, "the folder is an adapter: give its base model, and the adapter beside it")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "expected an object"),
        ("{}", "weight_map is None, expected an object"),
        ('{"weight_map": []}', r"weight_map is \[\], expected an object"),
        ('{"weight_map": {}}', r"weight_map is \{\}, expected an object"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' twice, expected once"),
        ('{"weight_map": {"a": "x"}, "weight_map": {}}', "key 'weight_map' twice"),
        ('{"weight_map"', "delimiter"),
        ("[" * 100_000, "nested deeper than 64"),
    ],
)
def test_m47_malformed_index(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, message)


def test_m47_metadata_of_the_index(folder: Path) -> None:
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND}
    (folder / INDEX).write_text(json.dumps({"metadata": 1, "weight_map": weight_map}))
    refused(folder, "metadata is 1, expected an object")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert Checkpoint(folder).names == ("a", "b", "c")


def test_truncated_shard_is_named(folder: Path) -> None:
    content = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(content[:-1])
    refused(folder, f"{SECOND}: file has 11 bytes of data, expected 12; the download is incomplete")


def test_shard_that_changes_after_opening(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    safetensors.write(folder / SECOND, {"other": C})
    with pytest.raises(CheckpointError, match=f"{SECOND}: tensor 'c' is absent"):
        checkpoint.read()
