"""Mutate the bytes of any file, as faults of disks, of transfers and of people's editors do; the same mutants for a seed."""

import re
from collections.abc import Callable, Iterator
from random import Random
from typing import TypeAlias

Mutation: TypeAlias = Callable[[bytearray, Random], None]

# values at which sizes, indices and floats go wrong, in little-endian integers and doubles of the lengths that files use
VALUES = [
    value.to_bytes(length, "little", signed=value < 0)
    for length in (1, 2, 4, 8)
    for value in (0, 1, -1, 2 ** (8 * length - 1) - 1, -(2 ** (8 * length - 1)), 2 ** (8 * length - 2), 16)
] + [bytes.fromhex(text) for text in ("000000000000f87f", "000000000000f07f", "000000000000f0ff", "9c7500883ce4377e")]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "99999999999999999999",
    "2147483648",
    "-0.0",
    "1e9",
    "",
]
NUMBER = re.compile(rb"[-+]?\d+\.?\d*(?:[eEdD][-+]?\d+)?")
TOKEN = re.compile(rb"[^\s,:=\[\]{}\"']+")


def _span(data: bytearray, random: Random, longest: int = 64) -> slice:
    """Return a random span, mostly short: the length is as likely between 1 and 2 as between 32 and 64."""
    start = random.randrange(len(data))
    return slice(start, min(len(data), start + int(longest ** random.random())))


def _flip_bits(data: bytearray, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 8))):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set_bytes(data: bytearray, random: Random) -> None:
    span = _span(data, random)
    data[span] = random.choice((bytes, lambda n: b"\xff" * n, random.randbytes))(span.stop - span.start)


def _set_value(data: bytearray, random: Random) -> None:
    value = random.choice(VALUES)
    start = random.randrange(len(data))
    if random.random() < 0.7:
        start -= start % len(value)
    data[start : start + len(value)] = value[: len(data) - start]


def _cut_end(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def _append(data: bytearray, random: Random) -> None:
    data += data[: random.randrange(len(data)) + 1] if random.random() < 0.5 else random.randbytes(1 + random.randrange(64))


def _delete(data: bytearray, random: Random) -> None:
    del data[_span(data, random, len(data))]


def _duplicate(data: bytearray, random: Random) -> None:
    span = _span(data, random, len(data))
    data[span.stop : span.stop] = data[span]


def _move(data: bytearray, random: Random) -> None:
    span = _span(data, random, len(data))
    part = data[span]
    del data[span]
    place = random.randrange(len(data) + 1)
    data[place:place] = part


def _swap(data: bytearray, random: Random) -> None:
    """Swap two spans of the same length; in binary files often of whole doubles."""
    length = random.choice((4, 8, 16, int(256 ** random.random())))
    if len(data) >= 2 * length:
        a, b = (random.randrange(len(data) - length + 1) // length * length for _ in "ab")
        data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def _swap_lines(data: bytearray, random: Random) -> None:
    lines = data.splitlines(keepends=True)
    a, b = random.randrange(len(lines)), random.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    data[:] = b"".join(lines)


def _repeat_or_drop_line(data: bytearray, random: Random) -> None:
    lines = data.splitlines(keepends=True)
    line = random.randrange(len(lines))
    lines[line : line + 1] = lines[line : line + 1] * random.choice((0, 0, 2, 50))
    data[:] = b"".join(lines)


def _replace_number(data: bytearray, random: Random) -> None:
    numbers = list(NUMBER.finditer(data))
    if not numbers:
        return _set_value(data, random)
    found = random.choice(numbers)
    text = found[0]
    changed = [random.choice(NUMBERS).encode(), b"-" + text, text + b"0", text[:-1], text.replace(b".", b"")]
    if text.isdigit():
        changed += [b"%d" % (int(text[:18]) + random.choice((-1, 1))), b"%d" % random.getrandbits(40)]
    data[found.start() : found.end()] = random.choice(changed)
    return None


def _swap_tokens(data: bytearray, random: Random) -> None:
    tokens = list(TOKEN.finditer(data))
    if len(tokens) < 2:
        return _swap(data, random)
    a, b = sorted(random.sample(range(len(tokens)), 2))
    first, second = tokens[a], tokens[b]
    data[:] = (
        data[: first.start()] + second[0] + data[first.end() : second.start()] + first[0] + data[second.end() :]
        if random.random() < 0.5
        else data[: first.start()] + second[0] + data[first.end() :]
    )
    return None


def _drop_token(data: bytearray, random: Random) -> None:
    tokens = list(TOKEN.finditer(data))
    if not tokens:
        return _delete(data, random)
    found = random.choice(tokens)
    data[found.start() : found.end()] = random.choice((b"", found[0] + b" " + found[0], found[0].swapcase()))
    return None


BINARY: list[Mutation] = [_flip_bits, _set_bytes, _set_value, _cut_end, _append, _delete, _duplicate, _move, _swap]
TEXT: list[Mutation] = [_swap_lines, _repeat_or_drop_line, _replace_number, _replace_number, _swap_tokens, _drop_token]


def mutants(data: bytes, count: int, seed: int, first: int = 0) -> Iterator[bytes]:
    """Yield `count` mutants of the bytes of a file; each differs from it, by one to four mutations.

    Of text, which has no byte zero, lines, numbers and words are changed too. Mutant n of a seed is the same whatever `count`
    is; they begin with mutant `first`. Raises ValueError if there is nothing to mutate.
    """
    if not data:
        raise ValueError("a file without a byte has no mutants.")
    mutations = BINARY if b"\0" in data else BINARY + TEXT + TEXT
    for number in range(first, first + count):
        random = Random(f"{seed} {number}")
        mutant = bytearray(data)
        while mutant == data:
            mutant = bytearray(data)
            for _ in range(random.choice((1, 1, 1, 2, 4))):
                if mutant:
                    random.choice(mutations)(mutant, random)
        yield bytes(mutant)
