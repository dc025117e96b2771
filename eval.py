"""Problem sets, prompts, answer extraction, accuracy: what was gained (math) and what was lost (BIG-Bench Hard).

Read it in the order in which an answer is made: a problem is loaded and becomes a prompt, the final answer is
extracted from what the model wrote and compared, by exact match and by the rule behind the paper's figures. Nothing
here trains. The problem sets are read in their publishers' own formats; what becomes of predictions (their file, the
table, the plots) is in data/predictions.py.

    python eval.py google/flan-t5-base google/flan-t5-large --tasks gsm8k,multiarith,asdiv,svamp,bbh
    python eval.py --show 5 runs/predictions.jsonl
"""

import argparse
import collections
import functools
import hashlib
import json
import math
import os
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import torch

from data.calculator import calculator
from data.cpu import packed
from data.download import InputError, bounded, download, hub_folder, run_command, show
from data.predictions import PredictionFile, compare, scaling_plot, show_cases, summarize, trade_off_plot
from t5 import best_device, existing_device, load_pretrained, pad

MATH = ("gsm8k", "multiarith", "asdiv", "svamp")  # the paper's
OUT_OF_DISTRIBUTION = MATH[1:]
DEFAULT_DATA = Path(__file__).parent / "data" / "downloads"

# Where each file comes from (GITHUB_ENDPOINT can name a mirror): its place in the data folder -> (repository at a commit, path there, SHA-256).
GITHUB = os.environ.get("GITHUB_ENDPOINT", "https://raw.githubusercontent.com").rstrip("/")
SOURCES = {
    "gsm8k/train.jsonl": (
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c", "grade_school_math/data/train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
    "gsm8k/test.jsonl": (
        "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c", "grade_school_math/data/test.jsonl",
        "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    "multiarith/MultiArith.json": (
        "kojima-takeshi188/zero_shot_cot/5ef330fcdeec0cd26aee27943504f91f8ec1c33c", "dataset/MultiArith/MultiArith.json",
        "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4"),
    "asdiv/ASDiv.xml": (
        "chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47", "dataset/ASDiv.xml",
        "ef8904068482919ac48c8eeaaf6df344b8a308ba66d048c2d4d87eab82dc4929"),
    "svamp/SVAMP.json": (
        "arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53", "SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"),
}  # fmt: skip
BBH_SOURCE = "suzgunmirac/BIG-Bench-Hard/9ee07bd481feebf959a6b59d61ea57bdcf30964d"
BBH_TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()


@dataclass
class Problem:
    """A question and its gold answer: a number (float) where it is one, else text. solution: written reasoning, if
    the set has it, without calculator marks and without the line of the final answer. written: the answer as the
    publisher wrote it, where commas may stand in it; only the authors' rule of scoring reads it."""

    question: str
    answer: float | str
    solution: str = ""
    written: str = ""

    def __post_init__(self):
        if not (isinstance(self.question, str) and self.question.strip()):
            raise ValueError("there is no text of a question")
        if not (self.answer if isinstance(self.answer, str) else isinstance(self.answer, float) and math.isfinite(self.answer)):
            raise ValueError(f"the answer {self.answer!r} is neither a float nor a text")


def load(task, split="test", folder=DEFAULT_DATA):
    """The problems of a task ("gsm8k", "multiarith", "asdiv", "svamp" or the name of a BBH task) as a list of Problem.

    split: "train" (GSM8K alone has one), "validation", "test" or "all". No set has an official validation part: 500
    problems of GSM8K's test file and of each other set (200 of MultiArith, and never more than half) are drawn for
    validation with a fixed seed; the rest is the test part. Both parts are in random order, so that the first n are a
    sample. (MultiArith holds some questions twice: 12 of its test part stand in the validation part, too.) BBH tasks
    have "test" alone, whole.
    Missing files are fetched. Raises InputError naming the file, and the line or problem where there is one.
    """
    folder = Path(folder)
    if split not in ("train", "validation", "test", "all"):
        raise InputError(f"no split {split!r}: there are train, validation, test and all")
    if task in bbh_tasks(folder):
        if split in ("train", "validation"):
            raise InputError(f"{task} has no {split} part: BIG-Bench Hard is for testing alone")
        return read_problems(bbh_file(folder, f"bbh/{task}.json"), bbh_problems)
    if task not in READERS:
        raise InputError(f"no task {task!r}: there are {', '.join([*READERS, *bbh_tasks(folder)])}")
    if split == "train" and task != "gsm8k":
        raise InputError(f"{task} has no training part")
    reader, name = READERS[task]
    if split == "train":
        name = "gsm8k/train.jsonl"
    if name in SOURCES:
        repository, path, sha256 = SOURCES[name]
        download(f"{GITHUB}/{repository}/{path}", folder / name, sha256)
    problems = read_problems(folder / name, reader)
    if split in ("train", "all"):
        return problems
    random.Random(0).shuffle(problems)
    size = min(200 if task == "multiarith" else 500, len(problems) // 2)
    return problems[:size] if split == "validation" else problems[size:]


def read_problems(path, reader):
    """The problems that reader makes of the file's text; InputError naming the file and the place if it can't."""
    place = []  # the reader leaves here where it is
    try:
        problems = [Problem(*fields) for fields in reader(Path(path).read_text(encoding="utf-8"), place)]
        if not problems:
            raise ValueError("it holds no problem")
        return problems
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ElementTree.ParseError) as error:
        fault = f"no {error}" if isinstance(error, KeyError) else error
        where = ", ".join([str(path), *place[-1:]])
        raise InputError(f"{where}: {fault}; mend the file (the publishers' are fetched anew when deleted)") from None


def gsm8k_problems(text, place):
    """GSM8K's JSONL: the solution's lines carry <<48/2=24>> marks for a calculator, the last is `#### 72`."""
    for number, line in enumerate(text.strip().split("\n"), 1):
        place.append(f"line {number}")
        problem = json.loads(line)
        if not isinstance(problem["answer"], (str, int, float)):
            raise TypeError(f"the answer is {problem['answer']!r}")
        solution, _, answer = str(problem["answer"]).rpartition("####")
        yield problem["question"], gold(answer), re.sub(r"<<.*?>>", "", solution).strip(), answer.strip()


def multiarith_problems(text, place):
    """MultiArith's JSON: the answer is a float in a list."""
    for number, problem in enumerate(json.loads(text)):
        place.append(f"problem {number}")
        yield problem["sQuestion"].strip(), float(problem["lSolutions"][0])


def asdiv_problems(text, place):
    """ASDiv's XML: body and question, the answer like `9 (apples)`. Of the 2,305 answers 212 are not one number
    (names, times, ratios, lists): they stay text, and only the same text is right."""
    if "<!DOCTYPE" in text:
        raise ValueError("it has a DOCTYPE, whose entities could expand without end")
    for problem in ElementTree.fromstring(text).iter("Problem"):
        place.append(f"problem {problem.get('ID')}")
        body, question, answer = (problem.findtext(tag).strip() for tag in ("Body", "Question", "Answer"))
        yield f"{body} {question}", gold(re.sub(r"\s+\([^()]*\)", "", answer))


def svamp_problems(text, place):
    """SVAMP's JSON: body and question joined, the answer a float."""
    for number, problem in enumerate(json.loads(text)):
        place.append(f"problem {number}")
        body = problem["Body"].strip()
        body += "" if body.endswith((".", "?", "!", ",")) else ","
        yield f"{body} {problem['Question'].strip()}", float(problem["Answer"])


# The math sets: task -> (reader, its place in the data folder).
READERS = {
    "gsm8k": (gsm8k_problems, "gsm8k/test.jsonl"),
    "multiarith": (multiarith_problems, "multiarith/MultiArith.json"),
    "asdiv": (asdiv_problems, "asdiv/ASDiv.xml"),
    "svamp": (svamp_problems, "svamp/SVAMP.json"),
}


def bbh_problems(text, place):
    """BIG-Bench Hard's JSON: examples of input and target."""
    for number, example in enumerate(json.loads(text)["examples"]):
        place.append(f"example {number}")
        yield example["input"], example["target"]


def gold(text):
    """A written answer as a number if it is one number or fraction, else as the text it is."""
    text = re.sub(r"[()]", "", text).strip()
    return extract_number(text) if NUMBER.fullmatch(text) else text.removesuffix(".")


def bbh_tasks(folder):
    """The benchmark's 27 tasks; a data folder with tasks of other names has those instead."""
    found = {path.stem for path in Path(folder).glob("bbh/bbh/[!.]*.json")}
    return sorted(found) if found - set(BBH_TASKS) else BBH_TASKS


def bbh_file(folder, name):
    """A file of BBH in the data folder, fetched if it is missing."""
    return download(f"{GITHUB}/{BBH_SOURCE}/{name}", Path(folder) / "bbh" / name)


def math_target(problem, cot):
    """What the model should write: `{cot}\\nThe answer is {a}`, or the last line alone."""
    answer = number_text(problem.answer)
    return f"{problem.solution}\nThe answer is {answer}" if cot else f"The answer is {answer}"


def number_text(answer):
    """A gold answer as it is written: 72 and not 72.0."""
    return str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer)


