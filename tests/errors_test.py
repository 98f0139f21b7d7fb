"""Every error a caller can see names the argument, what it got, and what it takes."""

import functools
from unittest import mock

from absl import logging
from absl.testing import absltest, parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import (
    PrefillPageAttention,
    PrefillPageAttentionConfig,
    append_to_pages,
    append_to_pages_p,
    create_shard_map_wrapper,
    local_append_to_pages_p,
    local_paged_prefill_p,
    merge,
    paged_prefill_p,
    prefill_page_attention,
    ragged_paged_prefill,
    validate,
)
from paged_prefill.lowering.call import Device
from paged_prefill.lowering.choose import KERNELS, choose
from paged_prefill.tests import cases
from paged_prefill.tests.problems import problem

OPERANDS = dict(
    query=jax.ShapeDtypeStruct((10, 4, 16), jnp.float32),
    key_cache=jax.ShapeDtypeStruct((2, 9, 8, 16), jnp.float32),
    value_cache=jax.ShapeDtypeStruct((2, 9, 8, 24), jnp.float32),
    context_lens=jax.ShapeDtypeStruct((3,), jnp.int32),
    page_indices=jax.ShapeDtypeStruct((3, 5), jnp.int32),
    query_offsets=jax.ShapeDtypeStruct((4,), jnp.int32),
)

# (name, operand, shape or dtype, error, what the message says: the operand, what it takes, what it got)
OPERAND_ERRORS = [
    ("query_rank", "query", (4, 16), ValueError, r"query must have shape \[\.\.\., tokens, q_heads, head_dim\], got \(4, 16\)"),
    ("query_dtype", "query", "int8", TypeError, r"query must be one of float32, bfloat16, float16, got int8"),
    ("query_float64", "query", "float64", TypeError, r"query must be one of float32, bfloat16, float16, got float64"),
    ("query_heads", "query", (10, 5, 16), ValueError, r"query must have a multiple of key_cache's 2 KV heads, got 5 query heads"),
    ("query_no_heads", "query", (10, 0, 16), ValueError, r"query must have at least one head and one feature, got \(10, 0, 16\)"),
    ("key_cache_rank", "key_cache", (9, 8, 16), ValueError,
     r"key_cache must have shape \[kv_heads, num_pages, page_size, head_dim.*\], got \(9, 8, 16\)"),
    ("key_cache_head_dim", "key_cache", (2, 9, 8, 17), ValueError,
     r"key_cache must have shape \[kv_heads, num_pages, page_size, head_dim = 16\], got \(2, 9, 8, 17\): head_dim is query's$"),
    ("key_cache_dtype", "key_cache", "bfloat16", TypeError, r"key_cache must have query's dtype float32 or a quantised one .*, got bfloat16: cast query"),
    ("key_cache_no_heads", "key_cache", (0, 9, 8, 16), ValueError,
     r"key_cache must have at least one of kv_heads, got \(0, 9, 8, 16\)"),
    ("key_cache_no_slots", "key_cache", (2, 9, 0, 16), ValueError, r"key_cache must have at least one of page_size, got"),
    ("query_no_features", "query", (10, 4, 0), ValueError, r"query must have at least one head and one feature, got \(10, 4, 0\)"),
    ("query_scalar", "query", (), ValueError, r"query must have shape \[\.\.\., tokens, q_heads, head_dim\], got \(\)"),
    ("key_cache_too_many", "key_cache", (1, 2, 9, 8, 16), ValueError,
     r"key_cache must have shape \[kv_heads, num_pages, page_size, head_dim.*\], got \(1, 2, 9, 8, 16\)"),
    ("value_cache_rank", "value_cache", (1, 2, 9, 8, 24), ValueError,
     r"value_cache must have shape \[kv_heads = 2, num_pages = 9, page_size = 8, value_dim\], got \(1, 2, 9, 8, 24\)"),
    ("value_cache_pages", "value_cache", (2, 8, 8, 24), ValueError,
     r"value_cache must have shape \[kv_heads = 2, num_pages = 9, page_size = 8, value_dim\], got \(2, 8, 8, 24\): num_pages is key_cache's$"),
    ("value_cache_heads", "value_cache", (4, 9, 8, 24), ValueError, r"value_cache must have shape \[kv_heads = 2"),
    ("value_cache_slots", "value_cache", (3, 9, 4, 24), ValueError, r"\(3, 9, 4, 24\): kv_heads is key_cache's, page_size is key_cache's$"),
    ("value_cache_no_features", "value_cache", (2, 9, 8, 0), ValueError,
     r"value_cache must have at least one of value_dim, got \(2, 9, 8, 0\)"),
    ("value_cache_dtype", "value_cache", "float16", TypeError, r"value_cache must have key_cache's dtype float32, got float16"),
    ("context_lens_rank", "context_lens", (), ValueError, r"context_lens must have shape \[seqs\], got \(\)"),
    ("context_lens_2d", "context_lens", (3, 1), ValueError, r"context_lens must have shape \[seqs\], got \(3, 1\)"),
    ("page_indices_rank", "page_indices", (5,), ValueError, r"page_indices must have shape \[seqs = 3, pages_per_seq\], got \(5,\)"),
    ("page_indices_seqs", "page_indices", (2, 5), ValueError, r"page_indices must have shape \[seqs = 3, pages_per_seq\], got \(2, 5\)"),
    ("query_offsets_length", "query_offsets", (3,), ValueError, r"query_offsets must have shape \[seqs \+ 1 = 4\], got \(3,\)"),
]
FLOAT_INDICES = [
    (name, name, "float32", TypeError, rf"{name} must be an array of integers, got float32")
    for name in ("context_lens", "page_indices", "query_offsets")
]
NARROW_INDICES = [
    (name, name, "int16", TypeError, rf"{name} must be int32, got int16")
    for name in ("context_lens", "page_indices", "query_offsets")
]


