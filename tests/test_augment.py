"""Image and box move together: painted boxes are looked for in the transformed pictures."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from mra.data import augment
from mra.data.augment import box_to_patches, finetune_view, pretrain_view

SIZE = (192, 96)


def colours(view_image: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: (H, W, 3) in 0 .. 255."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((view_image * std + mean) * 255).permute(1, 2, 0).numpy()


def noise(width=48, height=96) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def painted(rng: random.Random) -> tuple[Image.Image, tuple[float, ...]]:
    """A blue 90 x 200 picture with a red box on whole pixels: the picture and the box."""
    pixels = np.full((200, 90, 3), (0, 0, 255), np.uint8)
    (left, right), (top, bottom) = sorted(rng.sample(range(91), 2)), sorted(rng.sample(range(201), 2))
    pixels[top:bottom, left:right] = (255, 0, 0)
    box = ((left + right) / 180, (top + bottom) / 400, (right - left) / 90, (bottom - top) / 200)
    return Image.fromarray(pixels), box


@pytest.mark.parametrize("seed", range(60))
def test_the_box_stays_on_what_it_marks(seed):
    rng = random.Random(seed)
    image, box = painted(rng)
    view = pretrain_view(image, box, SIZE, rng)
    red = colours(view.image)[..., 0]                                       # 255 inside the box, 0 outside
    cx, cy, w, h = view.box
    assert min(cx - w / 2, cy - h / 2) >= -1e-9 and max(cx + w / 2, cy + h / 2) <= 1 + 1e-9
    scale_x, scale_y = (w / box[2]) * SIZE[1] / 90, (h / box[3]) * SIZE[0] / 200     # view pixels of a pixel
    assert 0.9 < scale_x < 2.2 and 0.8 < scale_y < 2.2
    weight = red.clip(0, 255) / 255                                         # mass and centre of what is red
    assert weight.sum() / red.size == pytest.approx(w * h, rel=0.1, abs=0.004)
    columns, rows = (np.arange(n) + 0.5 for n in (SIZE[1], SIZE[0]))
    assert (weight.sum(0) @ columns) / weight.sum() / SIZE[1] == pytest.approx(cx, abs=0.012)
    assert (weight.sum(1) @ rows) / weight.sum() / SIZE[0] == pytest.approx(cy, abs=0.012)
    seen = np.argwhere(red > 128)                                           # its four edges, to a pixel
    if min(w * SIZE[1], h * SIZE[0]) > 3:
        expected = np.array([cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2]) * (SIZE * 2)
        assert np.abs(np.array([*seen.min(0), *(seen.max(0) + 1)]) - expected).max() <= 1.01


def test_mirroring_is_told_and_done_half_of_the_time():
    pixels = np.zeros((60, 30, 3), np.uint8)
    pixels[:, :15] = 255                                                    # bright on the left
    image, rng = Image.fromarray(pixels), random.Random(1)
    for make in (lambda: pretrain_view(image, (0.5, 0.5, 1.0, 1.0), SIZE, rng),
                 lambda: finetune_view(image, SIZE, rng, erase=0.0)):
        views = [make() for _ in range(200)]
        for view in views:
            left, right = colours(view.image)[:, :40].mean(), colours(view.image)[:, -40:].mean()
            assert (right > left + 200) if view.mirrored else (left > right + 200)
        assert 70 < sum(view.mirrored for view in views) < 130


def test_crops_vary_in_the_stated_range_and_without_a_box_too():
    gradient = np.zeros((200, 200, 3), np.uint8)
    gradient[..., 0], gradient[..., 1] = np.arange(200), np.arange(200)[:, None]     # colour = column, row
    image, rng = Image.fromarray(gradient), random.Random(2)
    spans, starts = [], []
    for _ in range(300):
        view = pretrain_view(image, None, (50, 50), rng)
        assert view.box is None
        seen = colours(view.image)
        x, y = np.sort(seen[25, [0, -1], 0]), seen[[0, -1], 25, 1]
        spans.append(((x[1] - x[0]) / 196, (y[1] - y[0]) / 196))
        starts.append(y[0] / (199 - (y[1] - y[0])) if y[1] - y[0] < 170 else 0.5)
    areas, ratios = np.prod(spans, axis=1), np.divide(*np.transpose(spans))
    assert areas.min() > 0.45 and areas.max() > 0.9 and np.ptp(areas) > 0.3
    assert ratios.min() > 0.72 and ratios.max() < 1.4 and ratios.max() > 1.2 and ratios.min() < 0.84
    assert np.histogram(starts, 4, (0, 1))[0].min() > 20                    # top, middle and bottom alike


def test_boxes_at_the_limits_stay_inside():
    image, rng = noise(), random.Random(3)
    limits = [(0.5, 0.5, 1.0, 1.0), (0.0005, 0.5, 0.001, 1.0), (1 - 1e-9, 1 - 1e-9, 2e-9, 2e-9),
              (0.5, 0.1, 1.0, 0.2), (0.15, 0.15, 0.3, 0.30000000000000004), (0.95, 0.85, 0.1, 0.3)]
    for box in limits * 100:
        cx, cy, w, h = pretrain_view(image, box, (16, 8), rng).box
        assert 0 < w <= 1 and 0 < h <= 1
        assert min(cx - w / 2, cy - h / 2) >= -1e-9 and max(cx + w / 2, cy + h / 2) <= 1 + 1e-9


def test_values_are_normalised_and_resized_as_clip_does():
    image = noise()
    expected = np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC)) / 255
    expected = (expected - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    view = augment.tensor_of(image, (64, 32))
    assert view.shape == (3, 64, 32) and view.dtype == torch.float32 and view.is_contiguous()
    assert np.abs(view.permute(1, 2, 0).numpy() - expected).max() < 1e-5
    rng = random.Random(0)
    for _ in range(10):
        tuned = finetune_view(image, (64, 32), rng, erase=0.0)
        assert torch.equal(tuned.image.flip(2) if tuned.mirrored else tuned.image, view) and tuned.box is None
    full = pretrain_view(image, (0.5, 0.5, 1.0, 1.0), (64, 32), rng)        # the box leaves no room to crop
    assert torch.allclose(full.image.flip(2) if full.mirrored else full.image, view, atol=1e-5)
    assert full.box == (0.5, 0.5, 1.0, 1.0)


def test_erasing_sets_one_rectangle_to_zero():
    image, rng, areas, ratios, corners = noise(), random.Random(4), [], [], []
    views = [finetune_view(image, (64, 32), rng, erase=0.6) for _ in range(1000)]
    for view in views:
        gone = (view.image == 0).all(0).numpy()
        if gone.sum() < 4:                                                  # a pixel may be 0 by chance
            continue
        (top, left), (bottom, right) = np.argwhere(gone).min(0), np.argwhere(gone).max(0) + 1
        assert gone[top:bottom, left:right].all() and gone.sum() == (bottom - top) * (right - left)
        areas.append(gone.mean())
        ratios.append((bottom - top) / (right - left))
        corners.append((top, left))
    assert 540 < len(areas) < 660
    assert 0.015 < min(areas) < 0.05 and 0.35 < max(areas) < 0.42
    assert min(ratios) < 0.5 and max(ratios) > 2.5 and np.ptp(corners, axis=0).min() > 20
    assert all((finetune_view(image, (64, 32), rng, 1.0).image == 0).any() for _ in range(20))


def test_a_view_depends_on_its_generator_alone():
    image, before = noise(), random.getstate()
    for make in (lambda rng: pretrain_view(image, (0.4, 0.3, 0.2, 0.2), (64, 32), rng),
                 lambda rng: finetune_view(image, (64, 32), rng, 0.6)):
        views = [[make(random.Random(seed)) for seed in range(20)] for _ in range(2)]
        for first, again in zip(*views):
            assert torch.equal(first.image, again.image)
            assert (first.box, first.mirrored) == (again.box, again.mirrored)
        assert len({view.image.numpy().tobytes() for view in views[0]}) > 5
    assert random.getstate() == before


@pytest.mark.parametrize("grid", [(8, 4), (12, 8), (7, 7), (24, 16), (1, 1), (2, 5)])
def test_box_to_patches_against_rasterisation(grid):
    """Boxes on a lattice of F cells a patch are painted cell by cell; a patch is kept if a cell of it is."""
    fine, rng = 6, random.Random(7)
    rows, columns = grid[0] * fine, grid[1] * fine
    for _ in range(300):
        top, bottom = sorted(rng.sample(range(rows + 1), 2))
        left, right = sorted(rng.sample(range(columns + 1), 2))
        painted_cells = np.zeros((rows, columns), bool)
        painted_cells[top:bottom, left:right] = True
        expected = painted_cells.reshape(grid[0], fine, grid[1], fine).any((1, 3)).ravel()
        keep = box_to_patches(((left + right) / 2 / columns, (top + bottom) / 2 / rows,
                               (right - left) / columns, (bottom - top) / rows), grid)
        assert keep.dtype == torch.bool and keep.shape == (grid[0] * grid[1],)
        assert keep.tolist() == expected.tolist()


def test_box_to_patches_is_never_empty():
    for centre in (0.0, 0.25, 0.5, 1 - 1e-12, 1.0, math.nextafter(0.75, 0)):
        for length in (0.0, 1e-12, 1e-7):
            assert box_to_patches((centre, centre, length, length), (8, 4)).sum() == 1
    assert box_to_patches((0.5, 0.5, 1.0, 1.0), (12, 8)).all()
    assert box_to_patches((0.5, 0.5, 1.2, 1.2), (12, 8)).all()


def test_random_light_keeps_the_box_and_the_share():
    """Light changes what is seen, not where; the share decides how often, the generator all else."""
    view = pretrain_view(noise(), None, SIZE, random.Random(0)).image
    assert torch.allclose(augment.relit(view, 0.0, random.Random(1)), view, atol=1e-5)
    assert torch.equal(augment.relit(view, 1.0, random.Random(1)), augment.relit(view, 1.0, random.Random(1)))
    lit = [not torch.allclose(augment.relit(view, 0.75, random.Random(seed)), view, atol=1e-3) for seed in range(200)]
    assert 130 <= sum(lit) <= 170
    images = torch.rand(64, 3, 16, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = augment.random_light(images, 1.0, torch.Generator().manual_seed(1))
    assert made.shape == images.shape and -1 <= made.min() and made.max() <= 1
    means = made.mean((1, 2, 3))
    assert means.std() > 3 * images.mean((1, 2, 3)).std()