def math_prompt(question, cot, demonstrations=()):
    """A math question as one of the paper's four inputs: chain of thought or answer only, zero-shot or in context."""
    if not cot and not demonstrations:
        return f"Q: {question} A:"
    ask = f"Q: {question}\n" + ("Let's think step by step" if cot else "A:")
    return "".join(math_demonstration(shot, cot) for shot in demonstrations) + ask


def math_demonstration(problem, cot):
    """A solved problem as it stands before the question in context."""
    ask = f"Q: {problem.question}\n" + ("Let's think step by step\n" if cot else "A: ")
    return f"{ask}{math_target(problem, cot)}\n\n"


def bbh_prompt(task, question, cot, folder=DEFAULT_DATA):
    """A BBH question behind the benchmark's three demonstrations; answer-only is the same without their reasoning."""
    return bbh_demonstrations(task, cot, folder) + f"Q: {question}\nA:" + " Let's think step by step." * cot


@functools.lru_cache(maxsize=64)
def bbh_demonstrations(task, cot, folder):
    """The task's description and demonstrations from cot-prompts/TASK.txt, up to the place of a new question."""
    path = bbh_file(folder, f"cot-prompts/{task}.txt")
    try:
        text = path.read_text(encoding="utf-8").partition("-----\n")[2].strip()
        if not text:
            raise ValueError("no demonstrations below a line of five hyphens")
        if not cot:
            reasoning = r"A: Let's think step by step\..*?[Tt]he answer is (.*?)\.?(?=\n\nQ: |\Z)"
            text, count = re.subn(reasoning, r"A: \1", text, flags=re.DOTALL)
            if count != text.count("\nQ: "):
                raise ValueError("not every demonstration ends in 'the answer is ...'")
        return text + "\n\n"
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; delete it to have it fetched anew") from None