INDICES = dict(
    context_lens=[12, 40, 3],
    page_indices=[[3, 1, -1, -1, -1], [0, 8, 7, 6, 5], [2, 99, 99, 99, 99]],
    query_offsets=[0, 4, 5, 8],
)


def operands(**changes):
    """The abstract operands, in order, some with another shape (a tuple) or dtype (a name)."""
    changed = dict(OPERANDS)
    for name, change in changes.items():
        old = OPERANDS[name]
        shape, dtype = (old.shape, change) if isinstance(change, str) else (change, old.dtype)
        changed[name] = jax.ShapeDtypeStruct(shape, dtype)
    return list(changed.values())


class OperandErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(OPERAND_ERRORS + NARROW_INDICES)
    def test_bind(self, operand, change, error, message):
        with jax.enable_x64(True), self.assertRaisesRegex(error, message):
            jax.eval_shape(paged_prefill_p.bind, *operands(**{operand: change}))

    @parameterized.named_parameters(OPERAND_ERRORS + FLOAT_INDICES)
    def test_ragged_paged_prefill(self, operand, change, error, message):
        with jax.enable_x64(True), self.assertRaisesRegex(error, message):
            jax.eval_shape(ragged_paged_prefill, *operands(**{operand: change}))

    @parameterized.named_parameters(OPERAND_ERRORS + FLOAT_INDICES)
    def test_validate(self, operand, change, error, message):
        arrays = [np.zeros(x.shape, x.dtype) for x in operands(**{operand: change})]
        with self.assertRaisesRegex(error, message):
            validate(*arrays)

    @parameterized.parameters("query", "key_cache", "value_cache", "key_ranges", "tree_mask", "sinks", "key_scale", "layer")
    def test_bind_what_is_no_array(self, name):
        named = OPERANDS | {name: [[1.0]]}
        with self.assertRaisesRegex(TypeError, rf"{name} must be an array, got \[\[1\.0\]\]"):
            paged_prefill_p.bind(**named)

    @parameterized.parameters("value_cache", "tree_mask")
    def test_ragged_paged_prefill_of_what_is_no_array(self, name):
        others = {other: x for other, x in OPERANDS.items() if other != name}
        with self.assertRaisesRegex(TypeError, rf"{name} must be an array, got \[\[1\.0\]\]"):
            jax.eval_shape(functools.partial(ragged_paged_prefill, **{name: [[1.0]]}), **others)

    @parameterized.product(name=("query", "key_cache", "value_cache", "tree_mask"), array=(np.array(["a"]), np.array([None])))
    def test_arrays_of_what_jax_has_no_dtype_for(self, name, array):
        call = OPERANDS | {n: np.int32(x) for n, x in INDICES.items()} | {name: array.reshape(1, 1, 1, 1)}
        message = rf"{name} must be an array of numbers, got (str|object)"
        for bind in (ragged_paged_prefill, paged_prefill_p.bind):
            with self.assertRaisesRegex(TypeError, message):
                bind(**call)
        call = OPERANDS | {name: array}
        if name != "tree_mask":
            with self.assertRaisesRegex(TypeError, message):
                prefill_page_attention(*(call[name] for name in ("query", "key_cache", "value_cache")), [9], [0, 1])

    def test_a_number_stands_for_an_array_of_rank_0_alone(self):
        with self.assertRaisesRegex(TypeError, r"tree_mask must be an array, got 3"):
            jax.eval_shape(functools.partial(paged_prefill_p.bind, tree_mask=3), *operands())

    def test_messages_show_no_whole_array(self):
        cache = np.zeros((2, 9, 8, 16)).tolist()
        for call in (
            lambda: ragged_paged_prefill(**OPERANDS | dict(key_cache=cache)),
            lambda: ragged_paged_prefill(**OPERANDS | dict(context_lens=cache[0][:1] + [None])),
            lambda: jax.eval_shape(functools.partial(ragged_paged_prefill, softmax_scale=np.array(cache)), *operands()),
            lambda: jax.eval_shape(functools.partial(ragged_paged_prefill, sliding_window=np.array(cache)), *operands()),
        ):
            with self.assertRaisesRegex((TypeError, ValueError), r"^[^\n]{,160}$"):
                call()

    def test_shapes_alone_where_arrays_are_wanted(self):
        with self.assertRaisesRegex(TypeError, r"context_lens must be an array of integers, got ShapeDtypeStruct"):
            ragged_paged_prefill(**OPERANDS)

    @parameterized.parameters("key_cache", "value_cache", "key", "value")
    def test_append_to_pages_of_what_is_no_array(self, name):
        cache, new = jnp.zeros((2, 3, 4, 8)), jnp.zeros((5, 2, 8))
        named = dict(key_cache=cache, value_cache=cache, key=new, value=new) | {name: [[1.0]]}
        with self.assertRaisesRegex(TypeError, rf"{name} must be an array, got \[\[1\.0\]\]"):
            append_to_pages(**named, context_lens=[5], page_indices=[[0, 1]], query_offsets=[0, 5])

    def test_bind_cache_batch_dims(self):
        for dims in (-1, 1):
            message = r"cache_batch_dims must be between 0 and the number of query's batch dimensions \(0.*got " + str(dims)
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(lambda *p: paged_prefill_p.bind(*p, cache_batch_dims=dims), *operands())

    def test_bind_batched_shapes_name_their_batch(self):
        batched = [jax.ShapeDtypeStruct((7, *x.shape), x.dtype) for x in operands()]
        batched[1] = jax.ShapeDtypeStruct((6, *batched[1].shape[1:]), jnp.float32)
        message = r"key_cache must have shape \[7, kv_heads, num_pages, page_size, head_dim = 16\], got \(6, 2, 9, 8, 16\)"
        with self.assertRaisesRegex(ValueError, message):
            jax.eval_shape(lambda *p: paged_prefill_p.bind(*p, cache_batch_dims=1), *batched)

    def test_local_bind(self):
        def call(*p, **kw):
            return jax.eval_shape(lambda *p: local_paged_prefill_p.bind(*p, num_kv_heads=2, **kw), *p)

        with self.assertRaisesRegex(ValueError, r"kv_head_start must have shape \[\], got \(1,\)"):
            call(*operands(), jax.ShapeDtypeStruct((1,), jnp.int32))
        with self.assertRaisesRegex(TypeError, "kv_head_start must be int32, got float32"):
            call(*operands(), jax.ShapeDtypeStruct((), jnp.float32))
        start = jax.ShapeDtypeStruct((), jnp.int32)
        with self.assertRaisesRegex(ValueError, r"query must have a multiple of key_cache's 2 KV heads, got 3"):
            call(*operands(query=(10, 3, 16)), start)
        for number, error, message in (
            (0, ValueError, "num_kv_heads must be at least 1, got 0"),
            (3, ValueError, "num_kv_heads must be at most key_cache's 2 KV heads, got 3"),
            (True, TypeError, "num_kv_heads must be an integer, got True"),
        ):
            with self.assertRaisesRegex(error, message):
                jax.eval_shape(lambda *p: local_paged_prefill_p.bind(*p, num_kv_heads=number), *operands(), start)

    @parameterized.named_parameters(
        ("pages_slots_heads", (64, 16, 2, 128), -2, r"\[num_pages, page_size, kv_heads, head_dim\]"),
        ("pages_heads_slots", (64, 2, 16, 128), -3, r"\[num_pages, kv_heads, page_size, head_dim\]"),
        ("of_layers", (3, 64, 16, 1, 128), -2, r"\[num_pages, page_size, kv_heads, head_dim\]"),
    )
    def test_caches_laid_out_as_peers_do(self, shape, dim, layout):
        """The error says which layout is wanted and which this looks like, and that one the calls take."""
        layer = dict(layer=0) if len(shape) == 5 else {}
        cache, query, key = jnp.zeros(shape), jnp.zeros((10, 8, 128)), jnp.zeros((10, shape[dim], 128))
        pack = [jnp.array([10]), jnp.zeros((1, 5), jnp.int32), jnp.array([0, 10])]
        name = {-2: "pskd", -3: "pksd"}[dim]
        wanted = rf"key_cache is laid out as \[kv_heads, num_pages, page_size, head_dim\], and \[{', '.join(map(str, shape[-4:]))}\]"
        message = rf"{wanted} looks like {layout}, which ragged_paged_prefill and append_to_pages take by cache_layout='{name}'$"
        calls = [
            lambda cache, **layout: ragged_paged_prefill(query, cache, cache, *pack, **layer, **layout),
            lambda cache, **layout: append_to_pages(cache, cache, key, key, *pack, **layer, **layout),
        ]
        for call in calls:
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(call, cache)
            jax.eval_shape(functools.partial(call, cache_layout=name), cache)
        if not layer:
            with self.assertRaisesRegex(ValueError, message):
                jax.eval_shape(prefill_page_attention, query, cache, cache, pack[0], pack[1][0])

    def test_a_layout_that_fits_two_ways_is_said_so(self):
        cache = jnp.zeros((64, 4, 2, 128))
        call = jnp.zeros((10, 8, 128)), cache, cache, jnp.array([10]), jnp.zeros((1, 5), jnp.int32), jnp.array([0, 10])
        with self.assertRaisesRegex(ValueError, r"looks like \[num_pages, page_size, .*\] or \[num_pages, kv_heads, "):
            jax.eval_shape(ragged_paged_prefill, *call)

    def test_a_query_in_another_float_dtype_is_told_how_to_cast(self):
        changed = operands(key_cache="bfloat16", value_cache="bfloat16")
        message = r"got bfloat16: cast query with query\.astype\(key_cache\.dtype\)$"
        for call in (ragged_paged_prefill, paged_prefill_p.bind):
            with self.assertRaisesRegex(TypeError, message):
                jax.eval_shape(call, *changed)
        one = [*changed[:3], jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.int32)]
        with self.assertRaisesRegex(TypeError, message):
            jax.eval_shape(prefill_page_attention, *one)
        jax.eval_shape(lambda query, *others: ragged_paged_prefill(query.astype(others[0].dtype), *others), *changed)

    def test_caches_of_two_float_dtypes_are_not_told_to_cast_the_query(self):
        with self.assertRaisesRegex(TypeError, r"value_cache must have key_cache's dtype float32, got float16$"):
            jax.eval_shape(ragged_paged_prefill, *operands(value_cache="float16"))

    def test_wrong_calls_fail_before_anything_runs(self):
        with self.assertRaisesRegex(ValueError, "query must have a multiple"):
            jax.jit(ragged_paged_prefill).lower(*operands(query=(10, 5, 16)))


