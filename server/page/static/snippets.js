// A request as code that sends it. The key is never written: each reads it from the environment.

const OPENAI = new Set([
  "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "stop", "n",
  "presence_penalty", "frequency_penalty", "seed", "user", "logprobs", "top_logprobs", "response_format",
  "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort",
]);

export const LANGUAGES = { curl, Python: python, JavaScript: javaScript };

function curl(body, base) {
  const json = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -N ${base}/chat/completions \\
  -H 'Content-Type: application/json' \\
  -H "Authorization: Bearer $ENGINEHOUSE_API_KEY" \\
  -d '${json}'
`;
}

function python(body, base) {
  const { stream, stream_options: options, ...asked } = body;
  const known = Object.entries(asked).filter(([name]) => OPENAI.has(name));
  const more = Object.fromEntries(Object.entries(asked).filter(([name]) => !OPENAI.has(name)));
  if (Object.keys(more).length) known.push(["extra_body", more]);
  const lines = known.map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base)}, api_key=os.environ.get("ENGINEHOUSE_API_KEY", "-"))
answer = client.chat.completions.create(
${lines.join("\n")}
)
for choice in answer.choices:
    print(choice.message.content or choice.message.tool_calls)
`;
}

// A JSON value as Python writes it.
function literal(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return ascii(value);
  const deeper = `${indent}    `;
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, deeper))
    : Object.entries(value).map(([name, item]) => `${ascii(name)}: ${literal(item, deeper)}`);
  if (!items.length) return open + close;
  return `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}`;
}

// JSON's escapes are Python's, but for pairs of surrogates.
function ascii(value) {
  return JSON.stringify(value).replace(/[\u2028\u2029]/g, (char) => `\\u${char.charCodeAt(0).toString(16)}`);
}

function javaScript(body, base) {
  const { stream, stream_options: options, ...asked } = body;
  return `const response = await fetch(${JSON.stringify(`${base}/chat/completions`)}, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",
    Authorization: \`Bearer \${globalThis.process?.env.ENGINEHOUSE_API_KEY ?? "-"}\`,
  },
  body: JSON.stringify(${JSON.stringify(asked, null, 2).replaceAll("\n", "\n  ")}),
});
const answer = await response.json();
if (!response.ok) throw new Error(answer.error.message);
for (const { message } of answer.choices) console.log(message.content ?? message.tool_calls);
`;
}
