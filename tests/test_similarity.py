"""Losses and search in chunks against double loops in float64, whole matrices and rankings made by hand."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import in_two
from safetensors import safe_open
from safetensors.torch import save_file
from test_commands import succeed
from test_losses import contrastive_by_loops, unit
from torch.utils._python_dispatch import TorchDispatchMode

from mra import losses, ranking
from mra.group import Group
from mra.ranking import top_k
from mra.retriever import Objective, pool_region
from mra.run import contrastive as scale
from mra.run.contrastive import contrastive
from mra.run.machine import Processes, Threads

COMPILED = scale.compiled


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Set the rows of a tile, for any number of pairs; nothing is compiled, which takes long."""
    monkeypatch.setattr(scale, "compiled", lambda function: function)

    def of(rows: int) -> None:
        monkeypatch.setattr(scale, "PLAIN", 0)
        monkeypatch.setattr(scale, "TILES", {"cpu": (rows, 2 * rows + 1)})
    return of


def whole_matrix(image, text, temperature, ids, smoothing):
    """The loss from all logits at once, in the precision of the features."""
    logits, same = image @ text.T / temperature, (ids[:, None] == ids).to(image)
    target = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / len(ids)
    return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2


def with_gradients(loss, image, text, temperature, *rest) -> list[torch.Tensor]:
    """The loss and its gradients by image, text and temperature."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (image, text, temperature)]
    value = loss(*leaves, *rest)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def threads(count: int) -> list[Threads]:
    """Group that exchange tensors with each other, each for a thread of its own."""
    slots, barrier = [None] * count, Barrier(count)
    return [Threads(rank, slots, barrier) for rank in range(count)]


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


# ---- contrastive: the numbers

@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [3, 7, 3, 3, 7, 1, 1], [9, 9, 9], [5], [2**55, 2**55 + 1, 2**55]])
def test_contrastive_is_a_double_loop_with_its_gradients(ids, smoothing, tiled):
    torch.manual_seed(0)
    inputs = unit(len(ids), 6), unit(len(ids), 6), torch.tensor(0.07).double()
    expected = with_gradients(contrastive_by_loops, *inputs, ids, smoothing)
    for rows in (1, 2, 4, 16):
        tiled(rows)
        found = with_gradients(contrastive, *inputs, torch.tensor(ids), smoothing)
        for ours, reference in zip(found, expected):
            torch.testing.assert_close(ours, reference.double(), atol=1e-12, rtol=1e-9)


def test_gradients_by_differences(tiled):
    torch.manual_seed(0)
    tiled(2)
    leaves = [leaf.requires_grad_() for leaf in (unit(5, 4), unit(5, 4), torch.tensor(0.3).double())]
    ids = torch.tensor([0, 1, 0, 2, 2])
    assert torch.autograd.gradcheck(lambda *leaves: contrastive(*leaves, ids, 0.2), leaves)


@pytest.mark.parametrize("precision, limit", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("count, rows, temperature", [(257, 64, 0.07), (300, 128, 0.5), (97, 40, 0.01)])
@pytest.mark.parametrize("noise", [0.5, 10.0])
def test_error_against_float64(precision, limit, count, rows, temperature, noise, tiled):
    """Loss and gradients of well aligned pairs (noise 0.5) and of random ones, from the same rounded features."""
    torch.manual_seed(count)
    image = unit(count, 48)
    text = F.normalize(image + noise * unit(count, 48), dim=1)
    ids = torch.randint(0, 4 * count, (count,))
    inputs = image.to(precision), text.to(precision), torch.tensor(temperature)
    expected = with_gradients(whole_matrix, *(x.double() for x in inputs), ids, 0.2)
    tiled(rows)
    for ours, reference in zip(with_gradients(contrastive, *inputs, ids, 0.2), expected):
        assert error(ours, reference) <= limit


@pytest.mark.parametrize("temperature", [0.001, 100.0])
def test_extreme_temperatures_stay_finite(temperature, tiled):
    torch.manual_seed(0)
    tiled(16)
    inputs = unit(50, 8).float(), unit(50, 8).float(), torch.tensor(temperature)
    found = with_gradients(contrastive, *inputs, torch.arange(50), 0.0)
    expected = with_gradients(whole_matrix, *(x.double() for x in inputs), torch.arange(50), 0.0)
    for ours, reference in zip(found, expected):
        assert ours.isfinite().all() and error(ours, reference) < 1e-3


def test_under_autocast_features_are_rounded_and_gradients_arrive_in_float32(tiled):
    torch.manual_seed(0)
    tiled(32)
    inputs = unit(70, 16).float(), unit(70, 16).float(), torch.tensor(0.07)
    ids = torch.arange(70) // 2
    expected = with_gradients(contrastive, *inputs, ids, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(contrastive, *inputs, ids, 0.1)
    assert all(x.dtype == torch.float32 for x in found)
    for ours, reference in zip(found, expected):
        assert 0 < error(ours, reference) < 2e-2


def test_logits_of_a_small_batch_are_float32_under_autocast():
    """Rounded to bf16 a cosine of 0.9 over a temperature of 0.01 would be off by up to 0.2."""
    torch.manual_seed(0)
    image, text = unit(20, 64).bfloat16(), unit(20, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits = losses.similarity_logits(image, text, torch.tensor(0.01))
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), image.double() @ text.double().T / 0.01, atol=1e-4)


# ---- contrastive: how it is computed

def test_no_whole_matrix_forward_or_backward(tiled):
    """With 600 pairs, tiles of 8 rows and 8 features nothing is larger than the features of all pairs."""
    tiled(8)
    inputs = unit(600, 8).float(), unit(600, 8).float(), torch.tensor(0.07), torch.arange(600)
    with Largest() as plain:
        with_gradients(losses.contrastive, *inputs, 0.1)
    with Largest() as ours:
        with_gradients(contrastive, *inputs, 0.1)
    assert plain.elements >= 600 * 600 and ours.elements <= 600 * 8


def test_training_uses_it(root, monkeypatch):
    """train.py computes ITC of captions and of augmented captions here; in tiles it logs what it logs without.

    On the CPU two threads share a step: each computes both terms for its two of the four pairs.
    """
    chunk, calls = scale.logits_and_targets, []
    monkeypatch.setattr(scale, "logits_and_targets", lambda image, *more: calls.append(len(image))
                        or chunk(image, *more))
    logs = {}
    for name, limit in (("plain", scale.PLAIN), ("tiled", 0)):
        monkeypatch.setattr(scale, "PLAIN", limit)
        succeed(root, "train.py", "--dataset", "cuhk", "--data-root", str(root), "--preset", "tiny", "--init", "none",
                "--steps", "1", "--batch", "4", "--eda", "0.8", "--evals", "1", "--precision", "float32", "--out", name)
        logged = json.loads((root / name / "log.jsonl").read_text().splitlines()[0])
        logs[name] = {term: value for term, value in logged.items() if term not in ("lr", "images_per_second")}
        assert calls == ([] if name == "plain" else [2] * 8)            # forward and backward
    assert "itc" in logs["plain"]
    assert logs["tiled"] == pytest.approx(logs["plain"], rel=1e-5, abs=2e-4)      # the last digit written may differ


def test_every_contrastive_term_of_the_model_uses_it(model, batch, monkeypatch):
    plain = model(batch, Objective(smoothing=0.2))
    monkeypatch.setattr(losses, "contrastive", None)
    monkeypatch.setattr(scale, "PLAIN", 0)
    terms = model(batch, Objective(smoothing=0.2, contrastive=contrastive))
    for name in ("itc", "rpc"):
        torch.testing.assert_close(terms[name], plain[name], atol=1e-5, rtol=1e-5)


def test_a_compiled_model_leaves_the_tiles_out(tiled):
    tiled(32)
    own = []
    model = torch.compile(lambda *given: contrastive(*given).exp(),
                          backend=lambda graph, inputs: own.append(graph.code) or graph.forward)
    torch.manual_seed(0)
    given = unit(100, 8).float(), unit(100, 8).float(), torch.tensor(0.07), torch.arange(100) // 3, 0.1
    assert error(model(*given), losses.contrastive(*given).exp()) < 1e-5
    assert own and not any("logsumexp" in code for code in own)


# ---- a group

PLAINS = 0, 22      # in tiles, and from the whole matrix


@functools.cache
def joint() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(3)
    return unit(22, 6), unit(22, 6), torch.tensor(0.1).double(), torch.randint(0, 7, (22,)), 0.2


def share_of(group: Group) -> list[torch.Tensor]:
    """One of two members: loss and gradients of its half of the pairs."""
    image, text, temperature, ids, smoothing = joint()
    half = slice(11 * group.rank, 11 * (group.rank + 1))
    loss = functools.partial(contrastive, group=group)
    return with_gradients(loss, image[half], text[half], temperature, ids[half], smoothing)


def one_of_two(rank: int, folder: str) -> None:
    """A process of `test_two_processes_are_one`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    scale.TILES, found = {"cpu": (4, 6)}, []
    for scale.PLAIN in PLAINS:
        found.append(share_of(Processes()))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def check_joint(found: list, limit: float) -> None:
    """Each member gets the joint loss; the mean of the members' gradients is that of a group of one."""
    value, *gradients = with_gradients(whole_matrix, *joint())
    (one, *ours), (other, *theirs) = found
    assert abs(one - value) < limit and abs(other - value) < limit
    for k in (0, 1):                                               # a member's own features count in itself alone
        assert error(torch.cat([ours[k], theirs[k]]) / 2, gradients[k]) < limit
    assert error((ours[2] + theirs[2]) / 2, gradients[2]) < limit


