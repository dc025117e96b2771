"""The paper's six findings in miniature: experiments on the toy world, three or five seeds each.

    python data/toy/findings.py            run what is missing, then print and plot the findings
    python data/toy/findings.py --jobs 0   only print and plot what has been measured so far

An experiment is a run of `specialize.py` in runs/findings/NAME-SEED; NAME-SEED.json has what its
checkpoints solve. A run that has this file is not repeated, so delete the folder after changing the
code. Errors are standard errors over the seeds.
"""

import argparse
import gzip
import json
import math
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from eval import DATASETS, TOY, Task, evaluate, load_demonstrations, plot, table
from grammar import teacher_records, train_bpe, walk
from make import MERGES, SAMPLES, SEED, TEMPERATURE, WIDTHS, make_problems
from specialize import batch_loss, build_examples, checkpoints, collate, parse_record
from t5 import T5, load_pretrained, run_command

FOLDER = Path("runs") / "findings"
OOD = [name for name, dataset in DATASETS.items() if dataset.select]

# --- experiments ---

STARTS = [f"{kind}-{size}" for size in reversed(WIDTHS) for kind in ("tuned", "raw")]
ZERO_SHOT = "--formats zero_shot_cot zero_shot_answer_only"
# Finding 3 needs settings in which the raw start can catch up; finding 2 compares the same starts.
CATCH_UP = f"{ZERO_SHOT} --steps 800 --learning-rate 1e-3"
MEASURED = "validation generic loss | test shots"  # at each checkpoint | and at the last
# {experiment: (order, seeds, what is measured, steps between checkpoints, options)}
EXPERIMENTS = {
    **{f"start-{start}": (0 if start == "tuned-1M" else 3, 1, MEASURED, 0, "")
       for start in STARTS},
    "main": (1, 5, MEASURED, 50, ""),
    "in_context": (2, 3, "| test shots", 0, ZERO_SHOT.replace("zero_shot", "in_context")),
    "in_context_most": (2, 3, "| test shots", 0, "--format-shares 1 1 0.25 0.25"),
    "zero_shot_most": (2, 3, "| test shots", 0, "--format-shares 0.025 0.025 1 1"),
    "zero_shot": (2, 3, "| test shots", 0, ZERO_SHOT),
    **{start: (3, 3, "validation | test", 100 if "-1M" in start else 0,
               f"--model {TOY / start} {CATCH_UP}") for start in STARTS},
    "likelihood": (4, 3, MEASURED, 50, "--loss nll"),
    "few": (5, 5, "validation test |", 50, f"--teacher {FOLDER / 'few.jsonl.gz'} {ZERO_SHOT} "
            "--epochs 999 --steps 1000 --schedule constant"),
}
FEW = 100  # the training questions of the experiment "few"
GROUPS = {  # {what is measured: {column: Task}}; "loss" is that on held_out_batch
    "validation": {name: Task(name, TOY, split="validation", limit=100 if name in OOD else 300)
                   for name in DATASETS},
    "test": {name: Task(name, TOY) for name in DATASETS},
    "shots": {"gsm8k": Task("gsm8k", TOY, demonstrations=load_demonstrations(4, TOY))},
    "generic": {"CoT": Task("bbh", TOY, True, limit=25),
                "answer-only": Task("bbh", TOY, False, limit=25)},
}

