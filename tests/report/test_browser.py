"""Pages in a real browser, headless: they fit a phone and a desktop, run no script, ask for nothing,
and follow the color scheme.
"""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.report import evaluation_file, run_folder, run_page
from jaxpeft.report.evaluation_section import section_of
from tests.compare.pages import write_comparison
from tests.report.conftest import EVALUATION, SAMPLE, START, WriteRun

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=4000",
    "--hide-scrollbars",
)
LONG = "x" * 300
HOSTILE = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"

# The page is shown in a frame of the width of a screen, whose document a script of this test reads.
MEASURE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0" width="WIDTH" height="3000" srcdoc="PAGE"></iframe><pre id="out"></pre>
<script>
const frame = document.getElementById("page");
function measure() {
  const doc = frame.contentDocument, root = doc.documentElement;
  const inside = e => e.closest(".scroll, pre, .text");
  const wide = [...doc.body.querySelectorAll("*")].filter(
    e => e.getBoundingClientRect().right > root.clientWidth + 1 && !(e.parentElement && inside(e.parentElement)));
  const small = [...doc.querySelectorAll("p, td, th, dd, dt, pre, figcaption")].map(
    e => parseFloat(doc.defaultView.getComputedStyle(e).fontSize));
  const charts = [...doc.querySelectorAll(".charts svg")].map(e => {
    const box = e.getBoundingClientRect();
    return [box.width, 11 * box.width / e.viewBox.baseVal.width];
  });
  const hero = doc.querySelector(".result").getBoundingClientRect();
  document.getElementById("out").textContent = "FOUND" + JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    smallest: Math.min(...small), charts, hero: hero.bottom, title: doc.title,
    elements: doc.querySelectorAll("script, img, link").length,
    requests: doc.defaultView.performance.getEntriesByType("resource").length,
    paper: doc.defaultView.getComputedStyle(doc.body).backgroundColor,
  }) + "END";
}
frame.addEventListener("load", measure);
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium"),
]


def chromium(tmp_path: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shown(page: str, width: int, tmp_path: Path, *flags: str) -> Mapping[str, Any]:
    wrapper = tmp_path / "wrapper.html"
    framed = MEASURE.replace("WIDTH", str(width)).replace("PAGE", html.escape(page))
    wrapper.write_text(framed)
    dom = chromium(tmp_path, *flags, "--window-size=1600,3200", "--dump-dom", wrapper.as_uri())
    assert '<pre id="out">FOUND' in dom, dom[-2000:]
    found = dom.split('<pre id="out">FOUND', 1)[1].split("END</pre>", 1)[0]
    return json.loads(html.unescape(found))


@pytest.fixture
def pages(write_run: WriteRun, tmp_path: Path) -> Mapping[str, str]:
    """Pages with texts that are too long and hostile."""
    labels = [f"a_rather_long_name_of_a_class_{i}" for i in range(40)]
    samples = [SAMPLE, dict.fromkeys(SAMPLE, HOSTILE), dict.fromkeys(SAMPLE, LONG)]
    folder = write_run(samples=samples, run={**START, "labels": [*labels, LONG]})
    rows = tmp_path / "evaluation.json"
    rows.write_text(json.dumps({**EVALUATION, "data": {"path": LONG, "rows": 3}, "against": LONG}))
    run = run_folder.read(folder)
    evaluation = section_of(run, evaluation_file.read(rows))
    return {
        "run": run_page.html(run, [evaluation]),
        "comparison": write_comparison(tmp_path / "comparison").read_text(),
    }


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_fits_the_screen(
    pages: Mapping[str, str], kind: str, width: int, tmp_path: Path
) -> None:
    found = shown(pages[kind], width, tmp_path)
    assert found["width"] == width
    assert (found["scroll"], found["wide"]) == (width, [])
    assert found["smallest"] >= 13
    assert found["hero"] < 844  # the result is on the first screen of a phone
    assert all(chart <= width and font >= 10 for chart, font in found["charts"])
    if kind == "run":
        assert len(found["charts"]) == 7
    assert (found["elements"], found["requests"]) == (0, 0)
    assert found["title"] != "ran"


def test_the_colors_follow_the_scheme(pages: Mapping[str, str], tmp_path: Path) -> None:
    light = shown(pages["run"], 390, tmp_path)["paper"]
    dark = shown(pages["run"], 390, tmp_path, "--blink-settings=preferredColorScheme=0")["paper"]
    assert light == "rgb(255, 255, 255)"
    assert dark == "rgb(21, 24, 28)"


def test_a_page_is_drawn(pages: Mapping[str, str], tmp_path: Path) -> None:
    import matplotlib.image as image

    (tmp_path / "page.html").write_text(pages["run"])
    shot = tmp_path / "shot.png"
    uri = (tmp_path / "page.html").as_uri()
    chromium(tmp_path, f"--screenshot={shot}", "--window-size=390,2000", uri)
    pixels = image.imread(shot)
    assert pixels.shape[:2] == (2000, 390)
    assert pixels[0, 0, :3].tolist() == [1, 1, 1]
    assert 0.05 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.6
