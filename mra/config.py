"""The numbers of the package: model presets, training recipes, and the command line made from their fields.

Read this after `mra/__init__.py`; next is data/people.py. A configuration is a frozen dataclass; the command
line is its fields (`batch: int` is `--batch`), a flag that is not a field is an error, and the resolved
configuration is printed and saved with the weights.
"""

import argparse
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake the user can mend: one sentence, printed without a traceback, exit status 2."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the retriever. Images are (height, width) pixels, cut in square patches."""

    height: int
    width: int
    patch: int
    image_dim: int
    image_depth: int
    image_heads: int
    text_dim: int
    text_depth: int      # layers that read words alone
    fusion_depth: int    # layers that also look at the image
    text_heads: int
    embed: int           # width of the contrastive space
    rerank: int          # candidates that the fusion encoder re-scores for each query
    dropout: float = 0.1
    positions: int = 512  # as in BERT, so that its table fits; captions are cut at max_tokens
    max_tokens: int = 56  # [CLS] and [SEP] included
    vocab: int = 0        # set from the vocabulary when the model is made
    window: int = 0       # patches along a window of a Swin image encoder, `patch` being its last stage's; 0: a ViT
    class_token: bool = False       # the ViT has a token beside the patches, as pretrained ones have
    bins: int = 0         # parts of the image and of the caption that the projections read; 0: token 0 alone
    released_regions: bool = False  # as in the released code: RPC ignores the box, RPM does not see the region's mean

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch, self.width // self.patch

    @property
    def patch_count(self) -> int:
        return self.grid[0] * self.grid[1]


PRESETS = {
    #                    height width patch  image: dim depth heads  text: dim depth fusion heads  embed rerank
    "tiny":  ModelConfig(32,    16,   8,            32,  1,    2,          32,  1,    1,     2,      16,    8),
    "demo":  ModelConfig(64,    32,   8,            128, 4,    4,          128, 2,    2,     4,      128,   32),
    "small": ModelConfig(192,   96,   16,           384, 12,   6,          384, 3,    3,     6,      256,   128),
    "base":  ModelConfig(384,   256,  16,           768, 12,   12,         768, 6,    6,     12,     256,   512),
    # the released models: a Swin-B, at the size of fine-tuning and at that of pretraining
    "swin":  ModelConfig(384,   256,  32,           1024, 24,  32,         768,  6,    6,     12,     2048,  512,
                         window=8, bins=3),
    "swin-224": ModelConfig(224, 224, 32,           1024, 24,  32,         768,  6,    6,     12,     2048,  512,
                            window=7, bins=3),
}


