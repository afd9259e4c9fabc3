"""From records to a Batch, the model's input.

All randomness of a sample comes from (seed, epoch, index). The order of the samples depends on the seed, the captions'
lengths and the number of pairs in a step's batch, not on loading processes or restarts. Read next: group.py, layers.py.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mra.config import ModelConfig, TrainConfig, pretrains
from mra.data.augment import box_to_patches, finetune_view, pretrain_view, relit
from mra.data.files import open_image
from mra.data.records import Packed, RecordSet
from mra.data.tokenizer import MAX_MASKED, Tokenizer, mask_words, pad
from mra.data.words import eda, swap_left_right

WHOLE_IMAGE = (0.5, 0.5, 1.0, 1.0)
WINDOW = 16     # batches whose pairs are sorted by length together: length bucketing


class Sample(NamedTuple):
    """One image-caption pair, and one of its regions, before padding."""
    image: Tensor                       # (3, H, W)
    identity: int
    caption_ids: list[int]              # (T,)
    masked_ids: list[int]               # (T,) some replaced
    masked_at: list[int]                # the positions to predict
    eda_ids: list[int] | None = None    # (T',) of an augmented caption
    region_keep: Tensor | None = None   # (N,)
    phrase_ids: list[int] | None = None         # (P,)


class Batch(NamedTuple):
    """What one member of a group (group.py) gets of a batch. Every keep mask: True = use it."""
    image: Tensor                       # (B, 3, H, W) normalised
    identity: Tensor                    # (B,)
    caption_ids: Tensor                 # (B, T)
    caption_keep: Tensor                # (B, T)
    masked_ids: Tensor                  # (B, T) the caption with masked words
    masked_at: Tensor                   # (B, M) the positions to predict
    masked_labels: Tensor               # (B, M) the ids of the caption there; -100: padding, without a loss
    eda_ids: Tensor | None = None       # (B, T') a second, augmented caption
    eda_keep: Tensor | None = None      # (B, T')
    region_keep: Tensor | None = None   # (B, N) the patches that the region's box touches
    phrase_ids: Tensor | None = None    # (B, P)
    phrase_keep: Tensor | None = None   # (B, P)
    phrase_class: Tensor | None = None  # (B,) equal phrases are one class

    def to(self, device: torch.device) -> "Batch":
        return Batch(*[x if x is None else x.to(device, non_blocking=True) for x in self])


class PairDataset(Dataset):
    """The image-caption pairs of a RecordSet as Samples, indexed by (epoch, index)."""

    def __init__(self, record_set: RecordSet, tokenizer: Tokenizer, model: ModelConfig, train: TrainConfig):
        self.name, self.tokenizer = record_set.name, tokenizer
        self.sizes, self.config = model, train
        self.pairs = Packed([caption, record.path, record.identity, record.boxes, record.phrases]
                            for record in record_set.records for caption in record.captions)
        self.lengths = [len(caption) for record in record_set.records for caption in record.captions]
        has_boxes = any(record.boxes for record in record_set.records)
        self.with_regions = train.regions and has_boxes
        self.pretraining = has_boxes or pretrains(record_set.name)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        rng = random.Random(f"{self.config.seed}-{epoch}-{index}")
        caption, path, identity, boxes, phrases = self.pairs[index]
        caption = self.tokenizer.clean(caption, self.name)
        box, phrase = WHOLE_IMAGE, caption      # of a record without boxes in a set with some (MRA section 2)
        if boxes:
            box, phrase = rng.choice(list(zip(boxes, phrases)))
        image, size = open_image(path), (self.sizes.height, self.sizes.width)
        if self.pretraining:
            view = pretrain_view(image, box if self.with_regions else None, size, rng)
            if self.config.light:
                view = view._replace(image=relit(view.image, self.config.light, rng))
        else:
            view = finetune_view(image, size, rng, self.config.erase)
        if view.mirrored:
            caption, phrase = swap_left_right(caption), swap_left_right(phrase)
        ids = self.encode(caption)
        masked, masked_at = mask_words(ids, self.tokenizer, rng)
        augmented = self.encode(eda(caption, rng)) if self.config.eda else None
        region_keep = phrase_ids = None
        if self.with_regions:
            region_keep, phrase_ids = box_to_patches(view.box, self.sizes.grid), self.encode(phrase)
        return Sample(view.image, identity, ids, masked, masked_at, augmented, region_keep, phrase_ids)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, self.sizes.max_tokens)

    def collate_parts(self, samples: list[Sample], parts: int) -> list[Batch]:
        """Several Batches of equal size, one for each member of the group."""
        size = len(samples) // parts
        return [self.collate(samples[start:start + size]) for start in range(0, len(samples), size)]

    def collate(self, samples: list[Sample]) -> Batch:
        """Samples -> Batch; words are padded to the longest of the batch."""
        every, pad_id = Sample(*zip(*samples)), self.tokenizer.pad_id       # each field holds the values of all samples
        caption_ids, caption_keep = pad(every.caption_ids, pad_id)
        masked_ids, _ = pad(every.masked_ids, pad_id)
        masked_at, _ = pad(every.masked_at, 0, MAX_MASKED)
        labels = [[sample.caption_ids[i] for i in sample.masked_at] for sample in samples]
        batch = Batch(torch.stack(every.image), torch.tensor(every.identity), caption_ids, caption_keep, masked_ids,
                      masked_at, pad(labels, -100, MAX_MASKED)[0])
        if every.eda_ids[0] is not None:
            eda_ids, eda_keep = pad(every.eda_ids, pad_id)
            batch = batch._replace(eda_ids=eda_ids, eda_keep=eda_keep)
        if every.phrase_ids[0] is not None:
            phrase_ids, phrase_keep = pad(every.phrase_ids, pad_id)
            classes = torch.tensor([hash(tuple(ids)) for ids in every.phrase_ids])    # the same in every process
            batch = batch._replace(region_keep=torch.stack(every.region_keep), phrase_ids=phrase_ids,
                                   phrase_keep=phrase_keep, phrase_class=classes)
        return batch


def loader(samples: Dataset | Sequence, workers: int, batch_size: int = 1, sampler: Iterable | None = None,
           batch_sampler: Iterable | None = None, collate_fn: Callable | None = None,
           pin_memory: bool = False) -> DataLoader:
    """A loader with forked processes, which share the records in memory and handle signals as this process does."""
    context = "fork" if workers else None
    return DataLoader(samples, batch_size, sampler=sampler, batch_sampler=batch_sampler, num_workers=workers,
                      collate_fn=collate_fn, pin_memory=pin_memory, multiprocessing_context=context)


def order(lengths: list[int], batch: int, seed: int, start: int, stop: int, rank: int = 0,
          processes: int = 1) -> Iterator[list[tuple[int, int]]]:
    """Batches `start` to `stop` of (epoch, index), from one stream of permutations that all `processes` share.

    Length bucketing: a batch has captions of similar `lengths`, so little padding. Each rank takes `batch` pairs of it.
    """
    for number in range(start, stop):
        if number == start or number % WINDOW == 0:
            batches = _window(lengths, batch * processes, seed, number // WINDOW)
        yield batches[number % WINDOW][rank * batch:(rank + 1) * batch]


def _window(lengths: list[int], pairs: int, seed: int, number: int) -> list[list[tuple[int, int]]]:
    """WINDOW batches of `pairs` (epoch, index) each: a part of the stream, sorted by length and cut into batches."""
    first = number * WINDOW * pairs
    places = [divmod(position, len(lengths)) for position in range(first, first + WINDOW * pairs)]
    keys = [(epoch, _permutation(len(lengths), seed, epoch)[place]) for epoch, place in places]
    keys.sort(key=lambda key: (key[0], lengths[key[1]]))        # by epoch first: a pair is rarely twice in a batch
    batches = [keys[start:start + pairs] for start in range(0, len(keys), pairs)]
    random.Random(f"{seed}-{number}").shuffle(batches)
    return batches


@lru_cache(1)       # positions ascend: one epoch at a time
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(hash((seed, epoch)) % 2**62)
    return torch.randperm(count, generator=generator).tolist()
