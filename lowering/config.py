"""How a kernel is laid out on the chip: the one description of it that users write and tables hold."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefillPageAttentionConfig:
    """Sizes a kernel runs with; None leaves a choice to the kernel, which ignores what it has no use for.

    Attributes:
      block_q: query tokens of one tile.
      block_kv: keys of one block.
      num_warps: warps of one thread block (Triton).
      num_stages: key blocks in flight.
      num_splits: parts that the keys of one query tile are cut into (GPU kernels).
      platform: the kernel to run, as in `prefill_page_attention(platform=...)`; None means "auto".
      backend: accepted for ejKernel's callers; "any" and None mean the same.

    Raises:
      ValueError: a size is no positive integer; names the field and what it got.
    """

    block_q: int | None = None
    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    num_splits: int | None = None
    platform: str | None = None
    backend: str | None = None

    def __post_init__(self):
        for name in ("block_q", "block_kv", "num_warps", "num_stages", "num_splits"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"cfg.{name} must be a positive integer or None, got {value!r}")

    def over(self, default: "PrefillPageAttentionConfig") -> "PrefillPageAttentionConfig":
        """This configuration, with `default`'s value wherever this one leaves the choice open."""
        names = self.__dataclass_fields__
        return PrefillPageAttentionConfig(
            **{n: getattr(default, n) if getattr(self, n) is None else getattr(self, n) for n in names}
        )