@dataclass(frozen=True)
class DiffusionConfig:
    """Sizes of the latent diffusion model (DaD). Its text encoder is made of the text_* fields, as the retriever's."""

    height: int
    width: int
    stem: int                     # pixels folded into channels before the autoencoder's first convolution
    autoencoder: tuple[int, ...]  # its channels at each level; each level halves the resolution of the one before
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
    stable: bool = False          # with the details of Stable Diffusion 1.5, so that its weights fit

    @property
    def factor(self) -> int:
        """Pixels to a latent, each way."""
        return self.stem * 2 ** (len(self.autoencoder) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of an image's latents."""
        return self.latent, self.height // self.factor, self.width // self.factor


DIFFUSION_PRESETS = {
    #                        height width stem autoencoder      latent widths               heads text: dim depth heads
    "tiny":  DiffusionConfig(32,    16,   4,   (16,),           4,     (16, 32),            2,          32,  1,    2),
    "demo":  DiffusionConfig(64,    32,   4,   (96,),           12,    (48, 96),            2,          128, 2,    4),
    "small": DiffusionConfig(192,   96,   2,   (64, 128, 256),  8,     (128, 256, 384),     8,          256, 4,    4),
    "base":  DiffusionConfig(384,   256,  2,   (96, 192, 384),  8,     (192, 384, 768, 768), 8,         512, 6,    8),
    # weights from elsewhere, and for tests the same with other widths
    "sd15":  DiffusionConfig(384,   256,  1,   (128, 256, 512, 512), 4, (320, 640, 1280, 1280), 8,      768, 12,   12,
                             positions=77, max_tokens=77, stable=True),
    "sd15-tiny": DiffusionConfig(128, 64, 1,   (32, 32, 64, 64), 4,    (32, 64, 96, 96),    4,          32,  2,    4,
                                 positions=77, max_tokens=77, stable=True),
}


@dataclass(frozen=True)
class Fit:
    """How long and how fast a network of DaD is trained."""

    steps: int              # 0: as many as draw each pair `epochs` times on average
    batch: int              # images of one step, all processes together
    lr: float               # peak; it rises over the first 5 % of the steps and falls linearly to 0
    decay: float = 0.999    # of the moving average of the weights; it starts smaller and grows to this
    save_every: int = 200   # steps
    middle: bool = False    # noise levels are drawn mostly from the middle, not evenly


FITS = {    # of each size; judge: steps of filters.tell_apart; flags: other defaults of the command line
    "tiny":  dict(autoencoder=Fit(5, 16, 2e-3), denoiser=Fit(5, 16, 2e-3),
                  decoder=Fit(5, 16, 1e-3), branch=Fit(5, 16, 1e-3, middle=True),
                  judge=5, reader=Fit(5, 16, 2e-3), flags=dict(sampling_steps=4)),
    "demo":  dict(autoencoder=Fit(2000, 32, 1e-3), denoiser=Fit(12000, 64, 1e-3),
                  decoder=Fit(600, 32, 2e-3), branch=Fit(2400, 16, 3e-3, middle=True),
                  judge=200, reader=Fit(3000, 64, 2e-3)),
    "small": dict(autoencoder=Fit(20_000, 64, 3e-4), denoiser=Fit(60_000, 256, 4e-4),
                  decoder=Fit(1000, 32, 3e-4), branch=Fit(4000, 64, 2e-4, middle=True),
                  judge=1000, reader=Fit(6000, 64, 1e-3)),
    "base":  dict(autoencoder=Fit(50_000, 32, 2e-4), denoiser=Fit(200_000, 256, 2e-4),
                  decoder=Fit(3000, 16, 2e-4), branch=Fit(10_000, 32, 1e-4, middle=True),
                  judge=2000, reader=Fit(10_000, 64, 1e-3)),
    # three epochs of the target's pairs, as in the paper
    "sd15":  dict(branch=Fit(0, 8, 1e-5, save_every=1000), epochs=3, judge=2000,
                  flags=dict(sampling_steps=20, guidance=7.5, guidance_from=0.0, guidance_to=1.0)),
    "sd15-tiny": dict(branch=Fit(0, 4, 1e-3), epochs=1, judge=1,
                      flags=dict(sampling_steps=2, guidance_from=0.0, guidance_to=1.0)),
}


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. A recipe below overrides some of these defaults, and a flag overrides both."""

    dataset: str = "icfg"        # cuhk, icfg, rstp (fine-tuning); sda, mals (pretraining); or a folder of your own
    preset: str = "demo"         # tiny, demo, small, base, swin or swin-224
    data_root: str = ""          # folder of the real sets; empty: the demo town, which is drawn on first use
    check: bool = False          # read the whole set, decode its images, list what is wrong, and stop
    init: str = ""               # checkpoint to start from, or "none"; empty: pretrain on the demo town first
    bert: str = ""               # a Hugging Face BERT, file or folder, for text and fusion encoder; with its vocab.txt
    vit: str = ""                # a ViT of torchvision or Hugging Face, file or folder, for the image encoder
    vocab: str = ""              # a WordPiece vocab.txt; empty: that of --bert, else the packaged one, of demo words
    out: str = ""                # folder of checkpoints and log; empty: out/<dataset>-<preset>-s<seed>
    seed: int = 0
    resume: bool = True          # go on from the last checkpoint in `out`; --no-resume starts over
    share: float = 1.0           # of the training identities that is used, the same ones each time
    epochs: float = 30           # passes over the image-caption pairs
    steps: int = 0               # a number of steps instead of epochs; 0: epochs decide
    batch: int = 40              # pairs of one batch and process
    accumulate: int = 1          # batches whose gradients are added up before a step
    lr: float = 1e-4             # peak rate of the encoders
    head_lr: float = 5.0         # the new heads' rate as a multiple of lr
    warmup: float = 0.1          # share of the steps with a rising rate; it falls linearly to 0 afterwards
    weight_decay: float = 0.01
    clip: float = 1.0            # largest gradient norm
    beta: float = 0.8            # weight of the region losses
    regions: bool = True         # region losses, where the records have boxes
    released_regions: bool = False  # as in the released code: RPC ignores the box, RPM does not see the region's mean
    smoothing: float = 0.0       # label smoothing of the contrastive targets
    eda: float = 0.0             # weight of the augmented caption's ITC and ITM; 0: no such caption
    erase: float = 0.0           # chance of random erasing
    fusion_from: float = 0.0     # share of the steps after which ITM and MLM join ITC, RPC and RPM
    evals: int = 10              # evaluations on val, evenly spaced; the best one is kept
    log_every: int = 20          # steps
    workers: int = 0             # data loading processes
    allow_missing: bool = False  # drop records whose image is missing
    compile: bool = False        # torch.compile the model
    precision: str = ""          # float32 or bf16 (autocast); empty: bf16 where the device computes in it
    device: str = ""             # cuda or cpu; empty: cuda where there is one


@dataclass(frozen=True)
class AdaptConfig:
    """What to make, from what, and how."""

    target: str = "icfg"          # cuhk, icfg or rstp: whose look the images get
    mode: str = "generate"        # generate from captions, or restyle the source's images
    share: float = 1.0            # of the target's training identities that is used, as in train.py
    images: int = 1500            # how many are made, before the filters
    condition: str = "white"      # of the branch; to restyle also structure, the edges of the source image
    captions: str = "target"      # whose captions to generate from, target or source
    size: str = "demo"            # tiny, demo, small, base or sd15
    base: str = ""                # file of a trained base; empty: the shipped one for demo, else trained first
    weights: str = ""             # for sd15: folder of Stable Diffusion 1.5 in the layout of diffusers
    zero_snr: bool = False        # for sd15: end in pure noise and learn v, not the noise
    train_base: bool = False      # train the base and stop
    source: str = ""              # folder with the source set, SDA or MALS; empty: the demo town
    data_root: str = ""           # folder with the real target set; empty: the demo town
    out: str = ""                 # folder of the set that is made; empty: out/sda/<target>, -<size> and the like behind
    steps: int = 0                # of the branch's training; 0: as in FITS
    recompute: bool = False       # train the branch with gradient checkpointing: less memory, more time
    sampler: str = "dpm"          # ddim or dpm (DPM-Solver++ 2M)
    sampling_steps: int = 12
    guidance: float = 3.5         # on the text; 1: none ...
    guidance_from: float = 0.2    # ... at the noise levels from this, 0 being clean, ...
    guidance_to: float = 0.8      # ... to this, 1 being pure noise
    domain_guidance: float = 1.0  # on the domain; 1: none
    rescale: float = 0.0          # of the contrast that guidance adds, how much is undone
    strength: float = 0.8         # of the noise that restyling starts from; 0: no diffusion, 1: from pure noise
    grey_mean: float = 0.02       # dropped as near-greyscale: mean ...
    grey_variance: float = 0.0005  # ... and variance of the channel differences both below these
    malformed: float = 1.0        # dropped as malformed: log-odds of the judge above this
    checkpoint: str = ""          # a retriever whose matching head judges image against caption; empty: no such filter
    mismatch: float = -2.0        # dropped as not showing its caption: log-odds of a match below this
    box_threshold: float = 0.35   # a phrase's box is dropped below this confidence
    measure: bool = True          # on the demo town, measure how much of the gap is closed
    seed: int = 0
    workers: int = 0              # image decoding processes
    device: str = ""              # cuda or cpu; empty: cuda where there is one
    precision: str = ""           # float32 or bf16; empty: bf16 where the device computes in it
    compile: bool = False         # torch.compile the networks


LIMITS = {  # what a number on the command line may be, at least and at most
    "share": (1e-6, 1), "seed": (0, 2**31), "steps": (0, 1e9), "workers": (0, 256),
    "epochs": (1e-6, 1e6), "batch": (1, 1e6), "accumulate": (1, 1e6), "evals": (1, 1e6), "log_every": (1, 1e9),
    "lr": (0, 10), "head_lr": (0, 1e3), "warmup": (0, 1), "weight_decay": (0, 10), "clip": (1e-9, 1e9),
    "beta": (0, 1e3), "smoothing": (0, 1), "eda": (0, 1e3), "erase": (0, 1), "fusion_from": (0, 1),
    "images": (1, 1e9), "sampling_steps": (1, 1000), "guidance": (0, 100), "guidance_from": (0, 1),
    "guidance_to": (0, 1), "domain_guidance": (0, 100), "rescale": (0, 1), "strength": (0, 1), "grey_mean": (0, 1),
    "grey_variance": (0, 1), "malformed": (-1e3, 1e3), "mismatch": (-1e3, 1e3), "box_threshold": (0, 1),
    "k": (-1, 1e9), "weight": (-1, 1e9),
}


def check_values(config, **choices) -> None:
    """Raise UserError for a number outside its LIMITS, or a word that is none of the choices for it."""
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise UserError(f"--{name} {getattr(config, name)}: choose one of {', '.join(allowed)}.")
    for name, (low, high) in LIMITS.items():
        if hasattr(config, name) and not low <= getattr(config, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: give a value from {low} to {high:g}.")


# What a stage sets, over the defaults above: the paper's values (section 3) and, for the small presets, ours.
PAPER = {       # warmup of pretraining: 2,600 steps on four GPUs
    "pretrain": dict(epochs=32, batch=40, lr=5e-5, head_lr=1.0, warmup=0.0107, evals=16, workers=8),
    "cuhk": dict(epochs=30, batch=40, lr=1e-4, smoothing=0.2, eda=0.8, erase=0.6, evals=30, workers=8),
    "rstp": dict(epochs=10, batch=40, lr=6e-5, smoothing=0.2, eda=0.8, erase=0.6, evals=10, workers=8),
}
DEMO = {
    "pretrain": dict(epochs=14, batch=32, lr=7e-4, head_lr=1.0, warmup=0.1, fusion_from=0.15, evals=3, log_every=100),
    "finetune": dict(epochs=12, batch=32, lr=4e-4, head_lr=1.0, warmup=0.1, evals=4, log_every=100),
}


def pretrains(dataset: str) -> bool:
    """Whether a set is one to pretrain on: SDA, MALS, or a folder of SDA parts, as adapt.py makes."""
    return dataset in ("sda", "mals") or any(Path(dataset).glob("sda_*.json"))


def recipe(dataset: str, preset: str) -> dict:
    """The fields that `dataset` sets at `preset` before the command line has its say."""
    table, usual = (DEMO, "finetune") if preset in ("tiny", "demo") else (PAPER, "cuhk")
    return table.get("pretrain" if pretrains(dataset) else dataset, table[usual])


Config = TypeVar("Config")


def parse(kind: type[Config], doc: str, argv: list[str] | None = None,
          recipe_of: Callable[[Config], dict] = lambda config: {}) -> Config:
    """Make a configuration from flags: `kind`'s defaults, then `recipe_of` the result, then the flags given.

    Raises UserError for an unknown flag or a value of the wrong type; prints help and exits for --help.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags.")
    parser.error = refuse
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE))
    usual = kind(**recipe_of(kind()))
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        text = f"{comments.get(field.name, '')} (default: {getattr(usual, field.name)!r})".replace("%", "%%")
        takes = (dict(action=argparse.BooleanOptionalAction) if field.type is bool
                 else dict(nargs="+") if field.type == tuple[str, ...] else dict(type=field.type))
        parser.add_argument(flag, help=text, **takes)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    return kind(**{**recipe_of(kind(**given)), **given})


