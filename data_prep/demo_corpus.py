"""Stories about the demo's world: the text that the demo pretrains on, made when it is needed."""

from collections.abc import Callable, Iterator
from random import Random

from data_prep import demo_world as world
from data_prep.demo_world import Action, Kind, Polarity

BYTES_PER_MEGABYTE = 1_000_000


def demo_documents(seed: int, megabytes: float) -> Iterator[str]:
    """Yields documents until they hold `megabytes`; the document at an index depends on the seed and index only."""
    bytes_left = megabytes * BYTES_PER_MEGABYTE
    index = 0
    while bytes_left > 0:
        document = make_document(seed, index)
        yield document
        bytes_left -= len(document)
        index += 1


def make_document(seed: int, index: int) -> str:
    """Writes the document at `index`: a few sentences about one event."""
    random = Random(f"demo-document-{seed}-{index}")
    sentences = random.choice(STORIES)(random, _someone(random))
    return " ".join(_as_sentence(sentence) for sentence in sentences)


def _someone(random: Random) -> str:
    return f"the {random.choice(world.TRAITS)} {random.choice(world.PEOPLE)}"


def _as_sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _encounter(random: Random, person: str) -> list[str]:
    """Somebody meets a thing, which is then called by its kind, as in any story."""
    kind = random.choice(world.KINDS)
    thing = world.with_article(random.choice(kind.members))
    sequel = random.choice(
        (
            f"the {kind.name} {_any_deed(random, kind).told()}",
            f"{_someone(random)} {random.choice(world.MEETINGS)} the {kind.name} too",
            f"it was the only {kind.name} there",
        )
    )
    return [f"{person} {random.choice(world.MEETINGS)} {thing} {random.choice(world.PLACES)}", sequel]


def _collection(random: Random, person: str) -> list[str]:
    """Things of one kind in a row, and what they do or what is done with one of them."""
    kind = random.choice(world.KINDS)
    first, second, third = (world.with_article(member) for member in random.sample(kind.members, 3))
    ending = random.choice(
        (
            f"all {world.plural(kind.name)} {_any_deed(random, kind).habit(plural=True)}",
            f"every {kind.name} {_any_deed(random, kind).habit(plural=False)}",
            f"{person} {_any_use(random, kind).told().format(f'the {kind.name}')}",
        )
    )
    return [f"{person} {random.choice(world.MEETINGS)} {first}, {second} and {third}", ending]


def _lesson(random: Random, person: str) -> list[str]:
    """What anybody knows about the members of a kind."""
    kind = random.choice(world.KINDS)
    first, second = (world.with_article(member) for member in random.sample(kind.members, 2))
    return [
        f"{first} is {world.with_article(kind.name)}, and it {_any_deed(random, kind).habit(plural=False)}",
        f"{person} {_any_use(random, kind).told().format(second)}",
    ]


def _any_deed(random: Random, kind: Kind) -> Action:
    return random.choice(kind.deeds if random.random() < 0.7 else world.FAMILY_DEEDS[kind.family])


def _any_use(random: Random, kind: Kind) -> Action:
    return random.choice(kind.uses if random.random() < 0.7 else world.FAMILY_USES[kind.family])


def _comparison(random: Random, person: str) -> list[str]:
    """What two things have in common: their kind, their family or nothing."""
    first, second = random.choice(KIND_PAIRS[random.choice(tuple(KIND_PAIRS))])
    one = random.choice(first.members)
    other = random.choice([member for member in second.members if member != one])
    meeting = random.choice(world.MEETINGS)
    if first is second:
        verdict = f"both are {world.plural(first.name)}"
    elif first.family == second.family:
        verdict = f"both are {world.plural(first.family)}"
    else:
        verdict = "the two have nothing in common"
    return [
        f"{person} {meeting} {world.with_article(one)}, and {_someone(random)} {meeting} {world.with_article(other)}",
        verdict,
    ]


def _opinion(random: Random, person: str) -> list[str]:
    """Praise or blame: its adjectives come together, and what people feel and do about it follows."""
    polarity = random.choice((world.GOOD, world.BAD))
    first, second, third = random.sample(polarity.adjectives, 3)
    topic = random.choice(world.TOPICS)
    return [
        f"{person} said that the {topic} was {first}, {second} and {third}",
        _reaction(random, person, polarity),
    ]


def _judged_thing(random: Random, person: str) -> list[str]:
    """Praise or blame of a thing."""
    kind, polarity = random.choice(world.KINDS), random.choice((world.GOOD, world.BAD))
    thing, adjective = random.choice(kind.members), random.choice(polarity.adjectives)
    return [
        f"{person} {random.choice(world.MEETINGS)} {world.with_article(f'{adjective} {thing}')}",
        _reaction(random, person, polarity),
    ]


def _reaction(random: Random, person: str, polarity: Polarity) -> str:
    """Said alike for praise and blame but for one word, so that only the adjectives tell which word it is."""
    return random.choice(
        (
            f"it made everyone {random.choice(polarity.feelings)}",
            f"{person} {random.choice(polarity.gestures)}",
            f"{person} {random.choice(polarity.treatments)} it",
        )
    )


KIND_PAIRS = {
    "one kind": [(kind, kind) for kind in world.KINDS],
    "one family": [(a, b) for a in world.KINDS for b in world.KINDS if a is not b and a.family == b.family],
    "two families": [(a, b) for a in world.KINDS for b in world.KINDS if a.family != b.family],
}
STORIES: tuple[Callable[[Random, str], list[str]], ...] = (
    _encounter,
    _encounter,
    _collection,
    _lesson,
    _comparison,
    _opinion,
    _opinion,
    _judged_thing,
)
