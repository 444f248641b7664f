// One file per instruction set. Each includes this header first, opens its target region and includes entry.h inside
// it: what stands above the region is shared, what stands below it is compiled once per instruction set.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "buffer.h"
#include "cross_entropy.h"
#include "dtypes.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__x86_64__)
#define CLIPFAST_X86
#endif

#define CLIPFAST_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define CLIPFAST_TARGET(set) CLIPFAST_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define CLIPFAST_TARGET_END CLIPFAST_PRAGMA(clang attribute pop)
#else
#define CLIPFAST_TARGET(set) CLIPFAST_PRAGMA(GCC target(set))
// GCC instantiates templates at the end of the file, in the region that is then open.
#define CLIPFAST_TARGET_END
#endif

namespace clipfast {

Kernels portable();
Kernels avx2();
Kernels avx512();
Kernels avx512_bf16();
Kernels amx();

}  // namespace clipfast
