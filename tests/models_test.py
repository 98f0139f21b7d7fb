"""The attention of models in use, as Hugging Face's transformers computes it, and by this operation in chunks over pages.

Each model is a small random one of its family, with the masks, norms, rotary embeddings and scales of its code.
What its layers hand to the softmax goes through pages here, with masks of this package's, and has to come out the same.
"""

import importlib
import importlib.util
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

from paged_prefill import append_to_pages, masks, ragged_paged_prefill
from paged_prefill.tests import cases

MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]

CHUNKS = (20, 17, 1, 7)
TOKENS = sum(CHUNKS)
IMAGES = ((3, 11), (20, 26), (28, 36))  # none across the border of two chunks; one longer than the window
WINDOW = 6
PAGE_SIZE = 4

SMALL = dict(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    pad_token_id=0,
)  # fmt: skip


def recorded(family: str, model_name: str, config, images=()):
    """Runs a model of random weights on random inputs; what each layer's attention was given, and its result.

    A dict a layer: query, key, value and out, [tokens, heads, features], scaling, and the layer's module. `images` are
    spans of the tokens that the model takes for images.
    """
    import torch

    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(modeling, model_name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # larger than at the start of training, so that attention is not even
            weight.copy_(torch.randn(weight.shape) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5))
    inputs = torch.randn(1, TOKENS, config.hidden_size)
    layers, attend = [], modeling.eager_attention_forward

    def record(module, query, key, value, attention_mask, scaling, **others):
        out, weights = attend(module, query, key, value, attention_mask, scaling=scaling, **others)
        given = dict(query=query, key=key, value=value, out=out.transpose(1, 2))
        tokens_first = {name: x[0].transpose(0, 1).numpy() for name, x in given.items()}
        layers.append(dict(module=module, scaling=scaling, **tokens_first))
        return out, weights

    mask = None
    if images:
        types = torch.zeros(1, TOKENS, dtype=torch.long)
        for start, end in images:
            types[0, start:end] = 1
        ids = modeling.get_block_sequence_ids_for_mask(types, device=types.device)
        mask = modeling.create_masks_for_vision_model(
            config, inputs, attention_mask=None, cache=None, position_ids=None, block_sequence_ids=ids
        )
    with torch.no_grad(), mock.patch.object(modeling, "eager_attention_forward", record):
        model(inputs_embeds=inputs, attention_mask=mask)
    return layers


