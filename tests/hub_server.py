"""A server that speaks enough of Google Cloud Storage's JSON API and of the Hugging Face hub's, and
that can be told to fail.
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

import google_crc32c


@dataclasses.dataclass
class Fault:
    """What goes wrong with requests whose path matches the regex `part`, `times` times.

    Attributes:
      status: this answer, with nothing in it. answer: this JSON. cut: no more than so many bytes.
      flip: wrong bytes.
      hold: so many bytes, and the rest when `Server.go_on` is set. drip: seconds
      between pieces. pad: so many bytes too many. whole: ranges are ignored. message: what the
      hub says of a status.
    """

    part: str
    times: int = 1
    status: int = 0
    answer: object = None
    cut: int | None = None
    flip: bool = False
    hold: int | None = None
    drip: float = 0.0
    pad: int = 0
    whole: bool = False
    message: str = ""


@dataclasses.dataclass
class Request:
    """What was asked for; `sent` counts bytes of bodies."""

    path: str
    kind: str = ""
    range: str | None = None
    authorization: str | None = None
    sent: int = 0


class Server:
    """Buckets and repositories to fill, faults to add, and requests to look at."""

    def __init__(self):
        self.buckets = collections.defaultdict(dict)  # bucket → name → (bytes, generation)
        self.composite = False  # objects of several parts have no MD5
        self.repositories = collections.defaultdict(dict)  # repository → name → bytes
        self.lfs_from = 1000  # bytes
        self.page = 2  # names in a page of a listing
        self.rename = {}  # name → name in listings
        self.token = None  # what private buckets and repositories ask for
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.go_on, self.holding = threading.Event(), threading.Event()
        self._generation, self._lock = 1000, threading.Lock()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self._http.handle_error = lambda *_: None  # clients that are killed
        self._http.site = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextlib.contextmanager
    def running(self):
        thread = threading.Thread(target=self._http.serve_forever, args=(0.005,), daemon=True)
        thread.start()
        yield self
        self.stop()
        thread.join()

    def stop(self):
        self.go_on.set()
        self._http.shutdown()
        self._http.server_close()

    def put(self, bucket, name, content):
        self._generation += 1
        self.buckets[bucket][name] = (content, str(self._generation))

    def media(self, part=""):
        """Requests for bytes of files."""
        return [r for r in self.requests if r.kind == "media" and part in r.path]

    def fault(self, path):
        with self._lock:
            for fault in self.faults:
                if re.search(fault.part, path) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault("")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the one before

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._json({"access_token": self.server.site.token, "expires_in": 3600})

    def do_GET(self):
        self.site = self.server.site
        parts = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(parts.path), dict(urllib.parse.parse_qsl(parts.query))
        self.request_ = Request(
            path,
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
        )
        self.site.requests.append(self.request_)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            fault = self.site.fault(path)
            if fault.status:
                self._end(fault.status, fault.message)
            elif fault.answer is not None:
                self._json(fault.answer)
            elif path.startswith("/cdn/"):  # signed links: who sends a token is refused there
                content = self.site.repositories[query["repository"]][query["name"]]
                refused = self.request_.authorization
                self._end(400) if refused else self._media(content, fault)
            elif self.site.token and self.request_.authorization != f"Bearer {self.site.token}":
                self._end(401, "Access is restricted")
            elif found := re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/(.+))?", path):
                self._bucket(self.site.buckets, *found.groups(), query, fault)
            else:
                self._hub(path, query, fault)

    def _bucket(self, buckets, bucket, name, query, fault):
        if bucket not in buckets or (name and name not in buckets[bucket]):
            self._end(404)
        elif not name:
            names = sorted(n for n in buckets[bucket] if n.startswith(query["prefix"]))
            start = int(query.get("pageToken") or 0)
            chosen, rest = names[start : start + self.site.page], names[start + self.site.page :]
            page = {"kind": "storage#objects"}
            if chosen:
                page["items"] = [self._object(buckets[bucket], n) for n in chosen]
            self._json(page | ({"nextPageToken": f"{start + len(chosen)}"} if rest else {}), fault)
        elif "alt" not in query:
            self._json(self._object(buckets[bucket], name), fault)
        elif query["generation"] != buckets[bucket][name][1]:
            self._end(404)
        else:
            self._media(buckets[bucket][name][0], fault)

    def _object(self, objects, name):
        content, generation = objects[name]
        crc = google_crc32c.Checksum(content).digest()
        described = {
            "name": self.site.rename.get(name, name),
            "size": str(len(content)),
            "generation": generation,
            "crc32c": base64.b64encode(crc).decode(),
        }
        if not self.site.composite:
            described["md5Hash"] = base64.b64encode(hashlib.md5(content).digest()).decode()
        return described

    def _hub(self, path, query, fault):
        repositories = self.site.repositories
        for name, content in repositories.items():
            home = name if name.startswith("datasets/") else f"models/{name}"
            commit = hashlib.sha1(b"".join(content.values())).hexdigest()
            if path in (f"/api/{home}/revision/main", f"/api/{home}/revision/{commit}"):
                return self._json({"sha": commit}, fault)
            if path == f"/api/{home}/tree/{commit}":
                names, start = sorted(content), int(query.get("cursor", 0))
                stop = start + self.site.page
                entries = [self._entry(n, content[n]) for n in names[start:stop]]
                link = f'<https://elsewhere.example/tree?recursive=true&cursor={stop}>; rel="next"'
                return self._json(entries, fault, {"Link": link} if names[stop:] else {})
            if path.startswith(f"/{name}/resolve/{commit}/"):
                file = path.split("/", name.count("/") + 4)[-1]
                if len(content[file]) < self.site.lfs_from:
                    return self._media(content[file], fault)
                self.request_.kind = "redirect"
                values = urllib.parse.urlencode({"repository": name, "name": file})
                elsewhere = self.site.url.replace("127.0.0.1", "localhost")
                target = f"{elsewhere}/cdn/{urllib.parse.quote(file)}?{values}"
                return self._end(302, headers={"Location": target})
        return self._end(404, "Repository or revision not found")

    def _entry(self, name, content):
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": self.site.rename.get(name, name), "size": len(content)}
        if len(content) < self.site.lfs_from:
            return entry | {"oid": blob}
        lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry | {"oid": "0" * 40, "lfs": lfs}

    def _json(self, value, fault=None, headers=None):
        self.request_ = getattr(self, "request_", None) or Request(self.path)
        self.request_.kind = "list"
        self._body(200, json.dumps(value).encode(), fault or Fault(""), headers or {})

    def _media(self, content, fault):
        self.request_.kind = "media"
        start = 0
        if self.request_.range and not fault.whole:
            start = int(re.fullmatch(r"bytes=(\d+)-", self.request_.range)[1])
        if fault.flip:
            content = content.translate(bytes(range(255, -1, -1)))
        self._body(206 if start else 200, content[start:] + bytes(fault.pad), fault, {})

    def _body(self, status, body, fault, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if fault.hold is not None:
            self._send(body[: fault.hold], 0.0)
            self.site.holding.set()
            self.site.go_on.wait(20)
            body = body[fault.hold :]
        self._send(body[: fault.cut], fault.drip)
        if fault.cut is not None:
            self.close_connection = True

    def _send(self, body, drip):
        for start in range(0, len(body), 1 << 16):
            time.sleep(drip)
            self.wfile.write(body[start : start + (1 << 16)])
            self.request_.sent += len(body[start : start + (1 << 16)])
        self.wfile.flush()

    def _end(self, status, message="", headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(name, value)
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
