"""What may be done to a caption without an image in sight: cleaning, left <-> right, and EDA.

EDA (Wei & Zou, EMNLP 2019) feeds the second positive of fine-tuning (paper section 3); its synonyms and the phrases
found here make the prompts of the diffusion (section 2). The synonyms come from the small lexicon of clothing and
appearance in lexicon.txt, not WordNet; it holds no stop words, and a colour is only ever exchanged for another name of
the same colour.
Before: records.py (captions), augment.py (mirrors the image). After: tokenizer.py (ids).
"""

import random
import re
from pathlib import Path

# lexicon.txt: a group of interchangeable terms between semicolons; a term stands in one group only.
LEXICON = Path(__file__).with_name("lexicon.txt").read_text(encoding="utf-8")
GROUPS = [tuple(" ".join(term.split()) for term in group.split(",")) for group in LEXICON.split(";")]
SYNONYMS = {term: tuple(other for other in group if other != term) for group in GROUPS for term in group}
# The longest term wins, so "dark blue" is never read as "blue", nor "t-shirt" as "shirt".
TERM = re.compile(r"(?<![\w-])(?ai:%s)(?![\w-])" % "|".join(
    re.escape(term).replace(r"\ ", r"\s+") for term in sorted(SYNONYMS, key=len, reverse=True)))
SIDE = re.compile(r"\b(?:left|right|Left|Right|LEFT|RIGHT)(?=(?:hand|handed|wards?|most)?\b)")
BETWEEN = re.compile(r"[,.;:]|\b(?:and|with|in|on|over|under|of|to|is|are|has|who|wearing|wears|carrying|carries|"
                     r"dressed|holding|holds|feet|that|above|below|he|she|her|his|the|from)\b", re.IGNORECASE)
COLOUR = ("black|white|gr[ea]y|red|crimson|blue|navy|green|yellow|orange|purple|violet|pink|brown|beige|cream|ivory|"
          "gold|golden|silver|maroon|burgundy|charcoal|lavender|lilac|fuchsia|khaki|sand|tan")
PERSON = re.compile(r"\b(?:(?:wo|gentle)?m[ae]n|lad(?:y|ies)|children|people|passers?-by|(?:boy|girl|guy|fellow|lad|"
                    r"lass|child|kid|teen|teenager|adolescent|youth|youngster|student|adult|person|pedestrian|"
                    r"individual|male|female)s?)\b(?!['\u2019]| s\b)", re.IGNORECASE)
# what a person wears, carries and shows; not all have synonyms
THINGS = """shirt tee top blouse sweater sweatshirt pullover jumper hoodie cardigan jacket coat topcoat overcoat
    raincoat blazer vest waistcoat gilet polo suit dress gown frock robe uniform skirt miniskirt trousers pants slacks
    jeans denims shorts leggings tights capris joggers sweatpants stocking sock shoe sneaker trainer boot sandal heel
    slipper flop footwear hat cap beanie hood helmet scarf scarves neckerchief tie necktie belt glove glasses
    eyeglasses spectacles sunglasses mask watch wristwatch bracelet wristband bangle jewelry jewellery headphones
    earphones hair haircut hairstyle hairdo ponytail tail bun braid plait beard moustache mustache bang fringe
    backpack pack rucksack knapsack bookbag bag sack handbag purse satchel tote briefcase suitcase case luggage
    umbrella book phone cellphone smartphone bottle cup wallet billfold bicycle bike skateboard zip zipper stripe
    sleeve sleeved collar logo emblem print clothes clothing garment attire outfit ensemble"""
THING = re.compile(rf"\b(?:{'|'.join(THINGS.split())}|{COLOUR})(?:e?s)?\b", re.IGNORECASE)
TWO_COLOURS = re.compile(rf"\b({COLOUR})\s+and\s+(?=(?:dark |light |bright )?(?:{COLOUR})\b)", re.IGNORECASE)
OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}


def clean(caption: str, dataset: str) -> str:
    """ICFG-PEDES, RSTPReid: lower case, a run of anything outside a-z and 0-9 is one space. Others: as is."""
    if dataset not in ("icfg", "rstp"):
        return caption
    return re.sub(r"[^a-z0-9]+", " ", caption.lower()).strip()


def swap_left_right(text: str) -> str:
    """The caption of the mirrored image; "Left-hand" becomes "Right-hand". Twice gives the original."""
    return SIDE.sub(lambda found: OTHER_SIDE[found[0]], text)


def noun_phrases(caption: str) -> list[str]:
    """A caption's pieces between commas and small words that name a person or, in two words or more, a thing or colour.

    "A red jacket" is one, and so is "a black and white top": an "and" between two colours holds them together.
    """
    pieces = [piece.strip().replace("\0", " and ")          # a sign that no caption holds
              for piece in BETWEEN.split(TWO_COLOURS.sub("\\1\0", caption))]
    return [piece for piece in pieces if PERSON.search(piece) or len(piece.split()) > 1 and THING.search(piece)]


def eda(text: str, rng: random.Random, alpha: float = 0.1) -> str:
    """One variant of a caption by one of the four operations, at random; alpha = share of words changed.

    Never empty, unless the text is blank: that comes back as it is.
    """
    return rng.choice(OPERATIONS)(text, rng, alpha) if text.strip() else text


def replace_synonyms(text: str, rng: random.Random, alpha: float) -> str:
    """Up to alpha x words terms of the lexicon give way to a synonym; letter case and punctuation stay."""
    found = list(TERM.finditer(text))
    chosen = rng.sample(found, min(_changes(text, alpha), len(found)))
    for term in sorted(chosen, key=re.Match.start, reverse=True):
        text = text[:term.start()] + _cased(_synonym(term, rng), term[0]) + text[term.end():]
    return text


def insert_synonyms(text: str, rng: random.Random, alpha: float) -> str:
    """alpha x words times, a synonym of a random term of the text is put at a random place."""
    found, words = list(TERM.finditer(text)), text.split()
    for _ in range(_changes(text, alpha) if found else 0):
        words.insert(rng.randint(0, len(words)), _synonym(rng.choice(found), rng))
    return " ".join(words)


def swap_words(text: str, rng: random.Random, alpha: float) -> str:
    """alpha x words times, two random words change places."""
    words = text.split()
    for _ in range(_changes(text, alpha) if len(words) > 1 else 0):
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return " ".join(words)


def delete_words(text: str, rng: random.Random, alpha: float) -> str:
    """Each word goes with probability alpha; when all would go, one at random stays."""
    words = text.split()
    return " ".join(word for word in words if rng.random() >= alpha) or rng.choice(words)


OPERATIONS = replace_synonyms, insert_synonyms, swap_words, delete_words


def _changes(text: str, alpha: float) -> int:
    return max(1, int(alpha * len(text.split())))


def _synonym(term: re.Match, rng: random.Random) -> str:
    return rng.choice(SYNONYMS[" ".join(term[0].lower().split())])


def _cased(word: str, like: str) -> str:
    """`word` in capitals or with a capital where `like` has them."""
    if like.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word
