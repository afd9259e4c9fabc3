"""Foreign weights against independent references: PyTorch's encoder layers, torchvision's ViT, the released values."""

import dataclasses
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import train
from mra.config import PRESETS, UserError
from mra.data.tokenizer import VOCAB_FILE, Tokenizer
from mra.show import pictures
from mra.weights import files, retrievers
from mra.weights.files import resized_grid
from mra.weights.retrievers import read_bert

CLOSE = dict(atol=1e-5, rtol=1e-5)
TINY = PRESETS["tiny"]
HEADS = dict(hidden_size=32, num_attention_heads=4)     # what config.json says of the BERT below ...
VIT_HEADS = dict(hidden_size=128, num_attention_heads=2)     # ... and of the ViT


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def write(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors", **config) -> Path:
    """A file of weights with, if there is something to say, its config.json."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / name


# ---- BERT

class Bert(nn.Module):
    """A BERT made of PyTorch's own layers, to compare with; it can write itself under Hugging Face's names."""

    def __init__(self, vocab: int, dim: int = 32, depth: int = 4, heads: int = 4):
        super().__init__()
        self.words, self.places, self.types = (nn.Embedding(count, dim) for count in (vocab, 64, 2))
        self.norm = nn.LayerNorm(dim, 1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", 1e-12, batch_first=True)
            for _ in range(depth))
        self.transform, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim, 1e-12)
        self.head_bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, ids: Tensor, keep: Tensor) -> list[Tensor]:
        places = torch.arange(ids.shape[1])
        states = [self.norm(self.words(ids) + self.places(places) + self.types(torch.zeros_like(ids)))]
        for layer in self.layers:
            states.append(layer(states[-1], src_key_padding_mask=~keep))
        return states

    def released_names(self, prefix: str = "bert.") -> dict[str, Tensor]:
        state = {"embeddings.word_embeddings.weight": self.words.weight,
                 "embeddings.position_embeddings.weight": self.places.weight,
                 "embeddings.token_type_embeddings.weight": self.types.weight,
                 "embeddings.position_ids": torch.arange(64)[None],
                 "pooler.dense.weight": torch.zeros(3), "pooler.dense.bias": torch.zeros(3)}
        named = {"embeddings.LayerNorm": self.norm}
        for i, layer in enumerate(self.layers):
            at = f"encoder.layer.{i}."
            for part, weight, bias in zip(("query", "key", "value"), layer.self_attn.in_proj_weight.chunk(3),
                                          layer.self_attn.in_proj_bias.chunk(3)):
                state |= {f"{at}attention.self.{part}.weight": weight, f"{at}attention.self.{part}.bias": bias}
            named |= {f"{at}attention.output.dense": layer.self_attn.out_proj,
                      f"{at}attention.output.LayerNorm": layer.norm1, f"{at}intermediate.dense": layer.linear1,
                      f"{at}output.dense": layer.linear2, f"{at}output.LayerNorm": layer.norm2}
        state |= {f"{name}.{kind}": getattr(module, kind) for name, module in named.items()
                  for kind in ("weight", "bias")}
        head = "cls.predictions."
        return {prefix + name: tensor.detach() for name, tensor in state.items()} | {
            head + "bias": self.head_bias.detach(), head + "decoder.weight": self.words.weight.detach().clone(),
            head + "decoder.bias": self.head_bias.detach().clone(), "cls.seq_relationship.bias": torch.zeros(2),
            **{f"{head}transform.dense.{kind}": getattr(self.transform, kind).detach() for kind in ("weight", "bias")},
            **{f"{head}transform.LayerNorm.{kind}": getattr(self.head_norm, kind).detach()
               for kind in ("weight", "bias")}}


def old_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def reference() -> Bert:
    return randomised(Bert(1011))


@pytest.fixture
def bert_folder(reference, tmp_path) -> Path:
    write(tmp_path / "bert", reference.released_names(), **HEADS)
    (tmp_path / "bert" / "vocab.txt").write_text(VOCAB_FILE.read_text())
    return tmp_path / "bert"


@pytest.mark.parametrize("name, prefix, rename", [
    ("model.safetensors", "bert.", dict), ("pytorch_model.bin", "bert.", old_names), ("model.safetensors", "", dict)])
def test_hidden_states_are_berts(tmp_path, reference, name, prefix, rename):
    """The first half of its layers in the text encoder, the second in the fusion encoder, and its word head."""
    path = write(tmp_path, rename(reference.released_names(prefix)), name, **HEADS)
    model, _ = retrievers.start(TINY, str(path), "", str(VOCAB_FILE))
    assert (len(model.text_encoder.blocks), len(model.fusion_encoder.blocks)) == (2, 2)
    ids, keep = torch.randint(5, 1011, (3, 9)), torch.arange(9) < torch.tensor([9, 4, 2])[:, None]
    with torch.inference_mode():
        model.eval()
        expected = reference(ids, keep)
        x = model.text_encoder(ids, keep)
        torch.testing.assert_close(x[keep], expected[2][keep], **CLOSE)
        for block, state in zip(model.fusion_encoder.blocks, expected[3:]):
            x = block(x, keep)                                       # without its cross-attention, which is new
            torch.testing.assert_close(x[keep], state[keep], **CLOSE)
        words = reference.head_norm(F.gelu(reference.transform(x))) @ reference.words.weight.T + reference.head_bias
        torch.testing.assert_close(model.word_head(x), words, atol=1e-4, rtol=1e-5)


def test_layers_are_divided_as_the_presets(bert_folder):
    """Four layers for a preset with one and three quarters; the vocabulary is the one beside the weights."""
    config = dataclasses.replace(TINY, text_depth=2, fusion_depth=6)
    model, tokenizer = retrievers.start(config, str(bert_folder), "", "")
    assert (model.config.text_depth, model.config.fusion_depth) == (1, 3)
    assert model.config.text_heads == 4 and len(tokenizer) == 1011 and model.config.positions == 64


# ---- vision transformers

@pytest.fixture(scope="module")
def torchvision_vit() -> VisionTransformer:
    """Of 32x32 pixels, so 4 x 4 patches."""
    return randomised(VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=512, num_classes=5))


def hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's state dict under Hugging Face's names, written out by hand."""
    named = {"vit.embeddings.cls_token": state["class_token"], "classifier.bias": state["heads.head.bias"],
             "vit.embeddings.position_embeddings": state["encoder.pos_embedding"]}
    for kind in ("weight", "bias"):
        named[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"conv_proj.{kind}"]
        named[f"vit.layernorm.{kind}"] = state[f"encoder.ln.{kind}"]
        for i in range(2):
            theirs, ours = f"encoder.layers.encoder_layer_{i}.", f"vit.encoder.layer.{i}."
            for part, tensor in zip(("query", "key", "value"),
                                    state[f"{theirs}self_attention.in_proj_{kind}"].split(128)):
                named[f"{ours}attention.attention.{part}.{kind}"] = tensor
            for name, other in (("layernorm_before", "ln_1"), ("attention.output.dense", "self_attention.out_proj"),
                                ("layernorm_after", "ln_2"), ("intermediate.dense", "mlp.0"),
                                ("output.dense", "mlp.3")):
                named[f"{ours}{name}.{kind}"] = state[f"{theirs}{other}.{kind}"]
    return named


@pytest.mark.parametrize("name, rename", [("vit.pth", dict), ("model.safetensors", hugging_face)])
def test_patches_are_torchvisions(tmp_path, torchvision_vit, name, rename):
    """Patch by patch behind the last norm; the token before them is their mean."""
    path = write(tmp_path, rename(torchvision_vit.state_dict()), name, **VIT_HEADS)
    model, _ = retrievers.start(dataclasses.replace(TINY, height=32, width=32), "", str(path), "")
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        patches = torchvision_vit._process_input(images)
        expected = torchvision_vit.encoder(torch.cat([torchvision_vit.class_token.expand(3, -1, -1), patches], 1))
        found = model.eval().image_encoder(images)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], **CLOSE)
    torch.testing.assert_close(found[:, 0], expected[:, 1:].mean(1), **CLOSE)


