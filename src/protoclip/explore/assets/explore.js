"use strict";
// The selection, the map's colours, sorting of tables, and search by image and while one types. Pages
// other than the map work without it.

// The selection is a list of sample ids, kept for this tab and these pairs.
const KEY = `protoclip-selection of ${document.body.dataset.pairs}`;
const BY_MAP = `${KEY}, by the map`;
const kept = (key) => JSON.parse(sessionStorage.getItem(key) || "[]");
const selection = new Set(kept(KEY));
const byMap = new Set(kept(BY_MAP)); // the ids in it that the map selected; others were ticked
let onMap = () => {};
const PAUSE = 200; // milliseconds without a key after which what is typed is looked for
// On the map: pixels between names, and of an image; among more places in view than FEW, images are
// SPARSE pixels apart, and stand where at least this share of them is.
const [GAP, THUMB, FEW, SPARSE, LEAST] = [12, 36, 150, 16, 1e-3];
const SHOWN = 48; // selected pairs beside the map

function store() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify([...selection]));
    sessionStorage.setItem(BY_MAP, JSON.stringify([...byMap]));
  } catch {
    // Too large to be kept for other pages; it can still be exported from this one.
  }
  document.getElementById("selected").textContent = selection.size.toLocaleString("en");
  document.getElementById("selection").classList.toggle("none", !selection.size);
  for (const box of document.querySelectorAll("input[data-id]")) {
    const chosen = idsOf(box).filter((id) => selection.has(id)).length;
    box.checked = chosen === idsOf(box).length;
    box.indeterminate = chosen > 0 && !box.checked;
  }
}

// A box stands for a pair, or for all pairs of an image.
function idsOf(box) {
  return [box.dataset.id, ...JSON.parse(box.dataset.more || "[]")];
}

function tick(box, chosen) {
  for (const id of idsOf(box)) pick(id, chosen);
}

function pick(id, chosen) {
  if (chosen) selection.add(id);
  else selection.delete(id);
  byMap.delete(id);
  document.getElementById("undo").hidden = true; // it would take away what is picked now
}

function pickNone() {
  selection.clear();
  byMap.clear();
}

// Clears the selection; once more, it is back.
let cleared = [];
function clearAll(back) {
  const ids = back ? cleared : [];
  cleared = [...selection];
  pickNone();
  for (const id of ids) selection.add(id);
  onMap();
  store();
  const undo = document.getElementById("undo");
  undo.hidden = back;
  if (!back) undo.focus();
}

