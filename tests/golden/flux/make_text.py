"""Golden files for the text encoders, and the names of FLUX.1's weights at their true size.

text.safetensors: a small T5 encoder (v1.1 layout) and a small CLIP text model of transformers
with random weights, token ids and outputs. names.txt.gz: every weight of FLUX.1-dev and of
the Union ControlNets with its shape, as diffusers makes them (on the meta device, so that
nothing is allocated). Run: python make_text.py
"""

import gzip
import json

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

torch.set_num_threads(1)
torch.set_grad_enabled(False)
rng = torch.Generator().manual_seed(2)
tensors, configs = {}, {}


def fill(model):
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=rng)
        if "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.1 * noise)
        elif p.ndim > 1 and "shared" not in name and "embedding" not in name:
            p.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.copy_(0.3 * noise)
    return model.eval()


t5_config = dict(
    vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
    feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6, tie_word_embeddings=False,
)
t5 = fill(T5EncoderModel(T5Config(**t5_config)))
configs["t5"] = t5_config
ids = torch.randint(1, 40, (2, 24), generator=rng)
ids[:, 15:] = 0  # padding, which FLUX.1 does not mask
tensors |= {f"t5/weights/{k}": v for k, v in t5.state_dict().items() if "embed_tokens" not in k}
tensors["t5/ids"] = ids.float()
tensors["t5/states"] = t5(ids).last_hidden_state

clip_config = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=20, hidden_act="quick_gelu",
    eos_token_id=49, bos_token_id=48, pad_token_id=49, projection_dim=16,
)
clip = fill(CLIPTextModel(CLIPTextConfig(**clip_config)))
configs["clip"] = clip_config
ids = torch.randint(1, 48, (2, 20), generator=rng)
ids[:, 0] = 48
ids[0, 7:] = 49  # the end, then padding with the same number
ids[1, 19] = 49
out = clip(ids)
# transformers 5 has dropped the `text_model.` that every published file has.
tensors |= {
    f"clip/weights/{k if k.startswith('text_model.') else 'text_model.' + k}": v
    for k, v in clip.state_dict().items()
}
tensors["clip/ids"] = ids.float()
tensors["clip/states"] = out.last_hidden_state
tensors["clip/pooled"] = out.pooler_output
save_file({k: v.contiguous().float() for k, v in tensors.items()}, "text.safetensors")
json.dump(configs, open("text.json", "w"), indent=1, sort_keys=True)

nets = {
    "dev": (FluxTransformer2DModel, dict(guidance_embeds=True)),
    "schnell": (FluxTransformer2DModel, dict(guidance_embeds=False)),
    "union": (
        FluxControlNetModel,
        dict(num_layers=5, num_single_layers=10, num_mode=10, guidance_embeds=True),
    ),
    "union_pro_2": (FluxControlNetModel, dict(num_layers=6, num_single_layers=0, guidance_embeds=True)),
    "xlabs": (
        FluxControlNetModel,
        dict(num_layers=2, num_single_layers=0, guidance_embeds=True, patch_size=2,
             conditioning_embedding_channels=16),
    ),
    "vae": (
        AutoencoderKL,
        dict(
            latent_channels=16, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False,
        ),
    ),
}
with gzip.GzipFile("names.txt.gz", "wb", mtime=0) as f:
    for case, (cls, config) in nets.items():
        with torch.device("meta"):
            net = cls(**config)
        total = sum(p.numel() for p in net.parameters())
        print(case, total)
        for name, p in sorted(net.state_dict().items()):
            f.write(f"{case} {name} {'x'.join(map(str, p.shape))}\n".encode())
