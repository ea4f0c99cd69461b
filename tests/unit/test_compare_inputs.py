"""What people give `ascend-safe compare` that it cannot compare, or that was written to do harm: a sentence each."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smoke_reports import A100, CPU_TINY, NPU_910C, NPU_STAND_IN, report_of, saved

from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.cli import main
from verl_ascend_rollout.tools.report import Check, Report
from verl_ascend_rollout.tools.smoke.measured import Smoke, Warned, Warnings

GOOD_TEXT = report_of(NPU_910C).to_json()


def edited(change: Callable[[dict[str, Any]], Any]) -> str:
    plain = json.loads(GOOD_TEXT)
    change(plain["facts"])
    return json.dumps(plain)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["compare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ascend-safe: ") and captured.err.count("\n") == 1 and len(captured.err) < 600
    return captured.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "truncated"),
        (GOOD_TEXT[: len(GOOD_TEXT) // 2], "truncated"),
        ("{}", "missing required field `schema`"),
        ("null", "got `null`"),
        (GOOD_TEXT.replace('"schema": "1.0"', '"schema": "2.0"'), "has schema 2.0, and this ascend-safe reads"),
        (GOOD_TEXT.replace('"schema": "1.0"', f'"schema": "{"1" * 5000}.0"'), "its schema is no version"),
        (GOOD_TEXT.replace('"kind": "smoke"', '"kind": "doctor"'), "is a doctor report, and "),
        (GOOD_TEXT.replace('"kind": "smoke"', '"kind": "compare"'), "is a compare report"),
        (edited(lambda facts: facts["warm"].update(seconds="nan")), "Expected `float`, got `str`"),
        (edited(lambda facts: facts["warm"].update(seconds=float("nan"))), "is no report of ascend-safe"),
        (edited(lambda facts: facts["warm"].update(seconds=float("inf"))), "is no report of ascend-safe"),
        (edited(lambda facts: facts["warm"].update(seconds=-1.0)), "Expected `float` >= 0.0 - at `$.warm.seconds`"),
        (edited(lambda facts: facts["warm"].update(seconds=1e12)), "Expected `float` <= 1000000000.0 - at `$.warm"),
        (edited(lambda facts: facts["warm"].update(seconds=12345)).replace("12345", "1e400"), "out of range"),
        (edited(lambda facts: facts["warm"].update(seconds=10**400)), "is no smoke report of ascend-safe: "),
        (edited(lambda facts: facts["memory"].update(weights=10**30)), "Expected `int` <= 1152921504606846976 - at"),
        (edited(lambda facts: facts["memory"].update(weights=-5)), "Expected `int` >= 0 - at `$.memory.weights`"),
        (edited(lambda facts: facts["memory"].update(weights=1.5)), "Expected `int | null`, got `float`"),
        (edited(lambda facts: facts["warnings"]["unknown"][0].update(count=-1)), "at `$.warnings.unknown[0].count`"),
        (edited(lambda facts: facts["warm"].pop("seconds")), "missing required field `seconds`"),
        (edited(lambda facts: facts["output"].update(text=None)), "Expected `str`, got `null`"),
        (edited(lambda facts: facts["output"]["logprobs"].pop()), "output.logprobs has 22 values for 23 tokens"),
        (edited(lambda facts: facts["output"]["prompt_logprobs"].pop()), "prompt_logprobs has 8 values for 10 prompt"),
        (
            edited(lambda facts: facts["output"]["logprobs"].__setitem__(3, 2.5)),
            "Expected `float` <= 0.001 - at `$.output.logprobs[3]`",
        ),
        (
            edited(lambda facts: facts["output"]["logprobs"].__setitem__(3, -1e300)),
            "Expected `float` >= -100000.0 - at",
        ),
        (
            edited(lambda facts: facts.update(more_outputs=[{"prompt": "p", "token_ids": [1], "logprobs": [-1, -2]}])),
            "output.logprobs has 2 values for 1 tokens",
        ),
        (
            edited(lambda facts: facts["output"]["token_ids"].__setitem__(0, -7)),
            "Expected `int` >= 0 - at `$.output.token_ids[0]`",
        ),
        ('{"schema": "1.0", "kind": "smoke", "title": "t", "facts": {"model": ' + '{"name": ' * 100_000, "nested"),
        (b"\x7fELF\x02\x01\x01\x00" + bytes(range(256)) * 8, "malformed"),
        (GOOD_TEXT.replace("answer", "x").encode().replace(b"2+2 is 4", b"\xff\xfe"), "utf-8"),
        ('{"schema": "1.0", "kind": "' + "\\u001b[2J" + "k" * 100_000 + '", "title": "t"}', "more characters"),
    ],
)
def test_what_is_no_smoke_report_is_refused_with_one_sentence(
    content: str | bytes, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = saved(tmp_path, good=A100)[0]
    bad = tmp_path / "bad.json"
    bad.write_bytes(content.encode() if isinstance(content, str) else content)
    told = refused(capsys, good, str(bad))
    assert "bad.json" in told and says in told
    assert "\x1b" not in told
    assert "bad.json" in refused(capsys, str(bad), good)


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, other = saved(tmp_path, good=A100, other=NPU_910C)
    assert "gone.json cannot be read: No such file" in refused(capsys, good, str(tmp_path / "gone.json"))
    (tmp_path / "folder.json").mkdir()
    assert "folder.json cannot be read: Is a directory" in refused(capsys, good, str(tmp_path / "folder.json"))
    assert "/dev/zero has more than 32 MiB" in refused(capsys, good, "/dev/zero")
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(100 * 2**20)
    assert "large.json has 100 MiB, and a report has at most 32" in refused(capsys, good, str(tmp_path / "large.json"))
    assert "two reports or more" in refused(capsys, good)
    assert "good.json is given twice" in refused(capsys, good, other, good)
    os.symlink(good, tmp_path / "link.json")
    assert "link.json is given twice" in refused(capsys, good, str(tmp_path / "link.json"))
    (tmp_path / "copy.json").write_bytes(Path(good).read_bytes())
    assert "are the same report" in refused(capsys, good, str(tmp_path / "copy.json"))


@pytest.mark.parametrize("form", ["--json", "--markdown", "--junit", "--plot"])
def test_a_report_that_is_read_is_not_written_over(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = saved(tmp_path, good=A100, other=NPU_910C)
    os.link(other, tmp_path / "link.png")
    before = Path(good).read_bytes(), Path(other).read_bytes()
    for file, source in ((good, good), (tmp_path / "link.png", other)):
        told = refused(capsys, good, other, form, str(file))
        assert f"{form} {file} would overwrite {source}, which is read: name another file" in told
    assert (Path(good).read_bytes(), Path(other).read_bytes()) == before
    # Nor is a file written twice, and /dev/null is none.
    out = str(tmp_path / "out.png")
    told = refused(capsys, good, other, "--plot", out, "--junit", f"{tmp_path}/../{tmp_path.name}/out.png")
    assert "are the same file: name one for each" in told
    assert main(["compare", good, other, "--json", "/dev/null", "--junit", "/dev/null"]) == 0


@pytest.mark.parametrize("form", ["--json", "--markdown", "--junit"])
def test_a_file_that_cannot_be_written_costs_no_answer(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = saved(tmp_path, good=A100, other=NPU_910C)
    assert main(["compare", good, other]) == 0
    answer = capsys.readouterr().out
    picture = tmp_path / "drawn.svg"
    assert main(["compare", good, other, form, "/dev/full", "--plot", str(picture)]) == 2
    captured = capsys.readouterr()
    # Each has its time in the third line.
    assert captured.out.splitlines()[3:] == answer.splitlines()[3:]
    assert captured.err == "ascend-safe: /dev/full cannot be written: No space left on device\n"
    assert picture.read_text().startswith("<?xml")


def test_a_file_that_may_not_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the error that the system gives: a test may run as a user who may read everything."""
    good, closed = saved(tmp_path, good=A100, closed=NPU_910C)
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == "closed.json":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    assert "closed.json cannot be read: Permission denied" in refused(capsys, good, closed)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["a"], "--label is given 1 times for 2 reports"),
        (["a", "a"], "--label 'a' is given twice"),
        (["a", "|<>|"], "has nothing that can be shown"),
    ],
)
def test_labels_that_do_not_fit(
    labels: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = saved(tmp_path, a=A100, b=NPU_910C)
    assert says in refused(capsys, *files, *(part for label in labels for part in ("--label", label)))


def test_a_file_name_does_not_colour_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path, good=A100)[0]
    told = refused(capsys, good, str(tmp_path / "a\x1b[31m\nb\x9bc.json"))
    assert "\x1b" not in told and "\x9b" not in told


