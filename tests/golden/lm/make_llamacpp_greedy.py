"""Greedy tokens of llama.cpp on 20 prompts, for tests/golden/lm/greedy_smollm2.json.

Usage: pip install xllamacpp; python make_llamacpp_greedy.py MODEL.gguf OUT.json
Each row has the prompt's text, its tokens, the 30 tokens that llama.cpp chooses, and for each
of them the gap between its log-probability and that of the runner-up (a tie is a small gap).
"""
import json, sys, time
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


params = xl.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx = 2048
params.n_parallel = 1
params.cpuparams.n_threads = 2
params.cpuparams_batch.n_threads = 2
params.warmup = True
server = xl.Server(params)
rows, speeds = [], []
for prompt in [chat(*s) for s in SUBJECTS] + PLAIN:
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": 30, "temperature": 0.0, "top_k": 1, "cache_prompt": False,
        "n_probs": 2, "return_tokens": True, "ignore_eos": False, "seed": 1,
    })
    if isinstance(answer, (str, bytes)):
        answer = json.loads(answer)
    if "choices" in answer and not rows:
        print(json.dumps(answer)[:1500])
    rows.append(answer | {"_prompt": prompt})
    speeds.append(answer.get("timings"))
    print(answer.get("timings"))
json.dump(rows, open(sys.argv[2] + ".raw", "w"))
