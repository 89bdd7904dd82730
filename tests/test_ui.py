"""The chat page in a real browser; the last test uses the real server."""

import json
import time

import pytest
from chat_page import box, browser, click, contents, done, emit, expect, links, page, replies, request, say, talk, visit  # noqa: F401

from tasks.customjson import read_conversation, read_records


def test_tokens_are_shown_as_they_arrive(page):
    say(page, "A story")
    emit(page, "Once ", "upon ")
    expect(replies(page)).to_contain_text("Once upon 2 tokens")
    emit(page, "a time.", done(tokens=1234))
    expect(replies(page)).to_contain_text("Once upon a time.1,234 tokens")
    expect(page).to_have_title("A story · nanochat")
    assert request(page) == {"messages": [{"role": "user", "content": "A story"}]}
    assert talk(page, "Again", "Nö 🌍.") == ["A story", "Once upon a time.", "Again"]
    expect(replies(page).last).to_contain_text("Nö 🌍.")


def test_an_incomplete_reply_says_why_and_can_be_continued(page):
    say(page, "Talk")
    emit(page, "As I was ")
    click(page, "Stop")
    expect(replies(page)).to_contain_text("As I was Stopped.")
    click(page, "Continue")
    emit(page, "saying", done("length", tokens=1, forgotten=2))
    assert contents(page) == ["Talk", "As I was "]
    expect(replies(page)).to_contain_text("As I was sayingCut off: the reply reached the length")
    expect(replies(page)).to_contain_text("2 earlier questions no longer fitted the model's memory.2 tokens")
    click(page, "Continue")
    emit(page, ".", done("context"))
    expect(replies(page)).to_contain_text("As I was saying.Cut off: the model's memory is full.")


def test_a_reply_continues_while_another_conversation_is_open(page):
    say(page, "First")
    emit(page, "Slow ")
    click(page, "New conversation")
    talk(page, "Second", "Quick.")
    emit(page, "but sure.", done(), stream=0)
    links(page).last.click()
    expect(replies(page)).to_contain_text("Slow but sure.")
    expect(links(page).last).to_have_attribute("aria-current", "page")


@pytest.mark.parametrize("number, length, kept", [(300, 1, 248), (20, 50_000, 5)])
def test_requests_stay_within_the_limits_of_the_server(visit, number, length, kept):
    exchange = {"text": "q", "parts": [{"type": "text", "text": "a" * length}]}
    page = visit(stored={"chat:a": json.dumps({"id": "a", "updated": 1, "exchanges": [exchange] * number})})
    links(page).click()
    assert len(talk(page, "Now?", "Yes.")) == 2 * kept + 1
    expect(replies(page).last).to_contain_text(f"{number - kept} earlier questions no longer fitted")


def test_tool_calls_are_shown_and_sent_back_as_parts(page):
    parts = [("text", "That is "), ("python", "12*7"), ("python_output", "84"), ("text", "84.")]
    say(page, "12 times 7?")
    emit(page, *parts[:2])
    expect(replies(page).locator(".calc")).to_contain_text("12*7 = …")
    emit(page, *parts[2:], done())
    expect(replies(page).locator(".calc")).to_contain_text("12*7 = 84")
    assert talk(page, "Sure?", "Yes.")[1] == [{"type": kind, "text": text} for kind, text in parts]


def test_a_reader_who_scrolled_up_stays_there(page):
    say(page, "Count")
    emit(page, "0\n\n" * 60, "first")
    expect(page.get_by_text("first")).to_be_in_viewport()
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -300)
    expect(page.get_by_role("button", name="Go to the latest message")).to_be_visible()
    emit(page, "1\n\n" * 60, "second")
    expect(page.get_by_text("second")).to_have_count(1)
    expect(page.get_by_text("second")).not_to_be_in_viewport()
    click(page, "Go to the latest message")
    expect(page.get_by_text("second")).to_be_in_viewport()


