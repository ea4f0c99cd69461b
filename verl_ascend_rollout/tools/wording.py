"""Other people's text in our report, and numbers with their units.

A report that is compared may come from anywhere, and what a model says may be anything: neither may colour a terminal,
close a table, or put a picture into somebody's issue.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from verl_ascend_rollout.tools.redaction import redact
from verl_ascend_rollout.tools.report import printable

UNKNOWN = "not recorded"
"""How a value that a report has not is shown."""

LONGEST_REDACTED = 20_000
"""Of a text, what is looked at, in characters: redaction takes time in proportion."""


def clipped(text: str, longest: int) -> str:
    """Return the text, or its beginning and how much more there is."""
    return text if len(text) <= longest else f"{text[:longest]} [{len(text) - longest} more characters]"


def line(text: str) -> str:
    """Return the text as one line that can be shown, as much of it as is looked at."""
    return " ".join(printable(text[:LONGEST_REDACTED]).split())


def verbatim(text: str, longest: int = 4000) -> str:
    """Prepare a text for a fenced block."""
    return clipped(printable(text), longest)


def name(text: object, longest: int = 120) -> str:
    """Prepare a word or a few that name something, for any place: without what Markdown or HTML would act on."""
    return clipped(re.sub(r"[\\`*\[\]<>|~&$!]", "", redact(line(str(text)))), longest)


def quoted(text: str, longest: int = 300) -> str:
    """Prepare a sentence or more, for a table's cell or a list: one line, redacted, and Markdown that does nothing.

    Redacted before it is escaped: an underscore with a backslash before it hides a token from redaction.
    """
    clean = redact(line(text))
    more = max(0, len(text) - LONGEST_REDACTED) + max(0, len(clean) - longest)
    clean = re.sub(r"([\\`*_\[\]~&$])", r"\\\1", clean[:longest]).replace("<", "&lt;")
    return f"{clean} ... ({more} more characters)" if more else clean


def seconds(value: float | None) -> str:
    """Render a duration: `52.9 s`, `80 ms`."""
    if value is None:
        return UNKNOWN
    if value >= 1000 or value == 0:
        return f"{value:.0f} s"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def size(value: float | None) -> str:
    """Render bytes: `13.4 GiB`."""
    if value is None:
        return UNKNOWN
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} bytes"


def number(value: float | None) -> str:
    """Render a count or a rate."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def many(count: int, thing: str) -> str:
    """`1 token`, `5 tokens`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def listed(words: Sequence[str]) -> str:
    """Join: `a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
