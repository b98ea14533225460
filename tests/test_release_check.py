"""The release checklist finds what is wrong, and nothing in this repository but what a release itself changes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import release_check

needs_git = pytest.mark.skipif(
    not (release_check.ROOT / ".git").exists(), reason="a checkout of the repository is needed"
)


@pytest.fixture
def repository(tmp_path):
    """The few files that the checks read, as they are here."""
    for name in (*release_check.versions(release_check.ROOT), "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(release_check.ROOT / name, tmp_path / name)
    return tmp_path


def commit(root, **files):
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)


@needs_git
@pytest.mark.parametrize(
    "name",
    ["versions agree", "nothing is due for removal", "papers are cited", "links lead somewhere", "no machine is named"],
)
def test_this_repository_is_in_order(name):
    assert list(release_check.CHECKS[name](release_check.ROOT)) == []


def test_a_version_that_differs_is_named_with_its_file(repository):
    assert list(release_check.check_versions(repository)) == []
    path = repository / "CITATION.cff"
    path.write_text(path.read_text().replace("version: 0.1.0", "version: 0.2.0"))
    (problem,) = release_check.check_versions(repository)
    assert "CITATION.cff 0.2.0" in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("## [Unreleased]\n- x\n", "no entry"),
        ("## [0.1.0]\n- x\n", "no date"),
        ("## [0.1.0] - 2026-02-03\nNothing.\n\n## [0.0.9] - 2026-01-01\n- x\n", "lists nothing"),
        ("## [Unreleased]\n\n## [0.1.0] - 2026-02-03\n### Added\n- x\n", None),
    ],
)
def test_a_changelog_without_its_entry_is_found(text, words, repository):
    (repository / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}")
    problems = list(release_check.check_changelog(repository))
    assert len(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_links_into_nothing_are_found(tmp_path):
    page = "# Two words, `code`\n[a](b.md) [c](b.md#here) [d](#two-words-code) [e](gone.md) [f](b.md#gone) [g](https://x.org)"
    commit(tmp_path, a__md=page, b__md="## Here\n```\n[h](nowhere.md)\n```\n")
    problems = list(release_check.check_links(tmp_path))
    assert [problem.split(",")[0] for problem in problems] == ["a.md links to gone.md", "a.md links to b.md#gone"]


@pytest.mark.parametrize(
    "line",
    [
        "see /home/ann/x",
        "cp /root/a b",
        r"C:\Users\ann",
        "pip install --index-url http://mirror/simple x",
        "https://git.corp/x",
    ],
)
def test_a_name_of_a_machine_is_found(line, tmp_path):
    commit(tmp_path, a__txt=f"fine\n{line}\n", b__txt="https://pypi.org/simple and a/home/b, ./root/x, /tmp/y\n")
    (problem,) = release_check.check_private_names(tmp_path)
    assert problem.startswith("a.txt:2 names ")


def test_a_paper_that_is_not_cited_is_found(tmp_path):
    methods = tmp_path / "src" / "sostenuto" / "methods"
    methods.mkdir(parents=True)
    (methods / "a.py").write_text('class A:\n    paper: ClassVar[str] = "arXiv 2401.00001v2"\n')
    (methods / "b.py").write_text('class B:\n    paper: ClassVar[str] = ""\n')
    (tmp_path / "CITATION.cff").write_text("")
    assert list(release_check.check_citation(tmp_path)) == [
        "CITATION.cff doesn't cite arXiv 2401.00001 of methods/a.py"
    ]
    (tmp_path / "CITATION.cff").write_text("arXiv:2401.00001")
    assert list(release_check.check_citation(tmp_path)) == []


def test_a_file_that_a_distribution_lacks_is_found():
    names = ["sostenuto/__init__.py", "sostenuto/py.typed"]
    assert list(release_check.missing("the wheel", names, (r"sostenuto/py\.typed", r"sostenuto/tables/.+"))) == [
        "the wheel holds nothing like sostenuto/tables/.+"
    ]


def test_one_failure_fails_the_whole_list(monkeypatch, capsys):
    monkeypatch.setattr(release_check, "CHECKS", {"good": lambda _: iter(()), "bad": lambda _: iter(["why"])})
    assert release_check.main(["--quick"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["ok     good", "FAILED bad", "       why"]
    assert [line for line in printed if line.startswith("to run")] == [
        f"to run {' '.join(command)}" for command in release_check.COMMANDS
    ]
    monkeypatch.setattr(release_check, "CHECKS", {})
    monkeypatch.setattr(release_check, "COMMANDS", (("pip", "--version"), ("no_such_module",)))
    assert release_check.main([]) == 1
