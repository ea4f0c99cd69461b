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
    """Run `python -m verl.trainer.main_ppo` on the toy with some overrides, which win, and some environment.

    Checks what holds for each mistake: no traceback, no Ray, no process and no shared memory that stays.
    """

    def run(*overrides: str, **environ: str) -> Run:
        mark = uuid.uuid4().hex
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
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
        assert lasting_orphans(segments) == set()
        sentences = [line for line in stderr.splitlines() if line.startswith(OURS)]
        assert not [line for line in stdout.splitlines() if line.startswith(OURS)]
        return Run(process.returncode, output, sentences, seconds)

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
    assert "unknown option 'verfy' (did you mean 'verify'?): the options are events, kv_rung, on_unsafe" in sentence
    assert "kv_rung='fast' is not possible: choose one of auto, release_kv_cache, sleep, direct, keep" in sentence


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


def test_a_verl_that_is_too_old(main_ppo: Callable[..., Run], tmp_path: Path) -> None:
    """The installed verl, under the metadata of an old one."""
    metadata = tmp_path / "old" / "verl-0.8.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: verl\nVersion: 0.8.0\n", encoding="utf-8")
    run = main_ppo("rollout=ascend_safe", PYTHONPATH=str(metadata.parent.parent))
    assert run.code == 2
    (sentence,) = run.sentences
    assert "verl 0.8.0 is too old for the rollout 'ascend_safe': it needs verl 0.9.0 or newer" in sentence
    assert "ERROR" in run.output and "The rollout 'ascend_safe' is NOT registered in process" in run.output


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
