"""What the rivals do with the same weights in the same run: compare.py STAGE MODELS ...

- velocity FILE: our velocity of one step against diffusers' on the same inputs.
- edit SIDE STEPS BATCH [compile]: FluxControlNetPipeline's transformer and ControlNet loop.
- logits FILE: our logits against transformers'.
- decode PROMPT NEW BATCH: transformers' generate.
- gradients FOLDER: our DPO loss and slopes against PEFT's, of the same adapter on the same pairs.
- dpo GROUPS STEPS: TRL's DPO loss on a PEFT model, forward, backward and optimiser.
One JSON object a line, as gpu_checks.
"""
import json
import pathlib
import sys
import time

import torch
from safetensors.torch import load_file

stage, models, *rest = sys.argv[1:]
models = pathlib.Path(models)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32


def wait():
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work):
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def networks():
    from diffusers import FluxControlNetModel, FluxTransformer2DModel
    load = dict(torch_dtype=dtype)
    return (FluxTransformer2DModel.from_pretrained(models / "transformer", **load).to(device),
            FluxControlNetModel.from_pretrained(models / "controlnet", **load).to(device))


def ids_of(rows):
    ids = torch.zeros(rows, rows, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(rows)[None, :]
    return ids.reshape(-1, 3).to(device)


def step(transformer, control, latents, condition, text, pooled, sigma, rows, scale):
    b = latents.shape[0]
    common = dict(hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled,
                  timestep=torch.full((b,), sigma, device=device, dtype=dtype),
                  img_ids=ids_of(rows), txt_ids=torch.zeros(text.shape[1], 3, device=device),
                  guidance=torch.full((b,), 3.5, device=device, dtype=dtype), return_dict=False)
    mode = torch.zeros(b, 1, dtype=torch.long, device=device)
    double, single = control(controlnet_cond=condition, controlnet_mode=mode,
                             conditioning_scale=scale, **common)
    return transformer(controlnet_block_samples=double, controlnet_single_block_samples=single,
                       **common)[0]


def difference(ours, theirs):
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return {"relative_error": ((ours - theirs).norm() / theirs.norm()).item(),
            "largest_error": (ours - theirs).abs().max().item()}


def velocity():
    saved = load_file(rest[0])
    inputs = {k: saved[k].to(device, dtype) for k in ("latents", "condition", "text", "pooled")}
    rows = int(inputs["latents"].shape[1] ** 0.5)
    with torch.no_grad():
        theirs = step(*networks(), sigma=0.7, rows=rows, scale=0.7, **inputs)
    return difference(saved["velocity"], theirs)


def edit():
    side, steps, batch = map(int, rest[:3])
    rows = side // 16
    transformer, control = networks()
    width = transformer.config
    if "compile" in rest:
        transformer, control = torch.compile(transformer), torch.compile(control)
    x = torch.randn(batch, rows * rows, width.in_channels, device=device, dtype=dtype)
    text = torch.randn(batch, 512, width.joint_attention_dim, device=device, dtype=dtype)
    pooled = torch.randn(batch, width.pooled_projection_dim, device=device, dtype=dtype)

    def sample(n):
        with torch.no_grad():
            latents = x.clone()
            for i in range(n):
                v = step(transformer, control, latents, x, text, pooled, 1 - i / n, rows, 0.7)
                latents = latents - v / n
    timed(lambda: sample(2))
    seconds = timed(lambda: sample(steps))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"side": side, "steps": steps, "batch": batch, "compiled": "compile" in rest,
            "sample_seconds": seconds, "a_step": seconds / steps, "peak_bytes": peak}


def language_model():
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(models / "language_model", dtype=dtype).to(device)


def logits():
    saved = load_file(rest[0])
    with torch.no_grad():
        theirs = language_model()(saved["ids"].long()[None].to(device)).logits
    return difference(saved["logits"], theirs)


def decode():
    prompt, new, batch = map(int, rest[:3])
    model = language_model()
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)

    def run(n):
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=n, min_new_tokens=n, pad_token_id=0)
    run(2)
    prefill, whole = timed(lambda: run(1)), timed(lambda: run(new))
    return {"prompt": prompt, "new": new, "batch": batch,
            "prefill_tokens_per_s": batch * prompt / prefill,
            "decode_tokens_per_s": batch * (new - 1) / (whole - prefill)}


def gradients():
    from peft import PeftModel
    saved = load_file(pathlib.Path(rest[0]) / "slopes.safetensors")
    ids, answer = saved.pop("ids").long().to(device), saved.pop("answers").shape[1]
    loss = saved.pop("loss").item()
    model = PeftModel.from_pretrained(language_model(), rest[0], is_trainable=True)

    def logps():
        out = model(ids, logits_to_keep=answer + 1).logits[:, :-1].float().log_softmax(-1)
        return out.gather(-1, ids[:, -answer:, None]).sum((1, 2))
    with torch.no_grad(), model.disable_adapter():
        before = logps()
    ratios = (logps() - before).reshape(-1, 2)
    theirs = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    theirs.backward()
    slopes = {name.replace(".default", ""): p.grad for name, p in model.named_parameters()
              if p.requires_grad}
    names = sorted(saved)
    flat = [torch.cat([t[n].float().cpu().flatten() for n in names]) for t in (saved, slopes)]
    return {"loss_off_by": abs(loss - theirs.item()), "loss": theirs.item(),
            "weights": len(flat[0]), **difference(*flat)}


def dpo():
    """TRL's work for the same pairs: prompt and answer in one row, chosen and rejected apart."""
    from peft import LoraConfig, get_peft_model
    groups, steps = map(int, rest[:2])
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear",
                      task_type="CAUSAL_LM")
    model = get_peft_model(language_model(), lora)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-7)
    ids = torch.randint(0, model.config.vocab_size, (2 * groups, 8 + 160 + 32), device=device)

    def logps(model):
        out = model(ids, logits_to_keep=33).logits[:, :-1].float().log_softmax(-1)
        return out.gather(-1, ids[:, -32:, None]).sum((1, 2))

    def one():
        with torch.no_grad(), model.disable_adapter():
            reference = logps(model)
        ours = logps(model)
        margin = (ours - reference)[:groups] - (ours - reference)[groups:]
        loss = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    one()
    seconds = timed(lambda: [one() for _ in range(steps)]) / steps
    return {"groups": groups, "steps": steps, "seconds_a_step": seconds,
            "tokens_per_s": groups * (8 + 160 + 64) / seconds,
            "note": "one pass a pair; the neighbours' term is K further passes"}


found = {"velocity": velocity, "edit": edit, "logits": logits, "decode": decode, "gradients": gradients,
         "dpo": dpo}[stage]()
print(json.dumps({"stage": stage, "by": "reference", "device": device, "arguments": rest, **found}))