HOSTILE = (
    "\x1b]0;title\x07\x1b[31mred\x9b2J \u202egnp \x00 | <script>alert(1)</script> [click](http://a.example) "
    "![i](http://a.example/p.png) `code` **bold** $x$ &lt; \n\n# Heading\n\n| a | b |\n```\nfence\n```\n"
)


def hostile() -> Smoke:
    """Every text in it wants to be something else."""

    def spoil(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: spoil(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, tuple):
            return tuple(spoil(item) for item in value)
        if isinstance(value, dict):
            return {f"{key} {HOSTILE}": HOSTILE for key in value}
        return value

    spoiled: Smoke = spoil(NPU_910C)
    return dataclasses.replace(
        spoiled, ended_in="done", warnings=Warnings((Warned(HOSTILE, 1, HOSTILE, HOSTILE),) * 50)
    )


def outside_fences(text: str) -> list[str]:
    lines, fence = [], ""
    for line in text.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line
        else:
            lines.append(line)
    assert fence == "", "a fence is left open"
    return lines


def test_text_that_wants_to_be_more_is_only_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path, good=A100)[0]
    bad = report_of(hostile(), Check("reference", "fail", HOSTILE), Check(HOSTILE, "skip", HOSTILE), created=HOSTILE)
    reports.write(bad, tmp_path / "bad.json", "json")
    outs = {form: tmp_path / form for form in reports.FORMS}
    arguments = [part for form, path in outs.items() if form != "markdown" for part in (f"--{form}", str(path))]
    status = main(["compare", good, str(tmp_path / "bad.json"), *arguments, "--plot", str(tmp_path / "a.svg")])
    text = capsys.readouterr().out
    assert status == 1
    drawn = (tmp_path / "a.svg").read_text()
    for written in (text, drawn, *(path.read_text() for form, path in outs.items() if form != "markdown")):
        assert not set("\x1b\x9b\x07\x00\u202e") & set(written)
    assert "<script>" not in drawn
    lines = outside_fences(text)
    widths = {}
    for line in lines:
        assert "<script" not in line and "**bold**" not in line.replace("\\*", "")
        assert "[click](" not in line and "[i](" not in line
        assert not line.startswith("# Heading")
    # Every row of a table has as many cells as its heading.
    for number, line in enumerate(lines):
        if line.startswith("|"):
            cells = line.replace("\\|", "").count("|")
            if not lines[number - 1].startswith("|"):
                widths["table"] = cells
            assert cells == widths["table"], line


