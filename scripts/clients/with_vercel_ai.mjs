// Vercel's AI SDK: text, a stream, a tool in two steps, an object by its schema.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { apiKey, baseURL, maxTokens, model, must, question, result, say, sayStream, timeout, weatherQuestion } from "./asked.mjs";

const provider = createOpenAICompatible({ name: "enginehouse", baseURL, apiKey, supportsStructuredOutputs: true });

const short = {
  model: provider(model),
  maxOutputTokens: maxTokens,
  temperature: 0,
  maxRetries: 0,
  abortSignal: AbortSignal.timeout(timeout),
};
const plain = await generateText({ ...short, prompt: question });
say("plain", plain.text);
const pieces = [];
for await (const piece of streamText({ ...short, prompt: question }).textStream) pieces.push(piece);
sayStream(pieces, plain.text);

const get_weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async () => result,
});
for (const ask of [generateText, streamText]) {
  const asked = await ask({
    ...short,
    prompt: weatherQuestion,
    tools: { get_weather },
    stopWhen: stepCountIs(2),
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
  });
  const [first] = await asked.steps;
  for (const call of first.toolCalls) say(`call, ${ask.name}`, `${call.toolName}(${JSON.stringify(call.input)})`);
  must(first.toolResults.length > 0, "no call was made");
  say("  and then", await asked.text);
}

const City = z.object({ name: z.string().max(16), country: z.string().max(16) });
const { output } = await generateText({ ...short, prompt: question, output: Output.object({ schema: City }) });
say("object", output);
City.parse(output);
