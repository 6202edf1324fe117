"""What Python programs do: dictionaries, text, objects, sorting, JSON, numbers. Prints what it computed."""

import json
import re


class Account:
    def __init__(self, name, balance):
        self.name = name
        self.balance = balance
        self.history = []

    def move(self, amount):
        self.balance += amount
        self.history.append(amount)
        return self.balance


def words(count):
    state, found = 12345, {}
    for _ in range(count):
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF
        word = "w%d" % (state % 997)
        found[word] = found.get(word, 0) + 1
    return found


def text(found):
    lines = [" ".join([name] * (1 + number % 3)) for name, number in sorted(found.items())]
    joined = "\n".join(lines)
    return len(re.findall(r"\bw(\d)\1\w*", joined)), joined.upper().count("W9"), len(set(joined.split()))


def objects(count):
    accounts = [Account("a%d" % n, n) for n in range(50)]
    for n in range(count):
        accounts[n % 50].move((n * 7919) % 101 - 50)
    accounts.sort(key=lambda account: (-account.balance, account.name))
    return [(account.name, account.balance) for account in accounts[:3]]


def numbers(count):
    total, x = 0.0, 0.5
    for n in range(1, count):
        x = 3.7 * x * (1.0 - x)
        total += x / n
    primes = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    return round(total, 9), len(primes), pow(3, 4001) % 1000007


found = words(60000)
again = json.loads(json.dumps([{"word": word, "times": times, "half": times / 2} for word, times in found.items()] * 4))
print(len(found), text(found), objects(40000), numbers(60000), sum(entry["half"] for entry in again))
