"""Watches job.completed from outside. When a line comes on standard input and the queue is silent, prints what was seen: for
each project the event ids of all messages."""
import json
import os
import sys
import threading

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["RABBITMQ_URL"]))
channel = connection.channel()
channel.exchange_declare("smap.events", "topic", durable=True)
queue = channel.queue_declare("", exclusive=True).method.queue
channel.queue_bind(queue, "smap.events", "job.completed")
asked = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), asked.set()), daemon=True).start()
print("ready", flush=True)
seen = {}
for method, properties, body in channel.consume(queue, auto_ack=True, inactivity_timeout=0.5):
    if method is not None:
        envelope = json.loads(body)
        payload = envelope["payload"]
        seen.setdefault(payload["project_id"], []).append(
            {"id": envelope["event_id"], "total": payload["total"], "done": payload["done"], "errors": payload["errors"]}
        )
    elif asked.is_set():
        break
print(json.dumps(seen), flush=True)
