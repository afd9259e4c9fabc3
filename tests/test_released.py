"""The released checkpoints: our numbers against those that the released code computed, key by key and score by score.

assets/released.npz holds them (large arrays every so many rows and columns), for models whose weights follow from
their names by the rule in `filled`. Small files of the same form are read, resized, evaluated and fine-tuned.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import evaluate
import train
from mra import losses, ranking
from mra.config import PRESETS, UserError
from mra.data.augment import box_to_patches
from mra.data.batches import Batch
from mra.data.tokenizer import VOCAB_FILE
from mra.retriever import Objective, Retriever, pool_region
from mra.run import checkpoint
from mra.weights import files, retrievers
from tests.test_weights import refusal

CLOSE = dict(atol=1e-4, rtol=0)
GOLDEN = {name: torch.from_numpy(array.astype(np.int64 if array.dtype == np.int32 else array.dtype))
          for name, array in np.load(Path(__file__).parent / "assets/released.npz").items() if name != "keys"}
KEYS = json.loads(str(np.load(Path(__file__).parent / "assets/released.npz")["keys"]))


SAME = {"text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
        "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias"}        # tied


def close(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found.double(), GOLDEN[name].double(), **CLOSE)


def words(prefix: str) -> tuple[Tensor, Tensor]:
    """Ids and keep of captions or phrases."""
    return GOLDEN[f"{prefix}_ids"], GOLDEN[f"{prefix}_atts"].bool()


# ---- full size, against the golden values

def drawn(key: str, shape: list[int]) -> Tensor:
    """The weight of a key: normal numbers seeded by its name, of 0.02, around 1 for the scale of a norm."""
    if "num_batches" in key or "relative_position_index" in key or "attn_mask" in key or "position_ids" in key:
        return torch.zeros(shape)
    if key == "temp" or key.endswith("running_var"):
        return torch.full(shape, 0.07 if key == "temp" else 1.0)
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(z * np.float32(0.02) + np.float32(len(shape) == 1 and key.endswith(".weight")))


@pytest.fixture(scope="module")
def filled() -> dict[str, Tensor]:
    """The cuhk model's state dict."""
    own = {key: shape for key, shape in KEYS["cuhk"].items() if key not in SAME}
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(own, pool.map(drawn, own, own.values())))
    return found | {key: found[other] for key, other in SAME.items()}


