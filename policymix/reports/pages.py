"""HTML pages that are one file: no scripts, nothing from the network, readable in the dark."""

import base64
import html
import io
import re
from collections.abc import Sequence

import matplotlib.figure

# Said by the page itself: a browser then loads nothing but what stands in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --dim: #5b6672; --line: #d9dee3; --back: #fff;
  --mark: #fdf1dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --dim: #9aa5b1; --line: #39424c; --back: #15191d; --mark: #3a2f1a; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--back); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }
p { max-width: 46rem; margin: 0.7rem 0; overflow-wrap: anywhere; }
p.dim { color: var(--dim); font-size: 0.92rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
thead th { color: var(--dim); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
tr.mark > * { background: var(--mark); }
tr.first > * { border-top: 2px solid var(--line); }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; border-radius: 6px;
  background: #fff; }
"""
_NUMBER = re.compile(r"[-+−]?[\d.,]+( ?%)?( \[[^]]*\])?( of [\d,]+)?")


def page(title: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A page of sections.

    Args:
      title: plain text.
      sections: (heading, parts) of each; a heading is plain text and may be empty, parts are what
        the other functions here return.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections:
        if heading:
            body.append(f"<h2>{html.escape(heading)}</h2>")
        body.extend(parts)
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{_STYLE}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body]
    return "\n".join([*lines, "</body>", "</html>", ""])


def paragraph(text: str, *, dim: bool = False) -> str:
    """A paragraph of plain text; `dim` for what is said in passing."""
    return f"<p{_class('dim' if dim else '')}>{html.escape(text)}</p>"


def table(
    rows: Sequence[Sequence[str]], header: Sequence[str], classes: Sequence[str] | None = None
) -> str:
    """A table that scrolls where the screen is narrow; empty columns are left out.

    Args:
      rows: plain text; columns of numbers are aligned to the right.
      classes: of each row: "mark" lights it up, "first" begins a group, "" neither.
    """
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    styles = {i: "number" if i and _numeric([row[i] for row in rows]) else "" for i in kept}
    head = "".join(_cell("th", header[i], styles[i], "col") for i in kept)
    lines = []
    for row, style in zip(rows, classes or [""] * len(rows), strict=True):
        cells = _cell("th", row[0], "", "row") + "".join(
            _cell("td", row[i], styles[i]) for i in kept[1:]
        )
        lines.append(f"<tr{_class(style)}>{cells}</tr>")
    top = ['<div class="scroll"><table>', f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    return "\n".join([*top, *lines, "</tbody>", "</table></div>"])


def picture(png: bytes, alt: str) -> str:
    """A PNG inside the page; `alt` says what it shows to those who do not see it."""
    encoded = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{encoded}">'


def png(figure: matplotlib.figure.Figure) -> bytes:
    """A figure as the bytes of a PNG, for a file or for `picture`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _numeric(cells: Sequence[str]) -> bool:
    return all(_NUMBER.fullmatch(cell) for cell in cells if cell)


def _class(name: str) -> str:
    return f' class="{html.escape(name)}"' if name else ""


def _cell(tag: str, text: str, style: str, scope: str = "") -> str:
    scope = f' scope="{scope}"' if scope else ""
    return f"<{tag}{scope}{_class(style)}>{html.escape(text)}</{tag}>"
