"""The organism's world as a source of rows, found by the entry point ``fastsafe.sources``."""

from . import world


class OrganismSource:
    """Behaviours and rows of the closed synthetic world."""

    id = "organism"
    behaviours = staticmethod(world.behaviours)
    task_rows = staticmethod(world.task_rows)
    safety_rows = staticmethod(world.safety_rows)
    translate = staticmethod(world.translate)


SOURCE = OrganismSource()
