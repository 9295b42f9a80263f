"""The grammar knows how probable every translation is, and what it says is Indonesian."""

import itertools
import math
import random
from hashlib import sha256

import make_pairs
import pytest

import data
import indonesian
from conftest import FOLDER
from grammar import RARE, Grammar, spell, ways_of
from indonesian import ber, corpus, di, held_out, is_sensible, is_unseen, me
from run import read_json

PARTS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def ours() -> Grammar:
    return indonesian.grammar()


@pytest.fixture(scope="module")
def pairs() -> data.Pairs:
    return data.load("grammar")


def drawn(n: int, seed: int = 0) -> list:
    dice = random.Random(seed)
    return [indonesian.grammar().draw(dice) for _ in range(n)]


# ── Small grammars, by hand ───────────────────────────────────────────────────────────────────────


def small() -> Grammar:
    """A red hat or a red cap; a cap is rarely called by another name, and red may be left out."""
    g = Grammar()
    g.add("sentence", "a <adjective> <noun> +.", "sebuah:a <noun> <adjective> +.")
    g.add("adjective", "red", "merah:red", 3)
    g.add("adjective", "old", "(tua:old|lama:old)", 1)
    g.add("noun", "hat", "topi:hat", 1)
    g.add("noun", "cap", "(pet:cap|topi:cap kecil)", 1)
    return g


def test_probabilities_of_a_small_grammar_by_hand():
    """`old cap`: p = 0.95 · 0.95 for usual words, 0.95 · 0.05 for one rare one, 0.05² for two."""
    g = small()
    assert g.translations("An old cap.") == pytest.approx(
        {
            "Sebuah pet tua.": 0.9025,
            "Sebuah pet lama.": 0.0475,
            "Sebuah topi kecil tua.": 0.0475,
            "Sebuah topi kecil lama.": 0.0025,
        }
    )
    assert g.log_prob("An old cap.", "Sebuah pet tua.") == pytest.approx(2 * math.log(0.95))
    assert g.log_prob("A red hat.", "Sebuah topi merah.") == 0
    assert g.best("An old cap.") == "Sebuah pet tua."


def test_entropy_of_a_small_grammar_by_hand():
    """A choice has H = −0.95 ln 0.95 − 0.05 ln 0.05; `old` has one (¼), `cap` another (½)."""
    choice = -(0.95 * math.log(0.95) + 0.05 * math.log(0.05))
    assert small().expected_entropy() == pytest.approx(choice * (1 / 4 + 1 / 2))
    assert small().entropy("An old cap.") == pytest.approx(2 * choice)
    assert small().entropy("A red hat.") == 0


def test_alignment_of_a_small_grammar_by_hand():
    """An(0) old(1) cap.(2) and Sebuah(0) topi(1) kecil(2) tua.(3): kecil stands for nothing."""
    expected = [(0, 0), (1, 3), (2, 1)]
    assert small().align("An old cap.", "Sebuah topi kecil tua.") == expected
    assert small().align("An old cap.", "Sebuah topi tua.") is None


def test_sentence_with_two_trees_sums_over_both():
    """x has the trees A (2/3: y or z) and B (1/3: y). p(y|x) = 2/3 · 0.95 + 1/3."""
    g = Grammar()
    g.add("sentence", "<a>", "<a>", 2)
    g.add("sentence", "<b>", "<b>", 1)
    g.add("a", "x", "(y|z)")
    g.add("b", "x", "y")
    assert len(g.trees("X")) == 2
    assert g.translations("X") == pytest.approx({"Y": 2 / 3 * 0.95 + 1 / 3, "Z": 2 / 3 * 0.05})
    assert g.tokens("x") is None  # a sentence begins with a capital letter


def test_two_ways_with_the_same_words_count_together():
    g = Grammar()
    g.add("sentence", "x", "a (b|) (|b)")
    assert g.translations("X") == pytest.approx({"A b": 0.905, "A": 0.0475, "A b b": 0.0475})


def test_choices_of_a_side():
    """Each bar doubles the ways; the first has 1 − RARE."""
    ways = {" ".join(way.split()): share for share, way in ways_of("(a|b) c (d|)")}
    usual, rare = 1 - RARE, RARE
    expected = {"a c d": usual**2, "a c": usual * rare, "b c d": usual * rare, "b c": rare**2}
    assert ways == pytest.approx(expected)


