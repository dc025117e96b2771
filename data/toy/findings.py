"""The paper's six findings in miniature: experiments on the toy world, three seeds each.

    python data/toy/findings.py

Each experiment is a run of `specialize.py`, in runs/findings/EXPERIMENT-SEED. Those that have
finished are not repeated, so delete that folder after changing the code. Then a table, a sentence
and a plot follow for each finding. Errors are standard errors over the seeds.
"""

import argparse
import functools
import json
import math
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from eval import DATASETS, TOY, curves_plot, evaluate_task, log_linear_fit, read_log, scaling_plot
from grammar import teacher_records, train_bpe, walk
from make import MERGES, SEED, TEMPERATURE, make_problems
from specialize import batch_loss, build_examples, checkpoints, collate, ood_accuracy, parse_record
from t5 import T5, Tokenizer, UserError, load_pretrained, run_command

import torch  # after t5, which sets how OpenMP's threads wait

FOLDER = Path("runs") / "findings"
SEEDS = (0, 1, 2)
SIZES = ("0.04M", "0.1M", "0.25M", "1M")
FORMATS = {name: ["--formats", f"{name}_cot", f"{name}_answer_only", "--shots", "4"]
           for name in ("in_context", "zero_shot")}
EXPERIMENTS = {  # options that differ from the main command's
    "tuned-1M": ["--checkpoint-every", "50", "--keep-checkpoints", "--shots", "4"],
    "likelihood": ["--checkpoint-every", "50", "--keep-checkpoints", "--loss", "nll"],
    **{f"tuned-{size}": ["--model", TOY / f"tuned-{size}"] for size in SIZES if size != "1M"},
    **{f"{start}-long": ["--model", TOY / f"{start}-1M", "--steps", "1600",
                         "--learning-rate", "1e-3"] for start in ("tuned", "raw")},
    **FORMATS,
    "long": ["--steps", "2400", "--schedule", "constant", "--keep-checkpoints"],
}
OOD = [f"toy-{dataset.name}" for dataset in DATASETS.values() if dataset.select]

# --- runs ---

def run_all(jobs):
    """Run the unfinished experiments, `jobs` at a time, with one thread each."""

    def start(experiment):
        name, seed = experiment
        run = FOLDER / f"{name}-{seed}"
        command = [sys.executable, ROOT / "specialize.py", "--name", f"findings/{run.name}",
                   "--seed", str(seed), "--threads", "1", *EXPERIMENTS[name]]
        command += [] if name == "tuned-1M" else ["--bbh-limit", "0", "--skip-bbh"]  # not needed
        command += ["--resume"] if (run / "arguments.json").exists() else []
        print(f"{name}, seed {seed}", flush=True)
        with open(FOLDER / f"{run.name}.txt", "a") as output:
            return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode

    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [(name, seed) for seed in SEEDS for name in EXPERIMENTS
               if not (FOLDER / f"{name}-{seed}" / "results.json").exists()]
    with ThreadPoolExecutor(jobs) as pool:
        statuses = list(pool.map(start, missing))
    failed = [f"{FOLDER}/{name}-{seed}.txt" for (name, seed), status in zip(missing, statuses)
              if status]
    if failed:
        raise UserError(f"experiments failed; see {', '.join(failed)}, then run this again")

# --- what they measured ---

def results(name):
    """Return each seed's results.json: {"selected": log entry, "test": {model: accuracies}}."""
    return [json.loads((FOLDER / f"{name}-{seed}" / "results.json").read_text())
            for seed in SEEDS if (FOLDER / f"{name}-{seed}" / "results.json").exists()]

def tested(name, model, column):
    """Return a column of the last table in percent, one value per seed. model: "base" or
    "specialized"; the column "OOD" is the mean of the three out-of-distribution sets."""
    columns = OOD if column == "OOD" else [column]
    return [statistics.mean(100 * r["test"][model][c][0] for c in columns) for r in results(name)]

def evaluations(name):
    """Return for each seed the evaluated checkpoints of its log, the start first."""
    logs = [FOLDER / f"{name}-{seed}" / "log.jsonl" for seed in SEEDS]
    return [[entry for entry in read_log(log) if "validation" in entry]
            for log in logs if log.with_name("results.json").exists()]

def measured(entry, column):
    """Return an accuracy in a log entry, in percent. column: a math set, "OOD", "CoT" or
    "answer-only" (both on the generic tasks)."""
    if column == "OOD":
        return 100 * ood_accuracy(entry)
    return 100 * (entry["validation"] | entry.get("bbh", {}))[column][0]

def mean(values):
    """Return mean and standard error over the seeds."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error

def curve(name, column):
    """Return [(step, mean, standard error)] of a column over an experiment's checkpoints."""
    return [(entries[0]["step"], *mean(measured(entry, column) for entry in entries))
            for entries in zip(*evaluations(name))]

