"""docs/adding_an_op.md, word for word: its files compiled, its op through the tests of the table."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import test_errors
import test_ops
import torch
from cases import Case
from torch import nn
from torch.utils import cpp_extension

import fastnorm
import fastnorm.functional as fn

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "adding_an_op.md").read_text()
# path: the code under its name
CODE = dict(re.findall(r"^\*\*`(\S+)`\*\*[^\n]*\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))

_BINDINGS = """
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
PYBIND11_MODULE(layer_scale_native, m) {{
  using torch::wrap_pybind_function_no_gil;
{lines}
}}
"""


def _compile(folder: Path) -> Path:
    """The op's sources with what they need of the library, the plain instruction set alone, as one small extension."""
    csrc = folder / "csrc"
    (csrc / "cpu").mkdir(parents=True)
    for header in (*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cpu").glob("*.h")):
        (csrc / header.relative_to(ROOT / "csrc")).write_text(header.read_text())
    for path in ("csrc/layer_scale.h", "csrc/layer_scale.cpp", "csrc/cpu/layer_scale.cpp"):
        (folder / path).write_text(CODE[path])
    end = "}  // namespace fastnorm"
    ops = (csrc / "ops.h").read_text().rpartition(end)
    (csrc / "ops.h").write_text(f"{ops[0]}{CODE['csrc/ops.h']}\n{end}\n")
    shared = "".join((ROOT / "csrc" / f"{name}.cpp").read_text() for name in ("tensors", "runtime", "device"))
    # host code as one file: torch's headers take most of the time
    host = CODE["csrc/layer_scale.cpp"] + shared + _BINDINGS.format(lines=CODE["csrc/bindings.cpp"])
    (csrc / "host.cpp").write_text(host)

    library = folder / f"layer_scale_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"], str(csrc)]
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [
        os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O1", "-std=c++20", "-fopenmp", "-fvisibility=hidden",
        "-ffp-contract=off", "-w", "-DFASTNORM_PLAIN", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT",
        *(f"-I{path}" for path in includes), str(csrc / "host.cpp"), str(csrc / "cpu" / "layer_scale.cpp"),
        f"-L{torch_lib}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{torch_lib}",
        "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return library


def _load(name: str, path: Path) -> object:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """The case of the page, after all its steps."""
    folder = tmp_path_factory.mktemp("adding_an_op")
    native = _load("layer_scale_native", _compile(folder))
    # The page's ops are registered in a library that is taken down: other tests look at all ops that there are.
    library = torch.library.Library("fastnorm", "FRAGMENT")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fastnorm.compile, "_library", library)
        for name in ("layer_scale_forward", "layer_scale_backward"):
            patch.setattr(fastnorm._C, name, getattr(native, name), raising=False)
        source = folder / "layer_scale.py"
        source.write_text(CODE["fastnorm/layer_scale.py"])
        module = _load("fastnorm.layer_scale", source)
        patch.setattr(fn, "layer_scale", module.layer_scale, raising=False)
        patch.setattr(fastnorm, "LayerScale", module.LayerScale, raising=False)
        yield eval(CODE["tests/cases.py"], {**vars(cases)})
    library._destroy()
    del sys.modules["fastnorm.layer_scale"], sys.modules["layer_scale_native"]


@pytest.mark.parametrize("dtype", test_ops.FLOATS, ids=str)
def test_accuracy(case: Case, dtype: torch.dtype) -> None:
    test_ops.test_against_float64(case, dtype, "cpu")
    test_ops.test_against_float64_channels_last(case, dtype, "cpu")


@pytest.mark.parametrize(
    "property_of_all",
    (
        test_ops.test_output_has_the_layout_of_the_input,
        test_ops.test_expanded_gradient,
        test_ops.test_inputs_and_gradient_are_not_written,
        test_ops.test_empty,
        test_ops.test_only_wanted_gradients,
        test_ops.test_gradcheck,
        test_ops.test_gradgradcheck,
        test_ops.test_third_derivative,
    ),
)
def test_what_all_ops_share(case: Case, property_of_all) -> None:
    property_of_all(case, "cpu")


@pytest.mark.parametrize("name", test_ops.STRIDES)
def test_strides(case: Case, name: str) -> None:
    test_ops.test_other_strides(case, name, "cpu")


def test_threads_and_memory(case: Case) -> None:
    test_ops.test_same_bits_for_any_number_of_threads(case, torch.float32, "cpu")
    test_ops.test_kept_for_backward(case, torch.float32, "cpu")


def test_messages(case: Case) -> None:
    for call, kind, message in eval(CODE["tests/test_errors.py"], {**vars(test_errors)}).values():
        with pytest.raises(kind, match=message):
            call()


def test_module_and_compiler(case: Case) -> None:
    """One graph, whose op and derivative are those of the page."""
    branch = nn.Sequential(nn.Linear(6, 6), fastnorm.LayerScale(6, 0.5))
    x = torch.randn(3, 6, requires_grad=True)
    wanted = torch.autograd.grad(branch(x).square().sum(), [x, *branch.parameters()])
    compiled = torch.compile(branch, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *branch.parameters()])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_op_has_no_second_derivative(case: Case) -> None:
    """The page gives its backward none, and to ask for it is an error; that of the function has one."""
    x = torch.randn(3, 6, requires_grad=True)
    gamma = torch.ones(6, requires_grad=True)
    y = torch.ops.fastnorm.layer_scale(x, gamma)
    (first,) = torch.autograd.grad(y.square().sum(), gamma, create_graph=True)
    with pytest.raises(NotImplementedError, match="can be differentiated once"):
        first.sum().backward()
