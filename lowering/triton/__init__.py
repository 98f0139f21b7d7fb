"""The Triton lowering, for NVIDIA and AMD GPUs: host.py has the `Kernel`, and kernel.py the program that it launches,
whose step through a block of keys is in block_kernel.py.

Around them: sizes.py and parts.py choose the sizes of tiles and in how many parts they are, schedule.py says which
program has which rows, constants.py what the program is compiled for, merge.py and merge_kernel.py add up parts,
launch.py reaches the GPU through jax_triton, append.py and append_kernel.py write new tokens. The words of these files:

    row       a token for one query head; row r of a sequence is token r // group, head r % group of its KV head
    tile      up to `TILE.rows` rows of one sequence and KV head
    interval  tokens that one sequence owns, or a gap that none owns: an entry of the schedule (`Stretch` in tiles.py)
    part      a share of the blocks of keys that a tile sees, where they are split (split-K)
    piece     one part of one tile. A program has one piece, for one KV head and, where values are wide, some of their
              features
    block     `TILE.block_kv` keys, a step of a loop; those at the ends of what rows see ("edges", of `TILE.edge_kv`
              keys) are masked
    share     some keys of a block, which one warp has to itself; shares are added up after the loop
"""
