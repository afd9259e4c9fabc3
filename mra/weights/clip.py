"""CLIP (Radford et al. 2021): its byte-level BPE, its causal text encoder, a retriever of its two encoders, its files.

The files are Hugging Face's, those with OpenAI's names as open_clip writes them, and those of IRRA's code (arXiv
2303.12501), which most methods since 2023 share. Stable Diffusion reads its prompts with the text side. Read next:
retrievers.py, stable.py.
"""

import gzip
import html
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from mra.config import DiffusionConfig, ModelConfig, UserError
from mra.layers import PreNormBlock, QuickGELU, initialise
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.weights.files import folder_of, named, read

CLIP_FILES = "vocab.json", "merges.txt"
OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
OPENAI_MERGES = 49152 - 256 - 2     # of the lines in that file
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
CLIP_SIGNS = "visual.class_embedding", "vision_model.embeddings.class_embedding"     # how a name in every CLIP ends
HEAD = 64                           # width of an attention head, in every CLIP
IRRA_TEMPERATURE = 0.02             # where a file holds none
TEXT_RULES = (      # Hugging Face's names of the text side
    (r".*embeddings\.position_ids$", ""), (r"^text_model\.", "text_encoder."),
    (r"\.embeddings\.token_embedding\.", ".words."), (r"\.embeddings\.position_embedding\.", ".positions."),
    (r"\.final_layer_norm\.", ".norm."), (r"\.encoder\.layers\.", ".blocks."))
CLIP_RULES = (
    (r"^base_model\.", ""),         # IRRA's
    (r"^(classifier|cross_attn|cross_modal_transformer|ln_pre_t|ln_pre_i|ln_post|mlm_head)\..*", ""),
    (r"^(input_resolution|context_length|vocab_size)$", ""),
    (r"^visual\.conv1\.", "image_encoder.patches."), (r"^visual\.class_embedding$", "image_encoder.class_token"),
    (r"^visual\.positional_embedding$", "image_encoder.positions"), (r"^visual\.ln_pre\.", "image_encoder.first_norm."),
    (r"^visual\.ln_post\.", "image_encoder.norm."), (r"^visual\.proj$", "image_projection.columns"),
    (r"^visual\.transformer\.resblocks\.", "image_encoder.blocks."), (r"^ln_final\.", "text_encoder.norm."),
    (r"^transformer\.resblocks\.", "text_encoder.blocks."), (r"^token_embedding\.", "text_encoder.words."),
    (r"^positional_embedding$", "text_encoder.positions.weight"), (r"^text_projection$", "text_projection.columns"),
    (r"\.mlp\.c_fc\.", ".mlp.0."), (r"\.mlp\.c_proj\.", ".mlp.2."), (r"\.attn\.", ".attention."),
    # Hugging Face's
    (r"^vision_model\.", "image_encoder."), (r"\.embeddings\.patch_embedding\.", ".patches."),
    (r"\.embeddings\.class_embedding$", ".class_token"), (r"\.pre_layrnorm\.", ".first_norm."),
    (r"^image_encoder\.embeddings\.position_embedding\.weight$", "image_encoder.positions"),
    (r"\.post_layernorm\.", ".norm."), (r"^visual_projection\.", "image_projection."), *TEXT_RULES)


class ClipTokenizer:
    """CLIP's byte-level BPE, with the interface of data/tokenizer.py's `Tokenizer`.

    Bytes spell every text, so nothing is unknown. CLIP marks the last piece of a word. In a causal encoder that piece
    has seen the others of its word, so `starts_word` is True there. `mask_id` is the last word's, as in IRRA.
    """

    def __init__(self, pieces: list[str], merges: list[list[str]], source: Path):
        """Pieces in the order of their ids, and pairs of pieces that are joined, first ones first."""
        ids = {piece: i for i, piece in enumerate(pieces)}
        try:
            self.engine = Engine(models.BPE(ids, [(one, other) for one, other in merges], end_of_word_suffix="</w>"))
            self.cls_id, self.sep_id = ids["<|startoftext|>"], ids["<|endoftext|>"]
        except Exception as error:      # the engine raises nothing more special
            raise UserError(f"{source}: no vocabulary of CLIP ({error!r}).") from None
        self.pieces, self.merges = pieces, merges
        self.pad_id, self.unk_id, self.mask_id = self.sep_id, None, self.cls_id - 1
        self.starts_word = np.array([piece.endswith("</w>") for piece in pieces])                   # (V,)
        self.ordinary_ids = list(range(self.mask_id))
        self.engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
        self.engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORD), "removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    @staticmethod
    def read(path: Path) -> "ClipTokenizer":
        """Read OpenAI's file of merges, or the two files of Hugging Face in a folder. Raises UserError for others."""
        file = path / OPENAI_FILE if (path / OPENAI_FILE).is_file() else path
        try:
            if file.is_file():
                lines = gzip.open(file, "rt", encoding="utf-8").read().split("\n")[1:1 + OPENAI_MERGES]
                merges = [line.split() for line in lines]
                bytes_ = byte_signs()
                pieces = [*bytes_, *(sign + "</w>" for sign in bytes_), *("".join(pair) for pair in merges),
                          "<|startoftext|>", "<|endoftext|>"]
            else:
                ids = json.loads((path / CLIP_FILES[0]).read_text(encoding="utf-8"))
                pieces = sorted(ids, key=ids.get)
                lines = (path / CLIP_FILES[1]).read_text(encoding="utf-8").split("\n")
                merges = [line.split() for line in lines if line and not line.startswith("#version")]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: no readable vocabulary of CLIP, {' and '.join(CLIP_FILES)} or {OPENAI_FILE} "
                            f"({error}).") from None
        return ClipTokenizer(pieces, merges, path)

    def __len__(self) -> int:
        return len(self.pieces)

    def clean(self, text: str, _: str) -> str:
        """The caption as CLIP's own code cleans it, of whatever set."""
        return html.unescape(html.unescape(text)).strip()

    def words_of(self, ids: list[int]) -> list[list[int]]:
        """The positions of each word's pieces, without special ids."""
        words, inside = [], False
        for position, piece in enumerate(ids):
            if piece >= self.mask_id:
                continue
            if not inside:
                words.append([])
            words[-1].append(position)
            inside = not self.starts_word[piece]
        return words

    def encode(self, text: str, max_tokens: int = 77) -> list[int]:
        """<|startoftext|> pieces <|endoftext|>, at most `max_tokens` >= 2 ids."""
        text = text.encode("utf-8", "ignore").decode()
        return [self.cls_id, *self.engine.encode(text).ids[:max_tokens - 2], self.sep_id]


