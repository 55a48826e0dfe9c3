"""The users of the kill matrix. Run with the client's own environment: `load.py map COUNT` or `load.py spawn COUNT`.

What was acknowledged is written to stdout, one line each, at once: the harness that kills the platform believes
nothing else.
"""

import sys
import time

import modal

# A client that gives up has heard of nothing: it asks again, as a user would.
ATTEMPTS = 120
PAUSE_SECONDS = 0.25


def main() -> int:
    kind, count = sys.argv[1], int(sys.argv[2])
    double = modal.Function.from_name("chaos", "double")
    return {"map": map_all, "spawn": spawn_all}[kind](double, count)


def map_all(double: modal.Function, count: int) -> int:
    results = list(double.map(range(count)))
    wrong = [index for index, result in enumerate(results) if result != 2 * index]
    print(f"map {len(results)} results, {len(wrong)} wrong", flush=True)
    return 1 if wrong or len(results) != count else 0


def spawn_all(double: modal.Function, count: int) -> int:
    for number in range(count):
        for attempt in range(ATTEMPTS):
            try:
                call = double.spawn(number)
            except Exception as error:  # whatever the client makes of a dead server
                print(f"retry {number} {type(error).__name__}", flush=True)
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(PAUSE_SECONDS)
            else:
                print(f"spawned {number} {call.object_id}", flush=True)
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
