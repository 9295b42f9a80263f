"""Sentence pairs, from files or the Hub to batches of numbers.

    name ──load──▶ Pairs: train, valid, test ──Subwords──▶ ids ──batches, pad──▶ (B, T)

`grammar` is the corpus that comes with this folder: English and Indonesian from our own grammar,
which knows how probable every translation is and which words belong together. Everything else is a
file of lines `English TAB Indonesian`, or a data set of the Hub with a column for each language;
neither side has to be English or Indonesian.

Pairs are cut in three parts so that no sentence, on either side, stands in two of them: the same
sentence in the training and in the test part would be a question whose answer is known.

Key: B rows, T longest row.
"""

import io
import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor

import indonesian
from options import UserError, say, shorten
from run import read_json, whole_file

HERE = Path(__file__).resolve().parent / "data"
FLOOR = HERE / "floor.json"
PARTS = ("train", "valid", "test")
LONGEST_WORDS, LONGEST_CHARS = 100, 1000  # of a side; longer ones are passed over
FEWEST = 10  # pairs; with fewer there is nothing to learn from
SHARE, MOST = 20, 2000  # one pair in 20 is for valid and one for test, 2,000 at most
COLUMNS = (("en", "id"), ("english", "indonesian"), ("source", "target"), ("src", "tgt"))
PAD, UNK, BOS, EOS = range(4)
N_BYTE = 256  # pieces that spell what was never seen
INSIDE = ("grammar",)  # names of data that comes with the folder
PairList = list[tuple[str, str]]


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def file_pairs(file: Path) -> Iterator[tuple[str, str]]:
    """The first two columns of each line. UserError for a line without a TAB, and for no UTF-8."""
    more = False
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                columns = line.rstrip("\n").split("\t")
                if len(columns) < 2 and line.strip():
                    raise UserError(
                        f"line {number} of {file} has no TAB: write English TAB Indonesian, "
                        f"not {shorten(line, 60)}"
                    )
                more |= len(columns) > 2
                yield columns[0], columns[1] if len(columns) > 1 else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as UTF-8 ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if more:
        say(f"{file}: what stands after a second TAB in a line is not read")


def file_of(name: str) -> Path:
    """The file called `name`. UserError if there is none, or if it can be read only once."""
    path = Path(name)
    if not name.strip():
        raise UserError("--data is empty: name a file, hf:OWNER/NAME or grammar")
    if path.is_dir():
        raise UserError(f"--data {name} is a folder: name a file of lines English TAB Indonesian")
    if not path.exists():
        raise UserError(
            f"--data {name}: there is no such file (grammar is the data of this folder)"
        )
    if not path.is_file():
        raise UserError(f"--data {name} can be read only once: save it as a file first")
    return path


def hub_name(name: str) -> tuple[str, str | None, list[str]]:
    """OWNER/NAME@CONFIG#SOURCE,TARGET as (OWNER/NAME, CONFIG, columns); the ends may be missing."""
    if Path(name).is_dir():
        return name, None, []
    name, _, columns = name.partition("#")
    name, _, config = name.partition("@")
    return name, config or None, [c.strip() for c in columns.split(",")] if columns else []


def hub_splits(name: str, config: str | None) -> dict:
    """The splits of a Hub data set, or of a local copy of one."""
    import datasets

    try:
        return dict(datasets.load_dataset(name, config))
    except Exception as error:  # the library raises many kinds
        raise UserError(f"cannot load --data hf:{name}: {shorten(error)}") from None


def choose_columns(names: Sequence[str], wanted: Sequence[str], where: str) -> tuple[str, str]:
    """Which columns are source and target: those asked for, known names, or the only two."""
    known = [pair for pair in COLUMNS if set(pair) <= set(names)]
    if wanted:
        known = [tuple(wanted)] if len(wanted) == 2 and set(wanted) <= set(names) else []
    elif not known and len(names) == 2:
        known = [tuple(names)]
    if not known:
        raise UserError(
            f"{where} has the columns {', '.join(names)}: say which two with "
            f"{where.partition('#')[0]}#SOURCE,TARGET"
        )
    return known[0]


