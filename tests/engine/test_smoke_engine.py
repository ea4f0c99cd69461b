"""`ascend-safe smoke` as a user runs it, on a real engine: to the end, and on models that cannot be loaded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from verl_ascend_rollout.tools.report import Check, read
from verl_ascend_rollout.tools.smoke import request
from verl_ascend_rollout.tools.smoke.measured import Smoke

pytestmark = pytest.mark.engine

SECONDS = 420


def smoke(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Check], Smoke]:
    before = set(Path("/dev/shm").glob("psm_*"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "verl_ascend_rollout.tools.smoke",
            "--out",
            str(out),
            "--timeout",
            str(SECONDS),
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
        # What vLLM is told by a test session's own environment is no part of this.
        env={name: value for name, value in os.environ.items() if not name.startswith("VLLM_LOGGING")},
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert not {path for path in set(Path("/dev/shm").glob("psm_*")) - before if not _mapped(path)}
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(out) in (process.info["cmdline"] or [])]
    report = read(out / "smoke.json")
    ElementTree.parse(out / "smoke.junit.xml")
    assert report.verdict_line() in done.stdout
    return done, {check.name: check for check in report.checks}, Smoke.of(report)


def _mapped(segment: Path) -> bool:
    """Whether a process still has it: then it is another engine's."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if str(segment) in maps.read_text(encoding="utf-8", errors="replace"):
                return True
    return False


def test_the_toy_passes_every_check_that_a_cpu_can_have(tmp_path: Path) -> None:
    other = "Name three colours."
    done, checks, facts = smoke(tmp_path, "--tiny", "--prompt", request.PROMPT, "--prompt", other, "--max-tokens", "24")
    assert done.returncode == 0, done.stdout
    assert {name: check.verdict for name, check in checks.items()} == {
        "engine.start": "pass",
        "output.deterministic": "pass",
        "output.finite": "pass",
        "kv-cache.free-init": "pass",
        "weights.reload": "pass",
        "sleep.wake": "skip",
        "output.reference": "pass",
        # One that nobody has seen yet makes it `warn`.
        "log.warnings": checks["log.warnings"].verdict,
    }
    assert checks["log.warnings"].verdict in ("pass", "warn")
    assert all(check.confidence == "measured" for check in checks.values())
    assert "vLLM refuses sleep mode on a CPU" in checks["sleep.wake"].summary
    assert "by reallocate" in checks["kv-cache.free-init"].summary
    assert facts.ended_in == "done"
    platform, model, engine, load, memory = facts.platform, facts.model, facts.engine, facts.load, facts.memory
    assert platform is not None and model is not None and engine is not None and load is not None and memory is not None
    assert (platform.name, platform.stand_in, platform.driver) == ("cpu", "", None)
    assert platform.threads and platform.isa
    assert (model.tiny, model.experts, model.experts_per_token, model.layers, model.dtype) == (
        True,
        60,
        4,
        2,
        "bfloat16",
    )
    assert model.parameters == request.TINY.bytes() // 2
    assert (engine.eager, engine.graph_mode, engine.graphs_captured) == (True, "NONE", 0)
    assert engine.attention_backend and engine.moe_backend
    parts = (load.imports, load.weights, load.kv_cache, load.other)
    assert all(part is not None and part > 0 for part in parts)
    assert load.total == pytest.approx(sum(part for part in parts if part is not None), rel=1e-6)
    assert memory.weights is not None and memory.weights >= request.TINY.bytes()
    assert memory.kv_cache == request.TINY_KV_BYTES
    assert facts.first is not None and facts.warm is not None and facts.output is not None
    assert facts.first.output_tokens == facts.warm.output_tokens == len(facts.output.token_ids) == 24
    assert len(facts.output.logprobs) == 24
    assert len(facts.output.prompt_logprobs) == len(facts.output.prompt_token_ids) - 1
    assert facts.output.chat_template
    assert [more.prompt for more in facts.more_outputs] == [other]


@pytest.mark.parametrize("broken", ["dtype", "shape"])
def test_a_model_that_vllm_cannot_load_is_one_failed_check(broken: str, tmp_path: Path) -> None:
    """What the files' headers do not show before an engine is started."""
    from verl_ascend_rollout.tools import toy_checkpoint

    model = tmp_path / "model"
    toy_checkpoint.write(model, request.TINY, 0, 0.1)
    config = json.loads((model / "config.json").read_text())
    if broken == "shape":
        config["moe_intermediate_size"] = 64
    else:
        config["num_experts_per_tok"] = "four"
    (model / "config.json").write_text(json.dumps(config))
    done, checks, facts = smoke(tmp_path / "out", str(model))
    assert done.returncode == 1
    failed = [check for check in checks.values() if check.verdict == "fail"]
    assert [check.name for check in failed] == ["engine.start"]
    assert failed[0].summary.startswith("it ended in the phase 'engine': ")
    assert "Engine core initialization failed" not in failed[0].summary
    assert facts.ended_in == "engine"
    assert facts.output is None and facts.load is not None and facts.load.total is None
    shutil.rmtree(tmp_path / "out")
