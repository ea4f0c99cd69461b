"""Where verl asks "is the rollout vllm?", `ascend_safe` is answered for as `vllm`.

verl decides a few things by comparing the rollout's name with the constant "vllm".  Our rollout is verl's vLLM rollout
under another name, so each of these places would refuse it, or, worse, take the other branch without a word.  `PATCHES`
lists them with the reason for each (verl 0.9.1; file and line are relative to the package `verl`).
tests/contract/test_verl_rollout_name.py searches the installed verl for every such place and fails where one is added.

A patch is applied when its module is imported, so nothing is imported that is not used.  It changes nothing for any
other rollout.  Where verl has drifted and a patch no longer fits, the import goes on, for users of other rollouts; the
problem is logged once, and `ascend_safe` refuses to start (see `assert_intact`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import wrapt
from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException

from verl_ascend_rollout import ROLLOUT_NAME

logger = logging.getLogger(__name__)

STOCK_NAME = "vllm"
"""The name that verl compares with."""

MARK = "_ascend_safe_patched"
"""The attribute that a patched function carries."""

WHAT_TO_DO = f"use a verl release that the support matrix lists, or set actor_rollout_ref.rollout.name={STOCK_NAME}"
"""The end of a sentence about a patch that does not fit."""

ACTOR_ROLLOUT = ("actor_rollout_ref", "rollout")
REWARD_ROLLOUT = ("reward", "reward_model", "rollout")

_problems: list[str] = []


class CompatError(RuntimeError):
    """verl has drifted away from a patch, so `ascend_safe` could be treated differently from `vllm`."""


class _DriftError(Exception):
    """What a patch missed in its module; becomes a part of a problem's sentence."""


@dataclass(frozen=True)
class Patch:
    """One place in verl that compares the rollout's name.

    Attributes:
        module: the module that holds it.
        attribute: the function, as a dotted path in the module.
        parameters: the parameters of it that `wrapper` relies on.
        wrapper: called in its place as `wrapper(original, *args, **kwargs)`.
        reason: where verl 0.9.1 compares, and what happens to `ascend_safe` without the patch.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    wrapper: Callable[..., Any]
    reason: str

    def apply(self, module: Any) -> None:
        """Replace the function in `module`; a second time does nothing.

        Never raises: an exception in an import hook would break the import for users of other rollouts too.  What does
        not fit is logged once and kept in `problems`.
        """
        try:
            self._replace(module)
        except _DriftError as error:
            problem = (
                f"verl {_verl_version()}: {self.module}.{self.attribute} {error}, so the rollout {ROLLOUT_NAME!r} "
                f"cannot be treated as {STOCK_NAME!r} there ({self.reason})"
            )
            if problem not in _problems:
                _problems.append(problem)
                logger.error("%s", problem)

    def _replace(self, module: Any) -> None:
        *path, name = self.attribute.split(".")
        owner = module
        for part in path:
            owner = vars(owner).get(part)
            if owner is None:
                raise _DriftError("is gone")
        # vars(): an attribute that is only inherited (object.__init__) is not the one that compares names.
        original = vars(owner).get(name)
        if original is None:
            raise _DriftError("is gone")
        if getattr(original, MARK, False):
            return
        missing = [
            parameter for parameter in self.parameters if parameter not in inspect.signature(original).parameters
        ]
        if missing:
            raise _DriftError(f"has no parameter {' or '.join(missing)}")

        wrapper = self.wrapper

        @functools.wraps(original)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(patched, MARK, True)
        setattr(owner, name, patched)
        if owner is module:
            _rebind(name, original, patched)


def install() -> None:
    """Arrange for every patch: at once where the module is imported already, else right after its import.

    Idempotent: a patched function is recognised by its mark.
    """
    for patch in PATCHES:
        wrapt.register_post_import_hook(patch.apply, patch.module)


def problems() -> tuple[str, ...]:
    """The patches that did not fit the modules imported so far, one sentence each; empty when all is well."""
    return tuple(_problems)


def assert_intact() -> None:
    """Refuse to go on as `ascend_safe` where a patch did not fit.

    Raises:
        CompatError: with every problem, and what to do.
    """
    if _problems:
        raise CompatError(f"{'; '.join(_problems)}: {WHAT_TO_DO}")


def _verl_version() -> str:
    try:
        return importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def _rebind(name: str, original: Any, patched: Any) -> None:
    """Give the patched function to the verl modules that took a copy before (`from verl.utils.config import ...`).

    `import verl` itself imports verl.utils.config, before it loads its plug-ins (verl 0.9.1, __init__.py:36 and :55),
    and verl.utils keeps a copy of validate_config.
    """
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] == "verl" and getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, patched)


def _is_ours(name: object) -> bool:
    """Whether this is our rollout.

    Raises:
        CompatError: when it is and a patch did not fit: better no run than one that is wrong in silence.
    """
    if name != ROLLOUT_NAME:
        return False
    assert_intact()
    return True


def _name_in(config: Any, path: tuple[str, ...]) -> object:
    """The rollout's name under `path`; `None` where there is none (then verl's own code says so, or doesn't care)."""
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
    """A copy of a whole job config (about 50 ms) in which the rollout under `path` is called "vllm"."""
    copied = copy.deepcopy(config)
    _set_name(functools.reduce(getattr, path, copied), STOCK_NAME)
    return copied


