"""Every way of cutting the operation over a mesh, against the unsharded reference, and what devices exchange for it.

One module computes several head configurations, which tell themselves apart by their sizes: so a collective names the
configuration and the operand that moved. They are every other one, as on a chessboard: each way has each of them with
half of what is given and how it is cut, and the next way with the other half. What is tested is what each device is
given, so a kernel that compiles fast stands in for the product's; sharding_ways_test.py runs those.
"""

import functools
import re
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from paged_prefill import local_paged_prefill_p, ragged_paged_prefill
from paged_prefill.lowering.choose import XLA
from paged_prefill.tests import cases, meshes
from paged_prefill.tests.packs import Pack, exact

HEADS = ((8, 8), (16, 8), (8, 4), (8, 2), (8, 1), (12, 6))  # (query heads, KV heads)
TOKENS, PAGES = (5, 7, 9, 11, 13, 17), (19, 23, 29, 31, 37, 41)  # of each, and no other size in a module
MISALIGNED = (12, 6)
CUTS = {  # (axes of the batch, axes of the heads)
    "heads": (None, "model"),
    "batch": ("data", None),
    "both": ("data", "model"),
    "two_axes_on_heads": (None, ("data", "model")),
}
SIZES = {"data": 2, "model": 4}
GIVEN = ("query", "caches", "out", "all")
WAYS = ("automatic", "gspmd", "explicit", "hint")
KINDS = ((AxisType.Auto, True), (AxisType.Auto, False), (AxisType.Explicit, True))  # and whether shard_map checks types


@functools.cache
def case(heads):
    """The pack of a head configuration, and its results."""
    number = HEADS.index(heads)
    q_heads, kv_heads = heads
    pack = meshes.batched_pack(
        number, q_heads=q_heads, kv_heads=kv_heads, tokens=TOKENS[number], num_pages=PAGES[number]
    )
    return pack, exact(pack)


