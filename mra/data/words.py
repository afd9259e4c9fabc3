"""What is done to captions alone: exchange of left and right, noun phrases, and EDA.

EDA (Wei & Zou, EMNLP 2019) makes the second, augmented caption of fine-tuning (MRA section 3). Synonyms and noun
phrases also make the prompts of the diffusion (section 2). Read next: tokenizer.py.
"""

import configparser
import random
import re
from pathlib import Path

# lexicon.txt replaces WordNet: groups of interchangeable terms for clothing and appearance. A group names at most one
# colour. A word with a second sense has no synonym: "old" is "elderly" for a man, but not for a bag.
LEXICON = Path(__file__).with_name("lexicon.txt").read_text(encoding="utf-8")
GROUPS = [tuple(" ".join(term.split()) for term in group.split(",")) for group in LEXICON.split(";")]
SYNONYMS = {term: tuple(other for other in group if other != term)
            for group in GROUPS if len(group) > 1 for term in group}
FILE = configparser.RawConfigParser()
FILE.read(Path(__file__).with_name("phrases.ini"), encoding="utf-8")
ANY_OF = {kind: "|".join(words.split()) for kind, words in FILE["words"].items()}
COLOUR = ANY_OF["colour"]
OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}

# The longest term wins: "dark gray" is no "gray". A genitive, "man's" or the cleaned "man s", is no term and no person.
TERM = re.compile(r"(?<![\w-])(?ai:%s)(?![\w'\u2019-]| s\b)" % "|".join(
    re.escape(term).replace(r"\ ", r"\s+") for term in sorted(SYNONYMS, key=len, reverse=True)))
MANY = rf"{ANY_OF['many']}|(?:{ANY_OF['person']})s"
PERSON = re.compile(rf"\b(?:{ANY_OF['one']}|{ANY_OF['person']}|{MANY})\b(?!['\u2019]| s\b)", re.IGNORECASE)
THING = re.compile(rf"\b(?:{ANY_OF['thing']}|{COLOUR})(?:e?s)?\b", re.IGNORECASE)
TWO_COLOURS = re.compile(rf"\b({COLOUR})\s+and\s+(?=(?:dark |light |bright )?(?:{COLOUR})\b)", re.IGNORECASE)
BETWEEN = re.compile(rf"[,.;:]|\b(?:{ANY_OF['between']})\b", re.IGNORECASE)
SIDE = re.compile(rf"\b(?:{'|'.join(OTHER_SIDE)})(?=(?i:hand|handed|wards?|most)?\b)")
ARTICLE = re.compile(r"(?<![\w'\u2019-])(a)n?(?=\s*$)", re.IGNORECASE)              # at the end of a text
VOWEL = re.compile(r"(?!uni|use|one|eu)[aeiou]|hour|honest|heir", re.IGNORECASE)   # how a word after "an" begins


def swap_left_right(text: str) -> str:
    """The caption of the mirrored image; "Left-hand" becomes "Right-hand". Twice gives the original."""
    return SIDE.sub(lambda found: OTHER_SIDE[found[0]], text)


def noun_phrases(caption: str) -> list[str]:
    """The noun phrases of a caption: pieces between commas and small words that name a person, a thing or a colour.

    A thing or a colour takes two words or more. An "and" between two colours does not cut: "a black and white top".
    """
    joined = TWO_COLOURS.sub("\\1\0", caption)      # \0 stands for "and" between colours; no caption contains it
    pieces = [piece.strip().replace("\0", " and ") for piece in BETWEEN.split(joined)]
    return [piece for piece in pieces if PERSON.search(piece) or (len(piece.split()) > 1 and THING.search(piece))]


def eda(text: str, rng: random.Random, alpha: float = 0.1) -> str:
    """A variant of a caption by one of the four operations; alpha = share of words changed. Never empty."""
    if not text.strip():
        return text
    return rng.choice(OPERATIONS)(text, rng, alpha)


def replace_synonyms(text: str, rng: random.Random, alpha: float) -> str:
    """Replace terms of the lexicon, alpha x words at most, by synonyms in lower case; an article before one agrees."""
    found = list(TERM.finditer(text))
    chosen = rng.sample(found, min(_changes(text, alpha), len(found)))
    for term in sorted(chosen, key=re.Match.start, reverse=True):
        synonym = _synonym(term, rng)
        n = "n" if VOWEL.match(synonym) else ""
        text = ARTICLE.sub(rf"\1{n}", text[:term.start()]) + synonym + text[term.end():]
    return text


def insert_synonyms(text: str, rng: random.Random, alpha: float) -> str:
    """Insert a synonym of a random term of the text at a random place, alpha x words times."""
    found, words = list(TERM.finditer(text)), text.split()
    if found:
        for _ in range(_changes(text, alpha)):
            words.insert(rng.randint(0, len(words)), _synonym(rng.choice(found), rng))
    return " ".join(words)


def swap_words(text: str, rng: random.Random, alpha: float) -> str:
    """Exchange two random words, alpha x words times."""
    words = text.split()
    if len(words) > 1:
        for _ in range(_changes(text, alpha)):
            i, j = rng.sample(range(len(words)), 2)
            words[i], words[j] = words[j], words[i]
    return " ".join(words)


def delete_words(text: str, rng: random.Random, alpha: float) -> str:
    """Delete each word with probability alpha; if none is left, one at random stays."""
    words = text.split()
    return " ".join(word for word in words if rng.random() >= alpha) or rng.choice(words)


OPERATIONS = replace_synonyms, insert_synonyms, swap_words, delete_words


def _changes(text: str, alpha: float) -> int:
    return max(1, int(alpha * len(text.split())))


def _synonym(term: re.Match, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[" ".join(term[0].lower().split())])
