"""Writes english.txt and indonesian.txt: the small corpus this folder trains on.

    python make_corpus.py

Every sentence is grown from the grammars below: people, places, food, weather, work, numbers and
little dialogues, in English and in Indonesian. The words are our own list. A value that is one
string is a list of words, with _ for a space inside. Both files say the same kind of things, not
the same things.
"""

import random
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SENTENCES = 1600  # a language

ENGLISH = {
    "S": [
        "{Who} {did} {thing} {place}{when}.", "{When}, {who} {did} {thing} {place}.",
        "{One} {felt} because {reason}.", "“{Quote},” said {who}{manner}.",
        "The {adj} {noun} {nounverb} {place}.", "{Who} bought {number} {plural} for {money}.",
        "There are {number} {plural} {place}, and {number} of them are {adj}.",
        "If {cond}, {who} will {verb} {thing}{when}.", "{Who} asked whether {reason}.",
        "Nobody knows why the {noun} {nounverb}, but {reason}.",
        "After {doing} {thing}, {who} {went} {place}{manner}.",
        "It was {weather} {when2}, so {who} {did} {thing}.",
        "{One} is {adv} {adjperson}, yet {reason}.", "The {noun} of {name} is {adj} and {adj}.",
    ],
    "name":
        "Ayu Budi Clara Dewi Edwin Fitri Grace Hasan Indah Joko Karen Lukman Maria Nadia Oscar "
        "Putri Ratna Samuel Tari Umar Vera Wayan Yusuf Zahra",
    "who": [
        "{name}", "{name}", "{name} and {name}", "my {relative}", "the {job}", "the old {job}",
        "our {relative}", "a young {job}", "her {relative}", "the {job}'s {relative}",
    ],
    "one": [
        "{name}", "{name}", "my {relative}", "the {job}", "the old {job}", "our {relative}",
    ],
    "relative":
        "mother father sister brother uncle aunt grandmother grandfather cousin neighbour friend "
        "daughter son",
    "job":
        "teacher doctor fisherman carpenter baker driver farmer librarian musician painter nurse "
        "tailor sailor engineer gardener photographer translator astronomer postman",
    "did":
        "carried found repaired described painted cleaned remembered hid borrowed returned "
        "measured photographed wrapped sold lost watched counted washed weighed polished lifted "
        "collected",
    "verb":
        "carry find repair describe paint clean remember hide borrow return measure photograph "
        "wrap sell lose watch count wash",
    "doing":
        "carrying finding repairing describing painting cleaning hiding borrowing returning "
        "measuring wrapping selling watching counting",
    "thing": [
        "the {adj} {noun}", "a {adj} {noun}", "an unusually {adj} {noun}", "{number} {plural}",
        "the {noun} of the {job}", "some {food}", "a bowl of {food}", "that {noun}",
        "every {noun} in the {room}", "their {adj} {plural}",
    ],
    "noun":
        "lantern bicycle umbrella notebook kettle basket bridge window violin ladder suitcase "
        "telescope blanket mirror clock drum letter boat map key compass hammer needle candle "
        "bell carpet teapot engine anchor feather",
    "plural":
        "lanterns bicycles umbrellas notebooks kettles baskets windows violins ladders mirrors "
        "suitcases blankets clocks drums letters boats maps keys oranges mangoes coconuts eggs "
        "stamps shells pencils candles feathers",
    "adj":
        "red blue green wooden broken beautiful heavy light ancient expensive quiet strange "
        "small enormous golden dusty shining useful forgotten colourful delicate unremarkable "
        "wonderful waterproof handmade unfinished",
    "adjperson":
        "patient generous thoughtful stubborn cheerful careful honest curious forgetful "
        "hardworking talkative brave",
    "adv": "very rather unusually surprisingly always quite remarkably",
    "food":
        "rice noodles soup porridge ginger_tea coconut_curry roasted_peanuts fried_bananas "
        "steamed_fish spicy_vegetables sweet_potatoes warm_bread",
    "place": [
        "in the {room}", "near the {where}", "behind the {where}", "beside the {where}",
        "at the {where}", "under the {noun}", "on the way to the {where}", "by the {where}",
        "between the {where} and the {where}",
    ],
    "where":
        "market river harbour school station mosque temple church library garden mountain beach "
        "village museum hospital bakery lighthouse workshop waterfall rice_field",
    "room": "kitchen attic cellar bedroom hall classroom office courtyard",
    "when": [
        "", "", " yesterday", " this morning", " on {day}", " last {season}", " at {hour} o'clock",
        " before sunrise", " after the storm", " in {year}",
    ],
    "when2": [
        "yesterday", "this morning", "on {day}", "all week", "in {month}", "that evening",
    ],
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "month": "January March April June July August October December",
    "season": "summer winter spring week month year night",
    "weather": "raining extremely_hot windy foggy surprisingly_cold cloudy sunny stormy",
    "felt": [
        "was {adjperson}", "felt tired", "laughed loudly", "could not sleep", "was worried",
        "stayed at home", "sang all day", "woke up early", "was delighted", "kept waiting",
    ],
    "reason": [
        "the {noun} was {adj}", "{name} had already {past} it", "nobody had {past} the {noun}",
        "the {where} is closed on {day}", "the rain didn't stop", "there wasn't enough {food}",
        "the {job} never came back", "it doesn't matter any more", "they're still waiting",
        "the {plural} weren't ready", "we've {past} everything twice",
    ],
    "past":
        "found repaired painted cleaned remembered hidden borrowed returned measured sold seen "
        "counted washed forgotten",
    "quote": [
        "I can't find the {noun}", "we'll meet at the {where}", "that is my {noun}",
        "please don't touch the {plural}", "I wonder how much the {plural} cost",
        "it's only a {noun}",
        "you should try the {food}", "let's {verb} the {noun} together", "I've never seen this",
    ],
    "manner": [
        " quietly", " without hesitation", " with a smile", " slowly", " once again", "",
    ],
    "cond": [
        "it rains", "the {job} agrees", "the {noun} breaks", "we are lucky", "nobody objects",
        "the {where} opens before {hour}",
    ],
    "nounverb": [
        "stood", "disappeared", "was shining", "was rebuilt", "fell over", "was forgotten",
        "was hanging", "had been painted", "was rolling",
    ],
    "went": [
        "walked", "travelled", "hurried", "returned", "cycled", "sat down", "fell asleep",
    ],
}  # fmt: skip

