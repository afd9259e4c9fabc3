"""Who lives in the demo town, and what people write about them.

`describe` is an annotator. It writes a caption of 15 to 40 words about the parts that an image shows, and lists some
phrases with their boxes, as in the SDA set of the MRA paper. Every word is true and about something visible. "left" and
"right" are those of the image. The words are in town.ini. Read next: figure.py, which gives the person a body.
"""

import configparser
import random
import re
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

from mra.data.records import Box

FILE = configparser.RawConfigParser()
FILE.read(Path(__file__).with_name("town.ini"), encoding="utf-8")
WORDS = {section: {value: tuple(names.split(", ")) for value, names in FILE[section].items()} for section in FILE}
COLOURS, HAIR_COLOURS, HAIR, HEADGEAR = (WORDS[name] for name in ("colours", "hair colours", "hair", "headgear"))
UPPERS, PATTERNS, LOWERS, SHOES = (WORDS[name] for name in ("uppers", "patterns", "lowers", "shoes"))
BAGS, CARRIED, GENDERS, PRONOUNS = (WORDS[name] for name in ("bags", "carried", "genders", "pronouns"))
BUILDS, VIEWS, PLACES, TEMPLATES = WORDS["builds"], WORDS["views"], FILE["places"], tuple(FILE["templates"].values())
OPENING = ("jacket", "coat")     # may be worn open over something; a vest always shows the sleeves under it
WOMENS = ("leggings", "skirt", "long skirt")
TWINS = {"upper_colour": COLOURS, "lower_colour": COLOURS, "lower": ("trousers", "shorts", *WOMENS),
         "upper": ("t-shirt", "shirt", "sweater", "hoodie", "tank top")}

# An identity: about 40 bits of attributes, each a word; "" is for a thing that the person does not have.
Person = namedtuple("Person", (
    "gender", "build", "hair", "hair_colour", "headgear", "headgear_colour",
    "upper", "upper_colour", "pattern",
    "pattern_colour",           # of stripes, checks, the lower half of two tones, the logo
    "inner_colour",             # under an open jacket or coat; the sleeves under a vest
    "lower", "lower_colour", "shoes", "shoes_colour", "bag", "bag_colour",
    "bag_side",                 # the person's own left or right; things are carried in the other hand
    "carried", "carried_colour",
    "skin"))                    # 0 to 3; drawn, never written about


class Words(NamedTuple):
    """A caption, and some of its phrases with the box of each."""
    caption: str
    phrases: tuple[str, ...]
    boxes: tuple[Box, ...]


def sample_person(rng: random.Random) -> Person:
    """A random identity. Its attributes are independent where clothes allow."""
    def colour(*but: str) -> str:
        return rng.choice([name for name in COLOURS if name not in but])

    def maybe(chance: float, kinds: dict) -> tuple[str, str]:
        return (rng.choice(list(kinds)), colour()) if rng.random() < chance else ("", "")

    gender, upper, upper_colour = rng.choice(list(GENDERS)), rng.choice(list(UPPERS)), colour()
    shows_inner = upper == "vest" or (upper in OPENING and rng.random() < 0.6)
    inner = colour(upper_colour) if shows_inner else ""
    logo = 0 if inner else 1.5
    pattern = rng.choices(list(PATTERNS), [1, 0, 0, 0, 0] if upper == "vest" else [4, 2, 2, 2, logo])[0]
    hairs = list(HAIR) if gender == "woman" else ("short", "short", "long")
    lowers = [kind for kind in LOWERS if gender == "woman" or kind not in WOMENS]
    return Person(
        gender, rng.choice(list(BUILDS)), rng.choice(hairs), rng.choice(list(HAIR_COLOURS)), *maybe(0.4, HEADGEAR),
        upper, upper_colour, pattern, "" if pattern == "plain" else colour(upper_colour), inner,
        rng.choice(lowers), colour(), rng.choice(list(SHOES)), colour(),
        *maybe(0.65, BAGS), rng.choice(("left", "right")), *maybe(0.45, CARRIED), rng.randrange(4))


def twin_of(person: Person, rng: random.Random) -> Person:
    """A person who differs in one attribute: colour or type of the upper or the lower garment."""
    name = rng.choice([name for name, values in TWINS.items() if getattr(person, name) in values])
    taken = {getattr(person, name)}
    if person.gender == "man":
        taken |= set(WOMENS)
    if name == "upper_colour":
        taken |= {person.pattern_colour, person.inner_colour}
    return person._replace(**{name: rng.choice([value for value in TWINS[name] if value not in taken])})


