"""The numbers of the package: model presets, training recipes, and the flags of the three scripts.

Every configuration is a frozen dataclass. A script's command line is made from the fields (`batch` becomes `--batch`).
The script prints the resolved configuration. Read next: data/records.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: one sentence, printed without a traceback; exit status 2."""


# ---- sizes of the models

@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the retriever. Images have height x width pixels and are cut into square patches."""

    height: int
    width: int
    patch: int
    image_dim: int
    image_depth: int
    image_heads: int
    text_dim: int
    text_depth: int       # layers of the text encoder
    fusion_depth: int     # layers of the fusion encoder, which also attend to the image
    text_heads: int
    embed: int            # width of the contrastive space
    rerank: int           # candidates that the fusion encoder re-scores for each query
    dropout: float = 0.1
    positions: int = 512  # position embeddings of the text, as in BERT
    max_tokens: int = 56  # longest caption, [CLS] and [SEP] included
    vocab: int = 0        # word pieces; set from the vocabulary when the model is made
    window: int = 0       # side of a Swin's window in patches; `patch` is that of its last stage; 0: a ViT
    class_token: bool = False       # the ViT also has a class token, as pretrained ones have
    clip: bool = False    # CLIP's ViT and causal text encoder
    bins: int = 0         # released models: bins of tokens that the projections read; 0: token 0 alone

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch


PRESETS = {
    #                      height width patch  image: dim depth heads  text: dim depth fusion heads  embed rerank
    "tiny":     ModelConfig(32,   16,   8,     32,   1,   2,           32,  1,  1,  2,               16,   8),
    "demo":     ModelConfig(64,   32,   8,     128,  4,   4,           128, 2,  2,  4,               128,  32),
    "small":    ModelConfig(192,  96,   16,    384,  12,  6,           384, 3,  3,  6,               256,  128),
    "base":     ModelConfig(384,  256,  16,    768,  12,  12,          768, 6,  6,  12,              256,  512),
    # the released models: a Swin-B, at the sizes of fine-tuning and of pretraining
    "swin":     ModelConfig(384, 256, 32, 1024, 24, 32, 768, 6, 6, 12, 2048, 512, window=8, bins=3),
    "swin-224": ModelConfig(224, 224, 32, 1024, 24, 32, 768, 6, 6, 12, 2048, 512, window=7, bins=3),
    "clip":     ModelConfig(384, 128, 16, 768, 12, 12, 512, 12, 4, 8, 512, 512, dropout=0.0,
                            positions=77, max_tokens=77, clip=True),    # CLIP ViT-B/16; image size and fusion as IRRA's
}


@dataclass(frozen=True)
class DiffusionConfig:
    """Sizes of the latent diffusion model; the fields text_* belong to its text encoder."""

    height: int
    width: int
    stem: int                     # pixels folded into channels before the autoencoder's first convolution
    autoencoder: tuple[int, ...]  # the autoencoder's channels at each level; each level halves the resolution
    latent: int                   # channels of the latents
    widths: tuple[int, ...]       # the denoiser's channels at each level
    heads: int
    text_dim: int
    text_depth: int
    text_heads: int
    dropout: float = 0.0
    positions: int = 512
    max_tokens: int = 56
    vocab: int = 0                # set from the vocabulary when the model is made
    stable: bool = False          # the architecture of Stable Diffusion 1.5, for its weights

    @property
    def factor(self) -> int:
        """Pixels along one latent, in height and in width."""
        return self.stem * 2 ** (len(self.autoencoder) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The latents of an image: (C, h, w)."""
        return self.latent, self.height // self.factor, self.width // self.factor


DIFFUSION_PRESETS = {
    #                        height width stem autoencoder      latent widths               heads text: dim depth heads
    "tiny":  DiffusionConfig(32,    16,   4,   (16,),           4,     (16, 32),            2,          32,  1,    2),
    "demo":  DiffusionConfig(64,    32,   4,   (96,),           12,    (48, 96),            2,          128, 2,    4),
    "base":  DiffusionConfig(384,   256,  2,   (96, 192, 384),  8,     (192, 384, 768, 768), 8,         512, 6,    8),
    "sd15":  DiffusionConfig(384,   256,  1,   (128, 256, 512, 512), 4, (320, 640, 1280, 1280), 8,      768, 12,   12,
                             positions=77, max_tokens=77, stable=True),
}


# ---- recipes of training

@dataclass(frozen=True)
class Fit:
    """How one network is trained: AdamW; the learning rate rises linearly, then falls linearly to 0."""

    steps: int
    batch: int                    # samples of a batch, over all processes
    lr: float                     # peak learning rate
    warmup: float = 0.05          # share of the steps with a rising learning rate
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    max_norm: float = 1.0         # largest gradient norm: clipping
    average: float = 0.999        # decay of the weights' moving average, which is the result; 0: no average
    accumulate: int = 1           # batches of a step: gradient accumulation
    save_every: int = 200         # steps


