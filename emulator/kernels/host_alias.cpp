// Host aliases of device tensors: see host_alias.h.
//
// Left out: sparse and quantised tensors, which have no single strided storage.
#include "host_alias.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>

namespace fake_npu {
namespace {

void release_storage(void* storage) {
  delete static_cast<c10::Storage*>(storage);
}

at::Tensor alias(const at::Tensor& tensor, at::DataPtr bytes) {
  // Resizable, with the CPU allocator: an out= operand may grow.
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(),
      tensor.storage().nbytes(),
      std::move(bytes),
      c10::GetAllocator(at::kCPU),
      /*resizable=*/true);
  auto host = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(storage)), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  host._set_conj(tensor.is_conj());
  host._set_neg(tensor.is_neg());
  return host;
}

} // namespace

bool on_npu(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_privateuseone();
}

at::Tensor host_alias(const at::Tensor& tensor) {
  if (!on_npu(tensor)) {
    return tensor;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == c10::kStrided, "fake_npu: no host alias of a tensor with layout ", tensor.layout());
  const c10::Storage& storage = tensor.storage();
  auto* owner = new c10::Storage(storage);
  return alias(tensor, at::DataPtr(const_cast<void*>(storage.data()), owner, &release_storage, at::kCPU));
}

at::Tensor host_address(const at::Tensor& tensor) {
  if (!on_npu(tensor)) {
    return tensor;
  }
  return alias(tensor, at::DataPtr(const_cast<void*>(tensor.storage().data()), at::kCPU));
}

at::Tensor empty_on_npu(const at::Tensor& host, c10::Device device) {
  auto options = host.options().device(device).pinned_memory(false).requires_grad(false);
  return at::empty_strided(host.sizes(), host.strides(), options);
}

at::Tensor to_npu(const at::Tensor& host, c10::Device device) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto values = host.is_non_overlapping_and_dense() ? host : host.contiguous();
  auto result = empty_on_npu(values, device);
  host_alias(result).copy_(values);
  return result;
}

void poison(const at::Tensor& host) {
  const auto width = static_cast<int64_t>(host.element_size());
  if (host.is_non_overlapping_and_dense()) {
    std::memset(host.data_ptr(), 0xFF, static_cast<size_t>(host.numel() * width));
    return;
  }
  auto filled = at::empty_strided(host.sizes(), host.strides(), host.options().pinned_memory(false));
  std::memset(filled.data_ptr(), 0xFF, filled.storage().nbytes());
  host.copy_(filled);
}

} // namespace fake_npu
