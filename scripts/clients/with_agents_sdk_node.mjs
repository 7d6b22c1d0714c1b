// OpenAI's agents SDK for Node over Responses, its default, and over chat completions.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, run, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { z } from "zod";

import { apiKey, baseURL, maxTokens, model, must, question, result, say, timeout, weatherQuestion } from "./asked.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout });
setTracingDisabled(true);
const byResponses = new OpenAIResponsesModel(client, model);
const byChat = new OpenAIChatCompletionsModel(client, model);

const get_weather = tool({
  name: "get_weather",
  description: "The weather in a city.",
  parameters: z.object({ city: z.string().max(20) }),
  execute: async () => result,
});
const City = z.object({ name: z.string().max(16), country: z.string().max(16) });
const modelSettings = { temperature: 0, maxTokens };

for (const by of [byResponses, byChat]) {
  say("by", by.constructor.name);
  const weather = new Agent({
    name: "weather",
    model: by,
    tools: [get_weather],
    modelSettings: { ...modelSettings, toolChoice: "required" },
    toolUseBehavior: "stop_on_first_tool", // else the model says when it calls no more
  });
  const called = await run(weather, weatherQuestion, { maxTurns: 3 });
  say("items", called.newItems.map((item) => item.type));
  must(called.finalOutput === result, "the tool's result is not the answer");
  const streamed = await run(weather, weatherQuestion, { maxTurns: 3, stream: true });
  let events = 0;
  for await (const _ of streamed) events += 1;
  await streamed.completed;
  say("streamed", `${events} events: ${streamed.finalOutput}`);
  must(streamed.finalOutput === called.finalOutput, "the stream says something else");
  const words = new Agent({ name: "words", model: by, modelSettings });
  say("answer", (await run(words, called.history)).finalOutput);
  const city = new Agent({ name: "city", model: by, outputType: City, modelSettings });
  const { finalOutput } = await run(city, question);
  say("output type", finalOutput);
  City.parse(finalOutput);
}
