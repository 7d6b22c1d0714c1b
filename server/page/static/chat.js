// The chat: what is on the page of one conversation, and what sends and stops.

import { Gathering, inWords } from "./answer.js";
import { ApiError, apiUrl, ask, events } from "./api.js";
import { announce, byId, el } from "./dom.js";
import { AssistantView, copyAs, resultsForm, toolBox, userBox } from "./message.js";
import { bodyOf } from "./request.js";
import { add, branches, chosen, lastId, path, turn } from "./tree.js";

const SAVE_MS = 1000;
const NEAR_PX = 80;
const NOTES = { "X-Ignored-Fields": "without effect", "X-Unenforced-Schema": "not enforced of the schema", "X-Repaired-Messages": "mended" };

export class Chat {
  // model(): its name. panel: of settings. save(conversation). wantsKey(): asks for one, resolves to
  // whether there is one now.
  constructor({ model, panel, save, wantsKey }) {
    Object.assign(this, { model, panel, save, wantsKey });
    this.running = null;
    this.list = byId("messages");
    this.box = byId("prompt");
    this.form = byId("composer");
    this.form.addEventListener("submit", (event) => (event.preventDefault(), this.running ? this.stop() : this.send()));
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.send();
      }
    });
    this.box.addEventListener("input", () => this.#fit());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.running && !document.querySelector("dialog[open]") && this.stop());
    byId("copy-next").append(copyAs(() => this.#nextBody(), apiUrl("v1")));
  }

  open(conversation) {
    this.stop();
    this.conversation = conversation;
    this.panel.show(conversation.settings);
    this.draw();
    this.list.scrollTop = this.list.scrollHeight;
  }

  draw() {
    const { conversation } = this;
    const nodes = path(conversation);
    const names = {};
    const boxes = nodes.map((node) => {
      const branch = branches(conversation, node);
      const turnTo = (step) => this.#change(() => turn(conversation, node, step));
      if (node.role === "user") return userBox(node, { turn: turnTo, edit: (text) => this.#edit(node, text) }, branch);
      if (node.role === "tool") return toolBox(node, names[node.callId] ?? node.callId);
      for (const { id, name } of chosen(node).calls) names[id] = name;
      return (node === this.running?.node ? this.running.view : this.#view(node, branch, turnTo)).box;
    });
    const last = nodes.at(-1);
    if (last?.role === "assistant" && chosen(last).calls.length && last !== this.running?.node) {
      const { calls } = chosen(last);
      boxes.push(resultsForm(calls, (texts) => this.#results(last, calls, texts)));
    }
    if (!boxes.length) boxes.push(el("p", { class: "empty" }, "Ask the model something. What you write stays in this browser, and goes to this server alone."));
    const isNear = this.#isNearEnd();
    this.list.replaceChildren(...boxes);
    if (isNear) this.list.scrollTop = this.list.scrollHeight;
  }

  #isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.list;
    return scrollHeight - scrollTop - clientHeight < NEAR_PX;
  }

  #view(node, branch, turnTo) {
    const { conversation } = this;
    return new AssistantView(
      node,
      {
        turn: turnTo,
        regenerate: () => this.#answer(node.parent),
        choose: (index) => this.#change(() => (node.chosen = index)),
        bodyOf: (one) => ({ ...bodyOf(conversation, one.parent, this.model()), ...one.facts.asked }),
        base: apiUrl("v1"),
      },
      branch,
    );
  }

  #change(work) {
    if (this.running) return;
    work();
    this.save(this.conversation);
    this.draw();
  }

  send() {
    const text = this.box.value;
    if (!text.trim() || !this.panel.check()) return;
    const node = add(this.conversation, lastId(this.conversation), { role: "user", content: text });
    this.box.value = "";
    this.#fit();
    this.#answer(node.id);
  }

  #edit(node, text) {
    if (!text.trim() || this.running || !this.panel.check()) return;
    this.#answer(add(this.conversation, node.parent, { role: "user", content: text }).id);
  }

  #results(node, calls, texts) {
    let parent = node.id;
    calls.forEach(({ id }, index) => (parent = add(this.conversation, parent, { role: "tool", callId: id, content: texts[index] }).id));
    this.#answer(parent);
  }

  #nextBody() {
    const body = bodyOf(this.conversation, lastId(this.conversation), this.model());
    const text = this.box.value.trim();
    if (text) body.messages.push({ role: "user", content: text });
    return body;
  }

  stop() {
    this.running?.abort.abort();
  }

  // A new branch below `parent`: the model's answer to all before it.
  async #answer(parent) {
    if (this.running || !this.panel.check()) return;
    const { conversation } = this;
    const body = bodyOf(conversation, parent, this.model());
    const gathering = new Gathering(body.n ?? 1, performance.now());
    const { messages, ...asked } = body;
    const node = add(conversation, parent, { role: "assistant", answers: gathering.answers, chosen: 0, facts: gathering.facts });
    node.facts.asked = asked;
    const turnTo = (step) => this.#change(() => turn(conversation, node, step));
    const view = this.#view(node, branches(conversation, node), turnTo);
    const running = { node, view, abort: new AbortController() };
    this.running = running;
    this.#state();
    this.draw();
    this.list.scrollTop = this.list.scrollHeight;
    announce("The answer is being written");
    try {
      await this.#stream(body, gathering, running, conversation);
    } catch (error) {
      this.#fail(error, node);
    } finally {
      this.running = null;
      this.save(conversation);
      this.#state();
      if (this.conversation === conversation) this.draw();
    }
    this.#tellEnd(node);
  }

  async #stream(body, gathering, { node, view, abort }, conversation) {
    let savedAt = performance.now();
    let isDue = false;
    const draw = () => {
      isDue = false;
      if (this.running?.node !== node) return;
      const isNear = this.#isNearEnd();
      view.update(true);
      if (isNear) this.list.scrollTop = this.list.scrollHeight;
    };
    const response = await this.#asked(body, abort.signal, node);
    node.facts.requestId = response.headers.get("X-Request-Id");
    node.facts.notes = Object.entries(NOTES).filter(([name]) => response.headers.get(name)).map(([name, words]) => `${words}: ${decodeURIComponent(response.headers.get(name))}`);
    for await (const event of events(response)) {
      const now = performance.now();
      gathering.take(event, now);
      if (!isDue) requestAnimationFrame(draw);
      isDue = true;
      if (now - savedAt > SAVE_MS) {
        savedAt = now;
        this.save(conversation);
      }
    }
  }

  // Once more where the server wants a key, and now there is one.
  async #asked(body, signal, node) {
    try {
      return await ask("v1/chat/completions", { body, signal });
    } catch (error) {
      if (error.status !== 401 || !(await this.wantsKey(error.message))) throw error;
      node.facts.begun = performance.now();
      return ask("v1/chat/completions", { body, signal });
    }
  }

  #fail(error, node) {
    if (error.name === "AbortError") {
      node.facts.stopped = true;
      return;
    }
    if (!(error instanceof ApiError)) console.error(error);
    node.facts.error = error.message;
    node.facts.requestId = error.requestId ?? node.facts.requestId;
    this.panel.tell(error.param, error.message);
  }

  #tellEnd({ facts, answers }) {
    if (facts.error) return; // its box is an alert
    const words = inWords(facts, answers.length).join(", ");
    announce(facts.stopped ? "Stopped" : `The answer: ${answers[0].text.slice(0, 600)} ${words}`);
  }

  #state() {
    const button = byId("send");
    button.textContent = this.running ? "Stop" : "Send";
    button.classList.toggle("is-stop", Boolean(this.running));
  }

  #fit() {
    this.box.style.height = "auto";
    this.box.style.height = `${Math.min(this.box.scrollHeight + 2, window.innerHeight / 3)}px`;
  }
}
