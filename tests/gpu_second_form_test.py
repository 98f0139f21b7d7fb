"""The optional operands on a real GPU, in the kernels that take them. Where there is no GPU, every test is skipped."""

import functools
import itertools
from unittest import mock

from absl.testing import absltest, parameterized
import chex
import jax
import numpy as np

from paged_prefill import ragged_paged_prefill
from paged_prefill.lowering.choose import KERNELS
from paged_prefill.lowering.mosaic_gpu import host, parts as hopper_parts
from paged_prefill.lowering.splits import parts_of
from paged_prefill.lowering.tiles import Parts
from paged_prefill.lowering.triton import host as triton_host, parts as triton_parts
from paged_prefill.primitive.config import PrefillPageAttentionConfig
from paged_prefill.primitive.context import policy
from paged_prefill.tests import oracle, poisoned
from paged_prefill.tests.append_test import QUANTISED
from paged_prefill.tests.gpus import gpus_for

SEQUENCES = ((70, 300), (1, 513), (0, 40), (130, 130), (9, 4), (1, 1), (64, 128))
FEW = ((70, 300), (1, 513), (9, 4))
DECODE = ((1, 300), (1, 1), (1, 900), (1, 64))
SPLIT = PrefillPageAttentionConfig(num_splits=3)
UNEVEN = ((1, 300), (1, 1), (1, 1900), (3, 700), (0, 7), (5, 0), (1, 64))
DTYPES = {"triton": ("bfloat16", "float16", "float32"), "mosaic_gpu": ("bfloat16", "float16")}
PLATFORMS = {"triton": "triton", "mosaic_gpu": "cuda"}
HOSTS = {"triton": triton_host, "mosaic_gpu": host}
PARTS = {"triton": triton_parts, "mosaic_gpu": hopper_parts}

ALONE = dict(
    key_ranges=dict(key_ranges=True),
    tree_mask=dict(tree_words=1),
    long_tree=dict(tree_words=3),
    sinks=dict(sinks=True),
    layers=dict(layers=3),
    latent=dict(latent=True, head_dim=80, value_dim=64),
    mla=dict(latent=True, head_dim=576, value_dim=512, q_heads=16, kv_heads=1),
    wide=dict(head_dim=512, value_dim=512, q_heads=4, kv_heads=2, key_ranges=True),
)
QUANTISED_KINDS = {
    f"{dtype}_{scale}": dict(cache_dtype=dtype, key_scale=scale, value_scale=scale)
    for dtype in QUANTISED
    for scale in poisoned.GRANULARITIES
}
COMBINED = dict(
    all_int8=dict(key_ranges=True, tree_words=2, sinks=True, layers=2, **QUANTISED_KINDS["int8_slot"]),
    all_e4m3=dict(key_ranges=True, tree_words=1, sinks=True, layers=2, **QUANTISED_KINDS["float8_e4m3fn_head"]),
    quantised_mla=dict(ALONE["mla"], cache_dtype="float8_e4m3fn", key_scale="slot", layers=2, tree_words=1),
    one_absent=dict(cache_dtype="int8", key_scale="slot", sinks=True),
)


# What the Hopper kernel alone has ways of its own for.
HOPPER = {
    f"{name}_{dtype}_{scale}": dict(kind, cache_dtype=dtype, key_scale=scale, value_scale=scale)
    for name, kind in dict(
        d64=dict(head_dim=64),
        d192=dict(head_dim=192, value_dim=128, key_ranges=True),
        d256=dict(head_dim=256, page_size=8),
        page_8=dict(page_size=8),
        page_32=dict(page_size=32, tree_words=2),
        page_64=dict(page_size=64, sinks=True),
        page_256=dict(page_size=256),
        group_of_16=dict(q_heads=16, kv_heads=1),
    ).items()
    for dtype, scale in (("float8_e4m3fn", "head"), ("int8", "slot"), ("float8_e5m2", "tensor"))
}  # fmt: skip


