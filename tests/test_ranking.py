"""Metrics against rankings made by hand and naive loops; two-stage search against pairs scored one by one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mra import ranking
from mra.config import PRESETS
from mra.data.augment import tensor_of
from mra.data.files import open_image
from mra.data.records import Record, RecordSet
from mra.ranking import Found, Settings, choose_weight, retrieval_metrics, search
from mra.retriever import Retriever

CAPTIONS = ["a man in a red coat with a bag on his left", "a woman",
            "blue jeans and white shoes on the right side", "black hat",
            "someone with a left bag and a right hat walks past the tall grey house today"]
NAMES = "R@1", "R@5", "R@10", "mAP", "mINP"


def naive_metrics(scores, query_ids, gallery_ids) -> dict[str, float]:
    rows = []
    for row, identity in zip(scores.tolist(), query_ids.tolist()):
        ranked = sorted(range(len(row)), key=lambda g: -row[g])         # sorted is stable
        ranks = [rank for rank, g in enumerate(ranked, 1) if gallery_ids[g] == identity]
        if ranks:
            precisions = [found / rank for found, rank in enumerate(ranks, 1)]
            recalls = [float(ranks[0] <= k) for k in (1, 5, 10)]
            rows.append([*recalls, sum(precisions) / len(ranks), len(ranks) / ranks[-1]])
    return dict(zip(NAMES, (100 * np.mean(rows, axis=0)).tolist()))


def made(similarity, logits, candidates=None) -> Found:
    """What a search finds whose similarities (Q, G) and logits (Q, k) are these; mismatches have the logit 0."""
    similarity, logits = torch.as_tensor(similarity), torch.as_tensor(logits)
    if candidates is None:
        candidates = similarity.argsort(dim=1, descending=True, stable=True)
    return Found(similarity, torch.eye(similarity.shape[1], dtype=similarity.dtype), similarity.gather(1, candidates),
                 candidates, logits)


def matrix(found: Found) -> torch.Tensor:
    return found.queries @ found.gallery.T


def order(found: Found, first: torch.Tensor) -> torch.Tensor:
    """The whole gallery (Q, G) as its metrics see it: `first` (Q, K) before the others."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "metric_rows", lambda order, *ids: seen.append(order.clone()) or torch.zeros(1, 5))
        found.metrics(torch.zeros(len(found.queries)), torch.zeros(len(found.gallery)), first)
    return torch.cat(seen)


def checked_metrics(scores, query_ids, gallery_ids) -> dict[str, float]:
    """Those of scores (Q, G), which a search with the best five of each query as candidates must have, too."""
    metrics = retrieval_metrics(scores, query_ids, gallery_ids)
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    found = made(scores, scores[:, :0], ranked[:, :5])
    assert found.metrics(query_ids, gallery_ids, found.candidates) == pytest.approx(metrics, nan_ok=True)
    return metrics


# ---- metrics

