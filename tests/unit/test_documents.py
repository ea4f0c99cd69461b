"""README, its translation, docs/ and the recipes' READMEs: held against the code, each other, and the tree.

What is composed by verl itself is tests/contract/test_documented_commands.py.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import yaml

from verl_ascend_rollout.options import AscendSafeOptions
from verl_ascend_rollout.tools.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
README, CHINESE, DOCS = ROOT / "README.md", ROOT / "README.zh-CN.md", ROOT / "docs"
PAGES = sorted(
    [
        *(file for file in ROOT.glob("*.md") if file.name != "CHANGELOG.md"),
        *DOCS.glob("*.md"),
        *ROOT.glob("recipes/*/README.md"),
        ROOT / "docker/README.md",
        ROOT / "emulator/README.md",
    ]
)


def load(name: str) -> ModuleType:
    """A script of docs/."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_blocks(text: str) -> list[list[str]]:
    """The indented and fenced blocks of a page, without the fences."""
    fenced = [
        block.strip("\n").splitlines() for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^|(?<=\n\n))((?: {4}.*\n)(?:(?: {4}.*)?\n)*)", plain)
    return fenced + [[line[4:] for line in block.rstrip().splitlines()] for block in indented]


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells."""
    found = re.findall(r"^(?:\|.*\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table.splitlines()] for table in found
    ]


def headings(text: str) -> list[str]:
    """The headings of a page."""
    without = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ .*", without, re.MULTILINE)


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    words = re.sub(r"[`*]", "", heading.lstrip("#").strip()).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


# --- the pages that are made of the code


@pytest.mark.parametrize("name", ["options.md", "events.md"])
def test_the_reference_is_what_the_code_says(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == load("reference").PAGES[name](), "run python docs/reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_row_of_a_table_is_the_rest_of_another(page: Path) -> None:
    for table in tables(page.read_text(encoding="utf-8")):
        assert not [row for row in table if "``" in row]
        assert len({len(row) for row in table}) == 1, table[0]


def test_the_reference_leaves_nothing_out() -> None:
    page = (DOCS / "options.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(AscendSafeOptions):
        assert f"## `{field.name}`" in page


@pytest.mark.parametrize("file", [README, CHINESE], ids=lambda file: file.name)
def test_the_readmes_table_has_the_options_with_their_values_and_defaults(file: Path) -> None:
    (table,) = [table for table in tables(file.read_text(encoding="utf-8")) if table[2][0] == "`on_unsafe`"]
    hints = get_type_hints(AscendSafeOptions)
    assert [row[0] for row in table[2:]] == [f"`{field.name}`" for field in dataclasses.fields(AscendSafeOptions)]
    for row, field in zip(table[2:], dataclasses.fields(AscendSafeOptions), strict=True):
        choices = [f"`{value}`" for value in get_args(hints[field.name]) if isinstance(value, str)]
        if choices:
            assert row[1].replace("、", ", ").split(", ") == choices and choices[0] == f"`{field.default}`"
        else:
            assert field.default is None or row[1] == f"`{field.default:.0f}`"


# --- one README in two languages


def test_both_readmes_have_the_same_headings_commands_tables_links_and_pictures() -> None:
    english, chinese = README.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8")
    assert [heading.split()[0] for heading in headings(english)] == [
        heading.split()[0] for heading in headings(chinese)
    ]

    def commands(text: str) -> list[list[str]]:
        return [[line.partition("  #")[0].rstrip() for line in block] for block in code_blocks(text)]

    assert commands(english) == commands(chinese)
    sizes = [[len(row) for row in table] for table in tables(english)]
    assert sizes == [[len(row) for row in table] for table in tables(chinese)]
    for left, right in zip(tables(english), tables(chinese), strict=True):
        for one, other in zip(left[2:], right[2:], strict=True):
            assert re.findall(r"`[^`]*`|#\d+|\d[\d.]*", " ".join(one)) == re.findall(
                r"`[^`]*`|#\d+|\d[\d.]*", " ".join(other)
            ), one[0]

    def links(text: str) -> list[str]:
        return [link for link in re.findall(r"\]\(([^)]+)\)", text) if "README" not in link or "/" in link]

    assert sorted(links(english)) == sorted(links(chinese))


# --- messages


def literals() -> str:
    """Every piece of text in the package, each on a line; what is put in stands as a `{}`."""
    found = []
    for file in [*ROOT.glob("verl_ascend_rollout/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py")]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        unsaid = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if node in unsaid:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.BinOp):
                sides = [side.value for side in (node.left, node.right) if isinstance(side, ast.Constant)]
                found += ["".join(sides)] if all(isinstance(side, str) for side in sides) else []
    return "\n".join(found)


def messages() -> Iterator[tuple[str, list[str]]]:
    """Each section of the page, with its messages."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for section in page.split("\n## ")[1:]:
        (table,) = tables(section)
        yield section.splitlines()[0], [row[0] for row in table[2:]]


