"""Short stories from a grammar: the training text of the demonstration model.

A story is an opening, the beats of one plot, a moral and a closing. Each beat is a choice of
templates in which two kinds of markup are expanded until none is left:

- `[a|b|c]` is one of the alternatives, each equally likely; alternatives may nest;
- `{hero}`, `{friend.his}`, `{place.at}` name parts of the scene, which is drawn once per story.
  A part may hold markup of its own.

What must agree is drawn together: a place with the spots that it has, a trouble with its remedy.
Everything is told in the past tense, so verbs need no agreement, and hero and friend never share a
pronoun, so "he" and "she" always say who is meant.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.story_plots import CLOSINGS, HABITS, MORALS, OPENINGS, PLOTS

_CHOICE = re.compile(r"\[([^\[\]]*)\]")  # innermost first


@dataclass(frozen=True)
class Pronouns:
    """Third person singular: subject, object, possessive."""

    he: str
    him: str
    his: str


@dataclass(frozen=True)
class Character:
    """Somebody in the story; formats as the name."""

    name: str
    kind: str
    adjective: str
    pronouns: Pronouns

    def __str__(self) -> str:
        return self.name

    @property
    def a(self) -> str:
        """The character as first seen: "a little fox"."""
        return with_article(f"{self.adjective} {self.kind}")

    @property
    def A(self) -> str:
        return self.a.capitalize()

    @property
    def he(self) -> str:
        return self.pronouns.he

    @property
    def him(self) -> str:
        return self.pronouns.him

    @property
    def his(self) -> str:
        return self.pronouns.his

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()


@dataclass(frozen=True)
class Thing:
    """An object; formats as "red kite"."""

    adjective: str
    noun: str

    def __str__(self) -> str:
        return f"{self.adjective} {self.noun}"

    @property
    def a(self) -> str:
        return with_article(str(self))


@dataclass(frozen=True)
class Place:
    """Somewhere to go, and the spots where something may lie hidden there."""

    noun: str
    preposition: str
    spots: tuple[str, ...]

    @property
    def at(self) -> str:
        return f"{self.preposition} the {self.noun}"

    @property
    def to(self) -> str:
        return f"to the {self.noun}"


@dataclass(frozen=True)
class Trouble:
    """How the friend is caught, and how the hero helps."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class Skill:
    """Something to learn: as an infinitive, the first attempt, the last."""

    do: str
    failed: str
    succeeded: str


@dataclass(frozen=True)
class Find:
    """Something found: what it is, what the elder knows, what comes of it."""

    thing: str
    noun: str
    answer: str
    outcome: str


@dataclass(frozen=True)
class Present:
    """A gift made by hand, and how it was made; formats as "wooden bird"."""

    thing: str
    making: str

    def __str__(self) -> str:
        return self.thing

    @property
    def a(self) -> str:
        return with_article(self.thing)


@dataclass(frozen=True)
class Food:
    """Something to eat; `noun` stands for it once it is known."""

    a: str
    noun: str


@dataclass(frozen=True)
class Scene:
    """Everything that templates may name, drawn once per story."""

    hero: Character
    friend: Character
    elder: str
    home: str
    time: str
    place: Place
    spot: str
    treasure: Thing
    toy: Thing
    food: Food
    trouble: Trouble
    skill: Skill
    find: Find
    present: Present


HE = Pronouns("he", "him", "his")
SHE = Pronouns("she", "her", "her")

