"""What a user sees who makes a mistake: the real command ends within a minute, with a sentence, and leaves nothing.

Each run is verl's own entry point in a process of its own.  Ray is never started, and no model is loaded: everything
here is found before.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from verl_ascend_rollout.platforms.detect import detect

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
OURS = "ascend_safe: "
MARK = "ASCEND_SAFE_TEST_RUN"


@dataclass(frozen=True)
class Run:
    """How a run ended: exit code, all that it printed, the lines that are our sentences, and how long it took."""

    code: int
    output: str
    sentences: list[str]
    seconds: float


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy model and its data."""
    folder = tmp_path_factory.mktemp("toy")
    make_tiny = ROOT / "recipes" / "grpo_tiny_cpu" / "make_tiny.py"
    subprocess.run([sys.executable, str(make_tiny), str(folder)], check=True, capture_output=True, timeout=SECONDS)
    return folder


@pytest.fixture
def main_ppo(toy: Path, tmp_path: Path) -> Callable[..., Run]:
    """Run `python -m verl.trainer.main_ppo`, or another module, on the toy with overrides, which win, and environment.

    Checks what holds for each mistake: no traceback, no Ray, no process and no shared memory that stays.
    """

    def run(*overrides: str, module: str = "verl.trainer.main_ppo", **environ: str) -> Run:
        # A test beside this one may have killed what used a semaphore: what is ours would be left every time.
        for _ in range(3):
            run, left = once(overrides, module, environ)
            if not left:
                return run
        pytest.fail(f"{left} stayed in /dev/shm")

    def once(overrides: tuple[str, ...], module: str, environ: dict[str, str]) -> tuple[Run, set[str]]:
        mark = uuid.uuid4().hex
        command = [
            *(sys.executable, "-m", module),
            *(override for override in overrides if override.startswith("--")),
            *(f"data.{split}_files={toy}/{split}.parquet" for split in ("train", "val")),
            *("data.max_prompt_length=64", "data.max_response_length=16"),
            f"actor_rollout_ref.model.path={toy}/model",
            f"hydra.run.dir={tmp_path}/hydra",
            *(override for override in overrides if not override.startswith("--")),
        ]
        started = time.monotonic()
        segments = shared_memory()
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
            env={**plain_environment(tmp_path), **environ, MARK: mark},
        ) as process:
            try:
                stdout, stderr = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"still running after {SECONDS} s: {process.communicate()[1][-3000:]}")
        seconds = time.monotonic() - started
        output = stdout + stderr
        assert "Traceback" not in output, output
        assert "Started a local Ray instance" not in output, output
        assert processes_with(mark) == []
        left = lasting_orphans(segments)
        sentences = [line for line in stderr.splitlines() if line.startswith(OURS)]
        assert not [line for line in stdout.splitlines() if line.startswith(OURS)]
        return Run(process.returncode, output, sentences, seconds), left

    return run


def plain_environment(folder: Path) -> dict[str, str]:
    """This process's environment without what other tests or the user set for verl and Ray."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VERL_", "RAY_", "ASCEND_", "HYDRA_", "PYTEST_"))
    }
    # No cluster of the user's is joined: what `ray start` notes is looked for here.
    environ["RAY_TMPDIR"] = str(folder)
    if detect({}).name != "cpu":
        environ["VERL_PLATFORM"] = "cpu"
    return environ


def processes_with(mark: str) -> list[str]:
    """The command lines of living processes that have the mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def lasting_orphans(before: set[str]) -> set[str]:
    """What is new and unused, and still there when Python's resource tracker has had its time to clean up."""
    deadline = time.monotonic() + 10
    while (left := orphans(shared_memory() - before)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def orphans(names: set[str]) -> set[str]:
    """Those that no living process uses: another job may have made segments of its own meanwhile."""
    used = ""
    for folder in Path("/proc").glob("[0-9]*") if names else ():
        try:
            used += (folder / "maps").read_text(encoding="utf-8", errors="replace")
            used += " ".join(os.readlink(link) for link in (folder / "fd").iterdir())
        except OSError:
            continue
    return {name for name in names if f"/dev/shm/{name}" not in used and Path("/dev/shm", name).exists()}


def test_the_checks_find_what_is_left_behind() -> None:
    """The negative control: a process that stays, and a segment without one."""
    mark = uuid.uuid4().hex
    before = shared_memory()
    segment = Path("/dev/shm", f"ascend_safe_test_{mark}")
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: mark}) as process:
        try:
            segment.touch()
            assert processes_with(mark) == ["sleep 60 "]
            assert segment.name in orphans(shared_memory() - before)
        finally:
            process.kill()
            segment.unlink()
    assert processes_with(mark) == []


