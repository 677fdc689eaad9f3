import pytest

from fastsafe.data.conversation import kind_of
from fastsafe.errors import DataError

TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt"),
        ({"prompt": [1], "completion": (2, 3)}, "prompt"),
        ({"prompt": [], "completion": []}, "prompt"),
        ({"messages": [TURN]}, "messages"),
        ({"messages": (TURN, {"role": "assistant", "content": ""}), "prompt": "kept"}, "messages"),
        ({"text": ""}, "text"),
        ({"text": "a", "source": "user", "prompt_id": 3}, "text"),
    ],
)
def test_kinds(row, kind):
    assert kind_of(row, "here") == kind


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (5, "row is int"),
        ({}, "keys are 'none'"),
        ({"prompt": "a"}, "keys are 'prompt'"),
        ({"text": "a", "messages": [TURN]}, "keys are 'messages, text'"),
        ({"text": None}, "text is None"),
        (
            {"prompt": "a", "completion": [1]},
            r"completion is \[1\], expected prompt and compl",
        ),
        ({"prompt": "a", "completion": 5}, "completion is 5, expected prompt and completion to be"),
        ({"prompt": 5, "completion": "a"}, "prompt is 5"),
        ({"prompt": [1], "completion": "b"}, "completion is 'b'"),
        ({"prompt": [1], "completion": [True]}, r"completion is \[True\]"),
        ({"prompt": [1.0], "completion": [1]}, r"prompt is \[1.0\]"),
        ({"prompt": [1], "completion": b"bytes"}, "completion is b'bytes'"),
        ({"messages": "hi"}, "messages is 'hi'"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": [TURN, "hi"]}, r"messages\[1\] has role 'hi'"),
        ({"messages": [{"role": "human", "content": "a"}]}, r"messages\[0\] has role 'human'"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has role None"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is None"),
        (
            {"messages": [{"role": "user", "content": [TURN]}]},
            r"messages\[0\].content is \[{'content': 'hi', 'role'",
        ),
        ({"text": {"a": "\x1b[31m"}}, r"text is {'a': '\\x1b"),
        ({"prompt": 1.5, "completion": "\x1b[31m" * 99}, r"prompt is 1\.5"),
        (
            {"messages": [{"role": "\x1b[31m" * 99, "content": "a"}]},
            r"messages\[0\] has role '\\x1b",
        ),
    ],
)
def test_refused(row, expected):
    with pytest.raises(DataError, match=f"^here: {expected}") as caught:
        kind_of(row, "here")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 300