@dataclass(frozen=True)
class DadRecipe:
    """How the networks of DaD are trained at one size. None: the network is Stable Diffusion's, and is not trained."""

    branch: Fit
    judge: Fit = Fit(1000, 256, 1e-3, warmup=0.0, average=0.0)
    autoencoder: Fit | None = None
    denoiser: Fit | None = None
    decoder: Fit | None = None
    epochs: int = 0                     # if not 0: passes over the target's pairs, which decide the branch's steps
    flags: dict[str, float] = field(default_factory=dict)       # defaults of adapt.py's flags at this size


DAD_RECIPES = {
    "tiny":  DadRecipe(Fit(5, 16, 1e-3), Fit(5, 16, 1e-3), Fit(5, 16, 2e-3), Fit(5, 16, 2e-3), Fit(5, 16, 1e-3),
                       flags=dict(sampling_steps=4, rank=2)),
    "demo":  DadRecipe(branch=Fit(3000, 16, 3e-3), autoencoder=Fit(2000, 32, 1e-3),
                       denoiser=Fit(12_000, 64, 1e-3), decoder=Fit(600, 32, 2e-3), flags=dict(rank=64)),
    "base":  DadRecipe(branch=Fit(10_000, 32, 1e-4), autoencoder=Fit(50_000, 32, 2e-4),
                       denoiser=Fit(200_000, 256, 2e-4), decoder=Fit(3000, 16, 2e-4)),
    "sd15":  DadRecipe(branch=Fit(0, 8, 1e-5, save_every=1000), epochs=3,      # as in the paper
                       flags=dict(sampling_steps=20, guidance=7.5, guidance_from=0.0, guidance_to=1.0)),
}

TARGETS = "cuhk", "icfg", "rstp"        # names of sets; write a folder of such a name as ./icfg
# What a stage of train.py sets beside TrainConfig's defaults: the paper's values (section 3); for tiny and demo, ours.
PAPER = {       # warmup of pretraining: 2,600 steps on four GPUs
    "pretrain": dict(epochs=32, batch=40, lr=5e-5, head_lr=1.0, warmup=0.0107, evals=16, workers=8),
    "finetune": dict(epochs=30, batch=40, lr=1e-4, smoothing=0.2, eda=0.8, erase=0.6, evals=30, workers=8),
    "finetune rstp": dict(epochs=10, batch=40, lr=6e-5, smoothing=0.2, eda=0.8, erase=0.6, evals=10, workers=8),
}
# IRRA's values (arXiv 2303.12501). Its rate falls as a cosine, ours linearly; it does not pretrain.
CLIP = {
    "pretrain": dict(epochs=32, batch=64, lr=1e-5, head_lr=5.0, warmup=0.0107, weight_decay=4e-5, evals=16, workers=8),
    "finetune": dict(epochs=60, batch=64, lr=1e-5, head_lr=5.0, warmup=5 / 60, weight_decay=4e-5, erase=0.5, evals=60,
                     workers=8),
}
DEMO = {
    "pretrain": dict(epochs=14, batch=32, lr=7e-4, head_lr=1.0, warmup=0.1, fusion_from=0.15, evals=3, log_every=100,
                     workers=1),
    # on a set of adapt.py; chosen for a start from the shipped retriever
    "adapted": dict(epochs=14, batch=32, lr=4e-4, head_lr=1.0, warmup=0.1, evals=3, log_every=100, workers=1),
    "finetune": dict(epochs=10, batch=32, lr=2e-4, head_lr=1.0, warmup=0.1, evals=4, log_every=100, workers=1),
}


def pretrains(dataset: str) -> bool:
    """Whether `dataset` is for pretraining: SDA, MALS, or a folder in SDA format, which adapt.py makes."""
    return dataset in ("sda", "mals") or (dataset not in TARGETS and any(Path(dataset).glob("sda_*.json")))


def made_by_adapt(folder: str | Path) -> bool:
    """Whether a folder holds a set that adapt.py has finished."""
    return (Path(folder) / "report.json").exists()


def recipe(dataset: str, preset: str) -> dict:
    """The fields of TrainConfig that `dataset` sets at `preset`; a flag overrides them."""
    table = {"tiny": DEMO, "demo": DEMO, "clip": CLIP}.get(preset, PAPER)
    if pretrains(dataset):
        return table.get("adapted" if made_by_adapt(dataset) else "pretrain", table["pretrain"])
    return table.get(f"finetune {dataset}", table["finetune"])


# ---- flags of the scripts

