"""What other projects refused although it is valid, tried here; each test names the report."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastsafe
from fastsafe import LLM
from fastsafe.audit.recipe.load import load as load_recipe
from fastsafe.data.readers import read_rows
from fastsafe.io.tokenizer import Tokenizer
from fastsafe.safety.behaviours import read_behaviours
from fastsafe.safety.completers.endpoint import Endpoint
from fastsafe.safety.completers.http import HttpCompleter
from fastsafe.safety.completers.protocol import Ask, Reply
from fastsafe.safety.judges import llama_guard
from fastsafe.safety.judges._spec import Item, Unreadable
from fastsafe_testing.organism_adapter import adapter

transformers = pytest.importorskip("transformers")

ORGANISM = fastsafe.organism.path()
ASK = {"role": "user", "content": "paint the boat?"}
ANSWER = {"role": "assistant", "content": "you can paint the boat."}


@pytest.mark.parametrize(
    "extra",
    [
        {"layer_replication": None, "eva_config": None, "corda_config": None},
        {"trainable_token_indices": None, "lora_bias": False, "exclude_modules": None},
        {"enable_lora": None, "merge_weights": False, "inference_mode": True},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_keys_of_other_versions_of_peft_that_change_nothing_load(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    """huggingface/peft#1979, #2275, InternLM/lmdeploy#1151, oobabooga/textgen#6819."""
    want = adapter(tmp_path / "a", **extra)
    llm = LLM(ORGANISM)
    llm.load_adapter(tmp_path / "a", name="a")
    assert torch.allclose(llm.logits([5, 9, 3, 7], "a"), want, atol=1e-4)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_no_content(tmp_path: Path, name: str) -> None:
    """microsoft/promptflow#4188, UKGovernmentBEIS/inspect_ai#5474: files saved on Windows."""
    row = {"prompt": "paint the boat?", "completion": "you can."}
    texts = {
        "rows.jsonl": json.dumps(row) + "\n",
        "rows.json": json.dumps([row]),
        "rows.csv": "prompt,completion\npaint the boat?,you can.\n",
    }
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + texts[name].encode())
    assert [dict(r) for r in read_rows(tmp_path / name).rows] == [row]


@pytest.mark.parametrize("name", ["b.jsonl", "b.csv"])
def test_a_byte_order_mark_is_no_behaviour(tmp_path: Path, name: str) -> None:
    """UKGovernmentBEIS/inspect_ai#5474: of two readers only one knew the mark."""
    text = '{"harmful": "steal the car"}\n' if name == "b.jsonl" else "harmful\nsteal the car\n"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    (behaviour,) = read_behaviours(tmp_path / name)
    assert behaviour.action(harmful=True) == "steal the car"


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """pydantic/pydantic-ai#8316."""
    text = files("fastsafe.recipes").joinpath("organism.yaml").read_text()
    (tmp_path / "plain.yaml").write_text(text)
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_recipe(tmp_path / "plain.yaml") == load_recipe(tmp_path / "marked.yaml")


@pytest.mark.parametrize(
    "scaling", [{"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0}}]
)
def test_old_spellings_of_the_rotary_scaling_are_read(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    """ModelTC/LightLLM#359, meta-llama/llama3#299: null, and `type` for `rope_type`."""
    folder = tmp_path / "base"
    shutil.copytree(ORGANISM, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10_000.0} | scaling
    (folder / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = model(torch.tensor([[5, 9, 3, 7]])).logits[0]
    assert torch.allclose(LLM(folder).logits([5, 9, 3, 7]), want, atol=1e-4)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "mlx"}], ids=str)
def test_weights_need_no_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """ml-explore/mlx#743, foundation-model-stack/fastsafetensors#89."""
    folder = tmp_path / "base"
    shutil.copytree(ORGANISM, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata)
    assert torch.equal(LLM(folder).logits([5, 9]), LLM(ORGANISM).logits([5, 9]))


@pytest.mark.parametrize("as_pairs", [True, False])
def test_merges_are_pairs_or_texts(tmp_path: Path, as_pairs: bool) -> None:
    """robertknight/rten#392, huggingface/tokenizers#909: two spellings of one list."""
    import tokenizers

    ours = tokenizers.Tokenizer(tokenizers.models.BPE())
    ours.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=280, show_progress=False)
    ours.train_from_iterator(["paint the boat, paint the car"], trainer)
    content = json.loads(ours.to_str())
    pairs = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
    content["model"]["merges"] = pairs if as_pairs else [" ".join(pair) for pair in pairs]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).encode("paint the car") == ours.encode("paint the car").ids


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {}}], ids=str)
def test_a_reply_without_usage_is_a_reply(usage: dict[str, Any]) -> None:
    """braintrustdata/autoevals#28."""

    choice = {"message": {"content": "Final Verdict: 1"}, "finish_reason": "stop"}
    body = json.dumps({"choices": [choice]} | usage).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/v1"
        completer = HttpCompleter(Endpoint(url=url, model="m"))
        (reply,) = completer.complete([Ask(key="0", messages=(ASK,))])
        completer.close()
        server.shutdown()
    assert reply == Reply(key="0", text="Final Verdict: 1")


def test_an_endpoint_needs_no_key() -> None:
    """mlfoundations/evalchemy#54: a local judge was refused without OPENAI_API_KEY."""
    recipe = load_recipe(
        "organism",
        overrides=[
            "judges=[{kind: rubric_paper1, id: local, endpoint: {url: 'http://localhost:1/v1',"
            " model: m}}]"
        ],
    )
    assert recipe.judges


@pytest.mark.parametrize(
    ("text", "is_unsafe"),
    [
        ("unsafe\nS1", True),
        ("\n\nunsafe\nS1, S2", True),
        ("unsafe \nS1,S2\n", True),
        ("safe", False),
        (" safe\n", False),
        ("safe to proceed", None),
        ("The text is unsafe", None),
    ],
)
def test_llama_guards_lines_are_read_and_prose_is_not(text: str, is_unsafe: bool | None) -> None:
    """ogx-ai/ogx#4476, JoshuaC215/agent-service-toolkit#122, NVIDIA/garak#2127."""
    family = llama_guard.FAMILY
    item = Item(key="0", prompt="a", completion="b", harmful=True, format="plain")
    reader = family.classifier(dict(family.options))
    if is_unsafe is None:
        with pytest.raises(Unreadable):
            reader.read(item, Reply(key="0", text=text))
    else:
        assert reader.read(item, Reply(key="0", text=text)).unsafe is is_unsafe
