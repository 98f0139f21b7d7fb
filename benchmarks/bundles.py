"""Counts the bundles that a TPU program runs, by running the scalar side of its final schedule.

The compiler writes a program's final bundles as text (`--xla_jf_dump_llo_text=true`). Which of them run, and how often,
is decided by scalars alone: numbers in SMEM, which came there as the call's int32 operands, and what is computed of
them. So scalar instructions are done here, vector ones and copies are not (but for those to SMEM and from it), and
each bundle is counted as it is passed. A scalar that is made of a vector counts as 0: a vote of numbers that are all 0,
which is that nothing rare happens. What else is not known is an error where a branch depends on it.
A bundle is one cycle when nothing stalls: waits for copies are not in the count.
"""

import dataclasses
import re

import numpy as np

BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s*(?:(?:LH|LB|LE|PB|PF|CT)\s*)*:\s*(?:> ?)*\s*\{(.*)")
ENDS = re.compile(r"End region (\d+)")
STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
INSTRUCTION = re.compile(r"(?:%(?P<result>\w+) = )?(?P<name>[\w.]+)\s*(?P<rest>.*)", re.DOTALL)
PREDICATE = re.compile(r"\((?P<negated>!?)%(?P<name>\w+)(?:, %(?P<otherwise>\w+))?\)")
OPERAND = re.compile(r"%(?P<name>\w+) = inlined_call_operand\.(?P<space><.*?>|\w+) .*?index: (?P<index>\d+), kind: \w+")
ADDRESS = re.compile(r"\[(?:smem|sflag|vmem|hbm):\[(?P<sum>.*?)\]\]|\[(?P<alone>.*)\]")
DIVISION = re.compile(r"sdivrem\.u32([^;/]*)/\* k(Rem|Div) \*/")
MOST_BUNDLES = 10**8

WORD = 2**32 - 1
# Made-up addresses that no number of 32 bits is. Copies count in granules of 32 bytes; VMEM, and up to v5 HBM too, in
# rows of 512 bytes, which a program shifts left by 4.
ALLOCATION_BASE, ALLOCATION_STRIDE, OPERAND_SHIFT, ROW_SHIFT, WORDS_OF_GRANULE = 2**33, 2**20, 45, 4, 8


@dataclasses.dataclass
class Count:
    """What one run of a program takes."""

    bundles: int = 0
    spills: int = 0  # vector registers stored because there are too few
    products: int = 0  # pushes into the matrix units
    by_bundle: dict[int, int] = dataclasses.field(default_factory=dict)  # times that each ran, by its place


def count(path: str, operands: dict, delay: int | None) -> Count:
    """Runs the program whose final bundles are in a file, with the integers among its operands by their number.

    `delay` are the bundles behind a branch that run before it is taken; None, as on 7x, if all up to where a region
    starts or ends.
    """
    with open(path, errors="replace") as lines:
        return Program(lines).run(operands, delay)


class Program:
    """A program's bundles, each as the scalar instructions in it, from the lines of the text."""

    def __init__(self, lines):
        self.regions, self.bundles, self.operands, self.spills, self.products = {}, [], {}, [], []
        self.ends, self.allocations, self.in_rows = {}, {}, {"vmem"}
        for line in lines:
            if match := BUNDLE.match(line):
                self._add(line, match[1])

    def _add(self, line, slots):
        at = len(self.bundles)
        for region in STARTS.findall(line):
            self.regions[region] = at
        for region in ENDS.findall(line):
            self.ends[region] = at
        if "int_to_ptr.hbm" in slots:
            self.in_rows.add("hbm")
        for operand in OPERAND.finditer(slots):
            self.operands[operand["name"]] = int(operand["index"]), operand["space"]
        self.spills.append(len(re.findall(r"vst \[vmem:\[#allocation\d+_spill", slots)))
        self.products.append(slots.count("= vmatmul"))
        slots = DIVISION.sub(r"sdivrem.\2\1", slots)  # which of the two results is used, a comment alone says
        slots = re.sub(r"/\*.*?\*/", "", slots)
        texts = slots[: slots.rindex("}")].split(";;") if "}" in slots else []
        instructions = [self._parse(text.strip()) for text in texts]
        instructions = [x for x in instructions if x is not None]
        # The values of a loop come before what is computed from them.
        self.bundles.append(sorted(instructions, key=lambda x: x[0] != "sphi"))

    def _parse(self, text):
        """(name, result, predicate, arguments) of an instruction that matters here, or None."""
        match = INSTRUCTION.match(text)
        if match is None or "inlined_call_operand" in text:
            return None
        name, rest, predicate = match["name"], match["rest"], None
        if not re.match(r"s[a-z]|p[a-z]|dma\.\w+_to_smem|dma\.smem_to_\w+|int_to_ptr|vpop.sfrf", name):
            return None
        if found := PREDICATE.search(rest):
            predicate = found["name"], bool(found["negated"]), found["otherwise"]
            rest = rest[: found.start()] + rest[found.end() :]
        if name == "sbr.rel":
            return name, None, predicate, re.search(r"\$region(\d+)", rest)[1]
        if name == "sst":  # the address and what is stored there, with no comma between
            rest = rest.replace("]]", "]],", 1)
        return name, match["result"], predicate, [self._argument(x) for x in _split(rest)]

    def _argument(self, text):
        """A register's name, an int, or for an address in memory a tuple of both to add up."""
        text = re.sub(r"\[(resolvable|thread):.*?\]", "", text).strip()
        if address := ADDRESS.fullmatch(text):
            parts = (address["sum"] or address["alone"] or "").split(" + ")
            return tuple(self._argument(x) for x in parts if x)
        if text.startswith("#allocation"):
            return ALLOCATION_BASE + ALLOCATION_STRIDE * self.allocations.setdefault(text, len(self.allocations))
        text = text.removeprefix("$")
        if text.startswith("%"):
            return text[1:]
        for number in (lambda x: int(x, 0), float):
            try:
                return number(text)
            except ValueError:
                pass
        return None

    def run(self, operands, delay: int | None) -> Count:
        """Runs it once."""
        state, ran, at = State(self, operands), np.zeros(len(self.bundles) + 1, np.int64), 0
        borders = {*self.regions.values(), *(end + 1 for end in self.ends.values())}
        branch = None  # where one leads, and where it is taken
        for _ in range(MOST_BUNDLES):
            if at >= len(self.bundles):
                break
            ran[at] += 1
            target = state.execute(self.bundles[at])
            at += 1
            if target is not None:
                taken_at = at + delay if delay else next(i for i in range(at, len(self.bundles) + 1) if i in borders)
                branch = self.place_of(target, at, taken_at), taken_at
            if branch is not None and at == branch[1]:
                at, branch = branch[0], None
        else:
            raise ValueError(f"it has not ended after {MOST_BUNDLES} bundles")
        ran = ran[:-1]
        by_bundle = {i: int(n) for i, n in enumerate(ran) if n}
        return Count(int(ran.sum()), int(ran @ np.array(self.spills)), int(ran @ np.array(self.products)), by_bundle)

    def place_of(self, region, at, taken_at):
        """Where a region starts; one without bundles is named nowhere, and stands behind the one around the branch."""
        if region in self.regions:
            return self.regions[region]
        return min(end + 1 for around, end in self.ends.items() if self.regions.get(around, 0) < at and end >= taken_at)


class State:
    """Registers by their names in the text, which are assigned once; those of loops also by the machine's."""

    def __init__(self, program, operands):
        self.values, self.machine, self.smem = {}, {}, {}
        self.operands = {i: np.asarray(x).reshape(-1) for i, x in operands.items()}
        for name, (index, space) in program.operands.items():
            shift = OPERAND_SHIFT - (ROW_SHIFT if space in program.in_rows else 0)
            by_value = space.startswith("<") and index in self.operands
            self.set(name, int(self.operands[index][0]) & WORD if by_value else (index + 1) << shift)

    def set(self, name, value):
        self.values[name] = value
        self.machine[name.rsplit("_", 1)[-1]] = value

    def get(self, argument):
        if isinstance(argument, tuple):
            parts = [self.get(x) for x in argument]
            return None if None in parts else sum(_signed(x) if x <= WORD else x for x in parts)
        return self.values.get(argument) if isinstance(argument, str) else argument

    def execute(self, instructions):
        """Does a bundle's scalar instructions; returns the region that it branches to, if it does."""
        target = None
        for name, result, predicate, arguments in instructions:
            if predicate is not None:
                flag = self.values.get(predicate[0])
                if flag is None and name == "sbr.rel":
                    raise ValueError(f"a branch to region {arguments} depends on %{predicate[0]}, which is not known")
                if flag is None or bool(flag) == predicate[1]:
                    if predicate[2] is not None:
                        self.set(result, self.values.get(predicate[2]))
                    continue
            if name == "sbr.rel":
                target = arguments
            elif name == "sphi":
                self.set(result, self.machine.get(result.rsplit("_", 1)[-1]))
            elif name == "sst":
                self.smem[self.get(arguments[0])] = self.get(arguments[1])
            elif name.startswith("dma."):
                self._copy(*(self.get(x) for x in arguments[:3]))
            elif name.startswith("int_to_ptr"):  # no instruction: it writes no register, where others may be by now
                self.values[result] = self.get(arguments[0])
            elif result is not None:
                self.set(result, self._value(name, [self.get(x) for x in arguments]))
        return target

    def _copy(self, source, granules, destination):
        """From an operand to SMEM, or of scalars that were spilled from SMEM and back."""
        if source is None or destination is None or granules is None:
            return
        words = granules * WORDS_OF_GRANULE
        array = self.operands.get((source >> OPERAND_SHIFT) - 1)
        if array is None:
            self.smem.update({destination + i: self.smem.get(source + i) for i in range(words)})
        else:
            first = (source & ((1 << OPERAND_SHIFT) - 1)) * WORDS_OF_GRANULE
            self.smem.update({destination + i: int(x) & WORD for i, x in enumerate(array[first : first + words])})

    def _value(self, name, x):
        if name == "spop":  # what a vector was reduced to
            return 0
        if name == "sld":
            return self.smem.get(x[0])
        if name == "scalar_select":
            return None if x[0] is None else x[1] if x[0] else x[2]
        if name in ("pnand", "por", "pand", "pneg"):
            return PREDICATES[name](*x) if None not in x else None
        if None in x:
            return None
        if name in ("smov", "spop.drf"):
            return x[0]
        if name.startswith("scalar_lea"):
            return sum(x)
        if name.startswith("scmp."):
            _, relation, kind, *_ = name.split(".")
            return RELATIONS[relation](*(map(_signed, x) if kind == "s32" else x))
        if function := ARITHMETIC.get(name):
            return function(*map(_signed, x)) if max(x) > WORD else function(*x) & WORD
        return None


def _signed(x):
    return x - 2**32 if 2**31 <= x <= WORD else x


def _split(text):
    """Arguments, at commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [x for x in parts if x.strip()]


PREDICATES = {
    "pneg": lambda x: not x,
    "por": lambda x, y: bool(x or y),
    "pand": lambda x, y: bool(x and y),
    "pnand": lambda x, y: not (x and y),
}
RELATIONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
ARITHMETIC = {
    "sadd.s32": lambda x, y: x + y,
    "ssub.s32": lambda x, y: x - y,
    "smul.u32": lambda x, y: x * y,
    "smulhi.u32": lambda x, y: (x & WORD) * (y & WORD) >> 32,
    "sdivrem.Div": lambda x, y: x // y,
    "sdivrem.Rem": lambda x, y: x % y,
    "sshll.u32": lambda x, y: x << (y & 31),
    "sshrl.u32": lambda x, y: x >> (y & 31),
    "sshra.s32": lambda x, y: _signed(x) >> (y & 31),
    "sand.u32": lambda x, y: x & y,
    "sor.u32": lambda x, y: x | y,
    "sxor.u32": lambda x, y: x ^ y,
    "smin.u32": min,
    "smax.u32": max,
}
