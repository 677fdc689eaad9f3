import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from fastsafe.errors import CheckpointError
from fastsafe.io import hub

# the hub client moved from one to the other; its errors carry responses of the one it uses
httpx = pytest.importorskip("httpx2" if find_spec("httpx2") else "httpx")


def answer(monkeypatch, result):
    """Let the hub client return a folder or raise; records how it was called."""
    calls = []

    def snapshot_download(repo, **options):
        calls.append((repo, options))
        if isinstance(result, BaseException):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def http_error(kind):
    request = httpx.Request("GET", "http://hub.invalid")
    return kind("no", response=httpx.Response(404, request=request))


def test_an_existing_path_wins(monkeypatch, tmp_path):
    calls = answer(monkeypatch, AssertionError("asked the hub"))
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name").samefile(tmp_path / "owner" / "name")
    assert hub.resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/owner") == tmp_path / "owner"
    assert not calls


def test_a_hub_id_is_fetched_by_an_allow_list(monkeypatch, tmp_path):
    calls = answer(monkeypatch, tmp_path)
    assert hub.resolve("owner/na.me-1_b") == tmp_path
    ((repo, options),) = calls
    assert repo == "owner/na.me-1_b"
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]


def test_what_the_allow_list_lets_through():
    files = [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "chat_template.jinja"),
        "additional_chat_templates/tool_use.jinja",
    ]
    others = [
        *("pytorch_model.bin", "modeling_x.py", "training_args.bin", "rng.pth", "model.pkl"),
        *(
            "original/consolidated.00.pth",
            "onnx/config.json",
            "onnx/x.safetensors",
            "consolidated.safetensors",
        ),
        *("model.gguf", "tf_model.h5", "README.md", "tokenizer.model", "a.json/x.py"),
    ]
    allowed = huggingface_hub.utils.filter_repo_objects(
        [*files, *others], allow_patterns=list(hub.ALLOWED), ignore_patterns=list(hub.IGNORED)
    )
    assert list(allowed) == files


@pytest.mark.parametrize(
    "model",
    [
        "missing",
        "./missing/folder",
        "/missing/folder",
        "a/b/c",
        "owner/",
        "/name",
        "owner/na me",
        "../x",
        "owner/name\n",
        "x" * 9999,
        "a\0b",
        "",
    ],
)
def test_neither_path_nor_hub_id(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = answer(monkeypatch, AssertionError("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist, expected a folder or a hub id"):
        hub.resolve(model)
    assert not calls


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.LocalEntryNotFoundError("x"), "there is no folder owner/name, and fetching it"),
        (errors.OfflineModeIsEnabled("x"), "there is no folder owner/name, and fetching it"),
        (httpx.ConnectError("x"), "there is no folder owner/name, and fetching it"),
        (
            http_error(errors.RepositoryNotFoundError),
            "there is no folder .* no such model is on the hub",
        ),
        (http_error(errors.GatedRepoError), "is gated on the hub"),
        (errors.HFValidationError("x"), "fetching it as a hub id failed"),
        (PermissionError("x"), "PermissionError"),
    ],
)
def test_what_can_go_wrong_is_one_sentence(error, expected, monkeypatch):
    answer(monkeypatch, error)
    with pytest.raises(CheckpointError, match=expected) as caught:
        hub.resolve("owner/name")
    assert "\n" not in str(caught.value)
    if "fetching it" in expected:  # a path that is not there, to the command line
        assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("name", ["rows.jsonl", "model.gguf", "adapter_model.safetensors"])
def test_a_file_is_no_checkpoint(tmp_path, name):
    """Data in the place of a checkpoint, in a command whose arguments are swapped."""
    (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(CheckpointError, match=f"{name} is a file of another name than model.safe"):
        hub.resolve(tmp_path / name)


def test_without_the_hub_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install '\.\[hub\]'"):
        hub.resolve("owner/name")


def data_repo(monkeypatch, tmp_path, files):
    """Let the hub have a data set of these files; records what is downloaded."""
    fetched = []

    class HfApi:
        def dataset_info(self, repo):
            assert repo == "owner/name"
            if isinstance(files, BaseException):
                raise files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def hf_hub_download(repo, file, repo_type):
        assert (repo, repo_type) == ("owner/name", "dataset")
        fetched.append(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return fetched


SHARDS = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]


@pytest.mark.parametrize(
    ("files", "source", "taken"),
    [
        ([*SHARDS, "data/test-00000-of-00001.parquet", "README.md"], "owner/name", SHARDS),
        (["a.csv", "dataset_infos.json"], "owner/name", ["a.csv"]),
        (["train.csv", "train.jsonl", "test.jsonl"], "owner/name", ["train.jsonl"]),
        (["a/b.json", "c.json"], "owner/name:a/b.json", ["a/b.json"]),
    ],
)
def test_files_of_a_data_set(monkeypatch, tmp_path, files, source, taken):
    fetched = data_repo(monkeypatch, tmp_path, files)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve_data(source) == [tmp_path / file for file in taken]
    assert fetched == taken


@pytest.mark.parametrize(
    ("files", "source", "why"),
    [
        (["a.json", "b.json"], "owner/name", r"2 files to train on, .*owner/name:FILE .*a.json, b"),
        (["README.md", "x.py"], "owner/name", "0 files to train on.*none that can be read"),
        (["a.json"], "owner/name:b.json", r"no file b.json"),
        (["a/train.json", "b/train.json"], "owner/name", "2 files to train on"),
    ],
)
def test_files_that_are_not_clear(monkeypatch, tmp_path, files, source, why):
    fetched = data_repo(monkeypatch, tmp_path, files)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=why):
        hub.resolve_data(source)
    assert not fetched


def test_data_on_this_machine_and_nowhere(monkeypatch, tmp_path):
    data_repo(monkeypatch, tmp_path, http_error(errors.RepositoryNotFoundError))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("")
    assert [path.resolve() for path in hub.resolve_data("owner/name")] == [tmp_path / "owner/name"]
    assert hub.resolve_data("a.jsonl") == [type(tmp_path)("a.jsonl")]
    (tmp_path / "owner" / "name").unlink()
    with pytest.raises(
        CheckpointError, match=r"data: there is no file owner/name.*no such data set"
    ):
        hub.resolve_data("owner/name")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_a_weight_file_stands_for_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert hub.resolve(tmp_path / name) == tmp_path


def test_a_weight_file_of_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "merged.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file of another name .*; give the folder"):
        hub.resolve(tmp_path / "merged.safetensors")
