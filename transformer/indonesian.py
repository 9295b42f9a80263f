"""Our English-Indonesian grammar: words, affixes, and the rules that make sentences of them.

What an English speaker meets in Indonesian, and where it is in this file:

    verbs       me- marks the active and changes with the sound after it (membeli, menyapu), di-
                the passive (dibeli), ber- what somebody does without an object (bermain)
    time        verbs have no tense; sedang, sudah, belum and akan say that something is going on,
                is done, is not done yet or will be
    nouns       adjectives and owners come after the noun (topi merah saya), `the` and `this` last
    number      a noun said twice is a plural (kucing-kucing); after a number it stands once, with a
                word that classifies it (tiga ekor kucing, "three tails cat")
    negation    tidak for verbs and adjectives, bukan for nouns
    questions   apakah in front, nothing else changes

The rare ways after a bar, as in (sedang|tengah), are what the entropy of the translation comes
from. Which adjective fits which noun follows from the noun's sort, so that nobody paints a mango;
`old` is tua for what lives and lama for things, and `good` is baik or bagus.
"""

import random
import zlib
from functools import lru_cache

from grammar import Grammar, Pair, spell, translations_of

LENGTHS = range(6, 15)  # English words of a sentence that is taken into the corpus
HELD_OUT = 10  # one of so many combinations of words is kept from the training part

# English one, many; Indonesian; classifier; sort, which says what adjectives fit; groups, which say
# what verbs do. No plural: only one of them is spoken of.
NOUNS = [
    ("teacher", "teachers", "guru", "orang", "person", "person"),
    ("doctor", "doctors", "dokter", "orang", "person", "person"),
    ("farmer", "farmers", "petani", "orang", "person", "person"),
    ("student", "students", "murid", "orang", "person", "person"),
    ("child", "children", "anak", "orang", "person", "person"),
    ("friend", "friends", "teman", "orang", "person", "person"),
    ("cat", "cats", "kucing", "ekor", "animal", "animal"),
    ("dog", "dogs", "anjing", "ekor", "animal", "animal"),
    ("bird", "birds", "burung", "ekor", "animal", "animal"),
    ("monkey", "monkeys", "monyet", "ekor", "animal", "animal"),
    ("book", "books", "buku", "buah", "thing", "thing text"),
    ("letter", "letters", "surat", "pucuk", "thing", "text"),
    ("newspaper", "newspapers", "koran", "buah", "thing", "thing text"),
    ("bag", "bags", "tas", "buah", "thing", "thing washed"),
    ("table", "tables", "meja", "buah", "thing", "thing painted"),
    ("bicycle", "bicycles", "sepeda", "buah", "thing", "thing washed painted"),
    ("hat", "hats", "topi", "buah", "thing", "thing washed"),
    ("shirt", "shirts", "kemeja", "helai", "thing", "thing washed"),
    ("pencil", "pencils", "pensil", "batang", "thing", "thing"),
    ("cup", "cups", "cangkir", "buah", "thing", "thing washed"),
    ("door", "doors", "pintu", "buah", "thing", "opened painted"),
    ("box", "boxes", "kotak", "buah", "thing", "thing opened painted"),
    ("house", "houses", "rumah", "buah", "thing", "swept painted"),
    ("office", "offices", "kantor", "buah", "thing", "swept painted"),
    ("mango", "mangoes", "mangga", "buah", "food", "food"),
    ("banana", "bananas", "pisang", "buah", "food", "food"),
    ("egg", "eggs", "telur", "butir", "food", "food"),
    ("cake", "cakes", "kue", "buah", "food", "food"),
]
PROFESSIONS = ["teacher", "doctor", "farmer", "student"]  # plural with para, rarely
PARENTS = [("mother", "ibu"), ("father", "ayah")]
NAMES = ["Budi", "Dewi", "Joko", "Rina", "Siti"]

