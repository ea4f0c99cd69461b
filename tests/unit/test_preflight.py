"""What the driver says before anything is started: a sentence for each problem, all of them, and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from verl_ascend_rollout import compat
from verl_ascend_rollout.checks import preflight

POSITIONS = 256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a checkpoint, as far as the check looks at it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": POSITIONS}), encoding="utf-8")
    return folder


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A machine without an accelerator, and without a Ray of somebody else's."""
    return {"VERL_PLATFORM": "cpu", "RAY_TMPDIR": str(tmp_path)}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether another test has started Ray in this process must not matter here."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))


@pytest.fixture(autouse=True)
def no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_problems", [])


def job(model: Path, **changes: Any) -> DictConfig:
    """A good config for a CPU, as verl composes it (struct), with changes by dotted name."""
    config = OmegaConf.create(
        {
            "data": {"max_prompt_length": 64, "max_response_length": 16},
            "actor_rollout_ref": {
                "model": {"path": str(model)},
                "rollout": {
                    "name": "ascend_safe",
                    "enforce_eager": None,
                    "free_cache_engine": True,
                    "enable_sleep_mode": False,
                    "expert_parallel_size": 1,
                    "max_model_len": None,
                    "engine_kwargs": {"vllm": {}, "ascend_safe": None},
                },
            },
            "trainer": {"n_gpus_per_node": 1, "nnodes": 1, "device": "cpu"},
            "ray_kwargs": {"ray_init": {"num_cpus": 8, "num_gpus": 1}},
        }
    )
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    OmegaConf.set_struct(config, True)
    return config


def problems(config: DictConfig, environ: dict[str, str]) -> list[str]:
    found = list(preflight.find_problems(config, environ))
    for problem in found:
        assert "\n" not in problem, problem
        assert ": " in problem, f"what to do is missing: {problem}"
    return found


def test_a_good_config_has_no_problem(model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(job(model), environ) == []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    preflight.check_driver_config(job(model, ray_kwargs__ray_init__address="local"))


RAY = "ray_kwargs__ray_init"
ROLLOUT = "actor_rollout_ref__rollout"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {f"{ROLLOUT}__engine_kwargs__ascend_safe": {"verfy": "off"}},
            [
                "unknown option 'verfy' (did you mean 'verify'?)",
                "events, kv_rung, on_unsafe, parity, sync_timeout, verify, weight_path",
            ],
        ),
        ({f"{ROLLOUT}__engine_kwargs__ascend_safe": {"verify": "no"}}, ["verify='no'", "first, always, off"]),
        ({"actor_rollout_ref__model__path": None}, ["actor_rollout_ref.model.path is empty"]),
        ({"actor_rollout_ref__model__path": "/no/such/model"}, ["model.path=/no/such/model is not there"]),
        ({"actor_rollout_ref__model__path": "~/no/such/model"}, ["model.path=~/no/such/model is not there"]),
        # A name on the hub has one slash at most.
        ({"actor_rollout_ref__model__path": "outputs/no/model"}, ["model.path=outputs/no/model is not there"]),
        (
            {"data__max_prompt_length": POSITIONS},
            ["data.max_prompt_length=256", "max_position_embeddings of actor_rollout_ref.model.path=256"],
        ),
        (
            {"data__max_prompt_length": 300, f"{ROLLOUT}__max_model_len": 128},
            ["data.max_prompt_length=300 leaves no room", "rollout.max_model_len=128"],
        ),
        (
            {f"{RAY}__num_gpus": None},
            ["Ray has no resource 'GPU'", "asks for 1", "add +ray_kwargs.ray_init.num_gpus=1", "ascend_safe"],
        ),
        (
            {"trainer__n_gpus_per_node": 4, "trainer__nnodes": 2},
            ["verl asks Ray for 8 GPU", "this machine offers 1 (ray_kwargs.ray_init.num_gpus)", "n_gpus_per_node"],
        ),
        ({f"{RAY}__num_gpus": "many"}, ["ray_kwargs.ray_init.num_gpus=many must be a number"]),
        (
            {f"{RAY}__num_cpus": 2},
            ["3 CPUs with each trainer worker", "this machine offers 2", "+ray_kwargs.ray_init.num_cpus"],
        ),
        ({"trainer__n_gpus_per_node": "all"}, ["trainer.n_gpus_per_node=all", "must be whole numbers"]),
        ({"trainer__device": "cuda"}, ["trainer.device=cuda on a machine without an accelerator", "device=cpu"]),
        ({f"{ROLLOUT}__engine_kwargs__ascend_safe": {"kv_rung": "sleep"}}, ["kv_rung=sleep cannot work"]),
    ],
)
def test_each_problem_is_one_sentence(
    changes: dict[str, Any], says: list[str], model: Path, environ: dict[str, str]
) -> None:
    (problem,) = problems(job(model, **changes), environ)
    for part in says:
        assert part in problem


def test_a_folder_that_is_no_checkpoint(model: Path, environ: dict[str, str]) -> None:
    (model / "config.json").unlink()
    (problem,) = problems(job(model), environ)
    assert problem == (
        f"actor_rollout_ref.model.path={model} has no config.json: it is not the folder of a Hugging Face checkpoint"
    )


