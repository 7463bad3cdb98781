"""Frame of self-contained HTML pages, which need no server, network or other file."""

from html import escape
from importlib.resources import files

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
POLICY += "form-action 'none'"


def document(title: str, body: str, package: str, name: str, sounds: bool = False) -> str:
    """Return the HTML of a whole page.

    Args:
        title: plain text.
        body: HTML; the caller has escaped any foreign text in it.
        package, name: of its style sheet and script: NAME.css and NAME.js of a Python package.
        sounds: whether it plays embedded sounds.
    """
    policy = f"{POLICY}; media-src data:" if sounds else POLICY
    style, script = ((files(package) / f"{name}.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}<script>
{script}</script>
</body>
</html>
"""
