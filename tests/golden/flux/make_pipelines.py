"""Golden files for schedule and whole pipelines, from diffusers with small random weights.

Uses the transformer, the Union ControlNet and the autoencoder of networks.safetensors (run
make_networks.py first) and writes pipelines.safetensors: prompts, pictures, noise, results.

Two things are taken out of torch's hands so that another program can repeat them: the noise
is stored and fed in, and the autoencoder's posterior gives its mean instead of a sample.
"""

import json

import numpy as np
import torch
from diffusers import (
    AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetImg2ImgPipeline,
    FluxControlNetModel, FluxControlNetPipeline, FluxTransformer2DModel,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
torch.set_grad_enabled(False)
rng = torch.Generator().manual_seed(1)
weights = load_file("networks.safetensors")
configs = json.load(open("networks.json"))
tensors = {}


def load(cls, case, **changes):
    net = cls(**(configs[case] | changes))
    prefix = f"{case}/weights/"
    net.load_state_dict({k[len(prefix):]: v for k, v in weights.items() if k.startswith(prefix)})
    return net.eval()


def scheduler():
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
        base_image_seq_len=256, max_image_seq_len=4096,
    )


# Noise levels for five sizes (in tokens) and step counts.
for tokens, steps in [(64, 4), (256, 20), (1024, 28), (4096, 60), (16384, 50)]:
    s = scheduler()
    s.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens))
    tensors[f"sigmas/{tokens}_{steps}"] = s.sigmas

DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()

parts = dict(
    scheduler=scheduler(), vae=load(AutoencoderKL, "vae_f8"),
    text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    transformer=load(FluxTransformer2DModel, "transformer"),
    controlnet=load(FluxControlNetModel, "union"),
)
control = torch.rand(1, 3, 32, 48, generator=rng)
picture = torch.rand(1, 3, 32, 48, generator=rng)
prompt = torch.randn(1, 4, 12, generator=rng)
pooled = torch.randn(1, 10, generator=rng)
# (b, c, h, w) noise of the latents, 1/8 of the picture.
noise = torch.randn(1, 2, 4, 6, generator=rng)
tensors |= dict(control=control, picture=picture, text=prompt, pooled=pooled, noise=noise)


def pack(x):
    return FluxControlNetPipeline._pack_latents(x, *x.shape)


# The pipelines normalise pictures, but take a tensor for the control as it is.
common = dict(
    prompt_embeds=prompt, pooled_prompt_embeds=pooled, control_image=control * 2 - 1,
    control_mode=0,
    controlnet_conditioning_scale=0.6, height=32, width=48, guidance_scale=3.5,
)
canny = FluxControlNetPipeline(**parts)
canny.set_progress_bar_config(disable=True)
for steps, start, end in [(4, 0.0, 1.0), (20, 0.0, 1.0), (20, 0.1, 0.6)]:
    for kind in ("latent", "pt"):
        out = canny(
            **common, num_inference_steps=steps, latents=pack(noise), output_type=kind,
            control_guidance_start=start, control_guidance_end=end,
        ).images
        tensors[f"canny_{steps}_{end}/{kind}"] = out

img2img = FluxControlNetImg2ImgPipeline(**parts)
img2img.set_progress_bar_config(disable=True)
# The pipeline draws its noise inside: give it ours instead.
import diffusers.pipelines.flux.pipeline_flux_controlnet_image_to_image as module
module.randn_tensor = lambda shape, **_: noise.reshape(shape)
for steps in (4, 20):
    for kind in ("latent", "pt"):
        out = img2img(
            **common, image=picture, strength=0.6, num_inference_steps=steps, output_type=kind,
        ).images
        tensors[f"img2img_{steps}/{kind}"] = out

save_file({k: v.contiguous().float() for k, v in tensors.items()}, "pipelines.safetensors")