def describe(person: Person, view: str, boxes: dict[str, Box], rng: random.Random) -> Words:
    """An annotator's words about an image. `boxes` has the visible parts, always "person", "upper" and "lower"."""
    texts = {part: text for part, text in _phrases(person, view, boxes, rng).items() if part in boxes}
    always = ["person", "upper", "lower"]
    optional = rng.sample([part for part in texts if part not in always], len(texts) - len(always))
    template = rng.choice(TEMPLATES)
    view_text = rng.choice(VIEWS[view]) if rng.random() < 0.5 else ""
    tries = [([part for part in optional if rng.random() < 0.9], view_text), (optional, rng.choice(VIEWS[view]))]
    tries += [(optional[i:], "") for i in range(len(optional))]
    for kept, view_text in tries:       # until the caption is neither short nor long
        told = {part: text for part, text in texts.items() if part in always + kept}
        caption = _compose(template, told | {"view": view_text}, person.gender)
        if 15 <= len(caption.split()) <= 40:
            break
    else:
        caption += " this is a crop from a camera image."
    others = [part for part in told if part not in ("upper", "lower")]
    chosen = ["upper", "lower", *rng.sample(others, min(len(others), rng.randint(2, 4)))]
    chosen.sort(key=lambda part: (caption.index(told[part]), part))
    return Words(caption, tuple(told[part] for part in chosen), tuple(boxes[part] for part in chosen))


def _phrases(person: Person, view: str, boxes: dict[str, Box], rng: random.Random) -> dict[str, str]:
    """part -> its words, for all parts, visible or not."""
    def named(part: str, kinds: dict) -> str:
        kind, colour = getattr(person, part), getattr(person, f"{part}_colour")
        return f"{rng.choice(COLOURS[colour])} {rng.choice(kinds[kind])}" if kind else ""

    build = rng.choice(BUILDS[person.build]) if rng.random() < 0.6 else ""
    tied = person.hair == "ponytail" and view == "front"        # a ponytail does not show from the front
    hair = "{} hair tied back" if tied else rng.choice(HAIR[person.hair])
    texts = {"person": _a(f"{build} {rng.choice(GENDERS[person.gender])}".strip()),
             "hair": hair.format(rng.choice(HAIR_COLOURS[person.hair_colour])),
             "headgear": _a(named("headgear", HEADGEAR))}
    pattern = "plain" if person.pattern == "logo" and "logo" not in boxes else person.pattern
    colours = person.upper_colour, person.pattern_colour, person.inner_colour
    colour, second, inner = [rng.choice(COLOURS.get(name, ("",))) for name in colours]
    upper = rng.choice(PATTERNS[pattern]).format(colour, second, rng.choice(UPPERS[person.upper]))
    if "inner" in boxes and person.upper in OPENING:
        upper = f"open {upper}"
    texts["upper"] = f"{_a(upper)} over {_a(inner)} top" if "inner" in boxes else _a(upper)
    lower = named("lower", LOWERS)
    texts["lower"] = _a(lower) if "skirt" in person.lower else lower
    texts |= {"shoes": named("shoes", SHOES), "bag": _a(named("bag", BAGS)), "carried": _a(named("carried", CARRIED))}
    for part in ("bag", "carried"):
        place = PLACES.get(getattr(person, part))
        if part in boxes and place and view in ("front", "back"):
            right = (boxes[part][0] - boxes["person"][0]) / boxes["person"][2]
            if abs(right) > 0.15 and rng.random() < 0.5:
                texts[part] += " " + place.format("right" if right > 0 else "left")
    return texts


def _compose(template: str, words: dict[str, str], gender: str) -> str:
    """Fill in a template of TEMPLATES; words: part, or "view" -> its text."""
    def option(group: re.Match) -> str:
        parts = re.findall(r"(\w+)[+}]", group[1])
        return group[1] if any(words.get(part) for part in parts) else ""

    def listed(slot: re.Match) -> str:
        *texts, last = [words[part] for part in slot[1].split("+") if words.get(part)]
        return f"{', '.join(texts)} and {last}" if texts else last

    she, her = PRONOUNS[gender]
    template = template.replace("{she}", she).replace("{her}", her)
    return re.sub(r"{(.*?)}", listed, re.sub(r"\[(.*?)\]", option, template))


def _a(noun: str) -> str:
    return f"an {noun}" if noun.startswith(tuple("aeiou")) else f"a {noun}"
