"""What a decoder is, in one form for all families, and the reader that turns a config.json into it.

A family (families.py) asks a `Reader` for the fields that it knows. What is left in the end, and what has another value
than those that are implemented, is one error that names all of it.
"""

import dataclasses
import math

import numpy as np

# Fields that say nothing about what is computed at inference.
SAY_NOTHING = frozenset(
    "_name_or_path _sliding_window_pattern architectures attention_dropout auto_map aux_loss_alpha bos_token_id "
    "cache_implementation dtype embd_pdrop ep_size experts_per_token head_dim initial_context_length initializer_range "
    "max_window_layers model_type num_nextn_predict_layers output_router_logits pad_token_id pretraining_tp "
    "qk_head_dim resid_pdrop router_aux_loss_coef router_jitter_noise seq_aux sep_token_id torch_dtype "
    "transformers_version unk_token_id use_cache".split()
)
NOTHING = (None, False, 0, [], {})


@dataclasses.dataclass(frozen=True)
class Layer:
    """What differs from layer to layer beside the weights.

    Attributes:
      kv_heads, head_dim: of the keys in its cache; 1 and latent + rotary features for a latent cache.
      frequencies: of the rotary embedding, one of each pair of features; features without one are not rotated.
      rope_scale: multiplies the rotated features (YaRN).
      window: how many keys a token sees, its own included; None for all.
      chunk: it sees only the keys in one chunk of so many positions with it; None for all.
      temperature: how fast queries grow with the position (Llama 4's layers without rotary embedding); 0 for not.
    """

    kv_heads: int
    head_dim: int
    frequencies: tuple[float, ...]
    rope_scale: float = 1.0
    window: int | None = None
    chunk: int | None = None
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """How tokens find their experts; `routing` names a function of experts.py."""

    routing: str
    per_token: int
    groups: int = 1
    top_groups: int = 1
    normalised: bool = False
    scale: float = 1.0
    swiglu_alpha: float | None = None  # gpt-oss' clamped SwiGLU; None for the plain one
    swiglu_limit: float | None = None
    scales_inputs: bool = False  # whether weights multiply what goes into an expert, not what comes out


@dataclasses.dataclass(frozen=True)
class Latent:
    """DeepSeek's attention: a key is `rank` latent features, then `rope_dim` rotary ones that all heads share."""

    rank: int
    rope_dim: int
    head_dim: int  # of a query without its rotary features
    value_dim: int


@dataclasses.dataclass(frozen=True)
class Config:
    """All that is static of a decoder. Hashable, since it decides what is compiled."""

    family: str
    vocabulary: int
    width: int
    q_heads: int
    layers: tuple[Layer, ...]
    softmax_scale: float
    norm_eps: float
    max_positions: int
    activation: str = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0  # Gemma's norms store their weight less one
    tied: bool = False
    soft_cap: float | None = None
    final_soft_cap: float | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    temperature_floor: int = 1  # Llama 4: positions per step of the growth of queries
    norms_rotated: bool = False  # Llama 4: whether queries and keys are normalised once they are rotated
    stop_tokens: tuple[int, ...] = ()

    @property
    def alike(self) -> bool:
        """Whether all layers see the same keys, so that no interval need be handed over."""
        return len({(layer.window, layer.chunk) for layer in self.layers}) == 1 and self.layers[0].chunk is None

    def draft_depth(self, position: int) -> int:
        """How deep drafts behind a token at `position` may go.

        All layers must see of a draft's chunk its ancestors, and no interval of places hides some of those. So a path
        has to be shorter than every window, and stay in one chunk of positions.
        """
        windows = [layer.window - 1 for layer in self.layers if layer.window]
        chunks = [layer.chunk - 1 - position % layer.chunk for layer in self.layers if layer.chunk]
        return min([self.max_positions - 1 - position, *windows, *chunks])


class Reader:
    """A config.json, field by field."""

    def __init__(self, values: dict):
        self.values = {name: value for name, value in values.items() if name not in SAY_NOTHING}
        self.all = values
        self.complaints = []

    def __call__(self, name: str, default=...):
        """A field's value; the default where it is absent or null."""
        value = self.values.pop(name, None)
        if value is None:
            if default is ...:
                raise ValueError(f"config.json has no {name!r}, which {self.all.get('model_type')!r} needs")
            return default
        return value

    def only(self, name: str, *implemented) -> None:
        """Holds a field to the values that are implemented; absent and null are always."""
        value = self(name, None)
        if value is not None and value not in implemented:
            self.complaints.append(f"{name}={value!r} (there is {' or '.join(map(repr, implemented))})")

    def finish(self) -> None:
        """Raises ValueError where the file asks for what nobody took."""
        self.complaints += [f"{name}={value!r}" for name, value in self.values.items() if value not in NOTHING]
        if self.complaints:
            kind = self.all.get("model_type")
            raise ValueError(f"config.json of {kind!r} asks for what is not implemented: {', '.join(self.complaints)}")

    def rope(self) -> dict:
        """The fields of the rotary embedding, of today's form or of the one before (rope_theta and rope_scaling)."""
        theta, scaling = self("rope_theta", 10_000.0), self("rope_scaling", {})
        return self("rope_parameters", None) or {"rope_theta": theta, **scaling}


def frequencies(rope: dict, head_dim: int, max_positions: int) -> tuple[tuple[float, ...], float]:
    """Of a rotary embedding (arXiv 2104.09864): the frequency of each pair of features, and the scale of the rotated.

    `rope` has the fields of transformers' `rope_parameters`.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = dict(default=_plain, linear=_linear, llama3=_llama3, yarn=_yarn, proportional=_proportional)
    if kind not in known:
        raise ValueError(f"config.json asks for what is not implemented: rope_type={kind!r} (there is {sorted(known)})")
    found, scale = known[kind](rope, head_dim, max_positions)
    return tuple(found.astype(np.float32).tolist()), float(scale)


def _powers(rope, dim):
    return rope["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


def _plain(rope, head_dim, max_positions):
    return _powers(rope, int(head_dim * rope.get("partial_rotary_factor", 1.0))), 1.0


def _linear(rope, head_dim, max_positions):
    """Position interpolation (arXiv 2306.15595)."""
    return _plain(rope, head_dim, max_positions)[0] / rope["factor"], 1.0


def _proportional(rope, head_dim, max_positions):
    """Gemma 4: the first share of the pairs is rotated as if all were, the others not at all."""
    pairs = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
    found = np.where(np.arange(head_dim // 2) < pairs, _powers(rope, head_dim), 0.0)
    return found / rope.get("factor", 1.0), 1.0


def _llama3(rope, head_dim, max_positions):
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    plain, _ = _plain(rope, head_dim, max_positions)
    turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / rope["factor"] + kept * plain, 1.0


def _yarn(rope, head_dim, max_positions):
    """YaRN (arXiv 2309.00071)."""
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_positions / original

    def pair_that_turns(rotations):
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low, high = pair_that_turns(rope.get("beta_fast") or 32), pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    interpolated = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    plain = _powers(rope, dim)
    found = plain * (1 - interpolated) + plain / factor * interpolated
    given, above, below = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is None:
        given = yarn_scale(factor, above) / yarn_scale(factor, below) if above and below else yarn_scale(factor, 1.0)
    return found, given


def yarn_scale(factor: float, mscale: float) -> float:
    """How much YaRN raises the magnitude of what it rotates."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
