"""PTST, pure tuning and safe testing: a safety prompt at test time alone.

tau_test = safety prompt (+) tau, where tau is the template of training. A safety prompt that was
already in the training template loses its effect. The text is ours.

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
