// The private format FRACTAL_NZ (aclFormat 29), as a real re-layout of the bytes.
//
// Stands in for TransData and for what torch_npu does with tensors in a private format.  The layout: a base tensor of
// sizes (..., M, N) is stored as (..., ceil(N/C0), ceil(M/16), 16, C0), padded with zeros; C0 is 32 for one-byte types
// and 16 for all others (torch_npu, FormatHelper.cpp; CANN documentation, "Data Formats").  C0 is not computed here: the
// storage sizes are torch_npu's own, from the storage description that its allocation made.
//
// Sizes and strides of a tensor stay those of the base format; a view has the sizes of the view, and the format belongs
// to the storage.  What follows, with where it was read:
//   - Copies (CopyKernel.cpp, FormatCastKernelNpu.cpp): reading any view of a FRACTAL_NZ storage converts the whole
//     storage to the base format first, so it gives the right values; so does writing from device memory.  A copy from
//     the host converts only its own block and writes that from the beginning of the storage on
//     (NpuStorageOffsetGuard): right for a whole tensor, and for a view it destroys other elements.  Inferred: how the
//     bytes of that block lie.
//   - Other aten operators (op_plugin's generated OpInterface.cpp): with an operand in a private format they go to the
//     legacy kernels (acl_op), which convert; operators without one raise "Current operator ... do not support internal
//     format."  Which those are is read from the installed libtorch_npu.so (fake_npu/formats.py).
//   - Memory that is handled by address (HCCL, IPC handles, aclrtMemcpy, set_, another dtype's view) is raw bytes.
//
// Left out: other private formats (NC1HWC0, FRACTAL_Z), packed int4, customize_dtype, the other way of casting that
// torch_npu takes with CANN 9.1 or newer, and devices that have aclnn operators only.
#include "fractal_nz.h"

#include "host_alias.h"
#include "launches.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/constant_pad_nd.h>
#include <torch/library.h>
#include <torch_npu/csrc/core/NPUStorageImpl.h>

#include <algorithm>
#include <cstring>
#include <unordered_set>
#include <vector>

namespace fake_npu {
namespace {

constexpr int64_t kBlockRows = 16;

std::unordered_set<std::string>& refusing_operators() {
  static std::unordered_set<std::string> names;
  return names;
}

torch_npu::NPUStorageDesc& description(const at::Tensor& tensor) {
  // Every storage on the device is one of torch_npu's: it relies on the same cast.
  return static_cast<torch_npu::NPUStorageImpl*>(tensor.storage().unsafeGetStorageImpl())->npu_desc_;
}

at::IntArrayRef base_sizes(const at::Tensor& tensor) {
  return description(tensor).base_sizes_;
}

// (..., N1, M1, 16, C0) of a base tensor of `sizes`.
std::vector<int64_t> fractal_sizes(at::IntArrayRef sizes, int64_t block_columns) {
  std::vector<int64_t> result(sizes.begin(), sizes.end() - 2);
  const int64_t rows = sizes[sizes.size() - 2];
  const int64_t columns = sizes[sizes.size() - 1];
  result.push_back((columns + block_columns - 1) / block_columns);
  result.push_back((rows + kBlockRows - 1) / kBlockRows);
  result.push_back(kBlockRows);
  result.push_back(block_columns);
  return result;
}

// Exchanges (..., N1, M1, 16, C0) with (..., M1, 16, N1, C0).
at::Tensor blocks_to_rows(const at::Tensor& fractals) {
  return fractals.movedim(-4, -2);
}

// The values (..., M, N) of FRACTAL_NZ `fractals`: a contiguous copy.
at::Tensor decode(const at::Tensor& fractals, at::IntArrayRef sizes) {
  const auto rows = blocks_to_rows(fractals).flatten(-2).flatten(-3, -2);
  return rows.narrow(-2, 0, sizes[sizes.size() - 2])
      .narrow(-1, 0, sizes[sizes.size() - 1])
      .clone(at::MemoryFormat::Contiguous);
}

// `values` (..., M, N) in FRACTAL_NZ: a contiguous tensor of the fractal sizes.
at::Tensor encode(const at::Tensor& values, int64_t block_columns) {
  const auto sizes = fractal_sizes(values.sizes(), block_columns);
  const auto rank = sizes.size();
  const int64_t rows = sizes[rank - 3] * kBlockRows;
  const int64_t columns = sizes[rank - 4] * block_columns;
  const auto padded = at::constant_pad_nd(values, {0, columns - values.size(-1), 0, rows - values.size(-2)});
  const auto split = padded.unflatten(-2, {sizes[rank - 3], kBlockRows}).unflatten(-1, {sizes[rank - 4], block_columns});
  return split.movedim(-2, -4).contiguous();
}

// A CPU tensor over the storage of `tensor` as it lies: the fractal sizes, or for a base format the base sizes.
at::Tensor stored(const at::Tensor& tensor) {
  const auto& about = description(tensor);
  const at::IntArrayRef sizes = is_fractal_nz(tensor) ? about.storage_sizes_ : about.base_sizes_;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * sizes[i];
  }
  return host_alias(tensor).as_strided(sizes, strides, 0);
}

// The values of the whole storage that `tensor` lies in: a copy, contiguous, of the base sizes.
at::Tensor base_values(const at::Tensor& tensor) {
  const auto bytes = stored(tensor);
  return is_fractal_nz(tensor) ? decode(bytes, base_sizes(tensor)) : bytes.clone();
}

bool is_whole(const at::Tensor& tensor) {
  return tensor.sizes() == base_sizes(tensor) && tensor.is_contiguous() && tensor.storage_offset() == 0;
}

// Writes `values` as a base tensor of their own to the beginning of the storage of `self`.
void write_from_beginning(const at::Tensor& self, const at::Tensor& values) {
  auto target = stored(self);
  const auto block =
      values.dim() < 2 || !is_fractal_nz(self) ? values.contiguous() : encode(values, target.size(-1));
  const auto bytes = std::min(block.nbytes(), target.nbytes());
  std::memcpy(target.data_ptr(), block.data_ptr(), bytes);
}

// The kernel "Identity" between storages of different formats, as FormatCastKernelNpu.cpp launches it.
void convert_storage(const at::Tensor& self, const at::Tensor& source) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  TORCH_CHECK(
      self.scalar_type() == source.scalar_type(),
      "fake_npu: a format cast keeps the dtype, not ",
      source.scalar_type(),
      " to ",
      self.scalar_type());
  if (!delayed()) {
    write_from_beginning(self, base_values(source));
    return;
  }
  void* stream = current_stream(self.device());
  settle(stream);
  poison(stored(self));
  enqueue(stream, [self, values = base_values(source)]() { write_from_beginning(self, values); });
}