def test_glued_words():
    g = Grammar()
    g.add("sentence", "his <noun> +, yes +.", "<noun> +nya:his +, ya:yes +.")
    g.add("noun", "hat", "topi:hat")
    assert g.translations("His hat, yes.") == {"Topinya, ya.": 1}
    assert g.align("His hat, yes.", "Topinya, ya.") == [(0, 0), (1, 0), (2, 1)]


@pytest.mark.parametrize(
    "english, indonesian",
    [("a <b>", "a"), ("a", "<b>"), ("<b> <c>", "<b>"), ("<b>", "<b> <b>"), ("", "")],
)
def test_rule_whose_sides_do_not_fit_is_refused(english, indonesian):
    with pytest.raises(ValueError, match="other slots"):
        Grammar().add("sentence", english, indonesian)


def test_rule_that_aligns_with_no_word_is_refused():
    with pytest.raises(ValueError):
        Grammar().add("sentence", "hat", "topi:cap")


def every_tree(g: Grammar, symbol: str = "sentence"):
    """All trees of a grammar, with their probabilities, by brute force."""
    for rule in g.rules[symbol]:
        share = rule.weight / sum(other.weight for other in g.rules[symbol])
        options = [list(every_tree(g, slot.strip("<>'"))) for slot in rule.slots]
        for choice in itertools.product(*options):
            yield tuple(tree for tree, _ in choice), share * math.prod(p for _, p in choice)


def sub_grammar() -> Grammar:
    """A piece of our own grammar that is small enough to write out: what there is, and nouns."""
    whole, g = indonesian.grammar(), Grammar()
    wanted = ["number", "group.any.animal.counted", "counted.animal", "any.animal"]
    g.rules = {symbol: whole.rules[symbol] for symbol in wanted}
    wanted_there = [r for r in whole.rules["there"] if "<group.any.animal.counted>" in r.english]
    g.rules["there"] = wanted_there
    g.add("sentence", "<there> +.", "<there> +.")
    return g


def test_entropy_by_enumeration_equals_the_computed_one():
    """H = Σ p(x) Σ −p(y|x) ln p(y|x) over each sentence that a piece of our grammar can say."""
    g = sub_grammar()
    shares = {}
    dice_free = [share for _, share in every_tree(g)]
    assert math.fsum(dice_free) == pytest.approx(1)
    dice = random.Random(0)
    for _ in range(30_000):  # enough to meet all sentences; their probability is exact all the same
        tree = g.draw_tree(dice)
        shares.setdefault(spell(tree.english()), g.tree_probability(tree))
    assert len(shares) == len(dice_free)
    assert math.fsum(shares.values()) == pytest.approx(1)
    by_enumeration = math.fsum(share * g.entropy(source) for source, share in shares.items())
    assert by_enumeration == pytest.approx(g.expected_entropy())
    assert by_enumeration > 0


# ── Our grammar ───────────────────────────────────────────────────────────────────────────────────


def test_every_sentence_has_one_tree_and_its_translations_sum_to_one(ours):
    for pair in drawn(400):
        assert ours.trees(pair.source) == [pair.tree]
        translations = ours.translations(pair.source)
        assert math.fsum(translations.values()) == pytest.approx(1)
        assert pair.target in translations


def test_no_two_ways_of_a_tree_are_the_same_words(ours):
    """The formula of the expected entropy needs it."""
    from grammar import translations_of

    for pair in drawn(400, seed=1):
        ways = [way.target for way in translations_of(pair.tree)]
        assert len(ways) == len(set(ways))


def test_mean_surprise_of_samples_approaches_the_entropy(ours):
    """Within four standard errors, drawn without any filter."""
    nats = [-ours.log_prob(pair.source, pair.target) for pair in drawn(3_000, seed=2)]
    mean = math.fsum(nats) / len(nats)
    variance = math.fsum((x - mean) ** 2 for x in nats) / (len(nats) - 1)
    assert abs(mean - ours.expected_entropy()) < 4 * math.sqrt(variance / len(nats))


