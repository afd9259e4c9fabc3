"""Prompts: the captions that images are made from and then have.

The paper augments every training caption by EDA (alpha 0.5; 19 variants and the caption itself) and samples an image
for each. EDA inserts, swaps and deletes words, so "a red jacket and blue jeans" may become "a red jeans". Here synonyms
replace single words, and the other operations repeat, move or drop whole phrases. So a prompt stays true of the
person in its caption. A caption of two people is not taken apart: its phrases would change hands. Read next: plan.py.
"""

import random
import re

from mra.data.words import BETWEEN, MANY, PERSON, noun_phrases, replace_synonyms

VARIANTS = 19       # variants of a caption, beside itself (MRA section 2)
ANYBODY = re.compile(rf"(?:an?|the|this)?\s*{PERSON.pattern}", re.IGNORECASE)       # a person without description
HE = re.compile(r"\b(?:he|his|him|(?:gentle)?man|guy|fellow|boy|lad|male)\b", re.IGNORECASE)
SHE = re.compile(r"\b(?:she|hers?|woman|lady|girl|lass|female)\b", re.IGNORECASE)
GROWN = re.compile(r"\b(?:(?:wo|gentle)?man|lady|guy|adult)\b", re.IGNORECASE)
CHILD = re.compile(r"\b(?:boy|girl|child|kid)\b", re.IGNORECASE)
# "a" and a noun for a person, without a small word or a comma between them.
A_PERSON = re.compile(rf"\ban?\s+(?:(?!an?\b|{BETWEEN.pattern})[\w-]+\s+){{0,4}}?{PERSON.pattern}", re.IGNORECASE)
OTHERS = re.compile(
    rf"\b(?:(?:{MANY})\b(?!['\u2019]| s\b)|(?:with|beside|behind|near|past|to)\s+(?:the|this)\s+{PERSON.pattern}|"
    r"(?:another|others?(?!\s+(?:hand|arm|shoulder|side))|someone|somebody|couple(?!\s+of)|crowd|group|family|friends?|"
    r"companion|partner|husband|wife|boyfriend|girlfriend|parents?|mother|father|mom|dad|son|daughter|brother|sister|"
    r"baby(?!\s+(?:blue|pink))|toddler|infant)\b)", re.IGNORECASE)
NOT = re.compile(r"\b(?:not|never|neither|nor|without|(?:is|does|has|do|are)n['\u2019 ]?t)\b", re.IGNORECASE)
ALPHA = 0.5         # chance that deletion drops a phrase; largest share of the words that synonyms replace


def prompts_of(captions: list[str], count: int, seed: int) -> list[tuple[int, str]]:
    """`count` pairs (index of the caption, prompt), or as many as there are: VARIANTS + 1 of each caption.

    First come all captions themselves in random order, then the first variant of each, and so on.
    """
    rng, made = random.Random(seed), []
    order = rng.sample(range(len(captions)), len(captions))
    for round_ in range(VARIANTS + 1):
        made += [(i, variant(captions[i], round_, rng)) for i in order[:max(0, count - len(made))]]
    return made


def variant(caption: str, number: int, rng: random.Random) -> str:
    """Variant `number` of a caption: 0, and any of one phrase, is itself; others take turns at four operations."""
    phrases = noun_phrases(caption)
    if number == 0 or len(phrases) < 2:
        return caption
    first = next(filter(PERSON.search, phrases), None)
    others = [phrase for phrase in phrases if phrase is not first and not ANYBODY.fullmatch(phrase)]
    if first is None and SHE.search(caption):           # no noun names the person, so a pronoun tells
        first = "a woman"
    elif first is None:
        first = "a man" if HE.search(caption) else "a person"
    if number % 4 == 0 or stays_whole(caption):     # synonyms for some terms
        return replace_synonyms(caption, rng, ALPHA)
    if number % 4 == 1:                 # a phrase again at the end, in other words
        return f"{caption.rstrip(' .')}. {replace_synonyms(rng.choice(phrases), rng, 1.0)}"
    if number % 4 == 2:                 # the phrases in another order
        return ", ".join([first, *rng.sample(others, len(others))])
    return ", ".join([first, *(phrase for phrase in others if rng.random() >= ALPHA)])


def stays_whole(caption: str) -> bool:
    """Whether a caption speaks of a second person or of what the person lacks. In doubt, it does."""
    if OTHERS.search(caption) or NOT.search(caption) or len(A_PERSON.findall(caption)) > 1:
        return True
    return any(one.search(caption) and other.search(caption) for one, other in ((HE, SHE), (GROWN, CHILD)))