def test_two_processes_are_one(tmp_path):
    in_two(one_of_two, str(tmp_path))
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for found, limit in zip(zip(*of_ranks), (1e-10, 1e-5)):        # the whole matrix is in float32
        check_joint(found, limit)


def test_two_threads_are_one(tiled, monkeypatch):
    joint()                     # drawn once, before the threads use it
    tiled(4)
    for plain, limit in zip(PLAINS, (1e-10, 1e-5)):
        monkeypatch.setattr(scale, "PLAIN", plain)
        with ThreadPoolExecutor(2) as pool:
            check_joint(list(pool.map(share_of, threads(2))), limit)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_joint_mean_is_the_mean_of_the_workers_shares(count):
    torch.manual_seed(0)
    values, counts = torch.randn(count, 5), torch.rand(count, 5) < 0.4
    counts[0] = False                                              # a member without any value
    with ThreadPoolExecutor(count) as pool:
        shares = list(pool.map(Group.mean_where, threads(count), values, counts))
    expected = values[counts].mean().item() if counts.any() else 0.0
    assert sum(shares) / count == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("compiles", [True, False])
def test_kernels_are_compiled_and_fall_back(compiles, monkeypatch, capfd):
    """Compiled for two sizes, and, where compiling fails, uncompiled with one line: the same sums."""
    if not compiles:
        def fails(*args, **kwargs):
            raise torch._dynamo.exc.Unsupported("no compiler")
        monkeypatch.setattr(torch, "compile", lambda function, **_: fails)
    scale_sums = COMPILED(lambda *tile: scale.sums(*tile))
    for count in (40, 50):
        image, text, classes = unit(count, 8), unit(count, 8), torch.arange(count) % 7
        weights = torch.full((count,), 0.1).double()
        tile = image, classes, 2 * weights, text, classes, weights, torch.tensor(14.0, dtype=image.dtype)
        for found, right in zip(scale_sums(*tile), scale.sums(*tile)):
            assert error(found, right) < 1e-6
    assert capfd.readouterr().out.count("torch.compile failed") == (not compiles)


