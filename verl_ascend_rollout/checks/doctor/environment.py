"""The machine and its environment variables: what a job would trip over before, or after, its engine is up."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_ascend_rollout import ROLLOUT_NAME, policy
from verl_ascend_rollout.checks.doctor.source import Sources
from verl_ascend_rollout.installed import OURS
from verl_ascend_rollout.platforms import npu
from verl_ascend_rollout.platforms.base import PlatformFacts
from verl_ascend_rollout.platforms.detect import OVERRIDE
from verl_ascend_rollout.plugin import PLUGINS_VARIABLE
from verl_ascend_rollout.policy_npu import ENVIRONMENT_UNTIL, vllm_ascend_release
from verl_ascend_rollout.report import Check, Evidence

MIB = 2**20

SHM_LEAST = 512 * MIB
"""One message queue of vLLM's is 10 chunks of 16 MiB (vllm 0.28, envs.py, VLLM_MQ_MAX_CHUNK_BYTES_MB, and
distributed/device_communicators/shm_broadcast.py), and an engine has two; docker gives 64 MiB unless told otherwise."""

SHM_ENOUGH = 4096 * MIB
"""Two buckets of verl's own weight transport, of 2048 MB each (verl 0.9.1, workers/config/rollout.py:135)."""

FILES_LEAST = 4096
"""Below it Ray warns of connection errors (ray 2.60, _private/worker.py:1775)."""

FILES_ENOUGH = 8192
"""What Ray recommends there."""

RAY_RAISES_TO = 65536
"""Ray raises the soft limit by itself, up to this or the hard limit (ray 2.60, _private/worker.py:1766)."""

SOCKET_PATH = 107
"""Bytes of a path that a socket's address has room for (unix(7))."""

RAY_SOCKET = "ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store"
VLLM_SOCKET = "01234567-89ab-cdef-0123-456789abcdef"

