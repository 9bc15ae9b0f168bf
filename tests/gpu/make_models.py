"""A bundle of models with true shapes and random weights: make_models.py OUT [--tiny].

Needs PyTorch, diffusers, transformers and tokenizers; downloads nothing. --tiny makes the same
files at toy sizes, so that the whole run can be tried on a CPU.
"""
import json
import pathlib
import sys

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (CLIPTextConfig, CLIPTextModel, Qwen2Config, Qwen2ForCausalLM, T5Config,
                          T5EncoderModel)

out = pathlib.Path(sys.argv[1])
tiny = "--tiny" in sys.argv
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
out.mkdir(parents=True, exist_ok=True)


def write(folder, build):
    """Random weights of PyTorch's usual sizes, made where they are fastest to make."""
    if (out / folder).exists():
        return
    torch.manual_seed(len(folder))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = build()
    torch.set_default_dtype(before)
    # Whole or not at all: a run that is cut off goes on with what is there.
    part = out / f"{folder}.part"
    model.to(dtype).save_pretrained(part, max_shard_size="8GB", safe_serialization=True)
    part.rename(out / folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def byte_tokenizer(path, specials):
    """Bytes and nothing else: what is measured does not depend on the words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


flux = dict(patch_size=1, in_channels=64, num_layers=19, num_single_layers=38,
            attention_head_dim=128, num_attention_heads=24, joint_attention_dim=4096,
            pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=[16, 56, 56])
control = dict(flux, num_layers=5, num_single_layers=10, num_mode=10)
t5 = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
          feed_forward_proj="gated-gelu", tie_word_embeddings=False)
clip = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, max_position_embeddings=77, projection_dim=768)
vae = dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, norm_num_groups=32)
qwen = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=32768,
            rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False,
            bos_token_id=256, eos_token_id=257)
if tiny:
    # Heads as wide as the true ones: other kernels serve other widths.
    small = dict(num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=32)
    flux.update(small, num_layers=2, num_single_layers=2)
    control.update(small, num_layers=1, num_single_layers=1)
    t5.update(d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    clip.update(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vae.update(block_out_channels=[16, 16, 32, 32], layers_per_block=1, norm_num_groups=8)
    qwen.update(vocab_size=512, hidden_size=512, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2)
write("transformer", lambda: FluxTransformer2DModel(**flux))
write("controlnet", lambda: FluxControlNetModel(**control))
write("vae", lambda: AutoencoderKL(
    in_channels=3, out_channels=3, latent_channels=16, act_fn="silu", scaling_factor=0.3611,
    shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **vae))
write("text_encoder_2", lambda: T5EncoderModel(T5Config(**t5)))
write("text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**clip)))
write("language_model", lambda: Qwen2ForCausalLM(Qwen2Config(**qwen)))
chat = ["<|im_start|>", "<|im_end|>"]
byte_tokenizer(out / "language_model/tokenizer.json", chat)
byte_tokenizer(out / "tokenizer_2/tokenizer.json", ["<pad>", "</s>"])
byte_tokenizer(out / "tokenizer/tokenizer.json", ["<|startoftext|>", "<|endoftext|>"])
(out / "language_model/tokenizer_config.json").write_text(json.dumps({
    "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                     "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "eos_token": "<|im_end|>"}))
# A user's embedding is the default bundle's, so that events lead to it; the soft prompt made of it
# has the language model's width.
embedding, inner, tokens, width = 256, 1024, 8, qwen["hidden_size"]
torch.manual_seed(8)
save_file({"mlp.0.weight": torch.randn(inner, embedding) / embedding ** 0.5,
           "mlp.0.bias": torch.zeros(inner),
           "mlp.2.weight": torch.randn(tokens * width, inner) / inner ** 0.5,
           "mlp.2.bias": torch.zeros(tokens * width)}, out / "soft_prompt.safetensors",
          metadata={"simpatico": json.dumps({
              "embedding": embedding, "inner": inner, "tokens": tokens, "hidden": width,
              "scale": 0.02, "normalize": True})})
(out / "manifest.json").write_text(json.dumps({
    "version": 1, "name": "random", "about": "True shapes, random weights: for measuring only.",
    "licence": "none", "files": [], "models": [],
    "roles": {
        "language_model": "language_model",
        "soft_prompt": "soft_prompt.safetensors",
        "sage": "default:sage.safetensors",
        "text_encoder": "cache:all-minilm-l6-v2",
        "flux": {"transformer": "transformer", "controlnet": "controlnet", "vae": "vae",
                 "text": {"kind": "t5-clip", "t5": "text_encoder_2",
                          "t5_tokenizer": "tokenizer_2/tokenizer.json", "clip": "text_encoder",
                          "clip_tokenizer": "tokenizer/tokenizer.json",
                          "tokens": 16 if tiny else 512}}},
    "settings": {"backend": "canny", "steps": 60, "side_min": 64, "side_max": 1024,
                 "square": False, "multiple": 16, "dtype": "bf16"}}, indent=1))
print(out, device, dtype)
