"""vLLM's own load generator, in vLLM's environment: one process, many measurements.

Reads a JSON list of lists of arguments of `vllm bench serve` from standard input. Writes a line of JSON for each.
"""

import argparse
import contextlib
import json
import sys
from importlib import import_module

WANTED = ("completed", "output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "total_output_tokens")


def main() -> None:
    serve = import_module("vllm.benchmarks.serve")
    for arguments in json.load(sys.stdin):
        parser = argparse.ArgumentParser()
        serve.add_cli_args(parser)
        with contextlib.redirect_stdout(sys.stderr):
            found = serve.main(parser.parse_args(arguments))
        print(json.dumps({name: found[name] for name in WANTED}), flush=True)


if __name__ == "__main__":
    main()
