"""What tests on 8 virtual CPU devices share: meshes, small packs that fit them, and the collectives of a module."""

import contextlib
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from paged_prefill.lowering.choose import XLA
from paged_prefill.primitive.attention import normalised
from paged_prefill.primitive.layout import CacheLayout
from paged_prefill.tests.packs import Pack

XLA_ATTEND = XLA.attend  # which the dense kernel stands in for

COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<op>all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(-start)?\("
)


def mesh(shape=(2, 4), kind=AxisType.Auto, names=("data", "model")):
    """A mesh over all 8 devices."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def batched_pack(seed=0, *, batch=(4,), pools=0, q_heads=8, kv_heads=8, tokens=5, num_pages=9) -> Pack:
    """Random packs of two sequences each; the first `pools` dimensions of `batch` have caches of their own.

    Host arrays, with finite junk wherever no row looks: a program must put no device's pages in another's place.
    """
    rng = np.random.default_rng(seed)
    page_size, head_dim, value_dim, pages_per_seq = 4, 8, 12, 3
    cache = (*batch[:pools], kv_heads, num_pages, page_size)
    first = rng.integers(0, tokens + 1, (*batch, 1))
    return Pack(
        rng.standard_normal((*batch, tokens, q_heads, head_dim), np.float32),
        rng.standard_normal((*cache, head_dim), np.float32),
        rng.standard_normal((*cache, value_dim), np.float32),
        rng.integers(2, page_size * pages_per_seq + 1, (*batch, 2)).astype(np.int32),
        rng.integers(0, num_pages, (*batch, 2, pages_per_seq)).astype(np.int32),
        np.concatenate([0 * first, first, 0 * first + tokens], -1).astype(np.int32),
    )


def put(over, pack, specs) -> Pack:
    """The pack on the mesh `over`, cut as `specs` say."""
    return Pack(*(jax.device_put(x, NamedSharding(over, spec)) for x, spec in zip(pack, specs, strict=True)))


def specs(batch=None, heads=None, kv_heads=None, batch_dims=1, pool_axis=None) -> Pack:
    """The usual way to cut: a pack's first batch dimension, its heads, and the caches'."""
    lead = (batch, *(None,) * (batch_dims - 1)) if batch_dims else ()
    cache = P(*(() if pool_axis is None else (pool_axis,)), kv_heads)
    return Pack(P(*lead, None, heads), cache, cache, P(*lead), P(*lead), P(*lead))


def specs_of_call(call, batch=None, heads=None, kv_heads=None, *, pages=None, pools=0, layers=1) -> dict[str, P]:
    """The spec of each operand of a call: what cuts its first batch dimension, its heads, the caches', and the pages."""
    pool = (batch,) * pools + (None,) * layers
    cache = P(*pool, kv_heads, pages)
    scales = {name: P(*cache[: call[name].ndim]) for name in ("key_scale", "value_scale") if name in call}
    of_call = dict(query=P(batch, None, heads), key_cache=cache, value_cache=cache, sinks=P(batch, heads), **scales)
    return {name: of_call.get(name, P(batch)) for name in call}


def put_call(over, call, cut) -> dict[str, jax.Array]:
    """The operands of a call on the mesh `over`, cut as `cut` says, by name."""
    return {name: jax.device_put(x, NamedSharding(over, cut[name])) for name, x in call.items()}


def assert_close(got, want) -> None:
    """Holds (out, lse) to float32 accuracy."""
    for a, b in zip(got, want, strict=True):
        a = np.asarray(a)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@contextlib.contextmanager
def partitioner(*, shardy: bool):
    """Compiles by Shardy, or by GSPMD as before it."""
    jax.config.update("jax_use_shardy_partitioner", shardy)
    try:
        yield
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)


def collectives(compiled) -> list[tuple[str, str]]:
    """The (operation, type of its result) of every collective in a compiled module."""
    found = COLLECTIVE.finditer(compiled.as_text())
    return [(match["op"], re.sub(r"\{[^}]*\}", "", match["type"])) for match in found]


