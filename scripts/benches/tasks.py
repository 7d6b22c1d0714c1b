"""What people ask of a model: things whose answers quote them, and things whose answers do not.

Texts and programs are ours, but for a sentence of Newton's Opticks. Knows no tokenizer.
"""

from __future__ import annotations

_TEXTS = (
    "The harbour of Lindmouth was built in 1871 by the engineer Clara Voss. It has three stone "
    "quays, a lighthouse of 42 metres and a dry dock for ships of up to 90 metres. In 1932 a storm "
    "broke the outer wall, and it was rebuilt in concrete within two years. Today fishing boats "
    "share the harbour with a ferry that crosses to the island of Tarn four times a day.",
    "By the Rays of Light I understand its least Parts, and those as well Successive in the same "
    "Lines, as Contemporary in several Lines. For it is manifest that Light consists of Parts, "
    "both Successive and Contemporary; because in the same place you may stop that which comes one "
    "moment, and let pass that which comes presently after.",
    "The meeting on Tuesday decided three things. The release of version 2.4 moves to the 14th of "
    "March, because the import of old invoices fails on files above two gigabytes. Ana writes the "
    "new importer and Piotr tests it on the archive of 2019. Until then support tells customers to "
    "split their files, and the page on imports says so in its first line.",
    "Tea comes from the leaves of Camellia sinensis, a shrub that grows best in warm and rainy "
    "hills. Green tea is heated soon after it is picked, which keeps it green; black tea is rolled "
    "and left to oxidise until it turns dark. Oolong lies between the two. The water should be "
    "cooler for green tea, about 75 degrees, and nearly boiling for black tea.",
)
_TOTAL = """def total(prices, tax):
    result = 0
    for price in prices:
        result += price
    return result * (1 + tax)


def average(prices):
    result = 0
    for price in prices:
        result += price
    return result / len(prices)
"""
_ACCOUNT = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        self.balance = self.balance + amount

    def withdraw(self, amount):
        self.balance = self.balance - amount
"""
_USERS = """import json


def read_users(path):
    with open(path) as file:
        users = json.load(file)
    names = []
    for user in users:
        if user['active']:
            names.append(user['name'])
    return names
"""
_WORDS = """function countWords(text) {
  const words = text.split(' ');
  const counts = {};
  for (const word of words) {
    if (counts[word]) {
      counts[word] += 1;
    } else {
      counts[word] = 1;
    }
  }
  return counts;
}
"""
_EDITS = {
    "Rename `result` to `sum_of_prices`": _TOTAL,
    "Add a docstring to each method": _ACCOUNT,
    "Rename `names` to `active_names`": _USERS,
    "Rename `counts` to `numberOf`": _WORDS,
}

TASKS: dict[str, list[str]] = {
    "summarise": [f"Summarize this text:\n\n{text}" for text in _TEXTS],
    "quote": [
        f"{text}\n\nRepeat the text above word for word, without any comment." for text in _TEXTS
    ],
    "edit code": [
        f"{edit} in this code, and write all of it again:\n\n```\n{code}```"
        for edit, code in _EDITS.items()
    ],
    "chat": [
        "Tell me a story about a fox who learns to sail.",
        "What should I think of before I adopt a dog?",
        "Explain why the sky is blue to a child of ten.",
        "I have been tired lately. How can I sleep better?",
    ],
}
