"""Checkpoints survive a round trip and a crash, say what is wrong with a file, and resume bit for bit."""

import dataclasses
import json
import pickle

import pytest
import torch

from mra import losses
from mra.config import Fit, TrainConfig, UserError
from mra.data import files
from mra.data.records import Record, RecordSet
from mra.data.tokenizer import Tokenizer
from mra.group import Group
from mra.ranking import Settings, validate
from mra.retriever import Objective, Retriever
from mra.run import checkpoint, stages
from mra.run.loop import Loop, Task
from mra.run.machine import Machine
from mra.weights.retrievers import load_retriever, model_facts

FACTS = {"pretrained_on": "sda", "train": {"preset": "tiny", "dataset": "cuhk", "data_root": ""}, "step": 7,
         "words": "grün \x1b", "val": {"R@1": 61.25, "nothing": None}, "list": [1, 0.1]}


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(3, 4).T, "b": torch.tensor(1.5), "c": torch.arange(3),
            "d": torch.ones(2, requires_grad=True)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files

def test_save_and_load_give_back_tensors_and_facts(tmp_path):
    saved = tensors()
    checkpoint.save(tmp_path / "x.safetensors", saved, FACTS)
    loaded, facts = checkpoint.load(tmp_path / "x.safetensors")
    assert facts == FACTS and same(loaded, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    """What the crash left behind does not disturb the next save, which takes it away."""
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, tensors(), FACTS)
    before = path.read_bytes()

    def crash(content, target, metadata):
        with open(target, "wb") as file:
            file.write(before[:50])
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_file", crash)
        checkpoint.save(path, tensors(), {})
    assert path.read_bytes() == before and checkpoint.load(path)[1] == FACTS
    checkpoint.save(path, {"a": torch.zeros(1)}, {"step": 8})
    assert checkpoint.load(path)[1] == {"step": 8}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_json_is_complete_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_json(path, {"R@1": 50.0, "words": "grün"})
    before = path.read_text(encoding="utf-8")
    assert json.loads(before)["words"] == "grün"
    monkeypatch.setattr(files.os, "replace", lambda source, target: (_ for _ in ()).throw(OSError()))
    with pytest.raises(UserError, match="results.json cannot be written"):      # not yet in its place
        files.write_json(path, {"R@1": 99.0})
    assert path.read_text(encoding="utf-8") == before


def test_files_that_are_no_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    assert str(path) in refusal(checkpoint.load, path)            # missing
    assert str(tmp_path) in refusal(checkpoint.load, tmp_path)    # a folder
    checkpoint.save(path, tensors(), FACTS)
    whole = path.read_bytes()
    contents = [whole[:cut] for cut in (0, 4, 60, len(whole) - 1)]                       # truncated
    for content in (*contents, pickle.dumps({"model": 1}), b"\x00" * 100, b"{}" * 20):
        path.write_bytes(content)
        assert str(path) in refusal(checkpoint.load, path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"mra": "not json"}, {"mra": "[1]"}, {"mra": "[" * 9**5}])
def test_a_foreign_safetensors_file(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    checkpoint.save_file({"a": torch.zeros(2)}, path, metadata=metadata)
    assert str(path) in refusal(load_retriever, path, torch.device("cpu"))
    if metadata and "mra" in metadata:
        assert str(path) in refusal(checkpoint.load, path)
    else:
        assert checkpoint.load(path)[1] == {}


# ---- the model

def test_a_model_comes_back_with_its_tokenizer(tmp_path, model, tokenizer, batch):
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, checkpoint.weights(model), model_facts(model, tokenizer) | FACTS)
    loaded, words, facts = load_retriever(path, torch.device("cpu"))
    assert loaded.config == model.config and words.pieces == tokenizer.pieces and facts["step"] == 7
    assert not loaded.training and loaded.word_head.decoder.weight is loaded.text_encoder.words.weight
    results = []
    for one in (model, loaded):
        torch.manual_seed(5)
        results.append(one(batch))
    assert same(*results)


def test_every_weight_is_saved(model):
    """All of PyTorch's own state, the tied word table once."""
    assert checkpoint.weights(model).keys() == model.state_dict().keys() - {"word_head.decoder.weight"}


def without_one(weights):
    return {name: tensor for name, tensor in weights.items() if name != "temperature"}


def with_one_more(weights):
    return weights | {"extra.weight": torch.zeros(1)}


def with_another_shape(weights):
    return weights | {"text_projection.bias": torch.zeros(3)}


