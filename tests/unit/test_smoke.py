"""smoke without an engine: its options, the log's lines, the comparison with the reference, the report.

Where a child process is needed, one made for the purpose says what an engine would have said; real engines are
tests/engine's and tests/npu's business.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from verl_ascend_rollout.engine import causes
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.tools import supervisor, toy_checkpoint
from verl_ascend_rollout.tools.cli import main
from verl_ascend_rollout.tools.report import read
from verl_ascend_rollout.tools.smoke import (
    __main__,
    bundle,
    cli,
    lines,
    measured,
    parity,
    request,
    run,
    text,
)
from verl_ascend_rollout.tools.smoke.lines import Circumstances
from verl_ascend_rollout.tools.smoke.measured import Output, Smoke
from verl_ascend_rollout.tools.smoke.request import Options, RequestError

EAGER_CPU = Circumstances("cpu", eager=True)
EAGER_NPU = Circumstances("npu", eager=True)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)


# usage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    folder.mkdir()
    config = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "say either a MODEL"),
        (["--tiny", "model"], "say either a MODEL"),
        (["./nowhere"], "the folder ./nowhere is not there"),
        (["nowhere"], "the folder nowhere is not there"),
        (["{empty}"], "has no config.json: give a checkpoint's folder"),
        (["{file}"], "is a file: give the folder of a checkpoint"),
        (["{broken}"], "cannot be read as a model's configuration"),
        (["{heads}"], "attention heads of 33 numbers cannot work on a CPU"),
        (["--tiny", "--graph"], "vLLM has no graphs on a CPU"),
        (["--tiny", "--ep"], "say --tp with 2 or more"),
        (["--tiny", "--tp", "99"], "takes 99 memory nodes on a CPU"),
        (["--tiny", "--tp", "0"], "'0' is no whole number"),
        (["--tiny", "--graph", "--eager"], "not allowed with"),
        (["--tiny", "--timeout", "nan"], "is no number of seconds"),
        (["--tiny", "--timeout", "-1"], "is no number of seconds"),
        (["--tiny", "--gpu-memory-utilization", "1.5"], "is no share of the memory"),
        (["--tiny", "--kv-gib", "inf"], "is no size in GiB"),
        (["--tiny", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--tiny", "--prompt", " "], "has nothing to answer"),
        (["--tiny", "--skip", "everything"], "invalid choice: 'everything'"),
        (["--tiny", "--out", "{file}/out"], "cannot be written to (Not a directory): choose another folder"),
    ],
)
def test_a_usage_error_is_one_sentence_and_status_2_before_anything_is_started(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    places = {name: tmp_path / name for name in ("empty", "file", "broken", "heads")}
    for name in ("empty", "broken", "heads"):
        places[name].mkdir()
    places["file"].write_text("")
    (places["broken"] / "config.json").write_text("{")
    (places["heads"] / "config.json").write_text(
        json.dumps({"num_hidden_layers": 1, "hidden_size": 66, "num_attention_heads": 2})
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it was started"))
    assert main(["smoke", *(argument.format(**places) for argument in arguments)]) == 2
    said = capsys.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert sentence in last
    assert "Traceback" not in said.err + said.out
    assert not list(tmp_path.glob("outputs/*"))


def test_ep_with_a_dense_model(dense: Path, tmp_path: Path) -> None:
    facts = planned("npu", "A2")
    options = Options(str(dense), tmp_path, tensor_parallel=2, expert_parallel=True)
    with pytest.raises(RequestError, match=r"--ep spreads experts over devices, and .*dense has none"):
        request.prepare(options, facts, {})


def test_more_devices_than_there_are(tmp_path: Path) -> None:
    facts = PlatformFacts("cuda", "nvidia", 1, None, "GPU", "CUDA_VISIBLE_DEVICES")
    with pytest.raises(RequestError, match=r"--tp 4 takes 4 devices, and this process may use 1 \(CUDA_VISIBLE"):
        request.refuse_impossible(Options(None, tmp_path, tiny=True, tensor_parallel=4), facts, {})


def test_without_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "package_folder", lambda name: None)
    with pytest.raises(RequestError, match="vLLM is not installed in this Python"):
        request.refuse_impossible(Options(None, tmp_path, tiny=True), planned("cpu"), {})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(__main__, "NEEDED", ("json", "not_there_at_all"))
    assert __main__.main(["--tiny"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ascend-safe smoke needs not_there_at_all, not installed in ")


def test_what_is_asked_of_the_engine(tmp_path: Path) -> None:
    options = Options(None, tmp_path, tiny=True, import_fix=False, max_model_len=128, dtype="float32")
    asked = request.prepare(options, planned("npu", "A2", {"vllm-ascend": "0.28.0"}), {"VLLM_ASCEND_ENABLE_NZ": "0"})
    assert asked.environment["ASCEND_SAFE_IMPORT_FIX"] == "0"
    assert asked.arguments["max_model_len"] == 128
    assert asked.arguments["dtype"] == "float32"
    assert asked.arguments["additional_config"]["weight_nz_mode"] == 0
    assert asked.arguments["kv_cache_memory_bytes"] == request.TINY_KV_BYTES
    assert asked.arguments["enforce_eager"] is asked.decisions["enforce_eager"].value
    assert "block_size" not in asked.arguments
    old = request.prepare(Options(None, tmp_path, tiny=True, kv_gib=4), planned("cpu", versions={"vllm": "0.13.0"}), {})
    assert old.arguments["kv_cache_memory_bytes"] == 4 * 2**30
    assert "VLLM_CPU_KVCACHE_SPACE" not in old.environment  # the engine sets it, from that
    gpu = PlatformFacts("cuda", "nvidia", 1, None, "GPU", "CUDA_VISIBLE_DEVICES")
    graphs = request.prepare(Options(None, tmp_path, tiny=True, eager=False), gpu, {})
    assert graphs.arguments["enforce_eager"] is False
    assert "ASCEND_SAFE_IMPORT_FIX" not in graphs.environment


def test_child_processes_get_our_package_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.verl_ascend_rollout, "__file__", "/somewhere/smoke.pyz/verl_ascend_rollout/__init__.py")
    assert run.python_path({}) == {"PYTHONPATH": "/somewhere/smoke.pyz"}
    assert run.python_path({"PYTHONPATH": "/a:/somewhere/smoke.pyz:"}) == {"PYTHONPATH": "/somewhere/smoke.pyz:/a"}
    monkeypatch.setattr(run.sysconfig, "get_path", lambda name: "/somewhere/smoke.pyz")
    assert run.python_path({}) == {}


def test_the_parent_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from verl_ascend_rollout.tools import smoke, cli; "
        "from verl_ascend_rollout.tools.smoke import run, bundle; "
        "print([name for name in ('torch', 'vllm', 'verl', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# the bundle ----------------------------------------------------------------------------------------------------------


def test_the_bundle_runs_from_anywhere_and_is_the_same_each_time(tmp_path: Path) -> None:
    assert main(["smoke", "--bundle", str(tmp_path / "smoke.pyz")]) == 0
    bundle.write(tmp_path / "again.pyz")
    assert (tmp_path / "smoke.pyz").read_bytes() == (tmp_path / "again.pyz").read_bytes()
    names = zipfile.ZipFile(tmp_path / "smoke.pyz").namelist()
    assert "__main__.py" in names and "verl_ascend_rollout/worker/lifecycle.py" in names
    assert not [name for name in names if "__pycache__" in name]
    # Isolated: neither this folder nor an installed package of ours is on the path; the environment's packages are.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        "import runpy, sys; sys.path += " + repr(packages) + "; sys.argv = ['smoke.pyz', '--tiny', '--graph']; "
        f"runpy.run_path({str(tmp_path / 'smoke.pyz')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 2
    assert "vLLM has no graphs on a CPU" in done.stderr and "Traceback" not in done.stderr
    # Nor does it write itself, of which nothing would be left.
    before = (tmp_path / "smoke.pyz").read_bytes()
    done = subprocess.run(
        [sys.executable, "-S", "-c", code.replace("'--tiny', '--graph'", "'--bundle', 'smoke.pyz'")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--bundle smoke.pyz would overwrite " in done.stderr
    assert (tmp_path / "smoke.pyz").read_bytes() == before


# lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("WARNING 11-22 04:00:00 [cpu.py:145] look out", "look out"),
        ("(EngineCore_DP0 pid=12) (Worker_TP0 pid=13) ERROR 11-22 04:00:00 [v1/x.py:1] oh", "oh"),
        ("\x1b[33mWARNING\x1b[0m 11-22 04:00:00 [cpu.py:145] look out", "look out"),
        ("INFO 11-22 04:00:00 [cpu.py:145] a warning: none", None),
        ("(EngineCore pid=1) INFO 11-22 04:00:00 [cpu.py:145] WARNING in the text", None),
        ("/lib/x.py:12: UserWarning: look out", "UserWarning: look out"),
        ("(Worker_TP0 pid=1) WARNING 11-22 04:00:00 [warnings.py:1] /x.py:1: FutureWarning: old", "FutureWarning: old"),
        ("<frozen importlib._bootstrap>:241: DeprecationWarning: old", "DeprecationWarning: old"),
        ("[W1122 05:04:22.147265096 OperatorEntry.cpp:218] Warning: twice", "Warning: twice"),
        ("[rank0]:[W1122 05:02:16.293815410 N.cpp:168] Warning: pad", "Warning: pad"),
        ("W1122 04:42:39.992000 18589 intel/_logger.py:72] No CUDA", "No CUDA"),
        ("WARNING:root:look out", "root:look out"),
        ("[ERROR] HCCL is gone", "HCCL is gone"),
        ("(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] Traceback (most recent call last):", None),
        ('(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1]   File "x.py", line 3, in load', None),
        ("a line like any other", None),
        ("WARNINGS are good", None),
        ("", None),
    ],
)
def test_what_looks_like_a_warning(line: str, said: str | None) -> None:
    assert lines.warning_text(line) == said


def test_what_python_takes_away_after_a_process_that_was_killed_is_no_finding() -> None:
    """As a busy machine prints it, where vLLM gives up waiting for its own process."""
    line = (
        "/lib/python3.11/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 "
    )
    found = lines.classify([f"{line}leaked shared_memory objects to clean up at shutdown"], EAGER_CPU)
    assert not found.unknown and found.harmless[0].why


@pytest.mark.parametrize(
    ("line", "harmless", "unknown"),
    [
        ("Failed to import from vllm._C with ModuleNotFoundError(...)", EAGER_NPU, EAGER_CPU),
        ("Driver Version: 25.2.0 is invalid or not supported yet.", EAGER_NPU, EAGER_CPU),
        (
            "cudagraph dispatching keys are not initialized. No cudagraph will be used.",
            EAGER_NPU,
            Circumstances("npu", eager=False),
        ),
        ("cudagraph dispatching keys are not initialized.", EAGER_CPU, Circumstances("cpu", eager=None)),
        ("Enforce eager set, disabling torch.compile and CUDAGraphs.", EAGER_CPU, Circumstances("cuda", eager=False)),
    ],
)
def test_harmless_only_under_its_condition(line: str, harmless: Circumstances, unknown: Circumstances) -> None:
    printed = [f"WARNING 11-22 04:00:00 [x.py:1] {line}"] * 2
    (known,) = lines.classify(printed, harmless).harmless
    assert (known.count, bool(known.why), bool(known.source)) == (2, True, True)
    found = lines.classify(printed, unknown)
    assert not found.harmless
    assert [(warned.count, warned.why) for warned in found.unknown] == [(2, "")]


def test_lines_of_one_kind_are_counted_together() -> None:
    printed = [f"WARNING 11-22 04:00:0{n} [x.py:1] took {n}.5 s at 0x{n}f" for n in range(3)]
    (warned,) = lines.classify([*printed, "INFO 11-22 04:00:00 [x.py:1] fine"], EAGER_CPU).unknown
    assert (warned.text, warned.count) == ("took 0.5 s at 0x0f", 3)


VLLM_CRASH = """
(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] EngineCore failed to start.
(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1]   File "x.py", line 3, in load
(EngineCore pid=9) ERROR 11-22 04:00:00 [core.py:1] safetensors_rust.SafetensorError: Error while deserializing header
(EngineCore pid=9) Exception: WorkerProc initialization failed due to an exception in a background process.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""

