"""What the command line asks of a mix: methods, coefficients and ratios, whole or by groups of
parameters, checked against each other before anything is read.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from policymix.checkpoints import keymaps
from policymix.mixing import rules

CLOSED_FORM = ("average", "manual", "interpolate")
SECOND_ORDER = ("gauss_newton", "bfgs")
DESCENT = ("gradient_descent", "adaptive_gradient_descent")
BY_LOSS = ("inverse_loss", "greedy", *DESCENT, *SECOND_ORDER)
METHODS = CLOSED_FORM + BY_LOSS
BY_GROUP = ("manual", "interpolate", *DESCENT, *SECOND_ORDER)

Numbers = tuple[float, ...] | Mapping[str, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; empty fields fall back to the config.

    Attributes:
      coefficients, merge_ratios: numbers, or numbers by the name of a group of parameters.
      format: of the output, "" being that of the inputs.
      repeat: the mix.json of a mix to make again.
      landscape: whether to plot the loss over all mixes of two or three inputs.
    """

    checkpoints: tuple[str, ...]
    output: pathlib.Path
    method: str = ""
    coefficients: Numbers = ()
    base: str = ""
    merge_ratios: Numbers = ()
    validation: str = ""
    format: str = ""
    repeat: str = ""
    landscape: bool = False
    overwrite: bool = False
    dry_run: bool = False

    @property
    def ratios(self) -> list[float | dict[str, float]]:
        """The merge ratios to write, each a number or one per group."""
        if isinstance(self.merge_ratios, Mapping):
            return [{name: values[0] for name, values in self.merge_ratios.items()}]
        return list(self.merge_ratios) or [0.5]


def parse_numbers(flag: str, text: str) -> Numbers:
    """ "0.5,0.3" → numbers; "vision:0.5,0.3;language:1,0" → numbers by group.

    ValueError names the flag and the word that is not a number.
    """
    if ":" not in text:
        return tuple(_number(flag, word) for word in text.split(",") if word.strip())
    found = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, colon, numbers = part.partition(":")
        if not colon or not numbers.strip() or name.strip() in found:
            raise ValueError(
                f"--{flag}: {part!r}; groups are written NAME:1,2,3;NAME:4,5,6, each once"
            )
        found[name.strip()] = tuple(_number(flag, word) for word in numbers.split(","))
    return found


def _number(flag: str, word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"--{flag}: {word!r} is not a number") from None


def groups(config: ml_collections.ConfigDict) -> dict[str, str]:
    """config.mix.groups: (name or "name=regex", …) → {name: path regex}, in that order.

    A bare name is one of `keymaps.GROUPS`. ValueError for any other.
    """
    found = {}
    for entry in config.mix.groups:
        name, given, regex = entry.partition("=")
        if not given and name not in keymaps.GROUPS:
            raise ValueError(
                f"config.mix.groups: {name!r} is not known; write NAME=REGEX, or one of "
                f"{', '.join(keymaps.GROUPS)}"
            )
        if name in found:
            raise ValueError(f"config.mix.groups names {name!r} twice")
        found[name] = regex if given else keymaps.GROUPS[name]
    if any("=" in entry for entry in config.mix.groups):
        return found
    # The action expert's parameters are told from the language model's by coming first.
    return {name: found[name] for name in keymaps.GROUPS if name in found}


def method_of(config: ml_collections.ConfigDict, request: Request) -> str:
    """The method asked for, checked against the other flags. ValueError where they do not agree."""
    method = request.method or config.mix.method
    if not method:
        method = "manual" if request.coefficients else "interpolate" if request.base else "average"
        if request.merge_ratios:
            method = "interpolate"
    n = len(request.checkpoints)
    if method not in METHODS:
        raise ValueError(f"--method {method!r}: expected one of {', '.join(METHODS)}")
    if not n:
        raise ValueError(
            "--checkpoints is empty: give the checkpoints to mix, as --checkpoints=a,b,c"
        )
    if (method == "manual") != bool(request.coefficients):
        raise ValueError(
            f"--coefficients goes with --method=manual, and manual needs it; the method is {method}"
        )
    if method == "manual":
        _check_coefficients(request.coefficients, n)
    if method == "interpolate":
        _check_ratios(request.merge_ratios)
    elif request.merge_ratios:
        raise ValueError(f"--merge_ratio goes with --method=interpolate; the method is {method}")
    _check_groups(groups(config), request, method)
    _check_settings(config)
    if method in BY_LOSS and not request.validation:
        raise ValueError(f"{method} needs validation batches: pass --validation=FILE.npz")
    return method


