// What stands between the products of a block: SwiGLU and rotary embeddings of whole tensors, and their gradients.
// Each value is read and written once, and float32 in between.

#pragma once

#include <algorithm>

#include "native_lanes.h"

namespace {

template <class X>
Lanes get(const X* p, long left) {  // the first of `left` values, and zeros behind the last
    if (left >= LANES) return load(p);
    X part[LANES] = {};
    std::copy_n(p, left, part);
    return load(part);
}

template <class X>
void put(Lanes x, X* p, long left) {
    if (left >= LANES) return store(x, p);
    X part[LANES];
    store(x, part);
    std::copy_n(part, left, p);
}

inline Lanes rounded(Lanes x, const float*) { return x; }

inline Lanes rounded(Lanes x, const Bfloat16*) {
    Bfloat16 bits[LANES];
    store(x, bits);
    return load(bits);
}

inline Lanes sigmoid(Lanes x) {
    const Lanes below = exponential(x < 0 ? x : -x);
    return (x < 0 ? below : Lanes{} + 1) / (below + 1);
}

// y (n) = silu(gate) * up of x = gate | up (2 n); or, where there is the gradient dy, the one by x. Every product is
// rounded as torch's operators round it.
template <class X>
void swiglu_of(const X* x, const X* dy, X* y, long n) {
    for (long i = 0; i < n; i += LANES) {
        const Lanes gate = get(x + i, n - i), up = get(x + n + i, n - i), open = sigmoid(gate);
        const Lanes silu = rounded(gate * open, x);
        if (!dy) {
            put(silu * up, y + i, n - i);
            continue;
        }
        const Lanes by = get(dy + i, n - i);
        put(rounded(by * up, x) * open * (1 + gate * (1 - open)), y + i, n - i);
        put(by * silu, y + n + i, n - i);
    }
}

// What turns: x (batch, tokens, heads, dim), whose heads and tokens lie `strides` apart, into a contiguous y.
struct Turn {
    int64_t batch, tokens, heads, dim;
    int64_t batch_stride, token_stride, head_stride;
    const float *cos, *sin;  // (batch or 1, tokens, pairs)
    int64_t pairs, table_batch_stride;
    int64_t interleaved;  // pairs 2 i with 2 i + 1, not i with i + pairs
    double sign;          // -1 turns back
};

template <class X>
void turn_of(const Turn& t, const X* x, X* y, long row) {
    const long b = row / t.tokens, token = row % t.tokens, table = b * t.table_batch_stride + token * t.pairs;
    x += b * t.batch_stride + token * t.token_stride, y += row * t.heads * t.dim;
    const auto one = t.interleaved ? turned_pairs<X, true> : turned_pairs<X, false>;
    for (long h = 0; h < t.heads; h++, x += t.head_stride, y += t.dim) {
        one(x, y, t.cos + table, t.sin + table, float(t.sign), t.pairs);
        std::copy(x + 2 * t.pairs, x + t.dim, y + 2 * t.pairs);
    }
}

template <class X>
void swiglus(const void* x, const void* dy, void* y, long rows, long n, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const X* by = dy ? static_cast<const X*>(dy) + r * n : nullptr;
        swiglu_of(static_cast<const X*>(x) + 2 * r * n, by, static_cast<X*>(y) + r * (dy ? 2 * n : n), n);
    }
}

template <class X>
void turns(const Turn& t, const void* x, void* y, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < t.batch * t.tokens; r++) turn_of(t, static_cast<const X*>(x), static_cast<X*>(y), r);
}

}  // namespace
