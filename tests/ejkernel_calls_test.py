"""The calls that EasyDeL makes, `paged_prefill.ejkernel`: argument for argument, against the oracle."""

import dataclasses
import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from paged_prefill import PrefillPageAttentionConfig, ejkernel
from paged_prefill.lowering.choose import XLA
from paged_prefill.tests import layouts, meshes, oracle, poisoned

SIZES = dict(page_size=4, head_dim=8, q_heads=4, kv_heads=2)
SEQUENCES = ((5, 34), (1, 44), (7, 9))
# The names of the index arrays are the oracle's, in the order of both functions.
PACK = ("context_lens", "page_indices", "query_offsets")
CFG = PrefillPageAttentionConfig(block_q=1, block_kv=16)


@dataclasses.dataclass
class TheirConfig:
    """A configuration as ejKernel has them, of sizes for its own kernels."""

    num_warps: int = 8
    num_stages: int = 17
    block_dim: int = 128
    platform: str = "auto"
    backend: str = "any"


def arguments(call, function):
    """The positional arguments of a call whose operands are in this project's order."""
    laid = layouts.lay(call, {"unified_attention": "pskd", "ragged_page_attention_v2": "ps(k2)d"}[function])
    caches = [laid[x] for x in ("key_cache", "value_cache") if laid[x] is not None]
    last = [len(call["context_lens"])] if function == "ragged_page_attention_v2" else []
    return [laid["query"], *caches, *(laid[x] for x in PACK), *last]


def run(call, function, sinks=None, **parameters):
    """The output of one of the two functions."""
    attend = functools.partial(getattr(ejkernel, function), softmax_aux=sinks, cfg=CFG, **parameters)
    return jax.jit(attend)(*arguments(call, function))


BOTH = parameterized.parameters("unified_attention", "ragged_page_attention_v2")


class ValuesTest(parameterized.TestCase):
    @BOTH
    def test_window_cap_scale_and_sinks(self, function):
        call = poisoned.make_call(0, SEQUENCES, **SIZES, sinks=True, sliding_window=9)
        out = run(call, function, call["sinks"], sliding_window=9, logits_soft_cap=2.0, softmax_scale=0.3)
        oracle.assert_matches(call, out, sliding_window=9, attn_logits_soft_cap=2.0, softmax_scale=0.3)

    @BOTH
    def test_0_is_off_and_others_have_no_effect(self, function):
        call = poisoned.make_call(1, SEQUENCES, **SIZES)
        others = dict(seq_threshold_3d=3) if function == "unified_attention" else dict(
            compute_dtype=jnp.float16, optimized=True, mask_value=-1e30, vmem_limit_bytes=7
        )  # fmt: skip
        oracle.assert_matches(call, run(call, function, sliding_window=0, logits_soft_cap=0, **others))

    @parameterized.parameters(None, 5)
    def test_not_causal(self, window):
        """Rows see what comes after them, and with a window what it leaves before."""
        call = poisoned.make_call(2, SEQUENCES, **SIZES, poison=False)
        ranges = np.zeros((len(call["query"]), 2), np.int32)
        for seq, context in enumerate(call["context_lens"]):
            start, end = call["query_offsets"][seq : seq + 2]
            position = context - end + np.arange(start, end)
            low = 0 * position if window is None else np.maximum(position - window + 1, 0)
            ranges[start:end] = np.stack([low, 0 * position + context], -1)
        out = run(call, "unified_attention", causal=False, sliding_window=window)
        oracle.assert_matches(call | dict(key_ranges=ranges), out)

    def test_rows_past_num_seqs_are_stale(self):
        """Whatever they hold, pages that do not exist and offsets that decrease among it; a number or an array, traced."""
        call = poisoned.make_call(3, SEQUENCES, **SIZES, tokens_after=3)
        want = dict(call)
        given = arguments(call, "ragged_page_attention_v2")
        pages = np.concatenate([call["page_indices"], np.full_like(call["page_indices"], 2**31 - 1)])
        lens = np.concatenate([call["context_lens"], [2**31 - 1, -5, 40]]).astype(np.int32)
        offsets = np.concatenate([call["query_offsets"], [9**9, 0, 2]]).astype(np.int32)
        stale = [*given[:2], lens, pages, offsets]
        attend = jax.jit(functools.partial(ejkernel.ragged_page_attention_v2, cfg=CFG))
        for num_seqs in (np.int32(3), np.int32([3]), np.int32([3, 77])):
            oracle.assert_matches(want, attend(*stale, num_seqs))
        none = attend(*stale, np.int32(0))
        np.testing.assert_array_equal(none, 0)

    def test_queries_of_another_dtype(self):
        """Products in the caches' dtype, the output in the queries'."""
        call = poisoned.make_call(4, SEQUENCES, **SIZES, dtype="bfloat16")
        wide = call | dict(query=call["query"].astype(np.float32))
        out = run(wide, "unified_attention")
        self.assertEqual(out.dtype, jnp.float32)
        oracle.assert_matches(call, out.astype(jnp.bfloat16))

    def test_a_configuration_of_theirs(self):
        call = poisoned.make_call(5, SEQUENCES, **SIZES)
        given = arguments(call, "unified_attention")
        out = ejkernel.unified_attention(*given, cfg=TheirConfig(), platform="xla")
        oracle.assert_matches(call, out)
        with self.assertRaisesRegex(ValueError, "platform='triton'"):
            ejkernel.unified_attention(*given, cfg=TheirConfig(platform="triton"))


class MeshTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.enter_context(absltest.mock.patch.object(type(XLA), "attend", staticmethod(meshes.dense_kernel)))
        self.call = poisoned.make_call(
            6, ((4, 11), (1, 9)), page_size=2, head_dim=4, q_heads=8, kv_heads=4, sinks=True, poison=False
        )

    @parameterized.parameters((None, "model"), (None, None), ("pages", "model"))
    def test_unified_attention_under_specs(self, pages, kv_heads):
        mesh = meshes.mesh((2, 4), names=("pages", "model"))
        call = dict(self.call)
        spare = -call["key_cache"].shape[1] % 2
        for name in ("key_cache", "value_cache"):
            call[name] = np.pad(call[name], ((0, 0), (0, spare), (0, 0), (0, 0)))
        cache = P(pages, None, kv_heads)
        specs = (P(None, "model"), cache, cache, P(), P(), P(), None, None, P("model"))
        out = run(call, "unified_attention", call["sinks"], mesh=mesh, in_specs=specs, out_specs=P(None, "model"))
        np.testing.assert_allclose(out, oracle.exact(call)[0], atol=1e-5)

    def test_ragged_page_attention_v2_under_specs(self):
        mesh, call = meshes.mesh((8,), names=("model",)), self.call
        specs = (P(None, "model"), P(), P(), P(), P(), P(), None)  # of fewer heads than devices, the pages are whole
        call = {name: x for name, x in call.items() if name != "sinks"}
        out = run(call, "ragged_page_attention_v2", mesh=mesh, in_specs=specs, out_specs=P(None, "model"))
        np.testing.assert_allclose(out, oracle.exact(call)[0], atol=1e-5)


