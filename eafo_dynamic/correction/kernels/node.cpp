/* The autograd node of a corrected activation: what class _Corrected of fused.py does in Python, without Python.

   f(z) = base(z) + c(z) by the functions of native.c, whose addresses Python gives. For float32 in dense memory on the
   CPU, one amplitude a term, the closed form, and a base that those functions compute. Python looks that all of this
   holds; what can only be seen in the backward is looked at here, and handed to Python where it does not. */

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t LEAST_PARALLEL = 32768;   /* as in native.py */

/* as in native.c */
using Forward = void (*)(const float *z, float *out, float *kept, int64_t n, const float *amplitudes, int which,
                         const float *shape, const float *table, int intervals, float half_width, float clamp, int base,
                         float below, int threads);
using Backward = void (*)(const float *z, const float *grad, const float *given, float *out, int64_t n,
                          const float *amplitudes, int which, const float *shape, const float *table, int intervals,
                          float half_width, float clamp, int base, float below, int threads, double *partial,
                          float *by_amplitudes);

Forward forward_kernel;
Backward backward_kernel;
float clamp, half_width;

/* For each user of this library, the backward of the node in Python, with the gradients that it finds or None. Never
   destroyed: at the end of the process Python may be gone before this library is. */
std::vector<py::function> &in_python() {
    static auto *functions = new std::vector<py::function>();
    return *functions;
}

/* While it lives, torch leaves new memory as it is; with deterministic algorithms it would fill it. */
struct Unfilled {
    bool fills = at::globalContext().deterministicFillUninitializedMemory();
    Unfilled() { if (fills) at::globalContext().setDeterministicFillUninitializedMemory(false); }
    ~Unfilled() { if (fills) at::globalContext().setDeterministicFillUninitializedMemory(true); }
};

/* Memory all of which is going to be written. */
Tensor uninitialised_like(const Tensor &values) {
    Unfilled unfilled;
    return at::empty_like(values);
}

int threads_for(int64_t n) { return n >= LEAST_PARALLEL ? at::get_num_threads() : 1; }

/* Whether a tensor is an ordinary one, whose memory holds its numbers: not one of a transform or of a batch of gradients.
   */
bool is_plain(const Tensor &tensor) {
    bool is_float = tensor.scalar_type() == at::kFloat && tensor.is_cpu() && tensor.layout() == at::kStrided;
    bool as_stored = !tensor.is_neg() && !tensor._is_zerotensor();
    return is_float && as_stored && (tensor.key_set() & at::kTensorSubclassLike).empty();
}

bool has_tangent(const Tensor &tensor) { return tensor._fw_grad(0).defined(); }

bool in_a_transform() {
    return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool lie_alike(const Tensor &one, const Tensor &other) {
    return (one.is_contiguous() && other.is_contiguous()) || one.strides() == other.strides();
}

struct Corrected : public torch::autograd::Function<Corrected> {
    /* which: sum of the codes of the terms; base: code of the base; below: its slope for z < 0; user: number of the function
       in Python. */
    static Tensor forward(AutogradContext *ctx, const Tensor &z, const Tensor &amplitudes, const Tensor &shape,
                          int64_t which, int64_t base, double below, int64_t user) {
        Tensor out = uninitialised_like(z);
        int64_t n = z.numel();
        forward_kernel(z.const_data_ptr<float>(), out.mutable_data_ptr<float>(), nullptr, n,
                       amplitudes.const_data_ptr<float>(), static_cast<int>(which), shape.const_data_ptr<float>(), nullptr,
                       0, half_width, clamp, static_cast<int>(base), static_cast<float>(below), threads_for(n));
        ctx->save_for_backward({z, amplitudes, shape});
        ctx->saved_data["which"] = which;
        ctx->saved_data["base"] = base;
        ctx->saved_data["below"] = below;
        ctx->saved_data["user"] = user;
        return out;
    }

    static variable_list backward(AutogradContext *ctx, variable_list grads) {
        variable_list found(7);
        Tensor grad = grads[0];
        if (!grad.defined()) return found;
        variable_list saved = ctx->get_saved_variables();
        const Tensor &z = saved[0], &amplitudes = saved[1], &shape = saved[2];
        int64_t which = ctx->saved_data["which"].toInt();
        bool by_z = ctx->needs_input_grad(0), by_amplitudes = ctx->needs_input_grad(1);
        /* what has been saved may be other tensors than those of the forward: hooks put them away and bring them back */
        bool usual = is_plain(grad) && is_plain(z) && z.is_non_overlapping_and_dense() && is_plain(amplitudes)
            && amplitudes.is_contiguous() && is_plain(shape) && shape.is_contiguous() && z.sizes() == grad.sizes();
        int64_t base = ctx->saved_data["base"].toInt();
        double below = ctx->saved_data["below"].toDouble();
        if (!usual || at::GradMode::is_enabled() || in_a_transform() || has_tangent(grad)) {
            py::gil_scoped_acquire acquired;
            const py::function &gradients = in_python().at(ctx->saved_data["user"].toInt());
            py::tuple both = gradients(grad, z, amplitudes, shape, which, base, below, by_z, by_amplitudes);
            for (int each = 0; each < 2; each++)
                if (!both[each].is_none()) found[each] = both[each].cast<Tensor>();
            return found;
        }
        if (!lie_alike(grad, z)) grad = uninitialised_like(z).copy_(grad);
        Tensor out = uninitialised_like(z), sums = uninitialised_like(amplitudes);
        int64_t n = z.numel();
        backward_kernel(z.const_data_ptr<float>(), grad.const_data_ptr<float>(), nullptr, out.mutable_data_ptr<float>(), n,
                        amplitudes.const_data_ptr<float>(), static_cast<int>(which), shape.const_data_ptr<float>(), nullptr,
                        0, half_width, clamp, static_cast<int>(base), static_cast<float>(below), threads_for(n), nullptr,
                        sums.mutable_data_ptr<float>());
        if (by_z) found[0] = out;
        if (by_amplitudes) found[1] = sums;
        return found;
    }
};

Tensor corrected(const Tensor &z, const Tensor &amplitudes, const Tensor &shape, int64_t which, int64_t base, double below,
                 int64_t user) {
    return Corrected::apply(z, amplitudes, shape, which, base, below, user);
}

}

PYBIND11_MODULE(eafo_dynamic_node, module) {
    module.def("attach", [](int64_t forward, int64_t backward, double largest_u, double end_of_tables, py::function other) {
        forward_kernel = reinterpret_cast<Forward>(forward);
        backward_kernel = reinterpret_cast<Backward>(backward);
        clamp = static_cast<float>(largest_u);
        half_width = static_cast<float>(end_of_tables);
        in_python().push_back(std::move(other));
        return in_python().size() - 1;
    });
    module.def("corrected", corrected);
}
