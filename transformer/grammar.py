"""A synchronous grammar: one set of rules that writes a sentence in two languages at once.

    rules ──draw──▶ tree ──▶ English sentence x
                     └─────▶ Indonesian sentences y, each with its probability p(y|x)

An ordinary context-free grammar replaces a symbol by words and further symbols until only words are
left. In a synchronous one (Aho and Ullman 1969) each rule has two right sides with the same
symbols, so both languages grow from one tree, and each may put its parts in another order:

    group  →  <adjective> <noun>  |  <noun> <adjective>          red hat | topi merah

Which tree is drawn is up to the weights of the rules. The Indonesian side has choices of its own,
written (usual|rare): the rare way is taken once in `1 / RARE` times. So one English sentence has
several translations, and no model can know which one stands in the corpus. How much that costs is
known exactly: −log p(y|x) is the loss of the best model that can be, our floor.

How a rule is written:

    <name>       a slot, replaced by what the symbol `name` grows into; <name'> is a second one
    word:a+b     an Indonesian word that translates the rule's English words a and b
    word         an Indonesian word that translates nothing in particular
    +nya         is written without a space before it: buku +nya is bukunya, and so is "+."
    (one|two)    the usual and the rare way; either may be empty

What is left out: no rule may lead back to its own symbol, so the grammar has no recursion and every
sum in here is finite. Standard library only.
"""

import bisect
import itertools
import math
import random
import re
from dataclasses import dataclass
from functools import cached_property

RARE = 0.05  # probability of the second way of a choice
PUNCTUATION = ",.?"
MANY = 100_000  # more translations of one sentence than this are not enumerated


# ── Rules ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Token:
    """A word of the Indonesian side, or a slot, and the English words of the rule it translates."""

    text: str
    sources: tuple[int, ...] = ()  # places in the rule's English side


@dataclass(frozen=True)
class Rule:
    """One way to replace a symbol. `ways` are (probability, Indonesian side), and sum to 1.

    pair: two slots whose words make a combination, such as an adjective with its noun. The rule's
    own `lemma` (dictionary form) stands in place of a slot that is "".
    """

    symbol: str
    weight: float  # relative to the other rules of the symbol
    english: tuple[str, ...]
    ways: tuple[tuple[float, tuple[Token, ...]], ...]
    lemma: str = ""
    pair: tuple[str, ...] = ()

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The slots in English order."""
        return tuple(token for token in self.english if is_slot(token))


def is_slot(token: str) -> bool:
    return token.startswith("<")


def symbol_of(slot: str) -> str:
    """The symbol that a slot stands for: <noun'> for noun."""
    return slot.strip("<>'")


def ways_of(side: str) -> list[tuple[float, str]]:
    """All ways through the choices of a side: "a (b|c)" gives (1 − RARE, "a b"), (RARE, "a c")."""
    choice = re.search(r"\(([^|()]*)\|([^|()]*)\)", side)
    if not choice:
        return [(1.0, side)]
    ways = []
    for share, text in ((1 - RARE, choice[1]), (RARE, choice[2])):
        rest = ways_of(side[: choice.start()] + text + side[choice.end() :])
        ways += [(share * probability, way) for probability, way in rest]
    return ways


def read_side(side: str, english: tuple[str, ...]) -> tuple[Token, ...]:
    """The Indonesian side of a rule as tokens. ValueError for a source word that is not there."""
    tokens = []
    for item in side.split():
        word, _, sources = item.partition(":")
        places = tuple(english.index(source) for source in sources.split("+") if source)
        tokens.append(Token(word, places))
    return tuple(tokens)


# ── Trees and spelling ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Tree:
    """A rule, and for each of its slots in English order the tree that fills it."""

    rule: Rule
    children: tuple["Tree", ...]

    def child(self, slot: str) -> "Tree":
        return self.children[self.rule.slots.index(slot)]

    def english(self) -> list[str]:
        """The English words, before spelling."""
        left, words = iter(self.children), []
        for token in self.rule.english:
            words += next(left).english() if is_slot(token) else [token]
        return words

    def head(self) -> str:
        """Dictionary form of the main word: of the noun, in a noun phrase; "" if there is none."""
        if self.rule.lemma or not self.children:
            return self.rule.lemma
        if self.rule.pair:  # an adjective with its noun
            return self.child(self.rule.pair[-1]).head()
        return next(filter(None, (child.head() for child in self.children)), "")

    def combinations(self) -> set[tuple[str, str]]:
        """The pairs of words that belong together: (adjective, noun) and (verb, its object)."""
        found = set().union(*(child.combinations() for child in self.children))
        if self.rule.pair:
            first, second = (
                self.child(slot).head() if slot else self.rule.lemma for slot in self.rule.pair
            )
            found |= {(first, second)} if first and second else set()
        return found


@dataclass(frozen=True)
class Translation:
    """One way to say a tree in Indonesian. sources[j]: places of the English tokens of word j."""

    probability: float
    words: tuple[str, ...]
    sources: tuple[frozenset[int], ...]

    @property
    def target(self) -> str:
        """The sentence, if the tree was that of a whole one."""
        return capital(" ".join(self.words))