def test_conversations_survive_a_reload_until_they_are_deleted(page):
    talk(page, "About cats\nand dogs", "Cats purr.")
    click(page, "New conversation")
    talk(page, "About the sea", "It is wide.")
    page.reload()
    expect(replies(page)).to_contain_text("It is wide.")
    expect(links(page)).to_have_text(["About the sea", "About cats"])
    links(page).last.click()
    expect(replies(page)).to_contain_text("Cats purr.")
    page.go_back()
    click(page, "Delete “About the sea”")  # a dialog asks, which Playwright dismisses
    say(page, "Deleted during a reply")
    page.on("dialog", lambda dialog: dialog.accept())
    click(page, "Delete “About the sea”")
    page.reload()
    expect(links(page)).to_have_text(["About cats"])


def test_without_storage_the_page_says_so_and_works(visit):
    page = visit('Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };')
    talk(page, "Hello", "Hi.")
    expect(replies(page)).to_contain_text("Hi.")
    expect(page.get_by_role("status")).to_contain_text("storage is full or switched off")


NOT_A_PRIMITIVE = {"toString": 1, "valueOf": 1, "toLocaleString": 1}


def test_what_is_odd_in_the_storage_is_dropped(visit):
    text, values = {"type": "text", "text": "Hi."}, [None, 0, -1e300, "x", [], {}, NOT_A_PRIMITIVE]
    fine = {"text": "Fine", "parts": [text], "tokens": 3, "problem": {"text": "It failed."}}
    odd = [*values, {"parts": []}, {"text": "x"}, {"text": 5, "parts": []}, {"text": "x", "parts": {"every": 1}}]
    odd += [{**fine, "parts": [text, part]} for part in (*values, {"text": "x"}, {"type": "image", "text": ""}, {"type": "text"})]
    odd += [{**fine, key: NOT_A_PRIMITIVE} for key in ("tokens", "forgotten", "problem")]
    odd += [{"text": "x", "versions": [fine], "shown": value} for value in (*values, 1) if value != 0]
    odd += [{"text": "x", "versions": value, "shown": 0} for value in (*values, *([value] for value in values))]
    chats = [{"exchanges": exchanges} for exchanges in (*values, *([exchange] for exchange in odd))]
    chats += [{"id": value, "updated": value, "title": [value], "exchanges": [*odd, fine]} for value in values]
    stored = {f"chat:{i}": json.dumps(chat) for i, chat in enumerate([*values, *chats])}
    stored |= {"chat:": json.dumps({"exchanges": [fine]}), "chat:a": "{not JSON", "chat:b": "9" * 10_000, "theme": "{}"}
    stored["chat:long"] = json.dumps({"exchanges": [{**fine, "text": "Long" * 200_000}], "updated": 1})
    settings = {"temperature": "hot", "top_k": 7.4, "max_tokens": 1e300, "system": "x" * 5000, "__proto__": 1}
    page = visit(stored={**stored, "settings": json.dumps(settings)})
    expect(links(page)).to_have_text(["Long" * 20, *["Fine"] * len(values)])
    talk(page, "Hello", "Hi.")
    sent = request(page)
    assert (sent["top_k"], sent["max_tokens"], "temperature" in sent) == (7, 4096, False)
    assert len(sent["messages"][0]["content"]) == 4000
    links(page).last.click()
    assert talk(page, "More", "Yes.")[1:] == ["Fine", "Hi.", "More"]
    page.on("dialog", lambda dialog: dialog.accept())
    number = page.evaluate("localStorage.length")
    click(page, "Delete “Fine”")
    assert page.evaluate("localStorage.length") == number - 1


def test_an_edited_question_replaces_what_followed(page):
    talk(page, "First", "One.")
    talk(page, "Second", "Two.")
    box(page).fill("A draft")
    page.get_by_role("button", name="Edit message").first.click()
    expect(page.get_by_role("status")).to_contain_text("Editing “First”")
    expect(box(page)).to_have_value("First")
    page.keyboard.press("Escape")
    expect(box(page)).to_have_value("A draft")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Edit message").first.click()
    say(page, "Changed")
    emit(page, "Other.", done())
    expect(replies(page)).to_contain_text(["Other."])
    assert contents(page) == ["Changed"]
    expect(box(page)).to_have_value("A draft")


