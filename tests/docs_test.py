"""What the documents say is so: links, files, flags, fields of configs, and quoted messages."""

import ast
import functools
import importlib
import inspect
import pathlib
import pickle
import re
import shutil
import sys
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import common, pi0_pusht, pi0_small, pi0_state, pi05_libero
from policymix import files, trees
from policymix.checkpoints import layout, safetensors, store
from policymix.data import lerobot, tokenizer, validation
from policymix.reports import pages
from policymix.rl import networks
from policymix.rl.config import LearnerConfig
from policymix.runs import (
    convert,
    dump_validation,
    edit_dataset,
    metadata,
    mix,
    offline_rl,
    requests,
    train,
    workdirs,
)
from tests import commands, oracle
from tests.commands import ROOT
from tests.runs import rl_support

DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
# Of tables whose first column is another program's.
HEADERS = (
    "| LeRobot | here |",
    "| kai0 | here |",
    "| RETAIN | here |",
    "| open-pi-zero | here |",
    "| rlvla | here |",
)


def own_words(path: pathlib.Path) -> str:
    """A document without what it says of other programs: the first cells of some tables, what "…"
    stands for there, and commands for gcloud and the hub.
    """
    text = path.read_text()
    for header in HEADERS:
        for cell, _ in commands.table(text, header) if header in text else ():
            text = text.replace(f"| {cell} |", "| |")
    return re.sub(r"`…` stands there for\s+`[^`]*`", "", text)


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, anchor


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path):
    pattern = r"\b(?:policymix|configs|experiments|tests|docs)/[\w/]+(?:\.\w+)?"
    for name in re.findall(rf"[`=(\s]({pattern})", path.read_text()):
        assert (ROOT / name).exists() or "NAME" in name, name


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_flags_that_are_named_exist(path):
    found = set(re.findall(r"(?<![\w-])--(\w+)", own_words(path)))
    assert found <= commands.flags_of_mains()


@functools.cache
def fields() -> set[str]:
    """Every field of every config, as "section.field"."""
    found = set()

    def visit(node, prefix):
        for key, value in node.items():
            found.add(f"{prefix}{key}")
            if hasattr(value, "items"):
                visit(value, f"{prefix}{key}.")

    for name in CONFIGS:
        visit(importlib.import_module(f"configs.{name}").get_config(), "")
    return found


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_config_fields_that_are_named_exist(path):
    named = {name[1:] for name in re.findall(r"\bconfig((?:\.\w+)+)", own_words(path))}
    assert named - {"json", "section.field", "py"} <= fields()


def test_configs_docstrings_name_flags_files_and_fields_that_exist():
    for name in CONFIGS:
        text = inspect.getdoc(importlib.import_module(f"configs.{name}"))
        assert set(re.findall(r"--(\w+)", text)) <= commands.flags_of_mains(), name
        assert {f[1:] for f in re.findall(r"`config((?:\.\w+)+)", text)} <= fields(), name
        for words in commands.of_docstring(text):
            assert (ROOT / words[1]).exists(), words
            free = any(word in words[1] for word in ("demos", "dataset"))  # they read no section
            named = any(w.partition(":")[0] == f"--config=configs/{name}.py" for w in words)
            assert named or name == "common" or free


# Messages


