// The functions that an instruction set's file offers: a kernel for the block's dtype, then one of its passes.
// Included once per instruction set, like tile_loop.h.
#pragma once

#include "distillation.h"
#include "matches.h"
#include "sigmoid.h"
#include "softmax.h"
#include "tile_loop.h"

namespace clipfast {
namespace {

// The passes of the kernels that Choice chooses: Choice::with_kernel(&Kernels::pass, visit, block, execution,
// arguments...) calls visit(kernel), or has another instruction set's `pass` do it.
template <class Choice>
struct Passes {
    static void forward(const Block& block, const Execution& execution, const Matches& matches, const Statistics& out) {
        Choice::with_kernel(
            &Kernels::forward,
            [&](auto&& kernel) {
                SoftmaxStatistics statistics(kernel.chunks(), matches, out);
                kernel.scan(statistics, out.kept);
            },
            block, execution, matches, out);
    }

    static void matches(const Block& block, const Execution& execution, const Matches& out) {
        Choice::with_kernel(
            &Kernels::matches,
            [&](auto&& kernel) {
                BestMatches best(kernel.chunks(), out);
                kernel.scan(best);
            },
            block, execution, out);
    }

    static Scalars backward(const Block& block, const Execution& execution, const Weights& in, const Gradients& out) {
        return Choice::with_kernel(
            &Kernels::backward,
            [&](auto&& kernel) {
                SoftmaxGradient gradient(kernel.chunks(), kernel.logits(), in);
                return Scalars{kernel.differentiate(gradient, out, in.kept), 0};
            },
            block, execution, in, out);
    }

    static Scalars symmetric(const Block& block, const Execution& execution, const Gradients& out) {
        return Choice::with_kernel(
            &Kernels::symmetric,
            [&](auto&& kernel) {
                SymmetricCrossEntropy loss(block.n(), block.m());
                SoftmaxStatistics statistics(kernel.chunks(), {}, loss.statistics());
                SoftmaxGradient gradient(kernel.chunks(), kernel.logits(), loss.weights());
                Scalars sums;
                const double dscale = kernel.scan_and_differentiate(
                    statistics, [&](Team& team) { sums = loss.differentiate(1, &team); }, gradient, out);
                return Scalars{dscale, sums.dbias, sums.loss};
            },
            block, execution, out);
    }

    static Scalars sigmoid(const Block& block, const Execution& execution, double unit, double* row_loss,
                           const Gradients& out) {
        return Choice::with_kernel(
            &Kernels::sigmoid,
            [&](auto&& kernel) {
                Sigmoid objective(kernel.chunks(), kernel.logits(), unit, row_loss);
                const double dscale = kernel.run(objective, out);
                return Scalars{dscale, objective.dbias()};
            },
            block, execution, unit, row_loss, out);
    }

    static Scalars distillation(const Block& block, const Execution& execution, const Weights& in, const Block& teacher,
                                const Weights& teacher_in, const Crosses& crosses, const Gradients& out) {
        return Choice::with_kernel(
            &Kernels::distillation,
            [&](auto&& kernel) {
                auto objective = distillation_of(kernel, in, teacher, teacher_in, crosses);
                return Scalars{kernel.run(objective, out), 0};
            },
            block, execution, in, teacher, teacher_in, crosses, out);
    }

    static index_t workspace_bytes(const Block& block, const Execution& execution, const Needs& needs) {
        return Choice::with_kernel(
            &Kernels::workspace_bytes,
            [&](auto&& kernel) {
                double* const some = reinterpret_cast<double*>(kLine);  // never read
                BestMatches best(kernel.chunks(), {});
                SoftmaxStatistics statistics(kernel.chunks(), {needs.ranks ? some : nullptr, nullptr}, {});
                SoftmaxGradient gradient(kernel.chunks(), kernel.logits(), {});
                Sigmoid sigmoid(kernel.chunks(), kernel.logits(), 1, nullptr);
                auto distillation = distillation_of(kernel, {}, block, {}, {});
                return std::max({kernel.scan_bytes(statistics), kernel.differentiate_bytes(gradient),
                                 needs.ranks ? kernel.scan_bytes(best) : 0,
                                 needs.symmetric ? kernel.scan_and_differentiate_bytes(statistics, gradient) +
                                                       SymmetricCrossEntropy::bytes(block.n(), block.m())
                                                 : 0,
                                 needs.sigmoid ? kernel.differentiate_bytes(sigmoid) : 0,
                                 needs.distillation ? kernel.differentiate_bytes(distillation) : 0});
            },
            block, execution, needs);
    }