def test_mean_entropy_of_sentences_approaches_the_expected_one(ours):
    found = [ours.entropy(pair.source) for pair in drawn(1_500, seed=3)]
    mean = math.fsum(found) / len(found)
    variance = math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1)
    assert abs(mean - ours.expected_entropy()) < 4 * math.sqrt(variance / len(found))


def test_rare_ways_are_as_rare_as_promised(ours):
    """`is buying`: tengah for sedang in 5 % of 20,000 draws, ± 4 √(0.05 · 0.95 / 20,000)."""
    tree = ours.trees("Budi is buying a hat at the market.")[0]
    dice = random.Random(4)
    n = sum(" tengah " in ours.draw_pair(dice, tree).target for _ in range(20_000))
    assert abs(n / 20_000 - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 20_000)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x, y + " "),
        lambda x, y: (x.lower(), y),
        lambda x, y: (x.rstrip("."), y),
        lambda x, y: (x, y.replace("sebuah", "seekor")),
        lambda x, y: (x.replace("an old", "a old"), y),
        lambda x, y: (x + x, y),
        lambda x, y: (x, ""),
        lambda x, y: ("", y),
        lambda x, y: ("", ""),
        lambda x, y: (x.replace("hat", "banana split"), y),
        lambda x, y: (y, x),
        lambda x, y: ("\ud800 \x00 漢字 <noun> +.", y),
        lambda x, y: ("the " * 1000, y),
    ],
)
def test_what_the_grammar_cannot_say_is_impossible(ours, change):
    x, y = "Budi has bought an old hat.", "Budi sudah membeli sebuah topi lama."
    assert ours.log_prob(x, y) == pytest.approx(math.log(0.95))
    assert ours.log_prob(*change(x, y)) == -math.inf


def test_best_of_what_cannot_be_said_is_refused(ours):
    with pytest.raises(ValueError, match="cannot say"):
        ours.best("Colorless green ideas sleep furiously.")
    with pytest.raises(ValueError, match="cannot say"):
        is_unseen("Colorless green ideas sleep furiously.")


def test_any_text_gets_a_probability_without_complaint(ours):
    hypothesis = pytest.importorskip("hypothesis")
    words = hypothesis.strategies.sampled_from(
        [*sorted(ours.words), "an", "The", "I", ".", "?", ""]
    )
    sentences = hypothesis.strategies.lists(words, max_size=8).map(" ".join)

    @hypothesis.given(sentences | hypothesis.strategies.text(), hypothesis.strategies.text())
    def check(source, target):
        assert ours.log_prob(source, target) <= 0
        assert (ours.align(source, target) is None) == (ours.log_prob(source, target) == -math.inf)

    check()


# ── Indonesian ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "root, active",
    [
        *[("beli", "membeli"), ("baca", "membaca"), ("buka", "membuka"), ("bantu", "membantu")],
        *[("potong", "memotong"), ("pakai", "memakai"), ("pukul", "memukul")],
        *[("cuci", "mencuci"), ("jual", "menjual"), ("dengar", "mendengar"), ("cari", "mencari")],
        *[("tangkap", "menangkap"), ("tulis", "menulis"), ("tanam", "menanam")],
        *[("angkat", "mengangkat"), ("ambil", "mengambil"), ("undang", "mengundang")],
        *[("gambar", "menggambar"), ("hitung", "menghitung")],
        *[
            ("kirim", "mengirim"),
            ("kejar", "mengejar"),
            ("sapu", "menyapu"),
            ("simpan", "menyimpan"),
        ],
        *[("cat", "mengecat"), ("lap", "mengelap"), ("pel", "mengepel"), ("bom", "mengebom")],
        *[("rawat", "merawat"), ("lihat", "melihat"), ("masak", "memasak"), ("nyanyi", "menyanyi")],
        *[("wakili", "mewakili"), ("fitnah", "memfitnah"), ("makan", "makan")],
    ],
)
def test_prefix_of_the_active(root, active):
    """Each form as the dictionary (KBBI) has it."""
    assert me(root) == active
    assert di(root) == "di" + root


@pytest.mark.parametrize(
    "root, verb",
    [
        *[("main", "bermain"), ("jalan", "berjalan"), ("istirahat", "beristirahat")],
        *[
            ("kerja", "bekerja"),
            ("renang", "berenang"),
            ("ajar", "belajar"),
            ("ternak", "beternak"),
        ],
        *[("peran", "berperan"), ("kebun", "berkebun"), ("nyanyi", "bernyanyi")],
    ],
)
def test_prefix_of_what_somebody_does(root, verb):
    assert ber(root) == verb


