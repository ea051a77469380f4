// Products of a matrix and a few rows, and norms: what all of the compiled code is made of. All sums are float32.
//
// Every weight is read once a token, so the floor is the time of reading them. What keeps to it: each thread reads a few
// runs of rows of its own at once, each in the order of memory, and bfloat16 becomes float32 in registers.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "native_lanes.h"

namespace {

// The structs are those of native.py.

struct Matrix {       // y = W x + b
    const void* w;    // (out, in), rows one behind the other; null: no matrix
    const float* b;   // (out,) or null
    int64_t out, in;
    int64_t bfloat16;  // the type of w, float32 otherwise
};

struct Norm {
    int64_t kind;  // 0: none, 1: by the root of the mean square, 2: by mean and variance
    const float *gain, *bias;  // or null
    double eps;
};

// The products of two runs of 2 * LANES values, bfloat16 ones by pairs: a word has an even one below and an odd one
// above, so that x must lie by `paired`.
inline void add_products(const float* w, const float* x, Lanes& even, Lanes& odd) {
    even += load(w) * load(x);
    odd += load(w + LANES) * load(x + LANES);
}

inline void add_products(const Bfloat16* w, const float* x, Lanes& even, Lanes& odd) {
    Words words, low, high;
    std::memcpy(&words, w, sizeof words);
    low = words << 16, high = words & 0xffff0000u;
    Lanes a, b;
    std::memcpy(&a, &low, sizeof a);
    std::memcpy(&b, &high, sizeof b);
    even += a * load(x);
    odd += b * load(x + LANES);
}

struct Rows {
    const float* first;
    long stride;
};

// Rows of n values as `dots` wants them beside weights of type W: even before odd in every whole run of 2 * LANES.
Rows paired(const float*, Rows x, long, long) { return x; }

Rows paired(const Bfloat16*, Rows x, long rows, long n) {
    thread_local std::vector<float> kept;
    if (long(kept.size()) < rows * n) kept.resize(rows * n);
    for (long r = 0; r < rows; r++) {
        const float* from = x.first + r * x.stride;
        float* to = kept.data() + r * n;
        long i = 0;
        for (; i + 2 * LANES <= n; i += 2 * LANES)
            for (long j = 0; j < LANES; j++) to[i + j] = from[i + 2 * j], to[i + LANES + j] = from[i + 2 * j + 1];
        std::copy(from + i, from + n, to + i);
    }
    return {kept.data(), n};
}

// Rows of a matrix that are multiplied at once, each from pages of its own: more reads are then under way than a
// processor comes to by itself, and its prefetchers do not see two rows of one page.
constexpr long STREAMS = 4;
constexpr long PAGE = 4096;  // bytes

// What is left of a row, and not inlined: whether products and sums are fused would else differ from place to place.
template <class W>
__attribute__((noinline)) float rest(const W* w, const float* x, long n, float sum) {
    for (long i = 0; i < n; i++) sum += widen(w[i]) * x[i];
    return sum;
}

// x times each of R rows of n weights that begin `apart` one from the other; the sum of a row does not depend on R.
template <long R, class W>
void dots(const W* w, long apart, const float* x, long n, float* sums) {
    Lanes even[R] = {}, odd[R] = {};
    long i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES)
        for (long r = 0; r < R; r++) add_products(w + r * apart + i, x + i, even[r], odd[r]);
    for (long r = 0; r < R; r++) sums[r] = rest(w + r * apart + i, x + i, n - i, total(even[r] + odd[r]));
}

struct Share {  // of a thread
    long index, count;
    long begin(long n) const { return n * index / count; }
    long end(long n) const { return n * (index + 1) / count; }
    long size(long n) const { return end(n) - begin(n); }
};

template <class W>
void times(const Matrix& m, long first, long count, Rows x, float* y, long y_stride, long rows) {
    const W* w = static_cast<const W*>(m.w) + first * m.in;
    const long run = count / STREAMS, apart = run * m.in;
    const bool streams = apart * long(sizeof *w) >= PAGE;
    x = paired(w, x, rows, m.in);
    for (long o = 0; streams && o < run; o++)
        for (long r = 0; r < rows; r++) {
            float sums[STREAMS];
            dots<STREAMS>(w + o * m.in, apart, x.first + r * x.stride, m.in, sums);
            for (long s = 0; s < STREAMS; s++) y[r * y_stride + s * run + o] = sums[s];
        }
    for (long o = streams ? STREAMS * run : 0; o < count; o++)
        for (long r = 0; r < rows; r++) dots<1>(w + o * m.in, 0, x.first + r * x.stride, m.in, y + r * y_stride + o);
    for (long o = 0; m.b && o < count; o++)
        for (long r = 0; r < rows; r++) y[r * y_stride + o] += m.b[first + o];
}

// `count` outputs of W x + b from the `first` on, for each of the rows.
void product(const Matrix& m, long first, long count, const float* x, long x_stride, float* y, long y_stride,
             long rows) {
    (m.bfloat16 ? times<Bfloat16> : times<float>)(m, first, count, {x, x_stride}, y, y_stride, rows);
}

void normalise(const Norm& norm, const float* x, float* y, long n) {
    if (norm.kind == 0) {
        if (x != y) std::memcpy(y, x, n * sizeof *x);
        return;
    }
    double mean = 0;
    if (norm.kind == 2) {
        Lanes sum = {};
        long i = 0;
        for (; i + LANES <= n; i += LANES) sum += load(x + i);
        mean = total(sum);
        for (; i < n; i++) mean += x[i];
        mean /= n;
    }
    for (long i = 0; i < n; i++) y[i] = x[i] - float(mean);
    float square;
    dots<1>(y, 0, y, n, &square);
    float scale = float(1 / std::sqrt(double(square) / n + norm.eps));
    for (long i = 0; i < n; i++) {
        float value = y[i] * scale;
        if (norm.gain) value *= norm.gain[i];
        y[i] = norm.bias ? value + norm.bias[i] : value;
    }
}

}  // namespace
