"""Sample chain-of-thought solutions from a teacher behind an OpenAI-compatible server.

    python data/sample_teacher.py --url http://localhost:8000/v1 --model NAME --out teacher.jsonl.gz

Every answer goes to the log, OUT.answers.jsonl, when it arrives. The same command continues a
stopped run; one with more --samples asks only for the rest. The right answers become teacher
records (data/README.md). The API key is read from OPENAI_API_KEY.

On --temperature: the paper's teacher was sampled at 0.5, but the probabilities in the authors' data
are those of temperature 1. In 40 of their records the sampled token is the most probable one 92.3%
of the time; the probabilities predict 81.8%, their squares (temperature 0.5) 92.2%. Servers may
report either kind: vLLM's old engine applies the temperature first, its new one does not.
"""

import argparse
import gzip
import json
import os
import re
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import requests
import urllib3

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import exact_match, extract_number, load, majority, math_prompt, number_text
from eval import open_jsonl, parse_gsm8k, read_problems
from specialize import parse_record
from t5 import UserError, run_command

# --- from a choice in a response to an answer ---

# How models mark what they think; "assistantfinal" is left if a server drops special tokens.
THOUGHT = r"(?s)\A.*(</think>|\[/THINK\]|<\|channel\|>final<\|message\|>|assistantfinal)"
UNFINISHED = r"(?s)(<think>|\[THINK\]|<\||\A\s*analysis(?=[^\s:,])).*"
STATEMENT = r"(?i)the answer is\W*(?!not\b)\w.*"
MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # a field is missing or of no use

def parse_choice(choice, is_number):
    """Return one choice of a response as {solution}, with usable log-probabilities also {tokens,
    top_logprobs}. The solution ends with the line that states the answer, as the authors' do, or
    has finish_reason "length" if it was cut off. Raises one of MALFORMED if there is no text."""
    message = choice.get("message", choice)  # the forms of /chat/completions and of /completions
    text, reason = message.get("content", message.get("text")), choice.get("finish_reason")
    if choice.get("error") or text is None and reason is None:
        raise ValueError("no text")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part["type"] == "text")
    text = re.sub(UNFINISHED, "", re.sub(THOUGHT, "", text or "")).strip()
    ends = (statement.end() for statement in re.finditer(STATEMENT, text)
            if not is_number or extract_number(statement[0]) is not None)
    answer = {"solution": text[: next(ends, None)].rstrip()}
    if reason in ("length", "max_tokens") and answer["solution"] == text:
        answer["finish_reason"] = "length"
    try:
        complete = answer | parse_logprobs(answer["solution"], choice["logprobs"])
        parse_record({"question": "", "answer": "", **complete})  # raises what training would
        return complete
    except MALFORMED:
        return answer

