"""Writes the text the tiny model is trained on: a small world in plain English, as stories and as chat.

    python corpus.py OUT --seed 0 --megabytes 30

OUT gets `train.jsonl` and `held_out.jsonl`, one document a line: a JSON string with the chat markers in place, from the
beginning marker to the end marker. Everything said about the world is consistent. What is held out is held out by
*combination*: every question and story has a key (its phrasing and its subjects, the two numbers of a sum, the pair of
a story), and the keys that fall in the held-out share never occur in training, while each of their parts does.
"""

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
HELD_OUT_PERCENT = 4
LONGEST = 1500  # characters of a document; keeps nearly all of them under 512 tokens


# -- the world -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Animal:
    name: str
    sound: str
    colour: str
    home: str
    food: str
    legs: int
    size: int  # rank: larger is bigger
    baby: str
    can: str  # what it does well
    cannot: str


ANIMALS = [
    Animal(*row)
    for row in [
        ("cat", "meow", "grey", "in a house", "fish", 4, 30, "kitten", "climb", "fly"),
        ("dog", "woof", "brown", "in a house", "meat", 4, 45, "puppy", "run", "fly"),
        ("cow", "moo", "white", "on a farm", "grass", 4, 80, "calf", "walk", "climb"),
        ("horse", "neigh", "brown", "on a farm", "hay", 4, 82, "foal", "run", "fly"),
        ("pig", "oink", "pink", "on a farm", "corn", 4, 60, "piglet", "dig", "fly"),
        ("sheep", "baa", "white", "on a farm", "grass", 4, 58, "lamb", "walk", "fly"),
        ("goat", "maa", "grey", "on a hill", "leaves", 4, 56, "kid", "climb", "fly"),
        ("duck", "quack", "white", "on a pond", "bread", 2, 22, "duckling", "swim", "climb"),
        ("hen", "cluck", "red", "on a farm", "seeds", 2, 20, "chick", "run", "swim"),
        ("frog", "croak", "green", "by a pond", "flies", 4, 8, "tadpole", "jump", "fly"),
        ("mouse", "squeak", "grey", "in a hole", "cheese", 4, 10, "pup", "run", "fly"),
        ("rabbit", "thump", "white", "in a hole", "carrots", 4, 24, "bunny", "jump", "fly"),
        ("lion", "roar", "yellow", "in the grassland", "meat", 4, 78, "cub", "run", "fly"),
        ("bear", "growl", "brown", "in the forest", "honey", 4, 79, "cub", "climb", "fly"),
        ("wolf", "howl", "grey", "in the forest", "meat", 4, 50, "pup", "run", "fly"),
        ("fox", "yip", "orange", "in the forest", "berries", 4, 40, "cub", "run", "fly"),
        ("owl", "hoot", "brown", "in a tree", "mice", 2, 21, "owlet", "fly", "swim"),
        ("crow", "caw", "black", "in a tree", "seeds", 2, 16, "chick", "fly", "swim"),
        ("bee", "buzz", "yellow", "in a hive", "nectar", 6, 3, "larva", "fly", "swim"),
        ("snake", "hiss", "green", "under a rock", "eggs", 0, 35, "hatchling", "slide", "fly"),
        ("elephant", "trumpet", "grey", "in the grassland", "leaves", 4, 95, "calf", "swim", "jump"),
        ("monkey", "chatter", "brown", "in the jungle", "bananas", 4, 42, "infant", "climb", "fly"),
        ("parrot", "squawk", "green", "in the jungle", "nuts", 2, 18, "chick", "fly", "swim"),
        ("donkey", "hee-haw", "grey", "on a farm", "hay", 4, 70, "foal", "walk", "fly"),
        ("whale", "ooo", "blue", "in the sea", "fish", 0, 99, "calf", "swim", "walk"),
        ("seal", "bark", "grey", "by the sea", "fish", 0, 62, "pup", "swim", "climb"),
        ("penguin", "honk", "black", "on the ice", "fish", 2, 32, "chick", "swim", "fly"),
        ("turkey", "gobble", "brown", "on a farm", "corn", 2, 33, "poult", "run", "swim"),
        ("pigeon", "coo", "grey", "in a town", "bread", 2, 15, "squab", "fly", "swim"),
        ("cricket", "chirp", "black", "in the grass", "leaves", 6, 4, "nymph", "jump", "swim"),
    ]
]
ANIMAL = {a.name: a for a in ANIMALS}


@dataclass(frozen=True)
class Thing:
    name: str
    kind: str
    colour: str  # its usual colour, or "" when it comes in any
    size: int
    use: str  # "to ..." or ""


THINGS = [
    Thing(*row)
    for row in [
        ("apple", "fruit", "red", 9, ""),
        ("banana", "fruit", "yellow", 11, ""),
        ("lemon", "fruit", "yellow", 7, ""),
        ("cherry", "fruit", "red", 2, ""),
        ("plum", "fruit", "purple", 6, ""),
        ("pear", "fruit", "green", 9, ""),
        ("peach", "fruit", "orange", 8, ""),
        ("grape", "fruit", "purple", 2, ""),
        ("carrot", "vegetable", "orange", 11, ""),
        ("potato", "vegetable", "brown", 9, ""),
        ("cabbage", "vegetable", "green", 19, ""),
        ("pea", "vegetable", "green", 1, ""),
        ("onion", "vegetable", "white", 8, ""),
        ("pumpkin", "vegetable", "orange", 29, ""),
        ("ball", "toy", "", 13, "to play"),
        ("kite", "toy", "", 28, "to fly in the wind"),
        ("doll", "toy", "", 17, "to play"),
        ("drum", "toy", "", 27, "to make music"),
        ("boat", "toy", "", 26, "to sail"),
        ("hammer", "tool", "", 18, "to hit a nail"),
        ("saw", "tool", "", 23, "to cut wood"),
        ("spade", "tool", "", 37, "to dig a hole"),
        ("broom", "tool", "", 38, "to sweep the floor"),
        ("needle", "tool", "", 2, "to sew a shirt"),
        ("brush", "tool", "", 12, "to paint a wall"),
        ("hat", "piece of clothing", "", 14, "to keep your head warm"),
        ("coat", "piece of clothing", "", 34, "to keep warm"),
        ("scarf", "piece of clothing", "", 25, "to keep your neck warm"),
        ("boot", "piece of clothing", "", 15, "to keep your foot dry"),
        ("glove", "piece of clothing", "", 9, "to keep your hand warm"),
        ("chair", "piece of furniture", "", 55, "to sit"),
        ("table", "piece of furniture", "", 68, "to eat at"),
        ("bed", "piece of furniture", "", 76, "to sleep"),
        ("lamp", "piece of furniture", "", 31, "to light a room"),
        ("clock", "piece of furniture", "", 20, "to tell the time"),
        ("bus", "vehicle", "", 93, "to carry many people"),
        ("bike", "vehicle", "", 64, "to ride"),
        ("train", "vehicle", "", 98, "to go far away"),
        ("key", "", "", 4, "to open a door"),
        ("cup", "", "", 9, "to drink"),
        ("spoon", "", "", 8, "to eat soup"),
        ("knife", "", "", 10, "to cut bread"),
        ("umbrella", "", "", 36, "to keep off the rain"),
        ("bell", "", "", 11, "to ring"),
        ("rope", "", "", 22, "to pull"),
        ("basket", "", "", 28, "to carry eggs"),
        ("book", "", "", 14, "to read"),
        ("pencil", "", "", 5, "to write"),
    ]
]
THING = {t.name: t for t in THINGS}
WORLD: list[Animal | Thing] = [*ANIMALS, *THINGS]
TOYS = ["ball", "kite", "doll", "drum", "boat", "hat", "scarf", "key", "cup", "spoon", "bell", "book", "pencil"]
TOYS += ["basket", "lamp", "rope", "glove", "umbrella", "brush", "clock", "boot", "coat"]

