"""Write docs/options.md and docs/events.md from the code: `python docs/reference.py`.  A test compares."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import get_args, get_type_hints

from verl_ascend_rollout import events, options

HERE = Path(__file__).resolve().parent


def attributes(cls: type) -> dict[str, str]:
    """Return what a class's docstring says of each attribute, on one line each; `a, b: text` is said of both."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", said) for names, said in entries for name in names.split(", ")}


def options_page() -> str:
    """Return every option with its values, its default and what it does."""
    said, hints = attributes(options.AscendSafeOptions), get_type_hints(options.AscendSafeOptions)
    lines = [
        "# Options",
        "",
        f"Under `{options.KEY}`. An unknown key or value is an error that names the",
        "allowed ones; `null` is the default.",
        "On the command line:",
        "",
        f"    ++{options.KEY}.kv_release=sleep",
    ]
    for field in dataclasses.fields(options.AscendSafeOptions):
        choices = [value for value in get_args(hints[field.name]) if isinstance(value, str)]
        free = {float: "seconds", int: "a number"}.get(hints[field.name], "a file")
        values = ", ".join(f"`{value}`" for value in choices) or free
        default = "none" if field.default is None else f"`{field.default}`"
        text = said[field.name]
        lines += [
            "",
            f"## `{field.name}`",
            "",
            f"Values: {values}. Default: {default}.",
            "",
            text[0].upper() + text[1:],
        ]
    lines += ["", "## Old names", "", "Still taken, with one line in the log.", "", "| old | now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in options.OLD_OPTIONS.items()]
    for name, values_of in options.OLD_VALUES.items():
        lines += [f"| `{name}={old}` | `{name}={new}` |" for old, new in values_of.items()]
    return "\n".join(lines) + "\n"


def events_page() -> str:
    """Return the schema of a line, and the steps that there are."""
    text = inspect.cleandoc(events.__doc__ or "")
    table = re.search(r"^( {4}step .*\n(?: {4}.*\n)+)", text, re.MULTILINE)
    assert table is not None
    header, *body = table[1].splitlines()
    starts = [match.start() for match in re.finditer(r"(?<=  )\S", header)]
    cuts = list(zip(starts, [*starts[1:], None], strict=True))
    rows: list[list[str]] = []
    for line in (header, *body):
        cells = [line[start:end].strip() for start, end in cuts]
        if cells[0]:
            rows.append(cells)
        else:  # the row before goes on
            rows[-1] = [f"{before} {more}".strip() for before, more in zip(rows[-1], cells, strict=True)]
    said = attributes(events.Event)
    lines = [
        "# Events",
        "",
        "The option `events` names a file: one line of JSON for each step of the rollout's life, schema",
        f"{events.SCHEMA}. `ascend-safe timeline FILE` reads it. Every line has every field; one that does not",
        "apply is null. No step fails for the sake of an event.",
        "",
        "## Fields",
        "",
        "| field | |",
        "|---|---|",
        *(f"| `{field.name}` | {said[field.name]} |" for field in dataclasses.fields(events.Event)),
        "",
        "## Steps",
        "",
        f"| {' | '.join(rows[0])} |",
        "|---|---|---|---|",
        *(f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in rows[1:]),
        "",
        *(part.replace("\n", " ") for part in [text.partition(table[1])[2].strip().partition("\n\n")[0]]),
    ]
    return "\n".join(lines) + "\n"


PAGES = {"options.md": options_page, "events.md": events_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
