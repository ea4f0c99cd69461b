"""docs/stacks.md: that it is about the claims of today, and, where the wheels are at hand, that it is what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from verl_ascend_rollout.tools.doctor import claims, wheels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "stacks"))

import reference  # noqa: E402
import table  # noqa: E402


def test_the_table_in_the_docs_has_every_claim_of_today() -> None:
    """A claim that was added, or a stack, needs the table written again: the file says how."""
    text = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
    missing = [claim.name for claim in claims.ALL if f"| `{claim.name}` |" not in text]
    missing += [stack for stack in table.COLUMNS if table.title(stack) not in text]
    traps = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `trap.")]
    assert missing == []
    assert len(traps) == len(reference.TRAPS)


AT_HAND = [
    stack
    for stack in table.COLUMNS
    if len(wheels.at_hand(wheels.cache_folder(), wheels.parse_stack(stack))) == len(wheels.parse_stack(stack))
]
if AT_HAND:

    @pytest.mark.parametrize("stack", AT_HAND)
    def test_a_column_of_the_table_is_what_the_wheels_say(stack: str) -> None:
        """Where `table` has been run, the wheels are in the cache; elsewhere this is no part of the suite."""
        written = (ROOT / "docs" / "stacks.md").read_text(encoding="utf-8")
        position = table.COLUMNS.index(stack) + 1
        report = table.column(stack, wheels.cache_folder())
        cells = {}
        for line in written.splitlines():
            parts = [part.strip() for part in line.strip("|").split(" | ")]
            if line.startswith("| `"):
                cells[parts[0].strip("` ")] = parts[position].removesuffix(" |").strip()
        shown = {check.name: table.cell(check) for check in report.checks}
        assert {name: cells.get(name) for name in shown} == shown
