"""Text to hide things in, and things to hide: all drawn from our own lists, so that every machine draws the same."""

from __future__ import annotations

import functools
import itertools
import random
import uuid
from collections.abc import Iterator

from open_lm_linear.cli import UserError
from open_lm_linear.data.inputs import Reading, documents, find_inputs, plan

_ADJECTIVES = """
able amber ancient ashen autumn bold brave breezy bright brisk broad bronze busy calm candid careful
clear clever coastal copper coral cosy crimson crisp curious dapper daring deep distant dusty eager early earnest easy
faded fair famous fancy fast fierce fine firm flat fond formal fresh frosty gentle giant gilded glad golden grand grassy
green hardy hasty hidden hollow honest humble idle inland ivory jolly keen kind large lasting lively lonely lucky marble
mellow merry mild misty modest mossy narrow neat noble northern olive open orange pale patient plain polite proud quick
quiet rapid rare ready robust rosy round royal rustic sandy scarlet secret silent silver simple sleepy smooth snowy
solid southern stable steady stern stormy sturdy sunny swift tall tender tidy timid tiny upper useful velvet vivid warm
wealthy western wild windy winter wise wooden young
"""
_NOUNS = """
acorn anchor anvil apple apron arch arrow attic badge baker barge barn barrel basin basket beacon bell bench
blanket boat bottle bridge broom brush bucket button cabin candle canoe canvas carpet cart castle cellar chair chapel
cherry chest chimney church circle clock cloud coat comet compass cottage cradle crane crown curtain desk diary door
drum eagle engine falcon farmer feather fence ferry fiddle field flag flute forest forge fountain garden gate glacier
goblet guitar hammer harbour harp hat heron hill horse island jacket jar jewel kettle key kitchen kite ladder lake lamp
lantern library lighthouse linen lizard market meadow mill mirror mountain needle oar orchard otter oven owl paddle
parlour pebble pencil pepper piano pillow pine pitcher pocket pond porch quarry quilt raven ribbon river road rocket
roof rope saddle sail shelf shield shovel spoon stable statue table teapot temple thimble tower tractor trumpet tunnel
valley village violin wagon walnut water wheel whistle window
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
VERBS = (
    "belongs to",
    "stands behind",
    "was painted by",
    "leans on",
    "was found near",
    "is older than",
    "faces",
    "reminds us of",
)
ENDINGS = (
    "as far as anyone in town can tell",
    "although few people ever ask about it",
    "which the visitors seldom notice",
    "and nothing about that has changed for years",
    "at least on the days when it rains",
    "and so the story was told again",
)
NOISE = (
    "The river runs past the old mill.",
    "A cart is waiting by the gate.",
    "The wind turns over the fields.",
    "Somebody walks up the hill.",
    "Then the day goes on as before.",
)
LONGEST_TEXT = 2_000_000  # words of a haystack's files that are held in memory


def noise() -> Iterator[str]:
    """The words of the same few sentences over and over."""
    return itertools.cycle(" ".join(NOISE).split())


def prose(rng: random.Random) -> Iterator[str]:
    """The words of sentences that make grammar and little sense, each drawn anew."""
    while True:
        first, second = (f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}" for _ in range(2))
        ending = f", {rng.choice(ENDINGS)}" if rng.random() < 0.4 else ""
        yield from f"{first.capitalize()} {rng.choice(VERBS)} {second}{ending}.".split()


def text_of(paths: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    """The words of given files from a random place on, round and round."""
    words = _words_in(paths)
    begin = rng.randrange(len(words))
    return itertools.islice(itertools.cycle(words), begin, None)


@functools.lru_cache(maxsize=1)
def _words_in(paths: tuple[str, ...]) -> list[str]:
    texts = (text for parts in plan(find_inputs(paths)) for text in documents(parts, Reading()))
    words = list(itertools.islice((word for text in texts for word in text.split()), LONGEST_TEXT))
    if not words:
        raise UserError(f"the haystack {', '.join(paths)} holds no words.")
    return words


def names(rng: random.Random) -> Iterator[str]:
    """Different names such as ``quiet-lamp``, in random order.

    Raises:
        UserError: there are no more.
    """
    total = len(ADJECTIVES) * len(NOUNS)
    drawn: set[int] = set()
    while len(drawn) < total:
        i = rng.randrange(total)
        if i not in drawn:
            drawn.add(i)
            yield f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}"
    raise UserError(f"a context this long needs more than the {total} names that there are: give shorter contexts.")


def value(kind: str, rng: random.Random) -> str:
    """A thing to hide: a ``number`` of seven digits, a ``uuid``, or a ``word`` such as ``quiet-lamp``."""
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    assert kind == "word"
    return next(names(rng))


def coded_word(rng: random.Random, length: int = 6) -> str:
    """A word that no language has."""
    return "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(length // 2))


def hide(words: list[str], needles: list[tuple[float, str]]) -> str:
    """``words`` as a text with each needle (depth in [0, 1], sentence) between two sentences nearest before its depth.

    Depth 0 is the beginning and depth 1 the very end.
    """
    pieces, at = list[str](), 0
    for depth, needle in sorted(needles, key=lambda item: item[0]):
        place = round(depth * len(words))
        while at < place < len(words) and words[place - 1][-1] not in ".!?":
            place -= 1
        pieces += [*words[at:place], needle]
        at = place
    return " ".join([*pieces, *words[at:]])
