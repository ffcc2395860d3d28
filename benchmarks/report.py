"""``python benchmarks/report.py RESULTS.json... [--out DIR]``: the table and the charts of measurements.

Reads what ``pytest benchmarks --benchmark-only --benchmark-json RESULTS.json`` wrote and writes into DIR (by default
where the first file lies) ``README.md`` with every row, losses as plainly as wins, and charts: ``speed_up.png``,
``memory_limit.png`` and, where there are rows for it, ``memory_kept.png``. Where files have a row in common, the last
one's counts. They must be of one machine and one torch; a ``README.md`` that is not a report is left alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = {"forward": "#0072B2", "backward": "#D55E00", "both": "#009E73"}
GREY, BLACK = "#999999", "#222222"
TITLE = "# Benchmarks"  # by which a report is known
PAGE = 4096  # bytes, of the least that the system provides
WANTED_SHARE = 0.6  # of a copy's speed, for rows whose size makes memory the limit


@dataclass(frozen=True)
class Row:
    """One pass of one workload; times in seconds, medians."""

    op: str
    passes: str
    network: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    device: str
    rounds: int
    seconds: dict[str, dict[str, Any]]  # by library, and "copy": median, quartiles
    speed_up: dict[str, float]  # over "torch" and perhaps "compile"
    tensor_bytes: int
    minimum_bytes: int
    gigabytes_per_s: float
    share_of_copy: float
    saved_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    page_faults: dict[str, float]

    @classmethod
    def of(cls, info: dict[str, Any]) -> Row:
        """From what the harness wrote; a file without one of these entries is not the harness's."""
        return cls(
            **{
                **info,
                "shape": tuple(info["shape"]),
            }
        )

    @property
    def key(self) -> tuple[Any, ...]:
        return self.op, self.passes, self.shape, self.dtype, self.layout, self.device

    def milliseconds(self, library: str) -> float:
        return self.seconds[library]["median"] * 1e3

    def spread(self, library: str) -> float:
        """Half the distance between the quartiles, over the median."""
        first, third = self.seconds[library]["quartiles"]
        return (third - first) / 2 / self.seconds[library]["median"]

    @property
    def fresh_bytes(self) -> float:
        """At least, of memory that the system had to provide during a call."""
        return PAGE * self.page_faults["fastnorm"]

    def is_memory_bound(self, cache_mib: float) -> bool:
        """Input and output do not fit in the cache together, so that nothing of them is left there from before."""
        return 2 * self.tensor_bytes > cache_mib * 2**20


class ReportError(Exception):
    """What is wrong with the results, in one line."""


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def read(paths: Sequence[Path]) -> tuple[list[Row], str, float]:
    """The rows in the order of the files, the line that says where they are from, and the last-level cache in MiB.

    Raises:
        ReportError: a file is missing, holds no results, or is of another machine than the first; in one line.
    """
    rows: dict[tuple[Any, ...], Row] = {}
    machine: dict[str, Any] = {}
    commits: list[dict[str, Any]] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            commits.append(content["commit_info"])
            about, cache_mib = machine_line(content["machine_info"], commits), content["machine_info"]["cache_mib"]
            for benchmark in content["benchmarks"]:
                row = Row.of(benchmark["extra_info"])
                rows[row.key] = row
        except OSError as error:
            raise ReportError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path}: not results of pytest benchmarks ({error!r})") from error
        machine = machine or content["machine_info"]
        if other := [key for key, value in machine.items() if content["machine_info"].get(key) != value]:
            raise ReportError(f"{path}: of another machine than {paths[0]}, by {', '.join(other)}")
    if not rows:
        raise ReportError(f"no rows in {', '.join(map(str, paths))}")
    return list(rows.values()), about, cache_mib


# ---- text


def shape_of(row: Row) -> str:
    return "x".join(map(str, row.shape))


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(row: Row, library: str) -> str:
    return number(row.speed_up[library]) if library in row.speed_up else ""


def of_median(row: Row, library: str) -> str:
    """Time in milliseconds and the spread."""
    return f"{row.milliseconds(library):.3g} ±{row.spread(library):.0%}"