INDONESIAN = {
    "S": [
        "{Who} {did} {thing} {place}{when}.", "{When}, {who} {did} {thing} {place}.",
        "{Who} {felt} karena {reason}.", "“{Quote},” kata {who}{manner}.",
        "{Noun} yang {adj} itu {nounverb} {place}.",
        "{Who} membeli {number} {noun} seharga {money}.",
        "Ada {number} {noun} {place}, dan {number} di antaranya {adj}.",
        "Kalau {cond}, {who} akan {did} {thing}{when}.", "{Who} bertanya apakah {reason}.",
        "Tidak ada yang tahu mengapa {noun} itu {nounverb}, tetapi {reason}.",
        "Setelah {did} {thing}, {who} {went} {place}{manner}.",
        "{When2} cuaca {weather}, jadi {who} {did} {thing}.",
        "{Who} {adv} {adjperson}, namun {reason}.", "{Noun} milik {name} itu {adj} dan {adj}.",
    ],
    "name": ENGLISH["name"],
    "who": [
        "{name}", "{name}", "{name} dan {name}", "{relative} saya", "{job} itu", "{job} tua itu",
        "{relative} kami", "seorang {job} muda", "{relative}nya", "{relative} {job} itu",
    ],
    "relative": "ibu ayah kakak adik paman bibi nenek kakek sepupu tetangga teman anak",
    "job":
        "guru dokter nelayan tukang_kayu pembuat_roti sopir petani pustakawan pemusik pelukis "
        "perawat penjahit pelaut insinyur pekebun penerjemah penyair pengantar_surat",
    "did":
        "membawa menemukan memperbaiki menceritakan mengecat membersihkan mengingat "
        "menyembunyikan meminjam mengembalikan mengukur memotret membungkus menjual kehilangan "
        "memperhatikan menghitung mencuci menimbang mengangkat mengumpulkan memperlihatkan "
        "membicarakan",
    "thing": [
        "{noun} yang {adj}", "sebuah {noun} {adj}", "{noun} yang sangat {adj} itu",
        "{number} {noun}", "{noun} milik {job} itu", "sedikit {food}", "semangkuk {food}",
        "{noun} itu", "semua {noun} di {room}", "{plural} mereka yang {adj}",
    ],
    "noun":
        "lentera sepeda payung buku_catatan ketel keranjang jembatan jendela biola tangga koper "
        "teropong selimut cermin jam gendang surat perahu peta kunci kompas palu jarum lilin "
        "lonceng permadani teko mesin jangkar kelapa mangga jeruk telur",
    "plural":
        "lentera-lentera sepeda-sepeda payung-payung keranjang-keranjang jendela-jendela "
        "koper-koper selimut-selimut surat-surat perahu-perahu kunci-kunci lilin-lilin",
    "adj":
        "merah biru hijau rusak indah berat ringan kuno mahal sepi aneh kecil besar keemasan "
        "berdebu berkilauan berguna terlupakan berwarna-warni bersejarah terbuka kedap_air",
    "adjperson":
        "sabar murah_hati bijaksana keras_kepala ceria teliti jujur ingin_tahu pelupa rajin "
        "suka_berbicara pemberani",
    "adv": "sangat agak selalu memang sungguh cukup",
    "food":
        "nasi mi_goreng sup_ayam bubur wedang_jahe gulai_kelapa kacang_goreng pisang_goreng "
        "ikan_bakar sayur_pedas ubi_manis roti_hangat",
    "place": [
        "di {room}", "di dekat {where}", "di belakang {where}", "di samping {where}", "di {where}",
        "di bawah {noun}", "dalam perjalanan ke {where}", "di tepi {where}",
        "antara {where} dan {where}",
    ],
    "where":
        "pasar sungai pelabuhan sekolah stasiun masjid pura gereja perpustakaan kebun gunung "
        "pantai desa museum rumah_sakit toko_roti mercusuar bengkel air_terjun sawah",
    "room": "dapur loteng gudang kamar_tidur ruang_tamu kelas kantor halaman",
    "when": [
        "", "", " kemarin", " tadi pagi", " pada hari {day}", " {season} lalu", " pukul {hour}",
        " sebelum matahari terbit", " setelah badai", " pada tahun {year}",
    ],
    "when2": [
        "kemarin", "tadi pagi", "pada hari {day}", "sepanjang minggu", "pada bulan {month}",
    ],
    "day": "Senin Selasa Rabu Kamis Jumat Sabtu Minggu",
    "month": "Januari Maret April Juni Juli Agustus Oktober Desember",
    "season": "musim_hujan musim_kemarau minggu bulan tahun malam",
    "weather": "hujan sangat_panas berangin berkabut dingin mendung cerah buruk_sekali",
    "felt": [
        "menjadi {adjperson}", "merasa lelah", "tertawa keras-keras", "tidak bisa tidur",
        "merasa khawatir", "tinggal di rumah", "bernyanyi seharian", "bangun pagi-pagi",
        "merasa senang", "terus menunggu",
    ],
    "reason": [
        "{noun} itu {adj}", "{name} sudah {past}nya", "belum ada yang {did} {noun} itu",
        "{where} tutup pada hari {day}", "hujan tidak kunjung berhenti", "{food} tidak cukup",
        "{job} itu tidak pernah kembali", "hal itu tidak penting lagi", "mereka masih menunggu",
        "{plural} itu belum siap", "kami sudah memeriksa semuanya",
    ],
    "past":
        "menemukan memperbaiki mengecat membersihkan mengingat menyembunyikan meminjam menjual "
        "melihat menghitung mencuci melupakan",
    "quote": [
        "saya tidak dapat menemukan {noun} itu", "kita bertemu di {where}", "itu {noun} saya",
        "tolong jangan menyentuh {plural} itu", "saya ingin tahu harga {noun} ini",
        "itu hanya {noun}",
        "Anda harus mencoba {food} ini", "mari kita memperbaiki {noun} itu bersama-sama",
    ],
    "manner": [
        " pelan-pelan", " tanpa ragu-ragu", " sambil tersenyum", " perlahan", " sekali lagi", "",
    ],
    "cond": [
        "turun hujan", "{job} itu setuju", "{noun} itu rusak", "kita beruntung",
        "tidak ada yang keberatan", "{where} dibuka sebelum pukul {hour}",
    ],
    "nounverb": [
        "berdiri", "menghilang", "bersinar", "dibangun kembali", "terjatuh", "terlupakan",
        "tergantung", "sudah dicat", "menggelinding",
    ],
    "went": "berjalan pergi bergegas kembali bersepeda duduk tertidur",
}  # fmt: skip