PARAMETER_ERRORS = [
    ("scale_nan", dict(softmax_scale=float("nan")), ValueError, r"softmax_scale must be finite, got nan"),
    ("scale_inf", dict(softmax_scale=float("inf")), ValueError, r"softmax_scale must be finite, got inf"),
    ("scale_text", dict(softmax_scale="big"), TypeError, r"softmax_scale must be a number, got 'big'"),
    ("scale_past_float32", dict(softmax_scale=1e39), ValueError, r"softmax_scale must be at most 1\.33e\+36 in magnitude.*got 1e\+39"),
    ("scale_past_float64", dict(softmax_scale=10**400), ValueError, r"softmax_scale must be finite, got inf"),
    ("scale_true", dict(softmax_scale=True), TypeError, r"softmax_scale must be a number, got True"),
    ("scale_numpy_true", dict(softmax_scale=np.bool_(True)), TypeError, r"softmax_scale must be a number, got .*True"),
    ("scale_digits", dict(softmax_scale="0.5"), TypeError, r"softmax_scale must be a number, got '0\.5'"),
    ("scale_array", dict(softmax_scale=np.ones(1)), TypeError, r"softmax_scale must be a number, got array"),
    ("scale_complex", dict(softmax_scale=1j), TypeError, r"softmax_scale must be a number, got 1j"),
    ("cap_past_float32", dict(attn_logits_soft_cap=1e39), ValueError, r"attn_logits_soft_cap must be between .*got 1e\+39"),
    ("cap_below_float32", dict(attn_logits_soft_cap=1e-39), ValueError, r"attn_logits_soft_cap must be between .*got 1e-39"),
    ("cap_true", dict(attn_logits_soft_cap=True), TypeError, r"attn_logits_soft_cap must be a number, got True"),
    ("cap_zero", dict(attn_logits_soft_cap=0.0), ValueError,
     r"attn_logits_soft_cap must be a positive finite number or None, got 0\.0"),
    ("cap_negative", dict(attn_logits_soft_cap=-30), ValueError, r"attn_logits_soft_cap must be a positive .*got -30"),
    ("cap_inf", dict(attn_logits_soft_cap=float("inf")), ValueError, r"attn_logits_soft_cap must be a positive .*got inf"),
    ("cap_nan", dict(attn_logits_soft_cap=float("nan")), ValueError, r"attn_logits_soft_cap must be a positive .*got nan"),
    ("cap_text", dict(attn_logits_soft_cap=[1, 2]), TypeError, r"attn_logits_soft_cap must be a number, got \[1, 2\]"),
    ("window_zero", dict(sliding_window=0), ValueError, r"sliding_window must be at least 1 .*or None, got 0"),
    ("window_negative", dict(sliding_window=-1), ValueError, r"sliding_window must be at least 1 .*got -1"),
    ("window_float", dict(sliding_window=4.0), TypeError, r"sliding_window must be an integer or None, got 4\.0"),
    ("window_bool", dict(sliding_window=True), TypeError, r"sliding_window must be an integer or None, got True"),
    ("window_pair", dict(sliding_window=(4, 0)), TypeError, r"sliding_window must be an integer or None, got \(4, 0\)"),
    ("platform_array", dict(platform=np.zeros(2)), ValueError, r"platform must be one of auto, .*, got array\(\[0\., 0\.\]\)"),
    ("platform_unknown", dict(platform="gpu"), ValueError,
     r"platform must be one of auto, xla, triton, pallas, cuda, got 'gpu'"),
]
PUBLIC_PARAMETER_ERRORS = PARAMETER_ERRORS + [
    ("mask_value_too_large", dict(mask_value=-1e4), ValueError,
     r"mask_value must be at most -1e\+09, or it could not mask a key, got -10000\.0"),
    ("mask_value_nan", dict(mask_value=float("nan")), ValueError, r"mask_value must be at most .*got nan"),
    ("mask_value_none", dict(mask_value=None), TypeError, r"mask_value must be a number, got None"),
    ("cfg_type", dict(cfg={"block_q": 64}), TypeError,
     r"cfg must be a PrefillPageAttentionConfig or None, got \{'block_q': 64\}"),
    # A parameter given twice is never silently ignored (sglang#33915).
    ("platform_twice", dict(platform="xla", cfg=PrefillPageAttentionConfig(platform="triton")), ValueError,
     r"platform='xla' and cfg\.platform='triton' ask for different kernels"),
]


