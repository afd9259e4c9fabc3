"""CLIP's text side (Radford et al. 2021): its byte-level BPE, and its causal text transformer.

Stable Diffusion 1.5 reads prompts with it. Read next: stable.py.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from mra.config import DiffusionConfig, UserError
from mra.layers import PreNormBlock, QuickGELU

CLIP_RULES = (
    (r"^text_model\.", ""), (r"^embeddings\.position_ids$", ""), (r"^embeddings\.token_embedding\.", "words."),
    (r"^embeddings\.position_embedding\.", "positions."), (r"^final_layer_norm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."), (r"\.fc1\.", ".0."), (r"\.fc2\.", ".2."),
    (r"\.layer_norm1\.", ".attention_norm."), (r"\.layer_norm2\.", ".mlp_norm."), (r"\.self_attn\.", ".attention."),
    (r"\.q_proj\.", ".to_query."), (r"\.k_proj\.", ".to_key."), (r"\.v_proj\.", ".to_value."),
    (r"\.out_proj\.", ".to_out."))
CLIP_FILES = "vocab.json", "merges.txt"
CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """The BPE of a folder with vocab.json and merges.txt, with the interface of data/tokenizer.py's `Tokenizer`.

    In CLIP the last piece of a word is marked. In a causal encoder it has seen the other pieces of its word, so it
    stands for the word in `starts_word`.
    """

    def __init__(self, folder: Path):
        try:
            self.engine = Engine(models.BPE.from_file(*(str(Path(folder) / name) for name in CLIP_FILES),
                                                      end_of_word_suffix="</w>"))
            ids = self.engine.get_vocab()
            self.start_id, self.pad_id = (ids[piece] for piece in ("<|startoftext|>", "<|endoftext|>"))
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("some ids are missing")
        except Exception as error:      # the engine raises nothing more special
            raise UserError(f"{folder}: no readable {' and '.join(CLIP_FILES)} of CLIP ({error}).") from None
        self.engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(CLIP_WORD), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        self.starts_word = np.array([piece.endswith("</w>") for piece in sorted(ids, key=ids.get)])     # (V,)

    def __len__(self) -> int:
        return len(self.starts_word)

    def encode(self, text: str, max_tokens: int = 77) -> list[int]:
        """<|startoftext|> pieces <|endoftext|>, at most `max_tokens` >= 2 ids."""
        text = text.encode("utf-8", "ignore").decode()
        return [self.start_id, *self.engine.encode(text).ids[:max_tokens - 2], self.pad_id]


class CausalTextEncoder(nn.Module):
    """Ids (B, T) and keep (B, T) -> states (B, 77, D) of a transformer whose tokens attend to those before them.

    The last id of a padded batch is the padding's, which continues to all 77 positions; keep is not used.
    """

    def __init__(self, config: DiffusionConfig):
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
