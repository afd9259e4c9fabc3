"""The order of samples, what a sample's randomness depends on, and that image, words and region agree."""

import random

import numpy as np
import pytest
import torch
from conftest import spelt

from mra.config import TrainConfig
from mra.data.batches import WINDOW, Batch, PairDataset, order
from mra.data.records import Record, RecordSet
from mra.data.tokenizer import MAX_MASKED

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def pairs(paint, tokenizer, config):
    """Make a PairDataset: five images with two captions each and, unless they are in `bare`, two regions."""
    def make(bare=(), name: str = "sda", **settings) -> PairDataset:
        records = tuple(Record(
            paint(f"{i}.png", seed=i),
            (f"a man number {i} with a red coat", "a woman in blue jeans on the left"), i,
            *((), ()) if i in bare else (((0.5, 0.25, 1.0, 0.3), (0.5, 0.75, 0.5, 0.5)),
                                                    ("a red coat", f"shoes {i}"))) for i in range(5))
        train = TrainConfig(**{"eda": 0.8} | settings)
        return PairDataset(RecordSet(name, "train", records), tokenizer, config, train)
    return make


def equal(one, other) -> bool:
    """Whether two Samples or Batches hold the same."""
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


LENGTHS = [30, 12, 25, 12, 18, 40, 7, 33, 21, 15]


def keys(steps: int, **changes) -> list[list[tuple[int, int]]]:
    return list(order(**{"lengths": LENGTHS, "batch": 4, "seed": 3, "start": 0, "stop": steps} | changes))


# ---- order