def test_a_token_in_an_answer_does_not_get_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where its underscore is escaped for Markdown."""
    token = "hf_" + "a1B2" * 6
    assert CPU_TINY.output is not None
    leaky = dataclasses.replace(
        CPU_TINY,
        output=dataclasses.replace(CPU_TINY.output, text=token),
        command=f"smoke --tiny --prompt {token}",
        warnings=Warnings(unknown=(Warned(f"cannot log in with {token}"),)),
    )
    plain = json.loads(report_of(CPU_TINY).to_json())
    plain["facts"] = leaky.as_facts()  # somebody else's tool may not have redacted it
    (tmp_path / "leaky.json").write_text(json.dumps(plain))
    other = saved(tmp_path, other=NPU_STAND_IN)[0]
    outs = [tmp_path / form for form in reports.FORMS]
    main(["compare", str(tmp_path / "leaky.json"), other])
    text = capsys.readouterr().out
    main(["compare", str(tmp_path / "leaky.json"), other, *(p for out in outs for p in (f"--{out.name}", str(out)))])
    for written in (text, *(out.read_text() for out in outs)):
        assert token not in written.replace("\\", "")
    assert text.count("secret") >= 4


def test_huge_texts_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert CPU_TINY.output is not None
    huge = dataclasses.replace(
        CPU_TINY,
        output=dataclasses.replace(CPU_TINY.output, prompt="p " * 200_000, text="`|[" * 200_000),
        command="c" * 300_000,
        warnings=Warnings(unknown=tuple(Warned(f"{number} " + "w" * 10_000) for number in range(100))),
        versions={f"package-{number}": "1" for number in range(1000)},
    )
    plain = json.loads(report_of(CPU_TINY).to_json())
    plain["facts"] = huge.as_facts()
    (tmp_path / "huge.json").write_text(json.dumps(plain))
    assert main(["compare", str(tmp_path / "huge.json"), *saved(tmp_path, other=NPU_STAND_IN)]) == 0
    text = capsys.readouterr().out
    assert len(text) < 200_000
    assert "more characters" in text and "100 kinds in all. The first 30 are shown; the reports have" in text


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    files = saved(tmp_path, a=A100, b=NPU_910C)
    command = [sys.executable, "-m", "verl_ascend_rollout.tools.cli", "compare", *files]
    # A pipe whose other end is closed before anything is written.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_that_knows_no_unicode_gets_the_report(tmp_path: Path) -> None:
    files = saved(tmp_path, a=A100, b=NPU_910C)
    command = [sys.executable, "-m", "verl_ascend_rollout.tools.cli", "compare", *files]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, timeout=120, env=environ)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"prompt \\u2192 text" in done.stdout


def test_it_needs_no_platform(tmp_path: Path) -> None:
    """Neither torch nor vLLM nor matplotlib is looked for."""
    files = saved(tmp_path, a=A100, b=NPU_910C)
    program = (
        "import sys\n"
        "for name in ('torch', 'vllm', 'verl', 'ray', 'torch_npu', 'matplotlib', 'numpy', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from verl_ascend_rollout.tools.cli import main\n"
        f"sys.exit(main(['compare', *{files!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "## Conclusion" in done.stdout


# Any change at all to a good report.

JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["nan", "inf", "\x1b[31m", "1e400", [], {}, [None], {"a": 1}, 0, 0.0, -1, "|", [1, 2], [0.5]]),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)), max_size=4),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5)), max_size=3),
)


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [where] if where else []
    if isinstance(value, dict):
        for key, item in value.items():
            found += places(item, (*where, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:3]):
            found += places(item, (*where, index))
    return found


PLAIN: dict[str, Any] = json.loads(report_of(NPU_STAND_IN).to_json())
PLACES = places(PLAIN)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A smoke report with some of its values gone, of another type, or swapped."""
    plain = copy.deepcopy(PLAIN)
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from(PLACES))
        parent: Any = plain
        try:
            for step in way:
                parent = parent[step]
            what = draw(st.sampled_from(["delete", "junk", "double", "swap"]))
            if what == "delete":
                del parent[last]
            elif what == "junk":
                parent[last] = draw(JUNK)
            elif what == "double" and isinstance(parent, list):
                parent.append(parent[last])
            else:
                *other_way, other = draw(st.sampled_from(PLACES))
                source: Any = PLAIN
                for step in other_way:
                    source = source[step]
                parent[last] = copy.deepcopy(source[other])
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    return plain


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(first=mutated(), second=mutated(), good_first=st.booleans())
def test_no_change_to_a_report_brings_a_traceback(
    first: dict[str, Any], second: dict[str, Any], good_first: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/a.json", f"{folder}/b.json"]
        Path(files[0]).write_text(report_of(CPU_TINY).to_json() if good_first else json.dumps(first))
        Path(files[1]).write_text(json.dumps(second))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["compare", *files, "--json", f"{folder}/c.json"])
        assert status in (0, 1, 2)
        assert err.getvalue().count("\n") == (1 if status == 2 else 0)
        if status == 2:
            assert ("a.json" in err.getvalue() or "b.json" in err.getvalue()) and out.getvalue() == ""
        else:
            assert "## Conclusion" in out.getvalue() and "\x1b" not in out.getvalue()
            assert isinstance(reports.read(f"{folder}/c.json"), Report)


@settings(max_examples=60)
@given(st.binary(max_size=200), st.integers(0, len(GOOD_TEXT.encode())), st.integers(0, 200))
def test_no_bytes_bring_a_traceback(junk: bytes, at: int, dropped: int) -> None:
    good = GOOD_TEXT.encode()
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/a.json", f"{folder}/b.json"]
        Path(files[0]).write_text(report_of(A100).to_json())
        Path(files[1]).write_bytes(good[:at] + junk + good[at + dropped :])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["compare", *files])
        assert status in (0, 1, 2)
        assert err.getvalue().count("\n") == (1 if status == 2 else 0)
