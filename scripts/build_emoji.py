"""Build the bundled emoji data: one concept, drawn in seven styles, with captions.

The art comes from seven `@iconify-json` packages and the words from `emojibase-data` (CLDR short
names and keywords), all at the exact versions in `PACKAGES`. Every emoji outside the `component`
group is a concept; skin tones are left out. Each drawing of a concept is a sample: a 64 x 64
image on white, and a caption that is the CLDR name followed by zero to three of the concept's
tags, drawn once per sample as web captions would vary.

Splits never part a *family*, so that no near-duplicate crosses them. A family is closed under:

* the same first code point (a gender, hair or direction variant, a keycap, flags of one initial);
* the same name once words of gender, age, hair and direction are dropped (man cook, woman cook and
  cook; left arrow and right arrow), which joins all of man, woman and person;
* all but the same image in any one style (new moon and black circle).

The territories in `SAME_FLAG`, whose flag is that of another concept, are left out: as families
they would chain nearly all initials into one.

The same packages give the same bytes (the files at hand: resvg_py 0.5.0, Pillow 13.0.0, pyarrow
26.0.1):

    python scripts/build_emoji.py [--cache FOLDER] [--out src/protoclip/data/emoji]
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fxemoji": "1.2.2",
    "emojibase-data": "17.0.0",
}
STYLES = tuple(name.split("/")[1] for name in PACKAGES if "/" in name)
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}
SIZE = 64
QUALITY = 82  # of the images that are smaller lossy than lossless; about 8 MB in all
ALIKE = 0.05  # images that differ by less, relative to their ink, are the same
SEED = 0

# Bouvet Island, Clipperton Island, Diego Garcia, Ceuta & Melilla, Heard & McDonald Islands,
# St. Martin, Svalbard & Jan Mayen, U.S. Outlying Islands, Wallis & Futuna.
SAME_FLAG = frozenset(
    "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in code)
    for code in ("bv", "cp", "dg", "ea", "hm", "mf", "sj", "um", "wf")
)

# The sets that say which code points their icons draw; the others share their vocabulary of names.
CHARTED = ("noto", "twemoji", "fluent-emoji-flat")
SIBLING = {"noto-v1": "noto", "fluent-emoji": "fluent-emoji-flat"}

# What icons draw where their names do not say, or say something else: the CLDR name, or nothing
# for a drawing that is broken or of another thing.
OWN_NAMES = {
    "noto-v1": {"cricket": "cricket game"},
    "emojione": {
        "cricket": "cricket game",
    },
    "fluent-emoji-flat": {
        "backhand-index-pointing-right": "backhand index pointing right",
        "white-square-button": "",
    },
    "fxemoji": {
        "2hearts": "two hearts",
        "americasglobe": "globe showing Americas",
        "anger": "anger symbol",
        "angry": "angry face",
        "anguish": "anguished face",
        "anticlockwiseupwardsanddownwardsarrows": "counterclockwise arrows button",
        "aok": "OK hand",
        "arrowrightwardsdownwards": "right arrow curving down",
        "arrowrightwardsupwards": "right arrow curving up",
        "asiaaustraliaglobe": "globe showing Asia-Australia",
        "backwithleftwardsarrow": "BACK arrow",
        "banknotedollar": "dollar banknote",
        "banknoteeuro": "euro banknote",
        "banknotepound": "pound banknote",
        "banknoteyen": "yen banknote",
        "beachumbrella": "beach with umbrella",
        "bellcancellation": "bell with slash",
        "blackdownpointingdoublearrow": "fast down button",
        "blackleftpointingarrow": "reverse button",
        "blackleftpointingdoublearrow": "fast reverse button",
        "blackquestionmark": "red question mark",
        "blackrightpointingarrow": "play button",
        "blackrightpointingdoublearrow": "fast-forward button",
        "blackskullcrossbones": "skull and crossbones",
        "blackuppointingdoublearrow": "fast up button",
        "blonde": "person: blond hair",
        "bolt": "high voltage",
        "bookmarktab": "bookmark tabs",
        "boot": "woman’s boot",
        "bow": "ribbon",
        "bowing": "person bowing",
        "bride": "person with veil",
        "bunny": "rabbit face",
        "bunny-ears": "people with bunny ears",
        "bunnyside": "rabbit",
        "cat": "cat face",
        "catside": "cat",
        "cellphone": "mobile phone",
        "chartdownwardstrend": "chart decreasing",
        "chartupwardstrend": "chart increasing",
        "chartupwardstrendyen": "chart increasing with yen",
        "chilipepper": "hot pepper",
        "chineseflag": "flag: China",
        "cjkunifiedideograph-a": "Japanese “reserved” button",
        "cjkunifiedideograph-b": "Japanese “open for business” button",
        "cjkunifiedideograph-c": "Japanese “prohibited” button",
        "cjkunifiedideograph-d": "Japanese “vacancy” button",
        "cjkunifiedideograph-e": "Japanese “passing grade” button",
        "cjkunifiedideograph-f": "Japanese “no vacancy” button",
        "cjkunifiedideograph-g": "Japanese “not free of charge” button",
        "cjkunifiedideograph-h": "Japanese “monthly amount” button",
        "cjkunifiedideograph-i": "Japanese “free of charge” button",
        "cjkunifiedideograph-j": "Japanese “application” button",
        "cjkunifiedideograph-k": "Japanese “discount” button",
        "clap": "clapping hands",
        "clock12oclock": "twelve o’clock",
        "clock12thirty": "twelve-thirty",
        "clock1oclock": "one o’clock",
        "clock1thirty": "one-thirty",
        "clock2oclock": "two o’clock",
        "clock2thirty": "two-thirty",
        "clock3oclock": "three o’clock",
        "clock3thirty": "three-thirty",
        "clock4oclock": "four o’clock",
        "clock4thirty": "four-thirty",
        "clock5thirty": "five-thirty",
        "clock6oclock": "six o’clock",
        "clock6thirty": "six-thirty",
        "clock7oclock": "seven o’clock",
        "clockwisedownupcircledarrows": "clockwise vertical arrows",
        "clockwiserightwardsleftwardscirclearrows": "repeat button",
        "clockwiserightwardsleftwardscirclearrowsone": "repeat single button",
        "closedmailboxlowered": "closed mailbox with lowered flag",
        "closedmailboxraised": "closed mailbox with raised flag",
        "coldsweat": "anxious face with sweat",
        "confetti": "confetti ball",
        "confounded": "confounded face",
        "confused": "confused face",
        "construct": "construction worker",
        "construction": "building construction",
        "constructionsign": "construction",
        "contact": "bust in silhouette",
        "contact2": "busts in silhouette",
        "controlknob": "control knobs",
        "cop": "police officer",
        "couple": "couple with heart",
        "couplekiss": "",
        "crying": "crying face",
        "darksunglasses": "sunglasses",
        "dash": "dashing away",
        "devilhorns": "smiling face with horns",
        "diamondshapewithdotinside": "diamond with a dot",
        "disappointed": "disappointed face",
        "dissapointedrelief": "sad but relieved face",
        "dog": "dog face",
        "dogside": "dog",
        "doubleexclaimationmark": "double exclamation mark",
        "down": "backhand index pointing down",
        "downpointingsmallredtrisngle": "downwards button",
        "dragonhead": "dragon face",
        "dragonside": "dragon",
        "eightspokedasterix": "eight-spoked asterisk",
        "endwithleftwardsarrow": "END arrow",
        "envelopedownarrowabove": "envelope with arrow",
        "europeafricaglobe": "globe showing Europe-Africa",
        "evergreen": "evergreen tree",
        "exclaimationquestionmark": "exclamation question mark",
        "expressionless": "expressionless face",
        "fallingleaf": "fallen leaf",
        "fearful": "fearful face",
        "fishcakeswirl": "fish cake with swirl",
        "fistedhand": "oncoming fist",
        "flexbicep": "flexed biceps",
        "floppydisk2": "floppy disk",
        "flushed": "flushed face",
        "fog": "",
        "forkknife": "fork and knife with plate",
        "franceflag": "flag: France",
        "frontfacingchick": "front-facing baby chick",
        "frown": "person frowning",
        "frownmouth": "frowning face with open mouth",
        "gem": "gem stone",
        "girlgirl": "women holding hands",
        "girlguy": "woman and man holding hands",
        "gma": "old woman",
        "gpa": "old man",
        "greatbritainflag": "flag: United Kingdom",
        "grimacing": "grimacing face",
        "grinsquint": "grinning squinting face",
        "grinsweat": "grinning face with sweat",
        "grintears": "face with tears of joy",
        "guapimao": "person with skullcap",
        "guyguy": "men holding hands",
        "halo": "smiling face with halo",
        "hampster": "hamster",
        "hand": "raised hand",
        "hands": "open hands",
        "handup": "person raising hand",
        "headmassage": "person getting massage",
        "heartarrow": "heart with arrow",
        "hearteyes": "smiling face with heart-eyes",
        "heartgreen": "green heart",
        "heartpurple": "purple heart",
        "heartribbon": "heart with ribbon",
        "heartyellow": "yellow heart",
        "heavyexclaimationmarksymbol": "red exclamation mark",
        "heavylatincross": "latin cross",
        "heavymultiplicationsymbol": "multiply",
        "heels": "high-heeled shoe",
        "high5": "raising hands",
        "highbrightness": "bright button",
        "highspeedtrainbulletnose": "bullet train",
        "hourglassflowingsand": "hourglass not done",
        "hushed": "hushed face",
        "index": "index pointing up",
        "italianflag": "flag: Italy",
        "japaneseangrymask": "goblin",
        "japanflag": "flag: Japan",
        "keyboard": "",
        "kiss": "kissing face",
        "kissclosedeyes": "kissing face with closed eyes",
        "kisseyes": "kissing face with smiling eyes",
        "kissing": "face blowing a kiss",
        "koreaflag": "flag: South Korea",
        "leaffluttering": "leaf fluttering in wind",
        "left": "backhand index pointing left",
        "leftmagnifyingglass": "magnifying glass tilted left",
        "leftwritinghand": "writing hand",
        "leopardside": "leopard",
        "lockandkey": "locked with key",
        "loudlycrying": "loudly crying face",
        "lowbrightness": "dim button",
        "mahjong": "mahjong red dragon",
        "makeupbag": "clutch bag",
        "manltepiececlock": "mantelpiece clock",
        "mansshirt": "t-shirt",
        "medicalmask": "face with medical mask",
        "mensrunner": "running shoe",
        "mensshoe": "man’s shoe",
        "meridianglobe": "globe with meridians",
        "monkeyhear": "hear-no-evil monkey",
        "monkeysee": "see-no-evil monkey",
        "monkeyspeak": "speak-no-evil monkey",
        "mouse": "mouse face",
        "mouseside": "mouse",
        "negativesquaredlatincaptiala": "A button (blood type)",
        "negativesquaredlatincaptialb": "B button (blood type)",
        "negativesquaredlatincaptialo": "O button (blood type)",
        "neutral": "neutral face",
        "nogesture": "person gesturing NO",
        "nomouth": "face without mouth",
        "nooneunder18symbol": "no one under eighteen",
        "notebookdecorativecover": "notebook with decorative cover",
        "okgesture": "person gesturing OK",
        "onarrowleftright": "ON! arrow",
        "openmailboxlowered": "open mailbox with lowered flag",
        "openmailboxraised": "open mailbox with raised flag",
        "openmouth": "face with open mouth",
        "outbox": "outbox tray",
        "pensive": "pensive face",
        "perservere": "persevering face",
        "phonerightarrowleft": "mobile phone with arrow",
        "pig": "pig face",
        "pigside": "pig",
        "pigsnout": "pig nose",
        "pinkwallet": "purse",
        "poo": "pile of poo",
        "potablewatersystem": "potable water",
        "pout": "person pouting",
        "pouting": "enraged face",
        "pray": "folded hands",
        "present": "wrapped gift",
        "racecar": "racing car",
        "raincloud": "cloud with rain",
        "raisedhandpartfingers": "vulcan salute",
        "raisedhandsfingerssplayed": "hand with fingers splayed",
        "relieved": "relieved face",
        "reminder": "reminder ribbon",
        "reversehandmiddlefinger": "middle finger",
        "right": "backhand index pointing right",
        "rightmagnifyingglass": "magnifying glass tilted right",
        "running": "person running",
        "russianflag": "flag: Russia",
        "saggitarius": "Sagittarius",
        "sandals": "woman’s sandal",
        "screamfear": "face screaming in fear",
        "silhouetteohjapan": "map of Japan",
        "sixpointedstarwithdot": "dotted six-pointed star",
        "sleeping": "sleeping face",
        "sleepy": "sleepy face",
        "sleuthspy": "detective",
        "smallfrown": "slightly frowning face",
        "smallsmile": "slightly smiling face",
        "smileeyes": "smiling face with smiling eyes",
        "smiletongue": "face savoring food",
        "smirk": "smirking face",
        "snowcloud": "cloud with snow",
        "snowmountains": "snow-capped mountain",
        "soonwithrightarrow": "SOON arrow",
        "spanishflag": "flag: Spain",
        "speaker3soundwaves": "speaker high volume",
        "speakercancellation": "muted speaker",
        "speakeronesoundwave": "speaker medium volume",
        "speechbubble": "speech balloon",
        "spurtingwhale": "spouting whale",
        "squaredup": "UP! button",
        "stormcloud": "cloud with lightning",
        "studiomic": "studio microphone",
        "sunglasses": "smiling face with sunglasses",
        "sunraincloud": "sun behind rain cloud",
        "sunrays": "sun",
        "sweat": "downcast face with sweat",
        "sweatsplash": "sweat droplets",
        "swimming": "person swimming",
        "telephonereceiver2": "telephone receiver",
        "ten": "keycap: 10",
        "tennisball": "tennis",
        "thoughtbaloon": "thought balloon",
        "tie": "necktie",
        "tiger": "tiger face",
        "tigerside": "tiger",
        "tired": "tired face",
        "tongueout": "face with tongue",
        "tongueoutwink": "winking face with tongue",
        "tongueoutwink2": "squinting face with tongue",
        "topwithupwardsarrow": "TOP arrow",
        "toykotower": "Tokyo tower",
        "tramcar": "",
        "triumph": "face with steam from nose",
        "turban": "person wearing turban",
        "unamused": "unamused face",
        "up": "backhand index pointing up",
        "uppointingsmallredtrisngle": "upwards button",
        "videocasette": "videocassette",
        "waitress": "person tipping hand",
        "walking": "person walking",
        "waningbibbousmoon": "waning gibbous moon",
        "wave": "water wave",
        "waving": "waving hand",
        "weary": "weary face",
        "whiteexclaimationmark": "white exclamation mark",
        "whitesunsmallcloud": "sun behind small cloud",
        "winking": "winking face",
        "wiredkeyboard": "keyboard",
        "womansshirt": "woman’s clothes",
        "worried": "worried face",
    },
}

# What a name loses before two names are compared: who it shows, their hair, and the direction.
VARIANT = re.compile(
    r"person with crown|\b(man|woman|person): .*"
    r"|\b(m[ae]n|wom[ae]n|boy|girl|child|person|people|adult|old(er)?|prince(ss)?"
    r"|santa|mrs|mx|(left|right|up|down)(wards?)?|facing)\b"
)


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as a lower-case key without FE0F, and its words."""

    key: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str


