"""What the driver says before anything is started: a sentence for each problem, all of them, and exit code 2."""

from __future__ import annotations

import atexit
import json
import logging
import sys
import traceback
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf
from ray.exceptions import RayTaskError

import verl_ascend_rollout
from verl_ascend_rollout.integration import cluster, patch, preflight
from verl_ascend_rollout.integration.cluster import Node
from verl_ascend_rollout.integration.patch import Patch
from verl_ascend_rollout.platforms import cpu
from verl_ascend_rollout.policy import engine_args

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


A_NODE = Node(
    "10.0.0.1",
    {"CPU": 64.0, "GPU": 16.0},
    {
        "python": "/usr/bin/python3",
        "versions": {"verl": metadata.version("verl")},
        "plugin": verl_ascend_rollout.__version__,
        "loaded": True,
        "npu_smi": False,
        "environ": {},
        "facts": {"name": "cuda", "soc": None, "versions": {}},
    },
)


def node(address: str, resources: dict[str, float], **answer: Any) -> Node:
    """A node of a cluster that is as this machine is, but for what is said."""
    return Node(address, resources, {**A_NODE.answer, **answer})


@pytest.fixture(autouse=True)
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes of the cluster, where a job joins one."""
    there = [A_NODE]
    monkeypatch.setattr(cluster, "ask", lambda _: tuple(there))
    monkeypatch.setattr(preflight, "installed_versions", lambda: {"verl": metadata.version("verl")})
    return there


@pytest.fixture(autouse=True)
def no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_drift", {})


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
                    "tensor_model_parallel_size": 1,
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


def test_an_argument_of_vllms_that_is_no_mapping_is_said_once(model: Path, environ: dict[str, str]) -> None:
    config = job(model, **{f"{ROLLOUT}__engine_kwargs__vllm__compilation_config": "{cudagraph_mode: NONE"})
    (problem,) = problems(config, environ)
    assert "engine_kwargs.vllm.compilation_config='{cudagraph_mode: NONE' must be a mapping" in problem


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {f"{ROLLOUT}__engine_kwargs__ascend_safe": {"verfy": "off"}},
            [
                "unknown option 'verfy' (did you mean 'verify'?)",
                "events, kv_release, max_engine_restarts, on_engine_death, on_unsafe, parity, sync_timeout, verify, "
                "weight_path",
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
        ({f"{ROLLOUT}__engine_kwargs__ascend_safe": {"kv_release": "sleep"}}, ["kv_release=sleep cannot work"]),
        (  # no setting of ours would make it a job for a CPU
            {"actor_rollout_ref__actor": {"strategy": "megatron"}, "trainer__device": "cuda", f"{RAY}__num_gpus": None},
            ["actor_rollout_ref.actor.strategy=megatron on a machine without", "only FSDP trains on a CPU", "address"],
        ),
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


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"actor_rollout_ref__rollout__calculate_log_probs": False},
            "actor_rollout_ref.rollout.calculate_log_probs is off: set that to True",
        ),
        (
            {"algorithm__rollout_correction__bypass_mode": True},
            "with algorithm.rollout_correction.bypass_mode the trainer computes no log-probabilities of its own: set "
            "that to False",
        ),
    ],
)
def test_a_parity_that_compares_nothing(
    settings: dict[str, bool], why: str, model: Path, environ: dict[str, str]
) -> None:
    """A warning where the job would warn, and no job where it would stop."""
    blind = job(model, actor_rollout_ref__rollout__calculate_log_probs=True)
    for name, value in settings.items():
        OmegaConf.update(blind, name.replace("__", "."), value, force_add=True)
    option = "actor_rollout_ref.rollout.engine_kwargs.ascend_safe.parity"
    (warning,) = preflight.find_warnings(blind, environ)
    assert warning == f"{option}=warn compares nothing, since {why}, or parity to off"
    assert problems(blind, environ) == []
    blind.actor_rollout_ref.rollout.engine_kwargs.ascend_safe = {"parity": "error"}
    assert list(preflight.find_warnings(blind, environ)) == []
    assert problems(blind, environ) == [f"{option}=error compares nothing, since {why}, or parity to off"]
    blind.actor_rollout_ref.rollout.engine_kwargs.ascend_safe = {"parity": "off"}
    assert list(preflight.find_warnings(blind, environ)) == [] == problems(blind, environ)
    both = job(model, actor_rollout_ref__rollout__calculate_log_probs=True)
    assert list(preflight.find_warnings(both, environ)) == []


def test_a_warning_is_said_once(model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """hydra's callback checks the job, and verl's own check comes to us as well."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    preflight._warn.cache_clear()
    caplog.set_level(logging.WARNING, logger=preflight.logger.name)
    config = job(model, actor_rollout_ref__rollout__calculate_log_probs=False, ray_kwargs__ray_init__address="local")
    for _ in range(2):
        preflight.check_driver_config(config)
    assert [record.getMessage() for record in caplog.records if "compares nothing" in record.getMessage()] == [
        caplog.records[0].getMessage()
    ]