# What a thing looks like stands before its noun; how it is can also be said of it (`is clean`).
LOOKS = {
    "person": {"old": "tua", "young": "muda", "tall": "tinggi"},
    "animal": {"old": "tua", "big": "besar", "small": "kecil", "black": "hitam", "white": "putih"},
    "thing": {
        **{"old": "lama", "new": "baru", "big": "besar", "small": "kecil", "black": "hitam"},
        **{"white": "putih", "red": "merah", "blue": "biru"},
    },
    "food": {"big": "besar", "small": "kecil"},
}
STATES = {
    "person": {
        **{"clever": "(pandai:clever|pintar:clever)", "good": "baik", "strong": "kuat"},
        **{"rich": "kaya", "poor": "miskin", "lazy": "malas"},
    },
    "animal": {"clever": "(pandai:clever|pintar:clever)", "strong": "kuat", "lazy": "malas"},
    "thing": {
        **{"expensive": "mahal", "cheap": "murah", "heavy": "berat", "clean": "bersih"},
        **{"dirty": "kotor", "good": "bagus"},
    },
    "food": {
        **{"delicious": "(lezat:delicious|enak:delicious)", "expensive": "mahal"},
        **{"cheap": "murah"},
    },
}
FEELINGS = {"hungry": "lapar", "tired": "lelah", "sick": "sakit", "happy": "senang"}

# base, -s, -ing, past, participle; root; groups of what it is done to; who does it
TRANSITIVE = [
    ("buy", "buys", "buying", "bought", "bought", "beli", "thing food", "person"),
    ("sell", "sells", "selling", "sold", "sold", "jual", "thing food", "person"),
    ("use", "uses", "using", "used", "used", "pakai", "thing", "person"),
    ("lift", "lifts", "lifting", "lifted", "lifted", "angkat", "thing", "person"),
    ("wash", "washes", "washing", "washed", "washed", "cuci", "washed", "person"),
    ("paint", "paints", "painting", "painted", "painted", "cat", "painted", "person"),
    ("open", "opens", "opening", "opened", "opened", "buka", "opened", "person"),
    ("sweep", "sweeps", "sweeping", "swept", "swept", "sapu", "swept", "person"),
    ("read", "reads", "reading", "read", "read", "baca", "text", "person"),
    ("send", "sends", "sending", "sent", "sent", "kirim", "text", "person"),
    ("cut", "cuts", "cutting", "cut", "cut", "potong", "food", "person"),
    ("help", "helps", "helping", "helped", "helped", "bantu", "person", "person"),
    ("eat", "eats", "eating", "ate", "eaten", "makan", "food", "person animal"),
    ("chase", "chases", "chasing", "chased", "chased", "kejar", "animal", "person animal"),
    ("catch", "catches", "catching", "caught", "caught", "tangkap", "animal", "person animal"),
]
INTRANSITIVE = [  # base, -s, -ing, past, participle; root; where it is done
    ("work", "works", "working", "worked", "worked", "kerja"),
    ("study", "studies", "studying", "studied", "studied", "ajar"),
    ("play", "plays", "playing", "played", "played", "main"),
    ("walk", "walks", "walking", "walked", "walked", "jalan"),
    ("swim", "swims", "swimming", "swam", "swum", "renang"),
]
FORMS = ("base", "s", "ing", "past", "participle")

PLACES = [
    ("in the kitchen", "di:in dapur:kitchen"),
    ("in the garden", "di:in kebun:garden"),
    ("in the library", "di:in perpustakaan:library"),
    ("in the village", "di:in desa:village"),
    ("at the market", "di:at pasar:market"),
    ("at the school", "di:at sekolah:school"),
]
WATERS = [("in the river", "di:in sungai:river"), ("in the sea", "di:in laut:sea")]
TIMES = {
    "often": [
        ("every day", "(setiap:every|tiap:every) hari:day"),
        ("every morning", "(setiap:every|tiap:every) pagi:morning"),
    ],
    "past": [("yesterday", "kemarin:yesterday"), ("last week", "minggu:week lalu:last")],
    "future": [("tomorrow", "besok:tomorrow"), ("next week", "minggu:week depan:next")],
}
NUMBERS = {"two": "dua", "three": "tiga", "four": "empat", "five": "lima"}

# By who it is said of: one, many, or me.
BE = {"one": "is", "many": "are", "me": "am"}
WAS = {"one": "was", "many": "were", "me": "was"}
DO = {"one": "does", "many": "do", "me": "do"}
HAVE = {"one": "has", "many": "have", "me": "have"}
WANT = {"one": "wants", "many": "want", "me": "want"}
PRESENT = {"one": "s", "many": "base", "me": "base"}  # which form the verb has


# ── Affixes ───────────────────────────────────────────────────────────────────────────────────────

