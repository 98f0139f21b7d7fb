"""What every kernel is: the one interface by which the rest of lowering/ knows them.

Words that all kernels share: a *row* is a new token for one query head; the rows of a pack are cut into *tiles*, each
of one sequence; a tile goes over the keys that it sees in *blocks*; where there are too few tiles to fill a chip, the
blocks of each are cut into *parts* ("splits"; split-K elsewhere), whose results are merged by their lse. What a
kernel's own files call the rest is in the docstring of its folder.
"""

import abc
from typing import ClassVar

from paged_prefill.lowering.call import FEATURES, Call, Device, Problem
from paged_prefill.primitive.config import PrefillPageAttentionConfig


class Kernel(abc.ABC):
    """A way to run a `Call`. A new kernel fills in what is abstract here, and is named in choose.py.

    What a call asks for, and what its indices may hold, is said in call.py. The results are those of every kernel, at
    the edges too: a row that no sequence owns, or that sees no key, has out 0 and lse -inf; a row that sees NaN has
    lse NaN; a key that a row does not see changes no bit of it, NaN included; and a sequence's bits depend on its own
    rows, keys and the configuration alone.

    Attributes:
      name: what tables and messages call it.
      version: grows with every change that may move its timings: tables of tuned configurations forget what an older
        one measured.
      platforms: those it runs on, as `Device.platform` has them.
      features: those of `call.FEATURES` that it takes. A call with any other is refused before the kernel is asked.
      invariant: whether its heuristic, under the policy of that name, follows the dims, group, page size, dtype and
        window of a call alone, so that a sequence's bits are the same in any pack, batch and cut over heads. That
        policy takes no other kernel.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    platforms: ClassVar[tuple[str, ...]]
    features: ClassVar[frozenset[str]] = frozenset()
    invariant: ClassVar[bool] = False

    def supports(self, problem: Problem, device: Device) -> str | None:
        """None, or the reason why it cannot run a call, in words that a user can act on."""
        if device.platform not in self.platforms:
            return f"it runs on {' and '.join(self.platforms)}, not on {device.platform}"
        if missing := [FEATURES[name] for name in problem.features if name not in self.features]:
            return f"does not take {' and '.join(missing)}"
        return self._reason_against(problem, device)

    @abc.abstractmethod
    def _reason_against(self, problem: Problem, device: Device) -> str | None:
        """What `supports` says where the device's platform and the call's features are among the kernel's."""

    @abc.abstractmethod
    def heuristic(self, problem: Problem, device: Device) -> PrefillPageAttentionConfig:
        """A configuration with every size that the kernel uses."""

    def complete(self, problem: Problem, device: Device, chosen: PrefillPageAttentionConfig) -> PrefillPageAttentionConfig:
        """`chosen` with the heuristic's sizes where it leaves them open.

        A kernel overrides it where something that was chosen calls for other sizes than the heuristic's.
        """
        return chosen.over(self.heuristic(problem, device))

    @abc.abstractmethod
    def candidates(self, problem: Problem, device: Device) -> list[PrefillPageAttentionConfig]:
        """The configurations worth timing, the heuristic one first."""

    def choices(self, problem: Problem, device: Device) -> dict[str, tuple[int, ...]]:
        """Values to try, by name, for sizes that a caller left open, where the heuristic's do not fit those given."""
        return {}

    @abc.abstractmethod
    def misfit(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> str | None:
        """None, or what is wrong with sizes that someone chose: then they do not get to `attend`."""

    def num_splits(self, problem: Problem, device: Device, config: PrefillPageAttentionConfig) -> int | None:
        """How many parts the keys of a tile are cut into, for tile sizes that fit; None from a kernel that cuts none.

        It is worked out for each call, so that the chip is full: no table holds it.
        """
        return None

    def blocks(self, problem: Problem, config: PrefillPageAttentionConfig) -> int | None:
        """How many thread blocks have work, parts of keys counted; None where that does not tell how many cores idle."""
        return None

    @abc.abstractmethod
    def attend(self, call: Call, config: PrefillPageAttentionConfig, device: Device):
        """Returns out [tokens, q_heads, value_dim] in the query's dtype, and lse [tokens, q_heads] in float32.

        A kernel whose softmax leaves out the sinks gives them their part by `call.with_sinks`.
        """
