"""DaD's networks, samplers and loop against known answers."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch
from PIL import Image

from mra.config import DIFFUSION_PRESETS, AdaptConfig, Fit, UserError
from mra.data.records import Record, RecordSet
from mra.diffusion.base import Diffusion, decode, encode, to_float
from mra.diffusion.denoiser import DomainBranch, TextStates, low_rank_branch, merge
from mra.diffusion.noising import Schedule, ddim, diffusion_loss, dpm_solver, q_sample
from mra.diffusion.pairs import LatentPairs
from mra.diffusion.sampling import guide
from mra.group import Group
from mra.run import checkpoint
from mra.run.machine import Machine
from mra.run.networks import Target, adapt_autoencoder, learn

CAPTIONS = ["a woman in a red coat with a black bag", "a man", "a lady in blue jeans and a white top"]
SCHEDULE = Schedule.cosine()
MACHINE = Machine(torch.device("cpu"), "float32", Group())


@pytest.fixture(scope="module")
def size(tokenizer):
    return dataclasses.replace(DIFFUSION_PRESETS["tiny"], vocab=len(tokenizer))


@pytest.fixture
def base(size, tokenizer) -> Diffusion:
    """A base whose zero-initialised parts are random, so that everything has an effect."""
    torch.manual_seed(0)
    base = Diffusion.new(size, tokenizer).eval()
    with torch.no_grad():
        for parameter in base.denoiser.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return base


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---- noising and samplers

def test_the_schedule_ends_in_pure_noise():
    assert SCHEDULE.alpha[-1] == 0 and SCHEDULE.sigma[-1] == 1 and SCHEDULE.alpha[0] > 0.999
    assert torch.allclose(SCHEDULE.alpha**2 + SCHEDULE.sigma**2, torch.ones(1000))
    assert SCHEDULE.trailing(4) == [999, 749, 499, 249] and SCHEDULE.trailing(4, 0.5) == [499, 249]
    assert SCHEDULE.trailing(4, 0.01) == [249]             # some noise is at least one level
    assert SCHEDULE.trailing(4, 0.0) == [] and len(SCHEDULE.trailing(1000)) == 1000


def test_noised_latents_keep_their_variance():
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 50_000, 1)
    for level in (0, 300, 700, 999):
        z = q_sample(latents, noise, torch.full((50_000,), level), SCHEDULE)
        assert z.var() == pytest.approx(1, abs=0.02)
        slope = (z * latents).mean() / (latents**2).mean()
        assert slope == pytest.approx(float(SCHEDULE.alpha[level]), abs=0.02)


MEAN, COVARIANCE = torch.tensor([1.0, -0.5]), torch.tensor([[0.5, 0.3], [0.3, 0.4]])


def exact_denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """v for data from the normal distribution above: E[z_0 | z_t] and E[e | z_t] are linear in z_t."""
    alpha, sigma = SCHEDULE.alpha[t[0]].double(), SCHEDULE.sigma[t[0]].double()
    mean, covariance = MEAN.double(), COVARIANCE.double()
    away = z.double() - alpha * mean
    solved = torch.linalg.solve(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64), away.T).T
    return alpha * sigma * solved - sigma * (mean + alpha * solved @ covariance)


def error_of(sampler, steps: int) -> float:
    """Largest error of a sampler's mean and covariance, which are linear in the noise: exact, no sampling error."""
    ends = sampler(exact_denoise, torch.cat([torch.zeros(1, 2), torch.eye(2)]).double(), SCHEDULE, steps)
    matrix = ends[1:] - ends[0]
    return float(torch.maximum((ends[0] - MEAN).abs().max(), (matrix.T @ matrix - COVARIANCE).abs().max()))


