"""The images nearest to a text, by LanceDB: lancedb_search.py VECTORS MODEL TEXT."""

import sys
from pathlib import Path

import lancedb
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import protoclip

vectors, reference, query = sys.argv[1:]
model, _, tokenizer = protoclip.load(reference)
with torch.inference_mode():
    text = model.encode_text(tokenizer([query]), normalize=True)[0].numpy()
table = pq.read_table(vectors, columns=["sample_id", "captions", "image_vector", "image"])
of_one_length = table["image_vector"].cast(pa.list_(pa.float16(), len(text)))  # LanceDB wants this
table = table.set_column(2, "vector", of_one_length)
# The database is a folder beside the file.
images = lancedb.connect(Path(vectors).with_suffix(".lance")).create_table(
    "images", table, mode="overwrite"
)
for found in images.search(text).distance_type("cosine").limit(5).to_list():
    print(f"{1 - found['_distance']:.3f}", found["image"] or found["sample_id"], found["captions"])
