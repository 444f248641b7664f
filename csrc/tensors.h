// Python's tensors, read by DLPack's C exchange API (github.com/dmlc/dlpack, major version 1), which torch 2.10 and
// later offer as torch.Tensor.__dlpack_c_exchange_api__: without torch's headers, and without a call of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "block.h"

namespace clipfast {

namespace dlpack {

// As dlpack.h lays them out; what is not used here has a plainer type.
struct DLTensor {
    void* data;
    struct { std::int32_t type, id; } device;
    std::int32_t ndim;
    struct { std::uint8_t code, bits; std::uint16_t lanes; } dtype;
    std::int64_t *shape, *strides;  // in elements
    std::uint64_t byte_offset;
};

constexpr std::uint8_t kFloat = 2, kBfloat = 4;  // DLDataTypeCode
constexpr std::int32_t kCPU = 1;                 // DLDeviceType

struct ExchangeAPI {
    struct { std::uint32_t major, minor; } version;
    ExchangeAPI* previous;
    void *allocator, *from_object, *to_object;
    int (*view)(void* object, DLTensor* out);  // of the object's own shape and memory; sets Python's error where it fails
    void* stream;
};

inline const ExchangeAPI* api = nullptr;

inline void use(const pybind11::capsule& capsule) {
    const auto* offered = static_cast<const ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!offered) throw pybind11::error_already_set();
    while (offered && offered->version.major != 1) offered = offered->previous;
    if (!offered || !offered->view) throw std::runtime_error("torch offers no DLPack exchange API of major version 1");
    api = offered;
}

}  // namespace dlpack

// A tensor's memory, while the tensor lives and nobody resizes it; of None there is none.
class Tensor {
  public:
    explicit Tensor(pybind11::handle object) {
        if (object.is_none()) return;
        if (dlpack::api->view(object.ptr(), &view_)) throw pybind11::error_already_set();
        if (view_.device.type != dlpack::kCPU) throw std::invalid_argument("device: accepted is the CPU");
    }

    // Its numbers, which must have T's size.
    template <class T>
    T* data() const {
        if constexpr (!std::is_void_v<T>)
            if (*this && view_.dtype.bits != 8 * sizeof(T))
                throw std::invalid_argument("dtype: got one of " + std::to_string(view_.dtype.bits) +
                                            " bits; accepted is one of " + std::to_string(8 * sizeof(T)));
        return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    }

    explicit operator bool() const { return view_.data; }

    DType dtype() const {
        const auto [code, bits, lanes] = view_.dtype;
        if (code == dlpack::kBfloat) return DType::bfloat16;
        if (code == dlpack::kFloat && bits == 64) return DType::float64;
        if (code == dlpack::kFloat && bits == 32) return DType::float32;
        if (code == dlpack::kFloat && bits == 16) return DType::float16;
        throw std::invalid_argument("dtype: accepted are float32, float64, bfloat16, float16");
    }

    Matrix matrix(const Tensor& factors) const {
        if (view_.ndim != 2) throw std::invalid_argument("features: accepted are matrices");
        return {data<void>(), view_.shape[0], view_.shape[1], view_.strides[0], view_.strides[1], factors.data<void>()};
    }

    // Of a 0-D tensor, float32 or float64.
    double get(double otherwise) const {
        if (!*this) return otherwise;
        return dtype() == DType::float64 ? *data<double>() : *data<float>();
    }

    void put(double value) const {
        if (!*this) return;
        if (dtype() == DType::float64)
            *data<double>() = value;
        else
            *data<float>() = static_cast<float>(value);  // inf beyond its range, as IEEE 754 rounds
    }

  private:
    dlpack::DLTensor view_{};
};

}  // namespace clipfast