def mebibytes(nbytes: float) -> str:
    return "0" if nbytes == 0 else f"{nbytes / 2**20:.3g}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "op": lambda row: row.op,
    "pass": lambda row: row.passes,
    "input": lambda row: f"{shape_of(row)} ({row.network})",
    "dtype": lambda row: row.dtype,
    "layout": lambda row: row.layout,
    "torch ms": lambda row: of_median(row, "torch"),
    "fastnorm ms": lambda row: of_median(row, "fastnorm"),
    "speed-up": lambda row: ratio(row, "torch"),
    "over torch.compile": lambda row: ratio(row, "compile"),
    "GB/s": lambda row: number(row.gigabytes_per_s),
    "share of copy": lambda row: f"{row.share_of_copy:.0%}",
    "fresh MiB": lambda row: mebibytes(row.fresh_bytes),
    "limited by": lambda row: limited_by(row),
    "kept MiB, torch": lambda row: mebibytes(row.saved_bytes["torch"]),
    "kept MiB, fastnorm": lambda row: mebibytes(row.saved_bytes["fastnorm"]),
}
LEFT = 5  # columns of words


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *lines)]


def plain_table(rows: Sequence[Row]) -> list[str]:
    """For a terminal."""
    names = ["op", "pass", "dtype", "layout", "torch ms", "fastnorm ms", "speed-up", "over torch.compile"]
    names += ["GB/s", "share of copy"]
    columns = {"shape": shape_of} | {name: COLUMNS[name] for name in names}
    columns = {name: columns[name] for name in ("op", "shape", *names[1:])}
    table = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def by_op(rows: Iterable[Row]) -> dict[str, list[Row]]:
    ops: dict[str, list[Row]] = {}
    for row in rows:
        ops.setdefault(row.op, []).append(row)
    return ops


def summary_line(name: str, rows: Sequence[Row], cache_mib: float) -> list[str]:
    over_torch = [row.speed_up["torch"] for row in rows]
    over_compile = [row.speed_up["compile"] for row in rows if "compile" in row.speed_up]
    shares = [row.share_of_copy for row in rows if row.is_memory_bound(cache_mib)]
    return [
        name,
        str(len(rows)),
        number(geometric_mean(over_torch)),
        number(min(over_torch)),
        str(sum(ratio < 1 for ratio in over_torch)),
        number(geometric_mean(over_compile)) if over_compile else "",
        f"{sum(ratio < 1 for ratio in over_compile)} of {len(over_compile)}" if over_compile else "",
        f"{statistics.median(shares):.0%}" if shares else "",
    ]


def summary(rows: Sequence[Row], cache_mib: float) -> list[str]:
    """A line an op, and one for all."""
    header = ["op", "rows", "speed-up (geometric mean)", "lowest", "rows below 1", "over torch.compile"]
    header += ["rows below 1", "share of a copy's speed"]
    lines = [summary_line(op, of_op, cache_mib) for op, of_op in by_op(rows).items()]
    lines.append([f"**{cell}**" if cell else "" for cell in summary_line("all", rows, cache_mib)])
    return markdown_table(header, lines, 1)


def losses(rows: Sequence[Row], library: str) -> list[Row]:
    slower = [row for row in rows if row.speed_up.get(library, 1.0) < 1]
    return sorted(slower, key=lambda row: row.speed_up[library])


def below_the_limit(rows: Sequence[Row], cache_mib: float) -> list[Row]:
    return [row for row in rows if row.is_memory_bound(cache_mib) and row.share_of_copy < WANTED_SHARE]


def at_the_limit(row: Row) -> float:
    """The speed-up over torch that a copy's speed would be."""
    return row.speed_up["torch"] / min(1.0, row.share_of_copy)


