"""Fixtures of the chat page in a real browser, with a fake `fetch` whose replies the tests send token by token.

An error on the page, or a request to another address, fails a test.
"""

import json
import shutil
from pathlib import Path

import pytest

try:
    from playwright.sync_api import expect, sync_playwright
    CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
except (ImportError, StopIteration):
    pytest.skip("needs Playwright (uv sync) and a browser (apt-get install chromium)", allow_module_level=True)
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
FILES = {name: Path(__file__).resolve().parents[1] / "nanochat" / (name or "ui.html") for name in ("", "logo.svg")}
ADDRESS = "http://localhost/"
FAKE_FETCH = """
// The bodies of requests, the replies to them, and [status, message] of the next reply, or "offline"
Object.assign(window, { requests: [], streams: [], refusal: null });
window.emit = (text, i) => {
  for (const byte of new TextEncoder().encode(text)) streams.at(i).enqueue(new Uint8Array([byte]));
};
const defaults = { temperature: 0.8, top_k: 50, max_tokens: 512 };
const health = { ready: true, model: "sft d4 step 60", context: 1024, defaults, examples: ["Spell cat."] };
window.fetch = async (url, { body, signal }) => {
  if (url === "health") return Response.json(health);
  const error = refusal;
  requests.push(JSON.parse(body));
  refusal = null;
  if (error === "offline") throw new TypeError("Failed to fetch");
  if (error) return Response.json({ error: { message: error[1] } }, { status: error[0] });
  return new Response(new ReadableStream({ start(controller) {
    streams.push(controller);
    signal.addEventListener("abort", () => controller.error(signal.reason));
  } }));
};
"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """`visit()` opens the page in a new browser context, with these options, items in its storage, and a script before its own."""
    contexts, errors = [], []

    def serve(route):
        file = FILES.get(route.request.url.removeprefix(ADDRESS).partition("#")[0])
        if file is None:
            errors.append(route.request.url)
        route.fulfill(path=file or FILES["logo.svg"])

    def start(script: str = "", stored: dict[str, str] | None = None, **options):
        options = {"viewport": {"width": 1100, "height": 720}, "reduced_motion": "reduce"} | options
        context = browser.new_context(**options)
        contexts.append(context)
        context.route("**/*", serve)
        items = {f"nanochat:{key}": value for key, value in (stored or {}).items()}
        context.add_init_script(f"{FAKE_FETCH}{script} Object.assign(localStorage, {json.dumps(items)});")
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(ADDRESS)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not errors


@pytest.fixture
def page(visit):
    return visit()


def box(page):
    return page.get_by_label("Message", exact=True)


def replies(page):
    return page.get_by_role("article", name="nanochat")


def links(page):
    return page.get_by_role("navigation").get_by_role("link")


def click(page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).last.click()


def say(page, text: str) -> None:
    box(page).fill(text)
    page.keyboard.press("Enter")


def emit(page, *steps, stream: int = -1) -> None:
    """Sends text (str), (type, token) pairs and other events (dict) as a part of a reply, split at every byte."""
    for step in steps:
        kind, token = step if isinstance(step, tuple) else ("text", step)
        event = step if isinstance(step, dict) else {"token": token, "type": kind}
        text = f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n"
        page.evaluate("([text, i]) => emit(text, i)", [text, stream])


def done(finish_reason="stop", tokens=5, forgotten=0) -> dict:
    return dict(done=True, finish_reason=finish_reason, usage={"completion_tokens": tokens}, forgotten=forgotten)


def talk(page, question: str, *steps) -> list:
    """Sends a question and waits for its whole reply; returns the contents of the messages in the request."""
    say(page, question)
    emit(page, *steps, *([] if isinstance(steps[-1], dict) else [done()]))
    page.wait_for_function("document.querySelector('#send').title === 'Send'")
    return contents(page)


def request(page) -> dict:
    return page.evaluate("requests.at(-1)")


def contents(page) -> list:
    """The contents of the messages in the last request; a reply that is only text as a string."""
    contents = [message["content"] for message in request(page)["messages"]]
    return [content[0]["text"] if isinstance(content, list) and len(content) == 1 else content for content in contents]