@pytest.mark.parametrize(
    "english, translation",
    [
        ("The teacher bought a new book yesterday.", "Guru itu membeli sebuah buku baru kemarin."),
        ("The teacher is buying a book.", "Guru itu sedang membeli sebuah buku."),
        ("The teacher has bought a book.", "Guru itu sudah membeli sebuah buku."),
        ("The teacher has not bought a book.", "Guru itu belum membeli sebuah buku."),
        ("The teacher will buy a book tomorrow.", "Guru itu akan membeli sebuah buku besok."),
        ("She does not buy books every day.", None),
        ("She did not buy the books last week.", "Dia tidak membeli buku-buku itu minggu lalu."),
        ("The book was bought by a child yesterday.",
         "Buku itu dibeli oleh seorang anak kemarin."),
        ("My hats have been washed by his mother.", "Topi-topi saya sudah dicuci oleh ibunya."),
        ("He is not a doctor.", "Dia bukan seorang dokter."),
        ("Siti is a young doctor.", "Siti adalah seorang dokter muda."),
        ("These are not our pencils.", "Ini bukan pensil-pensil kami."),
        ("The red hat is not cheap.", "Topi merah itu tidak murah."),
        ("The red hat is very expensive, but the blue hat is cheap.",
         "Topi merah itu sangat mahal, tetapi topi biru itu murah."),
        ("There are three black cats in the kitchen.", "Ada tiga ekor kucing hitam di dapur."),
        ("There is an egg in the garden.", "Ada sebutir telur di kebun."),
        ("Two teachers read five letters yesterday.",
         "Dua orang guru membaca lima pucuk surat kemarin."),
        ("I wash four old shirts every morning.",
         "Saya mencuci empat helai kemeja lama setiap pagi."),
        ("The old doctor painted an old table yesterday.",
         "Dokter tua itu mengecat sebuah meja lama kemarin."),
        ("The good teacher always uses a good pencil.",
         "Guru baik itu selalu memakai sebatang pensil bagus."),
        ("His new bicycle has been sold by Budi.", "Sepedanya yang baru sudah dijual oleh Budi."),
        ("Budi's white dog chases her black cats every day.",
         "Anjing putih Budi mengejar kucing-kucingnya yang hitam setiap hari."),
        ("They are swimming in the river.", "Mereka sedang berenang di sungai."),
        ("We must study with Rina in the library.",
         "Kami harus belajar dengan Rina di perpustakaan."),
        ("You want to play with Joko in the garden.",
         "Kamu ingin bermain dengan Joko di kebun."),
        ("The monkeys cannot catch the bird.",
         "Monyet-monyet itu tidak bisa menangkap burung itu."),
        ("Did the children eat the cake yesterday?",
         "Apakah anak-anak itu makan kue itu kemarin?"),
        ("Is your father sweeping the house?", "Apakah ayah kamu sedang menyapu rumah itu?"),
        ("Why did they open this door?", "Mengapa mereka membuka pintu ini?"),
        ("When will she send the letters?", "Kapan dia akan mengirim surat-surat itu?"),
        ("Who helped the old farmer last week?",
         "Siapa yang membantu petani tua itu minggu lalu?"),
        ("Where are my new bicycles now?", "Di mana sepeda-sepeda baru saya sekarang?"),
        ("The child ate a mango because she was hungry.",
         "Anak itu makan sebuah mangga karena dia lapar."),
        ("The big bananas were not cut by him yesterday.", None),
    ],
)  # fmt: skip
def test_translations_written_by_hand(ours, english, translation):
    """The likeliest translation, as a speaker writes it; None: the grammar does not say this."""
    if translation is None:
        assert ours.translations(english) == {}
    else:
        assert ours.best(english) == translation


