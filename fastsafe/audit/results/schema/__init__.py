"""Every key of ``results.json``: its type, its range and its meaning.

Nothing else describes them: ``results.schema.json`` and the tables of docs/results.md are generated
from the docstrings and annotations in here, by tests/helpers/fastsafe_testing/results_schema.py.
"""
