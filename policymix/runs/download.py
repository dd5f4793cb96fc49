"""Downloads: folders of one's own, each whole or absent, with what lies at gs:// or hf://.

The bytes pass through the cache of `hub`, which resumes and verifies, and the folder is linked to
it: one copy on the disk, and what configs name by gs:// or hf:// finds it there too.
"""

import difflib
import fnmatch
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import google_crc32c

from policymix import files, hub, metrics
from policymix.data import tokenizer

LEDGER = ".download.json"  # hidden: it describes the folder, and is no part of what is in it

_OPENPI = "gs://openpi-assets/checkpoints"
# Those of OpenPI that `all` means. Its list of released checkpoints does not name pi0_libero.
CHECKPOINTS = ("pi0_base", "pi0_libero", "pi05_base", "pi05_libero", "pi05_droid")
# tfds finds a dataset, and so do mixtures, in NAME/VERSION.
_FRACTAL, _BRIDGE = "fractal20220817_data/0.1.0", "bridge_dataset/1.0.0"
NAMES: Mapping[str, str] = {name: f"{_OPENPI}/{name}" for name in CHECKPOINTS} | {
    "paligemma": "hf://google/paligemma-3b-pt-224",
    "paligemma_tokenizer": tokenizer.PALIGEMMA_MODELS[0],
    "fractal": f"gs://gresearch/robotics/{_FRACTAL}",
    "bridge": f"https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds/{_BRIDGE}/",
}
FOLDERS = {name: name for name in NAMES} | {"fractal": _FRACTAL, "bridge": _BRIDGE}


class Item(NamedTuple):
    """What is to be downloaded, as it was named, and the folder it becomes."""

    name: str
    url: str
    folder: pathlib.Path


