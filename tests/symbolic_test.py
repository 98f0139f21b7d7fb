"""Sizes that jax.export leaves open: any of them, alone and together, in every public function, right at two sizes."""

import functools

from absl.testing import absltest, parameterized
import chex
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh
import numpy as np

from paged_prefill import append_to_pages, merge, prefill_page_attention, ragged_paged_prefill
from paged_prefill.tests import cases, oracle, packs

# The second number of sequences is more than GPU kernels write their schedules out for.
SMALL = dict(batch=2, tokens=24, seqs=3, columns=4, pages=32)
LARGE = dict(batch=3, tokens=33, seqs=11, columns=6, pages=50)
CHOICES = [(name,) for name in SMALL] + [tuple(SMALL)]
LAYERS, KV_HEADS, HEADS, PAGE_SIZE, FEATURES = 2, 2, 4, 4, 8

# Shapes by name: of the attention, of what append writes, and of one sequence's attention.
CACHE = ("kv_heads", "pages", "page_size", "features")
INDICES = dict(context_lens=("batch", "seqs"), page_indices=("batch", "seqs", "columns"), query_offsets=("batch", "seqs + 1"))
ATTENTION = dict(query=("batch", "tokens", "heads", "features"), key_cache=CACHE, value_cache=CACHE) | INDICES
NEW = dict.fromkeys(("key", "value"), ("batch", "tokens", "kv_heads", "features"))
APPEND = dict(key_cache=CACHE, value_cache=CACHE) | NEW | INDICES
ONE = dict(query=("tokens", "heads", "features"), key_cache=CACHE, value_cache=CACHE, context_len=("1",), page_indices=("columns",))
PARTIAL = dict(out_a=ATTENTION["query"], lse_a=ATTENTION["query"][:-1], out_b=ATTENTION["query"], lse_b=ATTENTION["query"][:-1])
# Everything that a call may have besides.
LAYERED = dict.fromkeys(("key_cache", "value_cache"), ("layers", *CACHE)) | dict(layer=("batch",))
SCALES = dict.fromkeys(("key_scale", "value_scale"), ("layers", *CACHE[:-1]))
ALL_OPERANDS = ATTENTION | LAYERED | SCALES | dict(
    key_ranges=("batch", "tokens", "2"), tree_mask=("batch", "tokens", "1"), sinks=("batch", "heads")
)
DTYPES = dict(context_len="int32", layer="int32", key_ranges="int32", tree_mask="uint32") | dict.fromkeys(INDICES, "int32")


def sizes_of(call):
    """All sizes of a call by name, and numbers by themselves."""
    fixed = dict(layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, page_size=PAGE_SIZE, features=FEATURES)
    return call | fixed | {"seqs + 1": call["seqs"] + 1} | {str(n): n for n in (1, 2)}


