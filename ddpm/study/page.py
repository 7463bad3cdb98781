"""The report as one self-contained HTML page, with styles, script and figures inside."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from ddpm.figures.offline_page import document
from ddpm.study import figures, formatting
from ddpm.study.findings import Arm, Curve, Failure, Findings, Measure
from ddpm.study.statistics import BETTER, HIGHER, LOWER, NEITHER, NOT_DECIDED, WORSE, Comparison, Estimate

SAME_NOISE = "Every arm starts from the same noise: differences between two rows are due to their arms."
OF_POINTS = (
    "Blue: samples; grey: the data. All show the same window, three standard deviations of the data to each side, with "
    "points beyond at its edge."
)
OF_BLOCKS = "the baselines and the {} arms compared with each of them"
SHEET = 640  # largest width in pixels of an arm's enlarged row of samples
FOLDED = 30  # rows above which a secondary table is folded


@dataclass(frozen=True)
class Section:
    """A section of the page with its heading."""

    name: str  # of its anchor
    title: str
    body: str


def page(findings: Findings) -> str:
    """Return the report as HTML: verdict, arms, measures, effects of a grid, curves, samples, and provenance.

    Args:
        findings: of the study. Parts without content are left out; all text is escaped.
    """
    labels = figures.chosen(findings)
    coloured = labels[: figures.LINES] if findings.blocks is None else figures.chosen(findings, figures.LINES)
    styles = figures.styles(coloured, findings.against)
    parts = [
        _arms(findings),
        *(_measure(i, measure, findings, labels) for i, measure in enumerate(findings.measures, 1)),
        _effects(findings),
        _interactions(findings),
        _fronts(findings),
        _trade_offs(findings),
        _curves(findings, styles),
        _sheet(findings, labels),
        _failures(findings.failures),
        _made(findings),
    ]
    sections = [part for part in parts if part is not None]
    links = "".join(f'<a href="#{part.name}">{escape(part.title)}</a>' for part in sections)
    bodies = "".join(
        f'<section id="{part.name}"><h2>{escape(part.title)}</h2>{part.body}</section>\n' for part in sections
    )
    body = f'{_opening(findings)}<nav aria-label="Contents">{links}</nav>\n{bodies}'
    return document(findings.study, body, "ddpm.study", "page")


def _opening(findings: Findings) -> str:
    """Return title, question, verdict, warnings and design."""
    parts = [f'<header><p class="kind">Study</p><h1>{escape(findings.study)}</h1>']
    if findings.question:
        parts.append(f'<p class="lead">{escape(findings.question)}</p>')
    verdict = findings.verdict or ("There is none: no arm could be compared.",)
    parts.append(f'<div class="answer" role="note" aria-label="Verdict">{_paragraphs(verdict)}</div>')
    if findings.warnings:
        warnings = _paragraphs(f"Warning: {text}" for text in findings.warnings)
        parts.append(f'<div class="warnings" role="note" aria-label="Warnings">{warnings}</div>')
    if findings.design:
        parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in findings.design)}</ul>")
    return "".join(parts) + "</header>\n"


def _arms(findings: Findings) -> Section | None:
    """Return the section with the table of all arms."""
    if not findings.arms:
        return None
    total, notes = len(findings.arms), formatting.footnotes(findings.arms)
    factors = list(dict.fromkeys(factor for arm in findings.arms for factor in arm.settings))
    factors = factors if len(factors) > 1 else []
    first, others = (findings.measures[0], findings.measures[1:]) if findings.measures else (None, ())
    heads = [_head("arm"), *(_head(factor) for factor in factors), _head("seeds", number=True)]
    if first is not None:
        heads += [_measured(first)]
        base = "baseline" if findings.blocks is None else formatting.baseline(findings)
        heads += [_head(f"difference to {base}", "interval of its test", number=True), _head("verdict")]
    heads += [_head("parameters", number=True), _head("GFLOP", "an image", number=True)]
    heads += [_head("training", "a run", number=True)]
    heads += [_measured(measure) for measure in others]
    rows = "".join(_arm(arm, findings, factors, notes) for arm in findings.arms)
    search = (
        '<div class="tools"><input type="search" data-filters="arms-table" placeholder="filter: words of a row" '
        'aria-label="Show only arms whose row has these words">'
        f'<output id="arms-table-count" aria-live="polite">{total} of {total} arms</output></div>'
    )
    table = _table(heads, rows, name="arms-table", caption="Arms of the study")
    flags = "".join(f'<li id="flag-{i}">{escape(formatting.sentence(flag))}</li>' for flag, i in notes.items())
    listed = f'<ol class="footnotes">{flags}</ol>' if flags else ""
    how = (
        f'<p class="note"><b>How to read.</b> {escape(formatting.how_to_read(findings))}</p>'
        if first is not None
        else ""
    )
    return Section("arms", "Arms", search + table + listed + how)


def _arm(arm: Arm, findings: Findings, factors: Sequence[str], notes: Mapping[str, int]) -> str:
    """Return a row of the table of arms."""
    base = findings.against[arm.label] == arm.label
    marks = "".join(
        f'<sup><a href="#flag-{notes[flag]}" title="{escape(flag)}">{notes[flag]}</a></sup>' for flag in arm.flags
    )
    badge = ' <span class="badge">baseline</span>' if base else ""
    cells = [_row_head(arm.label, marks + badge)]
    cells += [f'<td class="level">{escape(arm.settings.get(factor, formatting.MISSING))}</td>' for factor in factors]
    cells.append(_cell(str(len(arm.seeds)), len(arm.seeds)))
    if findings.measures:
        first = findings.measures[0]
        difference = first.differences.get(arm.label)
        cells += [_estimate(first.arms.get(arm.label)), _difference(difference), _verdict(difference, base)]
    cells.append(_cell(formatting.amount(arm.parameters), arm.parameters))
    cells.append(_cell(formatting.MISSING if arm.gflop is None else formatting.number(arm.gflop), arm.gflop))
    cells.append(_cell(formatting.duration(arm.seconds), arm.seconds))
    cells += [_estimate(measure.arms.get(arm.label)) for measure in findings.measures[1:]]
    return f"<tr class='{'baseline' if base else 'arm'}'>{''.join(cells)}</tr>\n"


def _measure(i: int, measure: Measure, findings: Findings, labels: Sequence[str]) -> Section | None:
    """Return the section of a measure: its figure and its table of differences."""
    if not measure.arms:
        return None
    parts = [f"<p>{escape(' '.join(formatting.context(measure)))}</p>"]
    left_out = len(findings.arms) - len(labels)
    caption = "Dots: training seeds, each beneath its arm's mean and interval."
    if measure.differences:
        caption += " On the right, the same for the differences to the baseline; rings: seeds of an arm not decided."
    if left_out:
        best = formatting.foremost(findings.measures[0])
        kind = OF_BLOCKS.format(best) if findings.blocks else f"the baseline and the {best} {len(labels) - 1} arms"
        caption += f" Shown are {kind} by {findings.measures[0].title}; {left_out} more are in the tables."
    parts.append(_figure(figures.measure(measure, labels, findings.against), f"measure-{i}", measure.title, caption))
    if measure.differences:
        base = "the baseline" if findings.blocks is None else formatting.baseline(findings)
        table = _differences(measure.differences, "arm", f"Differences to {base}: {measure.title}")
        many = len(measure.differences) > FOLDED
        parts.append(_details(f"Differences of all {len(measure.differences)} arms", table) if many else table)
    return Section(f"measure-{i}", measure.title, "".join(parts))


def _differences(differences: Mapping[str, Comparison], of_what: str, caption: str) -> str:
    """Return a table of differences, of arms or of levels."""
    rows = []
    for label, of in differences.items():
        mean, ends = formatting.digits(of.mean, of.low, of.high, signed=True)
        cells = [_cell(mean, of.mean), _cell(ends or formatting.MISSING, of.low)]
        if of.verdict == NOT_DECIDED:
            cells = [_cell(formatting.difference(of), of.mean, "number points"), _cell(formatting.MISSING, None)]
        cells += [_cell(str(len(of.points)), len(of.points)), _cell(formatting.p_value(of.p), of.p), _verdict(of)]
        rows.append(f"<tr>{_row_head(label)}{''.join(cells)}</tr>\n")
    heads = [_head(of_what), _head("difference", number=True), _head("interval", number=True)]
    heads += [_head("pairs", number=True), _head("p", number=True), _head("verdict")]
    return _table(heads, "".join(rows), caption=caption)


def _effects(findings: Findings) -> Section | None:
    """Return the section on main effects of a grid."""
    if not findings.effects or not findings.measures:
        return None
    first = findings.measures[0]
    caption = (
        f"{formatting.heading(first)} at each level of a factor, over all levels of the other factors: mean, interval, "
    )
    caption += f"and a dot for each seed. {formatting.aim(first).capitalize()}."
    figure = figures.effects(findings.effects, first)
    parts = [_figure(figure, "effects", "Main effects", caption)]
    for effect in findings.effects:
        if effect.differences:
            text = formatting.mean_differences(findings)
            parts.append(f"<p>{escape(text)}</p>{_differences(effect.differences, effect.factor, text)}")
    return Section("effects", "Main effects", "".join(parts))


def _interactions(findings: Findings) -> Section | None:
    """Return the section on interactions: maps of two factors of a grid."""
    if not findings.interactions or not findings.measures:
        return None
    first = findings.measures[0]
    darker = "higher" if first.better == NEITHER else "better"
    caption = f"Mean {formatting.heading(first)} at each pair of levels; darker is {darker}."
    figure = figures.interactions(findings.interactions, first)
    return Section("interactions", "Two factors at a time", _figure(figure, "interactions", "Two factors", caption))


def _fronts(findings: Findings) -> Section | None:
    """Return the section on fronts of quality against cost."""
    if not findings.fronts or not findings.measures:
        return None
    best = list(dict.fromkeys(label for front in findings.fronts for label in figures.named(front)))
    numbers = {label: i for i, label in enumerate(best, 1)}
    figure = figures.fronts(findings.fronts, findings.measures[0], numbers)
    caption = "Every dot is an arm; those on the line are not beaten by any other in both quality and cost."
    if any(len(front.best) > figures.NAMED for front in findings.fronts):
        caption += f" At most {figures.NAMED} of a line are numbered, evenly along it."
    items = "".join(f"<li>{escape(label)}</li>" for label in best)
    body = _figure(figure, "fronts", "Quality against cost", caption) + f'<ol class="front">{items}</ol>'
    return Section("fronts", "Quality against cost", body)


def _trade_offs(findings: Findings) -> Section | None:
    """Quality, coverage and speed of sampling, each pair as a scatter plot."""
    if not findings.trade_offs:
        return None
    figure = figures.trade_offs(findings.trade_offs, figures.styles(findings.trade_offs[0].runs))
    caption = "A small dot is a run, a large one the mean of an arm. Speeds are those of the machine that measured."
    return Section("trade-offs", "Trade-offs", _figure(figure, "trade-offs", "Quality, coverage and speed", caption))


def _curves(findings: Findings, styles: Mapping[str, figures.Style]) -> Section | None:
    """Return the section of curves: losses over training, errors over log-SNR, quality over evaluations."""
    steps = figures.styles(figures.ranked(findings.by_steps))
    parts = [
        _lines("losses", f"{findings.losses_of} over training", findings.losses, "training step", "loss", styles),
        _lines("snr", "Error by noise level", findings.by_snr, "log-SNR (from noise to data)",
               "mean squared error of ε, held out", styles),
        _lines("steps", "Quality by evaluations", findings.by_steps, "evaluations of the network, an image",
               "Frechet distance", steps, log_x=True, markers=True),
    ]  # fmt: skip
    body = "".join(parts)
    return Section("curves", "Curves", body) if body else None


def _lines(
    name: str,
    title: str,
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    styles: Mapping[str, figures.Style],
    log_x: bool = False,
    markers: bool = False,
) -> str:
    """Return a figure of curves under its title, or "" where there are none."""
    if not curves:
        return ""
    figure = figures.lines(curves, x_label, y_label, styles, log_x=log_x, markers=markers)
    caption = "Shades: the range over training seeds."
    if any(label not in styles for label in curves):
        kind = "the lowest" if name == "steps" else "the baseline and the first arms by the first measure"
        caption += f" In colour: {kind}, {len(styles)} in all."
    return f"<h3>{escape(title)}</h3>{_figure(figure, name, title, caption)}"


def _sheet(findings: Findings, labels: Sequence[str]) -> Section | None:
    """Return the section of samples: a row for each arm from the same noise, after its schedule if schedules differ."""
    present = [label for label in labels if label in findings.sheet or label in findings.schedules]
    if not present:
        return None
    heads = ["arm", *(["√ᾱ over t/T"] if findings.schedules else []), *(["samples"] if findings.sheet else [])]
    cells = [f'<div class="head">{head}</div>' for head in heads]
    lines = {label: _polyline(curve) for label, curve in findings.schedules.items()}
    behind = "".join(lines[label] for label in present if label in lines)
    for label in present:
        base = ' <span class="badge">baseline</span>' if findings.against.get(label) == label else ""
        cells.append(f"<div>{escape(label)}{base}</div>")
        if findings.schedules:
            own = lines.get(label, "").replace("<polyline", '<polyline class="own"')
            box = 'viewBox="-2 -4 104 68" preserveAspectRatio="none" role="img"'
            cells.append(f'<div><svg {box} aria-label="schedule of {escape(label)}">{behind}{own}</svg></div>')
        if findings.sheet:
            cells.append(f"<div>{_picture(findings.sheet[label], label) if label in findings.sheet else ''}</div>")
    kind = "sheet scheduled" if findings.schedules and findings.sheet else "sheet"
    if findings.sheet_of_points and not findings.schedules:
        return Section("samples", "Samples", f'<p class="note">{SAME_NOISE} {OF_POINTS}</p>{_tiles(findings, present)}')
    grid = f'<div class="{kind}">{"".join(cells)}</div>'
    notes = []
    if findings.sheet:
        notes += [SAME_NOISE, OF_POINTS] if findings.sheet_of_points else [SAME_NOISE]
    if findings.schedules:
        notes.append("Schedules: how much of the image is left over time, each with the others in grey.")
    title = "Samples" if findings.sheet else "Schedules"
    return Section("samples", title, f'<p class="note">{" ".join(notes)}</p>{grid}')


def _tiles(findings: Findings, labels: Sequence[str]) -> str:
    """Return pictures of the arms' points side by side, each under its arm's label."""
    tiles = []
    for label in labels:
        base = ' <span class="badge">baseline</span>' if findings.against.get(label) == label else ""
        tiles.append(f"<div>{_picture(findings.sheet[label], label)}{escape(label)}{base}</div>")
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _polyline(curve: Curve) -> str:
    """Return a schedule as an SVG line in a box of 100 by 60."""
    every = max(1, len(curve.x) // 60)
    pairs = list(zip(curve.x, curve.y, strict=True))
    points = " ".join(f"{100 * x:.4g},{60 * (1 - y):.4g}" for x, y in [*pairs[:-1:every], *pairs[-1:]])
    return f'<polyline points="{points}"/>'


def _picture(picture: object, label: str) -> str:
    """Return an inline image, enlarged by the browser without blur."""
    data = figures.png(picture)
    high, wide = picture.shape[:2]  # type: ignore[attr-defined]
    scale = max(1, min(SHEET // wide, 256 // high, 4))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img alt="samples of {escape(label)}" style="width:{scale * wide}px" src="{source}">'


def _failures(failures: Sequence[Failure]) -> Section | None:
    """Return the section of runs that are not done, with their reasons."""
    if not failures:
        return None
    parts = []
    for failure in failures:
        seed = "" if failure.seed is None else f", seed {failure.seed}"
        trace = _details("Traceback", f"<pre>{escape(failure.traceback)}</pre>") if failure.traceback else ""
        parts.append(
            f'<div class="failure"><p><span class="state">{escape(failure.state)}</span> '
            f"<b>{escape(failure.arm)}</b>{seed}</p><p>{escape(failure.reason)}</p>"
            f"<p><small><code>{escape(str(failure.path))}</code></small></p>{trace}</div>"
        )
    return Section("failures", "Runs that are not done", "".join(parts))


def _made(findings: Findings) -> Section | None:
    """Return the section on provenance: commands, folders of runs and environment."""
    parts = []
    if findings.commands:
        parts.append(_copyable("\n".join(findings.commands)))
    of_arms = [arm for arm in findings.arms if arm.runs or arm.commands]
    if of_arms:
        runs = "".join(
            f"<h3>{escape(arm.label)}</h3>"
            + (_copyable("\n".join(arm.commands)) if arm.commands else "")
            + "".join(
                f"<small><code>{escape(str(run))}</code> (seed {seed})</small><br>"
                for run, seed in zip(arm.runs, arm.seeds, strict=False)
            )
            for arm in of_arms
        )
        parts.append(_details(f"Runs of {len(of_arms)} arms: folders and commands", runs))
    if findings.environment:
        pairs = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in findings.environment.items())
        parts.append(f"<h3>Environment</h3><dl>{''.join(pairs)}</dl>")
    return Section("made", "How it was made", "".join(parts)) if parts else None


def _head(title: str, under: str = "", number: bool = False) -> str:
    """Return a column's header, a button that sorts."""
    small = f"<small>{escape(under)}</small>" if under else ""
    kind = ' class="number"' if number else ""
    button = f'<button type="button"><span>{escape(title)}</span>{small}</button>'
    return f'<th scope="col" aria-sort="none"{kind}>{button}</th>'