def variant(filled: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Another model's state dict: its own keys and shapes, the rest the same."""
    kept = {key: tensor for key, tensor in filled.items() if key not in KEYS[name]["without"]}
    return kept | {key: drawn(key, shape) for key, shape in KEYS[name]["with"].items()}


def loaded(state: dict[str, Tensor]) -> Retriever:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trunc_normal_", "kaiming_uniform_", "normal_"):        # no time for weights that are replaced
            patch.setattr(torch.nn.init, name, lambda x, *rest, **more: x)
        return retrievers.read_released(state, Path("ft.pth"))[0].eval()


def noise(seed: int, height: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((4, 3, height, width)).astype(np.float32))


@pytest.fixture(scope="module")
def cuhk(filled) -> Iterator[tuple[Retriever, Tensor]]:
    """The cuhk model, which encodes its four images and their mirror images once, and these images."""
    model, images = loaded(filled), noise(0, 384, 256)
    with torch.inference_mode():
        plain, mirrored = model.image_encoder(images), model.image_encoder(images.flip(-1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.image_encoder, "forward", lambda x: plain if torch.equal(x, images) else mirrored)
        yield model, images


@torch.inference_mode()
def test_encoders_and_features(cuhk):
    model, images = cuhk
    image, feature = model.encode_image(images)
    text, text_feature = model.encode_text(*words("A.text"))
    close(image[:, 0], "A.swin_first")
    close(image[:, ::8, ::16], "A.swin")
    close(text[:, 0], "A.text_first")
    close(text[:, ::5, ::16], "A.text_embeds")
    for name, projection, unit in (("image", model.image_projection, feature), ("text", model.text_projection,
                                                                               text_feature)):
        outputs = []
        with pytest.MonkeyPatch.context() as patch:    # what the unit features were before normalisation
            patch.setattr(projection, "forward", lambda x, f=projection.forward: outputs.append(f(x)) or outputs[-1])
            model.encode_image(images) if name == "image" else model.encode_text(*words("A.text"))
        close(outputs[0][:, ::16], f"A.{name}_feat")
        torch.testing.assert_close(unit, outputs[0] / outputs[0].norm(dim=1, keepdim=True))


@torch.inference_mode()
def test_fusion_and_matching(cuhk):
    """16 pairs, query by query; the shorter captions without their padding."""
    model, images = cuhk
    ids, keep = words("A.text")
    keys_values = model.fusion_encoder.keys_values(model.image_encoder(images))
    for query in range(4):
        length = int(keep[query].sum())
        text, _ = model.encode_text(ids[query:query + 1, :length], keep[query:query + 1, :length])
        started = model.fusion_encoder.start(text, keep[query:query + 1, :length])
        pairs = started.expand(4, -1, -1), keep[query:query + 1, :length].expand(4, -1)
        fused = model.fusion_encoder(*pairs, torch.zeros(4, 1, dtype=torch.long), keys_values)[:, 0]
        torch.testing.assert_close(fused[:, ::8], GOLDEN["A.fusion_cls"][4 * query:4 * query + 4], **CLOSE)
        torch.testing.assert_close(model.match(*pairs, keys_values), GOLDEN["A.itm_logits"][4 * query:4 * query + 4],
                                   **CLOSE)
        fused = model.fusion_encoder(started, pairs[1][:1], torch.arange(length)[None],
                                     [one[query:query + 1] for one in keys_values])[0]
        torch.testing.assert_close(fused[::7, ::16], GOLDEN["A.fusion_all_diag"][query, :len(fused[::7])], **CLOSE)


class Spoken:
    """A tokenizer for captions that are the numbers of golden captions."""

    pad_id = 0

    def encode(self, caption: str, max_tokens: int) -> list[int]:
        ids, keep = words("A.text")
        return ids[int(caption)][keep[int(caption)]].tolist()


@pytest.mark.parametrize("mirror", [True, False])
def test_evaluation_scores(cuhk, monkeypatch, mirror):
    """Similarities with the mirror images; the matching logits of all four candidates without them."""
    model, images = cuhk
    monkeypatch.setattr(ranking, "Images", lambda paths, config: images)
    found = ranking.search(model, Spoken(), list("0123"), list("abcd"), ranking.Settings(0 if mirror else 4, mirror))
    if mirror:
        close(found.queries @ found.gallery.T, "A.eval_sims_t2i")
    else:
        logits = GOLDEN["A.itm_logits"].view(4, 4, 2)
        match = (logits[..., 1] - logits[..., 0]).gather(1, found.candidates)
        torch.testing.assert_close(found.match_logit, match, **CLOSE)


def test_losses_of_fine_tuning(cuhk, monkeypatch):
    """Smoothing 0.2, augmented captions at 0.8; negatives are the most likely ones, not drawn."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count: p.argmax(1, keepdim=True))
    model, images = cuhk
    batch = Batch(images, GOLDEN["A.ft_idx"], *words("A.text"), GOLDEN["A.mlm_ids"], GOLDEN["A.mlm_pos"],
                  GOLDEN["A.mlm_labels"], *words("A.eda"))
    with torch.inference_mode():
        terms = model(batch, Objective(smoothing=0.2, eda=0.8))
    close(torch.stack([terms["itc"], terms["itm"], terms["mlm"], torch.tensor(0.0)]), "A.ft_losses_argmax")


def test_heads_of_rstp(filled, monkeypatch):
    """The tensors that its model is filled with; the model itself takes too long to make."""
    tensors = {}
    monkeypatch.setattr(retrievers, "fill", lambda model, found, path: tensors.update(found))
    with torch.device("meta"):
        model, facts = retrievers.read_released(variant(filled, "rstp"), Path("ft_rstp.pth"))
    assert (facts["train"]["preset"], model.config.embed, model.config.bins, model.config.rerank) == (
        "swin", 256, 0, 1000)
    for name, first in (("image", "A.swin_first"), ("text", "A.text_first")):
        feature = torch.nn.functional.linear(GOLDEN[first], tensors[f"{name}_projection.weight"],
                                             tensors[f"{name}_projection.bias"])
        close(feature[:, ::4], f"B.{name}_feat")


@pytest.fixture(scope="module")
def sda(filled) -> Iterator[tuple[Retriever, Batch]]:
    """The pretraining model, which encodes its images once, and its batch at 224x224."""
    model, images = loaded(variant(filled, "sda")), noise(10, 224, 224)
    tokens = model.image_encoder(images)
    regions = torch.stack([box_to_patches(((x + w / 2) / 224, (y + h / 2) / 224, w / 224, h / 224), model.config.grid)
                           for x, y, w, h in GOLDEN["C.boxes_xywh"].tolist()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.image_encoder, "forward", lambda x: tokens)
        yield model, Batch(images, GOLDEN["C.idx"], *words("C.text"), GOLDEN["C.mlm_ids"],
                           GOLDEN["C.mlm_pos"], GOLDEN["C.mlm_labels"], None, None, regions, GOLDEN["C.box_ids"],
                           GOLDEN["C.box_text_atts"].bool(), GOLDEN["C.label"])


def ignore_boxes(model: Retriever, monkeypatch) -> None:
    """Regions as in the released code: the feature ignores the box, and the fusion encoder does not see the mean."""
    def encode_region(tokens: Tensor, region_keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        region, keep = pool_region(tokens, region_keep)
        keep[:, 0] = False
        return region, keep, model.image_feature(tokens)
    monkeypatch.setattr(model, "encode_region", encode_region)


@pytest.fixture(scope="module")
def as_published(sda) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Loss terms, with regions as the released code treats them, and what the projections gave on the way."""
    model, batch = sda
    features = []
    hooks = [projection.register_forward_hook(lambda module, given, feature: features.append(feature[:, ::16]))
             for projection in (model.image_projection, model.text_projection)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", lambda p, count: p.argmax(1, keepdim=True))
        ignore_boxes(model, patch)
        terms = model(batch)
    for hook in hooks:
        hook.remove()
    return terms, features


def test_pretraining(sda, as_published, monkeypatch):
    """At 224x224: tokens, regions and all losses, those of the regions as the released code treats them."""
    monkeypatch.setattr(torch, "multinomial", lambda p, count: p.argmax(1, keepdim=True))
    model, batch = sda
    terms, features = as_published
    with torch.inference_mode():
        tokens = model.image_encoder(batch.image)
        close(tokens[:, ::7, ::16], "C.swin")
        close(pool_region(tokens, batch.region_keep)[0][:, 0, ::8], "C.region_pooled")
        own = model(batch)
        for feature, name in zip(features, ("image_feat", None, "image_feat_box", "text_feat_box")):   # None: captions
            close(feature, f"C.{name}") if name else None
        close(terms["rpc"], "C.region_itc")
        close(torch.stack([terms["itc"], terms["itm"], terms["mlm"], 0.8 * (terms["rpc"] + terms["rpm"])]),
              "C.losses_argmax")
        close(losses.total(terms, 0.8 * 0.8), "C.total_argmax")                  # there the weight applies twice
    assert abs(own["rpc"] - terms["rpc"]) > 1e-3 and abs(own["rpm"] - terms["rpm"]) > 1e-5


def test_gradients_of_pretraining(sda, as_published):
    """Their norms, tensor by tensor: keys and values are one of ours, and the token types are in the positions."""
    model, _ = sda
    losses.total(as_published[0], 0.8 * 0.8).backward()
    golden = json.loads((Path(__file__).parent / "assets/released_gradnorm.json").read_text())
    norms = {name: torch.tensor([[norm]]) for name, norm in golden.items()}
    expected = files.named(norms, Path("pretrain.pth"), "released", "bert")
    types = {"types.weight": expected["types.weight"]}
    expected = types | retrievers.divided(expected | {"types.weight": torch.zeros(1, 1)}, 6)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["types.weight"] = found["text_encoder.positions.weight"].sum(0)       # every token is of the same type
    torch.testing.assert_close({name: gradient.norm() for name, gradient in found.items()},
                               {name: norms.norm() for name, norms in expected.items()}, atol=1e-5, rtol=1e-3)


def test_the_embedding_of_padding_gets_no_gradient():
    """Bins pool padding, whose embedding the released BERT never trains."""
    model = retrievers.make_retriever(dataclasses.replace(PRESETS["tiny"], bins=3, vocab=50)).eval()
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 3, 0, 0, 0]])
    model.encode_text(ids, ids != 0)[1][:, 0].sum().backward()
    norms = model.text_encoder.words.weight.grad.norm(dim=1)
    assert norms.nonzero().flatten().tolist() == [2, 3, 7, 8, 9]