PYDANTIC = """
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (9) is greater [type=value_error, input_value=ArgsKwargs(), input_type=x]
    For further information visit https://errors.pydantic.dev
"""


@pytest.mark.parametrize(
    ("printed", "root"),
    [
        (VLLM_CRASH, "SafetensorError: Error while deserializing header"),
        (PYDANTIC, "ValidationError: User-specified max_model_len (9) is greater"),
        ("RuntimeError: Engine core initialization failed. See root cause above.", ""),
        ("all is well", ""),
    ],
)
def test_the_root_of_an_error(printed: str, root: str) -> None:
    assert causes.root_error(printed.splitlines()) == root


# parity --------------------------------------------------------------------------------------------------------------


def output(shift: float = 0.0) -> Output:
    return Output("p", (1, 2, 3), "ab", (4, 5), (-1.0 + shift, -2.0), (-3.0, -4.0 - shift))


def reference(**changes: Any) -> dict[str, Any]:
    found = {"logprobs": [-3.0, -4.0, -1.0, -2.0], "best": [9, 9, 4, 5], "best_logprobs": [0, 0, -1.0, -2.0]}
    return {**found, "spread": 2.0, **changes}


@pytest.mark.parametrize(
    ("shift", "changes", "dtype", "verdict"),
    [
        (0.0, {}, "bfloat16", "pass"),
        (0.05, {}, "bfloat16", "pass"),
        (0.05, {}, "float32", "fail"),
        (0.6, {}, "bfloat16", "fail"),  # one token is far off
        (0.2, {}, "bfloat16", "fail"),  # all are, by a little too much
        (0.05, {"spread": 0.1}, "bfloat16", "fail"),  # a model that has little to say: it is much there
        (math.nan, {}, "bfloat16", "fail"),
        (0.0, {"best": [9, 9, 7, 5], "best_logprobs": [0, 0, -0.9, -2.0]}, "bfloat16", "pass"),  # a near tie
        (0.0, {"best": [9, 9, 7, 5], "best_logprobs": [0, 0, 0.5, -2.0]}, "bfloat16", "fail"),
    ],
)
def test_parity(shift: float, changes: dict[str, Any], dtype: str, verdict: str) -> None:
    check = parity.judge([output(shift)], [reference(**changes)], dtype)
    assert check.verdict == verdict, check
    assert check.confidence == "measured" and len(check.evidence) == 4


