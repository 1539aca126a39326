"""The small world that the demo's corpus and benchmark speak about: what there is, what it does, and how it is said.

The corpus tells stories about this world and the benchmark asks questions about it, so that a model can know the
answers from reading alone. All relations (which noun is of which kind, which adjective praises) are data here.
"""

from dataclasses import dataclass

VOWELS = "aeiou"


@dataclass(frozen=True)
class Action:
    """A verb phrase: `base` and `past` of its verb, and what follows ("fly", "flew", "over the roofs")."""

    base: str
    past: str
    rest: str

    def told(self) -> str:
        """The phrase in the past tense: "flew over the roofs"."""
        return f"{self.past} {self.rest}"

    def habit(self, plural: bool) -> str:
        """The phrase in the present tense, agreeing with its subject: "flies over the roofs", "fly over the roofs"."""
        return f"{self.base if plural else third_person(self.base)} {self.rest}"


@dataclass(frozen=True)
class Kind:
    """A kind of thing ("bird"), its family ("animal"), its members, and what they do and what people do with them.

    In the actions of people, `{}` stands for the thing.
    """

    name: str
    family: str
    members: tuple[str, ...]
    deeds: tuple[Action, ...]
    uses: tuple[Action, ...]


@dataclass(frozen=True)
class Polarity:
    """One side of opinion: its adjectives, and how people feel, what they do, and how they treat the thing then."""

    name: str
    adjectives: tuple[str, ...]
    feelings: tuple[str, ...]
    gestures: tuple[str, ...]
    treatments: tuple[str, ...]


def third_person(verb: str) -> str:
    """The verb after "he" or "it": "sings", "flies", "goes"."""
    if verb.endswith("y") and verb[-2] not in VOWELS:
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("s", "x", "ch", "sh", "o")) else "s")


def plural(name: str) -> str:
    """The name of a kind or a family for many: "birds", "fish"."""
    return name if name == "fish" else name + "s"


def with_article(phrase: str) -> str:
    """The phrase after "a" or "an"."""
    return f"{'an' if phrase[0] in VOWELS else 'a'} {phrase}"


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _actions(text: str) -> tuple[Action, ...]:
    """Actions from lines such as "fly/flew over the roofs"."""
    actions = []
    for line in _lines(text):
        verb, rest = line.split(" ", 1)
        actions.append(Action(*verb.split("/"), rest))
    return tuple(actions)


KINDS = (
    Kind(
        "bird",
        "animal",
        _words(
            "heron sparrow robin eagle owl raven falcon pigeon seagull swan "
            "parrot finch thrush stork magpie woodpecker pelican cuckoo vulture albatross"
        ),
        _actions("""
            fly/flew over the roofs
            build/built a nest of twigs
            sing/sang at dawn
            spread/spread both wings
            perch/perched on a high branch
            lay/laid three eggs in the nest
            drop/dropped a grey feather
            sail/sailed on the wind
        """),
        _actions("""
            hear/heard {} in the treetops
            watch/watched {} fly south
            find/found a feather of {}
            keep/kept {} in a golden cage
        """),
    ),
    Kind(
        "fish",
        "animal",
        _words(
            "trout salmon herring carp cod mackerel tuna pike perch eel "
            "sardine haddock halibut minnow sturgeon anchovy flounder barracuda turbot tench"
        ),
        _actions("""
            swim/swam under the waves
            hide/hid between the water plants
            swallow/swallowed the hook
            jump/jumped out of the water
            slip/slipped through the net
            breathe/breathed through the gills
            dive/dived to the bottom of the lake
            follow/followed the cold current
        """),
        _actions("""
            catch/caught {} with a net
            pull/pulled {} into the boat
            scrape/scraped the scales from {}
            throw/threw {} back into the water
        """),
    ),
    Kind(
        "fruit",
        "food",
        _words(
            "apple pear plum cherry peach lemon grape banana mango melon "
            "apricot fig lime strawberry raspberry pineapple papaya nectarine tangerine blueberry"
        ),
        _actions("""
            ripen/ripened in the orchard
            fall/fell from the lowest branch
            give/gave sweet juice
            hide/hid the seeds in soft flesh
            grow/grew from a white blossom
            lie/lay in the bowl with the sugar
            turn/turned into sweet jam
            hang/hung on a sunny twig
        """),
        _actions("""
            pick/picked {} in the orchard
            squeeze/squeezed the juice out of {}
            boil/boiled jam from {}
            spit/spat out the seeds of {}
        """),
    ),
    Kind(
        "vegetable",
        "food",
        _words(
            "carrot cabbage onion potato turnip radish leek pumpkin cucumber lettuce "
            "parsnip cauliflower artichoke beetroot aubergine zucchini shallot courgette yam gherkin"
        ),
        _actions("""
            grow/grew in a row of dark soil
            simmer/simmered in the soup
            need/needed water and manure
            stand/stood in the muddy field
            boil/boiled in salted water
            sprout/sprouted after the rain
            go/went into the stew
            feed/fed the rabbits in winter
        """),
        _actions("""
            dig/dug {} out of the soil
            chop/chopped {} for the soup
            plant/planted {} in a straight row
            wash/washed the earth from {}
        """),
    ),
    Kind(
        "tool",
        "object",
        _words(
            "hammer chisel wrench screwdriver drill axe shovel rake spade hoe "
            "trowel mallet crowbar hatchet sickle pickaxe clamp spanner scythe awl"
        ),
        _actions("""
            hang/hung above the workbench
            cut/cut through the hard wood
            hit/hit the rusty nail
            slip/slipped off the iron bolt
            lie/lay between nails and screws
            need/needed a new wooden handle
            break/broke the stone in two
            save/saved hours of labour
        """),
        _actions("""
            mend/mended the fence with {}
            sharpen/sharpened {} on a wheel
            oil/oiled the handle of {}
            lift/lifted {} from the toolbox
        """),
    ),
    Kind(
        "instrument",
        "object",
        _words(
            "violin piano flute guitar trumpet drum cello harp clarinet oboe "
            "banjo tuba trombone accordion saxophone mandolin harmonica lute bassoon fiddle"
        ),
        _actions("""
            sound/sounded through the concert hall
            play/played a slow tune
            lead/led the orchestra
            drift/drifted out of tune
            join/joined the choir in the chorus
            carry/carried the melody
            accompany/accompanied the singer
            echo/echoed across the stage
        """),
        _actions("""
            practise/practised a waltz on {}
            tune/tuned {} before the concert
            play/played {} in the orchestra
            perform/performed a song on {}
        """),
    ),
)

