"""Checkpoints survive a round trip and a crash, say what is wrong with a file, and resume bit for bit."""

import dataclasses
import json
import pickle

import pytest
import torch

from mra import checkpoint, losses
from mra.config import TrainConfig, UserError
from mra.data.records import Record, RecordSet
from mra.retriever import Retriever
from mra.training import make_optimizer, validate

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
    checkpoint.write_json(path, {"R@1": 50.0, "words": "grün"})
    before = path.read_text(encoding="utf-8")
    assert json.loads(before)["words"] == "grün"
    monkeypatch.setattr(checkpoint.os, "replace", lambda source, target: (_ for _ in ()).throw(OSError()))
    with pytest.raises(UserError, match="results.json cannot be written"):      # not yet in its place
        checkpoint.write_json(path, {"R@1": 99.0})
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
    assert str(path) in refusal(checkpoint.load, path)


# ---- the model

def test_a_model_comes_back_with_its_tokenizer(tmp_path, model, tokenizer, batch):
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, checkpoint.weights(model), checkpoint.model_facts(model, tokenizer) | FACTS)
    loaded, words, facts = checkpoint.load_retriever(path, torch.device("cpu"))
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
    checkpoint.save(path, spoil(checkpoint.weights(model)), checkpoint.model_facts(model, tokenizer) | FACTS)
    message = refusal(checkpoint.load_retriever, path, torch.device("cpu"))
    assert str(path) in message and named in message
    target = Retriever(model.config)
    before = {name: tensor.clone() for name, tensor in checkpoint.weights(target).items()}
    refusal(checkpoint.restore_weights, target, spoil(checkpoint.weights(model)), path)
    assert same(before, checkpoint.weights(target))


@pytest.mark.parametrize("change", [{"model": None}, {"model": {"sizes": 3}}, {"vocab": None},
                                    {"vocab": ["red"]}])
def test_facts_that_make_no_model(tmp_path, model, tokenizer, change):
    path = tmp_path / "best.safetensors"
    checkpoint.save(path, checkpoint.weights(model), checkpoint.model_facts(model, tokenizer) | change)
    assert str(path) in refusal(checkpoint.load_retriever, path, torch.device("cpu"))


# ---- going on

def step(model, optimizer, batch, number: int) -> None:
    """One step of training with dropout, seeded as train.py does."""
    torch.manual_seed(number)
    model.train()
    losses.total(model(batch, eda=0.8), beta=0.8).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")))
def test_a_lack_of_memory_is_not_told_as_a_fault_of_the_file(tmp_path, error):
    with pytest.raises(type(error), match="memory"), checkpoint.trusting(tmp_path / "best.safetensors"):
        raise error


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


def facts_of(model, tokenizer, train: TrainConfig, **more) -> dict:
    return checkpoint.model_facts(model, tokenizer) | {
        "train": dataclasses.asdict(train), "precision": "float32", "pairs": 99, "processes": 2} | more