# the whole, with a child that plays the engine -----------------------------------------------------------------------

CHILD = """
import json, os, sys, time
pipe = os.fdopen(int(os.environ["ASCEND_SAFE_SMOKE_FD"]), "w", buffering=1)
def tell(**message): pipe.write(json.dumps(message) + "\\n")
def phase(name, state="begin"): tell(kind="phase", name=name, state=state, seconds=0.5)
"""

WORKER = {
    "seconds": {"load_model": 2.0, "determine_available_memory": 1.0, "initialize_from_config": 0.5},
    "compile_seconds": None, "weight_bytes": 1000, "kv_bytes": 2000, "kv_tokens": 64, "device_total": 9000,
    "device_free": 5000, "device": "Ascend910B2", "driver_toolkit": "8.5.0", "stand_in": "", "isa": [], "threads": None,
    "dtype": "bfloat16", "quantization": "", "eager": True, "graph_mode": "NONE", "graphs_captured": 0,
    "attention_backend": "A", "moe_backend": "M", "max_model_len": 512, "max_num_seqs": 8, "block_size": 32,
    "prefix_caching": True, "chunked_prefill": True, "tensor_parallel": 1, "pipeline_parallel": 1, "data_parallel": 1,
    "expert_parallel": False, "model_class": "Q", "worker": "W", "pid": 1,
}  # fmt: skip

