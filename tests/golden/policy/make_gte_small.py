"""Turns the ONNX weights of gte-small (MIT, thenlper/gte-small) into model.safetensors, as `models pull gte-small` does by itself:
the digest that it expects is that of this script's file.
Usage: make_gte_small.py FOLDER_WITH_onnx/model.onnx OUT_FOLDER. Matrices that the exporter renamed (onnx::MatMul_N, stored
transposed) come in the order of the layers: query, key, value, attention output, intermediate, output."""
import json, shutil, sys
import numpy as np, onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
out.mkdir(parents=True, exist_ok=True)
graph = onnx.load(source / "onnx/model.onnx").graph
weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
tensors = {}
for name, value in weights.items():
    if name.startswith(("embeddings.", "encoder.")) and value.dtype == np.float32:
        tensors[name] = value
kinds = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense"]
# in the order the graph uses them, each beside the bias that names its layer
uses = [n for n in graph.node if n.op_type == "MatMul" and any(i in weights for i in n.input)]
adds = {i: n for n in graph.node if n.op_type == "Add" for i in n.input}
for node in uses:
    matrix = next(weights[i] for i in node.input if i in weights)
    bias = next(i for i in adds[node.output[0]].input if i in weights)
    tensors[bias.replace(".bias", ".weight")] = np.ascontiguousarray(matrix.T)
save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, out / "model.safetensors", {"format": "pt"})
for name in ["config.json", "tokenizer.json"]:
    shutil.copy(source / name, out / name)
print(len(tensors), sum(v.size for v in tensors.values()), sum(k.endswith(".weight") and any(x in k for x in kinds) for k in tensors))
