// aten operators of the NPU backend, run by the CPU kernels on the same bytes.
//
// Stands in for the aclnn / aclop kernels behind torch_npu's registrations of aten operators for PrivateUse1.  One
// boxed function serves every operator: it replaces each tensor on "npu" by its host alias, calls the operator again
// (which now reaches the CPU kernel), and moves new results to the device.
//
// Left out: numerics and speed of the NPU, sparse tensors, the random numbers themselves (a seeded operator is
// reproducible, its numbers are the CPU's), and the checks of dtype and format that only aclnn makes.
#include "fractal_nz.h"
#include "host_alias.h"
#include "launches.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <torch_npu/csrc/aten/NPUGeneratorImpl.h>

#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace fake_npu {
namespace {

using torch::jit::Stack;

constexpr const char* kWhereToAdd = "emulator/fake_npu/aten.py";

// ---- which calls ran, for tests ------------------------------------------------------------------------------------

std::mutex registry_mutex;
bool counting = false;
std::map<std::string, int64_t> call_counts;

// Operators, by "name.overload", whose CPU kernel refuses some dtype that the NPU's takes: computed in another one.
std::map<std::string, at::ScalarType> compute_in_table;

std::string full_name(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  return schema.overload_name().empty() ? name : name + "." + schema.overload_name();
}

void count_call(const c10::OperatorHandle& op) {
  if (!counting) {
    return;
  }
  std::lock_guard<std::mutex> lock(registry_mutex);
  ++call_counts[full_name(op)];
}

// ---- one call ------------------------------------------------------------------------------------------------------

struct Operand {
  at::Tensor npu;
  at::Tensor host;
  bool written;
  bool decoded; // FRACTAL_NZ: `host` is a copy of the values
  at::Tensor before; // contents before the call; only for a written operand of a delayed launch
};

struct Call {
  std::vector<Operand> operands;
  std::optional<c10::Device> device; // of the tensors, else of the device argument
  bool result_on_cpu = false; // a device argument names the CPU
};

template <typename Function>
c10::IValue map_tensors(const c10::IValue& value, const Function& function) {
  if (value.isTensor()) {
    return function(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> mapped;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      mapped.push_back(function(tensor));
    }
    return mapped;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> mapped;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector()) {
      mapped.push_back(tensor.has_value() ? std::optional<at::Tensor>(function(*tensor)) : std::nullopt);
    }
    return mapped;
  }
  return value;
}

at::Tensor add_operand(Call& call, const c10::OperatorHandle& op, const at::Tensor& tensor, bool written) {
  if (!on_npu(tensor)) {
    return tensor;
  }
  const bool decoded = is_fractal_nz(tensor);
  if (decoded) {
    const auto& name = op.operator_name();
    check_takes_fractal_nz(name.name.substr(name.name.find("::") + 2), name.overload_name);
  }
  at::Tensor host = values_on_host(tensor);
  call.operands.push_back({tensor, host, written, decoded, {}});
  return host;
}

// The NPU generator of a call: its own argument, else the default one of the device.
at::Generator npu_generator(const std::vector<c10::IValue>& arguments, c10::Device device) {
  for (const auto& argument : arguments) {
    if (argument.isGenerator() && argument.toGenerator().defined()) {
      auto generator = argument.toGenerator();
      TORCH_CHECK(
          generator.device().is_privateuseone(),
          "Expected a 'npu' device type for generator but found '",
          generator.device().type(),
          "'");
      return generator;
    }
  }
  // torch_npu's own function: PyTorch's globalContext().defaultGenerator does not reach it before torch-npu 2.13.
  return at_npu::detail::getDefaultNPUGenerator(device.index());
}

// The next seed that `generator` gives: a mix (splitmix64) of its seed and its offset, which it advances by one Philox
// counter of four, as every random kernel of the NPU does.
uint64_t next_seed(at::Generator generator) {
  std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t offset = generator.get_offset();
  uint64_t mixed = generator.current_seed() + 0x9E3779B97F4A7C15ULL * (offset / 4 + 1);
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
  generator.set_offset(offset + 4);
  return mixed ^ (mixed >> 31);
}

