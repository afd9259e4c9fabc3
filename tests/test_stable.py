"""Stable Diffusion 1.5 in our modules, against values that diffusers and transformers gave.

tests/assets/stable.npz was made on the CPU in float32 by diffusers 0.42.1 and transformers 5.24.0 (torch 2.14.1), which
the tests do not need: UNet2DConditionModel, AutoencoderKL, CLIPTextModel, CLIPTokenizer and DDIMScheduler with the
sizes of the preset sd15-tiny and every tensor made by `filled` below, from its name. Beside them are the names and
shapes of all tensors of these models, at that size and in full. The schedulers: scaled_linear, trailing,
set_alpha_to_one, no clipping; 20 steps at guidance 7.5.
"""

import dataclasses
import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_commands import command, succeed
from torch import Tensor, nn

from mra.config import DAD_RECIPES, DIFFUSION_PRESETS, DadRecipe, DiffusionConfig, Fit, UserError
from mra.diffusion import pairs
from mra.diffusion.base import Diffusion
from mra.diffusion.denoiser import Denoiser, DomainBranch
from mra.diffusion.noising import ddim
from mra.diffusion.sampling import guide
from mra.formats.read import load
from mra.run import checkpoint
from mra.weights import files
from mra.weights.clip import CausalTextEncoder
from mra.weights.stable import StableAutoencoder, read_stable

DIFFUSION_PRESETS["sd15-tiny"] = DiffusionConfig(
    128, 64, 1, (32, 32, 64, 64), 4, (32, 64, 96, 96), 4, 32, 2, 4, positions=77, max_tokens=77, stable=True)
DAD_RECIPES["sd15-tiny"] = DadRecipe(branch=Fit(0, 4, 1e-3), judge=DAD_RECIPES["tiny"].judge, epochs=1, flags=dict(
    sampling_steps=2, guidance_from=0.0, guidance_to=1.0))
GOLDEN = np.load(Path(__file__).with_name("assets") / "stable.npz")
MERGES = ["r e", "re d</w>", "c o", "co a", "coa t</w>", "j e", "a n", "je an", "jean s</w>", "b l", "bl a", "c k</w>",
          "bla ck</w>", "w o", "wo m", "wom a", "woma n</w>", "m a", "ma n</w>", "' s</w>", "l e", "le f", "lef t</w>",
          "s h", "sh i", "shi r", "shir t</w>", "c a", "ca f", "caf Ã", "cafÃ ©</w>"]
WORDS = ["a woman in a red coat with black jeans", "",
         "The MAN's  red\tshirt,\nleft-hand 1612 !!! cafe\u0301 CAFÉ",
         "日本 🙂 it's 'round the woman’s coat; they'll we've \x00 x_y", "red " * 100]
FILE = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def array(name: str, *shape: int) -> Tensor:
    """Numbers of a normal distribution that only the name decides."""
    return torch.from_numpy(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))


