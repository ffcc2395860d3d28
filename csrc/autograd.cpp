// Nodes of the autograd graph in C++, for the norms, dropout and weight_norm: one takes 1.3 us less forward and backward
// than an autograd function in Python around the same kernel, of the 6 and 19 us of a call on a few elements, and
// backward takes no lock of the interpreter. fastnorm/norm.py and dropout.py have the same functions in Python, for what
// these do not know: fastnorm.recompute, writing in place, other kernels in _C's place.
//
// Backward is the kernel where a plain first derivative is due. It is given the last reference to dy where the engine
// had that, and writes dx over it: no fresh memory, and lines that are in the cache. Under create_graph, for a batch of
// gradients and inside of compiled autograd it is the dispatcher's op, which is differentiable and can be traced.
//
// torch's headers of its autograd take longer to compile than all of an op: they are included here alone.
#define AT_PER_OPERATOR_HEADERS  // or TensorOperators.h includes all of them
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/record_function.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include "checks.h"
#include "ops.h"

namespace fastnorm {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Setting = std::vector<c10::IValue>;  // of an op, as its schema has them

bool requires_grad(const Tensor& t) { return t.requires_grad(); }
bool requires_grad(const OptionalTensor& t) { return is_given(t) && t->requires_grad(); }

bool can_be_kept(const Tensor& t) { return has_memory(t); }
bool can_be_kept(const OptionalTensor& t) { return !is_given(t) || has_memory(*t); }

// Whether a call makes a node of the graph. Not of inputs without memory, which kernels refuse: a node would ask for
// its sizes, which a nested tensor has not.
template <typename... Tensors>
bool makes_node(const Tensors&... inputs) {
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...) && (can_be_kept(inputs) && ...);
}

// Whether a backward is that of plain tensors, which is not differentiated again: is_for_kernels of
// fastnorm/transforms.py. A tensor of vmap has no storage.
bool is_for_kernels(const Tensor& dy) {
  return !at::GradMode::is_enabled() && has_memory(dy) &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// torch.ops.fastnorm.<name>, which fastnorm/compile.py registered.
std::vector<c10::IValue> call_op(const char* name, std::vector<c10::IValue> arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow((std::string("fastnorm::") + name).c_str(), "").callBoxed(&arguments);
  return arguments;
}

c10::IValue value_of(std::optional<std::string_view> string) {
  return string ? c10::IValue(std::string(*string)) : c10::IValue();
}
std::optional<std::string_view> string_or_none(const c10::IValue& value) {
  return value.isNone() ? std::nullopt : std::optional<std::string_view>(value.toStringView());
}

constexpr size_t kInputs = 4;                   // of an op, at most
using Gradients = std::array<Tensor, kInputs>;  // of those that have one, else undefined

// What a backward has: the tensors that forward kept, the setting, and which inputs want a gradient.
struct Kept {
  const variable_list& tensors;
  const Setting& setting;
  std::array<bool, kInputs> wanted;
};

// ---- the norms: input, weight, bias and residual

// What forward keeps for backward: fastnorm/norm.py says when each is there.
struct NormTensors {
  const Tensor &input, &weight, &bias, &residual, &mask, &statistics;

  explicit NormTensors(const variable_list& kept)
      : input(kept[0]), weight(kept[1]), bias(kept[2]), residual(kept[3]), mask(kept[4]), statistics(kept[5]) {}
};

Gradients norm_gradients_by_op(const char* op, size_t activation_at, const Tensor& dy, const Kept& kept) {
  const NormTensors t(kept.tensors);
  // Without an activation the residual's gradient is dy, and an op must not return its argument.
  const auto& wanted = kept.wanted;
  const bool passed_on = wanted[3] && kept.setting[activation_at].isNone();
  const std::array<bool, 4> asked{wanted[0], wanted[1], wanted[2], wanted[3] && !passed_on};
  const auto or_none = [](const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); };
  const Tensor mask = t.mask.defined() ? t.mask : at::empty({0}, t.input.options().dtype(at::kByte));
  std::vector<c10::IValue> arguments{dy,   t.input,     or_none(t.weight), or_none(t.bias), or_none(t.residual),
                                     mask, t.statistics};
  arguments.insert(arguments.end(), kept.setting.begin(), kept.setting.end());
  arguments.emplace_back(c10::List<bool>({asked[0], asked[1], asked[2], asked[3]}));
  const auto found = call_op(op, std::move(arguments));
  const auto at = [&](size_t i) { return asked[i] ? found[i].toTensor() : Tensor(); };
  return {at(0), at(1), at(2), passed_on ? dy : at(3)};
}

