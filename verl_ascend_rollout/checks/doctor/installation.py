"""What is installed, and whether an import would find it: without importing any of it.

What an import would find (see `installed`) is compared with what the installed distributions say of themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from verl_ascend_rollout import import_fix
from verl_ascend_rollout.installed import (
    OURS,
    PACKAGES,
    Found,
    Search,
    checkout_of,
    home_of,
    pth_entries,
    same,
    version_of,
)
from verl_ascend_rollout.report import Check, Evidence

REQUIRED = ("verl", "vllm", "torch", "ray")
REQUIRED_ON_NPU = ("vllm_ascend", "torch_npu")


def check_installation(search: Search, platform: str) -> Iterator[Check]:
    """What is installed, shadowed, gone, or half there."""
    yield _present(search, platform)
    for package, distributions in PACKAGES.items():
        yield from _importable(search, package, distributions)
    yield _editables(search)


def _present(search: Search, platform: str) -> Check:
    needed = REQUIRED + (REQUIRED_ON_NPU if platform == "npu" else ())
    evidence = [Evidence("probe", f"{name} {version}") for name, version in search.versions.items()]
    missing = [
        package
        for package in needed
        if not any(name in search.versions for name in PACKAGES[package]) and not _is_there(search, package)
    ]
    if not missing:
        return Check("install.present", "pass", "verl, vLLM, torch and Ray are installed", tuple(evidence), risk="high")
    names = [" or ".join(PACKAGES[package]) for package in missing]
    # A folder of that name is no package, and may be why somebody thinks that it is there.
    folders = [found.folder for found in map(search.resolve, missing) if found is not None]
    evidence += [Evidence("probe", f"{folder} is a mere folder, without __init__.py") for folder in folders]
    return Check(
        "install.present",
        "fail",
        f"not installed: {', '.join(names)}",
        (*evidence, *(Evidence("probe", f"no distribution {name} in {len(search.paths)} folders") for name in names)),
        risk="high",
        advice="install them in this environment, or start the environment's own python; README, section 'In your verl "
        "job', says which build of vLLM a platform takes",
    )


def _importable(search: Search, package: str, distributions: Sequence[str]) -> Iterator[Check]:
    """Whether `import package` finds what its distribution installed."""
    name = f"install.{package}"
    installed = next((one for one in (search.distribution(name) for name in distributions) if one), None)
    found = search.resolve(package)
    editable = search.editable(package)
    if installed is None and (found is None or (not found.regular and editable is None)):
        return  # it is not installed: said for all of them at once
    version = version_of(installed) if installed else None
    label = f"{installed.name if installed else package} {version or 'of unknown version'}"
    shown = Evidence("probe", f"`import {package}` would take {found.folder if found else 'nothing'}")

    if found is not None and not found.regular:
        yield _namespace(search, package, found, editable, label)
        return
    if found is None:
        gone = search.editable_modules.get(package)
        what = (
            f"its editable install points to {gone[0]}, which is gone"
            if gone
            else "its files are gone: the upgrade or the removal was cut short"
        )
        yield Check(
            name,
            "fail",
            f"{label} is installed and cannot be imported: {what}",
            (shown,),
            risk="high",
            advice=f"install it again: pip install --force-reinstall --no-deps {distributions[-1]}"
            + ("; or bring the checkout back" if gone else ""),
        )
        return
    if installed is not None and version is None:
        yield Check(
            name,
            "fail",
            f"{package} has a *.dist-info folder without METADATA, so that its version cannot be told: an upgrade was "
            "cut short",
            (shown, Evidence("probe", f"{home_of(installed)} has no METADATA")),
            risk="high",
            advice=f"remove the folder and install {distributions[-1]} again",
        )
        return
    hidden = _hidden_copy(search, package, found, installed)
    if hidden is not None:
        yield Check(
            name,
            "fail",
            f"{found.folder} hides the installed {label} at {hidden}: `import {package}` takes the first, which may be "
            "a checkout without its compiled parts, or another release",
            (shown, Evidence("probe", f"{label} is installed in {hidden.parent}")),
            risk="high",
            advice=f"start the job from a folder without a `{found.folder.name}`, or take {found.entry} out of "
            "PYTHONPATH" + _mended(search, package),
        )
        return
    if installed is None:
        yield Check(
            name,
            "warn",
            f"{package} can be imported and belongs to no installed distribution: its version is unknown",
            (shown,),
            risk="medium",
            advice=f"verl and vLLM ask for the version of {distributions[-1]}: install it instead of putting its "
            "folder on the path",
        )
        return
    yield Check(name, "pass", f"{label} is what an import takes", (shown,), risk="high")


def _namespace(
    search: Search,
    package: str,
    found: Found,
    editable: Found | None,
    label: str,
) -> Check:
    entry = "the working directory" if found.entry == search.cwd else str(found.entry)
    evidence = [
        Evidence("probe", f"{found.folder} has no __init__.py: Python takes it for a namespace package, an empty one")
    ]
    if editable is not None:
        _, finder = search.editable_modules[package]
        evidence.append(Evidence("probe", f"{finder} maps {package} to {editable.folder}, and is asked after the path"))
        fix = (
            f"put the real package first: PYTHONPATH={editable.folder.parent}, or in Python "
            f"sys.path.insert(0, {str(editable.folder.parent)!r}) before the import; or start the job elsewhere"
        )
        hidden = f"the editable install of {label} at {editable.folder}"
    else:
        fix = f"install {label.split()[0]} again, and start the job from a folder without a `{package}`"
        hidden = f"{label}, whose own files are gone"
    fix += _mended(search, package)
    return Check(
        f"install.{package}",
        "fail",
        f"a folder named `{package}` in {entry} is taken for the package and shadows {hidden}: imports end in "
        f"\"cannot import name ... from '{package}' (unknown location)\"",
        tuple(evidence),
        risk="high",
        advice=fix,
    )


def _mended(search: Search, package: str) -> str:
    """The end of an advice: what the import fix does about a package that is hidden."""
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
    alive: list[Evidence] = []
    dead: list[Evidence] = []
    names: list[str] = []

    def note(name: str, target: Path, source: str) -> None:
        one = Evidence(source, f"{name} -> {target}" + ("" if target.exists() else ", which is gone"))
        (alive if target.exists() else dead).append(one)
        if not target.exists():
            names.append(name)

    for distributions in (*PACKAGES.values(), (OURS,)):
        for name in distributions:
            distribution = search.distribution(name)
            checkout = checkout_of(distribution) if distribution else None
            if checkout is not None:
                note(name, checkout, "direct_url.json")
    for module, (target, finder) in search.editable_modules.items():
        if module in PACKAGES:
            note(module, target, finder)
    for name, target, file in pth_entries(search.paths):
        if not target.exists():
            note(name, target, file)
    if dead:
        return Check(
            "install.editable",
            "fail",
            f"an editable install's checkout is gone: {', '.join(dict.fromkeys(names))}",
            tuple(dead),
            risk="high",
            advice="bring the checkout back to where it was, or install the package from a wheel: pip uninstall, then "
            "pip install",
        )
    if alive:
        return Check("install.editable", "pass", "editable installs have their checkouts", tuple(alive), risk="medium")
    return Check("install.editable", "pass", "nothing here is an editable install", risk="low")


def _is_there(search: Search, package: str) -> bool:
    found = search.resolve(package)
    return found is not None and (found.regular or search.editable(package) is not None)