def byte_signs() -> list[str]:
    """The printable sign of each of 256 bytes, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]


class CausalTextEncoder(nn.Module):
    """Ids (B, T) and keep (B, T) -> tokens (B, T, D) of a transformer whose tokens attend to those before them.

    Padding stands behind a text, which therefore never sees it; keep is not used.
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
    """A retriever of CLIP's two encoders; fusion encoder and its heads are ours, and new."""

    new_parts = "fusion_encoder", "matching_head", "word_head"

    def __init__(self, config: ModelConfig):
        super().__init__(config, text_encoder=CausalTextEncoder(config))
        self.image_projection = nn.Linear(config.image_dim, config.embed, bias=False).apply(initialise)
        self.text_projection = nn.Linear(config.text_dim, config.embed, bias=False).apply(initialise)

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces (B, T) -> tokens (B, T, D) and unit features (B, E): the projection of <|endoftext|>.

        <|endoftext|> has seen the whole text, <|startoftext|> nothing. So it also takes the place of token 0, which the
        fusion encoder matches by.
        """
        tokens = self.text_encoder(ids, keep)
        last = keep.sum(1) - 1                                               # (B,)
        end = tokens[torch.arange(len(tokens), device=tokens.device), last]  # (B, D)
        tokens = torch.cat([end[:, None], tokens[:, 1:]], 1)
        return tokens, F.normalize(self.text_projection(end), dim=-1)


def read_clip(path: Path, like: ModelConfig) -> tuple[dict[str, Tensor], ModelConfig]:
    """A CLIP's tensors under our names, and its sizes, for images of the size of `like`. Raises UserError.

    Positions are interpolated as in IRRA's code, bilinear; the class token's becomes part of the class token.
    """
    tensors = named(read(path), CLIP_RULES, path)
    with checkpoint.trusting(path):
        for name in ("image_projection", "text_projection"):
            if f"{name}.columns" in tensors:
                tensors[f"{name}.weight"] = tensors.pop(f"{name}.columns").T
        scale = tensors.pop("logit_scale", torch.tensor(-math.log(IRRA_TEMPERATURE)))
        tensors["temperature"] = (-scale.float()).exp()
        dim, _, patch, _ = tensors["image_encoder.patches.weight"].shape
        vocab, text_dim = tensors["text_encoder.words.weight"].shape
        positions = len(tensors["text_encoder.positions.weight"])
        depths = [len({name.split(".")[2] for name in tensors if name.startswith(f"{part}_encoder.blocks.")})
                  for part in ("image", "text")]
        config = replace(like, patch=patch, image_dim=dim, image_depth=depths[0], image_heads=dim // HEAD,
                         text_dim=text_dim, text_depth=depths[1], text_heads=text_dim // HEAD, vocab=vocab,
                         positions=positions, max_tokens=positions, embed=len(tensors["image_projection.weight"]))
        first, rest = tensors["image_encoder.positions"].float().tensor_split([1])            # (1, D), (N, D)
        if len(rest) != config.patch_count:
            side = math.isqrt(len(rest))
            rest = resized_positions(rest, (side, side), config.grid)
        tensors["image_encoder.class_token"] = (tensors["image_encoder.class_token"] + first)[None]
        tensors["image_encoder.positions"] = rest[None]
    return tensors, config


def clip_facts(tensors: dict[str, Tensor], config: ModelConfig) -> dict:
    """Facts as of a checkpoint of ours, for the tensors of a CLIP, and a sentence on what was found."""
    names = "Hugging Face's" if any(name.startswith("vision_model.") for name in tensors) else "OpenAI's"
    found = f"CLIP with {names} names, {config.image_depth} + {config.text_depth} layers, images of {config.height}x" \
            f"{config.width}"
    if "classifier.weight" in tensors:
        found = f"IRRA's {found}; its head of {len(tensors['classifier.weight'])} identities is left out"
    train = {"preset": "clip", "dataset": "", "seed": "unknown", "data_root": "real data"}
    return {"train": train, "val": {}, "pretrained_on": "unknown pairs", "found": found, "mirror": False}


def resized_positions(positions: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Position embeddings (N, D) of a grid of rows and columns -> of another, bilinear."""
    square = positions.T.unflatten(1, grid)[None]                            # (1, D, rows, columns)
    return F.interpolate(square, to, mode="bilinear", align_corners=False)[0].flatten(1).T


def read_clip_vocabulary(vocab: str, weights: Path, size: int) -> ClipTokenizer:
    """The vocabulary `vocab`, a folder or file, else the one beside the weights. Raises UserError if it has not `size`
    pieces."""
    tokenizer = ClipTokenizer.read(Path(vocab) if vocab else folder_of(weights))
    if len(tokenizer) != size:
        raise UserError(f"{vocab or weights}: the vocabulary has {len(tokenizer)} pieces and the weights {size}: they "
                        "do not belong together.")
    return tokenizer
