"""The chat page, used in a real browser as people use it, against a server that says what a test wants.

The one idea to know: `Stub` is the seam. It speaks the interface of scripts/chat_web.py, but what it answers is a list
of steps that the test puts into it: tokens, events to wait for, faults. So a test decides when each word comes, and
nothing here waits for a fixed time. A page that raises an error, or asks anything of another address, fails its test.
"""

from __future__ import annotations

import json
import queue
import select
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    pytest.skip("needs Playwright, which is in the dev group: uv sync", allow_module_level=True)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
ARGS += ["--disable-background-networking", "--disable-component-update"]  # of its own accord it asks nobody anything

FOLDER = Path(__file__).resolve().parents[1] / "nanochat"
FILES = {"/": ("ui.html", "text/html; charset=utf-8"), "/logo.svg": ("logo.svg", "image/svg+xml")}
HEALTH = {
    "status": "ok", "ready": True, "model": "sft d4 step 60", "context": 1024, "running": 0, "waiting": 0,
    "defaults": {"temperature": 0.8, "top_k": 50, "max_tokens": 512},
}
CUT = object()  # a step: the connection breaks
WAIT = 10  # seconds, the most that a step waits for its event


# -----------------------------------------------------------------------------
# The server


class Refusal:
    """An answer that is an error: `Refusal(503, "the server is busy", retry_after=1)`."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None):
        self.status, self.retry_after = status, retry_after
        kind = "server_busy" if status == 503 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Stub:
    """A server on this machine. `say(...)` lines up an answer, `asked()` gives the next request's body.

    A step of an answer is a string (a token of text), (type, text), bytes (sent as they are), an Event (waited for),
    a dict (an event as it is; without any, a last one is added) or CUT.
    """

    def __init__(self):
        self.answers: queue.Queue = queue.Queue()
        self.requests: queue.Queue = queue.Queue()
        self.left = threading.Event()  # a client went away in the middle of an answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def say(self, *steps) -> None:
        self.answers.put(steps)

    def asked(self) -> dict:
        return self.requests.get(timeout=WAIT)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def done(finish_reason="stop", tokens=5, forgotten=0) -> dict:
    usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
    return {"done": True, "finish_reason": finish_reason, "usage": usage, "forgotten": forgotten}


def make_handler(stub: Stub):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in FILES:
                name, kind = FILES[self.path]
                self.reply(200, (FOLDER / name).read_bytes(), kind)
            else:
                self.reply(200, json.dumps(HEALTH).encode(), "application/json")

        def do_POST(self):
            stub.requests.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            steps = stub.answers.get(timeout=WAIT)
            if isinstance(steps[0], Refusal):
                extra = {"Retry-After": str(steps[0].retry_after)} if steps[0].retry_after else {}
                return self.reply(steps[0].status, json.dumps(steps[0].body).encode(), "application/json", extra)
            if steps[0] is CUT:
                return None
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            if not any(isinstance(step, dict) or step is CUT for step in steps):
                steps = (*steps, done())
            for step in steps:
                if step is CUT or (isinstance(step, threading.Event) and not self.may_go_on(step)):
                    return None
                if not isinstance(step, threading.Event):
                    self.wfile.write(as_bytes(step))

        def may_go_on(self, event) -> bool:
            """Waits for the event; False where the client goes away before."""
            for _ in range(WAIT * 50):
                if event.wait(0.02):
                    return True
                if select.select([self.connection], [], [], 0)[0]:
                    stub.left.set()
                    return False
            return False

        def reply(self, status, body, kind, extra=None):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


def as_bytes(step) -> bytes:
    if isinstance(step, bytes):
        return step
    if not isinstance(step, dict):
        kind, text = step if isinstance(step, tuple) else ("text", step)
        step = {"token": text, "type": kind}
    return f"data: {json.dumps(step)}\n\n".encode()


# -----------------------------------------------------------------------------
# The browser


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def stub():
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def visit(browser, stub):
    """`visit()` gives the page as a new visitor sees it; options are those of a browser context."""
    contexts, errors, elsewhere = [], [], []

    def start(script: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 720}, "reduced_motion": "reduce", **options})
        context.set_default_timeout(WAIT * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith(stub.url) else None)
        if script:
            page.add_init_script(script)
        page.goto(stub.url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not errors and not elsewhere


@pytest.fixture
def page(visit):
    return visit()


def say(page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def talk(page, stub, question: str, *steps) -> dict:
    """One question and its whole answer; gives the request's body."""
    stub.requests.queue.clear()
    stub.say(*steps)
    say(page, question)
    body = stub.asked()
    page.wait_for_function("document.querySelector('#send').title === 'Send'")  # looks at every frame; expect() does not
    return body


