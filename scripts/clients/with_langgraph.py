# /// script
# requires-python = ">=3.10"
# dependencies = ["langgraph>=1.0", "langchain-openai>=0.3"]
# ///
"""A graph of LangGraph: the model calls a tool, the tool answers, the model answers."""

import json
from typing import Any

from asked import (
    API_KEY,
    BASE_URL,
    MAX_TOKENS,
    MODEL,
    RESULT,
    TIMEOUT_S,
    WEATHER_QUESTION,
    say,
)
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode


@tool
def get_weather(city: str, unit: str) -> str:
    """The weather in a city."""
    return RESULT


chat = ChatOpenAI(base_url=BASE_URL, api_key=API_KEY, model=MODEL)
bounded = chat.model_copy(
    update={"temperature": 0, "max_tokens": MAX_TOKENS, "request_timeout": TIMEOUT_S}
)


def ask(state: MessagesState) -> dict[str, Any]:
    answered = isinstance(state["messages"][-1], ToolMessage)
    model = bounded.bind_tools([get_weather], tool_choice="none" if answered else "required")
    return {"messages": [model.invoke(state["messages"])]}


def after_asking(state: MessagesState) -> str:
    return "tools" if state["messages"][-1].tool_calls else END


graph = StateGraph(MessagesState)
graph.add_node("model", ask)
graph.add_node("tools", ToolNode([get_weather]))
graph.add_edge(START, "model")
graph.add_conditional_edges("model", after_asking, ["tools", END])
graph.add_edge("tools", "model")
agent = graph.compile()

messages = agent.invoke({"messages": [("user", WEATHER_QUESTION)]})["messages"]
kinds = [message.type for message in messages]
say("messages", kinds)
assert kinds[:2] == ["human", "ai"] and kinds[-2:] == ["tool", "ai"], kinds
for call in messages[1].tool_calls:
    say("call", f"{call['name']}({call['args']})")
    assert set(call["args"]) == {"city", "unit"}, call
say("answer", messages[-1].content)
told = agent.stream({"messages": [("user", WEATHER_QUESTION)]}, stream_mode="messages")
chunks = [chunk for chunk, _ in told if chunk.type == "AIMessageChunk"]
called = [part["args"] or "" for chunk in chunks for part in chunk.tool_call_chunks]
say("call streamed", "|".join(called))
assert set(json.loads("".join(called))) == {"city", "unit"}
streamed = [chunk.content for chunk in chunks if chunk.content]
say("stream", "|".join(streamed))
assert "".join(streamed) == messages[-1].content