// Seeds the default CPU generator for one call and puts its state back: sampling on the NPU must not move the CPU's
// random numbers, and some kernels (native_dropout) have no generator argument.
class BorrowedCpuGenerator {
 public:
  explicit BorrowedCpuGenerator(uint64_t seed) : generator_(at::detail::getDefaultCPUGenerator()), lock_(mutex()) {
    std::lock_guard<std::mutex> inner(generator_.mutex());
    state_ = generator_.get_state();
    generator_.set_current_seed(seed);
  }
  ~BorrowedCpuGenerator() {
    std::lock_guard<std::mutex> inner(generator_.mutex());
    generator_.set_state(state_);
  }
  BorrowedCpuGenerator(const BorrowedCpuGenerator&) = delete;
  BorrowedCpuGenerator& operator=(const BorrowedCpuGenerator&) = delete;

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex value;
    return value;
  }
  at::Generator generator_;
  std::lock_guard<std::recursive_mutex> lock_;
  at::Tensor state_;
};

Stack host_arguments(Call& call, const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments) {
  const auto& schema = op.schema();
  Stack hosts;
  hosts.reserve(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& value = arguments[i];
    const auto* alias = schema.arguments()[i].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (value.isDevice()) {
      const auto device = value.toDevice();
      call.result_on_cpu = device.is_cpu();
      if (device.is_privateuseone() && !call.device.has_value()) {
        call.device = device;
      }
      hosts.emplace_back(device.is_privateuseone() ? c10::Device(at::kCPU) : device);
    } else if (value.isGenerator()) {
      hosts.emplace_back(); // the borrowed default generator
    } else {
      hosts.push_back(
          map_tensors(value, [&](const at::Tensor& tensor) { return add_operand(call, op, tensor, written); }));
    }
  }
  return hosts;
}

Stack in_dtype(const Stack& arguments, at::ScalarType from, at::ScalarType to) {
  Stack converted;
  for (const auto& argument : arguments) {
    converted.push_back(map_tensors(argument, [&](const at::Tensor& tensor) {
      return tensor.defined() && tensor.scalar_type() == from ? tensor.to(to) : tensor;
    }));
  }
  return converted;
}

[[noreturn]] void refuse(const c10::OperatorHandle& op, const std::string& reason) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      "fake_npu: operator aten::",
      full_name(op),
      " of device npu cannot be run by a CPU kernel: ",
      reason,
      "  If the NPU has it, add it to ",
      kWhereToAdd,
      " (COMPUTE_IN for another dtype, ADDITIONS for a definition in plain torch).");
}

void call_on_host(const c10::OperatorHandle& op, Stack& stack) {
  const Stack arguments = stack;
  try {
    op.callBoxed(stack);
    return;
  } catch (const c10::NotImplementedError& error) {
    const auto entry = compute_in_table.find(full_name(op));
    if (entry == compute_in_table.end() || !arguments.front().isTensor()) {
      refuse(op, error.what_without_backtrace());
    }
  }
  const auto dtype = arguments.front().toTensor().scalar_type();
  const auto wider = compute_in_table.at(full_name(op));
  stack = in_dtype(arguments, dtype, wider);
  op.callBoxed(stack);
  stack = in_dtype(stack, wider, dtype);
}

void write_decoded_back(Call& call, void* stream) {
  for (auto& operand : call.operands) {
    if (!operand.written || !operand.decoded) {
      continue;
    }
    if (delayed()) {
      write_values_later(stream, operand.npu, operand.host, Source::device);
    } else {
      write_values(operand.npu, operand.host, Source::device);
    }
  }
}

