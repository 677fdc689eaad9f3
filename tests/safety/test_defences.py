"""Defences after training: identities, dense formulas in fp64, choices, and what is refused."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastsafe.errors import AdapterError, CheckpointError, UsageError
from fastsafe.io import safetensors
from fastsafe.io.checkpoint import Checkpoint
from fastsafe.model import Adapter, ModelConfig, Transformer
from fastsafe.model.lora import LoraWeights
from fastsafe.model.peft import LoraConfig
from fastsafe.safety.defences import apply_posthoc, defences

# Qwen: biases, keys half as wide as queries, a tied head
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
ALL = defences()
FP32 = 64 * torch.finfo(torch.float32).eps


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30))


def dense(lora: LoraWeights) -> Tensor:
    return lora.scaling * lora.lora_B.double() @ lora.lora_A.double()


class Home(NamedTuple):
    """Folders of one model's life."""

    folder: Path
    base: Path  # aligned
    unaligned: Path
    tuned: Path  # adapter of ranks 2 and 3
    safe: Path  # adapter of rank 4
    full: Path  # tuned checkpoint

    def adapter(self, name: str) -> Adapter:
        config = ModelConfig.from_json(QWEN, "test")
        return Adapter.load(self.folder / name, Transformer.random(config).slots())

    def apply(self, defence: str, tuned: str = "tuned", out: str = "out", **params: Any) -> Path:
        """Edit; ``params`` that are paths of this home are given where they are needed."""
        needed = {"unaligned": self.unaligned, "safe_adapter": self.safe}
        given = {k: v for k, v in needed.items() if k in ALL[defence].needs} | params
        return apply_posthoc(
            ALL[defence], self.folder / tuned, self.base, self.folder / out, **given
        )

    def tensors(self, name: str) -> dict[str, Tensor]:
        return Checkpoint(self.folder / name).read()


def write_checkpoint(path: Path, seed: int, **config: Any) -> None:
    path.mkdir()
    model = Transformer.random(ModelConfig.from_json(QWEN | config, "test"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + torch.randn(tensor.shape, generator=generator) / 10
        for name, tensor in model.tensors().items()
    }
    safetensors.write(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(QWEN | config))


def write_adapter(path: Path, ranks: dict[str, int], alpha: float, seed: int) -> None:
    model = Transformer.random(ModelConfig.from_json(QWEN, "test"))
    config = LoraConfig(
        rank=max(ranks.values()), alpha=alpha, target_modules=tuple(ranks), rank_pattern=ranks
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        module: LoraWeights(
            torch.randn(rank := config.rank_of(module), slot.in_features, generator=generator),
            torch.randn(slot.end - slot.begin, rank, generator=generator),
            config.scaling_of(module),
        )
        for module, slot in model.slots().items()
        if module.rpartition(".")[2] in ranks
    }
    Adapter(path.name, config, weights).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "unaligned", "full"), 1):
        write_checkpoint(folder / name, seed)
    write_adapter(folder / "tuned", {"q_proj": 2, "k_proj": 3, "v_proj": 2}, 6.0, 5)
    write_adapter(folder / "safe", {"q_proj": 4, "k_proj": 4, "v_proj": 4, "up_proj": 4}, 3.0, 6)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Home:
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return Home(tmp_path, *(tmp_path / n for n in ("base", "unaligned", "tuned", "safe", "full")))


def same(first: Adapter, second: Adapter) -> bool:
    return first.weights.keys() == second.weights.keys() and all(
        torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) and a[2] == b[2]
        for a, b in ((lora, second.weights[m]) for m, lora in first.weights.items())
    )


def record(path: Path) -> Any:
    return json.loads((path / "defence.json").read_text())


def test_every_defence_says_what_it_is() -> None:
    for name, defence in ALL.items():
        assert defence.id == name
        assert defence.stage == ("post" if defence.acts_on == "weights" else "serve")
        assert defence.about
        assert defence.evidence.split(";")[0].split(" ")[0] in (
            "verified",
            "unverified",
            "inferred",
            "effect",
        )
        assert not defence.needs.keys() & defence.params.keys()


def subspace_cosines(home: Home) -> dict[str, float]:
    """cos(C dW, dW) of every module, dense and in fp64."""
    base, before = home.tensors("base"), home.tensors("unaligned")
    found = {}
    for module, lora in home.adapter("tuned").weights.items():
        V = (base[f"{module}.weight"] - before[f"{module}.weight"]).double()
        CdW = V @ V.T / torch.linalg.norm(V) @ dense(lora)
        flat = torch.nn.functional.cosine_similarity(CdW.flatten(), dense(lora).flatten(), dim=0)
        found[module] = float(flat)
    return found


