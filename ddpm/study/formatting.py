"""Text of findings: numbers rounded to what their interval allows, and a report in Markdown."""

import html
import math
import re
from collections.abc import Collection, Iterable, Sequence

from ddpm.metrics.intervals import LEVEL
from ddpm.study.findings import Arm, Failure, Findings, Measure
from ddpm.study.statistics import BETTER, ENOUGH, HIGHER, LOWER, NEITHER, NOT_DECIDED, WORSE, Comparison, Estimate

MISSING = "–"  # in a cell without a measurement
COMPARED = ("difference", "pairs", "p", "verdict")  # the columns of a comparison
MARKED = (BETTER, WORSE, HIGHER, LOWER)  # the verdicts that are results
HOW_TO_READ = (
    f"Intervals are {100 * LEVEL:.0f}% intervals over training seeds by Student's t. Differences to the baseline are "
    "paired by seed and tested over all arms of a measure together by Holm's method: with no differences at all, a "
    "measure has a mark better or worse (higher or lower, where neither way is better) "
    f"in {100 - 100 * LEVEL:.0f}% of studies at most (and one of several measures "
    "in more). Each interval has the level of its test, so it excludes zero exactly where its arm is marked. "
    f"“{NOT_DECIDED}” means fewer than {ENOUGH} pairs, or seeds that failed: the differences are listed, "
    "without a conclusion."
)


def digits(mean: float, low: float | None = None, high: float | None = None, signed: bool = False) -> tuple[str, str]:
    """Format a mean and its interval, "1.47" and "0.93 to 2.00", to two digits of half the interval's width.

    Args:
        mean, low, high: as of an `Estimate`; without an interval the mean has three digits.
        signed: whether positive numbers have a plus, as differences do.

    Returns: the mean, and the interval or "" where there is none.
    """
    values = [mean] if low is None or high is None else [mean, low, high]
    half = (values[2] - values[1]) / 2 if len(values) == 3 else 0.0
    words = _alike(values, half, signed, plain=len(values) == 3)
    return words[0], " to ".join(words[1:]) if math.isfinite(sum(values)) else ""


def number(value: float, signed: bool = False) -> str:
    """Format a number with three digits."""
    return digits(value, signed=signed)[0]


def interval(mean: float, low: float | None, high: float | None, signed: bool = False) -> str:
    """Format a mean with its interval: "1.47 (0.93 to 2.00)", or the mean alone where there is none."""
    middle, ends = digits(mean, low, high, signed)
    return f"{middle} ({ends})" if ends else middle


def listed(values: Collection[float]) -> str:
    """Format the differences of seeds in order with a common number of decimals: "-0.52, +0.13"."""
    spread = max(values) - min(values) if len(values) > 1 else 0.0
    return ", ".join(_alike(list(values), spread, signed=True))


def p_value(p: float | None) -> str:
    """Format a p-value with two digits; a small one only as a bound."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:#.2g}" if p < 0.995 else "1"


def amount(value: float | None) -> str:
    """Format a large number with three digits and a unit prefix: "35.7 M"."""
    if value is None:
        return MISSING
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * power:
            return f"{number(value / power)} {letter}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Format a time in its two largest units: "1 h 05 min"."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes < 10 else f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} d"


def counted(n: int, what: str) -> str:
    """Format a count with its noun: "1 run", "2 runs"."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def heading(measure: Measure) -> str:
    """Return the measure's title with its unit."""
    return f"{measure.title} ({measure.unit})" if measure.unit else measure.title


def aim(measure: Measure) -> str:
    """Return which way is better: "lower is better"."""
    return "neither way is better" if measure.better == NEITHER else f"{measure.better} is better"


def foremost(measure: Measure) -> str:
    """Return the adjective for the arms that rank first by a measure."""
    return "highest" if measure.better == NEITHER else "best"


def estimate(result: Estimate | None) -> str:
    """Format a cell of the table of arms."""
    return MISSING if result is None else interval(result.mean, result.low, result.high)


def difference(result: Comparison | None) -> str:
    """Format a cell of differences; where undecided, the seeds' differences, as a mean would look like a result."""
    if result is None:
        return MISSING
    if result.verdict == NOT_DECIDED:
        return listed(result.points.values())
    return interval(result.mean, result.low, result.high, signed=True)


