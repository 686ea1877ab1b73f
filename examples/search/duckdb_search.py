"""The images nearest to a text, by DuckDB: duckdb_search.py VECTORS MODEL TEXT."""

import sys

import duckdb
import torch

import protoclip

vectors, reference, query = sys.argv[1:]
model, _, tokenizer = protoclip.load(reference)
with torch.inference_mode():
    text = model.encode_text(tokenizer([query]), normalize=True)[0].tolist()
nearest = """
    SELECT list_cosine_similarity(image_vector::FLOAT[], ?::FLOAT[]) AS score,
        coalesce(image, sample_id), captions  -- an image within a table has no path
    FROM read_parquet(?) ORDER BY score DESC, sample_id LIMIT 5
"""
for score, image, captions in duckdb.execute(nearest, [text, vectors]).fetchall():
    print(f"{score:.3f}", image, captions)
