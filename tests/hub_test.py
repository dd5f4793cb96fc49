"""Local copies of remote files: whole, right, and fetched once, whatever goes wrong on the way."""

import contextlib
import fcntl
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("requests", reason="pip install 'policymix[hub]'")
pytest.importorskip("google_crc32c", reason="pip install 'policymix[hub]'")
pytest.importorskip("huggingface_hub", reason="pip install 'policymix[hub]'")

from huggingface_hub import constants

from policymix import hub
from tests import hub_server
from tests.hub_server import Fault

BIG = bytes(range(256)) * 6000  # 1.5 MB
CHECKPOINT = {
    "ckpt/params/_METADATA": b"{}",
    "ckpt/params/d/big": BIG,
    "ckpt/params/empty": b"",
    "ckpt/assets/droid/norm_stats.json": b'{"norm_stats": {}}',
    "ckpt/train_state/d/huge": b"never" * 1000,
    "ckpt/": b"",
    "ckpt2/params/_METADATA": b"another",
}
FETCH = "from policymix import hub; import sys; print(hub.fetch(sys.argv[1]))"


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server.Server().running() as running:
        monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", running.url)
        monkeypatch.setenv("HF_ENDPOINT", running.url)  # for other processes
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        monkeypatch.setenv("NO_PROXY", "*")
        for name in ("HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(hub, "_WAITS", (0, 0, 0))
        for name, content in CHECKPOINT.items():
            running.put("bucket", name, content)
        yield running


def fill(server, repository="lerobot/pi0"):
    server.repositories[repository] = {
        "README.md": b"# pi0",
        "a b/ü.bin": b"large" * 1000,
        "model.safetensors": BIG,
        "params/_METADATA": b"{}",
    }


def below(path):
    return {
        p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if not p.is_dir()
    }


def start(url):
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_is_remote():
    assert hub.is_remote("gs://bucket/path")
    assert hub.is_remote("hf://org/repo")
    assert not hub.is_remote("/gs/path")
    assert not hub.is_remote("relative")


def test_a_directory_of_a_bucket_is_copied_as_it_is(server, tmp_path):
    path = hub.fetch("gs://bucket/ckpt/")
    assert path == tmp_path / "cache" / "gs" / "bucket" / "ckpt"
    assert below(path) == {
        "params/_METADATA": b"{}",
        "params/d/big": BIG,
        "params/empty": b"",
        "assets/droid/norm_stats.json": b'{"norm_stats": {}}',
    }
    assert not list(path.parent.glob("ckpt2"))
    assert below(hub.fetch("gs://bucket/ckpt", ignore=())).keys() == {
        *below(path),
        "train_state/d/huge",
    }
    assert len(server.media("big")) == 1


def test_a_single_object_is_copied(server):
    assert hub.fetch("gs://bucket/ckpt/params/d/big").read_bytes() == BIG
    assert len(server.media()) == 1


def test_a_repository_is_copied_as_it_is(server, tmp_path):
    fill(server)
    path = hub.fetch("hf://lerobot/pi0")
    assert path == tmp_path / "cache" / "hf" / "lerobot" / "pi0" / "main"
    assert below(path) == server.repositories["lerobot/pi0"]
    assert hub.fetch("hf://lerobot/pi0/model.safetensors") == path / "model.safetensors"
    assert hub.fetch("hf://lerobot/pi0@main/params") == path / "params"
    assert len(server.media("model")) == 1


def test_a_dataset_and_a_commit_are_found(server, tmp_path):
    fill(server, "datasets/lerobot/pusht")
    hub.fetch("hf://datasets/lerobot/pusht/README.md")
    (request,) = [r for r in server.requests if "/tree/" in r.path][:1]
    commit = request.path.split("/")[-1]
    path = hub.fetch(f"hf://datasets/lerobot/pusht@{commit}/README.md")
    home = tmp_path / "cache" / "hf" / "datasets" / "lerobot" / "pusht"
    assert path == home / commit / "README.md"
    assert below(home) == {f"{commit}/README.md": b"# pi0", "main/README.md": b"# pi0"}


def test_params_bring_the_assets_beside_them(server):
    path = hub.fetch("gs://bucket/ckpt/params")
    assert path.name == "params"
    assert (path / "../assets/droid/norm_stats.json").read_bytes() == b'{"norm_stats": {}}'
    assert not (path / "../train_state").exists()
    assert hub.fetch("gs://bucket/ckpt2/params").is_dir()  # there are none beside these
    fill(server)
    server.repositories["lerobot/pi0"]["assets/droid/norm_stats.json"] = b"{}"
    path = hub.fetch("hf://lerobot/pi0/params")
    assert (path / "../assets/droid/norm_stats.json").read_bytes() == b"{}"
    assert not (path / "../README.md").exists()


@pytest.mark.parametrize("url", ["gs://bucket/ckpt", "hf://lerobot/pi0"])
def test_a_whole_copy_is_used_again_also_without_a_network(server, url, capsys):
    fill(server)
    path = hub.fetch(url)
    first, count = below(path), len(server.media())
    assert hub.fetch(url) == path
    assert len(server.media()) == count
    assert not capsys.readouterr().err.count("cannot be checked")
    server.stop()
    assert hub.fetch(url) == path
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{url} cannot be checked, its copy is used" in line
    (path / next(iter(first))).write_bytes(b"touched")
    with pytest.raises(OSError, match=f"{url}: .*Connection refused; check the network"):
        hub.fetch(url)


def test_no_network_and_no_copy(server):
    server.stop()
    with pytest.raises(OSError, match=r"gs://bucket/ckpt: .*Connection refused; check the network"):
        hub.fetch("gs://bucket/ckpt")


def test_a_copy_with_less_in_it_is_not_whole(server):
    hub.fetch("gs://bucket/ckpt")
    server.stop()
    with pytest.raises(OSError, match="check the network"):
        hub.fetch("gs://bucket/ckpt", ignore=())
    assert hub.fetch("gs://bucket/ckpt", ignore=(*hub.IGNORED, "*/empty")).is_dir()


def test_what_changed_remotely_is_fetched_anew_and_what_went_is_removed(server):
    path = hub.fetch("gs://bucket/ckpt")
    server.requests.clear()
    server.put("bucket", "ckpt/params/_METADATA", b"[]")
    server.put("bucket", "ckpt/params/empty", b"")  # another generation of the same bytes
    del server.buckets["bucket"]["ckpt/assets/droid/norm_stats.json"]
    assert below(hub.fetch("gs://bucket/ckpt")) == {
        "params/_METADATA": b"[]",
        "params/d/big": BIG,
        "params/empty": b"",
    }
    assert [request.path.split("/")[-1] for request in server.media()] == ["_METADATA"]
    assert path.is_dir()


def test_a_touched_file_is_repaired(server):
    path = hub.fetch("gs://bucket/ckpt")
    (path / "params/_METADATA").write_bytes(b"[]")
    (path / "params/d/big").touch()  # right, but how is one to know: it is read
    assert below(hub.fetch("gs://bucket/ckpt"))["params/_METADATA"] == b"{}"
    assert len(server.media("big")) == 1
    assert len(server.media("_METADATA")) == 2


@pytest.mark.parametrize("url", ["gs://bucket/ckpt", "hf://lerobot/pi0"])
def test_a_cut_connection_goes_on_where_it_was_cut(server, url):
    fill(server)
    big = "big" if url.startswith("gs") else "cdn/model"
    server.faults = [Fault(big, times=2, cut=600_000)]
    path = hub.fetch(url)
    assert BIG in below(path).values()
    ranges = [request.range for request in server.media(big)]
    assert ranges == [None, "bytes=524288-", "bytes=1048576-"]
    assert sum(request.sent for request in server.media(big)) < len(BIG) + 2 * (1 << 18)
    assert not list(path.rglob("*.partial"))


def test_a_server_without_ranges_begins_anew(server):
    server.faults = [Fault("big", cut=600_000), Fault("big", whole=True)]
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG
    assert server.media("big")[1].sent == len(BIG)


def test_what_goes_on_failing_says_how_far_it_came_and_the_next_run_goes_on(server):
    server.faults = [Fault("big", cut=600_000), Fault("big", times=3, status=503)]
    message = (
        r"gs://bucket/ckpt: the server answered 503 .*; 524,288 of 1,536,000 bytes of "
        r"ckpt/params/d/big are here: run it again"
    )
    with pytest.raises(OSError, match=message):
        hub.fetch("gs://bucket/ckpt")
    server.requests.clear()
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG
    assert [request.range for request in server.media("big")] == ["bytes=524288-"]


def test_a_partial_file_of_another_generation_is_discarded(server):
    server.faults = [Fault("big", cut=600_000), Fault("big", times=3, status=503)]
    with pytest.raises(OSError, match="503"):
        hub.fetch("gs://bucket/ckpt")
    server.put("bucket", "ckpt/params/d/big", BIG[::-1])
    server.requests.clear()
    path = hub.fetch("gs://bucket/ckpt")
    assert below(path)["params/d/big"] == BIG[::-1]
    assert [request.range for request in server.media("big")] == [None]
    assert not list(path.rglob("*.partial"))


def test_a_partial_file_of_a_neighbour_is_kept(server):
    server.put("bucket", "ckpt/params/d/small", b"small")
    server.faults = [Fault("big", times=2, cut=600_000), Fault("big", times=3, status=503)]
    with pytest.raises(OSError, match="503"):
        hub.fetch("gs://bucket/ckpt/params/d/big")
    hub.fetch("gs://bucket/ckpt/params/d/small")
    hub.fetch("gs://bucket/ckpt/params/d/big")
    assert server.media("big")[-1].range == "bytes=524288-"


def test_a_long_fetch_may_be_cut_often(server):
    server.put("bucket", "long", BIG * 4)
    server.faults = [Fault("long", times=6, cut=1_300_000)]
    assert hub.fetch("gs://bucket/long").read_bytes() == BIG * 4


def test_bytes_without_end_are_not_read_to_the_end(server):
    server.faults = [Fault("big", times=2, pad=50_000_000)]
    with pytest.raises(ValueError, match="twice with wrong bytes"):
        hub.fetch("gs://bucket/ckpt")
    assert max(request.sent for request in server.media("big")) < 25_000_000


def test_an_object_that_changes_while_it_is_fetched_is_an_error(server):
    server.faults = [Fault("params/d/big", status=404)]
    with pytest.raises(FileNotFoundError, match="gs://bucket/ckpt: .*404 .*run it again"):
        hub.fetch("gs://bucket/ckpt")
    assert not list(pathlib.Path(os.environ["POLICYMIX_CACHE"]).rglob("big"))


@pytest.mark.parametrize("crc32c", [True, False])
@pytest.mark.parametrize("url", ["gs://bucket/ckpt", "hf://lerobot/pi0"])
def test_wrong_bytes_are_fetched_once_more(server, url, crc32c, monkeypatch):
    fill(server)
    server.composite = crc32c  # objects of several parts have no MD5
    if not crc32c:
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
    server.faults = [Fault("big", flip=True), Fault("cdn/model", flip=True)]
    server.faults += [Fault("_METADATA", flip=True), Fault("resolve/", flip=True)]
    path = hub.fetch(url)
    assert BIG in below(path).values()
    assert b"{}" in below(path).values()
    assert len(server.media("big") + server.media("cdn/model")) == 2


def test_a_cut_and_then_wrong_bytes_are_found_out(server):
    server.faults = [Fault("big", cut=600_000), Fault("big", flip=True)]
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG
    assert [request.range for request in server.media("big")] == [None, "bytes=524288-", None]


@pytest.mark.parametrize(
    ("url", "kind"), [("gs://bucket/ckpt/params", "crc32c"), ("hf://lerobot/pi0", "sha256")]
)
def test_bytes_that_stay_wrong_are_refused(server, url, kind, tmp_path):
    fill(server)
    server.faults = [Fault(part, times=9, flip=True) for part in ("big", "cdn/model")]
    message = rf"{url}: .* came twice with wrong bytes, \w+ and not {kind}:\w+; they were deleted"
    with pytest.raises(ValueError, match=message):
        hub.fetch(url)
    left = below(tmp_path / "cache")
    assert not [name for name in left if name.endswith(("big", "model.safetensors"))]
    assert not list((tmp_path / "cache" / ".state").glob("*.json"))
    assert not any(len(content) == len(BIG) for content in left.values())
    server.stop()
    with pytest.raises(OSError, match="check the network"):  # nothing looks whole
        hub.fetch(url)


def test_errors_that_pass_are_tried_again(server):
    server.faults = [Fault("/o", times=2, status=500), Fault("big", times=2, status=429)]
    server.faults += [Fault("/o", cut=20)]  # a listing that is cut
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG


def test_a_listing_that_stays_cut_is_an_error(server):
    server.faults = [Fault("/o", times=9, cut=20)]
    with pytest.raises(OSError, match=r"gs://bucket/ckpt: .*20 bytes read.*; check the network"):
        hub.fetch("gs://bucket/ckpt")


def test_a_server_that_fails_is_asked_once_where_there_is_a_whole_copy(server, capsys):
    hub.fetch("gs://bucket/ckpt", lines=0)
    server.requests.clear()
    server.faults = [Fault("/o$", times=9, status=503)]
    hub.fetch("gs://bucket/ckpt")
    assert len(server.requests) == 1
    assert "cannot be checked, its copy is used" in capsys.readouterr().err


def test_an_object_of_a_bucket_that_may_not_be_listed(server):
    server.faults = [Fault("/o$", times=9, status=403)]
    assert hub.fetch("gs://bucket/ckpt/params/d/big").read_bytes() == BIG


@pytest.mark.parametrize("url", ["gs://bucket/none", "gs://nobucket/a", "hf://lerobot/no"])
def test_what_does_not_exist(server, url):
    with pytest.raises(FileNotFoundError, match=f"{url}.*check its spelling"):
        hub.fetch(url)


def test_a_path_that_a_repository_lacks(server):
    fill(server)
    with pytest.raises(FileNotFoundError, match="hf://lerobot/pi0/no does not exist"):
        hub.fetch("hf://lerobot/pi0/no")
    with pytest.raises(FileNotFoundError, match="404 Repository or revision not found"):
        hub.fetch("hf://lerobot/pi0@v2")


def test_a_gated_repository_says_where_to_ask(server, monkeypatch):
    fill(server)
    server.faults = [Fault("resolve", times=9, status=403, message="Access to it is restricted")]
    message = (
        "hf://lerobot/pi0: the server answered 403 Access to it is restricted; .*accept the terms "
        f"at {server.url}/lerobot/pi0 and run `hf auth login`"
    )
    with pytest.raises(PermissionError, match=message):
        hub.fetch("hf://lerobot/pi0")


def test_a_token_is_sent_to_the_hub_alone(server, monkeypatch, tmp_path):
    fill(server)
    server.token = "secret"
    with pytest.raises(PermissionError, match="401 .*hf auth login"):
        hub.fetch("hf://lerobot/pi0")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert below(hub.fetch("hf://lerobot/pi0")) == server.repositories["lerobot/pi0"]
    assert {request.authorization for request in server.media("cdn")} == {None}
    saved = b"".join(below(tmp_path / "cache").values())
    assert b"secret" not in saved


def test_a_private_bucket_is_read_as_the_user(server, monkeypatch, tmp_path):
    pytest.importorskip("google.auth")
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
    server.token = "secret"
    with pytest.raises(PermissionError, match="gs://bucket/ckpt: .*401 .*gcloud auth"):
        hub.fetch("gs://bucket/ckpt")
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {
        "type": "service_account",
        "client_email": "robot@lab",
        "private_key": key.decode(),
        "token_uri": f"{server.url}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG
    server.token = "another"  # and now the account may not read it any more
    server.faults = [Fault("/o", times=9, status=403)]
    with pytest.raises(PermissionError, match="gs://bucket/ckpt2: .*403 .*gcloud auth"):
        hub.fetch("gs://bucket/ckpt2")


@pytest.mark.parametrize(
    "name", ["ckpt/../../evil", "ckpt//evil", "ckpt/..\\evil", "ckpt/a\nb", "ckpt/./evil"]
)
def test_names_that_lead_elsewhere_are_refused(server, name, tmp_path):
    fill(server)
    server.rename = {"ckpt/params/empty": name, "README.md": name[5:]}
    for url in ("gs://bucket/ckpt", "hf://lerobot/pi0"):
        with pytest.raises(ValueError, match=f"{url} is refused: .*leads out of the copy"):
            hub.fetch(url)
    assert not list(tmp_path.rglob("*evil*"))
    assert not server.media()


@pytest.mark.parametrize("name", ["ckpt/params/_METADATA", "ckpt/params/d"])
def test_names_that_clash_are_refused(server, name):
    server.rename = {"ckpt/params/empty": name}
    with pytest.raises(ValueError, match=r"refused: .*comes twice, or is a file and a directory"):
        hub.fetch("gs://bucket/ckpt")


def test_names_that_were_not_asked_for_are_left_out(server, tmp_path):
    server.rename = {"ckpt/params/empty": "/etc/evil", "ckpt/params/d/big": "ckpt2/evil"}
    assert below(hub.fetch("gs://bucket/ckpt")).keys() == {
        "params/_METADATA",
        "assets/droid/norm_stats.json",
    }
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("answer", [["page"], {"items": [{"name": "ckpt/a"}]}, {"items": 1}])
def test_a_listing_that_is_none_is_an_error(server, answer):
    server.faults = [Fault("/o", answer=answer)]
    with pytest.raises(ValueError, match="gs://bucket/ckpt: its listing is not understood"):
        hub.fetch("gs://bucket/ckpt")


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/path", "gs://bucket", "gs://bucket/", "hf://gpt2", "gs://b/../x", "hf://../x"],
)
def test_other_urls_are_not_understood(server, url):
    with pytest.raises(ValueError, match=f"{url} is not understood: .*gs://BUCKET/PATH and hf://"):
        hub.fetch(url)
    assert not server.requests


def test_no_room_is_said_before_any_byte(server, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"needs up to 1.5 MB, and its disk has 1.0 MB free"):
        hub.fetch("gs://bucket/ckpt")
    assert not server.media()


def test_what_is_here_needs_no_room(server, monkeypatch):
    server.faults = [Fault("big", cut=1_500_000), Fault("big", times=9, status=503)]
    with pytest.raises(OSError, match="503"):
        hub.fetch("gs://bucket/ckpt")
    server.faults = []
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert below(hub.fetch("gs://bucket/ckpt"))["params/d/big"] == BIG


@pytest.mark.parametrize(
    ("url", "module"), [("gs://bucket/a", "requests"), ("hf://org/repo", "huggingface_hub.utils")]
)
def test_a_missing_extra_is_named(monkeypatch, url, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"need {module} .*pip install 'policymix\[hub\]'"):
        hub.fetch(url)


def test_the_hub_is_not_asked_where_it_may_not_be(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        hub.fetch("hf://lerobot/pi0")
    assert not server.requests


def test_progress_is_told_in_bytes(server, capsys):
    hub.fetch("gs://bucket/ckpt")
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) <= 11
    assert lines[-1] == "fetching gs://bucket/ckpt: 100%"
    hub.fetch("gs://bucket/ckpt2", lines=0)
    assert not capsys.readouterr().err


def test_a_killed_run_leaves_nothing_that_looks_whole_and_the_next_goes_on(server, tmp_path):
    server.faults = [Fault("big", hold=800_000)]
    with start("gs://bucket/ckpt/params") as process:
        assert server.holding.wait(20)
        wait_for(lambda: [p for p in tmp_path.rglob("*.partial") if p.stat().st_size > 700_000])
        os.kill(process.pid, signal.SIGKILL)
    server.go_on.set()
    cache = tmp_path / "cache"
    assert not (cache / "gs/bucket/ckpt/params/d/big").exists()
    assert not list(cache.rglob("*.json.*"))
    server.requests.clear()
    path = hub.fetch("gs://bucket/ckpt/params")
    assert below(path)["d/big"] == BIG
    assert server.media("big")[0].range == "bytes=786432-"
    assert len(server.media()) <= 3


def test_of_two_processes_one_downloads_and_the_other_waits(server):
    server.faults = [Fault("big", hold=800_000)]
    with start("gs://bucket/ckpt") as first:
        assert server.holding.wait(20)
        with start("gs://bucket/ckpt/params") as second:  # a part of the same
            line = second.stderr.readline()
            assert "waiting for another process to fetch gs://bucket/ckpt/params" in line
            server.go_on.set()
            (one, _), (two, rest) = first.communicate(), second.communicate()
    assert (first.returncode, second.returncode, rest) == (0, 0, "")
    assert two.strip() == f"{one.strip()}/params"
    paths = [request.path for request in server.media()]
    assert len(paths) == len(set(paths)) == 3
    assert below(pathlib.Path(two.strip()))["d/big"] == BIG


def test_an_error_stops_the_other_downloads(server):
    server.put("bucket", "ckpt/params/d/slow", bytes(8_000_000))
    server.faults = [Fault("slow", drip=0.02), Fault("params/d/big", status=403)]
    with pytest.raises(PermissionError, match="403"):
        hub.fetch("gs://bucket/ckpt")
    assert server.media("slow")[0].sent < 4_000_000
    assert not list(pathlib.Path(os.environ["POLICYMIX_CACHE"]).rglob("slow"))


def test_a_whole_copy_is_not_waited_for(server, tmp_path):
    path = hub.fetch("gs://bucket/ckpt")
    with contextlib.ExitStack() as stack:
        for lock in tmp_path.rglob("*.lock"):
            fcntl.flock(stack.enter_context(lock.open("a")), fcntl.LOCK_EX)
        command = [sys.executable, "-c", FETCH, "gs://bucket/ckpt"]
        other = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (other.stdout.strip(), other.stderr) == (str(path), "")


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
