"""Sampling a teacher: chain-of-thought solutions from an OpenAI-compatible server, with its likeliest tokens.

In the order in which an answer travels: a question becomes a prompt, a request, an answer, a line of the journal, and,
if it is right, a teacher record (data/README.md). Knows nothing of students. Beyond the standard library it needs what
eval.py needs.

The journal, OUT.answers.jsonl, gets every answer, right or wrong, the moment it arrives, so that a run that was stopped
or killed asks only for what is missing. The API key is read from OPENAI_API_KEY and goes into no file and no message.

    python data/teacher.py --url http://localhost:8000/v1 --model NAME --questions gsm8k --out teacher.jsonl.gz
"""

import argparse
import collections
import email.utils
import fcntl
import gzip
import http.client
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.download import InputError, bounded, show  # noqa: E402
from data.records import parse_record  # noqa: E402
from data.runs import on_interrupt  # noqa: E402
from eval import DEFAULT_DATA, extract_choice, extract_number, gsm8k_problems, is_correct, load  # noqa: E402
from eval import math_prompt, number_text, read_problems  # noqa: E402
from t5 import run_command  # noqa: E402

TOP = 5  # likeliest tokens of each step, as many as the paper's teacher told
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a request is repeated: doubled each time, up to the longest
LONGEST_ASKED = 600.0  # the longest such time that a server may ask for
TELL_EVERY = 60.0  # seconds between progress lines where no terminal shows them


# --- the question's way to the server ---


