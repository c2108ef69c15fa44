"""Runs on the worker, in the job's own folder; mounted by `client_side.py`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from openweights import OpenWeights

ow = OpenWeights()
params = ow.jobs.retrieve(sys.argv[1]).params["validated_params"]
counts = Counter(params["text"].split()).most_common(params["top"])
for step, (word, count) in enumerate(counts, start=1):
    ow.run.log({"step": step, "count": count})
    print(f"{word}: {count}")
# What lies under uploads/ when the job ends becomes its result.
Path("uploads").mkdir(exist_ok=True)
lines = [f"{word},{count}\n" for word, count in counts]
Path("uploads/counts.csv").write_text("word,count\n" + "".join(lines))
