"""data/sample_teacher.py: public bug reports, and what the script promises."""

import gzip
import http.server
import json
import math
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

import data.sample_teacher as sample_teacher
from align import transfer
from conftest import ROOT
from specialize import read_teacher
from t5 import UserError

QUESTIONS = {"one?": "72", "two?": 72, "three?": "So it is.\n#### 72", "four?": "71"}

def right(body):
    """A right answer without log-probabilities."""
    return 200, {"choices": [{"text": "It is 72", "message": {"content": "It is 72"}}]}

class Server(http.server.ThreadingHTTPServer):
    """Answers a request with reply(its body), a status and JSON, after a delay in seconds."""

    def __init__(self, reply=right, delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.delay, self.requests, self.paths = reply, delay, [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that was killed

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"key": self.headers.get("Authorization")})
        self.server.paths.append(self.path)
        time.sleep(self.server.delay)
        status, answer, *headers = self.server.reply(body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in [("Content-Length", len(content)), *headers]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

@pytest.fixture
def serve():
    """serve(reply, delay) -> a running Server."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """ask(server, *arguments) -> what the command prints, for three samples of each question."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    lines = [json.dumps({"question": q, "answer": answer}) for q, answer in QUESTIONS.items()]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    def ask(server, *arguments):
        monkeypatch.setattr(sys, "argv", command(server.url, *arguments)[1:])
        sample_teacher.main()
        return "".join(capsys.readouterr())

    return ask

def command(url, *arguments):
    given = ["--url", url, "--model", "m", "--questions", "questions.jsonl", "--samples", 3,
             "--out", "teacher.jsonl.gz", "--retries", 1, "--parallel", 1, *arguments]
    return [sys.executable, str(ROOT / "data" / "sample_teacher.py"), *map(str, given)]

def log(folder):
    """The number of logged answers per question."""
    lines = (folder / "teacher.jsonl.gz.answers.jsonl").read_text().splitlines()[1:]
    questions = [json.loads(line)["question"] for line in lines]
    return {question: questions.count(question) for question in QUESTIONS if question in questions}

def records(folder):
    """The records written, which training must accept."""
    assert list(read_teacher(folder / "teacher.jsonl.gz"))
    with gzip.open(folder / "teacher.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]

# --- public bug reports ---

SOLD, SUM = "She sold 72 clips.", "48 + 24 = 72. The answer is 72"
CASES = [  # name; the solution of the records, or None if the run ends in an error; what it says
    ("sampled log-probabilities without alternatives", SOLD, "9 right answers have no usable"),
    ("speculative decoding: logprob 0, no alternatives", SOLD, "9 right answers have no usable"),
    ("sampled value null, its real one among the alternatives", SOLD, "majority"),
    ("sampled value -9999 (documented for: outside the top 20)", SOLD, "majority"),
    ("cut at max_tokens inside a number", None, "12 answers were cut off at --max-tokens"),
    ("a thinking model that used up its tokens", None, "12 answers were cut off at --max-tokens"),
    ("content as a list of parts", "It is 72", ""),
    ("log-probabilities refused with 403", "It is 72", "Continuing without log-probabilities"),
    ("log-probabilities break the server: 500", None, "-inf.*--no-logprobs"),
    ("max_tokens refused in favour of max_completion_tokens", "It is 72", ""),
    ("no money left: 429 insufficient_quota", None, "exceeded your current quota.*credit"),
    ("200 with an error inside", None, "v1/chat/completions: .*Unexpected endpoint.*--url"),
    ("200 with a rate-limit error inside", None, "Rate limit exceeded.*--parallel"),
    ("an empty list of stops refused", "It is 72", ""),
    ("SentencePiece tokens (word mark, bytes in angle brackets)", "She sold\n72", "majority"),
    ("thinking in square brackets", SUM, ""),
    ("channels of an open-weight reasoning model", SUM, ""),
    ("the same after special tokens were dropped", SUM, ""),
    ("content null, all of it in reasoning_content, finish_reason stop", None,
     "12 answers are empty: the model only thought"),
    ("statement before the answer", "The answer is not obvious, so add.\n" + SUM, ""),
]
DISTRIBUTIONS = {  # the second token of the cases that report several candidates
    CASES[2][0]: (" sold", {" sold": -0.3, " had": -1.5}),
    CASES[3][0]: (" sold", {" bought": -0.3, " had": -1.5}),
    CASES[14][0]: (" sold", {" sold": -0.1, " had": -3.0}),
}

@pytest.mark.parametrize("name, solution, words", CASES, ids=[case[0] for case in CASES])
def test_cases_of_public_bug_reports(real, serve, ask, tmp_path, name, solution, words):
    lines = (real / "cases" / "server_responses.jsonl").read_text().splitlines()
    cases = {case["name"]: case for case in map(json.loads, lines)}
    assert list(cases) == [case[0] for case in CASES]
    case = cases[name]
    applies = {None: lambda body: True, "stop == []": lambda body: body.get("stop") == [],
               "logprobs in the request": lambda body: "logprobs" in body,
               "max_tokens in the request": lambda body: "max_tokens" in body}[case.get("when")]
    server = serve(lambda b: (case["status"], case["body"]) if applies(b) else right(b))
    arguments = ["--chat"] * (case["endpoint"] == "chat")
    arguments += ["--stop"] * (case.get("when") == "stop == []")
    if solution is None:
        with pytest.raises(UserError, match=words):
            ask(server, *arguments)
        assert not (tmp_path / "teacher.jsonl.gz").exists()
        assert len(server.requests) == 1 or "insufficient_quota" not in name
        return
    assert words in ask(server, *arguments)
    found = records(tmp_path)
    assert {record["solution"] for record in found} == {solution} and len(found) == 9
    if name in DISTRIBUTIONS:
        assert (found[0]["tokens"][1], found[0]["top_logprobs"][1]) == DISTRIBUTIONS[name]
    else:
        assert "tokens" not in found[0]

# --- the run ---

def test_wrong_answers_become_no_records_and_the_accuracies_are_printed(
        serve, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    lasts = {"one?": [72, 72, 9], "two?": [72, 9, 9], "three?": [72] * 3, "four?": [72] * 3}

    def reply(body):
        last = lasts[body["prompt"].removeprefix("Q: ").split("\n")[0]].pop()
        return 200, {"choices": [{"text": f"The answer is {last}"}]} | {"finish_reason": "stop"}

    server = serve(lambda body: reply(body) if len(server.requests) > 1
                   else (429, "slow down, sk-secret", ("Retry-After", "1")))
    start = time.time()
    printed = ask(server)
    assert "4 questions, 12 answers: a single sample is right 50.00% of the time" in printed
    assert "the majority vote (self-consistency) 50.00%" in printed
    assert len(server.requests) == 13 and time.time() - start >= 1
    assert server.requests[0]["prompt"] == "Q: one?\nLet's think step by step"
    assert server.requests[0]["logprobs"] == 5 and server.requests[0]["temperature"] == 0.5
    assert server.requests[0]["key"] == "Bearer sk-secret"
    assert [record["answer"] for record in records(tmp_path)] == ["72"] * 6
    assert "sk-secret" not in printed + (tmp_path / "teacher.jsonl.gz.answers.jsonl").read_text()

@pytest.mark.parametrize("failure", [
    (400, {"error": {"message": "too long"}}), (422, "filtered"), (500, "NaN"),
    (200, {"error": {"message": "filtered"}}), (200, {"choices": []})])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_fails_does_not_stop_the_others(serve, ask, tmp_path, failure, question):
    server = serve(lambda body: failure if question in body["prompt"] else right(body))
    assert "1 questions failed; the same command asks again" in ask(server)
    assert log(tmp_path) == {one: 3 for one in QUESTIONS if one != question}
    assert "1 questions failed" in ask(server)  # alone, it does not stop the command either
    server.reply = right
    assert "failed" not in ask(server) and set(log(tmp_path).values()) == {3}

@pytest.mark.parametrize("status, asked", [(400, 3), (401, 1), (404, 1), (503, 6)])
def test_a_server_that_never_answers_ends_the_run(serve, ask, status, asked):
    server = serve(lambda body: (status, {"error": {"message": "its own words"}}))
    with pytest.raises(UserError, match="its own words.*OPENAI_API_KEY"):
        ask(server)
    assert len(server.requests) == asked

def test_a_wrong_address_ends_the_run(serve, ask):
    server = serve()
    for server.url in ("localhost:8000/v1", "http://127.0.0.1:9/v1"):
        with pytest.raises(UserError, match=f"{server.url}/completions: no response.*--url"):
            ask(server)

@pytest.mark.parametrize("arguments, path", [((), "completions"), (["--chat"], "chat/completions")])
def test_the_path_of_the_endpoint_precedes_the_query(serve, ask, arguments, path):
    server = serve()
    server.url += "?api-version=2024-10-21"
    ask(server, *arguments)
    assert set(server.paths) == {f"/v1/{path}?api-version=2024-10-21"}

@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_continues_without_losing_or_repeating_an_answer(
        serve, ask, tmp_path, stop):
    server = serve(delay=0.1)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells may ignore it
    process = subprocess.Popen(command(server.url, "--parallel", 2), cwd=tmp_path, text=True,
                               stderr=subprocess.PIPE, preexec_fn=heed)
    while len(server.requests) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(stop)
    _, printed = process.communicate(timeout=60)
    asked, kept = len(server.requests), sum(log(tmp_path).values())
    if stop == signal.SIGINT:
        assert process.returncode == 130 and "the same command continues" in printed
        assert asked == kept  # also those in flight
    path = tmp_path / "teacher.jsonl.gz.answers.jsonl"
    before = path.read_text()
    path.write_text(before + '{"question": "one?", "answ')
    ask(server)
    assert path.read_text().startswith(before + '{"') and set(log(tmp_path).values()) == {3}
    assert len(server.requests) - asked == 12 - kept
    ask(server, "--samples", 5)
    assert set(log(tmp_path).values()) == {5} and len(records(tmp_path)) == 15
    with pytest.raises(UserError, match='sampled with .*"temperature": 0.5'):
        ask(server, "--temperature", 1.0)

# --- answers ---

def top(token, other="x"):
    """A token as chat servers give it, with another candidate."""
    return token | {"logprob": -0.1, "top_logprobs": [token | {"logprob": -0.1},
                                                      {"token": other, "logprob": -3.0}]}

@pytest.mark.parametrize("parts, names", [
    ([{"token": "bytes:\\xc2"}, {"token": " £5"}], None),
    ([{"token": "bytes:\\xc2"}, {"token": "bytes:\\xa3"}], ["bytes:\\xc2", "bytes:\\xa3"]),
    ([{"token": "bytes: \\xc2"}, {"token": "bytes:\\\\xa3"}], ["bytes:\\x20\\xc2", "bytes:\\xa3"]),
    ([{"token": "\\xc2", "bytes": [0xC2]}, {"token": "\\xa3", "bytes": [0xA3]}],
     ["bytes:\\xc2", "bytes:\\xa3"]),
    ([{"token": "▁<0xC2>", "bytes": [32, 0xC2]}, {"token": "<0xA3>"}],
     ["bytes:\\x20\\xc2", "bytes:\\xa3"]),
    ([{"token": " "}, {"token": "\ufffd"}], [" ", "bytes:\\xef\\xbf\\xbd"]),
    ([{"token": "▁£"}], [" £"]),
    ([{"token": "", "id": 7, "top": "\n"}, {"token": "\n£", "id": 8, "top": "£"}], ["\n", "£"]),
])
def test_every_spelling_of_tokens_gives_the_same_alignment(parts, names):
    tokens = [top({"token": text}) for text in ("<think>", "£9", "</think>", "It", " costs")]
    for part in parts:
        tokens.append(top(part))
        if "top" in part:  # llama.cpp withholds what might start a stop sequence
            tokens[-1]["top_logprobs"][0]["token"] = part["top"]
    tokens += [top({"token": "5"}), top({"token": "."}), top({"token": "</s>"})]
    gap = "\n" if "top" in parts[0] else " "
    choice = {"message": {"content": f"<think>£9</think>It costs{gap}£5."}, "finish_reason": "stop",
              "logprobs": {"content": tokens}}
    answer = sample_teacher.parse_choice(choice, True)
    assert answer.get("tokens") == (names and ["It", " costs", *names, "5", "."])
    if names:
        steps = [(token, {one: math.exp(p) for one, p in top.items()})
                 for token, top in zip(answer["tokens"], answer["top_logprobs"])]
        student = ["▁It", "▁costs", "▁", "£", "5", "."]
        _, probs = transfer(steps, student, {piece: i for i, piece in enumerate(student)})
        assert probs[[0, 1, 4, 5], 0] == pytest.approx(math.exp(-0.1), abs=1e-4)

def test_the_text_ends_with_the_line_that_states_the_answer():
    for text, kept in (
        ("So. The answer is 72.\nQ: 3", "So. The answer is 72."),
        ("The answer is:\n\n$$\n72\n$$", "The answer is:\n\n$$\n72"),
        ("The Answer is **72**.\nBye", "The Answer is **72**."),
        ("The answer is a sum.\nIt is 72", "The answer is a sum.\nIt is 72"),
        ("So the answer is", "So the answer is"),
    ):
        choice = {"text": text, "finish_reason": "stop"}
        assert sample_teacher.parse_choice(choice, True) == {"solution": kept}
        cut = sample_teacher.parse_choice(choice | {"finish_reason": "length"}, True)
        assert ("finish_reason" in cut) == (kept == text)
    choice = {"text": "The answer is yes.\nQ: 3", "finish_reason": "stop"}
    assert sample_teacher.parse_choice(choice, False) == {"solution": "The answer is yes."}
