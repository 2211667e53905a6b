"""What a report looks like: lines that everybody tells apart, no empty columns, bytes in units of their size."""

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

import matplotlib.colors
import matplotlib.image

from ds_mofa.profiler.categories import CATEGORIES
from ds_mofa.profiler.report.charts import Areas, Bar, Bars, Lines, Series
from ds_mofa.profiler.report.document import Claims, Code, Document, Figure, Points, Section, Table, Text
from ds_mofa.profiler.report.drawing import _apart, draw, save_png, svg
from ds_mofa.profiler.report.rendering import html, markdown, write
from ds_mofa.profiler.report.styles import AREA_COLORS, HIGHLIGHTED, styles_of
from ds_mofa.profiler.report.units import shown, unit_of

LABELS = [f"method {i}" for i in range(30)]


def lines(count: int) -> Lines:
    """Series that do not cross, of which the last are the best."""
    styles = styles_of(LABELS[:count], LABELS[:count][::-1])
    y = [[10 + i, 5 + i, 4 + i / 4] for i in range(count)]
    series = [Series(label, styles[label], [0, 1, 2], v, v, v) for label, v in zip(LABELS, y)]
    return Lines("lines", "Lines <b>&", "step", "loss", series)


def drawn_lines(chart: Lines) -> list:
    """Those of the data; a sample beside a label is one point."""
    return [line for line in draw(chart).axes[0].lines if len(line.get_xdata()) > 1]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 30])
def test_no_two_lines_look_alike_and_six_of_them_have_a_colour(count):
    looks = [
        (matplotlib.colors.to_hex(line.get_color()), line.get_linestyle(), str(line._dash_pattern), line.get_marker())
        for line in drawn_lines(lines(count))
    ]
    assert len(looks) == len(set(looks)) == count
    colours = {style.color for style in HIGHLIGHTED}
    assert sum(look[0] in colours for look in looks) == min(6, count)
    assert len({look[0] for look in looks if look[0] in colours}) == min(6, count)
    assert all(line.get_marker() for line in drawn_lines(lines(count)))


def test_the_highlighted_are_those_that_were_asked_for():
    styles = styles_of(LABELS, ["method 7", "no such line", "method 3"])
    assert [label for label, style in styles.items() if style.strong] == ["method 3", "method 7"]
    assert styles["method 7"] == HIGHLIGHTED[0]
    assert styles_of(LABELS, LABELS) == styles_of(LABELS, LABELS[:6])


def test_every_line_is_labelled_once_and_no_label_covers_another():
    figure = draw(lines(30))
    axes = figure.axes[0]
    figure.draw_without_rendering()
    labels = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in labels) == sorted(LABELS)
    boxes = sorted((text.get_window_extent() for text in labels), key=lambda box: box.y0)
    assert all(low.y0 + 0.7 * low.height < high.y0 for low, high in zip(boxes, boxes[1:]))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes), "cut off"
    assert not figure.legends and not axes.get_legend()


def test_places_are_near_where_they_belong():
    assert _apart([0.5, 0.1, 0.9], 0.1) == pytest.approx([0.5, 0.1, 0.9])
    assert _apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert _apart([0.0, 0.0, 1.0], 0.1) == pytest.approx([0.0, 0.1, 1.0])
    assert _apart([1.0, 0.99, 0.2], 0.1) == pytest.approx([1.0, 0.9, 0.2])
    assert _apart([0.3] * 5, 0.5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0]), "no room"


def test_a_png_has_all_colours_of_its_lines(tmp_path):
    pixels = matplotlib.image.imread(save_png(draw(lines(6)), tmp_path / "lines.png"))
    found = {matplotlib.colors.to_hex(pixel) for row in pixels[:, :, :3] for pixel in row}
    assert {style.color for style in HIGHLIGHTED} <= found


def test_a_page_has_the_dashes_of_the_png():
    dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)", svg(lines(6))))
    assert len(dashes) == len({style.dash for style in HIGHLIGHTED} - {"-"}) == 3


def test_what_lies_on_each_other_in_one_figure_differs():
    together = [name for name in CATEGORIES if name != "process base"]  # of the host; the others are of the device
    assert len({AREA_COLORS[name] for name in together}) == len(together)
    layers = {name: [10**8 * (i + 1)] * 3 for i, name in enumerate(together)}
    figure = draw(Areas("run", "Run", "s", [0, 1, 2], layers, peak=1))
    colours = {matplotlib.colors.to_hex(area.get_facecolor()[0]) for area in figure.axes[0].collections}
    assert len(colours) == len(together)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == together[::-1], "as they lie on each other"