VLLM_PLUGINS = "VLLM_PLUGINS"


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine.

    Attributes:
        shm_total, shm_free: bytes of /dev/shm; `None` where there is none.
        files_soft, files_hard: limits on open files.
        temporary: the folder for temporary files.
    """

    shm_total: int | None
    shm_free: int | None
    files_soft: int
    files_hard: int
    temporary: Path

    @classmethod
    def measure(cls, root: Path = Path("/")) -> Machine:
        """Look at this machine."""
        import resource

        total = free = None
        try:
            status = os.statvfs(root / "dev" / "shm")
            total, free = status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail
        except OSError:
            pass
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        endless = 2**31
        return cls(
            total,
            free,
            endless if soft == resource.RLIM_INFINITY else soft,
            endless if hard == resource.RLIM_INFINITY else hard,
            Path(tempfile.gettempdir()),
        )


def check_environment(
    facts: PlatformFacts, environ: Mapping[str, str], machine: Machine, sources: Sources
) -> Iterator[Check]:
    """The variables, then the machine."""
    yield platform_name(facts, environ)
    yield devices(facts, environ)
    yield ray_variables(facts, environ, sources)
    yield nz_layout(facts, environ)
    yield expandable_segments(facts, environ)
    yield policy_conflicts(facts, environ)
    yield shared_memory(machine)
    yield open_files(machine)
    yield sockets(machine, environ)


def _variable(environ: Mapping[str, str], name: str) -> Evidence:
    return Evidence("probe", f"{name}={environ[name]}" if name in environ else f"{name} is not set")


def platform_name(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """VERL_PLATFORM: a name that exists, and one that this installation can serve."""
    wanted = environ.get(OVERRIDE, "").strip()
    evidence = (_variable(environ, OVERRIDE), *(Evidence("probe", sentence) for sentence in facts.evidence))
    if wanted and facts.name == "npu" and "torch-npu" not in facts.versions:
        return Check(
            "env.verl-platform",
            "fail",
            f"{OVERRIDE}={wanted} asks for Ascend NPUs, and torch-npu is not installed",
            evidence,
            risk="high",
            advice=f"install torch-npu, or unset {OVERRIDE} to have the platform found",
        )
    if wanted and wanted.lower() != facts.verl_name:
        return Check(
            "env.verl-platform",
            "pass",
            f"{OVERRIDE}={wanted} is {facts.verl_name} to verl, which this plug-in registers under both names",
            (
                *evidence,
                Evidence("verl/plugin/platform/platform_npu.py", "verl 0.9.1 registers huawei, nvidia and amd"),
            ),
            risk="medium",
        )
    return Check(
        "env.verl-platform",
        "pass",
        f"the platform is {facts.name} ({facts.verl_name} to verl)",
        evidence,
        risk="medium",
    )


def devices(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """Whether the devices are visible to this process."""
    name = facts.visible_devices_variable
    evidence = (_variable(environ, name),)
    if facts.name == "cpu":
        return Check("env.devices", "pass", "a CPU needs no devices", evidence)
    if facts.device_count == 0:
        hidden = environ.get(name) is not None
        return Check(
            "env.devices",
            "warn",
            f"no device is visible here{f', {name} hides them' if hidden else ''}: right on a head node, wrong "
            "where the engine is to run",
            evidence,
            risk="medium",
            advice=f"unset {name}, or run doctor where the devices are",
        )
    return Check("env.devices", "pass", f"{facts.device_count} devices are visible", evidence)


def ray_variables(facts: PlatformFacts, environ: Mapping[str, str], sources: Sources) -> Check:
    """RAY_EXPERIMENTAL_NOSET_*: names that Ray reads, all or none of them set to a true value."""
    prefix = "RAY_EXPERIMENTAL_NOSET_"
    folder = "ray/_private/accelerators"
    known: dict[str, str] = {}
    for module in ("nvidia_gpu", "npu", "amd_gpu", "hpu", "neuron", "tpu", "intel_gpu", "rbln", "metax_gpu", "furiosa"):
        file = f"{folder}/{module}.py"
        for number, line in enumerate((sources.read(file) or "").splitlines(), 1):
            for name in re.findall(rf"{prefix}\w+", line):
                known.setdefault(name, f"{file}:{number}")
    setting = {name: value for name, value in environ.items() if name.startswith(prefix)}
    strange = [name for name in setting if known and name not in known]
    right = f"{prefix}{facts.visible_devices_variable}"
    evidence = [_variable(environ, name) for name in sorted(setting) or [right]]
    if right in known:
        evidence.append(Evidence(known[right], f"Ray reads {right}"))
    if strange:
        return Check(
            "env.ray",
            "fail",
            f"Ray reads no variable {' and no '.join(sorted(strange))}: it has no effect",
            tuple(evidence),
            risk="high",
            advice=f"set {right}=1 instead, if Ray is to leave {facts.visible_devices_variable} alone",
        )
    return Check("env.ray", "pass", "Ray's device variables have names that Ray reads", tuple(evidence), risk="medium")


def nz_layout(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """VLLM_ASCEND_ENABLE_NZ: weights in NZ layout cannot be written by a weight sync."""
    name = "VLLM_ASCEND_ENABLE_NZ"
    evidence = (_variable(environ, name), Evidence("vllm_ascend/envs.py", "the default is 1 (0.11 to 0.23)"))
    if facts.name != "npu":
        return Check("env.nz", "skip", "weights have an NZ layout on Ascend only", (_variable(environ, name),))
    release = vllm_ascend_release(facts)
    if release is not None and release >= ENVIRONMENT_UNTIL:
        summary = f"this vllm-ascend does not read {name}: its setting weight_nz_mode decides"
        return Check("env.nz", "pass", summary, (_variable(environ, name),), risk="high")
    if environ.get(name, "0") != "0":
        return Check(
            "env.nz",
            "fail",
            f"{name}={environ[name]} puts weights into NZ layout, which no weight sync can write: the engine refuses "
            "to wake up",
            evidence,
            risk="high",
            advice=f"set {name}=0, or unset it: {ROLLOUT_NAME} sets it before the worker starts",
        )
    summary = f"{ROLLOUT_NAME} sets {name}=0 before the worker starts" if name not in environ else "NZ layout is off"
    return Check("env.nz", "pass", summary, evidence, risk="high")


def expandable_segments(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """PYTORCH_NPU_ALLOC_CONF: the allocator of sleep mode refuses expandable segments."""
    name = "PYTORCH_NPU_ALLOC_CONF"
    if facts.name != "npu":
        return Check("env.expandable-segments", "skip", "the allocator that refuses them is Ascend's")
    evidence = (
        _variable(environ, name),
        Evidence("vllm_ascend/device_allocator/camem.py", "asserts that they are off"),
    )
    if re.search(r"expandable_segments\s*:\s*true", environ.get(name, ""), re.IGNORECASE):
        return Check(
            "env.expandable-segments",
            "fail",
            f"{name} turns expandable_segments on, which sleep mode's allocator refuses",
            evidence,
            risk="high",
            advice=f"take expandable_segments:True out of {name}",
        )
    return Check("env.expandable-segments", "pass", "expandable_segments is not turned on", evidence, risk="high")


def policy_conflicts(facts: PlatformFacts, environ: Mapping[str, str]) -> Check:
    """Whether the policy can decide here at all, with this environment and verl's default settings."""
    try:
        decided = policy.decide(facts, policy.Wishes(environ=environ))
    except policy.PolicyError as error:
        return Check(
            "env.policy",
            "fail",
            str(error),
            risk="high",
            advice="`ascend-safe explain` prints every decision",
        )
    shown = ", ".join(f"{name} {decided[name].value}" for name in ("enforce_eager", "kv_rung"))
    return Check("env.policy", "pass", f"the policy decides: {shown}", confidence="inferred", risk="medium")