def test_each_message_of_ours_is_one_that_the_code_prints() -> None:
    said = literals()
    *ours, (title, theirs) = messages()
    assert title.startswith("What verl, vLLM")
    assert sum(len(rows) for _, rows in ours) >= 40 and len(theirs) >= 20
    strange = []
    for _, rows in ours:
        for row in rows:
            for message in re.findall(r"`([^`]+)`", row):
                # What differs is put into the sentence by an f-string or by the logging module.
                parts = [re.escape(part.strip()) for part in message.split("…")]
                if not re.search(r"[^\n]*".join(parts), said):
                    strange.append(message)
    assert strange == []


def test_the_search_for_messages_finds_no_other() -> None:
    assert "leaves no room to generate below" in literals()
    assert "leaves no room to breathe" not in literals()


def test_each_message_has_a_cause_and_no_row_is_twice() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [row for table in tables(page) for row in table[2:]]
    assert all(len(row) == 3 and row[1] for row in rows)
    assert len({row[0] for row in rows}) == len(rows)


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_the_repository_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, place = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            place and target.suffix == ".md" and place not in map(slug, headings(target.read_text(encoding="utf-8")))
        ):
            dead.append(link)
    assert dead == []


def test_the_link_checker_of_the_site_finds_what_is_dead(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<p id="x"><a href="b.html#y"><a href="b.html#z"><img src="c.png"><a href="#x">')
    (tmp_path / "b.html").write_text('<h1 id="y"><a href="https://example.org/">')
    assert load("check_links").dead(tmp_path) == ["a.html: b.html#z", "a.html: c.png"]


def test_every_page_is_in_the_sites_table_of_contents() -> None:
    listed = re.findall(r"[\w.-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(file.name for file in DOCS.glob("*.md"))


# --- commands

COMMAND = r"(?:[A-Z_]+=\S+ )*(?:make|ascend-safe|python[\d.]*|pip|docker|ray|source|\.?[\w./-]+\.sh|\.venv/\S+)(?: |$)"

OTHERS = {"source", "pip", "docker", "ray", "eval"}
"""What is not ours: whether it works is not tested here."""


def commands() -> Iterator[tuple[str, str]]:
    """Every line of every block that is a command, with its page."""
    for page in PAGES:
        if page.parent.name == "emulator" or page.name in ("ARCHITECTURE.md", "stacks.md"):
            continue
        for block in code_blocks(page.read_text(encoding="utf-8")):
            for line in "\n".join(block).replace("\\\n", "").splitlines():
                command = re.split(r"\s#\s", line)[0].strip()
                if re.match(COMMAND, command):
                    yield str(page.relative_to(ROOT)), command


def test_there_are_commands() -> None:
    assert len(list(commands())) > 60


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_every_command_is_one_that_there_is(page: str, command: str) -> None:
    """Its options are parsed where the program is ours, and its files and targets are looked for."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    words = words[: words.index(">")] if ">" in words else words
    program, rest = words[0], words[1:]
    if program.endswith("/ascend-safe"):
        program = "ascend-safe"
    for word in rest:
        if re.match(r"(?:recipes|tests|docs|docker|requirements|emulator)/[\w./-]+$", word):
            assert (ROOT / word).exists(), word
    if program == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif program == "ascend-safe":
        arguments = _parser().parse_args(rest)
        assert callable(arguments.run)
    elif program.endswith(".sh"):
        assert (ROOT / program).is_file() or (ROOT / "recipes/grpo_qwen1_5_moe" / program).is_file()
    elif program.startswith((".venv", "python")):
        module = rest[rest.index("-m") + 1] if "-m" in rest else None
        assert module is None or importlib.util.find_spec(module.partition(".")[0]) is not None
        script = rest[0] if rest else ""
        assert (
            module
            or not script.endswith(".py")
            or (ROOT / script).is_file()
            or (ROOT / page).parent.joinpath(script).is_file()
        )
    else:
        assert program in OTHERS


def test_the_images_that_the_dockerfiles_build_on_are_arguments() -> None:
    for file in ("Dockerfile.ascend", "Dockerfile.cuda"):
        lines = [line for line in (ROOT / "docker" / file).read_text().splitlines() if line and line[0] != "#"]
        assert lines[0].startswith("ARG IMAGE=") and lines[1] == "FROM ${IMAGE}" and len(lines) == 5


def test_the_runtime_env_is_yaml_of_plain_strings() -> None:
    env = yaml.safe_load((ROOT / "recipes/runtime_env.yaml").read_text(encoding="utf-8"))
    assert all(isinstance(value, str) for value in env["env_vars"].values())
    # Of what run.sh reads, nothing else reaches a job; a working directory would, and with it OUT (docs/cluster.md).
    assert {"NODES", "DEVICES", "DATA", "OUT"} <= set(env["env_vars"]) and set(env) == {"env_vars"}
    for file in (ROOT / "recipes").glob("*/README.md"):
        for command in re.findall(r"^    (ray job submit .*)$", file.read_text(encoding="utf-8"), re.MULTILINE):
            words = shlex.split(command)
            assert "--address" in words and "--working-dir" not in words
            script = words[words.index("--") + 1]
            assert script.startswith("/") and (ROOT / script.partition("/verl_ascend_rollout/")[2]).is_file()


def test_the_emulators_page_has_each_stack_with_verl() -> None:
    """Under the heading that says which verl it is, and for which Python."""
    page = (ROOT / "emulator/README.md").read_text(encoding="utf-8")
    (table,) = [table for table in tables(page) if table[0][:3] == ["stack", "verl", "Python"]]
    told = {name: row[1:3] for row in table[2:] for name in row[0].split(", ")}
    text = (ROOT / "emulator/stacks.toml").read_text(encoding="utf-8")
    sections = re.split(r'^\[stack\."(.*)"\]$', text, flags=re.MULTILINE)[1:]
    stacks = dict(zip(sections[::2], sections[1::2], strict=True))
    found = {name: re.findall(r'"verl==(.*?)"', stack) for name, stack in stacks.items()}
    python = {name: re.findall(r'^python = "(.*)"', stack, re.MULTILINE) for name, stack in stacks.items()}
    like = {name: re.findall(r'^like = "(.*)"', stack, re.MULTILINE) for name, stack in stacks.items()}
    assert told == {
        name: [verl, *(python[name] or python[like[name][0]])] for name, versions in found.items() for verl in versions
    }


def test_the_workflows_call_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for file in (ROOT / ".github/workflows").glob("*.yml"):
        workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
        runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
        assert runs and all("timeout-minutes" in job for job in workflow["jobs"].values())
        for run in runs:
            assert set(re.findall(r"\bmake ([a-z-]+)", run)) <= targets
            assert ".ci/run" not in run or (ROOT / ".ci/run").is_file()
    for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(file.read_text(encoding="utf-8"))
        if file.name != "config.yml":
            assert form["body"][0]["attributes"]["label"] == "The doctor's block"
    yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
