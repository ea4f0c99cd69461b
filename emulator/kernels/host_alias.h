// Host aliases of device tensors.
//
// The stand-in CANN hands out host memory as "device" memory, so the CPU can read and write the bytes of a tensor on
// device "npu" where they lie.  A host alias is a CPU tensor over the same storage, sizes, strides and offset.
#pragma once

#include <ATen/core/Tensor.h>

namespace fake_npu {

bool on_npu(const at::Tensor& tensor);

// A CPU tensor over the same bytes, which keeps the storage of `tensor` alive.  An operator that resizes the alias
// moves it to memory of its own: compare storages afterwards.  Any other tensor comes back as it is.
at::Tensor host_alias(const at::Tensor& tensor);

// The same without keeping the storage alive, as a launched kernel or an asynchronous copy of the real device knows
// only an address.  For work that runs later.
at::Tensor host_address(const at::Tensor& tensor);

// A new tensor on `device` with the values of the CPU tensor `host`; strides are kept where no two elements share
// memory.
at::Tensor to_npu(const at::Tensor& host, c10::Device device);

// An uninitialised tensor on `device` that has the dtype, sizes and strides of the CPU tensor `host`.
at::Tensor empty_on_npu(const at::Tensor& host, c10::Device device);

// Fills the elements of the CPU tensor `host` with 0xFF bytes: NaN in every floating type, -1 in the integers.
void poison(const at::Tensor& host);

} // namespace fake_npu
