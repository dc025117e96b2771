"""Sample chain-of-thought solutions from a teacher behind an OpenAI-compatible server.

    python data/sample_teacher.py --url http://localhost:8000/v1 --model NAME --out teacher.jsonl.gz

A question becomes a prompt, a request, an answer, a line of the log and, if the answer is right, a
teacher record (data/README.md). The log, OUT.answers.jsonl, gets every answer when it arrives, so
that a killed run asks only for what is missing. The API key is read from OPENAI_API_KEY.

On --temperature: the paper's teacher was sampled at 0.5, but the probabilities in the authors' data
are those of temperature 1. In 40 of their records the sampled token is the most probable one 92.3%
of the time; the probabilities predict 81.8%, their squares (temperature 0.5) 92.2%. Servers may
report either kind: vLLM's old engine applies the temperature first, its new one does not.
"""

import argparse
import collections
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
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, getproxies, proxy_bypass, urlopen

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import DEFAULT_DATA, exact_match, extract_choice, extract_number, load
from eval import math_prompt, number_text, parse_gsm8k, read_problems
from specialize import MAX_LINE, parse_record
from t5 import UserError, in_range, run_command, show_progress

TOP_LOGPROBS = 5  # per token, as many as the paper's teacher reported
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before a retry, doubled each time
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

# --- from a question to an answer ---

def make_prompt(args):
    """Return the function from a question to its prompt: --prompt's text, or the paper's."""
    if args.prompt:
        template = args.prompt.read_text(encoding="utf-8")
        if "{question}" not in template:
            raise UserError(f"{args.prompt}: no {{question}} in it. Write it where questions go.")
        return lambda question: template.replace("{question}", question)
    pool = load("gsm8k", "train", args.data) if args.shots else []
    shots = random.Random(0).sample(pool, min(args.shots + 1, len(pool)))  # one to spare
    others = lambda question: [shot for shot in shots if shot.question != question][: args.shots]
    return lambda question: math_prompt(question, True, others(question))

THINKING = re.compile(r"\A(.*</think>|\s*<think>.*)", re.DOTALL)
STATEMENT = re.compile(r"the answer is\W*\w.*", re.IGNORECASE)

def parse_choice(choice):
    """Return one choice of a response as {solution, tokens, top_logprobs}.

    The solution ends with the line that states the answer, as in the authors' data; finish_reason
    is "length" if --max-tokens cut it off before that. The tokens are left out if their
    log-probabilities are unusable. Raises one of MALFORMED if the choice has no text."""
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
    tokens, tops = [], []
    for step in steps:
        entries = step.get("top_logprobs") or []
        # llama.cpp withholds text that might start a stop sequence, such as a newline, and reports
        # it with the next token. That token's own text is in the top list, under the same id.
        own = [entry for entry in entries if entry.get("id", -1) == step.get("id")]
        tokens.append(token_bytes(own[0] if own else step))
        top = {token_name(token_bytes(entry)): entry["logprob"] for entry in entries}
        if top:  # the sampled token need not be in it
            top.setdefault(token_name(tokens[-1]), step["logprob"])
        # Servers write null or -9999 for what they do not know.
        known = {one: value for one, value in top.items() if value is not None and value > -99}
        tops.append({one: round(min(0.0, value), 5) for one, value in known.items()})
    span = find_span(solution, tokens)
    names = [token_name(token) for token in tokens[span]]
    if all(top.keys() <= {name} for name, top in zip(names, tops[span])):
        raise ValueError("no alternatives to the sampled tokens, so no distribution")
    return {"tokens": names, "top_logprobs": tops[span]}

BYTE_TOKEN = re.compile(rb"bytes:( ?)(\\+x[0-9a-fA-F]{2})+|<0x[0-9a-fA-F]{2}>")

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
    """Return the slice of the tokens that spell the solution; raises ValueError if none do.

    Tokens of the model's thinking may come before it, a stop sequence or an end token after it.
    Whitespace is ignored, and with U+FFFD (part of a character) everything but ASCII."""
    partial = "\ufffd".encode() in b"".join([*tokens, solution.encode()])
    ignored = rb"[^!-~]" if partial else rb"\s"
    visible = [re.sub(ignored, b"", token) for token in tokens]
    wanted = re.sub(ignored, b"", solution.replace("▁", " ").encode())
    starts = list(itertools.accumulate(map(len, visible), initial=0))
    start = b"".join(visible).rindex(wanted)
    first = len(starts) - 1 - starts[::-1].index(start)  # the last one, to skip invisible tokens
    return slice(first, starts.index(start + len(wanted)))

# --- from answers to teacher records ---