def test_position_embeddings_are_interpolated():
    """A ramp over 4 rows and 4 columns becomes one over 8 x 2: rows stay rows, and the middle the middle."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    ramp = torch.stack([rows, columns], -1).view(16, 2)
    found = resized_grid(ramp, (8, 2), "bicubic").view(8, 2, 2)
    torch.testing.assert_close(found[:, 1, 0], found[:, 0, 0])
    torch.testing.assert_close(found + found.flip(0, 1), torch.full((8, 2, 2), 3.0))
    assert (found.diff(dim=0)[..., 0] > 0).all() and (found.diff(dim=1)[..., 1] > 0).all()
    assert torch.equal(resized_grid(ramp, (4, 4), "bicubic"), ramp)


def test_a_vit_and_a_bert_for_a_rectangle(tmp_path, torchvision_vit, bert_folder):
    path = write(tmp_path, torchvision_vit.state_dict(), "vit.pth", **VIT_HEADS)
    model, tokenizer = retrievers.start(PRESETS["demo"], str(bert_folder), str(path), "")
    tokens, feature = model.encode_image(torch.randn(2, 3, 64, 32))
    assert tokens.shape == (2, 1 + 32, 128) and feature.shape == (2, 128) and len(tokenizer) == 1011


def test_train_starts_from_bert(root, monkeypatch, bert_folder):
    """What it writes is one of our files, with the vocabulary, and says enough to go on from."""
    flags = ("--dataset", "cuhk", "--data-root", root, "--preset", "tiny", "--steps", 1, "--batch", 2, "--evals", 1,
             "--workers", 0, "--device", "cpu", "--bert", bert_folder)
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags), "--init", "none", "--out", str(root / "one")])
    train.main()
    best = root / "one" / "best.safetensors"
    model, tokenizer, _ = retrievers.load_retriever(best, torch.device("cpu"))
    assert model.config.text_heads == 4 and tokenizer.pieces == Tokenizer.read().pieces
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags), "--init", str(best)])
    assert "--bert" in refusal(train.main)


def test_a_check_counts_with_the_vocabulary_beside_bert(root, monkeypatch, capsys, bert_folder):
    """In 18 captions of the set stands 34 times "xq", which is two pieces."""
    file = root / "CUHK-PEDES/reid_raw.json"
    file.write_text(file.read_text().replace("a woman in black", "xq " * 34))
    with_bert = "--bert", bert_folder
    for flags in ((), with_bert, (*with_bert, "--vocab", VOCAB_FILE)):
        monkeypatch.setattr("sys.argv", ["train.py", "--check", "--dataset", "cuhk", "--data-root", str(root),
                                         "--preset", "tiny", "--device", "cpu", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            train.main()
        beside = bert_folder / "vocab.txt" if len(flags) == 2 else VOCAB_FILE
        said = capsys.readouterr().out
        assert end.value.code == 0
        assert f"18 x caption of more than 54 pieces of the vocabulary '{beside}', which the model cuts" in said


# ---- what is wrong with a file

class Trap:
    """Unpickled carelessly, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_no_pickle_is_executed(tmp_path, name):
    for number, save in enumerate((torch.save, lambda thing, path: Path(path).write_bytes(pickle.dumps(thing)))):
        sprung = tmp_path / f"sprung{number}"
        save({"model": {"a": torch.zeros(2)}, "config": Trap(sprung)}, tmp_path / name)
        assert name in refusal(files.read, tmp_path / name) and not sprung.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_broken_files(tmp_path, name):
    assert str(tmp_path / name) in refusal(files.read, tmp_path / name)              # missing
    whole = write(tmp_path, {"a": torch.zeros(50)}, name).read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"\x00" * 100, b"not weights at all"):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in refusal(files.read, tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"model": 3}, {"epoch": 3, "a": torch.zeros(1)}, {7: torch.zeros(1)},
                                     {"state_dict": [torch.zeros(1)]}])