def run_all(jobs):
    """Run the experiments that have not been measured, `jobs` at a time, with one thread each."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with gzip.open(TOY / "teacher.jsonl.gz", "rt") as lines:
        with gzip.open(FOLDER / "few.jsonl.gz", "wt") as file:
            file.writelines(islice(lines, FEW * SAMPLES))
    missing = sorted((seed, order, name) for name, (order, seeds, *_) in EXPERIMENTS.items()
                     for seed in range(seeds) if not (FOLDER / f"{name}-{seed}.json").exists())
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_and_measure, name, seed) for seed, _, name in missing]
    for future in futures:  # raise what failed when the others are done
        future.result()

def run_and_measure(name, seed):
    """Run one seed of an experiment, or continue it, and measure its checkpoints."""
    _, _, measured, every, options = EXPERIMENTS[name]
    torch.set_num_threads(1)
    run, folders = FOLDER / f"{name}-{seed}", [TOY / name.removeprefix("start-")]
    if not name.startswith("start"):  # specialize.py itself evaluates next to nothing
        command = [sys.executable, ROOT / "specialize.py", "--name", f"findings/{run.name}",
                   "--seed", str(seed), "--threads", "1", *options.split(), "--keep-checkpoints",
                   "--checkpoint-every", str(every or 9999), "--skip-bbh", "--bbh-limit", "0",
                   "--validation-limit", "1", "--test-limit", "1"]
        command += ["--resume"] if (run / "arguments.json").exists() else []
        with open(FOLDER / f"{run.name}.txt", "a") as output:
            subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=True)
        folders = checkpoints(run)[10 if name == "few" else 0 :]  # only late ones
    always, finally_ = measured.split("|")
    results = {}
    for folder in folders:
        groups = always.split() + (finally_.split() if folder == folders[-1] else [])
        results[folder.name.removeprefix("checkpoint-")] = measure(folder, groups)
    run.with_name(f"{run.name}.json").write_text(json.dumps(results))
    print(f"{name}, seed {seed}: done", flush=True)

# --- measurements ---

@torch.no_grad()
def measure(folder, groups):
    """Return a model's measurements: 100 for each problem that is solved, and losses."""
    model, tokenizer = load_pretrained(folder)
    measured = {}
    for group in groups:
        if group == "loss":
            batch = held_out_batch(tokenizer)
            measured[group] = {loss: [batch_loss(model, batch, loss).item()]
                               for loss in ("kl", "nll")}
        else:
            evaluations = {column: evaluate(model, tokenizer, task, max_new_tokens=64)
                           for column, task in GROUPS[group].items()}
            measured[group] = {column: [100 * p["correct"] for p in evaluation.predictions]
                               for column, evaluation in evaluations.items()}
    return measured

def held_out_batch(tokenizer):
    """Return a batch of right solutions of the teacher to problems of toy-GSM8K's test file, with
    the distributions that it reports. They are at temperature 1, but it samples at 0.5."""
    sets, _ = make_problems()
    rng = random.Random(SEED + 1)
    encoding = train_bpe((walk(rng, story) for story in sets["train"]), MERGES)
    records = teacher_records(rng, sets["gsm8k"][:300], encoding, 1, TEMPERATURE)
    examples, _ = build_examples(map(parse_record, records), tokenizer, ["zero_shot_cot"])
    return collate(examples, "cpu")

def runs(name):
    """Return {step: {group: {column: [value per problem]}}} of each seed that has been run."""
    paths = [FOLDER / f"{name}-{seed}.json" for seed in range(EXPERIMENTS[name][1])]
    return [json.loads(path.read_text()) for path in paths if path.exists()]

def value(measured, group, column, limit=None):
    """Return the mean over problems; OOD is the mean of three sets."""
    columns = OOD if column == "OOD" else [column]
    return np.mean([np.mean(measured[group][name][:limit]) for name in columns])

def last(name, group, column):
    """Return the value of each seed's last checkpoint."""
    return [value(list(run.values())[-1], group, column) for run in runs(name)]

def curve(name, group, column, start="start-tuned-1M"):
    """Return [(step, mean, standard error)] of an experiment, the start first."""
    points = [(0, *mean(last(start, group, column)))]
    for entries in zip(*(run.items() for run in runs(name))):
        points.append((int(entries[0][0]), *mean(value(m, group, column) for _, m in entries)))
    return points

def mean(values):
    """Return mean and standard error over the seeds; of one seed, the error is 0."""
    values = list(values)
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)

def text(mean, error, digits=1):
    """Format a mean with its error."""
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")

def show_curves(title, curves, digits=1):
    """Print curves, a row per step."""
    rows = [(f"step {row[0][0]}", [text(m, error, digits) for _, m, error in row])
            for row in zip(*curves.values())]
    print(f"\n{table(curves, rows, title)}")

