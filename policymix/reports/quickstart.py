"""What the quickstart leaves to look at: sentences first, then tables, a picture and a page."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from policymix import files
from policymix.reports import pages, pictures, rates, tables, verdicts

_MEASURED = (
    "Every policy of a table met the same starts with the same noise in its actions. Intervals are "
    "Wilson's, at 95 %; p-values are McNemar's, exact and two-sided. There is one training seed: "
    "the intervals cover the roll-outs only, not what another training would give. Seconds are "
    "those of the attempt that completed a stage; peak memory is of one process, to which those "
    "beside it (simulators, other trainings) come."
)


def summary(report: Mapping[str, Any]) -> str:
    """Everything for the terminal."""
    soup, retain = report["soup"], report["retain"]
    stages = _stages(pictures.grouped(report["stages"]))
    return "\n\n".join(
        [
            f"soup on {soup['task']}: {soup['note']}\n{_soup_table(soup)}",
            f"{_chosen(soup)}\n{_wrapped(_geometry(soup))}",
            _wrapped(verdicts.soup_sentence(soup)),
            f"RETAIN on {retain['task']}: {retain['note']}\n{tables.table(*_retain(retain))}",
            _wrapped(verdicts.retain_sentence(retain)),
            f"stages, {report['seconds']:.0f} s in all\n{tables.table(*stages)}",
            _wrapped(_MEASURED),
        ]
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def draw(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """report.png: both acts and the time of the stages."""
    files.write_whole(path, pages.png(pictures.figure(report)))


def write_page(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """report.html: the sentences, the tables, the picture, and how it was measured."""
    soup, retain = report["soup"], report["retain"]
    sections = [
        (
            "",
            [
                pages.paragraph(verdicts.soup_sentence(soup)),
                pages.paragraph(verdicts.retain_sentence(retain)),
            ],
        ),
        ("In one picture", [_picture(report)]),
        (f"Soup: {soup['task']}", _soup_parts(soup)),
        (f"RETAIN: {retain['task']}", _retain_parts(retain)),
        ("How it was measured", _measured(report)),
        ("Stages", [pages.table(*_stages(report["stages"]))]),
    ]
    title = f"policymix quickstart in {report['simulator']['name']}"
    files.write_whole(path, pages.page(title, sections).encode("utf-8"))


def _soup(soup: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    """Rows and header; the kind stands where a group begins."""
    rows, last = [], None
    scores = rates.scores_tell(soup["rows"])
    best = verdicts.chosen(soup)
    for row in soup["rows"]:
        loss = row["loss"] or {}
        rows.append(
            [
                row["kind"] if row["kind"] != last else "",
                row["name"] + (" *" if row is best else ""),
                " ".join(f"{c:.3f}" for c in row["coefficients"] or ()),
                _number(loss.get("selection"), ".4f"),
                _number(loss.get("held_out"), ".4f"),
                rates.cell(row),
                str(row["episodes"]),
                _number(row["mean_score"] if scores else None, ".3f"),
            ]
        )
        last = row["kind"]
    header = ["", "policy", f"coefficients ({', '.join(soup['inputs'])})", "selection loss"]
    return rows, [*header, "held-out loss", "success % [95 %]", "n", "mean best score"]


def _soup_table(soup: Mapping[str, Any]) -> str:
    """For the terminal: kind and name share the column that is aligned to the left."""
    rows, header = _soup(soup)
    rows = [[f"{kind:<8} {name}", *rest] for kind, name, *rest in rows]
    return tables.table(rows, ["", "coefficients", *header[3:]])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _chosen(soup: Mapping[str, Any]) -> str:
    return f"* mix chosen by selection loss: {verdicts.chosen(soup)['name']}"


def _geometry(soup: Mapping[str, Any]) -> str:
    return f"distances: {soup['geometry']['meaning']}"


def _retain(retain: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    suites = retain["suites"]
    every = [row["results"][suite] for row in retain["rows"] for suite in suites]
    scores = rates.scores_tell(every)
    rows = []
    for row in retain["rows"]:
        results = [row["results"][suite] for suite in suites]
        rows.append(
            [
                row["name"],
                _number(row["merge_ratio"], "g"),
                *map(rates.cell, results),
                *(_number(r["mean_score"] if scores else None, ".3f") for r in results),
            ]
        )
    first = retain["rows"][0]["results"]
    counted = [f"{suite} (n {first[suite]['episodes']})" for suite in suites]
    return rows, ["", "ratio", *counted, *(f"score {suite}" for suite in suites)]


def _stages(stages: Sequence[Mapping[str, Any]]) -> tuple[list[list[str]], list[str]]:
    rows = []
    for stage in stages:
        count, reused = stage.get("count", 1), int(stage["reused"])
        word = f"{reused} of {count}" if count > 1 else "yes"
        rows.append(
            [
                stage["name"].replace("_", " ") + (f" ({count})" if count > 1 else ""),
                f"{stage['seconds']:.1f}",
                f"{stage['peak_memory_bytes'] / 1e6:,.0f}",
                word if reused else "",
            ]
        )
    return rows, ["", "seconds", "peak MB", "reused"]


def _picture(report: Mapping[str, Any]) -> str:
    return pages.picture(
        pages.png(pictures.figure(report)),
        "Success and losses of base, inputs, mixes and controls; success along the merge ratio; "
        "seconds of the stages. The tables below have the same numbers.",
    )


def _soup_parts(soup: Mapping[str, Any]) -> list[str]:
    rows, header = _soup(soup)
    best = verdicts.chosen(soup)
    styles = [
        "mark" if row is best else "first" if told[0] else ""
        for row, told in zip(soup["rows"], rows, strict=True)
    ]
    # The name heads a row here, so that it stays where the table scrolls.
    rows = [[told[1], row["kind"], *told[2:]] for row, told in zip(soup["rows"], rows, strict=True)]
    return [
        pages.paragraph(soup["note"], dim=True),
        pages.table(rows, ["policy", "kind", *header[2:]], styles),
        pages.paragraph(_chosen(soup), dim=True),
        *_distances(soup),
    ]


def _distances(soup: Mapping[str, Any]) -> list[str]:
    """The matrices between inputs; a base, if it was measured too, stands first."""
    geometry, names = soup["geometry"], soup["inputs"]
    relative = geometry["relative_distance"]
    held = names if len(relative) == len(names) else ["base", *names]
    parts = [
        pages.paragraph(f"How far the inputs lie apart: {geometry['meaning']}."),
        pages.table(_matrix(held, relative, ".4f"), ["distance / length of the first", *held]),
    ]
    if geometry["cosine"] is not None:
        rows = _matrix(names, geometry["cosine"], ".2f")
        parts.append(pages.table(rows, ["cosine of task vectors", *names]))
    return parts


def _matrix(names: Sequence[str], values: Sequence[Sequence[float]], form: str) -> list[list[str]]:
    return [
        [name, *(format(v, form) for v in line)] for name, line in zip(names, values, strict=True)
    ]


def _retain_parts(retain: Mapping[str, Any]) -> list[str]:
    rows, header = _retain(retain)
    controls = [row["kind"] == "control" for row in retain["rows"]]
    styles = ["first" if is_one and i == controls.index(True) else ""
              for i, is_one in enumerate(controls)]  # fmt: skip
    styles = [
        "mark" if row["kind"] == "merged" and row["merge_ratio"] == 0.5 else style
        for row, style in zip(retain["rows"], styles, strict=True)
    ]
    return [pages.paragraph(retain["note"], dim=True), pages.table(rows, header, styles)]


def _measured(report: Mapping[str, Any]) -> list[str]:
    machine, simulator = report["machine"], report["simulator"]
    facts = {
        "simulator": simulator["name"],
        **{name: str(version) for name, version in simulator["versions"].items()},
        "training seed": str(report["training_seed"]),
        "peak MB of a simulator": f"{simulator['peak_memory_bytes'] / 1e6:,.0f}",
        "seconds, all stages": f"{report['seconds']:.0f}",
        **{name: str(value) for name, value in machine.items()},
    }
    return [pages.paragraph(_MEASURED), pages.table([[*pair] for pair in facts.items()], ["", ""])]
