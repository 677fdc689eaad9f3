"""Mixtures of a user's fine-tuning rows with safety rows, and the styles that rows are written in.

mitigation       the mitigations by data: which safety rows are mixed in, how many, in which style
safety_rows      a safety set over all formats, built from behaviours and the shipped refusals
learned_style    the style of a fine-tuning set, learned from its rows
dresser          rewrites one safety row in a style
manipulations    the prompting strategies of the second paper: AOA, AutoIF
prompt_styles    native chat template, Alpaca or plain text, for training rows and prompts
rewriter         a model that rewords rows, its replies cached
rewrite_checks   the checks that a model's wording must pass
"""

from .mitigation import Mitigation, mitigations, paraphrasing

__all__ = ["Mitigation", "mitigations", "paraphrasing"]