def paged(query, key, value, make_ranges=None, **parameters):
    """The attention of one sequence, chunk by chunk through pages that held NaN; value None for a latent cache."""
    pages = jnp.asarray(np.random.default_rng(0).permutation(40)[: -(-TOKENS // PAGE_SIZE)])[None]
    room = max(CHUNKS)

    def empty(new):
        return None if new is None else jnp.full((new.shape[1], 40, PAGE_SIZE, new.shape[2]), jnp.nan, new.dtype)

    def rows(new, start, count):
        return None if new is None else np.pad(new[start : start + count], ((0, room - count), (0, 0), (0, 0)))

    @jax.jit
    def step(caches, query, key, value, context_lens, offsets):
        caches = append_to_pages(*caches, key, value, context_lens, pages, offsets)
        ranges = None if make_ranges is None else make_ranges(context_lens, offsets, room)
        out = ragged_paged_prefill(
            query, *caches, context_lens, pages, offsets, key_ranges=ranges, cfg=cases.SMALL_TILES, **parameters
        )
        return caches, out

    caches, outs, start = (empty(key), empty(value)), [], 0
    for count in CHUNKS:
        new = [rows(x, start, count) for x in (query, key, value)]
        start += count
        caches, out = step(caches, *new, jnp.asarray([start]), jnp.asarray([0, count]))
        outs.append(out[:count])
    return np.concatenate(outs)


def image_ranges(window=None, spans=IMAGES):
    """The key ranges of one sequence with images, by transformers' rule: `(causal or span) and window`."""
    return lambda *pack: masks.spans(*pack, np.array([spans]), window, inside_window=True)


@absltest.skipIf(MISSING, f"needs {' and '.join(MISSING)}: pip install 'paged_prefill[models]'")
class ModelsTest(parameterized.TestCase):
    def assert_same(self, layer, without=None, **parameters):
        """Of a layer as recorded; and with parameters that are not enough, `without`, it has to be another result."""
        operands = layer["query"], layer["key"], layer["value"]

        def error(parameters):
            return np.abs(paged(*operands, **dict(softmax_scale=layer["scaling"]) | parameters) - layer["out"]).max()

        self.assertLess(error(parameters), 1e-4)
        if without is not None:
            self.assertGreater(error(without), 1e-2)

    def test_gpt_oss(self):
        """A sink for each head, and a window in every second layer."""
        from transformers import GptOssConfig

        kinds = ["sliding_attention", "full_attention"]
        config = GptOssConfig(
            **SMALL, num_hidden_layers=2, sliding_window=WINDOW, layer_types=kinds, num_local_experts=2,
            num_experts_per_tok=1,
        )  # fmt: skip
        windowed, full = recorded("gpt_oss", "GptOssModel", config)
        for layer, window in ((windowed, WINDOW), (full, None)):
            sinks = layer["module"].sinks.detach().numpy()
            self.assert_same(layer, sinks=sinks, sliding_window=window, without=dict(sliding_window=window))

    @parameterized.named_parameters(("text", ()), ("images", IMAGES))
    def test_gemma3(self, images):
        """A window in most layers; images are seen whole in all layers, in those with a window inside it."""
        from transformers import Gemma3TextConfig

        kinds = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            **SMALL, num_hidden_layers=2, sliding_window=WINDOW, layer_types=kinds, query_pre_attn_scalar=24
        )
        windowed, full = recorded("gemma3", "Gemma3TextModel", config, images)
        if images:
            self.assert_same(windowed, make_ranges=image_ranges(WINDOW), without=dict(sliding_window=WINDOW))
            self.assert_same(full, make_ranges=image_ranges(), without={})
        else:
            self.assert_same(windowed, sliding_window=WINDOW, without={})
            self.assert_same(full)

    @parameterized.named_parameters(("text", ()), ("images", IMAGES))
    def test_gemma4(self, images):
        """As Gemma 3, but layers without a window are causal and have heads of 512, whose values come from the keys."""
        from transformers import Gemma4TextConfig

        kinds = ["sliding_attention", "full_attention"]
        config = Gemma4TextConfig(
            **SMALL, num_hidden_layers=2, sliding_window=WINDOW, layer_types=kinds, global_head_dim=512,
            num_global_key_value_heads=1, attention_k_eq_v=True, hidden_size_per_layer_input=0,
        )  # fmt: skip
        windowed, full = recorded("gemma4", "Gemma4TextModel", config, images)
        self.assertEqual(full["query"].shape[-1], 512)
        if images:
            self.assert_same(windowed, make_ranges=image_ranges(WINDOW), without=dict(sliding_window=WINDOW))
        else:
            self.assert_same(windowed, sliding_window=WINDOW, without={})
        self.assert_same(full)

    def test_llama4(self):
        """Local layers see their own chunk of positions; the others are causal, without rotary embeddings."""
        from transformers import Llama4TextConfig

        config = Llama4TextConfig(
            **SMALL, intermediate_size_mlp=32, num_hidden_layers=2, moe_layers=[], no_rope_layers=[1, 0],
            attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"], floor_scale=8,
        )  # fmt: skip
        local, full = recorded("llama4", "Llama4TextModel", config)
        self.assert_same(local, make_ranges=lambda *pack: masks.chunked(*pack, 8), without=dict(sliding_window=8))
        self.assert_same(full)

    def test_qwen3(self):
        from transformers import Qwen3Config

        kinds = ["full_attention", "sliding_attention"]
        config = Qwen3Config(
            **SMALL, num_hidden_layers=2, use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds
        )
        full, windowed = recorded("qwen3", "Qwen3Model", config)
        self.assert_same(full)
        self.assert_same(windowed, sliding_window=WINDOW, without={})

    def test_deepseek_v3(self):
        """Absorbed: the cache holds latents and one rotary key for all heads; the weights go into query and result."""
        from transformers import DeepseekV3Config
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling

        small = {name: size for name, size in SMALL.items() if name != "head_dim"} | dict(num_key_value_heads=4)
        config = DeepseekV3Config(
            **small, num_hidden_layers=2, first_k_dense_replace=2, q_lora_rank=24, kv_lora_rank=32, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=12,
        )  # fmt: skip
        latents, expand = [], modeling.DeepseekV3Attention.expand_kv

        def record(module, latent, rotary):
            latents.append([x[0, 0].numpy() for x in (latent, rotary)])
            return expand(module, latent, rotary)

        with mock.patch.object(modeling.DeepseekV3Attention, "expand_kv", record):
            layers = recorded("deepseek_v3", "DeepseekV3Model", config)
        for layer, (latent, rotary) in zip(layers, latents, strict=True):
            weights = layer["module"].kv_b_proj.weight.detach().numpy().reshape(4, 16 + 12, 32)
            query, query_rotary = np.split(layer["query"], [16], axis=-1)
            absorbed = np.einsum("thn,hnl->thl", query, weights[:, :16])
            out = paged(
                np.concatenate([absorbed, query_rotary], axis=-1),
                np.concatenate([latent, rotary], axis=-1)[:, None],
                None,
                value_dim=32,
                softmax_scale=layer["scaling"],
            )
            error = np.abs(np.einsum("thl,hvl->thv", out, weights[:, 16:]) - layer["out"]).max()
            self.assertLess(error, 1e-4)


if __name__ == "__main__":
    absltest.main()