# Heads of a token that lie together in a tile of few tokens.
GROUPS = dict(
    of_16=dict(q_heads=32, kv_heads=2, head_dim=128),
    of_32=dict(q_heads=32, kv_heads=1, head_dim=64, sinks=True, tree_words=2),
    of_48=dict(q_heads=48, kv_heads=1, head_dim=128, page_size=8, key_ranges=True),
    of_64=dict(q_heads=128, kv_heads=2, head_dim=256, key_ranges=True, tree_words=1, layers=2),
    of_128_int8=dict(q_heads=128, kv_heads=1, head_dim=128, **QUANTISED_KINDS["int8_slot"]),
    of_16_e4m3=dict(q_heads=16, kv_heads=1, head_dim=64, sinks=True, **QUANTISED_KINDS["float8_e4m3fn_head"]),
)


# Outputs that two of its warpgroups share; rows are tokens of a head, or where groups are large heads of a token.
MLA = ALONE["mla"]
NARROW = dict(
    d96=dict(head_dim=96, tree_words=1),
    d80=dict(head_dim=80, key_ranges=True, sinks=True),
    d160_in_pages_of_8=dict(head_dim=160, page_size=8, q_heads=2),
    d32_of_16=dict(head_dim=32, q_heads=16, kv_heads=1, page_size=64, layers=2),
    d16_in_pages_of_256=dict(head_dim=16, page_size=256),
    d96_d80=dict(head_dim=96, value_dim=80, page_size=32),
    d112_in_pages_of_1=dict(head_dim=112, page_size=1, sinks=True),
    d32_in_pages_of_24=dict(head_dim=32, page_size=24, tree_words=2),
    d224=dict(head_dim=224, value_dim=240),
    d112_d176=dict(head_dim=112, value_dim=176, q_heads=8, kv_heads=2),
)
WIDE = dict(
    d512=dict(head_dim=512, value_dim=512, page_size=8),
    d512_in_pages_of_256=dict(head_dim=512, value_dim=512, q_heads=2, page_size=256, tree_words=3, key_ranges=True),
    d320=dict(head_dim=320, value_dim=384, page_size=32, sinks=True),
    d128=dict(head_dim=128, value_dim=512, q_heads=24, kv_heads=1, tree_words=2, layers=2),
    d576=dict(head_dim=576, value_dim=128, page_size=64, q_heads=3, kv_heads=1),
    mla_of_32=dict(MLA, q_heads=32, page_size=8, key_ranges=True, tree_words=2, sinks=True, layers=2),
    mla_of_64=dict(MLA, q_heads=64, page_size=64, tree_words=1, sinks=True),
    mla_of_128=dict(MLA, q_heads=128),
    mla_of_24=dict(MLA, q_heads=24, page_size=32, key_ranges=True),
    latent_heads=dict(latent=True, head_dim=192, value_dim=128, q_heads=32, page_size=128, sinks=True),
)


# Keys that are gathered one by one, where pages are no runs of a block's rows.
GATHERED = dict(
    page_1=dict(page_size=1),
    page_4_d64=dict(page_size=4, head_dim=64, key_ranges=True, tree_words=1),
    page_24_d256=dict(page_size=24, head_dim=256, sinks=True, layers=2),
    page_101_group_of_16=dict(page_size=101, q_heads=16, kv_heads=1),
    page_5_d192=dict(page_size=5, head_dim=192, value_dim=128, key_ranges=True),
    page_3_d512=dict(page_size=3, head_dim=512, value_dim=512, q_heads=4),
    page_1_mla=dict(MLA, page_size=1, tree_words=1),
    page_7_mla_of_128=dict(MLA, page_size=7, q_heads=128),
)


def quantised_by(scale, dtype="float8_e4m3fn", latent=False):
    """Arguments of `poisoned.make_call` for caches with such scales, or none."""
    if scale is None:
        return {}
    return dict(cache_dtype=dtype, key_scale=scale) | ({} if latent else dict(value_scale=scale))


