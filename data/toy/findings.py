"""The paper's findings in miniature: experiments on the toy world with three seeds each.

    python data/toy/findings.py

Each experiment is a training run by the four modules in runs/findings/EXPERIMENT-SEED. Those that
have finished are not repeated, so delete that folder after changing the code. Then tables and plots
follow for the paper's findings 1, 3, 4, 5 and 6. Finding 2, accuracy against the logarithm of the
size, would need students of several sizes. Errors are standard errors over the seeds.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval import DATASETS, TOY, evaluate_task, load, new_figure, save_figure
from specialize import SHOTS, build_examples, make_deterministic, ood_accuracy, parse_arguments
from specialize import teacher_records, train
from t5 import UserError, load_pretrained, run_command

import torch  # after t5, which sets how OpenMP's threads wait

FOLDER = Path("runs") / "findings"
SEEDS = (0, 1, 2)
EXPERIMENTS = {
    "mixed": [],  # the main command's run
    "raw-start": ["--model", str(TOY / "raw")],
    "likelihood": ["--loss", "nll"],
    "in-context-only": ["--formats", "in_context_cot", "in_context_answer_only"],
    "zero-shot-only": ["--formats", "zero_shot_cot", "zero_shot_answer_only"],
    "first-steps": ["--steps", "100", "--checkpoint-every", "20"],  # a schedule of 100 steps
}


# --- one experiment ---


def measure(model, tokenizer, args):
    """Evaluate a checkpoint: {part: {column: [accuracy, standard error]}}."""
    options = {"batch_size": args.eval_batch_size, "max_new_tokens": args.max_new_tokens}

    def accuracy(task, cot=True, split="test", limit=None, shots=0):
        found = evaluate_task(model, tokenizer, task, cot, split, args.data, limit, shots,
                              **options)
        return [round(found.accuracy, 5), round(found.stderr, 5)]

    return {
        "validation": {task: accuracy(task, split="validation", limit=args.validation_limit)
                       for task in DATASETS},
        "test": {task: accuracy(task) for task in DATASETS},
        "four shots": {"gsm8k": accuracy("gsm8k", limit=150, shots=SHOTS)},
        "generic": {"CoT": accuracy("bbh", limit=50),
                    "answer-only": accuracy("bbh", cot=False, limit=50)},
    }


def run_experiment(name, seed):
    """Measure the start and each checkpoint of a training; write start.json and log.jsonl."""
    run = FOLDER / f"{name}-{seed}"
    run.mkdir(parents=True, exist_ok=True)
    args = parse_arguments([*EXPERIMENTS[name], "--seed", str(seed), "--resume"])
    torch.set_num_threads(1)  # several experiments run at the same time
    make_deterministic(seed)
    model, tokenizer = load_pretrained(args.model, device=args.device)
    start = run / "start.json"
    if not start.exists():
        start.write_text(json.dumps({"step": 0} | measure(model, tokenizer, args)))
    pool = load("gsm8k", "train", args.data)
    records = teacher_records(args, pool)
    examples, _ = build_examples(records, tokenizer, args.formats, args.loss)
    train(model, tokenizer, examples, pool, args, run, measure)
    (run / "done").touch()


def run_all(jobs):
    """Run the unfinished experiments, `jobs` at a time, each in its own process."""

    def start(experiment):
        name, seed = experiment
        command = [sys.executable, __file__, "--only", name, "--seed", str(seed)]
        print(f"{name}, seed {seed}", flush=True)
        with open(FOLDER / f"{name}-{seed}.txt", "a") as output:
            return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode

    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [(name, seed) for seed in SEEDS for name in EXPERIMENTS
               if not (FOLDER / f"{name}-{seed}" / "done").exists()]
    with ThreadPoolExecutor(jobs) as pool:
        statuses = list(pool.map(start, missing))
    failed = [f"{FOLDER}/{name}-{seed}.txt" for (name, seed), status in zip(missing, statuses)
              if status]
    if failed:
        raise UserError(f"experiments failed; see {', '.join(failed)}, then run this again")


# --- what they show ---


def read(name, seed):
    """Return the log of an experiment: the entry of the start, then those of the training."""
    run = FOLDER / f"{name}-{seed}"
    lines = (run / "start.json").read_text().splitlines()
    lines += (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoints(name):
    """Return for each seed the entries of its checkpoints, the start first."""
    return [[entry for entry in read(name, seed) if "test" in entry] for seed in SEEDS]


def value(entry, column):
    """Return an accuracy in percent. column: "PART SET"; the set "ood" is the mean of the three
    out-of-distribution sets."""
    part, _, name = column.rpartition(" ")
    if name == "ood":
        return 100 * ood_accuracy({"validation": entry[part]})
    return 100 * entry[part][name][0]


def mean(values):
    """Return mean and standard error over the seeds."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def curve(name, column):
    """Return [(step, mean, standard error)] of a column over an experiment's checkpoints."""
    return [(entries[0]["step"], *mean([value(entry, column) for entry in entries]))
            for entries in zip(*checkpoints(name))]


