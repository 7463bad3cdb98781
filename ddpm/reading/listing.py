"""Code as HTML, line by line: syntax colours, links to definitions, and marked letters of the glossary."""

from collections.abc import Callable, Sequence
from html import escape

LinkOf = Callable[[str], str | None]
"""A name in the code -> its address, or None."""
GAP = '<span class="gap">⋯</span>'


def coloured(text: str, link: LinkOf = lambda name: None, letter: LinkOf = lambda name: None) -> list[str]:
    """Convert the lines of a Python file to HTML.

    Args:
        text: the whole file, so that strings over several lines are recognised.
        link: name -> address of its definition, or None.
        letter: name -> its name in the glossary, or None.
    """
    from pygments.lexers.python import PythonLexer

    lines = [""]
    attribute = False  # whether the name follows a dot
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        style = _style(str(kind))
        for i, part in enumerate(value.split("\n")):
            if i:
                lines.append("")
            if part:
                lines[-1] += _token(part, style, None if attribute else link(part), letter(part))
        attribute = value == "."
    return lines


def _style(kind: str) -> str:
    """Return the CSS class of a kind of token; empty for most."""
    kind = kind.removeprefix("Token.")
    if kind.startswith("Comment"):
        return "c"
    if kind.startswith(("Literal.String.Doc", "Literal.String")):
        return "s"
    if kind.startswith("Literal.Number"):
        return "m"
    if kind.startswith(("Keyword", "Operator.Word")):
        return "k"
    if kind.startswith("Name.Decorator"):
        return "d"
    if kind.startswith(("Name.Function", "Name.Class")):
        return "f"
    return "n" if kind.startswith("Name") else ""


def _token(text: str, style: str, address: str | None, letter: str | None) -> str:
    html = escape(text, quote=False)
    if style not in ("n", "f", "d") or not text.isidentifier():
        return f'<span class="{style}">{html}</span>' if style and style != "n" else html
    if letter is not None:
        return f'<span data-l="{letter}">{html}</span>'
    if address is not None and style == "n":
        return f'<a href="{address}">{html}</a>'
    return f'<span class="{style}">{html}</span>' if style != "n" else html


def listing(rows: Sequence[str], texts: Sequence[str], numbers: Sequence[int], ids: bool = True) -> str:
    """Return the HTML of some lines of a file.

    Args:
        rows: all lines as HTML.
        texts: the same as text, for their indentation.
        numbers: of the lines to include, from 1; blank ones at the ends are left out.
        ids: whether a line can be linked to, as #L88.
    """
    selected = [n for n in numbers if n <= len(rows)]
    while selected and not texts[selected[0] - 1].strip():
        selected = selected[1:]
    while selected and not texts[selected[-1] - 1].strip():
        selected = selected[:-1]
    indents = [len(t) - len(t.lstrip()) for n in selected if (t := texts[n - 1]).strip()]
    cut, parts, before = min(indents, default=0), [], 0
    for n in selected:
        if before and n != before + 1:
            if not texts[n - 1].strip():
                continue
            parts.append(GAP)
        name = f' id="L{n}"' if ids else ""
        parts.append(f'<span class="r"{name} data-n="{n}">{_without_indent(rows[n - 1], cut)}\n</span>')
        before = n
    return f'<pre class="code" tabindex="0">{"".join(parts)}</pre>' if parts else ""


def _without_indent(html: str, cut: int) -> str:
    """Remove the first `cut` spaces of a line, before any markup, or within a string that began earlier."""
    if html[:cut].isspace() or not html:
        return html[cut:]
    head, tag, rest = html.partition(">")
    return head + tag + rest[cut:] if tag and head.startswith("<span") and rest[:cut].isspace() else html
