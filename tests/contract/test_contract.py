"""The contract with verl, both ways: what our code overrides, reads, calls and imports has an entry, and each entry has
a use; and what it says of each release is so in that release's wheel."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import verl_ascend_rollout
from verl_ascend_rollout.integration import contract, preflight, probe
from verl_ascend_rollout.integration.actor import METHODS, OURS
from verl_ascend_rollout.integration.contract import CONTRACT, Symbol
from verl_ascend_rollout.integration.patches import OF_VERL, patches_of

PACKAGE = Path(verl_ascend_rollout.__file__).parent
RELEASES = ("0.7.1", "0.8.0", "0.9.0", "0.9.1")

VLLMS = {"model_runner", "rank", "device"}
"""What our worker extension reads on `self` and vLLM's worker has."""

BARE = {("verl.utils.vllm.patch", "patch_vllm_moe_model_weight_loader")}
"""A benchmark's measure of verl's own way; nothing of a rollout's."""


def trees_in(folder: Path) -> probe.Trees:
    @functools.cache
    def tree(file: str) -> ast.Module | None:
        try:
            return ast.parse((folder / file).read_bytes())
        except OSError:
            return None

    return tree


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, verl_wheel: Callable[[str], str]) -> tuple[str, probe.Trees]:
    return request.param, trees_in(Path(verl_wheel(request.param)))


# What the entries say


def test_each_entry_is_there_from_its_release_on(release: tuple[str, probe.Trees]) -> None:
    version, trees = release
    wrong = [
        symbol.key
        for symbol in CONTRACT
        if (probe.find(symbol, trees) is not None)
        != ((symbol.since or RELEASES[0]) <= version <= (symbol.last or RELEASES[-1]))
    ]
    assert wrong == []


def test_the_releases_that_have_all_of_it_are_named(release: tuple[str, probe.Trees]) -> None:
    version, trees = release
    found = probe.probe(trees)
    assert (found.missing == ()) == (version in contract.WHOLE)
    generations = ("no hooks", "no entry points", "no gate", "gate")
    assert found.generation == dict(zip(RELEASES, generations, strict=True))[version]
    # What a platform needs besides is there wherever the rest is.
    asked = (
        symbol for symbol in CONTRACT if symbol.only and found.generation in (symbol.generations or (found.generation,))
    )
    assert [symbol.key for symbol in asked if symbol.required and probe.find(symbol, trees) is None] == []


def test_the_installed_verl_has_all_of_it() -> None:
    trees = probe.installed()
    assert trees is not None
    assert probe.probe(trees).missing == ()


def test_half_a_gate_is_refused(verl_wheel: Callable[[str], str]) -> None:
    """A verl that moves one of the gate's names is not taken for one without a gate."""
    whole = trees_in(Path(verl_wheel("0.9.1")))

    def without_counter(file: str) -> ast.Module | None:
        tree = whole(file)
        return ast.parse(ast.unparse(tree).replace("_admitting", "_entering")) if tree else None

    found = probe.probe(without_counter)
    assert (found.generation, [symbol.key for symbol in found.missing]) == ("gate", ["server.admitting"])


def test_half_of_the_hooks_are_refused(verl_wheel: Callable[[str], str]) -> None:
    """A verl that moves one of the hooks is not taken for one without any."""
    whole = trees_in(Path(verl_wheel("0.8.0")))

    def without_hook(file: str) -> ast.Module | None:
        tree = whole(file)
        return ast.parse(ast.unparse(tree).replace("_init_config", "_start_config")) if tree else None

    found = probe.probe(without_hook)
    assert (found.generation, [symbol.key for symbol in found.missing]) == ("no entry points", ["server.init-config"])


def test_entries_have_keys_of_their_own() -> None:
    keys = [symbol.key for symbol in CONTRACT]
    assert sorted(keys) == sorted(set(keys))
    assert all(symbol.why and symbol.lost for symbol in CONTRACT)


# Our code against the entries


def ours(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imported_from_verl(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "verl":
            yield from ((node.module or "", alias.name) for alias in node.names)


def bases_in_verl(file: str) -> Iterator[tuple[ast.ClassDef, list[tuple[str, str]]]]:
    """Our classes, with those that they have in verl, nearest first: module and name."""
    tree = ours(file)
    origin = {name: module for module, name in imported_from_verl(tree)}
    own = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in own.values():
        bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
        verls = [(origin[base], base) for base in bases if base in origin]
        if any(base.endswith("HttpServer") for base in bases):
            verls = [(contract.SERVER, "vLLMHttpServer")]
        if verls:
            yield node, [link for start in verls for link in lineage(*start)]


def lineage(module: str, name: str) -> Iterator[tuple[str, str]]:
    """A class of the installed verl and its bases there."""
    trees = probe.installed()
    assert trees is not None
    tree = next(tree for tree in map(trees, probe.files(module)) if tree is not None)
    node = probe.definition(tree, name)
    assert isinstance(node, ast.ClassDef)
    yield module, name
    origin = {alias: origin for origin, alias in imported_from_verl(tree)}
    for base in node.bases:
        if isinstance(base, ast.Name):
            if base.id in origin:
                yield from lineage(origin[base.id], base.id)
            elif probe.definition(tree, base.id) is not None:
                yield from lineage(module, base.id)


def in_verl(links: list[tuple[str, str]], attribute: str) -> Symbol | None:
    """The nearest place of verl's that has an attribute of a class, as an entry would name it."""
    trees = probe.installed()
    assert trees is not None
    for module, name in links:
        place = Symbol("", module, f"{name}.{attribute}", "read", "", "", "")
        if probe.find(place, trees) is not None:
            return place
    return None


SUBCLASSES = [
    (file, node, links)
    for file in sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "integration").rglob("*.py"))
    for node, links in bases_in_verl(file)
]