def limit_line(rows: Sequence[Row], cache_mib: float) -> list[str]:
    """What the rows have whose tensors exceed the cache, and what there is for them to have."""
    bound = [row for row in rows if row.is_memory_bound(cache_mib)]
    if not bound:
        return []
    mean, limit = geometric_mean(row.speed_up["torch"] for row in bound), geometric_mean(map(at_the_limit, bound))
    below = sum(at_the_limit(row) < 2 for row in bound)
    return [
        f"Of the {len(bound)} rows whose tensors exceed the cache the geometric mean is {number(mean)}. At a copy's",
        f"speed, every one of them, it would be {number(limit)}, and {below} of them would still be less than twice as",
        "fast as torch's.",
        "",
    ]


def compile_line(rows: Sequence[Row]) -> list[str]:
    """How torch.compile compares with torch itself, and fastnorm with the faster of the two."""
    both = [row for row in rows if "compile" in row.speed_up]
    if not both:
        return []
    slower = sum(row.speed_up["compile"] > row.speed_up["torch"] for row in both)
    over_faster = [min(row.speed_up["torch"], row.speed_up["compile"]) for row in both]
    return [
        f"Of the {len(both)} rows with torch.compile it is slower than torch itself in {slower}. Over the faster of",
        f"the two the geometric mean is {number(geometric_mean(over_faster))}, the lowest {number(min(over_faster))}.",
        "",
    ]


def limited_by(row: Row) -> str:
    """What is known to keep a row from a copy's speed, by what it is and by what was measured with it."""
    reduces = any(name in row.op for name in ("BatchNorm", "BatchRenorm", "GroupNorm", "InstanceNorm"))
    sweeps_twice, by_columns = reduces and "eval" not in row.op, row.layout == "channels_last"
    known = {
        "fresh memory": row.fresh_bytes >= 2**20,
        "inputs read twice, from the last-level cache": sweeps_twice and by_columns,
        "each slice read, then written, where a copy does both at once": sweeps_twice and not by_columns,
        "sums over windows, powers": "LocalResponseNorm" in row.op,
        "exponentials": "SiLU" in row.op or "GELU" in row.op,
        "spread": row.spread("fastnorm") >= 0.15 or row.spread("copy") >= 0.15,
    }
    return ", ".join(reason for reason, applies in known.items() if applies)


def commit_of(commit: dict[str, Any]) -> str:
    name = commit["id"]  # or a word, where there is no repository
    return f"{name[:8] if len(name) == 40 else name}{' with changes' if commit.get('dirty') else ''}"


def machine_line(machine: dict[str, Any], commits: Sequence[dict[str, Any]]) -> str:
    built = machine["fastnorm"]
    parts = [
        machine["device"],
        f"{machine['threads']} threads",
        f"{machine['cache_mib']:.0f} MiB of last-level cache",
        f"{built['instruction_set']} kernels",
        f"torch {built['torch']}",
        f"fastnorm {built['fastnorm']}",
        f"commit {' and '.join(dict.fromkeys(map(commit_of, commits)))}",
        f"Python {machine['python']}",
        f"huge pages: {machine['huge_pages']}",
        *(["freed memory is kept"] if machine["keeps_freed_memory"] else []),
    ]
    return ", ".join(parts) + "."


HOW = """\
Speed-up: torch's median time over fastnorm's, libraries and a plain copy timed by turns in one process; after ± half
the distance between the quartiles. torch.compile is measured in part of the rows only. GB/s counts the bytes that any
program must move, and its share is of a copy of the same tensor into memory used before. On CPUs glibc's allocator is
told to keep what is freed, or else one library pays for returning what the other has used. *Fresh MiB*: page faults in
a call of fastnorm's, times 4 KiB (a huge page is one fault). *Kept*: for backward, in MiB, the input included."""


