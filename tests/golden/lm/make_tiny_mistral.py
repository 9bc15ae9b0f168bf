"""Makes mistral/: a tiny encoder in the form of Linq-Embed-Mistral, and its sentence vectors.

Usage, in this folder: python make_tiny_mistral.py (torch 2.15, transformers 5.24, tokenizers 0.23).
A bare MistralModel in four safetensors shards; a word-level tokenizer that puts <s> in front and,
as its settings ask, </s> behind. A sentence's vector is the last token's state at length 1, computed
from a batch padded behind, as the model's card pools it.
"""
import json, torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MistralConfig, MistralModel

torch.manual_seed(0)
torch.set_num_threads(1)
words = "a an the rustic weathered wood falling snow neon sign of over old stone fireplace leather sofa".split()
vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *words])}
tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
tokenizer.save("mistral/tokenizer.json")
json.dump({"add_bos_token": True, "add_eos_token": True}, open("mistral/tokenizer_config.json", "w"))

config = MistralConfig(
    vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    sliding_window=64, bos_token_id=1, eos_token_id=2)
model = MistralModel(config).eval()
with torch.no_grad():  # larger weights than the initialiser's, so that attention is not flat
    for p in model.parameters():
        if p.dim() > 1:
            p.mul_(8)
model.save_pretrained("mistral", max_shard_size="20KB")

texts = ["rustic wood", "falling snow over an old stone fireplace", "sofa", "a neon sign of the unknown"]
rows = [tokenizer.encode(t).ids + [2] for t in texts]
longest = max(map(len, rows))
ids = torch.tensor([r + [0] * (longest - len(r)) for r in rows])
mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
with torch.no_grad():
    states = model(ids, attention_mask=mask).last_hidden_state
out = []
for text, row, state in zip(texts, rows, states):
    vector = torch.nn.functional.normalize(state[len(row) - 1], dim=0)
    out.append({"text": text, "vector": [round(x, 7) for x in vector.tolist()]})
json.dump(out, open("mistral/sentences.json", "w"))
