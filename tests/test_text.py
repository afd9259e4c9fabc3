"""Words: WordPiece ids, whole-word masking, EDA, left and right."""

import random
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from conftest import spelt
from processes import FORKSERVER
from vocabulary import learn_pieces

from mra.config import UserError
from mra.data import words
from mra.data.tokenizer import SPECIAL, Tokenizer, mask_words, pad

CAPTION = "A young man, wearing a Navy blue T-shirt and dark grey pants; he carries a backpack on his left."
TINY = [*SPECIAL, "[unused0]", "red", "sh", "##irt", "##irts", "##i", ",", "-", "t", "cafe", "人",
        "a", "##a", "##aa"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.read()


@pytest.fixture
def tiny(tmp_path):
    return Tokenizer.read(write(tmp_path, "\n".join(TINY) + "\n"))


def write(folder, text, encoding="utf-8"):
    path = folder / "vocab.txt"
    path.write_bytes(text.encode(encoding))
    return path


# --- ids ---

@pytest.mark.parametrize("text, ids", [
    ("red shirt", [6, 7, 8]),
    ("RED SHIRTS,", [6, 7, 9, 11]),                   # longest first: ##irts, not ##irt + s
    ("T-shirt", [13, 12, 7, 8]),
    ("shi shix", [7, 10, 1]),                         # one unknown rest makes the whole word unknown
    ("Café", [14]),                                   # accents go
    ("red人人red", [6, 15, 15, 6]),                    # each CJK character is a word
    ("aaaa", [16, 18, 17]),                           # greedy: a + ##aa + ##a
    ("a" * 100, [16] + [18] * 49 + [17]),
    ("a" * 101, [1]),                                 # over 100 characters
    ("[SEP] [MASK]", [1] * 6), ("", []), ("r\ud800e\x00d\t\ufffdred", [6, 6]),
])
def test_ids_worked_out_by_hand(tiny, text, ids):
    assert tiny.encode(text, 200) == [2, *ids, 3]
    assert [tiny.pad_id, tiny.unk_id, tiny.cls_id, tiny.sep_id, tiny.mask_id] == [0, 1, 2, 3, 4]
    assert len(tiny) == 19


def naive_wordpiece(text, pieces):
    """BERT's basic tokenizer and greedy longest match, character by character."""
    spaced = ""
    for char in unicodedata.normalize("NFD", text.lower()):
        kind = unicodedata.category(char)
        if char in " \t\n\r" or kind == "Zs":
            spaced += " "
        elif kind[0] == "P" or char in "$+<=>^`|~" or 0x4E00 <= ord(char) <= 0x9FFF:
            spaced += f" {char} "
        elif kind != "Mn" and kind[0] != "C" and char != "\ufffd":
            spaced += char
    ids = []
    for word in spaced.split():
        found, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            ends = [end for end in range(len(word), start, -1) if mark + word[start:end] in pieces]
            if not ends:
                break
            found.append(pieces[mark + word[start:ends[0]]])
            start = ends[0]
        ids += found if start == len(word) <= 100 else [pieces["[UNK]"]]
    return ids


def test_ids_equal_a_naive_wordpiece(tokenizer):
    pieces, rng = {piece: i for i, piece in enumerate(tokenizer.pieces)}, random.Random(0)
    odd = "aàÉçñüİß人衣 \t\n\u00a0!$~’—€¡\x00\x07\u200b"
    atoms = [*tokenizer.pieces, *odd, *CAPTION.split(), "x" * 99, " ", " "]
    for _ in range(1500):
        text = "".join(rng.choice(atoms) for _ in range(rng.randint(0, 12)))
        assert tokenizer.encode(text, 10_000)[1:-1] == naive_wordpiece(text, pieces), repr(text)


def test_shipped_vocabulary_spells_every_ascii_word_and_knows_the_lexicon(tokenizer):
    assert tuple(tokenizer.pieces[:5]) == SPECIAL and len(tokenizer) <= 1500
    everything = "".join(map(chr, range(33, 127)))
    assert tokenizer.unk_id not in tokenizer.encode(f"{everything} zq9xj {everything[::-1]}", 1000)
    parts = {part for term in words.SYNONYMS for part in term.replace("-", " ").split()}
    assert all(len(tokenizer.encode(part)) == 3 for part in parts)


def test_learning_is_repeatable_and_obeys_the_size():
    pieces = learn_pieces(50, 400)
    assert pieces == learn_pieces(50, 400) and len(set(pieces)) == len(pieces) <= 400


def test_cut_at_max_tokens_with_sep_last(tokenizer):
    for limit in (2, 3, 20, 56):
        ids = tokenizer.encode("red " * 80, limit)
        assert len(ids) == limit and ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
    assert len(tokenizer.encode("red " * 80)) == 56


def test_words_join_pieces(tokenizer, tiny):
    assert spelt(tiny, [2, 6, 7, 9, 4, 1, 3, 0]) == ["red", "shirts", "[MASK]", "[UNK]"]
    assert spelt(tokenizer, tokenizer.encode("Zebrafish, red")) == ["zebrafish", ",", "red"]


def test_a_loading_process_gets_the_same_ids(tokenizer):
    with ProcessPoolExecutor(1, FORKSERVER) as pool:      # the tokenizer travels to it
        assert pool.submit(tokenizer.encode, CAPTION).result() == tokenizer.encode(CAPTION)


def test_pad():
    ids, keep = pad([[2, 7, 3], [2, 3], [2, 0, 8, 3]], 0)
    assert ids.tolist() == [[2, 7, 3, 0], [2, 3, 0, 0], [2, 0, 8, 3]] and ids.dtype == torch.int64
    assert keep.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]] and keep.dtype == torch.bool


