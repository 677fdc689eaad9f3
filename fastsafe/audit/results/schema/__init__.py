"""Every key of ``results.json``: its type, its range and its meaning.

Nothing else describes them: ``results.schema.json`` and the tables of docs/results.md are generated
from the docstrings and annotations in here, by `fastsafe.audit.results.schema.generate`.
"""