def _row_head(label: str, marks: str = "") -> str:
    """Return an arm's label as the header of its row."""
    kind = ' class="long"' if len(label) > 40 else ""
    return f'<th scope="row"{kind}>{escape(label)}{marks}</th>'


def _measured(measure: Measure) -> str:
    """Return the header of a measure's column."""
    return _head(
        measure.title,
        f"{measure.unit}, {formatting.aim(measure)}" if measure.unit else formatting.aim(measure),
        number=True,
    )


def _table(heads: Iterable[str], rows: str, caption: str, name: str = "") -> str:
    """Return a sortable table in a scrollable box."""
    named = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="sortable"{named}>'
        f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str, value: float | None, kind: str = "number", under: str = "") -> str:
    """Return a cell that sorts by a number, or last where there is none."""
    key = "" if value is None or math.isnan(value) else repr(value).replace("inf", "Infinity")
    small = f"<small>{escape(under)}</small>" if under else ""
    return f'<td class="{kind}" data-value="{key}">{escape(text)}{small}</td>'


def _estimate(estimate: Estimate | None) -> str:
    if estimate is None:
        return _cell(formatting.MISSING, None)
    mean, ends = formatting.digits(estimate.mean, estimate.low, estimate.high)
    return _cell(mean, estimate.mean, under=ends)


