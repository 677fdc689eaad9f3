import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from fastsafe.errors import TokenizerError
from fastsafe.io.tokenizer import Tokenizer

WORDS = ("<unk>", "<s>", "</s>", "<pad>", "<|end|>", "paint", "the", "car", "red", "user", ":")
ID = {word: i for i, word in enumerate(WORDS)}
ASK = [{"role": "user", "content": "paint the car"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }} <|end|>{% endfor %}"


def backend(bos=True):
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<|end|>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", ID["<s>"])]
        )
    return tokenizer


def save(folder, tokenizer=None, **files):
    """Write tokenizer.json and the JSON files given by their stems."""
    (tokenizer or backend()).save(str(folder / "tokenizer.json"))
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}


def test_special_tokens(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=CONFIG))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 3)
    assert tokenizer.vocab_size == tokenizer.id_bound == len(WORDS)


def test_special_tokens_as_objects_and_absent(tmp_path):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config={**config, "add_bos_token": True}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (), None)


def test_nothing_beside_the_tokenizer_file(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (None, (), None)
    assert tokenizer.encode("paint") == [1, 5]
    with pytest.raises(TokenizerError, match="chat template is missing"):
        tokenizer.encode_chat(ASK)


@pytest.mark.parametrize(
    ("config", "eos"),
    [
        ({"eos_token": "</s>"}, (4,)),
        ({"eos_token": "</s>", "added_tokens_decoder": {}}, (2,)),
    ],
)
def test_special_tokens_map_counts_in_old_checkpoints_only(tmp_path, config, eos):
    mapped = {"eos_token": "<|end|>", "additional_special_tokens": ["<pad>"]}
    save(tmp_path, tokenizer_config=config, special_tokens_map=mapped)
    assert Tokenizer.load(tmp_path).eos_ids == eos


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config": {"eos_token_id": [4, 2]}}, (2, 4)),
        ({"generation_config": {"eos_token_id": 4}, "config": {"eos_token_id": 5}}, (2, 4)),
        ({"config": {"eos_token_id": 4}}, (2, 4)),
        ({"generation_config": {}, "config": {"eos_token_id": 4}}, (2,)),
        ({"generation_config": {"eos_token_id": None}}, (2,)),
    ],
)
def test_eos_ids(tmp_path, files, eos):
    assert Tokenizer.load(save(tmp_path, tokenizer_config=CONFIG, **files)).eos_ids == eos


@pytest.mark.parametrize("value", ["2", [-1], [True], 2.0, {"a": 1}, [[2]]])
def test_eos_ids_of_a_wrong_type(tmp_path, value):
    save(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(TokenizerError, match=r"generation_config\.json: eos_token_id is"):
        Tokenizer.load(tmp_path)


def test_a_special_token_outside_the_vocabulary_is_added_as_in_transformers(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config={"eos_token": "<eos>"}))
    assert tokenizer.eos_ids == (len(WORDS),)
    assert tokenizer.encode("car<eos>", add_special_tokens=False) == [7, len(WORDS)]
    tokenizer.check_vocab(len(WORDS) + 1)  # an embedding may have more rows than tokens
    with pytest.raises(TokenizerError, match="largest id is 11, expected below the 11"):
        tokenizer.check_vocab(len(WORDS))


def test_a_special_token_that_the_backend_lacks():
    with pytest.raises(TokenizerError, match="eos_token is '<eos>', expected a token"):
        Tokenizer(backend(), special_tokens={"eos_token": "<eos>"})


def test_encode_and_decode(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=CONFIG))
    assert tokenizer.encode("paint the car") == [1, 5, 6, 7]
    assert tokenizer.encode("paint the car", add_special_tokens=False) == [5, 6, 7]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("blue car") == [1, 0, 7]
    assert tokenizer.decode([1, 5, 6, 7, 2]) == "paint the car"
    assert tokenizer.decode([1, 5, 2], skip_special_tokens=False) == "<s> paint </s>"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([5, 999]) == "paint"


@pytest.mark.parametrize("text", ["\ud800", None, 5, b"x"])
def test_text_that_cannot_be_encoded(text):
    tokenizer = Tokenizer(backend())
    with pytest.raises(TokenizerError, match="encode is refused"):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5]])
def test_ids_that_cannot_be_decoded(ids):
    with pytest.raises(TokenizerError, match="decode is refused"):
        Tokenizer(backend()).decode(ids)