Gradients gradients_of(std::tuple<Tensor, Tensor, Tensor, Tensor> found) {
  return std::apply([](auto&&... gradient) { return Gradients{std::move(gradient)...}; }, std::move(found));
}

Gradients batch_norm_gradients(Tensor dy, const Kept& kept) {
  if (!is_for_kernels(dy)) return norm_gradients_by_op("batch_norm_backward", 3, dy, kept);
  const NormTensors t(kept.tensors);
  return gradients_of(batch_norm_backward(std::move(dy), t.input, t.weight, t.bias, t.residual, t.mask, t.statistics,
                                          kept.setting[0].toBool(), string_or_none(kept.setting[3]), kept.wanted));
}

Gradients layer_norm_gradients(Tensor dy, const Kept& kept) {
  if (!is_for_kernels(dy)) return norm_gradients_by_op("layer_norm_backward", 2, dy, kept);
  const NormTensors t(kept.tensors);
  return gradients_of(layer_norm_backward(std::move(dy), t.input, t.weight, t.bias, t.residual, t.mask, t.statistics,
                                          kept.setting[0].toIntVector(), string_or_none(kept.setting[2]),
                                          kept.setting[3].toBool(), kept.wanted));
}

Gradients group_norm_gradients(Tensor dy, const Kept& kept) {
  if (!is_for_kernels(dy)) return norm_gradients_by_op("group_norm_backward", 2, dy, kept);
  const NormTensors t(kept.tensors);
  return gradients_of(group_norm_backward(std::move(dy), t.input, t.weight, t.bias, t.residual, t.mask, t.statistics,
                                          kept.setting[0].toInt(), string_or_none(kept.setting[2]), kept.wanted));
}

Gradients instance_norm_gradients(Tensor dy, const Kept& kept) {
  if (!is_for_kernels(dy)) return norm_gradients_by_op("instance_norm_backward", 2, dy, kept);
  const NormTensors t(kept.tensors);
  return gradients_of(instance_norm_backward(std::move(dy), t.input, t.weight, t.bias, t.residual, t.mask, t.statistics,
                                             string_or_none(kept.setting[2]), kept.wanted));
}

// ---- dropout: input

Gradients dropout_gradients(Tensor dy, const Kept& kept) {
  const Tensor& state = kept.tensors[0];
  const double p = kept.setting[0].toDouble();
  const int64_t channel_dims = kept.setting[1].toInt();
  const bool alpha = kept.setting[2].toBool();
  // Of an embedding with sparse gradients, say: the map is linear, element by element.
  if (dy.layout() != at::kStrided) {
    const Tensor ones = at::ones(dy.sizes(), dy.options().layout(at::kStrided));
    return {dy.mul(dropout_gradients(ones, kept)[0])};
  }
  if (!is_for_kernels(dy))
    return {call_op(alpha ? "alpha_dropout_backward" : "dropout", {dy, p, state, channel_dims})[0].toTensor()};
  if (alpha) return {alpha_dropout_backward(std::move(dy), p, state, channel_dims)};
  return {dropout(std::move(dy), p, state, channel_dims, false)};
}

// ---- weight_norm: v and g

// In torch's ops.
Gradients composite_weight_norm_gradients(const Tensor& dw, const Tensor& v, const Tensor& g) {
  at::DimVector dims;  // that a norm is over: those that g has no extent in
  for (int64_t d = 0; d < v.dim(); ++d)
    if (d >= g.dim() || g.size(d) == 1) dims.push_back(d);
  const auto arithmetic = v.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor x = v.to(arithmetic), dx = dw.to(arithmetic);
  const auto sum = [&](const Tensor& t) { return dims.empty() ? t : t.sum(dims, /*keepdim=*/true); };
  const Tensor norm = sum(x.square()).sqrt();
  const Tensor dg = sum(dx * x) / norm;
  const Tensor dv = (dx - x * (dg / norm)) * (g.to(arithmetic).view(norm.sizes()) / norm);
  return {dv.to(v.scalar_type()), dg.view(g.sizes()).to(g.scalar_type())};
}