def _difference(comparison: Comparison | None) -> str:
    """Return a cell of a difference with its interval; where undecided, the seeds' differences in grey."""
    if comparison is None:
        return _cell(formatting.MISSING, None)
    if comparison.verdict == NOT_DECIDED:
        return _cell(formatting.difference(comparison), comparison.mean, "number points")
    mean, ends = formatting.digits(comparison.mean, comparison.low, comparison.high, signed=True)
    return _cell(mean, comparison.mean, under=ends)


def _verdict(comparison: Comparison | None, baseline: bool = False) -> str:
    """Return a cell of a verdict, in bold and colour only where it is a result."""
    if comparison is None:
        return f'<td class="verdict undecided">{"" if baseline else formatting.MISSING}</td>'
    kind = {BETTER: "better", WORSE: "worse", HIGHER: "decided", LOWER: "decided"}.get(comparison.verdict, "undecided")
    return f'<td class="verdict {kind}">{escape(comparison.verdict)}</td>'


def _figure(figure: Figure, name: str, title: str, caption: str) -> str:
    return f"<figure>{figures.svg(figure, name, title)}<figcaption>{escape(caption)}</figcaption></figure>"


def _paragraphs(sentences: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in sentences)


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _copyable(text: str) -> str:
    """Return preformatted text with a button that copies it."""
    return f'<div class="copyable"><button type="button" hidden>copy</button><pre>{escape(text)}</pre></div>'
