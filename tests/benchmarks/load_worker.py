"""vLLM's own load generator, in vLLM's environment: one process, many measurements.

Reads lines from standard input, each a JSON list of arguments of `vllm bench serve`. Writes a line of JSON for each.
"""

import argparse
import contextlib
import json
import sys
from importlib import import_module

WANTED = ("completed", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "total_output_tokens")


def main() -> None:
    serve = import_module("vllm.benchmarks.serve")
    for line in sys.stdin:
        parser = argparse.ArgumentParser()
        serve.add_cli_args(parser)
        with contextlib.redirect_stdout(sys.stderr):
            found = serve.main(parser.parse_args(json.loads(line)))
        print(json.dumps({name: found[name] for name in WANTED}), flush=True)


if __name__ == "__main__":
    main()
