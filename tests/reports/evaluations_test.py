"""What an evaluation says of itself: lines, tables, verdicts in every outcome, picture and page."""

import html.parser

import pytest

from policymix import intervals
from policymix.reports import evaluations, rates


def counts(outcomes, scores):
    return {
        "episodes": len(outcomes),
        "successes": sum(outcomes),
        "interval": list(intervals.wilson(sum(outcomes), len(outcomes))),
        "mean_score": sum(scores) / len(scores),
        "score_interval": list(intervals.mean(scores)),
    }


def policy(name, successes, n=100, tasks=("push-v3",), scores=None, loss=None):
    """The first starts are solved, the others not; with several tasks, the same in each."""
    each = n // len(tasks)
    outcomes = [int(k % each < successes // len(tasks)) for k in range(n)]
    scores = scores or [float(outcome) for outcome in outcomes]
    parts = [slice(i * each, (i + 1) * each) for i in range(len(tasks))]
    return {
        "name": name,
        "path": f"/runs/{name}",
        "fingerprint": "0123456789abcdef" * 4,
        "loss": loss,
        **counts(outcomes, scores),
        "by_task": {
            task: counts(outcomes[part], scores[part])
            for task, part in zip(tasks, parts, strict=True)
        },
        "seeds": [1000 + k % each for k in range(n)],
        "outcomes": outcomes,
        "steps": [10] * n,
        "scores": scores,
        "seconds": 2.34,
    }


def report(*policies, tasks=("push-v3",), simulator="metaworld"):
    return {
        "version": 1,
        "policymix": "0.2.0",
        "jax": "0.10.2",
        "simulator": {"name": simulator, "versions": {"mujoco": "3.3.0"}},
        "tasks": list(tasks),
        "settings": {"env": f"{simulator}/{tasks[0]}", "num_episodes": 100, "seed": 1000},
        "validation": None,
        "policies": list(policies),
        "seconds": 12.3,
        "peak_memory_bytes": {"policy": 512_000_000, "environments": 256_000_000},
    }


def test_a_line_says_how_a_policy_did():
    assert evaluations.line(policy("mix", 88)) == (
        "mix: 88 of 100 episodes succeeded, 88 % [80, 93], 2.3 s"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (9.17, "9.2"), (66.667, "66.7"), (99.5, "99.5"), (100, "100")]
)
def test_a_percentage_has_the_decimals_it_needs(value, text):
    assert rates.short(value) == text


def test_p_values_are_short():
    assert rates.p_text(0.00031) == "p < 0.001"
    assert rates.p_text(0.01234) == "p = 0.012"
    assert rates.p_text(1.0) == "p = 1"


def test_a_table_of_one_task():
    loss = {"selection": 0.325, "held_out": None}
    text = evaluations.table(report(policy("a", 80), policy("b", 60, loss=loss)))
    assert text.splitlines()[:4] == [
        "   selection loss  success %  95 % interval    n",
        "-  --------------  ---------  -------------  ---",
        "a                         80       [71, 87]  100",
        "b         0.32500         60       [50, 69]  100",
    ]
    assert "mean best score" not in text


def test_scores_are_told_where_they_say_more_than_successes():
    scores = [0.5] * 100
    text = evaluations.table(report(policy("a", 0, scores=scores), policy("b", 10)))
    assert "mean best score" in text
    assert "0.500 [0.49, 0.51]" in text


def test_of_pusht_scores_are_told_whatever_succeeds():
    policies = policy("a", 60), policy("b", 90, scores=[0.6] * 50 + [0.8] * 50)
    told = report(*policies, simulator="pusht")
    assert "0.700 [0.67, 0.72]" in evaluations.table(told)
    verdict = evaluations.verdict(told)
    assert "highest mean score, 0.700 [0.67, 0.72], before “a” with 0.600 [0.50, 0.69]" in verdict
    assert "highest mean score" not in evaluations.verdict(report(*policies))


def test_several_tasks_have_a_table_of_their_own():
    tasks = ("push-v3", "reach-v3")
    told = report(policy("a", 80, tasks=tasks), policy("b", 60, tasks=tasks), tasks=tasks)
    lines = evaluations.table(told).splitlines()
    start = lines.index("")
    assert lines[start + 1 : start + 6] == [
        "success % of each task, 50 episodes each; the 95 % intervals are up to 26 points wide",
        "           a   b",
        "--------  --  --",
        "push-v3   80  60",
        "reach-v3  80  60",
    ]


def test_the_verdict_where_intervals_are_separate():
    assert evaluations.verdict(report(policy("a", 60), policy("b", 90))) == (
        "“b” has the most successes: 90 of 100, 90 % [83, 94]. The runner-up, “a”, has 60, "
        "60 % [50, 69]: the intervals are separate. The exact McNemar test of the two, on the same "
        "starts, gives p < 0.001."
    )


def test_the_verdict_where_intervals_overlap():
    told = evaluations.verdict(report(policy("a", 90), policy("b", 87), policy("c", 20)))
    assert told == (
        "“a” has the most successes: 90 of 100, 90 % [83, 94]. The runner-up, “b”, has 87, "
        "87 % [79, 92]: the intervals overlap. The exact McNemar test of the two, on the same "
        "starts, gives p = 0.25. Its interval is separate from 1 of the 2 others. The best of 3, "
        "picked on the same episodes that judge it, looks a little better than it is."
    )


def test_the_verdict_where_the_best_are_level():
    told = evaluations.verdict(report(policy("a", 90), policy("b", 90), policy("c", 20)))
    assert told == (
        "“a” and “b” have the most successes: 90 of 100 each, 90 % [83, 94], so this evaluation "
        "prefers none of them (McNemar p = 1 between the first two)."
    )


def test_the_verdict_where_nothing_succeeds():
    low, high = [0.2] * 10, [0.9] * 9 + [0.1]
    policies = [policy("a", 0, n=10, scores=low), policy("b", 0, n=10, scores=high)]
    assert evaluations.verdict(report(*policies)) == (
        "No policy succeeded in any of 10 episodes, so success does not tell them apart. “b” has "
        "the highest mean score, 0.820 [0.55, 0.98], before “a” with 0.200 [0.10, 0.40]: the "
        "intervals are separate; the sign test of the two, on the same starts, gives p = 0.021."
    )
    told = evaluations.verdict(report(policy("a", 0), policy("b", 0)))
    assert told.endswith("neither do the scores, which are all zero.")


def test_the_verdict_on_one_policy():
    told = evaluations.verdict(report(policy("a", 90)))
    assert told == "There is one policy, so there is nothing to compare it with."


@pytest.mark.parametrize("num_policies", [1, 15])
@pytest.mark.parametrize("tasks", [("push-v3",), ("push-v3", "reach-v3")])
def test_a_picture_is_written_whole(tmp_path, num_policies, tasks):
    policies = [policy(f"a${k}_$", 5 * k, tasks=tasks) for k in range(num_policies)]
    evaluations.draw(report(*policies, tasks=tasks), tmp_path / "report.png")
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]


def test_the_page_has_all_of_it(tmp_path):
    tasks = ("push-v3", "reach-v3")
    told = report(policy("<a>", 80, tasks=tasks), policy("b", 60, tasks=tasks), tasks=tasks)
    told["validation"] = {"path": "/data/<val>.npz", "batches": {}, "meta": {}}
    evaluations.write_page(told, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    html.parser.HTMLParser().feed(text)
    assert "<a>" not in text
    for part in (
        "&lt;a&gt;",
        "“&lt;a&gt;” has the most successes",
        "&lt;val&gt;.npz",
        "3.3.0",
        "1000 to 1049",
        "512 MB",
        "evaluate.num_episodes",
        "0123456789abcdef<",
        "data:image/png;base64,",
        'class="mark"',
    ):
        assert part in text
