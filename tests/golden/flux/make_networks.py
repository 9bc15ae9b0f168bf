"""Golden files for the Flux networks, from diffusers with small random weights.

Writes networks.safetensors: weights (diffusers' names, behind a prefix per case), inputs and
outputs; networks.json: the configs. Everything is float32. Run: python make_networks.py
(diffusers 0.42.1, torch 2.15; CPU, one thread).
"""

import json

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
rng = torch.Generator().manual_seed(0)
tensors, configs = {}, {}


def randn(*shape):
    return torch.randn(*shape, generator=rng)


def fill(model, std=0.15):
    """Random weights of a size that neither explodes nor fades; norms about 1."""
    for name, p in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            p.copy_(1 + 0.1 * randn(*p.shape))
        elif name.endswith("weight") and p.ndim > 1:
            p.copy_(randn(*p.shape) / p[0].numel() ** 0.5)
        elif name.endswith("weight"):
            p.copy_(1 + 0.1 * randn(*p.shape))
        else:
            p.copy_(std * randn(*p.shape))
    return model.eval()


def keep(case, **values):
    for name, value in values.items():
        tensors[f"{case}/{name}"] = value.contiguous().clone().float()


def keep_model(case, model):
    configs[case] = {k: v for k, v in model.config.items() if not k.startswith("_")}
    keep(f"{case}/weights", **model.state_dict())


def flux_config(layers, singles, guidance):
    return dict(
        in_channels=8, num_layers=layers, num_single_layers=singles, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10,
        guidance_embeds=guidance, axes_dims_rope=[2, 2, 4],
    )


def ids(rows, columns):
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] += torch.arange(rows)[:, None]
    grid[..., 2] += torch.arange(columns)[None]
    return grid.reshape(-1, 3)


def inputs(case, batch=2, rows=3, columns=5, text=4, guidance=True):
    x = dict(
        latents=randn(batch, rows * columns, 8), text=randn(batch, text, 12),
        pooled=randn(batch, 10), timestep=torch.tensor([0.9, 0.31][:batch]),
    )
    if guidance:
        x["guidance"] = torch.tensor([3.5, 1.0][:batch])
    keep(case, **x)
    return dict(
        hidden_states=x["latents"], encoder_hidden_states=x["text"],
        pooled_projections=x["pooled"], timestep=x["timestep"], guidance=x.get("guidance"),
        img_ids=ids(rows, columns), txt_ids=torch.zeros(text, 3),
    )


# 1. The transformer, with and without guidance.
dev = fill(FluxTransformer2DModel(**flux_config(2, 3, True)))
keep_model("transformer", dev)
keep("transformer", velocity=dev(**inputs("transformer")).sample)
schnell = fill(FluxTransformer2DModel(**flux_config(1, 1, False)))
keep_model("schnell", schnell)
keep("schnell", velocity=schnell(**inputs("schnell", guidance=False)).sample)

# 2. How residuals are spread. One narrow transformer of n+s blocks per case; the residuals
# are drawn, so that the rule alone is tested. 38 single blocks of width 16 are small.
for name, n, s, m, k, repeat in [
    ("spread_19_5", 19, 0, 5, 0, False),
    ("spread_38_10", 1, 38, 0, 10, False),
    ("spread_3_1", 3, 1, 1, 0, False),
    ("spread_6_2", 1, 6, 1, 2, False),
    ("spread_6_0", 6, 1, 6, 0, False),
    ("spread_xlabs", 5, 1, 2, 0, True),
]:
    config = flux_config(n, s, False) | dict(num_attention_heads=1, attention_head_dim=8)
    model = fill(FluxTransformer2DModel(**config))
    # The same numbers in every block would do for the rule, and 57 blocks' weights would
    # make a large file: blocks are made alike, and stored once.
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
    configs[name] = {k_: v for k_, v in model.config.items() if not k_.startswith("_")}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if not (parts[0].endswith("transformer_blocks") and parts[1] != "0"):
            keep(f"{name}/weights", **{key: value})
    x = inputs(name, batch=1, rows=2, columns=2, text=2, guidance=False)
    double = [0.5 * randn(1, 4, 8) for _ in range(m)]
    single = [0.5 * randn(1, 4, 8) for _ in range(k)]
    keep(name, **{f"double.{i}": r for i, r in enumerate(double)})
    keep(name, **{f"single.{i}": r for i, r in enumerate(single)})
    keep(name, velocity=model(
        **x, controlnet_block_samples=double or None,
        controlnet_single_block_samples=single or None, controlnet_blocks_repeat=repeat,
    ).sample)

# 3. ControlNets: InstantX' Union, Shakker's Pro-2.0, XLabs'.
for name, layers, singles, extra in [
    ("union", 2, 2, dict(num_mode=10)),
    ("pro2", 2, 0, dict(num_mode=None)),
    ("xlabs", 2, 0, dict(num_mode=None, conditioning_embedding_channels=2, patch_size=2)),
]:
    net = fill(FluxControlNetModel(**flux_config(layers, singles, True), **extra))
    keep_model(name, net)
    x = inputs(name)
    cond = randn(2, 3, 48, 80) if name == "xlabs" else randn(2, 15, 8)
    keep(name, condition=cond)
    mode = torch.tensor([[0], [3]]) if name == "union" else None
    out = net(**x, controlnet_cond=cond, controlnet_mode=mode, conditioning_scale=0.7)
    keep(name, **{f"double.{i}": r for i, r in enumerate(out.controlnet_block_samples)})
    keep(name, **{f"single.{i}": r for i, r in enumerate(out.controlnet_single_block_samples or [])})
    x.pop("hidden_states")
    keep(name, velocity=dev(
        hidden_states=tensors[f"{name}/latents"], **x,
        controlnet_block_samples=out.controlnet_block_samples,
        controlnet_single_block_samples=out.controlnet_single_block_samples,
        controlnet_blocks_repeat=name == "xlabs",
    ).sample)

# 4. Autoencoders: four levels as FLUX's, three as the small one.
# The first has 2 latent channels: packed they are the 8 of the transformers above.
for name, channels, layers, latent in [
    ("vae_f8", [4, 8, 8, 8], 2, 2), ("vae_f4", [4, 8, 8], 1, 4)
]:
    vae = fill(AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latent, block_out_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=layers, norm_num_groups=4, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    ))
    keep_model(name, vae)
    picture = randn(2, 3, 32, 48).clamp(-1, 1)
    posterior = vae.encode(picture).latent_dist
    latents = (posterior.mean - 0.1159) * 0.3611
    keep(name, picture=picture, mean=posterior.mean, log_variance=posterior.logvar,
         decoded=vae.decode(latents / 0.3611 + 0.1159).sample)

save_file(tensors, "networks.safetensors")
json.dump(configs, open("networks.json", "w"), indent=1, sort_keys=True)
print(sum(t.numel() * 4 for t in tensors.values()) / 1e6, "MB")
