"""report.html: one file that shows everything, pictures included."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:nth-child(-n + 2), td:nth-child(-n + 2) { text-align: left; }
img { max-width: 100%; }
p.note { color: #555; white-space: pre-line; }
"""

SETTINGS = ("dataset", "preset", "train_images", "val_images", "epochs", "batch_size", "seed")
MACHINE = ("backend", "device", "processes", "threads", "dtype")


def html_page(results: Mapping[str, Any], rows: Sequence[Sequence[str]], notes: str, pictures: Sequence[Path]) -> str:
    """The page. `rows` are the table's cells, header first."""
    settings = {name: results[name] for name in (*SETTINGS, *MACHINE)} | results["versions"]
    listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    body = [
        "<h1>The CIFAR-10 trick ladder</h1>",
        f"<p>{escape(listed)}</p>",
        _table(rows),
        f'<p class="note">{escape(notes)}</p>',
    ]
    failed = [f"<li>{escape(one['label'])}: {escape(one['reason'])}</li>" for one in results["failed"]]
    if failed:
        body.append(f"<h2>Rungs that failed</h2><ul>{''.join(failed)}</ul>")
    if results["interrupted"] is not None:
        body.append(f"<p>Interrupted in rung {escape(results['interrupted'])}.</p>")
    body += [_image(path) for path in pictures]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>The CIFAR-10 trick ladder</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *others = rows
    body = "\n".join(line(row, "td") for row in others)
    return f"<table>\n<thead>{line(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}"></p>'