at::Tensor base_format(const at::Tensor& tensor) {
  if (!on_npu(tensor) || !is_fractal_nz(tensor)) {
    return tensor;
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!delayed()) {
    return to_npu(values_on_host(tensor), tensor.device());
  }
  void* stream = current_stream(tensor.device());
  settle(stream);
  const auto values = values_on_host(tensor).contiguous();
  auto result = empty_on_npu(values, tensor.device());
  poison(host_alias(result));
  publish_later(stream, result, values);
  return result;
}

// Between base formats (ND, NCHW, ...) only the description changes.
void describe_as(const at::Tensor& tensor, int64_t acl_format) {
  description(tensor).npu_format_ = static_cast<aclFormat>(acl_format);
  description(tensor).origin_format_ = static_cast<aclFormat>(acl_format);
}

} // namespace

bool is_fractal_nz(const at::Tensor& tensor) {
  return description(tensor).npu_format_ == ACL_FORMAT_FRACTAL_NZ;
}

void check_takes_fractal_nz(const std::string& name, const std::string& overload) {
  const bool out = overload.size() >= 3 && overload.compare(overload.size() - 3, 3, "out") == 0;
  const std::string function = out ? name + "_out" : name;
  TORCH_CHECK(
      refusing_operators().count(function) == 0, "Current operator ", function, " do not support internal format. ");
}

at::Tensor values_on_host(const at::Tensor& tensor) {
  if (!on_npu(tensor) || !is_fractal_nz(tensor)) {
    return host_alias(tensor);
  }
  return base_values(tensor).as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

void write_values(const at::Tensor& self, const at::Tensor& values, Source source) {
  if (!is_fractal_nz(self)) {
    host_alias(self).copy_(values);
    return;
  }
  if (source == Source::host && !is_whole(self)) {
    write_from_beginning(self, values.expand(self.sizes()).to(self.scalar_type()));
    return;
  }
  auto base = base_values(self);
  base.as_strided(self.sizes(), self.strides(), self.storage_offset()).copy_(values);
  write_from_beginning(self, base);
}

void write_values_later(void* stream, const at::Tensor& self, const at::Tensor& values, Source source) {
  if (!is_fractal_nz(self)) {
    publish_later(stream, self, values);
    return;
  }
  // Keeps the storage, with its description, alive until then.
  enqueue(stream, [self, values, source]() { write_values(self, values, source); });
}

} // namespace fake_npu

TORCH_LIBRARY_FRAGMENT(fake_npu, library) {
  library.def("base_format(Tensor tensor) -> Tensor", torch::CppFunction::makeFromUnboxedFunction(&fake_npu::base_format));
  library.def("base_sizes(Tensor tensor) -> int[]", [](const at::Tensor& tensor) {
    return fake_npu::base_sizes(tensor).vec();
  });
  library.def("convert_storage(Tensor(a!) self, Tensor source) -> ()", [](at::Tensor self, const at::Tensor& source) {
    fake_npu::convert_storage(self, source);
  });
  library.def("describe_as(Tensor(a!) tensor, int acl_format) -> ()", [](at::Tensor tensor, int64_t acl_format) {
    fake_npu::describe_as(tensor, acl_format);
  });
  library.def("refuse_fractal_nz(str[] functions) -> ()", [](const std::vector<std::string>& functions) {
    fake_npu::refusing_operators().insert(functions.begin(), functions.end());
  });
}