# A number as people write it: sign, currency, thousands commas, decimals, a fraction's denominator. A minus behind a
# digit or a bracket is a subtraction.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)%.])(?<![\d)%.] )[-−]\$?|\$-)?\$?(?P<value>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d*\.?\d+)"
    r"(?:/(?P<denominator>[1-9]\d*)(?!\d|\.\d))?"
)


def extract_number(text):
    """The final answer of a math solution: the last number in it; None if there is none."""
    match = None
    for match in NUMBER.finditer(text):
        pass
    if match is None:
        return None
    value = float(match["value"].replace(",", "")) / float(match["denominator"] or 1)
    return -value if match["sign"] else value


def extract_choice(text):
    """The final answer of a BBH output, by the benchmark's rule: what follows the last "answer is ", without a final
    period; where nothing says "answer is ", as in answer-only outputs, the whole text. Comparable by == with the
    target: "(A) or (B)" is neither."""
    _, phrase, answer = text.rpartition("answer is ")
    return answer.strip().removesuffix(".") if phrase else answer.strip()


def is_correct(output, answer):
    """Exact match: of the final number where the gold answer is a number, else of the final answer's text."""
    if isinstance(answer, float):
        return extract_number(output) == answer
    return extract_choice(output) == answer


def is_correct_by_authors(output, answer, is_math, cot):
    """The rules behind the paper's figures; answer is a text.

    Math: the last run of digits of either, so that signs do not count and "1,080" is read as 80. BBH: the answer
    occurs anywhere after "the answer is", or anywhere in the output to an answer-only prompt.
    """
    if is_math:
        predicted, target = (re.findall(r"\d*\.?\d+", text) for text in (output, answer))
        return bool(predicted and target) and float(predicted[-1]) == float(target[-1])
    return answer in (output.partition("the answer is")[2] if cot else output)