Gradients weight_norm_gradients(Tensor dw, const Kept& kept) {
  const Tensor &v = kept.tensors[0], &g = kept.tensors[1], &norm = kept.tensors[2];
  if (!is_for_kernels(dw)) return composite_weight_norm_gradients(dw, v, g);
  const auto [dv, dg] = weight_norm_backward(dw, v, g, norm, {kept.wanted[0], kept.wanted[1]});
  return {dv, dg};
}

// ---- the node of all

enum Op : int64_t { kBatchNorm, kLayerNorm, kGroupNorm, kInstanceNorm, kDropout, kWeightNorm };
constexpr const char* kNodeNames[] = {"FastnormBatchNormBackward", "FastnormLayerNormBackward",
                                      "FastnormGroupNormBackward", "FastnormInstanceNormBackward",
                                      "FastnormDropoutBackward",   "FastnormWeightNormBackward"};
constexpr Gradients (*kGradients[])(Tensor dy, const Kept&) = {batch_norm_gradients, layer_norm_gradients,
                                                               group_norm_gradients, instance_norm_gradients,
                                                               dropout_gradients,    weight_norm_gradients};

// What an op's forward returns, and what is kept of it.
struct Result {
  Tensor y;
  variable_list kept;
  Setting setting;
};

Gradients gradients(Op op, Tensor dy, const Kept& kept) {
  const auto of_op = kGradients[op];
  // They are linear in dy, so a tangent of forward mode that it has has the same.
  const Tensor& tangent = dy._fw_grad(/*level=*/0);
  if (!tangent.defined()) return of_op(std::move(dy), kept);
  Gradients found = of_op(dy._fw_primal(/*level=*/0), kept);
  const Gradients tangents = of_op(tangent, kept);
  for (size_t i = 0; i < kInputs; ++i)
    if (found[i].defined()) found[i] = at::_make_dual(found[i], tangents[i], /*level=*/0);
  return found;
}

// Backward inside of compiled autograd, which traces it.
struct TracedBackward : torch::autograd::Function<TracedBackward> {
  static constexpr bool is_traceable = true;
  static constexpr const char* kNode = "node";  // all of it in one list, of which torch makes one input of the graph

  // The op, which inputs there are, and the setting.
  static c10::IValue pack(Op op, const std::array<bool, kInputs>& given, const Setting& setting) {
    c10::impl::GenericList list(c10::AnyType::get());
    list.reserve(1 + kInputs + setting.size());
    list.push_back(op);
    for (const bool is_given : given) list.push_back(is_given);
    for (const auto& value : setting) list.push_back(value);
    return list;
  }

  static variable_list backward(AutogradContext* ctx, variable_list& grads) {
    if (!grads[0].defined()) return variable_list(kInputs);
    const auto list = ctx->saved_data.at(kNode).toListRef();
    const variable_list tensors = ctx->get_saved_variables();
    const Setting setting = list.slice(1 + kInputs).vec();
    Kept kept{tensors, setting, {}};
    for (size_t i = 0, edge = 0; i < kInputs; ++i)
      kept.wanted[i] = list[1 + i].toBool() && ctx->needs_input_grad(edge++);
    const Gradients found = gradients(static_cast<Op>(list[0].toInt()), std::move(grads[0]), kept);
    return {found.begin(), found.end()};
  }
};

// One class for all ops, for each costs seconds to compile. What CppNode does around a backward in eager mode takes 1 us
// of the 3 that one of a few elements takes, so it does that here alone.
struct OpNode : torch::autograd::CppNode<TracedBackward> {
  Op op = kBatchNorm;
  std::array<bool, kInputs> given{};
  Setting setting;

