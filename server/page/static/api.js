// The server, as any client has it: keys, errors in words, streams. Paths are relative to the page's,
// so that it works behind a proxy's prefix.

import { EventDecoder } from "./sse.js";

const KEY = "enginehouse.key";

export const apiUrl = (path) => new URL(path, document.baseURI).href;

export const keys = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  set(key, keeps) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (key) (keeps ? localStorage : sessionStorage).setItem(KEY, key);
  },
};

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, param = null, requestId = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, requestId });
  }
}

function headers(hasBody) {
  const key = keys.get();
  return {
    ...(hasBody ? { "Content-Type": "application/json" } : {}),
    ...(key ? { Authorization: `Bearer ${key}` } : {}),
  };
}

// The answer; ApiError for what the server refuses, or where there is none.
export async function ask(path, { body, signal } = {}) {
  let response;
  try {
    response = await fetch(apiUrl(path), {
      method: body === undefined ? "GET" : "POST",
      headers: headers(body !== undefined),
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-cache",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const askJson = async (path) => (await ask(path)).json();

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const { message, code, param } = told?.error ?? {};
  const wait = response.headers.get("Retry-After");
  const words = message ?? `The server answered with status ${response.status}.`;
  return new ApiError(wait ? `${words} Try again in ${wait} s.` : words, {
    status: response.status,
    code,
    param,
    requestId: response.headers.get("X-Request-Id"),
  });
}

// Each event's data, as JSON; ends at [DONE]. ApiError for one that is told in mid-stream.
export async function* events(response) {
  const requestId = response.headers.get("X-Request-Id");
  const decoder = new EventDecoder();
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        throw new ApiError("The connection broke before the answer's end.", { requestId });
      });
      if (done) return;
      for (const data of decoder.decode(value)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) {
          const { message, code, param } = event.error;
          throw new ApiError(message, { code, param, requestId });
        }
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