def test_an_unknown_platform(model: Path, environ: dict[str, str]) -> None:
    (problem,) = problems(job(model), {**environ, "VERL_PLATFORM": "tpu"})
    assert problem.startswith("VERL_PLATFORM=tpu names no platform: set it to one of cpu, cuda, ")


def test_the_models_configuration_reaches_the_policy(model: Path, environ: dict[str, str]) -> None:
    dense = {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 144, "num_attention_heads": 2}
    (model / "config.json").write_text(json.dumps(dense), encoding="utf-8")
    (problem,) = problems(job(model, actor_rollout_ref__rollout__expert_parallel_size=2), environ)
    assert "expert_parallel_size=2 cannot work: the model has no experts" in problem
    assert "attention heads of 72 numbers cannot work on a CPU" in problem


def test_adapters_reach_the_policy(model: Path, environ: dict[str, str]) -> None:
    (problem,) = problems(job(model, actor_rollout_ref__model__lora_rank=8), environ)
    assert problem.startswith("training adapters (LoRA) cannot work with actor_rollout_ref.rollout.load_format=dummy")
    works = {"actor_rollout_ref__model__lora_rank": 8, "actor_rollout_ref__rollout__load_format": "safetensors"}
    assert problems(job(model, **works), environ) == []


def test_an_engine_of_two_workers_on_a_cpu_with_one_memory_node(
    model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "memory_nodes", lambda: 1)
    two = {"trainer__n_gpus_per_node": 2, f"{RAY}__num_gpus": 2, f"{ROLLOUT}__tensor_model_parallel_size": 2}
    (problem,) = problems(job(model, **two), environ)
    assert "takes 2 memory nodes on a CPU, and this machine has 1: set it to 1, or bind cores to workers" in problem
    assert problems(job(model, **two), {**environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}) == []
    monkeypatch.setattr(cpu, "memory_nodes", lambda: 2)
    assert problems(job(model, **two), environ) == []


