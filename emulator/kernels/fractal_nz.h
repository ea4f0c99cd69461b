// The private format FRACTAL_NZ of device tensors: see fractal_nz.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace fake_npu {

// Where the values of a copy come from.
enum class Source { host, device };

// Whether the storage of `tensor` is laid out as FRACTAL_NZ (torch_npu's storage description says format 29).
bool is_fractal_nz(const at::Tensor& tensor);

// Raises RuntimeError where torch_npu refuses private formats to the operator ("add_", overload "out", ...).
void check_takes_fractal_nz(const std::string& name, const std::string& overload);

// A CPU tensor with the values that `tensor` denotes: a host alias, or for FRACTAL_NZ a decoded copy.
at::Tensor values_on_host(const at::Tensor& tensor);

// Writes `values` (CPU) to the device tensor `self`, whatever its format.
void write_values(const at::Tensor& self, const at::Tensor& values, Source source);

// The same, queued on `stream`; `values` are read when that runs.
void write_values_later(void* stream, const at::Tensor& self, const at::Tensor& values, Source source);

} // namespace fake_npu
