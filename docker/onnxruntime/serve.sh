#!/bin/sh
# Entry point of the image that serves:
#
#   docker run ... IMAGE [OPTION ...]   the engine in /engine, on port 8000
#   docker run ... IMAGE serve          the engine in /opt/ml/model, on port 8080: so SageMaker starts it
#   docker exec CONTAINER smoothquant-serve health
#
# Options are those of `smoothquant serve`. SMOOTHQUANT_OPTIONS holds more of them, separated by spaces, and
# SMOOTHQUANT_API_KEYS the keys of which a client must give one, separated by commas.
set -euf

if [ "${1:-}" = health ]; then
    for port in 8000 8080; do
        python3 -c "import urllib.request as web
web.build_opener(web.ProxyHandler({})).open('http://127.0.0.1:$port/health', timeout=4)" 2> /dev/null && exit 0
    done
    echo "no server answers on port 8000 or 8080" >&2
    exit 1
fi

engine=/engine
port=8000
if [ "${1:-}" = serve ]; then
    shift
    engine=/opt/ml/model
    port=8080
fi
if [ ! -d "$engine" ]; then
    echo "smoothquant-serve: $engine: no such folder; mount an engine there: -v ENGINE:$engine:ro" >&2
    exit 2
fi
if [ -n "${SMOOTHQUANT_API_KEYS:-}" ]; then
    set -- --api-key-env SMOOTHQUANT_API_KEYS "$@"
fi
# shellcheck disable=SC2086  # several words
exec smoothquant serve "$engine" --host 0.0.0.0 --port "$port" ${SMOOTHQUANT_OPTIONS:-} "$@"
