"use strict";
// The selection, the map's colours, sorting of tables, and search by image. Pages work without it,
// but for the map.

// The selection is a list of sample ids, kept for this tab and these pairs.
const KEY = `protoclip-selection of ${document.body.dataset.pairs}`;
const selection = new Set(JSON.parse(sessionStorage.getItem(KEY) || "[]"));
let onMap = () => {};

function store() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify([...selection]));
  } catch {
    // Too large to be kept for other pages; it can still be exported from this one.
  }
  document.getElementById("selected").textContent = selection.size.toLocaleString("en");
  for (const box of document.querySelectorAll("input[data-id]")) {
    box.checked = selection.has(box.dataset.id);
  }
}

function pick(id, chosen) {
  if (chosen) selection.add(id);
  else selection.delete(id);
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

document.addEventListener("change", (event) => {
  const box = event.target;
  if (box.matches("input[data-id]")) {
    pick(box.dataset.id, box.checked);
    store();
  }
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.export) download(button.dataset.export);
  if (button.id === "clear") {
    selection.clear();
    onMap();
    store();
  }
  if (button.classList.contains("pick-all")) {
    for (const box of button.closest("section, main").querySelectorAll("input[data-id]")) {
      pick(box.dataset.id, true);
    }
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

const file = document.getElementById("query-image");
if (file) {
  file.addEventListener("change", async () => {
    if (!file.files.length) return;
    const main = document.getElementById("main");
    try {
      const answer = await fetch("search-image", { method: "POST", body: file.files[0] });
      const text = await answer.text();
      if (!answer.ok) throw new Error(text);
      const page = new DOMParser().parseFromString(text, "text/html");
      main.replaceWith(page.getElementById("main"));
    } catch (error) {
      main.textContent = `No search by this image (${error.message}).`;
    }
    store();
  });
}

// A server is asked for the map. A page that is a file holds it, since browsers fetch no files.
async function mapData(place) {
  const held = document.getElementById("map-data");
  if (held) return JSON.parse(held.textContent);
  const answer = await fetch(place.dataset.source);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function drawMap(place) {
  const found = await mapData(place);
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
  }

  function selected() {
    const ids = new Set(source.selected.indices.map((index) => found.ids[index]));
    for (const id of found.ids) pick(id, ids.has(id));
    store();
    const tapped = document.getElementById("tapped");
    if (tapped) {
      const [index, more] = source.selected.indices;
      tapped.hidden = index === undefined || more !== undefined;
      tapped.firstElementChild.href = `pair-${source.data.position[index]}.html`;
    }
  }

  onMap = () => {
    source.selected.indices = [];
  };
  const place_of = new Map(found.ids.map((id, index) => [id, index]));
  source.selected.indices = [...selection].filter((id) => place_of.has(id)).map((id) => place_of.get(id));
  source.selected.properties.indices.change.connect(selected);
  chooser.addEventListener("change", colour);
  colour();
  place.dataset.ready = "yes";
}

function legend(way, plain) {
  const place = document.getElementById("legend");
  place.replaceChildren();
  const add = (colour, label, shape) => {
    const entry = document.createElement("span");
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
  way.labels.forEach((label, index) => add(colours[index], label, shapes[index]));
}

store();
const map = document.getElementById("map");
if (map) {
  drawMap(map).catch((error) => {
    map.removeAttribute("role");
    map.textContent = `The map cannot be drawn (${error.message}). The other pages work without it.`;
  });
}