def replies(page):
    return page.get_by_role("article", name="nanochat")


def questions(page):
    return page.get_by_role("article", name="You")


def notice(page):
    return page.locator("#notice")


# -----------------------------------------------------------------------------
# Talking


def test_words_are_shown_as_they_come(page, stub):
    first, second = threading.Event(), threading.Event()
    stub.say("Once ", first, "upon ", second, "a time.", done(tokens=1234))
    say(page, "A story")
    expect(replies(page)).to_contain_text("Once")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(replies(page)).not_to_contain_text("upon")
    first.set()
    expect(replies(page)).to_contain_text("Once upon")
    expect(replies(page)).to_contain_text("2 tokens")
    second.set()
    expect(replies(page)).to_contain_text("Once upon a time.")
    expect(replies(page)).to_contain_text("1,234 tokens · ")
    expect(replies(page)).to_contain_text("tokens/s")
    expect(page).to_have_title("A story · nanochat")
    assert stub.asked() == {"messages": [{"role": "user", "content": "A story"}]}


def test_the_conversation_goes_along_with_the_next_question(page, stub):
    talk(page, stub, "Hello", "Hi ", "there.")
    body = talk(page, stub, "Again", "Hi.")
    assert [(m["role"], m["content"]) for m in body["messages"]] == [("user", "Hello"), ("assistant", "Hi there."), ("user", "Again")]


def test_events_may_be_cut_anywhere(page, stub):
    event = 'data: {"token": "Grüße 🌍", "type": "text"}\r\n\r\n: a comment\n\n'.encode()
    talk(page, stub, "Greet", *(event[i : i + 1] for i in range(len(event))), "!", done())
    expect(replies(page)).to_contain_text("Grüße 🌍!")


def test_stop_ends_the_request_and_keeps_what_had_arrived(page, stub):
    stub.say("As I was ", threading.Event(), "saying")
    say(page, "Talk")
    expect(replies(page)).to_contain_text("As I was")
    page.get_by_role("button", name="Stop").click()
    expect(replies(page)).to_contain_text("Stopped.")
    assert stub.left.wait(WAIT)
    body = talk(page, stub, "Go on", "…")
    assert body["messages"][1] == {"role": "assistant", "content": "As I was "}


def test_a_reply_goes_on_while_another_conversation_is_open(page, stub):
    gate = threading.Event()
    stub.say("Slow ", gate, "but sure.")
    say(page, "First")
    expect(replies(page)).to_contain_text("Slow")
    page.get_by_role("button", name="New conversation").click()
    talk(page, stub, "Second", "Quick.")
    expect(replies(page)).to_have_count(1)
    gate.set()
    page.get_by_role("link", name="First").click()
    expect(replies(page)).to_contain_text("Slow but sure.")
    expect(page.get_by_role("link", name="First")).to_have_attribute("aria-current", "page")


def test_what_the_server_left_out_and_cut_off_is_said(page, stub):
    talk(page, stub, "One", "Long", done("length", forgotten=2))
    expect(replies(page)).to_contain_text("Cut off: the reply reached the length")
    expect(replies(page)).to_contain_text("The first 2 questions and their answers no longer fitted")
    talk(page, stub, "Two", "Long", done("context"))
    expect(replies(page).last).to_contain_text("Cut off: the model's memory of 1,024 tokens is full.")