VOWELS = tuple("aeiou")
PLAIN = ("makan",)  # verbs that need no prefix in the active


def me(root: str) -> str:
    """The active form of a verb. The prefix takes on the place in the mouth of the next sound.

    beli membeli, potong memotong, cuci mencuci, tangkap menangkap, angkat mengangkat, kirim
    mengirim, sapu menyapu, cat mengecat (a root of one syllable), rawat merawat.
    """
    if root in PLAIN:
        return root
    if sum(letter in VOWELS for letter in root) == 1:
        return "menge" + root
    if root[0] in "ptks":  # these sounds are lost to the nasal that is made in the same place
        return {"p": "mem", "t": "men", "k": "meng", "s": "meny"}[root[0]] + root[1:]
    if root[0] in "bfv":
        return "mem" + root
    if root[0] in "cdjz":
        return "men" + root
    if root[0] in "gh" or root.startswith(VOWELS):
        return "meng" + root
    return "me" + root  # l, m, n, r, w, y


def di(root: str) -> str:
    """The passive form of a verb: dibeli, dicuci."""
    return "di" + root


def ber(root: str) -> str:
    """What somebody does: main bermain. No second r: renang berenang, kerja bekerja; ajar belajar.

    The r is lost before a root with r, or whose first syllable ends in er.
    """
    if root == "ajar":
        return "belajar"
    ends_in_er = root[1:3] == "er" and not root[3:].startswith(VOWELS)
    return ("be" if root[0] == "r" or ends_in_er else "ber") + root


# ── Nouns ─────────────────────────────────────────────────────────────────────────────────────────


def add_adjectives(g: Grammar) -> None:
    """look.SORT, state.SORT, any.SORT and feeling."""
    for kind, table in (("look", LOOKS), ("state", STATES)):
        for sort, words in table.items():
            for english, indonesian in words.items():
                side = indonesian if "(" in indonesian else f"{indonesian}:{english}"
                for symbol in (f"{kind}.{sort}", f"any.{sort}"):
                    g.add(symbol, english, side, lemma=english)
    for english, indonesian in FEELINGS.items():
        g.add("feeling", english, f"{indonesian}:{english}")


def plural(english: str, indonesian: str, many: str) -> str:
    """A noun said twice; for professions rarely once, after para."""
    twice = f"{indonesian}-{indonesian}:{many}"
    if english not in PROFESSIONS:
        return twice
    return f"({twice}|para:{many} {indonesian}:{many})"


def add_nouns(g: Grammar) -> None:
    """noun.GROUP.one and .many, counted.GROUP, and `a` with its noun, whose classifier it needs."""
    for one, many, indonesian, classifier, sort, groups in NOUNS:
        for group in groups.split():
            g.add(f"noun.{group}.one", one, f"{indonesian}:{one}", lemma=one)
            g.add(f"noun.{group}.many", many, plural(one, indonesian, many), lemma=one)
            counted = f"{classifier}:{many} {indonesian}:{many}"
            g.add(f"counted.{group}", many, counted, lemma=one)
            side = f"se{classifier}:a {indonesian}:{one}"
            g.add(f"a.{group}", f"a {one}", side, lemma=one)
            for kind in ("look", "any"):
                adjective = f"<{kind}.{sort}>"
                words, side_with = f"a {adjective} {one}", f"{side} {adjective}"
                g.add(f"a.{kind}.{group}", words, side_with, lemma=one, pair=(adjective, ""))


def sorts_of_groups() -> dict[str, str]:
    """Which sort the nouns of a group are of."""
    return {group: sort for *_, sort, groups in NOUNS for group in groups.split()}


def add_groups(g: Grammar) -> None:
    """group.KIND.GROUP.NUMBER: a noun with an adjective of that kind, or without one."""
    for group, sort in sorts_of_groups().items():
        for kind in ("look", "any"):
            adjective, symbol = f"<{kind}.{sort}>", f"{kind}.{group}"
            for number in ("one", "many"):
                noun = f"<noun.{group}.{number}>"
                g.add(f"group.{symbol}.{number}", noun, noun, 2)
                words, side = f"{adjective} {noun}", f"{noun} {adjective}"
                g.add(f"group.{symbol}.{number}", words, side, 3, pair=(adjective, noun))
            counted = f"<counted.{group}>"
            g.add(f"group.{symbol}.counted", counted, counted)
            words, side = f"{adjective} {counted}", f"{counted} {adjective}"
            g.add(f"group.{symbol}.counted", words, side, pair=(adjective, counted))
            g.add(f"some.{symbol}", f"<a.{group}>", f"<a.{group}>")
            g.add(f"some.{symbol}", f"<a.{symbol}>", f"<a.{symbol}>")


