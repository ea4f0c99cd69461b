"""Contract: wherever verl decides by the rollout's name, `ascend_safe` is decided for as `vllm`.

First the places: the source of the installed verl is searched for every use of the constant "vllm" and for every read
of a rollout's name, and must match the tables below, so that a place that a new verl adds is a failure with its name.
(A comparison with "sglang" or "trtllm" alone cannot tell `ascend_safe` from `vllm`, and so needs no row.)
Then the behaviour: each place, with verl's real objects, is given the same input under both names.  Only the edges to
Ray and to the network are stand-ins.
"""

from __future__ import annotations

import ast
import asyncio
import copy
import functools
import importlib
import importlib.util
import pickle
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from verl_ascend_rollout import PATCHED, ROLLOUT_NAME
from verl_ascend_rollout.integration import patches
from verl_ascend_rollout.integration.patch import Patch, problems
from verl_ascend_rollout.integration.patches import names

BOTH = pytest.mark.parametrize("name", ["vllm", ROLLOUT_NAME])


# ------------------------------------------------------------------------------------------------ the places in verl


@dataclass(frozen=True)
class Place:
    """A function of verl that uses the constant or reads the name, and why that is right for us.

    Attributes:
        file, function: where, relative to the package `verl`; the function is empty for a module's own body.
        times: how often.
        handled: what happens there for `ascend_safe`.
        patch: `module:attribute` of the patch in `names.PATCHES` that handles it, if one does.
    """

    file: str
    function: str
    times: int
    handled: str
    patch: str | None = None


COMPARISONS = (
    Place(
        "checkpoint_engine/base.py",
        "CheckpointEngineWorker.__init__",
        1,
        "delta_sharded allowed",
        "verl.checkpoint_engine.base:CheckpointEngineWorker.__init__",
    ),
    Place(
        "experimental/reward_loop/reward_loop.py",
        "RewardLoopWorker.compute_score_disrm",
        1,
        "the worker's config says vllm",
        "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.__init__",
    ),
    Place(
        "utils/config.py",
        "validate_config",
        1,
        "validates a copy that says vllm",
        "verl.utils.config:validate_config",
    ),
    Place(
        "workers/config/distillation.py",
        "DistillationTeacherModelConfig._validate_topk_logprobs",
        1,
        "the teacher's config says vllm meanwhile",
        "verl.workers.config.distillation:DistillationTeacherModelConfig._validate_topk_logprobs",
    ),
    Place(
        "workers/config/rollout.py",
        "RolloutConfig.__post_init__",
        2,
        "the config says vllm meanwhile",
        "verl.workers.config.rollout:RolloutConfig.__post_init__",
    ),
    Place(
        "workers/rollout/llm_server.py",
        "LLMServerClient.generate",
        1,
        "the client's config says vllm",
        "verl.workers.rollout.llm_server:LLMServerClient.__init__",
    ),
    Place(
        "workers/rollout/replica.py",
        "get_rollout_replica_class",
        1,
        "answers with our prefill/decode replica",
        "verl.workers.rollout.replica:get_rollout_replica_class",
    ),
)
"""Where verl 0.9.1 compares something with "vllm": `==`, `in`, `match`."""

