"""How many of a digits model's samples are recognised as the digit that was asked for.

    python benchmarks/digits.py [MODEL]      the bundled model `digits` by default

500 samples for each guidance weight, at temperature 1 and the preset's other defaults; the judge
is the nearest class mean in pixels, and real test digits show how good that judge is. Writes
results/digits.json.
"""

import json
import platform
import sys
import time
from collections import deque
from datetime import date
from pathlib import Path

import torch

from mar_mini import data, evaluation, load_pretrained

RESULT = Path(__file__).parent / "results" / "digits.json"


def main(name: str = "digits") -> None:
    pipeline = load_pretrained(name)
    images, labels = data.to_tensors(data.load_images("digits", "train"))
    means = evaluation.class_means(data.denormalise(data.normalise(images)), labels)
    real, truth = data.to_tensors(data.load_images("digits", "test"))
    real = data.denormalise(data.normalise(real))
    rows = {
        "real test digits": {
            "recognised": evaluation.recognised(real, truth, means),
            "std of pixels": float((2 * real).std()),
        }
    }
    asked = torch.arange(500) % 10

    for cfg, clip in ((1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (1.0, None)):
        start = time.perf_counter()
        seeded = torch.Generator().manual_seed(0)
        settings = {"cfg": cfg, "clip": clip, "temperature": 1.0, "generator": seeded}
        last = deque(pipeline.sample(asked, **settings), maxlen=1)[0]
        rows[f"guidance {cfg}" + ("" if clip else ", no bound on x0")] = {
            "recognised": evaluation.recognised(last.images(), asked, means),
            "std of pixels": float(last.tokens.std()),
            "seconds": round(time.perf_counter() - start, 1),
        }
    for row, values in rows.items():
        print(f"{row:32}", *(f"{key} {value:.3g}" for key, value in values.items()))
    RESULT.parent.mkdir(exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    result = {
        "date": str(date.today()),
        "machine": machine,
        "training": pipeline.card,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