ENGINE = f"""
phase("imports"); tell(kind="fact", name="imports", value=1.0); phase("imports", "end"); phase("engine")
print("ascend-safe smoke: step load_model", flush=True)
time.sleep(0.1); phase("engine", "end")
tell(kind="fact", name="total", value=10.0)
tell(kind="fact", name="workers", value=[json.loads({json.dumps(WORKER)!r})])
"""

CALLS = """
phase("generate")
call = {"seconds": 2.0, "prompt_tokens": 3, "output_tokens": 4, "tokens_per_second": 2.0}
tell(kind="fact", name="first", value=call)
tell(kind="fact", name="warm", value={**call, "repeats": 3, "spread": 1.5})
tell(kind="fact", name="outputs", value=[{"prompt": "p", "prompt_token_ids": [1, 2], "text": "a|b", "token_ids": [3],
     "logprobs": [-1.0], "prompt_logprobs": [-2.0], "finish_reason": "stop", "chat_template": True}])
phase("generate", "end")
print("WARNING 11-22 04:00:00 [x.py:1] nobody knows this", flush=True)
"""

REFERENCE = """
phase("output.reference"); tell(kind="fact", name="reference", value=[{"logprobs": [-2.0, -1.0], "best": [0, 3],
     "best_logprobs": [-2.0, -1.0], "spread": 2.0}])
"""


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs the command with children that run the programs given; the status, what was said, and the report."""

    def command(programs: dict[str, str], *options: str) -> tuple[int, str, Any]:
        def child(which: str, asked: Path) -> list[str]:
            return [sys.executable, "-c", CHILD + programs[which], str(asked)]

        monkeypatch.setattr(run, "child_command", child)
        monkeypatch.setattr(supervisor, "TICK", 0.02)
        status = main(["smoke", "--tiny", "--out", str(tmp_path / "out"), *options])
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        found = read(tmp_path / "out" / "smoke.json")
        ElementTree.parse(tmp_path / "out" / "smoke.junit.xml")
        assert (tmp_path / "out" / "smoke.md").read_text().startswith("# vLLM inference verification: tiny Qwen1.5-MoE")
        assert not list((tmp_path / "out").glob(".*"))
        return status, said.out + said.err, found

    return command


def test_the_engines_log_is_redacted_when_it_ends(play: Any, tmp_path: Path) -> None:
    play({"engine": "print('serve --token abcdef123', flush=True)\n" + ENGINE + CALLS, "reference": REFERENCE})
    assert "serve --token [secret]\n" in (tmp_path / "out" / "engine.log").read_text()


def test_a_run_to_the_end(play: Any, tmp_path: Path) -> None:
    status, said, report = play({"engine": ENGINE + CALLS, "reference": REFERENCE})
    assert status == 0
    assert "engine: loading weights" in said
    checks = {check.name: check for check in report.checks}
    assert list(checks) == list(run.CHECK_NAMES)
    assert checks["engine.start"].verdict == checks[parity.NAME].verdict == "pass"
    assert checks["log.warnings"].verdict == "warn"
    facts = Smoke.of(report)
    assert facts.ended_in == "done"
    assert facts.load == measured.Load(1.0, 2.0, 0.0, 0.0, 1.5, 5.5, 10.0)
    assert facts.memory == measured.Memory(1000, 2000, 64, 9000, 5000)
    assert facts.warm is not None and (facts.warm.repeats, facts.warm.spread) == (3, 1.5)
    assert facts.model is not None and facts.model.tiny and facts.model.parameters == request.TINY.bytes() // 2
    assert [warned.text for warned in facts.warnings.unknown] == ["nobody knows this"]
    assert facts.command.startswith("ascend-safe smoke")
    markdown = (tmp_path / "out" / "smoke.md").read_text()
    assert text.TINY_NOTE in markdown
    assert "2 s for 4 tokens after 3 of the prompt (median of 3, slowest over fastest 1.50)" in markdown


def test_a_stand_in_is_named_everywhere(play: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "npu")
    program = ENGINE.replace('"stand_in": ""', '"stand_in": "a stand-in CANN"')
    _, said, report = play({"engine": program + CALLS, "reference": REFERENCE})
    facts = Smoke.of(report)
    assert facts.platform is not None and facts.platform.stand_in == "a stand-in CANN"
    assert report.title.endswith("on a stand-in CANN")
    assert "on an Ascend NPU" not in report.title
    markdown = (tmp_path / "out" / "smoke.md").read_text()
    assert "**No Ascend hardware was used.**" in markdown
    assert "a stand-in CANN" in said


def test_out_of_time(play: Any, tmp_path: Path) -> None:
    hangs = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: (print('WARNING 11-22 04:00:00 dying', flush=True), "
        "sys.exit(1)))\nprint('waiting for the moon', flush=True)\ntime.sleep(600)"
    )
    status, said, report = play({"engine": ENGINE.replace("time.sleep(0.1)", hangs)}, "--timeout", "1.5")
    assert status == 1
    check = next(check for check in report.checks if check.name == "engine.start")
    assert check.verdict == "fail"
    assert check.summary == "the phase 'engine' was not done when the time was up (1.5 s in all)"
    assert check.evidence[-1].what == "waiting for the moon"  # and not what it says when it is ended
    assert not Smoke.of(report).warnings.unknown
    assert "dying" in (tmp_path / "out" / "engine.log").read_text()
    assert Smoke.of(report).ended_in == "engine"
    assert all(c.verdict in ("skip", "fail", "pass") for c in report.checks)
    assert "not reached: it ended in the phase 'engine'" in said


def test_out_of_time_in_a_check_keeps_what_was_known(play: Any) -> None:
    status, _, report = play({"engine": ENGINE + CALLS + "phase('weights.reload'); time.sleep(600)"}, "--timeout", "2")
    assert status == 1
    checks = {check.name: check for check in report.checks}
    assert checks["engine.start"].verdict == "pass"
    assert checks["weights.reload"].verdict == "fail"
    facts = Smoke.of(report)
    assert facts.output is not None and facts.output.text == "a|b"
    assert facts.ended_in == "weights.reload"


def test_a_crash_names_the_root_and_shows_no_traceback(play: Any) -> None:
    crash = f"print({VLLM_CRASH!r}, flush=True)\nos._exit(1)"
    status, said, report = play({"engine": ENGINE.replace("time.sleep(0.1)", crash)})
    assert status == 1
    check = next(check for check in report.checks if check.name == "engine.start")
    assert check.summary == ("it ended in the phase 'engine': SafetensorError: Error while deserializing header")
    assert "SafetensorError" in said


def test_a_process_that_is_killed(play: Any) -> None:
    status, said, _ = play({"engine": ENGINE.replace("time.sleep(0.1)", "os.kill(os.getpid(), 9)")})
    assert status == 1
    assert "was killed (signal 9), as the system does when memory runs out" in said


def test_a_reference_that_cannot_be_computed_is_unknown(play: Any) -> None:
    program = "phase('output.reference'); tell(kind='error', phase='x', text='ImportError: no such model'); sys.exit(1)"
    status, _, report = play({"engine": ENGINE + CALLS, "reference": program})
    assert status == 0
    check = next(check for check in report.checks if check.name == parity.NAME)
    assert (check.verdict, check.summary) == (
        "unknown",
        "the reference could not be computed: ImportError: no such model",
    )


def test_a_reference_that_does_not_fit_is_skipped_with_the_numbers(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.machine, "available_memory", lambda: 2**29)
    _, _, report = play({"engine": ENGINE + CALLS})
    check = next(check for check in report.checks if check.name == parity.NAME)
    assert check.verdict == "skip"
    assert "GiB in float32 (0.00 billion parameters), and 0.5 GiB of memory are available" in check.summary


def test_a_report_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "child_command", lambda which, asked: [sys.executable, "-c", CHILD + ENGINE + CALLS])
    monkeypatch.setitem(run.FILES, "json", "/dev/full")
    assert main(["smoke", "--tiny", "--out", str(tmp_path), "--skip", parity.NAME]) == 2
    captured = capsys.readouterr()
    assert "engine.start: the engine was ready" in captured.out
    assert captured.err.endswith("ascend-safe: /dev/full cannot be written: No space left on device\n")
    assert (tmp_path / "smoke.md").stat().st_size


def test_skipped_checks_say_so(play: Any) -> None:
    _, _, report = play({"engine": ENGINE + CALLS}, "--skip", parity.NAME, "--skip", "log.warnings")
    skipped = {check.name: check.summary for check in report.checks if check.summary == "left out with --skip"}
    assert set(skipped) == {parity.NAME, "log.warnings"}


def test_ctrl_c_writes_the_report(tmp_path: Path) -> None:
    """As a user presses it: SIGINT to the command, which runs in the foreground."""
    program = CHILD + ENGINE.replace("time.sleep(0.1)", "tell(kind='up'); time.sleep(600)")
    code = (
        "import sys; from verl_ascend_rollout.tools.smoke import run; from verl_ascend_rollout.tools.cli import main; "
        f"run.child_command = lambda which, asked: [sys.executable, '-c', {program!r}]; "
        f"sys.exit(main(['smoke', '--tiny', '--out', {str(tmp_path)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "loading weights" in line:
            break
    process.send_signal(2)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "stopped by the user in the phase 'engine'" in out
    assert Smoke.of(read(tmp_path / "smoke.json")).ended_in == "engine"


def test_the_command_is_recorded_without_the_programs_path() -> None:
    assert cli._command(["/opt/bin/ascend-safe", "smoke", "--tiny"]) == "ascend-safe smoke --tiny"
    assert cli._command(["/opt/smoke.pyz", "--prompt", "a b"]) == "ascend-safe smoke --prompt 'a b'"


def test_the_toy_is_as_large_as_its_tokenizer() -> None:
    assert request.TINY.vocabulary == toy_checkpoint.VOCABULARY
