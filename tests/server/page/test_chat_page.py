"""The chat in a real Chromium: what a person does with it, against a scripted engine."""

from __future__ import annotations

import json
import time
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "country": {"type": "string"}},
    "required": ["name", "country"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"type": "string"}},
            },
        },
    }
]


def test_an_answer_is_streamed_as_markdown_with_what_it_took(visit: Any) -> None:
    page = visit.open()
    assert "scripted" in page.inner_text("#model")
    answer = visit.ask("markdown please")
    text = answer.locator(".answer > .text")
    assert text.locator("strong").inner_text() == "bold"
    assert text.locator("em").inner_text() == "slanted"
    assert text.locator("ol > li").count() == 2 and text.locator("ol ul li").count() == 1
    assert text.locator("td").all_inner_texts() == ["1", "2"]
    link = text.locator("a")
    assert link.get_attribute("href") == "https://example.com/"
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert text.locator("pre .t-keyword").all_inner_texts() == ["def", "return"]
    assert text.locator("pre .t-comment").inner_text() == "# eight each"
    facts = answer.locator(".facts").inner_text()
    for word in ("tokens/s", "first after", "$0.0", "request"):
        assert word in facts


def test_a_stream_can_be_stopped_and_what_came_is_kept(visit: Any) -> None:
    page = visit.open()
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .answer > .text >> text=On and on it goes. On and")
    page.click("#send")
    answer = visit.answer()
    assert answer.locator(".ending").inner_text() == "Stopped."
    assert 20 < len(answer.locator(".answer > .text").inner_text()) < 4000
    gone = 'enginehouse_requests_cancelled_total{phase="decode",reason="client_gone"} 0.0'
    until = time.monotonic() + 15
    while gone in page.request.get(f"{visit.address}/metrics").text():
        assert time.monotonic() < until, "the engine goes on for nobody"
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#send.is-stop")
    page.keyboard.press("Escape")
    assert visit.answer().locator(".ending").inner_text() == "Stopped."


def test_a_conversation_that_is_deleted_while_it_is_answered_stays_away(visit: Any) -> None:
    page = visit.open()
    page.fill("#prompt", "slow")
    page.press("#prompt", "Enter")
    page.wait_for_selector("article.assistant .answer > .text >> text=On and on it goes.")
    page.get_by_role("button", name="Delete slow").click()
    page.wait_for_selector("#send:not(.is-stop)")
    assert page.locator("#conversations li").count() == 0
    assert visit.open().locator("#conversations li").count() == 0


def test_an_answer_follows_the_schema_of_the_editor(visit: Any) -> None:
    page = visit.open()
    page.select_option("#format", "json_schema")
    page.fill("#schema", '{"type": "objet"}')
    assert '"objet" is none of' in page.inner_text("#schema-fault")
    page.fill("#prompt", "a city")
    page.press("#prompt", "Enter")
    assert page.locator("article").count() == 0, "a schema with a fault is not sent"
    page.fill("#schema", "{")
    assert page.inner_text("#schema-fault").startswith("No JSON (line 1, column 2)")
    page.fill("#schema", json.dumps(SCHEMA))
    assert page.inner_text("#schema-fault") == ""
    answer = visit.ask("a city")
    assert json.loads(answer.locator(".answer > .text").inner_text()) == {
        "name": "Paris",
        "country": "France",
    }


def test_a_call_is_shown_and_its_result_sent_back(visit: Any) -> None:
    page = visit.open()
    page.fill("#tools", '[{"type": "function", "function": {"name": "a b"}}]')
    assert "tools[0].function.name" in page.inner_text("#tools-fault")
    page.fill("#tools", json.dumps(TOOLS))
    assert page.locator("#tool-choice option").last.inner_text() == "call get_weather"
    answer = visit.ask("What is the weather in Paris?")
    assert answer.locator(".call figcaption").text_content() == "Calls get_weather"
    told = json.loads(answer.locator(".call pre").inner_text())
    assert told == {"city": "Paris", "unit": "C"}
    page.get_by_label("Result of get_weather").fill("18 degrees")
    page.get_by_role("button", name="Send results").click()
    page.wait_for_selector("article.tool")
    said = visit.answer().locator(".answer > .text").inner_text()
    assert said == "It is 18 degrees and clear in Paris."


