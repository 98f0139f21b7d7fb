"""Grids of programs that take seconds each to make: all that pairs of values can do to each other, in few of them."""

import itertools


def pairs(**values) -> list[tuple]:
    """Combinations of one of each of `values`, in order, in which every value stands beside every other's each value."""
    unseen = {
        (a, x, b, y)
        for (a, of_a), (b, of_b) in itertools.combinations(enumerate(values.values()), 2)
        for x, y in itertools.product(range(len(of_a)), range(len(of_b)))
    }
    every = [
        (chosen, {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(enumerate(chosen), 2)})
        for chosen in itertools.product(*(range(len(of_one)) for of_one in values.values()))
    ]
    found = []
    while unseen:
        chosen, seen = max(every, key=lambda one: len(one[1] & unseen))
        unseen -= seen
        found.append(tuple(of_one[i] for i, of_one in zip(chosen, values.values())))
    return found
