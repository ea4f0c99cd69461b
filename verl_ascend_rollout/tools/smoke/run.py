"""The whole of a smoke test, from the process at the prompt: engine, reference, report."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

import verl_ascend_rollout
from verl_ascend_rollout.engine import causes
from verl_ascend_rollout.tools.report import Check, Evidence, Report, Risk
from verl_ascend_rollout.tools.smoke import lines, machine, measured, parity, text
from verl_ascend_rollout.tools.smoke.measured import Smoke
from verl_ascend_rollout.tools.smoke.request import Request
from verl_ascend_rollout.tools.supervisor import Ended, Message, supervise

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

OPTIONAL = CHECK_NAMES[CHECK_NAMES.index("output.finite") + 1 :]
"""Those that `--skip` may name: no run is without a start and an answer."""

Show = Callable[[str], None]


class Run:
    """The two child processes, and what is known so far."""

    def __init__(self, request: Request, show: Show, on_tick: Callable[[], None]) -> None:
        self.request, self.log = request, request.options.out / LOG
        self.log.write_bytes(b"")
        self._show, self._on_tick = show, on_tick
        self._deadline = time.monotonic() + request.options.timeout
        self.facts: dict[str, Any] = {}  # by name, as a child told them
        self.checks: dict[str, Check] = {}  # by name
        self.phase = "start"  # that was begun last
        self.phases: dict[str, float] = {}  # seconds of those that ended, by name
        self.error = ""  # of a child, in its own words
        self.ended_in = "done"  # or the phase in which it ended
        # Where the log ends for us, in bytes: what comes after is about our ending it.  `None`: all of it counts.
        self.printed: int | None = None

    @property
    def workers(self) -> list[dict[str, Any]]:
        """What vLLM's workers told of themselves."""
        workers: list[dict[str, Any]] = self.facts.get("workers", [])
        return workers

    @property
    def outputs(self) -> list[measured.Output]:
        """What the model said to each prompt."""
        # Unchecked: an engine that computes NaN is what smoke is there to report.
        return [measured.Output(**output) for output in self.facts.get("outputs", ())]

    def log_lines(self) -> list[str]:
        """Return what was printed, as far as it counts."""
        with self.log.open("rb") as file:
            return file.read(-1 if self.printed is None else self.printed).decode("utf-8", "replace").splitlines()

    def _take(self, message: Message) -> None:
        kind = message.get("kind")
        if kind == "phase":
            self.phase = str(message["name"])
            if message["state"] == "begin":
                self._show(self.phase)
            else:
                self.phases[self.phase] = float(message["seconds"])
        elif kind == "fact":
            self.facts[str(message["name"])] = message["value"]
        elif kind == "check":
            self._add(msgspec.convert(message["value"], Check))
        elif kind == "error":
            self.error = str(message["text"])

    def _take_line(self, line: str) -> None:
        _, mark, step = line.partition(lines.STEP_MARK)
        if mark:
            self._show(f"{self.phase}: {STEP_NAMES.get(step.strip(), step.strip())}")

    def _add(self, check: Check) -> None:
        self.checks[check.name] = check

    def _child(self, which: str, asked: Mapping[str, Any]) -> Ended:
        file = self.request.options.out / f".{which}.json"
        file.write_text(json.dumps(asked), encoding="utf-8")
        self.error = ""
        try:
            ended = supervise(
                child_command(which, file),
                self.log,
                {**self.request.environment, **python_path()},
                self._deadline - time.monotonic(),
                on_message=self._take,
                on_line=self._take_line,
                on_tick=self._on_tick,
            )
        finally:
            file.unlink(missing_ok=True)
        self.printed = ended.printed
        return ended

    def engine(self) -> int:
        """Start the engine and check it; the signal by which the user stopped us, or 0."""
        options, checkpoint, decisions = self.request.options, self.request.checkpoint, self.request.decisions
        sleep_mode = decisions["enable_sleep_mode"]
        asked = {
            "model": self.request.model,
            "arguments": self.request.arguments,
            "prompts": options.prompts,
            "max_tokens": options.max_tokens,
            "repeats": options.repeats,
            "files": [str(file.resolve()) for file in checkpoint.files] if checkpoint is not None else [],
            "why_no_sleep": "" if sleep_mode.value else sleep_mode.reason,
            "weight_path": decisions["weight_path"].value,
            "skipped": options.skipped,
        }
        ended = self._child("engine", asked)
        if "engine" in self.phases:
            seconds = self.facts.get("total", 0.0)
            told = f"the engine was ready {seconds:.1f} s after the start" if seconds else "the engine started"
            self._add(Check("engine.start", "pass", told, risk="high", seconds=seconds))
        if not ended.well:
            self._fail("engine.start" if self.phase in ("start", "imports", "engine") else self.phase, ended)
        return ended.signal

    def reference(self) -> int:
        """Compute the reference and compare; the signal by which the user stopped us, or 0."""
        name, outputs = parity.NAME, self.outputs
        if not outputs or self.ended_in != "done":
            return 0
        if why_not := self._why_no_reference():
            self._add(Check(name, "skip", why_not, risk="medium"))
            return 0
        asked = {
            "model": self.request.model,
            "trust_remote_code": self.request.options.trust_remote_code,
            "sequences": [(*output.prompt_token_ids, *output.token_ids) for output in outputs],
        }
        self.phase = name
        ended = self._child("reference", asked)
        if ended.timed_out or ended.signal:
            self._fail(name, ended)
        elif not ended.well or "reference" not in self.facts:
            said = self.error or causes.root_error(self.log_lines()) or _how(ended)
            # Hugging Face's own code may not know the model, or this stack: that says nothing about the engine.
            told = f"the reference could not be computed: {said}"
            self._add(Check(name, "unknown", told, risk="medium", seconds=ended.seconds))
        else:
            check = parity.judge(outputs, self.facts["reference"], self.workers[0]["dtype"])
            self._add(replace(check, seconds=ended.seconds))
        return ended.signal

    def _why_no_reference(self) -> str:
        """Return why the reference is not computed; empty: it can be."""
        checkpoint = self.request.checkpoint
        if parity.NAME in self.request.options.skipped:
            return "left out with --skip"
        if checkpoint is None or checkpoint.parameters is None:
            return (
                "the model's weights are not in safetensors files on this machine: how much memory it takes is not "
                "known"
            )
        if self.workers and self.workers[0]["quantization"]:
            return "the weights are quantised, and the reference would be another model"
        wanted = checkpoint.parameters * REFERENCE_BYTES + REFERENCE_MORE
        there = machine.available_memory()
        if wanted > there:
            return (
                f"it takes {wanted / 2**30:.1f} GiB in float32 ({checkpoint.parameters / 1e9:.2f} billion parameters), "
                f"and {there / 2**30:.1f} GiB of memory are available"
            )
        return ""

    def _fail(self, name: str, ended: Ended) -> None:
        """Add the check of a phase that did not come to its end."""
        self.ended_in = self.phase
        printed, timeout = self.log_lines(), self.request.options.timeout
        last = [causes.plain(line)[: causes.MOST_TEXT] for line in printed if line.strip()][-LAST_LINES:]
        root = causes.root_error(printed)
        if ended.signal:
            told, advice = f"stopped by the user in the phase {self.phase!r}", ""
        elif ended.timed_out:
            told = f"the phase {self.phase!r} was not done when the time was up ({timeout:g} s in all)"
            advice = "say more with --timeout, or look at the end of engine.log for what it waits for"
        else:
            said = self.error
            if not said or causes.is_followed(said):
                said = root or said or _how(ended)
            told = f"it ended in the phase {self.phase!r}: {said}"
            advice = f"{LOG} in the output folder has all of it"
            last = [root] if root else last
        evidence = tuple(Evidence(LOG, line) for line in last)
        risk: Risk = "low" if ended.signal else "high"
        self._add(Check(name, "fail", told, evidence, risk=risk, advice=advice, seconds=ended.seconds))