def flag(default, text: str, least: float | None = None, most: float | None = None,
         choices: Iterable[str] | None = None, bare: int | None = None):
    """A field that is a flag: a number from `least` to `most` or one of `choices`; given without value it is `bare`."""
    words = [*choices, ""] if choices and default == "" else choices       # "" is the same as no flag
    facts = {"text": text, "least": least, "most": most, "choices": words, "bare": bare}
    return field(default=default, metadata=facts)


@dataclass(frozen=True)
class TrainConfig:
    """One stage of train.py. A recipe overrides some of these defaults, a flag overrides both."""

    dataset: str = flag("icfg", "cuhk, icfg, rstp (fine-tuning); sda, mals (pretraining); or your own folder")
    preset: str = flag("demo", "size of the model", choices=tuple(PRESETS))
    data_root: str = flag("", "folder of the real sets; empty: the demo town, drawn on first use")
    check: bool = flag(False, "read the set, decode its images, list what is wrong, and stop")
    init: str = flag("", "a checkpoint; none: random or --bert ...; scratch: pretrain first; empty: shipped or scratch")
    bert: str = flag("", "a Hugging Face BERT, file or folder with its vocab.txt, for text and fusion encoder")
    vit: str = flag("", "a ViT of torchvision or Hugging Face, file or folder, for the image encoder")
    clip: str = flag("", "for --preset clip: a CLIP ViT-B/16, folder or file with its vocabulary beside it")
    vocab: str = flag("", "a vocabulary; empty: the one beside --bert or --clip, or else the packaged one")
    out: str = flag("", "folder of checkpoints and log; empty: out/<dataset>-<preset>-s<seed>, then what differs")
    seed: int = flag(0, "seed of all random numbers", 0, 2**31)
    resume: bool = flag(True, "continue from the last checkpoint in --out; --no-resume starts over")
    share: float = flag(1.0, "share of the training identities to use, always the same ones", 1e-6, 1)
    epochs: float = flag(30, "passes over the image-caption pairs", 1e-6, 1e6)
    steps: int = flag(0, "training steps, in place of --epochs; 0: --epochs decides", 0, 1e9)
    batch: int = flag(40, "pairs in a batch of one process", 1, 1e6)
    accumulate: int = flag(1, "batches of a step, whose gradients are averaged", 1, 1e6)
    lr: float = flag(1e-4, "peak learning rate of all but the `new_parts`", 0, 10)
    head_lr: float = flag(5.0, "learning rate of the model's `new_parts`, the heads, as a multiple of --lr", 0, 1e3)
    warmup: float = flag(0.1, "share of the steps with a rising learning rate; it then falls linearly to 0", 0, 1)
    weight_decay: float = flag(0.01, "weight decay of the matrices", 0, 10)
    max_norm: float = flag(1.0, "gradient clipping: largest norm", 1e-9, 1e9)
    beta: float = flag(0.8, "weight of the region losses", 0, 1e3)
    regions: bool = flag(True, "use the region losses for records with boxes")
    contrastive: str = flag("itc", "of captions and of phrases: the paper's itc, or IRRA's sdm", choices=("itc", "sdm"))
    smoothing: float = flag(0.0, "label smoothing of the contrastive targets", 0, 1)
    eda: float = flag(0.0, "weight of ITC and ITM on an augmented copy of the caption; 0: none", 0, 1e3)
    erase: float = flag(0.0, "chance of random erasing in fine-tuning", 0, 1)
    light: float = flag(0.0, "chance of random exposure, colours, haze and grain in pretraining", 0, 1)
    fusion_from: float = flag(0.0, "share of the steps before ITM and MLM join the other losses", 0, 1)
    evals: int = flag(10, "evaluations on val, evenly spaced: the best checkpoint is kept, the state saved", 1, 1e6)
    log_every: int = flag(20, "steps between lines of progress", 1, 1e9)
    workers: int = flag(0, "data loading processes", 0, 256)
    allow_missing: bool = flag(False, "drop records whose image is missing")
    blend: float = flag(0.0, "share of the first weights in those of the best checkpoint; val judges the mean", 0, 1)
    half: bool = flag(False, "write the best checkpoint in half precision")
    compile: bool = flag(False, "torch.compile the model")
    precision: str = flag("", "precision; empty: bf16 if the device supports it", choices=("float32", "bf16"))
    device: str = flag("", "device; empty: cuda where there is one", choices=("cuda", "cpu"))