def rollout_config_post_init(original: Callable[..., None], self: Any) -> None:
    """Validate the rollout config as vLLM's."""
    if not _is_ours(self.name):
        return original(self)
    with _shown_as_vllm(self):
        original(self)


def validate_config(original: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
    """Check a job's config in the driver: first what only we know, then verl's checks, as for vLLM."""
    if _name_in(config, ACTOR_ROLLOUT) != ROLLOUT_NAME:
        return original(config, *args, **kwargs)
    from verl_ascend_rollout.checks.preflight import check_driver_config

    # Before assert_intact: the pre-flight check reports bad input in one sentence, without a traceback.
    check_driver_config(config)
    assert_intact()
    original(_copy_as_vllm(config, ACTOR_ROLLOUT), *args, **kwargs)


def llm_server_client_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Let the client of the rollout servers, and its subclasses, see a job config that says "vllm".

    The client reads its config and hands it to nobody (verl 0.9.1, workers/rollout/llm_server.py:62-353).  It is
    pickled into the agent-loop workers together with this copy.
    """
    original(self, *args, **kwargs)
    if _is_ours(_name_in(self.config, ACTOR_ROLLOUT)):
        self.config = _copy_as_vllm(self.config, ACTOR_ROLLOUT)


def get_rollout_replica_class(
    original: Callable[..., Any], rollout: str, disaggregation_enabled: bool = False, **kwargs: Any
) -> Any:
    """Answer with our prefill/decode replica; everything else is in verl's registry."""
    if _is_ours(rollout) and disaggregation_enabled:
        from verl_ascend_rollout.server.replica import AscendSafePDReplica

        return AscendSafePDReplica
    return original(rollout, disaggregation_enabled=disaggregation_enabled, **kwargs)


def reward_loop_worker_init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Let the reward worker see a reward model that runs on "vllm".

    Only after verl's own __init__: the reward manager that it makes gets the user's config unchanged.
    """
    original(self, *args, **kwargs)
    if _is_ours(_name_in(self.config, REWARD_ROLLOUT)):
        self.config = _copy_as_vllm(self.config, REWARD_ROLLOUT)


def validate_topk_logprobs(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    """Raise the teacher engine's `max_logprobs` to the distillation's top k, as for vLLM.

    By default the teacher has the student's rollout name (trainer/config/distillation/distillation.yaml:89).
    """
    if not _is_ours(self.inference.name):
        return original(self, *args, **kwargs)
    with _shown_as_vllm(self.inference):
        original(self, *args, **kwargs)


def checkpoint_engine_worker_init(
    original: Callable[..., None],
    self: Any,
    rollout_config: Any,
    model_config: Any,
    server_adapter: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Accept `delta_sharded` as for vLLM, with our own server adapter.

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


PATCHES: tuple[Patch, ...] = (
    Patch(
        "verl.workers.config.rollout",
        "RolloutConfig.__post_init__",
        ("self",),
        rollout_config_post_init,
        "workers/config/rollout.py:320 guards against pipeline_model_parallel_size > 1 and :341 allows "
        "disaggregation, both by name: without the patch the guard is off, and disaggregation is refused",
    ),
    Patch(
        "verl.utils.config",
        "validate_config",
        ("config",),
        validate_config,
        "utils/config.py:212 checks the LoRA rank by name: without the patch a rank that vLLM cannot have fails only "
        "in the rollout server, minutes later",
    ),
    Patch(
        "verl.workers.rollout.llm_server",
        "LLMServerClient.__init__",
        ("self", "config"),
        llm_server_client_init,
        "workers/rollout/llm_server.py:148 passes a request's priority by name: without the patch priorities are "
        "dropped in silence, and with them scheduling_policy=priority and the order that full_determinism needs",
    ),
    Patch(
        "verl.workers.rollout.replica",
        "get_rollout_replica_class",
        ("rollout", "disaggregation_enabled"),
        get_rollout_replica_class,
        "workers/rollout/replica.py:411 picks the prefill/decode replica by name: without the patch it raises "
        "NotImplementedError",
    ),
    Patch(
        "verl.experimental.reward_loop.reward_loop",
        "RewardLoopWorker.__init__",
        ("self", "config"),
        reward_loop_worker_init,
        "experimental/reward_loop/reward_loop.py:235 picks the reward model's endpoint by name: without the patch a "
        "discriminative reward model raises NotImplementedError at the first score",
    ),
    Patch(
        "verl.workers.config.distillation",
        "DistillationTeacherModelConfig._validate_topk_logprobs",
        ("self",),
        validate_topk_logprobs,
        "workers/config/distillation.py:196 sets the teacher engine's max_logprobs by name: without the patch top-k "
        "distillation raises NotImplementedError",
    ),
    Patch(
        "verl.checkpoint_engine.base",
        "CheckpointEngineWorker.__init__",
        ("self", "rollout_config", "model_config", "server_adapter"),
        checkpoint_engine_worker_init,
        "checkpoint_engine/base.py:327 allows the backend delta_sharded by name: without the patch it raises "
        "NotImplementedError",
    ),
)
"""Every place that verl 0.9.1 decides by the name "vllm" and that a subclass of ours cannot decide instead."""
