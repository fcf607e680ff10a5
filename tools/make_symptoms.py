"""Make data/symptoms/evidence.json: what small trainings show, healthy or with one thing wrong.

    python tools/make_symptoms.py            all states, seeds 0 to 4; about ten minutes
    python tools/make_symptoms.py --fresh    again from the start, not only what is missing

Exercise 4 of chapter 7 is checked on it. Each row is one call of `symptoms.symptoms`.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from mar_mini.course.symptoms import STATES, Evidence, small_digits, symptoms
from mar_mini.files import write_atomically

FILE = Path(__file__).resolve().parent.parent / "data" / "symptoms" / "evidence.json"
SEEDS = range(5)
# the states, and a scale that is wrong in the other direction
CALLS = [*STATES.items(), ("latent scale", {"latent_scale": 20.0})]


def written(arguments: dict) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def rounded(evidence: Evidence) -> dict:
    """Six digits of each number."""
    return {
        k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in asdict(evidence).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="make all rows again")
    fresh = parser.parse_args().fresh
    rows = json.loads(FILE.read_text("utf-8")) if FILE.is_file() and not fresh else []
    names = [field.name for field in fields(Evidence)]
    rows = [row for row in rows if list(row["evidence"]) == names]
    there = {(row["arguments"], row["seed"]) for row in rows}
    latents, labels = small_digits()
    order = [written(arguments) for _, arguments in CALLS]
    missing = [
        (seed, state, arguments)
        for seed in SEEDS
        for state, arguments in CALLS
        if (written(arguments), seed) not in there
    ]
    for seed, state, arguments in tqdm(missing, unit="training"):
        evidence = rounded(symptoms(latents, labels, **arguments, seed=seed).evidence)
        rows.append(
            {"state": state, "arguments": written(arguments), "seed": seed, "evidence": evidence}
        )
        rows.sort(key=lambda row: (row["seed"], order.index(row["arguments"])))
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        write_atomically(FILE, lambda path, text=text: path.write_text(text, "utf-8"))


if __name__ == "__main__":
    main()