def translations_of(tree: Tree, start: int = 0) -> list[Translation]:
    """All ways to say a tree whose English begins at token `start`, glued words joined.

    ValueError for more than MANY.
    """
    places, at, children = [], start, iter(tree.children)
    filled = {}  # the translations of each slot
    for token in tree.rule.english:
        places.append(at)
        if is_slot(token):
            child = next(children)
            filled[token] = translations_of(child, at)
            at += len(child.english())
        else:
            at += 1
    found = []
    for share, way in tree.rule.ways:
        options = [filled[t.text] if is_slot(t.text) else [one_word(t, places)] for t in way]
        if math.prod(map(len, options)) > MANY:
            raise ValueError(f"more than {MANY} translations")
        found += [joined(share, parts) for parts in itertools.product(*options)]
    return found


def one_word(token: Token, places: list[int]) -> Translation:
    """A word of a rule whose English tokens stand at `places`."""
    return Translation(1.0, (token.text,), (frozenset(places[i] for i in token.sources),))


def joined(share: float, parts: tuple[Translation, ...]) -> Translation:
    """The parts one after another; what begins with + goes to the word before it."""
    words, sources = [], []
    for word, origin in ((w, s) for p in parts for w, s in zip(p.words, p.sources, strict=True)):
        if word.startswith("+") and words:
            words[-1] += word[1:]
            sources[-1] |= origin
        else:
            words.append(word)
            sources.append(origin)
    probability = share * math.prod(part.probability for part in parts)
    return Translation(probability, tuple(words), tuple(sources))


def spell(words: list[str]) -> str:
    """English words as a sentence: capital letter, `an` before a vowel, "+." at the word's end."""
    spelled = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("+"):
            spelled[-1] += word[1:]
        else:
            spelled.append("an" if word == "a" and following[:1] in tuple("aeiou") else word)
    return capital(" ".join(spelled))


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


# ── The grammar ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Pair:
    """A sentence in both languages. alignment: (English word, Indonesian word), counted from 0.

    Words are what stands between spaces, so a full stop belongs to the word before it.
    """

    source: str
    target: str
    alignment: tuple[tuple[int, int], ...]
    tree: Tree


