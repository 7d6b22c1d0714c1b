// What each sequence did in the last minute: from looks, one after the other. Knows no page.

const LASTS_S = 60;
const MOST = 64;

export class Lanes {
  #lanes = new Map();

  take(look, now) {
    const seen = new Set();
    for (const lane of [...look.ended, ...look.lanes]) {
      const key = `${lane.request_id}/${lane.choice}`;
      seen.add(key);
      const known = this.#lanes.get(key) ?? { key, past: [] };
      this.#lanes.set(key, known);
      if (!known.past.length) this.#begin(known, lane, now);
      if (known.past.at(-1).state !== lane.state) known.past.push({ state: lane.state, from: now });
      known.lane = lane;
      if (look.ended.includes(lane)) known.endedAt = now;
    }
    for (const [key, known] of this.#lanes) {
      // A worker that has gone told no end.
      if (!seen.has(key) && known.endedAt === undefined) known.endedAt = now;
      if (now - (known.endedAt ?? now) > LASTS_S) this.#lanes.delete(key);
    }
  }

  // What was between two looks is told by the times of the lane itself.
  #begin(known, { state, age_s: age, first_token_s: first }, now) {
    const began = now - age;
    known.past.push({ state: state === "queued" ? "queued" : "prefill", from: began });
    if (first !== null) known.past.push({ state: "decode", from: began + first });
  }

  // Running ones first, each group by age.
  shown() {
    const all = [...this.#lanes.values()];
    const rank = (one) => [one.endedAt === undefined ? 0 : 1, -one.past[0].from];
    all.sort((a, b) => rank(a)[0] - rank(b)[0] || rank(a)[1] - rank(b)[1]);
    return { lanes: all.slice(0, MOST), numMore: Math.max(0, all.length - MOST) };
  }
}

export const SPAN_S = LASTS_S;
