// The build's view: what the engine's manifest tells of how it was made. Asked for once.

import { ask, events } from "./api.js";
import { el } from "./dom.js";
import { bytes, card, seconds, table } from "./figures.js";
import { bar, profile } from "./plots.js";

const SHOWN_S = 0.05; // stages that took less are left out
const percent = (value) => `${(value * 100).toFixed(1)} %`;
const span = (value) => (value < 60 ? seconds(value) : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`);

export class BuildView {
  constructor(box, wantsKey) {
    Object.assign(this, { box, wantsKey });
  }

  async look() {
    if (this.isKnown) return;
    const abort = new AbortController();
    try {
      const response = await ask("v1/engine/events", { signal: abort.signal });
      for await (const look of events(response)) {
        if (!look.engine) continue;
        this.isKnown = true;
        this.box.replaceChildren(...sections(look.engine));
        break;
      }
    } catch (error) {
      this.box.replaceChildren(el("p", { class: "is-wrong" }, error.message));
      if (error.status === 401 && (await this.wantsKey(error.message))) await this.look();
    } finally {
      abort.abort();
    }
  }
}

function sections({ info, manifest }) {
  const { build, verify = {}, choices = {} } = manifest ?? {};
  const quality = table([
    ["Form", [choices.quant ?? info.quantization, choices.group_size && `groups of ${choices.group_size}`].filter(Boolean).join(", ")],
    ["KL divergence from the unquantised model", verify.mean_kl !== undefined ? `${verify.mean_kl.toPrecision(3)} in the mean, ${verify.max_kl.toPrecision(3)} at most` : "was not measured"],
    ["Same first choice", verify.top1_agreement !== undefined ? `${percent(verify.top1_agreement)} of ${verify.num_positions} tokens` : null],
  ]);
  if (!build) return [el("p", {}, "The manifest keeps nothing of this engine's build."), cards(card("Quality", quality))];
  return [cards(card("Size", size(build)), card("Quality", quality, errors(build))), cards(...costs(build)), cards(...memory(build.memory))];
}

const cards = (...parts) => el("div", { class: "cards" }, parts);

function bars(rows) {
  return rows.map(([name, words, share, start = 0]) => el("div", { class: "bar-row" }, el("span", {}, name), el("span", {}, words), bar(share, start)));
}

function size({ source_bytes: before, weight_bytes: after, num_parameters: count }) {
  const most = Math.max(before, after, 1);
  const bits = ((8 * after) / Math.max(count, 1)).toFixed(2);
  return [
    ...bars([["Source", bytes(before), before / most], ["Engine", `${bytes(after)}, ${percent(after / Math.max(before, 1))}`, after / most]]),
    el("p", { class: "about" }, `${(count / 1e9).toPrecision(3)} B parameters, ${bits} bits each`),
  ];
}

function errors({ errors: found, errors_of: of }) {
  if (!found.length) return el("p", { class: "about" }, "No layer was rounded while it was converted.");
  const [worst, most] = found.reduce((a, b) => (b[1] > a[1] ? b : a));
  const words = `Error of each layer (${of}), relative, root mean square; most at layer ${worst}: ${percent(most)}`;
  return [el("p", { class: "about" }, words), profile(found, words, percent)];
}

function costs({ stages }) {
  const shown = stages.filter((stage) => stage.seconds >= SHOWN_S);
  const slowest = Math.max(...shown.map((stage) => stage.seconds), 1e-9);
  const fullest = Math.max(...shown.map((stage) => stage.peak_bytes), 1);
  return [
    card("Time of each stage", bars(shown.map(({ name, seconds: took }) => [name, span(took), took / slowest]))),
    card("Peak memory of each stage", bars(shown.map(({ name, peak_bytes: peak }) => [name, bytes(peak), peak / fullest]))),
  ];
}

function memory({ gpu, total, weights, activations, runtime, kv_cache: kv, requests }) {
  const parts = [["Weights", weights], ["Activations, about", activations], ["Runtime, about", runtime], ["KV cache", kv]];
  const whole = Math.max(total, parts.reduce((sum, [, size]) => sum + size, 0));
  const starts = parts.map((_, index) => parts.slice(0, index).reduce((sum, [, size]) => sum + size / whole, 0));
  const most = Math.max(...requests.map(([, count]) => count), 1);
  return [
    card(
      `Each ${gpu}, as planned: ${bytes(total)}`,
      kv ? "" : el("p", { class: "is-wrong" }, `The engine does not fit on a ${gpu}.`),
      bars(parts.map(([name, size], index) => [name, `${bytes(size)}, ${percent(size / total)}`, size / whole, starts[index]])),
    ),
    card("Requests at once by context", bars(requests.map(([context, count]) => [`${context} tokens`, String(count), count / most]))),
  ];
}
