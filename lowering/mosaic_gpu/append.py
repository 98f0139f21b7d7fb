"""`append_to_pages` through Pallas Mosaic GPU: one launch for keys and values, in the memory of the given caches."""

import math

import jax.numpy as jnp

from paged_prefill.lowering.mosaic_gpu.hopper.append import CHUNK_BYTES, Launch, append
from paged_prefill.lowering.writer import MANY_TOKENS, Writer, places_of
from paged_prefill.primitive.layout import OWN_LAYOUT

DTYPES = ("bfloat16", "float16", "float32")


class MosaicGpuWriter(Writer):
    """Writes few tokens as they are on Hopper GPUs: what decode steps do."""

    name = "mosaic_gpu"
    platforms = ("cuda",)

    def is_for(self, device):
        """Whether the device is a Hopper GPU."""
        return super().is_for(device) and device.compute_capability == "9.0"

    def _reason_against(self, operands, device, layout):
        cache = operands["key_cache"]
        rows = math.prod(layout.lead(cache.shape)) * layout.rows(layout.sizes(cache.shape))["pool"]
        if rows >= 2**31:
            return f"a cache may have at most {2**31 - 1} rows, a slot of each head and pool, got {rows}"
        return None

    def pays(self, operands):
        """It moves whole chunks, and does not quantise."""
        new = [operands[name] for name in ("key", "value") if name in operands]
        as_they_are = operands["key_cache"].dtype == operands["key"].dtype and operands["key"].dtype.name in DTYPES
        whole = all(x.shape[-1] * x.dtype.itemsize % CHUNK_BYTES == 0 for x in new)
        return as_they_are and whole and math.prod(operands["key"].shape[:-2]) < MANY_TOKENS

    def write(self, operands, cache_batch_dims, device, layout=OWN_LAYOUT):
        """Leading dimensions are folded on the way in and out, which moves nothing."""
        caches = [operands[name] for name in ("key_cache", "value_cache") if name in operands]
        new = [operands[name] for name in ("key", "value") if name in operands]
        if 0 in (*new[0].shape, *caches[0].shape, *operands["page_indices"].shape):
            return caches
        launch = Launch(**places_of(operands, cache_batch_dims, layout))
        names = ("context_lens", "page_indices", "query_offsets", "layer")
        indices = [operands[name].reshape(-1).astype(jnp.int32) for name in names if name in operands]
        flat = lambda arrays: [x.reshape(-1, x.shape[-1]) for x in arrays]
        written = append(launch, indices, flat(new), flat(caches))
        return [x.reshape(cache.shape) for x, cache in zip(written, caches)]
