"""Makes the reference files beside it with PyG (made with torch 2.15, torch_geometric 2.8.1).

pyg_sage_oracle.safetensors  two layers, likes and dislikes apart, every dimension 6 -> 8 -> 8,
                             tensors of the model under "het."
separated.safetensors        a weights file as the store loads it, with inputs and outputs
blind.safetensors            the same with one relation whatever the sign
"""

import json

import torch
from safetensors.torch import save_file
from torch_geometric.data import HeteroData
from torch_geometric.nn import SAGEConv, to_hetero

torch.set_num_threads(1)


class Sage(torch.nn.Module):
    def __init__(self, hidden, out):
        super().__init__()
        self.c1 = SAGEConv((-1, -1), hidden)
        self.c2 = SAGEConv((-1, -1), out)

    def forward(self, x, edge_index):
        return self.c2(self.c1(x, edge_index).relu(), edge_index)


def run(x_user, x_attribute, relations, hidden, out):
    """The model on this graph; `relations` maps names to (2, n) user and attribute numbers."""
    data = HeteroData()
    data["user"].x, data["attr"].x = x_user, x_attribute
    for name, pairs in relations.items():
        data["user", name, "attr"].edge_index = pairs
        data["attr", "rev_" + name, "user"].edge_index = pairs.flip(0)
    model = to_hetero(Sage(hidden, out), data.metadata(), aggr="sum")
    with torch.no_grad():
        model(data.x_dict, data.edge_index_dict)  # fills in the lazy sizes
        result = model(data.x_dict, data.edge_index_dict)
    return dict(model.named_parameters()), result


def oracle():
    torch.manual_seed(3)
    x_user, x_attribute = torch.randn(4, 6), torch.randn(5, 6)
    like = torch.tensor([[0, 0, 1, 2, 3], [0, 1, 1, 2, 4]])
    dislike = torch.tensor([[0, 1, 2, 3], [4, 3, 0, 2]])
    conv = SAGEConv((6, 6), 8)
    saved = {"xu": x_user, "xa": x_attribute, "like": like, "dis": dislike}
    saved["out_attr"] = conv((x_user, x_attribute), like).detach()
    saved |= {"conv." + n: p.detach() for n, p in conv.named_parameters()}
    relations = {"likes": like, "dislikes": dislike}
    parameters, result = run(x_user, x_attribute, relations, 8, 8)
    saved |= {"het." + n: p.detach() for n, p in parameters.items()}
    saved |= {"het_out." + n: v for n, v in result.items()}
    save_file({n: v.contiguous() for n, v in saved.items()}, "pyg_sage_oracle.safetensors")


def weights_file(kind, seed):
    users, attributes, hidden, out = 40, 30, 20, 12
    torch.manual_seed(seed)
    x_user, x_attribute = torch.randn(users, 5), torch.randn(attributes, 9)
    x_user[1::2] = 0  # every other user is new
    sign = torch.randint(-3, 2, (users, attributes)).clamp(min=-1)
    sign[0] = 0  # a user without edges
    sign[:, 0] = 0  # an attribute without edges
    sign = torch.where(torch.rand(users, attributes) < 0.7, torch.zeros_like(sign), sign)
    pairs = lambda chosen: chosen.nonzero().T.contiguous()
    if kind == "separated":
        relations = {"likes": pairs(sign == 1), "dislikes": pairs(sign == -1)}
    else:
        relations = {"prefers": pairs(sign != 0)}
    parameters, result = run(x_user, x_attribute, relations, hidden, out)
    saved = {n: p.detach() for n, p in parameters.items()}
    saved |= {"x_user": x_user, "x_attribute": x_attribute, "sign": sign.to(torch.int64)}
    saved["embedding"] = result["user"]
    config = {"version": 1, "in_dim_attribute": 9, "in_dim_user": 5}
    config |= {"hidden": hidden, "out": out, "relations": kind}
    metadata = {"simpatico": json.dumps(config)}
    save_file({n: v.contiguous() for n, v in saved.items()}, kind + ".safetensors", metadata)


oracle()
weights_file("separated", 4)
weights_file("blind", 5)
