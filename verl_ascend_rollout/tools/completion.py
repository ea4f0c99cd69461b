"""The sub-command `ascend-safe completion`: a script with which a shell completes commands, options and file names."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

from verl_ascend_rollout.tools import terminal

SHELLS = ("bash", "zsh", "tcsh")

FILES = ("FILE", "REPORT", "EVENTS", "PATH")
"""What our options call a file (`metavar`); a folder is a DIR."""


def add_parser(commands: Any, whole: argparse.ArgumentParser) -> None:
    """Add the sub-command to argparse's sub-parsers, for the command line `whole`."""
    parser = commands.add_parser(
        "completion",
        help="a script that lets your shell complete what you type",
        description='Print a script for your shell.  In bash: eval "$(ascend-safe completion bash)", for good in '
        "~/.bashrc; in zsh, the output goes into a file _ascend-safe in a folder of $fpath.",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    parser.set_defaults(run=functools.partial(run, whole))


def run(whole: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Print the script; the exit status."""
    try:
        import shtab
    except ImportError:
        return terminal.fail("completion takes shtab, which is not installed here: pip install shtab", 1)
    for action in _actions(whole):
        if action.metavar in (*FILES, "DIR"):
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE  # type: ignore[attr-defined]
        if isinstance(action, argparse._SubParsersAction):
            for command in action._choices_actions:  # zsh shows it beside the command's name: one line
                action.choices[command.dest].description = command.help
    print(shtab.complete(whole, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