FILES = (("english", ENGLISH, "${}.50"), ("indonesian", INDONESIAN, "Rp{}.000"))


def grow(grammar: dict, text: str, rng: random.Random, money: str) -> str:
    """Replaces each {slot} by one of its choices until none is left; a {Slot} gets a capital."""
    while "{" in text:
        start = text.index("{")
        end = text.index("}", start)
        slot = text[start + 1 : end]
        text = text[:start] + fill(grammar, slot, rng, money) + text[end + 1 :]
    return text.replace("_", " ")


def fill(grammar: dict, slot: str, rng: random.Random, money: str) -> str:
    """One choice for a slot."""
    if slot == "number":
        return str(rng.choice([rng.randint(2, 20), rng.randint(20, 400)]))
    if slot == "hour":
        return str(rng.randint(5, 11))
    if slot == "year":
        return str(rng.randint(1850, 2024))
    if slot == "money":
        return money.format(rng.randint(2, 90))
    if slot[0].isupper():
        word = ""
        while not word:
            word = grow(grammar, fill(grammar, slot.lower(), rng, money), rng, money).strip()
        return word[0].upper() + word[1:]
    choices = grammar[slot]
    return rng.choice(choices.split() if isinstance(choices, str) else choices)


def corpus(grammar: dict, seed: int, money: str, sentences: int = SENTENCES) -> str:
    """Paragraphs of three to six different sentences, a paragraph a line."""
    rng, paragraphs, left = random.Random(seed), [], sentences
    while left > 0:
        size = min(left, rng.randint(3, 6))
        lines = [grow(grammar, rng.choice(grammar["S"]), rng, money) for _ in range(size)]
        paragraphs.append(" ".join(lines))
        left -= size
    text = "\n".join(paragraphs) + "\n"
    return re.sub(r"\b([Aa]) (?=[aeio]|un|um)", r"\1n ", text) if grammar is ENGLISH else text


def main() -> None:
    """Writes both files beside this script."""
    for name, grammar, money in FILES:
        text = corpus(grammar, 0, money)
        (HERE / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")
        print(f"{name}.txt: {len(text.encode('utf-8')):,} bytes, {len(text.split()):,} words")


if __name__ == "__main__":
    main()