def normalized(hexcode: str) -> str:
    """The key of a code-point sequence: lower case, variation selectors dropped."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def fetch_packages(cache: Path) -> Path:
    """Install the pinned packages into `cache` unless they are there; return their folder."""
    modules = cache / "node_modules"
    wanted = [
        f"{name}@{version}"
        for name, version in PACKAGES.items()
        if not (manifest := modules / name / "package.json").exists()
        or json.loads(manifest.read_text())["version"] != version
    ]
    if wanted:
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]
        subprocess.run([*command, str(cache), *wanted], check=True)
    return modules


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_concepts(modules: Path) -> dict[str, Concept]:
    """Every emoji outside `component`, in Unicode's order, by key."""
    data = modules / "emojibase-data"
    names = read_json(data / "meta/groups.json")
    entries = [e for e in read_json(data / "en/data.json") if "group" in e]  # else a bare letter
    concepts = [
        Concept(
            key=normalized(entry["hexcode"]),
            label=entry["label"],
            tags=tuple(entry.get("tags", ())),
            group=names["groups"][str(entry["group"])],
            subgroup=names["subgroups"][str(entry["subgroup"])],
        )
        for entry in sorted(entries, key=lambda entry: entry["order"])
    ]
    return {c.key: c for c in concepts if c.group != "component" and c.key not in SAME_FLAG}


