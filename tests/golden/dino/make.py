"""Reference DINOv2 forward in torch on tiny random weights, and with real weights on photographs.

    python make.py                               # writes tiny.safetensors
    python make.py dinov2s.pt FOLDER out.json    # embeddings of the photographs in FOLDER

Written from the published architecture: ViT with class and register tokens, layer scale,
LayerNorm eps 1e-6, exact GELU, position table resized bicubically with antialiasing.
"""
import json
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

torch.set_num_threads(1)


def forward(w, x, heads):
    d = w["cls_token"].shape[-1]
    p = w["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(k.split(".")[1]) for k in w if k.startswith("blocks."))
    b, _, h, wd = x.shape
    t = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p)
    t = t.flatten(2).transpose(1, 2)
    pos = w["pos_embed"]
    n = int(round((pos.shape[1] - 1) ** 0.5))
    grid = pos[:, 1:].reshape(1, n, n, d).permute(0, 3, 1, 2)
    if (h // p, wd // p) != (n, n):
        grid = F.interpolate(grid, size=(h // p, wd // p), mode="bicubic", antialias=True)
    t = t + grid.permute(0, 2, 3, 1).reshape(1, -1, d)
    cls = w["cls_token"] + pos[:, :1]
    t = torch.cat([cls.expand(b, -1, -1), w["register_tokens"].expand(b, -1, -1), t], 1)
    norm = lambda t, n: F.layer_norm(t, (d,), w[n + ".weight"], w[n + ".bias"], 1e-6)
    lin = lambda t, n: F.linear(t, w[n + ".weight"], w[n + ".bias"])
    for i in range(depth):
        s = f"blocks.{i}."
        q, k, v = lin(norm(t, s + "norm1"), s + "attn.qkv").reshape(b, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, d)
        t = t + lin(a, s + "attn.proj") * w[s + "ls1.gamma"]
        m = lin(F.gelu(lin(norm(t, s + "norm2"), s + "mlp.fc1")), s + "mlp.fc2")
        t = t + m * w[s + "ls2.gamma"]
    return norm(t, "norm")[:, 0]


if len(sys.argv) > 1:
    weights = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
    out = {}
    for path in sorted(pathlib.Path(sys.argv[2]).glob("*.jpg")):
        picture = Image.open(path).convert("RGB").resize((224, 224), Image.BICUBIC)
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
        out[path.stem] = forward(weights, x, 6)[0].tolist()
        picture.save(pathlib.Path(sys.argv[3]).parent / f"{path.stem}.png")
    json.dump(out, open(sys.argv[3], "w"))
else:
    torch.manual_seed(0)
    d, heads, depth, p, n = 16, 2, 2, 4, 5
    w = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + n * n, d), "register_tokens": (1, 2, d),
         "patch_embed.proj.weight": (d, 3, p, p), "patch_embed.proj.bias": (d,), "norm.weight": (d,), "norm.bias": (d,)}
    for i in range(depth):
        s = f"blocks.{i}."
        w |= {s + "norm1.weight": (d,), s + "norm1.bias": (d,), s + "norm2.weight": (d,), s + "norm2.bias": (d,),
              s + "attn.qkv.weight": (3 * d, d), s + "attn.qkv.bias": (3 * d,), s + "attn.proj.weight": (d, d), s + "attn.proj.bias": (d,),
              s + "mlp.fc1.weight": (4 * d, d), s + "mlp.fc1.bias": (4 * d,), s + "mlp.fc2.weight": (d, 4 * d), s + "mlp.fc2.bias": (d,),
              s + "ls1.gamma": (d,), s + "ls2.gamma": (d,)}
    w = {k: torch.randn(s) * 0.4 for k, s in w.items()}
    x = torch.randn(2, 3, 12, 28)
    square = torch.randn(1, 3, 20, 20)
    save_file(w | {"x": x, "y": forward(w, x, heads).contiguous(), "square": square, "square_y": forward(w, square, heads).contiguous()}, "tiny.safetensors")
