"""The tables and the picture of README.md: engines beside each other, and ours beside vLLM on the same folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles

from builders.validate.report.picture import Picture
from builders.validate.report.svg import Axis, Panel, log_axis, series
from tests.benchmarks.peers.forms import BASE, OURS, PEERS
from tests.benchmarks.results import Row

VLLM = "vLLM on our W8A8 folder"
AS_NEAR = 2.0  # an engine is as accurate as ours if its KL is at most so many times ours
DRAWN = (
    *("ours, INT8 head", "ours in OpenVINO, INT8 head", BASE, VLLM, "OpenVINO, FP32"),
    *("ONNX Runtime, quantize_dynamic", "onnxruntime-genai, int8", "llama.cpp, Q8_0"),
)
Cell = Mapping[str, Sequence[float]]  # engine -> seconds: of its first run alone, and of each round


def ratios(cell: Cell, name: str, base: str) -> list[float]:
    """How often an engine's time goes into another's: in each round, or of the first runs if one has no rounds."""
    pairs = list(zip(cell[base][1:], cell[name][1:], strict=False)) or [(cell[base][0], cell[name][0])]
    return [theirs / ours for theirs, ours in pairs]


def seconds(cell: Cell, name: str) -> float:
    """The median of an engine's rounds; its first run if it has none."""
    return median(cell[name][1:] or cell[name])


def cell_text(cell: Cell, name: str, failures: Mapping[str, str]) -> str:
    """Median, quartiles and seconds; one number where an engine ran once. failures: of the cell, by engine."""
    if name not in cell:
        return "failed" if name in failures else "too long"
    if BASE not in cell:
        return f"{seconds(cell, name) * 1e3:.1f} ms"
    found = ratios(cell, name, BASE)
    stopped = ", then failed" if name in failures else ""
    return f"{spread(found)}, {seconds(cell, name) * 1e3:.1f} ms{stopped}"


def spread(found: Sequence[float]) -> str:
    if len(found) < 2:
        return f"{found[0]:.2f} (once)"
    low, middle, high = quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def rows(facts: Mapping) -> list[Row]:
    """What the benchmark prints."""
    stopped = facts["failures"]
    found = [
        Row(f"{what}, {name}", cell_text(cell, name, stopped.get(what, {})))
        for what, cell in facts["times"].items()
        for name in cell
    ]
    return [*found, *beside_vllm(facts)]


def beside_vllm(facts: Mapping) -> Iterator[Row]:
    """Of each cell, the better of our engines with a float head, and with an INT8 head, over vLLM on our own folder."""
    for what, cell in facts["times"].items():
        for head, names in (("float head", OURS[::2]), ("INT8 head", OURS[1::2])):
            here = [name for name in names if name in cell]
            if VLLM in cell and here:
                best = min(here, key=lambda name: seconds(cell, name))
                prompt, alone = what.startswith("prefill"), what.endswith("batch 1")
                found = ratios(cell, VLLM, best) if prompt else ratios(cell, best, VLLM)
                unit = "x vLLM's time to the first token" if prompt else "x vLLM's tokens per second"
                target = ("<= 1.0 x" if prompt else ">= 1.2 x") if alone else ""
                spent = f"{seconds(cell, best) * 1e3:.1f} against {seconds(cell, VLLM) * 1e3:.1f} ms"
                yield Row(f"{what}, {best}, {head}", f"{spread(found)} {unit}: {spent}", target)


def quicker(facts: Mapping, divergence: Mapping[str, float]) -> Iterator[str]:
    """A line for each cell in which an engine that is as accurate as ours is quicker than each of ours. No profile says
    why."""
    for what, cell in facts["times"].items():
        ours = [name for name in OURS if name in cell]
        for name in cell:
            if name in OURS or name not in divergence or not ours:
                continue
            best = min(ours, key=lambda one: seconds(cell, one))
            faster = median(ratios(cell, name, best))
            if divergence[name] <= AS_NEAR * divergence[best] and faster > 1:
                yield f"* {what}: {name} is {faster:.2f} times as quick as {best}: not explained."


