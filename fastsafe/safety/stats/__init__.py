"""Statistics of rates, from the interval of one cell to the choice of a mitigation.

intervals   Wilson, Newcombe and Student intervals, McNemar's test, Holm's correction, kappa
rates       answer and refusal rates from verdicts, and their paired changes
clusters    pooled rates and changes: bootstrap and effective sample size over behaviours
power       the smallest change that a run of a given size can detect
pareto      the Pareto front of mitigations over safety, over-refusal and utility
"""