@pytest.mark.parametrize("text, encoding, said", [
    ("\n".join(TINY[:4]), "utf-8", r"vocab\.txt: lacks \[MASK\]"),
    ("\n".join([*TINY, "é"]), "utf-16", r"vocab\.txt: no readable UTF-8"),
])
def test_bad_vocabulary(tmp_path, text, encoding, said):
    with pytest.raises(UserError, match=said):
        Tokenizer.read(write(tmp_path, text, encoding))


def test_missing_vocabulary(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match="no readable"):
            Tokenizer.read(path)


def test_windows_vocabulary_reads_alike(tmp_path, tiny):
    assert Tokenizer.read(write(tmp_path, "\ufeff" + "\r\n".join(TINY))).pieces == tiny.pieces


# --- masking ---

def random_ids(tokenizer, rng, count):
    """`count` words of 1 to 4 pieces, [UNK] among them, padded."""
    starts = [i for i in tokenizer.ordinary_ids if tokenizer.starts_word[i]]
    rests = [i for i in tokenizer.ordinary_ids if not tokenizer.starts_word[i]]
    chosen = [[rng.choice(starts), *rng.choices(rests, k=rng.choice((0, 0, 0, 1, 3)))] for _ in range(count)]
    return [tokenizer.cls_id, *sum(chosen, []), tokenizer.unk_id, tokenizer.sep_id, *[tokenizer.pad_id] * 2]


def test_masking_takes_whole_words_never_specials_and_never_too_many(tokenizer):
    rng = random.Random(1)
    for _ in range(3000):
        ids = random_ids(tokenizer, rng, rng.randint(1, 30))
        masked, at = mask_words(ids, tokenizer, rng)
        assert 1 <= len(at) <= 10 and len(masked) == len(ids) and at == sorted(set(at))
        assert all(ids[i] > 4 for i in at)
        assert all(masked[i] == ids[i] for i in range(len(ids)) if i not in at)
        assert not {masked[i] for i in at} & {0, 1, 2, 3}
        for i in range(2, len(ids)):
            if not tokenizer.starts_word[ids[i]]:
                assert (i in at) == (i - 1 in at)


def test_masking_rates(tokenizer):
    rng, fates, picked, total = random.Random(2), Counter(), 0, 0
    for _ in range(6000):
        ids = random_ids(tokenizer, rng, 18)[:-4]
        masked, at = mask_words(ids, tokenizer, rng)
        total += min(len(ids) - 1, 40)
        picked += len(at)
        for i in at:
            fates["mask" if masked[i] == tokenizer.mask_id else "same" if masked[i] == ids[i] else "random"] += 1
    assert picked / total == pytest.approx(0.25, abs=0.02)
    for fate, share in (("mask", 0.8), ("random", 0.1), ("same", 0.1)):
        assert fates[fate] / picked == pytest.approx(share, abs=0.01)


def test_every_word_is_picked_equally_often(tokenizer):
    rng, counts = random.Random(3), Counter()
    ids = [2, *range(150, 170), 3]
    ids = [i for i in ids if tokenizer.starts_word[i]]
    for _ in range(8000):
        counts.update(mask_words(ids, tokenizer, rng)[1])
    inner = [counts[i] for i in range(3, len(ids) - 1)]
    assert max(inner) < 1.15 * min(inner)


