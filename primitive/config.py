"""How a kernel is laid out on the chip: the one description of it that users write and tables hold."""

import dataclasses

from paged_prefill.primitive.checks import PLATFORMS

SIZES = ("block_q", "block_kv", "num_warps", "num_stages", "num_splits")
BACKENDS = ("any",)


@dataclasses.dataclass(frozen=True)
class PrefillPageAttentionConfig:
    """Sizes a kernel runs with; None leaves a choice to the kernel, which ignores what it has no use for.

    Attributes:
      block_q: query tokens of one tile.
      block_kv: keys of one block.
      num_warps: warps of one thread block (GPU kernels).
      num_stages: key blocks in flight.
      num_splits: parts that the keys of one query tile are cut into (GPU kernels).
      platform: the kernel to run, as in `prefill_page_attention(platform=...)`; None means "auto".
      backend: "any" or None; there for ejKernel's callers.

    Raises:
      ValueError: a size is no positive integer, or a name is unknown; names the field, what it got and what it takes.
        So does a call whose kernel cannot run with the sizes, such as those that pass the chip's memory.
    """

    block_q: int | None = None
    block_kv: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    num_splits: int | None = None
    platform: str | None = None
    backend: str | None = None

    def __post_init__(self):
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"cfg.{name} must be a positive integer or None, got {value!r}")
        for name, known in (("platform", PLATFORMS), ("backend", BACKENDS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"cfg.{name} must be one of {', '.join(known)} or None, got {value!r}")

    def sizes(self) -> dict[str, int]:
        """The sizes that are not left open."""
        return {name: value for name, value in self.chosen().items() if name in SIZES}

    def chosen(self) -> dict[str, int | str]:
        """The fields that are not left open."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    def over(self, default: "PrefillPageAttentionConfig") -> "PrefillPageAttentionConfig":
        """This configuration, with `default`'s value wherever this one leaves the choice open."""
        return dataclasses.replace(default, **self.chosen())