# --- the paper's findings: each prints a table, draws a plot, and returns a sentence ---

def finding_1():
    """Trade-off. Math rises; generic ability falls, with answers only gradually."""
    names = {"toy-GSM8K": ("validation", "gsm8k"), "OOD mean": ("validation", "OOD"),
             "generic CoT": ("generic", "CoT"), "generic answer-only": ("generic", "answer-only")}
    curves = {label: curve("main", *column) for label, column in names.items()}
    show_curves("1. Trade-off (validation parts)", curves)
    plot(FOLDER / "finding_1.png", curves)
    parts = []
    for step in ("100", "250", "500"):
        found = [value(run[step], "generic", "answer-only") for run in runs("main")]
        parts.append(f"{min(found):.0f} to {max(found):.0f} at step {step}")
    return f"Generic answer-only, lowest to highest of {len(found)} seeds: {', '.join(parts)}."

def finding_2():
    """Scaling. Raw models are flat; specialization makes both starts log-linear."""
    points, rows = {}, []
    parameters = {size: sum(p.numel() for p in T5.from_pretrained(TOY / f"raw-{size}").parameters())
                  for size in WIDTHS}
    for kind in ("raw", "tuned"):
        for when, prefix in (("before", "start-"), ("after", "")):
            found = {size: mean(last(f"{prefix}{kind}-{size}", "test", "OOD")) for size in WIDTHS
                     if runs(f"{prefix}{kind}-{size}")}
            if len(found) > 2:  # otherwise not measured yet
                counts, means = [parameters[size] for size in found], list(zip(*found.values()))[0]
                (slope, intercept), covariance = np.polyfit(np.log10(counts), means, 1, cov=True)
                error = covariance[0, 0] ** 0.5
                cells = [text(*found[size]) if size in found else "" for size in WIDTHS]
                off = " ".join(f"{x:+.1f}" for x in means - intercept - slope * np.log10(counts))
                rows.append((f"{kind}, {when}", [f"{slope:.1f} ± {error:.1f}", *cells, off]))
                points[rows[-1][0]] = [(parameters[size], *found[size]) for size in found]
    columns = "slope per factor 10", *WIDTHS, "residuals of a line"
    print(f"\n{table(columns, rows, '2. Scaling (OOD test mean)')}")
    plot(FOLDER / "finding_2.png", points, "number of parameters", "OOD mean (%)", "log")
    return "Slopes: " + "; ".join(f"{label} {cells[0]}" for label, cells in rows) + "."

def finding_3():
    """Start. The instruction-tuned one ends higher, the raw one gains more."""
    rows, curves = [], {}
    for kind in ("tuned", "raw"):
        before = last(f"start-{kind}-1M", "test", "OOD")
        after = np.array(last(f"{kind}-1M", "test", "OOD"))
        rows.append((kind, [text(*mean(values)) for values in (before, after, after - before)]))
        curves[kind] = curve(f"{kind}-1M", "validation", "OOD", f"start-{kind}-1M")
    title = f"3. Start (OOD test mean; {CATCH_UP})"
    print(f"\n{table(['before', 'after', 'gain'], rows, title)}")
    plot(FOLDER / "finding_3.png", curves, ylabel="OOD mean (%)")
    return " ".join(f"The {kind} start ends at {after} and gains {gain}."
                    for kind, (_, after, gain) in rows)

def finding_4():
    """Loss. Matching distributions converges faster; accuracies end about equal."""
    names, sentence = {"main": "KL run", "likelihood": "NLL run"}, []
    losses = {f"{column} ({label})": curve(name, "loss", column)
              for column in ("kl", "nll") for name, label in names.items()}
    curves = {label: curve(name, "validation", "OOD") for name, label in names.items()}
    show_curves("4. Loss on held-out solutions, OOD mean", losses | curves, 2)
    plot(FOLDER / "finding_4.png", curves, ylabel="OOD mean (%)")
    for name, label in names.items():
        step = next((step for step, m, _ in curves[label] if m >= 30), "never")
        end = text(*mean(last(name, "test", "OOD")))
        sentence.append(f"{label}: OOD passes 30% at step {step}, test mean {end} at the end")
    return f"{'; '.join(sentence)}."

