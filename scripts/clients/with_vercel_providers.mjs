// Vercel's AI SDK by its OpenAI provider, which asks the Responses API, and by its Anthropic one.
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";

import { apiKey, baseURL, model } from "./asked.mjs";
import { sayCity, talk } from "./vercel.mjs";

const openai = createOpenAI({ baseURL, apiKey });
const anthropic = createAnthropic({ baseURL, apiKey });
await talk("openai", openai(model));
await talk("anthropic", anthropic(model));
await sayCity(openai(model));
