"""Every loss against an independent computation: loops in float64, counts of draws, numbers by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mra import losses
from mra.group import Group
from mra.retriever import Seen


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def contrastive_by_loops(image, text, temperature, ids, smoothing):
    """-1/2 E[sum_j target_ij (log S_I2T(i, j) + log S_T2I(i, j))], every sum written out."""
    count, total = len(ids), 0.0
    for i in range(count):
        same = sum(1 for j in range(count) if ids[j] == ids[i])
        from_image = sum(torch.exp(image[i] @ text[k] / temperature) for k in range(count))
        from_text = sum(torch.exp(image[k] @ text[i] / temperature) for k in range(count))
        for j in range(count):
            target = (1 - smoothing) * (ids[i] == ids[j]) / same + smoothing / count
            to_text = torch.exp(image[i] @ text[j] / temperature) / from_image
            to_image = torch.exp(image[j] @ text[i] / temperature) / from_text
            total = total - target * (torch.log(to_text) + torch.log(to_image)) / 2
    return total / count


# ---- contrastive

@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [3, 7, 3, 3, 7], [9, 9, 9], [5], [2**55, 2**55 + 1, 2**55]])
def test_contrastive_is_a_double_loop_with_its_gradients(ids, smoothing):
    torch.manual_seed(0)
    leaves = [unit(len(ids), 6), unit(len(ids), 6), torch.tensor(0.07, dtype=torch.float64)]
    results = []
    for loss in (losses.contrastive, contrastive_by_loops):
        image, text, temperature = (leaf.clone().requires_grad_() for leaf in leaves)
        value = loss(image, text, temperature, torch.tensor(ids), smoothing)
        results.append([value, *torch.autograd.grad(value, (image, text, temperature))])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours.double(), expected.double(), atol=1e-4, rtol=1e-4)


def test_contrastive_gradients_by_differences():
    """The loss computes in float32, hence the wide step and tolerance."""
    torch.manual_seed(0)
    leaves = [leaf.requires_grad_() for leaf in (unit(4, 5), unit(4, 5), torch.tensor(0.5).double())]
    ids = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda *leaves: losses.contrastive(*leaves, ids, 0.2), leaves,
                                    eps=1e-3, atol=2e-3, rtol=1e-2)


def test_irras_two_losses():
    """The values that IRRA's code gave for these features, at temperature 0.02 (tests/README.md)."""
    image, text = (F.normalize(torch.from_numpy(np.random.RandomState(seed).standard_normal((6, 512)).astype("f4")))
                   for seed in (21, 22))
    identities = torch.tensor([3, 1, 3, 7, 1, 9])
    assert losses.distribution_matching(image, text, 0.02, identities).item() == pytest.approx(21.110294, rel=1e-5)
    assert losses.contrastive(image, text, 0.02, torch.arange(6)).item() == pytest.approx(3.8876905, rel=1e-5)


def test_distribution_matching_by_hand():
    """Two pairs: chances 3/4 and 1/4 either way, against targets 1 and 0 (with 1e-8 added)."""
    logits = math.log(3) * torch.eye(2)
    by_hand = 2 * (0.75 * (math.log(0.75) - math.log(1 + 1e-8)) + 0.25 * (math.log(0.25) - math.log(1e-8)))
    found = losses.distribution_matching(logits, torch.eye(2), 1.0, torch.tensor([4, 5]))
    assert found.item() == pytest.approx(by_hand, rel=1e-6)


def test_soft_targets_by_hand():
    expected = torch.tensor([[0.45, 0.05, 0.45, 0.05], [0.05, 0.85, 0.05, 0.05],
                             [0.45, 0.05, 0.45, 0.05], [0.05, 0.05, 0.05, 0.85]])
    torch.testing.assert_close(losses.soft_targets(torch.tensor([4, 8, 4, 9]), 0.2), expected)


# ---- hard negatives

def test_a_hard_negative_is_never_of_the_same_identity():
    """10,000 draws, with the same identity by far the most similar."""
    torch.manual_seed(0)
    ids = torch.arange(100) % 12
    similarity = torch.randn(100, 100) + 1000.0 * (ids[:, None] == ids)
    for _ in range(100):
        columns, exists = losses.hard_negatives(similarity, ids)
        assert exists.all() and (ids[columns] != ids).all()


def test_hard_negatives_are_drawn_in_proportion_to_the_exponential_of_the_similarity():
    """Chi-square of 5,000 draws a row below its 99.9 % quantile: 16.3 with 4 columns allowed, 18.5 with 5."""
    torch.manual_seed(0)
    ids, similarity, draws = torch.tensor([0, 1, 0, 2, 3, 4]), 1.5 * torch.randn(6, 6), 5000
    counts = torch.zeros(6, 6)
    for _ in range(draws):
        counts[torch.arange(6), losses.hard_negatives(similarity, ids)[0]] += 1
    for row in range(6):
        allowed = [column for column in range(6) if ids[column] != ids[row]]
        weights = [math.exp(similarity[row, column]) for column in allowed]
        expected = [draws * weight / sum(weights) for weight in weights]
        chi = sum((counts[row, column] - e) ** 2 / e for column, e in zip(allowed, expected))
        assert chi < {4: 16.3, 5: 18.5}[len(allowed)]


def test_rows_without_a_negative_are_flagged():
    columns, exists = losses.hard_negatives(torch.randn(3, 3), torch.tensor([5, 5, 5]))
    assert not exists.any() and columns.shape == (3,) and ((0 <= columns) & (columns < 3)).all()
    columns, exists = losses.hard_negatives(torch.randn(3, 3), torch.tensor([5, 5, 6]))
    assert exists.all() and columns[:2].tolist() == [2, 2] and columns[2] != 2


