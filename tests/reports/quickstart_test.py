"""What the quickstart says in every outcome, and that its tables, picture and page are whole."""

import html.parser

import pytest

from policymix import intervals
from policymix.reports import quickstart, verdicts

SUITES = ["in distribution", "out of distribution", "pretraining tasks"]


def counts(successes, n, score=None, first=0):
    """Solved are starts in a row from number `first` on, counted in a circle."""
    return {
        "episodes": n,
        "successes": successes,
        "interval": list(intervals.wilson(successes, n)),
        "mean_score": successes / n if score is None else score,
        "outcomes": [int((k - first) % n < successes) for k in range(n)],
    }


def row(name, kind, successes, selection=1.0, score=None, first=0):
    return {
        "name": name,
        "kind": kind,
        "coefficients": [0.5, 0.3, 0.2] if kind == "mix" else None,
        "loss": {"selection": selection, "held_out": 0.9},
        **counts(successes, 100, score, first),
    }


def soup(*rows):
    values = [[0.0, 0.1, 0.2], [0.1, 0.0, 0.1], [0.2, 0.1, 0.0]]
    return {
        "task": "push-v3",
        "note": "18 demonstrations in 3 splits",
        "inputs": ["split 0", "split 1", "split 2"],
        "rows": list(rows),
        "geometry": {
            "distance": values,
            "relative_distance": values,
            "cosine": values,
            "meaning": "the inputs lie apart",
        },
    }


