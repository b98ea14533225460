"""The benchmark's page in a real browser: no error, no request, and its plot, table and strips show the file's numbers."""

import json
import shutil

import pytest

from fake_peer import QUICK
from sostenuto.bench.rows import ResultsFile, Row, read_results
from sostenuto.bench.session import Outcome
from sostenuto.report.bench_page import render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c6360000000020001e221bc33"
    "0000000049454e44ae426082"
)


def rows():
    """Three rows of a trained model, one that failed, and a growth curve."""
    common = dict(model="demo", num_inference_steps=3, batch_size=2, missing={"lpips": "no weights"})
    steps = dict(step_macs=[9, 1, 9], baseline_step_macs=[9, 9, 9], baseline_step_s=[0.2, 0.2, 0.2])
    return [
        Row("k0", "uncached", "uncached", wall_s=0.6, wall_s_min=0.5, wall_s_max=0.7, speedup=1.0, frechet_distance=2.5,
            psnr=None, macs=27, step_s=[0.2, 0.2, 0.2], **common,
            **steps | {"step_macs": [9, 9, 9]}),
        Row("k1", "FORA </script><b>N=2", "fora:interval=2", wall_s=0.4, speedup=1.5, ideal_speedup=1.6, efficiency=0.94,
            frechet_distance=3.25, psnr=30.0, macs=19, step_s=[0.2, 0.01, 0.2], samples="samples/k1.png", **common, **steps),
        Row("k2", "peer", "peer:fake", peer="fakelib 1.2", wall_s=0.3, speedup=2.0, frechet_distance=9.0, psnr=20.0,
            step_s=[0.15, 0.001, 0.149], **common, **steps),
        Row("k3", "broken", "peer:broken", error="no result within 5 s: ended", **common),
        *(Row(f"g{n}", f"depth {n}", "fora", model=f"dit:layers={n}", num_inference_steps=2, axis="depth", value=n,
              speedup=1.9, relative_error=0.1, cache_bytes_peak=1000 * n, step_s=[0.1 * n, 0.01 * n], step_macs=[9 * n, n],
              baseline_step_s=[0.1 * n] * 2, baseline_step_macs=[9 * n] * 2) for n in (1, 2, 4)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A results file and its page."""
    folder = tmp_path_factory.mktemp("bench")
    machine = {"processor": "p", "threads": 1}
    file = ResultsFile(folder / "results.jsonl", machine)
    for row in rows():
        assert file.append(row) is None
    (folder / "samples").mkdir()
    (folder / "samples/k1.png").write_bytes(PIXEL)
    _, kept = read_results(folder / "results.jsonl")
    (folder / "bench.html").write_text(render(Outcome(kept, machine, QUICK).content(), folder), encoding="utf-8")
    return folder, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def page(written):
    """The page in the browser, with what it complained of and asked for."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.complaints, page.requested = [], []
        page.on(
            "console", lambda said: page.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto((written[0] / "bench.html").as_uri())
        page.wait_for_selector("#table tbody tr")
        yield page
        browser.close()


def points(page):
    """Key and data of every point of the plot."""
    found = page.eval_on_selector_all(
        "circle.point", "all => all.map(p => [p.dataset.key, p.dataset.x, p.dataset.y, p.getAttribute('cx')])"
    )
    return {key: (float(x), float(y), float(cx)) for key, x, y, cx in found}


def test_nothing_is_wrong_and_nothing_is_fetched(page):
    assert page.complaints == []
    assert [url for url in page.requested if not url.startswith(("file:", "data:"))] == []


def test_the_data_within_equals_the_files(page, written):
    assert page.evaluate("JSON.parse(document.getElementById('results').textContent).rows") == written[1]


def test_the_plot_shows_the_files_numbers_whatever_is_chosen(page, written):
    of_demo = [row for row in written[1] if row["model"] == "demo"]
    for x, y in (("speedup", "frechet_distance"), ("wall_s", "psnr")):
        page.select_option("#x", x)
        page.select_option("#y", y)
        shown = points(page)
        expected = {row["key"]: (row[x], row[y]) for row in of_demo if row[x] is not None and row[y] is not None}
        assert {key: value[:2] for key, value in shown.items()} == expected
        in_order = sorted(shown, key=lambda key: shown[key][0])
        assert in_order == sorted(shown, key=lambda key: shown[key][2])  # further right is more
    assert page.locator("#model option").count() == 1  # growth has curves of its own


def test_table_strips_and_curves_show_the_rows(page, written):
    lines = page.locator("#table tbody tr")
    assert lines.count() == len(written[1])
    broken = page.locator("#table tr[data-key=k3]")
    assert "no result within 5 s: ended" in broken.inner_text()
    assert "FORA </script><b>N=2" in page.locator("#table tr[data-key=k1]").inner_text()
    seconds = page.eval_on_selector_all("svg.steps[data-key=k1] rect", "all => all.map(bar => +bar.dataset.seconds)")
    assert seconds == [0.2, 0.01, 0.2]
    heights = page.eval_on_selector_all(
        "svg.steps[data-key=k1] rect", "all => all.map(bar => +bar.getAttribute('height'))"
    )
    assert heights[1] < heights[0] / 10
    assert page.locator("svg.curve[data-axis=depth] circle").count() == 3 * 3
    assert page.locator(".grid img").count() == 1


def test_a_column_head_sorts_and_a_click_marks_the_row(page):
    page.get_by_role("columnheader", name="Fréchet distance").click()
    order = page.eval_on_selector_all("#table tbody tr", "all => all.map(line => line.dataset.key)")
    assert order[:3] == ["k0", "k1", "k2"]
    page.get_by_role("columnheader", name="Fréchet distance").click()
    order = page.eval_on_selector_all("#table tbody tr", "all => all.map(line => line.dataset.key)")
    assert order[:3] == ["k2", "k1", "k0"]
    page.locator("circle.point[data-key=k1]").click()
    assert page.locator("tr.chosen").get_attribute("data-key") == "k1"
    page.locator("circle.point[data-key=k2]").hover()
    assert "peer" in page.locator("#tip").inner_text()