// Gives a written operand the sizes, and where it moved the bytes, that the CPU kernel gave to its alias.
void follow_resize(Operand& operand) {
  const bool moved = operand.host.storage().data() != operand.npu.storage().data();
  const bool reshaped = operand.host.sizes() != operand.npu.sizes() || operand.host.strides() != operand.npu.strides();
  if (!moved && !reshaped) {
    return;
  }
  operand.npu.resize_(operand.host.sizes());
  operand.npu.unsafeGetTensorImpl()->set_sizes_and_strides(operand.host.sizes(), operand.host.strides());
  auto target = host_alias(operand.npu);
  if (moved && operand.npu.numel() > 0) {
    target.copy_(operand.host);
  }
  operand.host = target;
  if (operand.before.defined()) {
    operand.before = at::Tensor();
  }
}

at::Tensor result_on_npu(const Call& call, const at::Tensor& result, void* stream) {
  if (!result.defined() || !result.is_cpu()) {
    return result;
  }
  for (const auto& operand : call.operands) {
    if (operand.host.is_same(result)) {
      return operand.npu;
    }
  }
  if (call.result_on_cpu) {
    return result;
  }
  // A result that lies in an operand's storage (_unsafe_view and its like) shares it on the device too.
  for (const auto& operand : call.operands) {
    if (result.numel() > 0 && result.storage().data() == operand.npu.storage().data()) {
      return operand.npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
    }
  }
  const auto values = result.resolve_conj().resolve_neg();
  if (!delayed()) {
    return to_npu(values, *call.device);
  }
  const auto dense = values.is_non_overlapping_and_dense() ? values : values.contiguous();
  auto output = empty_on_npu(dense, *call.device);
  poison(host_alias(output));
  publish_later(stream, output, dense);
  return output;
}

// Real kernels write late: take the new contents aside, put the old ones back, and queue the writing.
void delay_writes(Call& call, void* stream) {
  for (auto& operand : call.operands) {
    if (!operand.written || operand.decoded || operand.host.numel() == 0) {
      continue;
    }
    auto after = operand.host.clone();
    if (operand.before.defined()) {
      operand.host.copy_(operand.before);
    } else {
      poison(operand.host);
    }
    publish_later(stream, operand.npu, after);
  }
}

// The host learns something from the call itself, so the real operator synchronises its stream.
bool synchronises(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments) {
  for (const auto& result : op.schema().returns()) {
    if (result.type()->kind() != c10::TypeKind::TensorType && result.type()->kind() != c10::TypeKind::ListType) {
      return true;
    }
  }
  if (!op.hasTag(at::Tag::dynamic_output_shape)) {
    return false;
  }
  for (const auto& argument : arguments) {
    if (!argument.isOptionalTensorList()) {
      continue;
    }
    // index with integers has a shape that is known beforehand; with masks it has not.
    for (const std::optional<at::Tensor>& index : argument.toOptionalTensorVector()) {
      if (index.has_value() && index->defined() &&
          (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) {
        return true;
      }
    }
    return false;
  }
  return true;
}

void run_on_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  count_call(op);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& schema = op.schema();
  const auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  Call call;

  // Look for the device first: what is read must be what the current stream sees.
  for (const auto& argument : arguments) {
    map_tensors(argument, [&](const at::Tensor& tensor) {
      if (on_npu(tensor) && !call.device.has_value()) {
        call.device = tensor.device();
      }
      return tensor;
    });
  }
  void* stream = nullptr;
  if (delayed()) {
    stream = current_stream(call.device.value_or(c10::Device(c10::DeviceType::PrivateUse1)));
    if (synchronises(op, arguments)) {
      synchronise(stream);
    } else {
      settle(stream);
    }
  }

  Stack host_stack = host_arguments(call, op, arguments);
  if (!call.device.has_value()) {
    call.device = c10::Device(c10::DeviceType::PrivateUse1); // a factory without a device argument: the current one
  }
  if (delayed()) {
    for (auto& operand : call.operands) {
      if (operand.written && !operand.decoded) {
        operand.before = operand.host.clone();
      }
    }
  }

  if (op.hasTag(at::Tag::nondeterministic_seeded)) {
    BorrowedCpuGenerator borrowed(next_seed(npu_generator(arguments, *call.device)));
    call_on_host(op, host_stack);
  } else {
    call_on_host(op, host_stack);
  }

  for (auto& operand : call.operands) {
    if (operand.written && !operand.decoded) {
      follow_resize(operand);
    }
  }
  write_decoded_back(call, stream);
  std::vector<c10::IValue> results;
  for (const auto& value : host_stack) {
    results.push_back(
        map_tensors(value, [&](const at::Tensor& tensor) { return result_on_npu(call, tensor, stream); }));
  }
  if (delayed()) {
    delay_writes(call, stream);
  }
  stack->insert(stack->end(), results.begin(), results.end());
}

