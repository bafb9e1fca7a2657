"""The report holds what the records hold: every number, every plot, nothing from outside, and where braze is slower."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, example, given, settings

from braze.benchmarks.__main__ import main
from braze.benchmarks.report import markdown, page, readme, results
from braze.benchmarks.report.columns import Column, plain
from braze.benchmarks.report.comparisons import SLOWER, comparisons, geometric_mean, slower, standings
from braze.benchmarks.report.contents import gather
from braze.benchmarks.report.results import ResultFile, load
from braze.benchmarks.report.sections import SECTIONS

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"processor": "a processor", "cores": 2, "threads": 1, "torch": "2.11", "date": "2026-01-02T03:04:05"}

WORDS = st.text(st.sampled_from("ab <>&\"'$|\\{}é"), min_size=1, max_size=6)
POSITIVE = st.floats(1e-6, 1e6)
FIGURES = {
    "median_ms": POSITIVE, "quartile_low_ms": POSITIVE, "quartile_high_ms": POSITIVE, "ratio": POSITIVE,
    "ratio_low": POSITIVE, "ratio_high": POSITIVE, "error_outputs": st.floats(0, 1) | st.just(math.inf),
    "error_gradients": st.none() | st.floats(0, 1), "least_bytes": st.integers(0, 2**40), "host_us": POSITIVE,
    "peak_bytes": st.integers(0, 2**40), "copy_ceiling_gbs": POSITIVE, "predicted_us": POSITIVE,
    "size": st.integers(1, 2**20),
}  # fmt: skip
RECORDS = st.fixed_dictionaries(
    {
        "benchmark": st.sampled_from(["ops", "scaling", "losses", "models", "something new"]),
        "op": st.sampled_from(["rms_norm", "<b>"]),
        "provider": st.sampled_from(["braze", "aten", "copy", "a & b"]),
    },
    optional={
        "pass": st.sampled_from(["forward", "backward"]),
        "dtype": st.just("float32"),
        "model": WORDS,
        "shape": WORDS,
        "status": st.sampled_from(["ok", "wrong: output 0", "unavailable: not installed", "skipped: memory"]),
        **FIGURES,
    },
)


def files(records: list, environment: dict | None = None) -> list[ResultFile]:
    environment = ENVIRONMENT if environment is None else environment
    return [ResultFile("f.json", "ops", environment, [results._named(r, "ops", environment) for r in records])]


class Page(html.parser.HTMLParser):
    """Tables as rows of (text, value); figures with what they draw; everything that names another place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, str | None]]] = []
        self.figures: list[int] = []
        self.places: list[str] = []
        self._cell: list | None = None
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        named = dict(attributes)
        self.places += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data") and v[:1] != "#"
        ]
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self._cell = ["", named.get("data-value")]
        elif tag == "figure":
            self.figures.append(0)
        elif tag in ("path", "use") and self.figures:
            self.figures[-1] += 1
        if tag not in ("meta", "input", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "td":
            self.rows[-1].append((self._cell[0], self._cell[1]))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell[0] += data


def usable(record: dict, *names: str) -> bool:
    values = (record.get(name) for name in names)
    return all(isinstance(v, int | float) and math.isfinite(v) and v > 0 for v in values)


def expected_figures(records: list[dict]) -> int:
    """Counted anew, from what each plot is said to show."""
    count = 0
    ops = [r for r in records if r["benchmark"] == "ops"]
    rivals = [r for r in records if usable(r, "ratio") and r["provider"] not in ("braze", "copy")]
    count += any(r["benchmark"] == "ops" for r in rivals)
    count += any(
        not math.isnan(r.get(n) or 0) and r.get(n) is not None
        for r in ops
        for n in ("error_outputs", "error_gradients")
    )
    count += any(usable(r, "peak_bytes", "least_bytes") for r in ops)
    count += len({r["op"] for r in ops if usable(r, "median_ms", "least_bytes")})
    for name in ("losses", "models"):
        own = [r for r in records if r["benchmark"] == name]
        count += any(r["benchmark"] == name for r in rivals) + any(usable(r, "peak_bytes") for r in own)
    scaled = [r for r in records if r["benchmark"] == "scaling" and usable(r, "size", "median_ms")]
    count += len({(r["op"], r.get("pass"), r.get("dtype")) for r in scaled})
    return count + any(r["benchmark"] == "something new" for r in rivals)


#: A record with every field, of each benchmark, operator and provider.
FULL = [
    {"benchmark": benchmark, "op": op, "provider": provider, "pass": "forward", "dtype": "float32", "model": "<model>",
     "shape": "N=1", "status": "ok", "error_gradients": 1e-3, "least_bytes": 1000 + 7 * i, "peak_bytes": 2000,
     "size": 64, **dict.fromkeys((name for name in FIGURES if FIGURES[name] is POSITIVE), 1.5 + i)}
    for i, (benchmark, op, provider) in enumerate(itertools.product(
        ("ops", "scaling", "losses", "models", "something new"), ("rms_norm", "<b>"), ("braze", "aten", "copy")))
]  # fmt: skip


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@example(records=FULL)
@given(records=st.lists(RECORDS, max_size=6))
def test_the_page_holds_every_number_and_every_plot(records: list[dict]) -> None:
    text = page.render(gather(files(records)))
    found = Page(text)
    assert found.places == []
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", text)
    assert len(found.figures) == expected_figures(records)
    assert all(drawn > 2 for drawn in found.figures)
    values = {value for row in found.rows for _, value in row}
    for record in records:
        for name, value in record.items():
            if isinstance(value, int | float) and not name.startswith(("quartile", "ratio_")):
                assert repr(value) in values, name
    for row in found.rows:
        for shown, value in row:
            if value is not None:
                assert shown != ""
    for record in records:
        if record.get("status"):
            assert any(record["status"] == shown for row in found.rows for shown, _ in row)


def test_figures_are_written_in_their_units() -> None:
    spread = {"median_ms": 1.25, "quartile_low_ms": 1.0, "quartile_high_ms": 1.5}
    one = record(0.5, 0.4, 0.6, **spread, least_bytes=3 * 2**20, error_outputs=1.25e-7)
    found = Page(page.render(gather(files([one]))))
    cells = {shown for row in found.rows for shown, _ in row}
    assert {"1.25 (1 … 1.5)", "0.50 (0.40 … 0.60)", "3", "1.2e-07"} <= cells


@pytest.mark.parametrize(
    ("value", "text"), [(7, "7"), (12345, "12,345"), (1234.5, "1,234"), (0.00123456, "0.00123"), (math.inf, "inf")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert plain(value) == text


def record(ratio: float, low: float | None, high: float | None, **fields: object) -> dict:
    return {"benchmark": "ops", "op": "glu", "provider": "aten", "ratio": ratio, "ratio_low": low, "ratio_high": high,
            **fields}  # fmt: skip


def test_slower_is_what_the_interval_says_and_the_worst_is_first() -> None:
    records = [
        record(0.9, 0.8, 0.99, op="slower"),
        record(0.9, 0.8, 1.01, op="cannot be told"),
        record(1.2, 1.1, 1.3, op="faster"),
        record(0.5, 0.4, 0.6, op="worst"),
        record(0.1, None, None, op="no interval"),
        record(0.2, 0.1, 0.3, provider="copy"),
        record(0.2, 0.1, 0.3, provider="braze"),
    ]
    found = comparisons(files(records)[0].records)
    assert [one.record["op"] for one in slower(found)] == ["worst", "slower"]
    (standing,) = standings(found)
    assert standing.counts == {"faster": 1, "same": 1, "slower": 2, "no interval": 1}
    assert standing.mean == pytest.approx((0.9 * 0.9 * 1.2 * 0.5 * 0.1) ** 0.2)
    text = markdown.render(gather(files(records)))
    assert "Of 5 cases braze is slower in 2, and in 2 the interval shows no difference." in text
    assert text.index("| ops | worst |") < text.index("| ops | slower |")


def test_a_wrong_result_of_braze_is_among_what_is_not_faster() -> None:
    wrong = {"benchmark": "ops", "op": "glu", "provider": "braze", "status": "wrong: output 0: error 1, budget 0"}
    contents = gather(files([wrong, {**wrong, "provider": "aten"}]))
    assert [r["provider"] for r in contents.refused] == ["braze"]
    assert "In 1 its own result was over the error budget" in contents.not_faster


def test_packing_reads_the_other_way_round() -> None:
    """Its ratio is packed ÷ padded: 0.25 means that padded takes four times as long."""
    records = [
        {"benchmark": "packing", "provider": "packed", "ratio": 0.25, "ratio_low": 0.2, "ratio_high": 0.5},
        {"benchmark": "packing", "provider": "padded", "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0},
    ]
    (one,) = comparisons(files(records)[0].records)
    assert (one.provider, one.ratio, one.low, one.high) == ("padded", 4.0, 2.0, 5.0)


def test_results_of_two_machines_are_kept_apart() -> None:
    other = {**ENVIRONMENT, "gpu": "a GPU"}
    both = files([record(2.0, 1.5, 2.5)]) + files([record(0.5, 0.4, 0.6, device="cuda")], other)
    contents = gather(both)
    assert [(one.machine, one.mean) for one in contents.standings] == [
        ("CPU: a processor, 1 thread, torch 2.11", pytest.approx(2.0)),
        ("a GPU, torch 2.11", pytest.approx(0.5)),
    ]
    assert not any("not measured yet" in what for _, what in contents.machines)


def test_processors_with_other_instructions_are_other_machines() -> None:
    wider = {**ENVIRONMENT, "instructions": "AVX512"}
    contents = gather(files([record(2.0, 1.5, 2.5)]) + files([record(0.5, 0.4, 0.6)], wider))
    assert [one.machine for one in contents.standings] == [
        "CPU: a processor, 1 thread, torch 2.11",
        "CPU: a processor with AVX512, 1 thread, torch 2.11",
    ]


def test_a_prediction_is_no_measurement() -> None:
    predicted = {"op": "glu", "provider": "triton", "measure": "prediction", "device": "a GPU, assumed"}
    contents = gather(files([record(2.0, 1.5, 2.5), {"benchmark": "kernels", "predicted_us": 9.0, **predicted}]))
    assert [machine for machine, _ in contents.machines] == ["CPU: a processor, 1 thread, torch 2.11", "GPU"]
    rows = [[cell for cell, _ in row] for row in Page(page.render(contents)).rows]
    assert ["glu", "9", "triton"] in rows


def test_what_is_not_measured_names_the_command_that_measures_it() -> None:
    contents = gather([])
    text, summary = page.render(contents), markdown.render(contents)
    for section in SECTIONS:
        command = f"python -m braze.benchmarks {section.benchmark.split()[0]}"
        assert f"Not measured yet: <code>{command}</code>" in text
        assert f"Not measured yet: `{command}`" in summary
    assert Page(text).figures == []


def test_fields_that_no_column_knows_are_shown_too() -> None:
    text = page.render(gather(files([{"benchmark": "ops", "op": "glu", "provider": "braze", "new_field": 7.5}])))
    assert ">new field<" in text
    assert 'data-value="7.5"' in text


def test_the_age_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three commits only the second changes code; results that are committed make none older."""

    def git(*words: str) -> str:
        named = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org", *words]
        return subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    commits = []
    for name in ("kernels/a.py", "kernels/b.py", "benchmarks/results/c.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        git("add", "--all")
        git("commit", "--quiet", "--message", name)
        commits.append(git("rev-parse", "HEAD"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.age(commits[0]) == ("older than HEAD: 2 commits since, 1 of them to code", True)
    assert results.age(commits[1]) == ("older than HEAD: 1 commits since, 0 of them to code", False)
    assert results.age(commits[2]) == ("HEAD", False)
    assert results.age(f"{commits[2]}-dirty") == ("HEAD, with changes that were not committed", True)
    assert results.age("0" * 40) == ("not in this history", True)
    assert results.age("unknown") == ("unknown", True)


NO_ENVIRONMENT = '{"command": "ops", "records": []}'
NO_RECORD = '{"command": "ops", "environment": {}, "records": [3]}'


@pytest.mark.parametrize("content", ["", "{", "[]", "3", NO_ENVIRONMENT, NO_RECORD])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"broken\.json must hold the JSON of one benchmark"):
        load(path, tmp_path)


def test_the_command_writes_both_and_reads_folders(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "a-gpu"
    folder.mkdir(parents=True)
    content = {"command": "ops", "environment": ENVIRONMENT, "records": [record(0.5, 0.4, 0.6)]}
    (folder / "ops.json").write_text(json.dumps(content))
    page_file, summary = tmp_path / "page.html", tmp_path / "summary.md"
    assert main(["report", str(tmp_path / "results"), "--html", str(page_file), "--markdown", str(summary)]) == 0
    assert [row[0][0] for row in Page(page_file.read_text()).rows if row and row[0][0].endswith("json")] == [
        "a-gpu/ops.json"
    ]
    assert "braze is slower in 1" in summary.read_text()
    with pytest.raises(SystemExit, match=r"there is no file or folder .*elsewhere"):
        main(["report", str(tmp_path / "elsewhere")])


def test_the_means_by_operator_are_those_of_the_committed_records() -> None:
    (file,) = [load(ROOT / "benchmarks/results/ops-cpu.json", ROOT)]
    ratios = [
        r["ratio"]
        for r in file.records
        if (r["benchmark"], r["op"], r["provider"], r.get("pass")) == ("ops", "glu", "aten", "forward")
    ]
    shown = readme.block([file])
    line = next(line for line in shown.splitlines() if line.startswith("| `glu` |"))
    assert f"{geometric_mean(ratios):.2f}" in line
    slow = [one for one in comparisons(file.records) if one.verdict == SLOWER and one.provider == "aten"]
    (headline,) = [line for line in shown.splitlines() if line.startswith("| ops | aten |")]
    assert headline.split(" | ")[5] == str(len(slow))


def test_the_readme_holds_the_committed_results() -> None:
    again = "python -m braze.benchmarks report --readme README.md"
    text = (ROOT / "README.md").read_text()
    folder = ROOT / "benchmarks" / "results"
    wanted = readme.block([load(path, folder) for path in results.find([folder])])
    assert text[text.index(readme.BEGIN) : text.index(readme.END)] == wanted, f"write it again: {again}"
    assert ("not measured yet" in wanted) == (not any(path.is_dir() for path in folder.iterdir()))


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="must hold the line"):
        readme.update(path, [])
    assert path.read_text() == "nothing"


def test_a_column_without_its_field_is_empty() -> None:
    assert Column("absent", "absent").text({}) == ""
    assert Column("absent", "absent").key({}) is None


def test_the_page_is_the_same_from_any_folder(tmp_path: Path) -> None:
    """The style sheet and the script come with the package."""
    out = tmp_path / "page.html"
    words = [sys.executable, "-m", "braze.benchmarks", "report", str(ROOT / "benchmarks/results/packing-cpu.json")]
    subprocess.run([*words, "--html", str(out)], cwd=tmp_path, check=True)
    assert "--series-0" in out.read_text()