def write_records(log, problems, args):
    """Write the right answers as teacher records, all or nothing, and return a summary."""
    counts = collections.Counter()
    votes = collections.defaultdict(collections.Counter)  # question -> {final answer: votes}
    unfinished = args.out.with_name(args.out.name + ".tmp")
    with (gzip.open if args.out.suffix == ".gz" else open)(unfinished, "wt") as file:
        for problem, answer in log.answers(problems, args.samples):
            cut_off = "finish_reason" in answer
            extract = extract_number if isinstance(problem.answer, float) else extract_choice
            final = None if cut_off else extract(answer["solution"])
            votes[problem.question][final] += final is not None
            right = not cut_off and exact_match(answer["solution"], problem.answer)
            counts.update({"all": 1, "right": right, "cut off": cut_off})
            counts["empty"] += cut_off and not answer["solution"]
            if right:
                record = make_record(problem, answer)
                counts["text only"] += bool(record) and "tokens" not in record
                counts["too long"] += not record
                file.write(json.dumps(record) + "\n" if record else "")
    summary = summarize(counts, votes, problems)
    if counts["right"] == counts["too long"]:
        unfinished.unlink()
        fault = "every right answer is too long" if counts["right"] else "no answer is right"
        raise UserError(f"{fault}.\n{summary}\nRead the answers in {log.path}.")
    os.replace(unfinished, args.out)
    return f"{summary}\nThe right answers are in {args.out}, all answers in {log.path}."

def make_record(problem, answer):
    """Return a right answer as a teacher record that training accepts.

    It is without tokens if training would refuse them, and empty if the text is too long, too."""
    for fields in (answer, {"solution": answer["solution"]}):
        record = {"question": problem.question, "answer": number_text(problem.answer), **fields}
        try:
            parse_record(record, "")
            if len(json.dumps(record)) < MAX_LINE:  # the line also has a line feed
                return record
        except MALFORMED:
            pass
    return {}

def summarize(counts, votes, problems):
    """Return the accuracies, and what was lost, as text."""
    agreed = sum(max(answers, key=answers.get) == problems[question].answer
                 for question, answers in votes.items())
    single, majority = counts["right"] / max(counts["all"], 1), agreed / max(len(votes), 1)
    text = f"{len(votes):,} questions, {counts['all']:,} answers: a single sample is right "
    text += f"{single:.2%} of the time, the majority vote (self-consistency) {majority:.2%}."
    if counts["cut off"]:
        text += f"\n{counts['cut off']:,} answers were cut off at --max-tokens and count as wrong; "
        text += f"{counts['empty']:,} of them are empty, as of a model that was still thinking.\n"
        text += "Use a larger --max-tokens and another --out, or turn thinking off."
    if counts["text only"]:
        text += f"\n{counts['text only']:,} right answers came without usable log-probabilities: "
        text += "they train by likelihood only."
    if counts["too long"]:
        text += f"\n{counts['too long']:,} right answers are longer than training accepts and were "
        text += "left out. Use a smaller --max-tokens, or shorter questions, and another --out."
    return text

# --- the client ---

OUT_OF_CREDIT = "(?i)insufficient.(quota|balance|credit|fund)|HTTP 402"
TRANSIENT = ("(?i)^(no response|incomplete response|HTTP (408|409|425|429|50[^1]|52.))|"
             '"code": ?"?(429|5..)|rate.?limit|overload|timed?.?out|try.again')
ADVICE = {  # what an error mentions -> what to do; the first match counts
    OUT_OF_CREDIT: "Add credit, then repeat the command.",
    "HTTP 4(00|13|22)": "Change what it names, such as --temperature, --stop or --max-tokens.",
    "(?i)HTTP 40[13]|api.?key": "Set OPENAI_API_KEY to a key that may use this model.",
    "(?i)HTTP 429|rate.?limit": "Lower --parallel, or repeat the command later.",
    "(?i)HTTP 5|logprob": "Read its log. If log-probabilities are the cause, add --no-logprobs.",
    "HTTP|incomplete": "Check --url (it usually ends in /v1), --model, and if --chat is needed.",
    "": "Check that a server is running at this address.",
}

