"""A sibling service that counts on the same hash with redis-py, as its code does: increments, a total, statuses."""
import sys

import redis

port, database, project, successes, failures, total = sys.argv[1:]
client = redis.Redis(port=int(port), db=int(database))
key = f"smap:proj:{project}"
client.set(f"{key}:user", "somebody")
for number in range(int(successes) + int(failures)):
    if number % 10 == 0:
        client.hset(key, "total", total)
        client.hset(key, "status", "CRAWLING")
    if number < int(failures):
        client.hincrby(key, "errors", 1)
    client.hincrby(key, "done", 1)
