"""`ascend-safe`: what a person asks of this package at a prompt.

Works on a broken installation too: nothing here imports torch, verl or vLLM.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys

from verl_ascend_rollout import ROLLOUT_NAME, __version__, events
from verl_ascend_rollout.platforms.base import PlatformError
from verl_ascend_rollout.policy import job_config
from verl_ascend_rollout.policy.engine_args import PolicyError
from verl_ascend_rollout.tools import completion, explain, terminal, timeline
from verl_ascend_rollout.tools.arguments import UsageError
from verl_ascend_rollout.tools.bench import cli as bench
from verl_ascend_rollout.tools.compare import cli as compare
from verl_ascend_rollout.tools.doctor import cli as doctor
from verl_ascend_rollout.tools.smoke import cli as smoke


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 where the answer is that something cannot work, 2 for a command that is not understood;
        141 where whoever reads the output (`| head`) has gone, as for a command that SIGPIPE ends; 1 where there is no
        room for the output.
    """
    try:
        status = _run(argv)
        if sys.stdout is not None:  # `>&-`
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        _read_no_more()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        _read_no_more()
        return terminal.fail(f"what is printed cannot be written: {error.strerror}", 1)


def _read_no_more() -> None:
    """Let Python's last flush, when it ends, go nowhere: it must not say the same again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ascend-safe", description=f"Ask about the {ROLLOUT_NAME} rollout for verl, and check it."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (explain, bench, timeline, doctor, smoke, compare):
        command.add_parser(commands)
    completion.add_parser(commands, parser)
    return parser


def _run(argv: list[str] | None) -> int:
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        return status
    except SystemExit as stop:  # argparse's way out, also of --help and --version
        return stop.code if isinstance(stop.code, int) else 2
    except (PlatformError, PolicyError) as error:
        return terminal.fail(error, 1)
    except (job_config.ConfigError, events.EventsError, UsageError) as error:
        return terminal.fail(error, 2)


if __name__ == "__main__":
    sys.exit(main())