def test_resume_takes_up_its_own_run_alone(tmp_path, model, tokenizer, batch):
    train, path = TrainConfig(lr=1e-3), tmp_path / "last.safetensors"
    optimizer = make_optimizer(model, train)
    assert checkpoint.resume(tmp_path, model, optimizer, facts_of(model, tokenizer, train)) == (0, None, False)
    step(model, optimizer, batch, 0)
    facts = facts_of(model, tokenizer, train, step=7, best={"quality": [False, 50.0]})
    checkpoint.save(path, checkpoint.state(model, optimizer), facts)
    assert "best.safetensors that is gone" in refusal(checkpoint.resume, tmp_path, model, optimizer, facts)
    checkpoint.save(tmp_path / "best.safetensors", {}, {})
    other = Retriever(model.config)
    restored = make_optimizer(other, train)
    elsewhere = facts_of(model, tokenizer, dataclasses.replace(train, workers=3, out="there", device="cpu"))
    assert checkpoint.resume(tmp_path, other, restored, elsewhere) == (7, {"quality": [False, 50.0]}, False)
    assert "--precision, 'float32';" in refusal(checkpoint.resume, tmp_path, other, restored,
                                                elsewhere | {"precision": "bf16"})      # whatever the flag said
    done = facts | {"best": None, "val": {}, "steps": 7}
    checkpoint.save(path, checkpoint.state(model, optimizer), done)         # finished: serves any
    assert checkpoint.resume(tmp_path, other, restored, elsewhere | {"precision": "bf16"}) == (7, None, True)
    checkpoint.save(path, checkpoint.state(model, optimizer), facts)
    spelt = facts_of(model, tokenizer, dataclasses.replace(train, precision="float32"))
    assert checkpoint.resume(tmp_path, other, restored, spelt)[0] == 7
    assert same(checkpoint.state(model, optimizer), checkpoint.state(other, restored))
    older = facts | {"train": {name: value for name, value in facts["train"].items() if name != "bert"}}
    assert checkpoint.resume(tmp_path, other, restored, older)[0] == 7            # from before there was --bert
    changed = facts_of(model, tokenizer, dataclasses.replace(train, weight_decay=0.5))
    message = refusal(checkpoint.resume, tmp_path, other, restored, changed)
    assert str(path) in message and "--weight-decay" in message
    assert "number of pairs, 99;" in refusal(checkpoint.resume, tmp_path, other, restored, elsewhere | {"pairs": 98})
    whole = checkpoint.state(model, optimizer)
    moment = next(name for name in whole if name.startswith("optimizer.exp_avg."))
    without = {name: {n: t for n, t in whole.items() if not n.startswith(name)} for name in (moment, "optimizer.")}
    for tensors, more in ((without[moment], {}), (without["optimizer."], {}), (whole, {"best": {}}),
                          (whole | {"optimizer.step.nothing": torch.ones(())}, {}),
                          (whole, {"best": {"quality": "good"}})):
        checkpoint.save(path, tensors, facts | more)
        assert str(path) in refusal(checkpoint.resume, tmp_path, other, restored, facts)
    checkpoint.save(path, {name: tensor * float("nan") if name == "temperature" else tensor
                           for name, tensor in whole.items()}, facts)
    assert "temperature first" in refusal(checkpoint.resume, tmp_path, other, restored, facts)


def test_another_number_of_processes_goes_on_with_as_many_pairs_a_step(tmp_path, model, tokenizer, batch):
    train = TrainConfig(batch=20)
    optimizer = make_optimizer(model, train)
    step(model, optimizer, batch, 0)
    checkpoint.save(tmp_path / "last.safetensors", checkpoint.state(model, optimizer),
                    facts_of(model, tokenizer, train, step=7, best=None))
    for processes, own, fits in ((1, 40, True), (4, 10, True), (1, 20, False), (4, 20, False)):
        now = facts_of(model, tokenizer, dataclasses.replace(train, batch=own), processes=processes)
        if fits:
            assert checkpoint.resume(tmp_path, model, optimizer, now) == (7, None, False)
        else:
            assert "--batch x processes, 40;" in refusal(checkpoint.resume, tmp_path, model, optimizer, now)


def test_the_best_result_so_far_compares_with_a_new_one(tmp_path, model, tokenizer, batch, paint):
    """As train.py does after a restart: `result["quality"] >= best["quality"]`."""
    records = tuple(Record(paint(f"{i}.png", seed=i), (f"man {i}", "red hat"), i) for i in range(3))
    val = RecordSet("cuhk", "val", records)
    train = TrainConfig()
    step(model, optimizer := make_optimizer(model, train), batch, 0)
    result = validate(model, tokenizer, val, fused=True)
    assert {"embeddings", "reranked", "weight"} <= result.keys()
    checkpoint.save(tmp_path / "last.safetensors", checkpoint.state(model, optimizer),
                    facts_of(model, tokenizer, train, step=1, best=result, val=result))
    checkpoint.save(tmp_path / "best.safetensors", {}, {})
    _, best, judged = checkpoint.resume(tmp_path, model, optimizer, facts_of(model, tokenizer, train))
    assert judged
    assert validate(model, tokenizer, val, fused=True)["quality"] >= best["quality"]
