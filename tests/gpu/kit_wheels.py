"""The folder of wheels that `kit.py fetch` makes on a machine with a network, and that `kit.py run` installs from."""

from __future__ import annotations

import base64
import concurrent.futures
import csv
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOCK = HERE / "requirements.txt"

PYTHON = "3.12"
TORCH = "2.11.0"
"""What the machine brings along (vLLM 0.24.0 pins this torch); everything else in `LOCK` is carried."""

GLIBC = 35
"""The newest glibc (2.N) that a wheel may want: Ubuntu 22.04's."""

SOURCE_ONLY = {"antlr4-python3-runtime"}
"""What the index has as source only; pure Python."""

LIST = "kit.json"
MIB = 2**20

NOT_ON_HOPPER = {
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "vLLM takes FlashAttention 3 (v1/attention/backends/fa_utils.py:78)",
    "vllm/vllm-rs": "a server front end of its own, which nothing here starts",
}
"""Files of vLLM 0.24.0's wheel that a small one leaves out, and why it can."""


class KitError(Exception):
    """The kit cannot be made, or is not whole, or does not fit this machine; the message says what to do."""


@dataclass(frozen=True)
class Wheel:
    """One wheel of the kit: its file's name, size in bytes and SHA-256."""

    name: str
    bytes: int
    sha256: str


# --------------------------------------------------------------------------------------------------------------------
# fetch


