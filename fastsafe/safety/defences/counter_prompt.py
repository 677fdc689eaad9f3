"""Counter-prompt: a system prompt against the role that tuning may have taught.

It is the naive baseline that reviewers of the second paper asked for. The text is ours.

Source: reviews of arXiv:2406.10288 (verified that it was asked for; no measurement is known).
"""

from ._spec import Defence
from ._system import system_prompt

DEFENCE = Defence(
    id="counter_prompt",
    stage="serve",
    acts_on="prompt",
    about="system prompt that says: you are not absolutely obedient",
    evidence="verified as a reviewers' request; no published measurement",
    params={"text": None},  # None: texts/counter_prompt.txt
    apply=system_prompt("counter_prompt"),
)