def hub_pairs(rows: Iterable[dict], wanted: Sequence[str], where: str) -> Iterator[tuple[str, str]]:
    """The pairs of a split; a column `translation` holds a dictionary by language."""
    chosen = None
    for row in rows:
        texts = row.get("translation", row)
        if not isinstance(texts, dict):
            raise UserError(f"the column translation of {where} holds no dictionary by language")
        chosen = chosen or choose_columns(list(texts), wanted, where)
        pair = tuple(texts.get(column) for column in chosen)
        if not all(isinstance(side, str) or side is None for side in pair):
            raise UserError(f"{where}: {' and '.join(chosen)} hold something else than text")
        yield pair[0] or "", pair[1] or ""


def clean(pairs: Iterable[tuple[str, str]], where: str) -> PairList:
    """The pairs with single spaces, each once; says how many were empty or too long."""
    kept, counts = {}, {"empty": 0, "too long": 0, "there twice": 0}
    for sides in pairs:
        if max(map(len, sides)) > 10 * LONGEST_CHARS:  # do not even split ten megabytes
            counts["too long"] += 1
            continue
        pair = tuple(" ".join(side.split()) for side in sides)
        if not all(pair):
            counts["empty"] += 1
        elif any(len(s) > LONGEST_CHARS or s.count(" ") >= LONGEST_WORDS for s in pair):
            counts["too long"] += 1
        elif pair in kept:
            counts["there twice"] += 1
        else:
            kept[pair] = None
    passed = ", ".join(f"{n:,} {why}" for why, n in counts.items() if n)
    if passed:
        say(f"{where}: pairs passed over: {passed}; {len(kept):,} are left")
    return list(kept)


def read(name: str) -> dict[str, PairList]:
    """The pairs of a source, by the parts it has of its own; a source without parts is "all"."""
    if name == "grammar":
        files = {part: HERE / f"{part}.tsv" for part in PARTS}
        return {part: clean(file_pairs(file), str(file)) for part, file in files.items()}
    if not name.startswith("hf:"):
        return {"all": clean(file_pairs(file_of(name)), name)}
    splits = hub_splits(*hub_name(name.removeprefix("hf:"))[:2])
    columns = hub_name(name.removeprefix("hf:"))[2]
    found = {s: clean(hub_pairs(rows, columns, name), f"{name}, {s}") for s, rows in splits.items()}
    found = {{"validation": "valid", "dev": "valid"}.get(s, s): pairs for s, pairs in found.items()}
    if set(PARTS) <= found.keys():
        return {part: found[part] for part in PARTS}
    return {"all": list(dict.fromkeys(itertools.chain(*found.values())))}


def read_pairs(name: str) -> PairList:
    """All pairs of a source, whatever its parts: what `--eval --data` scores.

    UserError as in `load`, but one pair is enough.
    """
    pairs = list(dict.fromkeys(itertools.chain(*read(name).values())))
    if not pairs:
        raise UserError(f"--data {name} has no pair of sentences: lines English TAB Indonesian")
    return pairs


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs (source, target) in three parts that have no sentence in common."""

    name: str
    train: PairList
    valid: PairList
    test: PairList

    def part(self, part: str) -> PairList:
        return getattr(self, part)

    @property
    def is_grammar(self) -> bool:
        """Are these drawn from our grammar, so that their probabilities are known?"""
        return self.name == "grammar"

    def floor(self, part: str) -> float | None:
        """The mean of −log p(target | source) over a part, in nats per sentence; else None.

        It is the loss of who knows the grammar by heart. No model has a lower expected loss; on the
        pairs that happen to be in this part one could, by luck, be a little lower.
        """
        return read_json(FLOOR)[part]["floor"] if self.is_grammar else None

    def ceiling(self, part: str) -> float | None:
        """The BLEU of the grammar's likeliest translations on a part; None if it is unknown."""
        return read_json(FLOOR)[part]["ceiling_bleu"] if self.is_grammar else None

    def alignments(self, part: str) -> list[list[tuple[int, int]]] | None:
        """Gold links (source word, target word), counted from 0 between spaces; None if unknown."""
        if not self.is_grammar:
            return None
        return [indonesian.grammar().align(*pair) for pair in self.part(part)]

    def unseen(self, part: str) -> list[bool] | None:
        """Which pairs combine words that are never together in training; None if unknown."""
        if not self.is_grammar:
            return None
        return [indonesian.is_unseen(source) for source, _ in self.part(part)]


