// Events of a stream -> the answers so far, and what they took. Knows no page.

const emptyAnswer = () => ({ text: "", reasoning: "", calls: [], tokens: [], finish: "" });

export class Gathering {
  constructor(count, now) {
    this.answers = Array.from({ length: count }, emptyAnswer);
    this.facts = { begun: now };
  }

  take(event, now) {
    const { facts } = this;
    if (event.model) facts.model = event.model;
    for (const choice of event.choices ?? []) {
      const answer = this.answers[choice.index];
      const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
      if (content || reasoning || calls?.length) {
        facts.first ??= now;
        facts.last = now;
      }
      answer.text += content ?? "";
      answer.reasoning += reasoning ?? "";
      for (const call of calls ?? []) takeCall(answer, call);
      for (const { token, logprob, top_logprobs: top } of choice.logprobs?.content ?? [])
        answer.tokens.push({ token, logprob, top: top.map((one) => ({ token: one.token, logprob: one.logprob })) });
      if (choice.finish_reason) answer.finish = choice.finish_reason;
    }
    if (event.usage) {
      facts.promptTokens = event.usage.prompt_tokens;
      facts.tokens = event.usage.completion_tokens;
      facts.cost = event.usage.estimated_cost;
    }
  }
}

function takeCall(answer, { index, id, function: called }) {
  const call = (answer.calls[index] ??= { id: "", name: "", text: "" });
  call.id ||= id ?? "";
  call.name ||= called?.name ?? "";
  call.text += called?.arguments ?? "";
}

// "12 tokens · 30.1 tokens/s · first after 80 ms · $0.000012"
export function inWords({ begun, first, last, tokens, promptTokens, cost }, count) {
  const words = [];
  if (tokens !== undefined) words.push(`${promptTokens} + ${tokens} tokens`);
  if (tokens > count && last > first)
    words.push(`${(((tokens - count) * 1000) / (last - first)).toFixed(1)} tokens/s`);
  if (first !== undefined) words.push(`first after ${time(first - begun)}`);
  if (last !== undefined) words.push(`${time(last - begun)} in all`);
  if (cost !== undefined) words.push(`$${cost.toFixed(8).replace(/0+$/, "").replace(/\.$/, "")}`);
  return words;
}

const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
