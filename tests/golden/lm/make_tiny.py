"""Makes the tiny checkpoints and their logits, against transformers.

Usage, in this folder: python make_tiny.py
`qwen2/` and the adapters `adapter/` (B zero) and `sft_adapter/` (r 4, alpha 8, B not zero) were
made with torch 2.15, transformers 5.23.0 and peft 0.21.2; this script makes `llama/` (new
spellings, tied embeddings, llama3 rope scaling) and `expected.safetensors`.
"""
import json, shutil, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
    tie_word_embeddings=True, rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0,
                     "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 32},
)
model = LlamaForCausalLM(config)
with torch.no_grad():  # larger weights than the initialiser's, so that attention is not flat
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(8)
model.save_pretrained("llama")
shutil.os.remove("llama/generation_config.json")

ids = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 32, 7, 9]])
out = {"ids": ids.to(torch.int64)}
with torch.no_grad():
    for name in ["qwen2", "llama"]:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        out[name] = model(ids).logits[0]
        # A batch whose second row is padded in front with 6 tokens.
        padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids[:, :14]], 1)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[1, :6] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        both = model(torch.cat([ids, padded]), attention_mask=mask, position_ids=positions)
        out[name + ".padded"] = both.logits[1, 6:]
        out[name + ".greedy"] = model.generate(
            ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 20:]
    base = AutoModelForCausalLM.from_pretrained("qwen2", dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, "sft_adapter").eval()
    out["qwen2.sft_adapter"] = tuned(ids).logits[0]
    out["qwen2.merged"] = tuned.merge_and_unload()(ids).logits[0]
save_file({k: v.contiguous() for k, v in out.items()}, "expected.safetensors")
