// What each provider of Vercel's AI SDK is asked: text, a stream, a tool in two steps, an object by its schema.
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import { maxTokens, must, question, result, say, sayStream, timeout, weatherQuestion } from "./asked.mjs";

const get_weather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({ city: z.string().max(20) }),
  execute: async () => result,
});
const City = z.object({ name: z.string().max(16), country: z.string().max(16) });

const short = (model) => ({
  model,
  maxOutputTokens: maxTokens,
  temperature: 0,
  maxRetries: 0,
  abortSignal: AbortSignal.timeout(timeout),
});

export async function talk(name, model) {
  const asking = short(model);
  const plain = await generateText({ ...asking, prompt: question });
  say(name, plain.text);
  const pieces = [];
  for await (const piece of streamText({ ...asking, prompt: question }).textStream) pieces.push(piece);
  sayStream(pieces, plain.text);
  for (const ask of [generateText, streamText]) {
    const asked = await ask({
      ...asking,
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
}

export async function sayCity(model) {
  const { output } = await generateText({ ...short(model), prompt: question, output: Output.object({ schema: City }) });
  say("object", output);
  City.parse(output);
}