VALUE_DIM_ERRORS = [
    ("value_dim_list", dict(value_dim=[16]), TypeError, r"value_dim must be an integer or None, got \[16\]"),
    ("value_dim_array", dict(value_dim=np.ones(1)), TypeError, r"value_dim must be an integer or None, got array"),
]
BIND_ERRORS = PARAMETER_ERRORS + VALUE_DIM_ERRORS + [
    ("cache_batch_dims_float", dict(cache_batch_dims=1.0), TypeError, r"cache_batch_dims must be an integer, got 1\.0"),
    ("hint_text", dict(hint="data"), TypeError, r"hint must be a Hint .* or None, got 'data'"),
    ("hint_list", dict(hint=["data"]), TypeError, r"hint must be a Hint .* or None, got \['data'\]"),
]
RAGGED_ERRORS = PUBLIC_PARAMETER_ERRORS + VALUE_DIM_ERRORS + [
    ("return_lse_number", dict(return_lse=1), TypeError, r"return_lse must be True or False, got 1"),
    ("return_lse_array", dict(return_lse=np.zeros(2)), TypeError, r"return_lse must be True or False, got array"),
]


class ParameterErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(BIND_ERRORS)
    def test_bind(self, parameters, error, message):
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *p: paged_prefill_p.bind(*p, **parameters), *operands())

    @parameterized.parameters(dict(cache_batch_dims=1.0), dict(hint="data"))
    def test_bind_append(self, **parameters):
        new = jax.ShapeDtypeStruct((10, 2, 16), jnp.float32)
        _, keys, _, *pack = operands()
        (name,) = parameters
        with self.assertRaisesRegex(TypeError, rf"{name} must be .*, got {next(iter(parameters.values()))!r}"):
            jax.eval_shape(functools.partial(append_to_pages_p.bind, **parameters), keys, keys, new, new, *pack)

    @parameterized.named_parameters(RAGGED_ERRORS)
    def test_ragged_paged_prefill(self, parameters, error, message):
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *p: ragged_paged_prefill(*p, **parameters), *operands())

    @parameterized.named_parameters(PUBLIC_PARAMETER_ERRORS)
    def test_prefill_page_attention(self, parameters, error, message):
        query, keys, values, *_ = operands()
        indices = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.int32)
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(lambda *p: prefill_page_attention(*p, **parameters), query, keys, values, *indices)

    @parameterized.parameters("softmax_scale", "attn_logits_soft_cap", "mask_value", "sliding_window", "return_lse", "value_dim")
    def test_a_traced_parameter(self, name):
        def call(value, *p):
            return ragged_paged_prefill(*p, **{name: value})

        takes = "an integer or None|True or False"
        message = rf"{name} (is a static parameter and must be a Python number|must be ({takes})), got"
        with self.assertRaisesRegex(TypeError, message):
            jax.eval_shape(call, jax.ShapeDtypeStruct((), jnp.float32), *operands())

    @parameterized.product(
        field=("block_q", "block_kv", "num_warps", "num_stages", "num_splits"), value=(0, -1, 1.5, True, "64")
    )
    def test_config_sizes(self, field, value):
        with self.assertRaisesRegex(ValueError, rf"cfg\.{field} must be a positive integer or None, got {value!r}"):
            PrefillPageAttentionConfig(**{field: value})

    @parameterized.parameters("block_q", "block_kv")
    def test_config_sizes_past_what_int32_counts(self, field):
        with self.assertRaisesRegex(ValueError, rf"cfg\.{field} must be at most 1073741824, got 1099511627776"):
            PrefillPageAttentionConfig(**{field: 2**40})

    def test_numbers_of_numpy_are_numbers(self):
        parameters = dict(softmax_scale=np.float32(0.5), attn_logits_soft_cap=np.int64(30), sliding_window=np.int32(7))
        jaxpr = jax.make_jaxpr(lambda *p: paged_prefill_p.bind(*p, **parameters))(*operands())
        params = jaxpr.eqns[0].params
        for name, kind in (("softmax_scale", float), ("attn_logits_soft_cap", float), ("sliding_window", int)):
            self.assertIs(type(getattr(params["attention"], name)), kind)

    @parameterized.parameters(
        (paged_prefill_p, "return_lse", "softmax_scale, .*, hint"),
        (local_paged_prefill_p, "hint", "softmax_scale, .*, num_kv_heads"),
        (append_to_pages_p, "platform", "cache_batch_dims, cache_layout, hint"),
        (local_append_to_pages_p, "hint", "cache_batch_dims, cache_layout"),
    )
    def test_bind_a_parameter_that_there_is_not(self, primitive, name, there_are):
        message = f"^{primitive.name} has no operand or parameter {name}; its parameters are {there_are}$"
        with self.assertRaisesRegex(TypeError, message):
            primitive.bind(**{name: None})

    def test_bind_config(self):
        with self.assertRaisesRegex(TypeError, r"config must be a PrefillPageAttentionConfig or None, got 64"):
            jax.eval_shape(lambda *p: paged_prefill_p.bind(*p, config=64), *operands())


class PrefillPageAttentionErrorsTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("query", 0, (10, 4, 16, 1), r"query must have shape \[chunk, q_heads, head_dim\], got \(10, 4, 16, 1\)"),
        ("key_cache", 1, (2, 9, 16), r"key_cache must have shape \[kv_heads, num_pages, page_size, head_dim\], got \(2, 9, 16\)"),
        ("value_cache", 2, (2, 9, 16), r"value_cache must have shape .*got \(2, 9, 16\)"),
        ("context_len", 3, (2,), r"context_len must have shape \[1\] or be a scalar, got \(2,\)"),
        ("page_indices", 4, (1, 5), r"page_indices must have shape \[pages_per_seq\], got \(1, 5\)"),
    )
    def test_shapes(self, position, shape, message):
        arrays = [*operands()[:3], jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.int32)]
        arrays[position] = jax.ShapeDtypeStruct(shape, arrays[position].dtype)
        with self.assertRaisesRegex(ValueError, message):
            jax.eval_shape(prefill_page_attention, *arrays)

    @parameterized.parameters(*enumerate(("query", "key_cache", "value_cache")))
    def test_what_is_no_array(self, position, name):
        arrays = [np.zeros(x.shape, x.dtype) for x in operands()[:3]] + [[9], [0, 1]]
        arrays[position] = arrays[position].tolist()
        mesh = jax.make_mesh((1,), ("model",))
        wrapper = functools.partial(create_shard_map_wrapper, mesh=mesh, in_specs=(jax.P(),) * 5, out_specs=jax.P())
        for call in (prefill_page_attention, PrefillPageAttention().run, wrapper):
            with self.assertRaisesRegex(TypeError, rf"^{name} must be an array, got \[\[.{{,90}}$"):
                call(*arrays)

    @parameterized.named_parameters(("context_len", 3), ("page_indices", 4))
    def test_floats_for_indices(self, position):
        arrays = [*operands()[:3], jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.int32)]
        arrays[position] = jax.ShapeDtypeStruct(arrays[position].shape, jnp.float32)
        name = ("context_len", "page_indices")[position - 3]
        with self.assertRaisesRegex(TypeError, rf"{name} must be an array of integers, got float32"):
            jax.eval_shape(prefill_page_attention, *arrays)


