"""The pages: their measured tables are those of the result files, the code of the guides runs, the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sostenuto
from sostenuto.bench.cases import Case, Settings
from sostenuto.bench.machine import prepare
from sostenuto.bench.runner import measure

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import bench_tables
import results_tables

ROOT = results_tables.ROOT
SLOW_PAGES = {
    "combining",
    "ditfastattn",
    "duca",
    "eb-cache",
    "epsilon-scaling",
    "feb-cache",
    "l2c",
    "smoothcache",
    "toca",
}
METHOD_PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow, pytest.mark.timeout(1800)] * (page.stem in SLOW_PAGES))
    for page in sorted((ROOT / "docs" / "methods").glob("*.md"))
]
GUIDES = {"README.md": [], "docs/index.md": ["table.json"], "docs/how-to/calibrate.md": ["table.json"]}


def test_measured_tables_are_those_of_the_result_files():
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "results_tables.py", "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "guide", [pytest.param(guide, marks=[pytest.mark.slow] * (guide == "docs/how-to/calibrate.md")) for guide in GUIDES]
)
def test_the_code_of_a_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_the_code_of(ROOT / guide)
    assert {name for name in GUIDES[guide] if not (tmp_path / name).is_file()} == set()


PAGES = sorted([ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_of_the_library_is_there(page):
    text = page.read_text(encoding="utf-8")
    kinds = {name: getattr(sostenuto, name) for name in sostenuto.__all__ if name[0].isupper()}
    named = [(kind, name) for kind, name in re.findall(r"\b([A-Z]\w+)\.([a-z]\w*)\(", text) if kind in kinds]
    assert [f"{kind}.{name}" for kind, name in named if not hasattr(kinds[kind], name)] == []
    called = re.findall(r"\bsostenuto\.([A-Za-z]\w*)\(", text)
    assert [name for name in called if not hasattr(sostenuto, name)] == []


def run_the_code_of(page):
    names = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", METHOD_PAGES)
def test_the_code_of_a_methods_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_the_code_of(page)


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: sostenuto\.(\w+)$", page, re.MULTILINE))
    assert "errors" in named  # all of them, as a module
    assert set(sostenuto.__all__) - named - set(vars(sostenuto.errors)) == set()


def test_a_table_whose_results_are_not_there_yet_is_left_as_it_is():
    page = "before\n<!-- table: of-another-day.json -->\nNot in yet.\n<!-- end -->\nafter"
    assert results_tables.filled(page) == page


@pytest.mark.slow  # make docs does it, too
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    formulas = (tmp_path / "theory" / "index.html").read_text(encoding="utf-8")
    assert "<math" in formulas
    assert "$" not in re.sub(r"<script.*?</script>", "", formulas, flags=re.DOTALL)
    pages = {path: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert [path for path, html in pages.items() if re.search(r"<p>[^<]*\n(- |\d+\. )|:(func|class|meth):", html)] == []
    assert "TaylorSeer.flux_dev" in (tmp_path / "how-to" / "families" / "index.html").read_text(encoding="utf-8")


def test_tables_of_results_show_what_the_benchmark_measured_counted_and_could_not():
    small, settings = "dit:layers=2,width=64,tokens=16", Settings(repeats=1, warmup=0)
    rows = [
        measure(Case("reused", "reuse-branches:interval=2", small, 4, axis="depth", value=2), settings),
        measure(
            Case("dry", "fora:interval=2", small, 4, kind="count", printed={"macs": 2e12, "speedup": 1.5}), settings
        ),
        measure(Case("broken", "peer:nobody", small, 4), settings),
    ]
    results = {"rows": [row.as_dict() for row in rows], "machine": prepare(settings)}
    for name, table in bench_tables.SUITES.items():
        if name in ("peer-support.json", "peers.json dit"):  # in a form of its own, and some of another's rows
            continue
        text = table(results)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        cells = next([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "reused" in line)
        assert len(cells) == lines[0].count("|") - 1
        assert f"- broken: {rows[2].error}" in text
        assert "threads: 1" in text
        if name == "efficiency.json":
            assert cells[0] == "reused"
            assert cells[-1] == f"{rows[0].efficiency:.3f}"
        if name == "dit-xl.json":
            (counted,) = [line for line in lines if line.startswith("| dry |")]
            assert f"| {rows[1].macs / 2 / 1e12:.2f} | 2.00 | {rows[1].ideal_speedup:.2f}× | 1.50 |" in counted
