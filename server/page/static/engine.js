// The engine's view: looks at /v1/engine/events while it is seen, and draws each.

import { ask, events } from "./api.js";
import { announce, el } from "./dom.js";
import { bytes, card, number, seconds, table } from "./figures.js";
import { Lanes, SPAN_S } from "./lanes.js";
import { blockMap, curve, strip } from "./plots.js";

const AGAIN_MS = 2000;
const CURVE_S = 180;
const MARK_S = 1.5; // how long an end is seen in a lane
const KINDS = { queued: "queued", prefill: "prompt", decode: "answer", preempted: "preempted", cancelled: "cancelled, failed" };

export class EngineView {
  constructor(box, wantsKey) {
    Object.assign(this, { box, wantsKey, lanes: new Lanes(), out: [], into: [], firsts: [], notes: [] });
    this.parts = Object.fromEntries(["state", "numbers", "out", "into", "first", "blocks", "lanes", "engine"].map((name) => [name, el("div")]));
    const { parts } = this;
    box.replaceChildren(
      parts.state,
      el("div", { class: "cards" }, card("Queue and batch", parts.numbers), card("Tokens of answers a second", parts.out), card("Tokens of prompts a second", parts.into), card("Time to the first token", parts.first)),
      el("div", { class: "cards" }, card("Sequences", parts.lanes)),
      el("div", { class: "cards" }, card("KV cache", parts.blocks)),
      el("div", { class: "cards" }, card("Engine", parts.engine)),
    );
    document.addEventListener("visibilitychange", () => this.look(this.isWanted));
  }

  // Nothing is asked of the server while nobody sees it.
  look(isWanted) {
    this.isWanted = isWanted;
    const looks = isWanted && document.visibilityState === "visible";
    if (looks && !this.abort) this.#follow((this.abort = new AbortController()));
    if (!looks && this.abort) {
      this.abort.abort();
      this.abort = null;
    }
  }

  async #follow(abort) {
    while (!abort.signal.aborted) {
      try {
        const response = await ask("v1/engine/events", { signal: abort.signal });
        for await (const look of events(response)) this.#take(look);
      } catch (error) {
        if (error.name === "AbortError") return;
        this.#tell(error.message, true);
        if (error.status === 401 && !(await this.wantsKey(error.message))) return;
      }
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }

  #take(look) {
    const now = performance.now() / 1000;
    if (look.engine) this.#tellEngine(look.engine);
    this.#rates(look, now);
    this.lanes.take(look, now);
    for (const lane of look.ended) if (lane.first_token_s !== null) this.firsts.push([now, lane.first_token_s]);
    const words = look.stands_still ? "The engine stands still while sequences wait." : look.ready ? "The engine takes requests." : "The engine is not there; it starts or is being restarted.";
    if (this.wasReady === true && !look.ready) this.notes.push(`${new Date().toLocaleTimeString()}: the engine was lost`);
    if (this.wasReady === false && look.ready) this.notes.push(`${new Date().toLocaleTimeString()}: the engine is back`);
    if (this.wasReady !== undefined && this.wasReady !== look.ready) announce(words);
    this.wasReady = look.ready;
    this.#tell([words, ...this.notes.slice(-4)].join(" · "), !look.ready || look.stands_still);
    this.#draw(look, now);
  }

  // Counters grow; the host tells them about once a second.
  #rates({ stats }, now) {
    const { last } = this;
    const isSame = last && last.stats.num_iterations === stats.num_iterations && last.stats.num_generated_tokens === stats.num_generated_tokens;
    if (isSame && now - last.now < 1.5) return;
    if (last && stats.num_generated_tokens >= last.stats.num_generated_tokens) {
      const per = (name) => (stats[name] - last.stats[name]) / (now - last.now);
      this.out.push([now, per("num_generated_tokens")]);
      this.into.push([now, per("num_prompt_tokens")]);
    }
    this.last = { stats, now };
    for (const name of ["out", "into", "firsts"]) this[name] = this[name].filter(([s]) => now - s < CURVE_S);
  }

  #tell(words, isWrong) {
    this.parts.state.replaceChildren(el("p", { class: isWrong ? "is-wrong" : null }, words));
  }

  #draw(look, now) {
    const { stats } = look;
    const { parts } = this;
    const limit = this.info?.max_batch_size;
    parts.numbers.replaceChildren(
      table([
        ["Running", `${stats.num_running}${limit ? ` of ${limit} at most` : ""}`],
        ["Waiting", `${stats.num_waiting}${this.info?.max_queue_requests ? ` of ${this.info.max_queue_requests} at most` : ""}`],
        ["Iterations", stats.num_iterations],
        ["Preempted so far", stats.num_preemptions],
        ["Prompt tokens found in the cache", stats.num_cached_tokens],
        ["Drafted tokens that were right", stats.num_draft_tokens ? `${stats.num_accepted_tokens} of ${stats.num_draft_tokens}` : null],
      ]),
    );
    const plot = (points, words, format) => [el("div", { class: "number" }, points.length ? format(points.at(-1)[1]) : "–"), curve(points, CURVE_S, words, format)];
    parts.out.replaceChildren(...plot(this.out, "tokens of answers a second", number));
    parts.into.replaceChildren(...plot(this.into, "tokens of prompts a second", number));
    parts.first.replaceChildren(...plot(this.firsts, "time to the first token", seconds));
    const kept = stats.num_remembered_kv_blocks ?? 0;
    const held = stats.num_kv_blocks - stats.num_free_kv_blocks;
    const counts = { held, kept, free: stats.num_free_kv_blocks - kept };
    const legend = Object.entries({ held: "held by sequences", kept: "kept: prompts that begin alike share them", free: "free" });
    const states = look.kv_blocks;
    const shared = states && [el("span", { class: "key k-shared" }), "held by several."];
    const each = states && states.length < stats.num_kv_blocks ? ` A cell is one of ${(stats.num_kv_blocks / states.length).toFixed(1)} blocks.` : "";
    parts.blocks.replaceChildren(blockMap(counts, states), el("p", { class: "about" }, legend.map(([name, words]) => [el("span", { class: `key k-${name}` }), `${counts[name]} ${words}`]), shared, each));
    this.#drawLanes(look, now);
  }

  #drawLanes(look, now) {
    const { lanes, numMore } = this.lanes.shown();
    const elsewhere = look.stats.num_running + look.stats.num_waiting - look.lanes.length - look.num_more_lanes;
    const legend = el("p", { class: "about" }, `The last ${SPAN_S} s. `, Object.entries(KINDS).map(([name, words]) => [el("span", { class: `key k-${name}` }), words]));
    const rows = lanes.map(({ lane, past, endedAt }) =>
      el(
        "tr",
        {},
        el("td", {}, el("code", {}, lane.request_id.slice(0, 12)), lane.choice ? ` #${lane.choice + 1}` : ""),
        el("td", {}, lane.state),
        el("td", {}, `${lane.num_prompt_tokens}${lane.num_cached_tokens ? ` (${lane.num_cached_tokens} shared)` : ""} + ${lane.num_tokens}`),
        el("td", {}, lane.first_token_s === null ? "–" : seconds(lane.first_token_s)),
        el("td", { class: "strip" }, strip(endedAt === undefined ? past : [...past, { state: "none", from: Math.min(now, endedAt + MARK_S) }], now, SPAN_S)),
      ),
    );
    const head = ["Request", "State", "Tokens", "First token", "Past"].map((words) => el("th", { scope: "col" }, words));
    const more = [numMore + look.num_more_lanes > 0 && `${numMore + look.num_more_lanes} more are not shown.`, elsewhere > 0 && `${elsewhere} more are other workers' or were not begun here.`].filter(Boolean);
    this.parts.lanes.replaceChildren(
      legend,
      rows.length ? el("div", { class: "scrolls", tabindex: 0, role: "region", "aria-label": "sequences" }, el("table", { class: "lanes" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))) : el("p", {}, "None: ask something in the chat."),
      more.length ? el("p", { class: "about" }, more.join(" ")) : "",
    );
  }

  #tellEngine({ info, manifest }) {
    this.info = info;
    const { choices = {}, verify = {}, files, versions } = manifest ?? {};
    const total = Object.values(files ?? {}).reduce((sum, file) => sum + file.bytes, 0);
    this.parts.engine.replaceChildren(
      table([
        ["Model", info.model],
        ["Engine", info.name],
        ["Quantisation", [info.quantization, choices.quant && `(${choices.quant})`, choices.kv_cache_dtype && `KV cache ${choices.kv_cache_dtype}`].filter(Boolean).join(" ")],
        ["Backend", info.backend],
        ["TP × PP", `${info.tp_size} × ${info.pp_size}`],
        ["Context, batch, tokens of an iteration", `${info.max_seq_len}, ${info.max_batch_size}, ${info.max_num_tokens}`],
        ["Queue at most", info.max_queue_requests ? `${info.max_queue_requests} sequences beyond the batch, ${info.max_queue_tokens} tokens of prompts, ${info.max_queue_s} s` : null],
        ["KV cache at most", `${bytes(info.kv_cache_bytes)}, ${info.num_kv_blocks} blocks of ${info.kv_block_size} tokens`],
        ["Files", files ? `${Object.keys(files).length}, ${bytes(total)}` : null],
        ["Built", manifest?.created],
        ["Versions", versions && Object.entries(versions).map(([name, one]) => `${name} ${one}`).join(", ")],
        ["KL divergence from the unquantised model", verify.mean_kl !== undefined ? `${verify.mean_kl.toPrecision(3)} in the mean, ${verify.max_kl.toPrecision(3)} at most` : null],
        ["Same first choice", verify.top1_agreement !== undefined ? `${(verify.top1_agreement * 100).toFixed(1)} % of ${verify.num_positions} tokens` : null],
        ["Digest", info.digest],
      ]),
    );
  }
}
