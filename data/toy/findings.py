"""The paper's six findings in miniature: experiments on the toy world, three seeds each.

    python data/toy/findings.py

Each experiment is a run of `specialize.py` in runs/findings/EXPERIMENT-SEED. Those that have
finished are not repeated, so delete that folder after changing the code. Then a table, a sentence
and a plot follow for each finding. Errors are standard errors over the seeds.
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import eval as ev
from specialize import ood_accuracy
from t5 import T5, UserError, load_pretrained, run_command

FOLDER = Path("runs") / "findings"
SEEDS = (0, 1, 2)
SIZES = ("0.1M", "0.25M", "1M", "1.7M")
MODEL = "data/toy/{}-{}"
SHOTS = ["--shots", "4"]
EXPERIMENTS = {
    "tuned-1M": ["--shots", "4", "--checkpoint-every", "50"],  # otherwise the main command's run
    "tuned-0.1M": [],
    "tuned-0.25M": [],
    "tuned-1.7M": [],
    "raw-1M": [],
    "likelihood": ["--loss", "nll", "--checkpoint-every", "50"],
    "in-context": ["--formats", "in_context_cot", "in_context_answer_only", *SHOTS],
    "zero-shot": ["--formats", "zero_shot_cot", "zero_shot_answer_only", *SHOTS],
    "long": ["--steps", "2400", "--schedule", "constant", "--keep-checkpoints"],
}
