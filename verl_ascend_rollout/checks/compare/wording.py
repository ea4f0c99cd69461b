"""Other people's text in our report, and numbers with their units.

A report that is compared may come from anywhere, and what a model says may be anything: neither may colour a terminal,
close a table, or put a picture into somebody's issue.
"""

from __future__ import annotations

import re

from verl_ascend_rollout.redaction import redact

UNKNOWN = "not recorded"
"""How a value that a report has not is shown."""

LONGEST_REDACTED = 20_000
"""Of a text, what is looked at, in characters: redaction takes time in proportion."""

_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|(?:\x1b\]|\x9d).*?(?:\x07|\x1b\\|\x9c|$)"  # window titles, links
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    "|[\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"  # they turn the direction of what follows
)
_MARKDOWN = re.compile(r"([\\`*_\[\]~&$])")


def printable(text: str) -> str:
    """The text without a terminal's control sequences, and with a mark for each character that cannot be shown."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", _ESCAPES.sub("", text))


def clipped(text: str, longest: int) -> str:
    """The text, or its beginning and how much more there is."""
    return text if len(text) <= longest else f"{text[:longest]} [{len(text) - longest} more characters]"


def verbatim(text: str, longest: int = 4000) -> str:
    """For a fenced block."""
    return clipped(printable(text), longest)


def name(text: object, longest: int = 120) -> str:
    """For a word or a few that name something, in any place: what Markdown or HTML would act on is left out."""
    line = " ".join(printable(str(text)[:LONGEST_REDACTED]).split())
    return clipped(re.sub(r"[\\`*\[\]<>|~&$!]", "", redact(line)), longest)


def quoted(text: str, longest: int = 300) -> str:
    """For a sentence or more, in a table's cell or a list: one line, redacted, and Markdown that does nothing.

    Redacted before it is escaped: an underscore with a backslash before it hides a token from redaction.
    """
    more = max(0, len(text) - LONGEST_REDACTED)
    line = redact(" ".join(printable(text[:LONGEST_REDACTED]).split()))
    more += max(0, len(line) - longest)
    line = _MARKDOWN.sub(r"\\\1", line[:longest]).replace("<", "&lt;")
    return f"{line} ... ({more} more characters)" if more else line


def sentence(text: str, longest: int = 400) -> str:
    """For standard error: one line of what somebody else may have written into a file or its name."""
    return clipped(" ".join(printable(text[:LONGEST_REDACTED]).split()), longest)


def seconds(value: float | None) -> str:
    """A duration: `52.9 s`, `80 ms`."""
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0 s"
    return f"{value:.3g} s" if value >= 1 and value < 1000 else f"{value:.0f} s" if value >= 1000 else _small(value)


def _small(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def size(value: float | None) -> str:
    """Bytes: `13.4 GiB`."""
    if value is None:
        return UNKNOWN
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} bytes"


def number(value: float | None) -> str:
    """A count or a rate."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def many(count: int, thing: str) -> str:
    """`1 token`, `5 tokens`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def truth(value: bool | None) -> str:
    """`yes`, `no`, or that it is not recorded."""
    return UNKNOWN if value is None else "yes" if value else "no"


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