# --- from outputs to accuracies ---


def majority(outputs, extract):
    """Self-consistency (Wang et al., 2022, arXiv 2203.11171): of sampled outputs the first that ends in the commonest
    answer. What has no number has no vote."""
    answers = [extract(output) for output in outputs]
    votes = collections.Counter(answer for answer in answers if answer is not None)
    return outputs[answers.index(votes.most_common(1)[0][0])] if votes else outputs[0]


def judge(problem, task, prompt, outputs, cot):
    """A problem's prediction, as it is kept: right or not by exact match and by the authors' rule."""
    extract = extract_number if isinstance(problem.answer, float) else extract_choice
    output = majority(outputs, extract)
    written = problem.written or number_text(problem.answer)
    prediction = {
        "task": task, "question": problem.question, "prompt": prompt, "output": output, "extracted": extract(output),
        "answer": problem.answer, "correct": is_correct(output, problem.answer),
        "correct_by_authors": is_correct_by_authors(output, written, task in READERS, cot),
    }  # fmt: skip
    return prediction | ({"outputs": outputs} if len(outputs) > 1 else {})


def evaluate(model, tokenizer, problems, prompt=None, batch_size=32, max_new_tokens=256, samples=1, temperature=0.7,
             use_calculator=False, task="gsm8k", cot=True, file=None):  # fmt: skip
    """Accuracy of a model on problems: greedy, or by majority vote over samples drawn at a temperature.

    prompt: a function from question to input; by default zero-shot math. Problems of similar length share
    a batch, so that little is padded. file: a PredictionFile; what it knows is not generated again, only judged.
    Returns an Evaluation with the predictions in the order of the problems. Raises InputError where there is none.
    """
    if not problems:
        raise InputError(f"{task}: no problem to evaluate")
    prompt = prompt or functools.partial(math_prompt, cot=cot)
    prompts = [prompt(problem.question) for problem in problems]
    outputs = [file.outputs(task, text) if file else None for text in prompts]
    encoded = {i: tokenizer.encode(text) for i, text in enumerate(prompts) if outputs[i] is None}
    order = sorted(encoded, key=lambda i: -len(encoded[i]))
    device = model.shared.weight.device
    decoding = {"max_new_tokens": max_new_tokens, "num_samples": samples}
    if samples > 1:
        decoding |= {"temperature": temperature, "generator": torch.Generator(device).manual_seed(0)}
    if use_calculator:
        decoding["logits_processor"] = calculator(tokenizer)
    with packed(model.decoder, model.lm_head):  # once for all batches
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = model.generate(pad([encoded[i] for i in chosen], device), **decoding)
            texts = [tokenizer.decode(row) for row in rows.tolist()]
            for i in chosen:
                outputs[i], texts = texts[:samples], texts[samples:]
                if file:
                    file.add(judge(problems[i], task, prompts[i], outputs[i], cot))
            show(f"{task}: {min(start + batch_size, len(order))} of {len(order)}")
    show("")
    return summarize([judge(problems[i], task, prompts[i], outputs[i], cot) for i in range(len(problems))])


def evaluate_task(model, tokenizer, task, cot, split="test", folder=DEFAULT_DATA, limit=None, shots=0, **options):
    """evaluate() on a task by name. "bbh" is all BBH tasks: the mean over tasks, with the benchmark's demonstrations.

    split: of a math set; BBH has a test part alone. limit: at most that many problems (of each task). shots:
    demonstrations from GSM8K's training set for math tasks.
    """
    if task == "bbh":
        parts = [
            evaluate_task(model, tokenizer, name, cot, "test", folder, limit, **options) for name in bbh_tasks(folder)
        ]
        return summarize([prediction for part in parts for prediction in part.predictions])
    problems = load(task, split if task in READERS else "test", folder)[:limit]
    if task in READERS:
        demonstrations = random.Random(0).sample(load("gsm8k", "train", folder), shots) if shots else ()
        prompt = functools.partial(math_prompt, cot=cot, demonstrations=demonstrations)
    else:
        prompt = lambda question: bbh_prompt(task, question, cot, folder)  # noqa: E731
    return evaluate(model, tokenizer, problems, prompt, task=task, cot=cot, **options)


