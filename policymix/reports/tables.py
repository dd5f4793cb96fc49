"""Tables for the terminal, and short names for their rows."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns, the first aligned to the left, the others to the right; empty ones are left out."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row):
        return "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])


def labels(names: Sequence[str]) -> list[str]:
    """Paths without what they have in common at either end, so that columns stay narrow."""
    split = [name.rstrip("/").split("/") for name in names]
    while len(split) > 1 and all(len(s) > 1 and s[0] == split[0][0] for s in split):
        split = [s[1:] for s in split]
    while len(split) > 1 and all(len(s) > 1 and s[-1] == split[0][-1] for s in split):
        split = [s[:-1] for s in split]
    return ["/".join(s[-3:]) for s in split]
