"""WordPiece: captions to ids, and the masking of whole words (MRA section 3, L_MLM).

The ids are those of BERT's uncased tokenizer for the same vocabulary file. The small vocab.txt of this package can
spell every ASCII word; tests/vocabulary.py learns it from the town's captions. Read next: batches.py.
"""

import random
import re
from pathlib import Path

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers

from mra.config import UserError

VOCAB_FILE = Path(__file__).with_name("vocab.txt")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK_RATE = 0.25     # share of a caption's pieces to predict
MAX_MASKED = 10      # most pieces to predict
SPAN_RATE = 0.2      # share of the picked words that grow to 2 or 3 words


class Tokenizer:
    """Captions to ids, with a vocabulary of V pieces. The id of a piece is its index in the list."""

    def __init__(self, pieces: list[str], source: Path):
        """`source` is the file that the pieces come from. Raises UserError if they make no vocabulary."""
        missing = [piece for piece in SPECIAL if piece not in pieces]
        if missing:
            raise UserError(f"{source}: lacks {', '.join(missing)}; give a BERT vocab.txt, one piece a line")
        self.pieces, self.source = pieces, source
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[piece] for piece in SPECIAL)
        self.starts_word = [not piece.startswith("##") for piece in pieces]
        self.is_special = [re.fullmatch(r"(?s)\[.+\]", piece) is not None for piece in pieces]
        self.ordinary_ids = [i for i, special in enumerate(self.is_special) if not special]     # no "[unused7]" either
        # BERT's normaliser (lower case, no accents) and splitter (spaces, punctuation, CJK)
        self.engine = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self.engine.normalizer = normalizers.BertNormalizer()
        self.engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()

    @staticmethod
    def read(vocab_file: Path = VOCAB_FILE) -> "Tokenizer":
        """Read a BERT vocabulary, one piece a line, or the vocab.txt of a folder. Raises UserError for others."""
        if vocab_file.is_dir():
            vocab_file /= "vocab.txt"
        try:
            pieces = vocab_file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{vocab_file}: no readable UTF-8 vocabulary ({error}); give a vocab.txt") from None
        return Tokenizer(pieces, vocab_file)

    def __len__(self) -> int:
        return len(self.pieces)

    def clean(self, caption: str, dataset: str) -> str:
        """The caption; of ICFG-PEDES and RSTPReid in lower case, with one space for all but letters and digits."""
        if dataset not in ("icfg", "rstp"):
            return caption
        return re.sub(r"[^a-z0-9]+", " ", caption.lower()).strip()

    def words_of(self, ids: list[int]) -> list[list[int]]:
        """The positions of the pieces of each word, without special ids."""
        words = []
        for position, piece in enumerate(ids):
            if self.starts_word[piece] or not words:
                words.append([])
            words[-1].append(position)
        return [word for word in words if not self.is_special[ids[word[0]]]]

    def encode(self, text: str, max_tokens: int = 56) -> list[int]:
        """[CLS] pieces [SEP], at most `max_tokens` >= 2 ids (a preset's). A typed "[SEP]" is ordinary pieces."""
        text = text.encode("utf-8", "ignore").decode()                   # lone surrogates go, as in BERT
        return [self.cls_id, *self.engine.encode(text).ids[:max_tokens - 2], self.sep_id]


def pad(sequences: list[list[int]], pad_id: int, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B id lists -> ids (B, T) int64 and keep (B, T) bool, True = a real token; T: the longest list, or `width`."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    width = max(width, int(lengths.max()))
    padded = torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in sequences])
    return padded, torch.arange(width) < lengths[:, None]


def mask_words(ids: list[int], tokenizer: Tokenizer, rng: random.Random) -> tuple[list[int], list[int]]:
    """Masked ids (T,) and the positions to predict (MRA section 3). Special ids are never picked.

    Whole words are picked, and a fifth of them grow to 2 or 3 words, up to 25 % of the pieces and 10 pieces at most, as
    in the released code. At least one word is picked, unless all have more than 10 pieces. As in BERT's whole-word
    masking each piece draws for itself: 80 % become [MASK], 10 % a random piece, 10 % stay.
    """
    words, picked = tokenizer.words_of(ids), set()
    budget = min(MAX_MASKED, max(1, round(MASK_RATE * sum(map(len, words)))))
    for start in rng.sample(range(len(words)), len(words)):
        length = rng.choice((2, 3)) if rng.random() < SPAN_RATE else 1
        if words[start][0] in picked:
            continue
        for word in words[start:start + length]:
            grown = picked.union(word)
            limit = budget if picked else MAX_MASKED        # the first word may exceed the budget
            if len(grown) > limit:
                break
            picked = grown
    masked, at = list(ids), sorted(picked)
    for i in at:
        fate = rng.random()
        if fate < 0.8:
            masked[i] = tokenizer.mask_id
        elif fate < 0.9:
            masked[i] = rng.choice(tokenizer.ordinary_ids)
    return masked, at