# ---- matching and masked words

def test_matching_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [2.0, 2.0]])  # matched: 3/4, 3/4, 1/2
    loss = losses.matching(logits, torch.tensor([True, False, False]))
    torch.testing.assert_close(loss, torch.tensor([math.log(4 / 3), math.log(4), math.log(2)]))


def test_masked_words_by_hand():
    """Three words with shares 1/2, 1/4, 1/4 and 1/6, 1/6, 4/6; -100 costs nothing and teaches nothing."""
    logits = torch.tensor([[[2.0, 1, 1], [1, 1, 4]], [[1, 1, 4], [5, 1, 1]]]).log().requires_grad_()
    loss = losses.masked_words(logits, torch.tensor([[0, 1], [2, -100]]))
    torch.testing.assert_close(loss, torch.tensor([[math.log(2), math.log(6)], [math.log(1.5), 0.0]]))
    loss.sum().backward()
    assert logits.grad[1, 1].abs().sum() == 0 and (logits.grad[0].abs().sum(1) > 0).all()


def test_the_mean_counts_what_is_marked():
    values = torch.tensor([1.0, 5.0, 9.0])
    assert Group().mean_where(values, torch.tensor([True, False, True])) == 5
    assert Group().mean_where(values, torch.zeros(3, dtype=torch.bool)) == 0


# ---- the sum

def test_every_weight_is_applied_once():
    terms = {name: torch.tensor(2.0 ** i) for i, name in enumerate(("itc", "itm", "mlm", "rpc", "rpm"))}
    assert losses.total(terms, 0.8).item() == pytest.approx(1 + 2 + 4 + 0.8 * (8 + 16))
    some = {name: terms[name] for name in ("itc", "rpc")}
    assert losses.total(some, 0.8).item() == pytest.approx(1 + 0.8 * 8)


# ---- the matching loss of a batch

def texts_and_images(model, batch, rows: int):
    image, feature = model.encode_image(batch.image[:rows])
    keep = batch.caption_keep[:rows]
    text, text_feature = model.encode_text(batch.caption_ids[:rows], keep)
    return feature @ text_feature.T / 0.07, model.fusion_encoder.keys_values(image), text, keep


def matching_loss(model, similarity, seen: Seen, text, keep, classes) -> torch.Tensor:
    logits, matched, counts = model.match_with_negatives(similarity, seen, text, keep, classes)
    return Group().mean_where(losses.matching(logits, matched), counts)


def pair_loss(model, text, keep, keys_values, i: int, j: int, matched: bool) -> torch.Tensor:
    """-log of the share that image i and text j get for what they are."""
    started = model.fusion_encoder.start(text[j:j + 1], keep[j:j + 1])
    logits = model.match(started, keep[j:j + 1], [one[i:i + 1] for one in keys_values])
    return -logits[0].softmax(0)[int(matched)].log()


def test_two_pairs_give_two_matched_and_four_mismatched(model, batch):
    """With two identities the negatives are certain: N matched and 2N mismatched pairs."""
    similarity, keys_values, text, keep = texts_and_images(model, batch, 2)
    loss = matching_loss(model, similarity, Seen(None, keys_values, None), text, keep, torch.tensor([3, 4]))
    pairs = [(0, 0, True), (1, 1, True), (0, 1, False), (1, 0, False), (0, 1, False), (1, 0, False)]
    expected = sum(pair_loss(model, text, keep, keys_values, *pair) for pair in pairs) / 6
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_wrong_texts_are_hard_for_the_image_and_wrong_images_for_the_text(model, batch):
    """Image i is surely drawn to text i + 1, so text i is to image i - 1: the mismatched pairs are known."""
    _, keys_values, text, keep = texts_and_images(model, batch, 3)
    similarity = 1000.0 * torch.eye(3).roll(1, 1)
    loss = matching_loss(model, similarity, Seen(None, keys_values, None), text, keep, torch.tensor([3, 4, 5]))
    pairs = [(i, i, True) for i in range(3)] + 2 * [(i, (i + 1) % 3, False) for i in range(3)]
    expected = sum(pair_loss(model, text, keep, keys_values, *pair) for pair in pairs) / 9
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_the_negatives_of_a_region_bring_their_own_mask(model, batch):
    similarity, keys_values, text, keep = texts_and_images(model, batch, 2)
    image_keep = torch.tensor([[True] * 3 + [False] * 6, [True] + [False] * 5 + [True] * 3])
    loss = matching_loss(model, similarity, Seen(None, keys_values, image_keep), text, keep, torch.tensor([3, 4]))
    expected = 0
    for i in range(2):
        for j in range(2):
            own = [one[i:i + 1] for one in keys_values]
            started = model.fusion_encoder.start(text[j:j + 1], keep[j:j + 1])
            logits = model.match(started, keep[j:j + 1], own, image_keep[i:i + 1])
            expected = expected - logits[0].log_softmax(0)[int(i == j)] * (1 if i == j else 2) / 6
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_one_identity_has_matched_pairs_alone(model, batch):
    """A wrong text cannot be drawn, so its pairs count for nothing, neither in the sum nor in the mean."""
    similarity, keys_values, text, keep = texts_and_images(model, batch, 4)
    loss = matching_loss(model, similarity, Seen(None, keys_values, None), text, keep, torch.tensor([6, 6, 6, 6]))
    expected = sum(pair_loss(model, text, keep, keys_values, i, i, True) for i in range(4)) / 4
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
