"""Words of captions: those that name a group of pairs, and those that explain a search.

Groups of the map are formed here too; prototypes, which group features, come from `atlas.py`.
"""

import unicodedata
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from protoclip.explore.atlas import Array

COARSE, FINER, LEVELS = 12, 3, 3  # 12 groups of the map, then 36, then 108
PAIRS_PER_GROUP = 8  # on average at least, so that a group's words are not those of one caption
WORDS, LEAST = 3, 0.4  # in a name; each scores at least this share of the first word's score
READ = 300  # characters of a caption
PART_NEAR_MIDDLE = 4  # of a group's pairs, a quarter may be its example


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of the map.

    Attributes:
        level: 0 is the coarsest.
        coarse: The name of the coarse group that most of its pairs are in.
        x, y: The median of its points.
        example: Among pairs near the middle whose caption has the first word of the name, the one
            whose image and caption agree best.
        size: Number of pairs.
    """

    level: int
    name: str
    coarse: str
    x: float
    y: float
    example: int
    size: int


def frequent_words(captions: Sequence[str], most: int) -> list[str]:
    """The words that most captions have, the most frequent first, without English stop words."""
    words, has = count_words(captions)
    order = np.argsort(-np.asarray(has.sum(0)).ravel(), kind="stable")[:most]
    return [str(word) for word in words[order]]


def count_words(captions: Sequence[str]) -> tuple[Array, Any]:
    """The words of captions `(w,)`, and a sparse matrix of which captions have which `(n, w)`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, stop_words="english", token_pattern=word_pattern())
    try:
        has = counter.fit_transform([caption[:READ] for caption in captions])
    except ValueError:  # no caption has a word
        return np.array([], str), np.zeros((len(captions), 0), np.int64)
    return counter.get_feature_names_out(), has


@cache
def word_pattern() -> str:
    """Matches words that begin with a letter, so that no number is a name. Many scripts write
    vowels as marks, which are no part of a word for `re`."""
    marks = [c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c).startswith("M")]
    return rf"(?u)\b[^\W\d_][\w{''.join(marks)}]+"


def name_groups(
    captions: Sequence[str], assignments: Array, number: int, *, distinct: bool = False
) -> list[str]:
    """One to three words for each group, by class-based TF-IDF; empty where no word is found.

    A word scores the share of the group's captions that have it, times log(1 + A / f): f captions
    have the word, and a group has A captions on average. A word of a single caption names a group
    only if its captions share no word.

    Args:
        assignments: The group of each caption `(n,)`, in `0..number - 1`.
        distinct: Prefer words that no larger group has in its name, or that most captions of the
            group have.
    """
    words, has = count_words(captions)
    if not len(words):
        return [""] * number
    frequency = np.asarray(has.sum(0)).ravel()
    rarity = np.log1p(len(captions) / number / frequency)
    names, used = [""] * number, set[str]()
    sizes = np.bincount(assignments, minlength=number)
    for group in np.argsort(-sizes, kind="stable").tolist():
        members = np.flatnonzero(assignments == group)
        holders = np.asarray(has[members].sum(0)).ravel()
        score = holders / max(1, len(members)) * rarity
        if (shared := holders > 1).any():  # else rare words of one caption would come first
            score = score * shared
        best = np.lexsort((-frequency, -score))[: 4 * WORDS]
        good = best[score[best] > LEAST * score[best[0]]]
        new = [
            word
            for word in good
            if 2 * holders[word] > len(members) or not is_form_of(words[word], used)
        ]
        chosen: list[str] = []
        for word in words[new if distinct and new else good].tolist():
            if not is_form_of(word, chosen):
                chosen.append(word)
        used.update(chosen[:WORDS])
        names[group] = ", ".join(chosen[:WORDS])
    return names


def is_form_of(word: str, others: Collection[str]) -> bool:
    """Whether a word is another one with an ending, or vice versa."""
    return any(word.startswith(other) or other.startswith(word) for other in others)


def group_map(
    map_positions: Array, captions: Sequence[str], distance: Array
) -> tuple[list[Group], list[str]]:
    """Groups of pairs that lie together, coarse and large ones first; and the name of each pair's
    coarse group.

    Args:
        map_positions: Positions of image and text of each pair `(n, 2, 2)`.
        distance: Distance between the features of image and text of each pair `(n,)`.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    middles = map_positions.mean(1)
    most = min(max(1, len(middles) // PAIRS_PER_GROUP), len(np.unique(middles, axis=0)))
    numbers = sorted({min(most, COARSE * FINER**level) for level in range(LEVELS)})
    groups: list[Group] = []
    coarse: list[str] = []
    for level, number in enumerate(numbers):
        with warnings.catch_warnings():  # of fewer groups than asked for, because of copies
            warnings.simplefilter("ignore", ConvergenceWarning)
            assignments = KMeans(number, n_init=1, random_state=0).fit_predict(middles)
        names = name_groups(captions, assignments, number, distinct=level == 0)
        coarse = coarse or [names[group] for group in assignments]
        sizes = np.bincount(assignments, minlength=number)
        for group in np.argsort(-sizes, kind="stable").tolist():
            members = np.flatnonzero(assignments == group)
            if not len(members):  # fewer middles differ in K-means' precision
                continue
            middle = np.median(map_positions[members].reshape(-1, 2), axis=0)
            word = names[group].partition(",")[0]
            holders = [row for row in members.tolist() if word in captions[row].lower()]
            candidates = np.array(holders) if holders else members  # `lower` may change the word
            from_middle = np.linalg.norm(map_positions[candidates, 0] - middle, axis=1)
            central = candidates[np.argsort(from_middle, kind="stable")]
            central = central[: -(-len(central) // PART_NEAR_MIDDLE)]
            groups.append(
                Group(
                    level=level,
                    name=names[group],
                    coarse=Counter(coarse[row] for row in members.tolist()).most_common(1)[0][0],
                    x=float(middle[0]),
                    y=float(middle[1]),
                    example=int(central[distance[central].argmin()]),
                    size=len(members),
                )
            )
    return groups, coarse