def shapes(which: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of unet, vae and text_encoder."""
    found = {part: {} for part in FILE}
    for part, name, shape in (line.split() for line in str(GOLDEN[which]).split("\n")):
        found[part][name] = tuple(map(int, shape.split("x")))
    return found


def filled(name: str, shape: tuple[int, ...]) -> Tensor:
    """Matrices that keep a variance, norms near 1, small biases."""
    if len(shape) > 1:
        return array(name, *shape) / np.prod(shape[1:]) ** 0.5
    return 0.1 * array(name, *shape) + name.endswith(tuple(f"norm{x}.weight" for x in ("", "1", "2", "3", "_out")))


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights in the layout of diffusers."""
    folder = tmp_path_factory.mktemp("weights")
    write_tokenizer(folder / "tokenizer")
    for part, tensors in shapes("tiny_keys").items():
        (folder / part).mkdir()
        save_file({name: filled(name, shape) for name, shape in tensors.items()},
                  folder / part / f"{FILE[part]}.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(folder) -> Diffusion:
    return read_stable(folder, DIFFUSION_PRESETS["sd15-tiny"]).eval().requires_grad_(False)


def off(ours: Tensor, name: str) -> float:
    """The largest difference from a golden array, as a multiple of that array's standard deviation where above 1."""
    golden = torch.from_numpy(GOLDEN[name])
    assert ours.shape == golden.shape
    return float((ours - golden).abs().max() / golden.std().clamp(min=1))


def test_everything_agrees_with_diffusers(base):
    prompt = base.encode_text(WORDS[:3])
    assert off(prompt.states[:2], "states") < 1e-4 and prompt.keep.all()
    z, t = array("z", 2, 4, 16, 8), torch.tensor([17, 980])
    assert off(base.denoiser(z, t, prompt[[0, 2]]), "unet") < 1e-4
    assert off(base.autoencoder.encode(array("image", 1, 3, 128, 64).clamp(-1, 1)), "encoded") < 1e-4
    assert off(base.autoencoder.decode(array("latents", 1, 4, 16, 8))[:, :, ::2, ::2], "decoded") < 1e-4


def test_a_guided_trajectory_agrees_with_diffusers(base):
    assert off(base.schedule.alpha[::37], "alpha") < 1e-5 and base.schedule.predicts_noise
    denoise = guide(base.denoiser, base.encode_text([WORDS[0], ""]), 7.5)
    assert off(ddim(denoise, array("noise", 1, 4, 16, 8), base.schedule, 20), "ddim") < 1e-4


@pytest.mark.parametrize("number", range(len(WORDS)))
def test_token_ids_agree_with_clip(base, number):
    ids = base.tokenizer.encode(WORDS[number], 77)
    assert ids + [base.tokenizer.pad_id] * (77 - len(ids)) == GOLDEN["ids"][number].tolist()
    assert all(base.tokenizer.pieces[i].endswith("</w>") for i in ids[-2:-1] if i != ids[0])
    assert [base.tokenizer.pieces[i] for i in (ids[0], ids[-1])] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(base.tokenizer) == len(base.tokenizer.pieces) and base.tokenizer.unk_id not in ids


def test_names_shapes_and_counts_in_full(monkeypatch):
    config = dataclasses.replace(DIFFUSION_PRESETS["sd15"], vocab=49408)
    with torch.device("meta"):
        denoiser, autoencoder = Denoiser(config, CausalTextEncoder(config)), StableAutoencoder(config)
        branch = DomainBranch(denoiser)
    text = nn.ModuleDict({"text_encoder": denoiser.text_encoder})
    del denoiser.text_encoder
    for part, model, count, *kinds in (("unet", denoiser, 859_520_964, "unet"),
                                       ("vae", autoencoder, 83_653_863, "vae"),
                                       ("text_encoder", text, 123_060_480, "prompt", "clip text")):
        theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes("full_keys")[part].items()}
        monkeypatch.setattr(files, "read", lambda path: theirs)
        named = files.named(files.read(Path(part)), Path(part), *kinds)
        found = {name: tensor.shape for name, tensor in named.items()}
        assert found == {name: tensor.shape for name, tensor in checkpoint.weights(model).items()}
        assert sum(math.prod(shape) for shape in found.values()) == count
    assert len(branch.outputs) == 13 and sum(p.numel() for p in branch.parameters()) == 360_192_640


def with_part(folder: Path, to: Path, part: str, tensors: dict[str, Tensor], name: str = "") -> Path:
    """The folder with other tensors in one of its parts."""
    to.mkdir()
    for own in folder.iterdir():
        if own.name != part:
            (to / own.name).symlink_to(own)
    (to / part).mkdir()
    save_file(tensors, to / part / f"{name or FILE[part]}.safetensors")
    return to


def test_older_files_and_half_precision(base, folder, tmp_path):
    text = load_file(folder / "text_encoder/model.safetensors")
    older = {f"text_model.{name}": tensor for name, tensor in text.items()}
    older["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    to = with_part(folder, tmp_path / "a", "text_encoder", older)
    vae = {}
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        vae[name] = tensor.half()
    to = with_part(to, tmp_path / "b", "vae", vae, "diffusion_pytorch_model.fp16")
    again = checkpoint.weights(read_stable(to, DIFFUSION_PRESETS["sd15-tiny"]))
    for name, tensor in checkpoint.weights(base).items():
        assert torch.equal(again[name], tensor.half().float() if name.startswith("autoencoder.") else tensor)


def test_weights_that_do_not_fit_are_refused(folder, tmp_path):
    whole = load_file(folder / "text_encoder/model.safetensors")
    bias = "encoder.layers.1.mlp.fc1.bias"
    for i, (change, said) in enumerate((({bias: None}, "text_encoder.blocks.1.mlp.0.bias first"),
                                        ({"logit_scale": torch.ones(1)}, "unknown: 1, text_encoder.logit_scale first"),
                                        ({bias: torch.zeros(7)}, "Tensors of another shape: 1, text_encoder"))):
        tensors = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        with pytest.raises(UserError, match=f"text_encoder.* {said}"):
            read_stable(with_part(folder, tmp_path / str(i), "text_encoder", tensors), DIFFUSION_PRESETS["sd15-tiny"])
    more = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    more["down_blocks.0.norms.0.bias"] = torch.ones(1)
    with pytest.raises(UserError, match=r"unet does not fit .* unknown: 1, down_blocks\.0\.norms"):
        read_stable(with_part(folder, tmp_path / "more", "unet", more), DIFFUSION_PRESETS["sd15-tiny"])
    with pytest.raises(UserError, match="no readable vocabulary of CLIP, merges.txt or"):
        read_stable(tmp_path / "nowhere", DIFFUSION_PRESETS["sd15-tiny"])
    write_tokenizer(tmp_path / "bare/tokenizer")
    with pytest.raises(UserError, match="bare/unet: no such file of weights"):
        read_stable(tmp_path / "bare", DIFFUSION_PRESETS["sd15-tiny"])


def gradients(base: Diffusion, branch: DomainBranch, data: pairs.LatentPairs) -> list[Tensor]:
    loss = data.loss(torch.Generator().manual_seed(3), 3, partial(base.denoiser, branch=branch))
    return [loss, *torch.autograd.grad(loss, list(branch.parameters()))]


def test_cached_states_change_nothing(folder, monkeypatch):
    monkeypatch.setattr(pairs, "NO_WORDS", 0.5)
    base = read_stable(folder, DIFFUSION_PRESETS["sd15-tiny"]).eval().requires_grad_(False)
    branch = DomainBranch(base.denoiser)
    for parameter in branch.outputs.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    images = (array("images", 2, 3, 128, 64) * 50 + 128).clamp(0, 255).to(torch.uint8)
    data = pairs.LatentPairs(base, images, [(0, "a red coat"), (1, "a red coat"), (1, "black on his left")])
    assert len(data.ids) == 4 and len(data.caption_of) == 7      # one is mirrored in other words; and without words
    plain = gradients(base, branch, data)
    data.encode_captions(torch.float32)
    for one, other in zip(plain, gradients(base, branch, data), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


# ---- adapt.py

def test_adapt_beside_stable_diffusion(folder, root):
    flags = ("--size", "sd15-tiny", "--weights", str(folder), "--target", "cuhk", "--data-root", str(root),
             "--images", "3", "--malformed", "0", "--grey-mean", "0", "--out", "out/made")
    said = succeed(root, "adapt.py", *flags)
    for words in ("Stable Diffusion", "6 images, 12 captions", "branch step 3/3", "Kept 3 of 3",
                  "All regions are whole images: no phrase has a box."):
        assert words in said
    assert '"sampling_steps": 2,' in said                                  # the preset's, not the demo's
    records = [record for split in ("train", "val") for record in
               load(str(root / "out/made"), split, root, say=lambda line: None).records]
    assert len(records) == 3 and all(record.boxes == ((0.5, 0.5, 1, 1),) for record in records)
    assert all(record.phrases == record.captions for record in records)
    branch = root / "out/dad/cuhk-sd15-tiny-s0-real/trainable-copy-3/branch.safetensors"
    assert checkpoint.load(branch)[0]["outputs.12.weight"].any()
    said = succeed(root, "adapt.py", *flags[:-1], "out/short", "--steps", "1")
    assert "Kept 3 of 3" in said and "branch step 1/1" in said


@pytest.mark.parametrize("flags, said", [
    (("--size", "sd15"), "--weights"), (("--weights", "."), "--size sd15"),
    (("--size", "sd15", "--weights", "."), "a real target"),
    (("--size", "sd15", "--weights", ".", "--data-root", ".", "--mode", "restyle"), "needs --source"),
    (("--size", "sd15", "--weights", "nowhere", "--data-root", "."), "nowhere/tokenizer"),
])
def test_mistakes_are_told_in_a_sentence(tmp_path, flags, said):
    status, _, err = command(tmp_path, "adapt.py", *flags)
    assert status == 2 and said in err and err.count("\n") == 1