def test_an_npu_without_npu_smi(
    model: Path, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "missing_npu", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    config = job(model, ray_kwargs__ray_init__resources={"NPU": 8}, trainer__device="npu")
    (problem,) = problems(config, {**environ, "VERL_PLATFORM": "npu"})
    assert problem.startswith("npu-smi is not on PATH here: verl runs it on every node with an NPU")
    (tmp_path / "npu-smi").touch(mode=0o755)
    assert problems(config, {**environ, "VERL_PLATFORM": "npu"}) == []


def test_a_rollout_with_devices_of_its_own_needs_them_beside_the_trainers(model: Path, environ: dict[str, str]) -> None:
    """`fully_async_policy`: 16 for the trainer and 16 for the rollout, on a machine that offers 16."""
    own = {"rollout__nnodes": 1, "rollout__n_gpus_per_node": 16, "trainer__n_gpus_per_node": 16}
    config = job(model, **own, **{f"{RAY}__num_gpus": 16, f"{RAY}__num_cpus": 200})
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 1
    (problem,) = problems(config, environ)
    assert problem.startswith(
        "verl asks Ray for 32 GPU (trainer.n_gpus_per_node=16 x trainer.nnodes=1; rollout.n_gpus_per_node=16 x "
        "rollout.nnodes=1) and this machine offers 16"
    )


ASYNCHRONOUS = {"rollout__nnodes": 1, "rollout__n_gpus_per_node": 1, "trainer__n_gpus_per_node": 1}


@pytest.mark.parametrize(
    ("trainer", "own"),
    [("one_step_off_policy", 10), ("fully_async_policy", 23)],
)
def test_an_asynchronous_trainer_needs_cpus_for_its_own_actors(
    trainer: str, own: int, model: Path, environ: dict[str, str]
) -> None:
    """3 for the trainer's device and 2 for the rollout's, and what verl's decorators say."""
    more = {"async_training": {"staleness_threshold": 0}} if own == 23 else {}
    config = job(model, **ASYNCHRONOUS, **more, **{f"{RAY}__num_gpus": 2, f"{RAY}__num_cpus": own + 4})
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 1
    (problem,) = problems(config, environ)
    assert f"{own + 5} in all ({own} for actors of the trainer), and this machine offers {own + 4}" in problem
    config.ray_kwargs.ray_init.num_cpus = own + 5
    assert problems(config, environ) == []


def test_an_npu_is_asked_for_as_the_resource_npu(
    model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another test may have imported torch, which is asked for its devices where it is there.
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    npu = {**environ, "VERL_PLATFORM": "npu"}
    config = job(model, ray_kwargs__ray_init__resources={"NPU": 8}, trainer__device="npu")
    assert not [problem for problem in problems(config, npu) if "Ray" in problem]
    config = job(model, ray_kwargs__ray_init__resources={"NPU": 0}, trainer__device="npu")
    found = problems(config, npu)
    assert [problem for problem in found if "verl asks Ray for 1 NPU" in problem], found


# Clusters


JOB_ON_GPUS = {
    "trainer__n_gpus_per_node": 8,
    "trainer__device": "cuda",
    f"{RAY}__num_gpus": None,
    f"{RAY}__num_cpus": None,
}
WITHOUT_PLATFORM = {"VERL_PLATFORM": ""}


def join(how: str, config: DictConfig, environ: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a job join a cluster in one of the ways that there are."""
    if how in ("address", "auto"):
        address = "auto" if how == "auto" else "10.0.0.1:6379"
        OmegaConf.update(config, "ray_kwargs.ray_init.address", address, force_add=True)
    if how in ("RAY_ADDRESS", "auto"):
        environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    elif how == "ray start":
        (folder / "ray").mkdir()
        (folder / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379", encoding="utf-8")
    elif how == "initialised":
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))


@pytest.mark.parametrize("how", ["address", "RAY_ADDRESS", "auto", "ray start", "initialised"])
def test_on_a_cluster_its_nodes_are_asked_and_not_this_machine(
    how: str, model: Path, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[Node]
) -> None:
    config = job(model, **JOB_ON_GPUS)
    assert len(problems(config, {**environ, **WITHOUT_PLATFORM})) == 2, "this machine has no GPU"
    join(how, config, environ, tmp_path, monkeypatch)
    assert problems(config, {**environ, **WITHOUT_PLATFORM}) == []
    nodes[:] = [node("10.0.0.1", {"CPU": 64.0, "GPU": 4.0}), node("10.0.0.2", {"CPU": 64.0, "GPU": 4.0})]
    (problem,) = problems(config, {**environ, **WITHOUT_PLATFORM})
    assert "verl asks Ray for 1 x 8 GPU with 24 CPUs, each on one node (trainer.n_gpus_per_node=8" in problem
    assert "has room for 0 (10.0.0.1 and 1 more have 4 GPU and 64 CPUs)" in problem


def test_on_a_cluster_an_actor_of_a_trainer_needs_one_node(
    nodes: list[Node], model: Path, environ: dict[str, str]
) -> None:
    config = job(model, **{**JOB_ON_GPUS, **ASYNCHRONOUS}, ray_kwargs__ray_init__address="10.0.0.1:6379")
    config.actor_rollout_ref.rollout.tensor_model_parallel_size = 1

    def found(*cpus: int) -> list[str]:
        nodes[:] = [node(f"10.0.0.{number}", {"GPU": 8.0, "CPU": float(has)}) for number, has in enumerate(cpus)]
        return problems(config, {**environ, **WITHOUT_PLATFORM})

    assert found(10, 5) == []
    for cpus, total in (((9, 9), 18), ((10, 4), 14)):
        (problem,) = found(*cpus)
        assert problem.startswith("verl asks Ray for 15 CPUs in all, 10 of them for this trainer's own actors")
        assert f"has {total} (" in problem and "--num-cpus" in problem


@pytest.mark.parametrize("how", ["address", "initialised"])
def test_what_contradicts_itself_is_refused_wherever_ray_runs(
    how: str, model: Path, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job(model, **JOB_ON_GPUS, actor_rollout_ref__rollout__engine_kwargs__ascend_safe={"kv_rung": "direct"})
    config.actor_rollout_ref.rollout.enable_sleep_mode = True
    join(how, config, environ, tmp_path, monkeypatch)
    (problem,) = problems(config, {**environ, **WITHOUT_PLATFORM})
    assert "kv_release=reallocate cannot work in sleep mode" in problem


def test_what_ray_does_not_take_when_it_joins_a_cluster(model: Path, environ: dict[str, str]) -> None:
    environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    (problem,) = problems(job(model), environ)
    assert problem.startswith(
        "the job would join the Ray cluster at 10.0.0.1:6379, where Ray takes no ray_kwargs.ray_init.num_cpus, "
        "ray_kwargs.ray_init.num_gpus: set to null"
    )


def test_a_cluster_that_does_not_answer(model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(joined: cluster.Joined) -> tuple[Node, ...]:
        raise cluster.ClusterError(f"{joined.words} cannot be joined (no): see whether it is up (`ray status`)")

    monkeypatch.setattr(cluster, "ask", ask)
    environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    config = job(model, **{**JOB_ON_GPUS, "trainer__device": "cpu"})
    (problem,) = problems(config, environ)
    assert problem.startswith("the Ray cluster at 10.0.0.1:6379 cannot be joined (no): ")


def test_an_actor_asks_nobody(model: Path, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`one_step_off_policy` validates its config in an actor: what is wrong in it still ends the job, by an error."""
    monkeypatch.setattr(cluster, "ask", lambda _: pytest.fail("asked"))
    environ |= {"RAY_RAYLET_PID": "1", "RAY_ADDRESS": "10.0.0.1:6379"}
    assert problems(job(model, trainer__device="cuda", trainer__n_gpus_per_node=99), environ) == []
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(preflight.PreflightError, match="verfy"):
        preflight.check_driver_config(
            job(model, actor_rollout_ref__rollout__engine_kwargs__ascend_safe={"verfy": "off"})
        )


# The driver on a head node without an accelerator


NPUS = [
    node("10.0.0.1", {"CPU": 8.0}),
    node(
        "10.0.0.2",
        {"CPU": 128.0, "NPU": 16.0},
        npu_smi=True,
        versions={"verl": metadata.version("verl"), "torch-npu": "2.10.0"},
        facts={"name": "npu", "soc": "A3", "versions": {"vllm": "0.23.0", "vllm-ascend": "0.23.0"}},
    ),
]


@pytest.mark.parametrize("how", [{"trainer__device": "npu"}, {"trainer__device": "cuda", "VERL_PLATFORM": "npu"}])
def test_a_head_without_an_accelerator_of_a_cluster_of_npus(
    how: dict[str, str], model: Path, environ: dict[str, str], nodes: list[Node]
) -> None:
    nodes[:] = NPUS
    environ["RAY_ADDRESS"] = "10.0.0.1:6379"
    environ["VERL_PLATFORM"] = how.pop("VERL_PLATFORM", "")
    assert problems(job(model, **{**JOB_ON_GPUS, **how}), environ) == []
    # The nodes' own chip and releases decide.
    config = job(model, **{**JOB_ON_GPUS, **how}, actor_rollout_ref__rollout__expert_parallel_size=2)
    config.actor_rollout_ref.rollout.engine_kwargs.vllm = {"additional_config": {"weight_nz_mode": 1}}
    config.actor_rollout_ref.rollout.enable_sleep_mode = True
    assert [problem for problem in problems(config, environ) if "weight_nz_mode=1 cannot work in sleep mode" in problem]


@pytest.mark.parametrize(
    ("device", "variable", "says"),
    [
        ("cpu", "", "this job is set up for trainer.device=cpu, and the Ray cluster at 10.0.0.1:6379 has NPU devices"),
        ("cuda", "", "trainer.device=cuda, and the devices are NPUs, which verl cannot see from this driver"),
        ("cpu", "npu", "VERL_PLATFORM=npu and trainer.device=cpu contradict each other"),
        ("npu", "cpu", "VERL_PLATFORM=cpu and trainer.device=npu contradict each other"),
    ],
)
def test_no_advice_leads_to_a_cpu_platform_on_nodes_with_npus(
    device: str, variable: str, says: str, model: Path, environ: dict[str, str], nodes: list[Node]
) -> None:
    nodes[:] = NPUS
    environ |= {"RAY_ADDRESS": "10.0.0.1:6379", "VERL_PLATFORM": variable}
    # As platform=cpu sets it: Ray's own numbers are wrong as well, and to null them is not what helps.
    config = job(model, trainer__device=device)
    found = problems(config, environ)
    assert found[0].startswith(says)
    assert not [problem for problem in found if "set to null" in problem]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plugin": None}, "the node 10.0.0.2 has no verl_ascend_rollout in the Python that Ray runs there (/usr/bin/"),
        ({"plugin": "0.0.1"}, "the node 10.0.0.2 has verl_ascend_rollout 0.0.1 in the Python that Ray runs there"),
        ({"loaded": False}, "on the node 10.0.0.2 verl would not load verl_ascend_rollout, which has no entry point"),
        (
            {"versions": {"verl": "0.1", "torch-npu": "2.10.0"}},
            "the node 10.0.0.2 has verl 0.1 in the Python that Ray runs there",
        ),
        ({"versions": {"torch-npu": "2.10.0"}}, "the node 10.0.0.2 has no verl in the Python that Ray runs there"),
        (
            {"versions": {"verl": metadata.version("verl")}},
            "the node 10.0.0.2 has 16 NPU and no torch-npu in the Python",
        ),
        ({"npu_smi": False}, "npu-smi is not on PATH on the node 10.0.0.2: verl runs it on every node with an NPU"),
    ],
)
def test_a_node_that_is_not_as_the_others_is_named(
    change: dict[str, Any], says: str, model: Path, environ: dict[str, str], nodes: list[Node]
) -> None:
    nodes[:] = [NPUS[0], node("10.0.0.2", dict(NPUS[1].resources), **{**NPUS[1].answer, **change})]
    environ |= {"RAY_ADDRESS": "10.0.0.1:6379", "VERL_PLATFORM": "npu"}
    (problem,) = problems(job(model, **{**JOB_ON_GPUS, "trainer__device": "npu"}), environ)
    assert problem.startswith(says)


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
    for target in ("verl.a.b", "verl.c.d"):
        drifted = Patch("verl.stand_in", target, print)
        monkeypatch.setitem(patch._drift, drifted, f"verl 9.9: {target} is gone")
    first, second = problems(job(model), environ)
    assert first.startswith("verl 9.9: verl.a.b is gone: use a release that the support matrix lists")
    assert second.startswith("verl 9.9: verl.c.d is gone: ")
    assert first.endswith("actor_rollout_ref.rollout.name=vllm")


# What comes out of an actor


def raised_in_an_actor(error: Exception) -> Exception:
    """What `ray.get` raises in the driver: Ray's error, which has the traceback of the actor as text."""
    try:
        try:
            raise ValueError("something below")
        except ValueError as cause:
            raise error from cause
    except Exception:
        text = traceback.format_exc()
    inner = RayTaskError("WorkerDict.update_weights", text, error, proctitle="ray::WorkerDict", pid=1, ip="10.0.0.2")
    outer: Exception = RayTaskError(
        "TaskRunner.run", str(inner), inner, proctitle="ray::TaskRunner", pid=2, ip="10.0.0.1"
    )
    return outer


def test_a_refusal_in_an_actor_is_the_last_line_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda function, *arguments: registered.append((function, arguments)))
    shut_down: list[bool] = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: shut_down.append(True)))
    sentence = "the weights of layer 3 did not come: train without"
    for error in (engine_args.PolicyError(sentence), preflight.PreflightError(sentence)):
        check = preflight.DriverCheck()
        check.on_job_end(
            config=None, job_return=JobReturn(status=JobStatus.FAILED, _return_value=raised_in_an_actor(error))
        )
        ((function, arguments),) = registered
        function(*arguments)
        assert capsys.readouterr().err == f"ascend_safe: {sentence}\n"
        assert shut_down.pop()
        registered.clear()


def test_an_error_of_somebody_elses_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atexit, "register", lambda *_: pytest.fail("said"))
    check = preflight.DriverCheck()
    failed = JobReturn(status=JobStatus.FAILED, _return_value=raised_in_an_actor(RuntimeError("no memory")))
    check.on_job_end(config=None, job_return=failed)
    check.on_job_end(config=None, job_return=JobReturn(status=JobStatus.COMPLETED, _return_value=None))


def test_a_verl_that_lacks_what_routing_replay_takes_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(preflight._routing_replay()) == []
    monkeypatch.setattr(preflight.probe, "installed", lambda: lambda file: None)
    (sentence,) = preflight._routing_replay()
    assert "enable_rollout_routing_replay=True cannot work with this verl and FSDP, since it lacks" in sentence
    assert "FSDPEngineWithLMHead.prepare_model_inputs(self, micro_batch)" in sentence and "set it to False" in sentence