def fetch(folder: Path, have: Iterable[str], architecture: int | None, part_bytes: int | None) -> list[Wheel]:
    """Fill `folder` with what a machine without a network needs beside its own torch.

    Args:
        folder: made where it is missing, and else empty.
        have: names of packages that the machine has in a version that will do.
        architecture: compress wheels further and keep of vLLM's device code only what a GPU of that architecture takes
            (90: Hopper); `None`: wheels stay as they were published.
        part_bytes: sort everything into folders `part-N` of at most this size each, larger wheels cut into pieces.

    Raises:
        KitError: the folder is in use, or pip could not get a wheel.
    """
    if folder.exists() and any(folder.iterdir()):
        raise KitError(f"--wheels {folder} is not empty: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [line for line in requirements() if _project(line) not in {_canonical(name) for name in have}]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _download(wanted, Path(scratch))
        wheels = sorted(Path(scratch).glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
        if architecture is not None:
            with concurrent.futures.ProcessPoolExecutor() as pool:
                wheels = list(pool.map(smaller, wheels, [architecture] * len(wheels)))
        made = [Wheel(wheel.name, wheel.stat().st_size, _sha256(wheel)) for wheel in wheels]
        _lay_out(wheels, folder, part_bytes)
    listed = {"python": PYTHON, "torch": TORCH, "architecture": architecture, "wheels": [asdict(one) for one in made]}
    for place in sorted(folder.glob("part-*")) or [folder]:
        (place / LIST).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return made


def requirements() -> list[str]:
    """The lines `name==version` of the lock."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _download(wanted: list[str], into: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(GLIBC, 4, -1)]
    platforms += [f"manylinux{year}_x86_64" for year in ("2014", "2010", "1")]
    target = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    target += [word for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    target += [word for platform in platforms for word in ("--platform", platform)]
    binary = [line for line in wanted if _project(line) not in SOURCE_ONLY]
    source = [line for line in wanted if _project(line) in SOURCE_ONLY]
    commands = [[*pip, "download", "--quiet", "--no-deps", "--dest", str(into), *target, *binary]]
    if source:
        commands.append([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(into), *source])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise KitError(f"pip could not get a wheel: {' '.join(errors) or done.stderr.strip()[-500:]}")


def smaller(wheel: Path, architecture: int) -> Path:
    """The same wheel with other compression, or with less in it if it is vLLM's; the old file is removed.

    A wheel with less in it says so in its name, by a build tag; it is still that version of vLLM to pip.
    """
    import fatbin

    name, version, *tags = wheel.name.split("-")
    less = name == "vllm"
    out = wheel.with_name("-".join([name, version, *([f"0sm{architecture}"] if less else []), *tags]))
    scratch = out.with_suffix(".new")
    changed: dict[str, bytes | None] = {}
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(scratch, "w", zipfile.ZIP_LZMA) as new:
        # RECORD comes last in a wheel, as the format wants it.
        for item in old.infolist():
            content = old.read(item)
            if less and architecture == 90 and item.filename in NOT_ON_HOPPER:
                changed[item.filename] = None
                continue
            if less and item.filename.endswith(".so"):
                cut, _ = fatbin.keep_only(content, architecture)
                if cut != content:
                    changed[item.filename] = content = cut
            if changed and item.filename.endswith(".dist-info/RECORD"):
                content = _record(content, changed)
            item.compress_type = zipfile.ZIP_LZMA
            new.writestr(item, content, zipfile.ZIP_LZMA)
    if not less and scratch.stat().st_size >= wheel.stat().st_size:
        scratch.unlink()
        return wheel
    wheel.unlink()
    return scratch.rename(out)


def _record(record: bytes, changed: Mapping[str, bytes | None]) -> bytes:
    """A wheel's list of files, with the changed ones' own hashes and sizes, and without those that are gone."""
    rows = []
    for row in csv.reader(io.StringIO(record.decode())):
        content = changed.get(row[0])
        if content is not None:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            row = [row[0], f"sha256={digest}", str(len(content))]
        if content is not None or row[0] not in changed:
            rows.append(row)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _lay_out(wheels: list[Path], folder: Path, part_bytes: int | None) -> None:
    """Move the wheels to their place; with parts, each piece into the first part that has room, largest first."""
    if part_bytes is None:
        for wheel in wheels:
            wheel.rename(folder / wheel.name)
        return
    room = part_bytes - MIB  # for the list, and for what a file costs beside its bytes
    left: list[int] = []
    for wheel in sorted(wheels, key=lambda one: -one.stat().st_size):
        with wheel.open("rb") as stream:
            size, number = wheel.stat().st_size, 0
            while size > 0:
                piece = min(size, room)
                part = next((index for index, free in enumerate(left) if free >= piece), len(left))
                if part == len(left):
                    left.append(room)
                left[part] -= piece
                place = folder / f"part-{part + 1}"
                place.mkdir(exist_ok=True)
                whole = wheel.stat().st_size <= room
                name = wheel.name if whole else f"{wheel.name}.{number:03}"
                (place / name).write_bytes(stream.read(piece))
                size, number = size - piece, number + 1
        wheel.unlink()


# --------------------------------------------------------------------------------------------------------------------
# bring


def check_machine() -> None:
    """Refuse a Python or a torch that the kit was not made for.

    Raises:
        KitError: with both versions.
    """
    here = ".".join(str(part) for part in sys.version_info[:2])
    if here != PYTHON:
        raise KitError(
            f"the wheels are for Python {PYTHON}, and {sys.executable} is {here}: run this with python{PYTHON}"
        )
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not there"
    if torch.partition("+")[0] != TORCH:
        raise KitError(f"vLLM 0.24.0 needs torch {TORCH}, and torch is {torch} in {sys.executable}")


def gather(folder: Path, scratch: Path) -> list[Path]:
    """The kit's wheels, those in pieces joined in `scratch`, each as it was when it was fetched.

    Raises:
        KitError: names what is missing or damaged.
    """
    listed = next(iter(sorted(folder.rglob(LIST))), None)
    if listed is None:
        raise KitError(f"--wheels {folder}: no {LIST} is there; make the folder with `kit.py fetch`")
    wheels = [Wheel(**one) for one in json.loads(listed.read_text(encoding="utf-8"))["wheels"]]
    files = {path.name: path for path in folder.rglob("*.whl*")}
    found, wrong = [], []
    scratch.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        path = files.get(wheel.name)
        pieces = sorted(name for name in files if re.fullmatch(re.escape(wheel.name) + r"\.\d{3}", name))
        if path is None and pieces:
            path = scratch / wheel.name
            with path.open("wb") as whole:
                for piece in pieces:
                    with files[piece].open("rb") as stream:
                        shutil.copyfileobj(stream, whole)
        if path is None:
            wrong.append(f"{wheel.name} is missing")
        elif path.stat().st_size != wheel.bytes or _sha256(path) != wheel.sha256:
            wrong.append(f"{wheel.name} is not as it was fetched")
        else:
            found.append(path)
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise KitError(f"--wheels {folder}: {', '.join(wrong[:4])}{more}: bring every part again")
    return found


def install(wheels: list[Path], venv: Path) -> Path:
    """A virtual environment with the kit's wheels before everything that this Python has, and this project; its Python.

    Raises:
        KitError: with the end of what failed.
    """
    _call([sys.executable, "-m", "venv", "--without-pip", "--clear", str(venv)])
    python = venv / "bin" / "python"
    packages = next(venv.glob("lib/python*/site-packages"))
    # Not --system-site-packages: where this Python is a virtual environment too, that would be its parent's.
    lines = [f"import site; site.addsitedir({place!r})\n" for place in site.getsitepackages() if Path(place).is_dir()]
    (packages / "what_the_machine_has.pth").write_text("".join(lines), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    pip += ["--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--no-compile"]
    _call([*pip, *(str(wheel) for wheel in wheels)])
    _call([*pip, "--no-build-isolation", "--editable", str(ROOT)])
    return python


def _call(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PIP_REQUIRE_VIRTUALENV"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise KitError(f"{' '.join(command[:4])} ... failed: {(done.stderr or done.stdout).strip()[-1500:]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


def _project(requirement: str) -> str:
    return _canonical(requirement.partition("==")[0])


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.partition("==")[0].strip()).lower()
