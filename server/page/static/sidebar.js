// The list of conversations: new, open, delete, export and import.

import { announce, button, byId, download, el } from "./dom.js";
import * as store from "./store.js";
import { newConversation, newId } from "./tree.js";

export class Sidebar {
  // open(conversation): shows it.
  constructor(conversations, open) {
    this.conversations = conversations;
    this.show = open;
    this.removed = new Set(); // an answer to one may still be on its way
    this.list = byId("conversations");
    byId("new").addEventListener("click", () => this.begin());
    byId("export").addEventListener("click", () => download("enginehouse-conversations.json", store.exported(this.conversations)));
    const file = byId("import-file");
    byId("import").addEventListener("click", () => file.click());
    file.addEventListener("change", () => this.#import(file));
  }

  begin() {
    const settings = structuredClone(this.current?.settings ?? {});
    this.open(newConversation(settings));
    byId("prompt").focus();
  }

  open(conversation) {
    this.current = conversation;
    document.body.classList.remove("shows-list");
    location.replace(`#${conversation.id}`);
    this.show(conversation);
    this.draw();
  }

  // A conversation is kept from its first message on.
  async save(conversation) {
    if (!conversation.title || this.removed.has(conversation)) return;
    if (!this.conversations.includes(conversation)) this.conversations.unshift(conversation);
    this.draw();
    try {
      await store.save(conversation);
    } catch (error) {
      announce(`The conversation is not kept: ${error.message}`);
      byId("kept").textContent = `Not kept: ${error.message}`;
    }
  }

  async #remove(conversation) {
    this.removed.add(conversation);
    this.conversations.splice(this.conversations.indexOf(conversation), 1);
    await store.remove(conversation.id);
    announce("Conversation deleted");
    if (this.current === conversation) this.begin();
    else this.draw();
  }

  async #import(file) {
    const note = byId("kept");
    try {
      const found = store.imported(await file.files[0].text());
      const known = new Set(this.conversations.map(({ id }) => id));
      for (const conversation of found) {
        if (known.has(conversation.id)) conversation.id = newId();
        await this.save(conversation);
      }
      note.textContent = `${found.length} imported`;
      announce(note.textContent);
    } catch (error) {
      note.textContent = error.message;
      announce(error.message);
    }
    file.value = "";
  }

  draw() {
    this.list.replaceChildren(
      ...this.conversations.map((conversation) => {
        const title = conversation.title || "Untitled";
        const isCurrent = conversation === this.current;
        return el(
          "li",
          { class: isCurrent ? "is-current" : null },
          button(title, () => this.open(conversation), { class: "title", "aria-current": isCurrent ? "true" : null }),
          button("×", () => this.#remove(conversation), { "aria-label": `Delete ${title}` }),
        );
      }),
    );
  }
}