def load(name: str) -> Pairs:
    """The pairs called `name`: grammar, a .tsv file, or hf:OWNER/NAME[@CONFIG][#SOURCE,TARGET].

    UserError for what is missing, unreadable, not UTF-8 or without TABs, and for too few pairs.
    """
    found = read(name)
    if name == "grammar":
        return Pairs(name, **found)
    parts = cut(found["all"]) if "all" in found else without_leaks(found)
    n = sum(map(len, parts.values()))
    if n < FEWEST or not all(parts.values()):
        raise UserError(
            f"--data {name} has {n} pairs that can be cut in three parts without a sentence in two "
            f"of them: {FEWEST} or more are needed"
        )
    return Pairs(name, **parts)


def without_leaks(parts: dict[str, PairList]) -> dict[str, PairList]:
    """Parts as they come, less what stands in a later one: the test part stays as it is."""
    taken, kept = set(), {}
    for part in reversed(PARTS):
        kept[part] = [pair for pair in parts[part] if not keys(pair) & taken]
        taken = taken.union(*map(keys, parts[part]))
    lost = sum(map(len, parts.values())) - sum(map(len, kept.values()))
    if lost:
        say(f"{lost:,} pairs passed over: a sentence of theirs is in the valid or test part, too")
    return {part: kept[part] for part in PARTS}


def keys(pair: tuple[str, str]) -> set[tuple[int, str]]:
    """What two pairs must not have in common: a side, whatever the case of its letters."""
    return {(side, text.casefold()) for side, text in enumerate(pair)}


