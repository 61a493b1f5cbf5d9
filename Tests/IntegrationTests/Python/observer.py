"""Watches the demo from outside: pika and redis-py, nothing of ours. Reads the demo's summary from standard input once the
demo has ended, and checks it against what was seen on the wire and what Redis holds."""
import json
import os
import re
import sys
import threading

import pika
import redis

parameters = pika.URLParameters(os.environ["RABBITMQ_URL"])
topic, legacy = [], []


def watch(exchange, kind, key, seen, ready, stop):
    connection = pika.BlockingConnection(parameters)
    channel = connection.channel()
    channel.exchange_declare(exchange, kind, durable=True)
    queue = channel.queue_declare("", exclusive=True).method.queue
    channel.queue_bind(queue, exchange, key)
    ready.set()
    for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=1):
        if method is not None:
            seen.append((method.routing_key, properties, body))
        elif stop.is_set():
            break
    connection.close()


stop = threading.Event()
threads = []
for arguments in [("smap.events", "topic", "#", topic), ("smtp_send_email_exc", "fanout", "", legacy)]:
    ready = threading.Event()
    # They end with this program, also when it fails.
    thread = threading.Thread(target=watch, args=(*arguments, ready, stop), daemon=True)
    thread.start()
    if not ready.wait(60):
        sys.exit(f"{arguments[0]} could not be watched")
    threads.append(thread)
print("ready", flush=True)

summary = json.loads(sys.stdin.readline())
stop.set()
for thread in threads:
    thread.join()

problems = []


def check(condition, what):
    if not condition:
        problems.append(what)


EVENT_ID = re.compile(r"^evt_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$")
TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
completed, project, brands = [], None, []
for key, properties, body in topic:
    envelope = json.loads(body)
    payload = envelope["payload"]
    check(set(envelope) == {"event_id", "timestamp", "payload"}, f"envelope keys {sorted(envelope)}")
    check(EVENT_ID.match(envelope["event_id"]), f"event_id {envelope['event_id']}")
    check(TIMESTAMP.match(envelope["timestamp"]), f"timestamp {envelope['timestamp']}")
    check(payload["routing_key"] == key and payload["action"] == key.split(".", 1)[1], f"routing key {key}")
    check(payload["service"] == "demo" and isinstance(payload["data"], dict), "service and data")
    check(None not in payload.values(), "no null in the payload")
    check(properties.content_type == "application/json" and properties.delivery_mode == 2, "content type, persistence")
    check(properties.message_id == envelope["event_id"] and properties.type == key, "message_id and type")
    check(properties.app_id == "demo" and properties.timestamp is not None, "app_id and timestamp")
    check(properties.headers.get("x-smap-schema-version") == 1, "schema version header")
    if key == "project.created":
        project = payload["project_id"]
        brands.append(payload["brand_name"])
        check(payload["data"]["brand_name"] == payload["brand_name"], "both shapes agree")
    if key == "job.completed":
        completed.append(envelope)

check(len(topic) == summary["published"] == summary["confirmed"], f"{len(topic)} seen on smap.events")
check(brands == ["VinFast"], f"payload.brand_name {brands}")
check(len(completed) == 1, f"{len(completed)} job.completed")
for envelope in completed:
    check(envelope["event_id"] == summary["finish_event_id"], "the finish's event id")
    data = envelope["payload"]["data"]
    check([data[k] for k in ("total", "done", "errors")] == [summary[k] for k in ("total", "done", "errors")], f"{data}")

mails = {p.message_id for k, p, b in topic if k == "email.verification.requested"}
check(len(legacy) == summary["legacy_delivered"] == summary["topic_delivered"] == len(mails), f"{len(legacy)} legacy")
for key, properties, body in legacy:
    message = json.loads(body)
    check(list(message) == ["Subject", "Recipient", "Body", "ReplyTo", "CcAddresses", "Attachments"], f"{list(message)}")
    check(key == "" and properties.content_type == "text/plain", "legacy key and content type")
    check(properties.message_id in mails, "one id on both legs")
    check(properties.headers["x-smap-event-id"] == properties.message_id, "legacy header")

state = redis.Redis(os.environ["REDIS_HOST"], int(os.environ["REDIS_PORT"]), db=1, decode_responses=True)
fields = state.hgetall(f"smap:proj:{project}")
check(fields.get("status") == "DONE", f"status {fields.get('status')}")
for name in ("total", "done", "errors"):
    check(int(fields.get(name, -1)) == summary[name], f"{name} {fields.get(name)} in Redis")
check(0 < state.ttl(f"smap:proj:{project}") <= 604800, "the hash has its time to live again")
check(state.scard("smap:finish:pending") == 0, "nothing is pending")

for problem in sorted(set(problems)):
    print(problem)
print(f"{len(topic)} topic, {len(legacy)} legacy, {len(problems)} problems")
sys.exit(1 if problems else 0)