def test_ddim_converges_to_the_distribution():
    errors = [error_of(ddim, steps) for steps in (10, 50, 250)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.01


def test_dpm_solver_needs_fewer_steps():
    assert error_of(dpm_solver, 20) < error_of(ddim, 60)
    assert error_of(dpm_solver, 200) < 0.01


def test_samplers_agree_on_one_step():
    noise = torch.randn(3, 2)
    assert torch.equal(ddim(exact_denoise, noise, SCHEDULE, 1), dpm_solver(exact_denoise, noise, SCHEDULE, 1))


def test_the_loss_of_a_perfect_and_of_a_blind_denoiser():
    torch.manual_seed(0)
    latents, noise, t = torch.randn(400, 4), torch.randn(400, 4), torch.randint(1000, (400,))
    alpha, sigma = SCHEDULE.alpha[t, None], SCHEDULE.sigma[t, None]
    assert diffusion_loss(lambda z, t: alpha * noise - sigma * latents, latents, noise, t, SCHEDULE) < 1e-12
    assert diffusion_loss(lambda z, t: torch.zeros_like(z), latents, noise, t, SCHEDULE) == pytest.approx(1, abs=0.1)


# ---- the networks

def test_the_autoencoder_owns_its_scale(base, images):
    images, unscaled = torch.cat([images] * 10), copy.deepcopy(base.autoencoder)
    for _ in range(2):
        base.autoencoder.learn_scale(encode(base.autoencoder, images))
    latents = encode(base.autoencoder, images)
    assert latents.shape == (50, *base.config.shape)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    mean, _ = base.autoencoder.posterior(images[:2].float() / 127.5 - 1)
    assert torch.allclose(base.autoencoder.decode(latents[:2]), unscaled.decode(mean), atol=1e-5)
    assert (base.autoencoder.std != 1).all()


def test_a_new_autoencoder_is_the_principal_components_of_patches(base):
    torch.manual_seed(0)
    axes, parts = torch.randn(4, 3, 4, 4), torch.randn(20, 4, 8, 4)        # as many axes as latents: nothing is lost
    images = torch.einsum("kcyx,bkij->bciyjx", axes, parts).reshape(20, 3, 32, 16)
    base.autoencoder.start(images)
    mean, log_variance = base.autoencoder.posterior(images)
    assert torch.allclose(mean.transpose(0, 1).flatten(1).cov(), torch.eye(4), atol=1e-3)
    assert torch.allclose(base.autoencoder.decode(mean), images, atol=1e-3) and (log_variance == -6).all()


def test_grain_is_learned_as_the_size_of_what_is_missed(base, images):
    autoencoder, size = base.autoencoder, 0.1
    autoencoder.start(images.float() / 127.5 - 1)
    flat, draw = torch.zeros(64, 3, 32, 16), torch.Generator().manual_seed(0)
    for parameter in [autoencoder.linear_in[1].weight, *autoencoder.linear_out.parameters()]:
        torch.nn.init.zeros_(parameter)                             # it can say nothing but grey ...
    grain = autoencoder.decoder[-2].bias
    optimizer = torch.optim.Adam([grain], 0.05)
    for _ in range(120):
        noisy = flat + size * torch.randn(flat.shape, generator=draw)
        optimizer.zero_grad()
        autoencoder.loss(noisy, torch.zeros(64, *base.config.shape)).backward()
        grain.grad.unflatten(0, (6, -1))[:3] = 0                    # ... and only learns how far off that is
        optimizer.step()
    with torch.no_grad():
        made = autoencoder.decode(torch.zeros(64, *base.config.shape), torch.randn(flat.shape, generator=draw))
        assert made.std() == pytest.approx(size * (2 / math.pi) ** 0.5, rel=0.05)
        assert not autoencoder.decode(torch.zeros(1, *base.config.shape)).any()       # none where none is asked for


def test_a_branch_is_made_on_the_device_of_its_base(base, size):
    """The device "meta" stands for a GPU: its tensors do not mix with the CPU's. networks.py moves the copy there."""
    denoiser = base.denoiser.to("meta").requires_grad_(False)
    latents, t = torch.zeros(4, *size.shape, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    keep = torch.ones(4, 7, dtype=torch.bool, device="meta")
    text = TextStates(torch.zeros(4, 7, size.text_dim, device="meta"), keep)
    adapted, added = low_rank_branch(denoiser, 2)
    copied = DomainBranch(denoiser).to("meta")
    for network, branch in ((adapted, added), (partial(denoiser, branch=copied), copied)):
        diffusion_loss(lambda z, t: network(z, t, text), latents, latents, t, base.schedule).backward()
        assert all(parameter.grad.is_meta for parameter in branch.parameters())


@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_denoiser_in_the_layout_of_stable_diffusion(preset, tokenizer):
    size = dataclasses.replace(DIFFUSION_PRESETS[preset], vocab=len(tokenizer))
    base = Diffusion.new(size, tokenizer)
    levels = len(size.widths)
    assert len(base.denoiser.encoder.stages) == 3 * levels - 1 and len(base.denoiser.stages) == 3 * levels
    lowest = [stage.transformer for stage in base.denoiser.encoder.stages[-2:]]
    assert lowest == [None, None] and base.denoiser.encoder.stages[0].transformer is not None
    z, prompt = torch.randn(3, *size.shape), base.encode_text(CAPTIONS)
    v = base.denoiser(z, torch.tensor([0, 500, 999]), prompt)
    assert v.shape == z.shape and not v.any()                      # a new denoiser predicts 0
    assert torch.isfinite(base.autoencoder.decode(z)).all() and base.autoencoder.decode(z).shape[1:] == (
        3, size.height, size.width)


def test_words_noise_level_and_padding(base):
    torch.manual_seed(0)
    z, t = torch.randn(1, *base.config.shape), torch.tensor([500])
    alone = base.denoiser(z, t, base.encode_text(CAPTIONS[:1]))
    beside = base.denoiser(z.repeat(3, 1, 1, 1), t.repeat(3), base.encode_text([CAPTIONS[0], *CAPTIONS[1:]]))
    padded = base.denoiser(z.repeat(2, 1, 1, 1), t.repeat(2), base.encode_text([CAPTIONS[1], CAPTIONS[2]]))
    assert torch.allclose(beside[0], alone[0], atol=1e-5) and torch.allclose(beside[1], padded[0], atol=1e-5)
    assert (beside[0] - beside[2]).abs().max() > 1e-3              # other words, another v
    assert (base.denoiser(z, t - 400, base.encode_text(CAPTIONS[:1])) - alone).abs().max() > 1e-3


def test_a_new_branch_changes_nothing_and_a_trained_one_does(base):
    torch.manual_seed(0)
    branch, prompt = DomainBranch(base.denoiser), base.encode_text(CAPTIONS)
    z, t = torch.randn(3, *base.config.shape), torch.tensor([1, 500, 999])
    plain = base.denoiser(z, t, prompt)
    assert torch.equal(base.denoiser(z, t, prompt, branch), plain)
    assert len(branch.outputs) == 3 * len(base.config.widths) + 1
    for parameter in branch.outputs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert (base.denoiser(z, t, prompt, branch) - plain).abs().amax((1, 2, 3)).min() > 1e-3


def test_a_new_low_rank_branch_changes_nothing_and_all_of_its_parts_can(base):
    torch.manual_seed(0)
    (adapted, branch), prompt = low_rank_branch(base.denoiser, 3), base.encode_text(CAPTIONS)
    z, t = torch.randn(3, *base.config.shape), torch.tensor([1, 500, 999])
    torch.nn.init.normal_(base.denoiser.last[-1].weight, std=0.1)
    adapted.last[-1].parametrizations.weight.original.data.copy_(base.denoiser.last[-1].weight)
    plain = base.denoiser(z, t, prompt)
    assert torch.equal(adapted(z, t, prompt), plain)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    zeros = [part.last if hasattr(part, "last") else part.by for part in branch]
    assert len(trained) == len(list(branch.parameters())) == len(zeros) + sum(zero.dim() == 2 for zero in zeros)
    for number, zero in enumerate(zeros):
        torch.nn.init.normal_(zero, std=0.1)
        assert not torch.equal(adapted(z, t, prompt), plain), number
        torch.nn.init.zeros_(zero)
    for zero in zeros:
        torch.nn.init.normal_(zero, std=0.1)
    changed = adapted(z, t, prompt)
    assert (changed - plain).abs().amax((1, 2, 3)).min() > 1e-3
    merge(adapted)
    assert checkpoint.weights(adapted).keys() == checkpoint.weights(base.denoiser).keys()
    assert torch.allclose(adapted(z, t, prompt), changed, atol=1e-5)
    assert torch.equal(base.denoiser(z, t, prompt), plain)


def test_captions_are_cut_at_what_the_base_can_read(tokenizer, images):
    size = dataclasses.replace(DIFFUSION_PRESETS["tiny"], vocab=len(tokenizer), max_tokens=10, positions=10)
    base = Diffusion.new(size, tokenizer)
    pairs = LatentPairs(base, images, [(0, "a man in a red coat, " * 9)])
    assert pairs.ids.shape[1] == 10 and pairs.ids[0, -1] == tokenizer.sep_id


@pytest.mark.parametrize("rank", [0, 2])
def test_training_the_branch_leaves_the_base_alone(base, images, tmp_path, rank):
    base.requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    if rank:
        adapted, branch = low_rank_branch(base.denoiser, rank)
    else:
        branch = DomainBranch(base.denoiser)
        adapted = partial(base.denoiser, branch=branch)
    pairs = LatentPairs(base, images, [(i, CAPTIONS[i % 3]) for i in range(5)])
    first = {name: value.clone() for name, value in branch.state_dict().items()}
    learn("branch", branch, lambda: partial(pairs.loss, adapted=adapted), Fit(4, 8, 1e-2),
          tmp_path, {"seed": 0}, MACHINE)
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in branch.parameters())
    still = [name for name, value in branch.state_dict().items() if torch.equal(first[name], value)]
    assert not still


def test_a_target_without_captions_teaches_no_words(base, images, tmp_path):
    records = []
    for number, image in enumerate(images):
        path = tmp_path / f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        records.append(Record(str(path), ("a person",), number))
    config = AdaptConfig(target="cuhk", size="tiny")
    target = Target.of(config, RecordSet("a test", "train", records), base)
    assert not target.labelled and target.captions == [(number, "") for number in range(len(images))]
    records[0] = dataclasses.replace(records[0], captions=("a person", "a man"))
    target = Target.of(config, RecordSet("a test", "train", records), base)
    assert target.labelled and target.captions[:3] == [(0, "a person"), (0, "a man"), (1, "a person")]


def test_of_a_target_without_captions_the_base_knows_the_words(base):
    torch.manual_seed(0)
    branch, both = DomainBranch(base.denoiser), base.encode_text([*CAPTIONS, "", "", ""])
    adapted = partial(base.denoiser, branch=branch)
    z, t = torch.randn(3, *base.config.shape), torch.full((3,), 700)
    usual = guide(adapted, both, 3)(z, t)
    assert torch.allclose(guide(adapted, both, 3, base=base.denoiser)(z, t), usual, atol=1e-5)      # it is untrained
    for parameter in branch.outputs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    look = base.denoiser(z, t, both[3:], branch)
    words, empty = base.denoiser(z, t, both[:3]), base.denoiser(z, t, both[3:])
    assert torch.allclose(guide(adapted, both, 3, base=base.denoiser)(z, t), look + 3 * (words - empty), atol=1e-5)
    outside = guide(adapted, both, 3, (0, 699), base.denoiser)(z, t)
    assert torch.allclose(outside, look + words - empty, atol=1e-5) and not torch.allclose(outside, look, atol=1e-3)


def test_the_autoencoder_gets_the_targets_scale_and_decoder(base, images, tmp_path):
    """The base keeps its own; latents stay those of the new scale."""
    dark = torch.cat([images // 3 + shift for shift in range(10)])
    base.requires_grad_(False)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    scaled = copy.deepcopy(base.autoencoder)
    scaled.learn_scale(encode(scaled, dark))
    adapted = adapt_autoencoder(AdaptConfig(size="tiny"), base, Target(dark, [], True, tmp_path, {"seed": 0}), MACHINE)
    learned, latents = adapted.autoencoder, encode(adapted.autoencoder, dark)

    def loss(autoencoder) -> float:
        with torch.no_grad():
            return float(autoencoder.decoder_loss(to_float(dark), latents))

    assert loss(learned) < loss(scaled) and not any(p.requires_grad for p in learned.parameters())
    assert latents.mean((0, 2, 3)).abs().max() < 1e-4 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    assert torch.equal(latents, encode(scaled, dark)) and adapted.denoiser is base.denoiser
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
    first = scaled.state_dict()
    changed = {name for name, value in learned.state_dict().items() if not torch.equal(first[name], value)}
    assert changed and all(name.startswith(("decoder", "linear_out")) for name in changed)
    assert {path.name for path in tmp_path.iterdir()} >= {"decoder.safetensors", "decoder.jsonl"}


def test_guidance_of_one_costs_and_changes_nothing(base):
    torch.manual_seed(0)
    branch, both = DomainBranch(base.denoiser), base.encode_text([*CAPTIONS, "", "", ""])
    for parameter in branch.outputs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prompt, nothing, passes = both[:3], both[3:], []
    z, t = torch.randn(3, *base.config.shape), torch.full((3,), 700)
    base.denoiser.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))

    def v(guidance: float, span: tuple = (0, 1000)) -> torch.Tensor:
        return guide(partial(base.denoiser, branch=branch), both, guidance, span)(z, t)

    words = base.denoiser(z, t, prompt, branch)
    empty = base.denoiser(z, t, nothing, branch)
    assert torch.equal(v(1), words) and passes == [3, 3, 3]
    assert torch.allclose(v(3), empty + 3 * (words - empty), atol=1e-5) and passes[-1] == 6
    assert torch.equal(v(3, (700, 700)), v(3))
    assert torch.equal(v(3, (0, 699)), words) and torch.equal(v(3, (701, 1000)), words)


def test_levels_are_drawn_evenly_and_each_as_often():
    def levels(**given) -> torch.Tensor:
        draws = [SCHEDULE.random_levels(10, torch.Generator().manual_seed(seed), **given) for seed in range(400)]
        return torch.stack(draws)       # (400, 10)

    drawn = levels()
    assert all(set((row // 100).tolist()) == set(range(10)) for row in drawn)
    assert 450 < drawn[:, 0].float().mean() < 550 and 0 <= drawn.min() < 5 and 995 <= drawn.max() < 1000
    found = torch.quantile(levels(logit_normal=True).flatten().float(), torch.tensor([0.1, 0.5, 0.9]))
    assert torch.allclose(found, 1000 * torch.tensor([-1.2816, 0, 1.2816]).sigmoid(), atol=15)


def test_strength_zero_gives_the_reconstruction(base, images):
    latents = encode(base.autoencoder, images)
    assert torch.equal(dpm_solver(None, latents, SCHEDULE, 20, 0.0), latents)
    assert decode(base.autoencoder, latents, torch.Generator()).shape == images.shape


def test_cached_latents_and_mirror_images_give_the_same_loss(base, images):
    captions = [(i, f"{CAPTIONS[i % 3]} in the left hand") for i in range(5)]
    pairs = LatentPairs(base, images, captions)
    cached = pairs.loss(torch.Generator().manual_seed(3), 64)
    draw = torch.Generator().manual_seed(3)                        # the same draws, everything made anew
    pair = torch.randint(10, (64,), generator=draw)
    dropped = torch.rand(64, generator=draw) < 0.1
    t = SCHEDULE.random_levels(64, draw)
    noise = torch.randn(64, *base.config.shape, generator=draw)
    made = torch.stack([images[i % 5].flip(-1) if i >= 5 else images[i] for i in pair.tolist()])
    words = ["" if gone else captions[i % 5][1].replace("left", "right" if i >= 5 else "left")
             for i, gone in zip(pair.tolist(), dropped)]
    prompt = base.encode_text(words)
    latents = encode(base.autoencoder, made)
    uncached = diffusion_loss(lambda z, t: base.denoiser(z, t, prompt), latents, noise, t, SCHEDULE)
    assert cached.item() == pytest.approx(uncached.item(), rel=1e-5) and dropped.any()


# ---- the loop

def interrupt() -> None:
    raise KeyboardInterrupt


def fit_line(folder, steps: int, stop_at: int | None = None, seed: int = 0, lr: float = 0.1,
             stop: Callable = interrupt) -> torch.Tensor:
    """Fit one weight to 3; `stop` is called in the middle, after `stop_at` losses. Returns the weight."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    calls = []

    def loss(draw, count) -> torch.Tensor:
        calls.append(None)
        if stop_at and len(calls) > stop_at:
            stop()
        x = torch.randn(count, 1, generator=draw)
        return (model(x) - 3 * x).square().mean()

    learn("line", model, lambda: loss, Fit(steps, 8, lr, save_every=5), folder, {"of": "a test", "seed": seed}, MACHINE)
    return model.weight.detach().clone()


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path):
    whole = fit_line(tmp_path / "whole", 60)
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "cut", 60, stop_at=67)    # two shards a step
    assert checkpoint.load(tmp_path / "cut/line.part")[1]["step"] == 30
    assert torch.equal(fit_line(tmp_path / "cut", 60), whole) and abs(float(whole) - 3) < 0.2
    assert not (tmp_path / "cut/line.part").exists()
    assert torch.equal(fit_line(tmp_path / "cut", 60, stop_at=1), whole)      # finished: not trained again


def test_a_signal_stops_a_fit_after_its_step(tmp_path):
    before, whole = signal.getsignal(signal.SIGTERM), fit_line(tmp_path / "whole", 60)
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "cut", 60, stop_at=67, stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert checkpoint.load(tmp_path / "cut/line.part")[1]["step"] == 34
    assert torch.equal(fit_line(tmp_path / "cut", 60), whole)
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt):          # after the last step: it is finished, and nothing else is begun
        fit_line(tmp_path / "last", 60, stop_at=119, stop=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert torch.equal(fit_line(tmp_path / "last", 60, stop_at=1), whole)


def test_a_gradient_that_is_not_finite_stops_a_fit_before_it_is_saved(tmp_path):
    """Of step 10, whose loss is finite: what was saved after step 5 stays, and training goes on from there."""
    torch.manual_seed(0)
    model, calls = torch.nn.Linear(1, 1, bias=False), itertools.count(1)

    def loss(draw, count) -> torch.Tensor:
        number = next(calls)        # two halves, in threads, a step
        value = model(torch.randn(count, 1, generator=draw)).square().mean()
        if number == 19:
            value.register_hook(lambda gradient: gradient * math.nan)
        return value

    def train(name: str) -> None:
        learn("line", model, lambda: loss, Fit(20, 8, 0.1, save_every=5), tmp_path / name, {"seed": 0},
              MACHINE)

    with pytest.raises(UserError, match="line gradient is nan by step 10; what was saved"):
        train("x")
    tensors, facts = checkpoint.load(tmp_path / "x/line.part")
    assert facts["step"] == 5 and all(tensor.isfinite().all() for tensor in tensors.values())
    (tmp_path / "y").mkdir()
    for lost in ("average.weight", "optimizer.exp_avg.weight"):
        left = {name: value for name, value in tensors.items() if name != lost}
        checkpoint.save(tmp_path / "y/line.part", left, facts)
        with pytest.raises(UserError, match="line.part: its content is incomplete"):
            train("y")
    train("x")
    logged = [json.loads(line) for line in (tmp_path / "x/line.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [5, 10, 15, 20] and logged[0]["loss"] > logged[3]["loss"]
    assert model.weight.isfinite().all()


def test_an_unfinished_fit_goes_on_in_its_precision_with_as_many_samples(tmp_path, capsys):
    model = torch.nn.Linear(2, 1)

    def loss(draw, count):
        counts.append(count)
        if len(counts) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return model(torch.randn(count, 2, generator=draw)).square().mean()

    def train(machine: Machine, prepare=lambda: loss) -> None:
        learn("line", model, prepare, Fit(8, 8, 1e-2, save_every=5), tmp_path, {"seed": 0}, machine)

    counts = []
    with pytest.raises(KeyboardInterrupt):
        train(MACHINE)
    assert set(counts) == {4} and checkpoint.load(tmp_path / "line.part")[1]["step"] == 7
    train(MACHINE)
    assert "going on after step 7 of 8" in capsys.readouterr().out
    train(dataclasses.replace(MACHINE, precision="bf16"), None)         # what is finished serves any
    (tmp_path / "line.safetensors").unlink()
    counts = [0] * 20
    with pytest.raises(UserError, match="line: 3 processes cannot share out the 8 samples of a step"):
        three = Group()
        three.count = 3
        train(dataclasses.replace(MACHINE, group=three))


def test_an_unfinished_fit_of_another_precision_begins_anew(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, 20, stop_at=15)
    capsys.readouterr()
    model = torch.nn.Linear(1, 1, bias=False)
    learn("line", model, lambda: lambda draw, count: model(torch.randn(count, 1, generator=draw)).square().mean(),
          Fit(20, 8, 0.1, save_every=5), tmp_path, {"of": "a test", "seed": 0},
          dataclasses.replace(MACHINE, precision="bf16"))
    assert "line.part is made anew: precision was float32 and is bf16." in capsys.readouterr().out


def test_a_fit_of_another_key_is_made_anew_and_says_why(tmp_path, capsys):
    """What is there is kept until the new one is finished."""
    path = tmp_path / "line.safetensors"
    fit_line(tmp_path, 10)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path, 11, stop_at=15)
    assert "line.safetensors is made anew: fit.steps was 10 and is 11." in capsys.readouterr().out
    assert path.read_bytes() == before
    fit_line(tmp_path, 11)
    assert path.read_bytes() != before and checkpoint.load(path)[1]["key"]["fit"]["steps"] == 11
    capsys.readouterr()
    fit_line(tmp_path, 11, seed=1)
    assert "seed was 0 and is 1." in capsys.readouterr().out
    fit_line(tmp_path, 11, seed=1)
    assert f"{path} is complete and is used." in capsys.readouterr().out
