"""The plan by itself: whatever is wished, every device can run its part, and what can stay where it is stays."""

import math
import types

from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P
import numpy as np

from paged_prefill.primitive.cut import Cut, plan, settle
from paged_prefill.primitive.operands import PREFILL, Shapes
from paged_prefill.sharding.rule import sharding_rule

MESH = {"data": 2, "model": 4}


def call(q_heads, kv_heads, batch=(), pools=(), tokens=5, num_pages=9) -> Shapes:
    """The shapes of a call's operands."""
    cache = (*pools, kv_heads, num_pages, 4, 8)
    return Shapes(
        PREFILL,
        dict(
            query=(*batch, tokens, q_heads, 8), key_cache=cache, value_cache=cache, context_lens=(*batch, 2),
            page_indices=(*batch, 2, 3), query_offsets=(*batch, 3),
        ),
        len(pools),
    )  # fmt: skip


class PlanTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("query_alone", (16, 8), dict(query=P(None, "model")), ("model",), ()),
        ("caches_alone", (16, 8), dict(key_cache=P("model")), ("model",), ("model",)),
        ("one_cache_is_enough", (16, 8), dict(value_cache=P("model")), ("model",), ("model",)),
        ("output_alone", (16, 8), dict(out=P(None, "model")), ("model",), ()),
        ("lse_alone", (16, 8), dict(lse=P(None, "model")), ("model",), ()),
        ("fewer_kv_heads_than_devices", (8, 2), dict(query=P(None, ("data", "model"))), ("data", "model"), ()),
        (
            "caches_cut_less", (8, 2), dict(query=P(None, ("data", "model")), key_cache=P("data")),
            ("data", "model"), ("data",),
        ),
        ("caches_first", (16, 8), dict(query=P(None, "model"), key_cache=P("data")), ("data", "model"), ("data",)),
        ("misaligned", (12, 6), dict(query=P(None, "model")), (), ()),
        ("misaligned_at_the_second_axis", (12, 6), dict(query=P(None, ("data", "model"))), ("data",), ()),
        ("misaligned_but_caches_cut", (12, 6), dict(query=P(None, "model"), key_cache=P("data")), ("data",), ("data",)),
        (
            "an_output_may_cut_further", (16, 8), dict(key_cache=P("model"), out=P(None, ("model", "data"))),
            ("model", "data"), ("model",),
        ),
    )  # fmt: skip
    def test_heads(self, heads, specs, cut_heads, cut_kv_heads):
        self.assertEqual(settle(MESH, call(*heads), specs), Cut((), cut_heads, cut_kv_heads))

    @parameterized.named_parameters(
        ("query", dict(query=P("data", None, None, "model")), (("data",), ()), ("model",)),
        ("pools_first", dict(key_cache=P("data"), query=P("model")), (("data",), ()), ()),
        ("caches_heads_before_querys_batch", dict(key_cache=P(None, "data"), query=P("data")), ((), ()), ("data",)),
        ("indices_last", dict(context_lens=P("model"), query=P(None, None, None, "model")), ((), ()), ("model",)),
        ("indices_alone", dict(page_indices=P(None, "data")), ((), ("data",)), ()),
        ("does_not_divide", dict(query=P(None, "model")), ((), ()), ()),
        ("divides_by_the_first", dict(query=P(("data", "model"))), (("data",), ()), ()),
    )
    def test_batch(self, specs, batch, heads):
        cut = settle(MESH, call(8, 8, batch=(2, 6), pools=(2,)), specs)
        self.assertEqual((cut.batch, cut.heads), (batch, heads))

    @parameterized.named_parameters(
        ("caches", dict(key_cache=P(None, "model")), (), ("model",), ()),
        ("heads_beside", dict(key_cache=P("data", "model")), ("data",), ("model",), ()),
        ("the_other_cache", dict(value_cache=P(None, ("model", "data"))), (), ("model", "data"), ()),
        ("before_the_querys_heads", dict(key_cache=P(None, "model"), query=P(None, "model")), (), ("model",), ()),
        (
            "query_heads_over_what_is_left", dict(key_cache=P(None, "model"), query=P(None, "data")),
            ("data",), ("model",), (),
        ),
        ("as_far_as_they_divide", dict(key_cache=P(None, ("data", "model")), tokens=8, num_pages=6), (), ("data",), ()),
        ("querys_tokens_stay", dict(key_cache=P(None, "model"), query=P("model"), tokens=8), (), ("model",), ()),
        ("results_tokens", dict(key_cache=P(None, "model"), out=P("model"), tokens=8), (), ("model",), ("model",)),
        ("and_further", dict(key_cache=P(None, "data"), lse=P(("data", "model")), tokens=8), (), ("data",), ("data",)),
        ("over_other_axes", dict(key_cache=P(None, "data"), out=P(("model", "data")), tokens=8), (), ("data",), ()),
        ("that_do_not_divide", dict(key_cache=P(None, "model"), out=P("model"), tokens=6), (), ("model",), ()),
        ("of_whole_caches", dict(out=P("model"), tokens=8), (), (), ()),
    )  # fmt: skip
    def test_pages(self, given, heads, pages, tokens):
        shapes = call(8, 8, tokens=given.pop("tokens", 5), num_pages=given.pop("num_pages", 8))
        cut = settle(MESH, shapes, given)
        self.assertEqual((cut.heads, cut.pages, cut.tokens), (heads, pages, tokens))

    def test_the_rule_asks_for_no_more_than_is_whole(self):
        """What the compiler is told: pages go together and may be cut, and results' tokens apart from the query's."""
        rule = sharding_rule(call(16, 8), types.SimpleNamespace(shape=MESH))
        may_be_cut = ("num_pages", "result_tokens", "kv_heads", "q_heads")
        self.assertNoCommonElements(rule.need_replication_factors, may_be_cut)
        query, key_cache, value_cache = rule.operand_mappings[:3]
        self.assertEqual((key_cache[1], value_cache[1]), ("num_pages", "num_pages"))
        self.assertEqual([x[0] for x in (query, *rule.result_mappings)], ["tokens", "result_tokens", "result_tokens"])

    def test_any_wishes_give_a_cut_that_runs(self):
        """5,000 random wishes: no axis twice, everything divides, parts keep groups, KV heads follow the query's."""
        rng = np.random.default_rng(0)
        mesh = {"a": 2, "b": 2, "c": 3}

        def axes():
            return tuple(rng.permutation(list(mesh))[: rng.integers(0, 4)].tolist())

        cuts = 0
        for _ in range(5000):
            kv_heads, group = rng.integers(1, 13, 2)
            batch = tuple(int(x) for x in rng.integers(1, 13, rng.integers(0, 3)))
            num_pages = int(rng.integers(0, 13))
            wishes = [Cut(tuple(axes() for _ in batch), axes(), axes(), axes()) for _ in range(3)]
            cut = plan(mesh, batch, int(kv_heads * group), int(kv_heads), num_pages, wishes)
            used = [*cut.heads, *cut.pages, *(axis for dim in cut.batch for axis in dim)]
            self.assertEqual(num_pages % math.prod(mesh[a] for a in cut.pages), 0)
            self.assertLen(used, len(set(used)))
            for size, dim in zip(batch, cut.batch, strict=True):
                self.assertEqual(size % math.prod(mesh[a] for a in dim), 0)
            self.assertEqual(cut.heads[: len(cut.kv_heads)], cut.kv_heads)
            self.assertEqual(kv_heads % math.prod(mesh[a] for a in cut.kv_heads), 0)
            part, rest = divmod(int(kv_heads * group), math.prod(mesh[a] for a in cut.heads))
            self.assertEqual(rest, 0)
            self.assertTrue(part % group == 0 or group % part == 0)
            cuts += bool(used)
        self.assertGreater(cuts, 2500)


if __name__ == "__main__":
    absltest.main()