  // In profiles, and in what anomaly mode says.
  std::string name() const override { return kNodeNames[op]; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);  // against release_variables() of another thread
    const size_t edges = num_outputs();
    variable_list results;
    results.reserve(edges);
    if (!grads[0].defined()) {
      results.resize(edges);
      return results;
    }
    const variable_list tensors = ctx_.get_saved_variables();
    Kept kept{tensors, setting, {}};
    for (size_t i = 0, edge = 0; i < kInputs; ++i) kept.wanted[i] = given[i] && task_should_compute_output(edge++);
    Gradients found = gradients(op, std::move(grads[0]), kept);
    for (size_t i = 0; i < kInputs; ++i)
      if (given[i]) results.push_back(std::move(found[i]));
    return results;
  }

  // Comes first, and alone needs what CppNode's apply_with_saved() reads.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    auto& self = const_cast<OpNode&>(*this);
    self.is_variable_input_.assign(given.begin(), given.end());
    self.ctx_.saved_data[TracedBackward::kNode] = TracedBackward::pack(op, given, setting);
    CppNode::compiled_args(args);
  }
};

// A forward in profiles: it is no op of the dispatcher's, whose they show. A test of one number where nobody profiles.
#define FASTNORM_RECORD(name) RECORD_FUNCTION(name, c10::ArrayRef<const c10::IValue>{})

// torch has had nodes behind shared_ptr up to some version, and since then behind a pointer of its own.
template <typename Node>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) {
    return c10::make_intrusive<Node>();
  } else {
    return std::shared_ptr<Node>(new Node, [](auto* node) { deleteNode(node); });
  }
}

// run() and its node in the graph; `inputs` are null where there are none. As Function::apply, but that looks for outputs
// that are views of inputs or written in place, and for tangents of forward mode, which do not come here: 0.6 us of the 3
// of a call on a few elements.
Tensor apply(Op op, const std::array<const Tensor*, kInputs>& inputs, c10::function_ref<Result()> run) {
  const auto node = make_node<OpNode>();
  node->op = op;
  node->set_ctx_grad_fn(node);
  node->ctx_.set_materialize_grads(false);
  for (size_t i = 0; i < kInputs; ++i) {
    node->given[i] = inputs[i] != nullptr;
    if (inputs[i]) node->add_next_edge(torch::autograd::impl::gradient_edge(*inputs[i]));
  }
  Result result = [&] {
    const at::AutoGradMode grad_mode(false);
    return run();
  }();

  node->setting = std::move(result.setting);
  node->ctx_.save_for_backward(std::move(result.kept));
  torch::autograd::set_history(result.y, node);
  node->save_variables_to_ctx();
  return result.y;
}

void check_without_gradient(const char* op, const OptionalTensor& running_mean, const OptionalTensor& running_var) {
  TORCH_CHECK(!(requires_grad(running_mean) || requires_grad(running_var)) || !at::GradMode::is_enabled(), op,
              ": not differentiable with respect to running_mean and running_var, got ",
              requires_grad(running_mean) ? "running_mean" : "running_var", " with requires_grad=True");
}

// What torch says when such a tensor is kept, but before running statistics are written.
void check_may_be_kept(const Tensor& t) {
  TORCH_CHECK(
      !t.defined() || !t.is_inference(),
      "Inference tensors cannot be saved for backward. Please do not use Tensors created in inference mode in "
      "computation tracked by autograd. To work around this, you can make a clone to get a normal tensor and use "
      "it in autograd, or use `torch.no_grad()` instead of `torch.inference_mode()`.");
}

