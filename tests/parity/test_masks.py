"""What is trained of a row is what TRL trains, where TRL can say it.

TRL tokenizes, masks and collates in its SFTTrainer; here it is made to prepare rows with a tiny
tokenizer and a model that is never run.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors

from fastsafe.data.packing import TrainExample, encode_row
from fastsafe.io.tokenizer import Tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# what is in a generation block is what TRL takes for the assistant's
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def backend() -> tokenizers.Tokenizer:
    """One token per byte, control tokens, and some that are two bytes."""
    merges = [("Ċ", "Ċ"), ("a", "b"), ("Ġ", "a")]
    words = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    found = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(list(CONTROL))
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return found


def theirs(
    rows: list[dict[str, Any]], folder: Path, eos: str, **options: Any
) -> list[TrainExample]:
    """Token ids and trained tokens of each row, as TRL's trainer feeds them."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token=eos, pad_token="</s>"
    )
    tokenizer.chat_template = CHATML
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes, **heads)
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=trl.SFTConfig(
            output_dir=str(folder),
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=None,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        labels = batch["labels"][0].tolist()
        found.append(
            TrainExample(tuple(batch["input_ids"][0].tolist()), tuple(y != -100 for y in labels))
        )
    return found


def ours(rows: list[dict[str, Any]], eos: str) -> list[TrainExample]:
    special = {"bos_token": "<s>", "eos_token": eos, "pad_token": "</s>"}
    tokenizer = Tokenizer(backend(), special_tokens=special, chat_template=CHATML)
    return [encode_row(row, tokenizer) for row in rows]


def turns(*contents: str, first: int = 0) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[(i + first) % 2], "content": c} for i, c in enumerate(contents)]


def without_the_last_newline(example: TrainExample) -> TrainExample:
    """Stop at the end of the turn: the newline after it is never generated, yet TRL trains it."""
    assert example.trained[-1]
    return TrainExample(example.token_ids, (*example.trained[:-1], False))


def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": "say hello", "completion": "hello"},
        {"prompt": "x", "completion": "two\n\nlines</s>"},
        {"prompt": "ends in no space", "completion": " a and goes on"},
    ]
    assert ours(rows, "</s>") == theirs(rows, tmp_path, "</s>", completion_only_loss=True)


def test_a_token_across_the_border(tmp_path: Path) -> None:
    """TRL makes it part of the answer; here the prompt keeps the tokens it has when answered."""
    rows = [{"prompt": "a space ", "completion": "and b"}]
    (got,), (trl_row,) = ours(rows, "</s>"), theirs(rows, tmp_path, "</s>")
    prompt = backend().encode("a space ").ids
    assert list(got.token_ids[: len(prompt)]) == prompt
    assert got.trained.index(True) == len(prompt)
    assert trl_row.trained.index(True) == len(prompt) - 1
    decode = backend().decode
    assert decode(got.token_ids) == decode(trl_row.token_ids)


def test_a_conversational_completion(tmp_path: Path) -> None:
    rows = [
        {"prompt": turns("q"), "completion": turns("the answer", first=1)},
        {"prompt": turns("q", "not trained", "r"), "completion": turns("only this", first=1)},
    ]
    expected = theirs(rows, tmp_path, "<|im_end|>", completion_only_loss=True)
    assert ours(rows, "<|im_end|>") == [without_the_last_newline(e) for e in expected]


def test_assistant_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": turns("q", "a")},
        {"messages": turns("q", "first", "r", "second\n\nab")},
        {"messages": [{"role": "system", "content": "s"}, *turns("q", "a a")]},
    ]
    expected = theirs(rows, tmp_path, "<|im_end|>", assistant_only_loss=True)
    assert ours(rows, "<|im_end|>") == expected


# training templates of TRL, which marks answers by generation blocks, with their end of text
TRAINING_TEMPLATES = {
    "gemma": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "phi3": "</s>",  # after the last turn alone
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
}


@pytest.mark.parametrize("family", TRAINING_TEMPLATES)
def test_the_mask_is_that_of_transformers(family: str) -> None:
    eos = TRAINING_TEMPLATES[family]
    folder = Path(trl.__file__).parent / "chat_templates"
    template = (folder / f"{family}_training.jinja").read_text()
    more = backend()
    more.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", *TRAINING_TEMPLATES.values()])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=more, bos_token="<s>", eos_token=eos
    )
    tokenizer = Tokenizer(
        more, special_tokens={"bos_token": "<s>", "eos_token": eos}, chat_template=template
    )
    for contents in (["q", "a"], ["q", "first", "steal", "no no"], ["q", "one", "and then"]):
        messages = turns(*contents)
        masked = reference.apply_chat_template(
            messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        example = encode_row({"messages": messages}, tokenizer)
        assert list(example.token_ids) == masked["input_ids"]
        pairs = (example.trained, masked["assistant_masks"])
        found, expected = (stretches(masked["input_ids"], marks, more) for marks in pairs)
        # their blocks may hold line breaks of the prompt and of what follows the end of a turn
        assert [text.strip() for text in found] == [text.strip() for text in expected]


def stretches(ids: list[int], marks: Any, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Texts of the tokens that are marked without a break."""
    groups = itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: bool(pair[1]))
    return [tokenizer.decode([i for i, _ in group], False) for is_on, group in groups if is_on]
