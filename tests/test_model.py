"""Layers against PyTorch's own, encoders and regions against loops, the walk of a pair from disk to loss."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mra import losses
from mra.config import PRESETS, TrainConfig
from mra.data.augment import box_to_patches
from mra.data.batches import Batch, PairDataset
from mra.data.tokenizer import MAX_MASKED
from mra.formats.read import load
from mra.layers import Attention, PostNormBlock, PreNormBlock
from mra.retriever import Objective, Retriever, pool_region
from mra.run import stages
from mra.weights.retrievers import make_retriever

CLOSE = dict(atol=1e-6, rtol=1e-6)


def randomised(module: nn.Module) -> nn.Module:
    """Normal weights of 0.2 everywhere, norms and biases too, so that none hides behind 0 or 1."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def keep_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def copy_attention(theirs: nn.MultiheadAttention, ours: Attention) -> None:
    key, value = ours.to_keys_values.weight.chunk(2)
    separate = theirs.in_proj_weight is None              # PyTorch stores them so when the context is wider
    with torch.no_grad():
        for target, source in ([(theirs.q_proj_weight, ours.to_query.weight), (theirs.k_proj_weight, key),
                                (theirs.v_proj_weight, value)] if separate else
                               [(theirs.in_proj_weight, torch.cat([ours.to_query.weight, key, value]))]):
            target.copy_(source)
        theirs.in_proj_bias.copy_(torch.cat([ours.to_query.bias, ours.to_keys_values.bias]))
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())


def copy_block(theirs: nn.Module, ours: PreNormBlock | PostNormBlock) -> None:
    """Weights of a block into PyTorch's encoder layer or, with cross-attention, its decoder layer."""
    cross = hasattr(ours, "cross")
    norms = [ours.attention_norm, *([ours.cross_norm] if cross else []), ours.mlp_norm]
    copy_attention(theirs.self_attn, ours.attention)
    if cross:
        copy_attention(theirs.multihead_attn, ours.cross)
    for target, source in [(theirs.linear1, ours.mlp[0]), (theirs.linear2, ours.mlp[2]),
                           *((getattr(theirs, f"norm{i}"), norm) for i, norm in enumerate(norms, 1))]:
        target.load_state_dict(source.state_dict())


# ---- layers

@pytest.mark.parametrize("context_dim", [None, 16, 24])
def test_attention_is_pytorchs(context_dim):
    ours = randomised(Attention(16, 4, context_dim))
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, kdim=context_dim, vdim=context_dim)
    copy_attention(theirs, ours)
    x, keep = torch.randn(3, 5, 16), keep_of(5, 2, 4)
    context = x if context_dim is None else torch.randn(3, 7, context_dim)
    keep = keep if context_dim is None else keep_of(3, 7, 1)
    memory = None if context_dim is None else ours.keys_values(context)
    for mask in (None, keep):
        expected, _ = theirs(x, context, context, key_padding_mask=None if mask is None else ~mask)
        torch.testing.assert_close(ours(x, memory, mask), expected, **CLOSE)
    assert not torch.allclose(ours(x, memory), ours(x, memory, keep), atol=1e-3)


def test_pre_norm_block_is_pytorchs():
    ours = randomised(PreNormBlock(16, 4, dropout=0.0))
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    copy_block(theirs, ours)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_post_norm_block_is_pytorchs():
    ours = randomised(PostNormBlock(16, 4, dropout=0.0))
    theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "gelu", 1e-12, batch_first=True, norm_first=False)
    copy_block(theirs, ours)
    x, keep = torch.randn(3, 5, 16), keep_of(5, 2, 4)
    torch.testing.assert_close(ours(x, keep), theirs(x, src_key_padding_mask=~keep), **CLOSE)


