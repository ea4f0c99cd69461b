// Copies between the host and the device, and on the device.
//
// Stands in for torch_npu's copy_, _copy_from, _copy_from_and_resize, _to_copy and _local_scalar_dense.  In torch_npu
// these convert dtype and layout by kernels and move bytes by aclrtMemcpyAsync; here the CPU's copy_ does all, on host
// aliases.  With FAKE_CANN_ASYNC=1 they follow torch_npu's CopyKernelOpApi.cpp:
//   - a non_blocking copy with host memory is aclrtMemcpyAsync on the current stream; one that must first make the host
//     side contiguous or cast it goes through unpinned memory, and so ends before the call does;
//   - any other copy with host memory waits for the current stream;
//   - a copy on one device is a launch; between two devices both current streams are waited for.
#include "fractal_nz.h"
#include "host_alias.h"
#include "launches.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <torch/library.h>

namespace fake_npu {
namespace {

// Whether bytes move as they are.
bool one_to_one(const at::Tensor& self, const at::Tensor& source) {
  return self.scalar_type() == source.scalar_type() && self.sizes() == source.sizes() && self.is_contiguous() &&
      source.is_contiguous() && self.is_conj() == source.is_conj() && self.is_neg() == source.is_neg();
}

void copy_on_device(const at::Tensor& self, const at::Tensor& source) {
  void* stream = current_stream(self.device());
  if (self.device() != source.device()) {
    synchronise(current_stream(source.device()));
    synchronise(stream);
  } else if (delayed()) {
    settle(stream);
    write_values_later(stream, self, values_on_host(source).clone(), Source::device);
    return;
  }
  write_values(self, values_on_host(source), Source::device);
}

void copy_to_device(const at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!delayed()) {
    write_values(self, source, Source::host);
    return;
  }
  void* stream = current_stream(self.device());
  if (non_blocking && one_to_one(self, source) && !is_fractal_nz(self)) {
    copy_to_device_later(stream, self, source);
    return;
  }
  if (non_blocking && source.is_pinned() && source.is_contiguous() && source.scalar_type() == self.scalar_type()) {
    // To a contiguous tensor on the device first, from there by a kernel.
    write_values_later(stream, self, source, Source::host);
    return;
  }
  synchronise(stream);
  write_values(self, source, Source::host);
}

void copy_to_host(const at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (!delayed()) {
    self.copy_(values_on_host(source));
    return;
  }
  void* stream = current_stream(source.device());
  if (!non_blocking || !self.is_contiguous() || self.scalar_type() != source.scalar_type()) {
    synchronise(stream);
    self.copy_(values_on_host(source));
    return;
  }
  settle(stream);
  auto values = values_on_host(source).expand(self.sizes()).clone(at::MemoryFormat::Contiguous);
  copy_to_host_later(stream, self, values);
  enqueue(stream, [values]() {}); // keeps them until the copy has run
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (self.is_same(source) || self.numel() == 0) {
    return self;
  }
  if (on_npu(self) && on_npu(source)) {
    copy_on_device(self, source);
  } else if (on_npu(self)) {
    copy_to_device(self, source, non_blocking);
  } else {
    copy_to_host(self, source, non_blocking);
  }
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& destination, bool non_blocking) {
  at::Tensor target = destination;
  return copy_(target, self, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& destination) {
  if (destination.sizes() != self.sizes()) {
    destination.resize_(self.sizes());
  }
  return copy_from(self, destination, false);
}

at::Scalar local_scalar(const at::Tensor& self) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  synchronise(current_stream(self.device()));
  return at::_local_scalar_dense(values_on_host(self));
}

// PyTorch's own _to_copy: an empty tensor (pinned, for a non_blocking copy to the host) and copy_.
void to_copy(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd, *stack);
}

} // namespace
} // namespace fake_npu

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("copy_", &fake_npu::copy_);
  library.impl("_copy_from", &fake_npu::copy_from);
  library.impl("_copy_from_and_resize", &fake_npu::copy_from_and_resize);
  library.impl("_local_scalar_dense", &fake_npu::local_scalar);
  library.impl("_to_copy", torch::CppFunction::makeFromBoxedFunction<&fake_npu::to_copy>());
}
