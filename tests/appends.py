"""Random appends for tests, and what they should write."""

import numpy as np

from paged_prefill.primitive.quantised import largest_number
from paged_prefill.tests import oracle, poisoned

SIZES = dict(page_size=4, head_dim=8, value_dim=12, tokens_before=1, tokens_after=1)
SEQUENCES = ((5, 9), (0, 3), (3, 2), (1, 14))
QUANTISED = ("float8_e4m3fn", "float8_e5m2", "int8")
CACHES = ("key_cache", "value_cache", "key_scale", "value_scale")


def make_append(seed, sequences=SEQUENCES, *, dtype="float32", latent=False, **kind):
    """The operands of an append to random caches: those of a call, and new tokens in place of its query."""
    call = poisoned.make_call(seed, sequences, poison=False, dtype=dtype, latent=latent, **SIZES | kind)
    rng = np.random.default_rng(seed)
    lead = (*call.pop("query").shape[:-2], call["key_cache"].shape[-4])
    new = {
        name: rng.standard_normal((*lead, (SIZES | kind)[dim])).astype(dtype)
        for name, dim in dict(key="head_dim", value="value_dim").items()
    }
    return call | new | (dict(value=None) if latent else {})


def expected(call, scales=()):
    """The caches and scales once each token is stored, one by one.

    `scales` are those that the operation wrote, by name, if any: held to the definition, but for the last bit of its
    division, and then what the numbers are divided by.
    """
    scales = dict(scales)
    written = {name: np.array(call[name]) for name in CACHES if call.get(name) is not None}
    for pack, sequence in oracle.sequences(call | dict(query=call["key"])):
        for token in range(sequence.start, sequence.end):
            key = len(sequence.page) - (sequence.end - token)
            if key < 0:
                continue
            for name in ("key", "value"):
                if call[name] is None:
                    continue
                pool = oracle.pool_of(call, f"{name}_cache", pack)
                at = (*pool, slice(None), sequence.page[key], sequence.slot[key])
                numbers, cache = call[name][pack][token].astype(np.float32), written[f"{name}_cache"]
                if cache.dtype.itemsize == 1:
                    scale, largest = call.get(f"{name}_scale"), np.float32(largest_number(cache.dtype))
                    if scale is None:
                        scale = np.float32(1)
                    elif scale.ndim == len(pool) + 3:
                        scale = np.abs(numbers).max(-1) / largest
                        if f"{name}_scale" in scales:
                            own = scales[f"{name}_scale"][at]
                            np.testing.assert_allclose(own, scale, rtol=2e-7)
                            scale = own
                        written[f"{name}_scale"][at] = scale
                        scale = np.where(scale == 0, 1, scale)[:, None]
                    else:
                        scale = scale[pool].reshape(-1, 1)
                    numbers = np.clip(numbers / scale, -largest, largest)
                    numbers = np.rint(numbers) if cache.dtype == np.int8 else numbers
                cache[at] = numbers.astype(cache.dtype)
    scaled = any(name in call and call[name].ndim == call["key_cache"].ndim - 1 for name in CACHES[2:])
    return tuple(written.get(name) for name in CACHES[: 4 if scaled else 2])


def assert_written(call, got):
    """Holds what an append gave to what it should, to the bit."""
    got = [x if x is None else np.asarray(x) for x in got]
    scales = {name: x for name, x in zip(CACHES[2:], got[2:]) if x is not None and x.ndim == call["key_cache"].ndim - 1}
    for a, b in zip(got, expected(call, scales), strict=True):
        if b is None:
            assert a is None
            continue
        bits = f"u{b.dtype.itemsize}"
        np.testing.assert_array_equal(a.view(bits), b.view(bits))