# ---- what needs no model

def test_metrics():
    order = GOLDEN["D.scores"].argsort(dim=1, descending=True, stable=True)
    found = 100 * ranking.metric_rows(order, GOLDEN["D.q_pids"], GOLDEN["D.g_pids"]).mean(0)
    assert found.tolist() == pytest.approx(GOLDEN["D.metrics_R1_R5_R10_mAP_mINP"].tolist(), abs=1e-3)


@pytest.mark.parametrize("preset, count", [("swin", 226_596_661), ("swin-224", 226_586_869)])
def test_parameter_counts(preset, count):
    """The released ones less the two token types, which have gone into the position embeddings."""
    with torch.device("meta"):
        model = retrievers.make_retriever(dataclasses.replace(PRESETS[preset], vocab=30522))
    assert sum(parameter.numel() for parameter in model.parameters()) == count - 2 * 768


# ---- small files of the same form

@pytest.fixture
def small(monkeypatch) -> None:
    """The two presets with a Swin of 2 blocks a stage and two short BERTs; their vocabulary is the packaged one."""
    for name in ("swin", "swin-224"):
        monkeypatch.setitem(PRESETS, name, dataclasses.replace(
            PRESETS[name], image_dim=64, image_depth=8, image_heads=8, text_dim=32, text_depth=1, fusion_depth=1,
            text_heads=1, embed=16, positions=64, vocab=1011))


