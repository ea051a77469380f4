// Runs of numbers in registers, float32 whatever they are in memory; and what turns pairs of them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)  // floats of a register: a longer run goes through memory
constexpr long LANES = 16;
#elif defined(__AVX__)
constexpr long LANES = 8;
#else
constexpr long LANES = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(Bfloat16 x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

inline void narrow(float x, float* to) { *to = x; }

inline void narrow(float x, Bfloat16* to) {  // to the nearest, ties to even, as torch rounds
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    to->bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

inline Lanes load(const float* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <class T>
T upper_half_added(const void* values) {
    T low, high;
    std::memcpy(&low, values, sizeof low);
    std::memcpy(&high, static_cast<const char*>(values) + sizeof low, sizeof high);
    return low + high;
}

inline float total(Four x) { return (x[0] + x[1]) + (x[2] + x[3]); }
#if defined(__AVX__)
inline float total(Eight x) { return total(upper_half_added<Four>(&x)); }
#endif
#if defined(__AVX512F__)
inline float total(Lanes x) { return total(upper_half_added<Eight>(&x)); }
#endif

inline Lanes load(const Bfloat16* p) {
    Halves bits;
    std::memcpy(&bits, p, sizeof bits);
    const Words words = __builtin_convertvector(bits, Words) << 16;
    Lanes x;
    std::memcpy(&x, &words, sizeof x);
    return x;
}

inline void store(Lanes x, float* p) { std::memcpy(p, &x, sizeof x); }

inline void store(Lanes x, Bfloat16* p) {  // as `narrow`, but for numbers that are none
    Words words;
    std::memcpy(&words, &x, sizeof words);
    words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    const Halves bits = __builtin_convertvector(words, Halves);
    std::memcpy(p, &bits, sizeof bits);
}

// e^x of x up to 0, to 2e-7 of itself, and not below e^-87. By 2^n e^r, |r| <= log(2) / 2, and Taylor's
// first terms of e^r.
inline Lanes exponential(Lanes x) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: a number added to it has its whole part in the lowest bits
    const Lanes least = Lanes{} - 87.0f;
    x = x < least ? least : x;
    const Lanes shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes y = r * (1 / 720.0f) + 1 / 120.0f;
    y = y * r + 1 / 24.0f;
    y = y * r + 1 / 6.0f;
    y = y * r + 0.5f;
    y = y * r * r + r + 1.0f;
    Words power;
    std::memcpy(&power, &shifted, sizeof power);
    power = (power + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &power, sizeof scale);
    return y * scale;
}

// Pairs of x turned into y, which may be x: 2 i with 2 i + 1 where they are interleaved, i with i + pairs elsewhere.
template <class X, bool INTERLEAVED>
void turned_pairs(const X* x, X* y, const float* cos, const float* sin, float sign, long pairs) {
    constexpr long step = INTERLEAVED ? 2 : 1;
    const long apart = INTERLEAVED ? 1 : pairs;
    for (long i = 0; i < pairs; i++) {
        const float a = widen(x[i * step]), b = widen(x[i * step + apart]), s = sign * sin[i];
        narrow(a * cos[i] - b * s, y + i * step);
        narrow(b * cos[i] + a * s, y + i * step + apart);
    }
}

}  // namespace