@pytest.mark.parametrize("path", ["Qwen/Qwen1.5-MoE-A2.7B", "gpt2", "hdfs://some/where/else"])
def test_a_name_on_the_hub_is_not_looked_for_on_disk(path: str, model: Path, environ: dict[str, str]) -> None:
    assert problems(job(model, actor_rollout_ref__model__path=path), environ) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"max_position_embeddings": "many"}'])
def test_a_config_json_without_a_length_is_no_problem_of_ours(text: str, model: Path, environ: dict[str, str]) -> None:
    (model / "config.json").write_text(text, encoding="utf-8")
    assert problems(job(model, data__max_prompt_length=10**6), environ) == []


def test_answers_that_will_be_cut_short_are_a_warning(model: Path, environ: dict[str, str]) -> None:
    """verl runs such a job, and cuts the answers to the longest prompts: so do we, and say it."""
    fits = job(model, data__max_prompt_length=POSITIONS - 16)
    assert list(preflight.find_warnings(fits)) == []
    cut = job(model, data__max_response_length=65, actor_rollout_ref__rollout__max_model_len=128)
    assert problems(cut, environ) == []
    (warning,) = preflight.find_warnings(cut)
    assert "data.max_prompt_length=64 and data.max_response_length=65 together exceed" in warning
    assert "actor_rollout_ref.rollout.max_model_len=128" in warning


def test_an_unknown_platform(model: Path, environ: dict[str, str]) -> None:
    (problem,) = problems(job(model), {**environ, "VERL_PLATFORM": "tpu"})
    assert problem.startswith("VERL_PLATFORM=tpu names no platform: set it to one of cpu, cuda, ")


def test_an_npu_is_asked_for_as_the_resource_npu(model: Path, environ: dict[str, str]) -> None:
    npu = {**environ, "VERL_PLATFORM": "npu"}
    config = job(model, ray_kwargs__ray_init__resources={"NPU": 8}, trainer__device="npu")
    assert not [problem for problem in problems(config, npu) if "Ray" in problem]
    config = job(model, ray_kwargs__ray_init__resources={"NPU": 0}, trainer__device="npu")
    assert [problem for problem in problems(config, npu) if "verl asks Ray for 1 NPU" in problem]


# Clusters


@pytest.mark.parametrize("how", ["address", "RAY_ADDRESS", "auto", "ray start", "initialised"])
def test_joining_a_cluster_skips_what_is_asked_of_this_machine(
    how: str, model: Path, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(model, trainer__n_gpus_per_node=8, trainer__device="cuda", **dict.fromkeys([f"{RAY}__num_gpus"]))
    config.ray_kwargs.ray_init.num_cpus = None
    assert len(problems(config, environ)) == 2, "without a cluster there is nothing to skip"
    if how in ("address", "auto"):
        OmegaConf.update(
            config, "ray_kwargs.ray_init.address", "auto" if how == "auto" else "10.0.0.1:6379", force_add=True
        )
    elif how == "RAY_ADDRESS":
        environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    elif how == "ray start":
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379", encoding="utf-8")
    else:
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert problems(config, environ) == []


def test_what_ray_does_not_take_when_it_joins_a_cluster(model: Path, environ: dict[str, str]) -> None:
    environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    (problem,) = problems(job(model), environ)
    assert problem.startswith(
        "the job would join the Ray cluster at 10.0.0.1:6379, where Ray takes no ray_kwargs.ray_init.num_cpus, "
        "ray_kwargs.ray_init.num_gpus: set to null"
    )


@pytest.mark.parametrize("how", ["address", "RAY_ADDRESS"])
def test_local_is_no_cluster(how: str, model: Path, environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379", encoding="utf-8")
    config = job(model, trainer__device="cuda")
    if how == "address":
        OmegaConf.update(config, "ray_kwargs.ray_init.address", "local", force_add=True)
    else:
        environ["RAY_ADDRESS"] = "local"
    (problem,) = problems(config, environ)
    assert problem.startswith("trainer.device=cuda")


# All at once


def test_all_problems_are_said_at_once_with_exit_code_2(
    model: Path, environ: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = job(
        model,
        actor_rollout_ref__model__path="/no/such/model",
        actor_rollout_ref__rollout__engine_kwargs__ascend_safe={"verify": "no", "kv_rng": "keep"},
        data__max_prompt_length=200,
        actor_rollout_ref__rollout__max_model_len=100,
        trainer__device="cuda",
        trainer__n_gpus_per_node=3,
    )
    with pytest.raises(SystemExit) as stop:
        preflight.check_driver_config(config)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.startswith("ascend_safe: ") for line in lines] == [True] * 5
    for line, part in zip(lines, ["kv_rng", "=200", "/no/such/model", "asks Ray for 3", "device=cuda"], strict=True):
        assert part in line
    assert "verify='no'" in lines[0]


def test_a_verl_that_has_drifted_is_a_problem_of_every_job(
    model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "_problems", ["verl 9.9: verl.a.b is gone", "verl 9.9: verl.c.d is gone"])
    first, second = problems(job(model), environ)
    assert first.startswith("verl 9.9: verl.a.b is gone: use a verl release that the support matrix lists")
    assert second.startswith("verl 9.9: verl.c.d is gone: ")
    assert first.endswith("actor_rollout_ref.rollout.name=vllm")