ENTRIES = {(symbol.module, symbol.name): symbol for symbol in CONTRACT}


@pytest.mark.parametrize(("file", "node", "links"), SUBCLASSES, ids=[node.name for _, node, _ in SUBCLASSES])
def test_each_override_and_each_attribute_that_is_read_has_an_entry(
    file: str, node: ast.ClassDef, links: list[tuple[str, str]]
) -> None:
    methods = {child.name for child in node.body if isinstance(child, probe.Function)}
    overrides = {name for name in methods if name not in ("__init__", "__setstate__") and in_verl(links, name)}
    reads = {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(child.value, ast.Name)
        and child.value.id in ("self", "replica")
    }
    verls = {name: place for name in overrides | reads if (place := in_verl(links, name)) is not None}
    # A class further up, or the one that we subclass: an entry for either will do.
    known = {name for name in verls for module, owner in links if (module, f"{owner}.{name}") in ENTRIES}
    assert set(verls) - known - methods - VLLMS == set(), "read or called, without an entry"
    assert {name for name in overrides if name not in known} == set(), "overridden, without an entry"
    for name in overrides & known:
        entry = next(ENTRIES[key] for key in ((module, f"{owner}.{name}") for module, owner in links) if key in ENTRIES)
        if entry.used_by == file:
            assert entry.use == "override", entry.key


def test_each_class_of_verls_that_we_subclass_is_one_of_the_entries() -> None:
    assert len(SUBCLASSES) >= 7, "the search finds our classes"
    owners = {(symbol.module, symbol.name.partition(".")[0]) for symbol in CONTRACT}
    assert {links[0] for _, _, links in SUBCLASSES} <= owners


def test_each_import_from_verl_has_an_entry() -> None:
    used = {pair for path in PACKAGE.rglob("*.py") for pair in imported_from_verl(ast.parse(path.read_text("utf-8")))}
    owners = {(symbol.module, symbol.name.partition(".")[0]) for symbol in CONTRACT}
    # A package may hand on what its module has: `from verl.plugin.platform import PlatformRegistry`.
    missing = {
        (module, name)
        for module, name in used - BARE
        if not any(owner == name and home.startswith(module) for home, owner in owners)
    }
    assert used and missing == set()


def test_each_entry_has_a_use() -> None:
    unused = []
    for symbol in CONTRACT:
        if symbol.use == "forward":
            continue  # held below, by the server itself
        text = (PACKAGE / symbol.used_by).read_text(encoding="utf-8")
        words = {word for node in ast.walk(ast.parse(text)) for word in _words(node)}
        used = words & set(symbol.words) or (symbol.expression and any(word in text for word in symbol.words))
        if not used:
            unused.append(f"{symbol.key}: {symbol.used_by} names none of {symbol.words}")
    assert unused == []


def _words(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.rpartition(":")[2]  # a patch's target is `module:name`
    elif isinstance(node, probe.Function | ast.ClassDef | ast.alias):
        yield node.name


def test_each_patch_has_an_entry_with_its_parameters() -> None:
    patched = {
        (patch.module, patch.attribute): patch.parameters
        for patch in patches_of(OF_VERL)
        if not patch.once  # a registry, which is filled: of its entries are its methods
    }
    entries = {place: symbol.parameters for place, symbol in ENTRIES.items() if symbol.use == "patch"}
    assert patched and patched == entries


# What verl calls on the server


def test_a_trainer_that_hides_a_part_of_each_sequence_is_refused(release: tuple[str, probe.Trees]) -> None:
    version, trees = release

    def problems(workers: str, packed: bool) -> list[str]:
        model = {"use_remove_padding": packed}
        config = {"trainer": {"use_legacy_worker_impl": workers}, "actor_rollout_ref": {"model": model}}
        return list(preflight._short_attention_mask(OmegaConf.create(config), trees))

    assert len(problems("disable", False)) == (version == "0.7.1")
    assert problems("disable", True) == problems("auto", False) == []


def test_the_actor_hands_through_every_public_method_of_verls_server(release: tuple[str, probe.Trees]) -> None:
    version, trees = release
    tree = trees(probe.files(contract.SERVER)[0])
    node = probe.definition(tree, "vLLMHttpServer") if tree else None
    assert isinstance(node, ast.ClassDef)
    public = {
        child.name
        for child in node.body
        if isinstance(child, probe.Function) and not child.name.startswith("_") and not child.decorator_list
    }
    assert public <= set(METHODS)
    later = {symbol.name.partition(".")[2] for symbol in CONTRACT if symbol.since > version}
    assert set(METHODS) - public - set(OURS) <= later


def test_the_search_would_find_what_has_no_entry() -> None:
    """Control: an override that nobody wrote down."""
    tree = ast.parse("class C(vLLMHttpServer):\n    def _get_cli_description(self): return self._server_port\n")
    node = tree.body[0]
    assert isinstance(node, ast.ClassDef)
    with pytest.raises(AssertionError, match="without an entry"):
        test_each_override_and_each_attribute_that_is_read_has_an_entry("", node, [(contract.SERVER, "vLLMHttpServer")])
