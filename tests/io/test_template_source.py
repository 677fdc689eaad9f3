"""Chat templates render as in Jinja, or are refused by name."""

import time
from contextlib import suppress
from typing import Any

import pytest

from fastsafe.errors import TokenizerError
from fastsafe.io.chat_template import ChatTemplate
from fastsafe.io.template_source import for_minijinja

jinja_utils = pytest.importorskip("transformers.utils.chat_template_utils")

MESSAGES = [
    {"role": "user", "content": "they're here\r\n{{ x }}"},
    {"role": "assistant", "content": "a {% b %}"},
]


def theirs(source: str) -> str:
    texts, _ = jinja_utils.render_jinja_template([MESSAGES], chat_template=source)
    return str(texts[0])


@pytest.mark.parametrize(
    "source",
    [
        '{{ messages[0].content.title() }}|{{ "it\'s".title( ) }}',
        "{{ messages[0].role.title() + '.title()' }} x.title()",
        "{{ '{% generation %}' }}{% generation %}{{ messages[1].content }}{% endgeneration %}",
        "{%- if true -%}\r\n a {{- ' %} ' -}} }} {%- endif %}\rb",
        "{# {{ 1e20 }} ' #}{% raw %}{{ 1e20 }}'{% endraw %}{{ '1e20' }}{{ \"a\\\"b}}\" }}",
        "{{ 'x'|int }}{{ '7'|int }}{{ '7.9'|int }}{{ none|int(3) }}{{ 2.9|int }}",
        "{{ 'ab' is sequence }}{{ messages is sequence }}{{ 3 is sequence }}{{ {} is sequence }}",
        "{{ 1.0 }}{{ 2.5|tojson }}{{ messages|tojson }}{{ 0x1e2|default('') }}",
        "{% set a1e2 = 'n' %}{{ a1e2 }}{{ [1, 2]|tojson }}",
    ],
)
def test_templates_print_what_jinja_prints(source: str) -> None:
    got = ChatTemplate(source, {}).render(MESSAGES, add_generation_prompt=False)
    assert got == theirs(source)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ 1e20 }}", "a number with an exponent"),
        ("{% if 1.5E+3 > 2 %}a{% endif %}", "a number with an exponent"),
        ("{{ 2.0|tojson }}", "whole number with a point as JSON"),
        ("{{ [0.5, 10.00, 3] | first | tojson }}", "whole number with a point as JSON"),
        ("{{ messages[0]|attr('role') }}", "attr"),
        ("{{ 'a'.title().strip() }}", "title"),
    ],
)
def test_what_would_print_something_else_is_refused(source: str, problem: str) -> None:
    with pytest.raises(TokenizerError, match=problem):
        ChatTemplate(source, {}).render(MESSAGES)


@pytest.mark.parametrize("part", ["{{", "{%", "{#", "{{ '", '{% "', "{% raw %}", "'", "{{ a }}"])
def test_any_source_is_read_in_linear_time(part: str) -> None:
    source: Any = part * (100_000 // len(part))
    assert for_minijinja.__wrapped__(source) == source


@pytest.mark.parametrize("part", ["1.0 ", "1.0|", "1_", "| ", ".title() "])
def test_the_code_of_a_tag_is_read_in_linear_time(part: str) -> None:
    """A quadratic search takes half a minute or longer here."""
    begin = time.process_time()
    with suppress(TokenizerError):
        for_minijinja.__wrapped__("{{ " + part * (300_000 // len(part)) + "}}")
    assert time.process_time() - begin < 5
