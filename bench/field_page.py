"""The figures of `field` as a page (Markdown) and as a picture (SVG)."""

from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from itertools import chain

from bench.chunk import Result
from bench.field import DIRECT, Figures
from bench.load import Wire

PAGE, PICTURE = "field.md", "pictures/field.svg"
"""Below docs/."""
_OTHERS_MOST = 0.10
_WIRES: dict[Wire, str] = {"h2": "HTTP/2", "h1": "HTTP/1.1"}
_NAMES = {"behest": "Behest", "envoy": "Envoy", "ferrogw": "Ferro", "litellm": "LiteLLM", DIRECT: "nothing"}
_WIDTH, _BAR, _LEFT, _GAP = 760, 18, 90, 46
_MEMORY = """\
Resident memory of the serving process after its start, and for each stream more that is open and says nothing.
Answers that are not streamed, from 16 connections, and the CPU that each took.
"""
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#334}.t{font-weight:600}.n{fill:#667}"
    "rect{fill:#9aa7b8}.behest{fill:#2f6fde}@media(prefers-color-scheme:dark)"
    "{text{fill:#dde}.n{fill:#99a}rect{fill:#5b6675}.behest{fill:#5b93f5}}"
)


def page(figures: Figures, *, command: str, machine: str, load: str) -> str:
    """The whole page."""
    day = datetime.now(tz=UTC).strftime("%d %B %Y").lstrip("0")
    rows = [f"| {_name(each.name)} | {each.version} | {each.does} |" for each in figures.gateways]
    sections = [
        "# Behest and the field\n",
        f"Written by `{command}` on {day}; what is measured how stands in [performance.md](performance.md#the-field).",
        f"{machine}.\n{load}\n",
        "All had the same simulated provider behind them and the same clients before them, in one run.\n",
        _quiet(figures),
        "| gateway | version | with each request |\n|---|---|---|\n" + "\n".join(rows) + "\n",
        "![CPU, latency and memory of each gateway](pictures/field.svg)\n",
        "## CPU per forwarded chunk\n",
        "Microseconds of the gateway's process: what longer answers cost more, for each chunk more.\n",
        _chunk_table(figures),
        "## Latency\n",
        "Milliseconds more than without a gateway, five streams at once; and from a client's reset to the provider.\n",
        _latency_table(figures),
        "## Memory, and whole answers\n",
        _MEMORY,
        _rest_table(figures),
        "## Not here\n",
        "\n".join(f"- {name}: {reason}." for name, reason in figures.missing) + "\n",
    ]
    if figures.faults:
        sections += ["Not measured in this run:\n", "\n".join(f"- {fault}" for fault in figures.faults) + "\n"]
    return "\n".join(section for section in sections if section)