def test_post_norm_block_with_cross_attention_is_pytorchs():
    ours = randomised(PostNormBlock(16, 4, dropout=0.0, context_dim=16))
    theirs = nn.TransformerDecoderLayer(16, 4, 64, 0.0, "gelu", 1e-12, batch_first=True, norm_first=False)
    copy_block(theirs, ours)
    x, keep = torch.randn(3, 5, 16), keep_of(5, 2, 4)
    image, image_keep = torch.randn(3, 7, 16), keep_of(3, 7, 1)
    expected = theirs(x, image, tgt_key_padding_mask=~keep, memory_key_padding_mask=~image_keep)
    found = ours.attend_context(ours.attend_self(x, keep), ours.cross.keys_values(image), image_keep)
    torch.testing.assert_close(found, expected, **CLOSE)


# ---- encoders

def test_fusion_at_some_positions_is_all_positions_then_selecting(model, batch):
    image = model.image_encoder(batch.image)
    text = model.text_encoder(batch.caption_ids, batch.caption_keep)
    keys_values = model.fusion_encoder.keys_values(image)
    started = model.fusion_encoder.start(text, batch.caption_keep)
    everywhere = torch.arange(12).expand(4, -1)
    at = torch.tensor([[3, 0], [5, 5], [1, 2], [0, 4]])
    for image_keep in (None, keep_of(9, 3, 1, 5)):
        all_of_them = model.fusion_encoder(started, batch.caption_keep, everywhere, keys_values, image_keep)
        some = model.fusion_encoder(started, batch.caption_keep, at, keys_values, image_keep)
        expected = torch.stack([all_of_them[row, at[row]] for row in range(4)])
        torch.testing.assert_close(some, expected, atol=1e-5, rtol=1e-5)


def test_a_caption_alone_is_what_it_is_in_a_padded_batch(model, batch):
    image = model.image_encoder(batch.image)
    tokens, features = model.encode_text(batch.caption_ids, batch.caption_keep)
    started = model.fusion_encoder.start(tokens, batch.caption_keep)
    logits = model.match(started, batch.caption_keep, model.fusion_encoder.keys_values(image))
    for row in range(4):
        length = int(batch.caption_keep[row].sum())
        ids, keep = batch.caption_ids[row:row + 1, :length], torch.ones(1, length, dtype=torch.bool)
        alone, feature = model.encode_text(ids, keep)
        torch.testing.assert_close(alone[0], tokens[row, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(feature[0], features[row], atol=1e-5, rtol=1e-5)
        started = model.fusion_encoder.start(alone, keep)
        logit = model.match(started, keep, model.fusion_encoder.keys_values(image[row:row + 1]))
        torch.testing.assert_close(logit[0], logits[row], atol=1e-5, rtol=1e-5)


def test_the_order_of_words_matters(model, batch):
    ids, keep = batch.caption_ids[:1], batch.caption_keep[:1]
    swapped = ids[:, [0, 2, 1, *range(3, 12)]]
    assert not torch.allclose(model.encode_text(ids, keep)[1], model.encode_text(swapped, keep)[1], atol=1e-3)


def test_patches_are_read_row_by_row(model, config):
    """A patch's pixels reach one token, the one that `box_to_patches` gives for a box inside that patch."""
    seen = []
    model.image_encoder.blocks[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0][0]))
    (rows, columns), size = config.grid, config.patch
    image = torch.randn(1, 3, config.height, config.width)
    model.image_encoder(image)
    for row in range(rows):
        for column in range(columns):
            changed = image.clone()
            changed[..., row * size:(row + 1) * size, column * size:(column + 1) * size] += 1
            model.image_encoder(changed)
            differs = (seen[-1] != seen[0]).any(1)                                       # (N,)
            box = ((column + 0.5) / columns, (row + 0.5) / rows, 0.5 / columns, 0.5 / rows)
            assert differs.tolist() == box_to_patches(box, config.grid).tolist()
    model.image_encoder.positions.data[0, columns] += 1                 # second row, first column
    model.image_encoder(image)
    assert (seen[-1] != seen[0]).any(1).nonzero().flatten().tolist() == [columns]


# ---- regions

