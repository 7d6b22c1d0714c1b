// Anthropic's own package for Node: text, its stream helper, a tool in two turns and by its runner.
import Anthropic from "@anthropic-ai/sdk";
import { betaTool } from "@anthropic-ai/sdk/helpers/beta/json-schema";

import { apiKey, baseURL, maxTokens, model, must, question, result, say, sayStream, timeout, weatherQuestion } from "./asked.mjs";

const client = new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey, maxRetries: 0, timeout });

const short = { model, max_tokens: maxTokens, temperature: 0 };
const messages = [{ role: "user", content: question }];
const plain = await client.messages.create({ ...short, messages });
say("plain", plain.content[0].text);
const pieces = [];
const stream = client.messages.stream({ ...short, messages }).on("text", (text) => pieces.push(text));
await stream.finalMessage();
sayStream(pieces, plain.content[0].text);

const city = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"] };
const tools = [{ name: "get_weather", description: "The weather in a city.", input_schema: city }];
const asked = [{ role: "user", content: weatherQuestion }];
const called = await client.messages.stream({ ...short, messages: asked, tools, tool_choice: { type: "any" } }).finalMessage();
const call = called.content.find((block) => block.type === "tool_use");
must(call !== undefined, "no call was made");
say("call", `${call.name}(${JSON.stringify(call.input)})`);
const told = { type: "tool_result", tool_use_id: call.id, content: result };
const answer = await client.messages.create({
  ...short,
  messages: [...asked, { role: "assistant", content: called.content }, { role: "user", content: [told] }],
  tools,
  tool_choice: { type: "none" },
});
say("  and then", answer.content[0].text);

const ran = [];
const run = ({ city: name }) => {
  ran.push(name);
  return result;
};
const get_weather = betaTool({ name: "get_weather", description: "The weather in a city.", inputSchema: city, run });
for (const stream of [false, true]) {
  const fields = { ...short, messages: asked, tools: [get_weather], max_iterations: 2, stream };
  const runner = client.beta.messages.toolRunner({ ...fields, tool_choice: { type: "any" } });
  say(stream ? "runner streamed" : "runner", (await runner.runUntilDone()).stop_reason);
}
say("  ran", `${ran.length} calls`);
must(ran.length >= 2, "the runner ran no tool");