OWNERS = {"my": "saya:my", "your": "kamu:your", "their": "mereka:their"}
OWNERS["our"] = "(kami:our|kita:our)"  # kita counts you in, kami does not: English cannot tell


def add_phrases(g: Grammar) -> None:
    """known.KIND.GROUP.NUMBER: what both have heard of; np.KIND.GROUP.NUMBER: that, or `a`."""
    for group, sort in sorts_of_groups().items():
        for kind in ("look", "any"):
            for number, this, that in (("one", "this", "that"), ("many", "these", "those")):
                tail = f"{kind}.{group}.{number}"
                known, owned, inner = f"known.{tail}", f"owned.{tail}", f"<group.{tail}>"
                g.add(known, f"the {inner}", f"{inner} itu:the", 6)
                g.add(known, f"{this} {inner}", f"{inner} ini:{this}")
                g.add(known, f"{that} {inner}", f"{inner} itu:{that}")
                g.add(known, f"<{owned}>", f"<{owned}>", 4)
                add_owners(g, owned, inner, f"<{kind}.{sort}>", f"<noun.{group}.{number}>")
                g.add(f"np.{tail}", f"<{known}>", f"<{known}>", 2)
            some, counted = f"<some.{kind}.{group}>", f"<group.{kind}.{group}.counted>"
            g.add(f"np.{kind}.{group}.one", some, some)
            g.add(f"np.{kind}.{group}.many", f"<number> {counted}", f"<number> {counted}")
    add_names(g)


def add_owners(g: Grammar, owned: str, inner: str, adjective: str, noun: str) -> None:
    """my new hat: topi baru saya; his new hat: topinya yang baru, its adjective in a clause."""
    for owner, side in OWNERS.items():
        g.add(owned, f"{owner} {inner}", f"{inner} {side}")
    g.add(owned, f"<owner> {inner}", f"{inner} <owner>", 2)
    for owner in ("his", "her"):
        g.add(owned, f"{owner} {noun}", f"{noun} +nya:{owner}", 0.5)
        words, side = f"{owner} {adjective} {noun}", f"{noun} +nya:{owner} yang {adjective}"
        g.add(owned, words, side, 0.5, pair=(adjective, noun))


def add_names(g: Grammar) -> None:
    """name, owner, number, parent and family: my mother, his father."""
    for name in NAMES:
        g.add("owner", f"{name}'s", f"{name}:{name}'s")
        g.add("name", name, f"{name}:{name}")
    for english, indonesian in NUMBERS.items():
        g.add("number", english, f"{indonesian}:{english}")
    for english, indonesian in PARENTS:
        g.add("parent", english, f"{indonesian}:{english}")
    for owner, side in [*OWNERS.items(), ("his", "+nya:his"), ("her", "+nya:her")]:
        g.add("family", f"{owner} <parent>", f"<parent> {side}")


def add_people(g: Grammar) -> None:
    """Who does something, and to whom: subject.NUMBER, agent and object.person."""
    for symbol in ("somebody", "subject.one"):
        for slot, weight in (("<name>", 4), ("<family>", 3), ("<np.any.person.one>", 8)):
            g.add(symbol, slot, slot, weight)
    g.add("subject.one", "he", "(dia:he|ia:he)", 2)
    g.add("subject.one", "she", "(dia:she|ia:she)", 2)
    g.add("subject.many", "<np.any.person.many>", "<np.any.person.many>", 6)
    for english, side in (
        ("we", "(kami:we|kita:we)"),
        ("you", "kamu:you"),
        ("they", "mereka:they"),
    ):
        g.add("subject.many", english, side)
    g.add("subject.me", "I", "saya:I")
    g.add("agent", "<somebody>", "<somebody>", 3)
    g.add("agent", "<np.any.person.many>", "<np.any.person.many>")
    for number in ("one", "many"):
        g.add(f"animal.{number}", f"<np.any.animal.{number}>", f"<np.any.animal.{number}>")
    objects = {"me": "saya", "you": "kamu", "him": "dia", "her": "dia", "them": "mereka"}
    for english, indonesian in objects.items():
        g.add("object.person", english, f"{indonesian}:{english}", 0.6)
    g.add("object.person", "<somebody>", "<somebody>", 4)
    g.add("object.person", "<np.any.person.many>", "<np.any.person.many>", 2)
    for group in sorts_of_groups():
        if group != "person":
            for number, weight in (("one", 3), ("many", 2)):
                phrase = f"<np.any.{group}.{number}>"
                g.add(f"object.{group}", phrase, phrase, weight)


# ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────


def add_verbs(g: Grammar) -> None:
    """act.FORM: what a person does, in each English form; deed.FORM: what an animal does."""
    for *forms, root, groups, doers in TRANSITIVE:
        objects = groups.split()
        for form, english in zip(FORMS, forms, strict=True):
            for group in objects:
                words, side = (
                    f"{english} <object.{group}>",
                    f"{me(root)}:{english} <object.{group}>",
                )
                facts = {"lemma": forms[0], "pair": ("", f"<object.{group}>")}
                if "person" in doers:
                    g.add(f"act.{form}", words, side, 3 / len(objects), **facts)
                    g.add(
                        f"act.{form}",
                        f"{words} <place>",
                        f"{side} <place>",
                        1 / len(objects),
                        **facts,
                    )
                if "animal" in doers:
                    g.add(f"deed.{form}", words, side, 1 / len(objects), **facts)
    for *forms, root in INTRANSITIVE:
        place = "<water>" if root == "renang" else "<place>"
        for form, english in zip(FORMS, forms, strict=True):
            words, side = f"{english} {place}", f"{ber(root)}:{english} {place}"
            g.add(f"act.{form}", words, side, 1.5, lemma=forms[0])
            g.add(
                f"act.{form}",
                f"{english} with <somebody> {place}",
                f"{ber(root)}:{english} (dengan:with|bersama:with) <somebody> {place}",
                1.5,
                lemma=forms[0],
            )
    for symbol, places in (("place", PLACES), ("water", WATERS)):
        for english, side in places:
            g.add(symbol, english, side)
    for symbol, times in TIMES.items():
        for english, side in times:
            g.add(symbol, english, side)


def add_statements(g: Grammar, subject: str, act: str, number: str, weight: float) -> None:
    """What `subject` does, in every time. `act`: act for people, deed for animals."""
    be, do, have, want = (words[number] for words in (BE, DO, HAVE, WANT))
    who, present = f"<{subject}.{number}>", f"<{act}.{PRESENT[number]}>"
    base, ing, past, done = (f"<{act}.{form}>" for form in ("base", "ing", "past", "participle"))
    patterns = [
        (f"{be} {ing}", f"(sedang:{be}|tengah:{be}) {ing}", 5),
        (f"{be} not {ing}", f"tidak:not sedang:{be} {ing}", 1),
        (f"{present} <often>", f"{present} <often>", 2),
        (f"always {present}", f"selalu:always {present}", 2),
        (f"{past} <past>", f"{past} <past>", 5),
        (f"{have} {done}", f"(sudah:{have}|telah:{have}) {done}", 4),
        (f"{have} not {done}", f"belum:{have}+not {done}", 2),
        (f"will {base} <future>", f"akan:will {base} <future>", 4),
        (f"will not {base} <future>", f"tidak:not akan:will {base} <future>", 2),
        (f"{do} not {base} <often>", f"tidak:{do}+not {base} <often>", 2),
        (f"did not {base} <past>", f"tidak:did+not {base} <past>", 3),
        (f"can {base}", f"(bisa:can|dapat:can) {base}", 2),
        (f"cannot {base}", f"tidak:cannot (bisa:cannot|dapat:cannot) {base}", 1),
    ]
    if subject == "subject":
        patterns += [
            (f"must {base}", f"harus:must {base}", 2),
            (f"{want} to {base}", f"(ingin:{want}+to|mau:{want}+to) {base}", 2),
        ]
    for english, side, share in patterns:
        g.add("statement", f"{who} {english}", f"{who} {side}", weight * share)