class Teacher:
    """A model behind a server's /completions or /chat/completions.

    tells: whether it tells log-probabilities, as far as known; fault: what went wrong last; stopping: set to give up;
    answered: whether an answer ever came; refused: what the server said of prompts that it will not answer.
    """

    def __init__(self, url, model, chat=False, retries=10, timeout=600, **sampling):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--url {url}: not an address like http://localhost:8000/v1")
        self.url = url.rstrip("/") + ("/chat/completions" if chat else "/completions")
        self.model, self.chat, self.sampling = model, chat, sampling
        self.retries, self.timeout, self.key = retries, timeout, os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError("OPENAI_API_KEY holds a line's end or another character that no key has")
        self.tells, self.fault, self.stopping, self.answered, self.refused = True, "", threading.Event(), False, []

    def ask(self, prompt, n):
        """Up to n answers to a prompt, at least one, each as parse_choice gives it; [] if told to stop, or if the server
        refuses this prompt (too long, filtered), as it may once it has answered others.

        What may pass (a dropped connection, a time-out, 429, 5xx, half an answer) is tried again, after the time that
        the server asks for or a growing one. Raises InputError where trying again is of no use, or was of none.
        """
        for attempt in itertools.count():
            if self.stopping.is_set():
                return []
            body, wait = self.request(prompt, n), 0.0
            try:
                choices = self.post(body)["choices"][:n]
                if answers := [answer for answer in map(parse_choice, choices) if answer]:
                    self.answered = True
                    return answers
                self.fault = "no answer in the response"
            except urllib.error.HTTPError as error:
                text = error_text(error)
                self.fault = f"HTTP {error.code} {error.reason}"
                if error.code in (400, 422) and "logprob" in text and "logprobs" in body:
                    if self.tells:
                        print("the server refuses to tell log-probabilities", file=sys.stderr, flush=True)
                    self.tells = False
                    continue
                if error.code not in (408, 409, 429) and error.code < 500:
                    message = f"{self.url}: {self.without_key(f'{self.fault}: {text.strip()}')[:500]}"
                    if error.code in (400, 413, 422) and self.answered:
                        self.refused.append(message)
                        return []
                    raise InputError(message) from None
                wait = retry_after(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException) as error:
                self.fault = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                self.fault = f"not an answer ({type(error).__name__}: {error})"
            if attempt >= self.retries:
                raise InputError(self.without_key(f"{self.url}: {self.fault}, {attempt + 1} times over"))
            backoff = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1)
            self.stopping.wait(max(backoff, min(wait, LONGEST_ASKED)))

    def request(self, prompt, n):
        """The body of a request for n answers."""
        body = {"model": self.model, **self.sampling}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        if n > 1:  # not every server knows it
            body["n"] = n
        if self.tells:
            body |= {"logprobs": True, "top_logprobs": TOP} if self.chat else {"logprobs": TOP}
        return body

    def post(self, body):
        """One try: the server's answer as JSON. Raises OSError, HTTPException or ValueError."""
        request = urllib.request.Request(self.url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            return json.loads(response.read())

    def without_key(self, message):
        """The message, should the server have put the key into it."""
        return message.replace(self.key, "[key]") if self.key else message


def error_text(error):
    """What the server says about an error, as far as it comes."""
    try:
        return error.read(2000).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""


def retry_after(header):
    """A Retry-After header, seconds or a date, as seconds from now; 0 where there is none."""
    try:
        return float(header)
    except (TypeError, ValueError):
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# --- the answer ---


def parse_choice(choice):
    """One of a server's choices -> {solution, tokens, top_logprobs}; {solution} where no usable log-probabilities came
    with it, None where it has no place for a text. An empty one is a wrong answer."""
    try:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        answer = {"solution": (text or "").strip()}
    except (KeyError, TypeError, AttributeError):
        return None
    try:
        return answer | told_tokens(answer["solution"], choice.get("logprobs") or {})
    except (KeyError, TypeError, ValueError, AttributeError):
        return answer


def told_tokens(solution, told):
    """A choice's logprobs -> {tokens, top_logprobs}, or {} where there are none or they are not of this solution.

    They come in two forms, whichever the address: the lists tokens, token_logprobs and top_logprobs, or a list
    `content` with an entry for each token. Raises KeyError, TypeError, ValueError or AttributeError.
    """
    if told.get("content"):
        steps = [(entry, entry.get("top_logprobs") or []) for entry in told["content"]]
    else:
        entry = lambda pair: {"token": pair[0], "logprob": pair[1]}  # noqa: E731
        sampled = map(entry, zip(told.get("tokens") or [], told.get("token_logprobs") or []))
        steps = [(one, list(map(entry, (top or {}).items()))) for one, top in zip(sampled, told.get("top_logprobs") or [])]
    tokens = sampled_tokens(steps)
    count = length_written(solution, tokens)
    if not count:
        return {}
    top_logprobs = [
        {token_name(token_bytes(one)): log_probability(one) for one in top} | {token_name(token): log_probability(sampled)}
        for token, (sampled, top) in zip(tokens, steps[:count])
    ]
    return {"tokens": list(map(token_name, tokens[:count])), "top_logprobs": top_logprobs}


def sampled_tokens(steps):
    """The bytes of the sampled tokens. llama.cpp holds back what may begin a stop sequence, such as a newline, and lets
    the next token's entry tell it; the token's own text is that of the entry with its id among the likeliest."""
    tokens, held = [], b""
    for sampled, top in steps:
        told = token_bytes(sampled)
        own = next((token_bytes(one) for one in top if one.get("id", -1) == sampled.get("id")), None)
        tokens.append(told.removeprefix(held) if own is None else own)
        held += tokens[-1]
        held = held[len(told) :] if held.startswith(told) else b""
    return tokens


def log_probability(entry):
    """An entry's log-probability: finite, not above 0, and no longer than it need be."""
    value = entry["logprob"]
    return round(min(0.0, max(-99.0, -99.0 if value is None else value)), 5)


def token_bytes(entry):
    """The bytes of a token. Part of a UTF-8 sequence is told as a list of bytes, as the text bytes:\\xe2, or not at
    all: then it is U+FFFD."""
    if entry.get("bytes") is not None:
        return bytes(entry["bytes"])
    token = entry["token"]
    if token.startswith("bytes:") and "\\x" in token:
        return re.sub(rb"\\x([0-9a-fA-F]{2})", lambda code: bytes.fromhex(code[1].decode()), token[6:].encode())
    return token.encode()


def token_name(token):
    """A token's bytes as text, or as bytes:\\xe2 where they are no whole characters."""
    text = token.decode("utf-8", "replace")
    return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def length_written(text, tokens):
    """How many of the tokens write the text; behind them come a stop sequence or a mark of the end. None: not known."""
    written = b""
    for count, token in enumerate(tokens, 1):
        written += token
        if written.decode("utf-8", "replace").strip() == text:
            return count
    return len(tokens) if any(b"\xef\xbf\xbd" in token for token in tokens) else None


# --- the journal ---


class Journal:
    """Every answer that came, a line a request: {"question": .., "answers": [..]}; the first line tells what was asked.

    Raises InputError where the file is of another run.
    """

    def __init__(self, path, asked):
        self.path, self.lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path}: another process is sampling into it; wait for it, or take another --out") from None
        self.file.seek(0)
        whole = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                self.file.truncate(whole)  # the machine stopped while this line was being written
                break
            whole += len(line)
        if not whole:
            self.write(asked)
        self.file.seek(0)
        before = self.parse(self.file.readline(), 1)
        changed = [f"{key} {before.get(key)!r}" for key in asked if before.get(key) != asked[key]]
        if changed:
            raise InputError(f"{path} has answers that were asked for with {'; '.join(changed)}: take another --out")

    def write(self, entry):
        """Put a line on the disk."""
        with self.lock:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def __iter__(self):
        """Yield (question, its answers) for each line."""
        with open(self.path, "rb") as lines:
            next(lines)
            for number, line in enumerate(lines, 2):
                entry = self.parse(line, number)
                try:
                    yield entry["question"], entry["answers"]
                except KeyError as error:
                    raise InputError(f"{self.path}, line {number}: no key {error}") from None

    def parse(self, line, number):
        """One line's object."""
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self.path}, line {number}: not a line of a journal ({error})") from None


