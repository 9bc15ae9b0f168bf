"""What a unit of work (a step, a token) is made of on a GPU, kernel by kernel:

    kernel_times.py TABLE FEW MANY CHECKS STAGE DEVICE BUNDLE ARGUMENTS...

Runs a stage of gpu_checks twice with the profiler before it (libsimpatico_cuda_profiler.so beside
CHECKS, or PROFILER), {} among its arguments being FEW units and then MANY, and takes the difference
apart. TABLE gets every row; the largest are printed as one JSON object.
"""
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

table, few, many, checks, *arguments = sys.argv[1:]
units = int(many) - int(few)
checks = str(pathlib.Path(checks).absolute())
profiler = os.environ.get("PROFILER") or pathlib.Path(checks).parent / "libsimpatico_cuda_profiler.so"

if not pathlib.Path(profiler).exists():
    sys.exit(f"no profiler {profiler}: tests/gpu/build makes it")


def run(count):
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        environment = dict(os.environ, CARD_PROFILE=file.name,
                           LD_PRELOAD=f"{profiler}:{os.environ.get('LD_PRELOAD', '')}".rstrip(":"))
        filled = [a.replace("{}", count) for a in arguments]
        subprocess.run([checks, *filled], env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(pathlib.Path(file.name).read_text())


before, after = run(few), run(many)
rows = []
for name, sums in after.items():
    times, ms, gflop = ((b - a) / units for a, b in zip(before.get(name, (0, 0, 0)), sums))
    if times:
        rows.append((ms, times, gflop, name))
rows.sort(reverse=True)
whole = sum(row[0] for row in rows)
lines = [f"{' '.join(arguments)}: {whole:.3f} ms and {sum(r[1] for r in rows):.0f} launches a unit", "",
         "| kernel | times | ms | share | TFLOP/s | GB/s |", "|---|---|---|---|---|---|"]
for ms, times, gflop, name in rows:
    # What a product reaches, in arithmetic and in reading and writing each of its matrices once;
    # billions in a millisecond are thousand billions in a second.
    reached = read = ""
    shape = re.fullmatch(r"product (\d+) x (\d+) of (\d+)(?: x(\d+))? (f|bf)(\d+)", name)
    if shape and ms > 0:
        n, m, k, batch, bits = (int(part or 1) for part in shape.group(1, 2, 3, 4, 6))
        gigabytes = times * batch * (n * k + k * m + n * m) * bits / 8e9
        reached, read = f"{gflop / ms:.0f}", f"{1000 * gigabytes / ms:.0f}"
    lines.append(f"| {name} | {times:.1f} | {ms:.4f} | {ms / whole:.1%} | {reached} | {read} |")
pathlib.Path(table).write_text("\n".join(lines) + "\n")
products = [row for row in rows if row[2]]
multiplied = sum(row[0] for row in products)
print(json.dumps({
    "stage": "profile", "table": table, "ms": whole, "launches": sum(row[1] for row in rows),
    "products_share": multiplied / whole if whole else None,
    "products_tflop_per_s": sum(row[2] for row in products) / multiplied if multiplied else None,
    "most": {row[3]: round(row[0] / whole, 4) for row in rows[:6]},
}))
