"""ShieldGemma: does this text violate this policy? P(Yes) of one token.

Zeng et al. 2024 (arXiv 2407.21772). The order of the parts and the decision by the tokens ``Yes``
and ``No`` are from the model card (secondary); the wording and the policy are ours unless the user
supplies texts. One policy per judge; the default is about dangerous content.
"""

from collections.abc import Mapping
from typing import Any

from fastsafe.safety.completer import Ask, Reply
from fastsafe.safety.judges._grammar import label_odds
from fastsafe.safety.judges._model import WORDED, ask_in_words, settings, worded
from fastsafe.safety.judges._spec import Classifier, Family, Item, Reading
from fastsafe.safety.judges._template import template

VERSION = "1"
LABELS = ("Yes", "No")


def classifier(options: Mapping[str, Any]) -> Classifier:
    """Return the guard; ``template`` is for answers, ``prompt_template`` for prompts alone."""
    answers = worded("shieldgemma_answer", options)
    prompts = template(
        "shieldgemma_prompt", options["prompt_template"], options["prompt_template_sha256"]
    )

    def ask(item: Item, attempt: int) -> Ask:
        text = prompts if item.completion is None else answers
        return ask_in_words(text, item, attempt, options, labels=LABELS)

    def read(item: Item, reply: Reply) -> Reading:
        p_yes = label_odds(reply, LABELS)["Yes"]
        return Reading(unsafe=p_yes > options["threshold"], score=p_yes)

    return Classifier(
        id="shieldgemma" + ("-ours" if answers.is_ours or prompts.is_ours else ""),
        settings=settings(VERSION, options, answers, prompts),
        ask=ask,
        read=read,
        reads_prompts=True,
    )


FAMILY = Family(
    id="shieldgemma",
    options={**WORDED, "prompt_template": "", "prompt_template_sha256": "", "threshold": 0.5},
    classifier=classifier,
)
