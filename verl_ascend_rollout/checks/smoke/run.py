"""The whole of a smoke test, from the process at the prompt: engine, reference, report."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

import verl_ascend_rollout
from verl_ascend_rollout.checks.smoke import lines, machine, measured, parity, text
from verl_ascend_rollout.checks.smoke.measured import Smoke
from verl_ascend_rollout.checks.smoke.request import Request
from verl_ascend_rollout.checks.smoke.supervisor import Ended, Message, supervise
from verl_ascend_rollout.report import Check, Evidence, Report, write

LOG = "engine.log"
FILES = {"json": "smoke.json", "markdown": "smoke.md", "junit": "smoke.junit.xml"}

LAST_LINES = 12
"""Of the log, as evidence."""

REFERENCE_BYTES = 4
"""Of a parameter in float32."""

REFERENCE_MORE = 2**30
"""Beside the weights: Python, torch, activations."""

STEP_NAMES = {
    "load_model": "loading weights",
    "determine_available_memory": "profiling memory",
    "initialize_from_config": "making the KV cache",
    "compile_or_warm_up_model": "warming up",
    "capture_model": "capturing graphs",
}
"""vLLM's steps as the progress display calls them."""

CHECK_NAMES = (
    "engine.start",
    "output.deterministic",
    "output.finite",
    "kv-cache.free-init",
    "weights.reload",
    "sleep.wake",
    parity.NAME,
    "log.warnings",
)
"""In the order of the report."""

OPTIONAL = ("kv-cache.free-init", "weights.reload", "sleep.wake", parity.NAME, "log.warnings")
"""Those that `--skip` may name."""

Show = Callable[[str], None]


