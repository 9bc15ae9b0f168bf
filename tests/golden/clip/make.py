"""CLIP on tiny random weights, in transformers' layout and in OpenCLIP's, with their outputs.
Run with: torch 2.15.0, torchvision 0.29.2, transformers 5.24.0, open_clip_torch 3.3.0, pillow.

    python make.py    # writes transformers.*, open_clip.*, expected.safetensors

The letterbox is that of HPSv2's package (its open_clip/transform.py): longer side to the size,
black around.
"""
import json

import numpy as np
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional as F
from transformers import CLIPConfig, CLIPModel

torch.manual_seed(0)
torch.set_grad_enabled(False)
expected = {}


def louder(model):
    """Nothing silent: biases and norms away from nought and one."""
    for p in model.parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.ndim else 0.0))
    return model.eval()


config = CLIPConfig(
    text_config=dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                     num_attention_heads=3, max_position_embeddings=10, bos_token_id=48,
                     eos_token_id=49),
    vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                       num_attention_heads=4, image_size=20, patch_size=5),
    projection_dim=16,
)
model = louder(CLIPModel(config))
assert config.text_config.hidden_act == "quick_gelu"
save_file({k: v.contiguous() for k, v in model.state_dict().items() if "position_ids" not in k},
          "transformers.safetensors")
with open("transformers.json", "w") as file:
    json.dump(config.to_dict(), file, indent=1, sort_keys=True, default=str)
pictures = torch.randn(2, 3, 20, 20)
ids = torch.tensor([[48, 7, 3, 21, 49, 49, 49, 49], [48, 11, 5, 49, 49, 49, 49, 49]])
text = model.text_model(input_ids=ids).pooler_output
vision = model.vision_model(pixel_values=pictures).pooler_output
expected |= {
    "transformers/ids": ids.int(), "transformers/texts": model.text_projection(text),
    "transformers/pictures": pictures, "transformers/vectors": model.visual_projection(vision),
}

vision_cfg = dict(image_size=20, layers=2, width=40, head_width=10, patch_size=5, mlp_ratio=2.0)
text_cfg = dict(context_length=9, vocab_size=60, width=24, heads=3, layers=2, mlp_ratio=2.0)
model = louder(CLIP(16, CLIPVisionCfg(**vision_cfg), CLIPTextCfg(**text_cfg), quick_gelu=False))
weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
save_file(weights, "open_clip.safetensors")
with open("open_clip.json", "w") as file:
    json.dump({"model_cfg": {"embed_dim": 16, "vision_cfg": vision_cfg, "text_cfg": text_cfg}},
              file, indent=1)
# OpenCLIP pools at the largest id, which is the end token, and pads with 0.
ids = torch.tensor([[58, 7, 3, 21, 59, 0, 0, 0, 0], [58, 11, 59, 0, 0, 0, 0, 0, 0]])
expected |= {
    "open_clip/ids": ids.int(), "open_clip/texts": model.encode_text(ids),
    "open_clip/pictures": pictures, "open_clip/vectors": model.encode_image(pictures),
}


def letterbox(picture, side):
    w, h = picture.size
    scale = side / float(max(w, h))
    size = [round(h * scale), round(w * scale)]
    x = F.resize(F.to_tensor(picture), size, F.InterpolationMode.BICUBIC, antialias=True)
    down, across = side - x.shape[1], side - x.shape[2]
    return F.pad(x, [across // 2, down // 2, across - across // 2, down - down // 2], fill=0)


def bytes_of(x):
    return (x.clamp(0, 1) * 255).round().permute(1, 2, 0)


rng = np.random.default_rng(0)
for name, (w, h) in {"wide": (97, 61), "tall": (50, 83)}.items():
    y, x = np.mgrid[:h, :w]
    smooth = np.stack([np.sin(x / 9 + y / 7), np.cos(x / 5), np.sin(y / 11 + x / 13)], -1)
    pixels = (smooth * 90 + 128 + rng.normal(0, 8, (h, w, 3))).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    crop = image_transform(20, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    expected |= {
        f"framing/{name}": torch.tensor(pixels).float(),
        f"framing/{name}/crop": bytes_of(crop(picture)),
        f"framing/{name}/letterbox": bytes_of(letterbox(picture, 20)),
    }
save_file({k: v.detach().clone().contiguous() for k, v in expected.items()}, "expected.safetensors")