def _quiet(figures: Figures) -> str:
    """A warning, where other processes were at work."""
    shares = sorted(result.shares.get("others", 0.0) for result in _results(figures))
    middle = shares[len(shares) // 2] if shares else 0.0
    if middle <= _OTHERS_MOST:
        return ""
    return (
        f"**This was not a quiet run**: other processes took {middle:.0%} of the machine in the middle case."
        " Elapsed times say little then, and late chunks come together, which makes each cheaper:"
        " compare within a row only.\n"
    )


def _name(name: str) -> str:
    return _NAMES.get(name, name)


def _chunk_table(figures: Figures) -> str:
    names = [gateway.name for gateway in figures.gateways]
    lines = ["| case | " + " | ".join(map(_name, names)) + " | Behest to Envoy | others' share of the machine |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for case, found in figures.chunks.items():
        cells = [f"{found[name].median_us:.1f}" if name in found else "-" for name in names]
        behest, envoy = found.get("behest"), found.get("envoy")
        ratio = f"{behest.median_us / envoy.median_us:.2f}" if behest and envoy and envoy.median_us > 0 else "-"
        others = max((result.shares.get("others", 0.0) for result in found.values()), default=0.0)
        lines.append(f"| {_case(case)} | {' | '.join(cells)} | {ratio} | {others:.0%} |")
    turns = max((len(result.slopes_us) for result in _results(figures)), default=0)
    lines.append(f"\nEach the median of {turns} turn{'s' if turns != 1 else ''}, where it was not too slow for more.\n")
    return "\n".join(lines)


def _results(figures: Figures) -> Iterable[Result]:
    return chain.from_iterable(found.values() for found in figures.chunks.values())


def _case(name: str) -> str:
    _, wire, streams, *bursts = name.split("-")
    pace = {20: "a chunk each 10 ms", 200: "a chunk each 20 ms", 1000: "a chunk each 100 ms"}[int(streams)]
    return f"{'HTTP/2' if wire == 'h2' else 'HTTP/1.1'}, {streams} streams, {'in bursts' if bursts else pace}"


def _latency_table(figures: Figures) -> str:
    lines = ["| gateway | | first byte p50 | p99 | gap p50 | p99 | reset to provider p50 | p99 |"]
    lines.append("|---" * 8 + "|")
    for gateway in figures.gateways:
        for wire, called in _WIRES.items():
            seen, direct = figures.latencies.get((gateway.name, wire)), figures.latencies.get((DIRECT, wire))
            aborts = figures.aborts.get((gateway.name, wire))
            if seen is None and aborts is None:
                continue
            added = [f"{ms:.1f}" for ms in seen.added_ms(direct)] if seen and direct else ["-"] * 4
            resets = [f"{aborts.at(share):.1f}" for share in (0.5, 0.99)] if aborts else ["-"] * 2
            lines.append(f"| {_name(gateway.name)} | {called} | {' | '.join([*added, *resets])} |")
    return "\n".join(lines) + "\n"


def _rest_table(figures: Figures) -> str:
    lines = ["| gateway | at rest | a stream over HTTP/2 | over HTTP/1.1 | whole answers a second | CPU of one |"]
    lines.append("|---" * 6 + "|")
    for name in [*(gateway.name for gateway in figures.gateways), DIRECT]:
        prints = [figures.footprints.get((name, wire)) for wire in _WIRES]
        idle = next((f"{found.idle_mib:.0f} MiB" for found in prints if found), "-")
        cells = [f"{found.stream_kib:.0f} KiB" if found else "-" for found in prints]
        plain = figures.plain.get(name)
        answers = [f"{plain.per_second:.0f}", f"{plain.cpu_ms:.2f} ms"] if plain else ["-", "-"]
        if name == DIRECT:
            answers[1] = "-"
        lines.append(f"| {_name(name)} | {idle} | {' | '.join([*cells, *answers])} |")
    return "\n".join(lines) + "\n"


def picture(figures: Figures) -> str:
    """Bars, a panel for each figure; the shorter the better but for the last."""
    names = [gateway.name for gateway in figures.gateways]
    panels: list[tuple[str, dict[str, float]]] = []
    for case in ("chunk-h1-20", "chunk-h2-200", "chunk-h1-200"):
        found = {name: result.median_us for name, result in figures.chunks.get(case, {}).items()}
        panels.append((f"CPU per chunk, µs ({_case(case)})", found))
    direct = figures.latencies.get((DIRECT, "h1"))
    if direct is not None:
        added = {
            name: seen.added_ms(direct)[0]
            for name in names
            if (seen := figures.latencies.get((name, "h1"))) is not None
        }
        panels.append(("Time to the first byte, ms more than without a gateway (p50, HTTP/1.1)", added))
    resets = {name: left.at(0.99) for name in names if (left := figures.aborts.get((name, "h1"))) is not None}
    panels.append(("From a client's reset to the provider, ms (p99, HTTP/1.1)", resets))
    open_kib = {name: each.stream_kib for name in names if (each := figures.footprints.get((name, "h1"))) is not None}
    panels.append(("Memory of an open stream, KiB (HTTP/1.1)", open_kib))
    panels.append(
        ("Whole answers a second (more is better)", {name: each.per_second for name, each in figures.plain.items()})
    )
    return _svg([(title, values) for title, values in panels if values])


def _svg(panels: list[tuple[str, dict[str, float]]]) -> str:
    parts: list[str] = []
    y = 24
    for title, values in panels:
        parts.append(f'<text class="t" x="0" y="{y}">{escape(title)}</text>')
        y += 10
        most = max(*values.values(), 1e-9)
        for name, value in values.items():
            width = max(1.0, max(value, 0.0) / most * (_WIDTH - _LEFT - 80))
            parts.append(f'<text x="0" y="{y + 14}">{escape(_name(name))}</text>')
            shown = "behest" if name == "behest" else "other"
            parts.append(f'<rect class="{shown}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" rx="2"/>')
            parts.append(f'<text class="n" x="{_LEFT + width + 6:.1f}" y="{y + 14}">{value:,.{_digits(value)}f}</text>')
            y += _BAR + 5
        y += _GAP - 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img">'
    about = "<title>CPU, latency and memory of each gateway</title>"
    return f"{head}{about}<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1
