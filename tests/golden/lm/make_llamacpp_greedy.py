"""Greedy tokens of llama.cpp on 20 prompts, for greedy_smollm2.json and greedy_qwen.json.

Usage: pip install xllamacpp gguf; python make_llamacpp_greedy.py MODEL.gguf OUT.json
(greedy_qwen.json, of Qwen2.5-Coder-1.5B-Instruct Q4_K_M, with --as-is: as F32 it has 6 GB.)
The model's weights are first written out as F32 (their values do not change): with quantised
weights llama.cpp rounds activations to 8 bits, and that noise (0.1 to 0.2 in a logit of this
model) decides many a close choice. Keys and values are kept as F32 too, for the same reason.
With --as-is the file is run as it is, also for its speed (--threads N, 2 unless told otherwise).
Each row has the prompt's text, the up to 30 tokens that llama.cpp chooses, and for each of them the gap between its log-probability and that of the runner-up (a tie is a small gap).
"""
import json, os, struct, sys, tempfile
import gguf, numpy
import xllamacpp as xl

SYSTEM = "You suggest one edit of a picture that this person would love."
SUBJECTS = [
    ("a brown dog on a beach", "warm light, film grain", "neon"),
    ("a living room with a grey sofa", "fireplaces, wooden beams", "clutter"),
    ("two people riding bicycles", "pastel colours", "dark shadows"),
    ("a bowl of fruit on a table", "baroque still life", "flash photography"),
    ("a city street at night", "rain, reflections, cyberpunk", "daylight"),
    ("a cat asleep on a keyboard", "watercolour, soft edges", "hard contrast"),
    ("a train in the mountains", "autumn leaves, fog", "snow"),
    ("a plate of pasta", "rustic kitchens", "white backgrounds"),
    ("a surfer on a wave", "ukiyo-e prints", "photorealism"),
    ("a child with a red balloon", "black and white, one colour kept", "busy backgrounds"),
]
PLAIN = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "1, 2, 3, 5, 8,",
    "The three primary colours are",
    "Photosynthesis is the process by which",
    "My favourite recipe: take two eggs,",
    "Les chats sont",
]


def chat(caption, likes, dislikes):
    user = (f"Likes: {likes}\nDislikes: {dislikes}\nThe picture shows {caption}.\n"
            "Suggest a single, cohesive image-editing instruction.")
    return (f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n")


def as_f32(source, target):
    """The same GGUF file with every tensor as F32."""
    reader = gguf.GGUFReader(source)
    first = min(t.field.offset for t in reader.tensors)
    with open(source, "rb") as f:
        keys = f.read(first)
    infos, data, at = b"", [], 0
    for t in reader.tensors:
        x = gguf.quants.dequantize(t.data, t.tensor_type).astype(numpy.float32)
        name = t.name.encode()
        infos += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(t.shape))
        infos += b"".join(struct.pack("<Q", int(d)) for d in t.shape) + struct.pack("<IQ", 0, at)
        data.append(x)
        at += -(-x.nbytes // 32) * 32
    with open(target, "wb") as f:
        f.write(keys + infos)
        for x in data:
            f.write(b"\0" * (-f.tell() % 32))
            f.write(x.tobytes())


params = xl.CommonParams()
if "--as-is" in sys.argv:
    params.model.path = sys.argv[1]
else:
    params.model.path = os.path.join(tempfile.mkdtemp(), "f32.gguf")
    as_f32(sys.argv[1], params.model.path)
    params.cache_type_k = params.cache_type_v = xl.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.n_ctx = 2048
params.n_parallel = 1
threads = int(sys.argv[sys.argv.index("--threads") + 1]) if "--threads" in sys.argv else 2
params.cpuparams.n_threads = threads if "--as-is" in sys.argv else 1
params.cpuparams_batch.n_threads = params.cpuparams.n_threads
params.warmup = True
server = xl.Server(params)
rows, speeds = [], []
for prompt in [chat(*s) for s in SUBJECTS] + PLAIN:
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": 30, "temperature": 0.0, "top_k": 1, "cache_prompt": False,
        "n_probs": 2, "ignore_eos": False, "seed": 1,
    })
    if isinstance(answer, (str, bytes)):
        answer = json.loads(answer)
    row = {"prompt": prompt, "tokens": [], "gaps": []}
    for token in answer["choices"][0]["logprobs"]["content"]:
        top = sorted((t["logprob"] for t in token["top_logprobs"]), reverse=True)
        row["tokens"].append(token["id"])
        row["gaps"].append(round(top[0] - top[1], 5))
    rows.append(row)
    speeds.append(answer["timings"]["predicted_per_second"])
    print(answer["timings"])
print("median tokens/s", sorted(speeds)[len(speeds) // 2])
with open(sys.argv[2], "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
