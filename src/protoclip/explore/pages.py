"""The pages of an explorer, and its map; the table `PAGES` lists the pages with their needs.

Pages link to each other by relative names, so a server and a folder of files hold the same ones
(`serve.py`). Captions, ids and names are text: Jinja escapes them, and `shorten` cuts them and
makes characters visible that would turn or break a line.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, product
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from bokeh import models
from bokeh.core.properties import field
from bokeh.embed import json_item
from bokeh.palettes import Viridis256
from bokeh.plotting import figure
from bokeh.util.paths import bokehjs_path
from jinja2 import Environment
from markupsafe import Markup
from torch import Tensor

from protoclip.data.access import start_thread
from protoclip.data.pairs import Rows, evenly_spaced
from protoclip.explore.atlas import (
    LEAST_ALIKE,
    MODALITIES,
    OTHER,
    Array,
    Atlas,
    Modality,
    Movements,
    Prototype,
    find_movements,
    find_repeats,
    group_map,
    name_groups,
    share_moved_by_seed,
)
from protoclip.explore.explorer import Answer, Explorer
from protoclip.explore.pairs import ExploredPairs
from protoclip.files import read_toml
from protoclip.models.checkpoint import run_of
from protoclip.results.table import make_environment, shorten
from protoclip.terminal import visible

HERE = Path(__file__).parent
ID_LENGTH = 120  # characters of a sample id
PAGE_SIZE = 60  # pairs, or prototypes, on a page
MAP_PAIRS, FILE_PAIRS = 100_000, 10_000  # on the map; and on that of files, with an image each
ALIKE = 0.95  # default likeness from which near-duplicates are listed
FLOWS = 40  # movements between groups that are listed
READ_CAPTIONS = 2000  # captions of pairs that moved, and of those that stayed, to describe moves
MEMBERS, CAPTIONS = 4, 3  # of a prototype in the list
NAMED_BY = 20  # members nearest to the centroid, whose captions name a prototype
THUMBNAIL_SIDE, LARGE_SIDE = 160, 512  # pixels
MAP_CAPTION_LENGTH, NAME_LENGTH = 120, 40
OUTER = 0.01  # share of the points at each side that the first view may leave out
MOST_SIZE = 8  # pixels across a point
COLOURS = read_toml(HERE / "colours.toml")["colours"]
PALETTE = [colour for colour, *_ in COLOURS]  # later categories share the last one
# Bokeh escapes what it puts in the place of a column's name.
TOOLTIP = (HERE / "templates" / "tooltip.html").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A pair, as pages show it."""

    position: int
    row: int
    sample_id: str
    caption: str
    facts: Sequence[str] = ()
    prototype: tuple[str, int, str] | None = None  # modality, number, name
    others: Sequence["Card"] = ()  # pairs with the same image
    file: str = ""  # name of the image's file; empty for an image in the data
    is_again: bool = False  # whether a near-duplicate comes earlier in the data