def table(result: Mapping, accuracy: Mapping | None) -> str:
    """A line for each engine. result, accuracy: of `peers` and `peers.accuracy`."""
    facts = result["details"]
    divergence = accuracy["details"]["divergence"] if accuracy else {}
    times, model = facts["times"], facts["model"]
    lines = [
        f"| hidden {model['hidden']}, {model['layers']} layers | body | head | KL on SmolLM2 | memory, batch 1 / 16 "
        f"| {' | '.join(times)} |",
        "|---" * (5 + len(times)) + "|",
    ]
    for peer in PEERS:
        if not any(peer.name in cell for cell in times.values()):
            continue
        near = f"{divergence[peer.name]:.4f}" if peer.name in divergence else ""
        peaks = facts["memory"].get(peer.name, {}).values()
        memory = " / ".join(f"{size / 1e9:.2f} GB" for size in peaks)
        cells = [
            peer.name,
            peer.body,
            peer.head,
            near,
            memory,
            *(cell_text(cell, peer.name, facts["failures"].get(what, {})) for what, cell in times.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *quicker(facts, divergence)]
    lines += ["", "| W8A8 folder and graph of one model | measured | target |", "|---|---|---|"]
    lines += [f"| {row.what} | {row.measured} | {row.target} |" for row in beside_vllm(facts)]
    why = {name: f"needs {what}" for name, what in facts["missing"].items()} | facts["failed"]
    measured = {name for cell in times.values() for name in cell}
    missing = [f"{name} ({said})" for name, said in why.items() if name not in measured]
    stopped = [said for name, said in facts["failed"].items() if name in measured]
    stopped += [f"{what}, {said}" for what, cell in facts["failures"].items() for said in cell.values()]
    lines += ["", f"* `{result['command']}` ({where(result)}; {facts['threads']} threads, vLLM's max_num_seqs 16)"]
    if missing:
        lines.append(f"* Not measured: {'; '.join(missing)}")
    if stopped:
        lines.append(f"* Failed: {'; '.join(stopped)}")
    if accuracy:
        known = accuracy["details"]
        lines.append(f"* KL: `{accuracy['command']}`, {known['tokens']} tokens; {known['note']}")
    return "\n".join(lines) + "\n"


def first_table(result: Mapping) -> str:
    """The table of results/peers.json: one sequence at a time, before vLLM, llama.cpp and NNCF took part."""
    cells = [(*row["what"].partition(", "), row["measured"]) for row in result["rows"]]
    cases = list(dict.fromkeys(case for case, *_ in cells))
    engines = list(dict.fromkeys(name for _, _, name, _ in cells))
    found = {(case, name): measured for case, _, name, measured in cells}
    lines = [f"| hidden 2048, 4 layers; times FP32 in ONNX Runtime | {' | '.join(cases)} |", "|---" * 4 + "|"]
    lines += [f"| {name} | {' | '.join(found[case, name] for case in cases)} |" for name in engines]
    later = [peer.name for peer in PEERS if peer.kind in ("vllm", "llama.cpp") or "nncf" in peer.packages]
    missing = "; ".join(
        [*later, "batches of several sequences", "memory", "how near an engine comes to the float model"]
    )
    return "\n".join([*lines, "", f"* `{result['command']}` ({where(result)})", f"* Not measured: {missing}"]) + "\n"


def where(result: Mapping) -> str:
    """The machine and the packages of a result."""
    machine, versions = result["machine"], result["versions"]
    tried = ", ".join(f"{name} {versions[name]}" for name in ("onnxruntime", "openvino", "torch"))
    return f"{machine['processor']}, {machine['cores']} cores, {', '.join(machine['features'][:3])}; {tried}"


def picture(results: Sequence[Mapping]) -> str:
    """Tokens per second by the size of the batch, a plot for each kind of cell and model, as SVG."""
    colours = series(DRAWN)
    plots = [
        _plot(result["details"], case, colours)
        for result in results
        for case in dict.fromkeys(what.partition(", batch ")[0] for what in result["details"]["times"])
    ]
    return Picture(*plots, title="tokens per second", legend=colours).svg() + "\n"


def _plot(facts: Mapping, case: str, colours: Mapping[str, str]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in colours}
    for what, cell in facts["times"].items():
        begin, _, batch = what.partition(", batch ")
        tokens = int(case.split()[1]) if case.startswith("prefill") else 1
        for name, line in lines.items():
            if begin == case and name in cell:
                line.append((float(batch), int(batch) * tokens / seconds(cell, name)))
    speeds = [speed for line in lines.values() for _, speed in line]
    x = Axis("sequences in a batch", 0.9, 18, log=True)
    panel = Panel(f"hidden {facts['model']['hidden']}: {case}", x, log_axis("tokens per second", speeds))
    for name, css in colours.items():
        if lines[name]:
            panel.line(lines[name], css, name, dots=True)
    return panel.svg()
