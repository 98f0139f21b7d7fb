"""The parts of examples/serve/ that need no step: pages, drafts, sampling, folders and what is said of them."""

import importlib.util
from pathlib import Path
import tempfile

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill.examples.serve import checkpoint, drafts, runner
from paged_prefill.examples.serve.config import Config, Layer, Reader, frequencies
from paged_prefill.examples.serve.families import config_of
from paged_prefill.examples.serve.pages import PagePool, block_names
from paged_prefill.tests.checkpoints import LLAMA, save, tensors

MISSING = [name for name in ("safetensors",) if importlib.util.find_spec(name) is None]


class PagePoolTest(absltest.TestCase):
    def test_pages_of_unknown_content_are_free_once_nobody_owns_them(self):
        pool = PagePool(3)
        pages = [pool.allocate() for _ in range(3)]
        self.assertCountEqual(pages, range(3))
        self.assertIsNone(pool.allocate())
        pool.release(pages[1])
        self.assertEqual(pool.allocate(), pages[1])

    def test_named_pages_are_found_until_they_are_needed(self):
        pool, names = PagePool(2), block_names([1, 2, 3, 4], 2)
        pages = [pool.allocate(), pool.allocate()]
        for page, name in zip(pages, names):
            pool.publish(page, name)
        pool.share(pages[0])
        for page in pages:
            pool.release(page)
        self.assertEqual(pool.find(names), pages)
        self.assertEqual(pool.available, 1)  # the first still has an owner
        self.assertEqual(pool.allocate(), pages[1])
        self.assertEqual(pool.find(names), pages[:1])

    def test_the_page_idle_for_longest_goes_first(self):
        pool, names = PagePool(2), block_names([1, 2, 3, 4], 2)
        for name in names:
            pool.publish(pool.allocate(), name)
        pool.release(1), pool.release(0)
        self.assertEqual([pool.allocate(), pool.allocate()], [1, 0])

    def test_a_block_is_named_by_all_that_stands_before(self):
        first, second = block_names([1, 2, 3, 4, 5], 2)
        self.assertEqual(block_names([1, 2, 9, 4], 2)[0], first)
        self.assertNotEqual(block_names([9, 2, 3, 4], 2)[1], second)
        self.assertEqual(block_names([1, 2, 3, 4, 5, 6], 2, [first, second])[:2], [first, second])


class DraftsTest(absltest.TestCase):
    def test_what_followed_the_same_tokens_is_guessed_the_latest_first(self):
        tokens = [1, 2, 3, 7, 8, 0, 1, 2, 3, 7, 9, 0, 1, 2, 3]
        tree = drafts.lookup(tokens, nodes=8, depth=3)
        self.assertEqual(tree, drafts.Tree([3, 7, 9, 0, 8, 0], [-1, 0, 1, 2, 1, 4], [0, 1, 2, 3, 2, 3]))

    def test_a_tree_stays_within_its_bounds(self):
        tokens = [5, 6] * 20
        self.assertLen(drafts.lookup(tokens, nodes=4, depth=9).tokens, 4)
        self.assertEqual(max(drafts.lookup(tokens, nodes=9, depth=2).depths), 2)
        self.assertEqual(drafts.lookup(tokens, nodes=9, depth=0).tokens, [6])
        self.assertEqual(drafts.lookup([4], nodes=9, depth=3).tokens, [4])
        self.assertEqual(drafts.lookup([1, 2, 3], nodes=9, depth=3).tokens, [3])

    def test_drafts_are_taken_as_far_as_the_model_says_them(self):
        tree = drafts.Tree([3, 7, 9, 8, 0], [-1, 0, 1, 1, 3], [0, 1, 2, 2, 3])
        self.assertEqual(drafts.accepted(tree, [7, 8, 1, 0, 5]), [0, 1, 3, 4])
        self.assertEqual(drafts.accepted(tree, [7, 2, 1, 0, 5]), [0, 1])
        self.assertEqual(drafts.accepted(tree, [9, 8, 1, 0, 5]), [0])

    def test_drafts_end_before_a_window_or_a_chunk_of_positions_would(self):
        def depth(position, **layer):
            layers = Layer(1, 8, ()), Layer(1, 8, (), **layer)
            return Config("llama", 16, 8, 2, layers, 1.0, 1e-6, max_positions=100).draft_depth(position)

        self.assertEqual(depth(10), 89)
        self.assertEqual(depth(10, window=4), 3)
        self.assertEqual([depth(p, chunk=8) for p in (0, 6, 7, 8)], [7, 1, 0, 7])


