"""The audit: recipe -> plan -> train -> generate -> judge -> measure -> report.

The package is also the function: ``fastsafe.audit("organism", out="runs/x")`` and
``from fastsafe import audit; audit("organism")`` both run one.
"""

import sys
from types import ModuleType
from typing import Any

from fastsafe.audit.recipe.schema import Recipe
from fastsafe.audit.results.make_results import comparable
from fastsafe.audit.run import audit
from fastsafe.audit.run_result import Run
from fastsafe.audit.trainer_callback import AuditCallback

__all__ = ["AuditCallback", "Recipe", "Run", "audit", "comparable"]


class _CallableModule(ModuleType):
    """Lets ``from fastsafe import audit`` be called, which is this module once it is imported."""

    def __call__(self, *args: Any, **options: Any) -> Run:
        return audit(*args, **options)


sys.modules[__name__].__class__ = _CallableModule