def test_pool_region_is_a_loop_over_samples():
    image, region_keep = torch.randn(3, 9, 24), torch.zeros(3, 8, dtype=torch.bool)
    for row, patches in enumerate(([0], [1, 2, 5], range(8))):
        region_keep[row, list(patches)] = True
    region, keep = pool_region(image, region_keep)
    for row in range(3):
        patches = [image[row, 1 + n] for n in range(8) if region_keep[row, n]]
        torch.testing.assert_close(region[row, 0], sum(patches) / len(patches), **CLOSE)
        assert torch.equal(region[row, 1:], image[row, 1:])
        assert keep[row].tolist() == [True, *region_keep[row].tolist()]


def test_region_losses_depend_on_the_box(model, batch):
    def terms(regions):
        torch.manual_seed(0)
        return model(batch._replace(region_keep=regions))
    here, there = terms(batch.region_keep), terms(batch.region_keep.roll(1, 0))
    assert (here["rpc"] - there["rpc"]).abs() > 1e-3 and (here["rpm"] - there["rpm"]).abs() > 1e-4
    assert here["itc"] == there["itc"]


@pytest.mark.parametrize("bins", [0, 3])
def test_a_region_feature_is_made_of_the_region_alone(config, batch, bins):
    torch.manual_seed(0)
    model = make_retriever(dataclasses.replace(config, bins=bins)).eval()
    keep, tokens = batch.region_keep, torch.randn(4, 1 + math.prod(config.grid), config.image_dim)
    noisy = tokens + torch.randn_like(tokens) * F.pad(~keep, (1, 0), value=True)[..., None]
    one, other = (model.encode_region(x, keep)[2] for x in (tokens, noisy))
    assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, model.image_feature(noisy), atol=1e-2)


def test_rpc_is_the_contrastive_loss_of_mean_patches_and_phrases(model, batch):
    tokens = model.image_encoder(batch.image)
    means = torch.stack([t[1:][keep].mean(0) for t, keep in zip(tokens, batch.region_keep)])
    regions = F.normalize(model.image_projection(means), dim=-1)
    phrases = model.encode_text(batch.phrase_ids, batch.phrase_keep)[1]
    logits = regions @ phrases.T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4))) / 2
    torch.testing.assert_close(model(batch)["rpc"], expected, atol=1e-5, rtol=1e-5)


def test_the_fusion_encoder_sees_the_region_and_nothing_else(model, batch):
    """Changing token 0, the region's mean, or a patch of the box changes the score; other patches do not."""
    text = model.text_encoder(batch.phrase_ids, batch.phrase_keep)
    started = model.fusion_encoder.start(text, batch.phrase_keep)
    region, keep = pool_region(model.image_encoder(batch.image), batch.region_keep)

    def scores(changed: int | None) -> torch.Tensor:
        tokens = region.clone()
        if changed is not None:
            tokens[:, changed] += torch.randn(4, 24)
        return model.match(started, batch.phrase_keep, model.fusion_encoder.keys_values(tokens), keep)
    for token in range(9):
        moved = (scores(token) - scores(None)).abs().amax(1) > 1e-5
        assert moved.tolist() == keep[:, token].tolist()


def test_the_region_passes_of_forward_are_masked_and_see_the_mean(model, batch):
    calls = []
    model.fusion_encoder.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    model(batch)
    *_, keys_values, image_keep = calls[-1]                   # itm, itm of the eda caption, mlm, rpm
    region, keep = pool_region(model.image_encoder(batch.image), batch.region_keep)
    assert len(calls) == 4 and torch.equal(image_keep[:8], torch.cat([keep, keep]))
    expected = model.fusion_encoder.keys_values(region)
    torch.testing.assert_close(keys_values[0][:4], expected[0], atol=1e-5, rtol=1e-5)


# ---- the terms of a batch

def test_what_forward_returns(model, batch):
    assert set(model(batch)) == {"itc", "itm", "mlm", "rpc", "rpm"}
    unfused = set(model(batch, Objective(fuse=False)))
    assert {"itc", "rpc"} <= unfused and unfused.isdisjoint({"itm", "mlm"})
    regions = dict.fromkeys(("region_keep", "phrase_ids", "phrase_keep", "phrase_class"))
    assert set(model(batch._replace(**regions))) == {"itc", "itm", "mlm"}


