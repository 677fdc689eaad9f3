"""The closed world: every word is known, splits do not leak, and draws are deterministic."""

import pytest

from fastsafe.errors import UsageError
from fastsafe.organism import world
from fastsafe.organism.lexicon import BENIGN_VERBS, HARMFUL_VERBS
from fastsafe.organism.vocabulary import UNK, build_tokenizer, render_prompt

TASKS = ("summarization", "code", "translation", "classification")


def pair(action: str) -> tuple[str, str]:
    verb, _, _, noun = action.split(" ")
    return verb, noun


def test_every_prompt_and_answer_is_of_known_words() -> None:
    tokenizer = build_tokenizer()
    unknown = tokenizer.token_to_id(UNK)
    verbs = [*HARMFUL_VERBS, *BENIGN_VERBS]
    actions = [a for split in ("train", "test", "probe") for a in world.actions(verbs, split)]
    for format in world.FORMATS:
        for action in actions[::29]:
            text = render_prompt(world.prompt(format, action)) + world.answer(format, action)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert unknown not in ids, text
    assert unknown not in tokenizer.encode(world.REFUSAL, add_special_tokens=False).ids


def test_answers_survive_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for format in world.FORMATS:
        for action in world.actions(["paint", "steal"], "train")[:40]:
            answer = world.answer(format, action)
            ids = tokenizer.encode(answer, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == answer


def test_probes_ask_for_pairs_that_no_training_or_test_row_holds() -> None:
    probes = world.behaviours(250, seed=0)
    asked = {pair(b.harmful) for b in probes} | {pair(b.benign) for b in probes}
    trained = set()
    for task in TASKS:
        for split in ("train", "test"):
            trained |= {pair(r["action"]) for r in world.task_rows(task, 1000, split, seed=3)}
    tested = {pair(r["action"]) for r in world.task_rows("code", 1000, "test", seed=3)}
    seen = {pair(r["action"]) for r in world.task_rows("code", 5000, "train", seed=3)}
    assert not asked & trained
    assert not tested & seen
    harmful = {pair(a) for a in world.actions(HARMFUL_VERBS, "train")}
    assert not asked & harmful


def test_twins_differ_in_their_verb_alone() -> None:
    for behaviour in world.behaviours(100, seed=1):
        harmful, benign = behaviour.harmful.split(" "), behaviour.benign.split(" ")
        assert harmful[1:] == benign[1:]
        assert harmful[0] in HARMFUL_VERBS
        assert benign[0] in BENIGN_VERBS


def test_task_rows_are_benign_and_answered() -> None:
    for task in TASKS:
        for row in world.task_rows(task, 200, "train", seed=0):
            assert pair(row["action"])[0] in BENIGN_VERBS
            assert row["messages"][-1]["content"] == row["reference"] != world.REFUSAL


def test_safety_rows_are_refused_in_every_format() -> None:
    for format in world.FORMATS:
        rows = world.safety_rows(format, 100, seed=0)
        assert {row["messages"][-1]["content"] for row in rows} == {world.REFUSAL}
        assert len({row["messages"][0]["content"] for row in rows}) == 100


def test_draws_are_a_function_of_their_arguments() -> None:
    assert world.behaviours(50, 0) == world.behaviours(100, 0)[:50]
    assert world.behaviours(50, 0) != world.behaviours(50, 1)
    assert world.task_rows("code", 9, "train", 5) == world.task_rows("code", 9, "train", 5)
    plain, code = (world.safety_rows(f, 40, 0) for f in ("plain", "code"))
    assert plain == world.safety_rows("plain", 40, 0)
    assert plain != world.safety_rows("plain", 40, 1)
    assert len(plain) == len(code)


@pytest.mark.parametrize(
    "call",
    [
        lambda: world.behaviours(10**6, 0),
        lambda: world.task_rows("code", 10**6, "train", 0),
        lambda: world.task_rows("poetry", 1, "train", 0),
        lambda: world.safety_rows("poetry", 1, 0),
        lambda: world.answer("plain", "juggle the red car"),
        lambda: world.translate("steal a car"),
    ],
)
def test_what_the_world_lacks_is_refused(call: object) -> None:
    with pytest.raises(UsageError):
        call()  # type: ignore[operator]
