"""Sample chain-of-thought solutions from a teacher behind an OpenAI-compatible server.

    python data/sample_teacher.py --url http://localhost:8000/v1 --model NAME --out teacher.jsonl.gz

A question becomes a prompt, a request, an answer, a line of the log and, if the answer is right, a
teacher record (data/README.md). The log, OUT.answers.jsonl, gets every answer, right or wrong, the
moment it arrives, so that a run that was stopped or killed asks only for what is missing.

On --temperature: the paper's teacher was sampled at 0.5, but the probabilities in the authors' data
are those of temperature 1. In 40 of their records the sampled token is the most probable one 92.3%
of the time; the probabilities predict 81.8%, their squares (temperature 0.5) 92.2%. Servers may
report either kind: vLLM's old engine applies the temperature first, its new one does not.
"""

import argparse
import collections
import email.utils
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
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, proxy_bypass, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import DEFAULT_DATA, exact_match, extract_choice, extract_number, load  # noqa: E402
from eval import math_prompt, number_text, read_gsm8k, read_problems  # noqa: E402
from specialize import parse_record  # noqa: E402
from t5 import UserError, in_range, run_command, show_progress  # noqa: E402

TOP_LOGPROBS = 5  # per token, as many as the paper's teacher reported
UNKNOWN = -99.0  # servers write null or -9999 for a log-probability that they do not know
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a retry, doubled each time
LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for

# --- from a response to an answer ---

THINKING = re.compile(r"\A(.*</think>|\s*<think>.*)", re.DOTALL)
STATEMENT = re.compile(r"the answer is\W*\w.*", re.IGNORECASE)
BYTE_TOKEN = re.compile(rb"bytes:( ?)(\\+x[0-9a-fA-F]{2})+|<0x[0-9a-fA-F]{2}>")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

def parse_choice(choice):
    """Return one choice of a response as {solution, tokens, top_logprobs}.

    The solution ends with the line that states the answer, as in the authors' data. If it was cut
    off before that, at --max-tokens, finish_reason is "length". Without usable log-probabilities
    there are no tokens and top_logprobs. Raises one of MALFORMED if the choice has no text.
    """
    message = choice.get("message", choice)  # the forms of /chat/completions and of /completions
    text, reason = message.get("content", message.get("text")), choice.get("finish_reason")
    if choice.get("error") or text is None and reason is None:
        raise ValueError("no text")
    if isinstance(text, list):
        text = "".join(part["text"] for part in text if part["type"] == "text")
    text = THINKING.sub("", text or "").strip()
    statement = STATEMENT.search(text)
    answer = {"solution": text[: statement.end()].rstrip() if statement else text}
    if reason in ("length", "max_tokens") and answer["solution"] == text:
        answer["finish_reason"] = "length"
    try:
        return answer | parse_logprobs(answer["solution"], choice["logprobs"])
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
    tokens = sampled_tokens(steps)
    span = find_span(solution, tokens)
    names = [token_name(token) for token in tokens[span]]
    tops = []
    for name, step in zip(names, steps[span]):
        top = {}
        for entry in step.get("top_logprobs") or []:
            top.setdefault(token_name(token_bytes(entry)), entry["logprob"])
        if top:  # the sampled token need not be in it
            top.setdefault(name, step["logprob"])
        known = {one: value for one, value in top.items() if value is not None and value > UNKNOWN}
        tops.append({one: round(min(0.0, value), 5) for one, value in known.items()})
    if all(top.keys() <= {name} for name, top in zip(names, tops)):
        raise ValueError("no alternatives to the sampled tokens, so no distribution")
    return {"tokens": names, "top_logprobs": tops}

def sampled_tokens(steps):
    """Return the sampled tokens as bytes.

    llama.cpp withholds text that might start a stop sequence, such as a newline, and reports it
    with the next token, whose own text is in the top list under the same id.
    """
    tokens, withheld = [], b""
    for step in steps:
        reported = token_bytes(step)
        top = [entry for entry in step.get("top_logprobs") or [] if "id" in entry]
        own = [token_bytes(entry) for entry in top if entry["id"] == step.get("id")]
        tokens.append(own[0] if own else reported.removeprefix(withheld))
        withheld += tokens[-1]
        withheld = withheld[len(reported) :] if withheld.startswith(reported) else b""
    return tokens

