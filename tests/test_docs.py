"""The pages: their measured tables are those of the result files, the code of the guides runs, the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = ["docs/index.md", "docs/how-to/calibrate.md"]


def test_measured_tables_are_those_of_the_result_files():
    run = subprocess.run(
        [sys.executable, ROOT / "scripts" / "results_tables.py", "--check"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("guide", GUIDES)
def test_the_code_of_a_guide_runs(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / guide).read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, guide, "exec", dont_inherit=True), names)
    assert (tmp_path / "table.json").is_file()


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
    assert "TaylorSeer.flux_dev" in (tmp_path / "how-to" / "families" / "index.html").read_text(encoding="utf-8")
