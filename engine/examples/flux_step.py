"""The step of flux_step.rs in diffusers (same shape, random weights, f32), for comparison.
Run: python flux_step.py [runs]; THREADS (2) threads."""

import os
import resource
import sys
import time

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel

torch.set_num_threads(int(os.environ.get("THREADS", "2")))
torch.set_grad_enabled(False)
runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
config = dict(
    in_channels=32, attention_head_dim=64, num_attention_heads=3, joint_attention_dim=384,
    pooled_projection_dim=384, guidance_embeds=True, axes_dims_rope=[8, 28, 28],
)
flux = FluxTransformer2DModel(**config, num_layers=3, num_single_layers=6).eval()
net = FluxControlNetModel(**config, num_layers=1, num_single_layers=2, num_mode=10).eval()
for p in net.parameters():
    p.add_(0.01)
for side in (16, 32):
    grid = torch.zeros(side, side, 3)
    grid[..., 1] += torch.arange(side)[:, None]
    grid[..., 2] += torch.arange(side)[None]
    for batch in (1, 4, 16):
        latents = torch.randn(batch, side * side, 32)
        x = dict(
            hidden_states=latents, encoder_hidden_states=torch.full((batch, 24, 384), 0.1),
            pooled_projections=torch.full((batch, 384), 0.1), timestep=torch.full((batch,), 0.5),
            guidance=torch.full((batch,), 3.5), img_ids=grid.reshape(-1, 3),
            txt_ids=torch.zeros(24, 3),
        )
        least = least_cpu = 1e9
        for _ in range(runs + 1):
            start, cpu = time.perf_counter(), time.process_time()
            double, single = net(
                **x, controlnet_cond=latents, controlnet_mode=torch.zeros(batch, 1, dtype=torch.long),
                conditioning_scale=0.7, return_dict=False,
            )
            flux(**x, controlnet_block_samples=double, controlnet_single_block_samples=single)
            least = min(least, (time.perf_counter() - start) * 1e3)
            least_cpu = min(least_cpu, (time.process_time() - cpu) * 1e3)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print({"tokens": side * side, "batch": batch, "ms": round(least, 1),
               "cpu_ms": round(least_cpu, 1), "peak_mb": round(peak)}, flush=True)