def harmless(text) -> str:
    """Text for a terminal: what is not printable is escaped, what is too long is cut."""
    safe = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[:2000])
    return safe + "..." * (len(str(text)) > 2000)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file to write, which becomes `path` at the end: complete or not at all. Raises UserError."""
    scratch = path.with_suffix(".tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except (OSError, SafetensorError) as error:     # a full disk
        scratch.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); what was saved before it is kept.") from error


def run(main: Callable[[], None]) -> None:
    """Call a script's main; a UserError becomes one sentence on standard error and exit status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as if by Ctrl-C
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")           # for a terminal that cannot show every sign
    try:
        main()
        if "LOCAL_RANK" in os.environ:      # torchrun's: the group's threads must end before the interpreter does
            import torch.distributed as dist  # here, for processes that draw or load images do without it
            if dist.is_initialized():
                dist.destroy_process_group()
        return
    except (UserError, OSError) as mistake:     # OSError: a folder that may not be written to
        sentence = str(mistake).split("UserError: ")[-1].strip()     # a loading process wraps it in its traceback
        said, status = f"error: {harmless(sentence)}", 2
    except (RuntimeError, MemoryError) as error:
        told = str(error).strip() or type(error).__name__
        if "in DataLoader worker process" in told:              # its traceback, as text
            told = told.splitlines()[-1]
        if isinstance(error, BrokenExecutor) or told.startswith("DataLoader worker"):
            said = (f"a helping process was killed ({harmless(told.splitlines()[0])}), perhaps for lack of memory; "
                    "free some, or give fewer --workers.")
        elif any(sign in f"{type(error).__name__} {told}" for sign in ("MemoryError", "allocate memory")):
            told = ". ".join(told.split(". ")[:2])
            said = (f"out of memory ({harmless(told)}); free some, or do less at once: a smaller --batch, or "
                    "--recompute of adapt.py.")
        else:
            raise
        said, status = f"error: {said}", 2
    except KeyboardInterrupt:
        said = "Stopped; the same command goes on after what was saved last."
        status = 130
    print(said, file=sys.stderr)
    sys.exit(status)