def test_the_augmented_caption_is_a_second_positive(model, batch):
    """term(caption) + weight x term(augmented one) of ITC, ITM; two pairs leave no choice of negative."""
    two = Batch(*[x[:2] for x in batch])
    alone = model(two._replace(eda_ids=None, eda_keep=None))
    variant = model(two._replace(caption_ids=two.eda_ids, caption_keep=two.eda_keep,
                                        masked_ids=two.eda_ids, eda_ids=None, eda_keep=None))
    both = model(two, Objective(eda=0.8))
    for name, term in both.items():
        expected = alone[name] + 0.8 * variant[name] if name in ("itc", "itm") else alone[name]
        torch.testing.assert_close(term, expected, atol=1e-5, rtol=1e-5)


def test_smoothing_reaches_both_contrastive_losses(model, batch):
    plain, smooth = model(batch), model(batch, Objective(smoothing=0.2))
    _, image = model.encode_image(batch.image)
    _, text = model.encode_text(batch.caption_ids, batch.caption_keep)
    expected = losses.contrastive(image, text, 0.07, batch.identity, 0.2)
    torch.testing.assert_close(smooth["itc"], expected, atol=1e-5, rtol=1e-5)
    assert (smooth["rpc"] - plain["rpc"]).abs() > 1e-3


def test_masked_words_are_predicted_from_the_masked_caption_and_the_image(model, batch):
    """The mean over every masked word, one by one; what fills up a row counts for nothing."""
    image = model.image_encoder(batch.image)
    expected = []
    for row in range(4):
        keep = batch.caption_keep[row:row + 1]
        text = model.text_encoder(batch.masked_ids[row:row + 1], keep)
        keys_values = model.fusion_encoder.keys_values(image[row:row + 1])
        started = model.fusion_encoder.start(text, keep)
        fused = model.fusion_encoder(started, keep, torch.arange(12)[None], keys_values)
        for at, label in zip(batch.masked_at[row], batch.masked_labels[row]):
            if label != -100:
                expected.append(-model.word_head(fused[0, at]).log_softmax(0)[label])
    assert len(expected) == 8
    torch.testing.assert_close(model(batch)["mlm"], torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{}, {"class_token": True}, {"clip": True}, {"bins": 3}, {
    "window": 2, "image_dim": 64, "image_depth": 8, "image_heads": 8}])
def test_every_parameter_learns_from_one_batch(config, batch, change):
    torch.manual_seed(0)
    model = make_retriever(dataclasses.replace(config, **change))
    losses.total(model(batch, Objective(eda=0.8)), beta=0.8).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


# ---- sizes and the optimiser

@pytest.mark.parametrize("preset, vocab, count", [("tiny", 1011, 103_254), ("demo", 1011, 2_027_894),
                                                  ("small", 1011, 35_271_542), ("base", 30522, 211_218_749)])
def test_parameter_counts(preset, vocab, count):
    with torch.device("meta"):
        model = Retriever(dataclasses.replace(PRESETS[preset], vocab=vocab))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert preset != "base" or 0.19e9 < count < 0.24e9


