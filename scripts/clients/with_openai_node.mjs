// The official Node client: plain, a stream, its tool runner, its zod helper, its errors.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { apiKey, baseURL, maxTokens, model, must, question, result, say, sayStream, timeout, weatherQuestion } from "./asked.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout });

const messages = [{ role: "user", content: question }];
const short = { model, max_tokens: maxTokens, temperature: 0 };
const plain = await client.chat.completions.create({ ...short, messages });
say("plain", plain.choices[0].message.content);
const pieces = [];
for await (const chunk of await client.chat.completions.create({ ...short, messages, stream: true })) {
  pieces.push(chunk.choices[0]?.delta?.content ?? "");
}
sayStream(pieces, plain.choices[0].message.content);

const tool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] },
  },
};
const asked = [{ role: "user", content: weatherQuestion }];
for (const stream of [false, true]) {
  const fields = { ...short, messages: asked, tools: [tool], tool_choice: "required" };
  const answer = stream
    ? await client.chat.completions.stream(fields).finalChatCompletion()
    : await client.chat.completions.create(fields);
  const { message } = answer.choices[0];
  for (const call of message.tool_calls) {
    say(stream ? "call streamed" : "call", `${call.function.name}(${call.function.arguments})`);
    must("city" in JSON.parse(call.function.arguments), "no city");
  }
  const results = message.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: result }));
  const then = await client.chat.completions.create({ ...short, messages: [...asked, message, ...results] });
  say("  and then", then.choices[0].message.content);
}

const City = z.object({ name: z.string().max(16), country: z.string().max(16) });
const parsed = await client.chat.completions.parse({ ...short, messages, response_format: zodResponseFormat(City, "city") });
say("parsed", parsed.choices[0].message.parsed);
City.parse(parsed.choices[0].message.parsed);

const refused = await client.chat.completions.create({ ...short, messages, temperature: 3 }).catch((error) => error);
say("refused", `${refused.constructor.name} ${refused.status} param=${refused.param}`);
must(refused instanceof OpenAI.BadRequestError, "a temperature of 3 was taken");
