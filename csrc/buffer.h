// Uninitialized memory, aligned to cache lines.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "block.h"

namespace clipfast {

constexpr std::size_t kLine = 64;

// What a buffer needs beyond the sizes of the parts that are taken from it, for sixteen parts.
template <class T>
constexpr index_t kBufferSlack = 16 * kLine / sizeof(T);

// One allocation for all that a pass needs: the allocator keeps one block for the next call, several it would give back.
template <class T>
class Buffer {
  public:
    explicit Buffer(index_t size) {
        data_.reset(static_cast<T*>(std::aligned_alloc(kLine, lines(size) * kLine)));
        if (!data_) throw std::bad_alloc();
        next_ = data_.get();
    }
    T* get() const { return data_.get(); }

    // The next part of the buffer.
    T* take(index_t size) {
        T* part = next_;
        next_ += lines(size) * (kLine / sizeof(T));
        return part;
    }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    static std::size_t lines(index_t size) { return (size * sizeof(T) + kLine - 1) / kLine; }

    std::unique_ptr<T, Free> data_;
    T* next_;
};

}  // namespace clipfast
