"""examples/serve/ computes what transformers does: random small checkpoints of every family, saved by it."""

import importlib.util
from pathlib import Path
import tempfile

from absl.testing import absltest, parameterized
import jax
import numpy as np

from paged_prefill.examples.serve import checkpoint, runner
from paged_prefill.examples.serve.engine import Engine
from paged_prefill.lowering import tuning
from paged_prefill.tests import cases

MISSING = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
    num_hidden_layers=4, pad_token_id=0, max_position_embeddings=256,
)  # fmt: skip
WINDOWED = SMALL | dict(sliding_window=9)
KINDS = ["sliding_attention", "full_attention"] * 2


def without(*names):
    return {name: value for name, value in SMALL.items() if name not in names}


LLAMA3 = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=64, mscale=1.0,
    mscale_all_dim=0.7,
)  # fmt: skip
LATENT = without("head_dim", "num_key_value_heads") | dict(
    num_key_value_heads=8, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=8,
    n_group=4, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=24, first_k_dense_replace=1,
)  # fmt: skip

# (name, class of its configuration, its arguments)
FAMILIES = (
    ("llama", "LlamaConfig", SMALL | dict(rope_parameters=LLAMA3, attention_bias=True)),
    ("qwen3", "Qwen3Config", SMALL | dict(tie_word_embeddings=True)),
    ("qwen3_windowed", "Qwen3Config", WINDOWED | dict(use_sliding_window=True, layer_types=KINDS)),
    ("mistral", "MistralConfig", WINDOWED),
    ("gemma2", "Gemma2Config", WINDOWED | dict(query_pre_attn_scalar=24)),
    ("gemma3", "Gemma3TextConfig", WINDOWED | dict(query_pre_attn_scalar=24, layer_types=KINDS)),
    ("gpt_oss", "GptOssConfig", WINDOWED | dict(num_local_experts=4, num_experts_per_tok=2)),
    ("gemma4", "Gemma4TextConfig", WINDOWED | dict(
        layer_types=KINDS, global_head_dim=32, num_global_key_value_heads=2, attention_k_eq_v=True,
        hidden_size_per_layer_input=0, final_logit_softcapping=30.0,
    )),
    ("llama4", "Llama4TextConfig", SMALL | dict(
        intermediate_size_mlp=40, attention_chunk_size=8, no_rope_layers=[1, 1, 1, 0], num_local_experts=4,
        interleave_moe_layer_step=2, floor_scale=8,
    )),
    ("llama4_dense", "Llama4TextConfig", SMALL | dict(
        intermediate_size_mlp=40, attention_chunk_size=8, no_rope_layers=[1, 0, 1, 0], moe_layers=[], use_qk_norm=False,
    )),
    ("olmo2", "Olmo2Config", without("head_dim")),
    ("deepseek_v3", "DeepseekV3Config", LATENT | dict(q_lora_rank=24)),
    ("deepseek_v3_yarn", "DeepseekV3Config", LATENT | dict(q_lora_rank=None, rope_parameters=YARN)),
)  # fmt: skip

CHUNKS = (1, 7, 64, 90)  # of four prompts that are read side by side
PROMPTS = (23, 50, 80, 90)
NEW_TOKENS = 32
MESHES = dict(
    heads=dict(heads=8), pages=dict(pages=8), heads_and_pages=dict(heads=2, pages=4),
    batch_and_heads=dict(batch=2, heads=4),
)  # fmt: skip


def saved(folder: Path, name: str, arguments: dict):
    """A model of random weights, larger than at the start of training, so that attention is not even."""
    import torch
    import transformers

    config = getattr(transformers, name)(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
            weight.copy_(torch.randn(weight.shape) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5))
    model.save_pretrained(folder)
    return model


def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(3, SMALL["vocab_size"], count).tolist() for count in PROMPTS]


def expected(model, prompt):
    """transformers' logits of every position, and the tokens that it adds, the likeliest each."""
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
        out = model.generate(
            ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, attention_mask=ids * 0 + 1
        )
    return logits, out[0, len(prompt) :].tolist()


def chunked_logits(model: checkpoint.Model, mesh=None):
    """Logits of every position of the prompts, each read in chunks of its own size, all in one pack a step."""
    seqs, page_size, columns = len(PROMPTS), 4, 24
    run = runner.Runner(model, num_pages=104, page_size=page_size, mesh=mesh)

    @jax.jit
    def logits(weights, caches, batch):
        def replica(caches, batch):
            rows = np.arange(batch.tokens.shape[0])
            return runner.logits_of(model.config, weights, caches, batch, rows)

        return jax.vmap(replica)(caches, batch)

    pages = np.random.default_rng(1).permutation(seqs * columns).reshape(seqs, columns)
    found, done = [[] for _ in PROMPTS], [0] * seqs
    while done != list(PROMPTS):
        batch = runner.empty_batch(run.replicas, sum(CHUNKS), seqs, columns, 1, SMALL["vocab_size"])
        start, places = 0, []
        for s, (prompt, chunk) in enumerate(zip(prompts(), CHUNKS)):
            count = min(chunk, len(prompt) - done[s])
            batch.tokens[:, start : start + count] = prompt[done[s] : done[s] + count]
            batch.positions[:, start : start + count] = np.arange(done[s], done[s] + count)
            batch.context_lens[:, s], batch.page_indices[:, s] = done[s] + count, pages[s]
            places.append(slice(start, start + count))
            start, done[s] = start + count, done[s] + count
            batch.query_offsets[:, s + 1 :] = start
        with run.contexts():
            got, run.caches = logits(run.weights, run.caches, run.placed(batch))
        for s, place in enumerate(places):
            found[s].append(np.asarray(got)[:, place])
    return [np.concatenate(parts, axis=1) for parts in found]


@absltest.skipIf(MISSING, f"needs {' and '.join(MISSING)}: pip install 'paged_prefill[models,serve]'")
class FamiliesTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(tuning.overlay(cases.SMALL_TILES))
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

    def assert_logits(self, got, want):
        for replicas, logits in zip(got, want, strict=True):
            for own in replicas:
                self.assertLess(np.abs(own - logits).max(), 2e-4 * np.abs(logits).max())

    @parameterized.named_parameters(*FAMILIES)
    def test_logits_and_greedy_tokens(self, name, arguments):
        """Every prompt in chunks of another size, packed with the others; tokens by the engine, drafts and all."""
        theirs = saved(self.folder, name, arguments)
        want = [expected(theirs, prompt) for prompt in prompts()]
        model = checkpoint.load(self.folder)
        self.assert_logits(chunked_logits(model), [logits for logits, _ in want])

        engine = Engine(model, num_pages=140, page_size=4, max_seqs=4, token_buckets=(96,), max_drafts=4)
        requests = [engine.submit(prompt, NEW_TOKENS, stop_tokens=()) for prompt in prompts()]
        engine.run()
        self.assertEqual([request.output for request in requests], [tokens for _, tokens in want])
        self.assertGreater(engine.counts.accepted, 0)

    @parameterized.product(family=FAMILIES, mesh=sorted(MESHES))
    def test_on_several_devices(self, family, mesh):
        _, name, arguments = family
        theirs = saved(self.folder, name, arguments)
        want = [expected(theirs, prompt)[0] for prompt in prompts()]
        got = chunked_logits(checkpoint.load(self.folder), runner.make_mesh(MESHES[mesh]))
        self.assert_logits(got, want)


if __name__ == "__main__":
    absltest.main()
