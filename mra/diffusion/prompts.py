"""Prompts: what the denoiser is asked for, and what may be said of the image afterwards.

The paper augments every training caption by EDA (alpha 0.5; 19 variants and the caption itself) and samples an image
for each. On whole captions, insertion, swap and deletion tear colours from their garments ("a red jacket and blue
jeans" becomes "a red jeans"), so that the image and its caption part ways. Here synonyms are exchanged word by word,
and the other three operations move, drop or rephrase whole phrases: every prompt still reads true of the person it was
made from, and is its image's caption. Before: data/words.py. After: adapt.py.
"""

import random

from mra.data.words import noun_phrases, replace_synonyms

VARIANTS = 19       # of each caption, beside itself (paper section 2)
ALPHA = 0.5         # an operation changes this share of the phrases, or terms as many as this share of the words


def prompts_of(captions: list[str], count: int, seed: int) -> list[tuple[int, str]]:
    """`count` pairs (index of the caption, prompt): each caption itself, then variants in turn, VARIANTS + 1 at most.

    Captions are visited in random order, every caption once before any twice. Fewer where there are not so many.
    """
    rng, made = random.Random(seed), []
    order = rng.sample(range(len(captions)), len(captions))
    for round_ in range(VARIANTS + 1):
        made += [(i, variant(captions[i], round_, rng)) for i in order[:max(0, count - len(made))]]
    return made


def variant(caption: str, number: int, rng: random.Random) -> str:
    """Variant `number` of a caption: 0 is the caption; the four operations take turns."""
    phrases = noun_phrases(caption)
    if number == 0 or len(phrases) < 2:
        return caption
    operation = (replace_phrases, insert_phrase, swap_phrases, delete_phrases)[number % 4]
    return operation(caption, phrases, rng)


def replace_phrases(caption: str, phrases: list[str], rng: random.Random) -> str:
    """The caption with synonyms for up to half as many terms as it has words."""
    return replace_synonyms(caption, rng, ALPHA)


def insert_phrase(caption: str, phrases: list[str], rng: random.Random) -> str:
    """The caption and, at its end, one of its phrases again in other words."""
    return f"{caption.rstrip(' .')}. {replace_synonyms(rng.choice(phrases), rng, 1.0)}"


def swap_phrases(caption: str, phrases: list[str], rng: random.Random) -> str:
    """Its phrases in another order; the first, which says who it is, stays."""
    return ", ".join([phrases[0], *rng.sample(phrases[1:], len(phrases) - 1)])


def delete_phrases(caption: str, phrases: list[str], rng: random.Random) -> str:
    """Its phrases, each but the first dropped with probability ALPHA."""
    return ", ".join([phrases[0], *(phrase for phrase in phrases[1:] if rng.random() >= ALPHA)])
