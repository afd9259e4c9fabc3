"""CLIP (Radford et al. 2021): its byte-level BPE, its causal text encoder, a retriever of its two encoders.

Stable Diffusion reads its prompts with the text side. Read next: retrievers.py, which reads CLIP's files, stable.py.
"""

import gzip
import html
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from mra.config import DiffusionConfig, ModelConfig, UserError
from mra.data.tokenizer import Tokenizer
from mra.layers import PreNormBlock, QuickGELU
from mra.retriever import Retriever

MERGE_FILES = "merges.txt", "bpe_simple_vocab_16e6.txt.gz"      # Hugging Face's, OpenAI's
MERGES = 49152 - 256 - 2            # the first of OpenAI's file, which has more
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokenizer(Tokenizer):
    """CLIP's byte-level BPE. An encoded text is <|startoftext|> pieces <|endoftext|>.

    Bytes spell every text, so nothing is unknown. A word's last piece is marked. The mask is the last word's id (IRRA).
    """

    def __init__(self, merges: list[list[str]], source: Path):
        """`merges` are the pairs of pieces to join, in the order of their rank; the ids of all pieces follow."""
        signs = sorted(pre_tokenizers.ByteLevel.alphabet())              # a printable one for each byte
        self.pieces = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges),
                       "<|startoftext|>", "<|endoftext|>"]
        ids = {piece: i for i, piece in enumerate(self.pieces)}
        try:
            pairs = [(one, other) for one, other in merges]
            self.engine = tokenizers.Tokenizer(models.BPE(ids, pairs, end_of_word_suffix="</w>"))
        except Exception as error:      # the engine raises nothing more special
            raise UserError(f"{source}: no vocabulary of CLIP ({error!r}).") from None
        self.merges, self.source = merges, source
        self.cls_id, self.sep_id = ids["<|startoftext|>"], ids["<|endoftext|>"]
        self.pad_id, self.unk_id, self.mask_id = self.sep_id, None, self.cls_id - 1
        self.ordinary_ids = list(range(self.mask_id))
        self.engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @staticmethod
    def read(path: Path) -> "ClipTokenizer":
        """Read a file of merges, or one of MERGE_FILES in a folder. Raises UserError for others."""
        file = next((path / name for name in MERGE_FILES if (path / name).is_file()), path)
        try:
            text = file.read_bytes()
            if file.suffix == ".gz":
                text = gzip.decompress(text)
            lines = text.decode().split("\n")[1:1 + MERGES]              # the first line is a version
        except Exception as error:      # broken archives raise many types
            raise UserError(f"{path}: no readable vocabulary of CLIP, {' or '.join(MERGE_FILES)} ({error}).") from None
        return ClipTokenizer([line.split() for line in lines if line], path)

    def clean(self, text: str, _: str) -> str:
        """The caption of any set, cleaned as CLIP's own code does."""
        return html.unescape(html.unescape(text)).strip()

    def words_of(self, ids: list[int]) -> list[list[int]]:
        """The positions of each word's pieces, without special ids."""
        words, ended = [], True
        for position, piece in enumerate(ids):
            if piece < self.mask_id:
                if ended:
                    words.append([])
                words[-1].append(position)
                ended = self.pieces[piece].endswith("</w>")
        return words


class CausalTextEncoder(nn.Module):
    """Ids (B, T) and keep (B, T) -> tokens (B, T, D); each token attends to itself and to those before it.

    Padding follows the text, which therefore never sees it; keep is not used.
    """

    def __init__(self, config: DiffusionConfig | ModelConfig):
        super().__init__()
        dim = config.text_dim
        self.words, self.positions = nn.Embedding(config.vocab, dim), nn.Embedding(config.positions, dim)
        self.blocks = nn.ModuleList(PreNormBlock(dim, config.text_heads, config.dropout, 1e-5, True, QuickGELU)
                                    for _ in range(config.text_depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.words(ids) + self.positions.weight[:ids.shape[1]]           # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ClipRetriever(Retriever):
    """A retriever of CLIP's two encoders; the fusion encoder and its heads are ours, and new."""

    new_parts = "fusion_encoder", "matching_head", "word_head"

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces (B, T) -> tokens (B, T, D) and unit features (B, E): the projection of <|endoftext|>.

        Only <|endoftext|> has seen the whole text. So it also becomes token 0, which the fusion encoder matches by.
        """
        tokens = self.text_encoder(ids, keep)
        last = keep.sum(1) - 1                                               # (B,)
        end = tokens[torch.arange(len(tokens), device=tokens.device), last]  # (B, D)
        tokens = torch.cat([end[:, None], tokens[:, 1:]], 1)
        return tokens, F.normalize(self.text_projection(end), dim=-1)