# --- sampling ---


class Progress:
    """What has come so far, and the line that tells it."""

    def __init__(self, problems, samples):
        self.problems, self.samples = problems, samples
        self.answers, self.have, self.right, self.tokens = collections.Counter(), 0, 0, 0
        self.start, self.before, self.told = time.time(), 0, time.time()

    def add(self, question, answers):
        """Count answers to one of the questions."""
        if question in self.problems:
            self.answers[question] += len(answers)
            self.have += len(answers)
            self.right += sum(is_correct(a["solution"], self.problems[question].answer) for a in answers)
            self.tokens += sum(len(a.get("tokens", ())) for a in answers)

    def begin(self):
        """Start the clock: what was added before came with an earlier run."""
        self.before, self.tokens = self.have, 0

    def tell(self, fault):
        """Show the line in place, or print it now and then where there is no terminal."""
        have, seconds = self.have, max(time.time() - self.start, 1e-9)
        missing = sum(max(0, self.samples - self.answers[question]) for question in self.problems)
        done = sum(self.answers[question] >= self.samples for question in self.problems)
        line = f"questions {done:,}/{len(self.problems):,}  kept {self.right / max(have, 1):.1%} of {have:,}"
        line += f"  {self.tokens:,} tokens, {self.tokens / seconds:,.0f}/s"
        if have > self.before:
            line += f"  {missing * seconds / (have - self.before) / 60:.1f} min left"
        if fault:
            line += f"  last fault: {fault}"
        show(line)
        if not sys.stderr.isatty() and time.time() - self.told > TELL_EVERY:
            self.told = time.time()
            print(line, file=sys.stderr, flush=True)


