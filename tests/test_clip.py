"""CLIP's encoders and tokenizer against IRRA's code, Hugging Face's and open_clip's; their files, whole and wrong.

assets/irra.npz holds the values: `irra.*` from IRRA's code at full width (large arrays every 8 rows and columns),
`hf.*` and `open_clip.*` from CLIPModel of transformers 5.24.0 and CLIP of open_clip 3.3.0 at a small width. All weights
follow from their names by the rules in `irra_state` and `small_state`. Of CLIP's 48,894 merges it holds the ones that
its texts need, with their ranks; `hard_ids` are open_clip's.
"""

import dataclasses
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_stable import array
from tokenizers import pre_tokenizers
from torch import Tensor, nn

import evaluate
import train
from mra import losses
from mra.config import PRESETS, ModelConfig, UserError
from mra.data.batches import Batch
from mra.data.tokenizer import MAX_MASKED, mask_words, pad
from mra.retriever import Objective
from mra.run import checkpoint
from mra.weights.clip import MERGE_FILES, ClipRetriever, ClipTokenizer
from mra.weights.files import fit_positions
from mra.weights.retrievers import load_retriever, make_retriever, model_facts, start
from tests.test_weights import refusal

STORED = np.load(Path(__file__).with_name("assets") / "irra.npz")
KEYS = json.loads(str(STORED["keys"]))              # names and shapes of each model's tensors
MERGES = str(STORED["merges"]).split("\n")
TEXTS = [*map(str, STORED["captions"]), *map(str, STORED["hard"])]
OPENAI_FILE = MERGE_FILES[1]
TEXT_IDS = np.concatenate([STORED["token_ids"], STORED["hard_ids"]])        # (13, 77), filled up with 0
CPU = torch.device("cpu")
HEADS = dict(vision_config=dict(num_attention_heads=2), text_config=dict(num_attention_heads=1))


def close(found: Tensor, name: str, atol: float) -> None:
    torch.testing.assert_close(found, torch.from_numpy(STORED[name]), atol=atol, rtol=0)


def golden_noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


# ---- vocabularies

def write_small_vocabulary(folder: Path) -> Path:
    """OpenAI's file, of the stored merges alone."""
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / OPENAI_FILE, "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version", *MERGES]))
    return folder / OPENAI_FILE


