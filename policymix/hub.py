"""Remote checkpoints and datasets: a whole, verified local copy of what lies at gs:// or hf://.

In the cache files lie as they do remotely, so that paths which contain each other share them. One
loop fetches both kinds, since gcsfs and huggingface_hub do not each resume, verify and lock; what
comes with them is asked for what only they know: how the user is logged in.
"""

import base64
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import pathlib
import re
import sys
import threading
import types
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from policymix import files, metrics

IGNORED = ("train_state/*", "*/train_state/*")  # optimizer states: large, and of no use here

_WAITS = (0.5, 1, 2, 4, 8)  # seconds before a request that failed is sent again
_CHUNK = 1 << 18  # what a cut connection loses at most
_UNSAFE = re.compile(r"(^|/)\.{0,2}(/|$)|[\\\x00-\x1f\x7f]")  # names that may not be written


class _Unreachable(ConnectionError):
    """What may pass, if one tries again."""


@dataclasses.dataclass(frozen=True)
class _File:
    """A remote file: its path in the bucket or repository, "KIND:HEX", and where its bytes are."""

    name: str
    size: int
    checksum: str
    link: str = ""


def is_remote(path: str) -> bool:
    """Whether a path names a place on the network ("scheme://…"), not on this disk."""
    return "://" in str(path)


def fetch(url: str, *, ignore: Sequence[str] = IGNORED, lines: int = 10) -> pathlib.Path:
    """The local path of a whole, verified copy of a remote file or directory.

    It lies in $POLICYMIX_CACHE, or ~/.cache/policymix, and is used again if the remote listing
    agrees, or cannot be had. With `…/params` come the `assets` beside it, where OpenPI keeps
    normalisation statistics. What was interrupted goes on where it stopped.

    Args:
      url: gs://BUCKET/PATH or hf://[datasets/]ORG/REPO[@REVISION][/PATH].
      ignore: shell patterns of names that are left out, relative to the URL (to the directory
        around it where it ends in `params`).
      lines: of progress on stderr, where that is no terminal (0: none).

    Raises:
      ValueError: for another scheme, names that are not safe to write, and wrong bytes.
      OSError: for what does not exist, may not be read, cannot be reached, or has no room.
      ImportError: if the extra `hub` is not installed.
    """
    remote, place, path = _parse(url)
    cache = files.local(os.environ.get("POLICYMIX_CACHE") or "~/.cache/policymix")
    root, state = cache / place, cache / ".state"
    base = re.sub(r"(^|/)params$", "", path)
    # What the copy of this URL consists of, and when each file was found right. It is written
    # last, and so is what says that the copy is whole.
    ledger = state / f"{_digest(f'{place}/{path}')}.json"
    before = _read(ledger)
    copy = before["files"] if set(before["ignore"]) <= set(ignore) else {}
    listed, trouble = _list(remote, path, base, copy)
    relative = {f: f.name.removeprefix(base).lstrip("/") for f in listed}
    wanted = [f for f in listed if not any(fnmatch.fnmatchcase(relative[f], p) for p in ignore)]
    if not all(_is_here(root / f.name, f, before["files"], by_bytes=False) for f in wanted):
        with _locked(state, [place, *filter(None, base.split("/"))], url):
            known = _read(ledger)["files"]  # another process may have done it all
            missing = [f for f in wanted if not _is_here(root / f.name, f, known, by_bytes=True)]
            if missing and trouble:
                raise trouble
            _download(remote, root, missing, lines)
            for gone in known.keys() - {file.name for file in listed}:
                (root / gone).unlink(missing_ok=True)
            times = {file: (root / file.name).stat().st_mtime_ns for file in wanted}
            rows = {file.name: (file.checksum, time, file.size) for file, time in times.items()}
            files.write_json(ledger, {"url": url, "ignore": list(ignore), "files": rows})
    if trouble:
        print(f"{url} cannot be checked, its copy is used ({trouble})", file=sys.stderr, flush=True)
    return root / path