def test_reasoning_is_folded_before_the_answer(visit: Any) -> None:
    visit.open()
    answer = visit.ask("think")
    thought = answer.locator("details.reasoning")
    assert thought.get_attribute("open") is None
    thought.locator("summary").click()
    assert thought.locator("em").inner_text() == "think"
    assert answer.locator(".answer > .text").inner_text() == "Then I say it."


def test_answers_stand_beside_each_other_and_one_is_gone_on_with(visit: Any) -> None:
    page = visit.open()
    page.fill("#field-n", "3")
    answer = visit.ask("Hello")
    assert answer.locator(".answer").count() == 3
    lefts = {box.bounding_box()["x"] for box in answer.locator(".answer").all()}
    assert len(lefts) > 1
    answer.get_by_label("Answer 2").check()
    with page.expect_request("**/v1/chat/completions") as sent:
        visit.ask("And then?")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_probabilities_are_a_heat_map_with_alternatives(visit: Any) -> None:
    page = visit.open()
    page.click("text=More fields")
    page.select_option("#field-logprobs", "true")
    page.fill("#field-top_logprobs", "3")
    answer = visit.ask("Hello")
    plain = answer.locator(".answer > .text").inner_text()
    answer.get_by_role("button", name="Probabilities").click()
    tokens = answer.locator(".token")
    assert "".join(tokens.all_text_contents()).strip() == plain
    tokens.first.hover()
    assert 3 <= answer.locator(".tip tr").count() <= 4
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).evaluate("node => node === document.activeElement")
    assert "is-told" in tokens.nth(1).get_attribute("class")


def test_a_message_is_edited_into_a_branch_and_answers_are_asked_for_again(visit: Any) -> None:
    page = visit.open()
    visit.ask("Hello")
    page.get_by_role("button", name="Regenerate").click()
    visit.answer()
    assert "2 / 2" in page.inner_text("article.assistant .branches")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit message").fill("think of it")
    page.get_by_role("button", name="Send as a new branch").click()
    page.wait_for_selector("article.user .branches")
    assert visit.answer().locator(".answer > .text").inner_text() == "Then I say it."
    page.get_by_role("button", name="previous branch").click()
    assert page.inner_text("article.user .text") == "Hello"
    assert "2 / 2" in page.inner_text("article.assistant .branches")


def test_a_refusal_is_told_in_words_with_its_request_and_at_its_field(visit: Any) -> None:
    page = visit.open()
    page.fill("#field-temperature", "3")
    assert "0 to 2" in page.inner_text("#field-temperature-fault")
    page.fill("#field-temperature", "")
    page.fill("#field-max_tokens", "2")
    page.click("text=More fields")
    page.fill("#field-min_tokens", "3")
    answer = visit.ask("Hello")
    told = answer.locator("[role=alert]")
    assert "min_tokens" in told.inner_text()
    assert len(told.locator(".id code").inner_text()) == 32
    assert page.get_attribute("#field-min_tokens", "aria-invalid") == "true"
    assert [text for text in visit.said if "400" not in text] == []
    visit.said.clear()  # the browser's own line of the status


def test_an_engine_that_fails_in_mid_stream_is_told_after_what_it_said(visit: Any) -> None:
    visit.open()
    answer = visit.ask("break")
    assert "its log has more under" in answer.locator("[role=alert]").inner_text()
    assert answer.locator(".answer > .text").inner_text() != ""
    assert answer.get_by_role("button", name="Try again").is_visible()


def test_every_field_is_there_with_its_range_and_the_system_prompt_is_sent(visit: Any) -> None:
    page = visit.open()
    fields = page.request.get(f"{visit.address}/page/fields.json").json()
    for field in fields:
        assert page.locator(f"#field-{field['name']}").count() == 1
        assert field["about"].split()[0] in page.text_content(f"#field-{field['name']}-about")
    assert "above 0 to 1, default 1" in page.inner_text("#field-top_p-about")
    page.fill("#system", "Be brief.")
    page.fill("#field-temperature", "0.5")
    page.fill("#field-stop", "END\n\\n\\n")
    with page.expect_request("**/v1/chat/completions") as sent:
        visit.ask("Hello")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["stop"]) == (0.5, ["END", "\n\n"])
    assert "top_p" not in body, "what is not set is the server's"
