"""The release checklist: is what is tracked here fit to be published as the version that it names?

Run it with ``make release-check``; ``--quick`` leaves out lint, types and tests, which it lists.
"""

from __future__ import annotations

import argparse
import ast
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

COMMANDS = (
    ("ruff", "format", "--check", "."),
    ("ruff", "check", "."),
    ("basedpyright",),
    ("pytest", "-n", "auto"),
)

# What must be in the wheel: patterns, each of which some file must match.
IN_WHEEL = (
    r"sostenuto/__init__\.py",
    r"sostenuto/py\.typed",
    r"sostenuto/tables/.+\.json",
    r"sostenuto/tables/.+\.safetensors",
    r"sostenuto/demo/assets/.+\.safetensors",
    r"sostenuto/report/page\.html\.jinja",
    r"sostenuto/comfyui/nodes\.py",
    r"sostenuto-.+\.dist-info/licenses/LICENSE",
    r"sostenuto-.+\.dist-info/licenses/NOTICE",
)
IN_SDIST = (
    r"src/sostenuto/__init__\.py",
    r"tests/conftest\.py",
    r"comfyui/comfyui-sostenuto/__init__\.py",
    r"CHANGELOG\.md",
    r"CITATION\.cff",
    r"README\.md",
    r"mkdocs\.yml",
    r"pyproject\.toml",
)