def losses(name, loss):
    """Return [(step, mean, standard error)] of a training loss at steps that all seeds logged."""
    logs = [{entry["step"]: entry[loss] for entry in read(name, seed) if loss in entry}
            for seed in SEEDS]
    steps = sorted(set.intersection(*map(set, logs)))
    return [(step, *mean([log[step] for log in logs])) for step in steps]


def chosen(name, by="validation ood"):
    """Return for each seed the checkpoint that is best by a column; ties go to the latest step."""
    return [max(entries[1:], key=lambda entry: (value(entry, by), entry["step"]))
            for entries in checkpoints(name)]


def named(label):
    """Return a label with the sets' names, so that nobody takes them for the real ones."""
    for task, dataset in DATASETS.items():
        label = label.replace(task, f"toy-{dataset.name}")
    return label.replace("ood", "out-of-distribution mean")


def show(title, columns, rows):
    """Print a table of means ± standard errors. rows: [(label, [values per seed] per column)]."""
    columns = [named(column) for column in columns]
    size = max(20, *(len(column) + 2 for column in columns))
    width = max(len(label) for label, _ in rows)
    print(f"\n{title}\n{'':{width}}" + "".join(f"{column:>{size}}" for column in columns))
    for label, cells in rows:
        texts = ["{:5.1f} ± {:3.1f}".format(*mean(cell)) for cell in cells]
        print(f"{label:{width}}" + "".join(f"{text:>{size}}" for text in texts))


def draw(name, ylabel, curves):
    """Write runs/findings/NAME.png if matplotlib is installed.

    curves: {label: [(step, mean, standard error)]}.
    """
    try:
        figure, axes = new_figure("step", ylabel)
    except UserError as error:
        print(error)
        return
    for label, points in curves.items():
        steps, means, errors = zip(*points)
        axes.errorbar(steps, means, errors, marker=".", capsize=2, label=named(label))
    save_figure(figure, axes, FOLDER / f"{name}.png")


def columns_of(entries, columns):
    """Return the values of entries per column."""
    return [[value(entry, column) for entry in entries] for column in columns]


def main_table():
    """Print the main command's table over seeds."""
    columns = [*(f"test {task}" for task in DATASETS), "test ood", "generic CoT",
               "generic answer-only"]
    start = [entries[0] for entries in checkpoints("mixed")]
    rows = [("base", columns_of(start, columns)),
            ("specialized", columns_of(chosen("mixed"), columns))]
    show("Base and specialized (checkpoint selected on the out-of-distribution validation sets)",
         columns, rows)


