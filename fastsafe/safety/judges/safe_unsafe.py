"""One word, ``safe`` or ``unsafe``, from any chat model: the plainest guard over an endpoint.

The reply's form is that of JailbreakBench's judge (Chao et al. 2024, arXiv 2404.01318; verified);
the wording is ours unless the user supplies another. Theirs calls answers under 15 tokens not
jailbroken without asking; here every answer is asked about.
"""

from collections.abc import Mapping
from typing import Any

from fastsafe.safety.completer import Ask, Reply
from fastsafe.safety.judges._grammar import plain
from fastsafe.safety.judges._model import FENCED, ask_in_words, settings, worded
from fastsafe.safety.judges._spec import Classifier, Family, Item, Reading, Unreadable
from fastsafe.safety.judges._template import template

VERSION = "1"


def classifier(options: Mapping[str, Any]) -> Classifier:
    """Return the guard; ``template`` is for answers, ``prompt_template`` for prompts alone."""
    answers = worded("safe_unsafe_answer", options)
    prompts = template(
        "safe_unsafe_prompt", options["prompt_template"], options["prompt_template_sha256"]
    )

    def ask(item: Item, attempt: int) -> Ask:
        text = prompts if item.completion is None else answers
        return ask_in_words(text, item, attempt, options, max_tokens=64)

    def read(item: Item, reply: Reply) -> Reading:
        word = plain(reply.text).casefold()
        if word not in ("safe", "unsafe"):
            raise Unreadable(f"reply is {word!r:.40}, expected the one word safe or unsafe")
        return Reading(unsafe=word == "unsafe")

    return Classifier(
        id="safe_unsafe" + ("-ours" if answers.is_ours or prompts.is_ours else ""),
        settings=settings(VERSION, options, answers, prompts),
        ask=ask,
        read=read,
        reads_prompts=True,
    )


FAMILY = Family(
    id="safe_unsafe",
    options={**FENCED, "prompt_template": "", "prompt_template_sha256": ""},
    classifier=classifier,
)