class ChoiceErrorsTest(parameterized.TestCase):
    @parameterized.parameters("triton", "pallas", "cuda")
    def test_a_kernel_that_is_not_for_this_platform(self, platform):
        arrays = [jnp.zeros(x.shape, x.dtype) for x in operands()]
        message = rf"platform='{platform}' cannot run this call on cpu: .*only xla"
        for call in (dict(platform=platform), dict(cfg=PrefillPageAttentionConfig(platform=platform))):
            with self.assertRaisesRegex(ValueError, message):
                ragged_paged_prefill(*arrays, **call)

    def test_the_reason_of_a_kernel_that_cannot_run(self):
        """A kernel in the registry that refuses: asked for, its reason is the error; under "auto" it is told once."""
        refusing = mock.Mock(supports=lambda problem, device: "head_dim must be 64, got 16")
        arrays = [jnp.zeros(x.shape, x.dtype) for x in operands()]
        kernels = {"cpu": {"triton": refusing, **KERNELS["cpu"]}}
        with mock.patch.dict(KERNELS, kernels), mock.patch.object(logging, "log") as log:
            message = r"platform='triton' cannot run this call on cpu: triton: head_dim must be 64, got 16"
            with self.assertRaisesRegex(ValueError, message):
                ragged_paged_prefill(*arrays, platform="triton")
            for scale in (0.125, 0.25):  # two programs
                jax.jit(lambda *p: ragged_paged_prefill(*p, softmax_scale=scale)).lower(*arrays)
            self.assertEqual(log.call_count, 1)
            level, message, *arguments = log.call_args.args
            self.assertEqual(level, logging.WARNING)
            self.assertRegex(message % tuple(arguments), "by xla on .*Faster kernels cannot: triton: head_dim must be 64, got 16")

    def test_choose_answers_for_devices_that_are_not_here(self):
        for platform in KERNELS:
            name, _ = choose(problem(), Device(platform))
            self.assertIn(name, KERNELS[platform])
            self.assertEqual(choose(problem(), Device(platform), "xla"), ("xla", {}))


