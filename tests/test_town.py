"""The demo town: true words, true boxes, the same pixels for the same seed, the real sets' formats."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_commands import command

from mra.config import UserError
from mra.formats.read import load
from mra.town import drawing, people, sets
from mra.town.drawing import DOMAINS, Pose, render
from mra.town.people import Person, describe, sample_person, twin_of
from mra.town.sets import DEFAULT, FOLDERS, TINY, shots
from tests.study import portraits, worlds

COLOUR_OF = {name: colour for colour, names in people.COLOURS.items() for name in names}
HAIR_COLOUR_OF = {name: colour for colour, names in people.HAIR_COLOURS.items() for name in names}
EXAMPLE = Person("woman", "slim", "long", "blond", "", "", "jacket", "red", "plain", "", "white", "jeans",
                 "black", "sneakers", "white", "handbag", "green", "left", "", "", 1)     # see people.__doc__
ALL_PARTS = ("person", "hair", "headgear", "upper", "inner", "logo", "lower", "shoes", "bag", "carried")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    for set_name in FOLDERS:
        sets.build(root, set_name, TINY[set_name], 5, workers=1, say=lambda line: None)
    return root


def seen_parts(person: Person, rng: random.Random) -> dict:
    """Made-up boxes of what the person has: everything but, now and then, shoes, hair and other things."""
    boxes = {part: (rng.uniform(.3, .7), .5, .2, .2) for part in ALL_PARTS} | {"person": (.5, .5, .5, .9)}
    absent = {part for part in ("headgear", "bag", "carried") if not getattr(person, part)}
    absent |= set() if person.inner_colour else {"inner"}
    absent |= set() if person.pattern == "logo" else {"logo"}
    absent |= {part for part in ("shoes", "hair", "bag", "inner", "logo", "carried") if rng.random() < 0.15}
    return {part: box for part, box in boxes.items() if part not in absent}


def samples(count: int):
    for i in range(count):
        rng = random.Random(i)
        person, view = sample_person(rng), rng.choice(list(people.VIEWS))
        boxes = seen_parts(person, rng)
        yield person, view, boxes, describe(person, view, boxes, rng)


def said(caption: str, nouns: dict, colours: dict) -> set[tuple[str, str]]:
    """(colour, kind) pairs of a caption, longest names first: an independent reading of the words."""
    kind_of = {name: kind for kind, names in nouns.items() for name in names}
    either = ["|".join(map(re.escape, sorted(table, key=len, reverse=True))) for table in (colours, kind_of)]
    found = re.findall(rf"(?<![\w-])({either[0]}) ({either[1]})(?![\w-])", caption)
    return {(colours[colour], kind_of[noun]) for colour, noun in found}


def test_words_are_true_and_of_what_is_seen():
    for person, view, boxes, words in samples(1500):
        caption = words.caption
        assert 15 <= len(caption.split()) <= 40, caption
        assert not set("[]{}") & set(caption), caption
        for part, nouns in (("lower", people.LOWERS), ("shoes", people.SHOES), ("bag", people.BAGS),
                            ("carried", people.CARRIED), ("headgear", people.HEADGEAR)):
            truth = {(getattr(person, f"{part}_colour"), getattr(person, part))} if part in boxes else set()
            pairs = said(caption, nouns, COLOUR_OF)
            assert pairs <= truth, caption
            assert pairs or part != "lower", caption
        uppers = {kind for kind, names in people.UPPERS.items() for name in names
                  if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", caption)}
        assert person.upper in uppers and uppers <= {person.upper, "shirt"}, caption    # "sleeveless shirt"
        assert any(name in caption for name in people.COLOURS[person.upper_colour]), caption
        true = {"stripe": person.pattern == "striped", "check": person.pattern == "checked",
                "logo": "logo" in boxes, "open ": "inner" in boxes and person.upper in people.OPENING,
                " top": "inner" in boxes or person.upper == "tank top"}
        assert all(true[word] for word in true if word in caption), caption
        assert person.gender == "woman" or not re.search(r"\b(woman|lady|female|she|her)\b", caption), caption
        assert ("hair" not in caption and "ponytail" not in caption) or "hair" in boxes, caption
        heading = re.search("(?:facing|walking|walking to the) (left|right)", caption)
        assert not heading or heading[1] == view, caption


def test_colours_named_belong_to_the_person():
    for person, _, boxes, words in samples(800):
        worn = {person.upper_colour, person.lower_colour, person.pattern_colour}
        worn |= {person.inner_colour} if "inner" in boxes else set()
        parts = set(boxes) & {"hair", "headgear", "shoes", "bag", "carried"}
        worn |= {getattr(person, f"{part}_colour") for part in parts}
        names = "|".join(sorted((*COLOUR_OF, "blond", "ginger"), key=len, reverse=True))
        for name in re.findall(rf"\b({names})\b", words.caption):
            assert {**HAIR_COLOUR_OF, **COLOUR_OF}[name] in worn, (name, words.caption)


def test_phrases_stand_in_the_caption_with_their_boxes():
    for person, _, boxes, words in samples(500):
        assert 2 <= len(words.phrases) <= 6 and len(words.phrases) == len(words.boxes)
        assert all(phrase in words.caption for phrase in words.phrases)
        assert {boxes["upper"], boxes["lower"]} <= set(words.boxes) <= set(boxes.values())


def test_left_and_right_are_those_of_the_picture():
    person = EXAMPLE._replace(inner_colour="")
    for x, right, wrong in ((.3, "left hand", "right hand"), (.7, "right hand", "left hand")):
        boxes = dict.fromkeys(("person", "hair", "upper", "lower", "shoes"), (.5, .5, .4, .4))
        boxes["bag"] = (x, .5, .1, .1)
        captions = " ".join(describe(person, "front", boxes, random.Random(i)).caption for i in range(60))
        assert right in captions and wrong not in captions
    front, back = (render(person, Pose(yaw, 1.0), "source", 0, 1)[1]["bag"] for yaw in (0, 180))
    assert front[0] > 0.5 > back[0]     # her left is the picture's right when she faces the camera


def test_a_worked_example():
    boxes = {"person": (.50, .52, .40, .90), "hair": (.50, .14, .18, .20), "upper": (.50, .32, .34, .32),
             "inner": (.50, .31, .08, .26), "lower": (.50, .67, .28, .40), "shoes": (.50, .93, .30, .08),
             "bag": (.64, .55, .12, .12)}
    words = describe(EXAMPLE, "front", boxes, random.Random(136874))
    assert words.caption == ("a slim woman with long blond hair wears an open red jacket over a white top, black jeans "
                             "and white sneakers. she is carrying a green handbag in the right hand.")
    phrases = {"a slim woman": "person", "long blond hair": "hair", "an open red jacket over a white top": "upper",
               "black jeans": "lower", "white sneakers": "shoes", "a green handbag in the right hand": "bag"}
    assert dict(zip(words.phrases, words.boxes)) == {phrase: boxes[part] for phrase, part in phrases.items()}


def test_boxes_are_true():
    """Recolouring a part changes pixels inside its box, up to its edges, and nowhere else."""
    loose = []
    for i in range(60):
        rng, domain = random.Random(i), ("source", "cuhk")[i % 2]
        person, pose = sample_person(rng), Pose(rng.uniform(0, 360), rng.uniform(0, 6))
        image, boxes = render(person, pose, domain, i % 5, i)
        for part in {"lower", "bag", "carried", "headgear", "shoes"} & set(boxes):
            pale = getattr(person, f"{part}_colour") in ("red", "orange", "yellow", "pink", "white", "brown")
            other = person._replace(**{f"{part}_colour": "blue" if pale else "yellow"})
            again, _ = render(other, pose, domain, i % 5, i)
            change = np.abs(np.float32(image) - np.float32(again)).max(-1)
            edges, some, strong = np.array(corners(boxes[part])), extent(change > 25), extent(change > 50)
            assert ((strong - edges) * (-1, -1, 1, 1)).max() <= 4, (i, part, edges, strong)
            loose += [((edges - some) * (-1, -1, 1, 1)).max() > 3] * (domain == "source")
    assert len(loose) > 60 and np.mean(loose) < 0.05        # a sliver may be too thin to change a whole pixel


def corners(box) -> tuple[float, float, float, float]:
    cx, cy, w, h = box
    return (cx - w / 2) * 96, (cy - h / 2) * 192, (cx + w / 2) * 96, (cy + h / 2) * 192


def extent(mask: np.ndarray) -> np.ndarray:
    """Left, top, right and bottom of a mask (H, W), stray pixels left out."""
    columns, rows = (np.flatnonzero(mask.sum(axis) > 2) for axis in (0, 1))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def test_boxes_lie_in_the_image():
    for i in range(60):
        rng = random.Random(i)
        person, domain = sample_person(rng), list(DOMAINS)[i % 4]
        _, boxes = render(person, Pose(rng.uniform(0, 360), rng.uniform(0, 6)), domain, 1, i)
        assert {"person", "upper", "lower"} <= set(boxes) <= set(ALL_PARTS)
        for cx, cy, w, h in boxes.values():
            assert w > 0 and h > 0 and min(cx - w / 2, cy - h / 2) >= 0 and max(cx + w / 2, cy + h / 2) <= 1


def test_render_is_pure():
    person, pose, state = sample_person(random.Random(3)), Pose(10, 1.0), random.getstate()
    first = {domain: render(person, pose, domain, 2, 9) for domain in DOMAINS}
    for domain in reversed(DOMAINS):
        image, boxes = render(person, pose, domain, 2, 9)
        assert image.tobytes() == first[domain][0].tobytes() and boxes == first[domain][1]
        assert image.size == (96, 192) and image.mode == "RGB"
    assert len({image.tobytes() for image, _ in first.values()}) == 4 and random.getstate() == state


def test_twins_differ_in_one_attribute():
    for i in range(300):
        rng = random.Random(i)
        person = sample_person(rng)
        one, two = person._asdict(), twin_of(person, rng)._asdict()
        (name,) = [name for name in one if one[name] != two[name]]
        assert name in ("upper", "upper_colour", "lower", "lower_colour")


@pytest.mark.parametrize("set_name", FOLDERS)
def test_shots(set_name):
    made, again, others = (list(shots(set_name, DEFAULT[set_name], seed)) for seed in (1, 1, 2))
    assert made[300:330] == again[300:330] != others[300:330]
    assert len({shot.path for shot in made}) == len(made)
    train, val, test = ({shot.person for shot in made if shot.split == split}
                        for split in ("train", "val", "test"))
    assert not train & val and not (train | val) & test
    cameras = {}
    for shot in made:
        cameras.setdefault(shot.identity, []).append(shot.camera)
    assert all(len(set(used)) == len(used) for used in cameras.values())
    test = [shot for shot in made if shot.split == "test"]
    assert len({shot.identity for shot in test}) >= 200 and len(test) >= 600


def test_sets_have_their_own_people():
    train = {name: {shot.person for shot in shots(name, TINY[name], 1)} for name in FOLDERS}
    assert sum(map(len, train.values())) == len(set().union(*train.values())) == 46


@pytest.mark.parametrize("set_name", FOLDERS)
def test_manifest_and_twins(root, set_name):
    manifest = json.loads((root / FOLDERS[set_name] / "town.json").read_text())
    person_of = {shot.identity: shot.person for shot in shots(set_name, TINY[set_name], 5) if shot.split == "test"}
    twins = [identity for pair in manifest["twins"] for identity in pair]
    assert len(twins) >= 0.2 * len(person_of) and len(set(twins)) == len(twins)
    for one, two in manifest["twins"]:
        assert sum(a != b for a, b in zip(person_of[one], person_of[two])) == 1
    assert "not photographs" in manifest["note"] and manifest["seed"] == 5


def test_formats_on_disk(root):
    cuhk = json.loads((root / "CUHK-PEDES/reid_raw.json").read_text())
    assert set(cuhk[0]) == {"split", "captions", "file_path", "processed_tokens", "id"}
    assert {r["split"] for r in cuhk} == {"train", "val", "test"} and min(r["id"] for r in cuhk) == 1
    icfg = json.loads((root / "ICFG-PEDES/ICFG-PEDES.json").read_text())
    assert set(icfg[0]) == {"split", "captions", "file_path", "id"}
    assert {(r["split"], len(r["captions"])) for r in icfg} == {("train", 1), ("test", 1)}
    rstp = json.loads((root / "RSTPReid/data_captions.json").read_text())
    assert set(rstp[0]) == {"split", "captions", "img_path", "id"}
    assert all(len(r["captions"]) == 2 and re.fullmatch(r"\d{4}_c\d_\d{4}\.jpg", r["img_path"]) for r in rstp)
    sda = json.loads((root / "SDA/sda_0_5000.json").read_text())
    assert set(sda[0]) == {"image", "boxes", "logits", "phrases", "caption", "image_id"} and len(sda) == 12
    assert all(len(r["boxes"]) == len(r["logits"]) == len(r["phrases"]) for r in sda)
    test = json.loads((root / "SDA/finetune/sda_test.json").read_text())
    assert set(test[0]) == {"image", "caption", "image_id"} and len(test[0]["caption"]) == 2
    for dataset, counts in (("sda", (None, 12)), ("cuhk", (4, 18)), ("rstp", (4, 18)), ("icfg", (None, 18))):
        for split, count in zip(("val", "test"), counts):
            assert count is None or len(load(dataset, split, root, say=lambda line: None).records) == count


def test_workers_change_nothing(root, tmp_path):
    sets.build(tmp_path, "rstp", TINY["rstp"], 5, workers=2, say=lambda line: None)
    files = sorted(path.relative_to(root) for path in (root / "RSTPReid").rglob("*") if path.is_file())
    assert len(files) == 34 + 2
    assert all((tmp_path / path).read_bytes() == (root / path).read_bytes() for path in files)


def test_portraits_are_the_same_from_several_processes(monkeypatch):
    monkeypatch.setattr(portraits, "CHUNK", 2)
    those, drawn = [sample_person(random.Random(i)) for i in range(6)], []
    for many in (7, 6):
        monkeypatch.setattr(portraits, "MANY", many)
        drawn.append(portraits.portraits("cuhk", those, 3, (32, 16), workers=2))
    for one, other in zip(*drawn, strict=True):
        assert (one.pixels == other.pixels).all() and one.pixels.shape == (32, 16, 3)
        assert (one.words, one.camera) == (other.words, other.camera)


def test_a_half_written_set_is_drawn_again(tmp_path, monkeypatch):
    lines, draw = [], sets.render

    def fails(person, *rest):
        if len(list(tmp_path.glob("*/imgs/*"))) > 3:
            raise RuntimeError("power cut")
        return draw(person, *rest)

    monkeypatch.setattr(sets, "render", fails)
    with pytest.raises(RuntimeError):
        sets.build(tmp_path, "rstp", TINY["rstp"], 5, 1, lines.append)
    assert not (tmp_path / "RSTPReid").exists()
    monkeypatch.setattr(sets, "render", draw)
    sets.build(tmp_path, "rstp", TINY["rstp"], 5, 1, lines.append)
    assert len(list(tmp_path.glob("*/imgs/*"))) == 34
    monkeypatch.setattr(sets, "render", None)      # complete: nothing is drawn any more
    sets.build(tmp_path, "rstp", TINY["rstp"], 5, 1, lines.append)
    assert len(lines) == 2 and all("drawing" in line and "not photographs" in line for line in lines)


def test_real_data_are_never_touched(tmp_path):
    (tmp_path / "CUHK-PEDES").mkdir()
    (tmp_path / "CUHK-PEDES/reid_raw.json").write_text("precious")
    with pytest.raises(UserError, match="CUHK-PEDES was not drawn here"):
        sets.build(tmp_path, "cuhk", TINY["cuhk"], 5, 1, str)
    assert (tmp_path / "CUHK-PEDES/reid_raw.json").read_text() == "precious"


def test_another_set_is_not_drawn_over(tmp_path):
    sets.build(tmp_path, "rstp", TINY["rstp"], 5, 1, str)
    own = tmp_path / "RSTPReid/imgs/my own photograph.jpg"
    own.write_bytes(b"precious")
    with pytest.raises(UserError, match="with another seed"):
        sets.build(tmp_path, "rstp", TINY["rstp"], 6, 1, str)
    assert own.read_bytes() == b"precious" and len(list(own.parent.iterdir())) == 35
    shutil.rmtree(tmp_path / "RSTPReid")
    sets.build(tmp_path, "rstp", TINY["rstp"], 6, 1, str)


def test_domains():
    """The table is pinned: a calibrated gap must not drift unnoticed."""
    assert {name: (d.cameras, d.strength, d.exposure, d.gamma, d.saturation, d.red, d.blue, d.noise, d.height)
            for name, d in DOMAINS.items()} == {
        "source": (6, 1.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0),
        "cuhk": (5, 0.9, 0.5, -0.3, -0.5, 0.2, -0.5, 0.02, 0.15),
        "icfg": (6, 0.5, -0.9, 0.25, -0.3, -0.4, 0.5, 0.03, 0.55),
        "rstp": (7, 0.8, -0.2, -0.2, -0.9, -0.45, -0.5, 0.03, 0.3)}
    table = json.dumps({name: dataclasses.asdict(domain) for name, domain in DOMAINS.items()})
    assert hashlib.sha256(table.encode()).hexdigest().startswith("7b7ee7c27dc8cb90")
    for name in ("cuhk", "icfg", "rstp"):
        cameras = {drawing.camera_of(name, i) for i in range(DOMAINS[name].cameras)}
        assert len(cameras) == DOMAINS[name].cameras


def test_random_worlds_are_wide_and_far_from_every_target():
    """No strength, scene or person of a target is in the worlds that the diffusion base learns from."""
    looks = [worlds.world_of(number) for number in range(0, worlds.WORLDS, 5000)]
    assert looks[7] == worlds.world_of(35_000) and len(set(looks)) == len(looks) == 200
    assert {look.scene for look in looks} == {"plain", "random"}
    for name, (low, high) in worlds.RANGES.items():
        values = [getattr(look, name) for look in looks]
        assert low <= min(values) and max(values) <= high and max(values) - min(values) >= 0.9 * (high - low)
    widths = np.array([high - low for low, high in worlds.RANGES.values() if high > low])
    targets = [drawing.camera_of(name, i) for name in ("cuhk", "icfg", "rstp") for i in range(DOMAINS[name].cameras)]
    names = [name for name, (low, high) in worlds.RANGES.items() if high > low]
    ours, theirs = (np.array([[getattr(one, name) for name in names] for one in some]) for some in (looks, targets))
    apart = (np.abs(ours[:, None] - theirs) / widths).mean(-1)                          # (worlds, cameras)
    assert apart.min() >= 0.15 and apart.shape == (200, 18)


def test_a_folder_of_worlds_is_drawn_and_read_as_sda(tmp_path):
    status, said, _ = command(tmp_path, "tests/study/worlds.py", "worlds", "--people", "6")
    assert status == 0 and "worlds/SDA: 12 computer drawings" in said
    records = load("sda", "train", tmp_path / "worlds", say=lambda line: None).records
    assert all(record.boxes and Path(record.path).is_file() for record in records) and 6 <= len(records) <= 12
    status, _, err = command(tmp_path, "tests/study/worlds.py", "worlds", "--people", "6")
    assert status == 2 and "worlds/SDA exists" in err


def test_strength_scales_a_domain(monkeypatch):
    """At strength 0 nothing of the domain is left but its scene; brightness falls with the strength."""
    person, pose, light = sample_person(random.Random(1)), Pose(0, 1.0), []
    for strength in (0.0, 0.5, 1.0):
        monkeypatch.setitem(DOMAINS, "icfg", dataclasses.replace(DOMAINS["icfg"], strength=strength))
        drawing.camera_of.cache_clear()
        drawing.backdrop.cache_clear()
        light.append(np.asarray(render(person, pose, "icfg", 0, 1)[0]).mean())
        cam = drawing.camera_of("icfg", 0)
        assert strength or {cam.exposure, cam.noise, cam.height, cam.shadow, cam.occlusion} == {0}
    monkeypatch.undo()
    drawing.camera_of.cache_clear()
    drawing.backdrop.cache_clear()
    assert light[0] > light[1] + 10 > light[2] + 20


def test_two_runs_at_once_draw_a_set_once(tmp_path):
    lines = []
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(sets.build, tmp_path, "rstp", TINY["rstp"], 5, 1, lines.append) for _ in range(2)]:
            done.result()
    assert len(lines) == 1 and len(list((tmp_path / "RSTPReid/imgs").iterdir())) == 34


def test_drawing_processes_do_without_torch():
    """Importing it takes ten times as long as all else that they need."""
    code = "import sys; import mra.town.sets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
