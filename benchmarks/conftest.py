"""The command line of ``pytest benchmarks``, what its JSON says of the machine, and the table at its end."""

from __future__ import annotations

from typing import Any

import harness
import machine
import pytest
import report
import torch

import fastnorm


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fastnorm")
    group.addoption("--quick", action="store_true", help="a part of the rows: three minutes on two cores")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the workloads run")


def pytest_configure(config: Any) -> None:
    harness.SESSION.device = config.getoption("device")
    harness.SESSION.quick = config.getoption("quick")
    if harness.SESSION.device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no GPU")
    if results := config.getoption("benchmark_json", None):
        results.parent.mkdir(parents=True, exist_ok=True)  # before the minutes that it takes
    fastnorm.set_fallback("error")  # torch's own op would be measured under fastnorm's name


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of the benchmarks; tests that were named beside them stay as they are."""
    for item in items:
        if "workload" in parameters_of(item):
            item.add_marker(pytest.mark.benchmark(timer=harness.REPLAY))
    if config.getoption("quick"):
        left_out = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_quick(item)]


def parameters_of(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_quick(item: Any) -> bool:
    parameters = parameters_of(item)
    return "workload" not in parameters or (parameters["workload"].quick and parameters["passes"] != "both")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    return machine.machine_info(harness.SESSION.device)


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return machine.commit_info()


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keeps what the report needs: the rounds themselves go."""
    for one in output_json["benchmarks"]:
        one["stats"].pop("data", None)
        del one["params"], one["param"]  # repr of objects, with addresses; the name says it, too


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    rows = [report.Row.of(bench.extra_info) for bench in session.benchmarks] if session else []
    if rows:
        terminalreporter.write_line("")
        for line in report.plain_table(rows):
            terminalreporter.write_line(line)
