"""What stands around a call (hints, an overlay, the policy) reaches it wherever and whenever it is traced."""

import concurrent.futures
import functools
from unittest import mock

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from paged_prefill import (
    PrefillPageAttentionConfig,
    create_shard_map_wrapper,
    lowering,
    paged_prefill_p,
    ragged_paged_prefill,
    sharding_hints,
)
from paged_prefill.primitive.context import current_policy, overlay, policy
from paged_prefill.tests import cases, meshes

attend = functools.partial(ragged_paged_prefill, cfg=cases.ONE_HEIGHT, return_lse=True)


def warm(call, *operands):
    """Traces a function without anything around it."""
    jax.make_jaxpr(call)(*operands)
    return call


class ContextTest(parameterized.TestCase):
    """What stands around a call reaches it wherever it was traced before."""

    PACK = meshes.batched_pack(q_heads=8, kv_heads=4)

    def in_a_scan(self):
        def body(carry, _):
            return carry + attend(*self.PACK)[0].sum(), None

        return lambda *pack: lax.scan(body, 0.0, None, 2)[0]

    def parameters_of(self, call):
        """The parameters of the one call somewhere in a jaxpr."""
        found = []

        def look(jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name == "paged_prefill":
                    found.append(equation.params)
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    if hasattr(inner, "eqns"):
                        look(inner)

        look(jax.make_jaxpr(call)(*self.PACK).jaxpr)
        (parameters,) = found
        return parameters

    @parameterized.named_parameters(
        ("jit", lambda self: jax.jit(lambda *pack: attend(*pack))),
        ("checkpoint", lambda self: jax.checkpoint(lambda *pack: attend(*pack))),
        ("jit_in_jit", lambda self: jax.jit(lambda *pack: jax.jit(attend)(*pack))),
        ("scan", lambda self: jax.jit(self.in_a_scan())),
    )
    def test_reaches_a_warm_trace(self, make):
        call = warm(make(self), *self.PACK)
        self.assertIsNone(self.parameters_of(call)["hint"])
        with sharding_hints(head_axis="model"), overlay(PrefillPageAttentionConfig(num_stages=3)):
            inside = self.parameters_of(call)
        self.assertEqual(inside["hint"].heads, ("model",))
        self.assertEqual(inside["config"].num_stages, 3)
        self.assertIsNone(self.parameters_of(call)["hint"])
        self.assertIsNone(self.parameters_of(call)["config"].num_stages)

    def test_reaches_a_warm_jit_in_another_thread_and_stays_there(self):
        call = warm(jax.jit(lambda *pack: attend(*pack)), *self.PACK)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:

            def inside():
                with sharding_hints(head_axis="model"):
                    return self.parameters_of(call)["hint"]

            self.assertEqual(pool.submit(inside).result().heads, ("model",))
            self.assertIsNone(self.parameters_of(call)["hint"])

    def test_an_overlay_reaches_bind_and_the_shard_map_wrapper(self):
        single = [jnp.asarray(x[0]) if i not in (1, 2) else jnp.asarray(x) for i, x in enumerate(self.PACK)]
        one = (single[0], single[1], single[2], single[3][:1], single[4][0])
        mesh = meshes.mesh((8,), names=("model",))
        seen = []

        def spy(*operands, config, **parameters):
            seen.append(config)
            return run(*operands, config=config, **parameters)

        run = lowering.run
        with mock.patch.object(lowering, "run", spy), overlay(cases.ONE_HEIGHT):
            jax.jit(paged_prefill_p.bind).lower(*single)
            function, arguments = create_shard_map_wrapper(
                *one, mesh=mesh, in_specs=(P(None, "model"), P(), P(), P(), P()), out_specs=P(None, "model")
            )
            jax.jit(function).lower(*arguments)
        self.assertEqual(seen, [cases.ONE_HEIGHT] * 2)


class PolicyTest(absltest.TestCase):
    def test_threads_have_policies_of_their_own(self):
        """One enters "on", another "off"; the first leaves, and the other still reads "off"."""
        entered, left = concurrent.futures.Future(), concurrent.futures.Future()

        def other():
            with policy("off"):
                entered.set_result(None)
                left.result(timeout=60)
                return current_policy()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            with policy("on"):
                inside = pool.submit(other)
                entered.result(timeout=60)
                self.assertEqual(current_policy(), "on")
            left.set_result(None)
            self.assertEqual(inside.result(timeout=60), "off")

    def test_a_policy_lowers_a_warm_function_again(self):
        pack, seen = meshes.batched_pack(batch=()), []
        call = jax.jit(ragged_paged_prefill)
        run = lowering.run

        def spy(*operands, **parameters):
            seen.append(current_policy())
            return run(*operands, **parameters)

        with mock.patch.object(lowering, "run", spy):
            for name in ("off", "cache", "off"):
                with policy(name):
                    call.lower(*pack)
        self.assertEqual(seen[:2], ["off", "cache"])


if __name__ == "__main__":
    absltest.main()