def at(points, step):
    """Return "mean ± standard error" of a curve at a step."""
    return next(text(*value) for s, *value in points if s == step)

def text(mean, error):
    """Format a mean with its standard error, if there is more than one seed."""
    return f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}"

def show(title, columns, rows):
    """Print a table. rows: [(label, [values per seed] per column)]."""
    lines = [["", *columns]]
    lines += [[label, *(text(*mean(cell)) for cell in cells)] for label, cells in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for label, *cells in lines:
        print(f"{label:<{widths[0]}}", *(f"{x:>{n}}" for x, n in zip(cells, widths[1:])), sep="  ")

# --- the findings: each prints a table, draws a plot, and returns a sentence ---

def finding_1():
    """Trade-off. Paper: math improves step by step while generic ability is lost, at once with
    chain of thought, gradually with answers only."""
    names = {"gsm8k": "toy-GSM8K", "OOD": "OOD mean", "CoT": "generic CoT",
             "answer-only": "generic answer-only"}
    curves = {label: curve("tuned-1M", column) for column, label in names.items()}
    rows = [(f"step {entries[0]['step']}", [[measured(e, c) for e in entries] for c in names])
            for entries in zip(*evaluations("tuned-1M"))]
    show("1. Trade-off over steps (validation parts)", list(names.values()), rows)
    curves_plot(FOLDER / "finding_1.png", curves)
    first, last = (curves["OOD mean"][i][0] for i in (1, -1))
    parts = [f"{label} goes {', '.join(at(points, step) for step in (0, first, last))}"
             for label, points in curves.items()]
    return f"From step 0 to {first} to {last} {'; '.join(parts)}."

def finding_2():
    """Scaling. Paper: flat over sizes before specialization, log-linear after."""
    models = {size: T5.from_pretrained(TOY / f"tuned-{size}") for size in SIZES}
    parameters = {size: sum(p.numel() for p in m.parameters()) for size, m in models.items()}
    points, rows, slopes = {}, [], []
    for label, model in (("before", "base"), ("after", "specialized")):
        cells = {size: tested(f"tuned-{size}", model, "OOD") for size in SIZES}
        points[label] = [(parameters[size], *mean(cells[size])) for size in SIZES]
        rows.append((label, list(cells.values())))
        slope, error, _ = log_linear_fit(*zip(*[point[:2] for point in points[label]]))
        slopes.append(f"{slope:.1f} ± {error:.1f}")
    show("2. Scaling: out-of-distribution mean by number of parameters",
         [f"{n:,}" for n in parameters.values()], rows)
    scaling_plot(FOLDER / "finding_2.png", points)
    return (f"Per factor of 10 in parameters the out-of-distribution mean rises by {slopes[0]} "
            f"points before specialization and by {slopes[1]} after.")

def finding_3():
    """Start. Paper: the instruction-tuned start ends higher, the raw one gains more."""
    rows, sentence = [], []
    for start in ("tuned", "raw"):
        before, after = (tested(f"{start}-long", m, "OOD") for m in ("base", "specialized"))
        gain = [b - a for a, b in zip(before, after)]
        rows.append((start, [before, after, gain]))
        sentence.append(f"the {start} start ends at {text(*mean(after))} and gains "
                        f"{text(*mean(gain))}")
    show("3. Start: out-of-distribution mean", ["before", "after", "gain"], rows)
    curves = {start: curve(f"{start}-long", "OOD") for start in ("tuned", "raw")}
    curves_plot(FOLDER / "finding_3.png", curves, "out-of-distribution mean (%)")
    return f"Out of distribution {', '.join(sentence)}."

def finding_4():
    """Loss. Paper: matching distributions converges faster than likelihood, and ends about
    equal."""
    names = {"tuned-1M": "KL", "likelihood": "likelihood"}
    curves = {label: curve(name, "OOD") for name, label in names.items()}
    losses = {label: held_out_loss(name) for name, label in names.items()}
    rows = [(label, [tested(name, "specialized", c) for c in ("toy-GSM8K", "OOD")])
            for name, label in names.items()]
    show("4. Loss: test parts at the end", ["toy-GSM8K", "OOD mean"], rows)
    curves_plot(FOLDER / "finding_4.png", losses, "KL on held-out solutions")
    parts = []
    for (label, cells), points in zip(rows, curves.values()):
        reached = [f"by step {step}" for step, value, _ in points if value >= 30] or ["never"]
        early, late = losses[label][1], losses[label][-1]
        parts.append(f"With {label} the KL on held-out solutions is {early[1]:.2f} at step "
                     f"{early[0]} and {late[1]:.2f} at the end; the out-of-distribution mean "
                     f"passes 30% {reached[0]} and ends at {text(*mean(cells[1]))}")
    return f"{'. '.join(parts)}."

@functools.cache
def held_out_batch():
    """Return a batch of the teacher's solutions for problems of toy-GSM8K's test file."""
    sets, _ = make_problems()
    rng = random.Random(SEED + 1)
    encoding = train_bpe((walk(rng, story) for story in sets["train"]), MERGES)
    records = teacher_records(rng, sets["gsm8k"][:200], encoding, 1, TEMPERATURE)
    tokenizer = Tokenizer(TOY / "tuned-1M")
    examples, _ = build_examples((parse_record(record, "") for record in records), tokenizer,
                                 ["zero_shot_cot"])
    return collate(examples, "cpu")

def held_out_loss(name):
    """Return [(step, mean, standard error)] of the KL of an experiment's checkpoints to the teacher
    on held-out solutions: the same measure for both losses."""
    curves = []
    for seed in SEEDS:
        path = FOLDER / f"{name}-{seed}" / "held_out.json"
        if not path.exists():
            with torch.no_grad():
                losses = [(int(folder.name.partition("-")[2]), batch_loss(
                    T5.from_pretrained(folder), held_out_batch(), "kl").item())
                    for folder in checkpoints(path.parent)]
            path.write_text(json.dumps(losses))
        curves.append(json.loads(path.read_text()))
    return [(points[0][0], *mean(loss for _, loss in points)) for points in zip(*curves)]

def finding_5():
    """Data format. Paper: in-context data keep both abilities; zero-shot data improve the zero-shot
    one and destroy the in-context one."""
    names = {"in_context": "in-context data", "zero_shot": "zero-shot data", "tuned-1M": "mixed"}
    columns = {"toy-GSM8K": "zero-shot", "toy-GSM8K, 4 shots": "in context"}
    rows = [("start", [tested("tuned-1M", "base", c) for c in columns])]
    rows += [(label, [tested(name, "specialized", c) for c in columns])
             for name, label in names.items()]
    show("5. Data format: toy-GSM8K", list(columns.values()), rows)
    curves_plot(FOLDER / "finding_5.png",
                {label: curve(name, "gsm8k") for name, label in names.items()},
                "toy-GSM8K, zero-shot (%)")
    parts = [f"{label} {text(*mean(a))} zero-shot and {text(*mean(b))} in context"
             for label, (a, b) in rows]
    return f"On toy-GSM8K: {'; '.join(parts)}."

def finding_6():
    """Selection. Paper: late in tuning, accuracy in and out of distribution fluctuate differently,
    so selecting on the out-of-distribution sets costs a little in distribution and gains out of
    distribution."""
    correlations, rows = [], {"in distribution": [], "out of distribution": []}
    for entries, seed in zip(evaluations("long"), SEEDS):
        late = entries[len(entries) // 2 :]
        inside, outside = ([measured(e, c) for e in late] for c in ("gsm8k", "OOD"))
        correlations.append(statistics.correlation(inside, outside))
        for label, column in zip(rows, ("gsm8k", "OOD")):
            best = max(entries[1:], key=lambda e: (measured(e, column), e["step"]))["step"]
            rows[label].append(test_checkpoint(FOLDER / f"long-{seed}", best))
    show("6. Selection: test parts of the checkpoint selected",
         ["toy-GSM8K", "OOD mean"], [(label, zip(*pairs)) for label, pairs in rows.items()])
    curves = {"toy-GSM8K": curve("long", "gsm8k"), "OOD mean": curve("long", "OOD")}
    curves_plot(FOLDER / "finding_6.png", curves)
    difference = [b[1] - a[1] for a, b in zip(*rows.values())]
    return (f"In the second half of a long run the two validation curves correlate by "
            f"{mean(correlations)[0]:.2f} ± {mean(correlations)[1]:.2f}; selecting out of "
            f"distribution changes the out-of-distribution test mean by {text(*mean(difference))}.")

def test_checkpoint(run, step):
    """Return a checkpoint's test accuracies on toy-GSM8K and out of distribution, in percent."""
    path = run / f"tested-{step}.json"
    if not path.exists():
        model, tokenizer = load_pretrained(run / f"checkpoint-{step}")
        accuracy = {task: 100 * evaluate_task(model, tokenizer, task, True, "test", TOY,
                                              max_new_tokens=64).accuracy for task in DATASETS}
        ood = statistics.mean(accuracy[task] for task in DATASETS if DATASETS[task].select)
        path.write_text(json.dumps([accuracy["gsm8k"], ood]))
    return json.loads(path.read_text())

FINDINGS = finding_1, finding_2, finding_3, finding_4, finding_5, finding_6

def main():
    """Run the unfinished experiments, then print tables and sentences and draw the plots."""
    parser = argparse.ArgumentParser(description="Reproduce the paper's findings on the toy world.")
    parser.add_argument("--jobs", type=int, default=2,
                        help="experiments at a time, one core each (default: 2)")
    run_all(parser.parse_args().jobs)
    for finding in FINDINGS:
        print(f"\n{finding()}")

if __name__ == "__main__":
    run_command(main)
