"""How many registers a thread of each warpgroup has."""

from typing import NamedTuple


class Registers(NamedTuple):
    """Of a thread that computes, that loads and that widens; None where a warpgroup keeps what it starts with."""

    computes: int | None
    loads: int | None
    widens: int | None = None


# By the number of computing warpgroups, and whether blocks are widened.
REGISTERS = {
    (1, False): Registers(None, None),
    (2, False): Registers(240, 24),
    (3, False): Registers(160, 32),
    (4, False): Registers(112, 32),
    (1, True): Registers(256, 40, 168),
    (2, True): Registers(232, 40),
    (3, True): Registers(160, 32),
}
GATHERING_REGISTERS = Registers(232, 40)  # of two warpgroups, beside lanes that have more than one key's numbers
# By whether caches are quantised. 24 are too few for what splits add to the loads, and 191 do for products.
WIDE_REGISTERS = {False: Registers(224, 56), True: Registers(208, 40, 56)}
