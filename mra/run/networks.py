"""The networks of DaD, each trained once and kept: the base; then, on the target, decoder, branch and judge.

A function for each network says what it learns from, its loss and its key. adapt.py calls them in this order.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, TARGETS, AdaptConfig, DiffusionConfig, Fit, UserError
from mra.data.augment import random_light
from mra.data.files import printable
from mra.data.records import RecordSet
from mra.data.tokenizer import Tokenizer
from mra.diffusion.base import Diffusion, encode, read_images, to_float
from mra.diffusion.denoiser import Denoiser, DomainBranch, low_rank_branch, merge
from mra.diffusion.filters import DAMAGE, Judge, distort, judge_loss, split_for_judge
from mra.diffusion.pairs import LatentPairs
from mra.run import checkpoint
from mra.run.loop import Loop, Task
from mra.run.machine import Machine, locked
from mra.weights.stable import read_stable

TRAINED = "out/base-{}/base.safetensors"        # where `train_base` writes the base of a size
SCALE_IMAGES = 2000     # images of the source that set the scale of the base's latents
LIT = 0.75              # share of the autoencoder's images under random light

Loss = Callable[[torch.Generator, int], Tensor]     # (generator, n) -> the loss of n random samples


def learn(name: str, network: nn.Module, prepare: Callable[[], Loss], fit: Fit, folder: Path, key: dict,
          machine: Machine) -> None:
    """Train the parameters of `network` that require gradients, unless `folder` holds them for the same key.

    `prepare` is called if training is needed; it returns the loss. `fit` is added to the key, whose "seed" decides all
    that is random. A finished network serves any precision; an unfinished one, beside it as .part, goes on in its own.
    """
    key, path = {"network": name, "fit": asdict(fit), **key}, folder / f"{name}.safetensors"
    with locked(folder, machine):
        if path.exists() and checkpoint.same_key(path, checkpoint.load(path)[1].get("key", {}), key, machine.say):
            machine.say(f"{path} is complete and is used.")
        else:
            loss, state = prepare(), path.with_suffix(".part")
            saves = frozenset(range(fit.save_every, fit.steps, fit.save_every))
            task = Task(name, network, fit, key["seed"], state, path.with_suffix(".jsonl"), key, save_after=saves)
            Loop(task, lambda portion: {"loss": loss(portion.generator, portion.count)}, machine).run()
            machine.on_rank_0(lambda: checkpoint.save(path, checkpoint.weights(network), {"key": key}))
            machine.on_rank_0(lambda: state.unlink(missing_ok=True))
    checkpoint.restore_weights(network, checkpoint.load(path)[0], path)


def read_pairs(records: RecordSet, size: DiffusionConfig, workers: int) -> tuple[Tensor, list[tuple[int, str]], str]:
    """Images (N, 3, H, W) uint8, every pair (number of the image, caption), and a hash of both."""
    images = read_images([record.path for record in records.records], size, workers)
    pairs = [(i, caption) for i, record in enumerate(records.records) for caption in record.captions]
    captions = ["\n".join(record.captions).encode() + b"\0" for record in records.records]
    return images, pairs, checkpoint.digest_of([images.numpy(), *captions])


# ---- the base

def base_file(config: AdaptConfig) -> Path:
    """The file of the base: that of --base, else the shipped one of this size, else the one that is trained."""
    shipped = Path(__file__).parents[1] / f"diffusion/base-{config.size}.safetensors"
    if config.base or shipped.exists():
        return Path(config.base or shipped)
    return Path(TRAINED.format(config.size))


def source_folder(config: AdaptConfig) -> str:
    """The folder of the source set; empty for the demo town's."""
    return str(Path(config.source).resolve()) if config.source else ""