class IconSet:
    """One style's icons, as an Iconify package holds them."""

    def __init__(self, modules: Path, style: str) -> None:
        folder = modules / "@iconify-json" / style
        self.data = read_json(folder / "icons.json")
        self.chart = {normalized(c): name for c, name in read_json(folder / "chars.json").items()}

    def names(self) -> Iterator[str]:
        """The icons that are on show, then their other names."""
        yield from (n for n, icon in self.data["icons"].items() if not icon.get("hidden"))
        yield from self.data.get("aliases", {})

    def drawing(self, name: str) -> tuple[str, bool]:
        """The icon behind a name, and whether it is mirrored."""
        alias = self.data.get("aliases", {}).get(name, {})
        return alias.get("parent", name), alias.get("hFlip", False)

    def svg(self, name: str) -> str:
        """The drawing as an SVG file of its own; a non-square one is centred in the square."""
        parent, mirrored = self.drawing(name)
        icon = self.data["icons"][parent]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self.data.get("width", 16))
        height = icon.get("height", self.data.get("height", 16))
        body = icon["body"]
        if mirrored:
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{body}</svg>'
        )


def squashed(name: str) -> str:
    """A name as the sets agree on it: letters and digits only, `flag-for-x` as `flag: x`."""
    name = unicodedata.normalize("NFKD", name.lower()).replace("&", "and")
    return re.sub(r"^flagfor(flag)?", "flag", re.sub(r"[^a-z0-9]", "", name))


