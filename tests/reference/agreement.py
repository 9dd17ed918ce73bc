"""Prints how far our logits are from transformers', for every golden case: the table in the README.

python tests/reference/agreement.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import tiny

from numoe.engine import load

print("| checkpoint | family | prompt tokens | largest difference of a logit | greedy tokens equal |")
print("| --- | --- | ---: | ---: | ---: |")
for case in tiny.cases():
    golden = tiny.load_golden(case)
    with tempfile.TemporaryDirectory() as folder:
        session = load(tiny.write_checkpoint(case, Path(folder) / case)).session(1024)
    logits = session.feed(golden.ids)
    difference = float(np.abs(logits - golden.logits).max())
    last, equal = logits[-1], 0
    for token in golden.greedy.tolist():
        if int(last.argmax()) != token:
            break
        equal += 1
        last = session.feed([token], last=True)[0]
    family = golden.config["model_type"]
    print(f"| {case} | {family} | {len(golden.ids)} | {difference:.1e} | {equal} of {len(golden.greedy)} |")