def train_base(config: AdaptConfig, records: RecordSet, machine: Machine) -> None:
    """Autoencoder, then denoiser, on the source's records alone; one file holds both."""
    recipe, size = DAD_RECIPES[config.size], DIFFUSION_PRESETS[config.size]
    path = Path(TRAINED.format(config.size))
    images, captions, contents = read_pairs(records, size, config.workers)
    tokenizer, folder = Tokenizer.read(), path.parent
    key = {"size": asdict(size), "source": records.name, "root": source_folder(config), "images": len(images),
           "captions": len(captions), "contents": contents, "seed": config.seed}
    if path.exists():       # entries of `key` alone are compared, without the size: the file's counts its vocabulary
        was = checkpoint.load(path)[1]
        advice = "move it away to train another, or use it by --base"
        checkpoint.same_key(path, was, was | key | {"size": was.get("size")}, machine.say, advice)
    torch.manual_seed(config.seed)
    base = Diffusion.new(replace(size, vocab=len(tokenizer)), tokenizer).to(machine.device)
    machine.say(f"Training the {config.size} base on {len(images)} images with {len(captions)} captions.")
    some = images[:SCALE_IMAGES]
    base.autoencoder.start(random_light(to_float(some), LIT, torch.Generator().manual_seed(0)).to(machine.device))
    learn("autoencoder", base.autoencoder, lambda: partial(autoencoder_loss, base, images), recipe.autoencoder, folder,
          key, machine)
    base.autoencoder.learn_scale(encode(base.autoencoder, some))
    if config.compile:
        base.denoiser.compile()
    learn("denoiser", base.denoiser, lambda: LatentPairs(base, images, captions).loss, recipe.denoiser, folder, key,
          machine)
    facts = key | {"size": asdict(base.config), "vocab": tokenizer.pieces, "versions": checkpoint.VERSIONS}
    machine.on_rank_0(lambda: checkpoint.save(path, checkpoint.weights(base, half=True), facts))
    machine.say(f"{path} is ready: give it to adapt.py as --base.")