def as_released(model: Retriever) -> dict[str, Tensor]:
    """The state dict that the released code would have saved of this model."""
    state, own, buffers = {}, checkpoint.weights(model), dict(model.named_buffers())

    def give(theirs: str, ours: str) -> None:
        state.update({f"{theirs}.{kind}": own.pop(f"{ours}.{kind}") for kind in ("weight", "bias")
                      if f"{ours}.{kind}" in own})
    vision, bert, head = "vision_encoder", "text_encoder.bert", "text_encoder.cls.predictions"
    give(f"{vision}.patch_embed.proj", "image_encoder.patches")
    give(f"{vision}.patch_embed.norm", "image_encoder.patch_norm")
    give(f"{vision}.norm", "image_encoder.norm")
    for stage in range(4):
        for block in range(2):
            theirs, ours = f"{vision}.layers.{stage}.blocks.{block}", f"image_encoder.stages.{stage}.{block}"
            for one, other in (("norm1", "norm1"), ("attn.qkv", "attn.qkv"), ("attn.proj", "attn.proj"),
                               ("norm2", "norm2"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3")):
                give(f"{theirs}.{one}", f"{ours}.{other}")
            table = "attn.relative_position_bias_table"
            state[f"{theirs}.{table}"] = own.pop(f"{ours}.{table}")
            side = int(len(buffers[f"{ours}.attn.relative_position_index"]) ** 0.5)
            state[f"{theirs}.attn.relative_position_index"] = torch.zeros(side, side, dtype=torch.long)
            if block:
                state[f"{theirs}.attn_mask"] = torch.zeros(6, side, side)
        give(f"{vision}.layers.{stage}.downsample.reduction", f"image_encoder.merges.{stage}.reduction")
        give(f"{vision}.layers.{stage}.downsample.norm", f"image_encoder.merges.{stage}.norm")
    give(f"{bert}.embeddings.word_embeddings", "text_encoder.words")
    give(f"{bert}.embeddings.position_embeddings", "text_encoder.positions")
    give(f"{bert}.embeddings.LayerNorm", "text_encoder.norm")
    state[f"{bert}.embeddings.token_type_embeddings.weight"] = torch.zeros(2, model.config.text_dim)
    for layer, ours in enumerate(("text_encoder.blocks.0", "fusion_encoder.blocks.0")):
        theirs = f"{bert}.encoder.layer.{layer}"
        for one, other in (("attention", "attention"), ("crossattention", "cross"))[:layer + 1]:
            give(f"{theirs}.{one}.self.query", f"{ours}.{other}.to_query")
            for kind in ("weight", "bias"):
                key, value = own.pop(f"{ours}.{other}.to_keys_values.{kind}").chunk(2)
                state |= {f"{theirs}.{one}.self.key.{kind}": key, f"{theirs}.{one}.self.value.{kind}": value}
            give(f"{theirs}.{one}.output.dense", f"{ours}.{other}.to_out")
            give(f"{theirs}.{one}.output.LayerNorm", f"{ours}.{other}_norm")
        for one, other in (("intermediate.dense", "mlp.0"), ("output.dense", "mlp.2"),
                           ("output.LayerNorm", "mlp_norm")):
            give(f"{theirs}.{one}", f"{ours}.{other}")
    give(f"{head}.transform.dense", "word_head.transform.0")
    give(f"{head}.transform.LayerNorm", "word_head.transform.2")
    state[f"{head}.bias"] = state[f"{head}.decoder.bias"] = own.pop("word_head.decoder.bias")
    state[f"{head}.decoder.weight"] = state[f"{bert}.embeddings.word_embeddings.weight"]
    short = {"image_projection": "vision_proj", "text_projection": "text_proj", "matching_head": "itm_head",
             "temperature": "temp"}
    state |= {name.replace(one := name.split(".")[0], short[one]): tensor for name, tensor in own.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.fixture
def write(small, tmp_path) -> Callable[..., tuple[Path, Retriever]]:
    """A small released file with its vocabulary beside it, and the model in it."""
    def make(preset: str, spoil: Callable = dict, **change) -> tuple[Path, Retriever]:
        torch.manual_seed(0)
        model = retrievers.make_retriever(dataclasses.replace(PRESETS[preset], **change)).eval()
        path = tmp_path / "ft.pth"
        torch.save({"model": spoil(as_released(model)), "config": {"lr": 1e-4}}, path)
        (tmp_path / "vocab.txt").write_text(VOCAB_FILE.read_text())
        return path, model
    return make


@pytest.mark.parametrize("preset, change", [("swin", {}), ("swin-224", {}),
                                            ("swin", dict(bins=0, embed=24, rerank=1000))])
def test_a_file_becomes_its_model(write, preset, change):
    path, model = write(preset, **change)
    found, tokenizer, facts = retrievers.load_retriever(path, torch.device("cpu"))
    assert found.config == model.config and facts["train"]["preset"] == preset and len(tokenizer) == 1011
    images = torch.randn(2, 3, model.config.height, model.config.width)
    with torch.inference_mode():
        torch.testing.assert_close(found.encode_image(images), model.encode_image(images))
    assert all(torch.equal(tensor, checkpoint.weights(model)[name])
               for name, tensor in checkpoint.weights(found).items())


SPOILT = {
    "vision_encoder.layers.1.downsample.norm.bias": "image_encoder.merges.1.norm.bias",
    "vision_encoder.layers.2.blocks.1.mlp.fc1.weight": "image_encoder.stages.2.1.mlp.0.weight",
    "text_encoder.bert.encoder.layer.1.crossattention.self.value.bias":
        "fusion_encoder.blocks.0.cross.to_key.bias",
    "temp": "temperature", "itm_head.3.weight": "matching_head.3.weight", "vision_proj.2.bias": "image_projection.2",
}


@pytest.mark.parametrize("key, named", SPOILT.items())
def test_a_file_with_one_tensor_too_few_or_misshapen(write, key, named):
    for spoil in (lambda state: {k: v for k, v in state.items() if k != key},
                  lambda state: state | {key: torch.zeros(5, 7)}):
        path, _ = write("swin", spoil)
        message = refusal(retrievers.load_retriever, path, torch.device("cpu"))
        assert str(path) in message and (named in message or "is incomplete or wrong" in message)


def test_files_that_are_no_released_checkpoint(write, tmp_path):
    path, _ = write("swin", lambda state: state | {"vision_encoder.extra": torch.zeros(2)})
    assert "extra" in refusal(retrievers.load_retriever, path, torch.device("cpu"))
    torch.save({"model": {"a": torch.zeros(2)}}, path)
    assert "no released MRA model" in refusal(retrievers.load_retriever, path, torch.device("cpu"))
    torch.save({"model": {"vision_encoder.a": torch.zeros(2)}}, path)
    assert "relative_position_bias_table" in refusal(retrievers.load_retriever, path, torch.device("cpu"))
    path, _ = write("swin")
    (tmp_path / "vocab.txt").unlink()
    assert "vocab.txt" in refusal(retrievers.load_retriever, path, torch.device("cpu"))


def test_half_precision_leaves_a_norm_its_count_of_batches(tmp_path):
    norm, again, path = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2), tmp_path / "half.safetensors"
    norm.num_batches_tracked.fill_(100_000)
    checkpoint.save(path, checkpoint.weights(norm, half=True), {})
    checkpoint.restore_weights(again, checkpoint.load(path)[0], path)
    assert again.num_batches_tracked == 100_000 and checkpoint.load(path)[0]["weight"].dtype == torch.float16


@pytest.mark.parametrize("one, other", [("swin-224", "swin"), ("swin", "swin-224")])
def test_another_image_size(small, one, other):
    """What does not depend on the size stays; the tables are interpolated, and both reach from corner to corner."""
    torch.manual_seed(0)
    model = retrievers.make_retriever(PRESETS[one]).eval()
    found = retrievers.resized(model, PRESETS[other]).eval()
    assert found.config == PRESETS[other]
    before, after = checkpoint.weights(model), checkpoint.weights(found)
    changed = {name for name in before if before[name].shape != after[name].shape}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"relative_position_bias_table"}
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - changed)
    name = "image_encoder.stages.0.1.attn.relative_position_bias_table"
    squares = [tensors[name].view(side, side, -1) for tensors, side in (
        (before, {"swin": 15, "swin-224": 13}[one]), (after, {"swin": 15, "swin-224": 13}[other]))]
    for at in (0, -1):
        for to in (0, -1):
            torch.testing.assert_close(squares[0][at, to], squares[1][at, to])
    middles = [square[len(square) // 2, len(square) // 2] for square in squares]       # a patch and itself
    torch.testing.assert_close(*middles)
    found.encode_image(torch.randn(1, 3, PRESETS[other].height, PRESETS[other].width))
    assert dict(found.named_buffers()).keys() - after.keys()       # the indices: files of before hold them, too
    checkpoint.restore_weights(found, after | dict(found.named_buffers()), Path("old.safetensors"))


# ---- the commands

def run(monkeypatch, script, *flags) -> None:
    monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *map(str, flags)])
    script.main()