@pytest.mark.parametrize(
    "english, rare",
    [
        ("He is buying a hat.", "Ia sedang membeli sebuah topi."),
        ("He is buying a hat.", "Dia tengah membeli sebuah topi."),
        ("The teachers have read our letter.", "Para guru itu sudah membaca surat kami."),
        ("The teachers have read our letter.", "Guru-guru itu telah membaca surat kita."),
        ("The box is very heavy.", "Kotak itu berat sekali."),
        ("The box was opened by Dewi yesterday.", "Kotak itu dibuka Dewi kemarin."),
        ("Siti is a clever student.", "Siti adalah seorang murid pintar."),
        ("Siti is a clever student.", "Siti seorang murid pandai."),
    ],
)
def test_rare_translations_are_said_as_well(ours, english, rare):
    assert -math.inf < ours.log_prob(english, rare) < math.log(0.1)


# ── The corpus ────────────────────────────────────────────────────────────────────────────────────


def test_script_writes_the_committed_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pairs, "HERE", tmp_path)
    monkeypatch.setattr(make_pairs, "facts", len)  # the facts have tests of their own
    make_pairs.main()
    for part in PARTS:
        committed = (FOLDER / "data" / f"{part}.tsv").read_bytes()
        assert (tmp_path / f"{part}.tsv").read_bytes() == committed


@pytest.mark.parametrize("part", ["valid", "test"])
def test_facts_are_those_of_the_parts(ours, pairs, part):
    """Recomputed from the files."""
    found = make_pairs.facts([Row(*pair) for pair in pairs.part(part)])
    known = read_json(FOLDER / "data" / "floor.json")[part]
    assert found == pytest.approx(known, rel=1e-12)
    assert pairs.floor(part) == known["floor"] > 0
    nats = [-ours.log_prob(*pair) for pair in pairs.part(part)]
    assert math.fsum(nats) / len(nats) == pytest.approx(known["floor"], rel=1e-12)


class Row:
    def __init__(self, source, target):
        self.source, self.target = source, target


def test_facts_of_the_training_part_fit_a_piece_of_it(ours, pairs):
    """The mean of every tenth pair lies within four standard errors of the whole."""
    nats = [-ours.log_prob(*pair) for pair in pairs.train[::10]]
    mean = math.fsum(nats) / len(nats)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in nats) / len(nats))
    assert abs(mean - pairs.floor("train")) < 4 * deviation / math.sqrt(len(nats))
    assert read_json(FOLDER / "data" / "floor.json")["train"]["pairs"] == len(pairs.train)


@pytest.mark.parametrize("part", PARTS)
def test_floor_is_near_the_entropy_and_the_ceiling_is_high(part):
    """A floor far from the entropy would mean that the filter chose by translation."""
    known = read_json(FOLDER / "data" / "floor.json")[part]
    assert known["ceiling_bleu"] >= 97
    spread = 0.63  # of −log p of a pair, about
    assert abs(known["floor"] - known["entropy"]) < 4 * spread / math.sqrt(known["pairs"])


def test_no_sentence_stands_in_two_parts(pairs):
    for side in (0, 1):
        sides = [{pair[side] for pair in pairs.part(part)} for part in PARTS]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    for part in PARTS:
        sources = [source for source, _ in pairs.part(part)]
        assert len(set(sources)) == len(sources)


def test_combinations_held_out_are_in_the_test_part_alone(ours, pairs):
    assert sum(pairs.unseen("test")) == len(pairs.test) / 2
    assert not any(pairs.unseen("valid"))
    seen = set()
    for source, _ in pairs.train:
        for tree in ours.trees(source):
            seen |= tree.combinations()
    assert not any(map(held_out, seen))
    for (source, _), unseen in zip(pairs.test, pairs.unseen("test"), strict=True):
        new = ours.trees(source)[0].combinations() - seen
        assert bool(new & {c for c in new if held_out(c)}) == unseen


def test_words_of_a_held_out_combination_are_each_trained_on(pairs):
    """On both sides: what is new in the test part is what stands beside what."""
    for side in (0, 1):
        words = [
            {word.strip(",.?").lower() for pair in pairs.part(part) for word in pair[side].split()}
            for part in ("train", "test")
        ]
        assert words[1] <= words[0]


def test_combinations_are_those_of_the_words():
    tree = indonesian.grammar().trees("The old doctor painted a blue table yesterday.")[0]
    assert tree.combinations() == {("old", "doctor"), ("blue", "table"), ("paint", "table")}
    passive = indonesian.grammar().trees("The blue tables were painted by him yesterday.")
    assert passive == []
    passive = indonesian.grammar().trees("Her blue tables were painted by Siti yesterday.")[0]
    assert passive.combinations() == {("blue", "table"), ("paint", "table")}