def finding_5():
    """Data format. In-context data keep both abilities, zero-shot data only their own."""
    names = {"start-tuned-1M": "start", "in_context": "in-context data", "in_context_most": "94%",
             "main": "49% of steps", "zero_shot_most": "9%", "zero_shot": "zero-shot data"}
    rows, points = [], {}
    for name, label in names.items():
        if runs(name):
            (x, dx), (y, dy) = (mean(last(name, group, "gsm8k")) for group in ("test", "shots"))
            rows.append((label, [text(x, dx), text(y, dy)]))
            points[label] = [(x, y, dy)]
    title = "5. Data format (toy-GSM8K, test part)"
    print(f"\n{table(['zero-shot', 'in context'], rows, title)}")
    plot(FOLDER / "finding_5.png", points, "toy-GSM8K, zero-shot (%)", "in context (%)")
    return "; ".join(f"{label}: {a} zero-shot, {b} in context" for label, (a, b) in rows) + "."

def finding_6():
    """Selection. Late in tuning, accuracies in and out of distribution part."""
    halves, tested = [], []
    for run in runs("few"):
        late = list(run.values())
        halves.append(np.array([[value(m, group, column, 300 if column == "gsm8k" else 100)
                                 for m in late] for column in ("gsm8k", "OOD")
                                for group in ("validation", "test")]))
        best = [late[np.argmax(by)] for by in halves[-1][[0, 2]]]  # by the validation parts
        tested.append([[value(m, "test", column) for m in best] for column in ("gsm8k", "OOD")])
    rows = [(label, [text(*mean(x)) for x in (*pairs.T, pairs[:, 1] - pairs[:, 0])])
            for label, pairs in zip(("toy-GSM8K", "OOD mean"), np.swapaxes(tested, 0, 1))]
    columns = "by toy-GSM8K", "by OOD mean", "difference"
    print(f"\n{table(columns, rows, '6. Selection (test parts)')}")
    plot(FOLDER / "finding_6.png", {"toy-GSM8K": curve("few", "validation", "gsm8k"),
                                    "OOD mean": curve("few", "validation", "OOD")})
    raw = [np.corrcoef(run[0], run[2])[0, 1] for run in halves]
    without_one = [correlation(halves[:i] + halves[i + 1 :] or halves) for i in range(len(halves))]
    error = math.sqrt(len(halves) - 1) * np.std(without_one, axis=0)  # the jackknife's
    r, inside, outside = map(text, correlation(halves), error, (2, 1, 1))
    return (f"Correlation in the second half: {text(*mean(raw), 2)} as measured, {r} without the "
            f"problems' noise; the accuracies themselves vary by {inside} in distribution and "
            f"{outside} out of distribution (standard deviations over checkpoints).")

def correlation(runs):
    """Return the correlation of accuracies in and out of distribution over checkpoints, and both
    standard deviations, without the noise of the problems: it is independent in two halves.

    runs: arrays (4, checkpoints) with the accuracy on two halves of the problems in distribution,
    then on two out of distribution."""
    covariance = sum(np.cov(run) for run in runs) / len(runs)  # (4, 4)
    inside, outside = np.sqrt([covariance[0, 1], covariance[2, 3]])
    return covariance[:2, 2:].mean() / (inside * outside), inside, outside

def main():
    """Run the unfinished experiments, then print tables and sentences and draw the plots."""
    parser = argparse.ArgumentParser(description="Reproduce the paper's findings on the toy world.")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time (default: 2)")
    jobs = parser.parse_args().jobs
    if jobs:
        run_all(jobs)
    for finding, needed in ((finding_1, "main"), (finding_5, "main"), (finding_2, "raw-0.04M"),
                            (finding_3, "raw-1M"), (finding_4, "likelihood"), (finding_6, "few")):
        if runs(needed):
            print(f"\n{finding()}")

if __name__ == "__main__":
    run_command(main)
