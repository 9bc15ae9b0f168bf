"""Makes the small pickles that the restricted reader is tested with. Needs torch and numpy."""
import collections
import pickle

import numpy as np
import torch

tensors = collections.OrderedDict()
tensors["a"] = torch.arange(6, dtype=torch.float32).reshape(2, 3)
tensors["b.c"] = torch.ones(3, dtype=torch.float16)
torch.save(tensors, "two_tensors.pt")
with open("numpy.pkl", "wb") as f:
    pickle.dump({"net": {"kernel": np.arange(4, dtype=np.float32).reshape(2, 2), "bias": np.zeros(2, np.float32)}}, f, protocol=3)