# ---- regions

def test_a_region_is_the_mean_of_its_patches_by_a_loop_and_no_large_tensor():
    torch.manual_seed(0)
    tokens, keep = torch.randn(3, 51, 16), torch.rand(3, 50) < 0.2
    keep[1] = False
    with Largest() as seen:
        found, found_keep = pool_region(tokens, keep)
    assert found.shape == (3, 51, 16) and seen.elements <= 3 * 51 * 16
    assert torch.equal(found[:, 1:], tokens[:, 1:]) and torch.equal(found_keep[:, 1:], keep) and found_keep[:, 0].all()
    for b in range(3):
        touched = [tokens[b, 1 + n] for n in range(50) if keep[b, n]]
        expected = sum(touched) / len(touched) if touched else torch.zeros(16)
        torch.testing.assert_close(found[b, 0], expected, atol=1e-5, rtol=1e-5)


# ---- search

def ranked(queries: torch.Tensor, gallery: torch.Tensor, k: int) -> list[list[tuple[float, int]]]:
    """(similarity, index) by a sort, exact for whole numbers: the highest first, equal ones by index."""
    scores = (queries.double() @ gallery.double().T).tolist()
    return [sorted(zip(row, range(len(row))), key=lambda pair: (-pair[0], pair[1]))[:k] for row in scores]