def test_earlier_replies_are_kept_and_the_one_shown_is_sent(page):
    talk(page, "First", "One.")
    for text in ("Two.", "Three."):
        click(page, "Write this reply again")
        emit(page, text, done())
        expect(replies(page)).to_contain_text(f"{text}5 tokens")
        assert contents(page) == ["First"]
    page.evaluate("refusal = 'offline'")
    click(page, "Write this reply again")
    expect(replies(page)).to_contain_text("4/4")
    click(page, "Retry")  # takes the place of the reply that failed
    emit(page, "Four.", done())
    expect(replies(page)).to_contain_text("Four.5 tokens4/4")
    arrow = page.get_by_role("button", name="Show the previous reply")
    for position in ("3/4", "2/4"):
        arrow.press("Enter")
        expect(replies(page)).to_contain_text(position)
        expect(arrow).to_be_focused()
    page.reload()
    expect(replies(page)).to_contain_text("Two.5 tokens2/4")
    assert talk(page, "Second", "Yes.") == ["First", "Two.", "Second"]
    for _ in range(3):  # the last reply is followed by the first
        click(page, "Show the next reply")
    assert talk(page, "Third", "No.") == ["First", "One.", "Second", "Yes.", "Third"]


def test_an_exported_conversation_can_be_trained_on(visit, tmp_path):
    page = visit(stored={"settings": json.dumps({"system": "Be brief."})})
    parts = [("text", "It is "), ("python", "6*7"), ("python_output", "42")]
    talk(page, "Hello", "Hi.")
    talk(page, "6 times 7?", *parts)
    page.evaluate("refusal = 'offline'")
    say(page, "Unanswered")
    page.once("dialog", lambda dialog: dialog.accept("Sums"))
    click(page, "Rename “Hello”")
    page.reload()
    expect(links(page)).to_have_text(["Sums"])
    with page.expect_download() as download:
        click(page, "Export “Sums”")
    assert download.value.suggested_filename == "Sums.jsonl"
    download.value.save_as(tmp_path / "my.jsonl")
    [record] = read_records(tmp_path / "my.jsonl")
    answer = [{"type": kind, "text": text} for kind, text in parts]
    contents = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "6 times 7?"), ("assistant", answer)]
    assert read_conversation(*record)["messages"] == [{"role": role, "content": content} for role, content in contents]


