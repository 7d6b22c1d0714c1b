// compatcanary, a judge: every one of its probes of chat completions and Responses, by its own code.
import { scanEndpoint } from "compatcanary";

import { apiKey, baseURL, model, must, say, timeout } from "./asked.mjs";

const report = await scanEndpoint({ baseUrl: baseURL, apiKey, model, timeoutMs: timeout });
for (const probe of report.results) say(probe.id, `${probe.status}: ${probe.summary}`);
say("score", `${report.score} of 100`);
must(report.results.length > 0 && report.results.every((probe) => probe.status === "pass"), "not every probe passed");