@jax.jit
def draws(logits, top_k, top_p):
    """2000 samples by as many seeds."""
    draw = lambda seed: runner.sample(logits, 1.0, top_k, top_p, seed, 7)  # noqa: E731
    return jax.vmap(draw)(jnp.arange(2000))


class SampleTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(top_k=16, top_p=1.0), [0.4, 0.3, 0.2, 0.1]), (dict(top_k=2, top_p=1.0), [4 / 7, 3 / 7, 0, 0]),
        (dict(top_k=16, top_p=0.6), [4 / 7, 3 / 7, 0, 0]), (dict(top_k=1, top_p=1.0), [1, 0, 0, 0]),
        (dict(top_k=16, top_p=0.0), [1, 0, 0, 0]),
    )  # fmt: skip
    def test_frequencies(self, options, expected):
        probabilities = np.array([0.1, 0.4, 0.2, 0.3], np.float32)  # in another order than by size
        found = np.bincount(draws(np.log(probabilities), **options), minlength=4)[[1, 3, 2, 0]] / 2000
        np.testing.assert_allclose(found, expected, atol=0.04)
        self.assertTrue(all(count == 0 for count, share in zip(found, expected) if share == 0))


class ConfigTest(parameterized.TestCase):
    def test_the_usual_is_read(self):
        config = config_of(LLAMA)
        self.assertEqual((config.q_heads, config.layers[1].kv_heads, config.layers[1].head_dim), (2, 1, 4))
        self.assertEqual(config.stop_tokens, (2,))

    @parameterized.parameters(
        (dict(model_type="mamba"), "model_type 'mamba'; families that there are: .*llama"),
        (dict(alibi=True), "'llama' asks for what is not implemented: alibi=True"),
        (dict(hidden_act="relu", mlp_bias=True), "mlp_bias=True .there is False., hidden_act='relu'"),
        (dict(rope_scaling=dict(rope_type="longrope")), "rope_type='longrope' .there is .*yarn"),
        (dict(vocab_size=None), "config.json has no 'vocab_size', which 'llama' needs"),
        (dict(layer_types=["full_attention", "linear_attention"]), r"layer_types=\['linear_attention'\]"),
        (dict(model_type="gemma4_text", num_kv_shared_layers=2, hidden_size_per_layer_input=256),
         "num_kv_shared_layers=2 .*hidden_size_per_layer_input=256"),
    )  # fmt: skip
    def test_what_is_not_implemented_is_one_clear_error(self, changes, words):
        with self.assertRaisesRegex(ValueError, words):
            config_of(LLAMA | changes)

    def test_both_forms_of_the_rotary_fields_are_read(self):
        scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
        before = config_of(LLAMA | dict(rope_scaling=dict(rope_type="llama3", **scaling)))
        today = dict(rope_type="llama3", rope_theta=10_000.0, **scaling)
        values = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
        self.assertEqual(config_of(values | dict(rope_parameters=today)), before)
        self.assertNotEqual(before, config_of(LLAMA))

    def test_older_gemma_3_files_alternate_by_their_pattern(self):
        values = LLAMA | dict(
            model_type="gemma3_text", num_hidden_layers=4, sliding_window=8, sliding_window_pattern=2,
            rope_local_base_freq=500.0, query_pre_attn_scalar=4, hidden_activation="gelu_pytorch_tanh",
        )  # fmt: skip
        layers = config_of(values).layers
        self.assertEqual([layer.window for layer in layers], [8, None, 8, None])
        self.assertEqual(layers[0].frequencies, frequencies(dict(rope_theta=500.0), 4, 64)[0])
        self.assertEqual(layers[1].frequencies, frequencies(dict(rope_theta=10_000.0), 4, 64)[0])

    def test_a_field_that_says_nothing_is_no_complaint(self):
        Reader(dict(transformers_version="9", use_cache=True, strange=None)).finish()


