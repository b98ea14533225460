"""The self-contained page of a comparison: no file beside it, no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import jinja2
import torch

from sostenuto.report.figures import frontier_figure, grid_figure, plans_figure, png


def render(results: dict[str, Any], images: torch.Tensor, names: Sequence[str], column_labels: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        results: what ``sostenuto demo --json`` writes.
        images: samples ``[rows, columns, 1, h, w]`` in ``[0, 1]``, every row from the same noise.
        names: of the rows of images.
        column_labels: of their columns.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sostenuto.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )

    def picture(figure: Any) -> str:
        return "data:image/png;base64," + base64.b64encode(png(figure)).decode()

    return environment.get_template("page.html.jinja").render(
        results=results,
        base=results["rows"][0],
        grid=picture(grid_figure(images, names, column_labels)),
        plans=picture(plans_figure(results["rows"])),
        frontier=picture(frontier_figure(results["rows"], results["floor"])),
        data=json.dumps(results).replace("<", "\\u003c"),
    )