class CompletionClient:
    """A model behind /completions or, with --chat, /chat/completions.

    supports_logprobs turns False when the server refuses them. answered counts answers, refused
    collects errors about single prompts. When the event stopping is set, ask() returns."""

    def __init__(self, args):
        self.args, self.supports_logprobs = args, not args.no_logprobs
        self.url = args.url.rstrip("/") + ("/chat/completions" if args.chat else "/completions")
        self.max_tokens_key = "max_tokens"
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()  # never written or printed
        self.answered, self.last_error, self.refused = 0, "", []
        self.stopping = threading.Event()
        if not re.match(r"https?://[^/\s]", self.url):
            raise UserError(f"--url {args.url}: not an address like http://localhost:8000/v1")
        if not re.fullmatch("[!-~]*", self.key):
            raise UserError("OPENAI_API_KEY contains a line break or another invalid character")

    def ask(self, prompt, n):
        """Return one to n answers, or none if stopped or if the server refuses this prompt.

        Transient failures are retried after the server's Retry-After or with exponential backoff.
        Raises UserError on permanent failures, or when the retries run out."""
        retries = 0
        while not self.stopping.is_set():
            request = self.make_request(prompt, n)
            answers, error, wait = self.post(request)
            if answers:
                self.answered += len(answers[:n])
                return answers[:n]
            self.last_error = error
            transient = re.search(TRANSIENT, error) and not re.search(OUT_OF_CREDIT, error)
            if transient and retries < self.args.retries:
                backoff = min(FIRST_WAIT * 2**retries, LONGEST_WAIT) * random.uniform(0.5, 1)
                self.stopping.wait(max(backoff, wait))
                retries += 1
            elif "logprobs" in request and "logprob" in error.lower():
                if self.supports_logprobs:
                    print(f"{error}\nContinuing without log-probabilities.", file=sys.stderr)
                self.supports_logprobs = False
            elif "max_tokens" in request and "max_completion_tokens" in error:
                self.max_tokens_key = "max_completion_tokens"
            elif self.answered and re.match("HTTP (400|413|422)", error):  # too long, filtered
                self.refused.append(self.explain(error))
                return []
            else:
                raise UserError(self.explain(error + f" (retries: {retries})" * (retries > 0)))
        return []

    def make_request(self, prompt, n):
        """Return the body of a request for n answers."""
        args = self.args
        request = {"model": args.model, "temperature": args.temperature}
        request[self.max_tokens_key] = args.max_tokens
        request |= {"stop": args.stop} if args.stop else {}  # some servers refuse an empty list
        request |= {"n": n} if n > 1 else {}  # some do not know it
        messages = [{"role": "user", "content": prompt}]
        request |= {"messages": messages} if args.chat else {"prompt": prompt}
        if self.supports_logprobs:
            top = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
            request |= top if args.chat else {"logprobs": TOP_LOGPROBS}
        return request

    def post(self, request):
        """Send a request once; return (answers, error, seconds that the server asks to wait)."""
        headers = {"Content-Type": "application/json"}
        message = Request(self.url, json.dumps(request).encode(), headers)
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
            return [], f"no response: {cause}", 0.0
        answers, error = [], f"HTTP {response.status} {response.reason}"
        if response.status == 200:
            try:
                body = json.loads(text)
                if "choices" in body and not body.get("error"):
                    error = "incomplete response"
                    answers = [parse_choice(choice) for choice in body["choices"]]
            except MALFORMED:
                error = "incomplete response"
        if self.key:
            text = text.replace(self.key, "[key]")  # some servers quote it
        words = " ".join(text.split())[:500]
        return answers, f"{error}: {words}", retry_after(response.headers.get("Retry-After"))

    def explain(self, error):
        """Return a message with the address, the server's words and what to do."""
        advice = next(advice for words, advice in ADVICE.items() if re.search(words, error))
        url = Request(self.url)
        if url.type in getproxies() and not proxy_bypass(url.host):
            advice += f"\n{url.type}_proxy is set. If the server is local, set no_proxy={url.host}."
        return f"{self.url}: {error}\n{advice}"

def retry_after(header):
    """Return the seconds that a Retry-After header asks for, as a number or a date; at most 600."""
    try:
        if re.fullmatch(r"[\d.]+", header):
            return min(float(header), 600.0)
        return min(parsedate_to_datetime(header).timestamp() - time.time(), 600.0)
    except (TypeError, ValueError):
        return 0.0

# --- the log of answers ---

class ResponseLog:
    """OUT.answers.jsonl: the settings, then {"question": .., "answers": [..]} per request."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()

    def open(self, settings):
        """Open the file to append. Raises UserError if it is in use or has other settings."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b")
        try:
            import fcntl
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{self.path} is in use. Wait, or use another --out.") from None
        except (ImportError, OSError) as error:  # Windows, some network file systems
            print(f"warning: cannot lock {self.path}: {error}; run one process", file=sys.stderr)
        self.file.seek(0)
        complete = sum(len(line) for line in self.file if line.endswith(b"\n"))
        self.file.truncate(complete)  # drops a last line that a kill left unfinished
        self.file.seek(0)
        before = self.file.readline().decode("utf-8", "replace").strip()
        if not before:
            self.append(settings)
        elif before != json.dumps(settings):
            raise UserError(f"{self.path} was sampled with {before[:300]}. Use another --out.")
        return self.file

    def append(self, entry):
        """Write a line and flush it to disk."""
        with self.lock:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def answers(self, problems, samples):
        """Yield (problem, answer) for the first `samples` answers to each question."""
        count = collections.Counter()
        if not self.path.exists():
            return
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 or not line.endswith(b"\n"):  # the settings; not yet complete
                    continue
                try:
                    question, answers = map(json.loads(line).get, ("question", "answers"))
                except MALFORMED as error:
                    raise UserError(f"{self.path}, line {number}: {error}. Delete it.") from None
                for answer in answers if question in problems else []:
                    count[question] += 1
                    if count[question] <= samples:
                        yield problems[question], answer

