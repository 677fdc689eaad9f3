"""What a recipe names reaches a report in a form that has no effect on the reader's screen."""

import json
from pathlib import Path
from typing import Any

from fastsafe.audit.report import heatmap_svg, report_html, table_text
from fastsafe_testing import fake_model as fake


def test_control_characters_of_a_recipe_are_shown_and_have_no_effect(
    tmp_path: Path,
) -> None:
    """Such as in the id of a judge or of a system prompt."""
    results: Any = fake.small_run(tmp_path / "run", behaviours=2).results
    hostile = "x\x1b[31m\x1b]8;;http://x\x07\x9b\u202e"
    old = next(iter(results["run"]["judges"]))
    text = json.dumps(results).replace(f'"{old}"', json.dumps(hostile))
    named: Any = json.loads(text.replace('"none"', json.dumps(f"none{hostile}")))
    page = report_html(named, heatmap_svg(named), {}, [])
    for shown in (page, heatmap_svg(named), table_text(named)):
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert r"x\x1b[31m" in page
    assert r"x\x1b[31m" in table_text(named)