def dense_kernel(call, config, device):
    """`Kernel.attend` that compiles fast: dense, each row with a copy of its keys. Pools apart go to XLA's."""
    if "pools_apart" in call.problem.features:
        return XLA_ATTEND(call, config, device)
    problem, query, sequences, num_kv_heads = call.problem, call.query, call.sequences, call.problem.num_kv_heads
    softmax_scale, soft_cap = problem.attention.softmax_scale, problem.attention.attn_logits_soft_cap
    tokens, q_heads, head_dim = query.shape
    row = jnp.arange(tokens, dtype=jnp.int32)
    start, end = sequences.start[None], (sequences.start + sequences.length)[None]
    owner = (row[:, None] >= start) & (row[:, None] < end)
    seq = jnp.argmax(owner, axis=1)
    position = sequences.context_len[seq] - sequences.length[seq] + row - sequences.start[seq]
    low, high = problem.attention.visible_keys(position) if call.ranges is None else jnp.unstack(call.ranges, axis=1)
    high = jnp.where(owner.any(axis=1), jnp.minimum(high, sequences.context_len[seq]), 0)
    pages = sequences.page_indices[seq][:, None]
    pool = sequences.pool[seq][:, None, None]
    heads = call.kv_head_start + jnp.arange(num_kv_heads, dtype=jnp.int32)[None, :, None]

    def gather(cache, scale):  # [tokens, num_kv_heads, keys, features]
        gathered = cache[pool, heads, pages].reshape(tokens, num_kv_heads, -1, cache.shape[-1]).astype(jnp.float32)
        if scale is not None and scale.ndim == 4:
            gathered *= scale[pool, heads, pages].reshape(*gathered.shape[:3], 1)
        elif scale is not None:
            scale = scale.reshape(scale.shape[0], 1) if scale.ndim == 1 else scale
            gathered *= scale[pool, heads if scale.shape[1] > 1 else 0][..., None]
        return gathered

    def in_order(keys, values):  # as this project lays them
        if keys is None or keys.ndim <= 2:
            return keys, values
        layout = CacheLayout(re.sub("[()]", "", problem.layout.name))  # whose pairs have a dimension of their own
        arrays = [half for x in (keys, values) if x is not None for half in layout.to_default(x, 1)]
        return arrays if len(arrays) == 2 else (*arrays, None)

    key_pages, value_pages = in_order(call.key_pages, call.value_pages)
    key_scale, value_scale = in_order(call.key_scale, call.value_scale)
    grouped = query.reshape(tokens, num_kv_heads, -1, head_dim).astype(jnp.float32)
    keys = gather(key_pages, key_scale)
    values = keys[..., : problem.value_dim] if value_pages is None else gather(value_pages, value_scale)
    logits = softmax_scale * jnp.einsum("tkgd,tkjd->tkgj", grouped, keys)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    key = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None]
    visible = (low[:, None] <= key) & (key < high[:, None])
    if call.tree is not None:
        new, last = key - (sequences.context_len - sequences.length)[seq][:, None], call.tree.shape[1] - 1
        word = jnp.take_along_axis(call.tree, jnp.clip(new // 32, 0, last), axis=1)
        in_tree = word >> (new % 32).astype(jnp.uint32) & jnp.uint32(1) == 1
        visible &= in_tree | (new < 0) | (new // 32 > last)
    weights = jnp.where(visible[:, None, None], jnp.exp(logits), 0.0)
    values = jnp.where(visible[:, None, :, None], values, 0.0)
    out = jnp.einsum("tkgj,tkjv->tkgv", weights, values)
    out, lse = normalised(out, weights.sum(-1), jnp.float32(0.0))
    out, lse = out.reshape(tokens, q_heads, -1).astype(query.dtype), lse.reshape(tokens, q_heads)
    return call.with_sinks(out, lse)


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts another Python process on `code`, with the same packages and devices, the CPU's, unless told otherwise."""
    paths = os.pathsep.join(filter(None, sys.path))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
