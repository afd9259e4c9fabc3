"""CLIP (Radford et al. 2021): its byte-level BPE, its causal text encoder, a retriever of its two encoders, its files.

Its files are Hugging Face's, open_clip's with OpenAI's names, and those of IRRA's code (arXiv 2303.12501), which most
methods since 2023 share. Stable Diffusion reads its prompts with the text side. Read next: retrievers.py, stable.py.
"""

import gzip
import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from mra.config import DiffusionConfig, ModelConfig, UserError
from mra.layers import PreNormBlock, QuickGELU
from mra.retriever import Retriever
from mra.run import checkpoint
from mra.weights.files import depth_of, fill, fit_positions, heads_of, named, read_vocabulary

OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
OPENAI_MERGES = 49152 - 256 - 2     # the first lines of that file, which has more
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
TEXT_RULES = (      # names of Hugging Face and of OpenAI
    (r".*embeddings\.position_ids$", ""), (r"^text_model\.", "text_encoder."),
    (r"\.(encoder\.layers|transformer\.resblocks)\.", ".blocks."), (r"\.(embeddings\.)?token_embedding\.", ".words."),
    (r"^text_encoder\.embeddings\.position_embedding\.", "text_encoder.positions."),
    (r"\.(final_layer_norm|ln_final)\.", ".norm."))
CLIP_RULES = (      # IRRA has OpenAI's names, and parts that only its training uses
    (r"^base_model\.|^(input_resolution|context_length|vocab_size)$", ""),
    (r"^(classifier|cross_attn|cross_modal_transformer|ln_pre_t|ln_pre_i|ln_post|mlm_head)\..*", ""),
    (r"^visual\.proj$", "image_projection.columns"), (r"^text_projection$", "text_projection.columns"),
    (r"^visual_projection\.", "image_projection."), (r"^(visual|vision_model)\.", "image_encoder."),
    (r"^(token_embedding|transformer|ln_final)\.", r"text_encoder.\1."),
    (r"^positional_embedding$", "text_encoder.positions.weight"),
    (r"\.(conv1|embeddings\.patch_embedding)\.", ".patches."), (r"\.(embeddings\.)?class_embedding$", ".class_token"),
    (r"^image_encoder\.(positional_embedding|embeddings\.position_embedding\.weight)$", "image_encoder.positions"),
    (r"\.(ln_pre|pre_layrnorm)\.", ".first_norm."), (r"\.(ln_post|post_layernorm)\.", ".norm."),
    (r"\.attn\.", ".attention."), (r"\.mlp\.c_fc\.", ".mlp.0."), (r"\.mlp\.c_proj\.", ".mlp.2."), *TEXT_RULES)


class ClipTokenizer:
    """CLIP's byte-level BPE, with the interface of data/tokenizer.py's `Tokenizer`.

    Bytes spell every text, so nothing is unknown. CLIP marks the last piece of a word. In a causal encoder that piece
    has seen the others of its word, so `starts_word` is True there. As in IRRA, the mask is the last word's id.
    """

    def __init__(self, pieces: list[str], merges: list[list[str]], source: Path):
        """Pieces in the order of their ids, and the pairs of pieces to join in the order of their rank."""
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
                signs = sorted(pre_tokenizers.ByteLevel.alphabet())          # a printable one for each byte
                pieces = [*signs, *(sign + "</w>" for sign in signs), *("".join(pair) for pair in merges),
                          "<|startoftext|>", "<|endoftext|>"]
            else:
                ids = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
                pieces = sorted(ids, key=ids.get)
                lines = (path / "merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [line.split() for line in lines if line and not line.startswith("#version")]
        except (OSError, EOFError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: no readable vocabulary of CLIP, vocab.json and merges.txt or {OPENAI_FILE} "
                            f"({error}).") from None
        return ClipTokenizer(pieces, merges, path)

    def __len__(self) -> int:
        return len(self.pieces)

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
                ended = self.starts_word[piece]
        return words

    def encode(self, text: str, max_tokens: int = 77) -> list[int]:
        """<|startoftext|> pieces <|endoftext|>, at most `max_tokens` >= 2 ids."""
        text = text.encode("utf-8", "ignore").decode()
        return [self.cls_id, *self.engine.encode(text).ids[:max_tokens - 2], self.sep_id]


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

    def __init__(self, config: ModelConfig):
        super().__init__(config, text_encoder=CausalTextEncoder(config))

    def encode_text(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Pieces (B, T) -> tokens (B, T, D) and unit features (B, E): the projection of <|endoftext|>.

        Only <|endoftext|> has seen the whole text. So it also becomes token 0, which the fusion encoder matches by.
        """
        tokens = self.text_encoder(ids, keep)
        last = keep.sum(1) - 1                                               # (B,)
        end = tokens[torch.arange(len(tokens), device=tokens.device), last]  # (B, D)
        tokens = torch.cat([end[:, None], tokens[:, 1:]], 1)
        return tokens, F.normalize(self.text_projection(end), dim=-1)


def read_clip(tensors: dict[str, Tensor], like: ModelConfig, path: Path,
              vocab: str) -> tuple[ClipRetriever, ClipTokenizer]:
    """A retriever of the tensors of a CLIP file, for images of the size of `like`, and its vocabulary.

    Its fusion encoder is random. Raises UserError for tensors or a vocabulary that do not fit.
    """
    tensors = named(tensors, CLIP_RULES, path)
    with checkpoint.trusting(path):
        for name in ("image_projection", "text_projection"):
            if f"{name}.columns" in tensors:
                tensors[f"{name}.weight"] = tensors.pop(f"{name}.columns").T
        scale = tensors.pop("logit_scale", torch.tensor(50.0).log())         # IRRA's is fixed, and in no file
        tensors["temperature"] = (-scale.float()).exp()
        dim, _, patch, _ = tensors["image_encoder.patches.weight"].shape
        tokenizer = read_vocabulary(ClipTokenizer, vocab, path, len(tensors["text_encoder.words.weight"]))
        positions, text_dim = tensors["text_encoder.positions.weight"].shape
        config = replace(like, patch=patch, image_dim=dim, image_depth=depth_of(tensors, "image_encoder.blocks."),
                         image_heads=heads_of(path, dim, "vision_config", "quick_gelu"), text_dim=text_dim,
                         text_heads=heads_of(path, text_dim, "text_config", "quick_gelu"),
                         text_depth=depth_of(tensors, "text_encoder.blocks."), vocab=len(tokenizer),
                         positions=positions, max_tokens=positions, embed=len(tensors["image_projection.weight"]))
        fit_positions(tensors, config.grid, "bilinear")                      # as in IRRA's code
        model = ClipRetriever(config)
    fill(model, tensors, path, [r"(image|text)_(encoder|projection)\.|temperature$"])
    return model, tokenizer


def clip_facts(tensors: dict[str, Tensor], config: ModelConfig) -> dict:
    """The facts of a checkpoint of ours for the tensors of a CLIP file, with a sentence on what was found."""
    names = "Hugging Face's" if any(name.startswith("vision_model.") for name in tensors) else "OpenAI's"
    found = f"CLIP with {names} names, {config.image_depth} + {config.text_depth} layers, images of " \
            f"{config.height}x{config.width}"
    if "classifier.weight" in tensors:
        found = f"IRRA's {found}; its head of {len(tensors['classifier.weight'])} identities is left out"
    train = {"preset": "clip", "dataset": "", "seed": "unknown", "data_root": "real data"}
    return {"train": train, "val": {}, "pretrained_on": "unknown pairs", "found": found, "mirror": False}