OTHER_USES = (
    Place(
        "checkpoint_engine/kimi_checkpoint_engine.py",
        "KIMICheckpointEngine.init_process_group",
        1,
        "a torch.distributed back end that is called so",
    ),
    Place("third_party/vllm/__init__.py", "", 1, "the Python distribution"),
    Place("utils/import_utils.py", "is_vllm_available", 1, "the Python module"),
    Place("utils/vllm/utils.py", "is_version_ge", 1, "the Python distribution"),
    Place("utils/vllm/vllm_quant_utils.py", "_get_vllm_version", 1, "the Python distribution"),
    Place(
        "workers/config/distillation.py",
        "DistillationTeacherModelConfig._validate_topk_logprobs",
        2,
        "the key in engine_kwargs, which our rollout shares",
    ),
    Place("workers/rollout/base.py", "", 1, "the registry; plugin.py adds our name"),
    Place("workers/rollout/replica.py", "", 1, "the registry; plugin.py adds our name"),
    Place("workers/rollout/replica.py", "_load_sglang", 2, "the Python module; another engine"),
    Place("workers/rollout/vllm_rollout/__init__.py", "", 1, "the Python distribution"),
    Place(
        "workers/rollout/vllm_rollout/vllm_async_server.py",
        "vLLMHttpServer._get_engine_kwargs_key",
        1,
        "inherited: engine_kwargs.vllm is ours too",
    ),
    Place(
        "workers/rollout/vllm_rollout/vllm_async_server.py",
        "vLLMReplica._get_server_name_prefix",
        1,
        "overridden: the actor's name starts with ascend_safe_",
    ),
    Place(
        "workers/rollout/vllm_rollout/vllm_pd_replica.py",
        "vLLMPDReplica.launch_servers",
        2,
        "overridden: the actor's name starts with ascend_safe_",
    ),
    Place(
        "workers/rollout/vllm_rollout/vllm_rollout.py",
        "ServerAdapter._get_server_name_prefix",
        1,
        "overridden: the actor's name starts with ascend_safe_",
    ),
)
"""Every other "vllm", and every name that is put together from "vllm_" (Ray actors)."""

NAME_READS = (
    Place("checkpoint_engine/base.py", "CheckpointEngineWorker.__init__", 3, "see COMPARISONS; registry; message"),
    Place(
        "experimental/fully_async_policy/fully_async_rollouter.py",
        "FullyAsyncLLMServerManager._initialize_llm_servers",
        1,
        "label only, no behaviour: what verl prints about Prometheus",
    ),
    Place("experimental/reward_loop/reward_loop.py", "RewardLoopWorker.compute_score_disrm", 1, "see COMPARISONS"),
    Place(
        "experimental/reward_loop/reward_model.py",
        "RewardModelManager._initialize_llm_servers",
        1,
        "look-up in the registry: our replica",
    ),
    Place(
        "experimental/teacher_loop/teacher_model.py",
        "TeacherModelManager._initialize_llm_servers",
        1,
        "look-up in the registry: our replica",
    ),
    Place("trainer/main_generation_server.py", "start_server", 1, "look-up in the registry: our replica"),
    Place(
        "trainer/ppo/v1/trainer_separate_async.py",
        "PPOTrainerSeparateAsync._setup",
        1,
        "label only, no behaviour: what verl prints about Prometheus",
    ),
    Place("utils/config.py", "validate_config", 1, "see COMPARISONS"),
    Place(
        "workers/config/distillation.py",
        "DistillationTeacherModelConfig._validate_topk_logprobs",
        1,
        "see COMPARISONS",
    ),
    Place("workers/config/rollout.py", "RolloutConfig.__post_init__", 9, "see COMPARISONS; trtllm only; messages"),
    Place("workers/engine_workers.py", "ActorRolloutRefWorker.init_model", 1, "look-up in the registry: our adapter"),
    Place("workers/engine_workers.py", "ActorRolloutRefWorker.update_weights", 1, "sglang only"),
    Place("workers/rollout/llm_server.py", "LLMServerClient.generate", 2, "see COMPARISONS; sglang only"),
    Place(
        "workers/rollout/llm_server.py",
        "LLMServerManager.__init__",
        1,
        "look-up in the registry, or our prefill/decode replica",
    ),
    Place(
        "workers/rollout/llm_server.py",
        "LLMServerManager._initialize_llm_servers",
        4,
        "trtllm only; label only, no behaviour: what verl prints about Prometheus, and rl-insight's job",
    ),
    Place(
        "workers/rollout/vllm_rollout/vllm_rollout.py",
        "ServerAdapter._get_server_name_prefix",
        1,
        "overridden: the actor's name starts with ascend_safe_",
    ),
)
"""Where verl 0.9.1 reads the name of a rollout's config."""