def run(
    names: Sequence[str],
    output: str | pathlib.Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[pathlib.Path]:
    """Downloads each of `names` into a folder of its own in `output`.

    A folder that is there and whole is left alone, without asking the network. What was interrupted
    goes on where it stopped. Of several, those that fail do not hold up the others.

    Args:
      names: of NAMES, "all" for CHECKPOINTS, or any gs://BUCKET/PATH and
        hf://[datasets/]ORG/REPO[@REVISION][/PATH], whose folder is the last part of the name.
      overwrite: whether folders that an earlier download left are made anew.
      dry_run: whether to print what would be done, and touch nothing.

    Returns:
      The folders that are whole now.

    Raises:
      ValueError: an unknown name, two that become one folder, or wrong bytes.
      OSError: what is not there or cannot be reached, no room, or a folder that is in the way.
      ImportError: if the extra `hub` is not installed.
    """
    items = plan(names, output)
    whole, failures = [], []
    for item in items:
        try:
            if item.url.startswith("https://"):
                print(_by_wget(item))
            elif dry_run:
                _show(item, overwrite)
            else:
                whole.append(_one(item, overwrite))
        except (OSError, ValueError) as error:
            if len(items) == 1:
                raise
            print(f"{item.name}: {error}", file=sys.stderr, flush=True)
            failures.append(item.name)
    if failures:
        raise OSError(
            f"{len(failures)} of {len(items)} are not there: {', '.join(failures)}, for the "
            "reasons above; the others are whole, and the same command goes on"
        )
    return whole


def plan(names: Sequence[str], output: str | pathlib.Path) -> list[Item]:
    """What `names` stand for, each once. ValueError for what is not understood."""
    listed = [n for name in names for n in (CHECKPOINTS if name == "all" else (name,))]
    if not listed:
        raise ValueError(f"nothing is named; expected one of {', '.join((*NAMES, 'all'))}")
    files.check_output(pathlib.Path(output), overwrite=True)
    found: dict[pathlib.Path, Item] = {}
    for name in listed:
        url = _url(name)
        folder = files.local(output) / (FOLDERS.get(name) or _last_part(url))
        if folder in found and found[folder].url != url:
            raise ValueError(
                f"{found[folder].url} and {url} would become one folder, {folder}; download them "
                "to two outputs"
            )
        found[folder] = Item(name, url, folder)
    return list(found.values())


def _url(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    if name.startswith(("gs://", "hf://")):
        return name.rstrip("/")
    if "://" in name:
        raise ValueError(
            f"{name} cannot be downloaded: gs:// and hf:// are, since they say what their bytes "
            "must be; fetch other things with wget, and give the local path"
        )
    known = (*NAMES, "all")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"no download is called {name!r}; there are {', '.join(known)}, and any gs://BUCKET/PATH "
        f"or hf://ORG/REPO{hint}"
    )


def _last_part(url: str) -> str:
    """The name of the folder: of a repository its name, of …/params the checkpoint's."""
    path = re.sub(r"^(hf://(?:datasets/)?[^/@]+/[^/@]+)@(?:refs/\w+/)?[^/]+", r"\1", url)
    return re.sub(r"/params$", "", path).rpartition("/")[2]


def _by_wget(item: Item) -> str:
    where = shlex.quote(str(item.folder))
    return (
        f"{item.name} lies on a plain web server, which does not say what its bytes must be, so "
        "that they cannot be verified here. wget fetches it, and goes on where it stopped:\n"
        f"wget -c -r -l 1 -np -nd -R 'index.html*' -P {where} {item.url}"
    )


def _show(item: Item, overwrite: bool) -> None:
    trouble = _trouble(item)
    if trouble and item.folder.exists() and not overwrite:
        raise FileExistsError(trouble)
    done = "is whole, nothing is to be done" if not trouble else f"from {item.url}"
    print(f"{item.name}: {item.folder} {done}")


def _one(item: Item, overwrite: bool) -> pathlib.Path:
    """Leaves the folder whole, or raises."""
    trouble = _trouble(item)
    if not trouble and not overwrite:
        print(f"{item.name}: {item.folder} is whole already; --overwrite looks for a newer one")
        return item.folder
    if trouble and item.folder.exists() and not overwrite:
        raise FileExistsError(trouble)
    files.check_output(item.folder, overwrite=overwrite, ours=lambda f: (f / LEDGER).is_file())
    parent = next(p for p in item.folder.parents if p.exists())
    free = shutil.disk_usage(parent).free
    print(f"{item.name}: {item.url} to {item.folder}, whose disk has {free / 1e9:,.1f} GB free")
    sources = _sources(item.url, hub.fetch(item.url))
    with files.whole_directory(item.folder, overwrite=overwrite) as partial:
        copied = _link(sources, partial, item.folder)
        rows = {}
        for name in metrics.progress(sorted(sources), f"checking {item.name}", lines=0):
            path = partial / name
            rows[name] = [path.stat().st_size, path.stat().st_mtime_ns, _crc32c(path)]
        files.write_json(partial / LEDGER, {"url": item.url, "files": rows})
    total = sum(size for size, *_ in rows.values())
    how = "copied from" if copied else "linked to"
    print(f"{item.name}: {len(rows)} files, {total / 1e6:,.1f} MB, {how} the cache")
    return item.folder


def _trouble(item: Item) -> str:
    """Why the folder is not what a download of this URL left; "" if it is."""
    if not item.folder.exists():
        return f"{item.folder} does not exist"
    try:
        ledger = files.read_json(item.folder / LEDGER)
        url, rows = str(ledger["url"]), dict(ledger["files"])
        wrong = [name for name, row in rows.items() if not _is_right(item.folder / name, *row)]
    except (OSError, ValueError, KeyError, TypeError):
        return (
            f"output {item.folder} exists and no download left it there; choose another --output, "
            "or remove it yourself"
        )
    if url != item.url:
        return f"output {item.folder} exists and is {url}; pass --overwrite to replace it"
    if wrong:
        return (
            f"output {item.folder} is not as it was downloaded: {wrong[0]} is gone or was changed; "
            "pass --overwrite to replace it"
        )
    return ""


def _is_right(path: pathlib.Path, size: int, time: int, crc32c: str) -> bool:
    """Whether a file is as it was: untouched since, or by its bytes."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    return path.stat().st_mtime_ns == time or _crc32c(path) == crc32c


def _crc32c(path: pathlib.Path) -> str:
    digest = google_crc32c.Checksum()
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            digest.update(chunk)
    return digest.digest().hex()


def _sources(url: str, path: pathlib.Path) -> dict[str, pathlib.Path]:
    """The files of a URL in the cache, by their names in the folder."""
    if path.is_file():
        return {path.name: path}
    top, parts = path, [path]
    if url.endswith("/params"):  # with the statistics that lie beside them
        top, parts = path.parent, [path, path.parent / "assets"]
    found = {p.relative_to(top).as_posix(): p for part in parts for p in part.rglob("*")}
    return {name: p for name, p in found.items() if p.is_file() and not _is_left_out(name)}


def _is_left_out(name: str) -> bool:
    """Other fetches share the cache: what they want beyond this, and what they have begun."""
    begun = re.fullmatch(r"\.\w+-\w+\.partial", name.rpartition("/")[2])
    return bool(begun) or any(fnmatch.fnmatchcase(name, pattern) for pattern in hub.IGNORED)


def _link(
    sources: Mapping[str, pathlib.Path], partial: pathlib.Path, folder: pathlib.Path
) -> list[str]:
    """Puts the files there: links where the disk can, else copies. Returns which are copies."""
    unlinked = []
    for name, source in sources.items():
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one that has no links
            unlinked.append(name)
    if unlinked:
        files.check_space(folder, sum(sources[name].stat().st_size for name in unlinked))
        for name in metrics.progress(unlinked, f"copying to {folder}"):
            shutil.copy2(sources[name], partial / name)
    return unlinked
