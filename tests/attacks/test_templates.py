"""A chat template is a program of a stranger: it reaches nothing and it ends."""

import pytest

from fastsafe.errors import TokenizerError
from fastsafe.io import chat_template
from fastsafe.io.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "x" * 1000}]

# Each tries to reach Python, a file or a process. MARK is a path that must not come to exist.
INJECTIONS = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.system('touch MARK') }}",
    "namespace": "{{ namespace.__init__.__globals__.os.system('touch MARK') }}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "loop": "{% for m in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "messages": "{{ messages.__class__.__base__.__subclasses__() }}",
    "method": "{{ messages.append.__self__.__class__.__mro__ }}",
    "our function": "{{ raise_exception.__globals__['sys'].exit() }}",
    "our clock": "{{ strftime_now.__closure__[0].cell_contents._clock.__class__.__mro__ }}",
    "our filter": "{{ (1|tojson).__class__.__mro__[1].__subclasses__() }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "format map": "{{ '{a.__class__.__init__.__globals__}'.format_map({'a': messages}) }}",
    "stored format": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "format by filter": "{{ '%s'|format(messages.__class__.__mro__) }}",
    "attribute by map": "{{ [messages]|map(attribute='__class__.__mro__')|list|string|length/0 }}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '../../../etc/passwd' %}",
    "builtins": "{{ __builtins__.open('MARK', 'w') }}",
    "__import__": "{{ __import__('os').system('touch MARK') }}",
    "open": "{{ open('MARK', 'w').write('x') }}",
    "eval": "{{ eval('1') }}",
    "request": "{{ request.application.__globals__ }}",
    "config": "{{ config.items() }}",
    "statement": "{% do messages.append.__func__ %}",
}

# Each asks for more memory, output or time than there is.
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "repeat": "{{ 'a'*10**9 }}",
    "repeat long": "{{ 'a'*10**8 }}",
    "repeat list": "{{ ([1]*10**9)|length }}",
    "power": "{{ 9**9**9 }}",
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "loops that print": (
        "{% for i in range(9999) %}{% for j in range(9999) %}a{% endfor %}{% endfor %}"
    ),
    "doubled text": (
        "{% set n = namespace(x='a') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "doubled list": (
        "{% set n = namespace(x=[1]) %}"
        "{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x|list|length }}"
    ),
    "long output": (
        "{% set x = messages[0].content * 100 %}{% for i in range(99999) %}{{ x }}{% endfor %}"
    ),
    "long source": "{% for i in range(99999) %}" + "a" * 100_000 + "{% endfor %}",
    "replace": (
        "{% set x = 'a' * 9999 %}{% set y = x|replace('a', x)|replace('a', x) %}{{ y|length }}"
    ),
    "join": "{{ range(99999)|join('a' * 99999)|length }}",
    "padding": "{{ '%999999999d'|format(1) }}",
    "padding method": "{{ '{:999999999d}'.format(1) }}",
    "indent": "{{ 'a\nb'|indent(999999999) }}",
    "json indent": "{{ [1]|tojson(indent=999999999) }}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}"
    ),
    "recursive loop": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}"),
    "cycle": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "nested lists": "{{ " + "[" * 100_000 + "]" * 100_000 + " }}",
    "nested brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "nested blocks": "{% if 1 %}" * 20_000 + "{% endif %}" * 20_000,
    "unary": "{{ " + "not " * 100_000 + "1 }}",
    "huge source": " " * (chat_template.MAX_SOURCE_CHARS + 1),
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_injection(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = INJECTIONS[name].replace("MARK", str(tmp_path / "mark"))
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert not list(tmp_path.iterdir())
    assert "root:" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BOMBS)
def test_bomb(name):
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(BOMBS[name], {}).render(MESSAGES)
    assert len(str(caught.value)) < 600


def test_a_bomb_leaves_the_next_template_alone():
    with pytest.raises(TokenizerError):
        ChatTemplate(BOMBS["doubled text"], {}).render(MESSAGES)
    assert ChatTemplate("{{ messages|length }}", {}).render(MESSAGES) == "1"


def test_templates_do_not_see_each_other():
    ChatTemplate("{% set secret = 'x' %}{% macro spy() %}x{% endmacro %}", {}).render(MESSAGES)
    assert ChatTemplate("{{ secret }}|{{ spy is defined }}", {}).render(MESSAGES) == "|False"


def test_the_callers_messages_are_out_of_reach():
    messages = [{"role": "user", "content": "x"}]
    source = "{{ messages.append(1) }}{{ messages[0].update({'content': 'y'}) }}{{ messages }}"
    assert "y" in ChatTemplate(source, {}).render(messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages.__class__ }}{{ messages[0].__init__ }}", ""),
        ("{{ raise_exception.__globals__ }}{{ strftime_now.__closure__ }}", ""),
        ("{{ ['{0.__class__}']|map('format', messages)|list }}", "['{0.__class__}']"),
        ("{{ os is defined }}{{ sys is defined }}{{ open is defined }}", "FalseFalseFalse"),
    ],
)
def test_harmless(source, expected):
    assert ChatTemplate(source, {}).render(MESSAGES) == expected
