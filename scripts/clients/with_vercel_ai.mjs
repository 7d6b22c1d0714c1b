// Vercel's AI SDK by its provider for servers that answer as OpenAI's chat completions do.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";

import { apiKey, baseURL, model } from "./asked.mjs";
import { sayCity, talk } from "./vercel.mjs";

const provider = createOpenAICompatible({ name: "enginehouse", baseURL, apiKey, supportsStructuredOutputs: true });
await talk("plain", provider(model));
await sayCity(provider(model));