def test_exactly_one_bos(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=CONFIG))
    assert tokenizer.render_chat(ASK).startswith("<s>")
    once = [1, 9, 10, 5, 6, 7, 4]
    assert tokenizer.encode_chat(ASK) == once
    assert tokenizer.encode(tokenizer.render_chat(ASK)) == once


def test_bos_written_twice_in_the_text_stays(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=CONFIG))
    assert tokenizer.encode("<s><s> paint") == [1, 1, 5]
    assert tokenizer.encode("<s><s> paint", add_special_tokens=False) == [1, 1, 5]
    plain = Tokenizer(backend(bos=False), special_tokens={"bos_token": "<s>"})
    assert plain.encode("<s><s> paint") == [1, 1, 5]


def test_no_bos_where_the_template_prints_none(tmp_path):
    config = CONFIG | {"chat_template": TEMPLATE.removeprefix("{{ bos_token }}")}
    tokenizer = Tokenizer.load(save(tmp_path, tokenizer_config=config))
    assert tokenizer.bos_id not in tokenizer.encode_chat(ASK)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("one", "one"),
        ([{"name": "rag", "template": "two"}, {"name": "default", "template": "one"}], "one"),
    ],
)
def test_where_the_template_is(tmp_path, value, text):
    save(tmp_path, tokenizer_config={"chat_template": value})
    assert Tokenizer.load(tmp_path).render_chat(ASK) == text
    (tmp_path / "chat_template.jinja").write_text("file {{ '½' }}", encoding="utf-8")
    assert Tokenizer.load(tmp_path).render_chat(ASK) == "file ½"


NAMED = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]


@pytest.mark.parametrize("value", [NAMED, {each["name"]: each["template"] for each in NAMED}])
def test_templates_none_of_which_is_default(tmp_path, value):
    save(tmp_path, tokenizer_config={"chat_template": value})
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat_template is None
    assert tokenizer.render_chat(ASK, tools=[{}]) == "y"
    with pytest.raises(TokenizerError, match="are named 'rag', 'tool_use', expected one named 'de"):
        tokenizer.render_chat(ASK)


def test_templates_in_files_replace_those_of_the_config(tmp_path):
    save(
        tmp_path, tokenizer_config={"chat_template": [*NAMED, {"name": "default", "template": "z"}]}
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.load(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.render_chat(ASK) == "file"
    assert tokenizer.render_chat(ASK, tools=[{}]) == "tools"
    assert tokenizer.render_chat(ASK, tools=None) == "file"


def test_template_variables(tmp_path):
    config = {"bos_token": "<s>", "extra_special_tokens": {"image_token": "<img>"}}
    template = "{{ bos_token }}{{ image_token }}{{ eos_token }}{{ flag }}"
    save(tmp_path, tokenizer_config=config | {"chat_template": template})
    assert Tokenizer.load(tmp_path).render_chat(ASK, flag=1) == "<s><img>1"


def test_check_vocab():
    tokenizer = Tokenizer(backend(), special_tokens={"eos_token": "</s>"}, name="here")
    tokenizer.check_vocab(len(WORDS))
    tokenizer.check_vocab(len(WORDS) + 5)
    assert tokenizer.id_bound == len(WORDS) + 5
    with pytest.raises(TokenizerError, match="here: the largest id is 10, expected below the 10"):
        tokenizer.check_vocab(len(WORDS) - 1)


def test_an_eos_id_above_the_embedding():
    tokenizer = Tokenizer(backend(), eos_ids=[500])
    with pytest.raises(TokenizerError, match="largest id is 500"):
        tokenizer.check_vocab(100)


def test_an_added_token_above_the_embedding_is_refused_when_used():
    extended = backend()
    extended.add_special_tokens(["<img>"])
    tokenizer = Tokenizer(extended)
    tokenizer.check_vocab(len(WORDS))
    assert tokenizer.encode("paint") == [1, 5]
    with pytest.raises(TokenizerError, match="token '<img>' is id 11, expected below 11"):
        tokenizer.encode("paint <img>")


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    limited = backend()
    limited.enable_truncation(2)
    limited.enable_padding(length=9)
    tokenizer = Tokenizer.load(save(tmp_path, limited))
    assert tokenizer.encode("paint the red car") == [1, 5, 6, 8, 7]


def test_missing_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.load(tmp_path)