def test_evaluate_recognises_a_released_file(write, root, monkeypatch):
    path, _ = write("swin")
    run(monkeypatch, evaluate, "--checkpoint", path, "--dataset", "cuhk", "--data-root", root, "--out", root / "out",
        "--device", "cpu")
    results = json.loads((root / "out" / "results-ft-cuhk.json").read_text())
    assert (results["evaluation"]["weight"], results["evaluation"]["k"]) == (0.0, 512)
    assert results["results"]["cuhk"]["queries"] == 12 and "re-ranked" in results["results"]["cuhk"]


def test_evaluate_asks_for_the_set_and_its_folder(write, root, monkeypatch):
    path, _ = write("swin")
    for flags, named in (((), "--dataset"), (("--dataset", "cuhk"), "--data-root")):
        with pytest.raises(UserError, match=named):
            run(monkeypatch, evaluate, "--checkpoint", path, *flags, "--out", root / "out")


def test_train_goes_on_with_a_released_file_at_another_size(write, root, monkeypatch):
    """A step of fine-tuning at 384x256 from 224x224; what comes out is one of our files, and `--init` takes it."""
    path, _ = write("swin-224")
    common = ("--dataset", "cuhk", "--data-root", root, "--preset", "swin", "--batch", 2, "--steps", 1, "--evals", 1,
              "--workers", 0, "--device", "cpu")
    run(monkeypatch, train, *common, "--init", path, "--out", root / "one")
    model, _, facts = retrievers.load_retriever(root / "one" / "best.safetensors", torch.device("cpu"))
    assert model.config == PRESETS["swin"] and facts["pretrained_on"] == "sda"
    run(monkeypatch, train, *common, "--init", root / "one" / "best.safetensors", "--out", root / "two")
    with pytest.raises(UserError, match="preset"):
        run(monkeypatch, train, *common, "--preset", "base", "--init", path, "--out", root / "three")