CPU = ("--config-name=ascend_safe", "rollout=ascend_safe")


def test_a_model_that_is_not_there(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo(*CPU, "actor_rollout_ref.model.path=/no/such/model")
    assert run.code == 2
    assert run.sentences == [
        "ascend_safe: actor_rollout_ref.model.path=/no/such/model is not there: give the folder of a Hugging Face "
        "checkpoint, or a name on the hub"
    ]
    assert run.output.count(" registered in process ") == 1


def test_an_unknown_option_and_a_bad_value(main_ppo: Callable[..., Run]) -> None:
    options = "actor_rollout_ref.rollout.engine_kwargs.ascend_safe"
    run = main_ppo(*CPU, f"+{options}.verfy=off", f"{options}.kv_rung=fast")
    assert run.code == 2
    (sentence,) = run.sentences
    assert "unknown option 'verfy' (did you mean 'verify'?): the options are events, kv_release, " in sentence
    assert "kv_rung='fast' is not possible: choose one of auto, kv_only, sleep, reallocate, keep" in sentence


def test_verls_own_config_on_a_machine_without_an_accelerator(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo("rollout=ascend_safe")
    assert run.code == 2
    resource, device = run.sentences
    assert resource == (
        "ascend_safe: Ray has no resource 'GPU' on a machine without an accelerator, and verl asks for 8: add "
        "+ray_kwargs.ray_init.num_gpus=8 (logical slots), or use --config-name=ascend_safe, which sets what a CPU "
        "needs; on a cluster, give its address"
    )
    assert device.startswith("ascend_safe: trainer.device=cuda on a machine without an accelerator: set")


def test_a_prompt_that_is_longer_than_the_model_takes(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo(*CPU, "data.max_prompt_length=512", "actor_rollout_ref.rollout.max_model_len=128")
    assert run.code == 2
    assert run.sentences == [
        "ascend_safe: data.max_prompt_length=512 leaves no room to generate below "
        "actor_rollout_ref.rollout.max_model_len=128: lower the one or raise the other"
    ]


def test_a_script_that_names_verls_rollout_runs_ours(main_ppo: Callable[..., Run]) -> None:
    """As every script of verl's does; the job goes on, here to its next mistake."""
    run = main_ppo(*CPU, "actor_rollout_ref.rollout.name=vllm", "actor_rollout_ref.model.path=/no/such/model")
    assert run.code == 2
    replaced, model = run.sentences
    assert replaced.startswith(
        "ascend_safe: rollout=ascend_safe replaces actor_rollout_ref.rollout.name=vllm: the rollout"
    )
    assert model.startswith("ascend_safe: actor_rollout_ref.model.path=/no/such/model is not there")


def test_a_script_that_names_another_engine_stops(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo("actor_rollout_ref.rollout.name=sglang", "rollout=ascend_safe")
    assert run.code == 2
    (sentence,) = run.sentences
    assert "rollout=ascend_safe and actor_rollout_ref.rollout.name=sglang contradict each other" in sentence


@pytest.mark.parametrize(
    "module",
    [
        "verl.experimental.fully_async_policy.fully_async_main",  # asks verl for no check of its config
        "verl.experimental.one_step_off_policy.main_ppo",  # asks for it in a Ray actor
    ],
)
def test_an_entry_point_of_verls_that_checks_nothing_in_the_driver(module: str, main_ppo: Callable[..., Run]) -> None:
    folder = importlib.util.find_spec("verl")
    assert folder is not None and folder.origin is not None
    run = main_ppo(
        # Where verl's own `file://verl/trainer/config` is not there to be found.
        f"hydra.searchpath=[file://{Path(folder.origin).parent}/trainer/config]",
        "rollout=ascend_safe",
        "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.verify=no",
        "trainer.device=cpu",
        module=module,
    )
    assert run.code == 2
    option, resource, *_ = run.sentences
    assert "verify='no' is not possible" in option
    assert "Ray has no resource 'GPU' on a machine without an accelerator, and verl asks for 16" in resource


def test_what_the_first_sync_would_refuse_is_refused_here(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo(
        *CPU,
        *(f"actor_rollout_ref.model.{name}" for name in ("lora_rank=8", "lora_alpha=16", "target_modules=all-linear")),
        "actor_rollout_ref.rollout.quantization=fp8",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "ray_kwargs.ray_init.num_gpus=3",
        "ray_kwargs.ray_init.num_cpus=16",
        "trainer.n_gpus_per_node=3",
    )
    assert run.code == 2
    parts = (
        "takes 2 memory nodes on a CPU",
        "an engine of 2 devices",
        "load_format=dummy",
        "quantization=fp8",
        "experts",
    )
    found = [sentence for sentence in run.sentences if any(part in sentence for part in parts)]
    assert found == run.sentences
    assert len(found) >= len(parts) - (len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) > 1)


def test_a_rollout_that_does_not_exist(main_ppo: Callable[..., Run]) -> None:
    """Hydra's own error, with its exit code: it knows the options because our search path is there."""
    run = main_ppo("rollout=nonsense")
    assert run.code == 1
    assert "Could not find 'rollout/nonsense'" in run.output
    assert "Available options in 'rollout':\n\tascend_safe\n\trollout\n\tvllm\n" in run.output


def test_plugins_that_are_switched_off(main_ppo: Callable[..., Run]) -> None:
    """verl alone would start Ray, load the model, and fail in an actor over a rollout that it does not know."""
    run = main_ppo("actor_rollout_ref.rollout.name=ascend_safe", VERL_USE_EXTERNAL_PLUGINS="none")
    assert run.code == 2
    (sentence,) = run.sentences
    assert sentence.endswith(
        ": VERL_USE_EXTERNAL_PLUGINS=none keeps verl from loading it: unset it, or name ascend_safe in it"
    )
    assert " registered in process " not in run.output.replace("not registered in process", "")


@pytest.mark.parametrize("version", ["0.7.1", "0.8.0", "0.9.0", "0.9.1"])
def test_a_verl_that_has_all_of_it(
    version: str, main_ppo: Callable[..., Run], verl_wheel: Callable[[str], str]
) -> None:
    run = main_ppo(
        *CPU,
        "actor_rollout_ref.model.path=/no/such/model",
        PYTHONPATH=f"{verl_wheel(version)}{os.pathsep}{ROOT}",
    )
    assert f") with verl {version}: " in run.output
    assert ("a gate for requests, which this verl has not" in run.output) == (version != "0.9.1")
    assert run.code == 2
    (sentence,) = run.sentences
    assert "actor_rollout_ref.model.path=/no/such/model is not there" in sentence


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="torch-npu is installed here")
def test_an_npu_without_torch_npu(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo(*CPU, VERL_PLATFORM="npu")
    assert run.code == 2
    (sentence,) = run.sentences
    assert "VERL_PLATFORM=npu asks for an Ascend NPU" in sentence
    assert "torch-npu is not installed: install it" in sentence


def test_all_mistakes_are_said_at_once(main_ppo: Callable[..., Run]) -> None:
    run = main_ppo(
        *CPU,
        "actor_rollout_ref.model.path=/no/such/model",
        "+actor_rollout_ref.rollout.engine_kwargs.ascend_safe.verfy=off",
        "trainer.n_gpus_per_node=2",
    )
    assert run.code == 2
    assert len(run.sentences) == 3
    for sentence, part in zip(run.sentences, ("verfy", "/no/such/model", "asks Ray for 2 GPU"), strict=True):
        assert part in sentence
