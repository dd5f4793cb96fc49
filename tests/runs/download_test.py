"""Downloads: folders that are whole or absent, linked to the cache, then left alone."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("requests", reason="pip install 'policymix[hub]'")
pytest.importorskip("huggingface_hub", reason="pip install 'policymix[hub]'")

from huggingface_hub import constants

from policymix import files, hub
from policymix.data import lerobot
from policymix.runs import download
from tests import commands, hub_server, oracle
from tests.hub_server import Fault

BIG = bytes(range(256)) * 6000  # 1.5 MB
CONTENT = {
    "params/_METADATA": b"{}",
    "params/d/big": BIG,
    "assets/droid/norm_stats.json": b'{"norm_stats": {}}',
}
PUSHT = commands.ROOT / "tests/testdata/lerobot/pusht_v30_video"


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
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(hub, "_WAITS", (0, 0))
        for name in download.CHECKPOINTS:
            put(running, f"checkpoints/{name}")
        running.page = 50
        yield running


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def put(server, top, bucket="openpi-assets"):
    for name, content in CONTENT.items():
        server.put(bucket, f"{top}/{name}", content)
    server.put(bucket, f"{top}/train_state/d/huge", b"never" * 1000)


def below(path):
    found = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in found.items() if p.name != download.LEDGER}


def test_a_checkpoint_becomes_a_folder_of_its_name(server, output, tmp_path, capsys):
    (folder,) = download.run(["pi05_libero"], output)
    assert folder == output / "pi05_libero"
    assert below(folder) == CONTENT  # neither optimizer states nor anything of the cache
    cached = tmp_path / "cache/gs/openpi-assets/checkpoints/pi05_libero/params/d/big"
    assert (folder / "params/d/big").samefile(cached)  # no room twice
    out = capsys.readouterr().out
    assert "GB free" in out
    assert "3 files, 1.5 MB, linked to the cache" in out


def test_all_are_openpis_five_and_several_are_taken(server, output):
    assert [f.name for f in download.run(["all"], output)] == list(download.CHECKPOINTS)
    server.put("big_vision", "paligemma_tokenizer.model", b"model")
    two = download.run(["pi0_base", "paligemma_tokenizer", "pi0_base"], output)
    assert [f.name for f in two] == ["pi0_base", "paligemma_tokenizer"]
    assert below(two[1]) == {"paligemma_tokenizer.model": b"model"}


def test_fractal_lies_where_a_mixture_finds_it(server, output):
    top = "robotics/fractal20220817_data/0.1.0"
    server.put("gresearch", f"{top}/dataset_info.json", b"{}")
    assert download.run(["fractal"], output) == [output / "fractal20220817_data/0.1.0"]


def test_bridge_is_a_command_for_wget(output, capsys):
    assert download.run(["bridge"], output) == []
    said, command = capsys.readouterr().out.strip().splitlines()
    assert "cannot be verified here" in said
    (words,) = commands.of(command)
    assert words[0] == "wget"
    assert str(output / "bridge_dataset/1.0.0") in words
    assert words[-1].startswith("https://rail.eecs.berkeley.edu/")
    assert not output.exists()


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("gs://bucket/a/ckpt", "ckpt"),
        ("gs://bucket/a/ckpt/", "ckpt"),
        ("gs://bucket/a/ckpt/params", "ckpt"),
        ("hf://org/repo", "repo"),
        ("hf://org/repo@v1.0", "repo"),
        ("hf://org/repo@refs/pr/3", "repo"),
        ("hf://datasets/org/repo@v1.0/sub/part", "part"),
        ("hf://org/repo/params", "repo"),
        ("paligemma", "paligemma"),
    ],
)
def test_the_folder_is_the_last_part_of_the_name(url, folder, output):
    (item,) = download.plan([url], output)
    assert item.folder == output / folder


def test_any_url_with_the_statistics_beside_its_params(server, output, tmp_path):
    put(server, "run/29999", "mine")
    hub.fetch("gs://mine/run/29999", ignore=())  # the cache has more than was asked for
    begun = tmp_path / f"cache/gs/mine/run/29999/params/.{'0' * 32}-{'1' * 32}.partial"
    begun.write_bytes(b"half")
    (folder,) = download.run(["gs://mine/run/29999/params"], output)
    assert folder == output / "29999"
    assert below(folder) == CONTENT
    server.repositories["org/repo"] = {"model.safetensors": BIG, "config.json": b"{}"}
    (folder,) = download.run(["hf://org/repo"], output)
    assert below(folder) == server.repositories["org/repo"]


def test_a_dataset_of_the_hub_is_read(server, output):
    found = {p.relative_to(PUSHT).as_posix(): p for p in PUSHT.rglob("*") if p.is_file()}
    server.repositories["datasets/lerobot/pusht"] = {n: p.read_bytes() for n, p in found.items()}
    (folder,) = download.run(["hf://datasets/lerobot/pusht"], output)
    assert lerobot.open_dataset(folder).num_frames == lerobot.open_dataset(PUSHT).num_frames


def test_a_whole_folder_is_left_alone_without_a_network(server, output, capsys):
    (folder,) = download.run(["pi0_base"], output)
    before = {p: p.stat().st_ino for p in folder.rglob("*")}
    server.requests.clear()
    server.stop()
    shutil.rmtree(os.environ["POLICYMIX_CACHE"])  # the folder's links keep the bytes
    capsys.readouterr()
    assert download.run(["pi0_base"], output) == [folder]
    assert not server.requests
    assert {p: p.stat().st_ino for p in folder.rglob("*")} == before
    assert "is whole already" in capsys.readouterr().out
    moved = pathlib.Path(shutil.copytree(folder, output / "x/pi0_base", copy_function=shutil.copy))
    assert download.run(["pi0_base"], output / "x") == [moved]  # other times, the same bytes


@pytest.mark.parametrize("change", ["gone", "shorter", "other"])
def test_what_was_changed_is_told_and_replaced_when_asked(server, output, change):
    (folder,) = download.run(["pi0_base"], output)
    big = folder / "params/d/big"
    if change == "gone":
        big.unlink()
    else:  # in place, and so in the cache too
        big.write_bytes(BIG[:-1] if change == "shorter" else BIG[::-1])
    with pytest.raises(FileExistsError, match="params/d/big is gone or was changed; pass --overw"):
        download.run(["pi0_base"], output)
    assert download.run(["pi0_base"], output, overwrite=True) == [folder]
    assert below(folder) == CONTENT
    assert not list(output.glob(".*"))


def test_overwriting_looks_for_a_newer_one(server, output):
    (folder,) = download.run(["pi0_base"], output)
    server.put("openpi-assets", "checkpoints/pi0_base/params/_METADATA", b"[]")
    assert download.run(["pi0_base"], output) == [folder]
    assert (folder / "params/_METADATA").read_bytes() == b"{}"
    download.run(["pi0_base"], output, overwrite=True)
    assert (folder / "params/_METADATA").read_bytes() == b"[]"
    assert len(server.media("pi0_base/params/d/big")) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_somebody_else_wrote_is_never_replaced(server, output, overwrite):
    (output / "pi0_base").mkdir(parents=True)
    (output / "pi0_base/mine").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"pi0_base exists and (no|was not)"):
        download.run(["pi0_base"], output, overwrite=overwrite)
    assert (output / "pi0_base/mine").read_bytes() == b"mine"
    assert not server.media()


def test_a_folder_of_another_url_is_not_taken_for_it(server, output):
    put(server, "pi0_base", "mine")
    download.run(["gs://mine/pi0_base"], output)
    with pytest.raises(FileExistsError, match="exists and is gs://mine/pi0_base; pass --overwrite"):
        download.run(["pi0_base"], output)
    with pytest.raises(ValueError, match="would become one folder"):
        download.run(["pi0_base", "gs://mine/pi0_base"], output)


def test_wrong_bytes_leave_nothing(server, output):
    server.faults = [Fault("big", times=9, flip=True)]
    with pytest.raises(ValueError, match="came twice with wrong bytes"):
        download.run(["pi0_base"], output)
    assert not (output / "pi0_base").exists()
    server.faults = []
    assert below(*download.run(["pi0_base"], output)) == CONTENT


def test_what_was_cut_goes_on(server, output):
    server.faults = [Fault("big", cut=600_000), Fault("big", times=2, status=503)]
    with pytest.raises(OSError, match="run it again to go on there"):
        download.run(["pi0_base"], output)
    assert not output.exists()
    server.requests.clear()
    download.run(["pi0_base"], output)
    assert [request.range for request in server.media("big")] == ["bytes=524288-"]


def test_a_killed_run_leaves_no_folder_and_the_next_goes_on(server, output, tmp_path):
    server.faults = [Fault("big", hold=800_000)]
    command = ["--name=pi0_base", f"--output={output}"]
    with subprocess.Popen(
        [sys.executable, str(commands.ROOT / "experiments/download.py"), *command],
        stdout=subprocess.DEVNULL,
        env=commands.ONE_DEVICE | dict(os.environ),
    ) as process:
        assert server.holding.wait(60)
        deadline = time.monotonic() + 20
        while not [p for p in tmp_path.rglob("*.partial") if p.stat().st_size > 700_000]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    server.go_on.set()
    assert not (output / "pi0_base").exists()
    server.requests.clear()
    assert below(*download.run(["pi0_base"], output)) == CONTENT
    assert server.media("big")[0].range == "bytes=786432-"


def test_of_several_the_others_are_whole(server, output, capsys):
    released = server.buckets["openpi-assets"]
    for name in [n for n in released if "/pi0_libero/" in n]:
        del released[name]
    with pytest.raises(OSError, match="1 of 5 are not there: pi0_libero, for the reasons above"):
        download.run(["all"], output)
    assert (
        "pi0_libero: gs://openpi-assets/checkpoints/pi0_libero does not exist"
        in capsys.readouterr().err
    )
    assert {p.name for p in output.iterdir()} == {*download.CHECKPOINTS} - {"pi0_libero"}
    with pytest.raises(FileNotFoundError, match="check its spelling"):
        download.run(["pi0_libero"], output)


def test_another_disk_is_copied_to_if_it_has_the_room(server, output, monkeypatch, capsys):
    def link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1_540_000))
    (folder,) = download.run(["pi0_base"], output)
    assert below(folder) == CONTENT
    assert "copied from the cache" in capsys.readouterr().out
    assert download.run(["pi0_base"], output) == [folder]
    hub.fetch("gs://openpi-assets/checkpoints/pi05_base")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="pi05_base needs up to 1.5 MB.*make room"):
        download.run(["pi05_base"], output)
    assert not (output / "pi05_base").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pi0_bas"], "no download is called 'pi0_bas'.*did you mean pi0_base"),
        (["pi05"], "did you mean pi0"),
        ([], "nothing is named"),
        (["https://host/file"], "cannot be downloaded: gs:// and hf:// are.*wget"),
        (["gs://bucket"], "gs://bucket is not understood"),
    ],
)
def test_names_that_are_not_understood(names, message, server, output):
    with pytest.raises(ValueError, match=message):
        download.run(names, output)
    assert not output.exists()


def test_outputs_are_local(server):
    with pytest.raises(ValueError, match="is not a local path"):
        download.run(["pi0_base"], "gs://bucket/out")


def test_a_dry_run_asks_nobody(server, output, tmp_path, capsys):
    assert download.run(["all", "paligemma", "bridge"], output, dry_run=True) == []
    out = capsys.readouterr().out
    assert f"pi0_base: {output / 'pi0_base'} from gs://openpi-assets/checkpoints/pi0_base" in out
    assert not server.requests
    assert not list(tmp_path.iterdir())
    download.run(["pi0_base"], output)
    capsys.readouterr()
    download.run(["pi0_base"], output, dry_run=True)
    assert "is whole, nothing is to be done" in capsys.readouterr().out


def test_a_downloaded_checkpoint_is_one(server, output):
    source = oracle.step("pi0", "base")
    for path in (p for p in source.rglob("*") if p.is_file()):
        server.put("mine", f"pi0/{path.relative_to(source).as_posix()}", path.read_bytes())
    (folder,) = download.run(["gs://mine/pi0"], output)
    from policymix.checkpoints import store

    assert set(store.load_params(folder)) == set(store.load_params(source))