def test_what_the_server_would_refuse_is_not_sent(page, stub):
    for i in range(5):
        body = talk(page, stub, f"{i}" + "x" * 7900, "y" * 9000)
    # at most 32,000 characters in all and 8,000 in one message: the oldest exchange and the replies' ends stay behind
    assert [m["content"][0] for m in body["messages"]] == ["3", "y", "4"] and len(body["messages"][1]["content"]) == 8000
    expect(replies(page).last).to_contain_text("The first 3 questions and their answers")
    say(page, "z" * 8001)
    expect(notice(page)).to_contain_text("8,001 characters; at most 8,000")
    expect(questions(page)).to_have_count(5)


# -----------------------------------------------------------------------------
# Conversations


def test_conversations_are_kept(page, stub):
    talk(page, stub, "About cats\nand dogs", "Cats purr.")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("Ask a small model something.")).to_be_visible()
    talk(page, stub, "About the sea", "It is wide.")
    page.reload()
    expect(replies(page)).to_contain_text("It is wide.")
    expect(page).to_have_title("About the sea · nanochat")
    links = page.get_by_role("navigation").get_by_role("link")
    expect(links).to_have_text(["About the sea", "About cats"])
    links.last.click()
    expect(replies(page)).to_contain_text("Cats purr.")
    page.go_back()
    expect(replies(page)).to_contain_text("It is wide.")
    page.get_by_role("button", name="Delete “About the sea”").click()
    expect(links).to_have_text(["About cats"])
    expect(page).to_have_title("nanochat")
    notice(page).get_by_role("button", name="Undo").click()
    expect(replies(page)).to_contain_text("It is wide.")
    page.get_by_role("button", name="Delete “About the sea”").click()
    page.reload()
    expect(links).to_have_text(["About cats"])


def test_a_reload_in_the_middle_keeps_what_had_arrived(page, stub):
    stub.say("Half a ", threading.Event(), "reply")
    say(page, "Go")
    expect(replies(page)).to_contain_text("Half a")
    page.reload()
    expect(replies(page)).to_contain_text("Half a")
    expect(replies(page)).to_contain_text("The connection was lost")
    stub.say("A whole one.")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page)).to_contain_text("A whole one.")
    expect(replies(page)).not_to_contain_text("Half")


def test_what_is_deleted_in_the_middle_of_a_reply_stays_deleted(page, stub):
    stub.say("Half a ", threading.Event(), "reply")
    say(page, "Go")
    expect(replies(page)).to_contain_text("Half a")
    page.get_by_role("button", name="Delete “Go”").click()
    assert stub.left.wait(WAIT)
    talk(page, stub, "Stay", "Yes.")
    page.reload()
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Stay"])


def test_two_tabs_see_the_same(page, stub):
    other = page.context.new_page()
    other.goto(stub.url)
    talk(page, stub, "Said here", "Yes.")
    other.get_by_role("link", name="Said here").click()
    expect(replies(other)).to_contain_text("Yes.")
    page.get_by_role("button", name="Delete “Said here”").click()
    expect(replies(other)).to_have_count(0)


ABSENT = 'Object.defineProperty(window, "localStorage", { get() { throw new DOMException("no", "SecurityError"); } });'
FULL = 'Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };'


@pytest.mark.parametrize("script", [ABSENT, FULL], ids=["absent", "full"])
def test_without_storage_it_says_so_and_works(visit, stub, script):
    page = visit(script)
    talk(page, stub, "Hello", "Hi.")
    expect(replies(page)).to_contain_text("Hi.")
    expect(notice(page)).to_contain_text("storage is full or switched off")
    page.get_by_role("button", name="New conversation").click()
    talk(page, stub, "Bye", "See you.")
    expect(notice(page)).to_be_hidden()
    page.get_by_role("link", name="Hello").click()
    expect(replies(page)).to_contain_text("Hi.")