def cache_axes(kv_heads, axes):
    """As many of the axes, from the first, as divide the KV heads."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    ways, fit = 1, []
    for axis in axes:
        ways *= SIZES[axis]
        if kv_heads % ways:
            break
        fit.append(axis)
    return tuple(fit) or None


def heads_of(cut, given="all"):
    """The configurations that make a case of their own: arrays divide, and caches that alone are given are cut."""
    if cut == "batch":
        return [] if given == "caches" else [(8, 8), (8, 2)]  # heads are whole
    heads = [heads for heads in HEADS if cut != "two_axes_on_heads" or heads != MISALIGNED]
    return [h for h in heads if given != "caches" or cache_axes(h[1], CUTS[cut][1])]


CASES = tuple((given, cut) for given in GIVEN for cut in CUTS if heads_of(cut, given))


def turn(way, given, cut):
    """The configurations of a module of one of the ways."""
    start = WAYS.index(way) + GIVEN.index(given) + list(CUTS).index(cut) // 2
    return [heads for heads in heads_of(cut, given) if (HEADS.index(heads) + start) % 2]


def operand_specs(heads, cut, given):
    batch, axes = CUTS[cut]
    full = meshes.specs(batch, axes, cache_axes(heads[1], axes))
    whole = meshes.specs()
    return {
        "query": whole._replace(query=full.query),
        "caches": whole._replace(key_cache=full.key_cache, value_cache=full.value_cache),
        "out": whole,
        "all": full,
    }[given]


def moved(compiled):
    """The collectives of a module, as a set of (head configuration, operation, what moved)."""
    found = set()
    for op, kind in meshes.collectives(compiled):
        for shape in re.findall(r"\[([\d,]*)\]", kind):
            found.add((*owner([int(size) for size in shape.split(",") if size]), op))
    return found


def owner(shape):
    """The head configuration and the operand that an array belongs to, by sizes that are never cut."""
    for heads, tokens, pages in zip(HEADS, TOKENS, PAGES, strict=True):
        if pages in shape:
            return heads, "cache"
        if tokens in shape:
            return heads, "query" if len(shape) > 3 and 8 in shape[3:] else "result"
    return shape, "unknown"


class GridTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(mock.patch.object(XLA, "attend", meshes.dense_kernel))

    def check(self, call, over, cut, given, configurations, allowed=()):
        """Compiles `call` for these head configurations in one module; compares the results and the collectives."""
        packs = [meshes.put(over, case(h)[0], operand_specs(h, cut, given)) for h in configurations]
        wanted = None
        if given == "out":
            batch, axes = CUTS[cut]
            wanted = [tuple(NamedSharding(over, P(batch, None, axes)) for _ in range(2))] * len(packs)
        jitted = jax.jit(lambda all_packs: [call(*p) for p in all_packs], out_shardings=wanted)
        compiled = jitted.lower(packs).compile()
        for heads, results in zip(configurations, compiled(packs), strict=True):
            with self.subTest(heads=heads):
                meshes.assert_close(results, case(heads)[1])
        self.assertEqual(moved(compiled), {what for what in allowed if what[0] in configurations})

    def misaligned_query(self, cut, given):
        """12 query heads in groups of 2 cannot be cut 4 ways: where they come so cut, they are gathered."""
        if CUTS[cut][1] == "model" and given in ("query", "all"):
            return {(MISALIGNED, "query", "all-gather")}
        return set()

    def untied_result(self, cut, given):
        """Shardy is told that results follow the caches' heads only where those divide by all devices (see rule.py).

        Elsewhere caches that alone are cut, 4 ways or 2, cut the work, but results are promised whole and so gathered.
        """
        axes = CUTS[cut][1]
        if given != "caches" or axes is None:
            return set()
        return {(heads, "result", "all-gather") for heads in heads_of(cut, given) if heads[1] % 8}

    @parameterized.parameters(*CASES)
    def test_automatic_axes(self, given, cut):
        call = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
        allowed = self.misaligned_query(cut, given) | self.untied_result(cut, given)
        self.check(call, meshes.mesh(), cut, given, turn("automatic", given, cut), allowed)

    @parameterized.parameters(*CASES)
    def test_automatic_axes_under_gspmd(self, given, cut):
        call = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
        with meshes.partitioner(shardy=False):
            allowed = self.misaligned_query(cut, given)
            self.check(call, meshes.mesh(), cut, given, turn("gspmd", given, cut), allowed)

    @parameterized.parameters(*(case for case in CASES if case[0] != "out"))  # results follow the operands' types
    def test_explicit_axes(self, given, cut):
        call = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)
        over = meshes.mesh(kind=AxisType.Explicit)
        refused = bool(self.misaligned_query(cut, given))
        configurations = [heads for heads in turn("explicit", given, cut) if not (refused and heads == MISALIGNED)]
        self.check(call, over, cut, given, configurations)
        if refused:  # types may not ask for a move that the program does not show
            pack = meshes.put(over, case(MISALIGNED)[0], operand_specs(MISALIGNED, cut, given))
            with self.assertRaisesRegex(ValueError, "query is cut as .*whole groups"):
                jax.jit(call)(*pack)

    @parameterized.parameters(*CASES)
    def test_hint(self, given, cut):
        batch, axes = CUTS[cut]
        call = functools.partial(
            ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True, batch_axis=batch, head_axis=axes
        )
        configurations = [heads for heads in turn("hint", given, cut) if axes is None or heads != MISALIGNED]
        self.check(call, meshes.mesh(), cut, given, configurations)
        if axes is not None:  # a hint that cannot be followed is not dropped in silence
            pack = meshes.put(meshes.mesh(), case(MISALIGNED)[0], meshes.specs())
            with self.assertRaisesRegex(ValueError, "head_axis=.* cuts into .* 12 query heads over 6 KV heads"):
                jax.jit(call)(*pack)

    @parameterized.product(cut=tuple(CUTS), kind_and_check_vma=KINDS)
    def test_inside_shard_map(self, cut, kind_and_check_vma):
        """The call is local. Where the caches are cut less than the query, the caller says which KV heads are meant."""
        batch, axes = CUTS[cut]
        kind, check_vma = kind_and_check_vma
        over = meshes.mesh(kind=kind)

        def call(heads, *local):
            cut_further = len(axes if isinstance(axes, tuple) else (axes,)) > len(cache_axes(heads[1], axes) or ())
            if axes is None or not cut_further:
                return ragged_paged_prefill(*local, cfg=cases.ONE_HEIGHT, return_lse=True)
            finer = axes[len(cache_axes(heads[1], axes) or ()) :] if isinstance(axes, tuple) else axes
            group, part = heads[0] // heads[1], local[0].shape[-2]
            start = jnp.int32(lax.axis_index(finer) * part // group)
            count = max(1, part // group)
            return tuple(local_paged_prefill_p.bind(*local, start, num_kv_heads=count, config=cases.ONE_HEIGHT))

        start = (list(CUTS).index(cut) + KINDS.index(kind_and_check_vma)) % 2
        configurations = [heads for heads in heads_of(cut) if heads != MISALIGNED][start::2]
        packs, mapped = [], []
        for heads in configurations:
            specs = operand_specs(heads, cut, "all")
            packs.append(meshes.put(over, case(heads)[0], specs))
            mapped.append(
                jax.shard_map(
                    functools.partial(call, heads), mesh=over, in_specs=tuple(specs),
                    out_specs=(P(batch, None, axes), P(batch, None, axes)), check_vma=check_vma,
                )  # fmt: skip
            )
        jitted = jax.jit(lambda all_packs: [f(*p) for f, p in zip(mapped, all_packs)])
        compiled = jitted.lower(packs).compile()
        for heads, results in zip(configurations, compiled(packs), strict=True):
            with self.subTest(heads=heads):
                meshes.assert_close(results, case(heads)[1])
        self.assertEmpty(meshes.collectives(compiled))

    def test_misaligned_heads_inside_shard_map_are_refused(self):
        over = meshes.mesh()
        pack = case(MISALIGNED)[0]
        call = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT)
        cut = meshes.specs(None, "model")
        mapped = jax.shard_map(call, mesh=over, in_specs=tuple(cut), out_specs=cut.query)
        with self.assertRaisesRegex(ValueError, "query must have a multiple of key_cache's 6 KV heads, got 3"):
            mapped(*Pack(*pack))


if __name__ == "__main__":
    absltest.main()
