// Conversations, in this browser's IndexedDB and nowhere else.

import { read } from "./tree.js";

const NAME = "enginehouse";
const STORE = "conversations";
let opened;

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function store(mode) {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return (await opened).transaction(STORE, mode).objectStore(STORE);
}

export async function all() {
  const values = await done((await store("readonly")).getAll());
  return values.map(read).filter(Boolean).sort((a, b) => b.changed - a.changed);
}

export const save = async (conversation) => done((await store("readwrite")).put(conversation));
export const remove = async (id) => done((await store("readwrite")).delete(id));

export const exported = (conversations) =>
  JSON.stringify({ format: "enginehouse.conversations", version: 1, conversations }, null, 1);

// Those of a file that this page wrote; an Error in words for any other.
export function imported(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`The file is no JSON: ${error.message}`);
  }
  if (value?.format !== "enginehouse.conversations" || !Array.isArray(value.conversations))
    throw new Error("The file holds no conversations; wanted one that this page exported.");
  const found = value.conversations.map(read);
  if (found.includes(null)) throw new Error("A conversation of the file is damaged; nothing was imported.");
  return found;
}