CORRUPT = {
    "nanochat:chat:a": "{not JSON",
    "nanochat:chat:b": '{"updated": 1, "messages": [{"role": "assistant", "parts": []}]}',
    "nanochat:chat:c": '{"updated": 1, "messages": [{"role": "user", "text": 7}]}',
    "nanochat:chat:d": '{"updated": 1, "messages": [{"role": "user", "text": "Fine"}, {"role": "assistant", "parts": []}]}',
    "nanochat:chat:e": "[]",
    "nanochat:settings": '{"temperature": "hot", "top_k": 7, "__proto__": 1}',
    "nanochat:theme": "{}",
}


def test_what_is_not_a_conversation_is_passed_over(visit, stub):
    page = visit(f"for (const [key, value] of Object.entries({json.dumps(CORRUPT)})) localStorage.setItem(key, value);")
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_text(["Fine"])
    body = talk(page, stub, "Hello", "Hi.")
    assert body["top_k"] == 7 and "temperature" not in body


# -----------------------------------------------------------------------------
# Editing, regenerating, copying


def test_an_edited_message_goes_on_from_there(page, stub):
    talk(page, stub, "First", "One.")
    talk(page, stub, "Second", "Two.")
    questions(page).first.hover()
    questions(page).first.get_by_role("button", name="Edit message").click()
    stub.requests.queue.clear()
    stub.say("Other.")
    page.get_by_label("Edit your message").fill("Changed")
    page.keyboard.press("Enter")
    expect(replies(page)).to_have_count(1)
    expect(replies(page)).to_contain_text("Other.")
    expect(page).to_have_title("Changed · nanochat")
    assert stub.asked()["messages"] == [{"role": "user", "content": "Changed"}]
    notice(page).get_by_role("button", name="Undo").click()
    expect(questions(page)).to_have_count(2)
    expect(replies(page).last).to_contain_text("Two.")


def test_a_reply_can_be_written_again(page, stub):
    talk(page, stub, "Guess", "Heads.")
    gate = threading.Event()
    stub.say("Ta", gate, "ils.")
    page.get_by_role("button", name="Write this reply again").click()
    assert stub.asked()["messages"] == [{"role": "user", "content": "Guess"}]
    expect(replies(page)).to_contain_text("Ta")
    expect(replies(page)).not_to_contain_text("Heads.")
    gate.set()
    expect(replies(page)).to_contain_text("Tails.")


def test_copy_gives_the_source(visit, stub):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    source = "Use **this**:\n\n```python\nprint(1 < 2)\n```"
    talk(page, stub, "How?", source)
    read = "navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy code").click()
    expect(page.locator("#status")).to_have_text("Copied")
    assert page.evaluate(read) == "print(1 < 2)"
    page.get_by_role("button", name="Copy reply").click()
    page.wait_for_function(f"async () => (await {read}).startsWith('Use **this**')")
    assert page.evaluate(read) == source
    questions(page).hover()
    page.get_by_role("button", name="Copy message").click()
    page.wait_for_function(f"async () => await {read} === 'How?'")


# -----------------------------------------------------------------------------
# What the model wrote


MARKDOWN = """# Title
Some **bold**, *italic* and `code <b>`, 2 * 3 * 4, snake_case_name, a [link](https://example.org/a_(b)) and https://example.org/x.

1. one
   - inner **x**
   - other
2. two
```
f(1)
```
3. three

> quoted
> twice

---
~~~js
let a = "`"
"""


def test_markdown(page, stub):
    talk(page, stub, "Show", *MARKDOWN)  # character by character
    prose = page.locator(".prose")
    expect(prose.get_by_role("heading", name="Title")).to_be_visible()
    assert prose.locator("strong").all_inner_texts() == ["bold", "x"]
    assert prose.locator("em").all_inner_texts() == ["italic"]
    assert prose.locator(":not(pre) > code").all_inner_texts() == ["code <b>"]
    assert prose.locator("pre code").all_inner_texts() == ["f(1)", 'let a = "`"\n']
    assert [a.get_attribute("href") for a in prose.locator("a").all()] == ["https://example.org/a_(b)", "https://example.org/x"]
    assert prose.locator("ol > li > ul > li").all_inner_texts() == ["inner x", "other"]
    assert [ol.get_attribute("start") for ol in prose.locator("ol").all()] == ["1", "3"]
    expect(prose.locator("blockquote")).to_have_text("quoted\ntwice")
    expect(prose.locator("hr")).to_have_count(1)