def shared_memory(machine: Machine) -> Check:
    """/dev/shm: its size."""
    if machine.shm_total is None or machine.shm_free is None:
        return Check(
            "env.shm",
            "fail",
            "there is no /dev/shm: vLLM's processes and Ray's object store share memory there",
            (Evidence("probe", "/dev/shm cannot be looked at"),),
            risk="high",
            advice="mount a tmpfs on /dev/shm",
        )
    sizes = f"{machine.shm_total / MIB:.0f} MiB, of which {machine.shm_free / MIB:.0f} MiB are free"
    evidence = (Evidence("probe", f"/dev/shm has {sizes}"),)
    advice = "start the container with --shm-size=16g or more, or with --ipc=host; and remove what old jobs left there"
    if machine.shm_total < SHM_LEAST:
        return Check(
            "env.shm",
            "fail",
            f"/dev/shm has {sizes}: less than the {SHM_LEAST // MIB} MiB that an engine's message queues want",
            evidence,
            risk="high",
            advice=advice,
        )
    if machine.shm_free < SHM_ENOUGH:
        return Check(
            "env.shm",
            "warn",
            f"/dev/shm has {sizes}: verl's own weight transport takes up to {SHM_ENOUGH // MIB} MiB of it where device "
            "memory cannot be shared, and Ray puts its object store on disk",
            evidence,
            risk="medium",
            advice=advice,
        )
    return Check("env.shm", "pass", f"/dev/shm has {sizes}", evidence, risk="medium")


def open_files(machine: Machine) -> Check:
    """The limit on open files, as it will be once Ray has raised it."""
    limit = max(machine.files_soft, min(machine.files_hard, RAY_RAISES_TO))
    evidence = (Evidence("probe", f"soft limit {machine.files_soft}, hard limit {machine.files_hard}"),)
    advice = f"ulimit -Hn {FILES_ENOUGH} or more, or --ulimit nofile={RAY_RAISES_TO} for a container"
    if limit < FILES_LEAST:
        return Check(
            "env.open-files",
            "fail",
            f"a process may open {limit} files: below {FILES_LEAST} Ray's connections fail",
            evidence,
            risk="high",
            advice=advice,
        )
    if limit < FILES_ENOUGH:
        return Check(
            "env.open-files",
            "warn",
            f"a process may open {limit} files; Ray recommends {FILES_ENOUGH}",
            evidence,
            risk="medium",
            advice=advice,
        )
    return Check("env.open-files", "pass", f"a process may open {limit} files", evidence, risk="medium")


