"""Where verl asks "is the rollout vllm?", `ascend_safe` is answered for as `vllm`.

verl decides a few things by comparing the rollout's name with the constant "vllm".  Our rollout is verl's vLLM rollout
under another name, so each of these places would refuse it, or, worse, take the other branch without a word.  Here is
each of them that a subclass of ours cannot decide instead.  tests/contract/test_verl_rollout_name.py searches the
installed verl for every such place and fails where one is added.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException

from verl_ascend_rollout import ROLLOUT_NAME
from verl_ascend_rollout.integration.patch import Patch, assert_intact, patch_of

PATCHES: list[Patch] = []

STOCK_NAME = "vllm"
"""The name that verl compares with."""

ACTOR_ROLLOUT = ("actor_rollout_ref", "rollout")
REWARD_ROLLOUT = ("reward", "reward_model", "rollout")


def _is_ours(name: object) -> bool:
    """Whether this is our rollout.

    Raises:
        DriftError: when it is and a patch did not fit: better no run than one that is wrong in silence.
    """
    if name != ROLLOUT_NAME:
        return False
    assert_intact()
    return True


def _name_in(config: Any, path: tuple[str, ...]) -> object:
    """Return the rollout's name under `path`; `None` where there is none (which verl says, or does not mind)."""
    try:
        for key in (*path, "name"):
            config = getattr(config, key)
    except (AttributeError, OmegaConfBaseException):
        return None
    return config


def _set_name(rollout: Any, name: str) -> None:
    """Set the name in a rollout config, which is read-only: a frozen dataclass of verl's, or an OmegaConf node."""
    if isinstance(rollout, DictConfig):
        with flag_override(rollout, ["readonly", "struct"], [False, False]):
            rollout.name = name
    else:
        object.__setattr__(rollout, "name", name)


@contextlib.contextmanager
def _shown_as_vllm(rollout: Any) -> Iterator[None]:
    """Within the block, the name in this rollout config reads "vllm"."""
    _set_name(rollout, STOCK_NAME)
    try:
        yield
    finally:
        _set_name(rollout, ROLLOUT_NAME)


def _copy_as_vllm(config: Any, path: tuple[str, ...]) -> Any:
    """Return a copy of a whole job config (about 50 ms) in which the rollout under `path` is called "vllm"."""
    copied = copy.deepcopy(config)
    _set_name(functools.reduce(getattr, path, copied), STOCK_NAME)
    return copied


@patch_of(PATCHES, "verl.workers.config.rollout:RolloutConfig.__post_init__", "self")
def validate_rollout_config(original: Callable[..., None], self: Any) -> None:
    """Validate the rollout config as vLLM's.

    Without the patch pipeline_model_parallel_size > 1 is not refused, and disaggregation is: verl guards against the
    one and allows the other by name (workers/config/rollout.py:320, :341).  Remove when verl asks what a rollout can,
    not what it is called.
    """
    if not _is_ours(self.name):
        return original(self)
    with _shown_as_vllm(self):
        original(self)