class Pages:
    """The pages of one explorer, or of two on the same pairs.

    Attributes:
        live: A server answers queries; else pages are files, and show less.
        sites: The pages of each model.
        searches: Scripts that answer texts in pages that are files, one a model.
        thumbnail: An image of the data, by row, shrunk to a side, as WebP.
    """

    def __init__(self, explorers: Sequence[Explorer], *, live: bool = True) -> None:
        assert 1 <= len(explorers) <= 2
        self.explorers, self.live, self.pairs = explorers, live, explorers[0].pairs
        self.sites = [Site(self, number) for number in range(1, len(explorers) + 1)]
        self.searches: Sequence[bytes] = ()
        self.thumbnail = lru_cache(maxsize=4096)(self.pairs.thumbnail)

    def prepare(self) -> None:
        """Draw the maps, and prepare other pages in threads."""
        for site in self.sites:
            _ = site.map
            site.explorer.prepare()
            start_thread(partial(site.name, "image", 0), name="protoclip-names")  # makes all names

    @cached_property
    def model_names(self) -> list[str]:
        """The models for headings: the last part of a path, unless both have the same."""
        whole = [explorer.name for explorer in self.explorers]
        short = [*map(last_part, whole)]
        return [shorten(name, 60) for name in (short if len({*short}) == len(short) else whole)]

    @cached_property
    def movements(self) -> dict[str, tuple[Movements, float, str]]:
        """For each modality, the pairs that the two models group differently; the share of pairs
        whose group in the first model another seed of K-means changes; and the words that
        distinguish captions of moved pairs from those of pairs that stayed."""
        (first, second), movements = self.explorers, {}
        common = np.flatnonzero(np.isin(first.atlas.rows, second.atlas.rows))
        for modality in MODALITIES:
            moved = find_movements(first.atlas, second.atlas, modality)
            share = share_moved_by_seed(first.atlas, first.features, first.heads, modality)
            gone = moved.pairs[:, 0]
            parts = [
                part[evenly_spaced(len(part), READ_CAPTIONS, 0)]
                for part in (gone, np.setdiff1d(common, gone))
            ]
            captions = [self.pairs.caption(first.row(at)) for part in parts for at in part.tolist()]
            groups = np.repeat([0, 1], [*map(len, parts)])
            movements[str(modality)] = moved, share, name_groups(captions, groups, 2)[0]
        return movements

    def front(self) -> str:
        """The page that leads to the first model's map."""
        return str(templates().get_template("front.html").render())


def last_part(reference: str) -> str:
    """The last part of a path, with the run's name for a checkpoint; other names unchanged."""
    path = Path(reference).absolute()
    if not path.exists():
        return reference
    run = run_of(path)
    return path.name if run in (None, path) else f"{run.name}, {path.name}"