def test_copying_copies_the_source(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    source = "Use **this**:\n\n```python\nprint(1 < 2)\n```"
    talk(page, "How?", source)
    for name, text in {"Copy code": "print(1 < 2)", "Copy reply": source, "Copy message": "How?"}.items():
        page.get_by_role("button", name=name).click()
        page.wait_for_function("async (text) => await navigator.clipboard.readText() === text", arg=text)


MARKDOWN = """# Title
Some **bold**, *italic*, ~~gone~~, `code <b>`, 2 * 3 * 4, snake_case_name, [link](https://example.org/a_(b)) and
https://example.org/x.

1. one
   - inner **x**
   - other
2. two
```
f(1)
```
3. three

- [x] bought
- [ ] sold

> quoted
> twice

| Name | Size \\| cost |
|:-----|-----:|
| **a** | `1` |
---
~~~js
let a = "`"
"""
EVIL = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
[one](javascript:window.hacked=3) [two](java\tscript:alert(1)) [three](data:text/html,<script>1</script>)
![pixel](https://evil.example/pixel.png) [fine](https://example.org "onclick=alert(1)")

| <b onclick=alert(1)>x</b> |
|---|
| [t](vbscript:x) |
```html"><img src=x onerror=alert(1)>
</code></pre><script>window.hacked = 5</script><svg onload="window.hacked=6">
"""
SLOW = ["*a " * 2600, "[" * 8000, "> " * 4000, "- " * 4000, "**a" * 2600, "[a](" * 2000, "_a_" * 2600, "*_" * 4000,
        "`" * 3999 + "a" + "`" * 4000, "https://a" + ")." * 3900 + "(", "\n".join(" " * i + "- x" for i in range(120)),
        "|" * 4000 + "\n" + "|-" * 3999 + "|", "~~a " * 2000, "".join("`" * i + "a " for i in range(120)),
        "```" + "a" * 8000 + "`", "a" + " " * 8000 + "b|", "- a\n" + "\n" * 7000 + "- b"]


def test_markdown_becomes_elements(page):
    talk(page, "Show", *MARKDOWN)  # character by character
    prose = page.locator(".prose")
    texts = {
        "h3": ["Title"], "strong": ["bold", "x", "a"], "em": ["italic"], "del": ["gone"], "hr": [""],
        ":not(pre) > code": ["code <b>", "1"], "pre code": ["f(1)", 'let a = "`"\n'], "blockquote": ["quoted\ntwice"],
        "ol > li > ul > li": ["inner x", "other"], ":scope > ul > li": ["☑ bought", "☐ sold"],
        "th": ["Name", "Size | cost"], "td": ["a", "1"],
    }  # fmt: skip
    assert {selector: prose.locator(selector).all_inner_texts() for selector in texts} == texts
    addresses = ["https://example.org/a_(b)", "https://example.org/x"]
    assert [a.get_attribute("href") for a in prose.locator("a").all()] == addresses
    assert [ol.get_attribute("start") for ol in prose.locator("ol").all()] == ["1", "3"]
    expect(prose.locator("td").last).to_have_css("text-align", "end")


def test_hostile_markdown_is_shown_as_text(page):
    parts = [("python", "<img src=x onerror=window.hacked=7>"), ("python_output", "<b onclick=alert(1)>1</b>")]
    talk(page, EVIL.replace("\n", " ")[:200], EVIL, *parts)
    page.reload()
    expect(replies(page)).to_contain_text("window.hacked = 5")
    expect(links(page)).to_contain_text("<script>window.hacked = 1</script> <img")
    dangerous = ":is(script, img, iframe, object, [onerror], [onload], [onclick])"
    assert page.locator(f":is(#messages, #list) {dangerous}").count() == 0
    anchors = page.locator("#messages a[rel='noopener noreferrer']").all()
    assert [a.get_attribute("href") for a in anchors] == ["https://evil.example/pixel.png", "https://example.org/"]
    assert page.evaluate("window.hacked") is None


def test_no_text_is_slow_to_render(page):
    for text in SLOW:
        start = time.monotonic()
        talk(page, "Go", text)
        assert time.monotonic() - start < 3, text[:40]
        click(page, "New conversation")


def test_settings_are_sent_and_survive_a_reload(page):
    click(page, "temperature 0.8 · top-k 50")
    for name, value in {"Temperature": "1.2", "Top-k": "40", "Length": "256", "System prompt": "Be brief."}.items():
        page.get_by_role("dialog", name="Settings").get_by_label(name).fill(value)
    page.reload()
    talk(page, "Hello", "Hi.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert request(page) == {"messages": messages, "temperature": 1.2, "top_k": 40, "max_tokens": 256}
    click(page, "temperature 1.2 · top-k 40 · system prompt")
    click(page, "Use the server's defaults")
    page.keyboard.press("Escape")
    talk(page, "Hello", "Hi.")
    assert set(request(page)) == {"messages"}


def test_commands_change_settings_and_clear(page):
    notices = {"/temperature 0.35": "temperature is 0.35", "/topk 0": "topk is 0", "/topk default": "topk is 50",
               "/length": "length is 512; it may be 16", "/temperature 5": "temperature is 2", "/help": "/clear"}
    for command, text in notices.items():
        say(page, command)
        expect(page.get_by_role("status")).to_contain_text(text)
    assert talk(page, "/etc/hosts is what?", "A file.") == ["/etc/hosts is what?"]
    assert request(page)["temperature"] == 2 and "top_k" not in request(page)
    page.on("dialog", lambda dialog: dialog.accept())
    say(page, "/clear")
    expect(links(page)).to_have_count(0)


def test_a_base_model_is_not_offered_for_a_chat(visit):
    page = visit("health.chats = false;")
    expect(page.get_by_role("heading", name="A base model does not chat")).to_be_visible()


def test_the_theme_can_be_switched_and_is_kept(visit):
    page, dark = visit(color_scheme="light"), "rgb(21, 23, 22)"
    click(page, "Light or dark")
    page.reload()
    expect(page.locator("body")).to_have_css("background-color", dark)
    click(page, "Light or dark")
    expect(page.locator("body")).not_to_have_css("background-color", dark)
    page.emulate_media(color_scheme="dark")  # the page follows the system again
    expect(page.locator("body")).to_have_css("background-color", dark)


@pytest.mark.parametrize("refusal, text, remedy", [
    ("offline", "The server cannot be reached.", ["Retry"]),
    ([503, "the server is busy"], "The server is busy.", ["Retry"]),
    ([400, "the message is too long"], "The message is too long.", ["Edit message", "Send"]),
], ids=["offline", "busy", "refused"])
def test_a_failed_request_can_be_repeated(page, refusal, text, remedy):
    for question in ("First", "Second"):
        page.evaluate("(value) => { refusal = value; }", refusal)
        say(page, question)
        expect(replies(page).last).to_contain_text(text)
    assert contents(page) == ["Second"]  # unanswered questions are not sent again
    for name in remedy:
        click(page, name)
    emit(page, "Here.", done())
    expect(replies(page).last).to_contain_text("Here.5 tokens")


@pytest.mark.parametrize("end, text", [
    ("streams[0].close()", "The connection was lost before the reply was complete."),
    (r"""emit('data: {"error": {"message": "it failed"}}\n', 0)""", "It failed."),
    ("setTimeout(() => location.reload())", "The connection was lost"),
], ids=["cut", "error", "reload"])
def test_a_reply_that_broke_off_is_kept(page, end, text):
    say(page, "Tell")
    emit(page, "What I ", "know: ")
    page.evaluate(end)
    expect(replies(page)).to_contain_text(f"What I know: {text}")


def test_the_keyboard_alone_is_enough(page):
    press, write = page.keyboard.press, page.keyboard.type
    write("Line one")  # the box has the focus from the start
    press("Shift+Enter")
    write("Line two")
    press("Enter")
    emit(page, "Slowly")
    write("Draft")
    press("Enter")  # nothing is sent during a reply, and nothing is lost
    press("Escape")
    expect(replies(page)).to_contain_text("Stopped.")
    expect(box(page)).to_have_value("Draft")
    box(page).fill("")
    press("ArrowUp")
    write(" and more")
    press("Enter")
    emit(page, "Better.", done())
    assert contents(page) == ["Line one\nLine two and more"]
    expect(box(page)).to_be_focused()


def test_a_phone_shows_everything_within_its_width(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    wide = ["y" * 300, f"```\n{'z' * 300}\n```", "https://a.example/" + "w" * 300, f"|a|b|\n|-|-|\n|{'t' * 300}|b|"]
    talk(page, "x" * 300, "\n\n".join(wide), ("python", "1+" * 200 + "1"))
    nodes = "[document.documentElement, document.querySelector('#scroll')]"
    assert page.evaluate(f"{nodes}.every((node) => node.scrollWidth <= 390)")
    click(page, "Conversations")
    expect(links(page)).to_be_visible()
    click(page, "New conversation")
    expect(links(page)).to_be_hidden()
    click(page, "Spell cat.")  # an example from the server
    assert contents(page) == ["Spell cat."]


def test_the_page_works_with_the_real_server(browser):
    """Streaming, a tool call, a hostile reply that is cut and continued, and the content security policy of chat_web."""
    from chat_server import ScriptedEngine, serving

    hostile = "<script>window.harm = 1</script><img src=x onerror='window.harm = 1'>"
    texts = iter(["It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|> é!", hostile])
    with serving(ScriptedEngine(lambda prompt: next(texts)), max_tokens=60) as site:
        page, complaints = browser.new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(site.address)
        say(page, "How much is 6 times 7?")
        expect(replies(page)).to_contain_text("6*7 = 42 é!")
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        say(page, "And now?")
        click(page, "Continue")
        expect(replies(page).last.locator(".prose")).to_have_text(hostile)
        assert page.evaluate("window.harm") is None and not complaints
        page.close()
