"""Training is a pure function of its configuration: restarts, groups, processes and accumulation change nothing."""

import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import Fresh, in_two, script, torchrun
from test_commands import ROOT, TINY, command, log_of, refused, succeed

from mra import losses, ranking
from mra.config import PRESETS, Fit, TrainConfig, UserError
from mra.data import batches
from mra.data.batches import Batch
from mra.data.tokenizer import Tokenizer
from mra.formats.read import load
from mra.group import Group
from mra.ranking import Settings
from mra.retriever import Objective, Retriever
from mra.run import checkpoint, contrastive, stages
from mra.run.loop import Loop, Portion, Task, schedule
from mra.run.machine import (
    Machine,
    OwnRandomness,
    Processes,
    choose_device,
    choose_precision,
    locked,
)

SIX = (*TINY, "--init", "none", "--steps", "6", "--evals", "2", "--batch", "4", "--log-every", "1", "--lr", "1e-2")
AUGMENTED = ("--eda", "0.8", "--erase", "0.6", "--smoothing", "0.2")


@pytest.fixture(scope="module")
def town(in_town) -> Path:
    """A working directory with the tiny sets in it; runs differ in --out."""
    return in_town("town")


@pytest.fixture(scope="module")
def whole(town, tmp_path_factory) -> Callable[..., Path]:
    """The folder of an undisturbed run with these flags, each made once. Not to be changed."""
    @cache
    def trained(*flags: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        succeed(town, "train.py", *flags, "--out", str(folder))
        return folder
    return trained


def tensors_of(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / f"{name}.safetensors")[0]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last_lines(folder: Path) -> dict[tuple[int, bool], dict]:
    """The last line of the log for every step and evaluation, without what a clock decides."""
    return {(line["step"], "val" in line): {key: value for key, value in line.items() if key != "images_per_second"}
            for line in log_of(folder)}


# ---- the same run twice

@pytest.mark.parametrize("flags", [("--dataset", "sda", "--precision", "float32", "--fusion-from", "0.2"),
                                   ("--dataset", "cuhk", "--precision", "bf16", *AUGMENTED),
                                   ("--dataset", "cuhk", "--precision", "float32", "--accumulate", "2", *AUGMENTED)])
@pytest.mark.parametrize("saved", [["last"], ["last", "best"], ["last", "best", "last"]])
def test_a_run_that_was_killed_goes_on_bit_for_bit(town, whole, tmp_path, monkeypatch, flags, saved):
    """Killed right after the checkpoint of step 3: before it is evaluated, once it is logged, or after all of that.

    Weights, optimiser, losses and val are as if it never had been.
    """
    flags, cut, saves = (*SIX, *flags), tmp_path / "cut", []
    undisturbed, real = whole(*flags), checkpoint.save

    def kill(path, tensors, facts):
        real(path, tensors, facts)
        saves.append(path.stem)
        if saves == saved:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", kill)
        assert command(town, "train.py", *flags, "--out", str(cut)).status == 130
    state = checkpoint.load(cut / "last.safetensors")[1]
    assert state["step"] == 3 and saves == saved and state["evaluated"] == (len(saved) == 3)
    torch.manual_seed(12345)                                     # the state of the new process is another one
    assert "going on after step 3 of 6" in succeed(town, "train.py", *flags, "--out", str(cut))
    for name in ("last", "best"):
        assert same(tensors_of(undisturbed, name), tensors_of(cut, name))
    assert last_lines(undisturbed) == last_lines(cut)
    again = [3] if saved == ["last", "best"] else []             # it was logged, and is evaluated again
    assert [line["step"] for line in log_of(cut)] == [1, 2, 3, 3, *again, 4, 5, 6, 6]
    facts = [checkpoint.load(out / "last.safetensors")[1] for out in (undisturbed, cut)]
    assert facts[0]["results"] == facts[1]["results"] and facts[0]["results"]["best"]
    assert len(tensors_of(cut)) == 4 * len(tensors_of(cut, "best"))     # weight, two moments, step: of all parameters


def test_steps_after_the_last_checkpoint_are_done_again(town, whole, tmp_path, monkeypatch):
    """Killed in step 5, after the checkpoint of step 3. Two threads take the loss of every step."""
    flags, real, calls = (*SIX, "--dataset", "sda"), losses.total, []

    def kill(terms, beta):
        calls.append(beta)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(terms, beta)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total", kill)
        assert command(town, "train.py", *flags, "--out", str(tmp_path / "cut")).status == 130
    succeed(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    assert same(tensors_of(whole(*flags)), tensors_of(tmp_path / "cut"))


def test_two_processes_of_several_threads_train_alike(town, tmp_path):
    """This process and a fresh one: nothing may be summed in an order that threads decide."""
    flags, before = (*SIX, "--dataset", "sda", "--batch", "10", "--device", "cpu", "--out"), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fresh = Fresh(tmp_path, town, script, "train.py", *flags, str(tmp_path / "other"))
        succeed(town, "train.py", *flags, str(tmp_path / "one"))
    finally:
        torch.set_num_threads(before)
    assert fresh.status() == 0, fresh.err
    assert same(tensors_of(tmp_path / "one"), tensors_of(tmp_path / "other"))


def test_a_stop_in_the_last_step_is_heeded(town, tmp_path, monkeypatch):
    """A fine-tuning that would follow does not begin; what is finished is kept, and the same command ends well."""
    flags, real, calls = (*SIX, "--dataset", "sda", "--out", str(tmp_path)), losses.total, []

    def interrupted(terms, beta):
        calls.append(beta)
        if len(calls) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(terms, beta)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total", interrupted)
        status, _, _ = command(town, "train.py", *flags)
    assert status == 130 and checkpoint.load(tmp_path / "best.safetensors")[1]["step"] == 6
    succeed(town, "train.py", *flags)


def test_ctrl_c_of_a_terminal_spares_the_loading_processes(town, tmp_path):
    """It reaches them, too; the run goes on to the end of its step, for which it needs more batches, and saves it."""
    endless = (*SIX, "--steps", "100000", "--evals", "1", "--accumulate", "20", "--workers", "1", "--dataset", "sda")
    running = Fresh(tmp_path, town, script, "train.py", *endless, "--out", str(tmp_path))
    running.until((tmp_path / "log.jsonl").exists)
    running.interrupt()
    assert running.status() == 130 and "Traceback" not in running.err
    assert "The same command goes on" in running.err
    assert (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_its_step(town, whole, tmp_path, monkeypatch, number):
    """In step 2, before anything was evaluated."""
    flags, real, calls = (*SIX, "--dataset", "sda"), losses.total, []

    def interrupted(terms, beta):
        calls.append(beta)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(terms, beta)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total", interrupted)
        status, _, err = command(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    assert status == 130 and "The same command goes on" in err and len(calls) == 4
    assert checkpoint.load(tmp_path / "cut/last.safetensors")[1]["step"] == 2
    assert not (tmp_path / "cut/best.safetensors").exists()
    assert "going on after step 2 of 6" in succeed(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    for name in ("last", "best"):
        assert same(tensors_of(whole(*flags), name), tensors_of(tmp_path / "cut", name))


def test_a_second_run_in_the_same_folder_is_refused(town, tmp_path):
    with locked(tmp_path, Machine.of("cpu", "float32")):
        assert f"{tmp_path}: another run" in refused(town, "train.py", *SIX, "--dataset", "sda",
                                                     "--out", str(tmp_path))
    succeed(town, "train.py", *SIX, "--dataset", "sda", "--out", str(tmp_path))


def test_what_fails_in_a_step_costs_none_before_it(town, whole, tmp_path, monkeypatch):
    """Such as an image that is gone in step 5, two steps after the checkpoint."""
    flags, real, calls = (*SIX, "--dataset", "sda"), losses.total, []

    def fail(terms, beta):
        calls.append(beta)
        if len(calls) == 9:
            raise UserError("the image 'a.png' cannot be read")
        return real(terms, beta)
    with monkeypatch.context() as patch:
        patch.setattr(losses, "total", fail)
        assert "a.png" in refused(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    assert "going on after step 4 of 6" in succeed(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    assert same(tensors_of(whole(*flags)), tensors_of(tmp_path / "cut"))


def test_a_full_disk_leaves_the_best_checkpoint(town, tmp_path):
    """Files of this process may have so many bytes and no more; a run starts over where another has finished."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = (*SIX, "--dataset", "sda", "--out", str(tmp_path))
    succeed(town, "train.py", *flags, "--steps", "3")
    before = (tmp_path / "best.safetensors").read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * 1.5), limit[1]))
        sentence = refused(town, "train.py", *flags, "--no-resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "last.safetensors cannot be written" in sentence and (tmp_path / "best.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert "best.safetensors is of a run that cannot go on" in refused(town, "train.py", *flags, "--steps", "3")
    assert "going on" not in succeed(town, "train.py", *flags, "--steps", "3", "--no-resume")


@pytest.mark.parametrize("what", ["validate", "best"])
def test_what_fails_in_an_evaluation_costs_no_step(town, whole, tmp_path, monkeypatch, what):
    """Nor is the best checkpoint of the run before taken for this one's."""
    flags, real = (*SIX, "--dataset", "sda"), checkpoint.save

    def fail(*given) -> dict:
        if what == "best" and given[0].stem != "best":
            return real(*given)
        raise UserError("no room")
    succeed(town, "train.py", *flags, "--seed", "1", "--out", str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        patch.setattr(*((ranking, "validate") if what == "validate" else (checkpoint, "save")), fail)
        assert "no room" in refused(town, "train.py", *flags, "--no-resume", "--out", str(tmp_path / "cut"))
    assert "going on after step 3 of 6" in succeed(town, "train.py", *flags, "--out", str(tmp_path / "cut"))
    for name in ("last", "best"):
        assert same(tensors_of(whole(*flags), name), tensors_of(tmp_path / "cut", name))
    assert last_lines(whole(*flags)) == last_lines(tmp_path / "cut")


def test_a_broken_image_of_val_is_told_before_an_epoch_is_lost(town, tmp_path):
    shutil.copytree(town / "data/demo-tiny", tmp_path / "sets")
    broken = load("cuhk", "val", tmp_path / "sets", say=lambda line: None).records[-1].path
    Path(broken).write_bytes(b"no image")
    assert broken in refused(town, "train.py", *SIX, "--dataset", "cuhk", "--data-root", str(tmp_path / "sets"),
                             "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run/log.jsonl").exists()


def test_a_pretraining_has_as_many_pairs_a_step_in_any_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for world in (1, 2, 4):
        source, _ = stages.stages_of(TrainConfig(init="scratch"), machine_of(0, world))
        assert source.batch * world == 32


def machine_of(rank: int, world: int) -> Machine:
    """The machine of a process among others, which it never talks to."""
    group = Group()
    group.rank, group.count = rank, world
    return Machine(torch.device("cpu"), "float32", group)


def test_the_seed_decides_and_nothing_else(town, tmp_path):
    def trained(name: str, *flags: str) -> dict[str, torch.Tensor]:
        succeed(town, "train.py", *SIX, "--dataset", "cuhk", *AUGMENTED, *flags, "--out", str(tmp_path / name))
        return tensors_of(tmp_path / name)
    torch.manual_seed(99)
    once = trained("once")
    assert same(once, trained("again", "--workers", "2", "--log-every", "4"))
    assert not same(once, trained("other", "--seed", "1"))


def test_a_term_that_is_not_finite_stops_the_run(town, tmp_path, monkeypatch):
    """Its name and step are told; the checkpoints before it stay, and training goes on from them."""
    spoil_masked_words(monkeypatch, step=4)
    flags = (*SIX, "--dataset", "cuhk", "--out", str(tmp_path / "run"))
    message = refused(town, "train.py", *flags)
    assert "mlm is nan by step 4" in message and "--lr" in message
    tensors, facts = checkpoint.load(tmp_path / "run/last.safetensors")
    assert facts["step"] == 3 and all(tensor.isfinite().all() for tensor in tensors.values())
    monkeypatch.undo()
    assert "going on after step 3 of 6" in succeed(town, "train.py", *flags)


def spoil_masked_words(monkeypatch, step: int) -> None:
    """Make the masked-word loss of one step nan, in the first of its two halves."""
    real, calls = losses.masked_words, itertools.count(1)

    def spoilt(logits, labels):
        number = next(calls)        # the two threads of a step never get the same
        return real(logits, labels) * (math.nan if number == 2 * step - 1 else 1)
    monkeypatch.setattr(losses, "masked_words", spoilt)


def test_accumulated_batches_are_one_batch(town, tmp_path, monkeypatch):
    """2 x 4 pairs equal 8 for a term that is a mean over pairs: here the masked words of each, summed.

    ITC and ITM compare within a batch, and MLM is a mean over its masked words, so for those it is the mean of
    the batches' losses.
    """
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(PRESETS["tiny"], dropout=0.0))
    monkeypatch.setattr(batches, "WINDOW", 1)       # which pairs share a batch depends on its size
    monkeypatch.setattr(Group, "mean_where", lambda group, values, exists: (values * exists).sum() / len(values))
    monkeypatch.setattr(losses, "total", lambda terms, beta: terms["mlm"])
    for name, flags in (("two", ("--batch", "4", "--accumulate", "2")), ("one", ("--batch", "8"))):
        succeed(town, "train.py", *SIX, "--steps", "1", "--dataset", "cuhk", "--precision", "float32", "--max-norm",
                "1e9", *flags, "--out", str(tmp_path / name))
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    gradients = [name for name in one if name.startswith("optimizer.exp_avg.")]
    assert one.keys() == two.keys() and len(gradients) > 30
    assert sum(one[name].abs().max() > 1e-5 for name in gradients) > 30
    for name in gradients:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-4)


# ---- two processes

def joined_batch() -> Batch:
    """Eight pairs: classes shared by the halves, fewer negatives in the first, more masked words in the second."""
    generator = torch.Generator().manual_seed(3)
    size = PRESETS["tiny"]

    def words(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keep = torch.arange(length) < torch.randint(3, length + 1, (8, 1), generator=generator)
        return torch.randint(5, 90, (8, length), generator=generator) * keep, keep
    (caption, keep), (eda, eda_keep), (phrase, phrase_keep) = words(9), words(8), words(5)
    at = torch.tensor([[1, 0, 0], [0, 0, 0], [2, 0, 0], [0, 0, 0], [1, 2, 0], [1, 2, 0], [1, 0, 0], [2, 1, 0]])
    labels = caption.gather(1, at).where(at > 0, -100)
    regions = torch.rand(8, math.prod(size.grid), generator=generator) < 0.4
    regions[:, 0] = True
    return Batch(torch.randn(8, 3, size.height, size.width, generator=generator),
                 torch.tensor([0, 0, 0, 1, 2, 3, 0, 4]), caption, keep, caption.scatter(1, at, 4), at, labels, eda,
                 eda_keep, regions, phrase, phrase_keep, torch.tensor([5, 6, 5, 6, 5, 7, 8, 9]))


def half(batch: Batch, rank: int) -> Batch:
    return Batch(*[x[rank * 4:rank * 4 + 4] for x in batch])


def next_within_half(similarity: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of a draw: the next row of the same four; where it is of the same class there is no negative."""
    rows = torch.arange(len(ids))
    column = rows // 4 * 4 + (rows + 1) % 4
    return column, ids[column] != ids


def model_of_one_seed() -> Retriever:
    torch.manual_seed(0)
    return Retriever(dataclasses.replace(PRESETS["tiny"], dropout=0.0, vocab=90))


def terms_and_gradients(model: Retriever, batch: Batch, fuse: bool, group: Group) -> dict[str, torch.Tensor]:
    """Loss terms, and gradients averaged over the group, of a member's own batch."""
    losses.hard_negatives = next_within_half
    terms = model(batch, Objective(fuse, 0.2, 0.8, partial(contrastive.contrastive, group=group), group))
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(losses.total(terms, 0.8), list(named.values()), allow_unused=True)
    found = {name: term.detach() for name, term in terms.items()}
    found |= {f"gradient of {name}": one for name, one in zip(named, gradients) if one is not None}
    return {name: group.summed(term) / group.count for name, term in found.items()}


def searched(folder: str, group: Group) -> dict[str, torch.Tensor]:
    """Both stages of a search among seven images, which a group shares out in batches of two, the last one smaller."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.read()
    model = Retriever(dataclasses.replace(PRESETS["tiny"], vocab=len(tokenizer))).eval()
    paths = [f"{folder}/{number}.png" for number in range(7)]
    found = ranking.search(model, tokenizer, ["a man in red", "a bag", "a woman in a blue coat"], paths,
                           Settings(4, batch=2, group=group))
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


def fitted(group: Group) -> torch.Tensor:
    """A weight that the loop has trained, with dropout, in one process or in several."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.25), torch.nn.Linear(3, 1))

    def loss_of(portion: Portion) -> dict[str, torch.Tensor]:
        x = torch.randn(portion.count, 3, generator=portion.generator)
        return {"loss": (model(x) - x.sum(1, keepdim=True)).square().mean()}

    Loop(Task("line", model, Fit(9, 16, 0.1), 0), loss_of, Machine(torch.device("cpu"), "float32", group)).run()
    return model[1].weight.detach()


def one_of_two(rank: int, folder: str) -> None:
    """A process of the run that `test_two_processes_are_one` starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save((searched(folder, Processes()), fitted(Processes())), f"{folder}/{rank}.pt")
    for fuse in (True, False):
        found = terms_and_gradients(model_of_one_seed(), half(joined_batch(), rank), fuse, Processes())
        torch.save(found, f"{folder}/{rank}-{fuse}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path, monkeypatch, paint):
    """Loss terms, averaged over two processes, and their gradients are those of one process on the joined batch.

    So are both stages of a search. A network is trained by two processes as by the two threads of one, bit for bit.
    """
    for number in range(7):
        paint(f"{number}.png", seed=number)
    monkeypatch.setattr(losses, "hard_negatives", next_within_half)     # put back what terms_and_gradients sets
    in_two(one_of_two, str(tmp_path))
    assert_halves_are_whole(lambda rank, fuse: torch.load(tmp_path / f"{rank}-{fuse}.pt"))
    wanted, weight = searched(str(tmp_path), Group()), fitted(Group())
    for rank in (0, 1):
        found, trained = torch.load(tmp_path / f"{rank}.pt")
        assert found["match_logit"].shape == (3, 4) and found["match_logit"].std() > 0 and torch.equal(trained, weight)
        for name, expected in wanted.items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


def assert_halves_are_whole(found_by) -> None:
    """What members 0 and 1 found of the halves of a batch is what a group of one finds of the whole."""
    batch = joined_batch()
    assert (half(batch, 0).masked_labels >= 0).sum() == 2 and (half(batch, 1).masked_labels >= 0).sum() == 7
    for fuse, terms in ((True, {"itc", "itm", "mlm", "rpc", "rpm"}), (False, {"itc", "rpc", "rpm"})):
        wanted = terms_and_gradients(model_of_one_seed(), batch, fuse, Group())
        assert {name for name in wanted if not name.startswith("gradient")} == terms
        for rank in (0, 1):
            found = found_by(rank, fuse)
            assert found.keys() == wanted.keys()
            for name in found:
                torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=1e-5,
                                           msg=lambda m: f"{name}: {m}")


# ---- two threads

def test_two_threads_are_one(monkeypatch):
    """Loss terms and gradients of two threads are those of a group of one on the joined batch."""
    monkeypatch.setattr(losses, "hard_negatives", next_within_half)

    def found_by(rank: int, fuse: bool) -> dict[str, torch.Tensor]:
        models = model_of_one_seed(), model_of_one_seed()
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda one: terms_and_gradients(models[one.rank], half(joined_batch(), one.rank), fuse,
                                                            one), machine_of(0, 1).step_members(2, models[0]))
            return list(both)[rank]

    assert_halves_are_whole(found_by)


def test_an_error_in_one_thread_ends_the_step(monkeypatch):
    """The other thread, which waits for it, ends too, and the error is the one that is raised."""
    model = torch.nn.Linear(2, 1)

    def loss_of(portion: Portion) -> dict[str, torch.Tensor]:
        if portion.group.rank == 1:
            raise UserError("no loss")
        return {"loss": portion.group.gathered(model(torch.ones(2, 2))).mean()}

    with pytest.raises(UserError, match="no loss"):
        Loop(Task("one", model, Fit(2, 4, 0.1), 0), loss_of, machine_of(0, 1)).run()


def test_a_gradient_of_another_memory_layout_changes_nothing():
    """The fused AdamW of a CPU reads gradients as if they lay in memory as their parameters do."""
    def trained(layout: torch.memory_format) -> torch.Tensor:
        torch.manual_seed(0)
        model, x = torch.nn.Conv2d(3, 4, 3), torch.randn(4, 3, 8, 8).to(memory_format=layout)
        Loop(Task("one", model, Fit(5, 4, 0.1), 0), lambda portion: {"loss": model(x).square().mean()},
             machine_of(0, 1)).run()
        return model.weight.detach()

    assert torch.allclose(trained(torch.contiguous_format), trained(torch.channels_last), atol=1e-4)


def test_a_step_is_halved_where_that_changes_nothing():
    """Not an odd number of samples, not among several processes, and not where a batch norm must see them all."""
    plain, normed = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    assert [one.rank for one in machine_of(0, 1).step_members(4, plain)] == [0, 1]
    assert len(machine_of(0, 1).step_members(3, plain)) == 1
    assert len(machine_of(1, 2).step_members(4, plain)) == 1
    assert len(machine_of(0, 1).step_members(4, normed)) == 1


def test_dropout_of_a_worker_by_hand():
    """A share p is 0, the rest divided by 1 - p, by the member's own generator; nothing in evaluation."""
    x = torch.ones(50, 41, 100)

    def dropped(seed: int, module=torch.nn.Dropout(0.25)) -> torch.Tensor:
        with OwnRandomness(torch.Generator().manual_seed(seed)):
            return module(x)

    torch.manual_seed(1)
    once, state = dropped(0), torch.get_rng_state()
    assert once.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (once == 0).float().mean().item() == pytest.approx(0.25, abs=0.004)          # 4 standard deviations
    for axis in (0, 1, 2):          # no row or column is left out
        others = tuple(i for i in range(3) if i != axis)
        assert (once == 0).float().mean(others).sub(0.25).abs().max() < 0.05
    assert torch.equal(once, dropped(0)) and not torch.equal(once, dropped(1))
    assert torch.equal(torch.get_rng_state(), state)            # PyTorch's own generator is not used
    assert torch.equal(dropped(0, torch.nn.Dropout(0.25).eval()), x)


def test_multinomial_of_a_worker():
    weights = torch.ones(8, 100)

    def drawn(seed: int) -> torch.Tensor:
        with OwnRandomness(torch.Generator().manual_seed(seed)):
            return torch.multinomial(weights, 1)

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(2), torch.multinomial(weights, 1, generator=torch.Generator().manual_seed(2)))


def localhost() -> bool:
    try:
        socket.create_server(("127.0.0.1", 0)).close()
        return True
    except OSError:
        return False


@pytest.mark.skipif(not localhost() or not dist.is_gloo_available(), reason="processes cannot talk to each other")
def test_torchrun_from_end_to_end(tmp_path):
    """Pretraining and fine-tuning in two processes; one of them draws, logs and saves.

    The group and its threads end before the interpreter: else they may crash it. What loads a compiler after the group
    exists, as an optimiser does, must not keep it.
    """
    file = tmp_path / "script.py"
    train = str(ROOT / "train.py")
    file.write_text("import runpy, sys, weakref\nimport torch\nfrom mra.run.machine import Machine\n"
                    "groups, real = [], Machine.of\n\ndef of(*given):\n    made = real(*given)\n"
                    "    groups.append(weakref.ref(torch.distributed.group.WORLD))\n"
                    "    assert 'torch._dynamo' not in sys.modules\n    return made\n\n"
                    f"Machine.of = staticmethod(of)\nrunpy.run_path({train!r}, run_name='__main__')\n"
                    "assert 'torch._dynamo' in sys.modules and len(groups) == 1 and groups[0]() is None\n")
    flags = ("--dataset", "icfg", *TINY, "--device", "cpu", "--batch", "4", "--accumulate", "2", "--steps", "3",
             "--evals", "1", "--log-every", "1")
    ran = Fresh(tmp_path, tmp_path, torchrun, "--nproc_per_node=2", str(file), *flags, PYTHONPATH=str(ROOT),
                OMP_NUM_THREADS="1")
    assert ran.status() == 0, ran.err
    assert ran.out.count("drawing demo data") == 2 and ran.out.count("2 process(es)") == 2
    out = tmp_path / "out/icfg-tiny-s0"
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 3]
    facts = checkpoint.load(out / "best.safetensors")[1]
    assert facts["processes"] == 2 and facts["pretrained_on"] == "sda" and facts["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors_of(out).values())
    assert "icfg re-ranked" in succeed(tmp_path, "evaluate.py")
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/data").symlink_to(tmp_path / "data")
    succeed(tmp_path / "alone", "train.py", *flags, "--batch", "8")         # as many pairs, in one process
    for two, one in zip(log_of(out)[:3], log_of(tmp_path / "alone/out/icfg-tiny-s0")):
        assert {name: two[name] for name in ("itc", "mlm", "loss")} == pytest.approx(
            {name: one[name] for name in ("itc", "mlm", "loss")}, abs=2e-3)


# ---- plan, rates, choices

def test_the_schedule_by_hand():
    assert [schedule(step, 10, 0.2) for step in range(10)] == pytest.approx(
        [1 / 2, 1, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert [schedule(step, 4, 0.0) for step in range(4)] == pytest.approx([1, 1, 2 / 3, 1 / 3])
    assert [schedule(step, 4, 1.0) for step in range(4)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert schedule(0, 1, 0.1) == 1


def test_rates_of_a_run_follow_the_schedule(town, tmp_path, monkeypatch):
    """The logged rate, and the rates that the optimiser has: the new heads' is five times as high."""
    real, seen = torch.optim.AdamW.step, []

    def step(self, closure=None):
        seen.append([group["lr"] for group in self.param_groups])
        return real(self, closure)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    succeed(town, "train.py", *SIX, "--dataset", "cuhk", "--lr", "6e-3", "--head-lr", "5", "--warmup", "0.3",
            "--out", str(tmp_path / "run"))
    wanted = [3e-3, 6e-3, 6e-3, 4.5e-3, 3e-3, 1.5e-3]
    assert [line["lr"] for line in log_of(tmp_path / "run") if "lr" in line] == pytest.approx(wanted)
    assert len(seen) == 6
    for rate, groups in zip(wanted, seen):
        assert groups == pytest.approx([rate, rate, 5 * rate, 5 * rate])


def test_every_parameter_is_in_one_group(model):
    groups = stages.param_groups(model, TrainConfig(lr=1e-4, head_lr=5.0, weight_decay=0.01))
    members = [(id(p), group["peak"], group["weight_decay"]) for group in groups for p in group["params"]]
    settings = {member: rest for member, *rest in members}
    assert len(members) == len(settings) == len(list(model.parameters()))
    own = {name: settings[id(parameter)] for name, parameter in model.named_parameters()}
    assert own["temperature"] == [1e-4, 0.0] and own["text_encoder.words.weight"] == [1e-4, 0.01]
    assert own["image_projection.weight"] == [pytest.approx(5e-4), 0.01]
    assert own["image_projection.bias"] == [pytest.approx(5e-4), 0.0]


@pytest.mark.parametrize("settings, pairs, world, wanted", [
    (dict(epochs=3, batch=4, evals=2), 10, 1, (8, 0, {4, 8})),                  # 30 / 4, rounded up
    (dict(epochs=3, batch=4, accumulate=2, evals=1), 10, 2, (2, 0, {2})),       # 30 / 16
    (dict(epochs=0.5, batch=4, evals=1), 16, 1, (2, 0, {2})),
    (dict(epochs=3, steps=7, batch=4, evals=3, fusion_from=0.3), 10, 1, (7, 2, {2, 5, 7})),
    (dict(epochs=1, steps=2, evals=10), 10, 1, (2, 0, {1, 2})),                 # more evaluations than steps
])
def test_the_plan_by_hand(settings, pairs, world, wanted):
    fit, fusion_from, evals = stages.timetable_of(TrainConfig(**settings), pairs, world)
    assert (fit.steps, fusion_from, evals) == wanted


def test_the_best_checkpoint_is_kept(town, tmp_path, monkeypatch):
    """best.safetensors is of the best evaluation, last.safetensors of the last one, which knows the best."""
    scores, real = iter([10.0, 30.0, 20.0]), ranking.validate

    def validate(*arguments):
        return real(*arguments) | {"selected_by": [True, next(scores)]}
    monkeypatch.setattr(ranking, "validate", validate)
    succeed(town, "train.py", *SIX, "--dataset", "cuhk", "--evals", "3", "--out", str(tmp_path / "run"))
    (_, best), (_, last) = (checkpoint.load(tmp_path / f"run/{name}.safetensors") for name in ("best", "last"))
    assert best["step"] == 4 and best["val"]["selected_by"] == [True, 30.0]
    assert last["step"] == 6 and last["results"]["best"]["selected_by"] == [True, 30.0]
    assert [line["val"]["selected_by"][1] for line in log_of(tmp_path / "run") if "val" in line] == [10.0, 30.0, 20.0]


def test_device_and_precision(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_device("cpu") == cpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("") == cpu
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")
    for able in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able or including_emulation)
        assert choose_precision("", cpu) == choose_precision("", cuda) == ("bf16" if able else "float32")
    assert choose_precision("float32", cuda) == "float32"
    assert choose_precision("bf16", cpu) == "bf16"


def test_the_log_has_the_means_since_the_last_line(tmp_path):
    task = Task("", torch.nn.Linear(1, 1), Fit(10, 8, 0.1), 0, log=tmp_path / "log.jsonl")
    loop = Loop(task, None, machine_of(0, 1))
    loop.tell(4, [{"itc": torch.tensor(value)} for value in (1.0, 2.0, 3.0, 6.0)], seconds=2.0)
    loop.tell(5, [{"itc": torch.tensor(5.0), "mlm": torch.tensor(7.0)}], seconds=2.0)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["step"], first["itc"], first["images_per_second"]) == (4, 3.0, 16.0)
    assert first["lr"] == pytest.approx(0.1 * schedule(3, 10, 0.05))
    assert (second["itc"], second["mlm"]) == (5.0, 7.0) and "mlm" not in first