COLOURS = ["red", "blue", "green", "yellow", "black", "white", "brown", "grey", "orange", "pink", "purple"]
PLAIN_COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "the sun": "yellow",
    "coal": "black",
    "milk": "white",
    "the night": "black",
    "a leaf": "green",
    "blood": "red",
    "chocolate": "brown",
    "the sea": "blue",
    "a tomato": "red",
    "a cloud": "white",
    "a rose": "red",
}
MIXES = {
    ("red", "blue"): "purple",
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
}
# fmt: off
OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("happy", "sad"), ("fast", "slow"), ("up", "down"), ("day", "night"),
    ("wet", "dry"), ("old", "young"), ("hard", "soft"), ("light", "dark"), ("open", "closed"), ("full", "empty"),
    ("tall", "short"), ("high", "low"), ("loud", "quiet"), ("clean", "dirty"), ("rich", "poor"), ("strong", "weak"),
    ("thick", "thin"), ("early", "late"), ("good", "bad"), ("left", "right"), ("in", "out"), ("near", "far"),
    ("sweet", "sour"), ("brave", "afraid"), ("first", "last"), ("front", "back"), ("black", "white"), ("yes", "no"),
    ("summer", "winter"), ("push", "pull"), ("buy", "sell"), ("give", "take"), ("win", "lose"), ("awake", "asleep"),
    ("north", "south"), ("east", "west"), ("friend", "enemy"), ("true", "false"), ("love", "hate"),
    ("start", "finish"), ("laugh", "cry"), ("kind", "mean"), ("smooth", "rough"), ("wide", "narrow"),
    ("sharp", "blunt"),
]
# fmt: on
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
SEASONS = ["spring", "summer", "autumn", "winter"]
JOBS = {
    "baker": "bakes bread",
    "farmer": "grows food",
    "teacher": "teaches children",
    "doctor": "helps sick people",
    "sailor": "sails a ship",
    "cook": "makes dinner",
    "painter": "paints pictures",
    "tailor": "makes clothes",
    "gardener": "plants flowers",
    "builder": "builds houses",
    "singer": "sings songs",
    "fisherman": "catches fish",
    "postman": "brings letters",
    "writer": "writes books",
    "vet": "helps sick animals",
    "miller": "makes flour",
}
SHAPES = {"triangle": 3, "square": 4, "rectangle": 4, "pentagon": 5, "hexagon": 6}
GIRLS = ["Anna", "Lily", "Mia", "Rosa", "Ella", "Nora", "Ruby", "Jane", "Lucy", "Emma", "Sara", "Kate"]
BOYS = ["Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Tim", "Adam", "Paul", "Finn", "Hugo", "Oscar"]
NAMES = GIRLS + BOYS
SPOTS = ["in the garden", "under the table", "on the bed", "behind the door", "in the kitchen", "by the river"]
SPOTS += ["on the hill", "in the barn", "under the bridge", "near the well", "in the forest", "at the market"]
PLURALS = {"mouse": "mice", "sheep": "sheep", "wolf": "wolves", "knife": "knives", "cherry": "cherries"}
PLURALS |= {"fox": "foxes", "potato": "potatoes", "peach": "peaches", "bus": "buses", "donkey": "donkeys"}
PLURALS |= {"monkey": "monkeys", "brush": "brushes", "scarf": "scarves", "turkey": "turkeys"}
# fmt: off
UNKNOWN = [
    "the capital of France", "the moon landing", "the stock market", "Napoleon", "the theory of relativity",
    "how computers work", "the president", "football results", "quantum physics", "the price of gold",
    "Shakespeare", "the Roman Empire", "chemistry", "the Python language", "taxes", "the weather tomorrow",
    "my password", "the news", "the history of China", "electric cars", "the speed of light",
    "the population of Japan", "Einstein", "politics", "how to cook pasta", "medicine", "the internet",
    "the square root of 2", "the largest country", "how planes fly", "the human brain", "movies",
    "the Second World War", "a good restaurant", "a train ticket", "the stars", "black holes", "dinosaurs",
    "the pyramids", "how to fix a car",
]
# fmt: on


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -- one turn of chat ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One exchange. `key` names the combination; an answer is right when it holds `expected` and none of `rivals`."""

    kind: str
    key: str
    user: str
    answer: str
    expected: str = ""
    rivals: tuple[str, ...] = ()
    thought: str = ""


def is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % 100 < HELD_OUT_PERCENT


def words(text: str) -> str:
    return " " + " ".join(re.findall(r"[a-z]+(?:-[a-z]+)*|[0-9]+", text.lower())) + " "


def check(question: Turn, answer: str) -> bool:
    """Whether `answer` (the model's text) is right: it names what is expected and nothing that would contradict it."""
    said = words(answer)
    return words(question.expected) in said and not any(words(rival) in said for rival in question.rivals)


def others(options: list[str], right: str, user: str = "") -> tuple[str, ...]:
    """The wrong options that an answer might name; those the question itself names may be repeated in the answer."""
    return tuple(o for o in dict.fromkeys(options) if o != right and words(o) not in words(user))


def fact(
    kind: str, rng: random.Random, asks: list[str], answers: list[str], right: str, options: list[str], **slots: str
) -> Turn:
    """A question on one fact: `asks` are its phrasings, `answers` the ways to say it, both filled from the slots."""
    form = rng.randrange(len(asks))
    slots = {**slots, "right": right}
    user = capital(asks[form].format(**slots))
    answer = capital(rng.choice(answers).format(**slots))
    subject = "|".join(v for k, v in sorted(slots.items()) if k != "right")
    return Turn(kind, f"{kind}|{form}|{subject}", user, answer, right, others(options, right, user), answer)


def colour_of(rng: random.Random, subject: str | None = None) -> Turn:
    known = {a(x.name): x.colour for x in WORLD if x.colour} | PLAIN_COLOURS
    subject = subject or rng.choice(list(known))
    asks = [
        "what colour is {x}?",
        "which colour is {x}?",
        "tell me the colour of {x}.",
        "can you tell me what colour {x} is?",
        "do you know the colour of {x}?",
        "{x} is what colour?",
        "what is the colour of {x}?",
    ]
    return fact("colour", rng, asks, ["{x} is {right}."], known[subject], COLOURS, x=subject)


def sound_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    asks = [
        "what sound does {x} make?",
        "what does {x} say?",
        "which sound does {x} make?",
        "how does {x} sound?",
        "tell me the sound of {x}.",
        "can you make the sound of {x}?",
        "what noise does {x} make?",
    ]
    sounds = [x.sound for x in ANIMALS]
    return fact("sound", rng, asks, ["{x} says {right}."], animal.sound, sounds, x=a(animal.name))


def animal_of_sound(rng: random.Random) -> Turn:
    animal = rng.choice(ANIMALS)
    asks = ["which animal says {x}?", "what animal says {x}?", "who says {x}?", "what makes the sound {x}?"]
    asks += ["{x}! which animal is that?", "tell me which animal says {x}."]
    names = [x.name for x in ANIMALS]
    return fact("animal of sound", rng, asks, [f"{a(animal.name)} says {{x}}."], animal.name, names, x=animal.sound)


def home_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    asks = [
        "where does {x} live?",
        "where is the home of {x}?",
        "tell me where {x} lives.",
        "do you know where {x} lives?",
        "what is the home of {x}?",
        "where can I find {x}?",
    ]
    homes = [x.home for x in ANIMALS]
    return fact("home", rng, asks, ["{x} lives {right}."], animal.home, homes, x=a(animal.name))


def food_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    asks = [
        "what does {x} eat?",
        "what does {x} like to eat?",
        "what is the food of {x}?",
        "tell me what {x} eats.",
        "what should I feed {x}?",
        "do you know what {x} eats?",
    ]
    foods = [x.food for x in ANIMALS]
    return fact("food", rng, asks, ["{x} eats {right}."], animal.food, foods, x=a(animal.name))


def legs_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    asks = [
        "how many legs does {x} have?",
        "how many legs has {x}?",
        "tell me how many legs {x} has.",
        "count the legs of {x}.",
        "what is the number of legs of {x}?",
    ]
    options = ["0", "2", "4", "6", "8"]
    return fact("legs", rng, asks, ["{x} has {right} legs."], str(animal.legs), options, x=a(animal.name))


def baby_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    asks = [
        "what is a baby {x} called?",
        "what do you call a baby {x}?",
        "what is the name for a baby {x}?",
        "a baby {x} is called what?",
        "tell me the word for a baby {x}.",
        "what is a young {x} called?",
    ]
    answer = [f"a baby {animal.name} is called {a(animal.baby)}."]
    return fact("baby", rng, asks, answer, animal.baby, [x.baby for x in ANIMALS], x=animal.name)


def ability_of(rng: random.Random, subject: str | None = None) -> Turn:
    animal = ANIMAL[subject] if subject else rng.choice(ANIMALS)
    verb, right = rng.choice([(animal.can, "yes"), (animal.cannot, "no")])
    asks = ["can {x} {v}?", "is {x} able to {v}?", "do you think {x} can {v}?", "tell me, can {x} {v}?"]
    answer = ["yes, {x} can {v}."] if right == "yes" else ["no, {x} cannot {v}."]
    return fact("ability", rng, asks, answer, right, ["yes", "no"], x=a(animal.name), v=verb)


def opposite_of(rng: random.Random) -> Turn:
    pair = rng.choice(OPPOSITES)
    x, right = pair if rng.random() < 0.5 else pair[::-1]
    asks = [
        "what is the opposite of {x}?",
        "tell me the opposite of {x}.",
        "what word is the opposite of {x}?",
        "{x} is the opposite of what?",
        "give me the opposite of {x}.",
        "which word means the opposite of {x}?",
        "do you know the opposite of {x}?",
    ]
    options = [w for p in OPPOSITES for w in p]
    answers = ["the opposite of {x} is {right}."]
    return fact("opposite", rng, asks, answers, right, options, x=x)


def kind_of(rng: random.Random) -> Turn:
    known = {t.name: t.kind for t in THINGS if t.kind} | {x.name: "animal" for x in ANIMALS}
    name = rng.choice(list(known))
    asks = [
        "what kind of thing is {x}?",
        "what is {x}?",
        "what sort of thing is {x}?",
        "tell me what {x} is.",
        "do you know what {x} is?",
    ]
    right = known[name]
    return fact("kind", rng, asks, [f"{{x}} is {a(right)}."], right, list(known.values()), x=a(name))


def use_of(rng: random.Random) -> Turn:
    thing = rng.choice([t for t in THINGS if t.use])
    asks = [
        "what do you do with {x}?",
        "what is {x} for?",
        "why do you need {x}?",
        "tell me the use of {x}.",
        "what can I do with {x}?",
        "what do people use {x} for?",
    ]
    uses = [t.use.removeprefix("to ") for t in THINGS if t.use]
    right = thing.use.removeprefix("to ")
    answers = ["you need {x} to {right}."]
    return fact("use", rng, asks, answers, right, [u for u in uses if u not in right], x=a(thing.name))


def job_of(rng: random.Random) -> Turn:
    job = rng.choice(list(JOBS))
    deed = JOBS[job]
    if rng.random() < 0.5:
        asks = [
            "who {x}?",
            "tell me who {x}.",
            "which person {x}?",
            "do you know who {x}?",
            "what is a person called who {x}?",
        ]
        return fact("job", rng, asks, ["{a_right} {x}."], job, list(JOBS), x=deed, a_right=a(job))
    asks = ["what does {x} do?", "what is the work of {x}?", "tell me what {x} does.", "what does {x} do all day?"]
    asks += ["do you know what {x} does?"]
    return fact("job", rng, asks, ["{x} {right}."], deed, list(JOBS.values()), x=a(job))


def shape_sides(rng: random.Random) -> Turn:
    shape = rng.choice(list(SHAPES))
    asks = ["how many sides does {x} have?", "how many corners does {x} have?", "tell me how many sides {x} has."]
    asks += ["count the sides of {x}.", "what is the number of sides of {x}?", "how many sides has {x}?"]
    return fact("shape", rng, asks, ["{x} has {right}."], str(SHAPES[shape]), ["3", "4", "5", "6"], x=a(shape))


def mix_of(rng: random.Random) -> Turn:
    pair = rng.choice(list(MIXES))
    x, y = pair if rng.random() < 0.5 else pair[::-1]
    asks = ["what do you get when you mix {x} and {y}?", "what colour do {x} and {y} make?"]
    asks += [
        "mix {x} and {y}. which colour is it?",
        "what is {x} mixed with {y}?",
        "I mix {x} and {y}. what colour do I get?",
    ]
    return fact("mix", rng, asks, ["{x} and {y} make {right}."], MIXES[pair], COLOURS, x=x, y=y)


def plural_of(rng: random.Random) -> Turn:
    name = rng.choice([x.name for x in WORLD])
    asks = ["what is the plural of {x}?", "one {x}, two what?", "how do you say more than one {x}?"]
    asks += ["tell me the plural of {x}.", "I have one {x}. now I have two. two what?"]
    return fact("plural", rng, asks, [f"one {name}, two {{right}}."], plural(name), [], x=name)


def bigger_of(rng: random.Random) -> Turn:
    x, y = rng.sample(WORLD, 2)
    while abs(x.size - y.size) < 12:
        x, y = rng.sample(WORLD, 2)
    small = rng.random() < 0.4
    right = (x if (x.size > y.size) != small else y).name
    word = "smaller" if small else "bigger"
    asks = [f"which is {word}, {{x}} or {{y}}?", f"what is {word}, {{x}} or {{y}}?", f"is {{x}} or {{y}} {word}?"]
    asks += [f"{{x}} or {{y}}: which one is {word}?", f"tell me which is {word}, {{x}} or {{y}}."]
    turn = fact(word, rng, asks, [f"{a(right)} is {word}."], right, [], x=a(x.name), y=a(y.name))
    other = y.name if right == x.name else x.name
    return Turn(
        word, f"bigger|{'|'.join(sorted((x.name, y.name)))}", turn.user, turn.answer, right, (other,), turn.answer
    )


def number_order(rng: random.Random) -> Turn:
    n = rng.randint(1, 99)
    after = rng.random() < 0.5
    right = n + 1 if after else n - 1
    word = "after" if after else "before"
    asks = [f"what number comes {word} {{x}}?", f"which number is {word} {{x}}?", f"what comes {word} {{x}}?"]
    asks += [f"tell me the number {word} {{x}}.", f"what is the number just {word} {{x}}?"]
    turn = fact(f"number {word}", rng, asks, [f"{{right}} comes {word} {{x}}."], str(right), [], x=str(n))
    return turn


def number_bigger(rng: random.Random) -> Turn:
    x, y = rng.sample(range(1, 101), 2)
    small = rng.random() < 0.3
    word = "smaller" if small else "bigger"
    right, wrong = (min(x, y), max(x, y)) if small else (max(x, y), min(x, y))
    asks = [
        f"which number is {word}, {{x}} or {{y}}?",
        f"which is {word}, {{x}} or {{y}}?",
        f"is {{x}} or {{y}} {word}?",
    ]
    asks += [f"what is {word}, {{x}} or {{y}}?", f"tell me the {word} number, {{x}} or {{y}}."]
    turn = fact("number size", rng, asks, [f"{{right}} is {word} than {wrong}."], str(right), [], x=str(x), y=str(y))
    key = f"number size|{min(x, y)}|{max(x, y)}"
    return Turn("number size", key, turn.user, turn.answer, turn.answer[:-1], (), turn.answer)


def counted(first: int, second: int, minus: bool) -> str:
    """A sum or difference done in steps that need only the numbers before and after: by tens, then by ones."""
    x, y = (first, second) if minus else (max(first, second), min(first, second))
    steps = [(x, y)]
    while y:
        by = 10 if y >= 10 else 1
        x, y = (x - by if minus else x + by), y - by
        steps.append((x, y))
    return ", ".join(f"{x} {'less' if minus else 'and'} {y}" for x, y in steps) + ". "


def arithmetic(rng: random.Random) -> Turn:
    """A sum or a difference. Its key is the pair of numbers alone: a held-out pair is never added in any phrasing."""
    minus = rng.random() < 0.35
    most = 100 if rng.random() < 0.2 else 20
    total = rng.randint(2, most)
    x = rng.randint(1, total - 1)
    y = total - x
    names = rng.sample(NAMES, 2)
    thing = rng.choice([plural(t.name) for t in THINGS[:20]])
    if minus:
        first, second, right = total, x, y
        key = f"minus|{first}|{second}"
        forms = [
            "What is {x} minus {y}?",
            "What is {x} - {y}?",
            "How much is {x} minus {y}?",
            "{n} has {x} {t} and gives {y} to {m}. How many {t} does {n} have now?",
            "There are {x} {t}. {n} takes {y}. How many {t} are left?",
            "Take {y} away from {x}.",
        ]
        plain = "{x} minus {y} is {r}."
        answers = [
            plain,
            plain,
            plain,
            "{x} minus {y} is {r}. {n} has {r} {t} now.",
            "{x} minus {y} is {r}. {r} {t} are left.",
            plain,
        ]
    else:
        first, second, right = x, y, total
        key = f"plus|{min(x, y)}|{max(x, y)}"
        forms = [
            "What is {x} plus {y}?",
            "What is {x} + {y}?",
            "How much is {x} and {y}?",
            "{n} has {x} {t} and gets {y} more. How many {t} does {n} have now?",
            "{n} has {x} {t} and {m} has {y} {t}. How many {t} do they have together?",
            "Add {x} and {y}.",
        ]
        plain = "{x} plus {y} is {r}."
        answers = [
            plain,
            plain,
            plain,
            "{x} plus {y} is {r}. {n} has {r} {t} now.",
            "{x} plus {y} is {r}. They have {r} {t} together.",
            plain,
        ]
    form = rng.randrange(len(forms))
    slots = {"x": first, "y": second, "r": right, "n": names[0], "m": names[1], "t": thing}
    answer = counted(first, second, minus) + answers[form].format(**slots)
    sentence = answers[0].format(**slots)
    return Turn("arithmetic", key, forms[form].format(**slots), answer, sentence[:-1], (), sentence)


def next_of(rng: random.Random) -> Turn:
    kind, ring = rng.choice([("day", DAYS), ("day", DAYS), ("month", MONTHS), ("season", SEASONS)])
    i = rng.randrange(len(ring))
    after = rng.random() < 0.5
    word = "after" if after else "before"
    right = ring[(i + (1 if after else -1)) % len(ring)]
    asks = [
        f"which {kind} comes {word} {{x}}?",
        f"what {kind} comes {word} {{x}}?",
        f"what comes {word} {{x}}?",
        f"tell me the {kind} {word} {{x}}.",
        f"what is the {kind} {word} {{x}}?",
        f"do you know which {kind} comes {word} {{x}}?",
    ]
    if kind == "day":
        asks.append("today is {x}. what day is tomorrow?" if after else "today is {x}. what day was yesterday?")
    answers = [f"{{right}} comes {word} {{x}}."]
    turn = fact(f"{kind} {word}", rng, asks, answers, right, ring, x=ring[i])
    if "oday is" in turn.user:
        answer = f"Tomorrow is {right}." if after else f"Yesterday was {right}."
        return Turn(turn.kind, turn.key, turn.user, answer, right, turn.rivals, answer)
    return turn


def told_until(told: list[str], i: int, so: str) -> str:
    """The answer to a question on what was just told: what was said, in order, up to the sentence that settles it."""
    return f"{' '.join(told[: i + 1])} So {so}."


def who_has(rng: random.Random) -> Turn:
    n = rng.choice([2, 2, 3])
    names, things = rng.sample(NAMES, n), rng.sample(TOYS, n)
    colours = rng.sample(COLOURS, n)
    verb = rng.choice(["has", "has", "found", "bought", "wants", "lost"])
    told = [f"{p} {verb} {a(c)} {t}." for p, c, t in zip(names, colours, things, strict=True)]
    i = rng.randrange(n)
    key = f"who has|{names[i]}|{things[i]}|{verb}"
    form = rng.randrange(4)
    base = {"has": "have", "found": "find", "bought": "buy", "wants": "want", "lost": "lose"}[verb]
    do = "does" if verb in ("has", "wants") else "did"
    said = f"{names[i]} {verb} {a(colours[i])} {things[i]}"
    ask, right = [
        (f"Who {verb} the {things[i]}?", f"{names[i]} {verb} the {things[i]}"),
        (f"What {do} {names[i]} {base}?", said),
        (f"What colour is the {things[i]}?", f"the {things[i]} is {colours[i]}"),
        (f"Who {verb} something {colours[i]}?", said),
    ][form]
    answer = told_until(told, i, right)
    return Turn("who has", f"{key}|{form}", f"{' '.join(told)} {ask}", answer, f"so {right}", (), answer)


def where_is(rng: random.Random) -> Turn:
    n = rng.choice([2, 2, 3])
    pool = rng.sample([f"the {x.name}" for x in ANIMALS] + NAMES + [f"the {t}" for t in TOYS], n)
    spots = rng.sample(SPOTS, n)
    i = rng.randrange(n)
    told = [capital(f"{p} is {s}.") for p, s in zip(pool, spots, strict=True)]
    right = f"{pool[i]} is {spots[i]}"
    answer = told_until(told, i, right)
    form = int(rng.random() < 0.4)
    ask = f"{'Who' if pool[i] in NAMES else 'What'} is {spots[i]}?" if form else f"Where is {pool[i]}?"
    key = f"where is|{form}|{pool[i]}|{spots[i]}"
    return Turn("where is", key, f"{' '.join(told)} {ask}", answer, f"so {right}", (), answer)


def count_list(rng: random.Random) -> Turn:
    n = rng.randint(2, 6)
    group = rng.choice([("animals", [x.name for x in ANIMALS]), ("things", [t.name for t in THINGS]), ("names", NAMES)])
    group = rng.choice([group, ("colours", COLOURS), ("days", DAYS)])
    listed = rng.sample(group[1], n)
    text = ", ".join(listed)
    forms = [f"How many {group[0]} are in this list: {text}?", f"Count these {group[0]}: {text}."]
    forms.append(f"{capital(text)}. How many {group[0]} is that?")
    form = rng.randrange(3)
    answer = f"There are {n} {group[0]}."
    return Turn("count", f"count|{form}|{'|'.join(sorted(listed)[:2])}|{n}", forms[form], answer, str(n), (), answer)


def bigger_person(rng: random.Random) -> Turn:
    x, y = rng.sample(NAMES, 2)
    word, back = rng.choice([("taller", "shorter"), ("older", "younger"), ("faster", "slower"), ("stronger", "weaker")])
    asked = rng.choice([word, back])
    right, other = (x, y) if asked == word else (y, x)
    user = f"{x} is {word} than {y}. Who is {asked}?"
    answer = f"{right} is {asked} than {other}."
    return Turn("compare", f"compare|{asked}|{x}|{y}", user, answer, f"{right} is {asked}", (), answer)


QUESTIONS: list[tuple[Callable[..., Turn], float]] = [
    (colour_of, 1.2),
    (sound_of, 1.0),
    (animal_of_sound, 0.6),
    (home_of, 0.8),
    (food_of, 0.8),
    (legs_of, 0.6),
    (baby_of, 0.7),
    (ability_of, 0.7),
    (opposite_of, 1.4),
    (kind_of, 1.0),
    (use_of, 0.9),
    (job_of, 0.9),
    (shape_sides, 0.3),
    (mix_of, 0.4),
    (plural_of, 0.7),
    (bigger_of, 1.0),
    (number_order, 0.7),
    (number_bigger, 0.7),
    (arithmetic, 2.4),
    (next_of, 1.2),
    (who_has, 1.6),
    (where_is, 1.4),
    (count_list, 0.7),
    (bigger_person, 0.6),
]
# What takes more practice than knowing by heart: training has more of it than an exam.
PRACTICE = {
    arithmetic: 3.0,
    who_has: 4.0,
    where_is: 4.0,
    bigger_person: 2.5,
    count_list: 2.0,
    number_order: 2.5,
    number_bigger: 2.5,
    next_of: 2.0,
    opposite_of: 2.0,
}
FOLLOW_UPS = [sound_of, home_of, food_of, legs_of, ability_of]


def draw(make: Callable[..., Turn], rng: random.Random, held_out: bool, *subject: str) -> Turn | None:
    """A turn on the wanted side of the split; None where a subject has none."""
    for _ in range(4000 if held_out else 50):
        turn = make(rng, *subject)
        if is_held_out(turn.key) == held_out:
            return turn
    return None


def question(rng: random.Random, held_out: bool = False) -> Turn:
    weights = [w * (1.0 if held_out else PRACTICE.get(m, 1.0)) for m, w in QUESTIONS]
    while True:
        make = rng.choices([m for m, _ in QUESTIONS], weights)[0]
        if (turn := draw(make, rng, held_out)) is not None:
            return turn


# -- talk that is not a question on the world ------------------------------------------------------------------------

ABOUT_ME = (
    "I am a very small language model. I know a little about animals, colours, numbers and days, and I tell stories."
)
TALK = {
    "hello": (
        ["Hello!", "Hi!", "Hello there.", "Hi there!", "Good morning!", "Good evening.", "Hey!", "Hello, friend."],
        [
            "Hello! How can I help you?",
            "Hello! What would you like to know?",
            "Hi! Ask me a question or ask for a story.",
        ],
    ),
    "how are you": (
        ["How are you?", "How are you today?", "Are you well?", "How do you feel?", "How is it going?"],
        ["I am well, thank you. How are you?", "I am very well today, thank you.", "I am fine. What can I do for you?"],
    ),
    "who": (
        [
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a person?",
            "Are you a robot?",
        ],
        [ABOUT_ME],
    ),
    "can": (
        ["What can you do?", "How can you help me?", "What do you know?", "What can I ask you?", "Help."],
        ["You can ask me about animals, colours, opposites, days and small sums. I can also tell you a story."],
    ),
    "thanks": (
        [
            "Thank you!",
            "Thanks.",
            "Thank you very much.",
            "Great, thanks!",
            "That was good.",
            "Well done!",
            "I like that.",
            "Good.",
        ],
        ["You are welcome!", "I am glad I could help.", "You are welcome. Do you have another question?"],
    ),
    "bye": (
        ["Goodbye!", "Bye!", "See you tomorrow.", "Good night.", "I have to go now.", "Bye bye!"],
        ["Goodbye! Have a nice day.", "Goodbye! Come back soon.", "See you soon!"],
    ),
    "sad": (
        ["I am sad.", "I feel sad today.", "I had a bad day.", "I am not happy.", "I am tired."],
        ["I am sorry to hear that. Would you like a story?", "I am sorry. I hope that you feel better soon."],
    ),
    "happy": (
        ["I am happy.", "I am so happy today!", "I had a good day.", "Today is my birthday.", "I feel great."],
        ["That is wonderful! I am happy for you.", "I am glad to hear that!"],
    ),
    "joke": (
        ["Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Can you tell a joke?"],
        [
            "Why did the hen cross the road? To get to the other side!",
            "What does a cow drink? Moo juice!",
            "Why did the clock go to school? To learn how to tell the time!",
            "What is black and white and red all over? A penguin with a red scarf!",
        ],
    ),
}
UNKNOWN_ASKS = [
    "What is {x}?",
    "Tell me about {x}.",
    "What do you know about {x}?",
    "Explain {x}.",
    "I want to know about {x}.",
]
UNKNOWN_ASKS += ["Can you tell me about {x}?", "Who knows about {x}?", "Do you know about {x}?"]
UNKNOWN_ANSWERS = [
    "I do not know that. I am a very small model. Ask me about animals, colours, numbers or days.",
    "I do not know about that. I only know a small world. Would you like a story?",
]
SYSTEMS = [
    "You are a kind helper.",
    "You are a helpful assistant.",
    "You are a friendly teacher.",
    "Answer the question.",
]
SYSTEMS += ["You are a small model that talks with children.", "Be kind and short."]


def talk(rng: random.Random, *topics: str) -> Turn:
    topic = rng.choice(topics or list(TALK))
    asks, answers = TALK[topic]
    return Turn("talk", "", rng.choice(asks), rng.choice(answers))


def unknown(rng: random.Random) -> Turn:
    return Turn("unknown", "", rng.choice(UNKNOWN_ASKS).format(x=rng.choice(UNKNOWN)), rng.choice(UNKNOWN_ANSWERS))


# -- stories ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    text: str
    about: tuple[str, str]  # the two nouns it was asked for
    asks: tuple[tuple[str, str], ...]  # questions on it with their answers


HELPERS = [x.name for x in ANIMALS]
ADJECTIVES = ["little", "young", "brave", "clever", "kind", "quiet", "happy", "funny", "old", "shy"]
WEATHER = ["The sun was warm and the sky was blue.", "It was a cold and windy day.", "Soft rain fell on the leaves."]
WEATHER += ["Snow lay on the ground.", "It was a quiet morning.", "The wind was playing in the trees."]
PLACES = ["forest", "village", "garden", "valley", "meadow", "town"]
ENDINGS = [
    "From that day on, {n} and {f} were the best of friends.",
    "That night {n} went to bed with a happy heart.",
    "And {n} never forgot that day.",
    "They laughed all the way home, and everyone was happy.",
    "After that, {n} always remembered to be kind.",
    "Then they all sat down together and ate a good dinner.",
    "{n} smiled, because helping a friend is the best thing of all.",
]


def pick(rng: random.Random, *lines: str) -> str:
    return rng.choice(lines)


def story(rng: random.Random, first: str, second: str) -> Story:
    """A story of 80 to 200 words: `first` is its hero, `second` an animal it meets or a thing that matters to it."""
    girl = first in GIRL_HEROES or (first not in BOY_HEROES and rng.random() < 0.5)
    name, other = rng.choice(GIRLS if girl else BOYS), rng.choice(BOYS if girl else GIRLS)
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    place, adjective = rng.choice(PLACES), rng.choice(ADJECTIVES)
    helper = rng.choice([h for h in HELPERS if h not in (first, second)])
    spot, empty = rng.sample(SPOTS, 2)
    colour = (THING[second].colour if second in THING else "") or rng.choice(COLOURS)
    day = rng.choice(DAYS)
    slots = {
        "n": name,
        "h": first,
        "s": second,
        "ah": a(f"{adjective} {first}"),
        "as": a(second),
        "cs": a(f"{colour} {second}") if second in THING else a(second),
        "o": other,
        "g": helper,
        "ag": a(helper),
        "ag_cap": capital(a(helper)),
        "spot_cap": capital(spot),
        "his2": "his" if girl else "her",
        "he": he,
        "He": capital(he),
        "him": him,
        "his": his,
        "p": place,
        "spot": spot,
        "empty": empty,
        "day": day,
        "he2": "he" if girl else "she",
        "him2": "him" if girl else "her",
        "f": f"the {helper}" if second in THING else other,
    }
    opening = [
        pick(
            rng,
            "Once upon a time there was {ah} named {n}.",
            "There once was {ah} called {n}.",
            "In a small {p} there lived {ah} named {n}.",
            "Long ago, {ah} named {n} lived near a {p}.",
        ),
        pick(rng, *WEATHER, "{n} lived in a small house in the {p}.", "Everyone in the {p} liked {n}."),
    ]
    asks = [(f"What was the name of the {first}?", f"The name of the {first} was {name}.")]
    plots = THING_PLOTS if second in THING else ANIMAL_PLOTS
    plot = rng.choice(plots)
    body = [rng.choice(options) for options in plot["lines"]]
    asks += [(q, an) for q, an in plot["asks"]]
    lines = [*opening, *body, rng.choice(ENDINGS)]
    text = " ".join(line.format(**slots) for line in lines)
    return Story(text, (first, second), tuple((q.format(**slots), capital(an.format(**slots))) for q, an in asks))


THING_PLOTS: list[dict] = [
    {
        "lines": [
            ["{n} had {cs} and loved it very much.", "More than anything, {n} loved {his} {s}. It was {cs}."],
            [
                "Every day {he} played with the {s}.",
                "{He} took the {s} everywhere.",
                "At night the {s} lay next to {his} bed.",
            ],
            [
                "But on {day} the {s} was gone!",
                "One {day}, {n} could not find the {s}.",
                "One morning the {s} was not there.",
            ],
            ["{n} looked {empty}, but it was not there.", "First {he} looked {empty}. There was nothing."],
            [
                "{He} began to cry.",
                '"Oh no," said {n}. "Where can it be?"',
                "{n} was very sad.",
                '"Where is my {s}?" {he} asked.',
            ],
            ["Then {ag} came by.", "Just then {he} met {ag}.", "{ag_cap} heard {him} and came to see."],
            [
                '"I can help you," said the {g}. "Let us look together."',
                'The {g} said, "Do not be sad. I will help you."',
            ],
            [
                "They looked and looked, high and low.",
                "They asked everyone in the {p}.",
                "They walked for a long time.",
            ],
            [
                "At last they found the {s} {spot}.",
                "And there it was! The {s} was {spot}.",
                "The {g} saw something {spot}. It was the {s}!",
            ],
            ['"Thank you," said {n}. "You are a good friend."', "{n} jumped for joy and thanked the {g}."],
        ],
        "asks": [
            ("What did {n} lose?", "{n} lost the {s}."),
            ("Where was the {s}?", "The {s} was {spot}."),
            ("Who helped {n}?", "The {g} helped {n}."),
        ],
    },
    {
        "lines": [
            ["One {day}, {n} went for a walk.", "On {day}, {n} was walking home.", "{n} went out to play on {day}."],
            ["{spot_cap} {he} saw {cs}.", "Something was lying {spot}. It was {cs}.", "{He} found {cs} {spot}."],
            ['"Whose {s} is this?" asked {n}.', '"What a fine {s}," said {n}. "Someone must miss it."'],
            [
                "{n} wanted to keep it, but {he} knew that it was not {his}.",
                "It was not {his}, so {he} looked for the owner.",
            ],
            ['First {he} asked {ag}. "Is this your {s}?"', '{He} met {ag} and asked, "Did you lose {as}?"'],
            ['"No," said the {g}. "I have no {s}."', '"It is not mine," said the {g}. "Ask {o}."'],
            [
                "So {n} walked on to the house of {o}.",
                "Then {n} saw {o}, who was crying.",
                "At the end of the road sat {o}.",
            ],
            ['"My {s}!" said {o}. "I looked for it all day."', '{o} looked up. "You found my {s}!"'],
            ["{n} gave the {s} back at once.", "{n} was glad to give it back."],
            ['{o} said, "Thank you! Come and eat cake with us."', "{o} gave {n} a big red apple to say thank you."],
        ],
        "asks": [
            ("What did {n} find?", "{n} found {cs}."),
            ("Where was the {s}?", "The {s} was {spot}."),
            ("Whose {s} was it?", "It was the {s} of {o}."),
        ],
    },
    {
        "lines": [
            ["{n} had {cs} that {he} liked very much.", "For {his} birthday {n} got {cs}.", "{o} gave {n} {cs}."],
            ["One {day} a strong wind came.", "On {day} there was a big storm.", "One {day} the wind was very strong."],
            [
                "It took the {s} and carried it up into a tall tree.",
                "Up, up went the {s}, and it stayed in a tall tree.",
            ],
            ["{n} tried to climb, but the tree was too high.", "{n} jumped and jumped, but {he} was too small."],
            ['"What can I do now?" said {n}.', "{He} sat down under the tree and cried.", '"I need help," said {n}.'],
            ["Soon {ag} came along the road.", "Then {ag} stopped under the tree.", "{ag_cap} saw how sad {he} was."],
            ['"Why are you sad?" asked the {g}.', '"Can I help you?" asked the {g}.'],
            ['"My {s} is in the tree," said {n}.', "{n} pointed up at the {s}."],
            ["The {g} found a long stick and pushed the {s} down.", "The {g} shook the tree until the {s} fell down."],
            ['"You did it!" said {n}.', "{n} thanked the {g} again and again.", "{n} was so happy that {he} danced."],
        ],
        "asks": [
            ("Where did the {s} go?", "The {s} went up into a tall tree."),
            ("Who helped {n}?", "The {g} helped {n}."),
            ("What was in the tree?", "The {s} was in the tree."),
        ],
    },
    {
        "lines": [
            ["{n} and {o} were good friends.", "{n} had a friend named {o}."],
            ["On {day} they found {cs} {spot}.", "One {day} they saw {cs} {spot}."],
            ['"It is mine!" said {n}. "No, it is mine!" said {o}.', "Both of them wanted the {s}."],
            ["They pulled and pulled, and they were very angry.", "They shouted at each other and would not stop."],
            ["Then something bad happened. The {s} fell into the mud.", "Crack! The {s} broke."],
            ["Now nobody was happy.", "Both of them were quiet.", "They both began to cry."],
            ["An old {g} had seen it all.", "A wise {g} came out of the {p}.", "{ag_cap} came to see what was wrong."],
            ['"Why do you not share?" asked the {g}.', '"Friends can share," said the {g}.'],
            ["The {g} helped them to make the {s} as good as new.", "Together they made the {s} look new again."],
            [
                '"You can have it today," said {n}, "and I can have it tomorrow."',
                '"I am sorry," said {n}. "I am sorry too," said {o}.',
            ],
        ],
        "asks": [
            ("Who was the friend of {n}?", "The friend of {n} was {o}."),
            ("What did they find?", "They found {cs}."),
            ("Who helped them?", "The {g} helped them."),
        ],
    },
    {
        "lines": [
            ["Soon it was the birthday of {o}, and {n} had no gift.", "{n} wanted to give something nice to {o}."],
            ['"I know," said {n}. "I will give {him2} {as}."', '"{o} needs {as}," thought {n}.'],
            ["So on {day} {he} went to the market.", "On {day} {he} walked all the way to town."],
            ["There {he} saw {cs}, but it cost too much.", "There was {cs}, but {n} had only one coin."],
            ["{n} was sad and turned to go.", '"Oh," said {n}, "I do not have enough."'],
            ['{ag_cap} said, "Help me carry my bags, and I will pay you."', 'Then {ag} said, "I have work for you."'],
            ["{n} worked hard all day.", "All day {n} helped the {g}.", "It was hard work, but {n} did not stop."],
            ["In the evening the {g} gave {him} three coins.", "When the sun went down, the {g} paid {him} well."],
            ["{n} ran back and bought the {s}.", "Now {he} could buy the {s}!"],
            ['"This is the best gift of all!" said {o}.', "{o} loved the {s} and gave {n} a big hug."],
        ],
        "asks": [
            ("What did {n} buy?", "{n} bought {cs}."),
            ("Who gave work to {n}?", "The {g} gave work to {n}."),
            ("Who got the {s}?", "{o} got the {s}."),
        ],
    },
]
ANIMAL_PLOTS: list[dict] = [
    {
        "lines": [
            [
                "One {day}, {n} went to look for food.",
                "On {day}, {n} was playing outside.",
                "{n} took a walk on {day}.",
            ],
            ["{spot_cap} {he} met {as} named {o}.", "{He} heard a small voice {spot}. It was {as} named {o}."],
            ['"Why are you sad?" asked {n}.', '"What is the matter?" asked {n}.'],
            [
                '"I am lost," said the {s}. "I cannot find my home."',
                '"I lost my way," said {o}, "and night is coming."',
            ],
            [
                '"Do not be afraid," said {n}. "I will help you."',
                '"Come with me," said {n}. "We will find it together."',
            ],
            ["They looked {empty}, but it was the wrong way.", "First they went the wrong way and got very tired."],
            ["Then it began to rain, and they hid under a big leaf.", "Soon it was dark, and the wind was cold."],
            ["An old {g} showed them the path.", '"Go over the bridge," said {ag}.', "{ag_cap} told them where to go."],
            ["At last they saw the house of the {s}.", "And there, behind the hill, was the home of the {s}."],
            [
                '"Thank you!" said {o}. "You must stay for dinner."',
                "The mother of the {s} was so glad that she made a cake.",
            ],
        ],
        "asks": [
            ("Why was the {s} sad?", "The {s} was sad because {he2} was lost."),
            ("What was the name of the {s}?", "The name of the {s} was {o}."),
            ("Who showed them the path?", "The {g} showed them the path."),
        ],
    },
    {
        "lines": [
            ["{n} had a friend, {as} named {o}.", "The best friend of {n} was {as} named {o}."],
            ["They played together every day.", "Every {day} they went to the river."],
            ["But one day the {s} fell into a deep hole.", "But on {day} {o} fell into a hole and could not get out."],
            ['"Help!" cried {o}. "It is dark down here!"', '"Help me!" called the {s}.'],
            ["{n} was too small to pull {him2} out.", "{n} pulled and pulled, but the {s} was too heavy."],
            ['"Wait," said {n}. "I will be back soon."', "{n} ran as fast as {he} could."],
            ["{He} ran to the {g} and told everything.", 'On the road {he} met {ag}. "Please come!" said {n}.'],
            ["The {g} brought a long rope.", "The {g} had a strong rope.", "Together they found a rope."],
            [
                "They pulled once. They pulled twice. Out came the {s}!",
                "One, two, three! Out of the hole came the {s}.",
            ],
            [
                '"You saved me," said {o}.',
                '"I knew you would come back," said {o}.',
                "{o} was safe, and all three were glad.",
            ],
        ],
        "asks": [
            ("Where did the {s} fall?", "The {s} fell into a hole."),
            ("What was the name of the {s}?", "The name of the {s} was {o}."),
            ("Who helped {n}?", "The {g} helped {n}."),
        ],
    },
    {
        "lines": [
            ["In the same {p} lived {as} named {o}.", "Near by lived {as} named {o}."],
            ['"I am faster than you," said the {s}.', 'The {s} said, "Nobody can run as fast as I can."'],
            ['"Then let us race on {day}," said {n}.', '"We will see," said {n}. "Let us have a race on {day}."'],
            ['The {g} said, "One, two, three, go!"', "The {g} rang a bell, and the race began."],
            ["At first the {s} was far ahead.", "{o} ran very fast and did not look back."],
            ["Then the {s} stopped to eat.", "But soon {o} was tired and lay down to sleep."],
            ["{n} did not stop. Step by step {he} went on.", "{n} went on, slow but sure."],
            ["Then {he} saw that the {s} had hurt a foot.", "When {n} came by, {o} was stuck in the mud."],
            ['"I will not leave you here," said {n}.', "{n} stopped to help, though {he} wanted to win."],
            [
                "They walked over the line side by side, so both of them won.",
                "They came in together, and everyone clapped.",
            ],
        ],
        "asks": [
            ("Who started the race?", "The {g} started the race."),
            ("What was the name of the {s}?", "The name of the {s} was {o}."),
            ("Who won the race?", "Both of them won the race."),
        ],
    },
    {
        "lines": [
            ["{n} was afraid of the dark.", "There was one thing {n} did not like. It was the dark."],
            ["One {day} night there was a big storm.", "On {day} night the wind was very loud."],
            ['"Who is there?" called {n}. Something was at the door.', "Knock, knock! Something was at the door."],
            ["It was {as} named {o}, cold and wet.", "There stood {as}. {o} was {his2} name."],
            ['"May I come in?" asked the {s}. "I am so cold."', '"Please let me in," said {o}.'],
            ["{n} gave {him2} a warm coat and some soup.", "{n} made tea, and they sat by the fire."],
            ["Then the light went out!", "Just then the lamp went out, and it was dark."],
            ['"I am afraid," said {n}.', "{n} began to cry."],
            [
                '"Hold my hand," said {o}. "The dark cannot hurt us."',
                'The {s} said, "I will sing you a song about {ag}."',
            ],
            [
                "In the morning the storm was over, and {n} was not afraid any more.",
                "When the sun came up, {n} was brave.",
            ],
        ],
        "asks": [
            ("What was {n} afraid of?", "{n} was afraid of the dark."),
            ("Who was at the door?", "{as} named {o} was at the door."),
            ("What was the name of the {s}?", "The name of the {s} was {o}."),
        ],
    },
    {
        "lines": [
            ["Winter was near, and {n} had no food in the house.", "The days grew cold, and {n} had no wood."],
            ["{n} asked {as} named {o} for help.", "On {day} {he} went to see {o}, {as} who lived {spot}."],
            ['"I am too busy," said the {s}.', '"Not today," said {o}. "I want to play."'],
            ["So {n} worked alone, day after day.", "{n} did not complain. {He} worked and worked."],
            ["Only {ag} came to help {him}.", "A kind {g} saw it and came to help."],
            ["Then the snow came, deep and white.", "One night the first snow fell."],
            ["There was a knock. It was {o}, cold and hungry.", "The {s} came to the door with nothing to eat."],
            ['"I am sorry," said {o}. "I should have helped you."', '"I was wrong," said the {s}.'],
            ['"Come in," said {n}. "There is enough for all of us."', "{n} opened the door and gave {him2} hot soup."],
            ["In spring the {s} was the first to help.", "And when spring came, {o} worked harder than anyone."],
        ],
        "asks": [
            ("Who helped {n}?", "The {g} helped {n}."),
            ("Why was the {s} sorry?", "The {s} was sorry because {he2} did not help."),
            ("What was the name of the {s}?", "The name of the {s} was {o}."),
        ],
    },
]
GIRL_HEROES, BOY_HEROES = ["girl", "queen", "princess", "witch"], ["boy", "king", "prince", "wizard"]
STORY_HEROES = [*(x.name for x in ANIMALS), *GIRL_HEROES, *BOY_HEROES, "farmer", "baker", "sailor", "painter"]
STORY_HEROES += ["dragon", "robot", "knight", "pirate"]
STORY_SECONDS = [*(x.name for x in ANIMALS), *TOYS]
STORY_ASKS = [
    "Tell me a story about {x} and {y}.",
    "Can you tell me a story about {x} and {y}?",
    "I want a story about {x} and {y}.",
    "Please write a story about {x} and {y}.",
    "Write a short story about {x} and {y}.",
    "Make up a story about {x} and {y}.",
    "Do you know a story about {x} and {y}?",
]
ONE_ASKS = ["Tell me a story about {x}.", "I want a story about {x}.", "Write a story about {x}."]
ANY_ASKS = ["Tell me a story.", "Can you tell me a story?", "I want to hear a story.", "Another story, please."]


def story_pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    while True:
        first, second = rng.choice(STORY_HEROES), rng.choice(STORY_SECONDS)
        if first != second and is_held_out("story|" + "|".join(sorted((first, second)))) == held_out:
            return first, second


def story_turns(rng: random.Random, held_out: bool = False) -> list[Turn]:
    """A story asked for, and sometimes questions that refer back to it."""
    first, second = story_pair(rng, held_out)
    told = story(rng, first, second)
    form = rng.random()
    x, y = a(first), a(second)
    if form < 0.7:
        user = rng.choice(STORY_ASKS).format(x=x, y=y)
    elif form < 0.9:
        user = rng.choice(ONE_ASKS).format(x=rng.choice([x, y]))
    else:
        user = rng.choice(ANY_ASKS)
    turns = [Turn("story", "", user, told.text, thought=f"The story is about {x} and {y}.")]
    for ask, answer in rng.sample(told.asks, rng.choice([0, 0, 1, 2])):
        turns.append(Turn("story question", "", ask, answer, thought=answer))
    return turns


# -- documents -------------------------------------------------------------------------------------------------------


def casual(rng: random.Random, text: str) -> str:
    """The question as people type it: American spelling, contractions, missing capitals and marks now and then."""
    if rng.random() < 0.1:
        text = text.replace("olour", "olor").replace("avourite", "avorite")
    if rng.random() < 0.1:
        text = text.replace("What is", "What's").replace("Who is", "Who's").replace("I am", "I'm")
    if rng.random() < 0.15:
        text = text.lower()
    if rng.random() < 0.1:
        text = text.rstrip("?.!")
    return text


def follow_up(rng: random.Random, last: Turn) -> Turn | None:
    """A turn that only makes sense after `last`: the same question on another subject, or another one on the same."""
    subject = last.key.split("|")[-1]
    animal = subject.removeprefix("an ").removeprefix("a ")
    makers = {f.__name__.removesuffix("_of"): f for f in FOLLOW_UPS}
    if animal not in ANIMAL or last.kind not in {"colour", "kind", "baby", *makers}:
        return None
    if rng.random() < 0.5 and last.kind in makers:
        other = rng.choice([x.name for x in ANIMALS if x.name != animal])
        turn = makers[last.kind](rng, other)
        if last.kind == "ability":
            return None
        user = rng.choice(["And {x}?", "What about {x}?", "And what about {x}?"]).format(x=a(other))
    else:
        make = rng.choice([sound_of, home_of, food_of, legs_of])
        turn = make(rng, animal)
        if a(animal) not in turn.user:
            return None
        user = turn.user.replace(a(animal), "it")
    key = f"follow up|{turn.kind}|{user}"
    return (
        None if is_held_out(key) else Turn("follow up", key, user, turn.answer, turn.expected, turn.rivals, turn.answer)
    )


def introduction(rng: random.Random) -> list[Turn]:
    """Something the user says of themself, to be asked for at some later time."""
    name, colour, animal = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(ANIMALS).name
    kind = rng.randrange(3)
    if kind == 0:
        said = rng.choice(["My name is {x}.", "I am {x}.", "Hello, my name is {x}.", "Hi, I am {x}."]).format(x=name)
        reply = rng.choice(["Hello, {x}! Nice to meet you.", "Nice to meet you, {x}."]).format(x=name)
        asks = ["What is my name?", "Do you know my name?", "Who am I?"]
        answer, right = f"Your name is {name}.", name
    elif kind == 1:
        said = rng.choice(["My favourite colour is {x}.", "I like the colour {x}.", "I love {x}."]).format(x=colour)
        reply = f"{capital(colour)} is a beautiful colour."
        asks = ["What is my favourite colour?", "Which colour do I like?", "What colour do I like?"]
        answer, right = f"You like {colour}.", colour
    else:
        said = rng.choice(["I have {x}.", "My pet is {x}.", "I have a pet. It is {x}."]).format(x=a(animal))
        reply = f"{capital(a(animal))} is a fine pet."
        asks = ["What pet do I have?", "Which animal do I have?", "What is my pet?"]
        answer, right = f"You have {a(animal)}.", animal
    key = f"introduction|{said}"
    return [Turn("talk", key, said, reply), Turn("memory", key, rng.choice(asks), answer, right, (), answer)]


def turns(rng: random.Random) -> Iterator[Turn]:
    """An endless conversation."""
    later: list[Turn] = []
    if rng.random() < 0.2:
        yield talk(rng, "hello")
    while True:
        draw_kind = rng.random()
        if later and rng.random() < 0.35:
            yield later.pop()
        elif draw_kind < 0.08:
            yield from story_turns(rng)
        elif draw_kind < 0.13:
            yield talk(rng)
        elif draw_kind < 0.15:
            yield unknown(rng)
        elif draw_kind < 0.19:
            first, second = introduction(rng)
            if not is_held_out(first.key):
                yield first
                later.append(second)
        else:
            turn = question(rng)
            yield turn
            while rng.random() < 0.35 and (turn := follow_up(rng, turn)) is not None:
                yield turn


def chat(rng: random.Random) -> str:
    """A conversation of up to LONGEST characters; in some the assistant thinks before its last answer."""
    text = BOS + (rng.choice(SYSTEMS) if rng.random() < 0.12 else "")
    wanted = rng.choice([1, 1, 1, 2, 3, 4, 6, 8, 10, 12, 14])
    spoken: list[Turn] = []
    length = 0
    for turn in turns(rng):
        length += len(turn.user) + len(turn.answer) + 16
        if len(spoken) == wanted or (spoken and length > LONGEST):
            break
        spoken.append(turn)
    thinks = rng.random() < 0.12 and bool(spoken[-1].thought)
    for i, turn in enumerate(spoken):
        thought = THINK + turn.thought if thinks and i == len(spoken) - 1 else ""
        text += f"{USER}{casual(rng, turn.user)}{ASSISTANT}{thought}{END_THINK}{turn.answer}{EOS}"
    return text


def tale(rng: random.Random) -> str:
    return BOS + story(rng, *story_pair(rng, False)).text + EOS


def facts(rng: random.Random) -> str:
    """Plain sentences on the world, no chat around them."""
    subject = rng.choice(ANIMALS).name
    lines = [colour_of(rng, a(subject)).answer]
    lines += [make(rng, subject).answer for make in (sound_of, home_of, food_of, legs_of, baby_of, ability_of)]
    lines += [question(rng).thought for _ in range(rng.randint(0, 8))]
    rng.shuffle(lines)
    return BOS + " ".join(lines) + EOS


def document(rng: random.Random) -> str:
    return rng.choices([chat, tale, facts], [0.89, 0.06, 0.05])[0](rng)


# -- the held-out part -----------------------------------------------------------------------------------------------


def held_out_questions(n: int, seed: int) -> list[Turn]:
    """n different questions whose combinations never occur in training; `check` judges the answers."""
    rng = random.Random(f"questions {seed}")
    found: dict[str, Turn] = {}
    while len(found) < n:
        turn = question(rng, held_out=True)
        found.setdefault(turn.user, turn)
    return list(found.values())


def held_out_story_prompts(n: int, seed: int) -> list[tuple[str, tuple[str, str]]]:
    """n requests for stories on pairs never told together in training, each with the two nouns a story must mention."""
    rng = random.Random(f"stories {seed}")
    found: dict[tuple[str, str], str] = {}
    while len(found) < n:
        pair = story_pair(rng, held_out=True)
        found.setdefault(pair, rng.choice(STORY_ASKS).format(x=a(pair[0]), y=a(pair[1])))
    return [(ask, pair) for pair, ask in found.items()]


def check_story(pair: tuple[str, str], text: str) -> bool:
    """Whether a story mentions both of its nouns and ends with a full stop."""
    return all(words(noun) in words(text) for noun in pair) and text.rstrip().endswith(".")


def held_out_documents(n: int, seed: int) -> list[str]:
    """Chats of held-out questions and held-out stories, for perplexity."""
    rng = random.Random(f"documents {seed}")
    texts = []
    for i in range(n):
        asked = (
            [question(rng, held_out=True) for _ in range(rng.randint(1, 6))]
            if i % 2
            else story_turns(rng, held_out=True)
        )
        texts.append(BOS + "".join(f"{USER}{t.user}{ASSISTANT}{END_THINK}{t.answer}{EOS}" for t in asked))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--megabytes", type=float, default=30)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    left = args.megabytes * 1e6
    with (args.out / "train.jsonl").open("w") as file:
        while left > 0:
            line = json.dumps(document(rng), ensure_ascii=False)
            left -= len(line)
            file.write(line + "\n")
    with (args.out / "held_out.jsonl").open("w") as file:
        file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in held_out_documents(400, args.seed))


if __name__ == "__main__":
    main()
