// The page's beginning: the model, its fields, the key, the colours; then the chat.

import { ApiError, askJson, keys } from "./api.js";
import { Chat } from "./chat.js";
import { announce, byId } from "./dom.js";
import { SettingsPanel } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { newConversation } from "./tree.js";

const THEMES = ["", "light", "dark"];
let model = "";

function tellServer(text, isWrong = false) {
  byId("model").textContent = text;
  byId("model").classList.toggle("is-wrong", isWrong);
}

// Whether there is a key now.
function wantsKey(words) {
  const dialog = byId("key-dialog");
  byId("key-words").textContent = words;
  byId("key").value = keys.get();
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener(
      "close",
      () => {
        const isGiven = dialog.returnValue === "use";
        if (isGiven) keys.set(byId("key").value.trim(), byId("key-keeps").checked);
        resolve(isGiven && Boolean(keys.get()));
      },
      { once: true },
    ),
  );
}

async function findModel() {
  for (;;) {
    try {
      const [card] = (await askJson("v1/models")).data;
      model = card.id;
      const facts = [card.max_model_len && `${card.max_model_len} tokens of context`, card.quantization];
      tellServer([card.id, ...facts.filter(Boolean)].join(" · "));
      return;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      tellServer(error.message, true);
      if (error.status !== 401 || !(await wantsKey(error.message))) return;
    }
  }
}

function watchButtons() {
  const root = document.documentElement;
  byId("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % THEMES.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    localStorage.setItem("enginehouse.theme", next);
    announce(`Colours: ${next || "as the system's"}`);
  });
  byId("set-key").addEventListener("click", async () => {
    if (await wantsKey("The key is sent with every request of this page.")) findModel();
  });
  byId("key-form").addEventListener("submit", () => byId("key-dialog").close("use"));
  byId("key-cancel").addEventListener("click", () => byId("key-dialog").close(""));
  for (const [name, shown] of [["toggle-list", "shows-list"], ["toggle-settings", "shows-settings"]]) {
    byId(name).addEventListener("click", () => {
      const isOn = document.body.classList.toggle(shown);
      byId(name).setAttribute("aria-expanded", isOn);
    });
  }
}

// The engine's and the build's views are loaded when they are first looked at, and ask nothing of the
// server otherwise.
function watchViews() {
  const views = {};
  const load = {
    engine: async () => new (await import("./engine.js")).EngineView(byId("engine"), wantsKey),
    build: async () => new (await import("./build.js")).BuildView(byId("build"), wantsKey),
  };
  async function turn(to) {
    for (const name of ["chat", "engine", "build"]) {
      byId(name).hidden = name !== to;
      byId(`view-${name}`).setAttribute("aria-pressed", name === to);
    }
    if (load[to]) views[to] ??= await load[to]();
    views.engine?.look(to === "engine");
    if (to === "build") await views.build.look();
  }
  for (const name of ["chat", "engine", "build"]) byId(`view-${name}`).addEventListener("click", () => turn(name));
}

async function begin() {
  watchButtons();
  watchViews();
  const fields = await askJson("page/fields.json");
  const conversations = await store.all().catch((error) => {
    byId("kept").textContent = `Conversations are not kept: ${error.message}`;
    return [];
  });
  const panel = new SettingsPanel(byId("settings"), fields, () => sidebar.save(sidebar.current));
  const chat = new Chat({ model: () => model, panel, save: (one) => sidebar.save(one), wantsKey });
  const sidebar = new Sidebar(conversations, (one) => chat.open(one));
  const wanted = conversations.find(({ id }) => `#${id}` === location.hash) ?? conversations[0];
  sidebar.open(wanted ?? newConversation());
  byId("send").disabled = false;
  byId("prompt").focus();
  await findModel();
  document.body.dataset.ready = "true";
}

begin().catch((error) => {
  console.error(error);
  tellServer(`The page did not start: ${error.message}`, true);
});
