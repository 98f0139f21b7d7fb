"""Errors of the optional operands: each names the operand, what it got, and what it takes."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

from paged_prefill import append_to_pages, paged_prefill_p, ragged_paged_prefill

OPERANDS = dict(
    query=jax.ShapeDtypeStruct((10, 4, 16), jnp.float32),
    key_cache=jax.ShapeDtypeStruct((3, 2, 9, 8, 16), jnp.int8),
    value_cache=jax.ShapeDtypeStruct((3, 2, 9, 8, 24), jnp.int8),
    context_lens=jax.ShapeDtypeStruct((5,), jnp.int32),
    page_indices=jax.ShapeDtypeStruct((5, 7), jnp.int32),
    query_offsets=jax.ShapeDtypeStruct((6,), jnp.int32),
    key_ranges=jax.ShapeDtypeStruct((10, 2), jnp.int32),
    tree_mask=jax.ShapeDtypeStruct((10, 2), jnp.uint32),
    sinks=jax.ShapeDtypeStruct((4,), jnp.float32),
    key_scale=jax.ShapeDtypeStruct((3, 2), jnp.float32),
    value_scale=jax.ShapeDtypeStruct((3, 2, 9, 8), jnp.float32),
    layer=jax.ShapeDtypeStruct((), jnp.int32),
)
NEW = dict(
    key=jax.ShapeDtypeStruct((10, 2, 16), jnp.float32),
    value=jax.ShapeDtypeStruct((10, 2, 24), jnp.float32),
)
APPENDED = {name: x for name, x in OPERANDS.items() if name not in ("query", "key_ranges", "tree_mask", "sinks")} | NEW
SCALE = r"must have shape \[layers = 3\] or \[layers = 3, kv_heads = 2\] or \[layers = 3, kv_heads = 2, num_pages = 9, page_size = 8\]"

# (name, operand, shape, what the message says)
SHAPES = [
    ("ranges_bounds", "key_ranges", (10, 3), r"key_ranges must have shape \[tokens = 10, 2\], got \(10, 3\)"),
    ("ranges_tokens", "key_ranges", (9, 2), r"key_ranges must have shape \[tokens = 10, 2\], got \(9, 2\)"),
    ("ranges_rank", "key_ranges", (1, 10, 2), r"key_ranges must have shape \[tokens = 10, 2\], got \(1, 10, 2\)"),
    ("tree_tokens", "tree_mask", (9, 2), r"tree_mask must have shape \[tokens = 10, words\], got \(9, 2\)"),
    ("tree_rank", "tree_mask", (10,), r"tree_mask must have shape \[tokens = 10, words\], got \(10,\)"),
    ("tree_no_words", "tree_mask", (10, 0), r"tree_mask must have at least one of words, got \(10, 0\)"),
    ("sinks_heads", "sinks", (5,), r"sinks must have shape \[q_heads = 4\], got \(5,\)"),
    ("sinks_rank", "sinks", (1, 4), r"sinks must have shape \[q_heads = 4\], got \(1, 4\)"),
    ("layer_rank", "layer", (1,), r"layer must have shape \[\], got \(1,\)"),
    (
        "layers_of_value_cache",
        "value_cache",
        (4, 2, 9, 8, 24),
        r"value_cache must have shape \[layers = 3, .*got \(4, 2",
    ),
    (
        "value_cache_without_layers",
        "value_cache",
        (2, 9, 8, 24),
        r"value_cache must have shape .*layers.*, kv_heads.*got \(2, 9",
    ),
    (
        "key_cache_without_layers",
        "key_cache",
        (2, 9, 8, 16),
        r"key_cache must have shape \[.*layers, kv_heads, .*got \(2, 9",
    ),
    ("no_layers", "key_cache", (0, 2, 9, 8, 16), r"key_cache must have at least one of layers, got \(0, 2"),
    ("scale_rank", "key_scale", (3, 2, 9), rf"key_scale {SCALE}, got \(3, 2, 9\)"),
    ("scale_layers", "key_scale", (4,), r"key_scale must have shape \[layers = 3\], got \(4,\)"),
    ("scale_heads", "value_scale", (3, 3), r"value_scale must have shape \[layers = 3, kv_heads = 2\], got \(3, 3\)"),
    ("scale_slots", "value_scale", (3, 2, 9, 7), r"value_scale must have shape .*page_size = 8\], got \(3, 2, 9, 7\)"),
]
# (name, operand, dtype, what bind says, what the public function says or None where it takes that dtype)
DTYPES = [
    ("ranges_float", "key_ranges", "float32", r"key_ranges must be int32, got float32", r"key_ranges must be an array of integers, got float32"),
    ("ranges_narrow", "key_ranges", "int16", r"key_ranges must be int32, got int16", None),
    ("tree_signed", "tree_mask", "int32", r"tree_mask must be uint32, got int32", r"tree_mask must be uint32, got int32"),
    ("tree_bool", "tree_mask", "bool", r"tree_mask must be uint32, got bool", r"tree_mask must be uint32, got bool"),
    ("sinks_half", "sinks", "bfloat16", r"sinks must be float32, got bfloat16", None),
    ("sinks_bool", "sinks", "bool", r"sinks must be float32, got bool", r"sinks must be an array of numbers, got bool"),
    ("scale_half", "key_scale", "bfloat16", r"key_scale must be float32, got bfloat16", None),
    ("scale_bool", "value_scale", "bool", r"value_scale must be float32, got bool", r"value_scale must be an array of numbers, got bool"),
    ("layer_float", "layer", "float32", r"layer must be int32, got float32", r"layer must be an array of integers, got float32"),
    ("cache_unsigned", "key_cache", "uint8", r"key_cache must be one of float32, .*int8, got uint8", r"key_cache must be one of float32, .*got uint8"),
    ("caches_differ", "value_cache", "float8_e5m2", r"value_cache must have key_cache's dtype int8, got float8_e5m2",
     r"value_cache must have key_cache's dtype int8, got float8_e5m2"),
]  # fmt: skip
LATENT = dict(value_cache=None, value_scale=None)
FLOATS = {name: jax.ShapeDtypeStruct(OPERANDS[name].shape, jnp.float32) for name in ("key_cache", "value_cache")}
# (name, operands, parameters, error, what the message says)
COMBINATIONS = [
    ("ranges_and_window", {}, dict(sliding_window=3), ValueError, r"key_ranges stands in place of causality and window.*got sliding_window=3"),
    ("value_dim_and_value_cache", {}, dict(value_dim=3), ValueError, r"value_dim is for a latent cache.*got value_dim=3"),
    ("latent_without_value_dim", LATENT, {}, TypeError, r"value_dim must be an integer where value_cache is None, got None"),
    ("value_dim_bool", LATENT, dict(value_dim=True), TypeError, r"value_dim must be an integer .*got True"),
    ("value_dim_zero", LATENT, dict(value_dim=0), ValueError, r"value_dim must be between 1 and head_dim 16, got 0"),
    ("value_dim_too_wide", LATENT, dict(value_dim=17), ValueError, r"value_dim must be between 1 and head_dim 16, got 17"),
    ("value_scale_of_latent", dict(value_cache=None), dict(value_dim=4), ValueError, r"value_scale must be None without a value_cache"),
    ("scale_of_floats", FLOATS, {}, ValueError, r"key_scale goes with caches of float8_e4m3fn, .*got key_cache of float32"),
    ("value_scale_of_floats", FLOATS | dict(key_scale=None), {}, ValueError, r"value_scale goes with caches of .*got key_cache of float32"),
    ("layers_without_layer", dict(layer=None), {}, ValueError, r"key_cache must have shape \[kv_heads, .*got \(3, 2, 9, 8, 16\)"),
]  # fmt: skip


def trace(call, operands, **static):
    """Traces a call of operands by name; those that are None, or no arrays, are left as they are."""
    arrays = {name: x for name, x in operands.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static |= {name: x for name, x in operands.items() if name not in arrays}
    return jax.eval_shape(lambda arrays: call(**arrays, **static), arrays)


def with_shape(operands, operand, shape):
    return operands | {operand: jax.ShapeDtypeStruct(shape, operands[operand].dtype)}


def with_dtype(operands, operand, dtype):
    return operands | {operand: jax.ShapeDtypeStruct(operands[operand].shape, jnp.dtype(dtype))}


class AttentionTest(parameterized.TestCase):
    def test_what_the_others_are_changes_of_is_right(self):
        for call in (paged_prefill_p.bind, ragged_paged_prefill):
            trace(call, OPERANDS)
        trace(append_to_pages, APPENDED)

    @parameterized.named_parameters(SHAPES)
    def test_shapes(self, operand, shape, message):
        for call in (paged_prefill_p.bind, ragged_paged_prefill):
            with self.assertRaisesRegex(ValueError, message):
                trace(call, with_shape(OPERANDS, operand, shape))

    @parameterized.named_parameters(DTYPES)
    def test_dtypes(self, operand, dtype, of_bind, of_function):
        operands = with_dtype(OPERANDS, operand, dtype)
        with self.assertRaisesRegex(TypeError, of_bind):
            trace(paged_prefill_p.bind, operands)
        if of_function is None:
            trace(ragged_paged_prefill, operands)
        else:
            with self.assertRaisesRegex(TypeError, of_function):
                trace(ragged_paged_prefill, operands)

    @parameterized.named_parameters(COMBINATIONS)
    def test_combinations(self, changes, parameters, error, message):
        for call in (paged_prefill_p.bind, ragged_paged_prefill):
            with self.assertRaisesRegex(error, message):
                trace(call, OPERANDS | changes, **parameters)

    @parameterized.named_parameters(
        ("layer", dict(layer=1.5), "layer must be an array of integers, got float64"),
        ("scale", dict(key_scale="x"), "key_scale must be an array of numbers"),
        ("query", dict(query=None), "query must be an array, got None"),
        ("key_cache", dict(key_cache=None), "key_cache must be an array, got None"),
    )
    def test_what_is_no_array(self, changes, message):
        with self.assertRaisesRegex(TypeError, message):
            trace(ragged_paged_prefill, OPERANDS | changes)

    def test_python_numbers_are_taken(self):
        trace(ragged_paged_prefill, OPERANDS | dict(layer=2, key_scale=0.5, value_scale=1, sinks=[0, 1, 2, 3]))


class AppendTest(parameterized.TestCase):
    @parameterized.named_parameters([row for row in SHAPES if row[1] in APPENDED])
    def test_shapes(self, operand, shape, message):
        with self.assertRaisesRegex(ValueError, message):
            trace(append_to_pages, with_shape(APPENDED, operand, shape))

    @parameterized.named_parameters([row for row in DTYPES if row[1] in APPENDED and row[4]])
    def test_dtypes(self, operand, dtype, of_bind, message):
        with self.assertRaisesRegex(TypeError, message):
            trace(append_to_pages, with_dtype(APPENDED, operand, dtype))

    @parameterized.named_parameters(
        ("value_without_cache", dict(value_cache=None, value_scale=None), ValueError, "value_cache must be given with value"),
        ("cache_without_value", dict(value=None), ValueError, "value must be given with value_cache"),
        ("value_scale_of_latent", dict(value=None, value_cache=None), ValueError, "value_scale must be None without a value_cache"),
        ("scale_of_floats", FLOATS, ValueError, "key_scale goes with caches of float8_e4m3fn, .*got key_cache of float32"),
        ("layers_without_layer", dict(layer=None), ValueError, r"key_cache must have shape \[kv_heads, .*got \(3, 2, 9, 8, 16\)"),
        ("no_key", dict(key=None), TypeError, "key must be an array, got None"),
        ("no_key_cache", dict(key_cache=None), TypeError, "key_cache must be an array, got None"),
        ("quantised_key", with_dtype(NEW, "key", "int8"), TypeError, "key must be one of float32, bfloat16, float16, got int8"),
        ("value_of_another_dtype", with_dtype(NEW, "value", "bfloat16"), TypeError, "value must have key's dtype float32, got bfloat16"),
    )  # fmt: skip
    def test_combinations(self, changes, error, message):
        with self.assertRaisesRegex(error, message):
            trace(append_to_pages, APPENDED | changes)

    def test_a_scale_that_is_given_comes_back_beside_one_that_is_written(self):
        shapes = [x.shape for x in trace(append_to_pages, APPENDED)]
        self.assertEqual(shapes, [APPENDED[n].shape for n in ("key_cache", "value_cache", "key_scale", "value_scale")])
        both_given = APPENDED | dict(value_scale=jax.ShapeDtypeStruct((3,), jnp.float32))
        self.assertLen(trace(append_to_pages, both_given), 2)


if __name__ == "__main__":
    absltest.main()
