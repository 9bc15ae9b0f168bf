"""TRL's DPO on the pairs that the example bench_dpo wrote, with the same model, on the CPU.

Usage: pip install torch transformers peft trl gguf datasets; python dpo.py MODEL.gguf PAIRS.jsonl
Rank-8 LoRA on all linear maps, the reference's log-probabilities computed beforehand, no gradient
checkpointing, all pairs in one batch: TRL at its quickest here. Prints a JSON object like bench_dpo's.
"""
import json, os, statistics, sys, time
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import uuid
import datasets.fingerprint
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

# The trainer cannot be pickled for its cache's name; any name does.
datasets.fingerprint.Hasher.hash = classmethod(lambda cls, value: uuid.uuid4().hex)
path, pairs = sys.argv[1:3]
threads = len(os.sched_getaffinity(0))
torch.set_num_threads(threads)
folder, name = os.path.split(path)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
rows = [json.loads(line) for line in open(pairs)]
count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
tokens = sum(2 * count(r["prompt"]) + count(r["chosen"]) + count(r["rejected"]) for r in rows)


class Clock(TrainerCallback):
    seconds = []

    def on_step_begin(self, *_, **__):
        self.begun = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.begun)


for dtype in [torch.float32, torch.bfloat16]:
    # Read from GGUF the weights are dense, but the model still says that it is quantised.
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    model = type(read)(type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})).to(dtype)
    model.load_state_dict(read.state_dict())
    options = DPOConfig(
        output_dir="/tmp/trl", use_cpu=True, bf16=False, per_device_train_batch_size=len(rows), max_steps=4,
        gradient_checkpointing=False, precompute_ref_log_probs=True, save_strategy="no",
        report_to=[], logging_steps=100, disable_tqdm=True)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    clock.seconds = []
    trainer = DPOTrainer(model=model, args=options, train_dataset=Dataset.from_list(rows),
                         processing_class=tokenizer, peft_config=lora, callbacks=[clock])
    trainer.train()
    seconds = statistics.median(clock.seconds[1:])
    print(json.dumps({
        "trainer": f"TRL, {str(dtype)[6:]}", "pairs": len(rows), "sequence_tokens": tokens,
        "threads": threads, "seconds": seconds, "pairs_per_second": len(rows) / seconds,
        "tokens_per_second": tokens / seconds}), flush=True)
