"""Golden files for LoRA: the transformer of networks.safetensors with LoRAs in four
spellings, loaded by diffusers. Writes lora.safetensors: per case the file's own keys, and the
velocity (inputs: case "transformer" of networks.safetensors). Run after make_networks.py.
"""

import json

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
rng = torch.Generator().manual_seed(3)
weights = load_file("networks.safetensors")
config = json.load(open("networks.json"))["transformer"]
d = 16


def pair(down, up, rows, columns, rank=3):
    return {
        down: torch.randn(rank, columns, generator=rng) / columns**0.5,
        up: torch.randn(rows, rank, generator=rng) / rank**0.5,
    }


def peft(stem, rows, columns):
    return pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", rows, columns)


def kohya(stem, rows, columns):
    alpha = {f"lora_unet_{stem}.alpha": torch.tensor(1.5)}
    stem = f"lora_unet_{stem}"
    return pair(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", rows, columns) | alpha


def xlabs(stem, rows, columns):
    return pair(f"{stem}.down.weight", f"{stem}.up.weight", rows, columns)


t = "transformer"
cases = {
    "diffusers": peft(f"{t}.transformer_blocks.0.attn.to_k", d, d)
    | peft(f"{t}.transformer_blocks.1.attn.add_v_proj", d, d)
    | peft(f"{t}.transformer_blocks.1.ff_context.net.0.proj", 4 * d, d)
    | peft(f"{t}.single_transformer_blocks.0.attn.to_q", d, d)
    | peft(f"{t}.single_transformer_blocks.2.proj_mlp", 4 * d, d)
    | peft(f"{t}.norm_out.linear", 2 * d, d)
    | peft(f"{t}.context_embedder", d, 12),
    "kohya": kohya("double_blocks_0_img_attn_qkv", 3 * d, d)
    | kohya("double_blocks_1_txt_mlp_0", 4 * d, d)
    | kohya("double_blocks_1_img_mod_lin", 6 * d, d)
    | kohya("single_blocks_2_linear2", d, 5 * d),
    "xlabs": xlabs("double_blocks.0.processor.qkv_lora1", 3 * d, d)
    | xlabs("double_blocks.1.processor.qkv_lora2", 3 * d, d)
    | xlabs("double_blocks.1.processor.proj_lora1", d, d)
    | xlabs("single_blocks.0.processor.qkv_lora", 3 * d, d),
}
# (diffusers splits kohya's linear1 at the true model's sizes only: not in this file.)
out = {}
grid = torch.zeros(3, 5, 3)
grid[..., 1] += torch.arange(3)[:, None]
grid[..., 2] += torch.arange(5)[None]
for case, lora in cases.items():
    net = FluxTransformer2DModel(**config)
    prefix = "transformer/weights/"
    net.load_state_dict({k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)})
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=net.eval(),
    )
    pipe.load_lora_weights({k: v.clone() for k, v in lora.items()}, adapter_name="a")
    x = {k: weights[f"transformer/{k}"] for k in ("latents", "text", "pooled", "timestep", "guidance")}
    velocity = net(
        hidden_states=x["latents"], encoder_hidden_states=x["text"], pooled_projections=x["pooled"],
        timestep=x["timestep"], guidance=x["guidance"], img_ids=grid.reshape(-1, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample
    print(case, (velocity - weights["transformer/velocity"]).abs().max().item())
    out |= {f"{case}/lora/{k}": v for k, v in lora.items()} | {f"{case}/velocity": velocity}
save_file({k: v.contiguous() for k, v in out.items()}, "lora.safetensors")