class Search(ast.NodeVisitor):
    """Counts, for one file, the comparisons, the other uses and the reads, by function."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.scope: list[str] = []
        # A Counter adds up without the functions whose count is 0.
        self.comparisons: Counter[tuple[str, str]] = Counter()
        self.other_uses: Counter[tuple[str, str]] = Counter()
        self.name_reads: Counter[tuple[str, str]] = Counter()

    @property
    def here(self) -> tuple[str, str]:
        return self.file, ".".join(self.scope)

    def _enter(self, node: Any) -> None:
        # Defaults belong to the function that has them.
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _enter

    def visit_Compare(self, node: ast.Compare) -> None:
        sides = [node.left, *node.comparators]
        if any(self._is_vllm(leaf) for side in sides for leaf in self._leaves(side)):
            self.comparisons[self.here] += 1
        for side in sides:
            if not all(isinstance(leaf, ast.Constant) for leaf in self._leaves(side)):
                self.visit(side)

    def visit_MatchValue(self, node: ast.MatchValue) -> None:
        if self._is_vllm(node.value):
            self.comparisons[self.here] += 1

    def visit_Constant(self, node: ast.Constant) -> None:
        actor_name = isinstance(node.value, str) and (node.value == "vllm_" or node.value.startswith("vllm_server"))
        self.other_uses[self.here] += self._is_vllm(node) or actor_name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "name" and self._is_rollout(node.value):
            self.name_reads[self.here] += 1
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function, arguments = node.func, node.args
        asks_name = bool(arguments) and isinstance(arguments[0], ast.Constant) and arguments[0].value == "name"
        if asks_name and isinstance(function, ast.Attribute) and function.attr == "get":
            self.name_reads[self.here] += self._is_rollout(function.value)
        if ast.unparse(function) == "getattr" and ast.unparse(arguments[1]) == "'name'":
            self.name_reads[self.here] += self._is_rollout(arguments[0])
        self.generic_visit(node)

    def _is_rollout(self, node: ast.expr) -> bool:
        """Whether the expression is a rollout's config, by what verl calls those."""
        called = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if called == "self":
            return self.scope[:1] == ["RolloutConfig"]
        if called == "config":
            return self.file.startswith("workers/rollout/")
        return "rollout" in called or called == "inference"

    @staticmethod
    def _is_vllm(node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value == "vllm"

    @staticmethod
    def _leaves(node: ast.expr) -> list[ast.expr]:
        return node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]


@pytest.fixture(scope="module")
def found() -> Search:
    """The whole of the installed verl, searched.  Nothing of it is imported."""
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    total = Search("")
    for path in sorted(root.rglob("*.py")):
        search = Search(path.relative_to(root).as_posix())
        search.visit(ast.parse(path.read_text(encoding="utf-8")))
        total.comparisons += search.comparisons
        total.other_uses += search.other_uses
        total.name_reads += search.name_reads
    return total


@pytest.mark.parametrize(
    ("kind", "table"),
    [("comparisons", COMPARISONS), ("other_uses", OTHER_USES), ("name_reads", NAME_READS)],
    ids=["comparisons", "other uses", "name reads"],
)
def test_every_place_in_verl_is_in_the_table(kind: str, table: tuple[Place, ...], found: Search) -> None:
    expected = {(place.file, place.function): place.times for place in table}
    assert len(expected) == len(table)
    in_verl = dict(getattr(found, kind))
    new = {place: times for place, times in in_verl.items() if expected.get(place) != times}
    gone = {place: times for place, times in expected.items() if in_verl.get(place) != times}
    assert in_verl == expected, f"verl has drifted: it now has {new}, where the table has {gone}"


def test_the_search_finds_what_it_is_for() -> None:
    search = Search("workers/rollout/example.py")
    search.visit(
        ast.parse(
            "def f(rollout, config, kwargs):\n"
            "    if rollout.name == 'vllm' or 'vllm' != config.get('name'): pass\n"
            "    if rollout.name in ('sglang', 'vllm') or getattr(rollout, 'name') not in {'vllm'}: pass\n"
            "    match rollout.name:\n"
            "        case 'sglang' | 'vllm': kwargs['vllm'] = f'vllm_server_{config.rank}'\n"
            "    if rollout.name == 'sglang': return kwargs.get('vllm') == 'fp8'\n"
        )
    )
    here = ("workers/rollout/example.py", "f")
    assert +search.comparisons == {here: 5}
    assert +search.other_uses == {here: 3}
    assert +search.name_reads == {here: 6}


