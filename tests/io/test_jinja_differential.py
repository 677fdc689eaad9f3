"""Micro templates against transformers' own renderer, which is Jinja."""

import pytest

from fastsafe.errors import TokenizerError
from fastsafe.io.chat_template import ChatTemplate

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

ASK = [{"role": "user", "content": "hi"}]
VARIABLES = {"s": "Ab b cD ", "n": 5, "d": {"role": "u", "b": None}, "turns": ASK * 2}
VALUES = ("s", "n", "d", "turns", "true", "none", "[3, 1, 2]", "'12'", "'1.9'", "2.5", "[]")
FILTERS = ("string", "upper", "trim", "default('x')", "default('x', true)", "tojson")
TESTS = ("defined", "none", "string", "number", "integer", "float", "boolean", "mapping")
TESTS += ("sequence", "iterable", "true", "false", "in([5])", "equalto(5)")
METHODS = ("upper()", "lower()", "strip()", "lstrip()", "rstrip()", "split()", "split(' ', 1)")
METHODS += ("splitlines()", "startswith('A')", "endswith(' ')", "find('b')", "replace('b', 'c', 1)")
METHODS += ("count('b')", "capitalize()", "isdigit()", "isalpha()", "isupper()", "islower()")
BLOCKS = (
    "a\n\n",
    "a\r\n\r\n",
    "\r\n a \r b \n",
    "  {% if true %}\n  a\n  {% endif %}\nb\n",
    "{% if true -%}\r\n  a\r\n{%- endif %} b\r\n",
    "{%+ if true %}a{% endif %}",
    "a {% if true %} \nb{% endif %}",
    "{#- c -#}\r x",
    "{{ 'a\r\nb' }}{{ 'a\\r\\nb' }}",
    "{% raw -%}  {{ x }}\r{%- endraw %}",
    "{%- generation -%}\n a \n{%- endgeneration -%}",
    "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % -3 }} {{ 7 / 2 }} {{ 2 ** 3 }}",
    "{{ s[0] }}{{ s[-1] }}{{ s[1:3] }}{{ s[::-1] }}{{ turns[::-1][0].role }}",
    "{{ [true, none, 1.0, 'a'] }}{{ {'a': none, 'b': [1, 2.5]} }}{{ (1, 2) }}",
    "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a = i %}{% endfor %}{{ ns.a }}",
    "{% for i in [1, 2, 3] if i != 2 %}{{ loop.index }}{{ loop.last }} {% endfor %}",
    "{% macro f(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}{{ f() }}",
    "{{ turns | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}",
    "{{ 'x'|int }}{{ 'x'|int(9) }}{{ '1.9'|int }}{{ '0x1f'|int(0, 16) }}{{ '5'|int + 1 }}",
    "{{ {'b': 1, 'a': '<é>'}|tojson }}{{ [1, [2.5]]|tojson(indent=2) }}",
)
SOURCES = (
    *BLOCKS,
    *(f"{{{{ ({value})|{name} }}}}" for value in VALUES for name in FILTERS),
    *(f"{{{{ ({value}) is {name} }}}}" for value in VALUES for name in TESTS),
    *(f"{{{{ ({text}).{name} }}}}" for text in ("s", "' a b\\n'", "'12'") for name in METHODS),
)


@pytest.mark.parametrize("source", SOURCES)
def test_equal_to_jinja(source: str) -> None:
    render = chat_template_utils.render_jinja_template
    (expected,), _ = render([ASK], chat_template=source, **VARIABLES)
    given = ChatTemplate(source, {}).render(ASK, add_generation_prompt=False, **VARIABLES)
    assert given == expected


@pytest.mark.parametrize(
    "method",
    ["index('b')", "partition('b')", "removeprefix('A')", "zfill(9)", "ljust(9)", "swapcase()"],
)
def test_methods_that_minijinja_lacks_are_refused_by_name(method: str) -> None:
    with pytest.raises(TokenizerError, match=f"no method named {method.partition('(')[0]}"):
        ChatTemplate(f"{{{{ 'Ab'.{method} }}}}", {}).render(ASK)
