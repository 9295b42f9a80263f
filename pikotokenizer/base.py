"""What every tokenizer does around its algorithm: text → ids → text.

    encode:  text ─ added tokens cut out ─ normalize ─ pre-tokenize ─ algorithm ─► ids
    decode:  ids ─ pieces ─ decoder ─► text

The algorithm itself is one method, `word_ids(word)`, in bpe.py, wordpiece.py and unigram.py. Here
is also what makes plain Python fast: equal words have equal ids, so they are looked up in a dict;
for the usual patterns a space is a border no token crosses, so whole stretches between spaces are.

Left out: pairs of texts and token types (BERT's second segment), truncation inside `encode`.
"""

import codecs
import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain

from characters import CHAR_TO_BYTE, PATTERNS, WHITE_SPACE, chars_to_bytes, well_formed
from decoders import BYTE_PIECE, MARK, decoder
from normalize import normalizer, plane
from pretokenize import is_word, pre_tokenizer

UNKNOWN_TEXT = " ⁇ "  # U+2047, what SentencePiece decodes its unknown token to
LONGEST_KEY = 64  # characters of what caches keep: longer words are rare and would fill the memory
BLOCK = 1 << 16  # characters handled at a time, so that memory stays bounded
ODD_SPACE = re.compile(r" (?!\S)")
LAST_SPACE = re.compile(r" (?=\S)")  # a border in every pattern of `PATTERNS`
SPACE_IN_RUN = re.compile(r" (?!\S)(?<=\s )")  # a space that might not be one
# A space begins a match wherever LAST_SPACE finds it in Qwen 2's pattern as well.
SPACED_PATTERNS = {
    *PATTERNS.values(),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPACES = "".join(chr(c) for first, last in WHITE_SPACE for c in range(first, last + 1))
MARKED = re.compile(f"{MARK}*[^{MARK}]+|{MARK}+")
WORD = re.compile(f"{MARK}[^{MARK}]*|[^{MARK}]+")
MARK_BORDER = re.compile(f"(?<=[^{MARK}]){MARK}")


class Unseen(Exception):
    """A stretch is not in the cache: those of its block are looked at together."""


class Cache(dict):
    """A dict that computes what it lacks, and forgets everything when it is full."""

    def __init__(self, compute: Callable[[str], Iterable[int]], limit: int):
        self.compute, self.limit = compute, limit

    def __missing__(self, key: str):
        value = tuple(self.compute(key))  # a list would keep the garbage collector busy
        if len(key) <= LONGEST_KEY:
            if len(self) >= self.limit:
                self.clear()
            # A copy: the keys then lie side by side in memory, not among the parts of a text.
            self[key[:1] + key[1:]] = value
        return value

    def add(self, pairs: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Many values at once, computed elsewhere."""
        new = {key: value for key, value in pairs if len(key) <= LONGEST_KEY}
        if len(self) + len(new) > self.limit:
            self.clear()
        self.update(new)


class Learnt(dict):
    """A dict that says when it lacks something."""

    def __missing__(self, key: str):
        raise Unseen


@dataclass(frozen=True)
class AddedToken:
    """A token found in the text before anything else, with Hugging Face's switches.

    special: only found if the caller allows it; the others always. single_word: not inside a word;
    lstrip, rstrip: takes the white space beside it; normalized: looked for in the normalized text.
    """

    id: int
    content: str
    special: bool = True
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass
class Pipeline:
    """The steps around the algorithm, each described as in `tokenizer.json` (None: nothing)."""

    normalizer: dict | None = None
    pre_tokenizer: dict | None = None
    decoder: dict | None = None
    prefix: tuple[int, ...] = ()  # ids that `add_special_tokens=True` puts before the text …
    suffix: tuple[int, ...] = ()  # … and after it
    added: list[AddedToken] = field(default_factory=list)


class Tokenizer:
    """Base of BPE, WordPiece and Unigram.

    vocab: piece → id, the pieces written as in `tokenizer.json`. Raises ValueError if two pieces
    share an id, or if a step of the pipeline is not supported.
    """

    algorithm = ""
    unk_piece: str | None = None
    byte_level = False  # the pieces are written in GPT-2's byte alphabet
    cache_size = 1 << 18

    def __init__(self, vocab: dict[str, int], pipeline: Pipeline):
        self.vocab, self.pipeline = vocab, pipeline
        self.pieces = {i: piece for piece, i in vocab.items()}
        if len(self.pieces) != len(vocab) or min(self.pieces, default=0) < 0:
            raise ValueError("two pieces of the vocabulary share an id, or an id is negative")
        for token in pipeline.added:
            if self.pieces.get(token.id, token.content) != token.content:
                piece = self.pieces[token.id]
                raise ValueError(f"the added token {token.content!r} has the id of {piece!r}")
            one_byte = token.content in CHAR_TO_BYTE and not token.content.isascii()
            if self.byte_level and one_byte and token.content in vocab:
                raise ValueError(f"the added token {token.content!r} is the piece of a byte, too")
        self.added = {token.content: token for token in pipeline.added}
        if any(self.added[token.content].id != token.id for token in pipeline.added):
            raise ValueError("one added token has two ids")
        self.pieces |= {token.id: token.content for token in pipeline.added}
        self.added_ids = {token.id: token.content for token in pipeline.added}
        self.special_ids = {token.id for token in pipeline.added if token.special}
        self.special = frozenset(token.content for token in pipeline.added if token.special)
        self.plain_added = frozenset(self.added) - self.special  # found whatever the caller allows
        # Tokens to be looked for after normalization, which matters only if there is one.
        self.late = [t for t in pipeline.added if t.normalized and pipeline.normalizer]
        self.normalize = normalizer(pipeline.normalizer)
        self.split = pre_tokenizer(pipeline.pre_tokenizer)
        self.join = decoder(pipeline.decoder)
        self.words = Cache(self.word_ids, self.cache_size)
        self.stretches = Learnt()
        self.odd_stretches = Learnt()
        self.finder = lru_cache(64)(self._finder)
        self.notes: list[str] = []  # what a file asked for and did not get, in words
        self.marked = MARK in vocab and not any(map(MARK_BORDER.search, vocab))
        self.spaced = self._spaced()

    def __len__(self) -> int:
        """One more than the highest id."""
        return max(self.pieces, default=-1) + 1

    # ---- the algorithm's part ----

    def word_ids(self, word: str) -> list[int]:
        """The ids of one word of the pre-tokenizer."""
        raise NotImplementedError

    def word_spans(self, word: str) -> list[tuple[int, int, int]]:
        """The same with the characters each token covers: (id, start, end)."""
        raise NotImplementedError

    def cut(self, word: str) -> Iterable[str]:
        """`word` in parts that can be encoded alone: cut at runs of ▁, if no piece crosses one."""
        if not self.marked or len(word) < 2:
            return [word]
        return chain.from_iterable(MARKED.findall(b) for b, _ in blocks(word, MARK_BORDER))

    def long_ids(self, word: str) -> Iterable[int]:
        """The ids of a word of any length, by looking up its parts."""
        return chain.from_iterable(map(self.words.__getitem__, self.cut(word)))

    # ---- text → ids ----

    def encode(
        self,
        text: str,
        allowed_special: Iterable[str] | str = (),
        add_special_tokens: bool = False,
    ) -> list[int]:
        """The ids of `text`.

        allowed_special: special tokens that may be recognised in the text, or "all"; any other is
        read as plain text. add_special_tokens: put the tokens of the model's template ([CLS], <s>
        …) around. Lone surrogates become U+FFFD. Raises ValueError for an unknown special token.
        """
        text, active = well_formed(text), self.allowed(allowed_special)
        ids: list[int] = []
        for part, start, token in self.parts(text, active):
            if token is not None:
                ids.append(token.id)
            else:
                found = self.plain_ids(part, start == 0, active)
                ids = ids + found if ids else found  # not +=: a long text is copied only if it must
        if add_special_tokens:
            return [*self.pipeline.prefix, *ids, *self.pipeline.suffix]
        return ids

    def encode_batch(self, texts: Iterable[str], **options) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, **options) for text in texts]

    def plain_ids(self, text: str, first: bool, active: frozenset[str]) -> list[int]:
        """The ids of text in which nothing is special."""
        if self.spaced:
            return self.spaced_ids(text)
        ids: list[int] = []
        for word, token in self.plain_words(text, first, active):
            ids.extend(self.long_ids(word) if token is None else [token.id])
        return ids

    def plain_words(
        self, text: str, first: bool, active: frozenset[str]
    ) -> Iterator[tuple[str, AddedToken | None]]:
        """The words of text in which nothing is special, and added tokens that wait till now."""
        for part, _, token in self.normalized_parts(self.normalize(text), active):
            for word in [part] if token else self.split(part, first):
                yield word, token
            first = False

    # ---- stretches between spaces ----

    def _spaced(self) -> str | None:
        """How stretches between spaces can be encoded alone: None, "words" or "context"."""
        steps = self.pipeline.pre_tokenizer or {}
        kind, normal = steps.get("type"), (self.pipeline.normalizer or {}).get("type")
        if self.late:
            return None
        if kind == "BertPreTokenizer" and normal in (None, "BertNormalizer"):
            return "words"
        if kind == "Sequence" and len(steps["pretokenizers"]) == 2:
            steps, bytes_step = steps["pretokenizers"]
            pattern = steps.get("pattern", {}).get("Regex") if isinstance(steps, dict) else None
            fits = steps.get("behavior") == "Isolated" and not steps.get("invert", False)
            plain = bytes_step.get("type") == "ByteLevel" and not bytes_step["add_prefix_space"]
            plain = plain and not bytes_step.get("use_regex", True)
        else:
            pattern, fits = PATTERNS["gpt2"], kind == "ByteLevel" and steps.get("use_regex", True)
            plain = not steps.get("add_prefix_space", True)
        known = pattern in SPACED_PATTERNS and fits and plain
        return "context" if known and normal in (None, "NFC") else None

    def stretch_ids(self, stretch: str, before: str = " ", after: str = " x") -> list[int]:
        """The ids of what stands between two spaces, the first of which belongs to it.

        The pattern may look one character ahead (`\\s+(?!\\S)`), so it is shown a next word, the
        same for all: that it begins with a space and something visible is all it can see.
        """
        if self.spaced == "words":
            words = self.split(self.normalize(stretch), False)
        else:
            words = self.split(self.normalize(before + stretch + after), False)
            words = words[:-1] if after else words
        return list(chain.from_iterable(map(self.words.__getitem__, words)))

    def spaced_ids(self, text: str) -> list[int]:
        """`plain_ids` by looking up stretches: the same ids (tested), several times faster."""
        ids: list[int] = []
        for block, last in blocks(text, LAST_SPACE):
            try:
                found = self.block_ids(block.split(" "), last, self.stretches)
            except Unseen:
                found = self.unseen_ids(block, last)
            ids += found
        return ids

    def unseen_ids(self, block: str, last: bool) -> list[int]:
        """The ids of a block with something new in it, or with a space that is no sure border."""
        parts, cache = block.split(" "), self.stretches
        if self.spaced == "context" and ODD_SPACE.search(block):
            parts, cache = stretches(block), self.odd_stretches
            with contextlib.suppress(Unseen):
                return self.block_ids(parts, last, cache)
        # the first and the last stretch of a text depend on what is beside them
        inner = parts if self.spaced == "words" else parts[1 : -1 if last else None]
        return self.block_ids(parts, last, self.learn(inner, cache))

    def learn(self, parts: list[str], cache: "Learnt") -> dict[str, tuple[int, ...]]:
        """The ids of all these stretches, those that are not in the cache worked out together."""
        known = {part: cache.get(part) for part in dict.fromkeys(parts)}  # another thread may clear
        new = [part for part, ids in known.items() if ids is None]
        if self.spaced == "words":
            found = {part: tuple(self.stretch_ids(part)) for part in new}
        else:
            found = {}
            for group in by_plane(new):
                found.update(self.new_stretches(group))
        if len(cache) + len(found) > self.cache_size:
            cache.clear()
        cache.update((part, ids) for part, ids in found.items() if len(part) <= LONGEST_KEY)
        return known | found

    def new_stretches(self, parts: list[str]) -> dict[str, tuple[int, ...]]:
        """`stretch_ids` of many stretches with one call of the pattern.

        They stand in a row, each between a space and " x", and are told apart by their lengths.
        """
        texts = [self.normalize(" " + part) for part in parts]
        words = self.split(" x".join([*texts, ""]), False)
        self.learn_words(set(words).difference(self.words))
        row, found = iter(words), {}
        for part, text in zip(parts, texts, strict=True):
            group, size = [], len(text)
            while size > 0:
                group.append(word := next(row))
                size -= len(word)
            next(row)  # the x
            ids = [self.words[word] for word in group]
            found[part] = ids[0] if len(ids) == 1 else tuple(chain.from_iterable(ids))
        return found

    def learn_words(self, words: Iterable[str]) -> None:
        """Puts many new words into the cache, where an algorithm has a way to do that at once."""

    def block_ids(self, parts: list[str], last: bool, cache: dict) -> list[int]:
        """The ids of stretches; the first has no space before it, the last of a text none after."""
        ids: list[int] = []
        extend, lookup = ids.extend, cache.__getitem__
        if self.spaced == "words":
            for found in map(lookup, parts):
                extend(found)
            return ids
        head, tail = parts[0], parts[-1] if last and len(parts) > 1 else None
        parts = parts[1:] if tail is None else parts[1:-1]
        if head:
            after = "" if last and tail is None else " x"
            extend(self.stretch_ids(head, before="", after=after))
        for found in map(lookup, parts):  # measured: faster than itertools.chain
            extend(found)
        if tail is not None:
            if cache is self.stretches and odd(tail):
                raise Unseen
            extend(self.stretch_ids(tail, after=""))
        return ids

    # ---- added tokens ----

    def allowed(self, allowed_special: Iterable[str] | str) -> frozenset[str]:
        """The added tokens that count: those that are not special, and the special ones allowed."""
        if allowed_special == "all":
            return self.plain_added | self.special
        chosen = {allowed_special} if isinstance(allowed_special, str) else set(allowed_special)
        if unknown := chosen - self.special:
            raise ValueError(f"{min(unknown)!r} is not a special token of this tokenizer")
        return self.plain_added | chosen

    def _finder(self, contents: frozenset[str], normalized: bool) -> re.Pattern | None:
        """A regex for the tokens of `contents`, longest first, that are looked for at one stage."""
        names = [t.content for t in self.pipeline.added if t.normalized == normalized]
        names = {self.normalize(n) if normalized else n: n for n in names if n in contents}
        ordered = sorted((n for n in names if n), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def parts(self, text: str, active: frozenset[str]) -> list[tuple[str, int, AddedToken | None]]:
        """`text` cut at the tokens of `allowed(…)`: (part, where it starts, the token or None).

        Those that ask for normalized text come second, here already if nothing is normalized.
        """
        parts = [(text, 0, None)] if text else []
        for late in (False,) if self.pipeline.normalizer else (False, True):
            if finder := self.finder(active, late):
                cut = (
                    [part] if part[2] else found_tokens(part[0], finder, self.added, part[1])
                    for part in parts
                )
                parts = list(chain.from_iterable(cut))
        return parts

    def normalized_parts(
        self, text: str, active: frozenset[str]
    ) -> Iterable[tuple[str, int, AddedToken | None]]:
        """The same in normalized text, for the tokens that ask for it."""
        finder = self.finder(active, True) if self.late else None
        if finder is None:
            return [(text, 0, None)]
        names = {self.normalize(t.content): t for t in self.late}
        return found_tokens(text, finder, names)

    # ---- ids → text ----

    def piece(self, i: int) -> str:
        """The piece with id `i`; raises ValueError if there is none."""
        try:
            return self.pieces[i]
        except (KeyError, TypeError):
            raise ValueError(f"id {i!r} is not in the vocabulary of {len(self)} tokens") from None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError for unknown ids."""
        ids = [i for i in ids if not (skip_special_tokens and i in self.special_ids)]
        if self.byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self.join([self.shown(i) for i in ids])

    def shown(self, i: int) -> str:
        """What the decoder gets to see of id `i`: SentencePiece hides its control tokens."""
        piece = self.piece(i)
        if i in self.special_ids and (self.pipeline.decoder or {}).get("type") == "SentencePiece":
            return UNKNOWN_TEXT if piece == self.unk_piece else ""
        return piece

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, also where they end inside a character."""
        if not self.byte_level:
            return self.decode(ids).encode("utf-8")
        return b"".join(
            self.added_ids[i].encode("utf-8")
            if i in self.added_ids
            else chars_to_bytes(self.piece(i))
            for i in ids
        )

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time and never emits half a character."""
        return StreamDecoder(self)


class StreamDecoder:
    """`feed(id)` returns the text that is certain now, `flush()` the rest.

    All that was returned, joined, is `tokenizer.decode(all ids)`. Bytes wait for the rest of their
    character. For the other decoders a run of byte pieces waits for its end, because what one of
    its bytes means may depend on the last of them.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.ids: list[int] = []  # decoded again each time: from the last id that stood for itself
        self.shown = ""  # what of their text was returned before

    def feed(self, i: int) -> str:
        if self.tokenizer.byte_level:
            return self.bytes.decode(self.tokenizer.decode_bytes([i]))
        self.ids.append(i)
        text = self.tokenizer.decode(self.ids)
        if BYTE_PIECE.fullmatch(self.tokenizer.piece(i)) or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if alone := self.tokenizer.decode([i]):
            self.ids, self.shown = [i], alone
        return new

    def flush(self) -> str:
        new = (
            self.bytes.decode(b"", final=True) + self.tokenizer.decode(self.ids)[len(self.shown) :]
        )
        self.ids, self.shown = [], ""
        return new


def blocks(text: str, border: re.Pattern, size: int = BLOCK) -> Iterator[tuple[str, bool]]:
    """`text` in blocks of at least `size`, cut where `border` matches: (block, is it the last)."""
    start = 0
    while (found := border.search(text, start + size)) if len(text) - start > size else None:
        yield text[start : found.start()], False
        start = found.start()
    yield (text[start:] if start else text), True


def odd(stretch: str) -> bool:
    """Whether nothing visible follows the space before `stretch`."""
    return not stretch or stretch[0].isspace()


def by_plane(parts: list[str]) -> list[list[str]]:
    """Texts of ASCII, of plane 0 and others apart: patterns are fastest for the first two."""
    groups: dict[str, list[str]] = {}
    for part in parts:
        groups.setdefault(plane(part), []).append(part)
    return list(groups.values())


def stretches(text: str) -> list[str]:
    """`text` cut at the spaces that are borders in every pattern of `PATTERNS`, spaces left out.

    A space is one if something visible stands before or after it. Where neither does, in a longer
    run of white space, the text from the border before to the border after the run stays together.
    """
    parts, done = [""], 0  # text[:done] is cut; a space stands at `done`, or the text begins
    for run in SPACE_IN_RUN.finditer(text):
        if run.start() < done:
            continue
        start = max(text.rfind(" ", done, run.start() - 1), done)
        found = LAST_SPACE.search(text, run.start())
        end = found.start() if found else len(text)
        if start > done:
            parts = join_parts(parts, text[done:start].split(" "))
        parts = join_parts(parts, [text[start:end]] if not start else ["", text[start + 1 : end]])
        done = end
    return join_parts(parts, text[done:].split(" ")) if done < len(text) or not done else parts


def join_parts(parts: list[str], more: list[str]) -> list[str]:
    """Two lists of stretches as that of the joined texts: the last and the first become one."""
    parts[-1] += more[0]
    parts += more[1:]
    return parts


def found_tokens(
    text: str, finder: re.Pattern, tokens: dict[str, AddedToken], shift: int = 0
) -> Iterator[tuple[str, int, AddedToken | None]]:
    """Cuts `text`, which begins at `shift`, at the matches of `finder` under the tokens' switches.

    As in tokenizers, spaces that one token took may belong to the next one as well.
    """
    end = 0
    for match in finder.finditer(text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token.single_word and (
            in_word(text[start - 1 : start]) or in_word(text[stop : stop + 1])
        ):
            continue
        if token.lstrip:
            start = max(end, len(text[:start].rstrip(SPACES)))
        if token.rstrip:
            stop = len(text) - len(text[stop:].lstrip(SPACES))
        if end < start:
            yield text[end:start], shift + end, None
        yield text[start:stop], shift + start, token
        end = stop
    if end < len(text):
        yield text[end:], shift + end, None


def in_word(char: str) -> bool:
    """Whether `char` is one of \\w."""
    return bool(char) and is_word().match(char) is not None


# ---- what the trainers share ----


def marked_pipeline() -> Pipeline:
    """SentencePiece's way: a space is ▁, one is put before the text; nothing else is changed."""
    return Pipeline(
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
            ],
        },
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )


def sentencepiece_pipeline(
    charsmap: str = "", prefix=True, collapse=False, keep: Iterable[str] = ()
) -> Pipeline:
    """SentencePiece's own normalizer and decoder, which `tokenizer.json` has no words for.

    charsmap: the base64 of a `CharsMap`; prefix: a space is put before the text; collapse: runs of
    spaces become one, and those at the ends go; keep: user-defined pieces, which the map leaves
    alone.
    """
    steps = {"type": "SentencePiece", "prefix": prefix, "collapse": collapse}
    if keep:
        steps["keep"] = list(keep)
    return Pipeline(normalizer=steps | {"charsmap": charsmap}, decoder=dict(steps))


def count_words(tokenizer: Tokenizer, text: str | Iterable[str]) -> Counter[str]:
    """How often each word of the pre-tokenizer occurs in a text, or in an iterable of documents.

    Words of a marked pipeline begin at each ▁. Documents are never joined. Special tokens in the
    text are cut out, and so is what reads like a byte's piece, <0x41>: neither may become a piece.
    """
    counts: Counter[str] = Counter()
    marked = tokenizer.pipeline.pre_tokenizer is None
    for document in [text] if isinstance(text, str) else text:
        document = BYTE_PIECE.sub(" ", well_formed(document)) if marked else well_formed(document)
        for part, start, token in tokenizer.parts(document, tokenizer.allowed("all")):
            words = [] if token else tokenizer.split(tokenizer.normalize(part), start == 0)
            counts.update(chain.from_iterable(map(WORD.findall, words)) if marked else words)
    if not counts:
        raise ValueError("there is no text to train on")
    return counts


def check_special(special: Iterable[str], learnt: Iterable[str]) -> None:
    """Raises ValueError for a special token that plain text could become."""
    if bad := {"", *learnt}.intersection(special):
        raise ValueError(f"the special token {min(bad)!r} would be a piece of plain text, too")


def check_size(vocab_size: int, least: int, what: str) -> None:
    if vocab_size < least:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {what} alone take {least}")