def test_the_unit_of_an_axis_is_that_of_its_size():
    for size, name in ((512, "B"), (40_000, "kB"), (3_000_000, "MB"), (72_500_000_000, "GB")):
        areas = Areas("run", "Run", "s", [0, 1], {"weights": [size, size]})
        assert draw(areas).axes[0].get_ylabel() == name
        bars = draw(Bars("peak", "Peak", [Bar("run", {"weights": size})])).axes[0]
        assert bars.get_xlabel() == name and bars.texts[-1].get_text() == f"run: {shown(size)}"


def test_bytes_are_shown_by_their_size():
    sizes = [0, 999, 1000, 1_234_567, 99_990_000, 181_700_000, 2_500_000_000, 123_700_000_000, -3_000_000, None]
    texts = ["0 B", "999 B", "1.00 kB", "1.23 MB", "99.99 MB", "181.7 MB", "2.50 GB", "123.7 GB", "-3.00 MB", "-"]
    assert [shown(size) for size in sizes] == texts
    unit = unit_of([310_000_000, None, 72_500_000_000])
    assert unit.name == "GB" and [unit.number(s) for s in (310_000_000, None)] == ["0.31", "-"]
    assert unit.number(5_000_000, digits=3) == "0.005"
    assert unit_of([]).name == unit_of([None]).name == "B"


class Tables(HTMLParser):
    """The cells of a page's tables, row by row."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, text):
        if self.cell:
            self.tables[-1][-1][-1] += text


TABLE = Table(["run", "a", "never measured", "b", "empty"], [["x", "1", "-", "-", ""], ["y", "2", "-", "3", ""]])
CLAIMS = [
    {"claim": "c", "measured": "m", "verdict": v, "holds": h}
    for v, h in (("holds", True), ("fails", False), ("not measured", None))
]
SUMMED = Table(["n", "v"], [["a", "1"], ["sum", "1"]], summed=True)
PEAK = Bars("peak", "P", [Bar("r", {"weights": 9})])
DOCUMENT = Document(
    "A <title>",
    "subtitle & more",
    [
        Section("", [TABLE, Points(["one", "two"])]),
        Section("Verdict", [Claims(CLAIMS)]),
        Section("Curves", [Text("Two of them."), Figure(lines(2)), Figure(PEAK)]),
        Section("Folded", [SUMMED, Code("$ run <x>")], 3, folded=True),
    ],
)


def test_no_column_of_a_page_is_empty():
    tables = Tables(html(DOCUMENT)).tables
    assert tables[0] == [["run", "a", "b"], ["x", "1", "-"], ["y", "2", "3"]]
    for table in tables:
        assert all(any(cell not in ("", "-") for cell in column[1:]) for column in zip(*table))
    text = markdown(DOCUMENT)
    assert "| run | a | b |\n| --- | ---: | ---: |\n| x | 1 | - |\n| y | 2 | 3 |\n" in text and "never" not in text


def test_the_markdown_of_each_block():
    text = markdown(DOCUMENT)
    for part in (
        "# A <title>\n\nsubtitle & more\n\n| run |",
        "\n\n- one\n- two\n\n## Verdict\n\n| claim | measured | verdict |\n| --- | --- | --- |\n| c | m | **holds** |",
        "\n\n## Curves\n\nTwo of them.\n\n![Lines <b>&](lines.png)\n\n![P](peak.png)\n\n### Folded\n\n| n | v |",
        "| **sum** | **1** |\n\n```\n$ run <x>\n```\n",
    ):
        assert part in text, part
    assert "\n\n\n" not in text


def test_a_page_needs_nothing_else_and_escapes_what_it_is_given():
    page = html(DOCUMENT)
    assert "http" not in page and "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "A &lt;title&gt;" in page and "subtitle &amp; more" in page and "Lines &lt;b&gt;&amp;" in page
    assert page.count("<svg") == 2 and page.count('class="figures"') == 1 and page.count("<details>") == 1
    assert 'class="claim holds"' in page and 'class="claim fails"' in page and 'class="sum"' in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)
    assert "var(--ink)" in page and "#1c2128;" not in page.split("</style>")[1], "a figure's text has the page's colour"


def test_the_same_document_gives_the_same_files(tmp_path):
    one, other = (write(DOCUMENT, tmp_path / name, "report.md") for name in ("one", "other"))
    assert [path.name for path in one] == ["report.md", "report.html", "lines.png", "peak.png"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