# What holds for a whole family tells the model which kinds are akin.
FAMILY_DEEDS = {
    "animal": _actions("""
        sleep/slept without a sound
        look/looked for something to eat
        flee/fled from the hungry cat
        wait/waited for a safe moment
        protect/protected the young
    """),
    "food": _actions("""
        taste/tasted better than ever
        cost/cost a coin at the grocery
        fill/filled the empty stomach
        rot/rotted after a week in the kitchen
        belong/belonged to a good breakfast
    """),
    "object": _actions("""
        break/broke after years of use
        gather/gathered dust in the attic
        belong/belonged to a rich uncle
        look/looked as good as new
        last/lasted for a lifetime
    """),
}
FAMILY_USES = {
    "animal": _actions("""
        feed/fed {} every morning
        frighten/frightened {} by accident
        follow/followed the tracks of {}
    """),
    "food": _actions("""
        eat/ate {} for supper
        taste/tasted {} in the kitchen
        cut/cut {} into slices
    """),
    "object": _actions("""
        repair/repaired {} in the evening
        borrow/borrowed {} from a neighbour
        inherit/inherited {} from an aunt
    """),
}

GOOD = Polarity(
    "good",
    _words(
        "wonderful excellent delightful superb splendid lovely brilliant charming fantastic marvelous "
        "pleasant beautiful magnificent terrific fabulous perfect glorious amazing impressive enjoyable "
        "graceful elegant great nice outstanding stunning exquisite adorable admirable flawless "
        "gorgeous heavenly inspiring refreshing satisfying thrilling dazzling sublime cheerful radiant"
    ),
    _words("happy glad pleased grateful content merry"),
    _words("smiled laughed cheered clapped danced rejoiced"),
    _words("loved liked praised enjoyed recommended blessed"),
)
BAD = Polarity(
    "bad",
    _words(
        "terrible awful horrible dreadful bad nasty ugly miserable disgusting disappointing "
        "dull boring dismal gloomy horrid lousy shabby tedious wretched appalling "
        "atrocious ghastly grim hideous inferior mediocre pathetic repulsive rotten shoddy "
        "sloppy tiresome vile worthless annoying dreary revolting abysmal filthy foul"
    ),
    _words("angry sad upset furious bitter unhappy"),
    _words("frowned groaned sighed wept shuddered grumbled"),
    _words("hated disliked cursed regretted blamed despised"),
)

PEOPLE = _words(
    "sailor farmer teacher painter doctor nurse shepherd miller gardener weaver "
    "tailor judge clerk poet pilot soldier student merchant lawyer butcher"
)
TRAITS = _words("old young tall busy quiet clever")
# Anything can be met by anyone in any of these ways, so that none of them says which kind of thing it is.
MEETINGS = _words("saw noticed found drew wanted described mentioned remembered admired painted")
PLACES = _lines("""
    near the bridge
    behind the house
    at the market
    in the village
    beside the road
    by the harbour
    outside the school
    on the island
""")
# Anything of these can be praised or blamed.
TOPICS = _words("play film hotel song book room speech journey party garden painting shop museum letter holiday game")