# Folders of somebody's machine, and package indexes other than the public ones.
_PRIVATE = re.compile(
    r"(?<![\w.])(/root/|/home/\w|/Users/\w|/mnt/\w|/work/\w|[A-Z]:\\Users\\)"
    r"|(?:index-url|extra-index-url|find-links)[ =]+\S+"
    r"|https?://(?:localhost|[\w.-]+\.(?:internal|local|lan|corp))\b"
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def versions(root: Path) -> dict[str, str]:
    """The version as each file names it, empty where it names none."""
    places = {
        "pyproject.toml": r'^version = "([^"]+)"',
        "src/sostenuto/__init__.py": r'^__version__ = "([^"]+)"',
        "CITATION.cff": r'^version: "?([^"\s]+)"?',
        "conda/recipe.yaml": r'^  version: "([^"]+)"',
        "comfyui/comfyui-sostenuto/pyproject.toml": r'^version = "([^"]+)"',
    }
    return {name: _first(pattern, (root / name).read_text(encoding="utf-8")) for name, pattern in places.items()}


def check_versions(root: Path) -> Iterator[str]:
    found = versions(root)
    if len(set(found.values())) != 1 or not all(found.values()):
        yield "the version differs: " + ", ".join(f"{name} {version or 'none'}" for name, version in found.items())


def check_changelog(root: Path) -> Iterator[str]:
    version = versions(root)["pyproject.toml"]
    text = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## \[([^\]]+)\]([\s\S]*?)(?=^## \[|\Z)", text, re.MULTILINE))
    if version not in sections:
        yield f"CHANGELOG.md has no entry '## [{version}] - <date>': give [Unreleased] its version"
        return
    if not re.match(r" - \d{4}-\d{2}-\d{2}\n", sections[version]):
        yield f"CHANGELOG.md's entry {version} has no date, '## [{version}] - 2026-01-31'"
    if not re.search(r"^- ", sections[version], re.MULTILINE):
        yield f"CHANGELOG.md's entry {version} lists nothing"


def check_deprecations(root: Path) -> Iterator[str]:
    """What was to be removed by now is removed."""
    from sostenuto.deprecation import due

    for deprecation in due(versions(root)["pyproject.toml"]):
        yield f"due for removal: {deprecation}"


def check_private_names(root: Path) -> Iterator[str]:
    """No tracked file names a folder or host of the machine that it was written on."""
    own = [name for name in (socket.gethostname(), str(Path.home())) if len(name) > 5 and name != "localhost"]
    for path in tracked(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        if path in ("scripts/release_check.py", "tests/test_release_check.py"):
            continue  # which hold the patterns
        for number, line in enumerate(text.splitlines(), 1):
            word = next((name for name in own if name in line), "")
            match = _PRIVATE.search(line)
            if word or match:
                yield f"{path}:{number} names {word or (match.group() if match else '')!r}"


def check_links(root: Path) -> Iterator[str]:
    """Every relative link of a page leads to a tracked file, and to a heading of it."""
    known = set(tracked(root))
    folders = {parent.as_posix() for path in known for parent in Path(path).parents}
    for path in sorted(known):
        if not path.endswith(".md"):
            continue
        text = re.sub(r"```[\s\S]*?```", "", (root / path).read_text(encoding="utf-8"))
        for link in _LINK.findall(text):
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = _normal(Path(path).parent / target) if target else path
            if file not in known and file not in folders:
                yield f"{path} links to {link}, which isn't there"
            elif anchor and file.endswith(".md") and anchor not in anchors((root / file).read_text(encoding="utf-8")):
                yield f"{path} links to {link}, but {file} has no such heading"


def check_citation(root: Path) -> Iterator[str]:
    """Every paper of a method is cited."""
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    for path in sorted((root / "src" / "sostenuto" / "methods").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "paper" and node.value is not None:
                number = _first(r"(\d{4}\.\d{5})", ast.unparse(node.value))
                if number and f"arXiv:{number}" not in text:
                    yield f"CITATION.cff doesn't cite arXiv {number} of methods/{path.name}"


def check_distributions(root: Path) -> Iterator[str]:
    """Wheel and source distribution build, and hold what they must."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel, sdist = build(root, Path(folder))
        except subprocess.CalledProcessError as error:
            yield f"the build failed: {error.stderr.strip().splitlines()[-1]}"
            return
        yield from missing("the wheel", wheel_names(wheel), IN_WHEEL)
        yield from missing("the sdist", sdist_names(sdist), IN_SDIST)
        odd = [name for name in wheel_names(wheel) if not name.startswith("sostenuto")]
        if odd:
            yield f"the wheel holds {odd[0]}, which is no part of the package"


def build(root: Path, folder: Path) -> tuple[Path, Path]:
    """Wheel and source distribution, built into a folder without a package index."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def sdist_names(sdist: Path) -> list[str]:
    """The names of its files, without the folder that they are all in."""
    with tarfile.open(sdist) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def missing(what: str, names: list[str], patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            yield f"{what} holds nothing like {pattern}"


def tracked(root: Path) -> list[str]:
    """The files that git knows."""
    ran = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    return [name for name in ran.stdout.split("\0") if name]


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings make, as GitHub and mkdocs do."""
    headings = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in plain}


def _normal(path: Path) -> str:
    """A relative path without ``..``."""
    parts: list[str] = []
    for part in path.as_posix().split("/"):
        if part == ".." and parts:
            parts.pop()
        elif part not in (".", ""):
            parts.append(part)
    return "/".join(parts)


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else ""


CHECKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "versions agree": check_versions,
    "the changelog has an entry": check_changelog,
    "nothing is due for removal": check_deprecations,
    "papers are cited": check_citation,
    "links lead somewhere": check_links,
    "no machine is named": check_private_names,
    "wheel and sdist build and are complete": check_distributions,
}


def main(args: list[str] | None = None) -> int:
    """Run the checklist; 0 where all of it is in order."""
    parser = argparse.ArgumentParser(description="The release checklist.")
    parser.add_argument("--quick", action="store_true", help="list lint, types and tests without running them")
    options = parser.parse_args(args)
    failed = 0
    for name, check in CHECKS.items():
        problems = list(check(ROOT))
        print(f"{'FAILED' if problems else 'ok':7}{name}")
        for problem in problems:
            print(f"       {problem}")
        failed += bool(problems)
    for command in COMMANDS:
        if options.quick:
            print(f"{'to run':7}{' '.join(command)}")
            continue
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        print(f"{'FAILED' if code else 'ok':7}{' '.join(command)}", flush=True)
        failed += bool(code)
    print("ready to be released" if not failed else f"{failed} of the checklist failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
