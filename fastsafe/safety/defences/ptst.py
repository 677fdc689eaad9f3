"""PTST, pure tuning and safe testing: a safety prompt at test time that training never saw.

tau_test = safety prompt (+) tau, with tau the template of training, which must hold no safety
prompt: one that was there in training loses its force with it. The text is ours.

Source: Lyu et al. 2024, arXiv:2402.18540 (verified).
"""

from ._spec import Defence
from ._system import system_prompt

DEFENCE = Defence(
    id="ptst",
    stage="serve",
    acts_on="prompt",
    about="safety prompt in front of the system prompt, at test time only",
    evidence="verified; Lyu et al. 2024, arXiv:2402.18540",
    params={"text": None},  # None: texts/ptst.txt
    apply=system_prompt("ptst"),
)