def test_every_patch_that_is_required_belongs_to_a_comparison() -> None:
    named = {place.patch for place in COMPARISONS}
    assert None not in named
    assert named == {f"{patch.module}:{patch.attribute}" for patch in names.PATCHES}


# ------------------------------------------------------------------------------------------------------ the behaviour


def outcome(function: Callable[[], Any]) -> Any:
    """What the call returned, or its exception's type and text: equal for both names, or the contract is broken."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    patches.install()


@pytest.fixture(scope="module")
def job_config() -> Callable[..., Any]:
    """Composes verl's own job config, as `python -m verl.trainer.main_ppo` does."""
    from hydra import compose, initialize_config_module

    def make(name: str, *overrides: str) -> Any:
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose(
                "ppo_trainer",
                overrides=[
                    f"actor_rollout_ref.rollout.name={name}",
                    "trainer.nnodes=1",
                    "trainer.n_gpus_per_node=1",
                    "actor_rollout_ref.actor.use_dynamic_bsz=true",
                    *overrides,
                ],
            )

    return make


@pytest.fixture
def preflight(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that our own pre-flight check was given; the check itself is tested elsewhere."""
    checked: list[Any] = []
    module = types.ModuleType("verl_ascend_rollout.integration.preflight")
    module.check_driver_config = checked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return checked


def test_every_patch_fits_this_verl_and_is_applied_once() -> None:
    def current(patch: Patch) -> Any:
        value: Any = importlib.import_module(patch.module)
        for part in patch.attribute.split("."):
            value = getattr(value, part)
        return value

    before = {patch: current(patch) for patch in names.PATCHES}
    patches.install()
    for patch, function in before.items():
        assert getattr(function, PATCHED).count(patch.name) == 1, patch
        assert current(patch) is function, patch
    assert problems() == ()


@pytest.mark.parametrize(
    "importer",
    [
        "verl.utils:validate_config",
        "verl.trainer.main_ppo:validate_config",
        "verl.workers.rollout.llm_server:get_rollout_replica_class",
        "verl.experimental.reward_loop.reward_model:get_rollout_replica_class",
        "verl.experimental.teacher_loop.teacher_model:get_rollout_replica_class",
        "verl.workers.engine.fsdp.transformer_impl:unfuse_moe_params",
    ],
)
def test_who_imports_a_patched_function_by_name_gets_the_patched_one(importer: str) -> None:
    module, name = importer.split(":")
    assert getattr(getattr(importlib.import_module(module), name), PATCHED, False)


# --- RolloutConfig


def test_pipeline_parallel_is_refused_as_for_vllm() -> None:
    from verl.workers.config import RolloutConfig

    stock, ours = (
        outcome(functools.partial(RolloutConfig, name=name, pipeline_model_parallel_size=2))
        for name in ("vllm", ROLLOUT_NAME)
    )
    assert ours == stock
    assert stock[0] is NotImplementedError


def test_pipeline_parallel_is_refused_when_the_config_comes_from_hydra(job_config: Callable[..., Any]) -> None:
    from verl.utils.config import omega_conf_to_dataclass

    def build(name: str) -> Any:
        config = job_config(name, "actor_rollout_ref.rollout.pipeline_model_parallel_size=2")
        return omega_conf_to_dataclass(config.actor_rollout_ref.rollout)

    stock, ours = (outcome(functools.partial(build, name)) for name in ("vllm", ROLLOUT_NAME))
    assert ours == stock
    assert "pipeline_model_parallel_size > 1" in stock[1]


@BOTH
def test_disaggregation_is_allowed_and_the_name_stays(name: str) -> None:
    from verl.workers.config import RolloutConfig

    config = RolloutConfig(name=name, disaggregation={"enabled": True, "decode_replicas": 2})
    assert (config.name, config.disaggregation.enabled, config.disaggregation.decode_replicas) == (name, True, 2)


def test_other_rollouts_are_validated_as_before() -> None:
    from verl.workers.config import RolloutConfig

    assert RolloutConfig(name="hf", pipeline_model_parallel_size=2).name == "hf"
    with pytest.raises(ValueError, match="got 'hf'"):
        RolloutConfig(name="hf", disaggregation={"enabled": True})
    with pytest.raises(NotImplementedError, match=r"self\.name='sglang'"):
        RolloutConfig(name="sglang", pipeline_model_parallel_size=2)
    assert RolloutConfig(name="trtllm", moe_tensor_parallel_size=2, tensor_model_parallel_size=2).name == "trtllm"


# --- validate_config


@pytest.mark.parametrize("lora", ["actor_rollout_ref.model.lora_rank=1024", "actor_rollout_ref.model.lora_rank=8"])
def test_lora_rank_is_checked_in_the_driver_as_for_vllm(
    lora: str, job_config: Callable[..., Any], preflight: list[Any]
) -> None:
    from verl.utils.config import validate_config

    results = []
    for name in ("vllm", ROLLOUT_NAME):
        config = job_config(name, lora, "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=1")
        before = copy.deepcopy(config)
        results.append(
            outcome(lambda c=config: validate_config(config=c, use_reference_policy=False, use_critic=False))
        )
        # Ours is a check of a copy: that loses nothing only as long as verl's check changes nothing.
        assert config == before
        assert preflight == ([] if name == "vllm" else [config])
    assert results[0] == results[1]
    if lora.endswith("1024"):
        assert results[0][0] is ValueError and "lora_rank must be less than or equal to" in results[0][1]
    else:
        assert results[0] is None


# --- LLMServerClient


class Remote:
    """Stands in for one method of a Ray actor handle."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            return self.answer(*args, **kwargs)

        return asyncio.get_running_loop().create_task(call())


def request(config: Any, client_class: Any, **kwargs: Any) -> dict[str, Any]:
    """Send one request through a client; returns what the rollout server was asked for."""
    from verl.workers.rollout.replica import TokenOutput

    asked: list[dict[str, Any]] = []

    def generate(**given: Any) -> Any:
        asked.append(given)
        return TokenOutput(token_ids=[7], log_probs=[-0.5], stop_reason="completed")

    server = types.SimpleNamespace(generate=Remote(generate))
    balancer = types.SimpleNamespace(
        require_acquire_fields=Remote(lambda: []),
        require_release_fields=Remote(lambda: []),
        acquire_server=Remote(lambda **_: ("server-0", server)),
        release_server=Remote(lambda **_: None),
    )
    client = client_class(config=config, load_balancer_handle=balancer)
    asyncio.run(client.generate("request-1", prompt_ids=[1, 2], sampling_params={"max_tokens": 1}, **kwargs))
    (given,) = asked
    return given


@pytest.mark.parametrize("client", ["LLMServerClient", "FullyAsyncLLMServerClient"])
@pytest.mark.parametrize("determinism", ["false", "true"])
def test_a_requests_priority_arrives(client: str, determinism: str, job_config: Callable[..., Any]) -> None:
    from verl.workers.rollout import llm_server

    asked = []
    for name in ("vllm", ROLLOUT_NAME, "sglang"):
        config = job_config(name, f"++actor_rollout_ref.rollout.full_determinism={determinism}")
        asked.append(request(config, getattr(llm_server, client), priority=3, video_data=["frame"]))
        assert config.actor_rollout_ref.rollout.name == name
    stock, ours, sglang = asked
    assert (stock["priority"], stock["video_data"]) == (3, ["frame"])
    if determinism == "false":
        assert stock.pop("request_id") != ours.pop("request_id")
    assert ours == stock
    assert "priority" not in sglang and sglang["video_data"] is None


def test_the_clients_view_of_the_config_differs_in_the_name_only_and_travels(job_config: Callable[..., Any]) -> None:
    from omegaconf import OmegaConf
    from verl.workers.rollout.llm_server import LLMServerClient

    config = job_config(ROLLOUT_NAME)
    client = pickle.loads(pickle.dumps(LLMServerClient(config=config)))
    theirs, ours = (OmegaConf.to_container(c, resolve=False) for c in (client.config, config))
    assert theirs["actor_rollout_ref"]["rollout"].pop("name") == "vllm"
    assert ours["actor_rollout_ref"]["rollout"].pop("name") == ROLLOUT_NAME
    assert theirs == ours


def test_the_client_uses_its_config_only_for_what_we_know() -> None:
    """The client's copy of the config is right only while nobody takes a name for a look-up out of it."""
    import inspect

    from verl.workers.rollout import llm_server

    reads = set()
    for client in (llm_server.LLMServerClient, llm_server.FullyAsyncLLMServerClient):
        for node in ast.walk(ast.parse(inspect.getsource(client))):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("self.config."):
                reads.add(ast.unparse(node))
    assert reads == {
        "self.config.actor_rollout_ref",
        "self.config.actor_rollout_ref.rollout",
        "self.config.actor_rollout_ref.rollout.name",
        "self.config.async_training",
        "self.config.async_training.partial_rollout",
    }


def test_a_client_whose_config_has_no_rollout_section_still_works() -> None:
    from verl.workers.rollout.llm_server import LLMServerClient

    stub = types.SimpleNamespace()
    assert LLMServerClient(config=stub).config is stub


# --- reward models


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A word-level tokenizer of a few words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[UNK]", "[EOS]", "one", "two", "three"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]", pad_token="[EOS]")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    path = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(path)
    return str(path)


