"""The images nearest to a text, by Qdrant: qdrant_search.py VECTORS MODEL TEXT."""

import sys

import numpy as np
import pyarrow.parquet as pq
import torch
from qdrant_client import QdrantClient, models

import protoclip

vectors, reference, query = sys.argv[1:]
table = pq.read_table(vectors, columns=["sample_id", "captions", "image_vector", "image"])
images = np.stack(table["image_vector"].to_numpy()).astype("float32")
client = QdrantClient(path=f"{vectors}.qdrant")  # a folder; or url=, for a server
client.delete_collection("images")
size = models.VectorParams(size=images.shape[1], distance=models.Distance.COSINE)
client.create_collection("images", vectors_config=size)
client.upload_collection("images", images, payload=table.drop(["image_vector"]).to_pylist())
model, _, tokenizer = protoclip.load(reference)
with torch.inference_mode():
    text = model.encode_text(tokenizer([query]), normalize=True)[0].tolist()
for found in client.query_points("images", text, limit=5).points:
    shown = found.payload
    print(f"{found.score:.3f}", shown["image"] or shown["sample_id"], shown["captions"])
client.close()