def test_a_fifth_of_the_picks_grow_to_two_or_three_words(tokenizer):
    word = tokenizer.encode("red")[1]
    ids, rng, runs = [2, *[word] * 300, 3], random.Random(4), Counter()
    for _ in range(2500):                              # so many words that two picks seldom touch
        at = set(mask_words(ids, tokenizer, rng)[1])
        picked = "".join("x" if i in at else " " for i in range(len(ids)))
        runs.update(map(len, picked.split()))
    share = {length: runs[length] / sum(runs.values()) for length in (1, 2, 3)}
    assert share[1] == pytest.approx(0.8, abs=0.04) and share[2] == pytest.approx(0.1, abs=0.035)
    assert share[3] == pytest.approx(0.1, abs=0.035)


def test_masking_edges(tokenizer):
    rng, (start, rest) = random.Random(5), tokenizer.encode("aq")[1:-1]
    assert mask_words([2, 3], tokenizer, rng) == ([2, 3], [])
    assert mask_words([2, start, *[rest] * 9, 3], tokenizer, rng)[1] == list(range(1, 11))
    assert mask_words([2, start, *[rest] * 10, 3], tokenizer, rng)[1] == []
    assert mask_words(tokenizer.encode(CAPTION), tokenizer, random.Random(6)) == mask_words(
        tokenizer.encode(CAPTION), tokenizer, random.Random(6))


# --- cleaning, left and right ---

def test_clean(tokenizer):
    text = "A man's RED T-shirt,  №5 人 <br>.\n"
    assert tokenizer.clean(text, "icfg") == tokenizer.clean(text, "rstp") == "a man s red t shirt 5 br"
    assert tokenizer.clean(text, "cuhk") == tokenizer.clean(text, "sda") == text


def test_swap_left_right():
    text = "Left-hand bag, RIGHT shoe; copyright, lefty, the leftmost, right-handed, LEFTHAND, éleft. On her left"
    swapped = "Right-hand bag, LEFT shoe; copyright, lefty, the rightmost, left-handed, RIGHTHAND, éleft. On her right"
    assert words.swap_left_right(text) == swapped and words.swap_left_right(swapped) == text


# --- EDA ---

def test_lexicon_has_each_term_once_and_no_stop_words():
    terms = [term for group in words.GROUPS for term in group]
    assert len(terms) == len(set(terms)) and sum(len(group) > 1 for group in words.GROUPS) >= 60
    assert set(words.SYNONYMS) < set(terms) and all(words.SYNONYMS.values())
    assert all(term == term.lower().strip() and term for term in terms)
    stop = "a an the and or of in on with his her he she it is are to at by for from up down over who has"
    assert not set(stop.split()) & set(terms)


def test_colours_keep_their_meaning():
    base = {"navy": "blue", "charcoal": "gray", "grey": "gray", "maroon": "red", "burgundy": "red",
            "wine": "red", "lavender": "purple", "lilac": "purple", "violet": "purple", "fuchsia": "pink",
            "ivory": "cream", "off-white": "cream", "off": "cream", "golden": "gold"}
    plain = {"blue", "gray", "red", "purple", "pink", "cream", "gold", "green", "yellow", "brown", "beige"}
    for group in words.GROUPS:
        named = {base.get(word, word) for term in group for word in term.split()}
        assert len(named & plain) <= 1, group
    assert "dark blue" in words.SYNONYMS["navy"] and not {"red", "orange"} & set(words.SYNONYMS)


def test_synonym_replacement_changes_only_terms_up_to_the_given_number():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        seen.add(words.replace_synonyms("A Navy  blue shirt, T-SHIRT!", rng, 1.0))
    assert seen == {f"A {colour} shirt, {shirt}!" for colour in ("navy", "dark blue", "deep blue")
                    for shirt in ("tee", "tee shirt")}
    text = "red man red purse red outfit red logo red wallet"
    for alpha, count in ((0.01, 1), (0.2, 2), (0.49, 4), (1.0, 5)):
        pairs = zip(words.replace_synonyms(text, rng, alpha).split("red "), text.split("red "))
        assert sum(new != old for new, old in pairs) == count
    assert words.replace_synonyms("nothing known here", rng, 1.0) == "nothing known here"


@pytest.mark.parametrize("text", [
    "An old bag with a little strap, a top, a scarf with fringe, a neck tie and a wrist watch.",
    "He checked his phone, dressed up in a black dress, a track suit and a cap, looking good.",
    "A small black dog and a thin white vest with printed letters, bangs and a ponytail-like tie.",
    "Wearing glasses, a man's coat, the lady's hat, men’s shoes; walking with a walking stick and an ice cream",
    "the women s shoes and a man s heels, a zip up top, a life jacket, hair pulled tight and curled, old jeans"])
def test_words_with_a_second_sense_and_genitives_are_not_replaced(text):
    for seed in range(5):
        assert words.replace_synonyms(text, random.Random(seed), 1.0) == text


