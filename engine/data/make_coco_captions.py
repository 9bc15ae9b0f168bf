"""Picks 2,000 COCO val2017 captions that speak of one nameable thing, and writes
`coco_captions.tsv.gz`: thing <tab> caption. Usage: make_coco_captions.py captions_val2017.tsv.gz categories.txt
The captions are CC BY 4.0, COCO Consortium; see LICENSE-coco.txt."""
import gzip, re, sys

captions, categories = sys.argv[1:3]
names = [line.strip() for line in open(categories) if line.strip()]
PLURAL = {"person": "people", "bus": "buses", "bench": "benches", "sheep": "sheep", "knife": "knives",
          "couch": "couches", "mouse": "mice", "toothbrush": "toothbrushes", "sandwich": "sandwiches",
          "wine glass": "wine glasses", "skis": "skis", "scissors": "scissors"}
EXTRA = ["man", "woman", "boy", "girl", "house", "plane", "kitchen", "bathroom", "bedroom", "desk", "table", "motorbike",
         "sofa", "mug", "plate", "lamp", "guitar", "kitten", "puppy", "sink", "statue", "tower", "bridge", "church", "sign"]
SKIP = {"person"}  # captions say man, woman, boy, girl
things = {n: n for n in names if n not in SKIP} | {e: e for e in EXTRA}
pattern = re.compile(r"\b(" + "|".join(sorted(map(re.escape, things), key=len, reverse=True)) + r")\b")

rows, seen, count = [], set(), {}
for line in gzip.open(captions, "rt", encoding="utf-8"):
    image, caption = line.rstrip("\n").split("\t")
    caption = re.sub(r"\s+", " ", caption).strip().rstrip(".").strip()
    found = pattern.search(caption.lower())
    if image in seen or not found or not 20 <= len(caption) <= 70 or not re.fullmatch(r"[A-Z][A-Za-z ,'-]+", caption):
        continue
    # the thing stands near the front, so that the caption is about it
    if found.start() > 24:
        continue
    thing = found.group(1)
    if count.get(thing, 0) >= 60:
        continue
    seen.add(image)
    count[thing] = count.get(thing, 0) + 1
    rows.append((thing, caption))
rows = rows[:2000]
with gzip.GzipFile("coco_captions.tsv.gz", "wb", mtime=0) as out:
    out.write("".join(f"{t}\t{c}\n" for t, c in rows).encode())
print(len(rows), len(count), sorted(count.items(), key=lambda x: -x[1])[:12])
