"""From rounds to tables: medians, spreads and ratios."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.methods import METHODS

RATES = (
    ("fdg_threads", "bp"),
    ("fdg_threads", "dp"),
    ("fdg_threads", "torch_fdg"),
    ("fdg_threads", "fdg_fused"),
    ("fdg_threads", "bp_xla"),
    ("bp", "bp_xla"),
    ("fdg_fused", "bp"),
    ("bp", "torch_bp"),
    ("fdg_threads", "torch_bp"),
)
"""Ratios of images per second: (numerator, denominator)."""

IN_TABLES = ("peak_device_mib", "peak_mib", "channels", "recorded")
BOUNDS = {
    "slowest stage alone": lambda one: max(s["alone_ms"] for s in one["stages"]),
    "slowest stage beside the others": lambda one: max(
        s["side_by_side_ms"] for s in one["stages"]
    ),
    "all stages' work spread over the cores": lambda one: one["estimated_tick_ms"],
}
"""What the tick of the threads engine is held against, from one of its rounds."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns "per_round", "median", "min" and "max" of some values."""
    return {
        "per_round": list(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def batch_ms(one: dict[str, Any]) -> float:
    """Returns the milliseconds per batch of a round; with FDG, its tick."""
    return 1e3 * one["seconds"] / one["num_batches"]


def ratios(rounds: dict[str, list[dict]], reports: dict[str, dict]) -> dict[str, dict]:
    """Returns every ratio that the measured methods allow, per round.

    Args:
        rounds: per method what ``Child.run_round`` returned, round by round.
        reports: per method what ``Child.report`` returned.
    """
    found = {}
    for above, below in RATES:
        if above in rounds and below in rounds:
            label = f"{METHODS[above].meaning} / {METHODS[below].meaning}"
            found[label] = spread(
                [
                    a["images_per_second"] / b["images_per_second"]
                    for a, b in zip(rounds[above], rounds[below], strict=True)
                ]
            )
    threads = rounds.get("fdg_threads", [])
    for words, bound in BOUNDS.items():
        if threads:
            found[f"FDG tick / {words}"] = spread(
                [batch_ms(one) / bound(one) for one in threads]
            )
    for name, said in reports.items():
        if "predicted_tick_ms" in said:
            found[f"{METHODS[name].meaning}: predicted tick / tick"] = spread(
                [said["predicted_tick_ms"] / batch_ms(one) for one in rounds[name]]
            )
    return found


def text(results: dict[str, Any]) -> str:
    """Returns the report of everything that was measured, as Markdown.

    Args:
        results: what ``--json`` writes.
    """
    parts = [
        "\n".join(f"- {key}: {value}" for key, value in results["header"].items()),
        _methods_table(results["methods"]),
    ]
    if results["ratios"]:
        parts.append(_ratios_table(results["ratios"]))
    if "fdg_threads" in results["methods"]:
        parts.append(_stages_table(results["methods"]["fdg_threads"]))
    parts += [_details(name, row) for name, row in results["methods"].items()]
    parts += [f"{name}: left out; {why}" for name, why in results["left_out"].items()]
    return "\n\n".join(parts)


def _methods_table(methods: dict[str, dict]) -> str:
    rows = [
        ("method", "images/s", "min - max", "ms per batch", "peak MiB")
        + ("warm-up s", "compile s", "cuts")
    ]
    for name, row in methods.items():
        rate, report = row["images_per_second"], row["report"]
        peak = report["peak_device_mib"] or report["peak_mib"]
        compiling = row["compile_seconds"]
        rows.append(
            (
                f"{name} ({METHODS[name].meaning})",
                f"{rate['median']:.1f}",
                f"{rate['min']:.1f} - {rate['max']:.1f}",
                f"{statistics.median(map(batch_ms, row['rounds'])):.1f}",
                "unknown" if peak is None else f"{peak:.0f}",
                f"{row['warm_up_seconds']:.1f}",
                "" if compiling is None else f"{compiling:.1f}",
                ", ".join(map(str, report.get("cuts", ()))),
            )
        )
    return _table(rows)


def _ratios_table(found: dict[str, dict]) -> str:
    rows = [("ratio", "median", "min - max")]
    for label, value in found.items():
        low_high = f"{value['min']:.2f} - {value['max']:.2f}"
        rows.append((label, f"{value['median']:.2f}", low_high))
    return _table(rows)


def _stages_table(row: dict) -> str:
    """Per stage of the threads engine: its compute, how busy it was, its channels."""
    rounds, report = row["rounds"], row["report"]
    channels, recorded = report["channels"], report["recorded"]
    tick = statistics.median(map(batch_ms, rounds))
    estimate = statistics.median(r["estimated_tick_ms"] for r in rounds)
    columns = {
        "alone_ms": "alone ms",
        "share_ms": "on its cores ms",
        "side_by_side_ms": "beside the others ms",
    }
    shown = [key for key in columns if key in rounds[0]["stages"][0]]
    rows = [
        ["stage", *(columns[key] for key in shown)]
        + ["in the run ms", "busy", "down MiB", "up MiB"]
    ]
    for k, record in enumerate(recorded):
        times = [
            statistics.median(r["stages"][k][key] for r in rounds) for key in shown
        ]
        # What leaves a stage: the activation below it, the cotangent above it.
        down = channels[k]["down_mib"] if k < len(channels) else 0.0
        up = channels[k - 1]["up_mib"] if k > 0 else 0.0
        rows.append(
            [f"{k}", *(f"{ms:.1f}" for ms in times), f"{record['work_ms']:.1f}"]
            + [f"{record['busy']:.0%}", f"{down:.2f}", f"{up:.2f}"]
        )
    return (
        f"FDG threads: a tick is {tick:.1f} ms; an estimate of the least that this "
        f"machine allows is {estimate:.1f} ms. Milliseconds of compute per batch:\n\n"
        f"{_table(rows)}"
    )


def _details(name: str, row: dict) -> str:
    shown = {
        key: value
        for key, value in row["report"].items()
        if key not in IN_TABLES and value is not None
    }
    shown["batches_per_round"] = row["num_batches"]
    return f"{name}: " + "; ".join(f"{k} {_word(v)}" for k, v in shown.items())


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_word(v)}" for k, v in value.items())
    return str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