class ErrorTest(parameterized.TestCase):
    def given(self, function="unified_attention"):
        return arguments(poisoned.make_call(7, SEQUENCES, **SIZES), function)

    def test_what_has_no_counterpart(self):
        bias = np.zeros((7, 7), np.float32)
        for given, words in (
            (dict(alibi_slopes=np.ones(4, np.float32)), "takes no alibi_slopes here"),
            (dict(alibi_slopes=np.ones(4, np.float32), qq_bias=bias), "takes no alibi_slopes and no qq_bias here"),
            (dict(qq_bias=bias), "takes no qq_bias here: logits have no bias. A qq_bias of 0 and -inf is a tree"),
        ):
            with self.assertRaisesRegex(NotImplementedError, words):
                ejkernel.unified_attention(*self.given(), **given)

    def test_a_kernel_that_only_they_have(self):
        with self.assertRaisesRegex(ValueError, "platform must be one of .*which is a kernel of ejKernel's"):
            ejkernel.unified_attention(*self.given(), platform="tilelang")

    @parameterized.product(function=("unified_attention", "ragged_page_attention_v2"), value=(np.zeros(2), "traced"))
    def test_what_may_be_0_or_None_and_is_neither(self, function, value):
        """Arrays, which have no truth value: the error says what each is here and there."""

        def call(value, *given):
            return getattr(ejkernel, function)(*given, **{name: value})

        for name, own in (("sliding_window", "sliding_window"), ("logits_soft_cap", "attn_logits_soft_cap")):
            with self.assertRaisesRegex(TypeError, rf"^{own} (must be|is a static parameter)") as caught:
                jax.jit(call)(1, *self.given(function)) if isinstance(value, str) else call(value, *self.given(function))
            self.assertIn("attn_logits_soft_cap is logits_soft_cap", "".join(caught.exception.__notes__))
        with self.assertRaisesRegex(TypeError, "^sinks must be an array of numbers") as caught:
            getattr(ejkernel, function)(*self.given(function), softmax_aux="none")
        self.assertIn("sinks is softmax_aux", "".join(caught.exception.__notes__))

    @parameterized.parameters((None,), ("no",), (np.zeros(2),))
    def test_causal_is_true_or_false(self, causal):
        with self.assertRaisesRegex(TypeError, "causal must be True or False, got"):
            ejkernel.unified_attention(*self.given(), causal=causal)

    def test_shapes_and_values(self):
        given = self.given()
        with self.assertRaisesRegex(ValueError, r"softmax_aux must have shape \[q_heads\], \(4,\), got \(2, 1\)"):
            ejkernel.unified_attention(*given, softmax_aux=np.ones((2, 1), np.float32))
        with self.assertRaisesRegex(ValueError, r"softmax_aux must have shape \[q_heads\], \(4,\), got \(3,\)"):
            ejkernel.unified_attention(*given, softmax_aux=[0.0, 1.0, 2.0])
        with self.assertRaisesRegex(TypeError, "value_cache must be an array, got None"):
            ejkernel.unified_attention(*given[:2], None, *given[3:])
        for num_seqs, error, words in (
            (np.zeros(0, np.int32), ValueError, r"num_seqs must be a number, or an array that begins with it, got shape \(0,\)"),
            (None, TypeError, "num_seqs must be an array of integers, got None"),
        ):
            with self.assertRaisesRegex(error, words):
                ejkernel.ragged_page_attention_v2(*self.given("ragged_page_attention_v2")[:5], num_seqs)
        with self.assertRaisesRegex(ValueError, "page_indices must have shape") as caught:
            ejkernel.unified_attention(*given[:4], given[4][:, 0], given[5])
        self.assertIn("page_indices is block_tables", "".join(caught.exception.__notes__))
        with self.assertRaisesRegex(TypeError, "cfg must be a PrefillPageAttentionConfig, one of ejKernel's, or None"):
            ejkernel.unified_attention(*given, cfg=3)
        with self.assertRaisesRegex(ValueError, "in_specs must have one PartitionSpec or None for each of 9 arrays, got 6 of them"):
            mesh = meshes.mesh((8,), names=("model",))
            ejkernel.unified_attention(*given, mesh=mesh, in_specs=(P(),) * 6, out_specs=P())
        with self.assertRaisesRegex(ValueError, "mask_value must be at most"):
            ejkernel.ragged_page_attention_v2(*self.given("ragged_page_attention_v2"), mask_value=-3.0)
        with self.assertRaisesRegex(ValueError, "key_cache must have an even number of heads"):
            query, pages, *rest = self.given("ragged_page_attention_v2")
            ejkernel.ragged_page_attention_v2(query, pages[:, :, :3], *rest)


if __name__ == "__main__":
    absltest.main()