def context(measure: Measure) -> list[str]:
    """Return sentences on how to interpret a measure's numbers."""
    sentences = [f"{aim(measure).capitalize()}."]
    unit = "" if not measure.unit else measure.unit if measure.unit == "%" else f" {measure.unit}"
    if measure.real is not None:
        sentences.append(f"Held-out {measure.units} have {number(measure.real)}{unit}.")
    if measure.noise is not None:
        sentences.append(
            f"The choice of {measure.noise_of} alone moves the number of one run by up to ±{measure.noise:.2g}{unit}."
        )
    if measure.note:
        sentences.append(sentence(measure.note))
    return sentences


def sentence(text: str) -> str:
    """Return the text with a capital and a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) or not text else ".")


def baseline(findings: Findings) -> str:
    """Return the name of the baseline, with blocks including the factors that an arm shares with its own."""
    same = "" if findings.blocks is None else f", with the same {' and '.join(findings.blocks.others)}"
    return f"{findings.baseline}{same}"


def how_to_read(findings: Findings) -> str:
    """Return the explanation of intervals and verdicts."""
    if findings.blocks is None:
        return HOW_TO_READ
    return f"{HOW_TO_READ} An arm's baseline is that of {baseline(findings).replace(', with', ' with')}."


def mean_differences(findings: Findings) -> str:
    """Return the explanation of the differences of effects."""
    of = "" if findings.blocks is None else f", means over {' and '.join(findings.blocks.others)}"
    return f"Differences to {findings.baseline}{of}: paired by seed, and tested separately."


def footnotes(arms: Iterable[Arm]) -> dict[str, int]:
    """Return flag -> its number, from 1, of the distinct flags of arms."""
    return {flag: i for i, flag in enumerate(dict.fromkeys(flag for arm in arms for flag in arm.flags), 1)}


def markdown(findings: Findings, figures: str | None = None, trade_offs: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        findings: of the study.
        figures, trade_offs: paths, relative to the report, of pictures to place after the verdict; None for none.
    """
    parts = [f"# {_safe(findings.study)}"]
    if findings.question:
        parts.append(_safe(findings.question))
    parts += ["## Verdict", _bullets(findings.verdict or ["There is none: no arm could be compared."])]
    for name, path in (("Summary of the study", figures), ("Quality, coverage and speed", trade_offs)):
        if path:
            parts.append(f"![{name}](<{path.replace('<', '%3C').replace('>', '%3E')}>)")
    if findings.warnings:
        parts += ["**Warnings**", _bullets(findings.warnings)]
    if findings.design:
        parts += ["## Design", _bullets(findings.design)]
    parts += _arms(findings) + _differences(findings) + _effects(findings)
    if findings.failures:
        parts += ["## Runs that are not done", "\n".join(map(_failure, findings.failures))]
    if findings.commands:
        parts += ["## Commands", _code("\n".join(findings.commands))]
    if findings.environment:
        rows = [[_safe(name), _safe(value)] for name, value in findings.environment.items()]
        parts += ["## Environment", _table(["", ""], rows)]
    return "\n\n".join(parts) + "\n"


def _arms(findings: Findings) -> list[str]:
    """Return the table of arms with footnotes."""
    if not findings.arms:
        return []
    notes, first = footnotes(findings.arms), findings.measures[0] if findings.measures else None
    header = ["arm", "seeds", *(f"{_safe(heading(measure))}, {aim(measure)}" for measure in findings.measures)]
    header += ["parameters", "GFLOP", "training"]
    rows = []
    for arm in findings.arms:
        base = findings.against[arm.label] == arm.label
        marks = "".join(f"<sup>{notes[flag]}</sup>" for flag in arm.flags)
        cells = [f"{_safe(arm.label)}{' (baseline)' if base else ''}{marks}", str(len(arm.seeds))]
        cells += [estimate(measure.arms.get(arm.label)) for measure in findings.measures]
        cells += [amount(arm.parameters), MISSING if arm.gflop is None else number(arm.gflop), duration(arm.seconds)]
        rows.append(cells)
    table = _table(header, rows, right=range(1, len(header)))
    parts = ["## Arms", table] if first else ["## Arms", table, "Nothing was measured yet."]
    if notes:
        parts.append("\n".join(f"{i}. {_safe(sentence(flag))}" for flag, i in notes.items()))
    return parts


