// When the effects of a launch are seen: at once, or (FAKE_CANN_ASYNC=1) when its stream goes on.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

namespace fake_npu {

// Whether the stand-in CANN delays asynchronous work until a synchronise.  Fixed for the life of the process.
bool delayed();

// The stream (aclrtStream) that torch_npu has made current for the calling thread on `device`.
void* current_stream(c10::Device device);

// Makes every effect of earlier work on `stream` visible in device memory, as a kernel that is queued behind it sees
// it.  What was copied to the host stays hidden from the host.  Nothing where launches are not delayed.
void settle(void* stream);

// The host waits for `stream`.  Nothing where launches are not delayed.
void synchronise(void* stream);

// Queues `work` behind everything on `stream`.
void enqueue(void* stream, std::function<void()> work);

// Queues the writing of `values` (CPU) to the elements of the device tensor `target`; `values` are read when that runs.
// The storage of the target is not kept alive, as a launched kernel does not keep it.
void publish_later(void* stream, const at::Tensor& target, const at::Tensor& values);

// aclrtMemcpyAsync between device memory and host memory, both dense and of the same dtype and sizes.
void copy_to_device_later(void* stream, const at::Tensor& target, const at::Tensor& host_source);
void copy_to_host_later(void* stream, const at::Tensor& host_target, const at::Tensor& source);

} // namespace fake_npu