# --- the command ---

def sample(client, log, problems, prompt, args):
    """Ask for the missing answers, --parallel requests at a time; log those in flight at Ctrl-C."""
    have = collections.Counter(one.question for one, _ in log.answers(problems, args.samples))
    client.answered, errors = have.total(), []
    jobs = collections.deque((one, min(args.per_request, args.samples - done)) for one in problems
                             for done in range(have[one], args.samples, args.per_request))
    jobs.extend([None] * args.parallel)  # ends each thread

    def work():
        try:
            while (job := jobs.popleft()) and not client.stopping.is_set():
                question, n = job
                while n > 0 and (answers := client.ask(prompt(question), n)):
                    log.append({"question": question, "answers": answers})
                    n -= len(answers)  # a server may give fewer
        except (UserError, OSError) as error:  # for the main thread to raise
            errors.append(error)
            client.stopping.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(args.parallel)]
    for thread in threads:
        thread.start()
    kept = f"All answers so far are in {log.path}; the same command continues from there."
    wanted = args.samples * len(problems)
    try:
        while any(thread.is_alive() for thread in threads):
            show_progress(f"{client.answered:,} of {wanted:,} answers  {client.last_error:.100}")
            time.sleep(0.2)
    except KeyboardInterrupt:
        client.stopping.set()
        print("\nwaiting for the answers in flight; Ctrl-C again drops them", file=sys.stderr)
        for thread in threads:
            thread.join()
        print(kept, file=sys.stderr)
        raise
    show_progress("")
    if errors:
        raise UserError(f"{errors[0]}\n{kept}")
    if client.refused:
        print(f"{len(client.refused):,} requests were refused; the last: {client.refused[-1]}")

def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, positive = parser.add_argument, in_range(int, above=0)
    add("--url", required=True, help="address of the server, such as http://localhost:8000/v1")
    add("--model", required=True, help="name of the model on the server")
    add("--out", type=Path, required=True, help="teacher records to write (.jsonl or .jsonl.gz)")
    add("--questions", default="gsm8k", help="gsm8k, or a JSONL file of question, answer")
    add("--samples", type=positive, default=40, help="solutions per question")
    add("--chat", action="store_true", help="use /chat/completions instead of /completions")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--shots", type=in_range(int), default=0, help="demonstrations of GSM8K")
    prompts.add_argument("--prompt", type=Path, help="file with a prompt that contains {question}")
    add("--temperature", type=in_range(float), default=0.5, help="sampling temperature")
    add("--max-tokens", type=positive, default=256, help="maximum length of a solution")
    add("--stop", nargs="*", default=["\nQ:"], help="texts that end a solution")
    add("--no-logprobs", action="store_true", help="do not ask for log-probabilities")
    add("--parallel", type=positive, default=8, help="number of requests at a time")
    add("--per-request", type=positive, default=1, help="answers per request, if servers know n")
    add("--retries", type=in_range(int), default=10, help="retries of a failed request")
    add("--timeout", type=in_range(float, above=0), default=600, help="seconds per request")
    add("--limit", type=positive, help="maximum number of questions")
    add("--data", type=Path, default=DEFAULT_DATA, help="folder of the problem sets")
    add("--write-only", action="store_true", help="ask nothing; write the records so far")
    return parser.parse_args()

def main():
    """Ask for the missing answers, then write the right ones and print the accuracies."""
    args = parse_arguments()
    problems = (load("gsm8k", "train", args.data) if args.questions == "gsm8k"
                else read_problems(args.questions, parse_gsm8k))
    problems = {problem.question: problem for problem in problems[: args.limit]}
    log = ResponseLog(args.out.with_name(args.out.name + ".answers.jsonl"))
    if not args.write_only:
        prompt, client = make_prompt(args), CompletionClient(args)
        names = ("model", "chat", "temperature", "max_tokens", "stop")
        settings = {**{name: vars(args)[name] for name in names}, "prompt": prompt("{question}")}
        with log.open(settings):
            sample(client, log, problems, prompt, args)
    elif not any(log.answers(problems, args.samples)):
        raise UserError(f"{log.path}: no answers to these questions yet. Run without --write-only.")
    print(write_records(log, problems, args))

if __name__ == "__main__":
    run_command(main)