def test_sizes_are_as_promised(ours, pairs):
    assert [len(pairs.part(part)) for part in PARTS] == [10_000, 400, 400]
    words = [w for w in ours.words if not w.startswith("+")]
    assert 150 <= len(words) <= 260
    assert all(is_sensible(source) for part in PARTS for source, _ in pairs.part(part))
    lengths = {len(source.split()) for source, _ in pairs.train}
    assert min(lengths) == 6 and max(lengths) == 14
    files = [file for file in (FOLDER / "data").iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_every_word_of_the_grammar_is_in_the_training_part(ours, pairs):
    trained = set()
    for source, _ in pairs.train:
        trained |= set(ours.tokens(source))
    assert ours.words <= trained


def test_readme_of_the_data_has_sizes_and_checksums():
    text = (FOLDER / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("train.tsv", "valid.tsv", "test.tsv", "floor.json"):
        content = (FOLDER / "data" / name).read_bytes()
        assert f"{len(content):,} bytes" in text and sha256(content).hexdigest() in text


def test_corpus_is_a_function_of_its_seed():
    sizes = {"train": 30, "valid": 5, "test": 6}
    first, again, other = (corpus(sizes, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(first[part]) for part in sizes] == list(sizes.values())


# ── Alignments ────────────────────────────────────────────────────────────────────────────────────

CONTENT = {
    *(form for one, many, *_ in indonesian.NOUNS for form in (one, many)),
    *(form for *forms, _, _, _ in indonesian.TRANSITIVE for form in forms),
    *(form for *forms, _ in indonesian.INTRANSITIVE for form in forms),
    *(
        w
        for table in (indonesian.LOOKS, indonesian.STATES)
        for words in table.values()
        for w in words
    ),
    *indonesian.FEELINGS,
    *indonesian.NUMBERS,
    *(name.lower() for name in indonesian.NAMES),
    *("not never always yesterday tomorrow day morning week must will very because but".split()),
}


@pytest.mark.parametrize("part", ["valid", "test"])
def test_alignments_are_in_range_and_reach_every_content_word(pairs, part):
    links = pairs.alignments(part)
    assert len(links) == len(pairs.part(part))
    for (source, target), found in zip(pairs.part(part), links, strict=True):
        english, words = source.split(), target.split()
        assert len(set(found)) == len(found) > 0
        assert all(0 <= i < len(english) and 0 <= j < len(words) for i, j in found)
        left, right = {i for i, _ in found}, {j for _, j in found}
        for i, word in enumerate(english):
            assert i in left or word.strip(",.?").lower() not in CONTENT, (source, word)
        assert {w.lower() for j, w in enumerate(words) if j not in right} <= {"yang"}, target


def test_alignment_of_a_drawn_pair_is_that_of_the_text(ours):
    for pair in drawn(200, seed=5):
        assert ours.align(pair.source, pair.target) == list(pair.alignment)


@pytest.mark.parametrize(
    "source, target, links",
    [
        (
            "Budi's red hat was not sold by my mother last week.",
            "Topi merah Budi tidak dijual oleh ibu saya minggu lalu.",
            "Topi-hat merah-red Budi-Budi's tidak-not dijual-was dijual-sold oleh-by ibu-mother "
            "saya-my minggu-week. lalu.-last",
        ),
        (
            "She has not read his new letters.",
            "Dia belum membaca surat-suratnya yang baru.",
            "Dia-She belum-has belum-not membaca-read surat-suratnya-letters. surat-suratnya-his "
            "baru.-new",
        ),
        (
            "There are two black cats in the garden.",
            "Ada dua ekor kucing hitam di kebun.",
            "Ada-There Ada-are dua-two ekor-cats kucing-cats hitam-black di-in kebun.-garden.",
        ),
    ],
)
def test_alignments_by_hand(ours, source, target, links):
    english, words = source.split(), target.split()
    expected = set()
    for link in links.split():
        word, _, origin = link.rpartition("-")
        expected.add((english.index(origin), words.index(word)))
    assert set(ours.align(source, target)) == expected