def strings() -> list[str]:
    """The texts in the package's code, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "policymix").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TROUBLE = (ROOT / "docs/troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.*)`$", TROUBLE, re.MULTILINE)


def pattern(quote: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)


def test_quoted_messages_are_in_the_code():
    texts = strings()
    causes = re.findall(r"^- `(\(.*\))`", TROUBLE, re.MULTILINE)
    assert len(QUOTED) > 25
    assert len(causes) == 6
    for quote in [*QUOTED, *causes]:
        assert any(pattern(quote).search(text) for text in texts), quote


class Places(NamedTuple):
    """Checkpoints of one architecture, and a folder for what is done to them."""

    a: pathlib.Path
    b: pathlib.Path
    torch: pathlib.Path
    folder: pathlib.Path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    paths = [oracle.write("pi05", w, root, norm_stats_of="base") for w in ("var1", "var2")]
    safetensors.save_params(oracle.params("pi05", "var1"), root / "torch", "openpi")
    return Places(*paths, root / "torch", root)


@pytest.fixture
def places(originals, tmp_path, monkeypatch):
    """Those, and a folder for what is damaged, or a copy; no pictures, which take long."""
    monkeypatch.setattr(pages, "png", lambda figure: b"")
    return originals._replace(folder=tmp_path)


def copied(source: pathlib.Path, places: Places) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(source, places.folder / "copy"))


def mixed(places: Places, *checkpoints, debug=False, settings=None, **fields) -> None:
    config = pi05_libero.get_config("debug") if debug else common.get_config()
    config.mix.update(settings or {})
    names = tuple(map(str, checkpoints or (places.a, places.b)))
    mix.mix(config, requests.Request(names, fields.pop("output", places.folder / "out"), **fields))


def lora_by_half(places):
    flat = trees.flatten(oracle.params("pi05", "var1"))
    flat["PaliGemma/llm/layers/mlp/linear_lora_a"] = np.zeros((4, 128, 2), np.float32)
    store.save_params(trees.unflatten(flat), places.folder / "half")
    mixed(places, places.folder / "half", places.b)


def peft(places):
    (places.folder / "peft").mkdir()
    arrays = {"x.lora_A.weight": np.ones((2, 2), np.float32)}
    safetensors.write(places.folder / "peft", arrays)
    mixed(places, places.folder / "peft", places.b)


def several_steps(places):
    for step in (1, 2):
        (places.folder / f"run/{step}/params").mkdir(parents=True)
    mixed(places, places.folder / "run", places.b)


def poisoned(places):
    flat = trees.flatten(oracle.params("pi05", "var1"))
    flat["action_out_proj/bias"] = np.full(8, np.nan, np.float32)
    path = places.folder / "nan"
    store.save_params(trees.unflatten(flat), path)
    shutil.copytree(places.a / "assets", path / "assets")
    mixed(places, path, places.b)


def with_stats(places, *names):
    path = copied(places.a, places)
    source = path / "assets/fake_robot"
    for name in names:
        shutil.copytree(source, path / "assets" / name)
    shutil.rmtree(source)
    return path


def other_stats(places):
    other = oracle.write("pi05", "var3", places.folder)
    mixed(places, places.a, other)


def truncated(places):
    path = copied(places.torch, places)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    mixed(places, path, places.b)


def shards(places, *, without="", foreign=""):
    names = ["model-1.safetensors", "model-2.safetensors"]
    arranged = safetensors.Layout(
        ((names[0], ("one",)), (names[1], ("two",))), {"format": "pt"}, index=True
    )
    path = places.folder / "shards"
    path.mkdir()
    safetensors.write(path, {n: np.ones(2, np.float32) for n in ("one", "two")}, arranged)
    if without:
        (path / names[1]).unlink()
    if foreign:
        (path / names[1]).write_bytes((path / names[0]).read_bytes())
    mixed(places, path)


def full_disk(places, monkeypatch):
    usage = shutil.disk_usage(places.folder)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    mixed(places)


def changed_since(places):
    path = copied(places.a, places)
    mixed(places, path, places.b, output=places.folder / "first")
    shutil.rmtree(path)
    shutil.copytree(oracle.write("pi05", "var3", places.folder), path)
    request = requests.Request((), places.folder / "out", repeat=str(places.folder / "first"))
    mix.mix(common.get_config(), request)


def not_a_mix(places):
    (places.folder / "out").mkdir()
    (places.folder / "out" / "notes.txt").write_text("mine")
    mixed(places, overwrite=True)


def pickled(places):
    path = places.folder / "val.pkl"
    path.write_bytes(pickle.dumps([1, 2]))
    mixed(places, debug=True, method="greedy", validation=str(path))


def saved(places, change=lambda batch: batch) -> str:
    (batch, *_) = oracle.batches("pi05")
    validation.save(places.folder / "val.npz", [change(batch)], [], {})
    return str(places.folder / "val.npz")


def with_tokens(places, tokens):
    def change(batch):
        observation = batch.observation
        shown = tokens(observation.prompt_tokens)
        mask = np.ones(shown.shape, bool)
        return batch.replace(observation=observation.replace(prompt_tokens=shown, prompt_mask=mask))

    mixed(places, debug=True, method="greedy", validation=saved(places, change))


def cut_off(places):
    path = pathlib.Path(shutil.copytree(common.PUSHT, places.folder / "cut"))
    file = path / "data" / "chunk-000" / "file-000.parquet"
    file.write_bytes(file.read_bytes()[:5000])
    lerobot.open_dataset(path)


def bad_episodes(places):
    path = pathlib.Path(shutil.copytree(common.PUSHT, places.folder / "bad"))
    file = path / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(file)
    values = np.full((len(table), 2), np.nan, np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), 2)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), file)
    config = pi0_state.get_config("debug")
    config.data.path = str(path)
    dump_validation.dump(config, places.folder / "val.npz")


def sizes_of_nothing(places):
    config = pi0_small.get_config()
    dump_validation.dump(config, places.folder / "val.npz")


def plain_format(places):
    updates = {f"PaliGemma/llm/layers/attn/q_einsum/{n}": np.ones(1) for n in ("lora_a", "lora_b")}
    params = trees.unflatten(trees.flatten(oracle.params("pi0")) | updates)
    store.save_params(params, places.folder / "lora")
    convert.convert(
        common.get_config(),
        convert.Request(str(places.folder / "lora"), places.folder / "out", "openpi"),
    )


def no_camera(places):
    config = pi0_pusht.get_config("small,debug")
    config.data.update({"path": str(common.PUSHT), "cameras": {"base_0_rgb": ""}})
    dump_validation.dump(config, places.folder / "val.npz")


def no_tokenizer(places, monkeypatch):
    monkeypatch.setenv("POLICYMIX_CACHE", str(places.folder / "cache"))
    monkeypatch.setitem(sys.modules, "requests", None)
    tokenizer.paligemma(48)


def no_hub(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    layout.local("gs://bucket/checkpoint")


def served(places, monkeypatch, **fault):
    """A checkpoint at a server that fails."""
    pytest.importorskip("google_crc32c", reason="pip install 'policymix[hub]'")
    from policymix import hub
    from tests import hub_server

    with hub_server.Server().running() as server:
        monkeypatch.setenv("POLICYMIX_CACHE", str(places.folder / "cache"))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(hub, "_WAITS", (0,))
        server.put("bucket", "checkpoint/params/_METADATA", b"{}" * 1000)
        server.faults = [hub_server.Fault("params", times=100, **fault)]
        layout.local("gs://bucket/checkpoint")


def chunk_level(places):
    config = LearnerConfig(action_dim=2, proprio_dim=3, action_horizon=2, hidden_dim=8)
    params = jax.device_get(networks.init(config, jax.random.key(0)))
    store.save_params(params, places.folder / "learner")
    mixed(places, places.folder / "learner", places.b, method="greedy")


def learned(places, *, rule="", rewards=True, **options):
    """A run of two updates on a small dataset, whose rewards are as `rule` says."""
    path = rl_support.write_dataset(places.folder / "data", rewards=rewards)
    if rule:
        request = edit_dataset.Request(reward=rule)
        edit_dataset.run("label_rewards", [path], places.folder / "labelled", request)
        path = places.folder / "labelled"
    config = rl_support.debug_config(path, **{"num_steps": 2, "language": False} | options)
    offline_rl.train(config, places.folder / "run", devices=jax.devices()[:1])


CASES = {
    "… and … are not the same architecture": lambda p, _: mixed(p, p.a, oracle.step("pi0", "base")),
    "… is half of a low-rank update": lambda p, _: lora_by_half(p),
    "… holds the low-rank update …: merge it into the model first": lambda p, _: peft(p),
    "… has low-rank updates, which --format=… has no names for": lambda p, _: plain_format(p),
    "… is not a checkpoint: expected a step directory with params/_METADATA": (
        lambda p, _: mixed(p, ROOT / "docs", p.b)
    ),
    "… holds the steps …; say which": lambda p, _: several_steps(p),
    "… is given twice; name it once": lambda p, _: mixed(p, p.a, p.a),
    "… are copies of one checkpoint; name it once": lambda p, _: mixed(p, p.a, copied(p.a, p)),
    "… holds … that are NaN or infinite": lambda p, _: poisoned(p),
    "config.mix.dtype is …; expected float32, bfloat16, float16 or float64": (
        lambda p, _: mixed(p, settings={"dtype": "int8"})
    ),
    "norm stats of … and … differ": lambda p, _: other_stats(p),
    "… has no norm stats, … has": lambda p, _: mixed(p, with_stats(p), p.b),
    "… has norm stats for …; choose one with --config.data.asset_id": (
        lambda p, _: mixed(p, with_stats(p, "droid", "trossen"), p.b)
    ),
    "the file is truncated or damaged; download it again": lambda p, _: truncated(p),
    "… names … shards that are not there": lambda p, _: shards(p, without="2"),
    "… disagree about … tensors": lambda p, _: shards(p, foreign="2"),
    "output … exists; pass --overwrite to replace it": lambda p, _: mixed(p, output=ROOT / "docs"),
    "… exists and was not written by this command": lambda p, _: not_a_mix(p),
    "output … overlaps the input": lambda p, _: mixed(p, output=p.a / "inside"),
    "needs up to …, and its disk has …": full_disk,
    "is not the checkpoint that … was made of": lambda p, _: changed_since(p),
    "a pickle, which is never loaded": lambda p, _: pickled(p),
    "config.model is empty: pass --config=configs/NAME.py": (
        lambda p, _: mixed(p, method="greedy", validation=saved(p))
    ),
    "… needs validation batches: pass --validation=FILE.npz": (
        lambda p, _: mixed(p, method="greedy")
    ),
    "… is a chunk-level learner, which has no validation loss here": lambda p, _: chunk_level(p),
    "… does not fit config.model": lambda p, _: with_tokens(p, lambda t: t[:, :-1]),
    "it was written for another tokenizer": lambda p, _: with_tokens(p, lambda t: t + 512),
    "… says of no picture feature that it is theirs": lambda p, _: no_camera(p),
    "PaliGemma's tokenizer is not in the cache and cannot be fetched": no_tokenizer,
    "interpolate needs a base": lambda p, _: mixed(p, p.a, method="interpolate"),
    "… of … episodes cannot be used; episode …": lambda p, _: bad_episodes(p),
    "expected a whole parquet file, found …": lambda p, _: cut_off(p),
    "… leaves … to the dataset: name it with --config.data.path=DIRECTORY": (
        lambda p, _: sizes_of_nothing(p)
    ),
    "… has no rewards, none of …": lambda p, _: learned(p, rewards=False),
    "every reward of the training episodes is 0": lambda p, _: learned(p, rule="zero"),
    "… not finite at step …": lambda p, _: learned(p, reward_scale=3e38),
    "…, which the … devices cannot share equally": lambda p, _: trained(p, batch_size=12),
    "… matches no parameter": lambda p, _: trained(p, freeze=("img",)),
    "so nothing is left to train": lambda p, _: trained(p, freeze=(".*",)),
    "… was begun with another config": lambda p, _: trained(p, begun={"seed": 7}),
    "… is being written by another process": lambda p, _: trained(p, begun={}),
    "remote paths need …": no_hub,
    "the server answered …": lambda p, m: served(p, m, status=500),
    "…: run it again to go on there": lambda p, m: served(p, m, cut=10),
}
WARNED = {  # of what is printed, and goes on
    "the policy learns from … of its batch": lambda p: learned(
        p, temperature=1e-6, max_weight=0.0, normalize_weights=True, batch_size=32
    ),
}


def trained(places: Places, *, begun: dict | None = None, **settings) -> None:
    """Plans a small run, where another was begun, and is still going on, if `begun` is given."""
    config = pi0_state.get_config("debug")
    workdir = places.folder / "training"
    config.train.update({"batch_size": 8} | settings)
    if begun is None:
        train.train(config, workdir, dry_run=True)
        return
    whole = metadata.complete(config, rate=True)
    record = {section: whole[section].to_dict() for section in ("model", "data", "train")}
    record["train"] |= begun
    with workdirs.taken(workdir, record, overwrite=False):
        train.train(config, workdir)


def test_every_quoted_message_has_its_case():
    assert sorted([*CASES, *WARNED]) == sorted(QUOTED)


@pytest.mark.parametrize("quote", CASES)
def test_quoted_messages_are_what_is_said(quote, places, monkeypatch):
    with pytest.raises((ValueError, OSError, ImportError, FloatingPointError)) as raised:
        CASES[quote](places, monkeypatch)
    assert pattern(quote).search(str(raised.value)), raised.value


@pytest.mark.parametrize("quote", WARNED)
def test_quoted_warnings_are_what_is_printed(quote, places, capsys):
    WARNED[quote](places)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("WARNING: ") and pattern(quote).search(line) for line in printed)


class Observation(NamedTuple):
    """What kai0 pickles, as far as the snippet looks at it."""

    images: dict
    image_masks: dict
    state: np.ndarray
    tokenized_prompt: np.ndarray
    tokenized_prompt_mask: np.ndarray


def test_a_pickle_of_kai0s_is_converted_by_the_snippet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    batches, old = oracle.batches("pi05"), []
    for batch in batches:
        o = batch.observation
        fields = o.images, o.image_masks, o.proprio, o.prompt_tokens, o.prompt_mask
        old.append((Observation(*fields), batch.actions))
    pathlib.Path("val.pkl").write_bytes(pickle.dumps(old))
    (snippet,) = commands.fenced(TROUBLE, "python")
    exec(compile(snippet, "troubleshooting.md", "exec"), {})
    found = validation.load(tmp_path / "val.npz", held_out=0.25)
    assert (len(found.selection), len(found.held_out)) == (3, 1)
    for ours, theirs in zip([*found.selection, *found.held_out], batches, strict=True):
        np.testing.assert_array_equal(ours.actions, theirs.actions)
        for camera, image in theirs.observation.images.items():
            np.testing.assert_array_equal(ours.observation.images[camera], image)
        np.testing.assert_array_equal(
            ours.observation.prompt_tokens, theirs.observation.prompt_tokens
        )


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_lines_fit_a_screen(path):
    text = re.sub(r"^## Measure\n.*?(?=^## )", "", path.read_text(), flags=re.M | re.S)  # figures
    assert [line for line in text.splitlines() if len(line) > 120] == []