EVIL = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
[one](javascript:window.hacked=3) [two](java\tscript:alert(1)) [three](data:text/html,<script>1</script>)
![pixel](https://evil.example/pixel.png) [fine](https://example.org "onclick=alert(1)")

<iframe src="javascript:window.hacked=4"></iframe>
```html"><img src=x onerror=alert(1)>
</code></pre><script>window.hacked = 5</script><svg onload="window.hacked=6">
```
"""


def test_nothing_that_is_said_is_ever_run(page, stub):
    question = EVIL.replace("\n", " ")[:200]
    talk(page, stub, question, EVIL, ("python", "<img src=x onerror=window.hacked=7>"), ("python_output", "<b>1</b>"))
    page.reload()  # and from storage, in the title and in the sidebar
    expect(replies(page)).to_contain_text("window.hacked = 5")
    expect(page.get_by_role("navigation").get_by_role("link")).to_contain_text("<script>window.hacked = 1</script> <img")
    assert page.locator(":is(#messages, #list) :is(script, img, iframe, object, [onerror], [onload])").count() == 0
    links = [a.get_attribute("href") for a in page.locator("#messages a").all()]
    assert links == ["https://evil.example/pixel.png", "https://example.org/"]
    expect(page.locator("#messages a").first).to_have_attribute("rel", "noopener noreferrer")
    assert page.evaluate("window.hacked") is None


HARD = [
    *("*a " * 2600, "[" * 8000, "> " * 4000, "- " * 4000, "**" * 4000, "\\" * 8000, "[a](" * 2000, "_a_" * 2600, "*_" * 4000),
    *("`" * 3999 + "a" + "`" * 4000, "https://a" + ")." * 3900 + "(", "\n".join(" " * i + "- x" for i in range(120))),
]


def test_texts_made_to_be_slow_are_not(page, stub):
    for text in HARD:
        talk(page, stub, "Go", text)
        expect(replies(page).last).not_to_contain_text("The connection was lost")
        page.evaluate("document.querySelector('#new').click()")


def test_only_the_last_block_is_drawn_anew(page, stub):
    gate = threading.Event()
    stub.say("First.\n\nSec", gate, *["ond "] * 500)
    say(page, "Go")
    expect(replies(page).locator("p")).to_have_count(2)
    page.evaluate("""() => {
      const body = document.querySelector(".prose");
      [window.first, window.draws, window.frames] = [body.firstChild, 0, 0];
      new MutationObserver(() => window.draws++).observe(body, { childList: true });
      const count = () => { window.frames++; requestAnimationFrame(count); };
      count();
    }""")
    gate.set()
    expect(replies(page)).to_contain_text("5 tokens")
    assert page.evaluate("document.querySelector('.prose').firstChild === window.first")
    assert page.evaluate("window.draws <= window.frames + 1")


def test_a_reader_who_scrolled_up_is_left_alone(page, stub):
    gates = [threading.Event() for _ in range(3)]
    lines = [f"{i}\n\n" for i in range(40)]
    stub.say(*lines, gates[0], *lines, gates[1], "middle\n\n", *lines, gates[2], "end")
    say(page, "Count")
    place = "({ top: scroll.scrollTop, left: scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop })"
    place = f"(() => {{ const scroll = document.querySelector('#scroll'); return {place}; }})()"
    expect(replies(page).locator("p")).to_have_count(40)
    page.wait_for_function(f"{place}.left < 4 && {place}.top > 100")  # followed to the end
    gates[0].set()
    expect(replies(page).locator("p")).to_have_count(80)
    page.wait_for_function(f"{place}.left < 4")
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"{place}.left > 100")
    top = page.evaluate(place)["top"]
    gates[1].set()
    expect(replies(page)).to_contain_text("middle")
    expect(replies(page).locator("p")).to_have_count(121)
    assert page.evaluate(place)["top"] == top
    page.get_by_role("button", name="Go to the latest message").click()
    page.wait_for_function(f"{place}.left < 4")
    gates[2].set()
    expect(replies(page)).to_contain_text("end")
    page.wait_for_function(f"{place}.left < 4")


def test_tools_are_shown_and_sent_back_as_parts(page, stub):
    gate = threading.Event()
    stub.say("That is ", ("python", "12"), ("python", "*7"), gate, ("python_output", "84"), "84.")
    say(page, "12 times 7?")
    expect(replies(page).locator(".calc")).to_contain_text("12*7 = …")
    gate.set()
    expect(replies(page).locator(".calc")).to_contain_text("12*7 = 84")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    body = talk(page, stub, "Sure?", "Yes.", ("python", "1/0"))
    kinds = [("text", "That is "), ("python", "12*7"), ("python_output", "84"), ("text", "84.")]
    assert body["messages"][1] == {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in kinds]}
    expect(replies(page).last.locator(".calc")).to_contain_text("1/0 = no result")


# -----------------------------------------------------------------------------
# Commands and settings


def test_commands(page, stub):
    say(page, "/temperature 0.35")
    expect(notice(page)).to_contain_text("Temperature is now 0.35.")
    say(page, "/topk 0")
    expect(page.get_by_role("button", name="temperature 0.35 · top-k 0")).to_be_visible()
    for wrong, answer in {
        "/temperature": "Temperature must be a number from 0 to 2",
        "/temperature 2.5": "now 0.35",
        "/topk 1.5": "Top-k must be a whole number from 0 to 200",
        "/topk -1": "now 0",
        "/nonsense": "There is no command /nonsense.",
        "/help": "/clear",
    }.items():
        say(page, wrong)
        expect(notice(page)).to_contain_text(answer)
    page.reload()
    body = talk(page, stub, "/etc/hosts is what?", "A file.")
    assert (body["temperature"], body["top_k"]) == (0.35, 0) and body["messages"][0]["content"] == "/etc/hosts is what?"
    say(page, "/temperature default")
    assert "temperature" not in talk(page, stub, "And now?", "A file.")
    stub.say("Long ", threading.Event())
    say(page, "Talk")
    expect(replies(page).last).to_contain_text("Long")
    say(page, "/clear")  # even while a reply is being written
    assert stub.left.wait(WAIT)
    expect(replies(page)).to_have_count(0)
    expect(page.get_by_role("navigation").get_by_role("link")).to_have_count(0)
    notice(page).get_by_role("button", name="Undo").click()
    expect(replies(page)).to_have_count(3)


def test_settings(page, stub):
    page.get_by_role("button", name="temperature 0.8 · top-k 50").click()
    settings = page.get_by_role("dialog", name="Settings")
    settings.get_by_label("Temperature").fill("1.2")
    settings.get_by_label("Top-k").fill("40")
    page.keyboard.press("Escape")
    expect(settings).to_be_hidden()
    body = talk(page, stub, "Hello", "Hi.")
    assert (body["temperature"], body["top_k"]) == (1.2, 40)
    page.get_by_role("button", name="temperature 1.2 · top-k 40").click()
    settings.get_by_role("button", name="Use the server's defaults").click()
    page.keyboard.press("Escape")
    assert set(talk(page, stub, "Hello", "Hi.")) == {"messages"}


def test_dark_and_light(visit):
    shade = "getComputedStyle(document.body).backgroundColor"
    page = visit(color_scheme="light")
    light = page.evaluate(shade)
    page.get_by_role("button", name="Switch to dark").click()
    dark = page.evaluate(shade)
    assert light != dark
    page.reload()
    assert page.evaluate(shade) == dark
    page.get_by_role("button", name="Switch to light").click()
    assert page.evaluate(shade) == light
    page.emulate_media(color_scheme="dark")  # the choice was undone, so the system decides again
    assert page.evaluate(shade) == dark


# -----------------------------------------------------------------------------
# Faults


def test_a_busy_server_is_asked_again_once(page, stub):
    busy = Refusal(503, "the server is busy; try again a little later", retry_after=1)
    stub.say(busy)
    stub.say("Here I am.")
    say(page, "Hello")
    expect(replies(page)).to_contain_text("The server is busy; try again a little later. Trying again in 1 s.")
    expect(replies(page)).to_contain_text("Here I am.")
    expect(replies(page)).not_to_contain_text("busy")
    stub.asked(), stub.asked()

    busy.retry_after = 60
    stub.say(busy)
    stub.say(busy)
    say(page, "And now?")
    page.get_by_role("button", name="Retry now").click()
    retry = page.get_by_role("button", name="Retry", exact=True)
    expect(retry).to_be_visible()  # two failures: now the user decides
    assert stub.asked() == stub.asked() and stub.requests.empty()
    expect(replies(page).last).to_contain_text("The server is busy")
    stub.say(busy)
    retry.click()
    page.get_by_role("button", name="Cancel").click()
    expect(replies(page).last).to_contain_text("Stopped.")
    stub.asked()
    body = talk(page, stub, "Still there?", "Yes.")  # what was never answered is not sent
    assert [m["content"] for m in body["messages"]] == ["Hello", "Here I am.", "Still there?"]


def test_a_server_that_is_gone(page, stub):
    stub.say(CUT)
    say(page, "Hello")
    expect(replies(page)).to_contain_text("The server cannot be reached.")
    stub.say("Back.")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page)).to_contain_text("Back.")
    expect(replies(page)).not_to_contain_text("reached")


@pytest.mark.parametrize("end, said", [
    (CUT, "The connection was lost before the reply was complete."),
    ({"error": {"message": "the engine failed", "type": "server_error", "param": None, "code": None}}, "The engine failed."),
    (b"data: {nonsense}\n\n", "The connection was lost"),
], ids=["cut", "error", "nonsense"])
def test_a_reply_that_breaks_off_is_kept(page, stub, end, said):
    stub.say("What I ", "know: ", end, CUT)
    say(page, "Tell")
    expect(replies(page)).to_contain_text("What I know:")
    expect(replies(page)).to_contain_text(said)
    page.reload()
    expect(replies(page)).to_contain_text(said)
    stub.say("All of it.")
    page.get_by_role("button", name="Retry").click()
    expect(replies(page)).to_contain_text("All of it.")
    expect(replies(page)).not_to_contain_text(said)


def test_what_the_server_refuses_is_said_in_plain_words(page, stub):
    talk(page, stub, "Long", Refusal(400, "messages[0].content: it should have at most 3 characters"))
    expect(replies(page)).to_contain_text("A message: it should have at most 3 characters.")
    page.get_by_role("button", name="Edit message").last.click()
    stub.say("Fine.")
    page.get_by_label("Edit your message").fill("Hi")
    page.keyboard.press("Enter")
    expect(replies(page)).to_have_count(1)
    expect(replies(page)).to_contain_text("Fine.")


# -----------------------------------------------------------------------------
# Keyboard, phone


def test_a_session_with_the_keyboard_alone(page, stub):
    press, kind = page.keyboard.press, page.keyboard.type
    gate = threading.Event()
    stub.say("Slowly", gate)
    kind("Line one")  # the box has the focus from the start
    press("Shift+Enter")
    kind("Line two")
    press("Enter")
    assert stub.asked()["messages"][0]["content"] == "Line one\nLine two"
    expect(replies(page)).to_contain_text("Slowly")
    kind("Draft")
    press("Enter")  # while a reply is being written, nothing is sent and nothing lost
    press("Escape")
    expect(replies(page)).to_contain_text("Stopped.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Draft")
    press("Control+A")
    press("Delete")
    press("ArrowUp")  # edits the last message
    expect(page.get_by_label("Edit your message")).to_be_focused()
    press("Escape")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    press("ArrowUp")
    stub.say("Better.")
    kind(" and more")
    press("Enter")
    assert stub.asked()["messages"][0]["content"] == "Line one\nLine two and more"
    expect(replies(page)).to_contain_text("Better.")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()

    # Tab goes round the whole page, in the order of reading, and one always sees where one is.
    names, order = [], ["Skip to the message box", "New conversation", "Line one", "Delete “Line one”", "Switch to dark", "Conversation",
                        "Copy message", "Edit message", "Copy reply", "Write this reply again", "Message"]
    while "Message" not in names:
        press("Tab")
        focus = "document.activeElement"
        names.append(page.evaluate(f"{focus} === document.body ? '' : {focus}.getAttribute('aria-label') ?? {focus}.textContent.trim()"))
        if names[-1] not in ("", "Message"):  # round the box stands a line of its own
            assert page.evaluate(f"getComputedStyle({focus}).outlineStyle") == "solid", names[-1]
    assert [name for name in names if name in order] == order


def test_a_phone(visit, stub):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    wide = "[document.documentElement, document.querySelector('#scroll')].some((node) => node.scrollWidth > 390)"
    assert not page.evaluate(wide)
    wide_ones = ["y" * 300, "```\n" + "z" * 300 + "\n```", "https://example.org/" + "w" * 300, "`" + "v" * 300 + "`", "# " + "u" * 300]
    talk(page, stub, "x" * 300, "\n\n".join(wide_ones), ("python", "1+" * 200 + "1"))
    expect(replies(page)).to_contain_text("1+1 = no result")
    assert not page.evaluate(wide)
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('#input')).fontSize)") >= 16  # or iOS zooms in
    link = page.get_by_role("navigation").get_by_role("link")
    expect(link).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(link).to_be_visible()
    assert not page.evaluate(wide)
    page.keyboard.press("Escape")
    expect(link).to_be_hidden()
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()
    page.get_by_role("button", name="Conversations").click()
    page.set_viewport_size({"width": 844, "height": 390})  # turned: there is room for both, and neither is in the way
    expect(page.locator("#main")).not_to_have_attribute("inert", "")
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("Ask a small model something.")).to_be_visible()
    page.get_by_role("button", name="Who are you?").click()
    stub.say("nanochat.")
    expect(replies(page)).to_contain_text("nanochat.")


def test_nothing_is_asked_of_anybody_else(page, stub):
    seen = []
    page.on("request", lambda request: seen.append(request.url.removeprefix(stub.url)))
    page.reload()
    talk(page, stub, "Hello", "![a](https://example.org/a.png) https://example.org <link rel=prefetch href=https://example.org>")
    page.locator("#messages a").first.hover()
    page.reload()
    assert {url.partition("#")[0] for url in seen} <= {"", "logo.svg", "health", "chat/completions"}


# -----------------------------------------------------------------------------
# With the real server


def test_the_page_and_the_real_server_understand_each_other(browser):
    """Words, a call of the calculator, a hostile reply and the memory of both, under the headers that chat_web sends."""
    from chat_server import TOKENIZER, ScriptedEngine, serving

    hostile = "<script>window.harm = 1</script><img src=x onerror='window.harm = 1'>\n```html\n<b onclick=harm()>x</b>\n```"
    replies = iter(["It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|> é!", hostile])
    with serving(ScriptedEngine(lambda prompt: next(replies))) as site:
        page = browser.new_page(reduced_motion="reduce")
        page.set_default_timeout(WAIT * 1000)
        complaints = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(site.address)
        say(page, "How much is 6 times 7?")
        expect(page.locator("main")).to_contain_text("6*7 = 42")
        expect(page.locator("main")).to_contain_text("é!")
        say(page, "And now?")
        expect(page.locator("main")).to_contain_text("<script>window.harm = 1</script>")
        expect(page.locator("main pre")).to_have_text("<b onclick=harm()>x</b>")
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        assert page.evaluate("window.harm") is None and page.locator("main script, main [onerror], main [onclick]").count() == 0
        page.close()
        memory = TOKENIZER.decode(site.engine.asked[1].tokens[: site.engine.asked[1].prompt_length])
        assert "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>" in memory
        assert memory.endswith("<|user_start|>And now?<|user_end|><|assistant_start|>")
        assert not complaints