def test_safe_lora_projects_the_least_similar_modules(home: Home) -> None:
    out = home.apply("safe_lora", number=4)
    cosines = subspace_cosines(home)
    least = sorted(cosines, key=lambda module: cosines[module])[:4]
    before, after = home.adapter("tuned"), home.adapter("out")
    assert after.config == before.config
    base, unaligned = home.tensors("base"), home.tensors("unaligned")
    for module, lora in before.weights.items():
        got = after.weights[module]
        assert torch.equal(got.lora_A, lora.lora_A)
        if module in least:
            V = (base[f"{module}.weight"] - unaligned[f"{module}.weight"]).double()
            assert error(dense(got), V @ V.T / torch.linalg.norm(V) @ dense(lora)) < FP32
        else:
            assert torch.equal(got.lora_B, lora.lora_B)
    said = record(out)
    assert said["changed"] == sorted(least)
    assert said["cosine"] == pytest.approx(cosines, abs=1e-6)
    assert (said["defence"], said["params"]["number"]) == ("safe_lora", 4)


@pytest.mark.parametrize(
    "params",
    [{"select": "threshold", "threshold": -1.0}, {"number": 0}],
    ids=["tau = -1", "no module"],
)
def test_safe_lora_can_change_nothing(home: Home, params: dict[str, Any]) -> None:
    given = {"unaligned": home.unaligned, **params}
    home.apply("safe_lora", **given)
    assert same(home.adapter("out"), home.adapter("tuned"))