def add_passives(g: Grammar) -> None:
    """The cake was eaten by Budi: kue itu dimakan (oleh) Budi."""
    for *forms, root, groups, _ in TRANSITIVE:
        part, objects = forms[-1], [group for group in groups.split() if group != "person"]
        for group in objects:
            for number, weight in (("one", 3), ("many", 2)):
                what, be, have = f"<known.any.{group}.{number}>", WAS[number], HAVE[number]
                by = "(oleh:by|) <agent>"
                patterns = [
                    (f"{be} {part} by <agent> <past>", f"{di(root)}:{be}+{part} {by} <past>", 3),
                    (f"{have} been {part} by <agent>", f"(sudah:{have}|telah:{have}) "
                     f"{di(root)}:been+{part} {by}", 2),
                    (f"will be {part} by <agent> <future>",
                     f"akan:will {di(root)}:be+{part} {by} <future>", 2),
                    (f"{be} not {part} by <agent> <past>",
                     f"tidak:not {di(root)}:{be}+{part} {by} <past>", 1),
                ]  # fmt: skip
                for english, side, share in patterns:
                    g.add(
                        "passive",
                        f"{what} {english}",
                        f"{what} {side}",
                        weight * share / len(objects),
                        lemma=forms[0],
                        pair=("", what),
                    )


# ── Sentences ─────────────────────────────────────────────────────────────────────────────────────


def add_being(g: Grammar) -> None:
    """is a doctor, is very heavy, is hungry, there are, this is not."""
    for number in ("one", "me"):
        who, be, doctor = f"<subject.{number}>", BE[number], "<some.any.person>"
        weight = 4 if number == "one" else 1
        g.add("noun", f"{who} {be} {doctor}", f"{who} (adalah:{be}|) {doctor}", weight)
        g.add("noun", f"{who} {be} not {doctor}", f"{who} bukan:{be}+not {doctor}", weight)
    for group in ("thing", "animal", "food"):
        for number in ("one", "many"):
            who, be, how = f"<known.look.{group}.{number}>", BE[number], f"<state.{group}>"
            very = f"(sangat:very {how}|{how} sekali:very)"
            g.add("quality", f"{who} {be} {how}", f"{who} {how}")
            g.add("quality", f"{who} {be} very {how}", f"{who} {very}", 2)
            g.add("quality", f"{who} {be} not {how}", f"{who} tidak:{be}+not {how}")
            for english, side in PLACES[:4]:
                what = f"<group.any.{group}.counted>"
                a = f"<some.any.{group}>"
                if number == "one":
                    g.add("there", f"there is {a} {english}", f"ada:there+is {a} {side}", 2)
                else:
                    words = f"there are <number> {what} {english}"
                    g.add("there", words, f"ada:there+are <number> {what} {side}", 2)
            what = f"<owned.any.{group}.{number}>"
            this, be = ("this", "is") if number == "one" else ("these", "are")
            g.add("this", f"{this} {be} not {what}", f"ini:{this} bukan:{be}+not {what}")
            g.add("this", f"{this} {be} {what}", f"ini:{this} (adalah:{be}|) {what}")
    for number in BE:
        who, be = f"<subject.{number}>", WAS[number]
        weight = {"one": 4, "many": 2, "me": 1}[number]
        g.add("felt", f"{who} {be} <feeling>", f"{who} <feeling>", weight)
        very = "(sangat:very <feeling>|<feeling> sekali:very)"
        g.add("felt", f"{who} {be} very <feeling>", f"{who} {very}", weight)
        past = f"{who} <act.past>"
        g.add("did", past, past, weight)


def add_questions(g: Grammar) -> None:
    """apakah, mengapa, kapan, siapa, di mana."""
    for number, weight in (("one", 3), ("many", 2), ("me", 0.5)):
        who, be, do = f"<subject.{number}>", BE[number], DO[number]
        going = f"apakah:{be} {who} (sedang:{be}|tengah:{be}) <act.ing>"
        patterns = [
            (f"{be} {who} <act.ing>", going, 3),
            (f"{do} {who} <act.base> <often>", f"apakah:{do} {who} <act.base> <often>", 2),
            (f"did {who} <act.base> <past>", f"apakah:did {who} <act.base> <past>", 3),
            (f"will {who} <act.base> <future>",
             f"apakah:will {who} akan:will <act.base> <future>", 3),
            (f"why did {who} <act.base>", f"(mengapa:why|kenapa:why) {who} <act.base>", 2),
            (f"when will {who} <act.base>", f"kapan:when {who} akan:will <act.base>", 2),
        ]  # fmt: skip
        for english, side, share in patterns:
            g.add("question", english, side, weight * share)
    g.add("question", "who <act.past> <past>", "siapa:who yang:who <act.past> <past>", 4)
    for group in ("thing", "animal"):
        for number, weight in (("one", 3), ("many", 2)):
            what, be = f"<known.any.{group}.{number}>", BE[number]
            side = f"di:where mana:where {what} sekarang:now"
            g.add("question", f"where {be} {what} now", side, weight)