def _parse(url: str) -> tuple["_Remote", str, str]:
    """The bucket or repository, its place in the cache, and the path within it."""
    repository = r"hf://(datasets/)?([^/@]+/[^/@]+)(?:@(refs/\w+/[^/]+|[^/]+))?(?:/(.*?))?/*"
    if match := re.fullmatch(r"gs://([^/]+)/+(.*[^/])/*", url):
        name, path = match.groups()
        remote, place = _Bucket(url, name), f"gs/{name}"
    elif match := re.fullmatch(repository, url):
        kind, name, revision, path = match.groups("")
        revision = urllib.parse.quote(urllib.parse.unquote(revision or "main"), safe="")
        remote, place = _Repository(url, kind, name, revision), f"hf/{kind}{name}/{revision}"
    if not match or _UNSAFE.search(f"{place}/{path}" if path else place):
        raise ValueError(
            f"{url} is not understood: remote paths are gs://BUCKET/PATH and hf://[datasets/]ORG/"
            "REPO[@REVISION][/PATH], without '..'; copy other things to a local path and give that"
        )
    return remote, place, path


class _Remote:
    """A bucket or a repository. `find(tops)` gives the files of, or below, some paths, or more."""

    def __init__(self, url: str, advice: str):
        self.url, self._advice = url, advice
        self.waits, self.stop = _WAITS, threading.Event()
        self._session = _extra("requests").Session()
        self._failures = (_extra("requests").RequestException,)

    def chunks(self, file: _File, start: int) -> Iterator[bytes]:
        """The bytes of a file from `start` on, until all is stopped."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with self._answer(file.link, headers=headers) as answer:
            skip = start if answer.status_code == 200 else 0  # the server knows no ranges
            for chunk in answer.iter_content(_CHUNK):
                if self.stop.is_set():
                    raise concurrent.futures.CancelledError
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def _json(self, link: str, **options) -> tuple[Any, dict]:
        """A JSON answer, and the links that came with it."""
        waits = list(self.waits)
        while True:
            try:
                with self._answer(link, **options) as answer:
                    return answer.json(), answer.links
            except _Unreachable:
                if not waits or self.stop.wait(waits.pop(0)):
                    raise

    @contextlib.contextmanager
    def _answer(self, link: str, **options) -> Iterator[Any]:
        # With an `auth` of its own, a request is not given that of ~/.netrc in place of ours.
        options |= {"stream": True, "timeout": (10, 30), "auth": lambda request: request}
        try:
            with self._session.get(link, **options) as answer:
                code, why = answer.status_code, answer.headers.get("X-Error-Message", answer.reason)
                said = f"{self.url}: the server answered {code} {why}"
                if code in (408, 429) or code >= 500:
                    raise _Unreachable(f"{said}; try again later")
                if code == 404:
                    raise FileNotFoundError(f"{said}; check its spelling, or run it again")
                if code >= 400:
                    kind = PermissionError if code in (401, 403) else OSError
                    raise kind(f"{said}; {self._advice}")
                yield answer
        except self._failures as error:
            cause: BaseException = error
            while cause.__context__:  # the outer ones wrap it in their own names
                cause = cause.__context__
            why = str(cause) or type(cause).__name__
            raise _Unreachable(f"{self.url}: {why}; check the network, or the proxy") from error


class _Bucket(_Remote):
    """A bucket of Google Cloud Storage, asked without a name first: most that we read is public."""

    def __init__(self, url: str, name: str):
        super().__init__(url, "check its spelling, or run `gcloud auth application-default login`")
        host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
        self._objects = f"{host}/storage/v1/b/{urllib.parse.quote(name, safe='')}/o"

    def find(self, tops: Sequence[str]) -> Iterable[_File]:
        try:
            return [file for top in tops for file in self._find(top)]
        except PermissionError as denied:
            self._log_in(denied)
        return [file for top in tops for file in self._find(top)]

    def _find(self, top: str) -> Iterator[_File]:
        found, page = [], {"nextPageToken": None}
        with contextlib.suppress(PermissionError):  # who may not list may yet read
            while "nextPageToken" in page:
                params = {"prefix": f"{top}/", "pageToken": page["nextPageToken"]}
                page, _ = self._json(self._objects, params=params)
                found += page.get("items", ())
        with contextlib.suppress(FileNotFoundError):
            found = found or [self._json(self._link(top))[0]]
        fast = importlib.util.find_spec("google_crc32c")
        for item in found:
            name, kind = item["name"], "crc32c" if fast or "md5Hash" not in item else "md5Hash"
            checksum = f"{kind.removesuffix('Hash')}:{base64.b64decode(item[kind]).hex()}"
            link = f"{self._link(name)}?alt=media&generation={item['generation']}"
            if not name.endswith("/"):  # what consoles draw empty folders with
                yield _File(name, int(item["size"]), checksum, link)

    def _link(self, name: str) -> str:
        return f"{self._objects}/{urllib.parse.quote(name, safe='')}"

    def _log_in(self, denied: PermissionError) -> None:
        google, transport = _extra("google.auth"), _extra("google.auth.transport.requests")
        scope = "https://www.googleapis.com/auth/devstorage.read_only"
        try:
            credentials, _ = google.default(scopes=[scope])
            credentials.refresh(transport.Request())
        except google.exceptions.GoogleAuthError:
            raise denied from None
        self._session = transport.AuthorizedSession(credentials)
        self._failures += (google.exceptions.GoogleAuthError,)


class _Repository(_Remote):
    """A repository of the Hugging Face hub, at one commit."""

    def __init__(self, url: str, kind: str, name: str, revision: str):
        constants, utils = _extra("huggingface_hub.constants"), _extra("huggingface_hub.utils")
        self._revision, self._offline = revision, constants.HF_HUB_OFFLINE
        end = constants.ENDPOINT
        self._home, self._api = f"{end}/{kind}{name}", f"{end}/api/{kind or 'models/'}{name}"
        advice = f"check its spelling, or accept the terms at {self._home} and run `hf auth login`"
        super().__init__(url, advice)
        self._session.headers.update(utils.build_hf_headers(library_name="policymix"))

    def find(self, tops: Sequence[str]) -> Iterable[_File]:
        if self._offline:
            raise ConnectionError(f"{self.url}: HF_HUB_OFFLINE is set")
        commit = self._json(f"{self._api}/revision/{self._revision}")[0]["sha"]
        params = {"recursive": "true"}
        while params:
            page, links = self._json(f"{self._api}/tree/{commit}", params=params)
            for entry in (entry for entry in page if entry["type"] == "file"):
                lfs, name = entry.get("lfs"), urllib.parse.quote(entry["path"])
                checksum = f"sha256:{lfs['oid']}" if lfs else f"git:{entry['oid']}"
                link = f"{self._home}/resolve/{commit}/{name}"
                yield _File(entry["path"], int(entry["size"]), checksum, link)
            # Of the link to the next page only the query counts: a mirror's names the original.
            more = urllib.parse.urlsplit(links.get("next", {}).get("url", "")).query
            params = dict(urllib.parse.parse_qsl(more))


def _extra(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"remote paths need {module} ({error}): `pip install 'policymix[hub]'`"
        raise ImportError(message) from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(ledger: pathlib.Path) -> dict[str, Any]:
    try:
        return files.read_json(ledger)
    except (OSError, ValueError):  # there is none, or a torn one: files are known by their bytes
        return {"ignore": [], "files": {}}


def _list(remote: Any, path: str, base: str, copy: dict) -> tuple[list[_File], OSError | None]:
    """All remote files; or those of a whole copy, and why the remote has none to offer."""
    remote.waits = () if copy else _WAITS
    tops = [path] if base == path else [path, f"{base}/assets".lstrip("/")]
    try:
        found = [file for file in remote.find(tops) if _is_below(file.name, tops)]
        if not any(_is_below(file.name, [path]) for file in found):
            raise FileNotFoundError(f"{remote.url} does not exist; check its spelling")
    except OSError as error:
        if not copy:
            raise
        return [_File(name, row[2], row[0]) for name, row in copy.items()], error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{remote.url}: its listing is not understood ({error!r})") from error
    names = collections.Counter(file.name for file in found)
    above = {str(parent) for name in names for parent in pathlib.PurePosixPath(name).parents}
    for name, times in names.items():
        if _UNSAFE.search(name) or times > 1 or name in above:
            why = "leads out of the copy, comes twice, or is a file and a directory"
            raise ValueError(f"{remote.url} is refused: {name!r} in its listing {why}")
    return found, None


def _is_below(name: str, tops: Sequence[str]) -> bool:
    return any(not top or f"{name}/".startswith(f"{top}/") for top in tops)


def _is_here(path: pathlib.Path, file: _File, known: dict[str, Any], *, by_bytes: bool) -> bool:
    """Whether a file is here and right: untouched since the ledger knew it, or by its bytes."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if known.get(file.name, ())[:2] == [file.checksum, path.stat().st_mtime_ns]:
        return True
    if not by_bytes:
        return False
    with path.open("rb") as opened:
        return file.checksum.endswith(f":{_hash(opened, file).digest().hex()}")