class PagesErrorsTest(parameterized.TestCase):
    NEW = dict(key=(10, 2, 16), value=(10, 2, 24))

    @parameterized.named_parameters(
        ("key_heads", dict(key=(10, 4, 16)), ValueError,
         r"key must have shape \[\.\.\., tokens, 2, 16\] to go into key_cache \(2, 9, 8, 16\), got \(10, 4, 16\)"),
        ("key_rank", dict(key=(2, 16)), ValueError, r"key must have shape \[\.\.\., tokens, 2, 16\].*got \(2, 16\)"),
        ("value_dim", dict(value=(10, 2, 16)), ValueError,
         r"value must have shape \[\.\.\., tokens, 2, 24\] to go into value_cache \(2, 9, 8, 24\), got \(10, 2, 16\)"),
        ("value_tokens", dict(value=(9, 2, 24)), ValueError, r"value must have .*\(10,.*got \(9, 2, 24\)"),
        ("key_dtype", dict(key="float16"), TypeError, r"key must have key_cache's dtype float32, got float16"),
        ("value_dtype", dict(value="bfloat16"), TypeError, r"value must have value_cache's dtype float32, got bfloat16"),
        ("key_cache_rank", dict(key_cache=(9, 8, 16)), ValueError,
         r"key_cache must have shape \[.*kv_heads, num_pages, page_size, head_dim\], got \(9, 8, 16\)"),
        ("value_cache_rank", dict(value_cache=(8, 16)), ValueError,
         r"value_cache must have shape \[.*kv_heads, num_pages, page_size, value_dim\], got \(8, 16\)"),
        ("value_cache_pages", dict(value_cache=(2, 8, 8, 24)), ValueError,
         r"value_cache must have shape \[kv_heads = 2, num_pages = 9, page_size = 8, value_dim\]"),
        ("int8", dict(key="int8", value="int8", key_cache="int8", value_cache="int8"), TypeError,
         r"key must be one of float32, bfloat16, float16, got int8"),
        ("batch", dict(key=(6, 10, 2, 16), value=(6, 10, 2, 24), key_cache=(5, 2, 9, 8, 16), value_cache=(5, 2, 9, 8, 24)),
         ValueError, r"key_cache must have shape \[6, kv_heads, num_pages, page_size, head_dim\], got \(5, 2, 9, 8, 16\)"),
        ("context_lens", dict(context_lens=(3, 1)), ValueError, r"context_lens must have shape \[seqs\], got \(3, 1\)"),
        ("context_lens_dtype", dict(context_lens="float32"), TypeError, r"context_lens must be an array of integers"),
        ("query_offsets", dict(query_offsets=(3,)), ValueError, r"query_offsets must have shape \[seqs \+ 1 = 4\], got \(3,\)"),
    )
    def test_append_to_pages(self, changes, error, message):
        shapes = {n: (OPERANDS[n].shape, "float32") for n in ("key_cache", "value_cache")}
        shapes |= {n: (shape, "float32") for n, shape in self.NEW.items()}
        shapes |= {n: (OPERANDS[n].shape, "int32") for n in ("context_lens", "page_indices", "query_offsets")}
        for name, change in changes.items():
            shapes[name] = (shapes[name][0], change) if isinstance(change, str) else (change, shapes[name][1])
        abstract = {n: jax.ShapeDtypeStruct(*x) for n, x in shapes.items()}
        with self.assertRaisesRegex(error, message):
            jax.eval_shape(append_to_pages, **abstract)

    @parameterized.named_parameters(
        ("out_b", 2, r"out_b must have shape \(5, 4, 16\) to go with out_a, got \(1, 4, 16\)"),
        ("lse_a", 1, r"lse_a must have shape \(5, 4\) to go with out_a, got \(1, 4\)"),
        ("lse_b", 3, r"lse_b must have shape \(5, 4\) to go with out_a, got \(1, 4\)"),
    )
    def test_merge(self, position, message):
        arrays = [jnp.zeros((5, 4, 16)), jnp.zeros((5, 4)), jnp.zeros((5, 4, 16)), jnp.zeros((5, 4))]
        arrays[position] = arrays[position][:1]
        with self.assertRaisesRegex(ValueError, message):
            merge(*arrays)

    @parameterized.parameters(
        ("out_a", jnp.zeros((5, 4, 16), jnp.int32), r"out_a must be an array of floats, got int32"),
        ("out_a", [1.0], r"out_a must be an array, got \[1\.0\]"),
        ("lse_b", None, r"lse_b must be an array, got None"),
    )
    def test_merge_of_other_than_floats(self, name, given, message):
        arrays = dict(out_a=jnp.zeros((5, 4, 16)), lse_a=jnp.zeros((5, 4)), out_b=jnp.zeros((5, 4, 16)), lse_b=jnp.zeros((5, 4)))
        with self.assertRaisesRegex(TypeError, message):
            merge(**arrays | {name: given})


attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT)
attend_one = functools.partial(prefill_page_attention, cfg=cases.ONE_HEIGHT)


class IndexDtypesTest(parameterized.TestCase):
    @parameterized.parameters("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    def test_any_integer_dtype_means_the_same(self, dtype):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in operands()[:3]]
            good = [jnp.asarray(np.abs(x)) for x in map(np.asarray, INDICES.values())]
            want = attend(*arrays, *(x.astype(jnp.int32) for x in good))
            got = attend(*arrays, *(x.astype(dtype) for x in good))
            np.testing.assert_array_equal(got, want)

    @parameterized.product(
        form=("int8", "int32", "int64", "uint32", "list"), function=(attend, append_to_pages, attend_one)
    )
    def test_numpy_and_python_numbers_mean_the_same_eager_and_closed_over(self, form, function):
        """Index arguments that a jitted function closes over are constants, not tracers."""
        rng = np.random.default_rng(0)
        query, *caches = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in operands()[:3]]
        new = [jnp.asarray(rng.standard_normal((10, 2, d)), jnp.float32) for d in (16, 24)]
        indices = [np.abs(np.asarray(x)) for x in INDICES.values()]
        arrays = (query, *caches) if function is not append_to_pages else (*caches, *new)
        if function is attend_one:
            indices = [indices[0][1:2], indices[1][1]]
        given = [x.tolist() if form == "list" else x.astype(form) for x in indices]
        want = function(*arrays, *(jnp.asarray(x, jnp.int32) for x in indices))
        chex.assert_trees_all_equal(function(*arrays, *given), want)
        chex.assert_trees_all_close(jax.jit(lambda *arrays: function(*arrays, *given))(*arrays), want, atol=1e-6)

    def test_wide_numpy_values_saturate_without_x64_too(self):
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in operands()[:3]]
        lens, pages, offsets = (np.abs(np.asarray(x, np.int64)) for x in INDICES.values())
        want = attend(*arrays, np.where(lens == 40, 2**31 - 1, lens), pages, offsets)
        for wide in (2**31, 2**32 + 1, 2**62):
            got = attend(*arrays, np.where(lens == 40, wide, lens), pages, offsets)
            np.testing.assert_array_equal(got, want)

    @parameterized.parameters("context_lens", "page_indices", "query_offsets", "key_ranges", "sinks", "key_scale")
    def test_lists_that_are_no_array(self, name):
        """Rows of unlike lengths, which NumPy makes no array of, and lists that hold traced values."""
        arrays = OPERANDS | INDICES
        with self.assertRaisesRegex(TypeError, rf"^{name} must be an array, got \[\[5, 3\], \[7\]\]$"):
            ragged_paged_prefill(**arrays | {name: [[5, 3], [7]]})
        with self.assertRaisesRegex(TypeError, rf"^{name} must be an array, got \[.*Tracer"):
            jax.eval_shape(lambda x: ragged_paged_prefill(**arrays | {name: [x, x]}), jax.ShapeDtypeStruct((), jnp.int32))
        with self.assertRaisesRegex(TypeError, rf"^{name} must be an array, got \[\[5, 3\], \[7\]\]$"):
            validate(**arrays | {name: [[5, 3], [7]]})

    def test_truth_values_and_numbers_too_large_are_no_integers(self):
        arrays = [jnp.zeros(x.shape, x.dtype) for x in operands()[:3]]
        for lens, kind in (([True] * 3, "bool"), ([2**70] * 3, r"\[1180591620717411303424")):
            with self.assertRaisesRegex(TypeError, f"context_lens must be an array of integers, got {kind}"):
                ragged_paged_prefill(*arrays, lens, *list(INDICES.values())[1:])

    def test_wide_values_saturate_and_do_not_wrap(self):
        with jax.enable_x64(True):
            rng = np.random.default_rng(0)
            arrays = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in operands()[:3]]
            lens, pages, offsets = (jnp.asarray(np.abs(x), jnp.int64) for x in INDICES.values())
            for dtype, wide, narrow in (("int64", 2**32 + 1, 2**31 - 1), ("int64", -(2**32) + 7, 0), ("uint64", 2**64 - 1, 2**31 - 1)):
                got = attend(*arrays, lens.astype(dtype).at[1].set(wide), pages, offsets)
                want = attend(*arrays, lens.at[1].set(narrow), pages, offsets)
                np.testing.assert_array_equal(got, want)


if __name__ == "__main__":
    absltest.main()