def run(request: Request, show: Show, on_tick: Callable[[], None] = lambda: None) -> tuple[Report, Smoke, int]:
    """Run everything, with the log in the output folder.

    Args:
        request: what to run.
        show: told each phase as it begins.
        on_tick: called a few times a second.

    Returns:
        The report, its facts, and the signal by which the user stopped us (0: none).

    Raises:
        OSError: the log cannot be written.
    """
    found = Run(request, show, on_tick)
    stopped = found.engine() or found.reference()
    facts = make_facts(found)
    return make_report(found, facts), facts, stopped


def child_command(which: str, asked: Path) -> list[str]:
    """Return what runs a child process: `engine`, or `reference`."""
    return [sys.executable, "-m", "verl_ascend_rollout.tools.smoke.child", which, str(asked)]


def python_path(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """PYTHONPATH with the folder or the archive that we were loaded from, for child processes and vLLM's workers.

    Nothing where we are installed: site-packages in front of the standard library would hide parts of it.
    """
    place = str(Path(verl_ascend_rollout.__file__).resolve().parents[1])
    if place in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {}
    rest = [part for part in environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != place]
    return {"PYTHONPATH": os.pathsep.join([place, *rest])}


def _how(ended: Ended) -> str:
    if ended.status == -9:
        return "its process was killed (signal 9), as the system does when memory runs out"
    if ended.status < 0:
        return f"its process was ended by signal {-ended.status}"
    return f"its process ended with status {ended.status}, and printed no error"


def make_report(found: Run, facts: Smoke) -> Report:
    """Return the report of what was found, whole or not."""
    checks = {**found.checks, "log.warnings": _warnings_check(found, facts)}
    for name in CHECK_NAMES:
        told = f"not reached: it ended in the phase {found.ended_in!r}"
        checks.setdefault(name, Check(name, "skip", told, risk="medium"))
    # What ended in a phase that is no check comes after `engine.start`.
    place = {name: number for number, name in enumerate(CHECK_NAMES)}
    ordered = sorted(checks.values(), key=lambda check: place.get(check.name, 1))
    sections = tuple(text.sections(facts, found.request.decisions, found.phases))
    return Report("smoke", text.title(facts), facts.as_facts(), tuple(ordered), sections)


def make_facts(found: Run) -> Smoke:
    """Return what is known, in the schema."""
    request, options, platform = found.request, found.request.options, found.request.facts
    workers, outputs = found.workers, found.outputs
    # What the engine ran with; where it did not come so far, what it was asked for.
    eager = request.decisions["enforce_eager"]
    asked = {
        "tensor_parallel": options.tensor_parallel,
        "expert_parallel": options.expert_parallel,
        "eager": eager.value,
        "stand_in": "",
    }
    worker = {**asked, **(workers[0] if workers else {})}
    reason = eager.reason if options.eager is None else f"--{'eager' if options.eager else 'graph'} was given"
    on_cpu = platform.name == "cpu"
    return Smoke(
        platform=measured.Platform(
            name=platform.name,
            soc=platform.soc or "",
            device=machine.processor() if on_cpu else worker.get("device"),
            devices=(1 if on_cpu else len(workers)) if workers else None,
            driver=machine.driver(platform.name),
            toolkit=worker.get("driver_toolkit"),
            stand_in=worker["stand_in"],
            isa=tuple(worker.get("isa", ())),
            threads=worker.get("threads"),
        ),
        versions=machine.versions(platform),
        model=_model(request, worker),
        # What the schema does not know of it is left out.
        engine=msgspec.convert({**worker, "eager_reason": reason}, measured.Engine),
        load=_load(found, workers),
        memory=_memory(workers),
        first=msgspec.convert(found.facts.get("first"), measured.Call | None),
        warm=msgspec.convert(found.facts.get("warm"), measured.Call | None),
        output=outputs[0] if outputs else None,
        more_outputs=tuple(outputs[1:]),
        warnings=lines.classify(found.log_lines(), lines.Circumstances(platform.name, worker["eager"])),
        import_fix=options.import_fix,
        put_first=options.put_first,
        command=options.command,
        ended_in=found.ended_in,
    )


def _model(request: Request, worker: Mapping[str, Any]) -> measured.Model:
    checkpoint, options = request.checkpoint, request.options
    name = str(options.model)
    if options.tiny:
        name = "tiny Qwen1.5-MoE (random weights)"
    elif checkpoint is None or Path(name).exists():  # else it is the hub's name
        name = name.rstrip("/").rpartition("/")[2]
    quantization = worker.get("quantization", "")
    loaded = measured.Model(name, worker.get("model_class"), dtype=worker.get("dtype"), quantization=quantization)
    if checkpoint is None:
        return loaded
    active = checkpoint.get("num_experts_per_tok", "moe_top_k", "num_experts_per_token")
    return replace(
        loaded,
        architecture=(checkpoint.config.get("architectures") or [None])[0],
        tiny=options.tiny,
        config_hash=checkpoint.config_hash,
        weights_hash=checkpoint.weights_hash(),
        parameters=checkpoint.parameters,
        layers=checkpoint.facts.layers,
        experts=checkpoint.facts.experts or None,
        experts_per_token=active if isinstance(active, int) else None,
    )


def _load(found: Run, workers: list[dict[str, Any]]) -> measured.Load:
    imports, total = found.facts.get("imports"), found.facts.get("total")
    if not workers:
        return measured.Load(imports=imports)

    def slowest(name: str) -> float | None:
        return max((worker["seconds"][name] for worker in workers if name in worker["seconds"]), default=None)

    weights = slowest("load_model")
    eager = bool(workers[0]["eager"])
    graphs = slowest("capture_model") if not eager else 0.0
    compiled = max((worker["compile_seconds"] or 0.0 for worker in workers), default=0.0) or (0.0 if eager else None)
    rest = [
        slowest(name) for name in ("determine_available_memory", "initialize_from_config", "compile_or_warm_up_model")
    ]
    kv_cache = None
    if any(rest):
        kv_cache = max(sum(second or 0.0 for second in rest) - (graphs or 0.0) - (compiled or 0.0), 0.0)
    parts = (imports, weights, compiled, graphs, kv_cache)
    other = max(total - sum(part or 0.0 for part in parts), 0.0) if total is not None else None
    return measured.Load(*parts, other, total)


def _memory(workers: list[dict[str, Any]]) -> measured.Memory:
    def largest(name: str) -> int | None:
        return max((worker[name] for worker in workers if worker[name] is not None), default=None)

    return measured.Memory(
        weights=largest("weight_bytes"),
        kv_cache=largest("kv_bytes"),
        kv_tokens=largest("kv_tokens"),
        device_total=largest("device_total"),
        device_free_after=min((worker["device_free"] for worker in workers), default=None),
    )


def _warnings_check(found: Run, facts: Smoke) -> Check:
    name, unknown = "log.warnings", facts.warnings.unknown
    if name in found.request.options.skipped:
        return Check(name, "skip", "left out with --skip")
    known = f"{len(facts.warnings.harmless)} kind(s) of warning that are known to be harmless here"
    if not unknown:
        told = f"{known}, and no other" if facts.warnings.harmless else "no warning was printed"
        return Check(name, "pass", told, risk="low")
    times = (f" ({warned.count} times)" if warned.count > 1 else "" for warned in unknown)
    evidence = tuple(Evidence(LOG, warned.text + count) for warned, count in zip(unknown, times, strict=True))
    told = f"{len(unknown)} kind(s) of warning that are not known here; {known}"
    return Check(
        name, "warn", told, evidence, risk="low", advice="read them: nothing here can tell whether they matter"
    )
