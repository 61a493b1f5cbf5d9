"""Reads {"schema", "valid", "instance"} per line and checks each against its schema; prints what disagrees."""
import json
import sys

from jsonschema import Draft202012Validator

validators = {}
bad = count = 0
for line in sys.stdin:
    case = json.loads(line)
    path = case["schema"]
    if path not in validators:
        with open(path) as file:
            schema = json.load(file)
        Draft202012Validator.check_schema(schema)
        validators[path] = Draft202012Validator(schema)
    errors = [error.message for error in validators[path].iter_errors(case["instance"])]
    count += 1
    if bool(errors) == case["valid"]:
        bad += 1
        print(f"{path}: expected valid={case['valid']}, got {errors or 'no error'}: {json.dumps(case['instance'])[:200]}")
print(f"{count} checked")
sys.exit(1 if bad else 0)
