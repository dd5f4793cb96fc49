"""One LeRobot dataset into several that share no episode."""

import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from policymix import files
from policymix.data import lerobot
from policymix.runs import episodes

SPLITS = "splits.json"
_PLACE = re.compile(r"(?P<feature>.+?)(\[(?P<dimension>\d+)\])?")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def split(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    num_splits: int | None = None,
    fractions: Sequence[str] = (),
    lists: Sequence[str] = (),
    seed: int = 42,
    sort_by: str = "",
    version: str = "",
    num_workers: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[pathlib.Path]:
    """Writes OUTPUT/split_0, split_1, …: complete datasets of the source's version, and
    splits.json.

    Without `fractions` or `lists` episodes are dealt out in the order that `seed` shuffles them
    into, so that sizes differ by one at most. Within a split they keep the source's order and are
    numbered anew, as are frames and tasks. See `episodes.copy` for what a copy is.

    Args:
      num_splits: how many; None: as many as `fractions` or `lists` has, else 4.
      fractions: "0.8" or "train=0.8" for each split, as `of_fractions`.
      lists: "train=0:40,45" for each split: just these episodes.
      sort_by: "observation.state[4]", or the name of a single number: episodes are ordered by
        what it is in their first frame instead, and cut into contiguous parts of that order.
        Every split then holds a region of its own; "episode_index" keeps the source's order.
      version: "v3.0" or "v2.1" instead of the source's.
      num_workers: threads that read ahead.
      dry_run: whether to print the plan alone.

    Returns:
      The folders of the splits.

    Raises:
      ValueError: too few or too many splits, nothing to sort by, lists that share an episode,
        features that cannot be written, or a damaged source.
      OSError: output that exists, or a disk without room.
    """
    source, output = files.local(source), files.local(output)
    dataset = lerobot.open_dataset(source)
    target = episodes.target(dataset, version=version)
    parts = _parts(dataset, num_splits, fractions, lists, seed, sort_by)
    files.check_apart(output, [source])
    files.check_output(output, overwrite=overwrite, ours=lambda path: (path / SPLITS).is_file())
    jobs = {name: [(dataset, number) for number in part] for name, part in parts.items()}
    files.check_space(
        output, episodes.check(target, [job for part in jobs.values() for job in part])
    )
    for name, part in parts.items():
        episodes.say(target, jobs[name], name)
        print(f"  {_brief(part)}")
    if left := dataset.num_episodes - sum(map(len, parts.values())):
        print(f"{left} episodes are in no split")
    if dry_run:
        print("dry run: nothing was written")
        return [output / name for name in parts]
    with files.whole_directory(output, overwrite=overwrite) as folder:
        outputs = {folder / name: part for name, part in jobs.items()}
        episodes.copy(target, outputs, f"splitting {dataset.path}", num_workers=num_workers)
        files.write_json(
            folder / SPLITS,
            {
                "source": {"path": str(source), "fingerprint": dataset.fingerprint()},
                "seed": None if lists else seed,
                "sort_by": sort_by,
                "episodes": parts,
            },
        )
    print(f"written to {output}")
    return [output / name for name in parts]


def assign(
    dataset: lerobot.Dataset, num_splits: int, seed: int = 42, sort_by: str = ""
) -> list[list[int]]:
    """The episodes of every split, ascending; each is in exactly one. Arguments as for `split`."""
    if not 2 <= num_splits <= dataset.num_episodes:
        raise ValueError(
            f"num_splits is {num_splits}; {dataset.path} has {dataset.num_episodes} episodes, so "
            f"2..{dataset.num_episodes} are possible"
        )
    order = _order(dataset, seed, sort_by)
    if sort_by:
        return [sorted(part.tolist()) for part in np.array_split(order, num_splits)]
    return [sorted(order[i::num_splits].tolist()) for i in range(num_splits)]


def of_fractions(
    dataset: lerobot.Dataset, fractions: Mapping[str, float], seed: int = 42, sort_by: str = ""
) -> dict[str, list[int]]:
    """{name: episodes, ascending}: int(num_episodes * fraction) of the shuffled or sorted order
    each, one after another; where the fractions add up to 1 the last has all that remain. It is
    LeRobot's rule, whose order is that of sort_by="episode_index".
    """
    total = sum(fractions.values())
    if total > 1 + 1e-6 or any(not 0 < fraction <= 1 for fraction in fractions.values()):
        raise ValueError(
            f"fractions are {list(fractions.values())}; expected numbers above 0 that add up to 1 "
            "at most"
        )
    order, first, parts = _order(dataset, seed, sort_by), 0, {}
    for place, (name, fraction) in enumerate(fractions.items(), 1):
        count = int(dataset.num_episodes * fraction)
        if place == len(fractions) and total > 1 - 1e-6:
            count = dataset.num_episodes - first
        if not count:
            raise ValueError(
                f"fraction {fraction} of the {dataset.num_episodes} episodes of {dataset.path} is "
                f"none for {name}; give it more"
            )
        parts[name] = sorted(order[first : first + count].tolist())
        first += count
    return parts


def of_lists(dataset: lerobot.Dataset, lists: Mapping[str, str]) -> dict[str, list[int]]:
    """{name: "0:40,45"} → {name: episodes, ascending}. ValueError where two share an episode."""
    parts = {
        name: episodes.chosen(text, dataset, f"episodes={name}") for name, text in lists.items()
    }
    owner: dict[int, str] = {}
    for name, part in parts.items():
        if not part:
            raise ValueError(f"episodes={name} has none; write {name}=0:40 or {name}=3,5,8")
        if shared := sorted(owner.keys() & set(part)):
            raise ValueError(
                f"episodes {_brief(shared)} are in {owner[shared[0]]} and in {name}; splits share "
                "no episode"
            )
        owner |= dict.fromkeys(part, name)
    return parts


def _parts(dataset, num_splits, fractions, lists, seed, sort_by) -> dict[str, list[int]]:
    if lists and (fractions or sort_by):
        raise ValueError("episodes are listed, so neither fractions nor sort_by can be given")
    if num_splits is not None and (count := len(lists or fractions)) not in (0, num_splits):
        raise ValueError(
            f"num_splits is {num_splits}, but {'episodes' if lists else 'fractions'} are given for "
            f"{count}; leave it out"
        )
    if lists:
        return of_lists(dataset, _named(lists, "episodes"))
    if not fractions:
        parts = assign(dataset, 4 if num_splits is None else num_splits, seed, sort_by)
        return {f"split_{i}": part for i, part in enumerate(parts)}
    numbers = {}
    for name, text in _named(fractions, "fractions").items():
        try:
            numbers[name] = float(text)
        except ValueError:
            raise ValueError(f"fractions: {text!r} is no number; write train=0.8,val=0.2") from None
    return of_fractions(dataset, numbers, seed, sort_by)


def _named(values: Sequence[str], flag: str) -> dict[str, str]:
    """["a=1", "b=2"] → {"a": "1", "b": "2"}; without a name a value is of split_0, split_1, …"""
    found: dict[str, str] = {}
    for place, value in enumerate(values):
        name, equals, rest = value.partition("=")
        name, rest = (name, rest) if equals else (f"split_{place}", value)
        if not _NAME.fullmatch(name) or name == SPLITS or name in found:
            raise ValueError(
                f"{flag}: {name!r} names no split, or two; names are of letters, digits, '_', '-' "
                "and '.'"
            )
        found[name] = rest
    return found


def _order(dataset: lerobot.Dataset, seed: int, sort_by: str) -> np.ndarray:
    """All episodes, shuffled or sorted: int64 [num_episodes]."""
    if sort_by:
        return np.argsort(_first_values(dataset, sort_by), kind="stable")
    return np.random.default_rng(seed).permutation(dataset.num_episodes)


def _first_values(dataset: lerobot.Dataset, sort_by: str) -> np.ndarray:
    """What `sort_by` names in the first frame of every episode: [num_episodes]."""
    place = _PLACE.fullmatch(sort_by)
    feature, dimension = place["feature"], place["dimension"]
    if feature not in dataset.numeric_keys:
        raise ValueError(
            f"sort_by={sort_by!r}: {dataset.path} has no numbers called {feature!r}; it has "
            f"{dataset.numeric_keys}"
        )
    values = dataset.column(feature)[dataset.episode_from]
    if values.ndim == 1 and dimension in (None, "0"):
        return values
    shape = list(values.shape[1:])
    if len(shape) != 1 or dimension is None or int(dimension) >= shape[0]:
        hint = f"write {feature}[0] to {feature}[{shape[0] - 1}]" if len(shape) == 1 else ""
        hint = hint if shape else f"write {feature}"
        raise ValueError(
            f"sort_by={sort_by!r}: {feature!r} of {dataset.path} has shape {shape or [1]}; "
            f"{hint or 'choose a feature that is one number or a vector'}"
        )
    return values[:, int(dimension)]


def _brief(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown + (f", … {numbers[-1]}" if len(numbers) > 12 else "")