@absltest.skipIf(MISSING, "needs safetensors: pip install 'paged_prefill[serve]'")
class CheckpointTest(parameterized.TestCase):
    def folder(self, values=LLAMA, change=lambda tensors: None, files=1) -> Path:
        folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        own = tensors()
        change(own)
        save(folder, values, own, files)
        return folder

    def test_files_are_joined_and_layers_stacked(self):
        weights = checkpoint.load(self.folder(files=3)).weights
        [(layer,)] = weights["segments"]
        self.assertEqual(layer["query"].shape, (2, 8, 2, 4))
        want = tensors()["model.layers.1.self_attn.k_proj.weight"]
        np.testing.assert_array_equal(layer["key"][1], want.reshape(1, 4, 8).transpose(2, 0, 1))

    def test_in_another_dtype(self):
        weights = checkpoint.load(self.folder(), jnp.bfloat16).weights
        self.assertEqual(weights["embedding"].dtype, jnp.bfloat16)
        self.assertEqual(weights["final_norm"].dtype, np.float32)

    def test_the_text_part_of_a_model_of_images_too_is_read(self):
        values = dict(model_type="llava", text_config=LLAMA, vision_config={}, eos_token_id=[1, 2])

        def change(tensors):
            for name in list(tensors):
                tensors[f"language_model.{name}"] = tensors.pop(name)
            tensors["vision_tower.weight"] = np.zeros(3, np.float32)

        self.assertEqual(checkpoint.load(self.folder(values, change)).config.stop_tokens, (1, 2))

    @parameterized.parameters(
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "layer 1 of the checkpoint has no mlp.up_proj.weight"),
        (
            lambda t: t.update({"model.layers.0.extra.weight": np.zeros(2)}),
            "layer 0 .* llama does not take: extra.weight",
        ),
        (lambda t: t.update({"model.extra.weight": np.zeros(2)}), "tensors that nobody takes: extra.weight"),
        (lambda t: t.pop("lm_head.weight"), "no lm_head.weight, and config.json does not tie"),
        (lambda t: t.clear(), r"one tensor named \*embed_tokens.weight, got 0"),
    )
    def test_tensors_that_do_not_fit_are_one_clear_error(self, change, words):
        with self.assertRaisesRegex(ValueError, words):
            checkpoint.load(self.folder(change=change))

    def test_quantised_checkpoints_are_refused(self):
        with self.assertRaisesRegex(ValueError, "not implemented: quantization_config"):
            checkpoint.load(self.folder(LLAMA | dict(quantization_config=dict(quant_method="mxfp4"))))


class SegmentsTest(absltest.TestCase):
    def test_layers_of_a_pattern_are_one_scan(self):
        shapes = dict(a=2, b=3, c=5)

        def pattern(kinds):
            layers = [dict(weight=np.zeros(shapes[kind])) for kind in kinds]
            return [(len(layers), len(layers[0]["weight"])) for layers in checkpoint.segments(layers)]

        self.assertEqual(pattern("aaaa"), [(1, 4)])
        self.assertEqual(pattern("abababab"), [(2, 4)])
        self.assertEqual(pattern("aaabaaabaa"), [(4, 2), (1, 2)])
        self.assertEqual(pattern("aaabbbbb"), [(1, 3), (1, 5)])
        self.assertEqual(pattern("abc"), [(1, 1)] * 3)


class MeshTest(parameterized.TestCase):
    @parameterized.parameters(
        (dict(rows=2), "mesh axes are batch, heads, pages, got rows"), (dict(heads=99), "needs 99")
    )
    def test_meshes_that_cannot_be(self, sizes, words):
        with self.assertRaisesRegex(ValueError, words):
            runner.make_mesh(sizes)


if __name__ == "__main__":
    absltest.main()
