"""What decides a chunk-level learner: its algorithm, its networks and the numbers in its losses."""

import dataclasses
import numbers
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

# What each algorithm takes where nothing is said. The losses are in the module of that name.
DEFAULTS: dict[str, dict[str, Any]] = {
    "chunk_iql": {
        "network": "plain", "temperature": 1 / 3, "max_weight": 100.0, "normalize_weights": False,
        "num_critics": 2, "ema_decay": 0.995, "num_candidates": 1,
    },
    "chunk_soft": {
        "network": "fused", "temperature": 1.0, "max_weight": 100.0, "normalize_weights": True,
        "num_critics": 2, "ema_decay": 0.995, "num_candidates": 1,
    },
    "cloning": {
        "network": "plain", "temperature": 1.0, "max_weight": 1.0, "normalize_weights": False,
        "num_critics": 1, "ema_decay": 0.0, "num_candidates": 1,
    },
    "qc_fql": {
        "network": "plain", "temperature": 1.0, "max_weight": 1.0, "normalize_weights": False,
        "num_critics": 2, "ema_decay": 0.995, "num_candidates": 1,
    },
    "qc": {
        "network": "plain", "temperature": 1.0, "max_weight": 1.0, "normalize_weights": False,
        "num_critics": 2, "ema_decay": 0.995, "num_candidates": 32,
    },
}  # fmt: skip
ALGORITHMS = tuple(DEFAULTS)
POLICIES = ("gaussian", "flow")
NETWORKS = ("plain", "fused")
DTYPES = ("float32", "bfloat16")
_WORDS = {
    bool: "true or false", int: "a whole number", float: "a finite number", str: "a text",
    tuple[int, int]: "two whole numbers", tuple[str, ...]: "texts",
}  # fmt: skip


