// What transformers.js computes from an exported folder, as JSON on standard output.
//
//     node transformers_js.mjs PACKAGES REQUEST
//
// PACKAGES is a folder in which `npm install @huggingface/transformers` was run. REQUEST is a JSON
// file: `folder`, an export with hf and onnx; `images`, paths; `captions`; and `pixels`, the images
// as the model reads them, as `dims` and `data`.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const [packages, request] = process.argv.slice(2);
const library = createRequire(join(packages, "package.json"))("@huggingface/transformers");
const { folder, images, captions, pixels } = JSON.parse(readFileSync(request, "utf-8"));

// The class decides which graph is read and what it is called; every export has CLIP's names.
library.env.allowRemoteModels = false;
library.env.localModelPath = dirname(folder);
const name = basename(folder);
const settings = { dtype: "fp32" };
const vision = await library.CLIPVisionModelWithProjection.from_pretrained(name, settings);
const text = await library.CLIPTextModelWithProjection.from_pretrained(name, settings);
const tokenizer = await library.AutoTokenizer.from_pretrained(name);
const processor = await library.AutoImageProcessor.from_pretrained(name);

const tokens = tokenizer(captions, { padding: "max_length", truncation: true });
const given = new library.Tensor("float32", Float32Array.from(pixels.data), pixels.dims);
const read = await Promise.all(images.map((path) => library.RawImage.read(path)));
const features = {
  version: library.env.version,
  text: (await text(tokens)).text_embeds.tolist(),
  image: (await vision({ pixel_values: given })).image_embeds.tolist(),
  own_image: (await vision(await processor(read))).image_embeds.tolist(),
};
console.log(JSON.stringify(features));