def soup_of(mix, control=None, single=80):
    """The mix with the lower selection loss, not the one with more successes, is the chosen one."""
    rows = [
        row("base", "base", 1),
        row("split 0", "input", single, 0.5),
        row("split 1", "input", single - 20, 0.4),
        row("greedy", "mix", 99, 0.33),
        row("average", "mix", mix, 0.32),
    ]
    if control is not None:
        rows += [
            row("all data", "control", control, 0.1),
            row("short", "control", control // 2, 0.05),
        ]
    return soup(*rows)


HEAD = (
    "Of 2 mixes, “average” has the lowest selection loss and was chosen by that alone, not by its "
    "successes. "
)


def test_a_mix_that_is_better_beyond_doubt():
    assert verdicts.soup_sentence(soup_of(95)) == HEAD + (
        "It succeeds in 95 of 100 episodes, 95 % [89, 98]; the best single checkpoint, “split 0”, "
        "in 80, 80 % [71, 87]. That one was picked by its successes in these very episodes, which "
        "makes it the hardest to beat. So the mix is 15 points better: the intervals are separate, "
        "and McNemar's exact test on the same starts gives p < 0.001."
    )


@pytest.mark.parametrize(
    ("mix", "ending"),
    [
        (
            90,
            (
                "So the mix is 10 points better: the intervals overlap, yet McNemar's exact test "
                "on the same starts gives p = 0.002, which chance alone seldom does."
            ),
        ),
        (
            81,
            (
                "So the mix is 1 point better: the intervals overlap, and McNemar's exact test on "
                "the same starts gives p = 1, so this may be chance."
            ),
        ),
        (80, "So the mix is level with it: nothing is gained (p = 1)."),
        (
            76,
            (
                "So the mix is 4 points worse, and mixing did not help here: the intervals "
                "overlap, and McNemar's exact test on the same starts gives p = 0.12."
            ),
        ),
        (
            40,
            (
                "So the mix is 40 points worse, and mixing did not help here: the intervals are "
                "separate, and McNemar's exact test on the same starts gives p < 0.001."
            ),
        ),
    ],
)
def test_a_mix_against_the_best_single_checkpoint(mix, ending):
    assert verdicts.soup_sentence(soup_of(mix)).endswith(ending)


@pytest.mark.parametrize(
    ("control", "ending"),
    [
        (
            98,
            (
                "A control without mixing does better: “all data”, the best of 2 on these "
                "episodes, has 98 % [93, 99], 8 points more (the intervals overlap, p = 0.0078)."
            ),
        ),
        (
            92,
            (
                "A control without mixing cannot be told from it: “all data”, the best of 2 on "
                "these episodes, has 92 % [85, 96], 2 points more (the intervals overlap, p = 0.5)."
            ),
        ),
        (
            90,
            (
                "“all data”, the best of 2 on these episodes, has 90 % [83, 94], as many (the "
                "intervals overlap, p = 1)."
            ),
        ),
        (
            89,
            (
                "A control without mixing cannot be told from it: “all data”, the best of 2 on "
                "these episodes, has 89 % [81, 94], 1 point less (the intervals overlap, p = 1)."
            ),
        ),
        (
            50,
            (
                "No control does as well: “all data”, the best of 2 on these episodes, has 50 % "
                "[40, 60], 40 points less (the intervals are separate, p < 0.001)."
            ),
        ),
    ],
)
def test_a_mix_against_the_best_control(control, ending):
    assert verdicts.soup_sentence(soup_of(90, control)).endswith(ending)


def test_a_search_that_keeps_one_checkpoint_has_not_mixed():
    rows = soup_of(70)["rows"]
    rows[2]["loss"]["selection"] = 0.1
    rows[3]["coefficients"], rows[3]["loss"]["selection"] = [1.0, 0.0, 0.0], 0.1
    told = verdicts.soup_sentence(soup(*rows))
    assert told.startswith(
        "Of 2 mixes, “greedy” keeps one checkpoint alone, so nothing is mixed; of the others, "
        "“average” has the lowest selection loss and was chosen by that alone, not by its "
        "successes. By selection loss it is not better than “split 1” by itself: 0.320 against "
        "0.100. It succeeds in 70 of 100"
    )
    rows[4]["coefficients"] = [0.0, 1.0, 0.0]
    told = verdicts.soup_sentence(soup(*rows))
    assert told.startswith("Each of the 2 mixes keeps one checkpoint alone: nothing was mixed. It")


def test_wins_on_different_starts_count_on_both_sides():
    """95 and 80 successes, but a start that the one fails and the other solves counts too."""
    rows = soup_of(95)["rows"]
    rows[4] = row("average", "mix", 95, 0.05, first=40)
    wins, losses = 20, 5  # of the mix where split 0 fails, and the other way round
    p = intervals.mcnemar([1] * wins + [0] * losses, [0] * wins + [1] * losses)
    assert f"gives p = {p:.2g}" in verdicts.soup_sentence(soup(*rows))


def test_a_success_of_the_base_alone_says_nothing_of_mixing():
    rows = [row("base", "base", 1), row("split 0", "input", 0, 0.5, 0.1)]
    rows.append(row("average", "mix", 0, 0.2, score=0.3))
    assert "above the best single checkpoint" in verdicts.soup_sentence(soup(*rows))


def test_a_soup_in_which_nothing_succeeds_is_told_by_its_scores():
    told = verdicts.soup_sentence(
        soup(
            row("split 0", "input", 0, 0.3, score=0.2),
            row("split 1", "input", 0, 0.3, score=0.3),
            row("average", "mix", 0, 0.2, score=0.4),
            row("all data", "control", 0, 0.2, score=0.4),
        )
    )
    assert told == (
        "There is one mix, “average”. No policy succeeded in any of 100 episodes, so success says "
        "nothing here. By mean best score the mix is above the best single checkpoint, “split 1”: "
        "0.400 against 0.300; it is level with the best control, “all data”, which has 0.400. "
        "These means have no intervals, so small differences may be chance."
    )


def retain_of(base=(10, 5, 97), tuned=(100, 57, 22), merged=(97, 58, 90), controls=(), score=None):
    """Successes of 100 in the three suites."""
    rows = [
        ("fine-tuned", "finetuned", 0.0, tuned),
        ("merged 0.25", "merged", 0.25, (0, 0, 0)),
        ("merged 0.5", "merged", 0.5, merged),
        ("base", "base", 1.0, base),
        *((f"control {k}", "control", None, values) for k, values in enumerate(controls)),
    ]
    return {
        "task": "plate-slide-v3@0:0.2",
        "note": "10 demonstrations",
        "suites": SUITES,
        "rows": [
            {
                "name": name,
                "kind": kind,
                "merge_ratio": ratio,
                "results": {
                    suite: counts(value, 100, score)
                    for suite, value in zip(SUITES, values, strict=True)
                },
            }
            for name, kind, ratio, values in rows
        ],
    }


def test_a_merge_that_recovers_most_of_what_was_forgotten():
    assert verdicts.retain_sentence(retain_of()) == (
        "Fine-tuning takes success from 10 to 100 % [96, 100] in distribution, from 5 to 57 % "
        "[47, 66] out of distribution and from 97 to 22 % [15, 31] on the pretraining tasks. "
        "Merged with the base at ratio 0.5, the default, fixed beforehand and not picked on these "
        "results, it has 97 % [92, 99] in distribution, 58 % [48, 67] out of distribution and "
        "90 % [83, 94] on the pretraining tasks. The merge recovers 68 of the 75 points that "
        "fine-tuning forgot on the pretraining tasks (91 %). Against the fine-tune it is 3 points "
        "lower in distribution (the intervals overlap, p = 0.25) and 1 point higher out of "
        "distribution (the intervals overlap, p = 1)."
    )


@pytest.mark.parametrize(
    ("tuned", "merged", "part"),
    [
        (22, 97, "The merge recovers all of the 75 points that fine-tuning forgot on the"),
        (22, 20, "Of the 75 points that fine-tuning forgot on the pretraining tasks the merge"),
        (97, 97, "Fine-tuning forgot nothing on the pretraining tasks, so there is nothing"),
        (95, 96, "That loss itself may be chance (p = 0.5)."),
    ],
)
def test_what_a_merge_recovers(tuned, merged, part):
    told = verdicts.retain_sentence(retain_of(tuned=(100, 57, tuned), merged=(97, 58, merged)))
    assert part in told


@pytest.mark.parametrize(
    ("controls", "ending"),
    [
        (
            [(97, 58, 98)],
            (
                "Plain controls against the merge, beyond chance: “control 0” is better on the "
                "pretraining tasks (98 against 90 %, p = 0.0078). So “control 0” does as well "
                "without merging, as far as these episodes tell."
            ),
        ),
        (
            [(100, 20, 98), (97, 58, 88), (96, 57, 91)],
            (
                "“control 0” is better on the pretraining tasks (98 against 90 %, p = 0.0078) and "
                "worse out of distribution (20 against 58 %, p < 0.001); “control 1” differs "
                "nowhere; “control 2” differs nowhere. So “control 1” and “control 2” do as well "
                "without merging, as far as these episodes tell."
            ),
        ),
        (
            [(100, 20, 98)],
            (
                "and worse out of distribution (20 against 58 %, p < 0.001). Every plain control "
                "is worse than the merge somewhere."
            ),
        ),
    ],
)
def test_a_merge_against_plain_controls(controls, ending):
    told = verdicts.retain_sentence(retain_of(controls=controls))
    assert told.endswith(ending)


def test_a_retain_in_which_nothing_succeeds_is_told_by_its_scores():
    nothing = (0, 0, 0)
    told = verdicts.retain_sentence(retain_of(nothing, nothing, nothing, [nothing], score=0.25))
    assert told.startswith("No policy succeeded in any episode, so success says nothing")
    assert "0.250 / 0.250 / 0.250 on the pretraining tasks" in told


def report(soup, retain):
    stages = [("demonstrations_soup", 3.0), ("train_base", 30.0), ("train_split_0", 9.5)]
    return {
        "simulator": {
            "name": "metaworld",
            "versions": {"mujoco": "3.3.0"},
            "peak_memory_bytes": 460_000_000,
        },
        "machine": {"cores": 2, "python": "3.11.2", "jax": "0.10.2", "platform": "cpu"},
        "training_seed": 0,
        "soup": soup,
        "retain": retain,
        "stages": [
            {
                "name": name,
                "begun": 100.0 * k,
                "seconds": s,
                "peak_memory_bytes": 500_000_000,
                "reused": s < 10,
            }
            for k, (name, s) in enumerate(stages)
        ],
        "seconds": 42.5,
    }


def test_the_tables():
    text = quickstart.summary(report(soup_of(90, 92), retain_of(controls=[(1, 2, 3)])))
    lines = text.splitlines()
    assert "* mix chosen by selection loss: average" in lines
    chosen = next(line for line in lines if "average *" in line)
    assert chosen.split() == (
        ["average", "*", "0.500", "0.300", "0.200", "0.3200", "0.9000", "90", "[83,", "94]", "100"]
    )
    assert next(line for line in lines if "greedy" in line).startswith("mix      greedy")
    assert "distances: the inputs lie apart" in lines
    merged = next(line for line in lines if line.startswith("merged 0.5"))
    assert merged.split("  ")[-1].strip() == "90 [83, 94]"
    training = next(line for line in lines if line.startswith("train (2)"))
    assert training.split() == ["train", "(2)", "39.5", "500", "1", "of", "2"]
    assert max(map(len, lines)) < 130


@pytest.mark.parametrize("controls", [(), [(90, 50, 90)] * 3])
def test_picture_and_page_are_written_whole(tmp_path, controls):
    soup = soup_of(90, 92 if controls else None)
    soup["rows"][0]["loss"] = {"selection": 3.0, "held_out": None}
    soup["rows"][0]["name"] = "<base> $x_$"
    told = report(soup, retain_of(controls=controls))
    quickstart.draw(told, tmp_path / "report.png")
    quickstart.write_page(told, tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert 1600 <= int.from_bytes(content[16:20], "big") <= 2000
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    html.parser.HTMLParser().feed(text)
    assert "<base>" not in text
    first = text.index("Of 2 mixes")
    assert first < text.index("<img") < text.index("<table")
    for part in ("&lt;base&gt; $x_$", "mujoco", "training seed", "train split 0", "apart."):
        assert part in text


def test_the_page_names_the_base_where_its_distances_were_measured(tmp_path):
    soup = soup_of(90)
    soup["geometry"]["relative_distance"] = [[0.0] * 4 for _ in range(4)]
    quickstart.write_page(report(soup, retain_of()), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col" class="number">base</th>' in text


def test_everything_zero_is_drawn_by_scores(tmp_path):
    nothing = (0, 0, 0)
    zero = soup(row("split 0", "input", 0, score=0.3), row("average", "mix", 0, score=0.4))
    told = report(zero, retain_of(nothing, nothing, nothing, score=0.2))
    quickstart.draw(told, tmp_path / "report.png")
    assert "mean best score" in quickstart.summary(told)
