"""How good is a translation? BLEU, chrF and, for attention, the alignment error rate.

    bleu    how many of the words, and of the sequences of 2, 3 and 4 words, are in the reference
    chrf    the same for sequences of 1 to 6 characters, so a wrong ending costs less than a word
    alignment_error_rate    how far predicted links between words are from the true ones

All of them look at a whole test set at once: the counts are added up over its sentences first. The
numbers are those of sacrebleu with its defaults (Post 2018, arXiv:1804.08771), which is what papers
report, to nine decimals; the tests compare them. One reference for a sentence. Standard library
only.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORD_ORDER = 4  # BLEU looks at sequences of up to so many words
CHAR_ORDER = 6  # chrF at so many characters
BETA = 2  # chrF counts recall BETA times as much as precision

ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
APART = re.compile(r"([ -&(-+:-@\[-`{-~/])")  # ASCII marks but for ' , - and .
STOPS = (
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # a point or comma is a token unless it stands
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),  # between digits, as in 3.14
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # and a dash is one behind a digit
)


def tokenize_13a(text: str) -> list[str]:
    """The tokens that BLEU counts: words and punctuation marks, as NIST's mteval-v13a cuts them."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        text = text.replace(entity, character)
    text = APART.sub(r" \1 ", f" {text} ")
    for pattern, replacement in STOPS:
        text = pattern.sub(replacement, text)
    return text.split()


def ngrams(items: Sequence, n: int) -> Counter:
    """How often each sequence of n items occurs. items: text, or a tuple of words."""
    return Counter(items[i : i + n] for i in range(len(items) - n + 1))


def check_lengths(hypotheses: Sequence, references: Sequence) -> None:
    """ValueError unless there is one reference for each hypothesis, and at least one."""
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(
            f"{len(hypotheses)} hypotheses and {len(references)} references: "
            "as many of both are needed, and at least one"
        )


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, Eq. (1) to (3) of Papineni et al. 2002 (aclanthology.org/P02-1040).

        BLEU = 100 · min(1, exp(1 − r/c)) · (p₁ p₂ p₃ p₄)^¼

    p_n: the share of the hypotheses' sequences of n words that are in their reference, where none
    counts more often than it stands there. c and r: words of all hypotheses and all references; who
    says less than the reference is punished for it, since leaving out the doubtful raises every p.
    The k-th p that is 0 is replaced by 1 / (2ᵏ · its denominator), method 3 of Chen and Cherry 2014
    (aclanthology.org/W14-3346); if no word is right at all, BLEU is 0.

    Equals 100 for the references themselves, if one of them has four words. ValueError for lists of
    different lengths or empty ones.
    """
    check_lengths(hypotheses, references)
    right, total, n_word, n_reference = [0] * WORD_ORDER, [0] * WORD_ORDER, 0, 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, true = tuple(tokenize_13a(hypothesis)), tuple(tokenize_13a(reference))
        n_word, n_reference = n_word + len(ours), n_reference + len(true)
        for n in range(1, WORD_ORDER + 1):
            right[n - 1] += (ngrams(ours, n) & ngrams(true, n)).total()
            total[n - 1] += max(0, len(ours) - n + 1)
    if not any(right):
        return 0.0
    brevity = min(0.0, 1 - n_reference / n_word)  # log of the penalty
    return 100 * math.exp(brevity) * geometric_mean(smoothed(right, total))


def smoothed(right: list[int], total: list[int]) -> list[float]:
    """right / total, where a 0 is replaced as in `bleu`. No sequence of n words at all counts 0."""
    shares, halving = [], 1
    for r, t in zip(right, total, strict=True):
        if t and not r:
            halving *= 2
        shares.append((r or 1 / halving) / t if t else 0.0)
    return shares


def geometric_mean(shares: list[float]) -> float:
    """The n-th root of the product; 0 if one of them is 0."""
    if not all(shares):
        return 0.0
    return math.exp(math.fsum(map(math.log, shares)) / len(shares))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2, 0 to 100: Popović 2015 (aclanthology.org/W15-3049), with β = 2.

        chrF = 100 · (1 + β²) · P R / (β² P + R)

    P: the share of the hypotheses' sequences of n characters that are in their reference, the mean
    over n = 1 … 6; R: the share of the references' sequences that are in the hypothesis. White
    space is taken out first. An n for which one side has no sequence at all is left out of both
    means. ValueError as in `bleu`.
    """
    check_lengths(hypotheses, references)
    counts = [[0, 0, 0] for _ in range(CHAR_ORDER)]  # ours, the reference's, in both
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        ours, true = ("".join(text.split()) for text in (hypothesis, reference))
        for n, count in enumerate(counts, start=1):
            n_true = max(0, len(true) - n + 1)
            # as sacrebleu has it: a hypothesis counts where its reference is long enough
            count[0] += max(0, len(ours) - n + 1) if n_true else 0
            count[1] += n_true
            count[2] += (ngrams(ours, n) & ngrams(true, n)).total()
    used = [count for count in counts if count[0] and count[1]]
    precision = sum(both / ours for ours, _, both in used) / max(1, len(used))
    recall = sum(both / true for _, true, both in used) / max(1, len(used))
    if not precision + recall:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def alignment_error_rate(predicted: Iterable, gold: Iterable) -> float:
    """1 − 2 |A ∩ G| / (|A| + |G|), 0 (all links right) to 1: Och and Ney 2003, §5.2.

    predicted, gold: for each sentence its links (source word, target word); both lists are as long.
    The links of all sentences are counted together. All gold links are sure ones (their S = P).
    ValueError for lists of different lengths; 0 if there is no link in either.
    """
    ours, true = [set(map(tuple, links)) for links in predicted], [set(map(tuple, g)) for g in gold]
    both = sum(len(a & g) for a, g in zip(ours, true, strict=True))
    n_link = sum(map(len, ours)) + sum(map(len, true))
    return 1 - 2 * both / n_link if n_link else 0.0
