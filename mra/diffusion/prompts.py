"""Prompts: the captions that images are made from and then have.

The paper augments every training caption by EDA (alpha 0.5; 19 variants and the caption itself) and samples an image
for each. EDA inserts, swaps and deletes words, so "a red jacket and blue jeans" may become "a red jeans". Here synonyms
replace single words, and the other operations repeat, move or drop whole phrases. So a prompt stays true of the
person in its caption. Read next: making.py.
"""

import random
import re

from mra.data.words import PERSON, noun_phrases, replace_synonyms

VARIANTS = 19       # variants of a caption, beside itself (MRA section 2)
ANYBODY = re.compile(rf"(?:an?|the|this)?\s*{PERSON.pattern}", re.IGNORECASE)       # a person without description
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
    """Variant `number` of a caption: 0 is the caption itself, the others are made by four operations in turn."""
    phrases = noun_phrases(caption)
    if number == 0 or len(phrases) < 2:
        return caption
    first = next(filter(PERSON.search, phrases), None)
    others = [phrase for phrase in phrases if phrase is not first and not ANYBODY.fullmatch(phrase)]
    first = first or who(caption)
    if number % 4 == 0:                 # synonyms for some terms
        return replace_synonyms(caption, rng, ALPHA)
    if number % 4 == 1:                 # a phrase again at the end, in other words
        return f"{caption.rstrip(' .')}. {replace_synonyms(rng.choice(phrases), rng, 1.0)}"
    if number % 4 == 2:                 # the phrases in another order
        return ", ".join([first, *rng.sample(others, len(others))])
    return ", ".join([first, *(phrase for phrase in others if rng.random() >= ALPHA)])


def who(caption: str) -> str:
    """The person of a caption with no noun for them, by its pronouns."""
    she = re.search(r"\b(?:she|her)\b", caption, re.IGNORECASE)
    he = re.search(r"\b(?:he|his|him)\b", caption, re.IGNORECASE)
    if she and not he:
        return "a woman"
    return "a man" if he and not she else "a person"