def test_top_k_by_hand(monkeypatch):
    """Similarities 1 3 2 3 0 3 of one query: indices 1, 3, 5 are equal and stand in that order."""
    gallery = torch.tensor([[1.0], [3], [2], [3], [0], [3]])
    for chunk in (1, 2, 4, 6):
        monkeypatch.setattr(ranking, "CHUNK", chunk)
        values, indices = top_k(torch.tensor([[1.0], [-1.0]]), gallery, 3)
        assert values.tolist() == [[3, 3, 3], [0, -1, -2]] and indices.tolist() == [[1, 3, 5], [4, 0, 2]]


@pytest.mark.parametrize("k", [1, 10, 57, 200])
@pytest.mark.parametrize("chunk, block", [(1, 5), (7, 3), (64, 8), (500, 512)])
@pytest.mark.parametrize("levels", [2, 1000])
def test_top_k_is_a_sort_with_ties(k, chunk, block, levels, monkeypatch):
    """Whole numbers, so that sums are exact: with two levels nearly all are equal."""
    torch.manual_seed(k)
    queries, gallery = torch.randint(0, levels, (8, 3)).float(), torch.randint(0, levels, (200, 3)).float()
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    monkeypatch.setattr(ranking, "BLOCK", block)
    values, indices = top_k(queries, gallery, k)
    for found, own, expected in zip(values.tolist(), indices.tolist(), ranked(queries, gallery, k)):
        assert list(zip(found, own)) == expected


def test_similarities_that_are_not_finite_are_ranked_all_the_same():
    gallery = torch.tensor([[1.0], [torch.nan], [2], [torch.nan]])
    assert top_k(torch.tensor([[1.0], [torch.nan]]), gallery, 3)[1].tolist()[0] == [1, 3, 2]


def anonymous() -> int:
    """This process's anonymous memory in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_gallery_on_disk_stays_there(tmp_path, monkeypatch, precision):
    """A file of 32 or 64 MiB, searched 1 MiB at a time, takes less than 16 MiB of anonymous memory."""
    torch.manual_seed(0)
    gallery = F.normalize(torch.randn(2**18, 64), dim=1).to(precision)
    save_file({"gallery": gallery}, tmp_path / "gallery.safetensors")
    wanted = [5, 2**18 - 3, 77777, 131071]
    queries, expected = gallery[wanted].float(), (gallery[wanted].float() @ gallery.float().T).topk(3).indices
    del gallery
    with safe_open(tmp_path / "gallery.safetensors", "pt") as file:
        mapped = file.get_tensor("gallery")
    monkeypatch.setattr(ranking, "CHUNK", 4096)
    top_k(queries, mapped[:8192], 3)                                   # what a first product takes is not counted
    before, peak, topk = anonymous(), [], torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda *inputs: peak.append(anonymous()) or topk(*inputs))
    values, indices = top_k(queries, mapped, 3)
    assert torch.equal(indices, expected) and indices[:, 0].tolist() == wanted
    assert max(peak) - before < 16 * 2**20