class Grammar:
    """Rules by symbol; "sentence" is where every tree starts."""

    def __init__(self):
        self.rules: dict[str, list[Rule]] = {}

    def add(self, symbol, english, indonesian, weight=1.0, lemma="", pair=()) -> None:
        """Add a rule. ValueError if a side names a word or a slot that the other lacks."""
        tokens = tuple(english.split())
        ways = [(share, read_side(side, tokens)) for share, side in ways_of(indonesian)]
        for _, way in ways:
            slots = [token.text for token in way if is_slot(token.text)]
            if sorted(slots) != sorted(t for t in tokens if is_slot(t)) or not tokens:
                raise ValueError(f"{symbol}: {english!r} and {indonesian!r} have other slots")
        rule = Rule(symbol, weight, tokens, tuple(ways), lemma, tuple(pair))
        self.rules.setdefault(symbol, []).append(rule)

    @cached_property
    def totals(self) -> dict[str, float]:
        """The sum of the weights of each symbol's rules."""
        return {symbol: sum(r.weight for r in rules) for symbol, rules in self.rules.items()}

    @cached_property
    def heaps(self) -> dict[str, list[float]]:
        """The weights of each symbol's rules, each added to those before it."""
        return {s: list(itertools.accumulate(r.weight for r in rs)) for s, rs in self.rules.items()}

    @cached_property
    def words(self) -> frozenset[str]:
        """All English words, as the rules write them."""
        every = (token for rules in self.rules.values() for rule in rules for token in rule.english)
        return frozenset(token for token in every if not is_slot(token))

    # Drawing

    def draw_tree(self, dice: random.Random, symbol: str = "sentence") -> Tree:
        """A tree, with the probability that the weights of its rules give it."""
        heap = self.heaps[symbol]
        rule = self.rules[symbol][bisect.bisect_right(heap, dice.random() * heap[-1])]
        return Tree(rule, tuple(self.draw_tree(dice, symbol_of(slot)) for slot in rule.slots))

    def draw_pair(self, dice: random.Random, tree: Tree) -> Pair:
        """The English sentence of a tree, and one of its translations drawn by p(y|x)."""
        ways = translations_of(tree)
        way = dice.choices(ways, [w.probability for w in ways])[0]
        return Pair(spell(tree.english()), way.target, aligned(tree, way), tree)

    def draw(self, dice: random.Random) -> Pair:
        """A pair of sentences: the English by the weights, the Indonesian by p(y|x)."""
        return self.draw_pair(dice, self.draw_tree(dice))

    # Reading

    @cached_property
    def firsts(self) -> dict[str, frozenset[str]]:
        """The words that each symbol can begin with."""
        found = {}

        def first(symbol):
            if symbol not in found:
                begin = (rule.english[0] for rule in self.rules[symbol])
                sets = (first(symbol_of(b)) if is_slot(b) else {b} for b in begin)
                found[symbol] = frozenset().union(*sets)
            return found[symbol]

        for symbol in self.rules:
            first(symbol)
        return found

    def tokens(self, source: str) -> list[str] | None:
        """The words of a sentence as the rules write them, or None if it is misspelled."""
        found = []
        for word in source.split():
            bare = word.rstrip(PUNCTUATION)
            found += [bare, *("+" + mark for mark in word[len(bare) :])]
        found = ["a" if word == "an" else word for word in found]
        if found and found[0] not in self.words:
            found[0] = "a" if found[0] == "An" else found[0].lower()
        known = found and self.words.issuperset(found)
        return found if known and spell(found) == source else None

    def trees(self, source: str) -> list[Tree]:
        """All trees that spell a sentence; [] if the grammar cannot say it."""
        tokens = self.tokens(source)
        if tokens is None:
            return []
        known = {}

        def grow(symbol, start):
            """[(end, tree)] for the symbol from `start`."""
            if (symbol, start) not in known:
                known[symbol, start] = [
                    (end, Tree(rule, children))
                    for rule in self.rules[symbol]
                    for end, children in follow(rule.english, start)
                ]
            return known[symbol, start]

        def follow(items, at):
            """[(end, children)] for a rest of a right side from `at`."""
            if not items:
                return [(at, ())]
            if at == len(tokens):
                return []
            if not is_slot(items[0]):
                return follow(items[1:], at + 1) if items[0] == tokens[at] else []
            if tokens[at] not in self.firsts[symbol_of(items[0])]:
                return []
            return [
                (end, (tree, *others))
                for middle, tree in grow(symbol_of(items[0]), at)
                for end, others in follow(items[1:], middle)
            ]

        return [tree for end, tree in grow("sentence", 0) if end == len(tokens)]

    # Probabilities

    def tree_probability(self, tree: Tree) -> float:
        """The product of the shares of its rules."""
        own = tree.rule.weight / self.totals[tree.rule.symbol]
        return own * math.prod(map(self.tree_probability, tree.children))

    def translations(self, source: str) -> dict[str, float]:
        """Every translation of a sentence with p(y|x), the likeliest first; {} for no sentence.

        p(y|x) = Σ p(tree) p(y|tree) / Σ p(tree) over the trees that spell x. Nothing is assumed of
        how many trees or ways there are, so this is exact for an ambiguous sentence as well.
        """
        trees = self.trees(source)
        total = math.fsum(map(self.tree_probability, trees))
        found = {}
        for tree in trees:
            share = self.tree_probability(tree) / total
            for way in translations_of(tree):
                found[way.target] = found.get(way.target, 0.0) + share * way.probability
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def log_prob(self, source: str, target: str) -> float:
        """log p(y|x) in nats, exact; −inf for what the grammar cannot say."""
        probability = self.translations(source).get(target, 0.0)
        return math.log(probability) if probability else -math.inf

    def entropy(self, source: str) -> float:
        """H(y | this x) in nats: the mean of −log p(y|x) over the translations of one sentence."""
        return -math.fsum(p * math.log(p) for p in self.translations(source).values())

    def expected_entropy(self, symbol: str = "sentence") -> float:
        """H(y|x) in nats, the mean over all sentences that the grammar draws.

            H(symbol) = Σ over its rules p(rule) [ H(ways of the rule) + Σ over its slots H(slot) ]

        True where every sentence has one tree and every tree tells its ways apart, as ours does:
        the tests hold it against enumeration.
        """
        known = {}

        def entropy(symbol):
            if symbol not in known:
                terms = (rule.weight * below(rule) for rule in self.rules[symbol])
                known[symbol] = math.fsum(terms) / self.totals[symbol]
            return known[symbol]

        def below(rule):
            ways = -math.fsum(p * math.log(p) for p, _ in rule.ways)
            return ways + math.fsum(entropy(symbol_of(slot)) for slot in rule.slots)

        return entropy(symbol)

    def best(self, source: str) -> str:
        """The likeliest translation. ValueError for what the grammar cannot say."""
        found = self.translations(source)
        if not found:
            raise ValueError(f"the grammar cannot say {source!r}")
        return next(iter(found))

    def align(self, source: str, target: str) -> list[tuple[int, int]] | None:
        """The gold alignment of a pair, as in `Pair`, by its likeliest tree; None for no pair."""
        best = max(
            (
                (self.tree_probability(tree) * way.probability, aligned(tree, way))
                for tree in self.trees(source)
                for way in translations_of(tree)
                if way.target == target
            ),
            default=None,
        )
        return list(best[1]) if best else None


def aligned(tree: Tree, way: Translation) -> tuple[tuple[int, int], ...]:
    """The alignment of a tree with one of its translations, in words."""
    word_of, number = [], -1
    for token in tree.english():
        number += not token.startswith("+")  # what is glued on is no word of its own
        word_of.append(number)
    links = {(word_of[i], j) for j, places in enumerate(way.sources) for i in places}
    return tuple(sorted(links))