  private:
    template <class Tiles, class Element>
    static Distillation<Tiles, Element> distillation_of(const Kernel<Tiles, Element>& kernel, const Weights& in,
                                                        const Block& teacher, const Weights& teacher_in,
                                                        const Crosses& crosses) {
        return {kernel.chunks(), kernel.logits(), in, teacher, teacher_in, crosses};
    }
};

template <class Isa>
struct Entry {
    template <class Pass, class Visit, class... Arguments>
    static auto with_kernel(Pass, const Visit& visit, const Block& block, const Execution& execution,
                            const Arguments&...) {
        switch (block.dtype) {
            case DType::float64: return visit(Kernel<Tile<Isa, double>, double>(block, execution));
            case DType::bfloat16: return visit(Kernel<Tile<Isa, float>, bfloat16>(block, execution));
            case DType::float16: return visit(Kernel<Tile<Isa, float>, float16>(block, execution));
            default: return visit(Kernel<Tile<Isa, float>, float>(block, execution));
        }
    }

    // Calls visit(vector, first, count) for `count` numbers, a vector at a time.
    template <class T, class Visit>
    static void for_vectors(const T* x, index_t count, const Visit& visit) {
        constexpr int W = Tile<Isa, T>::W;
        for (index_t i = 0; i < count; i += W)
            visit(Tile<Isa, T>::load_elements(x + i, 1, count - i), i, std::min<index_t>(W, count - i));
    }
    // Calls visit(T()) with the dtype's T.
    template <class Visit>
    static void with_type(DType dtype, const Visit& visit) {
        if (dtype == DType::float64) visit(double());
        else visit(float());
    }

    static double multiply_adds(DType dtype, index_t rounds) {
        double operations = 0;
        with_type(dtype, [&](auto type) { operations = Tile<Isa, decltype(type)>::multiply_adds(rounds); });
        return operations;
    }

    static void exp2_all(DType dtype, const void* x, void* out, index_t count) {
        with_type(dtype, [&](auto type) {
            using T = decltype(type);
            using Lanes = Tile<Isa, T>;
            for_vectors(static_cast<const T*>(x), count, [&](typename Lanes::V v, index_t i, index_t size) {
                Lanes::store_elements(static_cast<T*>(out) + i, exp2<T, Lanes::W>(v), size);
            });
        });
    }

    static void softplus_and_sigmoid_all(DType dtype, const void* x, void* softplus, void* sigmoid, index_t count) {
        with_type(dtype, [&](auto type) {
            using T = decltype(type);
            using Lanes = Tile<Isa, T>;
            for_vectors(static_cast<const T*>(x), count, [&](typename Lanes::V v, index_t i, index_t size) {
                const auto both = softplus_and_sigmoid<T, Lanes::W>(v);
                Lanes::store_elements(static_cast<T*>(softplus) + i, both.softplus, size);
                Lanes::store_elements(static_cast<T*>(sigmoid) + i, both.sigmoid, size);
            });
        });
    }

    static constexpr Kernels kernels(const char* name, bool (*available)()) {
        using P = Passes<Entry>;
        return {name,         available,  P::forward,      P::matches,         P::backward,
                P::symmetric, P::sigmoid, P::distillation, P::workspace_bytes, multiply_adds,
                exp2_all,     softplus_and_sigmoid_all};
    }
};

}  // namespace
}  // namespace clipfast
