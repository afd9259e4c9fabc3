"""Learn mra/data/vocab.txt again, from the town's captions and the lexicon.

    python -m tests.vocabulary > mra/data/vocab.txt
"""

import random

from tokenizers import trainers

from mra.data.tokenizer import SPECIAL, Tokenizer
from mra.data.words import LEXICON
from mra.town.people import VIEWS, describe, sample_person


def learn_pieces(captions: int = 20_000, size: int = 1500) -> list[str]:
    """At most `size` pieces; they can spell every ASCII word."""
    rng, texts = random.Random(0), [LEXICON]
    for person in (sample_person(rng) for _ in range(captions)):
        parts = "person hair headgear upper inner logo lower shoes bag carried".split()
        worn = [part for part in parts if getattr(person, part + "_colour", True)]
        boxes = {part: (rng.random(), 0.5, 0.5, 0.5) for part in worn}
        texts.append(describe(person, rng.choice(list(VIEWS)), boxes, rng).caption)
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    # These get fixed ids; left to the trainer the order of "##" letters, and so ties, would differ by run.
    fixed = [*SPECIAL, *characters, *"‘’“”–—…", *("##" + letter for letter in characters if letter.isalnum())]
    engine = Tokenizer(list(SPECIAL), __file__).engine
    engine.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=fixed,
                                                                show_progress=False))
    return sorted(engine.get_vocab(), key=engine.token_to_id)


if __name__ == "__main__":
    print("\n".join(learn_pieces()))