def write_folder_vocabulary(folder: Path, merges: list[str]) -> Path:
    """Hugging Face's file."""
    folder.mkdir(exist_ok=True)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ClipTokenizer:
    return ClipTokenizer.read(write_small_vocabulary(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def full_vocabulary(tmp_path_factory) -> Path:
    """The stored merges have CLIP's ranks; the others join pieces that end words, which no text does."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    fillers = (f"{one}</w> {other}</w>" for one in signs for other in signs)
    stored = dict(zip(STORED["ranks"].tolist(), MERGES))
    merges = [stored.get(rank) or next(fillers) for rank in range(48894)]
    return write_folder_vocabulary(tmp_path_factory.mktemp("full"), merges)


def filled_up(ids: list[int]) -> list[int]:
    return ids + [0] * (77 - len(ids))


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_token_ids(tokenizer, full_vocabulary, number):
    """By Hugging Face's file, and by OpenAI's, whose ids here are CLIP's without the merges that are left out."""
    text, expected = TEXTS[number], TEXT_IDS[number].tolist()
    full = ClipTokenizer.read(full_vocabulary)
    assert filled_up(full.encode(full.clean(text, "cuhk"), 77)) == expected and len(full) == 49408
    table = [*range(512), *(512 + STORED["ranks"]).tolist(), 49406, 49407]
    found = tokenizer.encode(tokenizer.clean(text, "cuhk"), 77)
    assert filled_up([table[i] for i in found]) == expected and len(tokenizer) == len(table)


def test_a_long_caption_is_cut(tokenizer):
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.encode(TEXTS[0], 8) == [*ids[:7], tokenizer.sep_id] and len(ids) > 8


def test_special_ids(full_vocabulary, tokenizer):
    """As in IRRA, the mask takes the id of the last word; a random piece never is a special one."""
    full = ClipTokenizer.read(full_vocabulary)
    assert (full.cls_id, full.sep_id, full.pad_id, full.mask_id, full.unk_id) == (49406, 49407, 49407, 49405, None)
    assert set(tokenizer.ordinary_ids).isdisjoint({tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id})


def test_whole_words_are_masked(tokenizer):
    """A word is spelt by pieces, the last of which has </w>; all of them are predicted, or none."""
    ids = tokenizer.encode("A woman wearing zebra leggings, carrying a turquoise umbrella & 12 bags.")
    words = tokenizer.words_of(ids)
    spelt = ["".join(tokenizer.pieces[ids[i]] for i in word) for word in words]
    assert spelt == [f"{word}</w>" for word in "a woman wearing zebra leggings , carrying a turquoise umbrella & 1 2 "
                                               "bags .".split()]
    assert sum(words, []) == list(range(1, len(ids) - 1)) and max(map(len, words)) > 3
    for seed in range(20):
        masked, at = mask_words(ids, tokenizer, random.Random(seed))
        assert at and all(set(word) <= set(at) or set(word).isdisjoint(at) for word in words)
        assert all(masked[i] == ids[i] for i in range(len(ids)) if i not in at)
    assert tokenizer.words_of([tokenizer.cls_id, tokenizer.mask_id, tokenizer.sep_id, tokenizer.pad_id]) == []


# ---- IRRA at full width

def irra_state() -> dict[str, Tensor]:
    """Numbers of 0.02, around 1 for the scale of a norm; zeros for the parts that only IRRA's training uses."""
    state = {}
    for name, shape in KEYS["irra"].items():
        if name.startswith("base_model."):
            state[f"module.{name}"] = 0.02 * array(name, *shape) + float(len(shape) == 1 and name.endswith("weight"))
        else:
            state[f"module.{name}"] = torch.zeros(()).expand(shape)
    return state


@pytest.fixture(scope="module")
def irra(tmp_path_factory, full_vocabulary) -> Iterator[tuple[ClipRetriever, ClipTokenizer, dict]]:
    """IRRA's best.pth, as DataParallel names its tensors."""
    path = tmp_path_factory.mktemp("irra") / "best.pth"
    torch.save({"model": irra_state(), "epoch": 3}, path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trunc_normal_", "kaiming_uniform_", "normal_"):       # no time for weights that are replaced
            patch.setattr(nn.init, name, lambda x, *rest, **more: nn.init.zeros_(x))
        found = load_retriever(path, CPU, str(full_vocabulary))
    path.unlink()
    yield found


@torch.inference_mode()
def test_irra_in_full(irra):
    """One image and four captions; IRRA projects all tokens."""
    model, tokenizer, _ = irra
    image, ids = golden_noise(20, 3, 3, 384, 128)[:1], torch.from_numpy(TEXT_IDS[:4]).long()
    tokens, feature = model.encode_image(image)
    projected = model.image_projection(tokens)
    close(projected[0, ::8, ::8], "irra.image_tokens0", 1e-4)
    torch.testing.assert_close(projected[0, 0, ::8], torch.from_numpy(STORED["irra.image_features"][0]), atol=1e-4,
                               rtol=0)
    text = model.text_projection(model.text_encoder(ids, ids > 0))
    close(text[0, ::8, ::8], "irra.text_tokens0", 1e-4)
    ends = text[range(4), (ids > 0).sum(1) - 1]
    torch.testing.assert_close(ends[:, ::8], torch.from_numpy(STORED["irra.text_features"][:4]), atol=1e-4, rtol=0)
    captions = [tokenizer.encode(tokenizer.clean(text, "cuhk"), 77) for text in TEXTS[:4]]
    _, texts = model.encode_text(*pad(captions, tokenizer.pad_id))
    torch.testing.assert_close(texts @ feature.T, torch.from_numpy(STORED["irra.similarity"][:4, :1]), atol=1e-4,
                               rtol=0)


def test_what_irra_becomes(irra):
    model, tokenizer, facts = irra
    assert facts["train"]["preset"] == "clip" and facts["mirror"] is False and len(tokenizer) == 49408
    expected = dataclasses.replace(PRESETS["clip"], vocab=49408)
    assert model.config == expected and model.temperature.item() == pytest.approx(0.02)


@pytest.mark.parametrize("preset, count", [("clip", 149_620_737)])
def test_parameter_counts(preset, count):
    """CLIP ViT-B/16's published number of parameters, less the positions of the class token and of the 14 x 14 grid."""
    with torch.device("meta"):
        model = make_retriever(dataclasses.replace(PRESETS[preset], vocab=49408))
    own = {name: p for name, p in model.named_parameters()
           if name.split(".")[0] in ("image_encoder", "text_encoder", "image_projection", "text_projection",
                                     "temperature")}
    assert sum(p.numel() for p in own.values()) == count - 768 * (197 - 24 * 8)


def test_positions_are_interpolated_as_in_irra():
    """14 x 14 become 24 x 8; the class token's stay and are added to it."""
    tensors = {"image_encoder.positions": golden_noise(23, 197, 768), "image_encoder.class_token": torch.zeros(768)}
    fit_positions(tensors, (24, 8), "bilinear")
    assert tensors["image_encoder.positions"].shape == (1, 192, 768)
    whole = torch.cat([tensors["image_encoder.class_token"], tensors["image_encoder.positions"]], 1)[0]
    close(whole[::24, ::8], "irra.positions", 1e-6)


# ---- Hugging Face's and open_clip's models, at a small width

def small_state(kind: str) -> dict[str, Tensor]:
    """Matrices that keep a variance, norms near 1, small biases."""
    state = {}
    for name, shape in KEYS[kind].items():
        if len(shape) > 1:
            state[name] = array(name, *shape) / float(np.prod(shape[1:])) ** 0.5
        elif shape:
            state[name] = 0.1 * array(name, *shape) + float(name.endswith("weight"))
        else:
            state[name] = torch.tensor(3.0)
    return state


@pytest.fixture
def small(monkeypatch) -> None:
    """The preset with the images of the stored values, 32x32, and a short fusion encoder."""
    monkeypatch.setitem(PRESETS, "clip", dataclasses.replace(PRESETS["clip"], height=32, width=32, fusion_depth=1))


def write_hugging_face(folder: Path) -> Path:
    write_folder_vocabulary(folder, MERGES)
    (folder / "config.json").write_text(json.dumps(HEADS))
    save_file(small_state("hf"), folder / "model.safetensors")
    return folder


def write_open_clip(folder: Path, **changes: Tensor | None) -> Path:
    write_small_vocabulary(folder)
    (folder / "config.json").write_text(json.dumps(HEADS))
    state = small_state("open_clip") | changes
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "open_clip.safetensors")
    return folder / "open_clip.safetensors"


def write_irra(folder: Path, prefix: str = "base_model.") -> Path:
    """In half precision, without the temperature, and with a head."""
    write_small_vocabulary(folder)
    (folder / "config.json").write_text(json.dumps(HEADS))
    state = {prefix + name: tensor.half() for name, tensor in small_state("open_clip").items()}
    del state[f"{prefix}logit_scale"]
    head = {prefix.replace("base_model.", "") + "classifier.weight": torch.zeros(7, 32)}
    torch.save({"model": state | head, "epoch": 3}, folder / "best.pth")
    return folder / "best.pth"


def close_to_stored(model: ClipRetriever, tokenizer: ClipTokenizer, kind: str) -> None:
    with torch.inference_mode():
        tokens, image = model.encode_image(array("image", 3, 3, 32, 32))
        ids, keep = pad([tokenizer.encode(caption, 77) for caption in TEXTS[:4]], tokenizer.pad_id, 77)
        _, text = model.encode_text(ids, keep)
        if kind == "hf":
            close(tokens[:, :, ::8], "hf.image_tokens", 1e-5)
            close(model.text_encoder(ids, keep)[:, ::8, ::8], "hf.text_tokens", 1e-5)
        close(image, f"{kind}.image", 1e-5)
        close(text, f"{kind}.text", 1e-5)
        close(text @ image.T / model.temperature, f"{kind}.logits", 2e-4)          # of about 10


def test_hugging_faces_folder(small, tmp_path):
    model, tokenizer, facts = load_retriever(write_hugging_face(tmp_path), CPU)
    assert facts["val"] == {}
    close_to_stored(model, tokenizer, "hf")
    config = model.config
    assert (config.image_dim, config.image_heads, config.text_dim, config.text_heads) == (128, 2, 64, 1)
    assert (config.embed, config.max_tokens, config.patch, config.fusion_depth) == (32, 77, 8, 1)


def test_open_clips_file(small, tmp_path):
    model, tokenizer, _ = load_retriever(write_open_clip(tmp_path), CPU)
    close_to_stored(model, tokenizer, "open_clip")


@pytest.mark.parametrize("prefix", ["base_model.", "module.base_model."])
def test_an_irra_file_in_half_precision(small, tmp_path, prefix):
    found, _, _ = load_retriever(write_irra(tmp_path / "irra", prefix), CPU)
    model, _, _ = load_retriever(write_open_clip(tmp_path / "own"), CPU)
    own = checkpoint.weights(found)
    for name, tensor in checkpoint.weights(model).items():
        exact = name.startswith(("image_", "text_")) and "class_token" not in name         # which is a sum
        assert torch.equal(own[name], tensor.half().float()) or not exact
    assert own["temperature"].item() == pytest.approx(0.02)
    image = array("image", 3, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(found.encode_image(image)[1], model.encode_image(image)[1], atol=2e-3, rtol=0)


def test_a_clip_to_start_training_from(tmp_path):
    """At the size of the configuration, which need not be square."""
    config = dataclasses.replace(PRESETS["clip"], height=64, width=24, fusion_depth=2)
    model, tokenizer = start(config, "", "", "", str(write_hugging_face(tmp_path)))
    tokens, feature = model.encode_image(torch.randn(2, 3, 64, 24))
    assert tokens.shape == (2, 1 + 8 * 3, 128) and feature.shape == (2, 32) and len(model.fusion_encoder.blocks) == 2
    assert len(tokenizer) == model.config.vocab == len(model.word_head.decoder.weight)


# ---- what is wrong with a file

@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_files_that_hold_no_clip(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-B-16.pt"))
    assert "TorchScript" in refusal(load_retriever, tmp_path / "ViT-B-16.pt", CPU)
    save_file({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 4)}, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert "no CLIP" in refusal(load_retriever, path, CPU)


@pytest.mark.parametrize("changes, said", [
    ({"visual.ln_post.weight": None}, "Tensors missing: 1, image_encoder.norm.weight first"),
    ({"visual.extra": torch.zeros(3)}, "Tensors unknown: 1, image_encoder.extra first"),
    ({"transformer.resblocks.1.mlp.c_fc.bias": None}, "text_encoder.blocks.1.mlp.0.bias first"),
    ({"text_projection": None}, "text_projection.weight first"),
    ({"text_projection": torch.zeros(64, 31)}, "Tensors of another shape: 1, text_projection.weight first"),
    ({"visual.conv1.weight": None}, "image_encoder.patches.weight"),
    ({"visual.proj": None}, "image_projection.weight"),
    ({"visual.positional_embedding": torch.zeros(12, 128)}, "image_encoder.positions first"),
    ({"visual.conv1.weight": torch.zeros(96, 3, 8, 8)}, "of another shape"),
    ({"positional_embedding": torch.zeros(77, 96)}, "of another shape")])
def test_a_clip_with_one_tensor_too_few_or_too_many_or_misshapen(small, tmp_path, changes, said):
    path = write_open_clip(tmp_path, **changes)
    message = refusal(load_retriever, path, CPU)
    assert str(path) in message and said in message


def test_a_method_that_adds_to_irras_encoders_is_refused(small, tmp_path):
    path = write_irra(tmp_path)
    state = torch.load(path)["model"] | {"visual_emb_layer.linear.weight": torch.zeros(3, 3)}
    torch.save({"model": state}, path)
    assert "Tensors unknown: 1, visual_emb_layer.linear.weight first" in refusal(load_retriever, path, CPU)


def test_what_config_json_says_of_a_clip(small, tmp_path):
    """Heads and activation of both encoders, which no tensor shows."""
    path = write_open_clip(tmp_path)
    wrong = HEADS | {"text_config": {"num_attention_heads": 1, "hidden_act": "gelu"}}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    assert "only quick_gelu will do" in refusal(load_retriever, path, CPU)
    (tmp_path / "config.json").unlink()
    assert "number of attention heads" in refusal(load_retriever, path, CPU)


def test_a_vocabulary_that_is_missing_or_another(small, tmp_path, full_vocabulary):
    path = write_open_clip(tmp_path)
    assert "do not belong together" in refusal(load_retriever, path, CPU, str(full_vocabulary))
    (tmp_path / OPENAI_FILE).unlink()
    message = refusal(load_retriever, path, CPU)
    assert all(word in message for word in (str(path), "--vocab", "merges.txt", OPENAI_FILE))
    whole = write_small_vocabulary(tmp_path).read_bytes()
    for content in (b"x", whole[:-50], whole[:40] + b"xxxx" + whole[44:]):
        (tmp_path / OPENAI_FILE).write_bytes(content)
        assert "no readable vocabulary of CLIP" in refusal(load_retriever, path, CPU)
    for line, said in (("a b c", "no vocabulary of CLIP"), ("ab c", "no vocabulary of CLIP"), ("a b", "515 pieces")):
        write_folder_vocabulary(tmp_path, [line])
        assert said in refusal(load_retriever, path, CPU)


# ---- a checkpoint of ours, and a step of training

@pytest.fixture
def config(tokenizer) -> ModelConfig:
    return dataclasses.replace(
        PRESETS["clip"], height=32, width=16, patch=8, image_dim=64, image_depth=2, image_heads=1, text_dim=64,
        text_depth=2, text_heads=1, fusion_depth=2, embed=16, vocab=len(tokenizer))


def test_a_checkpoint_holds_the_vocabulary(config, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = make_retriever(config).eval()
    facts = {"train": {"preset": "clip"}, "val": {}, "pretrained_on": "nothing"}
    checkpoint.save(tmp_path / "x.safetensors", checkpoint.weights(model), model_facts(model, tokenizer) | facts)
    found, again, _ = load_retriever(tmp_path / "x.safetensors", CPU)
    assert isinstance(found, ClipRetriever) and found.config == config
    assert again.pieces == tokenizer.pieces and again.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert all(torch.equal(tensor, checkpoint.weights(found)[name])
               for name, tensor in checkpoint.weights(model).items())
    image = torch.randn(2, 3, 32, 16)
    with torch.inference_mode():
        torch.testing.assert_close(found.encode_image(image), model.encode_image(image))


def test_a_step_of_training(config, tokenizer):
    torch.manual_seed(0)
    model = make_retriever(config)
    captions = [tokenizer.encode(text, 30) for text in TEXTS[:3]]
    masked, at = zip(*(mask_words(ids, tokenizer, random.Random(i)) for i, ids in enumerate(captions)))
    labels = [[ids[i] for i in places] for ids, places in zip(captions, at)]
    phrases = pad([ids[:5] + [tokenizer.sep_id] for ids in captions], tokenizer.pad_id)
    region_keep = torch.zeros(3, 8, dtype=torch.bool)
    region_keep[:, 2:5] = True
    batch = Batch(torch.randn(3, 3, 32, 16), torch.arange(3), *pad(captions, tokenizer.pad_id),
                  pad(masked, tokenizer.pad_id)[0], pad(at, 0, MAX_MASKED)[0], pad(labels, -100, MAX_MASKED)[0], None,
                  None, region_keep, *phrases, torch.arange(3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    terms = model(batch, Objective())
    assert set(terms) == {"itc", "itm", "mlm", "rpc", "rpm"} and all(term.isfinite() for term in terms.values())
    losses.total(terms, beta=0.8).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@torch.inference_mode()
def test_a_region_is_not_the_class_token(config, batch):
    """Even the region that covers the image: it is the mean of the patches, and token 0 is the class token."""
    torch.manual_seed(0)
    model = make_retriever(config).eval()
    tokens, feature = model.encode_image(batch.image)
    region, keep, of_region = model.encode_region(tokens, torch.ones(4, 8, dtype=torch.bool))
    torch.testing.assert_close(region[:, 0], tokens[:, 1:].mean(1))
    assert keep.all() and not torch.allclose(of_region, feature, atol=1e-2)


@torch.inference_mode()
def test_a_caption_alone_is_what_it_is_in_a_padded_batch(config, tokenizer):
    """Words after a word change nothing of it; the last one takes the place of token 0."""
    torch.manual_seed(0)
    model = make_retriever(config).eval()
    captions = [tokenizer.encode(text, 40) for text in TEXTS[:3]] + [tokenizer.encode("a man")]
    ids, keep = pad(captions, tokenizer.pad_id)
    tokens, features = model.encode_text(ids, keep)
    for row, caption in enumerate(captions):
        alone, feature = model.encode_text(torch.tensor([caption]), torch.ones(1, len(caption), dtype=torch.bool))
        torch.testing.assert_close(alone[0], tokens[row, :len(caption)], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(feature[0], features[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone[0, 0], alone[0, -1])
    torch.testing.assert_close(features, F.normalize(model.text_projection(tokens[:, 0]), dim=1))


def test_the_commands_take_a_clip(small, root, monkeypatch, capsys):
    """evaluate.py ranks by its embeddings alone, sets and photographs; train.py fine-tunes it and writes our files."""
    folder = write_hugging_face(root / "clip")
    common = ("--dataset", "cuhk", "--data-root", root, "--device", "cpu")
    once = ("--preset", "clip", "--steps", 1, "--batch", 2, "--evals", 1, "--workers", 0)
    photographs = ("--gallery", root / "CUHK-PEDES/imgs/test", "--query", "a man in red &amp; blue")
    for script, flags in (
            (evaluate, ("--checkpoint", folder, "--out", root / "out")),
            (evaluate, ("--checkpoint", folder, "--out", root / "out", *photographs)),
            (train, ("--init", "none", "--clip", folder, "--contrastive", "sdm", *once, "--out", root / "one")),
            (train, ("--init", folder, *once, "--out", root / "two")),
            (evaluate, ("--checkpoint", root / "one" / "best.safetensors", "--out", root / "one"))):
        monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *map(str, (*common, *flags))])
        script.main()
    checks = *common, "--check", "--preset", "clip", "--clip", folder
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, checks)])
    with pytest.raises(SystemExit) as ended:
        train.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "No faults found." in said and "that the vocabulary lacks" not in said
    assert "A CLIP or IRRA checkpoint: images are ranked by embeddings alone, without mirror images." in said
    for file, fused in (("out/results-cuhk.json", False), ("one/results.json", True)):
        written = json.loads((root / file).read_text())
        assert written["evaluation"]["mirror"] == fused and (written["evaluation"]["k"] > 0) == fused
        results = written["results"]["cuhk"]
        assert results["queries"] == 12 and ("re-ranked" in results) == fused
    hit, *_ = json.loads((root / "out/query.json").read_text())["answers"][0]["first"]
    assert -1 <= hit["similarity"] <= 1 and "match" not in hit


def test_a_clip_and_its_preset_go_together(small, root, monkeypatch):
    """Either without the other is refused, and so is a start from both --clip and --init."""
    folder = write_hugging_face(root / "clip")
    for flags in (("--preset", "clip"), ("--preset", "tiny", "--clip", folder),
                  ("--preset", "clip", "--clip", folder, "--init", folder)):
        monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "icfg", *map(str, flags)])
        with pytest.raises(UserError, match="--clip"):
            train.main()