def _differences(findings: Findings) -> list[str]:
    """Return a table of differences for each measure that has some."""
    parts = []
    for measure in findings.measures:
        if not measure.differences:
            continue
        rows = [[_safe(label), *_compared(result)] for label, result in measure.differences.items()]
        parts += [f"### {_safe(heading(measure))}", _safe(" ".join(context(measure)))]
        parts.append(_table(["arm", *COMPARED], rows, right=(1, 2, 3)))
    if not parts:
        return []
    return [f"## Differences to {_safe(baseline(findings))}", _safe(how_to_read(findings)), *parts]


def _effects(findings: Findings) -> list[str]:
    """Return tables of main effects of a grid, with differences where a level is the baseline."""
    if not findings.effects or not findings.measures:
        return []
    header = ["factor", "level", f"mean {_safe(heading(findings.measures[0]))}"]
    rows = [
        [_safe(effect.factor), _safe(level), estimate(result)]
        for effect in findings.effects
        for level, result in effect.levels.items()
    ]
    parts = ["## Main effects", _table(header, rows, right=(2,))]
    for effect in findings.effects:
        if effect.differences:
            of = [[_safe(level), *_compared(result)] for level, result in effect.differences.items()]
            parts.append(_safe(mean_differences(findings)))
            parts.append(_table([_safe(effect.factor), *COMPARED], of, right=(1, 2, 3)))
    return parts


def _compared(result: Comparison) -> list[str]:
    return [difference(result), str(len(result.points)), p_value(result.p), _verdict(result.verdict)]


def _failure(failure: Failure) -> str:
    seed = "" if failure.seed is None else f", seed {failure.seed}"
    return f"- {failure.state}: {_safe(failure.arm)}{seed}: {_safe(failure.reason)} ({_safe(str(failure.path))})"


def _verdict(verdict: str) -> str:
    return f"**{verdict}**" if verdict in MARKED else verdict


def _bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {_safe(sentence)}" for sentence in sentences)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Collection[int] = ()) -> str:
    """Return a table with the columns `right` aligned to the right."""
    rule = ["---:" if i in right else "---" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def printable(text: str) -> str:
    """Replace characters in text that would control a terminal."""
    return "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def _code(text: str) -> str:
    """Return a block of code, fenced by more backticks than it has in a row."""
    text = printable(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}bash\n{text}\n{fence}"


def _safe(text: str) -> str:
    """Return text on one line with all markup escaped."""
    line = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)


def _alike(values: Sequence[float], half: float, signed: bool, plain: bool = False) -> list[str]:
    """Format numbers with a common number of decimals: two digits of `half`, or three of the largest if that is zero.

    Args:
        values: the numbers.
        half: their uncertainty.
        signed: whether positive ones have a plus.
        plain: whether to add decimals where a non-zero number from the second on would be displayed as zero.
    """
    if not all(math.isfinite(value) for value in values):
        return [number(value, signed) if math.isfinite(value) else "not finite" for value in values]
    largest = max((abs(value) for value in values), default=0.0)
    first = math.floor(math.log10(largest)) if largest else 0  # decimal place of the first digit
    power = 0 if -5 < first < 7 else first
    scaled, first = [value / 10.0**power for value in values], first - power
    decimals = 1 - math.floor(math.log10(half / 10.0**power)) if half else 2 - first
    decimals = min(max(decimals, 0), max(5 - first, 0))  # seeds that nearly agree do not need all their bits
    for _ in range(2):
        if plain and any(value and not float(f"{value:.{decimals}f}") for value in scaled[1:]):
            decimals += 1
    return [_decimal(value, decimals, power, signed) for value in scaled]


def _decimal(value: float, decimals: int, power: int, signed: bool) -> str:
    """Format a number with a true minus sign, and no sign where it rounds to zero."""
    size = f"{abs(value):,.{decimals}f}"
    size = size.replace(",", "") if abs(value) < 10_000 else size
    sign = "" if not float(size.replace(",", "")) else "−" if value < 0 else "+" if signed else ""
    return f"{sign}{size}{f'e{power}' if power else ''}"
