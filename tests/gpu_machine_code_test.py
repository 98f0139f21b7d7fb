"""What ptxas says of the Hopper kernel, where a GPU and so its toolchain is. Where there is none, all is skipped."""

import os
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

from paged_prefill.tests.append_test import QUANTISED
from paged_prefill.tests.gpus import gpus_for

CHILD = """
import functools
import jax
import jax.numpy as jnp
from paged_prefill import ragged_paged_prefill

def compile(seqs, new, context, q_heads, kv_heads, head_dim, value_dim, latent, cache_dtype):
    columns = context // 16
    shapes = dict(
        query=((seqs * new, q_heads, head_dim), jnp.bfloat16),
        key_cache=((kv_heads, seqs * columns, 16, head_dim), cache_dtype),
        value_cache=((kv_heads, seqs * columns, 16, value_dim), cache_dtype),
        context_lens=((seqs,), jnp.int32),
        page_indices=((seqs, columns), jnp.int32),
        query_offsets=((seqs + 1,), jnp.int32),
    )
    if cache_dtype != "bfloat16":
        # With two scales of slots, wide heads have two registers spilled between pieces, outside all loops over keys.
        scale = (kv_heads, seqs * columns, 16) if latent else (kv_heads,)
        shapes |= {{name: (scale, jnp.float32) for name in ("key_scale", "value_scale")}}
    call = {{name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}}
    parameters = dict(value_dim=value_dim, value_cache=None, value_scale=None) if latent else {{}}
    call = {{name: shape for name, shape in call.items() if name not in parameters}}
    run = functools.partial(ragged_paged_prefill, platform="cuda", **parameters)
    jax.jit(lambda call: run(**call)).lower(call).compile()

compile(*{case!r})
"""


class GpuMachineCodeTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        gpus_for(self, hopper=True)

    @parameterized.named_parameters(
        ("latent_decode_of_16_heads", (16, 1, 4096, 16, 1, 576, 512, True, "bfloat16")),
        ("latent_decode_of_128_heads", (64, 1, 4096, 128, 1, 576, 512, True, "bfloat16")),
        # Three registers between pieces, outside all loops over keys; nine with values of their own.
        ("latent_chunk", (1, 2048, 8192, 128, 1, 576, 512, True, "bfloat16"), 12),
        ("wide_chunk", (1, 4096, 4096, 16, 2, 512, 512, False, "bfloat16"), 36),
        ("latent_decode_of_128_heads_in_8_bits", (64, 1, 4096, 128, 1, 576, 512, True, "float8_e4m3fn")),
        ("latent_chunk_over_widened_keys", (1, 2048, 8192, 128, 1, 576, 512, True, "int8")),
        ("latent_drafts_in_8_bits", (1, 5, 8192, 128, 1, 576, 512, True, "int8")),
        ("wide_chunk_in_8_bits", (1, 200, 4096, 16, 2, 512, 512, False, "float8_e4m3fn")),
        ("wide_chunk_over_widened_keys", (1, 4096, 4096, 16, 2, 512, 512, False, "float8_e4m3fn"), 36),  # as of 16 bits
        # Four registers outside all loops over keys, and five in that over masked blocks.
        ("four_warpgroups", (1, 8192, 8192, 32, 8, 64, 64, False, "bfloat16"), 36),
        ("two_teams_of_short_prompts", (16, 100, 256, 32, 8, 128, 128, False, "bfloat16")),
        ("two_teams_of_decode_steps", (64, 1, 4096, 32, 8, 128, 128, False, "bfloat16")),
        *((f"decode_steps_in_{dtype}", (64, 1, 4096, 32, 8, 128, 128, False, dtype)) for dtype in QUANTISED),
        # Ten registers between pieces, outside all loops over keys.
        ("prompt_over_widened_keys", (1, 8192, 8192, 32, 8, 128, 128, False, "float8_e5m2"), 40),
        ("wide_decode_steps_of_32_heads", (64, 1, 4096, 64, 2, 256, 256, False, "bfloat16")),
    )
    def test_products_run_beside_one_another_and_no_register_is_spilled(self, case, spilled_bytes=0):
        """ptxas serialises products where it doubts what reads their registers, and says so (its remarks C7510 on)."""
        flags = dict(MOSAIC_GPU_DUMP_PTXAS="1", XLA_PYTHON_CLIENT_PREALLOCATE="false", JAX_ENABLE_COMPILATION_CACHE="0")
        command = [sys.executable, "-c", CHILD.format(case=case)]
        done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        self.assertEqual(done.returncode, 0, said[-3000:])
        found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
        self.assertNotEmpty(found, said[-3000:])
        self.assertLessEqual(max(int(stored) for stored, _ in found), spilled_bytes)
        self.assertNotRegex(said, r"C75\d\d")


if __name__ == "__main__":
    absltest.main()