def families(pairs: PairList) -> list[list[int]]:
    """The pairs' numbers, grouped: who has a sentence in common is in one family."""
    leader = list(range(len(pairs)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    first = {}
    for i, pair in enumerate(pairs):
        for key in sorted(keys(pair)):
            leader[find(i)] = find(first.setdefault(key, i))
    members = {}
    for i in range(len(pairs)):
        members.setdefault(find(i), []).append(i)
    return list(members.values())


def cut(pairs: PairList) -> dict[str, PairList]:
    """Cut in three by chance, always in the same way for the same pairs, whole families each."""
    groups = families(pairs)
    random.Random(0).shuffle(groups)
    size = min(MOST, max(1, len(pairs) // SHARE))
    room, chosen = {"test": size, "valid": size}, {part: [] for part in PARTS}
    for group in groups:
        part = next((p for p, left in room.items() if len(group) <= left), "train")
        chosen[part] += group
        if part in room:
            room[part] -= len(group)
    return {part: [pairs[i] for i in sorted(numbers)] for part, numbers in chosen.items()}


# ── Subwords ──────────────────────────────────────────────────────────────────────────────────────


class Subwords:
    """Text to ids and back, with one vocabulary for both languages: a SentencePiece model.

    Frequent words are one piece and rare ones several (byte pair encoding, Sennrich et al. 2016, as
    in §5.1 of the paper), and what was never seen is spelled in bytes, so every text can be told.
    White space is the one thing that `decode(encode(text))` does not keep: it becomes one space.
    """

    FILE = "subwords.model"
    pad_id, unk_id, bos_id, eos_id = PAD, UNK, BOS, EOS

    def __init__(self, model: bytes, where: str = "the SentencePiece model"):
        """model: the content of a .model file. UserError if it is damaged or has other marks."""
        self.model = model
        try:
            self.library = sentencepiece.SentencePieceProcessor(model_proto=model)
            marks = [getattr(self.library, f"{m}_id")() for m in ("pad", "unk", "bos", "eos")]
            # the pieces by id; ▁ stands for the space before a word
            self.pieces = [self.library.id_to_piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError, OSError, TypeError) as error:
            raise UserError(f"{where} is damaged or none of SentencePiece: {error}") from None
        if marks != [PAD, UNK, BOS, EOS]:
            raise UserError(f"{where} has pad, unk, bos, eos = {marks}, we need 0, 1, 2, 3")

    @classmethod
    def train(cls, pairs: Iterable[tuple[str, str]], vocab_size: int) -> "Subwords":
        """Learn pieces from the training pairs, and from nothing else.

        UserError if the pairs have too few different words for so many pieces, or too many
        different letters for so few.
        """
        texts = list(itertools.islice(itertools.chain.from_iterable(pairs), 1_000_000))
        letters = set().union(*texts)
        most = N_BYTE + sum(map(len, texts))  # SentencePiece takes long to find that out
        if vocab_size > most:
            raise UserError(f"--vocab-size {vocab_size}: the text is short, take far below {most}")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                byte_fallback=True,
                # every letter a piece, unless the script has thousands
                character_coverage=1.0 if len(letters) <= vocab_size // 4 else 0.9995,
                normalization_rule_name="identity",
                split_digits=True,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                num_threads=1,
                minloglevel=2,
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--vocab-size {vocab_size}: {vocab_advice(error)}") from None
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        return self.library.get_piece_size()

    def encode(self, text: str, target: bool = False) -> list[int]:
        """The ids of a text, without marks for its start or end.

        target: is it in the target language? Nothing depends on it here, but the Marian models have
        a SentencePiece model for each language, and are used in the same way.
        """
        return self.library.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; pad, bos and eos are silent. IndexError for an id that there is not."""
        return self.library.decode([int(i) for i in ids])

    def words(self, ids: Sequence[int]) -> list[int]:
        """Which word, counted from 0 between spaces, each id of an encoded text belongs to."""
        number, found = -1, []
        for i in ids:
            number += self.pieces[i].startswith("▁") or number < 0
            found.append(number)
        return found

    def save(self, folder: Path) -> None:
        """Write `subwords.model` into a folder."""
        with whole_file(Path(folder) / self.FILE) as part:
            part.write_bytes(self.model)

    @classmethod
    def load(cls, folder: Path) -> "Subwords":
        """What `save` wrote. UserError if it is missing or damaged."""
        file = Path(folder) / cls.FILE
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from None


def vocab_advice(error: Exception) -> str:
    """What SentencePiece complains of, as advice."""
    text = str(error)
    if found := re.search(r"<= ?(\d+)", text):
        return f"there are too few different words for so many pieces, take {found[1]} or less"
    if found := re.search(r"required_chars.*?(\d+)\D*$", text, re.DOTALL):
        return f"every letter needs a piece, take more than {found[1]}"
    return shorten(text)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def batches(
    encoded_pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    n_token: int,
    seed: int,
    epoch: int,
) -> list[list[int]]:
    """Numbers of pairs, batch by batch: pairs of like length together, so that little is padding.

    n_token: rows times the longest side, with one more place for its end mark, is at most that. So
    a batch has many short pairs or few long ones. Every pair comes once. The order is a function of
    seed and epoch alone (and of the pairs). UserError if a pair alone is too long.
    """
    dice = np.random.default_rng((seed, epoch))
    lengths = np.array([1 + max(map(len, pair)) for pair in encoded_pairs], dtype=np.int64)
    if len(lengths) and lengths.max() > n_token:
        raise UserError(
            f"a pair of sentences has {lengths.max()} tokens with its end mark, a batch only "
            f"{n_token}: take more tokens a batch"
        )
    order = dice.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    found, batch = [], []
    for i in order.tolist():  # from short to long, so the newest is the longest
        if (len(batch) + 1) * lengths[i] > n_token:
            found.append(batch)
            batch = []
        batch.append(i)
    found += [batch] if batch else []
    return [found[i] for i in dice.permutation(len(found))]


def pad(rows: Sequence[Sequence[int]], pad_id: int = PAD) -> Tensor:
    """Rows of ids as one (B, T) int64 tensor, filled with pad_id behind shorter ones."""
    width = max(map(len, rows), default=0)
    padded = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    return padded