@pytest.mark.parametrize("text, replaced", [
    ("A person in an outfit, AN OUTFIT.", "An individual in an ensemble, An ensemble."),
    ("an individual with a image and a  logo", "a person with a picture and an  emblem"),
    ("A teen. THE TEEN, A TEEN", "An adolescent. THE adolescent, An adolescent"),
    ("the banana person, a tall person, a-person", "the banana individual, a tall individual, a-person"),
    ("a uniform, an hour, an used outfit", "a uniform, an hour, an used ensemble")])
def test_an_article_agrees_with_the_synonym_behind_it(text, replaced):
    assert words.replace_synonyms(text, random.Random(0), 1.0) == replaced


def test_articles_agree_with_sounds():
    asked = "hour heir honest umbrella emblem uniform used unisex one-piece European hat yellow"
    assert [word for word in asked.split() if words.VOWEL.match(word)] == "hour heir honest umbrella emblem".split()


def test_insertion_adds_synonyms_and_keeps_the_words_in_order():
    rng, text = random.Random(1), "the navy thing on the big thing over there now"
    synonyms = {"large", "dark", "blue", "deep", "navy"}
    for _ in range(200):
        got = words.insert_synonyms(text, rng, 0.3)
        left = got.split()
        for word in reversed(text.split()):            # take the original words away from the right
            at = len(left) - 1 - left[::-1].index(word)
            added, left = left[at + 1:], left[:at]
            assert set(added) <= synonyms
        assert len(got.split()) >= len(text.split()) + 3 and set(left) <= synonyms
    assert words.insert_synonyms("nothing known here", rng, 1.0) == "nothing known here"


def test_swap_and_deletion():
    rng, text = random.Random(2), " ".join(map(str, range(20)))
    kept = 0
    for _ in range(500):
        swapped = words.swap_words(text, rng, 0.1).split()      # two exchanges move at most four words
        assert sorted(swapped) == sorted(text.split())
        assert sum(a != b for a, b in zip(swapped, text.split())) in (0, 3, 4)
        assert 2 == sum(a != b for a, b in zip(words.swap_words(text, rng, 0.0).split(), text.split()))
        deleted = words.delete_words(text, rng, 0.3).split()
        assert [int(word) for word in deleted] == sorted(map(int, deleted))
        kept += len(deleted)
    assert kept / 500 == pytest.approx(14, abs=0.4)
    assert {words.delete_words("a b", rng, 1.0) for _ in range(50)} == {"a", "b"}


def test_eda_draws_all_four_operations_and_repeats_with_its_seed(monkeypatch):
    names = [operation.__name__ for operation in words.OPERATIONS]
    assert words.eda(CAPTION, random.Random(3)) == words.eda(CAPTION, random.Random(3))
    fakes = [lambda text, rng, alpha, name=name: f"{name} {alpha}" for name in names]
    monkeypatch.setattr(words, "OPERATIONS", fakes)
    drawn = Counter(words.eda(CAPTION, random.Random(i), 0.2) for i in range(400))
    assert set(drawn) == {f"{name} 0.2" for name in names} and min(drawn.values()) > 60


@pytest.mark.parametrize("text", ["red", "man", "ſhirt T-ſhirt", "navy\ud800 \x00", "人 !", "a  b", CAPTION])
def test_eda_is_never_empty(text):
    for seed in range(60):
        assert words.eda(text, random.Random(seed), 0.9).strip(" ")
        assert words.eda(text, random.Random(seed)).strip(" ")
    assert words.eda(" ", random.Random(0)) == " "


def test_two_colours_of_one_garment_stay_together():
    caption = "a man in a purple and dark blue checked top, black jeans and white sneakers and a red and grey bag"
    assert words.noun_phrases(caption) == ["a man", "a purple and dark blue checked top", "black jeans",
                                           "white sneakers", "a red and grey bag"]
    for group in words.GROUPS:                  # whatever replaces a word of a phrase leaves it one
        lost = [term for term in group if not words.noun_phrases(f"a large {term}")]
        assert not lost or group[0] in lost, lost
    relative = "A man whose jacket was red, which has a hood, carries a black bag while he walks"
    assert words.noun_phrases(relative) == ["A man", "a hood", "a black bag"]
    real = "The man has short brown hair. He wears a blue shirt, a hat and white shoes, walking towards the Bus stop."
    assert words.noun_phrases(real) == ["man", "short brown hair", "a blue shirt", "a hat", "white shoes"]
    assert words.noun_phrases("her shoes are black and white, a black & white top") == ["black and white",
                                                                                       "a black & white top"]
