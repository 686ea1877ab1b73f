"""Pages of what an explorer knows, as HTML, and the map as JSON for Bokeh.

Pages link to each other by relative names, so a server and a folder of files hold the same ones.
Captions, ids and names are text: Jinja escapes them, and `shown` cuts them and makes visible what
would turn or break a line.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import protoclip
from protoclip.data.access import begun
from protoclip.data.pairs import BadSample
from protoclip.data.sampler import evenly_spaced
from protoclip.explore.atlas import (
    LEAST_ALIKE,
    MODALITIES,
    Atlas,
    Modality,
    Moved,
    Prototype,
    moved,
    path_of,
    prototypes,
    regrouped,
)
from protoclip.explore.cards import Card, Listed, Section
from protoclip.explore.explorer import Answer, Explorer
from protoclip.explore.names import names
from protoclip.explore.neighbours import all_but_first
from protoclip.explore.pairs import ID_LENGTH, shown
from protoclip.explore.thumbnails import thumbnail
from protoclip.files import read_sealed, sealed, to_json, write_atomically
from protoclip.models.saved import run_of
from protoclip.terminal import say, visible

PAGE_SIZE = 60  # pairs, or prototypes, on a page
ALIKE = 0.95  # likeness from which near-duplicates are listed, unless one asks for others
FLOWS = 40  # movements between groups that are listed
READ_CAPTIONS = 2000  # of pairs that moved, and of those that stayed, to name what moved
MEMBERS, CAPTIONS = 4, 3  # of a prototype in the list
NAMED_BY = 20  # members nearest to the centroid, whose captions name a prototype
MAP_FORM = 4  # raised when `map.py` draws maps otherwise, so that kept ones are drawn again
Codes = npt.NDArray[np.uint8]
Files = dict[str, bytes]


class NoSuchPage(LookupError):
    """A page beyond the last one."""


@dataclass(frozen=True, eq=False)
class Pages:
    """The pages of one explorer, or of two on the same pairs.

    Attributes:
        live: A server answers questions; else pages are files, and show less.
    """

    explorers: Sequence[Explorer]
    live: bool = True

    def __post_init__(self) -> None:
        assert 1 <= len(self.explorers) <= 2

    def site(self, number: int) -> "Site":
        """The pages of a model, counted from 1."""
        return self._sites[number - 1]

    @cached_property
    def _sites(self) -> "list[Site]":
        return [Site(self, number) for number in range(1, len(self.explorers) + 1)]

    @cached_property
    def model_names(self) -> list[str]:
        """The models for headings: of a path the last part, unless both have the same."""
        whole = [explorer.name for explorer in self.explorers]
        short = [*map(last_part, whole)]
        return [shown(name, 60) for name in (short if len({*short}) == len(short) else whole)]

    @cached_property
    def image(self) -> Callable[[int, int], bytes]:
        """An image of the data, by row, shrunk to a side, as WebP."""
        pairs = self.explorers[0].pairs
        return lru_cache(maxsize=4096)(lambda row, side: thumbnail(pairs, row, side))

    def make_umaps(self) -> "Future[None] | None":
        """Begin to make maps by UMAP, where those by PCA are shown; None if there are none."""
        waiting = [site for site in self._sites if site.explorer.make_umap is not None]
        if not waiting:
            return None
        for site in waiting:
            site.umap_done = 0.0

        def make_all() -> None:
            for site in waiting:
                site.make_umap()

        return begun(make_all, name="protoclip-umap")

    def moved(self, modality: str) -> Moved:
        return self._moved[modality]

    @cached_property
    def _moved(self) -> dict[str, Moved]:
        first, second = (explorer.atlas for explorer in self.explorers)
        return {modality: moved(first, second, modality) for modality in MODALITIES}

    @cached_property
    def moved_by_seed(self) -> dict[str, float]:
        """The share of pairs whose group in the first model another seed of K-means changes."""
        first = self.explorers[0]
        again = regrouped(first.atlas, first.features(), first.heads)
        return {
            modality: len(moved(first.atlas, again, modality).pairs) / len(again)
            for modality in MODALITIES
        }

    def moved_words(self, modality: str) -> str:
        """The words that set captions of what moved apart from those of what stayed."""
        return self._moved_words[modality]

    @cached_property
    def _moved_words(self) -> dict[str, str]:
        (first, second), words = self.explorers, {}
        common = np.flatnonzero(np.isin(first.atlas.rows, second.atlas.rows))
        for modality in MODALITIES:
            gone = self.moved(modality).pairs[:, 0]
            chosen = [
                part
                if len(part) <= READ_CAPTIONS
                else part[evenly_spaced(len(part), READ_CAPTIONS, 0)]
                for part in (gone, np.setdiff1d(common, gone))
            ]
            captions = [
                first.pairs.caption(first.row(each)) for part in chosen for each in part.tolist()
            ]
            words[str(modality)] = names(captions, np.repeat([0, 1], [*map(len, chosen)]), 2)[0]
        return words

    def front(self) -> str:
        """The page that leads to the first model's map."""
        return str(template("front.html").render())


