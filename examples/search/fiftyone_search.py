"""The images nearest to a text, by FiftyOne: fiftyone_search.py VECTORS MODEL TEXT."""

import sys

import fiftyone as fo
import fiftyone.brain as fob
import numpy as np
import pyarrow.parquet as pq
import torch

import protoclip

vectors, reference, query = sys.argv[1:]
table = pq.read_table(vectors)
images = np.stack(table["image_vector"].to_numpy()).astype("float32")
dataset = fo.Dataset("protoclip", overwrite=True)  # fo.launch_app(dataset) shows it
for row in table.select(["sample_id", "captions", "image"]).to_pylist():
    path = row["image"] = row["image"] or row["sample_id"]  # an image within a table has no path
    dataset.add_sample(fo.Sample(path, **row))
fob.compute_similarity(dataset, embeddings=images, brain_key="images", metric="cosine")
model, _, tokenizer = protoclip.load(reference)
with torch.inference_mode():
    text = model.encode_text(tokenizer([query]), normalize=True)[0].numpy()
for found in dataset.sort_by_similarity(text, k=5, brain_key="images", dist_field="distance"):
    print(f"{1 - found.distance:.3f}", found.image, found.captions)
