// The official Node client over the Responses API: text, its stream helper, a kept turn, a streamed call, zod's parse.
import OpenAI from "openai";
import { zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

import { apiKey, baseURL, maxTokens, model, must, question, result, say, sayStream, timeout, weatherQuestion } from "./asked.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout });
const short = { model, max_output_tokens: maxTokens, temperature: 0 };

const plain = await client.responses.create({ ...short, input: question });
say("plain", plain.output_text);
const pieces = [];
const stream = client.responses.stream({ ...short, input: question }).on("response.output_text.delta", (event) => pieces.push(event.delta));
must((await stream.finalResponse()).output_text === plain.output_text, "the last event says something else");
sayStream(pieces, plain.output_text);
const later = await client.responses.create({ ...short, input: "And of Italy?", previous_response_id: plain.id });
say("goes on", later.output_text);

const parameters = { type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", name: "get_weather", description: "The weather in a city.", parameters, strict: true }];
const deltas = [];
const asked = await client.responses
  .stream({ ...short, input: weatherQuestion, tools, tool_choice: "required" })
  .on("response.function_call_arguments.delta", (event) => deltas.push(event.delta))
  .finalResponse();
const call = asked.output.find((item) => item.type === "function_call");
must(call !== undefined, "no call was made");
say("call", `${call.name}(${call.arguments}), in ${deltas.length} pieces`);
must(deltas.join("") === call.arguments, "the pieces are not the arguments");
const input = [{ type: "function_call_output", call_id: call.call_id, output: result }];
const answer = await client.responses.create({ ...short, input, previous_response_id: asked.id, tools, tool_choice: "none" });
say("  and then", answer.output_text);

const City = z.object({ name: z.string().max(16), country: z.string().max(16) });
const parsed = await client.responses.parse({ ...short, input: question, text: { format: zodTextFormat(City, "city") } });
say("parse", parsed.output_parsed);
City.parse(parsed.output_parsed);

await client.responses.delete(plain.id);
const gone = await client.responses.retrieve(plain.id).catch((error) => error);
must(gone instanceof OpenAI.NotFoundError, "a response that was deleted is still there");
say("deleted", gone.code);