def markdown(rows: Sequence[Row], about: str, cache: float, pictures: Sequence[str]) -> str:
    slower, behind, below = losses(rows, "torch"), losses(rows, "compile"), below_the_limit(rows, cache)
    every = [name for name in COLUMNS if name != "limited by"]
    full = markdown_table(every, ([COLUMNS[name](row) for name in every] for row in rows), LEFT)
    lost = ["op", "pass", "input", "dtype", "layout", "torch ms", "fastnorm ms", "speed-up", "share of copy"]
    lost_compile = [*lost[:5], "fastnorm ms", "over torch.compile"]
    short = [*lost[:5], "fastnorm ms", "share of copy", "limited by"]

    def part(names: Sequence[str], of: Sequence[Row]) -> list[str]:
        return markdown_table(names, ([COLUMNS[name](row) for name in names] for row in of), LEFT) if of else ["None."]

    lines = [TITLE, "", about, "", HOW, ""]
    lines += [line for name in pictures for line in (f"![{Path(name).stem.replace('_', ' ')}]({name})", "")]
    lines += ["## Summary", "", *summary(rows, cache), "", *limit_line(rows, cache), *compile_line(rows)]
    lines += [f"## Slower than torch: {len(slower)} of {len(rows)} rows", "", *part(lost, slower), ""]
    compiled = sum("compile" in row.speed_up for row in rows)
    lines += [f"## Slower than torch.compile: {len(behind)} of {compiled} rows", "", *part(lost_compile, behind), ""]
    bound = sum(row.is_memory_bound(cache) for row in rows)
    lines += [f"## Beyond the cache and below {WANTED_SHARE:.0%} of a copy's speed: {len(below)} of {bound} rows", ""]
    lines += [*part(short, below), "", "## All rows", "", *full]
    return "\n".join(lines) + "\n"


# ---- charts


def speed_up_chart(rows: Sequence[Row]) -> Figure:
    """Each row a dot, by op, and the geometric means, over torch and over torch.compile."""
    ops = by_op(rows)
    panels = [name for name in ("torch", "compile") if any(name in row.speed_up for row in rows)]
    figure = Figure(figsize=(4.0 + 3.6 * len(panels), 1.6 + 0.34 * len(ops)), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, library in zip(grid, panels, strict=True):
        for height, of_op in enumerate(ops.values()):
            with_it = [row for row in of_op if library in row.speed_up]
            for offset, (passes, colour) in enumerate(COLOURS.items()):
                dots = [row.speed_up[library] for row in with_it if row.passes == passes]
                axes.plot(dots, [height + 0.18 * (offset - 1)] * len(dots), ".", color=colour, ms=6, alpha=0.75)
            if with_it:
                mean = geometric_mean(row.speed_up[library] for row in with_it)
                axes.plot([mean] * 2, [height - 0.36, height + 0.36], color=BLACK, lw=2)
        axes.axvline(1, color=GREY, lw=1)
        axes.set_xscale("log")
        axes.set_xlabel(f"times as fast as {'torch.compile' if library == 'compile' else 'torch'}")
        times_axis(axes)
        axes.grid(axis="x", alpha=0.3)
    grid[0].set_yticks(range(len(ops)), ops)
    grid[0].set_ylim(len(ops) - 0.4, -0.6)
    used = [passes for passes in COLOURS if any(row.passes == passes for row in rows)]
    marks = [axes.plot([], [], ".", ms=9, color=COLOURS[passes], label=passes)[0] for passes in used]
    marks.append(axes.plot([], [], color=BLACK, lw=2, label="geometric mean")[0])
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False)
    return figure


