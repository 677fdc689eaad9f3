"""Values from outside are shortened and escaped before they enter a message."""

from fastsafe.errors import closest, nearest, printable, shown


def test_a_short_value_is_shown_as_python_writes_it() -> None:
    for value in ("text", "it's", "\x1b[31m", 3, -2.5, None, True, ["a", {"b": (1, 2)}]):
        assert shown(value) == repr(value)


def test_a_value_of_any_size_is_shown_in_few_characters() -> None:
    shared: list[object] = ["x"]
    for _ in range(60):
        shared = [shared] * 10
    recursive: list[object] = []
    recursive.append(recursive)
    for value in (shared, recursive, 1 << 100_000, "y" * 10**7, {str(i): i for i in range(9999)}):
        assert len(shown(value)) <= 60
    assert shown("z" * 100, limit=10) == "'zzzzzz..."


def test_what_would_control_a_terminal_is_escaped() -> None:
    hostile = "\x1b]8;;http://x\x07a\x9bb\u202ec\u2066\r\x00\u2028\U000e0041"
    assert printable(hostile).isprintable()
    assert "a" in printable(hostile)
    assert printable(hostile).startswith(r"\x1b]8;;http://x\x07a\x9bb\u202ec")
    kept = "Gr\u00fc\u00dfe, \u4f60\u597d\u3000\u0645\u0631\n\tnext \u200d"
    assert printable(kept) == kept


def test_a_close_word_is_hinted_at_and_only_a_word() -> None:
    assert nearest("cde", ["code", "plain"]) == "did you mean code?"
    assert nearest("zzz", ["code", "plain"]) == "known: code, plain"
    assert closest("cosin", ["cosine"]) == "; did you mean cosine?"
    assert closest("zzz", ["cosine"]) == closest(3, ["cosine"]) == ""