@pytest.mark.parametrize("spoil, named", [(without_one, "temperature"), (with_one_more, "extra.weight"),
                                          (with_another_shape, "text_projection.bias")])
def test_weights_that_do_not_fit(tmp_path, model, tokenizer, spoil, named):
    """Refused before anything is copied, with the file and the tensor named."""
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, spoil(checkpoint.weights(model)), model_facts(model, tokenizer) | FACTS)
    message = refusal(load_retriever, path, torch.device("cpu"))
    assert str(path) in message and named in message
    target = Retriever(model.config)
    before = {name: tensor.clone() for name, tensor in checkpoint.weights(target).items()}
    refusal(checkpoint.restore_weights, target, spoil(checkpoint.weights(model)), path)
    assert same(before, checkpoint.weights(target))


def test_what_does_not_fit_is_told_apart(model, tmp_path):
    spoilt = with_another_shape(with_one_more(without_one(checkpoint.weights(model))))
    assert refusal(checkpoint.restore_weights, model, spoilt, tmp_path) == (
        f"{tmp_path} does not fit this model. Tensors missing: 1, temperature first; unknown: 1, "
        "extra.weight first; of another shape: 1, text_projection.bias first.")


@pytest.mark.parametrize("change", [{"model": None}, {"model": {"sizes": 3}}, {"vocab": None},
                                    {"vocab": ["red"]}])
def test_facts_that_make_no_model(tmp_path, model, tokenizer, change):
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, checkpoint.weights(model), model_facts(model, tokenizer) | change)
    assert str(path) in refusal(load_retriever, path, torch.device("cpu"))


# ---- going on