def times_axis(axes: Axes) -> None:
    """Ticks at 0.5, 1, 2, 5, 10, ... of what is shown, written so, or of many decades at 0.1, 1, 10, ..."""
    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-3, 6) for m in ((1, 2, 5) if high < 1e4 * low else (1,))]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def memory_limit_chart(rows: Sequence[Row], cache_mib: float) -> Figure:
    """The share of a copy's speed by the tensor's size, from 64 KiB on, forward and backward."""
    families = {
        "BatchNorm": "#0072B2",
        "GroupNorm, InstanceNorm": "#009E73",
        "LayerNorm, RMSNorm": "#D55E00",
        "dropout": "#CC79A7",
        "LocalResponseNorm": "#56B4E9",
        "parametrizations": "#E69F00",
        "others": GREY,
    }

    def family(op: str) -> str:
        words_of = ("Batch", "Group Instance", "Layer RMS", "Drop Alpha", "Local", "_norm", "")
        return next(
            name for name, words in zip(families, words_of, strict=True) if any(word in op for word in words.split(" "))
        )

    panels = ("forward", "backward")
    large = [row for row in rows if row.tensor_bytes >= 1 << 16]  # the calls' overhead decides below
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, passes in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for name, colour in families.items():
            for dtype, marker in (("float32", "o"), ("bfloat16", "s")):
                of = [row for row in large if row.passes == passes and row.dtype == dtype and family(row.op) == name]
                axes.plot(
                    [row.tensor_bytes / 2**20 for row in of],
                    [row.share_of_copy for row in of],
                    marker,
                    color=colour,
                    mfc=colour if dtype == "float32" else "none",
                    ms=5,
                    alpha=0.8,
                )
        axes.axhline(1, color=GREY, lw=1)
        axes.axvline(cache_mib / 2, color=GREY, lw=1, ls=":")
        inside = axes.get_xaxis_transform()
        axes.text(cache_mib / 2, 0.02, "in the cache ", ha="right", fontsize=8, transform=inside)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, cache_mib / 8), max(high, cache_mib * 2))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(passes, fontsize=11)
        axes.set_xlabel("tensor, MiB")
        axes.grid(alpha=0.3)
        if passes == "forward":
            axes.set_ylabel("speed, of a copy's in the same run")
    shown = {family(row.op) for row in rows}
    marks = [axes.plot([], [], "o", color=families[name], label=name)[0] for name in families if name in shown]
    marks.append(axes.plot([], [], "s", color=BLACK, mfc="none", label="bfloat16")[0])
    figure.legend(handles=marks, loc="outside lower center", ncols=len(marks), frameon=False, fontsize=8)
    return figure


def of_memory(rows: Sequence[Row]) -> dict[str, Row]:
    """By op the largest float32 row of those that are about memory."""
    return {
        op: max(of_op, key=lambda row: (row.dtype == "float32", row.layout == "contiguous", row.tensor_bytes))
        for op, of_op in by_op(rows).items()
        if not op.endswith(("eval", "_norm"))
    }


def memory_kept_chart(largest: dict[str, Row]) -> Figure:
    """Bytes kept for backward and the peak of both passes, in units of the input, of a row for each op."""
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(largest)), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    titles = {"saved_bytes": "kept for backward", "peak_bytes": "peak"}
    for axes, (name, title) in zip(grid, titles.items(), strict=True):
        for offset, (library, colour) in enumerate((("torch", GREY), ("fastnorm", COLOURS["forward"]))):
            values = [getattr(row, name)[library] / row.tensor_bytes for row in largest.values()]
            axes.barh([i + 0.4 * (offset - 0.5) for i in range(len(values))], values, 0.38, color=colour, label=library)
        axes.set_xlabel(f"{title}, tensors of the input's size")
        axes.grid(axis="x", alpha=0.3)
    grid[0].set_yticks(range(len(largest)), largest)
    grid[0].set_ylim(len(largest) - 0.4, -0.6)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure


def write(paths: Sequence[Path], out: Path) -> list[Path]:
    """Writes the report of these files into a folder, and returns what it wrote.

    Raises:
        ReportError: see :func:`read`; or the folder has a README.md that is not a report; nothing is written then.
    """
    rows, about, cache_mib = read(paths)
    table = out / "README.md"
    if table.exists() and not table.read_text(encoding="utf-8").startswith(TITLE):
        raise ReportError(f"{table} is not a report and would be lost: name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    charts = {
        "speed_up.png": speed_up_chart(rows),
        "memory_limit.png": memory_limit_chart(rows, cache_mib),
    }
    if largest := of_memory(rows):
        charts["memory_kept.png"] = memory_kept_chart(largest)
    for name, figure in charts.items():
        figure.savefig(out / name, dpi=120)
    table.write_text(markdown(rows, about, cache_mib, list(charts)), encoding="utf-8")
    return [table, *(out / name for name in charts)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes README.md, with every row, and three charts of benchmark results."
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of pytest-benchmark")
    parser.add_argument("--out", type=Path, help="folder to write into; by default that of the first file")
    args = parser.parse_args()
    try:
        written = write(args.results, args.out or args.results[0].parent)
    except (ReportError, OSError) as error:
        parser.error(str(error))
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
