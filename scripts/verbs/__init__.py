"""What a person types -> what the floors do: the front door `enginehouse`, a file for each verb.

Stands above all three floors and may import each of them; nothing imports it. Does not know how
anything is done: a verb reads flags, calls the floor that does it, and prints. Nothing heavy is
imported before the verb that needs it runs. Read `main.py` first, then `base.py`.
"""
