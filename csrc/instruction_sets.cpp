#include "instruction_sets.h"

namespace clipfast {

const std::vector<Kernels>& instruction_sets() {
    static const std::vector<Kernels> all = {
#ifdef CLIPFAST_X86
        amx(), avx512_bf16(), avx512(), avx2(),
#endif
        portable()};
    return all;
}

}  // namespace clipfast