def score(config: Any) -> Any:
    """Score one response by a discriminative reward model: the endpoint, the payload and the score."""
    import numpy as np
    import torch
    from verl import DataProto
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    worker = RewardLoopWorker(config, reward_router_address="nowhere:1")
    posted = []

    async def post(payload: dict[str, Any], endpoint: str) -> dict[str, Any]:
        posted.append((endpoint, payload))
        return {"data": [{"probs": [0.25, 0.75], "embedding": [0.5]}]}

    worker._post_request = post
    data = DataProto.from_dict(
        tensors={"responses": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 1, 1]])},
        non_tensors={"raw_prompt": np.array([[{"role": "user", "content": "one"}]], dtype=object)},
    )
    result = asyncio.run(worker.compute_score(data))
    return posted, result


def test_a_reward_model_is_asked_as_for_vllm(job_config: Callable[..., Any], tokenizer_path: str) -> None:
    def run(name: str) -> Any:
        config = job_config(
            "vllm",
            f"actor_rollout_ref.model.path={tokenizer_path}",
            "reward.reward_model.enable=true",
            f"reward.reward_model.model_path={tokenizer_path}",
            f"reward.reward_model.rollout.name={name}",
        )
        result = outcome(lambda: score(config))
        assert config.reward.reward_model.rollout.name == name
        return result

    stock, ours, sglang, unknown = (run(name) for name in ("vllm", ROLLOUT_NAME, "sglang", "hf"))
    posted, result = stock
    assert (posted[0][0], result) == ("classify", {"reward_score": 0.75})
    assert ours == stock
    assert sglang[0][0][0] == "v1/embeddings"
    assert unknown == (NotImplementedError, "RewardLoopManager does not support hf")


