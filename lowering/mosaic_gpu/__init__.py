"""The kernels in Pallas Mosaic GPU, for NVIDIA Hopper. The words they use, and where to begin, are in
hopper/__init__.py.

This folder is the host's side, which decides what is launched with which sizes; hopper/ is what a GPU runs:

    host.py        the `Kernel`: what it supports, its heuristic sizes, and `attend`, which makes a Plan and launches
    room.py        what a tile takes of a thread block: warpgroups, rows, shared memory
    parts.py       into how many parts the keys of tiles are cut, and who merges them
    deal.py        how small the parts of tiles are, by an estimate over contexts of several kinds
    scheduling.py  the arrays that a launch reads: the table of tiles, the page table, pools
    widening.py    quantised caches that are widened once, before the kernel
    append.py      the `Writer` of `append_to_pages`
"""
