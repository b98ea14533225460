"""What the documentation site takes from elsewhere in the repository: pages that lie outside of docs, tables from the code."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
WIDE = (
    "methods/index.md",
    "models.md",
    "peers.md",
    "results/README.md",
    "schedulers.md",
)  # their tables take the margin


def _methods() -> str:
    """One row for every method, from its class."""
    from sostenuto.methods import available_methods
    from sostenuto.methods.base import LETTERS

    lines = [
        "# Methods",
        "",
        "What `sostenuto methods` prints: every method by the name that `sostenuto.enable` takes.",
        "",
        "| name, class | paper | what it does | calibration | compiled | keeps | bytes per token | for |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, kind in available_methods().items():
        paper = re.sub(r"arXiv (\d{4}\.\d{5})", r"[\1](https://arxiv.org/abs/\1)", kind.paper)
        compiled = "yes" if kind().works_compiled else "with random tokens" if kind.compiles else "no"
        lines.append(
            f"| `{name}`<br>`{kind.__name__}` | {paper} | {kind.summary} | {'needed' if kind.calibrated else '–'} | "
            f"{compiled} | {kind.state} | {kind.bytes_per_token} | {kind.denoisers} |"
        )
    lines += ["", f"Bytes per token, for each row of the batch: {LETTERS}."]
    return "\n".join(lines) + "\n"


def _presets() -> str:
    """The published settings of every model: the constructors of the methods' classes."""
    from sostenuto.methods import available_methods
    from sostenuto.methods.base import presets_of

    found: dict[str, list[str]] = defaultdict(list)
    for kind in available_methods().values():
        for name in presets_of(kind):
            wanted = [
                parameter.name
                for parameter in inspect.signature(getattr(kind, name)).parameters.values()
                if parameter.default is parameter.empty
            ]
            about = (inspect.getdoc(getattr(kind, name)) or "").partition("\n")[0]
            found[name].append(f"| `{kind.__name__}.{name}({', '.join(wanted)})` | {about} |")
    rows = [row for name in sorted(found) for row in found[name]]
    return "\n".join(["| constructor | what was published |", "|---|---|", *rows])


def _outside(path: str) -> str:
    """A page of the repository with its links to other files of it as plain text: they have no place on the site."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {
        "changelog.md": _outside("CHANGELOG.md"),
        "examples.md": _outside("examples/README.md"),
        "methods/index.md": _methods(),
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def _formulas(markdown: str) -> str:
    """TeX between dollars as MathML, which every browser shows by itself."""
    parts = re.split(r"(```.*?```|`[^`]*`)", markdown, flags=re.DOTALL)  # code is left alone
    for index in range(0, len(parts), 2):
        text = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), display="block"), parts[index], flags=re.DOTALL)
        parts[index] = re.sub(r"(?<![\\$])\$([^$\n]+)\$", lambda m: f"<span>{convert(m[1])}</span>", text)
    return "".join(parts)


def _lists(markdown: str) -> str:
    """A blank line between a paragraph and the list that follows it, which GitHub does without."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(
            r"^((?![-*] |\d+\. |[#|>]|<!--)\S.*\n)(?=[-*] |\d+\. )", r"\1\n", parts[index], flags=re.MULTILINE
        )
    return "".join(parts)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Formulas, lists, the presets, and links from docs to files outside of it as plain text."""
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    markdown = _formulas(_lists(markdown.replace("<!-- presets -->", _presets())))
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:examples|src|benchmarks|tests|CHANGELOG|README)[^)]*\)", r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """References in docstrings as the plain name of what they refer to."""
    html = re.sub(r":(?:func|class|meth|mod|attr|data):\s*(<code>)", r"\1", html)
    return re.sub(r"<code>~(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