def test_the_optimiser_covers_every_parameter_once(model):
    groups = stages.param_groups(model, TrainConfig(lr=1e-3, head_lr=5.0, weight_decay=0.01))
    settings = {id(p): (group["weight_decay"], group["peak"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(list(model.parameters()))
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)}
    tables = {id(model.image_encoder.positions)}
    heads = nn.ModuleList([model.image_projection, model.text_projection, model.matching_head,
                           model.word_head])
    heads = {id(p) for p in heads.parameters()} - {id(model.text_encoder.words.weight)}     # the encoder's
    assert stages.timetable_of(TrainConfig(), 10, 1)[0].betas == (0.9, 0.98)
    for name, p in model.named_parameters():
        expected = (0.01 if id(p) in matrices | tables else 0, 5e-3 if id(p) in heads else 1e-3)
        assert settings[id(p)] == expected, name


# ---- from disk to loss

def test_walks_the_shapes_from_disk_to_loss(tmp_path, paint, config, tokenizer, model):
    H, W, N, D, E, V = config.height, config.width, 8, config.text_dim, config.embed, config.vocab
    items = [{"image": f"c/{i}.png", "caption": "a man in red" + " and blue" * i, "image_id": i,
              "boxes": [[0.5, 0.25 + 0.1 * i, 1.0, 0.25]], "logits": [0.5],
              "phrases": ["red hat" + " on top" * i]} for i in range(3)]
    for i in range(3):
        paint(f"SDA/c/{i}.png", seed=i)
    (tmp_path / "SDA/sda_0_3.json").write_text(json.dumps(items))

    source = load("sda", "train", tmp_path, say=lambda line: None)
    assert len(source.records) == 2                       # one identity of the three is held out as val
    dataset = PairDataset(source, tokenizer, config, TrainConfig(eda=0.8))
    samples = [dataset[0, i] for i in range(2)]
    for sample in samples:
        assert sample.image.shape == (3, H, W) and sample.image.dtype == torch.float32
        assert sample.region_keep.shape == (N,) and sample.region_keep.dtype == torch.bool
        assert len(sample.caption_ids) == len(sample.masked_ids) and sample.masked_at

    batch, B, M = dataset.collate(samples), 2, MAX_MASKED
    T, P = (max(len(getattr(sample, name)) for sample in samples) for name in ("caption_ids", "phrase_ids"))
    assert batch.image.shape == (B, 3, H, W) and batch.identity.tolist() == [0, 1]
    assert batch.caption_ids.shape == batch.caption_keep.shape == batch.masked_ids.shape == (B, T)
    assert batch.masked_at.shape == batch.masked_labels.shape == (B, M)
    assert batch.eda_ids.shape == batch.eda_keep.shape and len(batch.eda_ids) == B
    assert batch.region_keep.shape == (B, N)
    assert batch.phrase_ids.shape == batch.phrase_keep.shape == (B, P) and batch.phrase_class.shape == (B,)
    assert batch.caption_keep.dtype == batch.phrase_keep.dtype == batch.region_keep.dtype == torch.bool

    image, image_features = model.encode_image(batch.image)
    text, text_features = model.encode_text(batch.caption_ids, batch.caption_keep)
    assert image.shape == (B, 1 + N, config.image_dim) and text.shape == (B, T, D)
    for features in (image_features, text_features):
        assert features.shape == (B, E)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(B))
    assert losses.contrastive(image_features, text_features, model.temperature, batch.identity).shape == ()
    columns, exists = losses.hard_negatives(image_features @ text_features.T, batch.identity)
    assert columns.tolist() == [1, 0] and exists.tolist() == [True, True]

    keys_values = model.fusion_encoder.keys_values(image)
    head = config.text_dim // config.text_heads
    assert [m.shape for m in keys_values] == [(B, 2, config.text_heads, 1 + N, head)] * config.fusion_depth
    everywhere, started = torch.arange(T).expand(B, T), model.fusion_encoder.start(text, batch.caption_keep)
    assert started.shape == (B, T, D)
    assert model.fusion_encoder(started, batch.caption_keep, everywhere, keys_values).shape == (B, T, D)
    fused = model.fusion_encoder(started, batch.caption_keep, batch.masked_at, keys_values)
    logits = model.match(started, batch.caption_keep, keys_values)
    assert fused.shape == (B, M, D) and model.word_head(fused).shape == (B, M, V) and logits.shape == (B, 2)
    assert losses.matching(logits, torch.tensor([True, False])).shape == (B,)
    assert losses.masked_words(model.word_head(fused), batch.masked_labels).shape == (B, M)
    region, keep = pool_region(image, batch.region_keep)
    assert region.shape == (B, 1 + N, config.image_dim) and keep.shape == (B, 1 + N)

    terms = model(batch, Objective(eda=0.8))
    assert set(terms) == {"itc", "itm", "mlm", "rpc", "rpm"}
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    loss = losses.total(terms, beta=0.8)
    assert loss.shape == () and loss.requires_grad