def make_optimizer(model, train: TrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(stages.param_groups(model, train), train.lr)


def step(model, optimizer, batch, number: int) -> None:
    """One step of training with dropout, seeded as train.py does."""
    torch.manual_seed(number)
    model.train()
    losses.total(model(batch, Objective(eda=0.8)), beta=0.8).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_training_goes_on_bit_for_bit(tmp_path, config, batch):
    """Saved after two steps and restored into a new model and optimiser: three more are the same."""
    path, settings = tmp_path / "last.safetensors", TrainConfig(lr=1e-2)

    def fresh(seed: int):
        torch.manual_seed(seed)
        model = Retriever(dataclasses.replace(config, dropout=0.1))
        return model, make_optimizer(model, settings)
    model, optimizer = fresh(0)
    for number in range(2):
        step(model, optimizer, batch, number)
    checkpoint.save(path, checkpoint.state(model, optimizer), FACTS)
    again, restored = fresh(1)
    saved, _ = checkpoint.load(path)
    checkpoint.restore(again, restored, saved, path)
    assert same(checkpoint.state(model, optimizer), checkpoint.state(again, restored))
    for number in (2, 3, 4):
        step(model, optimizer, batch, number)
        step(again, restored, batch, number)
        assert same(checkpoint.state(model, optimizer), checkpoint.state(again, restored))
    assert len(checkpoint.state(model, optimizer)) == 4 * len(list(model.parameters()))     # weight, two moments, step


def machine(world: int = 1, precision: str = "float32") -> Machine:
    """That of a process among `world`, which it never talks to."""
    group = Group()
    group.rank, group.count = 0, world
    return Machine(torch.device("cpu"), precision, group)


START = torch.nn.Linear(1, 1)       # stands for the model that every run starts from


def going_on(folder, model, train: TrainConfig, where: Machine = machine(), caption: str = "a bag") -> Loop:
    """The loop of train.py on what lies in `folder`, 7 steps long, on one record."""
    used = RecordSet("cuhk", "train", [Record("images/1.jpg", (caption,), 0)])
    task = Task("", model, Fit(7, train.batch * where.group.count, train.lr, average=0.0), train.seed,
                folder / "last.safetensors", key=stages.key_of(train, where, START, Tokenizer.read(), [used]),
                param_groups=stages.param_groups(model, train), advice=stages.ADVICE)
    return Loop(task, None, where)


def saved_by(loop: Loop, step: int = 5, tensors: dict | None = None, **more) -> None:
    """Write the state that the loop would write after a step, or one with other tensors or facts."""
    tensors = tensors or checkpoint.state(loop.task.network, loop.optimizer)
    facts = {"key": loop.key, "step": step, "evaluated": False, "results": {}} | more
    checkpoint.save(loop.task.state, tensors, facts)


def test_a_run_goes_on_from_its_own_state_alone(tmp_path, model, batch):
    train, path = TrainConfig(lr=1e-3), tmp_path / "last.safetensors"
    loop = going_on(tmp_path, model, train)
    assert (loop.done, loop.results) == (0, {})
    step(model, loop.optimizer, batch, 0)
    found = {"val": {}, "best": {"selected_by": [False, 50.0]}}
    saved_by(loop, results=found)
    other = Retriever(model.config)
    again = going_on(tmp_path, other, dataclasses.replace(train, workers=3, out="there", device="cpu"))
    assert (again.done, again.results) == (5, found)
    assert same(checkpoint.state(model, loop.optimizer), checkpoint.state(other, again.optimizer))
    changed = dataclasses.replace(train, weight_decay=0.5)
    message = refusal(going_on, tmp_path, other, changed)
    assert str(path) in message and "--weight-decay was 0.01 and is 0.5;" in message and "--no-resume" in message
    message = refusal(going_on, tmp_path, other, train, machine(), "a hat")
    assert "the content of the train records has changed;" in message
    assert path.exists()        # a refusal costs nothing


def test_a_run_goes_on_in_its_precision(tmp_path, model, batch):
    train = TrainConfig()
    loop = going_on(tmp_path, model, train)
    step(model, loop.optimizer, batch, 0)
    saved_by(loop)
    assert "precision was float32 and is bf16;" in refusal(going_on, tmp_path, model, train, machine(1, "bf16"))
    assert going_on(tmp_path, model, train).done == 5


def test_without_advice_a_training_begins_anew(tmp_path, model, batch, capsys):
    """So do DaD's networks, whose key lies beside them."""
    loop = going_on(tmp_path, model, TrainConfig())
    step(model, loop.optimizer, batch, 0)
    saved_by(loop)
    task = Task("branch", model, Fit(7, 4, 0.1, average=0.0), 0, tmp_path / "last.safetensors", key={"steps": 8})
    assert Loop(task, None, machine()).done == 0
    assert "last.safetensors is made anew" in capsys.readouterr().out and not task.state.exists()


def test_a_damaged_state_is_refused(tmp_path, model, batch):
    loop = going_on(tmp_path, model, TrainConfig())
    step(model, loop.optimizer, batch, 0)
    whole = checkpoint.state(model, loop.optimizer)
    moment = next(name for name in whole if name.startswith("optimizer.exp_avg."))
    without = {name: tensor for name, tensor in whole.items() if name != moment}
    spoilt = {name: tensor * float("nan") if name == "temperature" else tensor for name, tensor in whole.items()}
    for tensors, more in ((without, {}), (whole, {"results": 5}), (whole, {"key": 5}), (whole, {"step": "all"}),
                          (spoilt, {})):
        saved_by(loop, tensors=tensors, **more)
        assert str(tmp_path / "last.safetensors") in refusal(going_on, tmp_path, model, TrainConfig())


def test_another_number_of_processes_goes_on_with_as_many_pairs_a_step(tmp_path, model, batch):
    train = TrainConfig(batch=20)
    loop = going_on(tmp_path, model, train, machine(2))
    step(model, loop.optimizer, batch, 0)
    saved_by(loop)
    for processes, own, fits in ((1, 40, True), (4, 10, True), (1, 20, False), (4, 20, False)):
        now = dataclasses.replace(train, batch=own)
        if fits:
            assert going_on(tmp_path, model, now, machine(processes)).done == 5
        else:
            assert "--batch x processes was 40" in refusal(going_on, tmp_path, model, now, machine(processes))


def test_the_best_result_so_far_compares_with_a_new_one(tmp_path, model, tokenizer, batch, paint):
    """As train.py does after a restart: `result["selected_by"] >= best["selected_by"]`."""
    records = tuple(Record(paint(f"{i}.png", seed=i), (f"man {i}", "red hat"), i) for i in range(3))
    val, settings = RecordSet("cuhk", "val", records), Settings(8, mirror=False)
    loop = going_on(tmp_path, model, TrainConfig())
    step(model, loop.optimizer, batch, 0)
    result = validate(model, tokenizer, val, True, settings)
    assert {"embeddings", "reranked", "weight"} <= result.keys()
    saved_by(loop, results={"val": result, "best": result})
    again = going_on(tmp_path, model, TrainConfig())
    quality = validate(model, tokenizer, val, True, settings)["selected_by"]
    assert quality >= again.results["best"]["selected_by"]


def test_a_name_of_an_older_file_is_read(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", {"blocks.0.attention.to_memory.weight": torch.zeros(1)}, FACTS)
    assert list(checkpoint.load(tmp_path / "x.safetensors")[0]) == ["blocks.0.attention.to_keys_values.weight"]