def token_bytes(entry):
    """Return the bytes of a token: as listed, as spelled (bytes:\\xe2, <0xE2>), or of its text."""
    listed = entry.get("bytes")
    token = entry["token"].encode() if listed is None else bytes(listed)
    if spelled := BYTE_TOKEN.fullmatch(token):
        codes = re.findall(rb"x(..)", token)
        return (spelled[1] or b"") + bytes(int(code, 16) for code in codes)
    return token.replace("▁".encode(), b" ")  # SentencePiece's spelling of a space

def token_name(token):
    """Return a token's bytes as text, or as bytes:\\xe2 if they are not complete characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

def find_span(solution, tokens):
    """Return the slice of the tokens that spell the solution, ignoring whitespace.

    Tokens of the model's thinking may come before it, a stop sequence or an end token after it.
    Raises ValueError if no tokens spell it.
    """
    ignored = rb"\s"
    if any(b"\xef\xbf\xbd" in token for token in tokens):
        ignored = rb"[^!-~]"  # U+FFFD stands for part of a character: compare ASCII only
    visible = [re.sub(ignored, b"", token) for token in tokens]
    wanted = re.sub(ignored, b"", solution.replace("▁", " ").encode())
    starts = list(itertools.accumulate(map(len, visible), initial=0))
    start = b"".join(visible).rindex(wanted)
    first = len(starts) - 1 - starts[::-1].index(start)  # the last one, to skip invisible tokens
    return slice(first, starts.index(start + len(wanted)))

# --- from answers to teacher records ---

def write_records(log, problems, args):
    """Write the right answers as teacher records, all or nothing, and return a summary to print.

    Raises UserError if no answer is right.
    """
    counts = collections.Counter()
    votes = collections.defaultdict(collections.Counter)  # question -> {final answer: votes}
    unfinished = args.out.with_name(args.out.name + ".tmp")
    with (gzip.open if args.out.suffix == ".gz" else open)(unfinished, "wt") as file:
        for problem, answer in log.answers(problems, args.samples):
            cut_off = "finish_reason" in answer
            counts.update({"all": 1, "cut off": cut_off, "empty": cut_off and not answer["solution"]})
            extract = extract_number if isinstance(problem.answer, float) else extract_choice
            votes[problem.question][None if cut_off else extract(answer["solution"])] += 1
            if cut_off or not exact_match(answer["solution"], problem.answer):
                continue
            gold = number_text(problem.answer)
            record = {"question": problem.question, "answer": gold, **answer}
            try:
                parse_record(record, "")
            except MALFORMED:  # training would refuse its distributions
                record = {key: record[key] for key in ("question", "answer", "solution")}
            counts.update({"right": 1, "text only": "tokens" not in record})
            file.write(json.dumps(record) + "\n")
    summary = summarize(counts, votes, problems)
    if not counts["right"]:
        unfinished.unlink()
        raise UserError(f"No answer is right.\n{summary}\nRead the answers in {log.path}.")
    os.replace(unfinished, args.out)
    return f"{summary}\nThe right answers are in {args.out}, all answers in {log.path}."

def summarize(counts, votes, problems):
    """Return the accuracies, and what was lost, as text."""
    agreed = 0
    for question, answers in votes.items():
        answers.pop(None, None)  # no answer, no vote
        agreed += max(answers, key=answers.get, default=None) == problems[question].answer
    single, majority = counts["right"] / max(counts["all"], 1), agreed / max(len(votes), 1)
    text = f"{len(votes):,} questions, {counts['all']:,} answers: a single sample is right "
    text += f"{single:.2%} of the time, the majority vote (self-consistency) {majority:.2%}."
    if counts["cut off"]:
        text += f"\n{counts['cut off']:,} answers were cut off at --max-tokens and count as wrong, "
        text += f"{counts['empty']:,} of them while the model was still thinking.\n"
        text += "Use a larger --max-tokens and another --out, or turn thinking off."
    if counts["text only"]:
        text += f"\n{counts['text only']:,} right answers came without usable log-probabilities: "
        text += "they train by likelihood only."
    return text

# --- the client ---

OUT_OF_CREDIT = "insufficient.(quota|balance|credit|fund)|HTTP 402"
TRY_LATER = "rate.?limit|overload|timed? ?out|try again|unavailable|busy|capacity"
ADVICE = {  # what an error mentions -> what to do; the first match counts
    OUT_OF_CREDIT: "Add credit, then repeat the command.",
    "logprob": "Add --no-logprobs.",
    "temperature": "Set another --temperature, such as 1.",
    r"\bstop\b": "Send no stop sequences: --stop without a value.",
    "max_tokens|context.(length|size|window)|too (long|large)": "Lower --max-tokens or --shots.",
    "HTTP 40[13]|api.?key": "Set OPENAI_API_KEY to a key that may use this model.",
    "HTTP 429|rate.?limit": "Lower --parallel, or repeat the command later.",
    "HTTP 5": "Read the server's log. If log-probabilities are the cause, add --no-logprobs.",
    "HTTP": "Check --url (it usually ends in /v1), --model, and whether --chat is needed.",
    "": "Check that a server is running at this address.",
}

class CompletionClient:
    """A model behind /completions or, with --chat, /chat/completions.

    supports_logprobs: False once the server has refused log-probabilities. answered: True after
    the first answer. refused: errors about single prompts. stopping: an event that ends ask().
    """

    def __init__(self, args):
        self.args, self.supports_logprobs = args, not args.no_logprobs
        self.url = args.url.rstrip("/") + ("/chat/completions" if args.chat else "/completions")
        self.max_tokens_key = "max_tokens"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()  # never written or printed
        self.answered, self.last_error, self.refused = False, "", []
        self.stopping = threading.Event()
        if not re.match(r"https?://[^/\s]", self.url):
            raise UserError(f"--url {args.url}: not an address like http://localhost:8000/v1")
        if not re.fullmatch("[!-~]*", self.key):
            raise UserError("OPENAI_API_KEY contains a line break or another invalid character")

    def ask(self, prompt, n):
        """Return one to n answers, or none if stopped or if the server refuses this prompt.

        Transient failures are retried after the server's Retry-After or with exponential backoff.
        Raises UserError on permanent failures, or when the retries run out.
        """
        retries = 0
        while not self.stopping.is_set():
            request = self.make_request(prompt, n)
            answers, status, error, wait = self.post(request)
            if answers:
                self.answered = True
                return answers[:n]
            self.last_error = error
            if is_transient(status, error) and retries < self.args.retries:
                backoff = min(FIRST_WAIT * 2**retries, LONGEST_WAIT) * random.uniform(0.5, 1)
                self.stopping.wait(max(backoff, min(wait, LONGEST_RETRY_AFTER)))
                retries += 1
            elif "logprobs" in request and "logprob" in error.lower():
                if self.supports_logprobs:
                    print(f"{error}\nContinuing without log-probabilities.", file=sys.stderr)
                self.supports_logprobs = False
            elif "max_tokens" in request and "max_completion_tokens" in error:
                self.max_tokens_key = "max_completion_tokens"
            elif self.answered and status in (400, 413, 422):  # too long, filtered
                self.refused.append(self.explain(error))
                return []
            else:
                raise UserError(self.explain(error))
        return []

    def make_request(self, prompt, n):
        """Return the body of a request for n answers."""
        args = self.args
        request = {"model": args.model, "temperature": args.temperature}
        request[self.max_tokens_key] = args.max_tokens
        if args.stop:  # some servers refuse an empty list
            request["stop"] = args.stop
        if n > 1:  # some servers do not know it
            request["n"] = n
        if args.chat:
            request["messages"] = [{"role": "user", "content": prompt}]
        else:
            request["prompt"] = prompt
        if self.supports_logprobs:
            top = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            request |= top if args.chat else {"logprobs": TOP_LOGPROBS}
        return request

    def post(self, request):
        """Send a request once; return (answers, status, error, seconds that the server asks for).

        The status is 0 if no complete response came. An error inside a 200 has its own status.
        """
        message = Request(self.url, json.dumps(request).encode())
        message.add_header("Content-Type", "application/json")
        if self.key:
            message.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            try:
                response = urlopen(message, timeout=self.args.timeout)
            except HTTPError as error:
                response = error  # it has a body, too
            with response:
                text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            cause = str(getattr(error, "reason", error)) or type(error).__name__
            return [], 0, f"no response: {cause}", 0.0
        answers, status = parse_response(text) if response.status == 200 else ([], response.status)
        if self.key:
            text = text.replace(self.key, "[key]")  # some servers quote it
        error = f"HTTP {response.status} {response.reason}: {' '.join(text.split())[:500]}"
        return answers, status, error, retry_after(response.headers.get("Retry-After"))

    def explain(self, error):
        """Return a message with the address, the server's words and what to do."""
        advice = next(text for words, text in ADVICE.items() if re.search(words, error, re.I))
        parts = urlsplit(self.url)
        if parts.scheme in getproxies() and not proxy_bypass(parts.hostname):
            advice += f"\nRequests go through {parts.scheme}_proxy. If the server is local, "
            advice += f"set no_proxy={parts.hostname}."
        return f"{self.url}: {error}\n{advice}"