def _check_settings(config: ml_collections.ConfigDict) -> None:
    m = config.mix
    if m.num_iterations < 1 or not m.learning_rate > 0 or not math.isfinite(m.power):
        raise ValueError(
            "config.mix: num_iterations must be at least 1, learning_rate positive and power "
            f"finite, got {m.num_iterations}, {m.learning_rate} and {m.power}"
        )


def _check_coefficients(given: Numbers, n: int) -> None:
    for name, numbers in _named(given).items():
        if len(numbers) != n:
            where = f" for {name!r}" if name else ""
            raise ValueError(
                f"{n} checkpoints need {n} coefficients{where}, --coefficients has {len(numbers)}"
            )
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"--coefficients must be finite numbers, got {list(numbers)}")
        rules.normalize(numbers)


def _check_ratios(given: Numbers) -> None:
    for name, ratios in _named(given).items():
        if not all(math.isfinite(ratio) for ratio in ratios):
            raise ValueError(f"--merge_ratio must be finite, got {list(ratios)}")
        if name and len(ratios) != 1:
            raise ValueError(
                f"--merge_ratio gives {name!r} {len(ratios)} ratios; with groups each has one"
            )
        if len({f"{ratio:g}" for ratio in ratios}) < len(ratios):  # the names of directories
            raise ValueError(
                f"--merge_ratio names a ratio twice, to six digits: {', '.join(map(str, ratios))}"
            )


def _named(given: Numbers) -> Mapping[str, tuple[float, ...]]:
    return given if isinstance(given, Mapping) else {"": given}


def _check_groups(known: Mapping[str, str], request: Request, method: str) -> None:
    if known and method not in BY_GROUP:
        raise ValueError(
            f"{method} has one set of coefficients for the whole model; config.mix.groups goes "
            f"with {', '.join(BY_GROUP)}"
        )
    for flag, given in (
        ("coefficients", request.coefficients),
        ("merge_ratio", request.merge_ratios),
    ):
        if not isinstance(given, Mapping):
            continue
        if not known:
            raise ValueError(
                f"--{flag} names the groups {', '.join(given)}: say which parameters they are with "
                f"--config.mix.groups=\"('vision','action_expert','language','projections')\" (or "
                "'NAME=REGEX')"
            )
        if given.keys() != known.keys():
            raise ValueError(
                f"--{flag} names the groups {', '.join(given)}, config.mix.groups has "
                f"{', '.join(known)}"
            )


def manual(request: Request, known: Mapping[str, str]) -> np.ndarray | dict[str, np.ndarray]:
    """[n] normalised coefficients as given, or {regex: [n]}."""
    if isinstance(request.coefficients, Mapping):
        return {regex: rules.normalize(request.coefficients[name]) for name, regex in known.items()}
    return rules.normalize(request.coefficients)


def interpolated(
    ratio: float | Mapping[str, float], num_finetuned: int, known: Mapping[str, str]
) -> np.ndarray | dict[str, np.ndarray]:
    """[1 + num_finetuned], or {regex: [1 + num_finetuned]}: the base first.

    Several fine-tuned checkpoints are merged one after another, each into what came of the last:
    θ ← r θ + (1 - r) θ_k, so that the base keeps r^n and θ_k has (1 - r) r^(n - k).
    """
    if isinstance(ratio, Mapping):
        return {
            regex: interpolated(ratio[name], num_finetuned, {}) for name, regex in known.items()
        }
    powers = ratio ** np.arange(num_finetuned, -1, -1.0)
    return np.concatenate([powers[:1], (1 - ratio) * powers[1:]])


def named_coefficients(coefficients, known: Mapping[str, str]) -> Sequence | dict[str, list]:
    """Coefficients as mix.json has them: a list, or lists by the name of their group."""
    if isinstance(coefficients, Mapping):
        names = {regex: name for name, regex in known.items()}
        return {
            names.get(regex, regex): np.asarray(c).tolist() for regex, c in coefficients.items()
        }
    return np.asarray(coefficients).tolist()