@patch_of(PATCHES, "verl.utils.config:validate_config", "config")
def check_job(original: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
    """Check a job's config in the driver: first what only we know, then verl's checks, as for vLLM.

    Without the patch a LoRA rank that vLLM cannot have fails only in the rollout server, minutes later: verl checks it
    by name (utils/config.py:212).  Remove when verl asks what a rollout can, not what it is called.
    """
    if _name_in(config, ACTOR_ROLLOUT) != ROLLOUT_NAME:
        return original(config, *args, **kwargs)
    from verl_ascend_rollout.integration.preflight import check_driver_config

    # Before assert_intact: the pre-flight check reports bad input in one sentence, without a traceback.
    check_driver_config(config)
    assert_intact()
    original(_copy_as_vllm(config, ACTOR_ROLLOUT), *args, **kwargs)


@patch_of(PATCHES, "verl.workers.rollout.llm_server:LLMServerClient.__init__", "self", "config")
def send_priorities(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Let the client of the rollout servers, and its subclasses, see a job config that says "vllm".

    Without the patch priorities are dropped in silence, and with them scheduling_policy=priority and the order that
    full_determinism needs: verl passes a request's priority by name (workers/rollout/llm_server.py:148).  Remove when
    verl asks what a rollout can, not what it is called.

    The client reads its config and hands it to nobody (:62-353).  It is pickled into the agent-loop workers together
    with this copy.
    """
    original(self, *args, **kwargs)
    if _is_ours(_name_in(self.config, ACTOR_ROLLOUT)):
        self.config = _copy_as_vllm(self.config, ACTOR_ROLLOUT)


@patch_of(PATCHES, "verl.workers.rollout.replica:get_rollout_replica_class", "rollout", "disaggregation_enabled")
def pick_replica(
    original: Callable[..., Any], rollout: str, disaggregation_enabled: bool = False, **kwargs: Any
) -> Any:
    """Answer with our prefill/decode replica; everything else is in verl's registry.

    Without the patch disaggregation raises NotImplementedError: verl picks the prefill/decode replica by name
    (workers/rollout/replica.py:411).  Remove when verl asks what a rollout can, not what it is called.
    """
    if _is_ours(rollout) and disaggregation_enabled:
        from verl_ascend_rollout.integration.pd_replica import AscendSafePDReplica

        return AscendSafePDReplica
    return original(rollout, disaggregation_enabled=disaggregation_enabled, **kwargs)


@patch_of(PATCHES, "verl.experimental.reward_loop.reward_loop:RewardLoopWorker.__init__", "self", "config")
def score_with_vllm(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Let the reward worker see a reward model that runs on "vllm".

    Without the patch a discriminative reward model raises NotImplementedError at the first score: verl picks its
    endpoint by name (experimental/reward_loop/reward_loop.py:235).  Remove when verl asks what a rollout can, not what
    it is called.

    Only after verl's own __init__: the reward manager that it makes gets the user's config unchanged.
    """
    original(self, *args, **kwargs)
    if _is_ours(_name_in(self.config, REWARD_ROLLOUT)):
        self.config = _copy_as_vllm(self.config, REWARD_ROLLOUT)


@patch_of(PATCHES, "verl.workers.config.distillation:DistillationTeacherModelConfig._validate_topk_logprobs", "self")
def raise_teacher_logprobs(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Raise the teacher engine's `max_logprobs` to the distillation's top k, as for vLLM.

    Without the patch top-k distillation raises NotImplementedError: verl sets max_logprobs by name
    (workers/config/distillation.py:196).  Remove when verl asks what a rollout can, not what it is called.

    By default the teacher has the student's rollout name (trainer/config/distillation/distillation.yaml:89).
    """
    if not _is_ours(self.inference.name):
        return original(self, *args, **kwargs)
    with _shown_as_vllm(self.inference):
        original(self, *args, **kwargs)


@patch_of(
    PATCHES,
    "verl.checkpoint_engine.base:CheckpointEngineWorker.__init__",
    "self",
    "rollout_config",
    "model_config",
    "server_adapter",
)
def accept_sharded_deltas(
    original: Callable[..., None],
    self: Any,
    rollout_config: Any,
    model_config: Any,
    server_adapter: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Accept `delta_sharded` as for vLLM, with our own server adapter.

    Without the patch the backend delta_sharded raises NotImplementedError: verl allows it by name
    (checkpoint_engine/base.py:327).  Remove when verl asks what a rollout can, not what it is called.

    The same __init__ looks the adapter's class up by the name, and the adapter finds its server by the name in its
    config, so that both must get the real one: verl's code runs with the stock name and a placeholder for the adapter,
    which is made afterwards.
    """
    if not (_is_ours(rollout_config.name) and rollout_config.checkpoint_engine.backend == "delta_sharded"):
        return original(self, rollout_config, model_config, server_adapter, *args, **kwargs)
    stock_config = copy.copy(rollout_config)
    _set_name(stock_config, STOCK_NAME)
    placeholder = server_adapter if server_adapter is not None else object()
    original(self, stock_config, model_config, placeholder, *args, **kwargs)
    self.rollout_config = rollout_config
    if server_adapter is None:
        from verl.workers.rollout.base import get_rollout_class

        adapter_class = get_rollout_class(rollout_config.name, rollout_config.mode)
        self.server_adapter = adapter_class(
            *args, config=rollout_config, model_config=model_config, device_mesh=None, **kwargs
        )
