"use strict";
// Answers a text without a server, where model.js lies beside the page: the model that reads texts,
// its tokenizer, the features of the pairs on the map, and the libraries that run them.
const NEAREST = 24;
let opened = null;

async function openModel() {
  const { settings, files } = await openPack("model.js");
  const library = (name) => import(URL.createObjectURL(new Blob([files[name]], { type: "text/javascript" })));
  const [ort, { Tokenizer }] = [await library("ort.mjs"), await library("tokenizers.mjs")];
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = files["ort.wasm"];
  const tokenizer = new Tokenizer(JSON.parse(new TextDecoder().decode(files["tokenizer.json"])), {});
  const session = await ort.InferenceSession.create(files["model.onnx"]);
  return { settings, files, ort, tokenizer, session };
}

// The features of a text.
async function encode({ settings, ort, tokenizer, session }, text) {
  const { length, padding } = settings;
  const { ids } = tokenizer.encode(text.trim().replace(/^(a|an|the)\s+(?=\S)/i, ""));
  if (ids.length > length) ids.splice(length - 1, ids.length - length); // the last one ends the text
  const tokens = new Int32Array(length).fill(padding);
  tokens.set(ids);
  const { features } = await session.run({ text: new ort.Tensor("int32", tokens, [1, length]) });
  return features.data;
}

// The nearest rows of features, the nearest first: number and cosine.
function findNearest(features, query) {
  const width = query.length;
  const rows = new Int8Array(features.buffer, features.byteOffset, features.length);
  const norm = Math.hypot(...query);
  const found = [];
  for (let row = 0; row < rows.length / width; row++) {
    let [dot, square] = [0, 0];
    for (let at = 0; at < width; at++) {
      const value = rows[row * width + at];
      dot += value * query[at];
      square += value * value;
    }
    found.push([row, dot / (norm * Math.sqrt(square) || 1)]);
  }
  return found.sort(([, one], [, other]) => other - one);
}

// What is nearest to a text: numbers of pairs on the map with their cosines, by modality; and
// whether a text about other things comes no nearer.
async function findPairs(text, source) {
  opened ??= openModel().catch((error) => {
    opened = null; // the next question tries again
    throw error;
  });
  const model = await opened;
  const query = await encode(model, text);
  const { image_x: x, image_y: y } = source.data;
  const seen = new Set(); // pairs of one image lie in one place
  const isNew = ([row]) => {
    const place = `${x[row]} ${y[row]}`;
    return !seen.has(place) && seen.add(place);
  };
  const images = findNearest(model.files.image, query).filter(isNew).slice(0, NEAREST);
  const texts = findNearest(model.files.text, query).slice(0, NEAREST);
  const nearest = [images, findNearest(model.files.words, query)].map(([first]) => first?.[1]);
  const fits = !model.settings.byChance.length || nearest.some((cosine, at) => cosine > model.settings.byChance[at]);
  return { fits, near: { image: images, text: texts } };
}
