"""data/sample_teacher.py: against a misbehaving server on this machine, and llama.cpp's."""

import collections
import errno
import functools
import gzip
import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import data.sample_teacher as sample_teacher
from align import transfer
from conftest import ROOT, TOY, missing
from eval import extract_number
from specialize import MAX_LINE, MAX_TEXT, MAX_TOKENS, parse_record, read_teacher
from t5 import Tokenizer, UserError

class Server(http.server.ThreadingHTTPServer):
    """Answers completions with choice(prompt, number of the answer).

    faults: used up one per request. refuse: a function from a request to a fault or None.
    """

    def __init__(self, choice, delay=0.0, refuse=lambda body: None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.choice, self.delay, self.refuse = choice, delay, refuse
        self.faults, self.requests, self.answered = [], [], 0
        self.most = 9  # answers to one request
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # a client that was killed

class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((time.time(), self.path, body, dict(self.headers)))
            fault = server.faults.pop(0) if server.faults else server.refuse(body)
            number = server.answered
            n = 0 if fault else min(server.most, body.get("n", 1))
            server.answered += n
        time.sleep(server.delay)
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        choices = [server.choice(prompt, number + i) for i in range(n)]
        content = json.dumps({"choices": [{}] if fault == "no text" else choices}).encode()
        if fault == "drop":
            return self.connection.close()
        if fault == "half":
            content = content[: len(content) // 2]
        status, text, headers = fault if isinstance(fault, tuple) else (200, content, {})
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        self.send_response(status)
        length = len(text) + 50 * (fault == "cut")
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

TOKENS = ["\n", "It", " costs", " £", "5", ".", " The", " answer", " is", " 72"]

def completion(prompt="", number=0, last=" 72"):
    """A choice as completions servers give it: the sampled token need not be in the top list."""
    tokens = [*TOKENS[:-1], last]
    top = [{token: -0.1, " other": -3.0} for token in tokens[:-1]] + [{" 7": -0.2, " 8": -2.0}]
    logprobs = {"tokens": tokens, "token_logprobs": [-0.1] * 9 + [-4.0], "top_logprobs": top}
    return {"text": "".join(tokens), "logprobs": logprobs, "index": 0, "finish_reason": "stop"}

def entry(token, logprob=-0.1, **top):
    """A token as chat servers give it; top: {other token: log-probability}."""
    one = {"token": token, "logprob": logprob, "bytes": list(token.encode())}
    others = [{"token": other, "logprob": value} for other, value in top.items()]
    return one | {"top_logprobs": [one, *others] if top else []}

def chat(tokens, reason="stop", message=None):
    """A choice as chat servers give it, from its tokens' entries."""
    text = "".join(token["token"] for token in tokens)
    message = {"role": "assistant", "content": text} | (message or {})
    return {"message": message, "finish_reason": reason, "logprobs": {"content": tokens}}

@pytest.fixture
def serve():
    """serve(choice=..., delay=..., refuse=...) -> a running Server."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()

@pytest.fixture
def questions(tmp_path):
    """A file of four questions, whose gold answers are written in three ways."""
    lines = [{"question": "one?", "answer": "72"}, {"question": "two?", "answer": 72},
             {"question": "three?", "answer": "So it is.\n#### 72"},
             {"question": "four?", "answer": "71"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path

@pytest.fixture
def ask(questions, tmp_path, monkeypatch, capsys):
    """ask(server, *arguments) -> what the command prints; its output is teacher.jsonl.gz."""
    monkeypatch.setattr(sample_teacher, "FIRST_WAIT", 0.001)
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers the proxies

    def ask(server, *arguments):
        monkeypatch.setattr(sys, "argv", command(server.url, questions, *arguments)[1:])
        sample_teacher.main()
        printed = capsys.readouterr()
        return printed.out + printed.err

    monkeypatch.chdir(tmp_path)
    return ask

def command(url, questions, *arguments):
    """The command line that asks for three samples of each question."""
    given = ["--url", url, "--model", "m", "--questions", questions, "--out", "teacher.jsonl.gz",
             "--samples", 3]
    script = str(ROOT / "data" / "sample_teacher.py")
    return [sys.executable, script, *map(str, [*given, *arguments])]

def log(folder):
    """{question: [answers]} of the log."""
    found = collections.defaultdict(list)
    for line in (folder / "teacher.jsonl.gz.answers.jsonl").read_text().splitlines()[1:]:
        request = json.loads(line)
        found[request["question"]] += request["answers"]
    return found

def records(folder):
    """The records written."""
    with gzip.open(folder / "teacher.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]

# --- the run ---

def test_right_answers_become_records_and_the_accuracies_are_printed(serve, ask, tmp_path):
    lasts = {"one?": [" 72", " 72", " 9"], "two?": [" 72", " 9", " 9"],
             "three?": [" 72"] * 3, "four?": [" 72"] * 3}
    server = serve(lambda prompt, number: completion(last=lasts[prompt.split("\n")[0][3:]].pop()))
    printed = ask(server)
    assert "4 questions, 12 answers: a single sample is right 50.00% of the time" in printed
    assert "the majority vote (self-consistency) 50.00%" in printed
    found = list(read_teacher(tmp_path / "teacher.jsonl.gz"))
    assert len(found) == 6 and {record.problem.answer for record in found} == {72.0}
    steps = dict(found[0].steps)
    assert list(steps) == TOKENS[1:]
    assert steps["It"] == pytest.approx({"It": math.exp(-0.1), " other": math.exp(-3)})
    last = {" 72": math.exp(-4), " 7": math.exp(-0.2), " 8": math.exp(-2)}
    assert steps[" 72"] == pytest.approx(last)
    _, path, body, _ = server.requests[0]
    assert path == "/v1/completions" and body["prompt"].endswith("?\nLet's think step by step")
    assert body["logprobs"] == 5 and "n" not in body and body["temperature"] == 0.5

def test_transient_failures_are_retried_and_every_answer_comes_once(serve, ask, tmp_path):
    server = serve(completion)
    server.faults = [(429, b"slow down", {"Retry-After": "0.4"}), "drop", "cut", "half", "no text",
                     (503, b"", {}), "drop"]
    ask(server, "--parallel", 1)
    times = [when for when, *_ in server.requests]
    assert len(times) == 12 + 7 and times[1] - times[0] >= 0.4 and times[-1] - times[1] < 3
    counts = {question: len(answers) for question, answers in log(tmp_path).items()}
    assert counts == dict.fromkeys(("one?", "two?", "three?", "four?"), 3)

def test_a_retry_after_header_is_a_number_or_a_date():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < sample_teacher.retry_after(date) <= 30
    assert sample_teacher.retry_after(None) == sample_teacher.retry_after("soon") == 0
    assert sample_teacher.retry_after("1.5") == 1.5 and sample_teacher.retry_after("9999") == 600

def test_a_permanent_failure_ends_the_run_and_keeps_the_answers(serve, ask, tmp_path):
    server = serve(completion)
    server.faults = [None, None, (404, b"no model m", {})]
    with pytest.raises(UserError, match="HTTP 404.*no model m(.|\n)*the same command continues"):
        ask(server, "--parallel", 1)
    server.faults = ["drop"] * 3
    with pytest.raises(UserError, match="no response.*retries: 2"):
        ask(server, "--parallel", 1, "--retries", 2)
    assert sum(map(len, log(tmp_path).values())) == 2
    assert not (tmp_path / "teacher.jsonl.gz").exists()
    ask(server)
    assert server.answered == 12

def test_a_refused_question_does_not_stop_the_others(serve, ask):
    server = serve(completion)
    server.faults = [None, (400, b"too long", {}), (422, b"filtered", {})]
    assert "2 requests were refused; the last: " in ask(server, "--parallel", 1)
    assert server.answered == 10
    server.faults = [(400, b"filtered", {})]
    assert "1 requests were refused" in ask(server, "--parallel", 1) and server.answered == 11

def test_two_processes_do_not_sample_into_one_file(serve, ask, tmp_path):
    pytest.importorskip("fcntl")
    with sample_teacher.ResponseLog(tmp_path / "teacher.jsonl.gz.answers.jsonl").open({}):
        with pytest.raises(UserError, match="in use"):
            ask(serve(completion))

@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, None])
def test_without_file_locks_it_warns_and_continues(serve, ask, monkeypatch, error):
    def no_lock(*_):
        raise OSError(error, os.strerror(error))

    if error:
        monkeypatch.setattr("fcntl.flock", no_lock)
    else:  # as on Windows
        monkeypatch.setitem(sys.modules, "fcntl", None)
    assert "cannot lock" in ask(serve(completion))

def test_a_killed_run_continues_without_losing_or_repeating_an_answer(
        serve, ask, questions, tmp_path):
    server = serve(completion, delay=0.15)
    process = subprocess.Popen(command(server.url, questions, "--parallel", 2), cwd=tmp_path,
                               stderr=subprocess.DEVNULL)
    path = tmp_path / "teacher.jsonl.gz.answers.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before, kept = len(server.requests), path.read_bytes()
    assert server.answered - (kept.count(b"\n") - 1) <= 2  # no more than were in flight
    path.write_bytes(kept + b'{"question": "one?", "answ')  # as if the power had failed, too
    ask(server)
    assert path.read_bytes().startswith(kept) and set(map(len, log(tmp_path).values())) == {3}
    assert len(server.requests) - before == 12 - (kept.count(b"\n") - 1)
    ask(server)  # nothing is missing, so nothing is asked
    assert len(server.requests) - before == 12 - (kept.count(b"\n") - 1)
    ask(server, "--samples", 5)
    assert set(map(len, log(tmp_path).values())) == {5}

def test_ctrl_c_waits_for_the_answers_in_flight_and_exits_with_130(serve, questions, tmp_path):
    server = serve(completion, delay=0.5)
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells may ignore it
    process = subprocess.Popen(command(server.url, questions, "--parallel", 2), cwd=tmp_path,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    while not server.requests:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed
    assert "the same command continues" in printed
    assert sum(map(len, log(tmp_path).values())) == server.answered == len(server.requests)

def test_write_only_asks_nothing_and_disturbs_no_other_process(serve, ask, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    server = serve(completion)
    server.faults = [None, None, (404, b"stop here", {})]
    with pytest.raises(UserError, match="stop here"):
        ask(server, "--parallel", 1)
    path = tmp_path / "teacher.jsonl.gz.answers.jsonl"
    path.write_bytes(path.read_bytes() + b'{"question": "one?", "answ')  # just being written
    content = path.read_bytes()
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "2 answers" in ask(server, "--write-only")
    assert len(records(tmp_path)) == 2 and len(server.requests) == 3
    assert path.read_bytes() == content

def test_write_only_before_the_first_answer_says_so(serve, ask, tmp_path):
    server = serve(completion)
    words = "answers.jsonl: no answers to these questions yet. Run without --write-only"
    settings, other = '{"model": "m"}\n', '{"question": "5?", "answers": [{"solution": "72"}]}\n'
    for content in (None, settings, settings + other):
        if content:
            (tmp_path / "teacher.jsonl.gz.answers.jsonl").write_text(content)
        with pytest.raises(UserError, match=words):
            ask(server, "--write-only")
    with pytest.raises(UserError, match=words):
        ask(server, "--write-only", "--out", tmp_path / "new" / "teacher.jsonl")
    assert not server.requests and not list(tmp_path.glob("*.tmp"))

def test_answers_to_other_settings_are_not_mixed(serve, ask):
    server = serve(completion)
    ask(server)
    with pytest.raises(UserError, match='"temperature": 0.5'):
        ask(server, "--temperature", 1.0)

def test_a_damaged_line_of_the_log_is_named(serve, ask, tmp_path):
    server = serve(completion)
    ask(server)
    path = tmp_path / "teacher.jsonl.gz.answers.jsonl"
    path.write_bytes(path.read_bytes() + b"[3]\n")
    with pytest.raises(UserError, match="answers.jsonl, line 14: .*Delete"):
        ask(server)

def test_the_key_is_sent_and_never_shown(serve, ask, tmp_path, monkeypatch):
    server = serve(completion)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        ask(server)
    assert "sk-sec" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.faults = [None, (401, b"wrong key: sk-secret", {})]
    with pytest.raises(UserError, match=r"wrong key: \[key\]"):
        ask(server, "--parallel", 1)
    assert "sk-secret" not in ask(server)
    assert all(headers["Authorization"] == "Bearer sk-secret" for *_, headers in server.requests)
    for path in tmp_path.rglob("*"):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        assert b"secret" not in content

def test_several_solutions_per_request_and_a_server_that_gives_fewer(serve, ask, tmp_path):
    server = serve(completion)
    ask(server, "--per-request", 2, "--parallel", 1)
    assert [body.get("n", 1) for _, _, body, _ in server.requests] == [2, 1] * 4
    server.most = 1
    ask(server, "--per-request", 2, "--parallel", 1, "--samples", 5)
    assert set(map(len, log(tmp_path).values())) == {5} and server.answered == 20

def test_demonstrations_and_own_prompts(serve, ask, tmp_path):
    server = serve(completion)
    ask(server, "--shots", 2, "--data", TOY)
    prompt = server.requests[0][2]["prompt"]
    assert prompt.count("Q: ") == 3 and prompt.count("The answer is") == 2
    assert prompt.endswith("step by step")
    (tmp_path / "prompt.txt").write_text("Solve: {question}\nEnd with: The answer is N.")
    for path in tmp_path.glob("teacher*"):
        path.unlink()
    ask(server, "--prompt", "prompt.txt", "--parallel", 1)
    assert server.requests[12][2]["prompt"] == "Solve: one?\nEnd with: The answer is N."
    (tmp_path / "prompt.txt").write_text("Solve it.")
    with pytest.raises(UserError, match="no {question}"):
        ask(server, "--prompt", "prompt.txt")

# --- refusals ---

@pytest.mark.parametrize("status", [400, 403, 422])
def test_a_server_that_refuses_log_probabilities_is_asked_without(serve, ask, tmp_path, status):
    refusal = (status, {"error": {"message": "You are not allowed to request logprobs"}}, {})
    server = serve(lambda prompt, number: {"text": "The answer is 72"}, delay=0.2,
                   refuse=lambda body: refusal if "logprobs" in body else None)
    printed = ask(server, "--parallel", 4)
    assert printed.count("not allowed to request logprobs") == 1
    assert "Continuing without" in printed
    assert ["logprobs" in body for _, _, body, _ in server.requests] == [True] * 4 + [False] * 12

def test_a_flag_leaves_log_probabilities_out(serve, ask):
    server = serve(lambda prompt, number: {"text": "The answer is 72"})
    assert "Continuing without" not in ask(server, "--no-logprobs")
    assert not any("logprobs" in body for _, _, body, _ in server.requests)

def test_max_tokens_is_renamed_for_servers_that_ask_for_it(serve, ask):
    words = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    server = serve(completion, refuse=lambda body: (400, {"error": {"message": words}}, {})
                   if "max_tokens" in body else None)
    ask(server, "--parallel", 1)
    assert len(server.requests) == 13
    assert all(body["max_completion_tokens"] == 256 for _, _, body, _ in server.requests[1:])

def test_an_empty_list_of_stop_sequences_is_left_out(serve, ask):
    server = serve(completion)
    ask(server, "--stop")
    assert not any("stop" in body for _, _, body, _ in server.requests)

@pytest.mark.parametrize("fault, requests, words", [
    ((429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, {}), 1,
     "You exceeded your quota(.|\n)*Add credit"),
    ((429, {"error": {"message": "Too many requests in Tier 1"}}, {}), 3,
     "requests in Tier 1(.|\n)*--parallel"),
    ((500, {"message": "Out of range float values"}, {}), 3,
     "Out of range float values(.|\n)*--no-logprobs"),
    ((200, {"error": "Unexpected endpoint (POST /completions)"}, {}), 1,
     "/v1/completions: .*Unexpected endpoint(.|\n)*--url"),
    ((200, {"error": {"message": "Limit reached: free models", "code": 429}}, {}), 3,
     "Limit reached(.|\n)*--"),
    ((200, {"error": {"message": "The model is overloaded"}}, {}), 3, "is overloaded"),
    ((200, {"detail": "Not Found"}, {}), 1, "Not Found"),
    ((200, b"<html>It works</html>", {}), 3, "It works(.|\n)*--url"),
    ((401, {"error": {"message": "No API key"}}, {}), 1, "No API key(.|\n)*OPENAI_API_KEY"),
    ((400, {"error": {"message": "'temperature' must be 1"}}, {}), 1, "(.|\n)*--temperature"),
    ("drop", 3, "no response(.|\n)*running"),
])
def test_every_refusal_ends_with_the_servers_words_and_advice(serve, ask, fault, requests, words):
    server = serve(completion, refuse=lambda body: fault)
    with pytest.raises(UserError, match=words):
        ask(server, "--parallel", 1, "--retries", 2)
    assert len(server.requests) == requests

def test_a_proxy_for_a_local_server_is_pointed_out(serve, ask, monkeypatch):
    server, proxy = serve(completion), serve(completion, refuse=lambda body: (502, b"no route", {}))
    monkeypatch.setenv("http_proxy", proxy.url)
    with pytest.raises(UserError, match="no route(.|\n)*http_proxy.*no_proxy=127.0.0.1"):
        ask(server, "--retries", 0)

# --- answers ---

def test_chat_servers_give_the_same_records(serve, ask, tmp_path):
    parts = completion()["logprobs"]
    tokens = [entry(token, logprob) | {"top_logprobs": [entry(*pair) for pair in top.items()]}
              for token, logprob, top in zip(*parts.values())]
    choice = chat([*tokens, entry("<|end|>")], message={"content": completion()["text"]})
    server = serve(lambda prompt, number: choice)
    ask(server, "--chat")
    _, path, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and body["messages"][0]["content"].endswith("by step")
    assert body["top_logprobs"] == 5 and body["logprobs"] is True
    assert sample_teacher.parse_choice(choice) == sample_teacher.parse_choice(completion())
    assert next(read_teacher(tmp_path / "teacher.jsonl.gz")).steps[-1][0] == " 72"

@pytest.mark.parametrize("parts", [
    [{"token": "bytes:\\xc2"}, {"token": "bytes:\\xa3"}],
    [{"token": "\\xc2", "bytes": [0xC2]}, {"token": "\\xa3", "bytes": [0xA3]}],
    [{"token": "<0xC2>"}, {"token": "<0xA3>"}],
    [{"token": "\ufffd"}, {"token": "\ufffd"}],
])
def test_tokens_that_are_parts_of_a_character_keep_the_others_aligned(parts):
    tokens = [{"token": "It"}, {"token": " costs"}, {"token": " "}, *parts, {"token": "5"},
              {"token": ". It is 72"}]
    other = {"token": "x", "logprob": -4.0}
    content = [{"logprob": -0.1, **token, "top_logprobs": [{"logprob": -0.1, **token}, other]}
               for token in tokens]
    text = "It costs £5. It is 72"
    answer = sample_teacher.parse_choice({"text": text, "logprobs": {"content": content},
                                          "finish_reason": "stop"})
    assert answer["tokens"][:3] == ["It", " costs", " "] and len(answer["tokens"]) == 7
    assert answer["tokens"][3] in ("bytes:\\xc2", "\ufffd")
    record = parse_record({"question": "q", "answer": "72", **answer}, "here")
    student = ["▁It", "▁costs", "▁", "£", "5", "."]
    steps = record.steps[:-1] + [(".", {".": 0.8})]
    _, probs = transfer(steps, student, [*student, "<unk>"])
    expected = [0.90484, 0.90484, 1, 1, 0.90484, 0.8]
    assert probs[:, 0] == pytest.approx(expected, abs=1e-4)

@pytest.mark.parametrize("skipped", [0, 6])
def test_sentencepiece_tokens_spell_the_text(skipped):
    tokens = ["▁She", "▁sold", "<0x0A>", "7", "2"]
    tokens = [*tokens, "</think>", *tokens, "</s>"][skipped:]  # thinking that the text leaves out
    top = [{token: -0.1, "▁had": -2.5} for token in tokens]
    logprobs = {"tokens": tokens, "token_logprobs": [-0.1] * len(tokens), "top_logprobs": top}
    answer = sample_teacher.parse_choice(
        {"text": "She sold\n72", "finish_reason": "stop", "logprobs": logprobs})
    assert answer["tokens"] == [" She", " sold", "\n", "7", "2"]
    assert answer["top_logprobs"][2] == {"\n": -0.1, " had": -2.5}
    assert parse_record({"question": "q", "answer": "72", **answer}, "").steps

def test_tokens_withheld_by_llama_cpp_are_recognized_by_their_ids():
    def step(token, own, number):
        return {"token": token, "id": number, "logprob": -0.1, "top_logprobs": [
            {"token": own, "id": number, "logprob": -0.1}, {"token": "x", "id": 9, "logprob": -3}]}

    content = [step("It", "It", 1), step("", "\n", 2), step("\nis", "is", 3), step(" 72", " 72", 4)]
    answer = sample_teacher.parse_choice(
        {"text": "It\nis 72", "finish_reason": "stop", "logprobs": {"content": content}})
    assert answer["tokens"] == ["It", "\n", "is", " 72"]

def test_the_text_ends_with_the_line_that_states_the_answer():
    texts = ("So", ". The", " answer", " is", " 72", ".\n", "Q: 3")
    tokens = [entry(text, x=-3.0) for text in texts]
    answer = sample_teacher.parse_choice(chat(tokens, reason="length"))
    assert answer["solution"] == "So. The answer is 72." and "finish_reason" not in answer
    assert answer["tokens"][-2:] == [" 72", ".\n"] and len(answer["top_logprobs"]) == 6
    for text, kept in (("The answer is:\n\n$$\n72\n$$", "The answer is:\n\n$$\n72"),
                       ("The Answer is **72**.\nBye", "The Answer is **72**."),
                       ("So the answer is", "So the answer is")):
        answer = sample_teacher.parse_choice({"text": text, "finish_reason": "stop"})
        assert answer == {"solution": kept}

def test_answers_cut_off_at_max_tokens_are_wrong(serve, ask, tmp_path):
    texts = ["The total is $72", "The answer is 72", "The answer is 72\nQ: Tom"]
    server = serve(lambda prompt, number: {"text": texts[number % 3], "finish_reason": "length"})
    printed = ask(server, "--parallel", 1)
    assert "8 answers were cut off at --max-tokens and count as wrong" in printed
    assert "a single sample is right 25.00%" in printed
    assert {record["solution"] for record in records(tmp_path)} == {"The answer is 72"}
    assert len(records(tmp_path)) == 3

@pytest.mark.parametrize("message", [
    {"content": None, "reasoning_content": "so 48 + 24"}, {"content": "<think>so 48 + 72"},
    {"reasoning": "so"}, {"content": [{"type": "thinking", "thinking": []}]}])
def test_a_model_that_used_up_its_tokens_by_thinking_is_reported(serve, ask, message):
    choice = {"message": message, "finish_reason": "length"}
    words = "12 of them are empty, as of a model that was still thinking.\n.*--max-tokens"
    with pytest.raises(UserError, match=words):
        ask(serve(lambda prompt, number: choice), "--chat")

@pytest.mark.parametrize("content", [
    "It is 72", "<think>Is it 71?</think>\n\nIt is 72",
    [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
     {"type": "text", "text": "It is 72"}]])
def test_thinking_is_removed_from_the_text_and_from_the_tokens(content):
    thought = [entry(token, x=-3.0) for token in ("<think>", "It is 72", "?", "</think>", "\n\n")]
    tokens = [entry(token, x=-3.0) for token in ("It", " is", " 72", "<|end|>")]
    answer = sample_teacher.parse_choice(chat([*thought, *tokens], message={"content": content}))
    assert answer["solution"] == "It is 72" and answer["tokens"] == ["It", " is", " 72"]

def test_log_probabilities_without_alternatives_are_not_a_distribution():
    for logprob in (-2.25, 0.0):
        answer = sample_teacher.parse_choice(chat([entry("It is", logprob), entry(" 72", logprob)]))
        assert answer == {"solution": "It is 72"}
    logprobs = {"tokens": ["72"], "token_logprobs": [-1.0], "top_logprobs": [{"72": -1.0}]}
    choice = {"text": "72", "finish_reason": "stop", "logprobs": logprobs}
    assert sample_teacher.parse_choice(choice) == {"solution": "72"}

@pytest.mark.parametrize("unknown", [None, -9999.0, -math.inf])
def test_an_unknown_value_of_the_sampled_token_does_not_replace_a_known_one(unknown):
    sold, sixty = entry(" is", unknown), entry(" 72", unknown)
    sold["top_logprobs"] = [{"token": " is", "logprob": -0.3}, {"token": " was", "logprob": -1.5}]
    sixty["top_logprobs"] = [{"token": " 71", "logprob": -0.3}, {"token": " 7", "logprob": -1.5}]
    answer = sample_teacher.parse_choice(chat([entry("It", x=-3.0), sold, sixty]))
    assert answer["top_logprobs"][1:] == [{" is": -0.3, " was": -1.5}, {" 71": -0.3, " 7": -1.5}]

def test_servers_without_log_probabilities_serve_for_likelihood(serve, ask, tmp_path):
    server = serve(lambda prompt, number: {"text": "The answer is 72"})
    assert "9 right answers came without usable log-probabilities" in ask(server)
    assert all(record.steps is None for record in read_teacher(tmp_path / "teacher.jsonl.gz"))

def test_log_probabilities_that_training_would_refuse_are_left_out(serve, ask, tmp_path):
    choices = [completion(), completion(), completion()]
    choices[0]["logprobs"]["tokens"][3] = " $"  # another text
    choices[1]["logprobs"]["top_logprobs"][3] = {" £": 0.0, " a": 0.0}  # both are certain
    server = serve(lambda prompt, number: choices[number % 3])
    assert "6 right answers came without" in ask(server, "--parallel", 1)
    with_steps = [one for one in read_teacher(tmp_path / "teacher.jsonl.gz") if one.steps]
    assert len(with_steps) == 3

def long_completion(words):
    """A choice of so many one-word tokens and a right answer."""
    tokens = ["so "] * words + ["The answer is 72"]
    top = [{token: -0.1, " other": -3.0} for token in tokens]
    logprobs = {"tokens": tokens, "token_logprobs": [-0.1] * len(tokens), "top_logprobs": top}
    return {"text": "".join(tokens), "logprobs": logprobs, "finish_reason": "stop"}

def test_right_answers_that_are_too_long_lose_their_tokens_or_are_left_out(serve, ask, tmp_path):
    choices = [completion(), long_completion(MAX_TOKENS), long_completion(MAX_TEXT // 3)]
    choices[0]["logprobs"]["top_logprobs"][3]["x" * MAX_LINE] = -9.0
    server = serve(lambda prompt, number: choices[number % 3])
    printed = ask(server, "--parallel", 1)
    assert "6 right answers came without" in printed and "single sample is right 75.00%" in printed
    assert "3 right answers are longer than training accepts and were left out" in printed
    found = list(read_teacher(tmp_path / "teacher.jsonl.gz"))
    assert len(found) == 6 and not any(record.steps for record in found)
    lengths = {len(record.problem.solution) for record in found}
    assert lengths == {len(completion()["text"].strip()), len(choices[1]["text"])}

def test_if_every_right_answer_is_too_long_nothing_is_written(serve, ask, tmp_path):
    with pytest.raises(UserError, match="every right answer is too long.(.|\n)*answers.jsonl"):
        ask(serve(lambda prompt, number: long_completion(MAX_TEXT // 3)), "--samples", 1)
    assert [path.name for path in tmp_path.glob("t*")] == ["teacher.jsonl.gz.answers.jsonl"]

def test_an_answer_without_a_field_is_used_as_far_as_possible():
    complete = completion()["logprobs"]
    damaged = [{key: complete[key] for key in complete if key != name} for name in complete]
    damaged += [{"content": content} for content in (
        [{"token": "It is 72"}], [{"logprob": -1.0}], ["It"], "It", [None], 3)]
    for logprobs in [*damaged, [], 3, "It", None]:
        choice = {"text": "It is 72", "finish_reason": "stop", "logprobs": logprobs}
        assert sample_teacher.parse_choice(choice) == {"solution": "It is 72"}
    choice = {"message": {"content": None}, "finish_reason": "stop"}
    assert sample_teacher.parse_choice(choice) == {"solution": ""}
    for choice in ({}, None, 3, [], {"message": {}}, {"text": 3}, {"message": {"content": [3]}}):
        with pytest.raises(sample_teacher.MALFORMED):
            sample_teacher.parse_choice(choice)

# --- public bug reports ---

OUTCOMES = {  # the first words of a case's name -> what the run does with it
    "sampled log-probabilities": "text", "speculative": "text", "sampled value": "distribution",
    "cut at max_tokens": "error", "a thinking model": "error", "content as": "text",
    "log-probabilities refused": "text", "log-probabilities break": "error",
    "max_tokens refused": "text", "no money": "error", "200 with": "error",
    "an empty list": "text", "SentencePiece": "distribution"}

def test_cases_of_public_bug_reports(real, serve, ask, tmp_path):
    lines = (real / "cases" / "server_responses.jsonl").read_text().splitlines()
    for case in map(json.loads, lines):
        key = {"logprobs in the request": "logprobs", "max_tokens in the request": "max_tokens",
               "stop == []": "stop"}.get(case.get("when"))
        fault = (case["status"], case["body"], {})
        server = serve(lambda prompt, number: {"message": {"content": "It is 72"}},
                       refuse=lambda body: fault if key is None or key in body else None)
        arguments = ["--parallel", 1, "--retries", 1] + ["--stop"] * (key == "stop")
        arguments += ["--chat"] * (case["endpoint"] == "chat")
        outcome = next(OUTCOMES[name] for name in OUTCOMES if case["name"].startswith(name))
        for path in tmp_path.glob("teacher*"):
            path.unlink()
        if outcome == "error":
            with pytest.raises(UserError, match="--|Add credit"):
                ask(server, *arguments)
        else:
            ask(server, *arguments)
            found = records(tmp_path)
            assert len(found) == 9, case["name"]
            assert all(("tokens" in one) == (outcome == "distribution") for one in found)

# --- llama.cpp's server ---

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = sys.argv[1], ["127.0.0.1"], 0
params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 2048, 2, False, 1
server = xllamacpp.Server(params)
print("address", server.listening_address, flush=True)
time.sleep(600)
"""

def write_gguf(path):
    """A random Llama of one layer that writes digits, words and single bytes."""
    import gguf
    import numpy as np

    words = ["▁the", "▁answer", "▁is", "▁clips", "▁+", "▁=", ".", "\n", "▁"]
    words += [*map(str, range(10)), *map(chr, range(97, 123))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    V, D, F = len(tokens), 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    settings = dict(
        context_length=2048, embedding_length=D, block_count=1, feed_forward_length=F, head_count=2,
        head_count_kv=2, layer_norm_rms_eps=1e-5, vocab_size=V, rope_dimension_count=D // 2,
        tokenizer_model="llama", token_list=tokens, token_scores=[-float(i) for i in range(V)],
        token_types=[2, 3, 3] + [6] * 256 + [1] * len(words), bos_token_id=1, eos_token_id=2,
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (V, D), "output": (V, D), "output_norm": (D,),
              "blk.0.attn_norm": (D,), "blk.0.ffn_norm": (D,)}
    shapes |= {f"blk.0.attn_{name}": (D, D) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (F, D), "blk.0.ffn_up": (F, D), "blk.0.ffn_down": (D, F)}
    for name, shape in shapes.items():
        tensor = rng.normal(size=shape) / 2 if len(shape) == 2 else np.ones(shape)
        if name == "output":
            tensor[3:259] /= 4  # single bytes are rare, but possible
        writer.add_tensor(f"{name}.weight", tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The address of llama.cpp's server with a random model."""
    try:
        import gguf
        import xllamacpp
    except ImportError:
        missing("pip install xllamacpp gguf, the real server")
    folder = tmp_path_factory.mktemp("llama")
    write_gguf(folder / "random.gguf")
    with open(folder / "log", "w") as errors:
        process = subprocess.Popen([sys.executable, "-c", SERVE, folder / "random.gguf"],
                                   stdout=subprocess.PIPE, stderr=errors, text=True)
    line = next((line for line in process.stdout if line.startswith("address")), None)
    assert line, (folder / "log").read_text()[-2000:]
    yield line.split()[1] + "/v1"
    process.kill()
    process.wait()

@pytest.mark.parametrize("arguments", [(), ("--chat",), ("--per-request", 2)])
def test_a_real_server_gives_records_that_align(llama, ask, questions, tmp_path, arguments):
    class server:
        url = llama

    given = ["--max-tokens", 200, "--temperature", 1.0, "--samples", 60, "--stop", ".", *arguments]
    try:
        ask(server, *given)
    except UserError as error:  # a random model has to guess right
        assert "no answer is right" in str(error)
    answers = log(tmp_path)["one?"]
    assert len(answers) == 60 and sum("tokens" in answer for answer in answers) > 0
    for answer in answers:
        for token, top in zip(answer.get("tokens", ()), answer.get("top_logprobs", ())):
            assert token in top and 2 <= len(top) <= 6
            assert sum(map(math.exp, top.values())) <= 1.001
    usable = [one for one in answers if "tokens" in one and "finish_reason" not in one]
    gold = next(filter(None, (extract_number(one["solution"]) for one in usable)))
    questions.write_text(json.dumps({"question": "one?", "answer": gold}))
    before = (tmp_path / "teacher.jsonl.gz.answers.jsonl").read_bytes()
    ask(server, *given)
    assert (tmp_path / "teacher.jsonl.gz.answers.jsonl").read_bytes() == before
    tokenizer = Tokenizer(TOY / "tuned-1M")
    found = [record for record in read_teacher(tmp_path / "teacher.jsonl.gz") if record.steps]
    assert found
    for record in found:
        student = tokenizer.split(record.problem.solution)
        ids, probs = transfer(record.steps, student, tokenizer.pieces)
        assert len(ids) == len(student)
        assert (probs.sum(axis=1) <= 1).all() and (probs.max(axis=1) > 0).all()