function quoted(id) {
  return /[",\r\n]/.test(id) ? `"${id.replaceAll('"', '""')}"` : id;
}

function download(kind) {
  const ids = [...selection];
  const text = kind === "csv" ? ["sample_id", ...ids.map(quoted)].join("\n") + "\n" : JSON.stringify(ids);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind === "csv" ? "text/csv" : "application/json" }));
  link.download = `selection.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// The browser may show a page again as it was left; other pages have changed the selection since.
addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  pickNone();
  for (const id of kept(KEY)) selection.add(id);
  for (const id of kept(BY_MAP)) byMap.add(id);
  onMap();
  store();
});

document.addEventListener("input", (event) => {
  if (event.target.name === "least") event.target.nextElementSibling.textContent = Number(event.target.value).toFixed(2);
});

document.addEventListener("change", (event) => {
  const box = event.target;
  if (box.name === "least") box.form.requestSubmit();
  if (box.matches("input[data-id]")) {
    tick(box, box.checked);
    store();
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.export) download(button.dataset.export);
  if (button.id === "clear" || button.id === "undo") clearAll(button.id === "undo");
  if (button.classList.contains("pick-all")) {
    for (const box of button.closest("section, main").querySelectorAll("input[data-id]")) {
      tick(box, true);
    }
    store();
  }
  if (button.classList.contains("pick-again")) {
    for (const box of document.querySelectorAll(".twins .again input[data-id]")) tick(box, true);
    store();
  }
  const heading = button.closest(".sortable th");
  if (heading) sort(heading);
});

function sort(heading) {
  const table = heading.closest("table");
  const column = heading.cellIndex;
  const down = heading.getAttribute("aria-sort") !== "descending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => Number(row.cells[column].dataset.value);
  const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)));
  table.tBodies[0].append(...rows);
}

// An answer takes the place of the page, except for the form that asks; the map shows it beside itself,
// and lights its points. `what` is asked for in words.
let asking = new AbortController();
let light = () => {}; // points on the map: positions of pairs by modality
let showNearest = () => {}; // what is nearest to a text, found without a server

async function ask(what, url, options) {
  asking.abort(); // an earlier question, whose answer would come too late
  asking = new AbortController();
  const { signal } = asking;
  const said = document.getElementById("answered");
  try {
    if (self.findPairs) {
      said.textContent = "";
      await showNearest(textOf(new URL(url, location)), signal);
      return !signal.aborted;
    }
    const answer = await fetch(url, { ...options, signal });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    const page = new DOMParser().parseFromString(text, "text/html");
    if (signal.aborted) return false;
    if (map) showAnswer(page.querySelectorAll("#main > p, #main > section"));
    else {
      document.title = page.title;
      for (const part of ["#main", ".names", "header nav"]) {
        document.querySelector(part).replaceWith(page.querySelector(part));
      }
    }
    said.textContent = page.querySelector("section") ? `Answers for ${what} are shown.` : "";
  } catch (error) {
    if (signal.aborted) return false;
    said.textContent = `No search by ${what} (${error.message}).`;
    if (map) showAnswer([said.textContent]);
    else document.getElementById("main").textContent = said.textContent;
  }
  store();
  return true;
}

// Beside the map; nothing puts it away.
function showAnswer(parts) {
  const panel = document.getElementById("found");
  panel.replaceChildren(...parts);
  panel.hidden = !parts.length;
  panel.scrollTo(0, 0);
  const placed = (modality) =>
    [...panel.querySelectorAll(`[data-modality=${modality}] [data-position]`)].map((card) => Number(card.dataset.position));
  light({ image: placed("image"), text: placed("text") });
}

const file = document.getElementById("query-image");
if (file) {
  file.addEventListener("change", () => {
    if (!file.files.length) return;
    query.value = ""; // the text is not what is answered now
    ask("this image", "search-image", { method: "POST", body: file.files[0] });
  });
}

const map = document.getElementById("map");
const query = document.querySelector("input[name=text]");
const textOf = (place) => new URLSearchParams(place.search).get("text") || "";
const search = (text) => `search.html?text=${encodeURIComponent(text).replaceAll("%20", "+")}`;
if (query) {
  const address = () => location.pathname + location.search;
  let shown = address();
  query.value = textOf(location);
  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    if (!map && (self.findPairs || !query.value.trim())) return;
    waiting = setTimeout(async () => {
      const url = search(query.value);
      if (!query.value.trim()) {
        asking.abort();
        showAnswer([]);
      }
      else if (!(await ask("these words", url))) return;
      const next = map ? url.replace("search", "index") : url;
      // The first answer is a page to go back from, and later ones take its place.
      if (textOf(location)) history.replaceState(null, "", next);
      else history.pushState(null, "", next);
      shown = address();
    }, PAUSE);
  });
  query.form.addEventListener("submit", () => {
    clearTimeout(waiting);
    asking.abort();
  });
  addEventListener("popstate", () => {
    if (address() !== shown) location.reload(); // and not for a link within the page
  });
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    query.focus();
  });
}

// A script of packed files calls this.
let openPacked = () => {};

function runScript(source) {
  return new Promise((resolve, reject) => {
    openPacked = (settings, text) => resolve([settings, text]);
    const script = document.createElement("script");
    script.onerror = () => reject(new Error(`${source} cannot be read`));
    script.src = source;
    document.head.append(script);
  });
}

// The files in a script, as explore/pack.py packs them.
async function openPack(source) {
  const [settings, text] = await runScript(source);
  const units = new Uint16Array(text.length);
  let number = 0;
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    units[number++] = code === 0x2022 ? text.charCodeAt(++at) ^ 0x8000 : code;
  }
  const stream = new Blob([new Uint8Array(units.buffer, 0, settings.size)]).stream();
  const whole = await new Response(stream.pipeThrough(new DecompressionStream("deflate-raw"))).arrayBuffer();
  const files = {};
  let start = 0;
  for (const [name, size] of Object.entries(settings.files)) {
    files[name] = new Uint8Array(whole, start, size);
    start += size;
  }
  return { settings, files };
}

// Prototypes of pages that are files lie in one script. The list shows them: their name follows its #.
let prototypes = null;
async function showPrototype() {
  const name = location.hash.slice(1);
  if (!/^prototype-/.test(name)) return;
  try {
    prototypes ??= openPack("prototypes.js");
    const { files } = await prototypes;
    const page = new DOMParser().parseFromString(new TextDecoder().decode(files[name]), "text/html");
    for (const link of page.querySelectorAll("a[download]")) {
      link.download = link.getAttribute("href");
      link.href = URL.createObjectURL(new Blob([files[link.download]]));
    }
    document.title = page.title;
    document.getElementById("main").replaceWith(page.getElementById("main"));
    scrollTo(0, 0);
    store();
  } catch (error) {
    document.getElementById("main").textContent = `This prototype cannot be shown (${error.message}).`;
  }
}
addEventListener("hashchange", () => (location.hash ? showPrototype() : location.reload()));

// Tells the style how much of the first screen lies above the map, which fills the rest.
function fitStage() {
  const stage = document.getElementById("stage");
  const above = stage.getBoundingClientRect().top + scrollY;
  stage.style.setProperty("--above", `${Math.ceil(above)}px`);
}

async function drawMap(place) {
  const { searchParams: asked } = new URL(location.href);
  const found = JSON.parse(document.getElementById("map-data").textContent);
  await Bokeh.embed.embed_item(found.plot, "map");
  const doc = Bokeh.documents[0];
  const source = doc.get_model_by_name("pairs");
  const glyphs = { image: doc.get_model_by_name("images"), text: doc.get_model_by_name("texts") };
  const plain = { image: glyphs.image.glyph.fill_color, text: glyphs.text.glyph.fill_color };
  const mappers = { categories: doc.get_model_by_name("categories"), range: doc.get_model_by_name("range") };
  const chooser = document.getElementById("colour-by");
  for (const way of Object.keys(found.ways)) chooser.add(new Option(way, way));

  function colour() {
    const way = found.ways[chooser.value];
    for (const modality of ["image", "text"]) {
      const field = { field: `by ${chooser.value}`, transform: mappers[way.kind] };
      for (const glyph of [glyphs[modality].glyph, glyphs[modality].selection_glyph, glyphs[modality].nonselection_glyph]) {
        if (glyph && glyph.properties) glyph.fill_color = way.kind === "modality" ? plain[modality] : field;
      }
    }
    legend(way, plain);
    offer(way);
    // Names are in the colours of their groups where points are.
    found.groups.forEach((group, index) => {
      const [light, dark] = way.inks ? way.inks[group.colour] : ["", ""];
      const { style } = document.getElementById("names").children[index];
      style.setProperty("--on-light", light);
      style.setProperty("--on-dark", dark);
    });
    redraw();
  }
  // A point's colour, for the border of the image that hides it.
  function tint(index) {
    const way = found.ways[chooser.value];
    if (way.kind === "modality") return plain.image.value;
    const step = source.data[`by ${chooser.value}`][index];
    return way.colours[Math.min(way.kind === "range" ? step >> 5 : step, way.colours.length - 1)];
  }

  // What may be shown alone: a category of the chosen colours, or the highest or lowest of their values.
  const only = document.getElementById("only");
  const shown = new (Bokeh.Models.get("BooleanFilter"))();
  for (const { view } of Object.values(glyphs)) view.filter = shown;
  function offer(way) {
    const shares = [["highest", 1], ["highest", 5], ["highest", 25], ["lowest", 25]];
    const labels = way.kind === "range" ? shares.map(([end, share]) => `the ${end} ${share}%`) : way.labels;
    only.replaceChildren(new Option("all", ""), ...labels.map((label, index) => new Option(label, index)));
    only.parentElement.hidden = way.kind === "modality";
    const values = source.data[way.kind === "range" ? chooser.value : `by ${chooser.value}`];
    only.onchange = () => {
      let fits = (value) => value === Number(only.value);
      if (way.kind === "range" && only.value) {
        const [end, share] = shares[only.value];
        const rank = Math.floor((values.length * share) / 100);
        const bound = Float64Array.from(values).sort().at(end === "highest" ? -1 - rank : rank);
        fits = (value) => (end === "highest" ? value > bound : value < bound);
      }
      shown.booleans = only.value ? Array.from(values, fits) : null;
      redraw();
    };
    if (shown.booleans) only.onchange();
  }
  const isShown = (index) => !shown.booleans || shown.booleans[index];

  // A new selection on the map takes the place of the last one made there; what was ticked stays.
  function selected() {
    const ids = new Set(source.selected.indices.map((index) => found.ids[index]));
    for (const id of byMap) {
      if (!ids.has(id)) pick(id, false);
    }
    for (const id of ids) {
      if (!selection.has(id)) byMap.add(id);
      selection.add(id);
    }
    store();
    if (chosenOnMap().length > ids.size) onMap(); // puts what was ticked back, and comes here again
    else showPicked();
  }
  // The first of the selected pairs, beside the map.
  function showPicked() {
    const { indices } = source.selected;
    const panel = document.getElementById("picked");
    const more = indices.length > SHOWN ? `, the first ${SHOWN}` : "";
    panel.querySelector("h2").textContent = `${indices.length.toLocaleString("en")} selected${more}`;
    panel.querySelector("ul").replaceChildren(...indices.slice(0, SHOWN).map(pickedPair));
    panel.scrollTo(0, 0);
    panel.hidden = !indices.length;
  }
  function pickedPair(index) {
    const item = document.createElement("li");
    const image = new Image();
    image.alt = "";
    image.src = `../images/${source.data.row[index]}.webp`;
    const caption = document.createElement("bdi");
    caption.textContent = source.data.caption[index] || source.data.id[index];
    const link = document.createElement("a");
    const position = source.data.position[index];
    link.href = place.dataset.live ? `pair-${position}.html` : `index.html?at=${position}`; // pairs have no files
    const id = document.createElement("small");
    id.textContent = source.data.id[index];
    link.append(image, caption);
    item.append(link, id);
    item.dataset.position = position;
    return item;
  }
  function listPairs(title, modality, indices) {
    const section = document.createElement("section");
    const heading = document.createElement("h2");
    heading.textContent = title;
    const list = document.createElement("ul");
    list.append(...indices.map(pickedPair));
    section.dataset.modality = modality;
    section.append(heading, list);
    return section;
  }
  const listById = (text) => {
    const wanted = text.trim().toLowerCase();
    const indices = [...found.ids.keys()].filter((index) => found.ids[index].toLowerCase() === wanted);
    return indices.length ? [listPairs("With this id", "image", indices)] : [];
  };
  showNearest = async (text, signal) => {
    if (document.getElementById("found").hidden) showAnswer(["Opening the model"]);
    const { near, fits } = await findPairs(text, source);
    const sections = Object.entries(near).map(([modality, rows]) => {
      const section = listPairs(modality === "image" ? "Images" : "Captions", modality, rows.map(([index]) => index));
      rows.forEach(([, cosine], at) => section.lastChild.children[at].append(`cosine ${cosine.toFixed(3)}`));
      return section;
    });
    const doubt = fits ? [] : ["Perhaps nothing here fits: texts about other things come as near."];
    if (!signal.aborted) showAnswer([...listById(text), ...doubt, ...sections]);
  };

  const indexOfId = new Map(found.ids.map((id, index) => [id, index]));
  const chosenOnMap = () => [...selection].filter((id) => indexOfId.has(id)).map((id) => indexOfId.get(id));
  onMap = () => {
    source.selected.indices = chosenOnMap();
  };
  onMap();
  showPicked();
  source.selected.properties.indices.change.connect(selected);
  chooser.addEventListener("change", colour);
  const plot = doc.get_model_by_name("map");
  const [xs, ys] = [plot.x_range, plot.y_range];
  const { redraw, lit } = label(plot, source, found.groups, tint, isShown);
  colour();
  followTools(plot);
  document.getElementById("pick-shown").addEventListener("click", () => {
    const { image_x: x, image_y: y } = source.data;
    const inView = (index) => isShown(index) && x[index] > xs.start && x[index] < xs.end && y[index] > ys.start && y[index] < ys.end;
    source.selected.indices = [...x.keys()].filter(inView);
  });

  // Points that are lit have rings and images, and others are pale.
  const indexOfPosition = new Map([...source.data.position].map((position, index) => [position, index]));
  light = (pairs) => {
    for (const modality of ["image", "text"]) {
      lit[modality] = pairs[modality].map((position) => indexOfPosition.get(position)).filter((index) => index !== undefined);
    }
    const alpha = lit.image.length + lit.text.length ? 0.15 : 0.7;
    for (const glyph of Object.values(glyphs)) glyph.glyph.fill_alpha = alpha;
    redraw();
  };
  // To the place of a pair.
  function goTo(position) {
    const index = indexOfPosition.get(Number(position));
    if (index === undefined) return showAnswer(["This pair is not among those on the map."]);
    light({ image: [Number(position)], text: [Number(position)] });
    const middle = [source.data.image_x[index], source.data.image_y[index]];
    [xs, ys].forEach((range, axis) => {
      const half = (whole[axis][1] - whole[axis][0]) / 16;
      range.setv({ start: middle[axis] - half, end: middle[axis] + half });
    });
  }
  place.closest("main").addEventListener("click", (event) => {
    const link = event.target.closest("a[href*='?at=']");
    if (!link) return;
    event.preventDefault();
    goTo(new URL(link.href).searchParams.get("at"));
  });

  // What is in view is kept for this tab, so going back leads to it.
  const VIEW = `${KEY}, in view on ${location.pathname}`;
  const whole = [xs, ys].map((range) => [range.start, range.end]);
  let waiting = 0;
  const keep = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => sessionStorage.setItem(VIEW, JSON.stringify([xs, ys].map((range) => [range.start, range.end]))), PAUSE);
  };
  kept(VIEW).forEach(([start, end], axis) => [xs, ys][axis].setv({ start, end }));
  for (const range of [xs, ys]) for (const side of ["start", "end"]) range.properties[side].change.connect(keep);
  if (asked.has("at")) goTo(asked.get("at"));
  if (textOf(location)) ask("these words", search(textOf(location)));
  countHovered(plot, source, [glyphs.image, glyphs.text]);
  place.dataset.ready = "yes";
}

// Under the pointer one card stands, an image's before a text's, and says how many pairs more there are.
function countHovered(plot, source, glyphs) {
  const tool = plot.toolbar.tools.find((each) => each.type === "HoverTool");
  const { ttmodels } = Bokeh.index.get(plot).tool_views.get(tool);
  const [ofImage, ofText] = glyphs.map((glyph) => ttmodels.get(glyph));
  source.inspect.connect(() => {
    const [images, texts] = glyphs.map((glyph) => glyph.get_selection_manager().inspectors.get(glyph)?.indices ?? []);
    if (images.length) ofText.clear();
    const more = new Set([...images, ...texts]).size - 1;
    const said = (images.length ? ofImage : ofText).content.querySelector(".more");
    if (said && more > 0) said.textContent = `and ${more.toLocaleString("en")} more here`;
  });
}

function* descendants(node) {
  for (const child of (node.shadowRoot ?? node).children) {
    yield child;
    yield* descendants(child);
  }
}

// A finger on the map scrolls the page, unless a tool is chosen that drags. Where there is no mouse,
// none is at first: the map fills the screen, so there would be no way past it. While the box or the
// lasso is chosen, a drag may begin on a name.
function followTools(plot) {
  const { tools } = plot.toolbar.gestures.pan;
  const { style } = Bokeh.index.get(plot).canvas_view.events_el;
  const names = document.getElementById("names");
  const buttons = [...descendants(map)].filter((each) => /bk-\w+Button/.test(each.className));
  const follow = () => {
    for (const button of buttons) {
      button.role = "button";
      button.ariaLabel = button.title;
      if (button.matches(".bk-OnOffButton")) button.ariaPressed = button.matches(".bk-active");
    }
    style.touchAction = tools.some((tool) => tool.active) ? "none" : "pan-x pan-y";
    names.classList.toggle("selecting", tools.some((tool) => tool.active && tool.type.endsWith("SelectTool")));
  };
  for (const tool of tools) {
    if (matchMedia("(pointer: coarse)").matches) tool.active = false;
    tool.properties.active.change.connect(follow);
  }
  follow();
}

// Names of groups lie over the plot, of the coarse ones with an image; and images of points, far
// apart while many are in view. Coarse and large groups come first; what would overlap is left out,
// so there is room for more of them as one zooms in. A coarse name without room shrinks to its first
// word. Points that are `lit` come before all. Returns these, and what draws again.
function label(plot, source, groups, tint, isShown) {
  const [names, thumbs] = ["names", "thumbs"].map((id) => document.getElementById(id));
  const view = Bokeh.index.get(plot);
  const [x, y] = [source.data.image_x, source.data.image_y];
  const [xs, ys] = [plot.x_range, plot.y_range];
  const first = [xs.start, xs.end, ys.start, ys.end];

  function picture(index) {
    const image = new Image(THUMB, THUMB);
    image.alt = "";
    image.src = `../images/${source.data.row[index]}.webp`;
    return image;
  }
  const pictures = new Map(); // by point, so that none is asked for twice
  const lit = { image: [], text: [] };
  // The first point of each place: pairs of one image lie in one.
  const taken = new Map();
  for (const index of x.keys()) {
    const place = `${x[index]} ${y[index]}`;
    if (!taken.has(place)) taken.set(place, []);
    taken.get(place).push(index);
  }
  const places = () => [...taken.values()].map((indices) => indices.find(isShown)).filter((index) => index !== undefined);

  const buttons = groups.map((group) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = `level-${group.level}`;
    if (group.level === 0) button.append(picture(group.example));
    const [first, ...others] = group.name.split(/(?=, )/);
    const rest = document.createElement("span");
    rest.append(...others);
    button.append(first, rest); // as text: it is made of captions
    button.title = `${group.size.toLocaleString("en")} pairs: zoom in`;
    button.addEventListener("click", () => zoomTo(group));
    return button;
  });
  names.replaceChildren(...buttons);
  const sizes = () => buttons.map((button) => [button.offsetWidth, button.offsetHeight]);
  const whole = sizes();
  for (const button of buttons) button.classList.add("first");
  const short = sizes(); // of the first word alone

  // As far in as the next level needs, and never out.
  function zoomTo(group) {
    const share = Math.min(1, 0.5 ** (group.level + 1));
    const width = Math.min((first[1] - first[0]) * share, (xs.end - xs.start) / 1.5);
    const height = Math.min((first[3] - first[2]) * share, (ys.end - ys.start) / 1.5);
    xs.setv({ start: group.x - width / 2, end: group.x + width / 2 });
    ys.setv({ start: group.y - height / 2, end: group.y + height / 2 });
  }

  const put = (element, left, top) => {
    element.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
  };

  // Those with the most neighbours first, by squares of the map as large as an image; of thousands, none
  // that lie alone. Squares move with the map, so images stay on their points.
  function crowded(indices, frame) {
    const [width, height] = [(THUMB * (xs.end - xs.start)) / frame.width, (THUMB * (ys.end - ys.start)) / frame.height];
    const squares = new Map();
    for (const index of indices) {
      const square = `${Math.floor(x[index] / width)} ${Math.floor(y[index] / height)}`;
      if (!squares.has(square)) squares.set(square, []);
      squares.get(square).push(index);
    }
    const full = [...squares.values()].filter((each) => each.length >= indices.length * LEAST);
    return full.sort((one, other) => other.length - one.length).flat();
  }

  function draw() {
    const frame = view.frame.bbox;
    const [across, down] = [view.frame.x_scale, view.frame.y_scale];
    const at = (px, py) => [across.compute(px), down.compute(py)];
    const boxes = [];
    // A box of this size around a point, if it is inside and free; it keeps later ones at a distance.
    const fits = (px, py, width, height, apart = 0) => {
      const box = { left: px - width / 2, right: px + width / 2, top: py - height / 2, bottom: py + height / 2 };
      if (box.left < frame.left || box.right > frame.right || box.top < frame.top || box.bottom > frame.bottom) return false;
      if (boxes.some((other) => box.left < other.right && other.left < box.right && box.top < other.bottom && other.top < box.bottom)) return false;
      return boxes.push({ left: box.left - apart, right: box.right + apart, top: box.top - apart, bottom: box.bottom + apart });
    };
    const rings = [];
    for (const modality of ["image", "text"]) {
      for (const index of lit[modality]) {
        const [px, py] = at(source.data[`${modality}_x`][index], source.data[`${modality}_y`][index]);
        if (px < frame.left || px > frame.right || py < frame.top || py > frame.bottom) continue;
        const ring = document.createElement("i");
        if (modality === "image" && fits(px, py, THUMB, THUMB)) ring.append(picture(index));
        put(ring, px, py);
        if (ring.firstChild) rings.push(ring); // an image hides rings
        else rings.unshift(ring);
      }
    }
    const shown = new Set();
    groups.forEach((group, index) => {
      const [px, py] = at(group.x, group.y);
      const inside = px > frame.left && px < frame.right && py > frame.top && py < frame.bottom;
      const tried = inside && group.name && !shown.has(group.name) ? [whole, short].slice(0, group.level ? 1 : 2) : [];
      const found = tried.find((each) => {
        const [width, height] = [each[index][0] + GAP, each[index][1] + GAP];
        const left = Math.min(Math.max(px - width / 2, frame.left), frame.right - width);
        const top = Math.min(Math.max(py - height / 2, frame.top), frame.bottom - height);
        put(buttons[index], left + GAP / 2, top + GAP / 2);
        return fits(left + width / 2, top + height / 2, width, height);
      });
      buttons[index].style.visibility = found ? "visible" : "hidden";
      buttons[index].classList.toggle("first", found === short);
      if (found) shown.add(group.name);
    });

    const inside = places().filter((index) => x[index] > xs.start && x[index] < xs.end && y[index] > ys.start && y[index] < ys.end);
    const many = inside.length > FEW;
    const images = [];
    for (const index of many ? crowded(inside, frame) : inside) {
      const [px, py] = at(x[index], y[index]);
      if (!fits(px, py, THUMB, THUMB, many ? SPARSE : 0)) continue;
      if (!pictures.has(index)) pictures.set(index, picture(index));
      const image = pictures.get(index);
      image.style.borderColor = tint(index);
      put(image, px - THUMB / 2, py - THUMB / 2);
      images.push(image);
    }
    thumbs.replaceChildren(...images, ...rings);
  }

  let waiting = 0;
  const later = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(draw);
  };
  for (const range of [xs, ys]) {
    for (const side of ["start", "end"]) range.properties[side].change.connect(later);
  }
  for (const side of ["inner_width", "inner_height"]) plot.properties[side].change.connect(later);
  // The wheel over a name zooms the map too.
  names.onwheel = (event) => {
    event.preventDefault();
    view.canvas_view.events_el.dispatchEvent(new WheelEvent("wheel", event));
  };
  return { redraw: draw, lit };
}

function legend(way, plain) {
  const place = document.getElementById("legend");
  place.replaceChildren();
  place.className = way.inks ? "unseen" : ""; // names on the map say it, and here to who hears them
  const add = (colour, label, shape) => {
    const entry = document.createElement("li");
    const mark = document.createElement("i");
    if (shape) mark.className = shape;
    mark.style.background = colour;
    entry.append(mark, label);
    place.append(entry);
  };
  if (way.kind === "range") {
    add(`linear-gradient(90deg, ${way.colours.join(",")})`, `${way.labels[0]} to ${way.labels[1]}`, "bar");
    return;
  }
  const colours = way.colours || [plain.image.value, plain.text.value];
  const shapes = way.kind === "modality" ? ["", "triangle"] : [];
  const last = colours.length - 1;
  const many = way.labels.length > colours.length;
  way.labels.slice(0, many ? last : undefined).forEach((label, index) => add(colours[index], label, shapes[index]));
  if (many) add(colours[last], `${way.labels.length - last} others`);
}

store();
showPrototype();
if (map) {
  const above = new ResizeObserver(() => map.isConnected && fitStage());
  for (const each of document.querySelectorAll("header, #selection, .map-bar")) above.observe(each);
  const failed = (error) => {
    map.removeAttribute("role");
    map.textContent = `The map cannot be drawn (${error.message}). The other pages work without it.`;
  };
  drawMap(map).catch(failed);
}