def sockets(machine: Machine, environ: Mapping[str, str]) -> Check:
    """The folders in which sockets are made: writable, and short enough for a socket's address."""
    ray = Path(environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or "/tmp")
    vllm = Path(environ.get("VLLM_RPC_BASE_PATH") or machine.temporary)
    places = [
        ("Ray", "RAY_TMPDIR", ray, RAY_SOCKET),
        ("vLLM", "VLLM_RPC_BASE_PATH", vllm, VLLM_SOCKET),
        ("verl", "/tmp, which verl has written out", Path("/tmp"), "rl-colocate-zmq-0123456789-replica-0-rank-00.sock"),
    ]
    problems, evidence = [], []
    for who, setting, folder, socket in places:
        length = len(os.fsencode(folder / socket))
        evidence.append(Evidence("probe", f"{who}'s sockets are in {folder} ({length} bytes for a path)"))
        if not _writable(folder):
            problems.append(
                f"{who} cannot make its sockets in {folder}, which is not a folder that can be written to ({setting})"
            )
        elif length > SOCKET_PATH:
            problems.append(
                f"{folder} is too long for {who}'s sockets: a path would have {length} bytes, and an address has room "
                f"for {SOCKET_PATH} ({setting})"
            )
    if problems:
        return Check(
            "env.sockets",
            "fail",
            "; ".join(problems),
            tuple(evidence),
            risk="high",
            advice="set TMPDIR, RAY_TMPDIR and VLLM_RPC_BASE_PATH to a short folder on a local disk, such as /tmp",
        )
    return Check("env.sockets", "pass", "sockets can be made where Ray, vLLM and verl make them", tuple(evidence))


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def plug_in(
    entry_points: Mapping[str, tuple[str, ...]], environ: Mapping[str, str], sources: Sources
) -> Iterator[Check]:
    """Whether verl and vLLM will load us in each of their processes."""
    sides = (
        (
            "plug-in.verl",
            "verl",
            "verl.plugins",
            PLUGINS_VARIABLE,
            environ.get(PLUGINS_VARIABLE, "auto").strip().lower(),
        ),
        ("plug-in.vllm", "vLLM", "vllm.general_plugins", VLLM_PLUGINS, environ.get(VLLM_PLUGINS)),
    )
    for name, who, group, variable, value in sides:
        evidence = [_variable(environ, variable)]
        points = entry_points.get(group, ())
        evidence.append(Evidence(f"{OURS}, entry_points.txt", f"{group}: {', '.join(points) or 'nothing'}"))
        if ROLLOUT_NAME not in points:
            yield Check(
                name,
                "fail",
                f"{who} finds no entry point {ROLLOUT_NAME} in {group}: {OURS} is not installed in this environment, "
                "only its source can be imported",
                tuple(evidence),
                risk="high",
                advice=f"pip install {OURS}, from its checkout: pip install .",
            )
            continue
        if who == "verl":
            allowed = value == "auto" or (value != "none" and ROLLOUT_NAME in _names(value or ""))
        else:
            allowed = value is None or ROLLOUT_NAME in _names(value)
        if not allowed:
            others = "" if value in (None, "", "none", "auto") else f"{value},"
            yield Check(
                name,
                "fail",
                f"{variable}={environ.get(variable)} keeps {who} from loading {ROLLOUT_NAME}",
                tuple(evidence),
                risk="high",
                advice=f"unset {variable}, or set it to {others}{ROLLOUT_NAME}",
            )
            continue
        yield Check(
            name, "pass", f"{who} loads {ROLLOUT_NAME} in each of its processes", tuple(evidence), "read", "high"
        )


def _names(value: str) -> set[str]:
    return {name.strip() for name in value.split(",")}


def built_for(facts: PlatformFacts, sources: Sources, chip: str | None = None) -> Check:
    """For which SoC the vllm-ascend wheel was built, and whether that is the one here.

    Args:
        chip: its name by npu-smi, where it was asked; else the chip is not known.
    """
    file = "vllm_ascend/_build_info.py"
    text = sources.read(file)
    if not sources.has("vllm_ascend"):
        return Check("soc.built-for", "skip", "vllm-ascend is not installed")
    written = re.search(
        r"^__(?:device_type|soc_version)__\s*=\s*\W*(?:AscendDeviceType\.)?_?(\w+)", text or "", re.MULTILINE
    )
    if written is None:
        return Check(
            "soc.built-for",
            "unknown",
            "vllm-ascend does not say for which SoC it was built",
            (Evidence(file, "is missing, or has no device type"),),
            "read",
            "medium",
        )
    word = written[1].upper()
    built = word if word in ("A2", "A3", "A5", "310P") else npu.soc_of(word)
    line = (text or "")[: written.start()].count("\n") + 1
    evidence = [Evidence(f"{file}:{line}", (text or "").splitlines()[line - 1])]
    here = npu.soc_of(chip) if chip else None
    if chip:
        evidence.append(Evidence("npu-smi", f"the chip is {chip}"))
    if here is None:
        return Check(
            "soc.built-for",
            "pass",
            f"vllm-ascend is built for {built or word}; which chip is here was not found out",
            tuple(evidence),
            "read",
            "medium",
        )
    if built != here:
        return Check(
            "soc.built-for",
            "fail",
            f"vllm-ascend is built for {built or word}, and the chip here is {here} ({chip})",
            tuple(evidence),
            "measured",
            "high",
            advice=f"take vllm-ascend's image for {here}, or build it here: wheels on package indexes are for A2",
        )
    return Check(
        "soc.built-for", "pass", f"vllm-ascend is built for the chip here, {here}", tuple(evidence), risk="high"
    )