@pytest.mark.parametrize("count, batch", [(10, 4), (3, 8), (7, 7), (1, 2)])
def test_every_epoch_is_a_permutation(count, batch):
    """Also where batches straddle epochs, or hold several."""
    steps = 2 * WINDOW
    stream = [key for step in keys(steps, lengths=LENGTHS[:count], batch=batch) for key in step]
    assert sorted(epoch for epoch, _ in stream) == [position // count for position in range(batch * steps)]
    orders = [[index for e, index in stream if e == epoch] for epoch in range(batch * steps // count)]
    assert len(orders) > 1 and all(sorted(order) == list(range(count)) for order in orders)
    assert count == 1 or any(order != orders[0] for order in orders)


def test_a_window_of_steps_is_sorted_by_length():
    """No step of 5 holds lengths between those of another, and no pair twice, where a window is one epoch."""
    lengths = [7 * i % 80 for i in range(80)]
    for window in (keys(WINDOW, lengths=lengths, batch=5), keys(2 * WINDOW, lengths=lengths, batch=5)[WINDOW:]):
        ranges = [sorted(lengths[index] for _, index in step) for step in window]
        assert sorted(ranges) == [list(range(start, start + 5)) for start in range(0, 80, 5)] != ranges


def test_no_step_holds_a_pair_twice_though_a_window_holds_several_epochs():
    assert all(len({index for _, index in step}) == 5 for step in keys(2 * WINDOW, batch=5))


def test_the_order_depends_on_the_seed_alone():
    assert keys(10) == keys(10) != keys(10, seed=4)
    assert all(len(step) == 4 for step in keys(10))


def test_two_ranks_are_one_process_with_the_joined_batch():
    ranks = [keys(20, rank=rank, processes=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks)] == keys(20, batch=8)


@pytest.mark.parametrize("processes, rank", [(1, 0), (2, 1)])
@pytest.mark.parametrize("start", [1, 4, 15, 16, 33])
def test_a_later_start_goes_on_with_the_same_stream(start, processes, rank):
    assert keys(40, start=start, processes=processes, rank=rank) == keys(40, processes=processes, rank=rank)[start:]


# ---- randomness

def test_the_number_of_workers_changes_nothing(pairs):
    dataset = pairs()
    batches = [list(torch.utils.data.DataLoader(dataset, batch_sampler=order(LENGTHS, 4, 0, 0, 6), num_workers=workers,
                                                collate_fn=dataset.collate)) for workers in (0, 2)]
    assert len(batches[0]) == 6 and all(equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_sample_depends_on_seed_epoch_and_index_alone(pairs):
    dataset, other = pairs(seed=1), pairs(seed=1)
    first = dataset[2, 3]
    for epoch in range(3):                                # other samples and other generators in between
        dataset[epoch, 5]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert equal(dataset[2, 3], first) and equal(other[2, 3], first)
    for epoch, index, seed in ((3, 3, 1), (2, 3, 2)):
        changed = pairs(seed=seed)[epoch, index]
        assert changed.caption_ids in (first.caption_ids, dataset.encode("a woman in blue jeans on the right"))
        assert not torch.equal(changed.image, first.image)
    assert len({tuple(dataset[epoch, 0].eda_ids) for epoch in range(20)}) > 5
    assert len({tuple(dataset[epoch, 0].masked_ids) for epoch in range(20)}) > 5
    assert len({tuple(dataset[epoch, 0].phrase_ids) for epoch in range(20)}) == 2


def test_every_caption_of_every_record_is_a_pair(pairs):
    """Records of 2, 1, 3 captions: six pairs, in their order."""
    dataset = pairs()
    several = ("red", "blue"), ("green",), ("black", "white", "grey")
    some = [Record(dataset.pairs[i][1], captions, i) for i, captions in enumerate(several)]
    dataset = PairDataset(RecordSet("sda", "train", some), dataset.tokenizer, dataset.sizes, dataset.config)
    assert len(dataset) == 6
    words = [spelt(dataset.tokenizer, dataset[0, index].caption_ids) for index in range(6)]
    assert words == [["red"], ["blue"], ["green"], ["black"], ["white"], ["grey"]]
    assert [dataset[0, index].identity for index in range(6)] == [0, 0, 1, 2, 2, 2]


# ---- regions

def test_without_boxes_the_region_is_the_whole_image_and_the_phrase_is_the_caption(pairs):
    dataset = pairs(bare=[4])
    batch = dataset.collate([dataset[0, index] for index in range(10)])
    assert batch.region_keep[8:].all() and not batch.region_keep[:8].all(1).any()
    for row in (8, 9):                                    # the two captions of the last image
        phrase = batch.phrase_ids[row][batch.phrase_keep[row]]
        assert torch.equal(phrase, batch.caption_ids[row][batch.caption_keep[row]])


def test_equal_phrases_are_one_class(pairs):
    dataset = pairs(bare=[4])
    samples = [dataset[epoch, index] for epoch in range(6) for index in range(10)]
    batch = dataset.collate(samples)
    classes = batch.phrase_class.tolist()
    assert batch.phrase_class.dtype == torch.int64
    assert len(set(classes)) == 1 + 4 + 3                 # coat, shoes, captions
    for a, one in zip(samples, classes):
        for b, other in zip(samples, classes):
            assert (a.phrase_ids == b.phrase_ids) == (one == other)


@pytest.mark.parametrize("settings", [dict(regions=False), dict(bare=range(5)),
                                      dict(bare=range(5), name="icfg")])
def test_without_regions_there_are_none(pairs, settings):
    dataset = pairs(eda=0.0, **settings)
    batch = dataset.collate([dataset[0, 0], dataset[0, 1]])
    assert batch.region_keep is batch.phrase_ids is batch.phrase_keep is batch.phrase_class is None
    assert batch.eda_ids is batch.eda_keep is None


def test_pretraining_without_boxes_crops_at_random(pairs):
    """MALS has no boxes, so nothing has to stay in the picture: more views than one and its mirror image."""
    dataset = pairs(bare=range(5), name="mals")
    assert len({dataset[epoch, 0].image.numpy().tobytes() for epoch in range(10)}) > 2


# ---- left and right

@pytest.mark.parametrize("boxes", [(), ((0.25, 0.5, 0.5, 1.0),)])
def test_the_words_of_a_mirrored_image_change_sides(paint, tokenizer, config, boxes):
    """Red on the left, blue on the right; fine-tuning has no box, pretraining has one on the red."""
    path = paint("sides.png", left=RED, right=BLUE)
    record = Record(path, ("left",), 0, boxes, ("the left half",) * len(boxes))
    source = RecordSet("sda" if boxes else "cuhk", "train", (record,))
    dataset, size = PairDataset(source, tokenizer, config, TrainConfig(eda=1.0)), config.patch
    seen = set()
    for epoch in range(30):
        sample = dataset[epoch, 0]
        redness = sample.image[0] - sample.image[2]               # (H, W)
        side = "left" if redness[:, 0].mean() > redness[:, -1].mean() else "right"
        seen.add(side)
        assert spelt(tokenizer, sample.caption_ids) == spelt(tokenizer, sample.eda_ids) == [side]
        if boxes:
            assert spelt(tokenizer, sample.phrase_ids) == ["the", side, "half"]
            patches = redness.unfold(0, size, size).unfold(1, size, size).mean((2, 3))
            red = patches > patches.mean()                        # (rows, columns)
            keep = sample.region_keep.view(config.grid)
            assert keep[red].all() and keep[:, 0 if side == "left" else -1].all()
    assert seen == {"left", "right"}


# ---- words

def test_labels_agree_with_what_was_masked(pairs):
    """Label by label: the caption has what is to be predicted, and is the masked caption elsewhere."""
    dataset = pairs()
    samples = [dataset[epoch, index] for epoch in range(5) for index in range(10)]
    batch = dataset.collate(samples)
    assert batch.masked_at.shape == batch.masked_labels.shape == (50, MAX_MASKED)
    for row, sample in enumerate(samples):
        predicted = [(at, sample.caption_ids[at]) for at in sample.masked_at]
        fill = [(0, -100)] * (MAX_MASKED - len(predicted))
        found = list(zip(batch.masked_at[row].tolist(), batch.masked_labels[row].tolist()))
        assert predicted and found == predicted + fill
        assert all(batch.caption_ids[row, at] == label for at, label in predicted)
        changed = (batch.masked_ids[row] != batch.caption_ids[row]).nonzero().flatten().tolist()
        assert set(changed) <= {at for at, _ in predicted}
        assert batch.caption_ids[row][batch.caption_keep[row]].tolist() == sample.caption_ids
        assert (batch.caption_ids[row][~batch.caption_keep[row]] == dataset.tokenizer.pad_id).all()
    masked = batch.masked_ids.gather(1, batch.masked_at)[batch.masked_labels >= 0]
    assert 0.65 < (masked == dataset.tokenizer.mask_id).float().mean() < 0.95


def test_captions_are_cleaned_as_their_set_asks_and_cut(pairs):
    dataset = pairs(name="icfg")
    assert spelt(dataset.tokenizer, dataset[0, 0].caption_ids) == "a man number 0 with a red coat".split()
    long = Record(dataset.pairs[0][1], ("Grey, " + "red! " * 90,), 0)
    source = RecordSet("icfg", "train", (long,))
    cut = PairDataset(source, dataset.tokenizer, dataset.sizes, TrainConfig())[0, 0].caption_ids
    assert len(cut) == 56 and spelt(dataset.tokenizer, cut) == ["grey"] + ["red"] * 53


def test_a_batch_moves_as_a_whole(batch):
    moved = batch._replace(eda_ids=None).to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.eda_ids is None
    tensors = [x for x in moved if x is not None]
    assert len(tensors) == 12 and all(x.device.type == "meta" for x in tensors)


def test_a_batch_is_pinned_by_the_loader(batch, monkeypatch):
    """All of it, by what DataLoader calls for `pin_memory=True`; a GPU is what really pins."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.to("meta"))
    pinned = torch.utils.data._utils.pin_memory.pin_memory([batch._replace(eda_ids=None)])[0]
    assert pinned.eda_ids is None and {x.device.type for x in pinned if x is not None} == {"meta"}