def parse_response(text):
    """Return the answers in a 200 response, and a status for the case that there are none."""
    try:
        body = json.loads(text)
        if "choices" in body and not body.get("error"):
            return [parse_choice(choice) for choice in body["choices"]], 0
        code = re.search(r'"code": ?"?([45]\d\d)\b', text)
        return [], int(code[1]) if code else 200
    except MALFORMED:
        return [], 0

def is_transient(status, error):
    """Return whether the same request may succeed later."""
    if status == 200:  # an error without a code
        return re.search(TRY_LATER, error, re.IGNORECASE)
    later = status in (0, 408, 409, 425, 429) or status >= 500
    return later and not re.search(OUT_OF_CREDIT, error, re.IGNORECASE)

def retry_after(header):
    """Return a Retry-After header, seconds or a date, as seconds from now; 0 if there is none."""
    if re.fullmatch(r"\d+(\.\d+)?", header or ""):
        return float(header)
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0

# --- the log of answers ---

class ResponseLog:
    """The file OUT.answers.jsonl: a line with the settings, then a line per request.

    Such a line is {"question": .., "answers": [..]}, with answers as parse_choice returns them.
    """

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()

    def open(self, settings):
        """Open the file for appending. Raises UserError if it is in use or has other settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        try:
            import fcntl
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path} is in use. Wait, or use another --out.") from None
        except (ImportError, OSError) as error:  # Windows, some network file systems
            print(f"warning: cannot lock {self.path} ({error}): do not run two processes on it",
                  file=sys.stderr)
        self.file.seek(0)
        complete = sum(len(line) for line in self.file if line.endswith(b"\n"))
        self.file.truncate(complete)  # drops a last line that a kill left unfinished
        if not complete:
            self.append(settings)
        before = next(self.entries())
        old = [f"{key} {before.get(key)!r}" for key in settings if before.get(key) != settings[key]]
        if old:
            raise UserError(f"{self.path} was sampled with {', '.join(old)}. Use another --out.")

    def append(self, entry):
        """Write a line and flush it to disk."""
        with self.lock:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def entries(self):
        """Yield the lines as dicts. Raises UserError at a damaged one."""
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    entry = dict(json.loads(line)) if line.endswith(b"\n") else {}
                except (ValueError, TypeError) as error:
                    raise UserError(f"{self.path}, line {number}: {error}. Delete it.") from None
                yield entry

    def answers(self, problems, samples):
        """Yield (problem, answer) for the first `samples` answers to each question."""
        count = collections.Counter()
        for entry in self.entries():
            problem = problems.get(entry.get("question"))
            for answer in entry["answers"] if problem else []:
                count[problem.question] += 1
                if count[problem.question] <= samples:
                    yield problem, answer

# --- the command ---

def sample(client, log, problems, prompt, args):
    """Ask for the missing answers, --parallel requests at a time; log each as it arrives.

    Raises UserError or KeyboardInterrupt, after logging the answers in flight: they are paid for.
    """
    have = collections.Counter(one.question for one, _ in log.answers(problems, args.samples))
    client.answered = bool(have)
    jobs = collections.deque(
        (question, min(args.per_request, args.samples - done)) for question in problems
        for done in range(have[question], args.samples, args.per_request))
    total, errors = len(jobs), []

    def work():
        try:
            while not client.stopping.is_set():
                question, n = jobs.popleft()
                while n > 0 and (answers := client.ask(prompt(question), n)):
                    log.append({"question": question, "answers": answers})
                    n -= len(answers)  # a server may give fewer
        except IndexError:  # no more jobs
            pass
        except Exception as error:  # for the main thread to raise
            errors.append(error)
            client.stopping.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(args.parallel)]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            show_progress(f"{total - len(jobs):,} of {total:,} requests  {client.last_error[:150]}")
            time.sleep(0.2)
    except KeyboardInterrupt:
        client.stopping.set()
        print("\nwaiting for the answers in flight; Ctrl-C again drops them", file=sys.stderr)
        for thread in threads:
            thread.join()
        raise
    show_progress("")
    if errors:
        raise errors[0]

def make_prompt(args):
    """Return the function from a question to its prompt: --prompt's text or the paper's."""
    if args.prompt:
        template = args.prompt.read_text(encoding="utf-8")
        if "{question}" not in template:
            raise UserError(f"{args.prompt}: no {{question}} in it. Write it where questions go.")
        return lambda question: template.replace("{question}", question)
    pool = load("gsm8k", "train", args.data) if args.shots else []
    shots = random.Random(0).sample(pool, min(args.shots + 1, len(pool)))  # one to spare

    def prompt(question):
        others = [shot for shot in shots if shot.question != question]
        return math_prompt(question, True, others[: args.shots])

    return prompt

def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Sample chain-of-thought solutions from an OpenAI-compatible server.",
        epilog="An API key is read from the environment variable OPENAI_API_KEY.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, positive = parser.add_argument, in_range(int, above=0)
    add("--url", required=True, help="address of the server, such as http://localhost:8000/v1")
    add("--model", required=True, help="name of the model on the server")
    add("--out", type=Path, required=True, help="teacher records to write (.jsonl or .jsonl.gz)")
    add("--questions", default="gsm8k", help="gsm8k (its training set) or a JSONL file of questions")
    add("--samples", type=positive, default=40, help="solutions per question")
    add("--chat", action="store_true", help="use /chat/completions instead of /completions")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--shots", type=in_range(int), default=0, help="GSM8K demonstrations")
    prompts.add_argument("--prompt", type=Path, help="file with a prompt that contains {question}")
    add("--temperature", type=in_range(float), default=0.5, help="sampling temperature")
    add("--max-tokens", type=positive, default=256, help="maximum length of a solution")
    add("--stop", nargs="*", default=["\nQ:"], help="texts that end a solution")
    add("--no-logprobs", action="store_true", help="do not ask for log-probabilities")
    add("--parallel", type=positive, default=8, help="number of requests at a time")
    add("--per-request", type=positive, default=1, help="solutions per request, if servers allow n")
    add("--retries", type=in_range(int), default=10, help="retries of a failed request")
    add("--timeout", type=in_range(float, above=0), default=600, help="seconds per request")
    add("--limit", type=positive, help="maximum number of questions")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder of the problem sets")
    add("--write-only", action="store_true", help="write the records of the answers so far")
    return parser.parse_args()

def main():
    """Ask for the missing answers, then write the right ones and print the accuracies."""
    args = parse_arguments()
    from_gsm8k = args.questions == "gsm8k"
    problems = load("gsm8k", "train", args.data) if from_gsm8k else read_problems(args.questions, read_gsm8k)
    problems = {problem.question: problem for problem in problems[: args.limit]}
    log = ResponseLog(args.out.with_name(args.out.name + ".answers.jsonl"))
    ...