def test_metrics_of_a_ranking_made_by_hand():
    """Two queries on a gallery of seven, identities 1 2 1 3 2 1 4.

    Query of 1, ranking 3 2 1 5 0 4 6: identities 3 1 2 1 1 2 4, hits at ranks 2, 4, 5.
        R@1 0, R@5 1; AP = (1/2 + 2/4 + 3/5) / 3 = 8/15; INP = 3/5
    Query of 4, ranking 0 1 2 3 4 5 6: its one hit at rank 7.
        R@5 0, R@10 1; AP = INP = 1/7
    """
    ranks = torch.tensor([[3, 2, 1, 5, 0, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
    scores = torch.zeros(2, 7).scatter(1, ranks, torch.arange(7.0, 0, -1).expand(2, -1))
    expected = dict(zip(NAMES, (0, 50, 100, 100 * (8 / 15 + 1 / 7) / 2, 100 * (3 / 5 + 1 / 7) / 2)))
    ids = torch.tensor([1, 4]), torch.tensor([1, 2, 1, 3, 2, 1, 4])
    assert checked_metrics(scores, *ids) == pytest.approx(expected)
    assert made(torch.zeros(2, 7), torch.zeros(2, 0)).metrics(*ids, ranks) == pytest.approx(expected)


@pytest.mark.parametrize("queries, gallery, levels, people",
                         [(40, 30, 5, 12), (1100, 15, 3, 9), (7, 9, 1, 4)])
def test_metrics_are_a_naive_loop_with_ties_and_many_queries(queries, gallery, levels, people):
    generator = torch.Generator().manual_seed(queries)
    scores = torch.randint(0, levels, (queries, gallery), generator=generator).float()
    ids = [torch.randint(0, people, (count,), generator=generator) for count in (queries, gallery)]
    assert checked_metrics(scores, *ids) == pytest.approx(naive_metrics(scores, *ids))


def test_a_query_without_a_match_is_left_out():
    scores, gallery = torch.tensor([[3.0, 2, 1], [3, 2, 1]]), torch.tensor([0, 1, 2])
    with_and_without = checked_metrics(scores, torch.tensor([1, 77]), gallery)
    assert with_and_without == checked_metrics(scores[:1], torch.tensor([1]), gallery)
    assert with_and_without["mAP"] == 50 and with_and_without["R@1"] == 0
    nothing = checked_metrics(scores, torch.tensor([8, 9]), gallery)
    assert tuple(nothing) == NAMES and all(math.isnan(value) for value in nothing.values())


def test_distractors_and_queries_without_an_image(tokenizer):
    """Gallery: a0 b0 d d a1, where d has no caption. Queries: a0's two, b0's, one of a and one of c without an image.

    Person a is at ranks 2 and 4 of the three of its queries, b at rank 1, and c is in no image, so it is not counted.
        R@1 1/4; AP of a (1/2 + 2/4) / 2 = 1/2, of b 1; INP of a 2/4, of b 1
    """
    records = (Record("a0", ("red", "coat"), 0), Record("b0", ("blue",), 1), Record("d0", (), 2),
               Record("", ("hat",), 0), Record("d1", (), 3), Record("", ("bag",), 4), Record("a1", (), 0))
    captions, query_ids, paths, gallery_ids = ranking.queries_of(RecordSet("own", "test", records), tokenizer)
    assert captions == ["red", "coat", "blue", "hat", "bag"] and query_ids.tolist() == [0, 0, 1, 0, 4]
    assert paths == ["a0", "b0", "d0", "d1", "a1"] and gallery_ids.tolist() == [0, 1, 2, 3, 0]
    of_a, of_b = [4.0, 1, 5, 3, 2], [4.0, 5, 3, 2, 1]           # d0 a0 d1 a1 b0, and b0 first
    metrics = checked_metrics(torch.tensor([of_a, of_a, of_b, of_a, of_b]), query_ids, gallery_ids)
    assert metrics == pytest.approx(dict(zip(NAMES, (25, 100, 100, 100 * (3 / 2 + 1) / 4, 100 * (3 / 2 + 1) / 4))))


def test_a_gallery_of_one_image():
    metrics = checked_metrics(torch.tensor([[0.1], [0.2]]), torch.tensor([4, 5]), torch.tensor([4]))
    assert metrics == dict.fromkeys(NAMES, 100.0)


def test_duplicates_of_an_image_are_hits_of_their_own():
    """The pair of copies stands at ranks 2 and 3: AP = (1/2 + 2/3) / 2, INP = 2/3."""
    scores, gallery_ids = torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([0, 1, 1, 2])
    metrics = checked_metrics(scores, torch.tensor([1]), gallery_ids)
    assert metrics["mAP"] == pytest.approx(100 * 7 / 12) and metrics["mINP"] == pytest.approx(200 / 3)


# ---- the order of two stages

def test_candidates_come_first_and_the_rest_by_similarity():
    """Similarity ranks 2 0 3 1 4; of the candidates 2 0 3 matching prefers 3, then 0.

    weight 1: 2 gets 0 + .9, 0 gets 1 + .7, 3 gets 2 + .5.   weight 10: 2 gets 9, 0 gets 8, 3 gets 7.
    """
    for count in (3, 4, 5):                                       # found by similarity; the first three re-scored
        found = made([[0.7, 0.3, 0.9, 0.5, 0.1]], [[0.0, 1, 2]], torch.tensor([[2, 0, 3, 1, 4]])[:, :count])
        assert order(found, found.candidates).tolist() == [[2, 0, 3, 1, 4]]
        for weight, expected in ((0, [3, 0, 2, 1, 4]), (1, [3, 0, 2, 1, 4]), (10, [2, 0, 3, 1, 4])):
            assert found.reranked(weight).tolist() == [expected[:count]]
            assert order(found, found.reranked(weight)).tolist() == [expected]


def test_no_candidates_leave_the_order_of_similarity():
    found = made([[0.7, 0.3, 0.9], [0.1, 0.2, 0.3]], [[], []])
    assert order(found, found.reranked(4.0)).tolist() == found.candidates.tolist() == [[2, 0, 1], [2, 1, 0]]


@pytest.mark.parametrize("metric", ["R@1", "mAP"])
def test_the_best_weight_is_chosen(metric):
    """Image 1 is 0.1 more similar; matching prefers image 0, by 0.5 for query 0, which wants image 1, and by
    1 for query 1, which wants image 0: only the weight 8 serves both. With a certain hit first, and a miss
    last, mAP has to decide.
    """
    similarity, logits = torch.tensor([[0.5, 0.6], [0.5, 0.6]]), torch.tensor([[0.5, 0.0], [1.0, 0.0]])
    query_ids, gallery_ids = torch.tensor([1, 0]), torch.tensor([0, 1])
    if metric == "mAP":
        similarity = torch.cat([similarity, torch.ones(2, 2)], 1)
        logits = torch.cat([logits, torch.tensor([[-1000.0, 1000], [1000, -1000]])], 1)
        gallery_ids = torch.tensor([0, 1, 0, 1])
    found = made(similarity, logits, torch.arange(len(gallery_ids)).expand(2, -1))
    values = {weight: found.metrics(query_ids, gallery_ids, found.reranked(weight)) for weight in ranking.WEIGHTS}
    best = max(value[metric] for value in values.values())
    assert [weight for weight, value in values.items() if value[metric] == best] == [8.0]
    assert choose_weight(found, query_ids, gallery_ids) == (8.0, values[8.0])


def test_r_at_1_decides_before_map_and_then_the_smallest_weight():
    """Images 0 and 1 of 20 are right. Up to weight 4 they stand at ranks 1 and 20, AP (1 + 2/20) / 2 = 0.55;
    at 64 at 2 and 3, AP (1/2 + 2/3) / 2 = 0.58.
    """
    similarity, logits = torch.zeros(1, 20), torch.zeros(1, 20)
    similarity[0, :3], logits[0, :3] = torch.tensor([0.9, 0.8, 1.0]), torch.tensor([1.0, -10.0, 0.5])
    found = made(similarity, logits, torch.arange(20)[None])
    ids = torch.tensor([1]), torch.tensor([1, 1] + [0] * 18)
    values = {weight: found.metrics(*ids, found.reranked(weight)) for weight in (0.0, 4.0, 64.0)}
    assert [value["R@1"] for value in values.values()] == [100, 100, 0]
    assert [value["mAP"] for value in values.values()] == pytest.approx([55, 55, 350 / 6])
    assert choose_weight(found, *ids)[0] == 0.0


# ---- search

@pytest.fixture
def paths(paint) -> list[str]:
    return [paint(f"{i}.png", seed=i) for i in range(5)]


@torch.inference_mode()
def pair_by_hand(model, tokenizer, caption: str, path: str, mirrored: bool) -> tuple[float, float]:
    """Similarity and matching logit of one caption, unpadded, with one image."""
    ids = torch.tensor([tokenizer.encode(caption)])
    keep = torch.ones_like(ids, dtype=torch.bool)
    pixels = tensor_of(open_image(path), (model.config.height, model.config.width))
    text, text_feature = model.encode_text(ids, keep)
    image, image_feature = model.encode_image(pixels.flip(-1)[None] if mirrored else pixels[None])
    started = model.fusion_encoder.start(text, keep)
    logits = model.match(started, keep, model.fusion_encoder.keys_values(image))[0]
    return (text_feature @ image_feature.T).item(), (logits[1] - logits[0]).item()


def by_pair(found: Found) -> torch.Tensor:
    """Matching logits (Q, G), nan where a pair was no candidate."""
    candidates = found.candidates[:, :found.match_logit.shape[1]]
    return torch.full_like(matrix(found), torch.nan).scatter(1, candidates, found.match_logit)


@pytest.mark.parametrize("mirror", [False, True])
def test_search_scores_every_pair_as_by_hand(model, tokenizer, paths, mirror):
    """Averaged with the mirror image and, by hand here, the caption with left and right exchanged."""
    other = {0: "a man in a red coat with a bag on his right",
             2: "blue jeans and white shoes on the left side",
             4: "someone with a right bag and a left hat walks past the tall grey house today"}
    expected = torch.zeros(2, 5, 5)                               # similarity, logit
    for q, caption in enumerate(CAPTIONS):
        for g, path in enumerate(paths):
            passes = [pair_by_hand(model, tokenizer, caption, path, False)]
            if mirror:
                passes.append(pair_by_hand(model, tokenizer, other.get(q, caption), path, True))
            expected[:, q, g] = torch.tensor(passes).mean(0)
    found = search(model, tokenizer, CAPTIONS, paths, Settings(5, mirror, batch=2))
    assert expected[1].std() > 0.05
    torch.testing.assert_close(matrix(found), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.similarity, expected[0].gather(1, found.candidates), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_pair(found), expected[1], atol=1e-5, rtol=1e-5)


def test_bf16_rounds_what_encoders_do_and_not_the_order(model, tokenizer, paths):
    whole = search(model, tokenizer, CAPTIONS, paths, Settings(5))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = search(model, tokenizer, CAPTIONS, paths, Settings(5))
    for one, other in ((matrix(whole), matrix(rounded)), (by_pair(whole), by_pair(rounded))):
        assert other.dtype == torch.float32 and 0 < (one - other).abs().max() < 0.1
        assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.995
        assert (other != other.bfloat16().float()).any()            # scores themselves are not rounded


def test_candidates_are_scored_in_small_steps_as_one_by_one(model, tokenizer, paths, monkeypatch):
    """Three candidates a query, in no order, IMAGES of one or two, steps of about TOKENS tokens: each logit is where
    its candidate is, and a step sees the keys and values of its images themselves."""
    seen, computed, encoder = [], [], model.fusion_encoder
    real, real_keys_values = encoder.fused_cls, encoder.keys_values
    monkeypatch.setattr(encoder, "fused_cls", lambda *step: seen.append(step) or real(*step))
    monkeypatch.setattr(encoder, "keys_values", lambda x: computed.append(real_keys_values(x)) or computed[-1])
    candidates = torch.tensor([[4, 0, 2], [1, 2, 3], [3, 4, 0], [0, 1, 2], [2, 4, 3]])
    monkeypatch.setattr(ranking, "BLOCK", 2)
    queries = ranking.encode_queries(model, tokenizer, CAPTIONS)
    images = ranking.Images(paths, model.config)
    longest = int(queries[1].sum(1).max())
    for mirrored, tokens, count in ((False, 20, 1), (True, 40, 2), (False, 8192, 16)):
        passes = [queries, queries] if mirrored else [queries]
        seen.clear(), computed.clear()
        monkeypatch.setitem(ranking.TOKENS, "cpu", tokens)
        monkeypatch.setattr(ranking, "IMAGES", count)
        match = ranking.match_candidates(model, images, passes, candidates, Settings(3, batch=4))     # (5, 3)
        sizes = [int(keep.sum()) for _, keep, *_ in seen]
        assert max(sizes) < tokens + longest and sum(sizes) == 3 * len(passes) * int(queries[1].sum())
        assert len(computed) == len(passes) * {1: 5, 2: 3, 16: 2}[count]
        assert {id(step[2]) for step in seen} == {id(one) for one in computed}
        expected = sum(torch.tensor([[pair_by_hand(model, tokenizer, caption, paths[g], bool(i))[1] for g in row]
                                     for caption, row in zip(CAPTIONS, candidates.tolist())])
                       for i in range(len(passes))) / len(passes)
        torch.testing.assert_close(match, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.inference_mode()
def test_texts_that_ask_for_one_image_are_one_sequence(depth):
    """[CLS] of six texts with images 1 1 1 3 3 4 of five, as from copied keys and values, in bf16 too."""
    torch.manual_seed(depth)
    encoder = Retriever(replace(PRESETS["tiny"], vocab=30, fusion_depth=depth)).eval().fusion_encoder
    started, lengths, images = torch.randn(6, 9, 32), torch.tensor([3, 9, 1, 4, 4, 7]), torch.tensor([1, 1, 1, 3, 3, 4])
    keep, keys_values = torch.arange(9) < lengths[:, None], encoder.keys_values(torch.randn(5, 17, 32))
    copied, first = [one[images] for one in keys_values], torch.zeros(6, 1, dtype=torch.long)
    expected = encoder(started, keep, first, copied)[:, 0]                         # (6, D)
    torch.testing.assert_close(encoder.fused_cls(started, keep, keys_values, images), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder.fused_cls(started, keep, keys_values, images)
    assert 0 < (rounded - expected).abs().max() < 0.1


def test_a_pair_scores_the_same_in_any_company(model, tokenizer, paths):
    """Whatever the batch, the other queries (among them the longest) and the other images."""
    full = search(model, tokenizer, CAPTIONS, paths, Settings(5))
    for queries, gallery in (([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), ([3], [4, 2, 0, 1, 3]), ([1, 2], [2, 3]),
                             ([4, 0], [1])):
        some = [CAPTIONS[q] for q in queries], [paths[g] for g in gallery]
        found = search(model, tokenizer, *some, Settings(5, batch=2))
        for alone, together in ((by_pair(found), by_pair(full)), (matrix(found), matrix(full))):
            torch.testing.assert_close(alone, together[queries][:, gallery], atol=1e-5, rtol=1e-5)


def test_k_larger_than_the_gallery_and_none(model, tokenizer, paths):
    everything = search(model, tokenizer, CAPTIONS, paths, Settings(100))
    assert everything.candidates.shape == everything.match_logit.shape == (5, 5)
    assert everything.reranked(0.0).tolist() == by_pair(everything).argsort(dim=1, descending=True).tolist()
    nothing = search(model, tokenizer, CAPTIONS, paths, Settings(0))
    assert nothing.match_logit.shape == (5, 0)
    assert nothing.reranked(8.0).tolist() == nothing.candidates.tolist() == everything.candidates.tolist()


def test_without_candidates_the_fusion_encoder_does_nothing(model, tokenizer, paths, monkeypatch):
    expected = search(model, tokenizer, CAPTIONS, paths, Settings(2))
    monkeypatch.setattr(model.fusion_encoder, "start", lambda *given: pytest.fail("it started"))
    assert torch.equal(search(model, tokenizer, CAPTIONS, paths, Settings(0)).similarity, expected.similarity)
    assert ranking.encode_queries(model, tokenizer, CAPTIONS, fuse=False)[0].numel() == 0


def test_steps_are_filled_in_the_order_of_length():
    """Lengths 4 1 3 2 3 of five pairs, in steps of 4 tokens: tokens 0 1-2 | 3-5 6-8 | 9-12, by their last ones."""
    steps = ranking.bucketed(torch.arange(5), torch.tensor([4, 1, 3, 2, 3]), 4)
    assert [step.tolist() for step in steps] == [[1, 3], [2], [4], [0]]
    steps = ranking.bucketed(torch.tensor([4, 0, 2]), torch.tensor([4, 1, 3, 2, 3]), 100)
    assert [step.tolist() for step in steps] == [[4, 2, 0]]


def test_the_candidates_are_the_most_similar(model, tokenizer, paths):
    """Two are re-scored, three found, the last two ranked for the metrics alone."""
    found = search(model, tokenizer, CAPTIONS, paths, Settings(2, listed=3))
    ranks = matrix(found).argsort(dim=1, descending=True)
    assert found.candidates.tolist() == ranks[:, :3].tolist() and found.match_logit.shape == (5, 2)
    assert found.reranked(1.0)[:, :2].sort(1).values.tolist() == ranks[:, :2].sort(1).values.tolist()
    assert order(found, found.reranked(1.0))[:, 2:].tolist() == ranks[:, 2:].tolist()


def test_images_that_no_query_asks_for(model, tokenizer, paths):
    """One candidate in a gallery of five batches: four of them have nothing to score."""
    found = search(model, tokenizer, CAPTIONS[:1], paths, Settings(1, batch=1))
    best = found.candidates[0, 0]
    assert found.match_logit[0, 0].item() == pytest.approx(
        by_pair(search(model, tokenizer, CAPTIONS[:1], paths, Settings(5)))[0, best].item(), abs=1e-5)


def test_every_image_is_ranked_once_where_equals_straddle_the_last_candidate(model, tokenizer, paths):
    """Forty files with two pictures: none is lost or doubled."""
    found = search(model, tokenizer, CAPTIONS, [paths[i % 2] for i in range(40)], Settings(13, batch=40))
    assert order(found, found.reranked(0.0)).sort(1).values.tolist() == [list(range(40))] * 5