# --- the command ---


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Evaluate T5 checkpoints on math problems and BIG-Bench Hard.",
        epilog="`--show N FILE` and `--plot PICTURE runs/NAME/log.jsonl` look at what was written and evaluate nothing.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HF-format folders or hub names")
    parser.add_argument("--tasks", default=",".join(MATH), help=f"of {', '.join(READERS)}, bbh or a BBH task")
    parser.add_argument("--shots", type=int, default=0, choices=[0, 4], help="demonstrations for math (BBH has its 3)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--cot", action="store_true", default=True, help="chain of thought (default)")
    mode.add_argument("--direct", dest="cot", action="store_false", help="answer only")
    parser.add_argument("--samples", type=bounded(int, above=0), default=1, metavar="N", help="self-consistency: majority vote over N samples")
    parser.add_argument("--temperature", type=bounded(float, above=0), default=0.7, help="of the samples (default: %(default)s)")
    parser.add_argument("--calculator", action="store_true", help="compute what follows '=' and force it")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the problem sets")
    parser.add_argument("--split", default="test", choices=["validation", "test", "all"], help="of the math sets: one of two parts, or both")
    parser.add_argument("--limit", type=bounded(int, above=0), help="evaluate at most this many problems a task")
    parser.add_argument("--batch-size", type=bounded(int, above=0), default=32)
    parser.add_argument("--max-new-tokens", type=bounded(int, above=0), default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/predictions.jsonl"),
                        help="every prediction as a JSON line; what it holds is not made again (default: %(default)s)")  # fmt: skip
    parser.add_argument("--show", type=bounded(int), metavar="N", help="show N right and N wrong cases of a predictions file")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw accuracy against model size, or a run's log")
    parser.add_argument("--device", type=existing_device, default=best_device(), help="cpu, cuda or mps (default here: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights")
    args = parser.parse_args()
    args.tasks = [task.strip() for task in args.tasks.split(",")]
    return args


def weights_id(model):
    """A short hash that tells one training's weights from another's: of the first 64 numbers of every parameter."""
    few = [parameter.detach().flatten()[:64].float().cpu().numpy().tobytes() for parameter in model.parameters()]
    return hashlib.sha256(b"".join(few)).hexdigest()[:16]


def main():
    """python eval.py MODEL ...: accuracies of one or more models on tasks."""
    args = parse_arguments()
    if args.show is not None:
        print(*(line for path in args.models for line in show_cases(path, args.show)), sep="\n")
        return
    if args.plot and str(args.models[0]).endswith(".jsonl"):
        trade_off_plot(args.plot, args.models[0])
        return
    known = [*READERS, "bbh", *bbh_tasks(args.data)]
    for task in args.tasks:
        if task not in known:
            raise InputError(f"no task {task!r}: there are {', '.join(known)}")
    models, sizes = {}, {}
    for name in args.models:  # all of them found before one of them is evaluated
        hub_folder(name)
    for name in args.models:
        model, tokenizer = load_pretrained(name, device=args.device, dtype=getattr(torch, args.dtype))
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
        decoding = {"max_new_tokens": args.max_new_tokens, "samples": args.samples, "use_calculator": args.calculator}
        decoding["temperature"] = args.temperature if args.samples > 1 else 0.0
        settings = {"weights": weights_id(model), "dtype": args.dtype, "cot": args.cot, "shots": args.shots} | decoding
        file = PredictionFile(args.out, name, **settings)
        options = decoding | {"batch_size": args.batch_size, "file": file}
        models[name] = [
            evaluate_task(model, tokenizer, task, args.cot, args.split, args.data, args.limit, args.shots, **options)
            for task in args.tasks
        ]
    print(compare(args.tasks, models, READERS))
    if args.plot:
        points = {
            task: [(sizes[name], entries[i].accuracy, entries[i].stderr) for name, entries in models.items()]
            for i, task in enumerate(args.tasks)
        }
        scaling_plot(args.plot, points)


if __name__ == "__main__":
    run_command(main)
