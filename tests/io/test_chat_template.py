import os
import subprocess
import sys
import threading

import pytest

from fastsafe.errors import TokenizerError
from fastsafe.io import chat_template
from fastsafe.io.chat_template import ChatTemplate

ASK = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def render(source, messages=ASK, **variables):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables)


def test_variables_of_the_template():
    assert render("{{ bos_token }}{{ eos_token }}|{{ add_generation_prompt }}") == "<s>|True"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ bos_token }}{{ extra }}", bos_token="<b>", extra=3) == "<b>3"


def test_absent_tools_and_documents_are_none():
    for name in ("tools", "documents"):
        source = (
            f"{{{{ {name} is defined }}}} {{{{ {name} is none }}}} {{{{ {name} is iterable }}}}"
        )
        assert render(source) == "True True False"
        assert render(source, **{name: [1]}) == "True False True"


def test_break_continue_and_json():
    loop = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}"
    assert render(loop + "{% break %}{% endif %}{{ i }}{% endfor %}") == "02"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'a': 1} | tojson(indent=2) }}") == '{\n  "a": 1\n}'
    assert render("{{ [1, {'b': 2}] | tojson(separators=(',', ':')) }}") == '[1,{"b":2}]'
    assert render("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}") == '{"a": 2, "b": 1}'


def test_text_is_not_escaped():
    text = '<b> & "q" {{ x }} {% if %} {# c #} \\n \x1b[31m \u2028 \x00 '
    assert render(ECHO, [{"role": "user", "content": text}]) == f"user: {text}\n"


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_newlines_of_other_systems_are_line_feeds(newline):
    """As Jinja reads them; what a message holds stays as it is."""
    source = "{% for m in messages %}\n<{{ m.role }}>\n{{ m.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a\r\nb"}]
    got = ChatTemplate(source.replace("\n", newline), {}).render(messages)
    assert got == ChatTemplate(source, {}).render(messages)
    assert "a\r\nb" in got


def test_messages_are_not_modified():
    message = {"role": "assistant", "content": "a", "thinking": "t", "name": None}
    render(ECHO, [message])
    assert message == {"role": "assistant", "content": "a", "thinking": "t", "name": None}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is empty"),
        (["hi"], "a message is str"),
        ([{"role": "user", "content": object()}], "not plain data"),
        ([{"role": "user", "content": "\ud800"}], "not plain data"),
    ],
)
def test_refused_messages(messages, expected):
    with pytest.raises(TokenizerError, match=expected):
        render(ECHO, messages)


def test_refusal_of_the_template_is_quoted():
    with pytest.raises(TokenizerError, match=r"refused \('no \\x1b\[31msystem role'\)") as caught:
        render("{{ raise_exception('no \x1b[31msystem role') }}")
    assert "\x1b" not in str(caught.value)


def test_syntax_error_names_the_line():
    with pytest.raises(TokenizerError, match=r"line 2 is refused \('syntax error"):
        render("\n{% if %}")


def test_a_dead_child_is_replaced():
    assert render("{{ 'a' }}") == "a"
    chat_template._WORKER._process.kill()
    chat_template._WORKER._process.wait()
    assert render("{{ 'a' }}") == "a"
    chat_template._WORKER.close()
    assert render("{{ 'a' }}") == "a"


def test_an_interrupt_leaves_no_answer_for_the_next_request(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    assert render("{{ 'a' }}") == "a"
    child = chat_template._WORKER._process
    with monkeypatch.context() as patch:
        patch.setattr(chat_template._WORKER, "_process", Proxy(child, interrupted))
        with pytest.raises(KeyboardInterrupt):
            render("{{ 'b' }}")
    assert child.poll() is not None
    assert render("{{ 'c' }}") == "c"


class Proxy:
    """A child process whose output cannot be read."""

    def __init__(self, process, readline):
        self.stdin, self.stdout = process.stdin, self
        self.poll, self.kill, self.communicate = process.poll, process.kill, process.communicate
        self.readline = readline


def test_threads_get_their_own_answers():
    wrong = []

    def work(name):
        for i in range(50):
            content = f"{name}-{i}"
            if render(ECHO, [{"role": "user", "content": content}]) != f"user: {content}\n":
                wrong.append(content)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_after_a_fork_both_processes_render():
    script = (
        "import os\n"
        "from fastsafe.io.chat_template import ChatTemplate\n"
        "template = ChatTemplate('{{ messages[0].content }}', {})\n"
        "def render(text): return template.render([{'content': text}])\n"
        "assert render('before') == 'before'\n"
        "child = os.fork()\n"
        "assert render(str(child)) == str(child)\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, env=environment()
    )
    assert (result.returncode, result.stderr) == (0, b"")


def test_import_needs_neither_minijinja_nor_torch():
    script = (
        "import sys\n"
        "sys.modules['minijinja'] = None\n"
        "import fastsafe.io.chat_template, fastsafe.io.tokenizer, fastsafe.data.packing\n"
        "print('torch' in sys.modules)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], check=True, env=environment(), capture_output=True
    )
    assert out.stdout == b"False\n"


def test_without_minijinja(monkeypatch):
    chat_template._WORKER.close()
    monkeypatch.setattr(chat_template, "find_spec", lambda name: None)
    with pytest.raises(TokenizerError, match="minijinja is not installed"):
        render(ECHO)


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