def autoencoder_loss(base: Diffusion, images: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """The autoencoder's loss on `count` random images of (N, 3, H, W), three of four under a random light."""
    chosen = torch.randint(len(images), (count,), generator=generator, device=generator.device).cpu()
    lit = random_light(to_float(images[chosen].to(generator.device)), LIT, generator)
    noise = torch.randn(count, *base.config.shape, generator=generator, device=generator.device)
    return base.autoencoder.loss(lit, noise)


def load_base(config: AdaptConfig, machine: Machine) -> Diffusion:
    """The pretrained base, frozen. Raises UserError for a missing file, or one of another size."""
    size = DIFFUSION_PRESETS[config.size]
    if config.weights:
        base, told = read_stable(Path(config.weights), size), f"{config.weights}, Stable Diffusion"
    else:
        path = base_file(config)
        tensors, facts = checkpoint.load(path)
        with checkpoint.trusting(path):
            tokenizer = Tokenizer(facts["vocab"], path)
            base = Diffusion.new(checkpoint.config_of(DiffusionConfig, facts["size"], tokenizer), tokenizer)
            checkpoint.restore_weights(base, tensors, path)
        if base.config.shape != size.shape:
            raise UserError(f"{path} was trained with another --size than {config.size}; say so here too.")
        source = facts.get("root") or facts.get("source")       # the folder of a set that is not drawn
        trained_here = not config.base and path == Path(TRAINED.format(config.size))
        if trained_here and facts.get("root") != source_folder(config):
            raise UserError(f"{path} was trained on {printable(source)}, not on {config.source or 'the demo town'}: "
                            "name it by --base to use it, or move it away to train another.")
        told = f"{path}, trained on {printable(facts.get('images'))} images of {printable(source)}"
    machine.say(f"Base: {told}.")
    return base.to(machine.device).eval().requires_grad_(False)


# ---- what learns the target

@dataclass(frozen=True)
class Target:
    """The target's training pairs, and the folder and the key of all networks that learn from them."""

    images: Tensor                      # (N, 3, H, W) uint8
    captions: list[tuple[int, str]]     # (number of the image, caption)
    labelled: bool                      # False: every caption is empty
    folder: Path
    key: dict

    @staticmethod
    def of(config: AdaptConfig, records: RecordSet, base: Diffusion) -> "Target":
        """Read the images. A caption that all share is dropped. Raises UserError for fewer than two images."""
        if len(records.records) < 2:
            raise UserError(f"{records.name} has fewer than two training images, so no look can be learned.")
        labelled = len({caption for record in records.records for caption in record.captions}) > 1
        if not labelled:        # a branch would learn to ignore the words
            records = replace(records, records=[replace(record, captions=("",)) for record in records.records])
        images, captions, contents = read_pairs(records, base.config, config.workers)
        name = config.target if config.target in TARGETS else f"{Path(config.target).name}-{contents[:6]}"
        name += f"-{config.size}-s{config.seed}" + ("-real" if config.data_root else "")
        if config.share < 1:
            name += f"-{config.share:g}"
        key = {"target": records.name, "contents": contents, "base": checkpoint.digest(base), "seed": config.seed}
        return Target(images, captions, labelled, Path("out/dad") / name, key)


def adapt_autoencoder(config: AdaptConfig, base: Diffusion, target: Target, machine: Machine) -> Diffusion:
    """The base with an autoencoder for the target: its scale, then a decoder that gives its blur and grain.

    Latents of the target's images get mean 0 and variance 1. The decoder is not in the paper: without it half of what
    tells made images from the target's comes from there. Stable Diffusion's autoencoder stays, as in the paper.
    """
    if base.config.stable:
        return base
    autoencoder, images = copy.deepcopy(base.autoencoder).requires_grad_(False), target.images
    autoencoder.learn_scale(encode(autoencoder, images))
    for part in (autoencoder.decoder, autoencoder.linear_out):
        part.requires_grad_(True)
    learn("decoder", autoencoder, lambda: partial(decoder_loss, autoencoder, images, encode(autoencoder, images)),
          DAD_RECIPES[config.size].decoder, target.folder, target.key, machine)
    adapted = Diffusion(base.config, base.tokenizer, autoencoder, base.denoiser, base.schedule)
    return adapted.eval().requires_grad_(False)


def decoder_loss(network: nn.Module, images: Tensor, latents: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Of the decoder of an autoencoder, on `count` of the images (N, 3, H, W) and their latents (N, C, h, w)."""
    chosen = torch.randint(len(latents), (count,), generator=generator, device=generator.device)
    return network.decoder_loss(to_float(images[chosen.cpu()].to(generator.device)), latents[chosen])


def train_branch(config: AdaptConfig, base: Diffusion, target: Target, machine: Machine) -> Denoiser:
    """Train the branch on the target's pairs; returns the adapted denoiser, which is called as the base is."""
    recipe, captions = DAD_RECIPES[config.size], target.captions
    told = f"{len(captions)} captions" if target.labelled else "no captions: the source's will be used"
    machine.say(f"Adapting to {target.key['target']}: {len(target.images)} images, {told}.")
    torch.manual_seed(config.seed)
    if config.rank:
        network, branch = low_rank_branch(base.denoiser, config.rank)
        adapted, kind = network.to(machine.device), f"low-rank-{config.rank}"
    else:
        network, branch = base.denoiser, DomainBranch(base.denoiser).to(machine.device)
        adapted, kind = partial(network, branch=branch), "trainable-copy"
    if config.compile:      # at its first call; merged, it is compiled anew
        network.compile()

    def prepare() -> Loss:
        pairs = LatentPairs(base, target.images, captions)
        with machine.autocast():
            pairs.encode_captions(torch.bfloat16 if machine.precision == "bf16" else torch.float32)
        return partial(pairs.loss, adapted=adapted)

    steps = config.steps or recipe.branch.steps or math.ceil(recipe.epochs * len(captions) / recipe.branch.batch)
    fit, folder = replace(recipe.branch, steps=steps), target.folder / f"{kind}-{steps}"
    learn("branch", branch, prepare, fit, folder, target.key | {"rank": config.rank}, machine)
    branch.eval().requires_grad_(False)
    if config.rank:
        merge(network)
    return adapted


def train_judge(config: AdaptConfig, base: Diffusion, target: Target, machine: Machine) -> Judge:
    """A judge of malformed people: half of the target's images teach it, a quarter sets its threshold."""
    torch.manual_seed(config.seed)
    learned, others, _ = split_for_judge(target.images)
    judge = Judge(base)

    def prepare() -> Loss:
        damaged = [judge.features(distort(learned, DAMAGE, seed)) for seed in range(2)]
        return partial(judge_loss, judge.head, judge.features(learned), torch.cat(damaged))

    learn("judge", judge.head.to(machine.device), prepare, DAD_RECIPES[config.size].judge, target.folder, target.key,
          machine)
    judge.head.eval()
    judge.whole = judge.log_odds(others).sort().values
    return judge