@dataclass
class Found:
    """What is known so far; filled in as messages come.

    Attributes:
        facts: by name, as the child told them.
        checks: by name.
        phase: that was begun last.
        phases: seconds of those that ended, by name.
        error: of a child, in its own words.
        ended_in: `done`, or the phase in which it ended.
        printed: where the log ends for us, in bytes: what comes after is about our ending it; `None`: all of it counts.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    phase: str = "start"
    phases: dict[str, float] = field(default_factory=dict)
    error: str = ""
    ended_in: str = "done"
    printed: int | None = None

    def take(self, message: Message, show: Show) -> None:
        """Take a message of a child."""
        kind = message.get("kind")
        if kind == "phase":
            self.phase = str(message["name"])
            if message["state"] == "begin":
                show(self.phase)
            else:
                self.phases[self.phase] = float(message["seconds"])
        elif kind == "fact":
            self.facts[str(message["name"])] = message["value"]
        elif kind == "check":
            check = msgspec.convert(message["value"], Check)
            self.checks[check.name] = check
        elif kind == "error":
            self.error = str(message["text"])


def run(request: Request, show: Show, on_tick: Callable[[], None] = lambda: None) -> tuple[Report, int]:
    """Run everything and write the report into the output folder.

    Args:
        request: what to run.
        show: told each phase as it begins.
        on_tick: called a few times a second.

    Returns:
        The report, and the signal by which the user stopped us (0: none).

    Raises:
        ReportError: the report cannot be written.
        OSError: nor the log.
    """
    options = request.options
    log = options.out / LOG
    log.write_bytes(b"")
    found = Found()
    deadline = time.monotonic() + options.timeout
    stopped = _engine(request, found, deadline, log, show, on_tick)
    if not stopped:
        stopped = _reference(request, found, deadline, log, show, on_tick)
    report = make_report(request, found, log)
    for form, name in FILES.items():
        write(report, options.out / name, form)
    return report, stopped


# --------------------------------------------------------------------------------------------------------------------
# the two children


def _engine(request: Request, found: Found, deadline: float, log: Path, show: Show, on_tick: Callable[[], None]) -> int:
    options, checkpoint = request.options, request.checkpoint
    sleep_mode = request.decisions["enable_sleep_mode"]
    files = checkpoint.files if checkpoint is not None else ()
    asked = {
        "model": request.model,
        "arguments": request.arguments,
        "prompts": options.prompts,
        "max_tokens": options.max_tokens,
        "repeats": options.repeats,
        "files": [str(file.resolve()) for file in files],
        "why_no_files": "the model's weights are not in safetensors files on this machine, from which they would "
        "be loaded again",
        "sleep_mode": bool(sleep_mode.value),
        "why_no_sleep": sleep_mode.reason,
        "weight_path": request.decisions["weight_path"].value,
        "skipped": options.skipped,
    }
    ended = _child("child", asked, request, found, deadline, log, show, on_tick)
    if ended.well:
        seconds = found.facts.get("total", 0.0)
        found.checks["engine.start"] = Check(
            "engine.start",
            "pass",
            f"the engine was ready {seconds:.1f} s after the start",
            risk="high",
            seconds=seconds,
        )
        return 0
    found.ended_in = found.phase
    if "engine" in found.phases:
        found.checks["engine.start"] = Check(
            "engine.start", "pass", "the engine started", risk="high", seconds=found.facts.get("total", 0.0)
        )
    name = "engine.start" if found.phase in ("start", "imports", "engine") else found.phase
    found.checks[name] = _failed(name, ended, found, log, options.timeout)
    return ended.signal


def _reference(
    request: Request, found: Found, deadline: float, log: Path, show: Show, on_tick: Callable[[], None]
) -> int:
    name = parity.NAME
    outputs = _outputs(found)
    why_not = _why_no_reference(request, found)
    if not outputs or found.ended_in != "done":
        return 0
    if why_not:
        found.checks[name] = Check(name, "skip", why_not, risk="medium")
        return 0
    asked = {
        "model": request.model,
        "trust_remote_code": request.options.trust_remote_code,
        "sequences": [(*output.prompt_token_ids, *output.token_ids) for output in outputs],
    }
    started = time.monotonic()
    ended = _child("reference", asked, request, found, deadline, log, show, on_tick)
    seconds = time.monotonic() - started
    if ended.timed_out or ended.interrupted:
        found.ended_in = name
        found.checks[name] = _failed(name, ended, found, log, request.options.timeout)
        return ended.signal
    if not ended.well or "reference" not in found.facts:
        said = found.error or lines.root_error(_log_lines(log, found.printed)) or _how(ended)
        # Hugging Face's own code may not know the model, or this stack: that says nothing about the engine.
        found.checks[name] = Check(
            name, "unknown", f"the reference could not be computed: {said}", risk="medium", seconds=seconds
        )
        return 0
    dtype = _workers(found)[0]["dtype"]
    check = parity.judge(outputs, found.facts["reference"], dtype)
    found.checks[name] = replace(check, seconds=seconds)
    return 0


def _why_no_reference(request: Request, found: Found) -> str:
    """Why the reference is not computed; empty: it can be."""
    if parity.NAME in request.options.skipped:
        return "left out with --skip"
    if request.checkpoint is None or request.checkpoint.parameters is None:
        return "the model's weights are not in safetensors files on this machine: how much memory it takes is not known"
    if _workers(found) and _workers(found)[0]["quantization"]:
        return "the weights are quantised, and the reference would be another model"
    wanted = request.checkpoint.parameters * REFERENCE_BYTES + REFERENCE_MORE
    there = machine.available_memory()
    if wanted > there:
        return (
            f"it takes {wanted / 2**30:.1f} GiB in float32 ({request.checkpoint.parameters / 1e9:.2f} billion "
            f"parameters), and {there / 2**30:.1f} GiB of memory are available"
        )
    return ""


def _child(
    module: str,
    asked: Mapping[str, Any],
    request: Request,
    found: Found,
    deadline: float,
    log: Path,
    show: Show,
    on_tick: Callable[[], None],
) -> Ended:
    file = request.options.out / f".{module}.json"
    file.write_text(json.dumps(asked), encoding="utf-8")

    def on_line(line: str) -> None:
        _, mark, step = line.partition(lines.STEP_MARK)
        if mark:
            show(f"{found.phase}: {STEP_NAMES.get(step.strip(), step.strip())}")

    found.error = ""
    try:
        ended = supervise(
            child_command(module, file),
            log,
            {**request.environment, **python_path()},
            deadline - time.monotonic(),
            lambda message: found.take(message, show),
            on_line,
            on_tick,
        )
        found.printed = ended.printed
        return ended
    finally:
        file.unlink(missing_ok=True)


def child_command(module: str, asked: Path) -> list[str]:
    """What runs `child` or `reference`."""
    return [sys.executable, "-m", f"verl_ascend_rollout.checks.smoke.{module}", str(asked)]


def python_path(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """PYTHONPATH with the folder or the archive that we were loaded from, for child processes and vLLM's workers.

    Nothing where we are installed: site-packages in front of the standard library would hide parts of it.
    """
    place = str(Path(verl_ascend_rollout.__file__).resolve().parents[1])
    if place in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    rest = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != place]
    return {"PYTHONPATH": os.pathsep.join([place, *rest])}


def _failed(name: str, ended: Ended, found: Found, log: Path, timeout: float) -> Check:
    """The check of a phase that did not come to its end."""
    printed = _log_lines(log, found.printed)
    last = [lines.plain(line) for line in printed if line.strip()][-LAST_LINES:]
    tail = tuple(Evidence(LOG, line[: lines.MOST_TEXT]) for line in last)
    if ended.interrupted:
        return Check(name, "fail", f"stopped by the user in the phase {found.phase!r}", tail, risk="low")
    if ended.timed_out:
        return Check(
            name,
            "fail",
            f"the phase {found.phase!r} was not done when the time was up ({timeout:g} s in all)",
            tail,
            risk="high",
            advice="say more with --timeout, or look at the end of engine.log for what it waits for",
            seconds=ended.seconds,
        )
    root = lines.root_error(printed)
    said = found.error
    if not said or lines.is_followed(said):
        said = root or said or _how(ended)
    evidence = (Evidence(LOG, root),) if root and root != said else ()
    return Check(
        name,
        "fail",
        f"it ended in the phase {found.phase!r}: {said}",
        (*evidence, *tail) if not root else (Evidence(LOG, root),),
        risk="high",
        advice=f"{LOG} in the output folder has all of it",
        seconds=ended.seconds,
    )


def _how(ended: Ended) -> str:
    if ended.status == -9:
        return "its process was killed (signal 9), as the system does when memory runs out"
    if ended.status < 0:
        return f"its process was ended by signal {-ended.status}"
    return f"its process ended with status {ended.status}, and printed no error"


def _log_lines(log: Path, size: int | None) -> list[str]:
    """The lines of the log's first `size` bytes, or all of them."""
    with log.open("rb") as file:
        return file.read(-1 if size is None else size).decode("utf-8", "replace").splitlines()


