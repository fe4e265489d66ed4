"""The page of an inspection: one HTML file that opens offline, in light and dark, and runs nothing.

Whatever comes from the dataset is untrusted: it is escaped here, in `text`, and the page forbids scripts and every
request by a content security policy, so an escape that was forgotten would still be inert.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffpolicy.data.episodes import Episodes
from diffpolicy.inspection import Inspection, drawings, mean, span
from diffpolicy.inspection.findings import Finding, Severity
from diffpolicy.inspection.ranges import Range, is_image

OPEN_DIMS = 12
LONGEST_VALUE = 4000
WORDS = {Severity.WRONG: "Wrong", Severity.SUSPECT: "Look at this", Severity.NOTE: "Good to know"}
CSS = """
:root { color-scheme: light dark;
  --ink: #1c2430; --soft: #5b6675; --line: #a9b2bd; --rule: #e3e7ec; --paper: #fff; --card: #f6f8fa; --box: #e8edf3;
  --one: #2f6fde; --two: #0f9f7a; --wrong: #c62a2f; --suspect: #a86000; --note: #5b6675; --good: #1a8754; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e4e8ee; --soft: #9aa6b4; --line: #657180; --rule: #2a323d; --paper: #12161c; --card: #1a2028; --box: #27303b;
  --one: #6ea3ff; --two: #3cc79f; --wrong: #ff7b78; --suspect: #f2ae4b; --note: #9aa6b4; --good: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.2rem 1.4rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.65rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.08rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .3rem; }
h3 span { font-weight: 400; color: var(--soft); }
code { font-size: .92em; }
p { margin: .3rem 0; color: var(--soft); }
.wrong { --c: var(--wrong); } .suspect { --c: var(--suspect); } .note { --c: var(--note); } .good { --c: var(--good); }
.verdict { font-size: 1.08rem; margin: .35rem 0 1.2rem; color: var(--ink); }
.dot { display: inline-block; width: .68em; height: .68em; border-radius: 50%; margin-right: .5em;
  background: var(--c); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .6rem; margin: 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: .6rem .85rem; }
.tiles dt { color: var(--soft); font-size: .8rem; }
.tiles dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.finding { border-left: 4px solid var(--c); background: var(--card); border-radius: 0 8px 8px 0;
  padding: .65rem 1rem; margin: .55rem 0; }
.finding b { color: var(--c); font-size: .75rem; letter-spacing: .04em; text-transform: uppercase; margin-right: .6em; }
.finding code { font-weight: 600; }
.finding p { margin: .15rem 0 0; }
.finding p.what { color: var(--ink); }
figure { margin: 0 0 1rem; }
figure > svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
figcaption { font-size: .85rem; color: var(--soft); }
.pair { display: grid; grid-template-columns: 4fr 5fr; gap: 1rem; align-items: start; }
@media (max-width: 44rem) { .pair { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-size: .78rem; font-weight: 500; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
td.in { width: 34%; min-width: 9rem; }
td.text { text-align: left; white-space: pre-wrap; }
.strip { width: 100%; height: 14px; display: block; }
.strip .box { fill: var(--box); } .strip .line { fill: var(--line); } .strip .ink { fill: var(--ink); }
.strip .one { fill: var(--one); } .strip .soft { fill: var(--one); opacity: .35; }
.key { display: inline-block; width: 1.4em; height: .62em; margin-right: .35em; background: var(--one); }
.key.box { background: var(--box); } .key.soft { opacity: .35; }
.legend span { margin-right: 1.1em; white-space: nowrap; }
.frames { display: flex; flex-wrap: wrap; gap: 6px; margin: .5rem 0; }
.frames img { width: 108px; border-radius: 4px; }
summary { cursor: pointer; padding: .35rem 0; color: var(--soft); }
@media print { body { max-width: none; } .finding, figure { break-inside: avoid; } }
"""
HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
)


def text(value: object) -> str:
    """Escape one value for HTML; control characters become question marks."""
    return html.escape("".join(c if c.isprintable() or c == "\n" else "?" for c in str(value)), quote=True)


def page(inspection: Inspection, episodes: Episodes, name: str) -> str:
    """Return the whole page of a dataset called `name`."""
    parts = (
        _summary(inspection, name),
        _findings(inspection),
        _episodes(inspection, episodes),
        _actions(inspection, episodes),
        _observations(inspection, episodes),
        _provenance(inspection),
    )
    head = f"{HEAD}<title>{text(name)}: inspection</title>\n<style>{CSS}</style></head>\n<body>\n"
    return head + "\n".join(parts) + "\n</body></html>\n"


def _summary(i: Inspection, name: str) -> str:
    tiles = (
        ("episodes", f"{i.episodes:,}", f"{i.steps:,} steps"),
        ("steps of an episode", span(i.lengths), f"median {np.median(i.lengths):g}"),
        ("return", span(i.returns), f"mean {mean(i.returns)}"),
        ("action dimensions", f"{i.action.dims}", _reach(i.action)),
        ("observed", " + ".join(_size(r) for r in i.obs[:4]), ", ".join(r.name.removeprefix("obs ") for r in i.obs)),
        ("environment", *_environment(i)),
    )
    drawn = "".join(f"<div><dt>{a}</dt><dd>{text(b)}<small>{text(c)}</small></dd></div>" for a, b, c in tiles)
    worst = i.findings[0].severity.name.lower() if i.findings and i.findings[0].severity < Severity.NOTE else "good"
    verdict = f'<p class="verdict"><span class="dot {worst}"></span>{text(_sentence(i.verdict))}</p>'
    return f'<h1>{text(name)}</h1>\n{verdict}\n<dl class="tiles">{drawn}</dl>'


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _reach(r: Range) -> str:
    return f"{r.low.min():.4g} to {r.high.max():.4g}" if r.dims else "empty"


def _size(r: Range) -> str:
    return " × ".join(str(n) for n in r.shape) or "1"


def _environment(i: Inspection) -> tuple[str, str]:
    if i.environment is None:
        return "not named", "compare with --env ID"
    if i.environment.problem is not None:
        return i.environment.env_id, "could not be made here"
    limit = i.environment.max_steps
    return i.environment.env_id, f"at most {limit} steps" if limit else "no time limit"


def _findings(i: Inspection) -> str:
    body = "\n".join(_finding(f) for f in i.findings) or "<p>None: every check is silent.</p>"
    return f"<h2>Findings</h2>\n{body}"


def _finding(f: Finding) -> str:
    return (
        f'<div class="finding {f.severity.name.lower()}"><b>{WORDS[f.severity]}</b><code>{text(f.where)}</code>'
        f'<p class="what">{text(_sentence(f.what))}</p><p>{text(f.advice)}</p></div>'
    )


def _episodes(i: Inspection, episodes: Episodes) -> str:
    path = drawings.paths(episodes)
    action = drawings.actions(episodes) if i.action.dims else None
    drawn = (
        (path, "First two observed numbers of at most eight episodes; dots are starts."),
        (action, "Actions of at most four episodes over time."),
    )
    pair = [f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in drawn if svg is not None]
    return (
        f"<h2>Episodes</h2>\n<figure>{drawings.histograms(i.lengths, i.returns)}</figure>\n"
        f'<div class="pair">{"".join(pair)}</div>'
    )


def _actions(i: Inspection, episodes: Episodes) -> str:
    space = _space(i)
    return f"<h2>Actions</h2>\n{_legend(space is not None)}\n{_array(i.action, episodes.action, space)}"


def _observations(i: Inspection, episodes: Episodes) -> str:
    arrays = zip(i.obs, episodes.obs.values(), strict=True)
    return f"<h2>Observations</h2>\n{_legend(False)}\n" + "\n".join(_array(r, array, None) for r, array in arrays)


def _legend(space: bool) -> str:
    reach = "the action space" if space else "smallest to largest value"
    keys = (("box", reach), ("soft", "98 % of the values"), ("one", "half of them"))
    drawn = "".join(f'<span><i class="key {kind}"></i>{words}</span>' for kind, words in keys)
    return f'<p class="legend">{drawn}</p>'


def _space(i: Inspection) -> tuple[np.ndarray, np.ndarray] | None:
    """Bounds of the action space, where they are known, finite and of the right size."""
    env = i.environment
    if env is None or env.problem is not None or len(env.low) != i.action.dims:
        return None
    return (env.low, env.high) if np.isfinite([env.low, env.high]).all() else None


def _array(r: Range, array: np.ndarray, space: tuple[np.ndarray, np.ndarray] | None) -> str:
    low, high = (r.low, r.high) if space is None else space
    title = f"<h3><code>{text(r.name)}</code> <span>{text(r.shape)}, {_how(r)}</span></h3>"
    if r.dims > OPEN_DIMS:
        overview = f"<figure>{drawings.boxes(r, low, high)}{_caption(r, space is not None)}</figure>"
        numbers = f"<summary>{r.dims} dimensions in numbers</summary>{_table(r, low, high)}"
        return f"{title}{overview}<details>{numbers}</details>"
    return title + (_frames(array) if is_image(array) else "") + _table(r, low, high)


def _how(r: Range) -> str:
    if r.images:
        return f"{r.rows:,} images, by channel, from {r.seen} frames evenly spaced"
    sampled = f", percentiles from {r.sampled:,} evenly spaced" if r.sampled < r.rows else ""
    return f"{r.rows:,} rows{sampled}"


def _caption(r: Range, space: bool) -> str:
    reach = "the action space's low to its high" if space else "its smallest to its largest value"
    hidden = f" The first {drawings.SHOWN_DIMS} of {r.dims} are drawn." if r.dims > drawings.SHOWN_DIMS else ""
    return f"<figcaption>Each dimension from {reach}; the line across is the median.{hidden}</figcaption>"


def _frames(array: np.ndarray) -> str:
    images = "".join(f'<img src="{uri}" alt="a frame">' for uri in drawings.frames(array))
    return f'<div class="frames">{images}</div>'


def _table(r: Range, low: np.ndarray, high: np.ndarray) -> str:
    head = "".join(f"<th>{word}</th>" for word in ("dim", "", "min", "1 %", "median", "99 %", "max", "mean", "std"))
    rows = "".join(
        f'<tr><td>{d}</td><td class="in">{drawings.strip(r, d, float(low[d]), float(high[d]))}</td>'
        + "".join(f"<td>{value:.4g}</td>" for value in _numbers(r, d))
        + "</tr>"
        for d in range(r.dims)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _numbers(r: Range, d: int) -> tuple[float, ...]:
    first, _, median, _, last = r.percentiles[:, d]
    return r.low[d], first, median, last, r.high[d], r.mean[d], r.std[d]


def _provenance(i: Inspection) -> str:
    rows = "".join(
        f'<tr><td>{text(key)}</td><td class="text">{text(_value(value))}</td></tr>' for key, value in _pairs(i.meta)
    )
    return "<h2>Provenance</h2>\n" + (
        f"<table><tbody>{rows}</tbody></table>" if rows else "<p>The dataset says nothing about where it is from.</p>"
    )


def _pairs(meta: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in meta.items()]


def _value(value: Any) -> str:
    words = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return words if len(words) <= LONGEST_VALUE else words[:LONGEST_VALUE] + " ..."