// forward(keep) -> y, statistics, mask; setting() -> that of the op's backward.
template <typename Forward, typename MakeSetting>
Tensor norm(Op op, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
            const OptionalTensor& residual, std::optional<std::string_view> activation, const Forward& forward,
            const MakeSetting& setting) {
  if (!makes_node(input, weight, bias, residual)) return std::get<0>(forward(false));
  const auto or_undefined = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
  const bool keeps_residual = activation == "silu" || activation == "gelu";
  // Only an activation's slope depends on the value of bias. Else weight stands for it, for its shape and type.
  const bool keeps_bias = activation || !is_given(weight) || !is_given(bias);
  const Tensor kept[] = {input, or_undefined(weight), or_undefined(keeps_bias ? bias : weight),
                         keeps_residual ? or_undefined(residual) : Tensor()};
  for (const Tensor& t : kept) check_may_be_kept(t);
  const auto run = [&]() -> Result {
    const auto [y, statistics, mask] = forward(true);
    return {y, {kept[0], kept[1], kept[2], kept[3], mask, statistics}, setting()};
  };
  const auto given = [](const OptionalTensor& t) { return is_given(t) ? &*t : nullptr; };
  return apply(op, {&input, given(weight), given(bias), given(residual)}, run);
}

}  // namespace

Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  std::optional<std::string_view> activation, bool skip_nonfinite_stats,
                  std::optional<std::array<double, 2>> renorm) {
  FASTNORM_RECORD(renorm ? "fastnorm.batch_renorm" : "fastnorm.batch_norm");
  check_without_gradient(renorm ? "batch_renorm" : "batch_norm", running_mean, running_var);
  return norm(
      kBatchNorm, input, weight, bias, residual, activation,
      [&](bool keep) {
        return batch_norm_forward(input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                                  training, momentum, eps, activation, skip_nonfinite_stats, renorm, keep);
      },
      [&]() -> Setting {
        const auto bounds = renorm ? c10::IValue(c10::List<double>({(*renorm)[0], (*renorm)[1]})) : c10::IValue();
        return {training, momentum, eps, value_of(activation), skip_nonfinite_stats, bounds};
      });
}

Tensor layer_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, const std::vector<int64_t>& normalized_shape, double eps,
                  std::optional<std::string_view> activation, bool subtract_mean) {
  FASTNORM_RECORD(subtract_mean ? "fastnorm.layer_norm" : "fastnorm.rms_norm");
  return norm(
      kLayerNorm, input, weight, bias, residual, activation,
      [&](bool keep) {
        return layer_norm_forward(input, weight, bias, residual, normalized_shape, eps, activation, subtract_mean,
                                  keep);
      },
      [&]() -> Setting { return {normalized_shape, eps, value_of(activation), subtract_mean}; });
}

Tensor group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual, int64_t num_groups, double eps,
                  std::optional<std::string_view> activation) {
  FASTNORM_RECORD("fastnorm.group_norm");
  return norm(
      kGroupNorm, input, weight, bias, residual, activation,
      [&](bool keep) { return group_norm_forward(input, weight, bias, residual, num_groups, eps, activation, keep); },
      [&]() -> Setting { return {num_groups, eps, value_of(activation)}; });
}

Tensor instance_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& residual, const OptionalTensor& running_mean,
                     const OptionalTensor& running_var, double momentum, double eps,
                     std::optional<std::string_view> activation) {
  FASTNORM_RECORD("fastnorm.instance_norm");
  check_without_gradient("instance_norm", running_mean, running_var);
  return norm(
      kInstanceNorm, input, weight, bias, residual, activation,
      [&](bool keep) {
        return instance_norm_forward(input, weight, bias, residual, running_mean, running_var, momentum, eps,
                                     activation, keep);
      },
      [&]() -> Setting { return {momentum, eps, value_of(activation)}; });
}

Tensor differentiable_dropout(const Tensor& input, double p, const Tensor& state, int64_t channel_dims, bool alpha) {
  FASTNORM_RECORD(alpha ? "fastnorm.alpha_dropout" : "fastnorm.dropout");
  const auto y = [&] { return (alpha ? alpha_dropout : dropout)(input, p, state, channel_dims, false); };
  if (!makes_node(input)) return y();
  const auto run = [&]() -> Result { return {y(), {state}, {p, channel_dims, alpha}}; };
  return apply(kDropout, {&input}, run);
}

Tensor weight_norm(const Tensor& v, const Tensor& g, int64_t dim) {
  FASTNORM_RECORD("fastnorm.weight_norm");
  check_weight_norm(v, g, dim);
  if (!makes_node(v, g)) return std::get<0>(weight_norm_forward(v, g));
  const auto run = [&]() -> Result {
    const auto [w, norm] = weight_norm_forward(v, g);
    return {w, {v, g, norm}, {}};
  };
  return apply(kWeightNorm, {&v, &g}, run);
}

}  // namespace fastnorm