def add_sentences(g: Grammar) -> None:
    """What a sentence is, with its full stop or question mark."""
    for symbol, weight in (("statement", 52), ("passive", 14), ("question", 14), ("there", 6)):
        mark = "+?" if symbol == "question" else "+."
        g.add("sentence", f"<{symbol}> {mark}", f"<{symbol}> {mark}", weight)
    for symbol, weight in (("noun", 6), ("quality", 5), ("this", 4)):
        g.add("sentence", f"<{symbol}> +.", f"<{symbol}> +.", weight)
    because = "<did> (karena:because|sebab:because) <felt> +."
    g.add("sentence", "<did> because <felt> +.", because, 4)
    but = "<quality> +, (tetapi:but|tapi:but) <quality'> +."
    g.add("sentence", "<quality> +, but <quality'> +.", but, 5)


@lru_cache(maxsize=1)
def grammar() -> Grammar:
    """The whole grammar."""
    g = Grammar()
    add_adjectives(g)
    add_nouns(g)
    add_groups(g)
    add_phrases(g)
    add_people(g)
    add_verbs(g)
    for number, weight in (("one", 4), ("many", 3), ("me", 1)):
        add_statements(g, "subject", "act", number, weight)
    for number, weight in (("one", 0.6), ("many", 0.4)):
        add_statements(g, "animal", "deed", number, weight)
    add_passives(g)
    add_being(g)
    add_questions(g)
    add_sentences(g)
    return g


# ── The corpus ────────────────────────────────────────────────────────────────────────────────────


def held_out(combination: tuple[str, str]) -> bool:
    """Is this (adjective, noun) or (verb, noun) kept from the training part?"""
    return zlib.crc32(" ".join(combination).encode()) % HELD_OUT == 0


def is_unseen(source: str) -> bool:
    """Has the sentence a combination of words that no sentence of the training part has?

    Each of the words is there, with other partners. ValueError for what the grammar cannot say.
    """
    trees = grammar().trees(source)
    if not trees:
        raise ValueError(f"the grammar cannot say {source!r}")
    return any(held_out(pair) for tree in trees for pair in tree.combinations())


def is_sensible(source: str) -> bool:
    """Is an English sentence of the wanted length, nobody helps himself, and no child is old?"""
    words = source.rstrip(".?").split()
    circular = {"I", "me"} <= set(words) or [word.lower() for word in words].count("you") > 1
    return len(words) in LENGTHS and not circular and "old child" not in source.lower()


def corpus(sizes: dict[str, int], seed: int) -> dict[str, list[Pair]]:
    """Pairs for each part. No English sentence comes twice, and none has a translation in common
    with one of another part.

    Sentences with a held-out combination are every second one of the test part and no others. All
    that is passed over is so for its English side, never for the translation that was drawn: so the
    translations keep the probabilities p(y|x) of the grammar.
    """
    g, dice, parts = grammar(), random.Random(seed), {}
    sources, targets = set(), set()  # English sentences, and all that those of other parts can be
    for part, size in sizes.items():
        pairs, own_targets = [], set()
        while len(pairs) < size:
            tree = g.draw_tree(dice)
            source, unseen = spell(tree.english()), any(map(held_out, tree.combinations()))
            wanted = part == "test" and len(pairs) % 2 == 1
            if unseen != wanted or source in sources or not is_sensible(source):
                continue
            translations = {way.target for way in translations_of(tree)}
            if not translations & targets:
                sources.add(source)
                own_targets |= translations
                pairs.append(g.draw_pair(dice, tree))
        parts[part], targets = pairs, targets | own_targets
    return parts