// ---- operators without a CPU kernel, and composite ones ------------------------------------------------------------

void no_cpu_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack*) {
  refuse(op, "PyTorch has none.");
}

// torch_npu replaces some composite operators (matmul, scaled_dot_product_attention) with single kernels: PyTorch's own
// decomposition is given back, which ends in operators that the CPU has.
void run_decomposition(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd, *stack);
}

// The same for an operator with a derivative formula (native_dropout): PyTorch's own autograd kernel.
void run_pytorch_autograd(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::Autograd, *stack);
}

torch::Library& backend_library() {
  static torch::Library library(
      torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, static_cast<uint32_t>(__LINE__));
  return library;
}

torch::Library& autograd_library() {
  static torch::Library library(
      torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, static_cast<uint32_t>(__LINE__));
  return library;
}

c10::OperatorHandle find_operator(const std::string& name) {
  const auto dot = name.find('.');
  const std::string overload = dot == std::string::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchemaOrThrow(("aten::" + name.substr(0, dot)).c_str(), overload.c_str());
}

// Installs the boxed function for aten operators ("name.overload"); gives back those that no CPU kernel can run.
std::vector<std::string> install(const std::vector<std::string>& names) {
  std::vector<std::string> lacking;
  for (const auto& name : names) {
    if (find_operator(name).hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) {
      backend_library().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
    } else {
      backend_library().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&no_cpu_kernel>());
      lacking.push_back(name);
    }
  }
  return lacking;
}

// Gives aten operators that torch_npu overrides above the backend key PyTorch's own treatment back.
void install_autograd(const std::vector<std::string>& names) {
  for (const auto& name : names) {
    if (find_operator(name).hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
      autograd_library().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_decomposition>());
    } else {
      autograd_library().impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_pytorch_autograd>());
    }
  }
}

void compute_in(const std::string& name, at::ScalarType dtype) {
  find_operator(name);
  std::lock_guard<std::mutex> lock(registry_mutex);
  compute_in_table[name] = dtype;
}

void count_calls(bool on) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  counting = on;
  call_counts.clear();
}

c10::Dict<std::string, int64_t> calls() {
  std::lock_guard<std::mutex> lock(registry_mutex);
  c10::Dict<std::string, int64_t> result;
  for (const auto& [name, count] : call_counts) {
    result.insert(name, count);
  }
  return result;
}

} // namespace
} // namespace fake_npu

TORCH_LIBRARY_FRAGMENT(fake_npu, library) {
  library.def("install(str[] names) -> str[]", [](std::vector<std::string> names) { return fake_npu::install(names); });
  library.def("install_autograd(str[] names) -> ()", [](std::vector<std::string> names) {
    fake_npu::install_autograd(names);
  });
  library.def("compute_in(str name, ScalarType dtype) -> ()", [](const std::string& name, at::ScalarType dtype) {
    fake_npu::compute_in(name, dtype);
  });
  library.def("count_calls(bool on) -> ()", [](bool on) { fake_npu::count_calls(on); });
  library.def("calls() -> Dict(str, int)", []() { return fake_npu::calls(); });
  library.def("host_alias(Tensor tensor) -> Tensor", torch::CppFunction::makeFromUnboxedFunction(&fake_npu::host_alias));
  library.def("delayed() -> bool", []() { return fake_npu::delayed(); });
}