# --- distillation


@pytest.mark.parametrize("user", [None, 16, 128], ids=["unset", "too few", "enough"])
def test_a_teachers_top_k_is_prepared_as_for_vllm(user: int | None) -> None:
    from verl.workers.config import DistillationTeacherModelConfig, RolloutConfig

    def prepare(name: str) -> Any:
        kwargs = {} if user is None else {"vllm": {"max_logprobs": user}}
        teacher = DistillationTeacherModelConfig(
            key="default", model_path="model", inference=RolloutConfig(name=name, engine_kwargs=kwargs)
        )
        error = outcome(lambda: teacher.validate_and_prepare_for_distillation(use_topk=True, topk=64))
        assert teacher.inference.name == name
        return error, teacher.inference.engine_kwargs, teacher.inference.prompt_length

    stock, ours = prepare("vllm"), prepare(ROLLOUT_NAME)
    assert ours == stock
    if user == 16:
        assert stock[0][0] is ValueError
    else:
        assert stock[:2] == (None, {"vllm": {"max_logprobs": user or 64}})
    assert prepare("hf")[0] == (
        NotImplementedError,
        "DistillationTeacherModelConfig does not support inference engine hf",
    )


# --------------------------------------------------------------------- with our own classes, whose import needs vLLM


@pytest.fixture
def one_process_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The environment that verl gives a worker, and the one question to Ray that its constructors ask."""
    import ray

    context = types.SimpleNamespace(get_job_id=lambda: "job", get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)

    def rank(rank: int = 0, world_size: int = 1, local_world_size: int | None = None) -> None:
        for variable, value in {
            "RANK": rank,
            "WORLD_SIZE": world_size,
            "RAY_LOCAL_WORLD_SIZE": local_world_size or world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 1,
        }.items():
            monkeypatch.setenv(variable, str(value))

    rank()
    yield rank


@BOTH
@pytest.mark.parametrize("backend", ["naive", "delta_sharded"])
@pytest.mark.parametrize("given", [False, True], ids=["adapter made", "adapter given"])
def test_delta_sharded_is_allowed_and_the_adapter_is_the_rollouts_own(
    name: str, backend: str, given: bool, monkeypatch: pytest.MonkeyPatch, one_process_job: Callable[..., None]
) -> None:
    from verl.checkpoint_engine import base
    from verl.workers.config import CheckpointEngineConfig, RolloutConfig
    from verl.workers.rollout.base import get_rollout_class

    monkeypatch.setattr(base.CheckpointEngineRegistry, "new", lambda backend, **_: backend)
    monkeypatch.setattr(base, "initialize_global_process_group_ray", lambda **_: None)
    config = RolloutConfig(
        name=name, tensor_model_parallel_size=1, checkpoint_engine=CheckpointEngineConfig(backend=backend)
    )
    mine = object() if given else None
    worker = base.CheckpointEngineWorker(config, "model config", mine, **({} if given else {"replica_rank": 4}))
    assert worker.rollout_config is config and config.name == name
    assert worker.checkpoint_engine == backend
    if given:
        assert worker.server_adapter is mine
    else:
        assert type(worker.server_adapter) is get_rollout_class(name)
        assert worker.server_adapter.config is config
        assert worker.get_replica_rank() == 4


def test_delta_sharded_stays_refused_for_a_rollout_without_it(one_process_job: Callable[..., None]) -> None:
    from verl.checkpoint_engine import base
    from verl.workers.config import CheckpointEngineConfig, RolloutConfig

    config = RolloutConfig(name="trtllm", checkpoint_engine=CheckpointEngineConfig(backend="delta_sharded"))
    with pytest.raises(NotImplementedError, match="'trtllm'; use sglang or vllm"):
        base.CheckpointEngineWorker(config, "model config")


def test_the_prefill_decode_replica_is_ours() -> None:
    from verl.workers.rollout.replica import get_rollout_replica_class
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMReplica
    from verl.workers.rollout.vllm_rollout.vllm_pd_replica import vLLMPDReplica

    from verl_ascend_rollout.integration.pd_replica import AscendSafePDReplica
    from verl_ascend_rollout.integration.replica import AscendSafeReplica

    assert get_rollout_replica_class(ROLLOUT_NAME) is AscendSafeReplica
    assert get_rollout_replica_class(ROLLOUT_NAME, disaggregation_enabled=True) is AscendSafePDReplica
    assert issubclass(AscendSafePDReplica, vLLMPDReplica)
    assert get_rollout_replica_class("vllm") is vLLMReplica
    assert get_rollout_replica_class("vllm", disaggregation_enabled=True) is vLLMPDReplica
    with pytest.raises(NotImplementedError, match="got 'trtllm'"):
        get_rollout_replica_class("trtllm", disaggregation_enabled=True)


def test_engine_kwargs_for_vllm_stay_valid() -> None:
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    from verl_ascend_rollout.integration.server import AscendSafeHttpServer

    assert issubclass(AscendSafeHttpServer, vLLMHttpServer)
    assert AscendSafeHttpServer._get_engine_kwargs_key is vLLMHttpServer._get_engine_kwargs_key
    assert AscendSafeHttpServer._get_engine_kwargs_key(object.__new__(AscendSafeHttpServer)) == "vllm"


def launched_names(replica: Any, nodes: int = 1) -> list[str]:
    """The Ray actor names that a replica's own `launch_servers` gives to its servers, with Ray's edge faked."""
    names: list[str] = []
    nothing = Remote(lambda *_, **__: None)
    server = types.SimpleNamespace(
        get_master_address=Remote(lambda: ("127.0.0.1", 1, 2)),
        get_server_address=Remote(lambda: ("127.0.0.1", 3)),
        launch_server=nothing,
        set_pd_peer=nothing,
    )

    class ServerClass:
        def options(self, name: str, **_: Any) -> Any:
            names.append(name)
            return types.SimpleNamespace(remote=lambda **_: server)

    per_node = replica.world_size // nodes
    pd = replica.config.disaggregation.enabled
    replica.server_class = ServerClass()
    replica.workers = [
        types.SimpleNamespace(
            __ray_call__=Remote(
                lambda _, rank=rank: (f"{1 + rank // per_node:056x}", str(rank), *(["127.0.0.1"] if pd else []))
            )
        )
        for rank in range(replica.world_size)
    ]
    asyncio.run(replica.launch_servers())
    return names


def asked_names(config: Any, ranks: int, per_node: int, rank: Callable[..., None], monkeypatch: Any) -> list[str]:
    """The Ray actor names that the adapters of `ranks` trainer processes look for."""
    import ray

    from verl_ascend_rollout.integration.adapter import AscendSafeServerAdapter

    names: list[str] = []

    def get_actor(name: str, *_: Any, **__: Any) -> object:
        names.append(name)
        return object()

    monkeypatch.setattr(ray, "get_actor", get_actor)
    for number in range(ranks):
        rank(number, ranks, per_node)
        AscendSafeServerAdapter(config, "model config", None)._ensure_server_handle()
    return names


@pytest.fixture
def replica_of() -> Callable[..., Any]:
    from verl.workers.config import RolloutConfig

    def make(kind: str, rank: int = 0, **options: Any) -> Any:
        from verl_ascend_rollout.integration import pd_replica

        flags = {
            key: options.pop(key) for key in ("is_reward_model", "is_teacher_model", "name_suffix") if key in options
        }
        per_node = options.pop("gpus_per_node", 8)
        config = RolloutConfig(name=ROLLOUT_NAME, tensor_model_parallel_size=options.pop("tp", 1), **options)
        return getattr(pd_replica, kind)(rank, config, "model config", gpus_per_node=per_node, **flags)

    return make


@pytest.mark.parametrize(("tp", "per_node", "nodes"), [(1, 8, 1), (2, 8, 1), (2, 1, 2)])
def test_adapter_and_replica_agree_on_the_servers_name(
    tp: int,
    per_node: int,
    nodes: int,
    replica_of: Callable[..., Any],
    one_process_job: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replicas = [replica_of("AscendSafeReplica", rank, tp=tp, gpus_per_node=per_node) for rank in range(2)]
    launched = [name for replica in replicas for name in launched_names(replica, nodes)]
    asked = asked_names(replicas[0].config, 2 * tp, min(2 * tp, per_node), one_process_job, monkeypatch)
    assert launched == [f"ascend_safe_server_{rank}_{node}" for rank in range(2) for node in range(nodes)]
    assert asked == ["ascend_safe_server_0_0", "ascend_safe_server_1_0"]


@pytest.mark.parametrize("kind", ["reward", "teacher"])
def test_reward_and_teacher_servers_have_the_same_prefix(
    kind: str, replica_of: Callable[..., Any], one_process_job: Callable[..., None]
) -> None:
    replica = replica_of("AscendSafeReplica", 1, name_suffix="math", **{f"is_{kind}_model": True})
    assert launched_names(replica) == [f"ascend_safe_server_{kind}_1_0_math"]


def test_prefill_and_decode_servers_are_found_by_the_adapter(
    replica_of: Callable[..., Any], one_process_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = replica_of("AscendSafePDReplica", tp=2, disaggregation={"enabled": True, "decode_replicas": 2})
    launched = launched_names(replica)
    asked = asked_names(replica.config, replica.world_size, replica.world_size, one_process_job, monkeypatch)
    assert launched == ["ascend_safe_server_0_0", "ascend_safe_server_decode_0_0", "ascend_safe_server_decode_0_1"]
    assert asked == launched