def test_safe_lora_where_c_is_the_identity_changes_nothing(home: Home) -> None:
    """V = sqrt(O) Q with orthonormal rows Q, so that V V^T / |V| = I."""
    tensors, config = home.tensors("base"), json.loads((home.base / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.shape[0] <= tensor.shape[1]:
            Q, _ = torch.linalg.qr(torch.randn(tensor.shape[::-1], generator=generator))
            tensors[name] = tensor - tensor.shape[0] ** 0.5 * Q.T
    other = home.folder / "identity"
    other.mkdir()
    safetensors.write(other / "model.safetensors", {k: t.contiguous() for k, t in tensors.items()})
    (other / "config.json").write_text(json.dumps(config))
    out = home.apply("safe_lora", unaligned=other, number=99)
    assert len(record(out)["changed"]) == 9
    before, after = home.adapter("tuned"), home.adapter("out")
    for module, lora in before.weights.items():
        assert error(dense(after.weights[module]), dense(lora)) < FP32


def test_safe_lora_takes_exactly_the_number_where_modules_tie(home: Home) -> None:
    """Nine modules with one update and one V: all cosines are equal, the first four are taken."""
    model = Transformer.random(ModelConfig.from_json(QWEN, "test"))
    modules = [m for m in model.slots() if m.endswith(("k_proj", "v_proj"))]
    lora = LoraWeights(torch.ones(2, 16), torch.ones(8, 2), 2.0)
    config = LoraConfig(rank=2, alpha=4.0, target_modules=("k_proj", "v_proj"))
    Adapter("tied", config, dict.fromkeys(modules, lora)).save(home.folder / "tied")
    tensors = home.tensors("base")
    for module in modules:
        tensors[f"{module}.weight"] = torch.eye(8, 16)
    for name, factor in (("one", 1.0), ("two", 2.0)):
        (home.folder / name).mkdir()
        scaled = {
            k: factor * t if k.removesuffix(".weight") in modules else t for k, t in tensors.items()
        }
        safetensors.write(home.folder / name / "model.safetensors", scaled)
        (home.folder / name / "config.json").write_text(json.dumps(QWEN))
    out = apply_posthoc(
        ALL["safe_lora"],
        home.folder / "tied",
        home.folder / "one",
        home.folder / "out",
        unaligned=home.folder / "two",
        number=4,
    )
    said = record(out)
    assert len(set(said["cosine"].values())) == 1
    assert said["changed"] == sorted(modules[:4])


def test_safe_merge_blends_below_the_threshold(home: Home) -> None:
    cosines = subspace_cosines(home)
    ordered = sorted(cosines.values())
    threshold = (ordered[4] + ordered[5]) / 2
    out = home.apply("safe_merge", keep=0.7, threshold=threshold)
    low = {module for module, similar in cosines.items() if similar < threshold}
    assert record(out)["changed"] == sorted(low)
    assert len(low) == 5
    before, safe, after = (home.adapter(n) for n in ("tuned", "safe", "out"))
    for module, lora in before.weights.items():
        want = dense(lora)
        if module in low:
            want = 0.7 * want + 0.3 * dense(safe.weights[module])
        assert error(dense(after.weights[module]), want) < FP32


def test_safe_merge_that_keeps_all_changes_nothing(home: Home) -> None:
    home.apply("safe_merge", keep=1.0, threshold=1.0)
    assert same(home.adapter("out"), home.adapter("tuned"))


def test_safe_merge_needs_all_modules(home: Home) -> None:
    with pytest.raises(AdapterError, match=r"no update of .*mlp\.up_proj and 2 more modules"):
        home.apply("safe_merge", tuned="safe", safe_adapter=home.tuned)


def test_wise_ft_of_an_adapter(home: Home) -> None:
    for strength in (0.0, 0.25, 1.0):
        out = home.folder / f"out-{strength}"
        apply_posthoc(ALL["wise_ft"], home.tuned, home.base, out, strength=strength)
        after = home.adapter(out.name)
        for module, lora in home.adapter("tuned").weights.items():
            got = dense(after.weights[module])
            assert error(got, strength * dense(lora)) < FP32
            assert strength or not got.any()
    assert same(home.adapter("out-1.0"), home.adapter("tuned"))


def test_wise_ft_of_a_checkpoint(home: Home) -> None:
    base, full = home.tensors("base"), home.tensors("full")
    for strength, exact in ((0.0, base), (1.0, full), (0.25, None)):
        out = home.folder / f"out-{strength}"
        apply_posthoc(ALL["wise_ft"], home.full, home.base, out, strength=strength)
        for name, tensor in home.tensors(out.name).items():
            if exact is not None:
                assert torch.equal(tensor, exact[name])
            else:
                assert error(tensor, 0.75 * base[name].double() + 0.25 * full[name].double()) < FP32


@pytest.mark.parametrize("what", ["tuned", "full"])
def test_resta_without_step_and_drop_is_the_tuned_model(home: Home, what: str) -> None:
    out = home.apply("resta", tuned=what, gamma=0.0)
    base, full, found = home.tensors("base"), home.tensors("full"), home.tensors("out")
    updates = home.adapter("tuned").weights
    for name, tensor in found.items():
        lora = updates.get(name.removesuffix(".weight"))
        if what == "full":
            assert torch.equal(tensor, full[name])
        elif lora is None or name.endswith(".bias"):
            assert torch.equal(tensor, base[name])
        else:
            assert error(tensor, base[name].double() + dense(lora)) < FP32
    assert record(out)["params"]["unaligned"] == str(home.unaligned)


@pytest.mark.parametrize("tensors", ["all", "linear"])
def test_resta_takes_the_step_of_alignment_again(home: Home, tensors: str) -> None:
    home.apply("resta", tuned="full", gamma=0.4, tensors=tensors)
    base, full, before = (home.tensors(n) for n in ("base", "full", "unaligned"))
    for name, tensor in home.tensors("out").items():
        want = full[name].double()
        if tensors == "all" or name.endswith("_proj.weight"):
            want = want + 0.4 * (base[name].double() - before[name].double())
        assert error(tensor, want) < FP32


def test_resta_drops_by_seed(home: Home) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        home.apply("resta", tuned="full", out=name, gamma=0.0, drop=0.4, seed=seed)
    first, again, other, base, full = (home.tensors(n) for n in ("a", "b", "c", "base", "full"))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        kept = tensor != base[name]
        want = base[name].double() + (full[name].double() - base[name].double()) / 0.6
        assert error(tensor[kept], want[kept]) < FP32
    big = "model.embed_tokens.weight"
    assert not torch.equal(first[big], other[big])
    assert 0.5 < float((first[big] != base[big]).float().mean()) < 0.7


def test_resta_of_another_vocabulary(home: Home) -> None:
    write_checkpoint(home.folder / "small", 7, vocab_size=30)
    given: dict[str, Any] = {"unaligned": home.folder / "small"}
    with pytest.raises(CheckpointError, match=r"small: tensor 'model.embed_tokens.weight' is \[30"):
        home.apply("resta", tuned="full", **given)
    assert not (home.folder / "out").exists()
    given["tensors"] = "linear"
    home.apply("resta", tuned="full", **given)
    Transformer.load(Checkpoint(home.folder / "out"))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("wise_ft", {"strenght": 0.5}, "parameter 'strenght' is unknown; did you mean strength"),
        ("wise_ft", {"x": 1}, "parameter 'x' is unknown; known: strength"),
        ("wise_ft", {"strength": 1.2}, r"wise_ft: strength is 1\.2"),
        ("safe_lora", {}, "parameter 'unaligned' is missing; give the checkpoint before"),
        ("safe_lora", {"unaligned": "u", "select": "all"}, "safe_lora: select is 'all'"),
        ("safe_merge", {"unaligned": "u", "safe_adapter": "s", "keep": 2}, "keep is 2"),
        ("resta", {"unaligned": "u", "drop": 1.0}, r"drop 1\.0"),
        ("resta", {"unaligned": "u", "gamma": float("nan")}, "gamma is nan"),
        ("resta", {"unaligned": "u", "tensors": "some"}, "tensors 'some'"),
        ("ptst", {}, "defence ptst: acts on the prompt, expected one that edits weights"),
    ],
)
def test_wrong_parameters_are_refused(
    home: Home, name: str, params: dict[str, Any], message: str
) -> None:
    paths = {"u": home.unaligned, "s": home.safe}
    given = {k: paths.get(v, v) if isinstance(v, str) else v for k, v in params.items()}
    with pytest.raises(UsageError, match=message):
        apply_posthoc(ALL[name], home.tuned, home.base, home.folder / "out", **given)
    assert not (home.folder / "out").exists()


@pytest.mark.parametrize("what", ["tuned", "base", "unaligned"])
def test_no_input_is_overwritten(home: Home, what: str) -> None:
    with pytest.raises(UsageError, match="is read, too; write to another folder"):
        apply_posthoc(
            ALL["resta"],
            home.tuned,
            home.base,
            home.folder / "x" / ".." / what,
            unaligned=home.unaligned,
        )
