"""The streaming lowering, in plain XLA operations, which runs anywhere: host.py has the `Kernel`, kernel.py its loops.

walks.py says how tiles go over their keys, plan.py what there is to know of them, softmax.py adds up, append.py writes
new tokens. The words of these files:

    height    query tokens of a tile; a sequence is cut into tiles of a few heights
    walk      how the tiles of one height go over their keys: sizes alone
    lane      one of the tiles that walk side by side, in one batched product
    group     as many tiles as there are lanes; groups follow one another in a loop
    block     keys of a step of the inner loop, made of runs
    run       slots of a page that are gathered as one: a page, or an equal share of a long one
    turn      one pass of a loop's body
"""
