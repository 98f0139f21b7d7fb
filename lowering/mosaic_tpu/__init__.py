"""The kernels in Pallas Mosaic, for TPUs: host.py has the `Kernel`, and launches kernel.py and decode.py.

kernel.py attends for sequences of several new tokens, with step.py (its mathematics) and masks.py; decode.py for those of
one. Both have their work from schedule.py, bring pages by fetching.py, and use registers.py; chips.py says what a chip
has. append.py writes new tokens. The words of these files:

    tile      `block_q` tokens of the pack, wherever sequences begin and end, aligned as the chip copies them
    item      the rows of one sequence in one tile: what a grid step does. (In decode.py one token, in append.py one native
              tile of a cache)
    part      of a tile: the tokens of one matrix product, not to be taken for parts of keys, which no TPU kernel has
    block     `block_kv` keys: two buffers hold one each, so that the next is fetched beside the one that is computed with
    chunk     keys of one matrix product; a block has several
    run       slots of a page that are copied as one: a page, or an equal share of a long one
    splits    cores of a chip that share the KV heads
    m, l, acc of each row the running maximum, sum of weights and unnormalised output; `fade` is what those before are
              scaled by where the maximum moves
"""
