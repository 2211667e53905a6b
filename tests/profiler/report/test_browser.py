"""A page of runs in a real browser: on a phone and a desk, light and dark, and on paper."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from ds_mofa.profiler.report.command import main

RUNS = Path(__file__).resolve().parents[3] / "profiling/results/memory/report.json"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)"),
]
# The page measures itself. Nothing may stick out to the right but what is in a box that scrolls; no figure may be flat;
# and no two that follow each other may overlap.
PROBE = """<script>addEventListener('load',()=>{
const all=q=>[...document.querySelectorAll(q)],box=e=>e.getBoundingClientRect();
const wide=all('body *').filter(e=>!e.closest('.scroll,svg')&&box(e).right>innerWidth+1).length;
const flat=all('figure svg').filter(e=>box(e).height<100).length;
const blocks=all('body>*,.figures>figure').filter(e=>box(e).height);
const over=blocks.filter((e,i)=>i&&!blocks[i-1].contains(e)&&box(e).top<box(blocks[i-1]).bottom-1&&
box(e).left<box(blocks[i-1]).right-1&&!e.contains(blocks[i-1])).length;
document.title=JSON.stringify({wide,flat,over,charts:all('figure svg').length,
scrolling:all('.scroll').filter(e=>e.scrollWidth>e.clientWidth+1).length,
paper:getComputedStyle(document.body).backgroundColor})})</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of four runs with two figures each, three with a column of their own in a table."""
    folder = tmp_path_factory.mktemp("page")
    names = ("torch:AdamW", "torch:MoFaSGD:r=8", "zero2:AdamW", "zero3:MoFaSGD:r=32")
    main([*(f"{RUNS}#{name}" for name in names), "--output_dir", str(folder)])
    return folder / "report.html"


def browse(folder: Path, *words: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    run = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def measured(text: str, folder: Path, width: int, scheme: str) -> dict:
    probed = folder / "probe.html"
    probed.write_text(text.replace("</body>", PROBE + "</body>"))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    words = [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", *dark, f"file://{probed}"]
    return json.loads(browse(folder, *words).split("<title>")[1].split("</title>")[0])


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1100, "dark")])
def test_a_screen(page, tmp_path, width, scheme):
    found = measured(page.read_text(), tmp_path, width, scheme)
    assert (found["wide"], found["flat"], found["over"], found["charts"]) == (0, 0, 0, 9), found
    assert found["paper"] == ("rgb(20, 24, 29)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert found["scrolling"] > 0 or width > 390, "a phone scrolls within a table, and not the page"


def test_what_is_wide_or_overlaps_would_be_seen(page, tmp_path):
    wide = '<p style="width:900px">wide</p><p style="margin-top:-9rem;height:5rem">over</p></body>'
    found = measured(page.read_text().replace("</body>", wide), tmp_path, 390, "light")
    assert (found["wide"], found["over"]) == (1, 1), found


def last_columns(text: str, folder: Path) -> list[str]:
    """The end of each line of a page, on paper, that is a row of the run with the widest."""
    reader = shutil.which("pdftotext")
    if reader is None:
        pytest.skip("no pdftotext on this machine (Debian: apt install poppler-utils)")
    source, pdf = folder / "page.html", folder / "page.pdf"
    source.write_text(text)
    browse(folder, f"--print-to-pdf={pdf}", "--no-pdf-header-footer", f"file://{source}")
    run = subprocess.run([reader, "-layout", str(pdf), "-"], capture_output=True, text=True, timeout=60)
    return [line.split()[-1] for line in run.stdout.splitlines() if line.strip().startswith("zero3:MoFaSGD:r=32 ")]


def test_paper_cuts_nothing_off(page, tmp_path):
    """The widest table, down to its last column: what a box that scrolls hides is lost on paper."""
    assert "36.767" in last_columns(page.read_text(), tmp_path)


def test_what_is_cut_off_would_be_seen(page, tmp_path):
    text = page.read_text().replace("overflow:visible", "").replace("font-size:8.5px", "")
    assert text != page.read_text() and "36.767" not in last_columns(text, tmp_path)