def parse_logprobs(solution, logprobs):
    """Return {tokens, top_logprobs} of the solution. Raises one of MALFORMED if unusable."""
    steps = logprobs.get("content") or []
    if not steps:  # the form of /completions: parallel lists
        lists = [logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")]
        for token, logprob, top in zip(*lists):
            entries = [{"token": one, "logprob": value} for one, value in (top or {}).items()]
            steps.append({"token": token, "logprob": logprob, "top_logprobs": entries})
    tokens, tops = [], []
    for step in steps:
        entries = step.get("top_logprobs") or []
        # llama.cpp moves a newline to the next token, but the top list has each token by its id.
        own = next((one for one in entries if one.get("id", -1) == step.get("id")), step)
        tokens.append(token_bytes(own))
        entries = [own, *entries] if entries else []  # the sampled token need not be in the list
        # Servers write null or -9999 for what they do not know.
        tops.append({token_name(token_bytes(one)): round(min(0.0, one["logprob"]), 5)
                     for one in entries if one["logprob"] is not None and one["logprob"] > -99})
    # Find the solution after any thinking. Ignore whitespace, or with U+FFFD all but ASCII.
    ignored = rb"[^!-~]" if b"\xef\xbf\xbd" in b"".join([*tokens, solution.encode()]) else rb"\s"
    visible = [re.sub(ignored, b"", token) for token in tokens]
    wanted = re.sub(ignored, b"", solution.encode())
    start = b"".join(visible).rindex(wanted)
    owner = [i for i, token in enumerate(visible) for _ in token]  # of each visible byte
    span = slice(owner[start], owner[start + len(wanted) - 1] + 1)
    if all(len(top) < 2 for top in tops[span]):
        raise ValueError("no alternatives to the sampled tokens, so no distribution")
    return {"tokens": list(map(token_name, tokens[span])), "top_logprobs": tops[span]}

def token_bytes(entry):
    """Return the bytes of a token: as listed, as spelled (bytes:\\xe2, <0xE2>), or of its text."""
    token = entry["token"].encode() if entry.get("bytes") is None else bytes(entry["bytes"])
    if spelled := re.fullmatch(rb"(?:bytes:( ?)|<0)((?:\\*x[\da-fA-F]{2})+)>?", token):
        token = (spelled[1] or b"") + bytes.fromhex(re.sub(rb"\\*x", b"", spelled[2]).decode())
    return token.replace("▁".encode(), b" ")  # SentencePiece's spelling of a space

def token_name(token):
    """Return a token's bytes as text, or as bytes:\\xe2 if they are not complete characters."""
    name = token.decode(errors="replace")
    return name if "\ufffd" not in name else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

# --- from a question to the log of answers ---

FATAL = r"(?i)^HTTP 40[1245]|insufficient.(quota|balance|credit|fund)|code\W+402"
BUSY = r"(?i)^(no response|HTTP (4[02][89]|5[02][^1]|200.*(code\W+(429|5)|rate.?limit|overload)))"
REMEDY = ("check what it names, --url (it usually ends in /v1), --model, --chat, OPENAI_API_KEY, "
          "and your credit. A smaller --parallel or --max-tokens, or --no-logprobs, may help.")

class CompletionClient:
    """A model behind /completions or, with --chat, /chat/completions. answered counts the answers
    so far; failed is {question: error}. When the event stopping is set, ask() returns."""

    def __init__(self, args, answered):
        self.args, self.answered, self.failed = args, answered, {}
        self.stopping = threading.Event()
        self.options = {name: vars(args)[name] for name in ("model", "temperature", "max_tokens")}
        self.options |= {"stop": args.stop} if args.stop else {}  # some refuse an empty list
        if not args.no_logprobs:  # as many as the paper's teacher reported
            self.options |= {"logprobs": True, "top_logprobs": 5} if args.chat else {"logprobs": 5}
        base, mark, query = args.url.partition("?")  # ?api-version=1 stays at the end
        self.url = base.rstrip("/") + "/chat" * args.chat + "/completions" + mark + query
        self.session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=args.parallel)
        self.session.mount(base.partition("//")[0] + "//", adapter)
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())  # never written or printed
        self.session.headers.update({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def ask(self, problem):
        """Return an answer, or None if stopped or if the server fails on this question. Raises
        UserError if the server seems to fail on every question."""
        prompt = self.args.prompt.replace("{question}", problem.question)
        messages = [{"role": "user", "content": prompt}]
        question = {"messages": messages} if self.args.chat else {"prompt": prompt}
        retry = urllib3.Retry(self.args.retries, backoff_factor=1, backoff_max=60, backoff_jitter=1)
        while not self.stopping.is_set():
            request = self.options | question
            answer, error, seconds = self.post(request, isinstance(problem.answer, float))
            if answer:
                self.answered += 1
                return answer
            transient = re.search(BUSY, error) and not re.search(FATAL, error)
            if transient and retry.total and (self.answered or len(retry.history) < 2):
                retry = retry.increment()  # only twice if the server has never answered
                self.stopping.wait(max(seconds, retry.get_backoff_time()))
            elif "logprobs" in request and re.match("HTTP 4.*logprob", error):
                print(f"{error}\nContinuing without log-probabilities.", file=sys.stderr)
                self.options = {k: v for k, v in self.options.items() if "logprobs" not in k}
            elif "max_tokens" in request and "max_completion_tokens" in error:
                self.options["max_completion_tokens"] = self.args.max_tokens
                self.options.pop("max_tokens", None)
            else:
                self.failed[problem.question] = f"{self.url}: {error}; {REMEDY}"
                suspect = len(self.failed) >= 3 and (transient or not self.answered)
                if suspect or re.search(FATAL, error):
                    self.stopping.set()
                    raise UserError(self.failed[problem.question])
                return None

    def post(self, request, is_number):
        """Send a request once; return (answer, error, seconds that the server asks to wait)."""
        try:
            response = self.session.post(self.url, json=request, timeout=600)
        except requests.RequestException as error:
            return None, f"no response: {error}", 0
        answer, seconds = None, 0
        try:
            seconds = urllib3.Retry().get_retry_after(response) or 0
            body = response.json()
            if response.ok and not body.get("error"):
                answer = parse_choice(body["choices"][0], is_number)
        except (*MALFORMED, urllib3.exceptions.InvalidHeader):
            pass  # the error shows the response
        words = " ".join(response.text.replace(self.key or "\0", "[key]").split())[:500]
        return answer, f"HTTP {response.status_code} {response.reason}: {words}", seconds

def sample(client, log, missing, args):
    """Ask for missing answers, [(problem, how many)], --parallel questions at a time."""
    def work(problem, n):
        while n > 0 and (answer := client.ask(problem)):
            log.write(json.dumps({"question": problem.question, "answer": answer}) + "\n")
            n -= 1

    with ThreadPoolExecutor(args.parallel) as pool:  # its end waits for the answers in flight
        jobs = {pool.submit(work, *one) for one in missing}
        try:
            while jobs:
                done, jobs = wait(jobs, timeout=1, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()  # raises what work() raised
                if sys.stderr.isatty():
                    print(f"{client.answered:,} answers", end="\r", file=sys.stderr)
        except BaseException:
            client.stopping.set()
            print(f"\nThe answers are in {log.name}; the same command continues.", file=sys.stderr)
            raise

def read_answers(path, settings, problems, samples):
    """Yield (problem, answer), up to `samples` per question, from a log with these settings."""
    count = Counter()
    with open(path) as lines:
        if (before := next(lines).strip()) != settings:
            raise UserError(f"{path} was sampled with {before:.300}; use another --out")
        for entry in map(json.loads, lines):
            count[entry["question"]] += 1
            if entry["question"] in problems and count[entry["question"]] <= samples:
                yield problems[entry["question"]], entry["answer"]

# --- from the log to teacher records ---

CUT_OFF = "answers were cut off at --max-tokens and are wrong. Use a larger one, and another --out."
EMPTY = "answers are empty: the model only thought. Turn that off, or use a larger --max-tokens."
TEXT_ONLY = "right answers have no usable log-probabilities: they train by likelihood only."

def write_records(answers, out):
    """Write the right ones of (problem, answer) pairs as teacher records; return a summary."""
    counts, votes = Counter(), defaultdict(list)
    with (gzip.open if out.suffix == ".gz" else open)(out, "wt") as file:
        for problem, answer in answers:
            text = "" if "finish_reason" in answer else answer["solution"]
            right = exact_match(text, problem.answer)
            votes[problem.question, problem.answer].append(text)
            counts.update({"all": 1, "right": right, CUT_OFF: "finish_reason" in answer,
                           EMPTY: not answer["solution"],
                           TEXT_ONLY: right and "tokens" not in answer})
            if right:
                record = {"question": problem.question, "answer": number_text(problem.answer)}
                file.write(json.dumps(record | answer) + "\n")
    notes = "".join(f" {counts[n]:,} {n}" for n in (CUT_OFF, EMPTY, TEXT_ONLY) if counts[n])
    if not counts["right"]:
        out.unlink()
        raise UserError(f"none of {counts['all']:,} answers is right.{notes}")
    agreed = sum(exact_match(majority(texts, gold), gold) for (_, gold), texts in votes.items())
    return (f"{len(votes):,} questions, {counts['all']:,} answers: a single sample is right "
            f"{counts['right'] / counts['all']:.2%} of the time, the majority vote "
            f"(self-consistency) {agreed / len(votes):.2%}.{notes}")

def main():
    """Ask for the missing answers, then write the right ones and print the accuracies."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--url", required=True, help="address of the server, such as http://localhost:8000/v1")
    add("--model", required=True, help="name of the model on the server")
    add("--out", type=Path, required=True, help="teacher records to write (.jsonl or .jsonl.gz)")
    add("--questions", default="gsm8k", help="gsm8k, or a JSONL file of question, answer")
    add("--samples", type=int, default=40, help="solutions per question")
    add("--chat", action="store_true", help="use /chat/completions instead of /completions")
    add("--prompt", default=math_prompt("{question}", True), help="text with {question} in it")
    add("--temperature", type=float, default=0.5, help="sampling temperature")
    add("--max-tokens", type=int, default=256, help="maximum length of a solution")
    add("--stop", nargs="*", default=["\nQ:"], help="texts that end a solution")
    add("--no-logprobs", action="store_true", help="do not ask for log-probabilities")
    add("--parallel", type=int, default=8, help="number of questions asked at a time")
    add("--retries", type=int, default=10, help="retries of a failed request")
    add("--limit", type=int, help="maximum number of questions")
    args = parser.parse_args()
    if "{question}" not in args.prompt:
        parser.error("--prompt has no {question} in it; write it where questions go")
    problems = (load("gsm8k", "train") if args.questions == "gsm8k"
                else read_problems(args.questions, parse_gsm8k))
    problems = {problem.question: problem for problem in problems[: args.limit]}
    names = ("model", "chat", "temperature", "max_tokens", "stop", "prompt")
    settings = json.dumps({name: vars(args)[name] for name in names})
    path = args.out.with_name(args.out.name + ".answers.jsonl")
    with open_jsonl(path) as log:
        log.write("" if path.stat().st_size else settings + "\n")
        have = Counter(p.question for p, _ in read_answers(path, settings, problems, args.samples))
        missing = [(p, args.samples - have[p.question]) for p in problems.values()]
        client = CompletionClient(args, have.total())
        sample(client, log, missing, args)
    if failed := list(client.failed.values()):
        print(f"{len(failed):,} questions failed; the same command asks again. {failed[-1]}")
    print(write_records(read_answers(path, settings, problems, args.samples), args.out))

if __name__ == "__main__":
    run_command(main)