def last_part(reference: str) -> str:
    """The last part of a path, after that of its run for a checkpoint; other names are whole."""
    path = Path(reference).absolute()
    if not path.exists():
        return reference
    run = run_of(path)
    return path.name if run in (None, path) else f"{run.name}, {path.name}"


class Site:
    """The pages of one model."""

    def __init__(self, pages: Pages, number: int) -> None:
        self.pages, self.number, self.live = pages, number, pages.live
        self.explorer = pages.explorers[number - 1]
        self.atlas, self.pairs = self.explorer.atlas, self.explorer.pairs
        self.umap_done: float | None = None  # share, while the map by UMAP is made
        self.umap_failed = ""
        self._drawn: tuple[Atlas, str] | None = None  # a map as JSON, and what it shows
        self.on_card: Callable[[int], object] = lambda row: None  # told which images are shown

    def make_umap(self) -> None:
        """Make the map by UMAP, and show it from then on; that by PCA is shown meanwhile."""
        make = self.explorer.make_umap
        if make is None:
            return

        def done(share: float) -> None:
            self.umap_done = share

        try:
            atlas = make(done)
            self._drawn = atlas, self._draw(atlas)
            self.atlas = atlas
        except Exception as error:  # pages work on, with the map that there is
            self.umap_failed = visible(str(error))
            say(f"warning: the map stays that by PCA, since UMAP failed ({self.umap_failed})")
        self.umap_done = None

    def map_state(self) -> str:
        """How the map is made, and how far a better one is, as JSON."""
        state = {"layout": self.atlas.layout, "done": self.umap_done, "failed": self.umap_failed}
        return json.dumps(state)

    # What pages are made of.

    @cached_property
    def prototypes(self) -> dict[str, list[Prototype]]:
        return {modality: prototypes(self.atlas, modality) for modality in MODALITIES}

    @cached_property
    def _members(self) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """For each modality all pairs by prototype, the nearest first; and where each begins."""
        members = {}
        for modality in MODALITIES:
            assigned = self.atlas.prototype(modality)
            order = np.lexsort((-self.atlas.similarity(modality), assigned))
            starts = np.searchsorted(assigned[order], np.arange(self.atlas.number + 1))
            members[str(modality)] = order.astype(np.int64), starts.astype(np.int64)
        return members

    def members(self, modality: str, number: int) -> npt.NDArray[np.int64]:
        """The members of a prototype, those nearest to its centroid first."""
        order, starts = self._members[modality]
        return order[starts[number] : starts[number + 1]]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """For each modality the names of its prototypes, by their nearest members."""
        by_modality = {}
        for modality in MODALITIES:
            nearest = [self.members(modality, each)[:NAMED_BY] for each in range(self.atlas.number)]
            captions = [
                self.pairs.caption(self.explorer.row(int(position)))
                for members in nearest
                for position in members
            ]
            assigned = np.repeat(np.arange(self.atlas.number), [len(each) for each in nearest])
            by_modality[str(modality)] = names(captions, assigned, self.atlas.number)
        return by_modality

    def name(self, modality: str, number: int) -> str:
        """The words that set a prototype's captions apart; empty if there are none."""
        return shown(self._names[modality][number], 60)

    def listed(self, position: int) -> Listed:
        row = self.explorer.row(position)
        caption = shown(self.pairs.caption_or_reason(row))
        return Listed(sample_id=self.pairs.sample_id(row), caption=caption)

    def card(self, position: int, *facts: str, others: Iterable[int] = ()) -> Card:
        """A pair, and below it others that show the same image."""
        row, pair = self.explorer.row(position), self.listed(position)
        self.on_card(row)
        return Card(
            position=position,
            row=row,
            sample_id=pair.sample_id,
            caption=pair.caption,
            facts=facts,
            file=shown(self.pairs.file_name(row), ID_LENGTH),
            others=[self.listed(other) for other in others],
        )

    def by_image(self, positions: Iterable[int]) -> list[list[int]]:
        """Pairs, those that show the same image together, at the place of the first of them."""
        showing: dict[str, list[int]] = {}
        for position in positions:
            showing.setdefault(self.explorer.image_key(position), []).append(position)
        return [*showing.values()]

    def together(self, modality: str, positions: Sequence[int]) -> list[list[int]]:
        """Pairs by image; of texts each by itself, whatever image it has."""
        return self.by_image(positions) if modality == "image" else [[each] for each in positions]

    def different_images(self, positions: Iterable[int], number: int) -> list[int]:
        """The first of these pairs, of each image one; no more images are looked at than needed."""
        found: dict[str, int] = {}
        for position in positions:
            if len(found) == number:
                break
            found.setdefault(self.explorer.image_key(position), position)
        return [*found.values()]

    def id_shown(self, sample_id: str) -> str:
        return shown(sample_id, ID_LENGTH)

    def cards(self, modality: str, answer: Answer) -> list[Card]:
        """The images or texts of an answer; an image stands once, with the pairs that show it."""
        nearest, sharing = answer.texts, dict[int, Sequence[int]]()
        if modality == "image":
            nearest, sharing = answer.images, dict(answer.sharing)
        return [
            self.card(position, f"cosine {value:.3f}", others=sharing.get(position, ()))
            for position, value in nearest
        ]

    def found(self, modality: str, answer: Answer) -> list[Card]:
        """The same, each with why it is among them."""
        cards = self.cards(modality, answer)
        found, shared = [], answer.shared.get(modality) or [()] * len(cards)
        for card, words in zip(cards, shared, strict=True):
            why = [f"both near {', '.join(shown(word, 40) for word in words)}"] if words else []
            number = int(self.atlas.prototype(modality)[card.position])
            prototype = (modality, number, self.name(modality, number))
            found.append(replace(card, facts=[*card.facts, *why], prototype=prototype))
        return found

    def page(self, name: str, title: str, *, here: str = "index.html", **values: Any) -> str:
        """A page from its template; `here` is where the other model shows the same."""
        text: str = template(name).render(
            title=title,
            here=here,
            site=self,
            reference=shown(self.explorer.name),
            model=self.pages.model_names[self.number - 1],
            models=self.pages.model_names,
            data=shown(self.pairs.name, 60),
            shown=shown,
            modalities=MODALITIES,
            **values,
        )
        return text

    # The pages.

    def index(self) -> str:
        atlas = self.atlas
        empty = {m: sum(not each.size for each in self.prototypes[m]) for m in MODALITIES}
        out = len(self.pairs) - len(atlas)
        return self.page(
            "index.html",
            "Map",
            atlas=atlas,
            empty=empty,
            left_out=out,
            duplicates=int((atlas.duplicate_likeness >= ALIKE).sum()),
        )

    @property
    def map(self) -> str:
        """The map, as JSON: what Bokeh draws, and the ways to colour it."""
        atlas, drawn = self.atlas, self._drawn  # another thread may put others in their place
        if drawn is None or drawn[0] is not atlas:
            drawn = self._drawn = atlas, self._draw(atlas)
        return drawn[1]

    def _draw(self, atlas: Atlas) -> str:
        """The map of an atlas, which is kept beside it: Bokeh takes most of a second."""
        path = self._map_path(atlas)
        with suppress(OSError, ValueError):
            if path is not None:
                return str(read_sealed(path)["map"])
        from protoclip.explore.map import map_json

        made = json.dumps(map_json(atlas, self.pairs))
        with suppress(OSError):  # it is drawn again the next time
            if path is not None:
                write_atomically(path, to_json(sealed({"map": made})))
        return made

    def _map_path(self, atlas: Atlas) -> Path | None:
        """Where the map is kept; the name says all that it is made of."""
        if self.explorer.kept is None:
            return None
        shows = [(source.name, source.class_column) for source in self.pairs.sources]
        parts = (
            self.explorer.kept.stem,
            atlas.layout,
            protoclip.__version__,
            MAP_FORM,
            version("bokeh"),
            shows,
        )
        return path_of(self.explorer.kept.parent, *parts).with_suffix(".map.json")

    @property
    def map_in_page(self) -> Markup:
        """The map for a page that is a file, which may fetch nothing; no text in it ends a tag."""
        return Markup(self.map.replace("<", "\\u003c"))

    def prototype_list(self, modality: Modality, by: str = "size", page: int = 1) -> str:
        """Prototypes by a measure, the largest first; behind a `-` the smallest first."""
        measure, sign = by.removeprefix("-"), 1 if by.startswith("-") else -1
        every = self.prototypes[modality]
        order = np.argsort([sign * getattr(one, measure) for one in every], kind="stable")
        part, pages = paged(order, page, size=PAGE_SIZE if self.live else len(every))
        rows = []
        for each in (every[number] for number in part):
            nearest = self.members(modality, each.number)[:NAMED_BY].tolist()
            cards = [self.card(one) for one in self.different_images(nearest, MEMBERS)]
            captions = [*dict.fromkeys(self.listed(one).caption for one in nearest)][:CAPTIONS]
            rows.append((each, cards, captions))
        return self.page(
            "prototypes.html",
            f"{modality.capitalize()} prototypes",
            here=f"prototypes-{modality}.html",
            modality=modality,
            rows=rows,
            by=by,
            page=page,
            pages=pages,
        )

    def prototype(self, modality: Modality, number: int, page: int = 1) -> str:
        """The members of a prototype, in both modalities."""
        one, members = self.prototypes[modality][number], self.members(modality, number)
        name = self.name(modality, number)
        other = "text" if modality == "image" else "image"
        partners = Counter(self.atlas.prototype(other)[members].tolist()).most_common(12)
        part, pages = paged(members, page)
        similarity = self.atlas.similarity(modality)
        cards = [
            self.card(first, f"cosine to centroid {similarity[first]:.3f}", others=others)
            for first, *others in self.together(modality, part.tolist())
        ]
        return self.page(
            "prototype.html",
            f"{modality.capitalize()} prototype {number}" + (name and f": {name}"),
            one=one,
            other=other,
            partners=partners,
            cards=cards,
            page=page,
            pages=pages,
        )

    @cached_property
    def _oddest(self) -> dict[str, npt.NDArray[np.int64]]:
        return {
            by: np.argsort(-getattr(self.atlas, by), kind="stable").astype(np.int64)
            for by in ("distance", "loss")
        }

    def odd(self, by: Literal["distance", "loss"], page: int = 1) -> str:
        """The pairs that agree least."""
        part, pages = paged(self._oddest[by], page)
        cards = [
            self.card(
                int(each),
                f"distance {self.atlas.distance[each]:.3f}",
                f"loss {self.atlas.loss[each]:.2f}",
            )
            for each in part
        ]
        return self.page(
            "odd.html",
            "Odd ones out",
            here=f"odd-{by}.html",
            by=by,
            cards=cards,
            page=page,
            pages=pages,
        )

    @cached_property
    def _copies(self) -> set[str]:
        """Images in the data of which each row that holds one counts as an image of its own."""
        twins = [[*map(self.explorer.image_key, both)] for both in self.atlas.duplicates.tolist()]
        return {one for one, other in twins if one == other}

    def duplicates(self, least: float = ALIKE, page: int = 1) -> str:
        """The images that are at least so much alike, each with all its pairs."""
        atlas = self.atlas
        listed = np.flatnonzero(atlas.duplicate_likeness >= least)
        part, pages = paged(listed, page, size=PAGE_SIZE // 2)
        twins = atlas.duplicates[part].tolist()
        sharing = self.explorer.sharing([*chain(*twins)]) if twins else {}
        again = all_but_first(atlas.duplicates[listed].tolist())  # also by those of other pages

        def whole(position: int) -> Card:
            is_copy = self.explorer.image_key(position) in self._copies
            card = self.card(position, others=() if is_copy else sharing[position])
            return replace(card, is_again=position in again)

        rows = [
            (float(value), [*map(whole, both)])
            for value, both in zip(atlas.duplicate_likeness[part], twins, strict=True)
        ]
        return self.page(
            "duplicates.html",
            "Near-duplicates",
            here="duplicates.html",
            rows=rows,
            least=least,
            least_of_all=LEAST_ALIKE,
            page=page,
            pages=pages,
        )

    def moved(self, modality: Modality, page: int = 1) -> str:
        """What two models group differently."""
        movements = self.pages.moved(modality)
        first, second = self.pages.site(1), self.pages.site(2)
        flows = [
            (count, (one, first.name(modality, one)), (two, second.name(modality, two)))
            for count, one, two in movements.flows[:FLOWS].tolist()
        ]
        part, pages = paged(np.arange(len(movements.pairs)), page)
        positions = movements.pairs[part, self.number - 1].tolist()
        groups = dict(zip(positions, movements.groups[part].tolist(), strict=True))
        cards = [
            self.card(first, "group {} became {}".format(*groups[first]), others=others)
            for first, *others in self.together(modality, positions)
        ]
        return self.page(
            "moved.html",
            f"Moved {modality}s",
            here=f"moved-{modality}.html",
            modality=modality,
            moved=movements,
            by_seed=self.pages.moved_by_seed[modality],
            flows=flows,
            words=shown(self.pages.moved_words(modality), 120),
            cards=cards,
            page=page,
            pages=pages,
        )

    def pair(self, position: int) -> str:
        """One pair, and what is near to it."""
        row = self.explorer.row(position)
        source, index = self.pairs.locate(row)
        try:
            captions = [shown(text) for text in source.sample_captions(index)]
        except BadSample as error:
            captions = [shown(str(error))]
        nearest = {str(m): self.explorer.nearest(position, m) for m in MODALITIES}
        sections = [
            Section(title=title, cards=self.cards(modality, nearest[of]))
            for title, modality, of in (
                ("Images near this image", "image", "image"),
                ("Captions near this image", "text", "image"),
                ("Captions near this caption", "text", "text"),
                ("Images near this caption", "image", "text"),
            )
        ]
        other = self.pages.explorers[-self.number].position(row)
        return self.page(
            "pair.html",
            "Pair",
            here="index.html" if other is None else f"pair-{other}.html",
            card=self.card(position, others=self.explorer.sharing([position])[position]),
            captions=captions,
            origin=shown(source.where(index), 200),
            source=shown(source.name, 60),
            group=shown(self.pairs.class_of(row), 80),
            distance=float(self.atlas.distance[position]),
            loss=float(self.atlas.loss[position]),
            prototypes={m: int(self.atlas.prototype(m)[position]) for m in MODALITIES},
            sections=sections,
        )

    def answer(self, question: str | None, answer: Answer) -> str:
        """What is nearest to a text; or, without one, to an image, which was not kept."""
        note = "" if self.explorer.space("image").exact else "By an index, so some may be missed."
        sections = [
            Section(title=title, cards=self.found(modality, answer), note=note)
            for modality, title in (("image", "Images"), ("text", "Captions"))
        ]
        here, asked = "index.html", None
        if question is not None:
            here = f"search.html?{urlencode({'text': question}, errors='replace')}"
            asked = shown(question, 200)
        words = [shown(word, 40) for word in answer.words]
        return self.page(
            "search.html", "Search", here=here, question=asked, words=words, sections=sections
        )

    def message(self, title: str, text: str) -> str:
        return self.page("message.html", title, text=visible(text))

    def ids(self, modality: str, number: int) -> list[str]:
        """The sample ids of a prototype's members."""
        members = self.members(modality, number)
        return [self.pairs.sample_id(self.explorer.row(int(each))) for each in members]


def paged(
    rows: npt.NDArray[np.int64], page: int, size: int = PAGE_SIZE
) -> tuple[npt.NDArray[np.int64], int]:
    """The rows of a page, counted from 1, and how many there are; `NoSuchPage` beyond the last."""
    pages = max(1, -(-len(rows) // size))
    if page > pages:
        raise NoSuchPage(f"page {page} of {pages}")
    return rows[(page - 1) * size : page * size], pages


def ids_as(ids: Iterable[str], kind: Literal["csv", "json"]) -> str:
    """Sample ids as a file for `data.only` and `data.without`."""
    if kind == "json":
        return json.dumps(list(ids), ensure_ascii=False, indent=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample_id"])
    writer.writerows([each] for each in ids)
    return text.getvalue()


@lru_cache
def environment() -> Environment:
    return Environment(
        loader=PackageLoader("protoclip.explore"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def template(name: str) -> Any:
    return environment().get_template(name)


@lru_cache
def assets() -> Files:
    """Style and scripts, by name: ours, and Bokeh's out of its package."""
    bokeh = find_spec("bokeh")  # not imported, which takes time
    assert bokeh is not None
    assert bokeh.origin is not None
    folder = files("protoclip.explore") / "assets"
    ours = {name: (folder / name).read_bytes() for name in ("explore.css", "explore.js")}
    bokeh_js = Path(bokeh.origin).parent / "server" / "static" / "js" / "bokeh.min.js"
    return {**ours, "bokeh.min.js": bokeh_js.read_bytes()}
