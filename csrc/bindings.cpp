// fastnorm._C: one line an op. Every call releases the interpreter's lock.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "cpu/parallel.h"
#include "device.h"
#include "explain.h"
#include "isa.h"
#include "ops.h"

namespace py = pybind11;

namespace {

const char* instruction_set() {
  switch (fastnorm::isa()) {
    case fastnorm::Isa::kAvx512: return "AVX512";
    case fastnorm::Isa::kAvx2: return "AVX2";
    case fastnorm::Isa::kDefault: break;
  }
#if defined(__aarch64__)
  return "NEON";
#else
  return "default";
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using torch::wrap_pybind_function_no_gil;
  m.doc() = "fastnorm's kernels; use fastnorm.functional or the modules.";

  m.def("batch_norm_forward", wrap_pybind_function_no_gil(fastnorm::batch_norm_forward));
  m.def("batch_norm_backward", wrap_pybind_function_no_gil(fastnorm::batch_norm_backward));
  m.def("batch_norm_statistics", wrap_pybind_function_no_gil(fastnorm::batch_norm_statistics));
  m.def("batch_norm_normalize", wrap_pybind_function_no_gil(fastnorm::batch_norm_normalize));
  m.def("batch_norm_backward_reduce", wrap_pybind_function_no_gil(fastnorm::batch_norm_backward_reduce));
  m.def("batch_norm_backward_elements", wrap_pybind_function_no_gil(fastnorm::batch_norm_backward_elements));
  m.def("dropout_state", wrap_pybind_function_no_gil(fastnorm::dropout_state));
  m.def("dropout", wrap_pybind_function_no_gil(fastnorm::dropout));
  m.def("alpha_dropout", wrap_pybind_function_no_gil(fastnorm::alpha_dropout));
  m.def("alpha_dropout_backward", wrap_pybind_function_no_gil(fastnorm::alpha_dropout_backward));
  m.def("layer_norm_forward", wrap_pybind_function_no_gil(fastnorm::layer_norm_forward));
  m.def("layer_norm_backward", wrap_pybind_function_no_gil(fastnorm::layer_norm_backward));
  m.def("local_response_norm_forward", wrap_pybind_function_no_gil(fastnorm::local_response_norm_forward));
  m.def("local_response_norm_backward", wrap_pybind_function_no_gil(fastnorm::local_response_norm_backward));
  m.def("spectral_norm_backward", wrap_pybind_function_no_gil(fastnorm::spectral_norm_backward));
  m.def("spectral_norm_forward", wrap_pybind_function_no_gil(fastnorm::spectral_norm_forward));
  m.def("group_norm_forward", wrap_pybind_function_no_gil(fastnorm::group_norm_forward));
  m.def("group_norm_backward", wrap_pybind_function_no_gil(fastnorm::group_norm_backward));
  m.def("instance_norm_forward", wrap_pybind_function_no_gil(fastnorm::instance_norm_forward));
  m.def("instance_norm_backward", wrap_pybind_function_no_gil(fastnorm::instance_norm_backward));

  // differentiable as they are
  m.def("batch_norm", wrap_pybind_function_no_gil(fastnorm::batch_norm));
  m.def("layer_norm", wrap_pybind_function_no_gil(fastnorm::layer_norm));
  m.def("group_norm", wrap_pybind_function_no_gil(fastnorm::group_norm));
  m.def("instance_norm", wrap_pybind_function_no_gil(fastnorm::instance_norm));
  m.def("differentiable_dropout", wrap_pybind_function_no_gil(fastnorm::differentiable_dropout));
  m.def("weight_norm", wrap_pybind_function_no_gil(fastnorm::weight_norm));

  m.def("plan_slices", fastnorm::plan_slices);
  m.def("plan_rows", fastnorm::plan_rows);
  m.def("plan_dropout", fastnorm::plan_dropout);
  m.def("plan_windows", fastnorm::plan_windows);
  m.def("plan_weights", fastnorm::plan_weights);
  m.def("instruction_set", instruction_set, "The instruction set that the kernels use in this process.");
  m.def("stream_threshold", fastnorm::cpu::stream_threshold,
        "Bytes of an output from which CPU kernels write past the caches.");
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("compiler") = __VERSION__;

  const fastnorm::CudaBuild& cuda = fastnorm::cuda_build();
  m.def("cuda_build_runs_on", fastnorm::cuda_build_runs_on,
        "Whether a device of compute capability 90 (9.0) can run it.");
  m.attr("cuda_version") = cuda.version;
  m.attr("cuda_binaries") = cuda.binaries;
  m.attr("cuda_ptx") = cuda.ptx;
  m.attr("cuda_ops") = cuda.ops;
}