def arrays(shapes, call, cache_dtype=None):
    """Operands of these shapes: each pack of the batch has chunks at the same places, and pages of its own."""
    rng, sizes = np.random.default_rng(0), sizes_of(call)
    lengths, context_lens = zip((1, 7), (9, 12), (5, 5), *[(1, 3)] * (call["seqs"] - 3))
    pages = np.full((call["batch"], call["seqs"], call["columns"]), -1)
    free = iter(rng.permutation(call["pages"]))
    for pack, seq in np.ndindex(pages.shape[:2]):
        for column in range(-(-context_lens[seq] // PAGE_SIZE)):
            pages[pack, seq, column] = next(free)
    known = dict(
        context_lens=np.tile(context_lens, (call["batch"], 1)),
        page_indices=pages,
        query_offsets=np.tile(np.cumsum([0, *lengths]), (call["batch"], 1)),
        context_len=[3 * PAGE_SIZE],
        layer=np.arange(call["batch"]) % LAYERS,
    )

    def array(name):
        shape = tuple(sizes[dim] for dim in shapes[name])
        dtype = cache_dtype if cache_dtype and name.endswith("_cache") else DTYPES.get(name, "float32")
        if name == "page_indices" and len(shape) == 1:
            return jnp.asarray(pages[0, 1], dtype)
        if name in known:
            return jnp.asarray(known[name], dtype)
        if name == "key_ranges":
            return jnp.asarray(rng.integers(0, 12, shape), dtype)
        if name == "tree_mask":
            return jnp.asarray(rng.integers(0, 2**32, shape), dtype)
        values = rng.random(shape) + 0.5 if name.endswith("scale") else rng.standard_normal(shape)
        return jnp.asarray(values * (20 if dtype == "int8" else 1), dtype)

    return {name: array(name) for name in shapes}


def exported(function, shapes, given, symbolic, **options):
    """The function for operands as `given`, exported with variables for the sizes of these names."""
    scope, sizes = export.SymbolicScope(), sizes_of(SMALL)
    open_sizes = {*symbolic} | ({"seqs + 1"} if "seqs" in symbolic else set())

    def of_type(name):
        form = ", ".join(dim if dim in open_sizes else str(sizes[dim]) for dim in shapes[name])
        return jax.ShapeDtypeStruct(export.symbolic_shape(f"({form},)", scope=scope), given[name].dtype)

    return export.export(jax.jit(function), **options)(**{name: of_type(name) for name in given})


def two_calls(shapes, symbolic, **options):
    """Operands of two calls that differ in these sizes."""
    larger = SMALL | {name: LARGE[name] for name in symbolic}
    return [arrays(shapes, call, **options) for call in (SMALL, larger)]


def attend(*, cfg=cases.SMALL_TILES, **operands):
    return ragged_paged_prefill(**operands, return_lse=True, cfg=cfg)


def attend_one(*, cfg=cases.SMALL_TILES, **operands):
    return prefill_page_attention(*(operands[name] for name in ONE), cfg=cfg)


def sized(function, symbolic):
    """`function` with tiles of one height, half of the program, but where the tokens are open, which heights follow."""
    return function if "tokens" in symbolic else functools.partial(function, cfg=cases.ONE_HEIGHT)


def of_any_size(function, shapes, symbolic, **options):
    """Pairs of the operands of two calls and what one exported function gives for them."""
    calls = two_calls(shapes, symbolic, **options)
    function = export.deserialize(exported(function, shapes, calls[0], symbolic).serialize())
    return [(given, function.call(**given)) for given in calls]


class SymbolicTest(parameterized.TestCase):
    def check(self, function, shapes, symbolic, **options):
        """Exports a function and holds it to what it gives for sizes that are numbers."""
        for given, results in of_any_size(function, shapes, symbolic, **options):
            chex.assert_trees_all_close(tuple(results), tuple(jax.jit(function)(**given)), rtol=1e-6, atol=1e-6)

    def check_attention(self, shapes, symbolic, **options):
        for given, results in of_any_size(sized(attend, symbolic), shapes, symbolic, **options):
            oracle.assert_matches(given, *results)

    @parameterized.parameters(*CHOICES)
    def test_ragged_paged_prefill(self, *symbolic):
        self.check_attention(ATTENTION, symbolic)

    @parameterized.parameters(
        ("features", "head_dim"), ("page_size", "page_size"), ("heads", "q_heads"), ("kv_heads", "kv_heads")
    )
    def test_a_size_that_must_be_a_number_is_named(self, symbolic, name):
        message = f"{name} must be a number, got {symbolic}: under jax.export"
        with self.assertRaisesRegex(ValueError, message):
            exported(attend, ATTENTION, arrays(ATTENTION, SMALL), (symbolic,))

    @parameterized.parameters("tokens", "columns", "pages", ("tokens", "columns", "pages"))
    def test_prefill_page_attention(self, *symbolic):
        for given, out in of_any_size(sized(attend_one, symbolic), ONE, symbolic):
            query, *caches, context_len, pages = (given[name] for name in ONE)
            pack = packs.Pack(query, *caches, context_len, pages[None], np.asarray([0, len(query)]))
            packs.assert_matches_reference(pack, out)

    @parameterized.parameters(*CHOICES)
    def test_append_to_pages(self, *symbolic):
        self.check(append_to_pages, APPEND, symbolic)

    @parameterized.parameters("batch", "tokens", ("batch", "tokens"))
    def test_merge(self, *symbolic):
        self.check(merge, PARTIAL, symbolic)

    def test_every_operand(self):
        self.check_attention(ALL_OPERANDS, tuple(SMALL), cache_dtype="int8")
        self.check(append_to_pages, APPEND | LAYERED | SCALES, tuple(SMALL), cache_dtype="int8")

    def test_with_x64_on(self):
        with jax.enable_x64(True):
            self.check_attention(ATTENTION, tuple(SMALL))
            self.check(append_to_pages, APPEND, tuple(SMALL))

    @parameterized.product(device=(("tpu", "TPU v5 lite"), ("cuda", "NVIDIA H200")), name=(*SMALL, "all"))
    def test_other_devices_take_xla(self, device, name):
        platform, kind = device
        symbolic = tuple(SMALL) if name == "all" else (name,)
        given = arrays(ATTENTION, SMALL)
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, platform))):
            module = exported(attend, ATTENTION, given, symbolic, platforms=(platform,)).mlir_module()
        self.assertNotRegex(module, "tpu_custom_call|mosaic|triton")


if __name__ == "__main__":
    absltest.main()