CHILDREN: dict[Pronouns, tuple[str, tuple[str, ...]]] = {
    HE: ("boy", ("Tom", "Ben", "Sam", "Leo", "Max", "Finn", "Oscar", "Hugo", "Jack", "Theo")),
    SHE: ("girl", ("Lily", "Mia", "Anna", "Rosa", "Ella", "Nora", "Ruby", "Clara", "Ivy", "Emma")),
}
ANIMAL_NAMES: dict[Pronouns, tuple[str, ...]] = {
    HE: ("Pip", "Bruno", "Otto", "Rusty", "Milo", "Basil", "Felix"),
    SHE: ("Daisy", "Hazel", "Willow", "Luna", "Poppy", "Olive", "Pearl"),
}
ANIMALS = ("fox", "rabbit", "bear", "mouse", "squirrel", "hedgehog", "cat", "dog", "badger", "goat")
CHARACTER_ADJECTIVES = (
    "little", "young", "small", "brave", "curious", "shy", "clever", "cheerful", "gentle", "quiet",
)  # fmt: skip
ELDERS = ("grandmother", "grandfather", "mother", "father", "aunt", "uncle")
HOMES = (
    "in a small house near the forest",
    "in a white cottage by the river",
    "in a village by the sea",
    "on a farm among green hills",
    "at the edge of a quiet town",
    "in an old mill beside a stream",
)
TIMES = (
    "One sunny morning", "One warm afternoon", "One bright day in spring", "One summer day",
    "One cool autumn morning", "One day", "Early one morning",
)  # fmt: skip
PLACES = (
    Place("forest", "in", ("under a pile of leaves", "between the roots of an old oak tree",
                           "behind a fallen tree")),
    Place("river", "by", ("among the reeds", "between two wet stones", "under the wooden bridge")),
    Place("meadow", "in", ("in the tall grass", "under a thorn bush", "among the yellow flowers")),
    Place("beach", "on", ("behind a big rock", "in the soft sand", "under a fishing net")),
    Place("hill", "on", ("beside the stone wall", "under a thorn bush", "in a hollow tree")),
    Place("garden", "in", ("under the apple tree", "behind the old shed", "among the roses")),
    Place("lake", "by", ("under an old boat", "among the reeds", "behind a big rock")),
    Place("market", "at", ("under a wooden cart", "behind a row of baskets", "beside the well")),
)  # fmt: skip
THING_ADJECTIVES = (
    "red", "blue", "green", "yellow", "old", "tiny", "shiny", "wooden", "golden", "orange",
)  # fmt: skip
TOYS = ("ball", "kite", "drum", "boat", "whistle", "bell", "flute")
KEEPSAKES = ("scarf", "hat", "book", "lantern", "ring", "basket", "clock")
FOODS = (
    Food("a honey cake", "cake"),
    Food("a plum cake", "cake"),
    Food("an apple pie", "pie"),
    Food("a loaf of sweet bread", "bread"),
    Food("a cherry tart", "tart"),
)
TROUBLES = (
    Trouble(
        "{friend.His} foot was caught under a heavy branch.",
        "{hero} found a strong stick and lifted the branch until {friend} was free.",
    ),
    Trouble(
        "{friend.He} was stuck in the deep mud and could not move.",
        "{hero} held out a long branch and pulled with all {hero.his} strength.",
    ),
    Trouble(
        "{friend.He} had fallen into a deep hole and could not climb out.",
        "{hero} made a rope from long grass and pulled {friend.him} up, step by step.",
    ),
    Trouble(
        "{friend.He} had hurt {friend.his} leg and could not walk.",
        "{hero} tied a soft cloth around the leg and helped {friend.him} to walk home.",
    ),
    Trouble(
        "{friend.He} was caught in a thorn bush.",
        "{hero} bent the thorns away, one by one, until {friend} was free.",
    ),
)
SKILLS = (
    Skill("swim", "swallowed a lot of water", "swam across the lake like a fish"),
    Skill("climb the tall oak tree", "slipped and fell into the leaves",
          "sat on the highest branch and looked over the whole valley"),
    Skill("play the flute", "only made a terrible squeak", "played a song as sweet as honey"),
    Skill("whistle", "could not make a sound", "whistled like a bird"),
    Skill("skate on the frozen pond", "fell flat on the ice", "danced over the ice like a swan"),
    Skill("row the boat", "only turned in circles", "rowed to the island and back"),
    Skill("bake bread", "burned it until it was black", "baked bread that was soft and golden"),
)  # fmt: skip
FINDS = (
    Find(
        "a blue egg",
        "egg",
        "A little bird is asleep in there. Keep it warm, and wait.",
        "So {hero} [wrapped the egg in a scarf|kept the egg beside the fire], and after three days "
        "a tiny bird looked out and began to sing.",
    ),
    Find(
        "a rusty key",
        "key",
        "It opens the old chest under my bed. I have looked for it for years.",
        "Together they opened the chest, and inside lay [a golden crown|a box that played music|"
        "a pile of letters from long ago].",
    ),
    Find(
        "a torn map",
        "map",
        "It shows the way to a secret garden. Follow the stream, and you will see.",
        "So they followed the stream until they came to a garden full of [roses|butterflies|ripe "
        "cherries].",
    ),
    Find(
        "a white shell",
        "shell",
        "Hold it close to your ear, and you will hear the sea.",
        "{hero} held the shell to {hero.his} ear, and the waves [whispered|sang] to {hero.him}.",
    ),
    Find(
        "a strange seed",
        "seed",
        "Put it in the ground, and give it water every day.",
        "So {hero} planted the seed, and by the end of summer a flower as tall as a house stood in "
        "front of the door.",
    ),
    Find(
        "a green bottle",
        "bottle",
        "There is a letter in it. Let us read it.",
        "The letter came from a sailor far away, who wished good luck to everyone who found it.",
    ),
)
PRESENTS = (
    Present("crown of flowers", "picked white and yellow flowers in the meadow and tied them "
            "together"),
    Present("wooden bird", "found a piece of soft wood and carved it with great care"),
    Present("necklace of shells", "looked for the most beautiful shells on the beach and put "
            "them on a string"),
    Present("picture of the two of them", "made colours from berries and painted until it was "
            "dark"),
    Present("warm scarf", "took all the wool in the house and knitted until it was late"),
)  # fmt: skip


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it; the first letter of our words tells which."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def stories(seed: int) -> Iterator[str]:
    """Endless stories, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield write_story(rng)


def write_story(rng: random.Random) -> str:
    """One story of about 150 words: sentences in one paragraph."""
    scene, plot = draw_scene(rng), rng.choice(PLOTS)
    beats = [OPENINGS, HABITS, *plot.beats, MORALS, CLOSINGS]
    templates = [rng.choice(beat).replace("{moral}", plot.moral) for beat in beats]
    return " ".join(expand(template, scene, rng) for template in templates if template)


def draw_scene(rng: random.Random) -> Scene:
    """Draw everything that a story may name."""
    pronouns = rng.sample((HE, SHE), 2)
    adjectives = rng.sample(CHARACTER_ADJECTIVES, 2)
    hero = _draw_character(rng, pronouns[0], adjectives[0])
    friend = _draw_character(rng, pronouns[1], adjectives[1])
    place = rng.choice(PLACES)
    return Scene(
        hero=hero,
        friend=friend,
        elder=rng.choice(ELDERS),
        home=rng.choice(HOMES),
        time=rng.choice(TIMES),
        place=place,
        spot=rng.choice(place.spots),
        treasure=Thing(rng.choice(THING_ADJECTIVES), rng.choice(TOYS + KEEPSAKES)),
        toy=Thing(rng.choice(THING_ADJECTIVES), rng.choice(TOYS)),
        food=rng.choice(FOODS),
        trouble=rng.choice(TROUBLES),
        skill=rng.choice(SKILLS),
        find=rng.choice(FINDS),
        present=rng.choice(PRESENTS),
    )


def expand(template: str, scene: Scene, rng: random.Random) -> str:
    """Replace markup until none is left."""
    while True:
        template, n_choices = _CHOICE.subn(lambda m: rng.choice(m[1].split("|")), template)
        if not n_choices:
            if "{" not in template:
                return template
            template = template.format_map(vars(scene))


def _draw_character(rng: random.Random, pronouns: Pronouns, adjective: str) -> Character:
    if rng.random() < 0.5:
        kind, names = CHILDREN[pronouns]
    else:
        kind, names = rng.choice(ANIMALS), ANIMAL_NAMES[pronouns]
    return Character(rng.choice(names), kind, adjective, pronouns)
