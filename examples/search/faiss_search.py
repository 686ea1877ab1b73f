"""The images nearest to a text, by faiss: faiss_search.py VECTORS MODEL TEXT."""

import sys

import faiss
import numpy as np
import pyarrow.parquet as pq
import torch

import protoclip

vectors, reference, query = sys.argv[1:]
table = pq.read_table(vectors)
images = np.stack(table["image_vector"].to_numpy()).astype("float32")
index = faiss.IndexFlatIP(images.shape[1])  # exact; the inner product of unit vectors is the cosine
index.add(images)
model, _, tokenizer = protoclip.load(reference)
with torch.inference_mode():
    text = model.encode_text(tokenizer([query]), normalize=True).numpy()
for score, row in zip(*(found[0] for found in index.search(text, 5)), strict=True):
    found = table.select(["sample_id", "captions", "image"]).slice(row, 1).to_pylist()[0]
    # An image within a table has no path.
    print(f"{score:.3f}", found["image"] or found["sample_id"], found["captions"])
