"""LeRobot datasets made from others: merged, thinned, converted, measured or labelled anew."""

import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Sequence

from policymix import files
from policymix.data import lerobot
from policymix.runs import episodes, label_rewards

_COPIES = ("version", "pictures", "codec")
# What each takes beside sources and output; the last two are of other formats, and modules of
# that name.
TAKES = {
    "merge": _COPIES,
    "delete": (*_COPIES, "episodes"),
    "convert": _COPIES,
    "recompute_stats": _COPIES,
    "label_rewards": (*_COPIES, "reward", "feature", "episodes"),
    "import_hdf5": (*_COPIES, "layout", "fps", "task", "swap_channels", "skip_bad"),
    "resize_rlds": ("size", "quality"),
}
OPERATIONS = tuple(TAKES)[:5]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for beside the operation; every operation takes the first three.

    Attributes:
      version: "v3.0" or "v2.1"; pictures: "image" or "video"; codec: "av1" or "h264"; each as the
        first source where empty.
      episodes: "3,5:8", to be deleted, or to be successes of reward="success_at_end"; "" is none,
        None as if it were not mentioned.
      reward, feature: as `label_rewards.rewards` and `label_rewards.name`.
    """

    version: str = ""
    pictures: str = ""
    codec: str = ""
    episodes: str | None = None
    reward: str = ""
    feature: str = ""


def run(
    operation: str,
    sources: Sequence[str | pathlib.Path],
    output: str | pathlib.Path,
    request: Request | None = None,
    *,
    num_workers: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Writes the dataset OUTPUT: what `operation` makes of the sources, which are not touched.

    "merge" puts several sources one after another. "delete" leaves out the episodes of `request`,
    and those without frames. "convert" writes another version, or pictures for videos, or the
    reverse. "recompute_stats" looks at all frames, and at the pictures that statistics sample,
    again. "label_rewards" adds or replaces a feature of rewards. See `episodes.copy` for what a
    copy is; files are copied, not linked, so that neither dataset changes with the other.

    Args:
      num_workers: threads that read and decode ahead; the output does not depend on them.
      dry_run: whether to print the plan alone.

    Raises:
      ValueError: an unknown operation or episode, nothing to do, sources that do not fit
        together, features that cannot be written, or a damaged source.
      OSError: output that exists, or a disk without room.
    """
    request = request or Request()
    given = [name for name, value in dataclasses.asdict(request).items() if value]
    given += ["episodes"] * (request.episodes == "")
    check_operation(operation, sources, given)
    if operation not in OPERATIONS:
        raise ValueError(f"{operation} reads another format; call runs.{operation}.run")
    paths, output = [files.local(source) for source in sources], files.local(output)
    datasets = [lerobot.open_dataset(p, empty_episodes=operation == "delete") for p in paths]
    asked = {name: getattr(request, name) for name in _COPIES}
    target, *others = [episodes.target(dataset, **asked) for dataset in datasets]
    for path, other in zip(paths[1:], others, strict=True):
        _check_alike(paths[0], target, path, other)
    jobs = [(dataset, n) for dataset in datasets for n in range(dataset.num_episodes)]
    if operation == "delete":
        jobs = _kept(datasets[0], request.episodes or "")
    elif operation == "recompute_stats":
        target = dataclasses.replace(target, keep_stats=False)
    elif operation == "label_rewards":
        target = _labelled(target, datasets[0], request)
    files.check_apart(output, paths)
    files.check_output(output, overwrite=overwrite, ours=_is_dataset)
    files.check_space(output, episodes.check(target, jobs))
    episodes.say(target, jobs, output.name)
    if dry_run:
        print("dry run: nothing was written")
        return
    what = f"{operation} {output.name}"
    episodes.copy(target, {output: jobs}, what, num_workers=num_workers, overwrite=overwrite)
    print(f"written to {output}")


def check_operation(
    operation: str, sources: Sequence[str | pathlib.Path], given: Iterable[str] = ()
) -> None:
    """ValueError for an operation that is not in TAKES, or takes more or fewer sources, or has no
    use for an option that is `given`, or lacks one.
    """
    if operation not in TAKES:
        near = difflib.get_close_matches(operation, TAKES, n=1)
        hint = f"did you mean {near[0]!r}? Known are" if near else "known are"
        raise ValueError(f"operation {operation!r} is unknown; {hint} {', '.join(TAKES)}")
    if (operation == "merge") != (len(sources) > 1):
        raise ValueError(
            f"{operation} takes {'two or more sources' if operation == 'merge' else 'one source'}, "
            f"got {len(sources)}: {', '.join(map(str, sources))}"
        )
    if unused := [name for name in given if name not in TAKES[operation]]:
        raise ValueError(
            f"{operation} has no use for {', '.join(unused)}; it takes "
            f"{', '.join(TAKES[operation])}"
        )
    if operation == "convert" and not given:
        raise ValueError("convert into what? Give version, pictures or codec")
    if operation == "label_rewards" and "reward" not in given:
        raise ValueError(
            "label_rewards needs reward: success_at_end, zero, a number, FILE.csv, FILE.json or "
            "sub-goals, as next.success>=1"
        )


def _kept(dataset: lerobot.Dataset, text: str) -> list[tuple[lerobot.Dataset, int]]:
    """What is left without the named and the empty episodes."""
    lengths = dataset.episode_to - dataset.episode_from
    empty = {n for n in range(dataset.num_episodes) if not lengths[n]}
    named = set(episodes.chosen(text, dataset))
    if not named | empty:
        raise ValueError(
            f"nothing to delete: {dataset.path} has no episodes without frames; name some, as in "
            "episodes=3,5:8"
        )
    if len(named | empty) == dataset.num_episodes:
        raise ValueError(f"nothing would be left of {dataset.path}: a dataset has an episode")
    if empty:
        print(f"without frames: {sorted(empty)}")
    return [(dataset, n) for n in range(dataset.num_episodes) if n not in named | empty]


def _labelled(
    target: episodes.Target, dataset: lerobot.Dataset, request: Request
) -> episodes.Target:
    name = label_rewards.name(dataset, request.feature)
    told = request.episodes
    successes = None if told is None else episodes.chosen(told, dataset)
    values = label_rewards.rewards(dataset, request.reward, successes)
    label_rewards.say(dataset, values, name)
    features = target.features | {name: dict(label_rewards.FEATURE)}
    return dataclasses.replace(target, features=features, replaced={name: values})


def _check_alike(
    first: pathlib.Path, ours: episodes.Target, other: pathlib.Path, theirs: episodes.Target
) -> None:
    """ValueError unless copies of two datasets can be one: the same robot, fps and features."""

    def said(target: episodes.Target) -> dict:
        features = {f"feature {name!r}": feature for name, feature in target.features.items()}
        return {"fps": target.fps, "robot_type": target.robot_type} | features

    ours, theirs = said(ours), said(theirs)
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{other} does not fit {first}: {name} is {theirs.get(name)}, and "
                f"{ours.get(name)} there; merge datasets of one robot, with pictures given where "
                "one has images and the other videos"
            )


def _is_dataset(path: pathlib.Path) -> bool:
    return (path / "meta" / "info.json").is_file()
