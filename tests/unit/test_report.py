"""The one form of doctor's, smoke's and compare's answers."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from verl_ascend_rollout.tools import report as reports
from verl_ascend_rollout.tools.report import Check, Evidence, Report, ReportError, Section, read, write

FULL = Report(
    kind="doctor",
    title="A | title",
    facts={"versions": {"vllm": "0.28.0", "torch": None}, "bytes": 12, "eager": True, "seconds": 0.5, "gone": [1, "b"]},
    checks=(
        Check("a.good", "pass", "is fine", (Evidence("x.py:3", "class A"),), "read", "high", seconds=0.25),
        Check(
            "a.bad", "fail", "is <broken>\x1b[1m & done", (Evidence("probe", "no"),), "measured", "medium", "mend it"
        ),
        Check("a.odd", "warn", "is odd", risk="low"),
        Check("a.off", "skip", "does not apply here"),
        Check("a.dark", "unknown", "could not be read"),
    ),
    sections=(Section("Output", "Some *text*.", ("a", "b"), (("1|2", "x\ny"),), "```\nverbatim\n```"),),
)


@pytest.mark.parametrize(
    ("verdicts", "verdict", "code"),
    [
        (("pass", "skip"), "pass", 0),
        (("pass", "unknown"), "unknown", 0),
        (("unknown", "warn", "pass"), "warn", 0),
        (("warn", "fail", "pass"), "fail", 1),
        (("skip",), "unknown", 0),
        ((), "unknown", 0),
    ],
)
def test_the_verdict_is_that_of_the_worst_check(verdicts: tuple[str, ...], verdict: str, code: int) -> None:
    report = Report("doctor", "t", checks=tuple(Check(f"c{i}", v, "said") for i, v in enumerate(verdicts)))  # type: ignore[arg-type]
    assert (report.verdict, report.exit_code) == (verdict, code)


def test_the_verdict_line_counts_and_gives_the_highest_open_risk() -> None:
    assert FULL.verdict_line() == "FAIL: 1 fail, 1 warn, 1 unknown, 1 pass, 1 skip; risk medium"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"verdict": "ok"}, "'ok' is none of pass, fail"),
        ({"confidence": "sure"}, "'sure' is none of measured"),
        ({"risk": "huge"}, "'huge' is none of none, low"),
        ({"seconds": float("nan")}, "is no duration"),
        ({"seconds": -1.0}, "is no duration"),
    ],
)
def test_a_check_that_no_reader_would_take_is_not_made(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Check(**{"name": "a", "verdict": "pass", "summary": "b", **change})  # type: ignore[arg-type]


def test_a_section_with_a_ragged_table_is_not_made() -> None:
    with pytest.raises(ValueError, match="1 cells under 2 columns"):
        Section("t", columns=("a", "b"), rows=(("1",),))


def test_json_comes_back_as_it_was() -> None:
    text = FULL.to_json()
    plain = json.loads(text)
    assert (plain["schema"], plain["kind"], plain["verdict"]) == (reports.SCHEMA, "doctor", "fail")
    again = Report.from_json(text)
    assert again == FULL
    assert again.to_json() == text


def test_a_newer_minor_version_is_read() -> None:
    plain = {**json.loads(FULL.to_json()), "schema": "1.9", "colour": "blue"}
    assert Report.from_json(json.dumps(plain)).checks == FULL.checks


def test_a_number_that_is_none_is_told_from_one_that_was_not_measured() -> None:
    text = Report("smoke", "t", {"a": float("nan"), "b": [float("-inf")], "c": None}).to_json()
    assert json.loads(text)["facts"] == {"a": "nan", "b": ["-inf"], "c": None}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "truncated"),
        (FULL.to_json()[:-200], "truncated"),
        ("[1, 2]", "Expected `object`, got `array`"),
        ("{}", "missing required field `schema`"),
        ('{"schema": 1, "kind": "doctor"}', "Expected `str`, got `int`"),
        ('{"schema": "new", "kind": "doctor"}', "its schema is no version"),
        ('{"schema": "1.0", "kind": "doctor"}', "missing required field `title`"),
        ('{"schema": "2.0", "kind": "doctor"}', "has schema 2.0, and this ascend-safe reads schema 1.0"),
        ('{"schema": "1.0", "kind": "doctor", "title": "t", "facts": {"x": NaN}}', "invalid character"),
        ('{"schema": "1.0", "kind": "d", "title": "t", "checks": [{"name": "a"}]}', "`$.checks[0]`"),
        ('{"schema": "1.0", "kind": "d", "title": "t", "checks": [{"name": "a", "verdict": "ok"}]}', "'ok'"),
        ('{"schema": "1.0", "kind": "d", "title": "t", "sections": [{"title": "a", "rows": [["1"]]}]}', "columns"),
        (b"\xff\xfe\x00", "malformed"),
        (b'{"schema": "1.0", "kind": "\xff", "title": "t"}', "utf-8"),
        ("[" * 100_000, "Expected `object`, got `array`"),
        ('{"schema":"1.0","kind":"d","title":"t","facts":' + '{"a":' * 100_000, "nested"),
    ],
)
def test_what_is_no_report_is_refused_with_one_sentence(text: str | bytes, says: str) -> None:
    with pytest.raises(ReportError) as refused:
        Report.from_json(text, "a.json")
    message = str(refused.value)
    assert message.startswith("a.json ")
    assert says in message
    assert len(message) < 300 and "\n" not in message


def test_a_file_is_written_in_every_form_and_read_again(tmp_path: Path) -> None:
    for form in reports.FORMS:
        write(FULL, tmp_path / "made" / form, form)
        assert (tmp_path / "made" / form).stat().st_size > 500
    assert read(tmp_path / "made" / "json") == FULL


def test_files_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ReportError, match=r"gone.json cannot be read: No such file"):
        read(tmp_path / "gone.json")
    with pytest.raises(ReportError, match=r"cannot be read: Is a directory"):
        read(tmp_path)
    with pytest.raises(ReportError, match=r"cannot be written: "):
        write(FULL, tmp_path / "file" / "a.json", "json")
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(100 * 2**20)
    with pytest.raises(ReportError, match=r"large.json has 100 MiB, and a report has at most 32"):
        read(tmp_path / "large.json")


def test_markdown() -> None:
    text = FULL.to_markdown()
    lines = text.splitlines()
    assert lines[0] == "# A | title"
    assert "| versions.vllm | 0.28.0 |" in lines
    assert "| versions.torch | not known |" in lines
    assert "| fail | a.bad | is &lt;broken> & done | measured | medium |" in lines
    assert "- `x.py:3`: class A" in lines
    assert "- What to do: mend it" in lines
    assert "| 1\\|2 | x<br>y |" in lines
    # Text that has a fence of its own is fenced with a longer one.
    assert "````\n```\nverbatim\n```\n````" in text
    assert lines[-1] == "Verdict: **FAIL: 1 fail, 1 warn, 1 unknown, 1 pass, 1 skip; risk medium**"


def test_junit_is_what_a_ci_system_reads() -> None:
    """The elements, attributes and order of the schema of Jenkins' xUnit plug-in."""
    root = ElementTree.fromstring(FULL.to_junit())
    assert root.tag == "testsuites"
    (suite,) = root
    assert suite.tag == "testsuite"
    assert {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped", "time")} == {
        "name": "ascend-safe doctor",
        "tests": "5",
        "failures": "1",
        "errors": "0",
        "skipped": "2",
        "time": "0.250",
    }
    assert FULL.created.startswith(suite.attrib["timestamp"])
    assert suite[0].tag == "properties"
    assert {p.get("name"): p.get("value") for p in suite[0]}["versions.vllm"] == "0.28.0"
    cases = {case.get("name"): case for case in suite[1:]}
    assert {case.tag for case in cases.values()} == {"testcase"}
    assert {case.get("classname") for case in cases.values()} == {"ascend-safe.doctor"}
    assert {name: [child.tag for child in case] for name, case in cases.items()} == {
        "a.good": ["system-out"],
        "a.bad": ["failure"],
        "a.odd": ["system-out"],
        "a.off": ["skipped", "system-out"],
        "a.dark": ["skipped", "system-out"],
    }
    failure = cases["a.bad"][0]
    assert failure.get("message") == "is <broken> & done"
    assert "What to do: mend it" in (failure.text or "")


def test_a_report_is_redacted_on_its_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a1B2" * 6
    report = Report(
        "smoke",
        f"with {token}",
        {f"key {token}": {"deep": [f"in {token}"]}},
        (Check("c", "fail", token, (Evidence(token, token),), advice=token),),
        (Section(token, token, (token,), ((token,),), token),),
    )
    for form, to_text in reports.FORMS.items():
        text = to_text(report)
        assert token not in text, form
        assert text.count("[secret]") >= 8, form