# --------------------------------------------------------------------------------------------------------------------
# the report


def make_report(request: Request, found: Found, log: Path) -> Report:
    """The report of what was found, whole or not."""
    facts = make_facts(request, found, _log_lines(log, found.printed))
    checks = dict(found.checks)
    if "log.warnings" not in request.options.skipped:
        checks["log.warnings"] = _warnings_check(facts)
    else:
        checks["log.warnings"] = Check("log.warnings", "skip", "left out with --skip")
    for name in CHECK_NAMES:
        if name not in checks:
            checks[name] = Check(name, "skip", f"not reached: it ended in the phase {found.ended_in!r}", risk="medium")
    ordered = sorted(checks.values(), key=lambda check: _place(check.name))
    return Report(
        "smoke",
        text.title(facts),
        facts.as_facts(),
        tuple(ordered),
        text.sections(facts, request.decisions, found.phases),
    )


def _place(name: str) -> int:
    return CHECK_NAMES.index(name) if name in CHECK_NAMES else 1


def make_facts(request: Request, found: Found, printed: list[str]) -> Smoke:
    """What is known, in the schema."""
    options, platform = request.options, request.facts
    workers = _workers(found)
    worker = workers[0] if workers else {}
    stand_in = str(worker.get("stand_in", ""))
    model = _model(request, worker)
    eager = request.decisions["enforce_eager"]
    on_cpu = platform.name == "cpu"
    here = lines.Circumstances(
        platform.name, worker.get("eager", eager.value), bool(stand_in), options.tiny, options.tensor_parallel
    )
    outputs = _outputs(found)
    return Smoke(
        platform=measured.Platform(
            name=platform.name,
            soc=platform.soc or "",
            device=machine.processor() if on_cpu else worker.get("device"),
            devices=len(workers) if workers and not on_cpu else 1 if workers else None,
            driver=machine.driver(platform.name),
            toolkit=worker.get("driver_toolkit"),
            stand_in=stand_in,
            isa=tuple(worker.get("isa", ())),
            threads=worker.get("threads"),
        ),
        versions=machine.versions(platform),
        model=model,
        engine=measured.Engine(
            tensor_parallel=worker.get("tensor_parallel", options.tensor_parallel),
            pipeline_parallel=worker.get("pipeline_parallel", 1),
            data_parallel=worker.get("data_parallel", 1),
            expert_parallel=worker.get("expert_parallel", options.expert_parallel),
            eager=worker.get("eager", eager.value),
            eager_reason=eager.reason
            if options.eager is None
            else f"--{'eager' if options.eager else 'graph'} was given",
            **{
                name: worker.get(name)
                for name in (
                    "graph_mode",
                    "graphs_captured",
                    "attention_backend",
                    "moe_backend",
                    "max_model_len",
                    "max_num_seqs",
                    "block_size",
                    "prefix_caching",
                    "chunked_prefill",
                )
            },
        ),
        load=_load(found, workers),
        memory=_memory(workers),
        first=_call(found.facts.get("first")),
        warm=_call(found.facts.get("warm")),
        output=outputs[0] if outputs else None,
        more_outputs=tuple(outputs[1:]),
        warnings=lines.classify(printed, here),
        import_fix=options.import_fix,
        put_first=options.put_first,
        command=options.command,
        ended_in=found.ended_in,
    )