# The same with their numbers in one place, widened before each product; each kind of numbers and scales in turn.
WIDE_QUANTISED = {
    f"{name}_{dtype}_{scale}": kind | quantised_by(scale, dtype, kind.get("latent", False))
    for (name, kind), (scale, dtype) in zip(
        WIDE.items(), itertools.cycle(itertools.product(poisoned.GRANULARITIES, QUANTISED))
    )
}
MLA_QUANTISED = {
    f"mla_{dtype}_{scale}": MLA | quantised_by(scale, dtype, latent=True)
    for dtype, scale in itertools.product(QUANTISED, poisoned.GRANULARITIES)
}


# Each cache that the Hopper kernel has a loop of its own for, and each thing that a call may have beside it.
CACHES = dict(
    e4m3fn=quantised_by("head"),
    int8=quantised_by("slot", "int8"),
    e5m2=quantised_by("tensor", "float8_e5m2"),
    wide=dict(head_dim=512, value_dim=512),
    wide_e4m3fn=dict(head_dim=512, value_dim=512, **quantised_by("head")),
    latent=MLA,
    latent_int8=MLA | quantised_by("slot", "int8", latent=True),
)
FEATURES = {f"page_{size}": dict(page_size=size) for size in (8, 32, 64, 128, 256)} | dict(
    window=dict(sliding_window=100),
    cap=dict(attn_logits_soft_cap=20.0),
    sinks=dict(sinks=True),
    ranges=dict(key_ranges=True),
    tree=dict(tree_words=2),
    layers=dict(layers=2),
)


FEW_ROWS = PrefillPageAttentionConfig(block_q=1, block_kv=64, num_warps=8, num_stages=2)
WAYS = {kernel: (kernel, None) for kernel in DTYPES} | {"few_rows": ("mosaic_gpu", FEW_ROWS)}


def takes(kernel, kind) -> bool:
    """Whether the kernel has the features and dims of such a call."""
    needed = {"latent": kind.get("latent"), "quantised": "cache_dtype" in kind, "key_ranges": "key_ranges" in kind}
    multiple = 64 if "cache_dtype" in kind or kind.get("latent") else 16
    fits = kernel == "triton" or kind.get("head_dim", 128) % multiple == 0
    return fits and KERNELS["cuda"][kernel].features >= {name for name, has in needed.items() if has}


def named(*tables, kernels=tuple(DTYPES)):
    """(name, kernel, arguments of `poisoned.make_call`, dtype), each in one dtype of the kernel, the dtypes in turn.

    Wide heads are not in float32.
    """
    found = []
    for kernel in kernels:
        everything = [(name, kind) for table in tables for name, kind in table.items() if takes(kernel, kind)]
        for (name, kind), dtype in zip(everything, itertools.cycle(DTYPES[kernel])):
            dtype = "bfloat16" if kind.get("head_dim", 0) > 256 and dtype == "float32" else dtype
            found.append((f"{kernel}_{name}_{dtype}", kernel, kind, dtype))
    return found


class GpuSecondFormTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self)

    def attend(self, call, kernel="triton", **parameters):
        return self.compiled(kernel, **parameters)(call)

    def compiled(self, kernel, **parameters):
        gpus_for(self, hopper=kernel == "mosaic_gpu")
        run = functools.partial(ragged_paged_prefill, platform=PLATFORMS[kernel], return_lse=True, **parameters)
        return jax.jit(lambda call: run(**call))

    def check(self, seed, kernel, kind, *, cfg=None, **parameters):
        kind = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, tokens_before=3) | kind
        call = poisoned.make_call(seed, **kind)
        parameters |= dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}
        oracle.assert_matches(call, *self.attend(call, kernel, cfg=cfg, **parameters), **parameters)

    @parameterized.named_parameters(
        named(ALONE, QUANTISED_KINDS, COMBINED)
        + named(HOPPER, GATHERED, NARROW, WIDE, WIDE_QUANTISED, MLA_QUANTISED, kernels=("mosaic_gpu",))
        + named({name: WIDE[name] for name in ("mla_of_24", "mla_of_128")}, kernels=("triton",))
    )
    def test_matches_the_oracle(self, kernel, kind, dtype):
        self.check(0, kernel, dict(kind, dtype=dtype))

    @parameterized.product(cache=tuple(CACHES), feature=tuple(FEATURES), steps=(False, True))
    def test_each_feature_over_each_cache(self, cache, feature, steps):
        kind = dict(CACHES[cache], **FEATURES[feature], sequences=DECODE if steps else SEQUENCES, dtype="bfloat16")
        cap = kind.pop("attn_logits_soft_cap", None)
        parameters = dict(sliding_window=kind.get("sliding_window"), attn_logits_soft_cap=cap)
        self.check(19, "mosaic_gpu", kind, **parameters)

    @parameterized.named_parameters(
        named(COMBINED, QUANTISED_KINDS, ALONE)
        + named(HOPPER, GATHERED, NARROW, WIDE, WIDE_QUANTISED, GROUPS, kernels=("mosaic_gpu",))
    )
    def test_in_splits_of_decode_steps(self, kernel, kind, dtype):
        self.check(1, kernel, dict(kind, dtype=dtype, sequences=DECODE), cfg=SPLIT, attn_logits_soft_cap=20.0)

    @parameterized.named_parameters(
        named(ALONE, COMBINED, dict(plain={})) + named(GROUPS, GATHERED, NARROW, WIDE, WIDE_QUANTISED, kernels=("mosaic_gpu",))
    )
    def test_in_parts_of_long_tiles(self, kernel, kind, dtype):
        """Tiles of many blocks have more parts than others: here from three blocks on, twelve at most."""
        for least in (1, 2):
            with mock.patch.object(HOSTS[kernel], "parts_of_tiles", lambda *_, least=least: Parts(least, 12, 2)):
                self.check(14, kernel, dict(kind, dtype=dtype, sequences=UNEVEN))
                if "key_ranges" not in kind:
                    windowed = dict(kind, dtype=dtype, sequences=UNEVEN, sliding_window=600)
                    self.check(15, kernel, windowed, sliding_window=600, attn_logits_soft_cap=20.0)

    @parameterized.named_parameters(
        each
        for each in named(ALONE, COMBINED, NARROW, dict(plain={}), kernels=("mosaic_gpu",))
        if "latent" not in each[2] and each[2].get("head_dim", 128) <= 256  # rows of wide heads are shared by two warpgroups
    )
    def test_two_teams(self, kernel, kind, dtype):
        """Tiles of one warpgroup go side by side in a thread block: those of chunks, and parts of long ones."""
        cfg = PrefillPageAttentionConfig(block_q=16, block_kv=64, num_warps=8, num_stages=2)
        self.check(17, kernel, dict(kind, dtype=dtype), cfg=cfg)
        with mock.patch.object(host, "parts_of_tiles", lambda *_: Parts(1, 12, 2)):
            self.check(18, kernel, dict(kind, dtype=dtype, sequences=UNEVEN), cfg=cfg, attn_logits_soft_cap=20.0)

    @parameterized.product(
        kernel=tuple(DTYPES), kind=(dict(q_heads=16), dict(q_heads=16, sinks=True), dict(q_heads=128))
    )
    def test_bits_of_a_sequence_beside_long_ones_and_alone(self, kernel, kind):
        """As many tokens and sequences, and as wide a table: a long context has many parts, with or without others."""
        lengths, contexts = [1] * 28, [9000, 40, 16000, 513, 1, 4000, 4200, 7, 8192, 300, 128, 12345] + [64] * 16
        usual = dict(kv_heads=8, head_dim=128, page_size=16, dtype="bfloat16", tokens_before=0)
        call = poisoned.make_call(16, list(zip(lengths, contexts)), **usual | kind)
        spied = mock.patch.object(PARTS[kernel], "parts_of", side_effect=parts_of)
        run = self.compiled(kernel)
        with spied as rule:
            together = run(call)
        asked = rule.call_args
        parts = parts_of(*asked.args, **asked.kwargs)
        self.assertGreater(parts.most, parts.least)
        oracle.assert_matches(call, *together)
        for seq in range(len(contexts)):
            others = np.where(np.arange(len(contexts)) == seq, contexts, 0).astype(np.int32)
            alone = run(dict(call, context_lens=others))
            chex.assert_trees_all_equal(*[[x[seq] for x in results] for results in (alone, together)])

    @parameterized.named_parameters(named(QUANTISED_KINDS))
    def test_in_splits_without_a_cap(self, kernel, kind, dtype):
        self.check(6, kernel, dict(kind, dtype=dtype), cfg=SPLIT)

    @parameterized.product(page_size=(1, 5, 24, 128), dtype=DTYPES["triton"])
    def test_any_page_size(self, page_size, dtype):
        kind = dict(key_ranges=True, tree_words=1, dtype=dtype, page_size=page_size, **QUANTISED_KINDS["int8_slot"])
        self.check(2, "triton", kind, softmax_scale=-0.1)

    @parameterized.named_parameters(named(QUANTISED_KINDS))
    def test_windows_over_quantised_caches(self, kernel, kind, dtype):
        self.check(3, kernel, dict(kind, dtype=dtype), sliding_window=100)

    @parameterized.named_parameters(named(WIDE, WIDE_QUANTISED, kernels=("mosaic_gpu",)))
    def test_windows_over_wide_heads(self, kernel, kind, dtype):
        if "key_ranges" not in kind:
            parameters = dict(sliding_window=100, softmax_scale=-0.05)
            self.check(11, kernel, dict(kind, dtype=dtype, sliding_window=100), **parameters)
            self.check(12, kernel, dict(kind, dtype=dtype, sequences=DECODE, sliding_window=100), **parameters)

    @parameterized.product(drafts=(1, 2, 4), soft_cap=(None, 50.0))
    def test_large_groups_of_short_calls(self, drafts, soft_cap):
        """Few tokens a sequence, and more of some than a tile has room for."""
        sequences = *((n % (drafts + 1), 90 * n + 5) for n in range(9)), (9, 300)
        for seed, kind in enumerate(GROUPS.values()):
            window = None if "key_ranges" in kind else 200
            kind = dict(kind, dtype="bfloat16", sequences=sequences, sliding_window=window, tokens_before=0)
            self.check(17 + seed, "mosaic_gpu", kind, sliding_window=window, attn_logits_soft_cap=soft_cap)

    @parameterized.named_parameters(named(WIDE, WIDE_QUANTISED, kernels=("mosaic_gpu",)))
    def test_wide_heads_have_the_same_bits_whatever_is_beside_them(self, kernel, kind, dtype):
        """Each time, with other poison where no row looks, and with wild numbers in the rows beside."""
        kind = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, page_size=16, tokens_before=0) | kind
        call = poisoned.make_call(13, **kind, dtype=dtype)
        run = self.compiled(kernel, **(dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}))
        first = run(call)
        other = dict(call, query=call["query"].copy())
        poisoned.poison_unseen(np.random.default_rng(99), other)
        chex.assert_trees_all_equal(run(other), first)
        other["query"][1::2] *= 100
        others = run(other)
        self.assertTrue(np.any(np.asarray(others[0])[1::2] != np.asarray(first[0])[1::2]))
        chex.assert_trees_all_equal(*[[array[::2] for array in results] for results in (others, first)])
        for _ in range(5):
            chex.assert_trees_all_equal(run(call), first)

    @parameterized.product(way=tuple(WAYS), softmax_scale=(0.2, -0.1, 0.0), dtype=QUANTISED)
    def test_scales_of_any_sign(self, way, softmax_scale, dtype):
        """Those of heads and of all; rows of the query from 1e-6 to 1e6, each its own softmax."""
        kernel, cfg = WAYS[way]
        for scale in ("tensor", "head"):
            kind = dict(sequences=FEW, q_heads=4, kv_heads=4, head_dim=128, page_size=16, dtype="bfloat16")
            call = poisoned.make_call(7, **kind, cache_dtype=dtype, key_scale=scale, value_scale=scale)
            factors = np.float32([-1.0, 0.0, 1e-3, 1.0]) if scale == "head" else np.float32(-1)
            call["key_scale"], call["value_scale"] = call["key_scale"] * factors, call["value_scale"] * np.sign(factors)
            magnitudes = 10.0 ** np.random.default_rng(0).integers(-6, 2, call["query"].shape[:2])
            call["query"] = (call["query"].astype(np.float32) * magnitudes[..., None]).astype("bfloat16")
            parameters = dict(softmax_scale=softmax_scale)
            oracle.assert_matches(call, *self.attend(call, kernel, cfg=cfg, **parameters), **parameters)

    @parameterized.product(way=tuple(WAYS), dtype=QUANTISED, soft_cap=(None, 20.0))
    def test_scales_of_slots_of_any_size(self, way, dtype, soft_cap):
        """Six orders of magnitude, of either sign, growing with the keys or not; some are 0."""
        kernel, cfg = WAYS[way]
        kind = dict(sequences=((40, 900), (1, 1500), (9, 4)), q_heads=4, kv_heads=2, head_dim=128, page_size=16)
        call = poisoned.make_call(15, **kind, dtype="bfloat16", cache_dtype=dtype, key_scale="slot", value_scale="slot")
        rng = np.random.default_rng(0)
        for name in ("key_scale", "value_scale"):
            factors = 10.0 ** rng.uniform(-3, 0 if name == "key_scale" else 3, call[name].shape)
            factors *= rng.choice([-1.0, 0.0, 1.0], call[name].shape, p=[0.45, 0.1, 0.45])
            with np.errstate(over="ignore", invalid="ignore"):  # in what no row sees
                call[name] = (call[name] * factors).astype(np.float32)
        call["value_scale"][:, call["page_indices"][0, :30]] *= np.float32(1e-3)
        oracle.assert_matches(
            call, *self.attend(call, kernel, cfg=cfg, attn_logits_soft_cap=soft_cap), attn_logits_soft_cap=soft_cap
        )

    @parameterized.product(way=tuple(WAYS), dtype=QUANTISED)
    def test_many_small_weights_beside_a_large_one(self, way, dtype):
        """The first key outweighs each other by 2^23, and its value is 0: the result is that of all the others."""
        kernel, cfg = WAYS[way]
        kind = dict(sequences=((20, 2000), (1, 3000)), q_heads=2, kv_heads=2, head_dim=128, page_size=16)
        call = poisoned.make_call(8, **kind, dtype="bfloat16", cache_dtype=dtype, key_scale="head", value_scale="head")
        call["key_scale"], call["value_scale"] = np.full(2, 1 / 32, np.float32), np.full(2, 1 / 32, np.float32)
        call["query"][..., 0] = 8
        for name in ("key_cache", "value_cache"):
            numbers = np.clip(np.nan_to_num(call[name].astype(np.float32)), -100, 100)
            call[name] = (numbers / (50 if name == "key_cache" else 1)).astype(call[name].dtype)
        call["key_cache"][..., 0] = 0
        for page in call["page_indices"][:, 0]:
            call["key_cache"][:, page, 0] = 0
            call["key_cache"][:, page, 0, 0] = 80
            call["value_cache"][:, page, 0] = 0
        parameters = dict(softmax_scale=0.8)
        oracle.assert_matches(call, *self.attend(call, kernel, cfg=cfg, **parameters), **parameters)

    def test_calls_as_serving_makes_them(self):
        rng = np.random.default_rng(0)
        for _ in range(25):
            call, parameters = poisoned.sample(rng)
            oracle.assert_matches(call, *self.attend(call, **parameters), **parameters)

    @parameterized.product(kernel=tuple(DTYPES), num_splits=(1, 3), scale=(None, *poisoned.GRANULARITIES))
    def test_the_same_bits_each_time(self, kernel, num_splits, scale):
        kind = dict(sequences=SEQUENCES, q_heads=8, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16")
        call = poisoned.make_call(4, **kind, key_ranges=True, **quantised_by(scale))
        cfg = PrefillPageAttentionConfig(num_splits=num_splits)
        first = self.attend(call, kernel, cfg=cfg)
        for _ in range(5):
            chex.assert_trees_all_equal(self.attend(call, kernel, cfg=cfg), first)

    @parameterized.product(scale=poisoned.GRANULARITIES, sliding_window=(None, 70), cfg=(None, FEW_ROWS))
    def test_what_no_row_sees_has_no_effect_on_any_bit(self, scale, sliding_window, cfg):
        kind = dict(sequences=SEQUENCES, q_heads=4, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16")
        call = poisoned.make_call(9, **kind, **quantised_by(scale), sliding_window=sliding_window)
        other = dict(call)
        poisoned.poison_unseen(np.random.default_rng(99), other, sliding_window)
        run = functools.partial(self.attend, kernel="mosaic_gpu", cfg=cfg, sliding_window=sliding_window)
        chex.assert_trees_all_equal(run(call), run(other))

    @parameterized.product(scale=("head", "slot"), dtype=QUANTISED)
    def test_a_row_has_the_same_bits_whatever_the_rows_beside_it(self, scale, dtype):
        kind = dict(sequences=((100, 900),), q_heads=4, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16")
        call = poisoned.make_call(10, **kind, tokens_before=0, **quantised_by(scale, dtype))
        wild = dict(call, query=call["query"].copy())
        wild["query"][1::2] *= 100
        results = [self.attend(each, "mosaic_gpu") for each in (call, wild)]
        self.assertTrue(np.any(results[0][0][1::2] != results[1][0][1::2]))
        chex.assert_trees_all_equal(*[[array[::2] for array in result] for result in results])

    @parameterized.product(
        kernel=tuple(DTYPES),
        kind=({}, quantised_by("head"), quantised_by("slot"), dict(head_dim=512, value_dim=512), dict(MLA, q_heads=64)),
    )
    def test_invariant(self, kernel, kind):
        """Each sequence alone has the bits that it has in the pack."""
        parameters = dict(value_dim=kind["value_dim"]) if kind.get("latent") else {}
        usual = dict(q_heads=8, kv_heads=2, head_dim=128, page_size=16, dtype="bfloat16", tokens_before=0)
        call = poisoned.make_call(5, SEQUENCES, **usual | kind)
        with policy("invariant"):
            together = self.attend(call, kernel, **parameters)
            for seq, (length, _) in enumerate(SEQUENCES):
                start = call["query_offsets"][seq]
                rows = slice(start, start + length)
                if not length:
                    continue
                alone = call | dict(
                    query=call["query"][rows],
                    context_lens=call["context_lens"][seq : seq + 1],
                    page_indices=call["page_indices"][seq : seq + 1],
                    query_offsets=np.int32([0, length]),
                )
                chex.assert_trees_all_equal(self.attend(alone, kernel, **parameters), tuple(x[rows] for x in together))

    def test_every_feature_is_taken(self):
        self.assertEqual(KERNELS["cuda"]["triton"].features, KERNELS["cuda"]["xla"].features)


if __name__ == "__main__":
    absltest.main()
