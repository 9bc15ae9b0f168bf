"""Sentence vectors of all-MiniLM-L6-v2 by sentence-transformers, as a reference for text_vectors.rs.
Usage: make_sentence_vectors.py MODEL_FOLDER OUT.json (rounded to 6 digits to keep the file small)"""
import json, sys, torch
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)
model = SentenceTransformer(sys.argv[1], device="cpu")
sentences = ["rustic wood", "neon colors", "A stone fireplace.", "falling snow", "Make the cup look like marble.",
             "a", "", "  spaces   around  ", "ÜBER die Berge, naïve café", "日本庭園の石灯籠", "emoji 🎉 here",
             "punctuation!!! ... ??? --- (brackets) [MASK] </s>", "UPPER CASE WORDS", "supercalifragilisticexpialidocious",
             "a red bus parked in front of an old brick building", "cosy cabin with exposed beams and a leather sofa",
             "1234567890 12.5% $99", "tabs\tand\nnewlines", "the " * 400, "many different words about painting light and water " * 60]
vectors = model.encode(sentences, normalize_embeddings=True, batch_size=4)
json.dump({"max_seq_length": model.max_seq_length, "sentences": sentences,
           "vectors": [[round(float(x), 6) for x in v] for v in vectors]}, open(sys.argv[2], "w"))
print(model.max_seq_length, vectors.shape)
