#!/usr/bin/env bash
# Makes the model inside the package anew, from nothing: corpus, training (about an hour and a half on two quiet
# cores; run it again after any stop and it goes on), export, quantization, golden numbers. Seeded.
# Needs `pip install -e '.[reference]'` and a C++ compiler, which torch.compile uses.
set -euo pipefail
cd "$(dirname "$0")"
[ -f data/train.jsonl ] || python corpus.py data --seed 0 --megabytes 30
python train.py --seed 0 --tokens 14e6
rm -rf export && python train.py --export --out export
python train_head.py export
cp run/loss.png loss.png
rm -rf master && mkdir master && cp export/* master/
rm -rf ../../../engine/tiny && numoe quantize master ../../../engine/tiny --quant int8
python make_golden.py
python evaluate.py