def test_files_that_are_no_table_of_tensors(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    assert "x.pth" in refusal(files.read, tmp_path / "x.pth")


def test_nested_tables_and_the_prefix_of_data_parallel(tmp_path):
    own = {"a.module.b": torch.ones(2), "c": torch.zeros(1)}
    parallel = {f"module.{name}": tensor for name, tensor in own.items()}
    for content in (own, parallel, {"model": own, "epoch": 3}, {"state_dict": parallel}, {"model_state_dict": own},
                    {"model": {"state_dict": parallel}, "lr": [0.1]}):
        torch.save(content, tmp_path / "x.pth")
        found = files.read(tmp_path / "x.pth")
        assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
    assert files.read(write(tmp_path, parallel)).keys() == own.keys()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["ViT-B-16.pt", "pytorch_model.bin"])
def test_a_torchscript_archive_is_refused(tmp_path, name):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / name))
    message = refusal(files.read, tmp_path / name)
    assert name in message and "TorchScript" in message and "Hugging Face" in message and "open_clip" in message


@pytest.mark.parametrize("name, ours", [
    ("bert.embeddings.word_embeddings.weight", "text_encoder.words.weight"),
    ("bert.encoder.layer.2.output.dense.bias", "fusion_encoder.blocks.0.mlp.2.bias"),
    ("bert.encoder.layer.1.attention.self.key.weight", "text_encoder.blocks.1.attention.to_key"),
    ("bert.embeddings.LayerNorm.bias", "text_encoder.norm.bias"),
    ("cls.predictions.transform.dense.bias", "word_head.transform.0.bias")])
def test_a_bert_with_one_tensor_too_few_or_too_many_or_misshapen(tmp_path, reference, name, ours):
    """The tensor is named in the sentence, by our name."""
    own = reference.released_names()
    spoilt = {"missing": {k: v for k, v in own.items() if k != name}, "renamed": own | {name + "s": own[name].clone()},
              "misshapen": own | {name: torch.zeros(7, 5)}}
    for what, tensors in spoilt.items():
        path = write(tmp_path, tensors, f"{what}.safetensors", **HEADS)
        message = refusal(retrievers.start, TINY, str(path), "", str(VOCAB_FILE))
        assert what in message and (what == "misshapen" or ours in message)


