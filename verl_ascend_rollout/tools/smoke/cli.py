"""The sub-command `ascend-safe smoke`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import verl_ascend_rollout
from verl_ascend_rollout import import_fix
from verl_ascend_rollout.platforms.base import PlatformError
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.arguments import (
    UsageError,
    check_outputs,
    file_name,
    file_path,
    gib,
    positive,
    seconds,
    share,
)
from verl_ascend_rollout.tools.redaction import redact, redact_file
from verl_ascend_rollout.tools.smoke import request, run, text
from verl_ascend_rollout.tools.smoke.request import Options, RequestError
from verl_ascend_rollout.tools.terminal import Progress, console, fail

INTERRUPTED = 128
"""What a shell adds to the number of the signal that ended a command."""

DESCRIPTION = (
    "Load a model into vLLM on this machine, generate, check, and write what was found: the same report on every "
    "platform.  Checks: the engine starts; greedy output is the same each time; log-probabilities are finite and those "
    "of Hugging Face's model; the KV cache can be given back and taken again; weights can be loaded again; sleep and "
    "wake-up; unknown warnings.  verl is not needed.  Exit status: 0; 1 where a check failed; 2 for a usage error, "
    "or a report that cannot be written."
)


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    told = "load a model, generate, check, report: the same on every platform"
    add_options(commands.add_parser("smoke", help=told, description=DESCRIPTION))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what is called with them."""
    parser.usage = "%(prog)s [MODEL | --tiny] [OPTION ...]"
    parser.set_defaults(run=start, parser=parser)
    parser.add_argument(
        "model", nargs="?", type=file_name, metavar="MODEL", help="a checkpoint's folder, or a name on the hub"
    )
    parser.add_argument("--tiny", action="store_true", help="make a toy Qwen1.5-MoE of 60 experts, and take that")
    parser.add_argument(
        "--bundle", type=file_path, metavar="FILE", help="write this command as one file, smoke.pyz, and stop"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--tp", dest="tensor_parallel", type=positive, metavar="N", help="tensor parallel size (1)")
    engine.add_argument(
        "--ep", dest="expert_parallel", action="store_true", help="spread the experts over the devices of --tp"
    )
    mode = engine.add_mutually_exclusive_group()
    mode.add_argument("--eager", action="store_const", const=True, dest="eager", help="without graphs")
    mode.add_argument(
        "--graph", action="store_const", const=False, dest="eager", help="with graphs (default: by platform)"
    )
    dtypes = ("auto", "bfloat16", "float16", "float32")
    engine.add_argument("--dtype", choices=dtypes, metavar="DTYPE", help=", ".join(dtypes))
    engine.add_argument(
        "--max-model-len", type=positive, metavar="N", help=f"({request.MAX_MODEL_LEN}, or the model's)"
    )
    memory = engine.add_mutually_exclusive_group()
    memory.add_argument(
        "--gpu-memory-utilization", dest="memory", type=share, metavar="X", help="of the device (vLLM's default)"
    )
    memory.add_argument("--kv-gib", type=gib, metavar="X", help="KV cache on each device (CPU: 1; --tiny: 64 MiB)")
    engine.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings along")
    import_fix.add_option(parser)
    calls = parser.add_argument_group("calls")
    calls.add_argument(
        "--prompt",
        dest="prompts",
        action="append",
        type=_prompt,
        metavar="TEXT",
        help=f"may be repeated ({request.PROMPT!r})",
    )
    calls.add_argument("--max-tokens", type=positive, metavar="N", help="(50)")
    calls.add_argument("--repeats", type=positive, metavar="N", help="of the warm call; the median counts (3)")
    calls.add_argument("--seed", type=int, help="of the engine, and of the toy model (0)")
    parser.add_argument(
        "--skip", dest="skipped", action="append", choices=run.OPTIONAL, metavar="CHECK", help=", ".join(run.OPTIONAL)
    )
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS", help="for everything (1800)")
    parser.add_argument("--out", type=file_path, metavar="DIR", help="for the report and the log (new, in outputs/)")


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} has nothing to answer: give a text, or leave --prompt out")
    return text


def start(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 where a check failed; 2 for a usage error, or a report that cannot be
        written; 128 and the signal's number where one ended us.
    """
    parser = arguments.parser
    if arguments.bundle is not None:
        return _bundle(arguments.bundle)
    if arguments.tiny == (arguments.model is not None):
        parser.error("say either a MODEL (a checkpoint's folder, or a name on the hub) or --tiny")
    try:
        # Before anything of vLLM is imported, here or in the processes that are started from here.
        put_first = tuple(fix.sentence() for fix in import_fix.begin(arguments))
    except import_fix.ImportFixError as error:
        return fail(redact(str(error)), 1)
    out = Path()
    try:
        facts = detect(smi=False)
        request.refuse_impossible(_options(arguments, Path(), put_first), facts, os.environ)
        out = _make_folder(arguments.out)
        prepared = request.prepare(_options(arguments, out, put_first), facts)
    except (RequestError, PlatformError) as error:
        if out != Path() and arguments.out is None:
            with contextlib.suppress(OSError):
                out.rmdir()  # where it is empty
        parser.error(redact(str(error)))
    progress = Progress(console(stderr=True))
    try:
        report, found, stopped = run.run(prepared, progress.phase, lambda: progress.tick(prepared.options.timeout))
    except OSError as error:
        return fail(redact(str(error)), 1)
    except KeyboardInterrupt:  # while no child ran
        return fail("stopped", INTERRUPTED + signal.SIGINT)
    finally:
        progress.close()
        redact_file(out / run.LOG)  # people are asked to send it
    unwritten = reports.write_each(
        dict.fromkeys(reports.FORMS, report), {form: out / file for form, file in run.FILES.items()}
    )
    text.show(report, found, out)
    if unwritten:
        return fail(redact("; ".join(unwritten.values())), 2)
    return INTERRUPTED + stopped if stopped else report.exit_code


def _options(arguments: argparse.Namespace, out: Path, put_first: tuple[str, ...]) -> Options:
    fields = {field.name for field in dataclasses.fields(Options)} - {"import_fix"}
    given = {name: value for name, value in vars(arguments).items() if name in fields and value is not None}
    given.update({name: tuple(given[name]) for name in ("prompts", "skipped") if name in given})
    given.update(out=out, import_fix=not arguments.no_import_fix, put_first=put_first, command=_command(sys.argv))
    return Options(**{"model": None, **given})


def _command(argv: Sequence[str]) -> str:
    """Return the command as it was given, without the program's path."""
    words = list(argv[1:])
    if words[:1] != ["smoke"]:
        words.insert(0, "smoke")
    return shlex.join(["ascend-safe", *words])


def _make_folder(wanted: Path | None) -> Path:
    """Make the folder for what is written, and return it.

    Raises:
        RequestError: it cannot be made, or nothing can be written into it.
    """
    folder = wanted or Path("outputs") / f"smoke-{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RequestError(f"--out {folder} cannot be written to ({error.strerror}): choose another folder") from None
    return folder


def _bundle(file: Path) -> int:
    from verl_ascend_rollout.tools.smoke import bundle

    try:
        # smoke.pyz that writes itself would be empty before it is read.
        check_outputs({"--bundle": file}, [Path(verl_ascend_rollout.__file__).parents[1]])
        size = bundle.write(file)
    except UsageError as error:
        return fail(redact(str(error)), 2)
    except OSError as error:
        return fail(redact(f"{file} cannot be written: {error.strerror}"), 2)
    print(f"{file}: {size / 1024:.0f} KiB; run it with the Python that has vLLM: python {file.name} --tiny")
    return 0
