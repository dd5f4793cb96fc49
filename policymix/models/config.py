"""What decides π0's parameters and computation.

Sources: π0 (arXiv:2410.24164), π0.5 (arXiv:2504.16054), OpenPI and open-pi-zero.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from policymix.models import siglip, variants
from policymix.models.variants import Size

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
DTYPES = ("bfloat16", "float32", "float16")
CONVENTIONS = ("openpi", "open_pi_zero")
TIME_SAMPLING = ("beta", "uniform")


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """Everything that decides the parameter tree and the computation. The defaults are OpenPI's π0.

    Attributes:
      paligemma_variant, action_expert_variant: a name ("gemma_2b", "gemma_2b_lora") or the fields
        of `variants.Size`.
      proprio_dim: length of the proprio vector (None: action_dim, as in OpenPI, whose states are
        padded to it).
      remat: scan the layers and compute their activations again in the backward pass. Without it
        they are unrolled and kept, which needs the memory of all layers: for small networks.
      siglip_variant: SIZE/PATCH ("So400m/14"), or the fields of `siglip.Size`; siglip_depth
        replaces its number of layers.
      pi05: adaptive norms, no proprio token. discrete_state_input: proprio is written into the
      prompt (None: pi05).
      max_token_len: prompt length (None: 48, or 200 for π0.5); 0 leaves the prompt out.
      image_keys: the cameras, in order; () leaves the vision tower out.
      image_resolution: height and width in pixels. dtype: of the computation; parameters stay as
        they are stored.
      variant: whose conventions: "openpi", or "open_pi_zero" for checkpoints that were trained by
        that program. There every expert's tokens are scaled by sqrt(width), attention logits are
        capped softly, positions start again for proprio and actions, times are embedded otherwise,
        the path ends at `sigma_min` of noise, and sampled actions are clipped to ±1.
      expert_rope_base: of the action expert's rotary positions; time_max_period: of the time
        embedding (None: 4, or 10,000 for open-pi-zero).
      time_sampling: of training times: "beta", more of them near the noise, or "uniform".
    """

    paligemma_variant: str | Size | Mapping[str, Any] = "gemma_2b"
    action_expert_variant: str | Size | Mapping[str, Any] = "gemma_300m"
    siglip_variant: str | siglip.Size | Mapping[str, int] = "So400m/14"
    siglip_depth: int | None = None
    vocab_size: int = 257_152
    pi05: bool = False
    discrete_state_input: bool | None = None
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int | None = None
    image_keys: tuple[str, ...] = OPENPI_CAMERAS
    image_resolution: tuple[int, int] = (224, 224)
    dtype: str = "bfloat16"
    proprio_dim: int | None = None
    remat: bool = True
    variant: str = "openpi"
    expert_rope_base: float = 10_000.0
    time_max_period: float | None = None
    time_sampling: str = "beta"

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("paligemma_variant", variants.size(self.paligemma_variant))
        put("action_expert_variant", variants.size(self.action_expert_variant))
        variants.check_joint((self.paligemma_variant, self.action_expert_variant))
        if not isinstance(self.siglip_variant, str):  # a mapping would not hash
            put("siglip_variant", siglip.size(self.siglip_variant))
        put("image_keys", tuple(self.image_keys))
        put("image_resolution", tuple(self.image_resolution))
        if self.discrete_state_input is None:
            put("discrete_state_input", self.pi05)
        if self.max_token_len is None:
            put("max_token_len", 200 if self.pi05 else 48)
        if self.proprio_dim is None:
            put("proprio_dim", self.action_dim)
        for name in ("vocab_size", "action_dim", "action_horizon", "proprio_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pi0Config.{name} is {getattr(self, name)}; at least 1 is needed")
        patch = siglip.size(self.siglip_variant).patch
        if self.image_keys and min(self.image_resolution) < patch:
            raise ValueError(
                f"image_resolution {self.image_resolution} is smaller than one patch ({patch} "
                "pixels)"
            )
        for name, known in (
            ("dtype", DTYPES),
            ("variant", CONVENTIONS),
            ("time_sampling", TIME_SAMPLING),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Pi0Config.{name} is {getattr(self, name)!r}; expected one of {list(known)}"
                )
        if self.open_pi_zero and self.pi05:
            raise ValueError("variant='open_pi_zero' is a π0; it has no pi05")
        if self.time_max_period is None:
            put("time_max_period", 10_000.0 if self.open_pi_zero else 4.0)

    @property
    def open_pi_zero(self) -> bool:
        return self.variant == "open_pi_zero"

    @property
    def sigma_min(self) -> float:
        """Noise that is left at the end of the path."""
        return 1e-3 if self.open_pi_zero else 0.0

    def seeing(self, cameras: Collection[str]) -> "Pi0Config":
        """The same policy where only these of its cameras are there.

        What it computes from the same parameters is what it computes with the others masked: tokens
        of absent cameras are seen by nothing and take no positions. Without them the sequence is
        shorter. The parameter tree stays that of the whole policy.

        open-pi-zero's positions count absent cameras too: there all stay, to be masked.

        Raises:
          ValueError: one of `cameras` is none of the policy's.
        """
        unknown = [cameras] if isinstance(cameras, str) else [*{*cameras} - {*self.image_keys}]
        if unknown:
            raise ValueError(f"cameras: {unknown[0]!r} is not among {list(self.image_keys)}")
        if self.open_pi_zero:
            return self
        kept = tuple(camera for camera in self.image_keys if camera in cameras)
        return dataclasses.replace(self, image_keys=kept)

    @property
    def siglip_heads(self) -> int | None:
        """The vision tower's number of heads; None without one."""
        return siglip.size(self.siglip_variant).num_heads if self.image_keys else None

    def without_lora(self) -> "Pi0Config":
        """The policy that is left when low-rank updates are merged into their weights."""
        names = ("paligemma_variant", "action_expert_variant")
        plain = {n: dataclasses.replace(getattr(self, n), lora=None) for n in names}
        return dataclasses.replace(self, **plain)
