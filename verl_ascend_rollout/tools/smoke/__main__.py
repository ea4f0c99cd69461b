"""`python -m verl_ascend_rollout.tools.smoke`, and what `smoke.pyz` runs: `ascend-safe smoke` by itself.

The other commands of `ascend-safe` are not there, nor what only they need: vLLM brings along what smoke uses.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

NEEDED = ("msgspec", "packaging", "psutil", "numpy", "rich", "tokenizers")
"""Beside torch, vLLM and what vLLM needs itself, of which these are a part (vLLM 0.11 and 0.28)."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"ascend-safe smoke needs {', '.join(missing)}, not installed in {sys.executable}: run it with the Python "
            f"that has vLLM, or pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    from verl_ascend_rollout.tools.smoke import cli

    parser = argparse.ArgumentParser(prog="ascend-safe smoke", description=cli.DESCRIPTION)
    cli.add_options(parser)
    try:
        return cli.start(parser.parse_args(argv))
    except SystemExit as stop:  # argparse's way out, also of --help
        return stop.code if isinstance(stop.code, int) else 2


if __name__ == "__main__":
    sys.exit(main())
