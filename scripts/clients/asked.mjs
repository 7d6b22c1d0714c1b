// What the Node clients ask, and how an answer is printed: asked.py has the same for Python.
export const { OPENAI_BASE_URL: baseURL, OPENAI_API_KEY: apiKey, MODEL: model } = process.env;
export const maxTokens = 64;
export const timeout = 60_000;
export const question = "What is the capital of France?";
export const weatherQuestion = "What is the weather in Paris?";
export const result = JSON.stringify({ celsius: 18, sky: "clear" });

export function say(title, told) {
  console.log(`  ${title.padEnd(24)} ${typeof told === "string" ? told : JSON.stringify(told)}`);
}

export function must(held, told) {
  if (!held) throw new Error(told);
}

export function sayStream(pieces, plain) {
  say("stream", pieces.filter(Boolean).join("|"));
  must(pieces.join("") === plain, "the stream says something else");
}
