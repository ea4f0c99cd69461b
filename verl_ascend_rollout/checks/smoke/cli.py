"""The sub-command `ascend-safe smoke`."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from verl_ascend_rollout import import_fix
from verl_ascend_rollout import report as reports
from verl_ascend_rollout.bench.arguments import gib, positive, seconds, share
from verl_ascend_rollout.checks.smoke import request, run, text
from verl_ascend_rollout.checks.smoke.measured import Smoke
from verl_ascend_rollout.checks.smoke.request import Options, RequestError
from verl_ascend_rollout.platforms.base import PlatformError
from verl_ascend_rollout.platforms.detect import detect
from verl_ascend_rollout.redaction import redact

INTERRUPTED = 128
"""What a shell adds to the number of the signal that ended a command."""

DESCRIPTION = (
    "Load a model into vLLM on this machine, generate, check, and write what was found: the same report on every "
    "platform.  Checks: the engine starts; greedy output is the same each time; log-probabilities are finite and those "
    "of Hugging Face's model; the KV cache can be given back and taken again; weights can be loaded again; sleep and "
    "wake-up; unknown warnings.  verl is not needed.  Exit status: 0; 1 where a check failed; 2 for a usage error."
)


def add_parser(commands: Any) -> None:
    """Add the sub-command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "smoke", help="load a model, generate, check, report: the same on every platform", description=DESCRIPTION
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options, and what is called with them."""
    parser.set_defaults(run=start, parser=parser)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint's folder, or a name on the hub")
    parser.add_argument("--tiny", action="store_true", help="make a toy Qwen1.5-MoE of 60 experts, and take that")
    parser.add_argument(
        "--bundle", type=Path, metavar="FILE", help="write this command as one file, smoke.pyz, and stop"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor parallel size (1)")
    engine.add_argument("--ep", action="store_true", help="spread the experts over the devices of --tp")
    mode = engine.add_mutually_exclusive_group()
    mode.add_argument("--eager", action="store_const", const=True, dest="eager", help="without graphs")
    mode.add_argument(
        "--graph", action="store_const", const=False, dest="eager", help="with graphs (default: by platform)"
    )
    engine.add_argument("--dtype", default="auto", help="auto, bfloat16, float16, float32")
    engine.add_argument(
        "--max-model-len", type=positive, metavar="N", help=f"({request.MAX_MODEL_LEN}, or the model's)"
    )
    memory = engine.add_mutually_exclusive_group()
    memory.add_argument("--gpu-memory-utilization", type=share, metavar="X", help="of the device (vLLM's default)")
    memory.add_argument("--kv-gib", type=gib, metavar="X", help="KV cache on each device (CPU: 1; --tiny: 64 MiB)")
    engine.add_argument("--trust-remote-code", action="store_true", help="run code that the model brings along")
    import_fix.add_option(parser)
    calls = parser.add_argument_group("calls")
    calls.add_argument("--prompt", action="append", metavar="TEXT", help=f"may be repeated ({request.PROMPT!r})")
    calls.add_argument("--max-tokens", type=positive, default=request.MAX_TOKENS, metavar="N", help="(50)")
    calls.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="of the warm call; the median counts (3)"
    )
    calls.add_argument("--seed", type=int, default=0, help="of the engine, and of the toy model (0)")
    parser.add_argument(
        "--skip", action="append", choices=run.OPTIONAL, default=[], metavar="CHECK", help=", ".join(run.OPTIONAL)
    )
    parser.add_argument("--timeout", type=seconds, default=1800.0, metavar="SECONDS", help="for everything (1800)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the report and the log (new, in outputs/)")


def start(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 1 where a check failed; 2 for a usage error; 128 and the signal's number where one ended us.
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
        print(redact(f"ascend-safe: {error}"), file=sys.stderr)
        return 1
    out = Path()
    try:
        facts = detect(smi=False)
        request.refuse_impossible(_options(arguments, Path(), put_first), facts, os.environ)
        out = _make_folder(arguments.out)
        prepared = request.prepare(_options(arguments, out, put_first), facts)
    except (RequestError, PlatformError) as error:
        if out != Path() and arguments.out is None:
            _remove_if_empty(out)
        parser.error(redact(str(error)))
    try:
        with _progress(arguments.timeout) as (show, tick):
            report, stopped = run.run(prepared, show, tick)
    except (reports.ReportError, OSError) as error:
        print(redact(f"ascend-safe: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while no child ran
        print("ascend-safe: stopped", file=sys.stderr)
        return INTERRUPTED + signal.SIGINT
    print(text.terminal(report, Smoke.of(report), out))
    return INTERRUPTED + stopped if stopped else report.exit_code


def _options(arguments: argparse.Namespace, out: Path, put_first: tuple[str, ...]) -> Options:
    return Options(
        model=arguments.model,
        out=out,
        tiny=arguments.tiny,
        tensor_parallel=arguments.tp,
        expert_parallel=arguments.ep,
        eager=arguments.eager,
        prompts=tuple(arguments.prompt or (request.PROMPT,)),
        max_tokens=arguments.max_tokens,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        kv_bytes=int(arguments.kv_gib * 2**30) if arguments.kv_gib else None,
        memory=arguments.gpu_memory_utilization,
        repeats=arguments.repeats,
        seed=arguments.seed,
        timeout=arguments.timeout,
        skipped=tuple(arguments.skip),
        import_fix=not arguments.no_import_fix,
        put_first=put_first,
        trust_remote_code=arguments.trust_remote_code,
        command=_command(sys.argv),
    )


def _command(argv: Sequence[str]) -> str:
    """The command as it was given, without the program's path."""
    words = list(argv[1:])
    if words[:1] != ["smoke"]:
        words.insert(0, "smoke")
    return shlex.join(["ascend-safe", *words])


def _make_folder(wanted: Path | None) -> Path:
    """The folder for what is written, made.

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


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _bundle(path: Path) -> int:
    from verl_ascend_rollout.checks.smoke import bundle

    try:
        size = bundle.write(path)
    except OSError as error:
        print(redact(f"ascend-safe: {path} cannot be written: {error.strerror}"), file=sys.stderr)
        return 2
    print(f"{path}: {size / 1024:.0f} KiB; run it with the Python that has vLLM: python {path.name} --tiny")
    return 0


@contextlib.contextmanager
def _progress(timeout: float) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A line that lives where standard error is a terminal, and one line for each phase elsewhere."""
    started = time.monotonic()
    console: Any = None
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            console = Console(stderr=True)
    if console is None:

        def say(phase: str) -> None:
            print(f"[{time.monotonic() - started:6.1f} s] {phase}", file=sys.stderr, flush=True)

        yield say, lambda: None
        return
    now = {"phase": "starting"}
    with console.status("starting") as status:

        def show(phase: str) -> None:
            console.print(f"[{time.monotonic() - started:6.1f} s] {phase}", markup=False, highlight=False, style="dim")
            now["phase"] = phase

        def tick() -> None:
            status.update(f"{now['phase']}: {time.monotonic() - started:.0f} s of at most {timeout:.0f} s")

        yield show, tick