def finding_1():
    """Show the trade-off. Paper: math improves and generic ability is lost, at once with chain of
    thought, gradually with answers only."""
    columns = ["test gsm8k", "test ood", "generic CoT", "generic answer-only"]
    curves = {name: {column: curve(name, column) for column in columns}
              for name in ("mixed", "first-steps")}
    for name, title in (("mixed", "the trade-off over steps"),
                        ("first-steps", "the first steps, in a short run")):
        rows = [(f"step {entries[0]['step']}", columns_of(entries, columns))
                for entries in zip(*checkpoints(name))]
        show(f"Finding 1: {title}", columns, rows)
    draw("finding_1_first_steps", "accuracy (%)", curves["first-steps"])
    return "accuracy (%)", curves["mixed"]


def finding_3():
    """Compare starts. Paper: an instruction-tuned one ends higher, a raw one gains more."""
    rows, starts = [], {"mixed": "instruction-tuned", "raw-start": "raw"}
    for name, label in starts.items():
        before = [value(entries[0], "test ood") for entries in checkpoints(name)]
        after = [value(entry, "test ood") for entry in chosen(name)]
        rows.append((label, [before, after, [b - a for a, b in zip(before, after)]]))
    show("Finding 3: the start, mean of the three out-of-distribution sets",
         ["before", "after", "gain"], rows)
    curves = {label: curve(name, "test ood") for name, label in starts.items()}
    return "out-of-distribution accuracy (%)", curves


def finding_4():
    """Compare losses. Paper: matching distributions converges faster and more stably than
    likelihood, and ends about equal.

    The training losses differ by the teacher's entropy, and likelihood's includes the few
    answer-only batches.
    """
    columns, names = ["test gsm8k", "test ood"], {"mixed": "KL", "likelihood": "likelihood"}
    rows = [(f"{label}, step {entries[0]['step']}", columns_of(entries, columns))
            for name, label in names.items() for entries in zip(*checkpoints(name))]
    show("Finding 4: the loss", columns, rows)
    draw("finding_4_loss", "training loss (nats per token)",
         {"KL": losses("mixed", "kl"), "likelihood": losses("likelihood", "nll")})
    return "accuracy (%)", {f"{label}, {column}": curve(name, column)
                            for column in columns for name, label in names.items()}


def finding_5():
    """Compare data formats. Paper: in-context data keep both abilities; zero-shot data improve the
    zero-shot one and destroy the in-context one."""
    columns = {"test gsm8k": "zero-shot", "four shots gsm8k": "in context"}
    names = "in-context-only", "zero-shot-only", "mixed"
    rows = [(name, columns_of(chosen(name), columns)) for name in names]
    show("Finding 5: the data format", columns, rows)
    return "GSM8K accuracy (%)", {f"{name}, {label}": curve(name, column)
                                  for name in names for column, label in columns.items()}


def finding_6():
    """Compare selections. Paper: selecting on the out-of-distribution sets costs a little in
    distribution and gains out of distribution."""
    columns = ["test gsm8k", "test ood"]
    rows = [
        (f"selected {label} distribution", columns_of(chosen("mixed", by), columns))
        for label, by in (("in", "validation gsm8k"), ("out of", "validation ood"))
    ]
    show("Finding 6: the selection of the checkpoint", columns, rows)
    return "validation accuracy (%)", {column: curve("mixed", column) for column in
                                       ("validation gsm8k", "validation ood")}


def main():
    """Run the unfinished experiments, then print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description="Reproduce the paper's findings on the toy world.")
    add = parser.add_argument
    add("--jobs", type=int, default=2, help="experiments at a time, one core each (default: 2)")
    add("--only", choices=EXPERIMENTS, help="run one experiment with --seed; print no table")
    add("--seed", type=int, default=0, help="seed of --only (default: 0)")
    args = parser.parse_args()
    if args.only:
        run_experiment(args.only, args.seed)
        return
    run_all(args.jobs)
    main_table()
    for finding in (finding_1, finding_3, finding_4, finding_5, finding_6):
        draw(finding.__name__, *finding())


if __name__ == "__main__":
    run_command(main)