def sample(teacher, problems, prompt, journal, samples, per_request, parallel):
    """Ask until each question has its samples, several requests at a time; each answer goes to the journal at once.

    problems: {question: Problem}. prompt: a function of the question. Raises InputError where the teacher gives up, and
    KeyboardInterrupt, both after the answers in flight have come: they are paid for.
    """
    progress, lock, failed = Progress(problems, samples), threading.Lock(), []
    for question, answers in journal:
        progress.add(question, answers)
    progress.begin()
    teacher.answered = progress.have > 0
    missing = {question: samples - progress.answers[question] for question in problems}
    requests = iter([(q, min(per_request, n - start)) for q, n in missing.items() for start in range(0, n, per_request)])

    def work():
        try:
            while not teacher.stopping.is_set():
                with lock:
                    question, n = next(requests, (None, 0))
                if not n:
                    return
                while n > 0 and (answers := teacher.ask(prompt(question), n)):
                    journal.write({"question": question, "answers": answers})
                    n -= len(answers)  # a server may give fewer
                    with lock:
                        progress.add(question, answers)
        except Exception as error:  # for the main thread to raise
            failed.append(error)
            teacher.stopping.set()

    def interrupt(*_):
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        teacher.stopping.set()
        os.write(2, b"\nwaiting for the answers in flight; interrupt again to give them up\n")

    threads, interrupted = [threading.Thread(target=work, daemon=True) for _ in range(parallel)], threading.Event()
    with on_interrupt(interrupt):  # an exception in start() or join() would take a running thread for one that has ended
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                if not interrupted.is_set():
                    progress.tell(teacher.without_key(teacher.fault))
                thread.join(0.2)
    if interrupted.is_set():
        raise KeyboardInterrupt
    show("")
    if failed:
        raise failed[0]


# --- records ---


def write_records(journal, problems, samples, out):
    """Write the right answers as teacher records, and return what came of all: a sentence or two, to print.

    The file appears whole or not at all. Raises InputError where no answer is right.
    """
    seen, votes = collections.Counter(), collections.defaultdict(collections.Counter)
    right = silent = 0
    unfinished = out.with_name(out.name + ".tmp")
    with (gzip.open if out.suffix == ".gz" else open)(unfinished, "wt", encoding="utf-8") as file:
        for question, answers in journal:
            problem = problems.get(question)
            for answer in answers if problem else ():
                seen[question] += 1
                if seen[question] > samples:
                    break
                extract = extract_number if isinstance(problem.answer, float) else extract_choice
                votes[question][extract(answer["solution"])] += 1
                if is_correct(answer["solution"], problem.answer):
                    record = readable({"question": question, "answer": number_text(problem.answer), **answer})
                    file.write(json.dumps(record) + "\n")
                    right, silent = right + 1, silent + ("tokens" not in record)
    total = sum(votes[question].total() for question in votes)
    agreed = sum(majority(votes[question]) == problems[question].answer for question in votes)
    summary = f"{len(votes):,} questions, {total:,} answers: a single sample is right {right / total:.2%} of the time, "
    summary += f"the majority vote {agreed / len(votes):.2%}."
    if not right:
        unfinished.unlink()
        raise InputError(f"{summary} No answer is right, so {out} is not written; all are in {journal.path}")
    os.replace(unfinished, out)
    summary += f"\n{right:,} right answers are in {out}, all answers in {journal.path}."
    if silent:
        summary += f"\n{silent:,} came without usable log-probabilities: they can train by likelihood alone."
    return summary


def readable(record):
    """The record, without its log-probabilities if the training would refuse them."""
    try:
        parse_record(record, "")
    except ValueError:
        return {key: value for key, value in record.items() if key not in ("tokens", "top_logprobs")}
    return record


def majority(votes):
    """The answer that most samples give; those that give none do not vote."""
    return next((answer for answer, _ in votes.most_common() if answer is not None), None)


# --- the command ---