def expected(kind: Any, value: Any) -> str:
    """What a field of this annotation holds, in words; "" where `value` is such."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in kinds:
        return ""
    return "" if _is(kinds[0], value) else _WORDS[kinds[0]]


def _is(kind: Any, value: Any) -> bool:
    """Whether it is of the kind: a truth value is no number, and a whole number will do for any."""
    if kind in (bool, str):
        return isinstance(value, kind)
    if typing.get_origin(kind) is tuple:
        first, second = typing.get_args(kind)  # (int, int) or (str, ...)
        right = isinstance(value, tuple | list) and (second is ... or len(value) == 2)
        return right and all(_is(first, part) for part in value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    if kind is int:
        return isinstance(value, numbers.Integral)
    return -sys.float_info.max <= value <= sys.float_info.max


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """Everything that decides the parameter tree and the update.

    None stands for what `DEFAULTS` has for the algorithm.

    Attributes:
      algorithm: one of ALGORITHMS. policy: "gaussian" (a diagonal Normal over the chunk) or "flow".
      action_dim, proprio_dim, action_horizon: a, p and h.
      image_keys: the cameras, in order; image_resolution: height and width of their pictures.
      max_token_len: tokens of a prompt; 0: language is not read. vocab_size: of its tokens.
      temperature: T in the weights exp(advantage / T) of the policy's loss.
      max_weight: at which they are clipped; 0: nowhere.
      normalize_weights: whether they are divided by their mean over the batch.
      expectile: of the value's loss (chunk_iql).
      entropy_temperature: of log-probabilities in the soft value (chunk_soft).
      num_samples: chunks that the soft value is the mean of.
      num_critics: members of the critic's ensemble.
      ema_decay: of the target networks, target ← d * target + (1 - d) * online; 0: there are none,
        and the online networks are used.
      distill_scale: of the one-step actor's distance to the flow (qc_fql; its α).
      num_flow_steps: Euler steps of a flow policy.
      num_candidates: chunks among which the critic chooses when a flow policy acts (qc: and for
        its target); 1: none.
      lambda_v, lambda_pi: weights of the value's and the policy's losses in the total.
      learning_rate: of Adam; clip_norm: of each network's gradient, 0: none.
      network: "plain": pictures, proprio and language side by side into one MLP of `num_layers`
        layers of `hidden_dim` (GELU), pictures encoded once for all networks; "fused": an encoder
        per network that fuses the three by an MLP, then heads (ReLU), of `hidden_dim` throughout.
      feature_dim: of an encoder's output. layer_norm: in plain critics and values.
      min_std: the least deviation of a Gaussian policy.
      dtype: of the computation; parameters and losses are float32.
    """

    algorithm: str = "chunk_iql"
    policy: str = "gaussian"
    action_dim: int = 7
    proprio_dim: int = 8
    action_horizon: int = 10
    image_keys: tuple[str, ...] = ()
    image_resolution: tuple[int, int] = (256, 256)
    max_token_len: int = 0
    vocab_size: int = 1024
    temperature: float | None = None
    max_weight: float | None = None
    normalize_weights: bool | None = None
    expectile: float = 0.7
    entropy_temperature: float = 1e-3
    num_samples: int = 5
    num_critics: int | None = None
    ema_decay: float | None = None
    distill_scale: float = 100.0
    num_flow_steps: int = 10
    num_candidates: int | None = None
    lambda_v: float = 1.0
    lambda_pi: float = 1.0
    learning_rate: float = 3e-4
    clip_norm: float = 0.0
    network: str | None = None
    hidden_dim: int = 512
    feature_dim: int = 512
    num_layers: int = 4
    layer_norm: bool = True
    min_std: float = 1e-3
    dtype: str = "float32"

    discrete_state_input = False  # proprio is not written into prompts

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        self._check_kinds()
        for name, known in (
            ("algorithm", ALGORITHMS), ("policy", POLICIES), ("dtype", DTYPES),
            ("network", (*NETWORKS, None)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"config.offline_rl.{name} is {getattr(self, name)!r}; expected one of "
                    f"{[k for k in known if k]}"
                )
        for name, value in DEFAULTS[self.algorithm].items():
            if getattr(self, name) is None:
                put(name, value)
        put("image_keys", tuple(self.image_keys))
        put("image_resolution", tuple(self.image_resolution))
        if self.algorithm.startswith("qc"):
            put("policy", "flow")
        self._check()
        self._check_sizes()

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if words := expected(field.type, value):
                raise ValueError(f"config.offline_rl.{field.name} is {value!r}; expected {words}")

    def _check(self) -> None:
        for name in (
            "action_dim", "proprio_dim", "action_horizon", "num_samples", "num_critics",
            "num_flow_steps", "num_candidates", "hidden_dim", "feature_dim", "num_layers",
            "vocab_size",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(
                    f"config.offline_rl.{name} is {getattr(self, name)}; at least 1 is needed"
                )
        for name in ("temperature", "min_std", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"config.offline_rl.{name} is {getattr(self, name)}; expected above 0"
                )
        if min(self.image_resolution) < 1:
            raise ValueError(
                f"config.offline_rl.image_resolution is {self.image_resolution}; expected height "
                "and width above 0"
            )
        for name in ("max_weight", "entropy_temperature", "lambda_v", "lambda_pi", "clip_norm",
                     "distill_scale", "max_token_len"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ValueError(f"config.offline_rl.{name} is {getattr(self, name)}; not below 0")
        if not 0 < self.expectile < 1:
            raise ValueError(
                f"config.offline_rl.expectile is {self.expectile}; expected between 0 and 1"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"config.offline_rl.ema_decay is {self.ema_decay}; expected 0 (no target networks) "
                "to below 1"
            )
        if self.algorithm == "chunk_soft" and self.policy != "gaussian":
            raise ValueError(
                "config.offline_rl.policy is 'flow', which has no log-probability in closed form; "
                "chunk_soft needs 'gaussian'"
            )

    def _check_sizes(self) -> None:
        for name in ("hidden_dim", "feature_dim"):  # fused layers are half as wide in places
            if self.network == "fused" and getattr(self, name) < 2:
                raise ValueError(
                    f"config.offline_rl.{name} is {getattr(self, name)}; at least 2 is needed by "
                    "fused networks"
                )
        if self.policy == "gaussian" and self.num_candidates > 1:
            raise ValueError(
                f"config.offline_rl.num_candidates is {self.num_candidates}, of a gaussian policy, "
                "which acts by its mean; expected 1, or config.offline_rl.policy='flow'"
            )

    @property
    def chunk_dim(self) -> int:
        """Numbers in a chunk, h * a."""
        return self.action_horizon * self.action_dim

    def seeing(self, cameras: Collection[str]) -> "LearnerConfig":
        """The same with these cameras alone."""
        kept = tuple(camera for camera in self.image_keys if camera in cameras)
        return dataclasses.replace(self, image_keys=kept)