def vocabularies(
    sets: Mapping[str, IconSet], concepts: Mapping[str, Concept], modules: Path, style: str
) -> list[dict[str, str]]:
    """What a name of `style` may mean, most trusted first: squashed name to concept key."""
    charts = [sets[s] for s in sorted(CHARTED, key=lambda s: s != SIBLING.get(style))]
    formal = read_json(modules / "emojibase-data/meta/unicode-names.json")
    named = [
        {squashed(name): key for key, name in s.chart.items() if key in concepts} for s in charts
    ]
    aliased = [
        {
            squashed(alias): found[squashed(entry["parent"])]
            for alias, entry in s.data.get("aliases", {}).items()
            if squashed(entry["parent"]) in found and not entry.get("hFlip")
        }
        for s, found in zip(charts, named, strict=True)
    ]
    return [
        *named,
        *aliased,
        {squashed(c.label): c.key for c in concepts.values()},
        {squashed(name): normalized(c) for c, name in formal.items() if normalized(c) in concepts},
    ]


def match_icons(
    sets: Mapping[str, IconSet], concepts: Mapping[str, Concept], modules: Path, style: str
) -> dict[str, str]:
    """The icon that draws each concept in `style`."""
    icons = sets[style]
    own = OWN_NAMES.get(style, {})
    keys = {concept.label: key for key, concept in concepts.items()}
    matches = {keys[label]: name for name, label in own.items() if label}
    if style in CHARTED:
        charted = {c: n for c, n in icons.chart.items() if c in concepts and n not in own}
        return charted | matches
    used = {icons.drawing(name) for name in own}  # a drawing shows one concept only
    names = list(icons.names())
    for vocabulary in vocabularies(sets, concepts, modules, style):
        for name in names:
            key = vocabulary.get(squashed(name))
            if key and key not in matches and icons.drawing(name) not in used:
                matches[key] = name
                used.add(icons.drawing(name))
    return matches


