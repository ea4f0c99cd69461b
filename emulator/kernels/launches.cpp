// Launches and asynchronous copies on a stream of the stand-in CANN: see launches.h.
//
// The queue is the stand-in's (fake_cann/stream.c).  Where the loaded libascendcl.so has none, everything is done at
// once.  A launch first lets its own stream finish on the device, so at most the last launch of a stream is missing, and
// a copy from pinned memory is late only until the next launch behind it.  Left out: the time that real work takes.
#include "launches.h"

#include "host_alias.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>

#include <memory>

// Weak: this library also loads over a libascendcl.so that has no queue.
extern "C" {
int fake_cann_async(void) __attribute__((weak));
int fake_cann_stream_enqueue(void* stream, void (*run)(void*), void* argument) __attribute__((weak));
int fake_cann_stream_drain(void* stream) __attribute__((weak));
}

namespace fake_npu {
namespace {

void check(int error, const char* what) {
  TORCH_CHECK(error == 0, "fake_npu: ", what, " failed with CANN error ", error);
}

void run_and_delete(void* argument) {
  std::unique_ptr<std::function<void()>> work(static_cast<std::function<void()>*>(argument));
  // Whoever drains the stream may be inside a Python dispatch mode, which must not see the CPU tensors of this work.
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_python(c10::python_ks);
  (*work)();
}

} // namespace

bool delayed() {
  static const bool value = fake_cann_async != nullptr && fake_cann_stream_enqueue != nullptr &&
      fake_cann_stream_drain != nullptr && fake_cann_async() != 0;
  return value;
}

void* current_stream(c10::Device device) {
  // need_empty=false: do not wait for torch_npu's own task queue, which TASK_QUEUE_ENABLE=0 leaves empty.
  return c10_npu::getCurrentNPUStream(device.has_index() ? device.index() : -1).stream(false);
}

void settle(void* stream) {
  if (delayed()) {
    check(fake_cann_stream_drain(stream), "fake_cann_stream_drain");
  }
}

void synchronise(void* stream) {
  if (delayed()) {
    check(aclrtSynchronizeStream(stream), "aclrtSynchronizeStream");
  }
}

void enqueue(void* stream, std::function<void()> work) {
  auto* argument = new std::function<void()>(std::move(work));
  check(fake_cann_stream_enqueue(stream, &run_and_delete, argument), "fake_cann_stream_enqueue");
}

void publish_later(void* stream, const at::Tensor& target, const at::Tensor& values) {
  auto destination = host_address(target);
  enqueue(stream, [destination, values]() { destination.copy_(values); });
}

void copy_to_device_later(void* stream, const at::Tensor& target, const at::Tensor& host_source) {
  const size_t bytes = target.nbytes();
  check(
      aclrtMemcpyAsync(target.data_ptr(), bytes, host_source.data_ptr(), bytes, ACL_MEMCPY_HOST_TO_DEVICE, stream),
      "aclrtMemcpyAsync");
  enqueue(stream, [host_source]() {}); // torch_npu's host allocator keeps the block until then
}

void copy_to_host_later(void* stream, const at::Tensor& host_target, const at::Tensor& source) {
  const size_t bytes = host_target.nbytes();
  check(
      aclrtMemcpyAsync(host_target.data_ptr(), bytes, source.data_ptr(), bytes, ACL_MEMCPY_DEVICE_TO_HOST, stream),
      "aclrtMemcpyAsync");
}

} // namespace fake_npu
