"""CLIP's text side (Radford et al. 2021): its byte-level BPE, its causal text transformer, Hugging Face's names for it.

Stable Diffusion reads its prompts with it. Read next: stable.py.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from mra.config import DiffusionConfig, ModelConfig, UserError
from mra.layers import PreNormBlock, QuickGELU

CLIP_FILES = "vocab.json", "merges.txt"
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CLIP_RULES = (
    (r"^text_model\.", ""), (r"^embeddings\.position_ids$", ""), (r"^embeddings\.token_embedding\.", "words."),
    (r"^embeddings\.position_embedding\.", "positions."), (r"^final_layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."))


class ClipTokenizer:
    """The BPE of a folder with vocab.json and merges.txt, with the interface of data/tokenizer.py's `Tokenizer`.

    Bytes spell every text, so nothing is unknown; it has no [MASK]. CLIP marks the last piece of a word. In a causal
    encoder that piece has seen the others of its word, so `starts_word` is True there.
    """

    def __init__(self, folder: Path):
        try:
            self.engine = Engine(models.BPE.from_file(*(str(Path(folder) / name) for name in CLIP_FILES),
                                                      end_of_word_suffix="</w>"))
            ids = self.engine.get_vocab()
            self.cls_id, self.sep_id = ids["<|startoftext|>"], ids["<|endoftext|>"]
        except Exception as error:      # the engine raises nothing more special
            raise UserError(f"{folder}: no readable {' and '.join(CLIP_FILES)} of CLIP ({error}).") from None
        self.pad_id, self.unk_id = self.sep_id, None
        self.pieces = sorted(ids, key=ids.get)
        self.starts_word = np.array([piece.endswith("</w>") for piece in self.pieces])              # (V,)
        self.engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str, max_tokens: int = 77) -> list[int]:
        """<|startoftext|> pieces <|endoftext|>, at most `max_tokens` >= 2 ids."""
        text = text.encode("utf-8", "ignore").decode()
        return [self.cls_id, *self.engine.encode(text).ids[:max_tokens - 2], self.sep_id]


class CausalTextEncoder(nn.Module):
    """Ids (B, T) and keep (B, T) -> states (B, 77, D) of a transformer whose tokens attend to those before them.

    Every sequence ends with the id that pads, so its last id is repeated up to 77 positions; keep is not used.
    """

    def __init__(self, config: DiffusionConfig | ModelConfig):
        super().__init__()
        dim = config.text_dim
        self.words, self.positions = nn.Embedding(config.vocab, dim), nn.Embedding(config.positions, dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.text_heads, config.dropout, 1e-5, True, QuickGELU)
                                    for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        missing = self.positions.num_embeddings - ids.shape[1]
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)           # (B, 77)
        x = self.words(ids) + self.positions.weight                          # (B, 77, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
