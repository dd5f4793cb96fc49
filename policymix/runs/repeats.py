"""Mixes that are made again from what mix.json says of them."""

import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from policymix import files
from policymix.checkpoints import provenance
from policymix.checkpoints.store import FORMATS
from policymix.runs.requests import METHODS, Request


class Repeat(NamedTuple):
    """What was done: the method, and the coefficients of all inputs, [n] or {regex: [n]}."""

    method: str
    coefficients: Any


def read(
    config: ml_collections.ConfigDict, request: Request
) -> tuple[ml_collections.ConfigDict, Request, Repeat]:
    """The config, the request and the coefficients of the mix that request.repeat tells of.

    Inputs that moved may be named in request.checkpoints, in the order that mix.json has.

    Raises:
      ValueError, OSError: it is not the mix.json of one mix, or an input is not what it was.
    """
    path = files.local(request.repeat)
    path = path / "mix.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"--from: {path} does not exist")
    told = files.read_json(path)
    sweep = told.get("sweep") if isinstance(told, dict) else None
    if isinstance(sweep, list) and sweep and isinstance(sweep[0], dict):
        which = path.parent / str(sweep[0].get("output"))
        raise ValueError(f"--from: {path} tells of several mixes; say which, as {which}")
    if request.method or request.coefficients or request.merge_ratios or request.base:
        raise ValueError(
            "--from says which method and coefficients to use; leave out --method, "
            "--coefficients, --merge_ratio and --base"
        )
    try:
        names = [entry["path"] for entry in told["inputs"]]
        prints = [entry["fingerprint"] for entry in told["inputs"]]
        settings, groups, rows = told["settings"], told["groups"] or {}, told["base"] == 0
        coefficients = told["coefficients"]
        if isinstance(coefficients, dict):
            coefficients = {groups[name]: np.array(c) for name, c in coefficients.items()}
        else:
            coefficients = np.array(coefficients, np.float64)
        asked, config = config, config.copy_and_resolve_references()
        config.data.asset_id = settings["asset_id"]
        config.mix.update({k: v for k, v in settings.items() if k != "asset_id"})
        config.mix.groups = tuple(f"{name}={regex}" for name, regex in groups.items())
        method, chosen = told["method"], request.format or told["format"]
        _check(method, chosen, names + prints, coefficients)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"--from: {path} is not the mix.json of a mix (no {error})") from error
    if request.checkpoints:
        if len(request.checkpoints) != len(names):
            raise ValueError(
                f"--from: {path} has {len(names)} inputs, --checkpoints {len(request.checkpoints)}"
            )
        names = list(request.checkpoints)
    for name, expected in zip(names, prints, strict=True):
        if provenance.fingerprint(name) != expected:
            raise ValueError(
                f"{name} is not the checkpoint that {path} was made of (its content changed)"
            )
    for name in ("dtype", "norm_stats", "groups"):
        now, then = asked.mix[name], config.mix[name]
        if now != then:
            print(f"config.mix.{name} is that of {path}, {then!r}, not {now!r}")
    request = Request(
        checkpoints=tuple(names[rows:]),
        output=pathlib.Path(request.output),
        base=names[0] if rows else "",
        validation=request.validation,
        format=chosen,
        landscape=request.landscape,
        overwrite=request.overwrite,
        dry_run=request.dry_run,
    )
    return config, request, Repeat(method, coefficients)


def _check(method: Any, chosen: Any, texts: list, coefficients: Any) -> None:
    """ValueError for what no mix has written."""
    if method not in METHODS or chosen not in ("safetensors", *FORMATS):
        raise ValueError(f"method {method!r}, format {chosen!r}")
    n = len(texts) // 2
    if n < 1 or not all(isinstance(text, str) for text in texts):
        raise ValueError("paths or fingerprints are no texts")
    for c in coefficients.values() if isinstance(coefficients, dict) else [coefficients]:
        if np.shape(c) != (n,) or not np.isfinite(c).all():
            raise ValueError(f"{n} finite coefficients expected, got {c}")