def prompt_function(args):
    """question -> prompt: the file's text with the question in it, or the paper's, behind demonstrations if wanted."""
    if args.prompt:
        try:
            template = args.prompt.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{args.prompt}: {error}") from None
        if "{question}" not in template:
            raise InputError(f"{args.prompt}: no {{question}} in it, the place where each question goes")
        return lambda question: template.replace("{question}", question)
    pool = load("gsm8k", "train", args.data) if args.shots else []
    shots = random.Random(0).sample(pool, min(args.shots + 1, len(pool)))
    return lambda question: math_prompt(question, True, [shot for shot in shots if shot.question != question][: args.shots])


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Sample chain-of-thought solutions from an OpenAI-compatible server.",
        epilog="An API key is read from the environment variable OPENAI_API_KEY.",
    )
    parser.add_argument("--url", required=True, help="the server's address, such as http://localhost:8000/v1")
    parser.add_argument("--model", required=True, help="the model's name on the server")
    parser.add_argument("--questions", default="gsm8k", help="gsm8k (its training set), or a JSONL file with question "
                        "and answer on each line (default: gsm8k)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="teacher records to write (.jsonl or .jsonl.gz)")
    parser.add_argument("--samples", type=bounded(int, above=0), default=40, help="solutions a question (default: 40)")
    parser.add_argument("--chat", action="store_true", help="ask /chat/completions, not /completions")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--shots", type=bounded(int), default=0, help="demonstrations from GSM8K's training set (default: 0)")
    shown.add_argument("--prompt", type=Path, help="file with the whole prompt, {question} standing for the question")
    parser.add_argument("--temperature", type=bounded(float), default=0.7, help="default: 0.7")
    parser.add_argument("--max-tokens", type=bounded(int, above=0), default=256, help="of a solution (default: 256)")
    parser.add_argument("--stop", nargs="*", default=["\nQ:"], help="texts that end a solution (default: a line's Q:)")
    parser.add_argument("--parallel", type=bounded(int, above=0), default=8, help="requests in flight (default: 8)")
    parser.add_argument("--per-request", type=bounded(int, above=0), default=1, help="solutions a request, for servers that know n; the "
                        "prompt is then paid for once (default: 1)")  # fmt: skip
    parser.add_argument("--retries", type=bounded(int), default=10, help="of a failed request (default: 10)")
    parser.add_argument("--timeout", type=bounded(float, above=0), default=600, help="seconds to wait for an answer (default: 600)")
    parser.add_argument("--limit", type=bounded(int, above=0), help="at most this many questions")
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the problem sets")
    return parser.parse_args()


def main():
    """python data/teacher.py: ask for what is missing, then write the right answers and tell the accuracies."""
    args = parse_arguments()
    if args.questions == "gsm8k":
        problems = load("gsm8k", "train", args.data)
    else:
        problems = read_problems(args.questions, gsm8k_problems)
    problems = {problem.question: problem for problem in problems[: args.limit]}
    prompt = prompt_function(args)
    sampling = {"temperature": args.temperature, "max_tokens": args.max_tokens, "stop": args.stop}
    teacher = Teacher(args.url, args.model, args.chat, args.retries, args.timeout, **sampling)
    asked = {"model": args.model, "chat": args.chat, "prompt": prompt("{question}"), **sampling}
    journal = Journal(args.out.with_name(args.out.name + ".answers.jsonl"), asked)
    with journal.file:
        try:
            sample(teacher, problems, prompt, journal, args.samples, args.per_request, args.parallel)
        except InputError as error:
            raise InputError(f"{error}\nWhat came is kept in {journal.path}; the same command goes on from there") from None
        except KeyboardInterrupt:
            sys.exit(f"stopped; what came is kept in {journal.path}, and the same command goes on from there")
    if teacher.refused:
        print(f"{len(teacher.refused):,} requests were refused; the last: {teacher.refused[-1]}")
    if not teacher.tells:
        print("the server refuses to tell log-probabilities: its answers can train by likelihood alone")
    print(write_records(journal, problems, args.samples, args.out))


if __name__ == "__main__":
    run_command(main)