def _hash(opened: Any, file: _File) -> Any:
    """The checksum, an object as of hashlib, of what can be read."""
    kind = file.checksum.partition(":")[0]
    if kind == "crc32c":
        digest = _extra("google_crc32c").Checksum()
    else:
        digest = hashlib.new("sha1" if kind == "git" else kind, usedforsecurity=False)
    digest.update(b"blob %d\0" % file.size if kind == "git" else b"")
    while chunk := opened.read(_CHUNK):
        digest.update(chunk)
    return digest


@contextlib.contextmanager
def _locked(state: pathlib.Path, parts: list[str], url: str) -> Iterator[None]:
    """Keeps out other processes that fetch this path, a part of it, or what it is a part of."""
    state.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for depth in range(1, len(parts) + 1):
            path = state / f"{_digest('/'.join(parts[:depth]))}.lock"
            file = stack.enter_context(path.open("a"))  # the kernel lets go, also on kill -9
            kind = fcntl.LOCK_EX if depth == len(parts) else fcntl.LOCK_SH
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process to fetch {url}", file=sys.stderr, flush=True)
                fcntl.flock(file, kind)
        yield


def _download(remote: _Remote, root: pathlib.Path, missing: list[_File], lines: int) -> None:
    partials = {  # named after the checksum: what was written anew remotely begins anew
        f: (root / f.name).with_name(f".{_digest(f.name)}-{_digest(f.checksum)}.partial")
        for f in sorted(missing, key=lambda file: -file.size)  # or the largest is waited for
    }
    ours = {partial.name[:33] for partial in partials.values()}
    for old in [p for d in {p.parent for p in partials.values()} for p in d.glob(".*-*.partial")]:
        if old.name[:33] in ours and old not in partials.values():
            old.unlink()
    here = sum(partial.stat().st_size for partial in partials.values() if partial.exists())
    total = sum(file.size for file in missing) - here
    files.check_space(root, total)
    with (
        metrics.Progress(f"fetching {remote.url}", total, lines=lines) as shown,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        jobs = [pool.submit(_fetch_one, remote, *pair, shown.step) for pair in partials.items()]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        finally:  # after an error, or Ctrl-C, the others stop too
            remote.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch_one(remote: _Remote, file: _File, partial: pathlib.Path, step: Callable) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        with partial.open("a+b") as out:
            out.seek(0)
            digest, waits = _hash(out, file), list(_WAITS)
            while (start := out.tell()) < file.size:
                try:
                    for chunk in remote.chunks(file, start):
                        out.write(chunk)
                        digest.update(chunk)
                        step(len(chunk))
                        if out.tell() > file.size:  # wrong, and there may be no end of it
                            break
                    if out.tell() < file.size:
                        raise _Unreachable(f"{remote.url}: the connection was cut")
                except _Unreachable as error:
                    if out.tell() - start > 10**6:  # a long fetch may be cut often
                        waits = list(_WAITS)
                    if not waits or remote.stop.wait(waits.pop(0)):
                        have = f"{out.tell():,} of {file.size:,} bytes of {file.name} are here"
                        raise OSError(f"{error}; {have}: run it again to go on there") from error
        found = digest.digest().hex()
        if file.checksum.endswith(f":{found}"):
            partial.replace(partial.with_name(file.name.rpartition("/")[2]))
            return
        partial.unlink()
    wrong = f"twice with wrong bytes, {found} and not {file.checksum}; they were deleted"
    raise ValueError(f"{remote.url}: {file.name} came {wrong}: try again later")
