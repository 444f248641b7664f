// Uninitialized memory, aligned to cache lines.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "block.h"

namespace clipfast {

struct Free {
    void operator()(void* p) const { std::free(p); }
};

template <class T>
class Buffer {
  public:
    explicit Buffer(index_t size) {
        constexpr std::size_t line = 64;
        const std::size_t bytes = (size * sizeof(T) + line - 1) / line * line;
        data_.reset(static_cast<T*>(std::aligned_alloc(line, bytes ? bytes : line)));
        if (!data_) throw std::bad_alloc();
    }
    T* get() const { return data_.get(); }

  private:
    std::unique_ptr<T, Free> data_;
};

}  // namespace clipfast
