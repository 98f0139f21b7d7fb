"""What a Hopper GPU runs, in Pallas Mosaic GPU. Here are the words of these files; kernel.py is where to begin.

From a call to the tensor cores: `MosaicGpu.attend` (../host.py) makes a `Plan` (plan.py: all that is static) and a table
of tiles (schedule.py; the same in XLA is lowering/tiles.py), and calls `kernel.launch`. A thread block there runs
`kernel._kernel`: one warpgroup loads (loading.py), the others compute, all of them a piece after the other (pieces.py);
what they share is laid out in scratch.py, and handed to them as shared.py has it. Of four loops that compute, the plan
chooses one:

    compute.py    the usual one: a warpgroup has 64 rows of its own, FlashAttention-3's loop
    few_rows.py   up to 32 rows (decode steps), with products transposed (columns.py)
    alternate.py  wide heads over 16-bit caches: two warpgroups share 64 rows and take blocks of keys in turn
    wide.py       wide heads over quantised caches: they share each block

All of them use masks.py (who sees what), softmax.py (the online softmax), soft_cap.py (its tanh as a polynomial) and
operations.py (wgmma that runs on beside other work, and more that Pallas has no words for). Quantised caches are
converted by widen.py, for few rows by few_bytes.py, or transposed for products in 8 bits by transpose.py. Parts are
merged by cluster.py, pairs.py, last_part.py or merge.py, or by XLA (lowering/splits.py). Pages that TMA cannot copy
are gathered by gather.py. Thread blocks that copy keys for one another are in mates.py. Kernels of their own are
schedule.py, merge.py, widen_pages.py and append.py; they are written for single threads, in the words of threads.py.

The work:

    row         a token for one query head; a wgmma has 64
    tile        some tokens of one sequence (`block_q`) for some query heads that share a KV head (`heads`)
    part        a share of the blocks of keys that a tile sees, where they are split (split-K). All tiles have as many, or
                their number varies with their keys and their sequence (`parts.vary`)
    piece       one part of one tile: the unit of work. All pieces of a pack are numbered, those of most work first where
                there are more of them than thread blocks
    deal        how pieces go to thread blocks: each takes one a round, and every second round runs backwards ("to and
                fro"), so that who had the longest piece gets the shortest next
    block       of keys: `block_kv` of them, and the step of a loop. A thread block (CTA) is always called that, or a
                cluster's block
    step        what is done for one block of keys; they are counted on from piece to piece, and run from the last block
                to the first
    slab        rows of a tile that belong to one head (or one token): they lie together in memory
    share       of a block: some of its features, where these come on their own (and, of wide heads, make room on their own)
    run         keys of one copy, which lie together in one page
    part        of a row of a query, key or value: up to 64 of its features, which are a swizzled row (tiling.py)

Who does it:

    team        the warpgroups that compute one tile. Usually one team a thread block; where tiles are small there are two,
                of one warpgroup each, with a tile each and rings and barriers of their own
    turns       two warpgroups issue their products alternately (FlashAttention-3's ping-pong): one's softmax runs beside
                the other's products. (A turn of a loop is one pass of its body)
    chain       the next piece's first logits are issued beside the last product of this one, so that no piece begins cold
    cluster     the thread blocks that have the parts of one tile, and merge them in shared memory; or mates
    mates       two thread blocks whose tiles are two heads' of the same tokens: each copies half of all keys for both
    widen       convert the 8-bit numbers of a quantised cache to 16 bits, without their scales
    wide        heads whose output is too wide for the registers of one warpgroup: two share 64 rows, half the columns each

Where it lies:

    ring        buffers in shared memory that blocks go through in order
    stage       a buffer of the ring that copies fill
    slot        a buffer of the ring that products read: the same as a stage, but where caches are widened in between
    place       room for one query of 64 rows in shared memory; also an index into an array in global memory
    here, free  the two barriers of each buffer ("full" and "empty" elsewhere): it has been filled; it may be filled again
    ask for     prefetch into the L2 cache ("second cache")
    board       shared memory by which warpgroups, or warps, tell each other a number of each row
    clean       zero the values of keys that no row of the tile sees: they may hold NaN, and 0 * NaN is NaN
    m, l, acc   of each row the running maximum, sum of weights and unnormalised output, as in FlashAttention's papers; a
                row `fades` when they are scaled down to a larger maximum
"""