@dataclass(frozen=True)
class AdaptConfig:
    """What adapt.py makes, from what, and how."""

    target: str = flag("icfg", "whose look the images get: cuhk, icfg, rstp, or a folder of photographs")
    mode: str = flag("generate", "generate from captions, or restyle source images", choices=("generate", "restyle"))
    share: float = flag(1.0, "share of the target's training identities to use, as in train.py", 1e-6, 1)
    images: int = flag(3000, "number of images to make, before the filters", 1, 1e9)
    captions: str = flag("target", "whose captions to generate images from", choices=("target", "source"))
    size: str = flag("demo", "size of the diffusion model", choices=DIFFUSION_PRESETS.keys())
    base: str = flag("", "file of a trained base; empty: the shipped one for demo, else one is trained first")
    weights: str = flag("", "for sd15: folder of Stable Diffusion 1.5, in the layout of diffusers")
    train_base: bool = flag(False, "train the base and stop")
    source: str = flag("", "folder with the source set, SDA or MALS; empty: the demo town")
    data_root: str = flag("", "folder with the real target set; empty: the demo town")
    out: str = flag("", "folder of the set; empty: out/sda/<target>, then size, mode, ... that differ")
    resume: bool = flag(True, "go on with the set in --out; --no-resume removes one that was made otherwise")
    steps: int = flag(0, "training steps of the branch; 0: those of the recipe", 0, 1e9)
    rank: int = flag(0, "rank of what the branch adds; 0: the paper's branch, as base and sd15 have it", 0, 1024)
    sampling_steps: int = flag(12, "denoising steps of an image, by DPM-Solver++(2M)", 1, 1000)
    guidance: float = flag(3.5, "scale of the guidance on the text; 1: none", 0, 100)
    guidance_from: float = flag(0.2, "lowest noise level with guidance; 0: clean", 0, 1)
    guidance_to: float = flag(0.8, "highest noise level with guidance; 1: pure noise", 0, 1)
    strength: float = flag(0.8, "noise level that restyling starts from; 0: no diffusion, 1: pure noise", 0, 1)
    grey_mean: float = flag(0.02, "greyscale filter: drop if the channels' mean difference is below this ...", 0, 1)
    grey_variance: float = flag(0.0005, "greyscale filter: ... and the variance of the differences below this", 0, 1)
    malformed: float = flag(0.03, "drop as malformed: share of the target's own images that the filter may drop", 0, 1)
    seed: int = flag(0, "seed of all random numbers", 0, 2**31)
    workers: int = flag(0, "image decoding processes", 0, 256)
    device: str = flag("", "device; empty: cuda where there is one", choices=("cuda", "cpu"))
    precision: str = flag("", "precision; empty: bf16 if the device supports it", choices=("float32", "bf16"))
    compile: bool = flag(False, "torch.compile the networks")

    @property
    def usual_out(self) -> str:
        """out/sda/<target>, then what is not the default, then "real"; train.py finds a drawn one of its --share."""
        name = Path(self.target).absolute().name
        usual = (("demo", self.size), ("generate", self.mode), ("target", self.captions), ("s0", f"s{self.seed}"),
                 ("1", f"{self.share:g}"), ("", "real" if self.data_root or self.target not in TARGETS else ""))
        return "-".join([f"out/sda/{name}", *(own for default, own in usual if own != default)])


@dataclass(frozen=True)
class EvalConfig:
    """What evaluate.py evaluates, and how."""

    checkpoint: str = flag("", "ours, released, CLIP's or IRRA's; empty: the newest under out/, else the shipped")
    vocab: str = flag("", "vocabulary for a released checkpoint, CLIP's or IRRA's; empty: the one beside it")
    dataset: tuple[str, ...] = flag((), "sets to evaluate on; empty: the checkpoint's training set")
    split: str = flag("test", "split to evaluate on", choices=("train", "val", "test"))
    data_root: str = flag("", "folder of the real sets; empty: the demo town")
    k: int = flag(-1, "candidates that the fusion encoder re-scores; -1: the preset's; 0: none", -1, 1e9)
    mirror: bool = flag(True, "average with mirror images, whose captions exchange left and right")
    weight: float = flag(-1.0, "weight of the similarity beside the match; -1: the one chosen on val", -1, 1e9)
    query: tuple[str, ...] = flag((), "sentences: rank a gallery for each")
    queries: str = flag("", "a text file: rank a gallery for the sentence in each line")
    query_image: str = flag("", "a picture: rank a gallery by it, or by it and each sentence")
    threshold: float = flag(-1.0, "leave out images of a lower similarity to the query; -1: none", -1, 1)
    gallery: str = flag("", "a folder of photographs for these queries; empty: the test images")
    serve: int = flag(-1, "a page to search from, at this port or 8000; 0: a free one; -1: none", -1, 65535, bare=8000)
    out: str = flag("", "folder of results and pictures; empty: the checkpoint's; out/shipped for the shipped one")
    batch: int = flag(64, "images encoded at a time", 1, 1e6)
    workers: int = flag(0, "image decoding processes", 0, 256)
    allow_missing: bool = flag(False, "drop records whose image is missing")
    device: str = flag("", "device; empty: cuda where there is one", choices=("cuda", "cpu"))
    precision: str = flag("", "precision of the encoders; empty: bf16 on a GPU", choices=("float32", "bf16"))
