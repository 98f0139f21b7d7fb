"""How a kernel is laid out on the chip: the one description of it that users write and tables hold."""

import dataclasses
import json
from typing import Any

from paged_prefill.primitive import checks
from paged_prefill.primitive.packing import MAX_CONTEXT

SIZES = ("block_q", "block_kv", "num_warps", "num_stages", "num_splits")
BACKENDS = ("any", "gpu", "tpu", "cpu")


@dataclasses.dataclass(frozen=True, init=False)
class PrefillPageAttentionConfig:
    """Sizes a kernel runs with; None leaves a choice to the kernel, which ignores what it has no use for.

    By position the fields stand as in ejKernel's class of the same name, whose `block_k` is `block_kv` here, and is
    taken by either name.

    Attributes:
      platform: the kernel to run, as in `prefill_page_attention(platform=...)`; None means "auto".
      backend: "gpu", "tpu" or "cpu" refuse a kernel that is for another device; XLA's is for all. None means "any".
      block_kv: keys of one block.
      num_warps: warps of one thread block (GPU kernels).
      num_stages: key blocks in flight.
      block_q: query tokens of one tile.
      num_splits: parts that the keys of one query tile are cut into (GPU kernels). In short calls tiles of many keys
        may get more parts than that, but not under the policy "invariant".
      fp8_terms: for products in 8 bits over float8_e4m3fn caches (`mosaic_gpu`; docs/tuning.md#products-in-8-bits): a
        query becomes a sum of so many float8_e4m3fn numbers, 1, or 2 for less error, and weights are rounded to that
        dtype. With 0, as with None, keys and values are converted to 16 bits first.

    Raises:
      ValueError: a size is no positive integer, or a name is unknown; names the field, what it got and what it takes.
        So does a call whose kernel cannot run with the sizes, such as those that pass the chip's memory.
    """

    platform: str | None
    backend: str | None
    block_kv: int | None
    num_warps: int | None
    num_stages: int | None
    block_q: int | None
    num_splits: int | None
    fp8_terms: int | None

    def __init__(
        self,
        platform: str | None = None,
        backend: str | None = None,
        block_kv: int | None = None,
        num_warps: int | None = None,
        num_stages: int | None = None,
        block_q: int | None = None,
        num_splits: int | None = None,
        fp8_terms: int | None = None,
        *,
        block_k: int | None = None,
    ):
        _check_size("block_k", block_k)
        if None not in (block_k, block_kv) and block_k != block_kv:
            raise ValueError(f"cfg.block_k is cfg.block_kv by ejKernel's name, got {block_k} and {block_kv}")
        block_kv = block_k if block_kv is None else block_kv
        values = (platform, backend, block_kv, num_warps, num_stages, block_q, num_splits, fp8_terms)
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)
        for name in SIZES:
            _check_size(name, getattr(self, name))
        if fp8_terms is not None and (type(fp8_terms) is not int or fp8_terms not in (0, 1, 2)):
            raise ValueError(f"cfg.fp8_terms must be 0, 1, 2 or None, got {checks.shown(fp8_terms)}")
        checks.check_platform(platform, "cfg.platform")
        if not (backend is None or checks.is_one_of(backend, BACKENDS)):
            raise ValueError(f"cfg.backend must be one of {', '.join(BACKENDS)} or None, got {checks.shown(backend)}")

    @property
    def block_k(self) -> int | None:
        """`block_kv`, by ejKernel's name."""
        return self.block_kv

    def sizes(self) -> dict[str, int]:
        """The sizes that are not left open."""
        return {name: getattr(self, name) for name in SIZES if getattr(self, name) is not None}

    def chosen(self) -> dict[str, int | str]:
        """The fields that are not left open."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def over(self, default: "PrefillPageAttentionConfig") -> "PrefillPageAttentionConfig":
        """This configuration, with `default`'s value wherever this one leaves the choice open."""
        return dataclasses.replace(default, **self.chosen())

    def to_dict(self) -> dict[str, int | str | None]:
        """All fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PrefillPageAttentionConfig":
        """A configuration from its fields by name, also those of ejKernel's; TypeError for one that there is not."""
        return cls(**data)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "PrefillPageAttentionConfig":
        """What `to_json`, or ejKernel's, wrote."""
        return cls.from_dict(json.loads(text))


def _check_size(name, value) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"cfg.{name} must be a positive integer or None, got {checks.shown(value)}")
    if value is not None and value > MAX_CONTEXT:
        raise ValueError(f"cfg.{name} must be at most {MAX_CONTEXT}, got {value}")