def render(svg: str) -> Image.Image:
    """The drawing at SIZE x SIZE on white. Text is never drawn, so fonts cannot change it."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def webp(image: Image.Image) -> bytes:
    """The smaller of the lossless and the lossy file; flat art is often smaller lossless."""
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "WEBP", lossless=True, method=6)
    image.save(lossy, "WEBP", quality=QUALITY, method=6)
    return min(exact.getvalue(), lossy.getvalue(), key=len)


def alike(images: Mapping[str, Image.Image]) -> list[tuple[str, str]]:
    """Pairs of concepts that one style draws all but the same, compared as 16 x 16 thumbnails."""
    keys = list(images)
    thumbs = [image.resize((16, 16), Image.Resampling.BOX) for image in images.values()]
    ink = 255.0 - np.stack([np.asarray(thumb, np.float64).ravel() for thumb in thumbs])
    square = (ink**2).sum(axis=1)
    distance = square[:, None] + square - 2 * ink @ ink.T
    first, second = np.nonzero(np.triu(distance < ALIKE**2 * np.minimum.outer(square, square), 1))
    return [(keys[i], keys[j]) for i, j in zip(first, second, strict=True)]


def families(
    concepts: Mapping[str, Concept], same: Iterable[Iterable[str]]
) -> dict[str, list[str]]:
    """Group concept keys into families (see the module's docstring); `same` are equal images."""
    parent = {key: key for key in concepts}

    def root(key: str) -> str:
        while parent[key] != key:
            key = parent[key]
        return key

    links: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for key, concept in concepts.items():
        links["point", key.split("-")[0]].append(key)
        words = re.findall(r"\w+", VARIANT.sub(" ", concept.label.lower()))
        links["name", *words].append(key)
    for first, *others in [*links.values(), *(list(keys) for keys in same)]:
        for other in others:
            parent[root(other)] = root(first)
    found: dict[str, list[str]] = defaultdict(list)
    for key in concepts:
        found[root(key)].append(key)
    return {members[0]: members for members in found.values()}


def assign_splits(concepts: Mapping[str, Concept], kin: Mapping[str, list[str]]) -> dict[str, str]:
    """Give each family a split, near FRACTIONS within every subgroup.

    A family that would fill a tenth of the test split goes to train. The others are taken subgroup
    by subgroup in an order drawn from SEED, each to the split that is furthest behind its share.
    """
    rng = random.Random(SEED)
    large = 0.02 * len(concepts)
    splits = {key: "train" for keys in kin.values() if len(keys) > large for key in keys}
    rest = [keys for keys in kin.values() if len(keys) <= large]
    due = {split: share * len(concepts) for split, share in FRACTIONS.items()}
    due["train"] -= len(splits)
    share = {split: count / sum(due.values()) for split, count in due.items()}

    rng.shuffle(rest)
    order = {c.subgroup: i for i, c in enumerate(concepts.values())}
    rest.sort(key=lambda keys: order[concepts[keys[0]].subgroup])
    given = Counter[str]()
    seen = 0
    for keys in rest:
        seen += len(keys)
        behind = {split: share[split] * seen - given[split] for split in share}
        split = max(behind, key=lambda split: behind[split])
        given[split] += len(keys)
        splits.update(dict.fromkeys(keys, split))
    return splits


def caption(concept: Concept, sample_id: str) -> str:
    """The label and zero to three tags, drawn by the sample's own generator."""
    rng = random.Random(f"{SEED}/{sample_id}")
    tags = [tag for tag in concept.tags if tag.lower() != concept.label.lower()]
    return ", ".join([concept.label, *rng.sample(tags, min(rng.randint(0, 3), len(tags)))])


def build(modules: Path) -> pa.Table:
    """The whole table, ordered by concept in Unicode's order and then by style."""
    concepts = read_concepts(modules)
    sets = {style: IconSet(modules, style) for style in STYLES}
    icons = {style: match_icons(sets, concepts, modules, style) for style in STYLES}
    images = {
        (style, key): render(sets[style].svg(icons[style][key]))
        for key in concepts
        for style in STYLES
        if key in icons[style]
    }
    same = [
        pair
        for style in STYLES
        for pair in alike({key: image for (s, key), image in images.items() if s == style})
    ]
    kin = families(concepts, same)
    splits = assign_splits(concepts, kin)
    for style in STYLES:
        print(f"{style}: {len(icons[style])} of {len(concepts)} concepts")
    rows = [
        {
            "sample_id": (sample_id := f"{style}/{key}"),
            "image": webp(image),
            "caption": caption(concepts[key], sample_id),
            "label": concepts[key].label,
            "tags": list(concepts[key].tags),
            "style": style,
            "concept": key,
            "group": concepts[key].group,
            "subgroup": concepts[key].subgroup,
            "split": splits[key],
        }
        for (style, key), image in images.items()
    ]
    text = pa.string()
    types = {"image": pa.binary(), "tags": pa.list_(text)}
    return pa.Table.from_pylist(
        rows, pa.schema([(name, types.get(name, text)) for name in rows[0]])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the bundled emoji data.")
    parser.add_argument("--cache", type=Path, help="where to keep the npm packages")
    parser.add_argument("--out", type=Path, default=Path("src/protoclip/data/emoji"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        modules = fetch_packages(args.cache or Path(scratch))
        args.out.mkdir(parents=True, exist_ok=True)
        target = args.out / "emoji.parquet"
        pq.write_table(build(modules), target, compression="zstd")
        print(f"{target}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