def _model(request: Request, worker: Mapping[str, Any]) -> measured.Model:
    checkpoint, options = request.checkpoint, request.options
    name = "tiny Qwen1.5-MoE (random weights)" if options.tiny else str(options.model).rstrip("/").rpartition("/")[2]
    if not options.tiny and checkpoint is not None and not Path(str(options.model)).exists():
        name = str(options.model)  # the hub's name
    if checkpoint is None:
        return measured.Model(
            name=name,
            architecture=worker.get("model_class"),
            dtype=worker.get("dtype"),
            quantization=worker.get("quantization", ""),
        )
    architectures = checkpoint.config.get("architectures") or [None]
    active = checkpoint.get("num_experts_per_tok", "moe_top_k", "num_experts_per_token")
    return measured.Model(
        name=name,
        architecture=architectures[0],
        tiny=options.tiny,
        config_hash=checkpoint.config_hash,
        weights_hash=checkpoint.weights_hash(),
        parameters=checkpoint.parameters,
        layers=checkpoint.facts.layers,
        experts=checkpoint.facts.experts or None,
        experts_per_token=active if isinstance(active, int) else None,
        dtype=worker.get("dtype"),
        quantization=worker.get("quantization", ""),
    )


def _load(found: Found, workers: list[dict[str, Any]]) -> measured.Load:
    imports, total = found.facts.get("imports"), found.facts.get("total")
    if not workers:
        return measured.Load(imports=imports)

    def slowest(name: str) -> float | None:
        seconds = [worker["seconds"][name] for worker in workers if name in worker["seconds"]]
        return max(seconds) if seconds else None

    weights = slowest("load_model")
    eager = bool(workers[0]["eager"])
    graphs = slowest("capture_model") if not eager else 0.0
    compiled = max((worker["compile_seconds"] or 0.0 for worker in workers), default=0.0) or (0.0 if eager else None)
    rest = [
        slowest(name) for name in ("determine_available_memory", "initialize_from_config", "compile_or_warm_up_model")
    ]
    kv_cache = sum(second for second in rest if second is not None) if any(rest) else None
    if kv_cache is not None:
        kv_cache = max(kv_cache - (graphs or 0.0) - (compiled or 0.0), 0.0)
    parts = (imports, weights, compiled, graphs, kv_cache)
    other = max(total - sum(part for part in parts if part is not None), 0.0) if total is not None else None
    return measured.Load(imports, weights, compiled, graphs, kv_cache, other, total)


def _memory(workers: list[dict[str, Any]]) -> measured.Memory:
    if not workers:
        return measured.Memory()

    def largest(name: str) -> int | None:
        return max((worker[name] for worker in workers if worker[name] is not None), default=None)

    return measured.Memory(
        weights=largest("weight_bytes"),
        kv_cache=largest("kv_bytes"),
        kv_tokens=largest("kv_tokens"),
        device_total=largest("device_total"),
        device_free_after=min((worker["device_free"] for worker in workers), default=None),
    )


def _call(told: Any) -> measured.Call | None:
    return msgspec.convert(told, measured.Call) if told is not None else None


def _outputs(found: Found) -> list[measured.Output]:
    return [msgspec.convert(output, measured.Output) for output in found.facts.get("outputs", ())]


def _workers(found: Found) -> list[dict[str, Any]]:
    workers: list[dict[str, Any]] = found.facts.get("workers", [])
    return workers


def _warnings_check(facts: Smoke) -> Check:
    unknown, harmless = facts.warnings.unknown, facts.warnings.harmless
    name = "log.warnings"
    known = f"{len(harmless)} kind(s) of warning that are known to be harmless here"
    if not unknown:
        return Check(name, "pass", f"{known}, and no other" if harmless else "no warning was printed", risk="low")
    return Check(
        name,
        "warn",
        f"{len(unknown)} kind(s) of warning that are not known here; {known}",
        tuple(
            Evidence(LOG, f"{warned.text}" + (f" ({warned.count} times)" if warned.count > 1 else ""))
            for warned in unknown
        ),
        risk="low",
        advice="read them: nothing here can tell whether they matter",
    )
