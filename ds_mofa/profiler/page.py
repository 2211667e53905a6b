"""A report as one HTML page that needs no network: light and dark, on a phone and on paper.

Areas are SVG that stretches with the page, all text is HTML over it, so that it keeps its size on a narrow screen.
"""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ds_mofa.profiler.categories import MEANING, axis_unit, gb
from ds_mofa.profiler.layout import COLORS, DARK, Bar, bars, fullest, stacked_run, stacked_step
from ds_mofa.profiler.markdown import LAYER_COLUMNS, NO_STACK

__all__ = ["render"]

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--soft:#5b6470;--line:#d9dee4;--paper:#fff;--card:#f6f8fa;
--good:#1a7f37;--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaef;--soft:#9aa4b0;--line:#363d47;--paper:#14181d;--card:#1d232a;
--good:#56d17a;--bad:#ff8f85}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2rem) 3rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.4rem 0}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.3rem 0}.soft{color:var(--soft)}
code,pre{font:12.5px/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.claims{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.7rem;margin:.6rem 0}
.claim{background:var(--card);border:1px solid var(--line);border-left:5px solid var(--soft);border-radius:6px;
padding:.5rem .8rem}
.claim.holds{border-left-color:var(--good)}.claim.fails{border-left-color:var(--bad)}
.claim b{display:block}.holds b{color:var(--good)}.fails b{color:var(--bad)}
.bar{margin:.7rem 0}.bar .head{display:flex;justify-content:space-between;gap:1rem;font-size:.92rem}
.bar .head b{white-space:nowrap;font-variant-numeric:tabular-nums}
.strip{display:flex;height:1.7rem;border-radius:4px;overflow:hidden;background:var(--card)}
.strip i{display:block;height:100%;border-right:1px solid var(--paper);overflow:hidden;color:#10151b;font:11px/1.7rem
system-ui,sans-serif;text-align:center;white-space:nowrap}
.predicted .strip{height:1.1rem;opacity:.78}.predicted .strip i{line-height:1.1rem;font-size:10px}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.5rem 0;list-style:none;font-size:.85rem}
.legend i,.swatch{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.chart{position:relative;margin:.6rem 0 .2rem 3.2rem;height:16rem;border-left:1px solid var(--line)}
.chart svg{position:absolute;inset:0;width:100%;height:100%}
.chart .y{position:absolute;right:calc(100% + .4rem);transform:translateY(50%);font-size:.75rem;color:var(--soft);
white-space:nowrap}
.chart .grid{position:absolute;left:0;right:0;border-top:1px dashed var(--line)}
.chart .peak{position:absolute;top:0;bottom:0;border-left:1px solid var(--ink);font-size:.72rem;padding-left:.25rem}
.chart .peak.left{border-left:0;border-right:1px solid var(--ink);padding:0 .25rem 0 0;transform:translateX(-100%)}
.below{position:relative;margin-left:3.2rem;font-size:.75rem;color:var(--soft);display:flex;
justify-content:space-between}
.phases{position:relative;margin-left:3.2rem;height:1.2rem}
.phases i{position:absolute;top:0;bottom:0;overflow:hidden;font:11px/1.2rem system-ui,sans-serif;padding-left:2px;
white-space:nowrap;border-left:1px solid var(--paper);background:var(--line);color:var(--ink)}
.phases i.backward{background:var(--soft);color:var(--paper)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}tr:last-child.sum td{font-weight:600;border-top:2px solid var(--soft)}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--card:#f4f4f4;--good:#1a7f37;--bad:#b42318}
body{font-size:11px;max-width:none;padding:0}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.figure,.bar,.claim,tr{break-inside:avoid}h2,h3{break-after:avoid}.chart{height:12rem}}
"""


def render(
    runs: Mapping[str, dict[str, Any]], claims: Sequence[Mapping[str, Any]], title: str, document: Mapping[str, Any]
) -> str:
    """The page of one or several runs; see :func:`ds_mofa.profiler.markdown.render` for the arguments."""
    good = {name: report for name, report in runs.items() if "ranks" in report}
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="soft">{_subtitle(good, document)}</p>']
    if claims:
        parts += ["<h2>Verdict</h2>", '<div class="claims">', *map(_claim, claims), "</div>"]
    if good:
        parts += ["<h2>The peak by category</h2>", _bar_chart(bars(good))]
        parts += [_category_table(bars(good))]
    for name, report in good.items():
        parts += _run(name, report)
    failed = [f"<li>{escape(n)}: {escape(r['error'])}</li>" for n, r in runs.items() if "ranks" not in r]
    if failed:
        parts += ["<h2>Not measured</h2><ul>", *failed, "</ul>"]
    notes = dict.fromkeys([*document.get("notes", ()), *(n for r in good.values() for n in r["notes"])])
    if notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    if document.get("command"):
        parts += ["<h2>Made by</h2>", f"<pre>{escape(shlex.join(map(str, document['command'])))}</pre>"]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _subtitle(good: Mapping[str, dict[str, Any]], document: Mapping[str, Any]) -> str:
    devices = sorted({rank["device"] for report in good.values() for rank in report["ranks"]})
    versions = next((report["environment"] for report in good.values()), {})
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "deepspeed", "transformers") if name in versions)
    date = str(document.get("created", ""))[:10]
    return escape(" · ".join(filter(None, [", ".join(devices), shown, date, "GB are 1e9 bytes, of the fullest rank"])))


def _claim(claim: Mapping[str, Any]) -> str:
    state = "holds" if claim["holds"] else "fails" if claim["holds"] is False else ""
    return (
        f'<div class="claim {state}"><b>{escape(claim["verdict"])}</b>{escape(claim["claim"])}'
        f'<p class="soft">{escape(claim["measured"])}</p></div>'
    )


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<li title="{escape(MEANING.get(name, ""))}"><i style="background:{COLORS[name]}"></i>{escape(name)}</li>'
        for name in names
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _bar_chart(shown: Sequence[Bar]) -> str:
    full = max((sum(max(0, size) for size in bar.parts.values()) for bar in shown), default=0) or 1
    rows = []
    for bar in shown:
        pieces = []
        for name, size in bar.parts.items():
            width = max(0, size) / full * 100
            text = gb(size, 1 if full >= 5e9 else 2) if width > 5 else ""
            tip = escape(f"{name}: {gb(size, 3)} GB")
            style = f"width:{width:.3f}%;background:{COLORS[name]}{';color:#fff' if name in DARK else ''}"
            pieces.append(f'<i style="{style}" title="{tip}">{text}</i>')
        label = bar.label if bar.kind == "measured" else f"{bar.label}, predicted"
        rows.append(
            f'<div class="bar {bar.kind}"><div class="head"><span>{escape(label)}</span><b>{gb(bar.total)} GB</b></div>'
            f'<div class="strip" role="img" aria-label="{escape(label)}">{"".join(pieces)}</div></div>'
        )
    names = [name for name in COLORS if any(name in bar.parts for bar in shown)]
    return f'<div class="figure">{"".join(rows)}{_legend(names)}</div>'


def _category_table(shown: Sequence[Bar]) -> str:
    names = [name for name in COLORS if any(name in bar.parts for bar in shown)]
    head = "".join(f"<th>{escape(b.label)}{', predicted' if b.kind == 'predicted' else ''}</th>" for b in shown)
    rows = [
        f'<tr><td title="{escape(MEANING[name])}"><i class="swatch" style="background:{COLORS[name]}"></i>{name}</td>'
        + "".join(f"<td>{gb(bar.parts.get(name, 0), 3)}</td>" for bar in shown)
        + "</tr>"
        for name in names
    ]
    rows.append('<tr class="sum"><td>sum, GB</td>' + "".join(f"<td>{gb(bar.total, 3)}</td>" for bar in shown) + "</tr>")
    meanings = "".join(f"<li><b>{name}</b>: {escape(MEANING[name])}</li>" for name in names)
    return (
        f'<div class="scroll"><table><tr><th>GB</th>{head}</tr>{"".join(rows)}</table></div>'
        f"<details><summary>What the categories are</summary><ul>{meanings}</ul></details>"
    )


def _run(name: str, report: Mapping[str, Any]) -> list[str]:
    rank = fullest(report)
    parts = [f"<h2>{escape(name)}</h2>", f'<p class="soft">{_summary(report, rank)}</p>']
    step = stacked_step(rank)
    if step is not None:
        times, layers, phases, peak = step
        parts += ["<h3>One step, allocation by allocation</h3>", _area(times, layers, "ms", peak, phases)]
    times, layers = stacked_run(rank)
    if len(times) > 1:
        parts += ["<h3>The whole run, by the meters</h3>", _area(times, layers, "s", None, [])]
    if rank["phases"]:
        head = "".join(f"<th>{t}</th>" for t in ("phase", "times", "host ms each", "peak allocated", "peak host"))
        rows = "".join(
            f"<tr><td>{escape(p['name'])}</td><td>{p['count']:.0f}</td>"
            f"<td>{p['seconds'] / max(p['count'], 1) * 1e3:.2f}</td><td>{gb(p['peak_allocated'] or None)}</td>"
            f"<td>{gb(p['peak_host'] or None)}</td></tr>"
            for p in rank["phases"]
        )
        table = f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        parts.append(f"<details open><summary>Phases</summary>{table}</details>")
    if rank["layers"]:
        parts.append(_layers(rank["layers"]))
    return parts


def _summary(report: Mapping[str, Any], rank: Mapping[str, Any]) -> str:
    text = f"{rank['device']}, rank {rank['rank']} of {len(report['ranks'])}, {rank['steps']} steps"
    seconds = sorted(rank["step_seconds"])
    if seconds:
        text += f", {seconds[len(seconds) // 2] * 1e3:.0f} ms each (median)"
    peaks = rank["peaks"]
    for key, label in (("allocated", "allocated"), ("reserved", "reserved"), ("nvml_device", "NVML"), ("host", "host")):
        if peaks[key] is not None:
            text += f"; peak {label} {gb(peaks[key])} GB"
    return escape(text + f". The sum is of: {rank['breakdown']['meter']}.")


def _area(
    times: Sequence[float], layers: Mapping[str, Sequence[int]], unit: str, peak: float | None, phases: Sequence[dict]
) -> str:
    start, span = times[0], (times[-1] - times[0]) or 1
    totals = [sum(max(0, column[i]) for column in layers.values()) for i in range(len(times))]
    top = _ceiling(max(totals) or 1)
    base = [0.0] * len(times)
    polygons = []
    xs = [(t - start) / span * 1000 for t in times]
    for name, column in layers.items():
        upper = [low + max(0, size) / top * 1000 for low, size in zip(base, column)]
        points = [f"{x:.1f},{1000 - y:.1f}" for x, y in zip(xs, upper)]
        points += [f"{x:.1f},{1000 - y:.1f}" for x, y in zip(reversed(xs), reversed(base))]
        polygons.append(f'<polygon fill="{COLORS[name]}" points="{" ".join(points)}"><title>{name}</title></polygon>')
        base = upper
    unit_size, unit_name = axis_unit(top)
    digits = 0 if top / unit_size >= 20 else 1 if top / unit_size >= 4 else 2
    ticks = "".join(
        f'<span class="grid" style="bottom:{k * 25}%"></span><span class="y" style="bottom:{k * 25}%">'
        f"{top * k / 4 / unit_size:.{digits}f}{f' {unit_name}' if k == 4 else ''}</span>"
        for k in range(5)
    )
    mark = ""
    if peak is not None:
        at = (peak - start) / span * 100
        side = " left" if at > 70 else ""
        shown = f"peak {max(totals) / unit_size:.{digits + 1}f} {unit_name}"
        mark = f'<span class="peak{side}" style="left:{at:.2f}%">{shown}</span>'
    strip = "".join(
        f'<i class="{escape(p["name"])}" title="{escape(p["name"])}, {p["end"] - p["start"]:.2f} ms" '
        f'style="left:{(p["start"] - start) / span * 100:.3f}%;width:{(p["end"] - p["start"]) / span * 100:.3f}%">'
        f"{escape(p['name']) if (p['end'] - p['start']) / span > 0.06 else ''}</i>"
        for p in phases
    )
    return (
        f'<div class="figure"><div class="chart">{ticks}<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" '
        f'role="img">{"".join(polygons)}</svg>{mark}</div>'
        + (f'<div class="phases">{strip}</div>' if strip else "")
        + f'<div class="below"><span>0 {unit}</span><span>{span:.{1 if span < 100 else 0}f} {unit}</span></div>'
        + _legend(list(layers))
        + "</div>"
    )


def _ceiling(size: float) -> float:
    """The next round number for an axis of four equal parts."""
    scale = 1.0
    while scale * 10 < size:
        scale *= 10
    return next(step * scale for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12) if step * scale >= size)


def _layers(entries: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in ("layer", *LAYER_COLUMNS.values()))
    rows = "".join(
        f"<tr><td>{escape(e['layer'])}</td>{''.join(f'<td>{e[key] / 1e6:.3f}</td>' for key in LAYER_COLUMNS)}</tr>"
        for e in entries
    )
    worst = max(entries, key=lambda entry: entry["largest"])
    stack = escape("\n".join(worst["stack"]) or NO_STACK)
    return (
        "<details><summary>When the backward of each layer is done</summary><p>MB are 1e6 bytes.</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
        f"<p>The largest piece left comes from:</p><pre>{stack}</pre></details>"
    )