class Site:
    """The pages of one model. Each method in `PAGES` makes a page."""

    def __init__(self, pages: Pages, number: int) -> None:
        self.pages, self.number, self.live = pages, number, pages.live
        self.explorer, self.pairs = pages.explorers[number - 1], pages.pairs
        self.atlas = self.explorer.atlas

    def values(self, name: str) -> Sequence[Any]:
        """The possible values of a name in a page's path."""
        values: dict[str, Sequence[Any]] = {
            "modality": MODALITIES,
            "measure": ("distance", "loss"),
            "form": ("csv", "json"),
            "number": range(self.atlas.number),
            "position": range(len(self.atlas)),
        }
        return values[name]

    # The parts of pages.

    @cached_property
    def drawn(self) -> list[int]:
        """The pairs on the map."""
        most = MAP_PAIRS if self.live else FILE_PAIRS
        return evenly_spaced(len(self.atlas), most, 0)

    @cached_property
    def map(self) -> Markup:
        """The map as JSON for a page, in which no text ends a tag."""
        text = json.dumps(make_map(self.atlas, self.pairs, np.array(self.drawn)))
        return Markup(text.replace("<", "\\u003c"))

    @property
    def searched(self) -> tuple[str, dict[str, Tensor], list[str], list[float]]:
        """What `make_search` takes: the model, and features and captions of pairs on the map."""
        explorer = self.explorer
        searched = {"words": explorer.words[1]}
        for modality in MODALITIES:
            searched[modality] = getattr(explorer.features, modality)[self.drawn]
        captions = [self.pairs.caption(explorer.row(at)) for at in self.drawn]
        by_chance = explorer.by_chance.tolist() if explorer.words[0] else []
        return explorer.name, searched, captions, by_chance

    @property
    def below_chance(self) -> int:
        """The captions that fit their image no better than one drawn by chance."""
        return int((self.atlas.loss > self.atlas.chance).sum())

    @cached_property
    def prototypes(self) -> dict[str, list[Prototype]]:
        return {modality: self.atlas.list_prototypes(modality) for modality in MODALITIES}

    def members(self, modality: str, number: int) -> Rows:
        """The members of a prototype, those nearest to its centroid first."""
        members = np.flatnonzero(self.atlas.prototype[modality] == number)
        order = np.argsort(-self.atlas.similarity[modality][members], kind="stable")
        return members[order]

    @cached_property
    def _names(self) -> dict[str, list[str]]:
        """For each modality the names of its prototypes, by their nearest members."""
        names, number = {}, self.atlas.number
        for modality in MODALITIES:
            near = [self.members(modality, group)[:NAMED_BY].tolist() for group in range(number)]
            captions = [self.pairs.caption(self.explorer.row(at)) for at in chain(*near)]
            assignments = np.repeat(np.arange(number), [*map(len, near)])
            names[str(modality)] = name_groups(captions, assignments, number)
        return names

    def name(self, modality: str, number: int) -> str:
        """The words that distinguish a prototype's captions; empty if there are none."""
        return shorten(self._names[modality][number], 60)

    def card(self, position: int, *facts: str, others: Iterable[int] = ()) -> Card:
        """A pair, and below it others that show the same image."""
        row = self.explorer.row(position)
        return Card(
            position=position,
            row=row,
            sample_id=self.pairs.sample_id(row),
            caption=shorten(self.pairs.caption(row)),
            facts=facts,
            others=[self.card(other) for other in others],
            file=shorten(self.pairs.file_name(row), ID_LENGTH),
        )

    @cached_property
    def positions(self) -> dict[str, int]:
        """The position of each pair by its id, in lower case."""
        ids = map(self.pairs.sample_id, self.atlas.rows.tolist())
        return {sample_id.lower(): position for position, sample_id in enumerate(ids)}

    def answer_cards(self, modality: str, answer: Answer, *, explain: bool = False) -> list[Card]:
        """The images or texts of an answer, each with its cosine and perhaps an explanation. An
        image appears once, with all pairs that show it."""
        is_image, cards = modality == "image", []
        shared = answer.shared.get(modality, ())
        for place, (position, value) in enumerate(answer.images if is_image else answer.texts):
            others = self.explorer.pairs_of_image(position) if is_image else ()
            both = ", ".join(shorten(word, 40) for word in shared[place]) if shared else ""
            facts = [f"cosine {value:.3f}"] + [f"both near {both}"] * bool(both)
            card = self.card(position, *facts, others=others)
            if explain:
                number = int(self.atlas.prototype[modality][position])
                card = replace(card, prototype=(modality, number, self.name(modality, number)))
            cards.append(card)
        return cards

    def address(self, modality: str, number: int) -> str:
        """A prototype's page; among files, what `explore.js` shows in the list of its modality."""
        page = f"prototype-{modality}-{number}.html"
        return page if self.live else f"prototypes-{modality}.html#{page}"

    def group_by_image(self, modality: str, positions: Iterable[int]) -> list[list[int]]:
        """Groups of pairs that show one image; for texts a group each."""
        showing: dict[int, list[int]] = {}
        for position in positions:
            image = position if modality == "text" else int(self.atlas.images[position])
            showing.setdefault(image, []).append(position)
        return [*showing.values()]

    def render(self, name: str, title: str, *, here: str = "index.html", **values: Any) -> str:
        """A page from its template; `here` is the other model's page of the same."""
        template = templates().get_template(name)
        text: str = template.render(
            title=title,
            here=here,
            site=self,
            reference=shorten(self.explorer.name),
            model=self.pages.model_names[self.number - 1],
            models=self.pages.model_names,
            data=shorten(self.pairs.name, 60),
            **values,
        )
        return text

    # The pages.

    def index(self) -> str:
        sizes = np.sort([one.size for one in self.prototypes["image"]])[::-1]
        half = 1 + int((2 * sizes.cumsum() < sizes.sum()).sum())
        return self.render("index.html", "Map", atlas=self.atlas, half=half, alike=ALIKE)

    def prototype_list(self, modality: Modality, by: str = "size", page: int = 1) -> str:
        """Prototypes by a measure, the largest first; with a `-` before it the smallest first."""
        measure, sign = by.removeprefix("-"), 1 if by.startswith("-") else -1
        prototypes = self.prototypes[modality]
        order = np.argsort([sign * getattr(one, measure) for one in prototypes], kind="stable")
        part, paging = take_page(order, page, size=PAGE_SIZE if self.live else len(prototypes))
        rows = []
        for number in part.tolist():
            near = self.members(modality, number)[:NAMED_BY].tolist()
            cards = [self.card(position) for position in near]
            images = {first for first, *_ in self.group_by_image("image", near)[:MEMBERS]}
            captions = [*dict.fromkeys(card.caption for card in cards)][:CAPTIONS]
            shown = [card for card in cards if card.position in images]
            rows.append((prototypes[number], shown, captions))
        return self.render(
            "prototypes.html",
            f"{modality.capitalize()} prototypes",
            here=f"prototypes-{modality}.html",
            modality=modality,
            other=OTHER[modality],
            rows=rows,
            by=by,
            **paging,
        )

    def prototype(self, modality: Modality, number: int, page: int = 1) -> str:
        """The members of a prototype, in both modalities."""
        members, name = self.members(modality, number), self.name(modality, number)
        part, paging = take_page(members, page)
        similarity, other = self.atlas.similarity[modality], OTHER[modality]
        cards = [
            self.card(first, f"cosine to centroid {similarity[first]:.3f}", others=others)
            for first, *others in self.group_by_image(modality, part.tolist())
        ]
        return self.render(
            "prototype.html",
            f"{modality.capitalize()} prototype {number}" + (name and f": {name}"),
            one=self.prototypes[modality][number],
            other=other,
            partners=Counter(self.atlas.prototype[other][members].tolist()).most_common(12),
            cards=cards,
            **paging,
        )

    def ids(self, modality: Modality, number: int, form: str) -> str:
        """The sample ids of a prototype's members, as a file for `data.only` and `data.without`."""
        members = self.members(modality, number).tolist()
        return format_ids([self.pairs.sample_id(self.explorer.row(at)) for at in members], form)

    def odd(self, measure: str, page: int = 1) -> str:
        """The pairs that agree least."""
        oddest = np.argsort(-getattr(self.atlas, measure), kind="stable")
        part, paging = take_page(oddest, page)
        distance, loss = self.atlas.distance, self.atlas.loss
        cards = [
            self.card(at, f"distance {distance[at]:.3f}", f"loss {loss[at]:.2f}")
            for at in part.tolist()
        ]
        return self.render(
            "odd.html",
            "Odd ones out",
            here=f"odd-{measure}.html",
            measure=measure,
            cards=cards,
            **paging,
        )

    def duplicates(self, least: float = ALIKE, page: int = 1) -> str:
        """The near-duplicates of a likeness of `least` or more, each with all its pairs."""
        atlas = self.atlas
        listed = np.flatnonzero(np.abs(atlas.duplicate_likeness) >= least)
        part, paging = take_page(listed, page, size=PAGE_SIZE // 2)
        twins = atlas.duplicates[part].tolist()
        alike = listed[atlas.duplicate_likeness[listed] > 0]
        repeats = find_repeats(atlas.duplicates[alike].tolist())  # on all pages
        rows = []
        for value, both in zip(atlas.duplicate_likeness[part].tolist(), twins, strict=True):
            cards = [self.card(at, others=self.explorer.pairs_of_image(at)) for at in both]
            rows.append((value, [replace(c, is_again=c.position in repeats) for c in cards]))
        return self.render(
            "duplicates.html",
            "Near-duplicates",
            here="duplicates.html",
            rows=rows,
            least=least,
            least_of_all=LEAST_ALIKE,
            **paging,
        )

    def movement_page(self, modality: Modality, page: int = 1) -> str:
        """The pairs that two models group differently."""
        moved, by_seed, words = self.pages.movements[modality]
        first, second = self.pages.sites
        flows = [
            (count, (one, first.name(modality, one)), (two, second.name(modality, two)))
            for count, one, two in moved.flows[:FLOWS].tolist()
        ]
        part, paging = take_page(np.arange(len(moved.pairs)), page)
        positions = moved.pairs[part, self.number - 1].tolist()
        groups = dict(zip(positions, moved.groups[part].tolist(), strict=True))
        cards = [
            self.card(first, "group {} became {}".format(*groups[first]), others=others)
            for first, *others in self.group_by_image(modality, positions)
        ]
        return self.render(
            "moved.html",
            f"Moved {modality}s",
            here=f"moved-{modality}.html",
            modality=modality,
            moved=moved,
            by_seed=by_seed,
            flows=flows,
            words=shorten(words, 120),
            cards=cards,
            **paging,
        )

    def pair(self, position: int) -> str:
        """One pair, and the images and captions near to it."""
        row = self.explorer.row(position)
        source, index = self.pairs.locate(row)
        captions = [shorten(text) for text in source.sample_captions(index)]
        near = {str(m): self.explorer.nearest(position, m) for m in MODALITIES}
        sections = [
            (title, self.answer_cards(modality, near[query]))
            for title, modality, query in (
                ("Images near this image", "image", "image"),
                ("Captions near this image", "text", "image"),
                ("Captions near this caption", "text", "text"),
                ("Images near this caption", "image", "text"),
            )
        ]
        other = self.pages.explorers[-self.number].position(row)
        return self.render(
            "pair.html",
            "Pair",
            here="index.html" if other is None else f"pair-{other}.html",
            card=self.card(position, others=self.explorer.pairs_of_image(position)),
            captions=captions,
            origin=shorten(source.where(index), 200),
            source=shorten(source.name, 60),
            group=shorten(self.pairs.read_class(row), 80),
            distance=float(self.atlas.distance[position]),
            loss=float(self.atlas.loss[position]),
            prototypes={m: int(self.atlas.prototype[m][position]) for m in MODALITIES},
            sections=sections,
        )

    def search(self, text: str = "") -> str:
        """The images and captions nearest to a text, after the pair that it is the id of."""
        return self.answer(text, partial(self.explorer.search_text, text))

    def search_image(self, encoded: bytes) -> str:
        """The images and captions nearest to an image, which is not stored."""
        return self.answer(None, partial(self.explorer.search_image, encoded))

    def answer(self, question: str | None, find: Callable[[], Answer]) -> str:
        """The answer to a text; without one, to an image."""
        try:
            answer = find()
        except ValueError as error:
            return self.render("message.html", "Search", text=visible(f"No search: {error}."))
        here, sections = "index.html", []
        if question is not None:
            here = f"search.html?{urlencode({'text': question}, errors='replace')}"
            if (position := self.positions.get(question.strip().lower())) is not None:
                sections.append(("With this id", "image", [self.card(position)]))
        for modality, title in (("image", "Images"), ("text", "Captions")):
            sections.append((title, modality, self.answer_cards(modality, answer, explain=True)))
        return self.render(
            "search.html",
            "Search",
            here=here,
            question=None if question is None else shorten(question, 200),
            fits=answer.fits,
            words=[shorten(word, 40) for word in answer.words],
            sections=sections,
        )


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page that each model has."""

    path: str  # its name, with the names of values in braces; `Site.values` lists the values
    make: Callable[..., str]  # makes it from a site and these values
    query: Sequence[str] = ()  # names of further values that a server reads from the address
    # Whether it can be a file; else it needs the model, or would be one of too many.
    is_file: bool = True
    compares: bool = False  # whether it needs two models

    def make_files(self, site: Site) -> Iterator[tuple[str, str]]:
        """The files of this page: name and content."""
        names = re.findall(r"{(\w+)}", self.path)
        for values in product(*map(site.values, names)):
            arguments = dict(zip(names, values, strict=True))
            yield self.path.format(**arguments), self.make(site, **arguments)


PAGES = (
    Page(path="index.html", make=Site.index),
    Page(path="prototypes-{modality}.html", make=Site.prototype_list, query=("by", "page")),
    Page(path="prototype-{modality}-{number}.html", make=Site.prototype, query=("page",)),
    Page(path="ids-{modality}-{number}.{form}", make=Site.ids),
    Page(path="odd-{measure}.html", make=Site.odd, query=("page",)),
    Page(path="duplicates.html", make=Site.duplicates, query=("least", "page")),
    Page(path="moved-{modality}.html", make=Site.movement_page, query=("page",), compares=True),
    Page(path="pair-{position}.html", make=Site.pair, is_file=False),
    Page(path="search.html", make=Site.search, query=("text",), is_file=False),
)


def take_page(rows: Rows, page: int, size: int = PAGE_SIZE) -> tuple[Rows, dict[str, Any]]:
    """The rows of a page, or of the last one, and for its template `page`, from 1, and `pages`."""
    pages = max(1, -(-len(rows) // size))
    page = min(page, pages)
    return rows[(page - 1) * size : page * size], {"page": page, "pages": pages}


def format_ids(ids: Sequence[str], form: str) -> str:
    """Sample ids as a file that `data.only` and `data.without` read: `csv` or `json`."""
    if form == "json":
        return json.dumps(ids, ensure_ascii=False, indent=0)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample_id"])
    writer.writerows([sample_id] for sample_id in ids)
    return text.getvalue()


@lru_cache
def templates() -> Environment:
    environment = make_environment(HERE / "templates")
    environment.filters["short_id"] = partial(shorten, limit=ID_LENGTH)
    return environment


@lru_cache
def assets() -> dict[str, bytes]:
    """Style and scripts, by name: ours, and Bokeh's out of its package."""
    ours = [HERE / "assets" / name for name in ("explore.css", "explore.js", "search.js")]
    paths = *ours, bokehjs_path() / "js" / "bokeh.min.js"
    return {path.name: path.read_bytes() for path in paths}


# The map


def make_map(atlas: Atlas, pairs: ExploredPairs, drawn: Rows) -> dict[str, Any]:
    """The map of some pairs for the page, as JSON: the plot, the names of groups, the coarse ones
    first, and the legend of each way of colouring."""
    listed = atlas.rows[drawn].tolist()
    ids = [pairs.sample_id(row) for row in listed]
    captions = [pairs.caption(row) for row in listed]
    data: dict[str, Any] = {
        "image_x": atlas.map_position["image"][drawn, 0],
        "image_y": atlas.map_position["image"][drawn, 1],
        "text_x": atlas.map_position["text"][drawn, 0],
        "text_y": atlas.map_position["text"][drawn, 1],
        "row": np.array(listed, np.int32),
        "position": drawn.astype(np.int32),
        "caption": [shorten(caption, MAP_CAPTION_LENGTH) for caption in captions],
        "id": [shorten(sample_id, ID_LENGTH) for sample_id in ids],
        "distance": atlas.distance[drawn].astype(np.float32),
        "loss": atlas.loss[drawn].astype(np.float32),
    }
    positions = np.stack([atlas.map_position[modality][drawn] for modality in MODALITIES], axis=1)
    groups, group_names = group_map(positions, captions, data["distance"])
    ways: dict[str, Any] = {}
    colour_of = add_categories(data, ways, "group", group_names)
    ways["group"]["inks"] = [inks for _, *inks in COLOURS]
    ways["modality"] = {"kind": "modality", "labels": ["images", "texts"]}
    for modality in MODALITIES:
        numbers = atlas.prototype[modality][drawn].tolist()
        add_categories(data, ways, f"{modality} prototype", [*map(str, numbers)])
    if pairs.has_classes:
        add_categories(data, ways, "class", [*map(pairs.read_class, listed)])
    if len(pairs.sources) > 1:
        add_categories(data, ways, "source", [*map(pairs.source_name, listed)])
    for measure in ("distance", "loss"):
        values = data[measure]
        low, high = np.quantile(values, [0.01, 0.99])
        share = np.clip((values - low) / max(1e-9, high - low), 0, 1)
        data[f"by {measure}"] = (255 * share).astype(np.uint8)
        ways[measure] = {
            "kind": "range",
            "labels": [f"{low:.3g}", f"{high:.3g}"],
            "colours": list(Viridis256[::32]),
        }
    names = [
        {
            **asdict(group),
            "name": shorten(group.name, NAME_LENGTH),
            "colour": min(colour_of[group.coarse], len(PALETTE) - 1),
        }
        for group in groups
    ]
    plot = json_item(plot_points(data, positions))
    return {"plot": plot, "ways": ways, "ids": ids, "groups": names}


def add_categories(
    data: dict[str, Any], ways: dict[str, Any], name: str, values: list[str]
) -> dict[str, int]:
    """Add a way of colouring by categories, the most frequent first: those after the last colour of
    the palette share it. Returns the number of each category."""
    rank = {value: at for at, (value, _) in enumerate(Counter(values).most_common())}
    data[f"by {name}"] = np.array([rank[value] for value in values], np.int32)
    labels = [shorten(value, 40) or "none" for value in rank]
    ways[name] = {"kind": "categories", "labels": labels, "colours": PALETTE}
    return rank


def plot_points(data: dict[str, Any], positions: Array) -> Any:
    """A plot of columns `data`, with the models by name that `explore.js` colours."""
    source = models.ColumnDataSource(data, name="pairs")
    plot = figure(
        x_range=first_range(positions[..., 0]),
        y_range=first_range(positions[..., 1]),
        tools="",
        sizing_mode="stretch_both",
        min_height=320,
        toolbar_location="above",
        toolbar_sticky=False,  # else tools make room for a title, which the plot lacks
        lod_threshold=4000,
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        name="map",
    )
    plot.axis.visible = False
    plot.grid.visible = False
    glyphs: Any = [
        plot.scatter(
            f"{modality}_x",
            f"{modality}_y",
            source=source,
            name=f"{modality}s",
            marker=marker,
            # Any number of pairs covers as much of the map.
            size=float(min(MOST_SIZE, 340 / max(1, len(positions)) ** 0.5)),
            fill_color=colour,
            line_color=None,
            fill_alpha=0.7,
            nonselection_fill_alpha=0.08,
            selection_fill_alpha=1.0,
        )
        for modality, marker, colour in (
            ("image", "circle", PALETTE[0]),
            ("text", "triangle", PALETTE[1]),
        )
    ]
    zoom = models.WheelZoomTool()
    plot.add_tools(
        models.PanTool(),
        zoom,
        models.BoxSelectTool(continuous=False, renderers=glyphs),
        models.LassoSelectTool(continuous=False, renderers=glyphs),
        models.TapTool(renderers=glyphs),
        models.HoverTool(tooltips=TOOLTIP, renderers=glyphs, limit=1),
        models.ResetTool(),
    )
    plot.toolbar.active_scroll = zoom
    plot.toolbar.logo = None
    for name, palette in (("categories", PALETTE), ("range", list(Viridis256))):
        mapper = models.LinearColorMapper(palette=palette, low=0, high=len(palette) - 1, name=name)
        # A mapper reaches the page with a glyph that uses it.
        nothing = models.ColumnDataSource({"x": [], "y": [], "fill": []})
        plot.scatter("x", "y", source=nothing, fill_color=field("fill", mapper), visible=False)
    return plot


def first_range(values: Array) -> models.Range1d:
    """The first view of the map: all points except a few that lie far off."""
    low, high = np.quantile(values, [OUTER, 1 - OUTER]).tolist()
    margin = 0.06 * (high - low) or 1.0
    return models.Range1d(low - margin, high + margin)