def test_too_few_layers(tmp_path):
    path = write(tmp_path, Bert(1011, depth=1).released_names(), **HEADS)
    assert "1 layers" in refusal(read_bert, path, TINY)


@pytest.mark.parametrize("name, shape, said", [
    ("bert.embeddings.token_type_embeddings.weight", (2,), "input of size"),        # what broadcasting would hide
    ("bert.embeddings.token_type_embeddings.weight", (2, 1), "input of size"),
    ("bert.embeddings.position_embeddings.weight", (64, 1), "input of size"),
    ("bert.encoder.layer.1.attention.self.key.weight", (30, 32), "blocks.1.attention.to_keys_values.weight"),
    ("bert.embeddings.LayerNorm.gamma", (32,), "is there twice"),
    ("bert.embeddings.LayerNorm.weight", None, "not finite")])
def test_a_bert_that_only_seems_to_fit(tmp_path, reference, name, shape, said):
    other = torch.zeros(shape) if shape else torch.full((32,), torch.nan)
    path = write(tmp_path, reference.released_names() | {name: other}, **HEADS)
    assert said in refusal(retrievers.start, TINY, str(path), "", str(VOCAB_FILE))


def test_a_bert_with_few_positions_reads_the_beginning_of_a_caption(tmp_path, reference, paint):
    own = reference.released_names()
    del own["bert.embeddings.position_ids"]
    write(tmp_path / "short", own | {"bert.embeddings.position_embeddings.weight": torch.zeros(12, 32)}, **HEADS)
    (tmp_path / "short/vocab.txt").write_text(VOCAB_FILE.read_text())
    model, tokenizer = retrievers.start(TINY, str(tmp_path / "short"), "", "")
    ids = tokenizer.encode("a man in a red coat " * 5, model.config.max_tokens)
    tokens, _ = model.encode_text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    assert tokens.shape == (1, 12, 32)
    assert pictures.heat_map(model, tokenizer, paint("a.png"), "a man in a red coat " * 5).size == (96, 192)


def test_a_folder_without_weights(tmp_path):
    assert "no folder with one of model.safetensors" in refusal(read_bert, tmp_path, TINY)


def test_a_vocabulary_that_is_missing_or_another(bert_folder, tmp_path):
    (bert_folder / "vocab.txt").unlink()
    assert "vocab.txt" in refusal(retrievers.start, TINY, str(bert_folder), "", "")
    (tmp_path / "other.txt").write_text(VOCAB_FILE.read_text() + "unheard\n")
    assert "1012" in refusal(retrievers.start, TINY, str(bert_folder), "", str(tmp_path / "other.txt"))


def test_what_config_json_says(tmp_path, reference):
    """Without it the heads are those usual for the width; nothing that does not work here."""
    path = write(tmp_path, reference.released_names())
    assert "config.json" in refusal(read_bert, path, TINY)
    assert files.heads_of(tmp_path, 768) == 12 and files.heads_of(Path("vit_b_16.pth"), 1024) == 16
    write(tmp_path, {}, "other.pth", hidden_size=32, num_attention_heads=-4)
    assert "number of attention heads" in refusal(read_bert, path, TINY)
    write(tmp_path, {}, "other.pth", **HEADS, hidden_act="relu")
    assert "relu" in refusal(read_bert, path, TINY)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(read_bert, path, TINY)


def test_a_vit_with_one_tensor_too_few_or_too_many_or_that_does_not_fit(tmp_path, torchvision_vit):
    own, name = torchvision_vit.state_dict(), "encoder.layers.encoder_layer_1.ln_2.weight"
    for tensors, named in (({k: v for k, v in own.items() if k != name}, "blocks.1.mlp_norm.weight first"),
                           (own | {"extra": own[name]}, "extra"), (own | {name: torch.zeros(3)}, "blocks.1.mlp_norm"),
                           (own | {"class_token": torch.zeros(1, 1, 1)}, "input of size"),
                           (own | {"conv_proj.weight": torch.zeros(128, 3, 0, 0)}, "zero"),
                           ({k: v for k, v in own.items() if "conv_proj" not in k}, "patches.weight')"),
                           (own | {"encoder.pos_embedding": torch.zeros(1, 13, 128)}, "encoder.positions first")):
        assert named in refusal(retrievers.start, TINY, "", str(write(tmp_path, tensors, "vit.pth", **VIT_HEADS)), "")
    path = write(tmp_path, own, "vit.pth")
    assert "44x16" in refusal(retrievers.start, dataclasses.replace(TINY, height=44), "", str(path), "")
