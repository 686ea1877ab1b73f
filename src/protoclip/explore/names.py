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
WORDS, LEAST = 3, 0.4  # in a name; each scores at least this share of what the first scores
READ = 300  # characters of a caption
PART_NEAR_MIDDLE = 4  # of a group's pairs, a quarter may be its example


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of the map.

    Attributes:
        level: 0 is the coarsest.
        coarse: The name of the coarse group that most of its pairs are in.
        x, y: The median of its points.
        example: A pair that has the first word of the name, whose image lies near the middle and
            shows, of such pairs, most clearly what its caption says.
        size: Its pairs.
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
    """The words `(w,)` of captions, and a sparse matrix of which captions have which `(n, w)`."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(binary=True, stop_words="english", token_pattern=word_pattern())
    try:
        has = counter.fit_transform([caption[:READ] for caption in captions])
    except ValueError:  # no caption has a word
        return np.array([], str), np.zeros((len(captions), 0), np.int64)
    return counter.get_feature_names_out(), has


@cache
def word_pattern() -> str:
    """Matches words, which begin with a letter, so that no number is a name. Many scripts write
    vowels as marks, which `re` counts to no word."""
    marks = [c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c).startswith("M")]
    return rf"(?u)\b[^\W\d_][\w{''.join(marks)}]+"


def name_groups(
    captions: Sequence[str], assigned: Array, number: int, *, apart: bool = False
) -> list[str]:
    """One to three words for each group, by class-based TF-IDF; empty where no word is found.

    A word scores the share of the group's captions that have it, times log(1 + A / f): f captions
    have the word, and a group has A captions on average. A word of one caption alone names a group
    only where its captions share none.

    Args:
        assigned: The group of each caption `(n,)`, in `0..number - 1`.
        apart: Leave out words that the name of a larger group has, where a group has others; but
            not a word that most of its captions have, which is what it is about.
    """
    words, has = count_words(captions)
    if not len(words):
        return [""] * number
    frequency = np.asarray(has.sum(0)).ravel()
    rarity = np.log1p(len(captions) / number / frequency)
    names, taken = [""] * number, set[str]()
    sizes = np.bincount(assigned, minlength=number)
    for group in np.argsort(-sizes, kind="stable").tolist():
        members = np.flatnonzero(assigned == group)
        having = np.asarray(has[members].sum(0)).ravel()
        score = having / max(1, len(members)) * rarity
        if (shared := having > 1).any():  # or words of one caption, which are rare, come first
            score = score * shared
        best = np.lexsort((-frequency, -score))[: 4 * WORDS]
        good = best[score[best] > LEAST * score[best[0]]]
        new = [
            word
            for word in good
            if 2 * having[word] > len(members) or not is_form_of(words[word], taken)
        ]
        chosen: list[str] = []
        for word in words[new if apart and new else good].tolist():
            if not is_form_of(word, chosen):
                chosen.append(word)
        chosen = chosen[:WORDS]
        taken.update(chosen)
        names[group] = ", ".join(chosen)
    return names


def is_form_of(word: str, others: Collection[str]) -> bool:
    """Whether a word is another one with an ending, or the other way round."""
    return any(word.startswith(other) or other.startswith(word) for other in others)


def group_map(
    map_positions: Array, captions: Sequence[str], distance: Array
) -> tuple[list[Group], list[str]]:
    """Groups of pairs that lie together, coarse ones and large ones first; and for each pair the
    name of its coarse group.

    Args:
        map_positions: Where image and text of each pair lie `(n, 2, 2)`.
        distance: Between the features of image and text of each pair `(n,)`.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    middles = map_positions.mean(1)
    most = min(max(1, len(middles) // PAIRS_PER_GROUP), len(np.unique(middles, axis=0)))
    numbers = sorted({min(most, COARSE * FINER**level) for level in range(LEVELS)})
    groups: list[Group] = []
    coarse: list[str] = []
    for level, number in enumerate(numbers):
        with warnings.catch_warnings():  # that copies are fewer groups than asked for
            warnings.simplefilter("ignore", ConvergenceWarning)
            assigned = KMeans(number, n_init=1, random_state=0).fit_predict(middles)
        names = name_groups(captions, assigned, number, apart=level == 0)
        coarse = coarse or [names[group] for group in assigned]
        sizes = np.bincount(assigned, minlength=number)
        for group in np.argsort(-sizes, kind="stable").tolist():
            members = np.flatnonzero(assigned == group)
            if not len(members):  # fewer middles differ in K-means' precision
                continue
            middle = np.median(map_positions[members].reshape(-1, 2), axis=0)
            word = names[group].partition(",")[0]
            having = [row for row in members.tolist() if word in captions[row].lower()]
            candidates = np.array(having) if having else members  # `lower` may miss a lowered word
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
